"""The pool does what psycopg_pool's does, where it does not promise more."""

from __future__ import annotations

import asyncio
import contextlib
import re
import sys
import threading
import time
import warnings
from collections.abc import AsyncIterator, Callable
from functools import partial
from typing import Any

import psycopg
import psycopg_pool
import pytest
from psycopg.conninfo import make_conninfo
from psycopg.rows import DictRow, dict_row
from psycopg_pool import AsyncConnectionPool

from poolkeeper import (
    AcquireTimeout,
    DuplicatePoolWarning,
    NotOpenError,
    PoolManager,
    TooManyWaitersError,
)
from tests.support.inside import idle_of
from tests.support.server import admin, kill_sessions
from tests.support.waiting import until

MakeManager = Callable[..., PoolManager[Any]]
HERE = "tests/integration/test_psycopg_semantics.py"


@pytest.fixture
def table(dsn: str, request: pytest.FixtureRequest) -> Any:
    """The name of an empty table of the test's own."""
    name = "semantics_" + re.sub(r"\W", "_", request.node.name)[:50].lower()
    admin(dsn, f"drop table if exists {name}")
    admin(dsn, f"create table {name} (n int)")
    yield name
    admin(dsn, f"drop table {name}")


@contextlib.asynccontextmanager
async def pool_of(kind: str, dsn: str, **arguments: Any) -> AsyncIterator[AsyncConnectionPool[Any]]:
    """An open pool: psycopg_pool's own, or ours through a manager."""
    if kind == "bare":
        async with AsyncConnectionPool(dsn, open=False, **arguments) as pool:
            await pool.wait()
            yield pool
    else:
        async with PoolManager(dsn, **arguments) as manager:
            yield manager.pool


BOTH = pytest.mark.parametrize("kind", ["bare", "bound"])

# --- transactions and broken connections --------------------------------------------------------


@BOTH
async def test_a_block_commits_on_success_and_rolls_back_on_error(
    kind: str, dsn: str, table: str
) -> None:
    async with pool_of(kind, dsn, min_size=1, max_size=1) as pool:
        async with pool.connection() as conn:
            await conn.execute(f"insert into {table} values (1)")
        assert admin(dsn, f"select n from {table}") == [(1,)]
        with pytest.raises(KeyError):
            async with pool.connection() as conn:
                await conn.execute(f"insert into {table} values (2)")
                raise KeyError
        assert admin(dsn, f"select n from {table}") == [(1,)]
        with pytest.raises(asyncio.CancelledError):
            async with pool.connection() as conn:
                await conn.execute(f"insert into {table} values (3)")
                raise asyncio.CancelledError
        assert admin(dsn, f"select n from {table}") == [(1,)]


@BOTH
async def test_a_connection_given_back_in_a_transaction_is_rolled_back(
    kind: str, dsn: str, table: str
) -> None:
    async with pool_of(kind, dsn, min_size=1, max_size=1) as pool:
        for fault in ("", "selec"):
            conn = await pool.getconn()
            pid = conn.info.backend_pid
            await conn.execute(f"insert into {table} values (1)")
            if fault:
                with pytest.raises(psycopg.errors.SyntaxError):
                    await conn.execute(fault)
            await pool.putconn(conn)
            async with pool.connection() as other:
                assert other.info.backend_pid == pid
                assert await (await other.execute(f"select n from {table}")).fetchall() == []


@pytest.mark.direct
@BOTH
async def test_a_connection_that_breaks_in_use_is_replaced(kind: str, dsn: str) -> None:
    async with pool_of(kind, dsn, min_size=1, max_size=1, timeout=5) as pool:
        with pytest.raises(psycopg.OperationalError):
            async with pool.connection() as conn:
                pid = conn.info.backend_pid
                admin(dsn, "select pg_terminate_backend(%s, 5000)", (pid,))
                await conn.execute("select 1")
        async with pool.connection() as conn:
            assert conn.info.backend_pid != pid
        assert pool.get_stats()["returns_bad"] == 1


# --- callbacks ------------------------------------------------------------------------------------


class Calls:
    """What the callbacks were called with, in order."""

    def __init__(self) -> None:
        self.log: list[Any] = []
        self.sessions: list[int] = []

    def note(self, what: str, conn: Any) -> None:
        pid = conn.info.backend_pid
        if pid not in self.sessions:
            self.sessions.append(pid)
        kind = "connection" if isinstance(conn, psycopg.AsyncConnection) else "something else"
        status = conn.info.transaction_status.name
        self.log.append((what, kind, self.sessions.index(pid), status))

    async def configure(self, conn: Any) -> None:
        self.note("configure", conn)

    async def reset(self, conn: Any) -> None:
        self.note("reset", conn)

    async def check(self, conn: Any) -> None:
        self.note("check", conn)


async def exercise(pool: AsyncConnectionPool[Any], calls: Calls) -> None:
    """Do a bit of everything that calls a callback."""
    for step in ("commit", "error", "transaction", "closed"):
        calls.log.append(step)
        if step == "commit":
            async with pool.connection() as conn:
                await conn.execute("select 1")
        elif step == "error":
            with pytest.raises(psycopg.errors.SyntaxError):
                async with pool.connection() as conn:
                    await conn.execute("selec")
        elif step == "transaction":
            conn = await pool.getconn()
            await conn.execute("select 1")
            await pool.putconn(conn)
        else:
            conn = await pool.getconn()
            await conn.close()
            await pool.putconn(conn)
        await until(lambda: pool.get_stats()["pool_available"] == 1)
        del conn
    calls.log.append("check()")
    await pool.check()
    await until(lambda: pool.get_stats()["pool_available"] == 1)
    calls.log.append("drain()")
    await pool.drain()
    async with pool.connection() as conn:
        await conn.execute("select 1")
    await until(lambda: pool.get_stats()["pool_available"] == 1)


async def test_callbacks_are_called_as_psycopg_pool_calls_them(dsn: str) -> None:
    logs = {}
    for kind in ("bare", "bound"):
        calls = Calls()
        arguments = {"configure": calls.configure, "reset": calls.reset, "check": calls.check}
        async with pool_of(kind, dsn, min_size=1, max_size=1, timeout=5, **arguments) as pool:
            await exercise(pool, calls)
        logs[kind] = calls.log
    assert logs["bound"] == logs["bare"]
    called = [entry[0] for entry in logs["bound"] if isinstance(entry, tuple)]
    assert {"configure", "reset", "check"} == set(called)


@pytest.mark.direct
@BOTH
async def test_a_connection_that_fails_its_check_is_replaced(kind: str, dsn: str) -> None:
    async with pool_of(
        kind,
        dsn,
        min_size=1,
        max_size=1,
        timeout=10,
        check=AsyncConnectionPool.check_connection,
        kwargs={"application_name": f"check-{kind}"},
    ) as pool:
        async with pool.connection() as conn:
            pid = conn.info.backend_pid
        kill_sessions(dsn, f"check-{kind}")
        async with pool.connection() as conn:
            assert conn.info.backend_pid != pid
            assert await (await conn.execute("select 1")).fetchone() == (1,)
        assert pool.get_stats()["connections_lost"] == 1


@pytest.mark.direct
async def test_a_failed_connection_is_reported_to_reconnect_failed(
    dsn: str, make_manager: MakeManager
) -> None:
    name = "semantics-reconnect"
    target = [dsn]
    failed: list[Any] = []
    db = make_manager(
        lambda: target[0],
        min_size=1,
        max_size=1,
        timeout=5,
        reconnect_timeout=0.1,
        reconnect_failed=failed.append,
        application_name=name,
    )
    await db.open()
    target[0] = make_conninfo(dsn, port=1)
    kill_sessions(dsn, name)
    with contextlib.suppress(psycopg.OperationalError):
        await db.fetchval("select 1")
    await until(lambda: bool(failed))
    assert failed[0] is db.pool


@BOTH
async def test_a_connection_found_closed_before_its_first_use_does_not_shrink_the_pool(
    kind: str, dsn: str
) -> None:
    async with pool_of(
        kind,
        dsn,
        min_size=1,
        max_size=1,
        timeout=5,
        check=AsyncConnectionPool.check_connection,
    ) as pool:
        (idle,) = idle_of(pool)
        idle.pgconn.finish()
        for _ in range(3):
            async with pool.connection() as conn:
                assert await (await conn.execute("select 1")).fetchone() == (1,)
        assert pool.get_stats()["connections_lost"] == 1


# --- statistics -----------------------------------------------------------------------------------


async def exercise_for_stats(pool: AsyncConnectionPool[Any]) -> None:
    """Have every counter count."""
    async with pool.connection():
        waiting = [asyncio.ensure_future(pool.getconn(timeout=5)) for _ in range(2)]
        await asyncio.sleep(0.01)
        # One fits in the line and times out. (There it would go on to count as waiting.)
        failed = await asyncio.gather(
            *(pool.getconn(timeout=0.05) for _ in range(5)), return_exceptions=True
        )
        assert sum(isinstance(error, psycopg_pool.PoolTimeout) for error in failed) == 1
        assert sum(isinstance(error, psycopg_pool.TooManyRequests) for error in failed) == 4
    for task in waiting:
        await pool.putconn(await task)
    conn = await pool.getconn()
    await conn.close()
    await pool.putconn(conn)
    await until(lambda: pool.get_stats()["pool_available"] == 1)
    # One that is found broken when it is to be handed out.
    (idle,) = idle_of(pool)
    idle.pgconn.finish()
    async with pool.connection():
        pass
    await until(lambda: pool.get_stats()["pool_available"] == 1)


@pytest.mark.direct
async def test_statistics_have_the_same_keys_and_count_the_same(dsn: str) -> None:
    arguments: Any = {
        "min_size": 1,
        "max_size": 1,
        "timeout": 5,
        "max_waiting": 3,
        "check": AsyncConnectionPool.check_connection,
    }
    found = {}
    for kind in ("bare", "bound"):
        async with pool_of(kind, dsn, **arguments) as pool:
            at_first = pool.get_stats()
            await exercise_for_stats(pool)
            await asyncio.sleep(0.1)
            popped = pool.pop_stats()
            found[kind] = (set(at_first), popped, pool.pop_stats())
    bare, bound = found["bare"], found["bound"]
    assert bound[0] == bare[0]
    assert set(bound[1]) == set(bare[1])
    assert set(bound[2]) == set(bare[2])
    exact = set(bound[1]) - {"usage_ms", "requests_wait_ms", "connections_ms"}
    assert {key: bound[1][key] for key in exact} == {key: bare[1][key] for key in exact}
    assert all(bound[1][key] > 0 for key in ("usage_ms", "requests_wait_ms"))


async def test_statistics_that_another_thread_reads_lose_no_count(dsn: str) -> None:
    """A thread that collects metrics may ask at any time."""
    interval = sys.getswitchinterval()
    async with PoolManager(dsn, min_size=1, max_size=1) as manager:
        ended = threading.Event()
        manager.pool.pop_stats()

        def collect() -> None:
            while not ended.is_set():
                manager.pool.get_stats()

        thread = threading.Thread(target=collect)
        sys.setswitchinterval(1e-6)
        try:
            thread.start()
            for _ in range(2_000):
                async with manager.connection():
                    pass
        finally:
            sys.setswitchinterval(interval)
            ended.set()
            thread.join()
        assert manager.pool.pop_stats()["requests_num"] == 2_000
        assert "requests_num" not in manager.pool.get_stats()


async def test_statistics_of_a_pool_that_was_never_opened(dsn: str) -> None:
    bare: AsyncConnectionPool[Any] = AsyncConnectionPool(dsn, open=False)
    assert PoolManager(dsn).pool.get_stats() == bare.get_stats()


# --- size -----------------------------------------------------------------------------------------


@BOTH
async def test_resize_grows_the_pool_and_lets_more_in(kind: str, dsn: str) -> None:
    async with pool_of(kind, dsn, min_size=1, max_size=1, timeout=5) as pool:
        await pool.resize(3, 5)
        assert (pool.min_size, pool.max_size) == (3, 5)
        await until(lambda: pool.get_stats()["pool_available"] == 3)
        async with contextlib.AsyncExitStack() as stack:
            pids = set()
            for _ in range(5):
                conn = await stack.enter_async_context(pool.connection())
                pids.add(conn.info.backend_pid)
            assert len(pids) == 5
            with pytest.raises(psycopg_pool.PoolTimeout):
                await pool.getconn(timeout=0.02)


@BOTH
async def test_resize_takes_what_the_constructor_takes(kind: str, dsn: str) -> None:
    async with pool_of(kind, dsn, min_size=1, max_size=1) as pool:
        for sizes in ((-1, 1), (2, 1), (0, 0)):
            with pytest.raises(ValueError):
                await pool.resize(*sizes)
        assert (pool.min_size, pool.max_size) == (1, 1)


@BOTH
async def test_a_pool_shrinks_to_its_minimum_when_it_has_rest(kind: str, dsn: str) -> None:
    async with pool_of(kind, dsn, min_size=1, max_size=3, timeout=5, max_idle=0.2) as pool:
        async with contextlib.AsyncExitStack() as stack:
            for _ in range(3):
                await stack.enter_async_context(pool.connection())
        assert pool.get_stats()["pool_size"] == 3
        await until(lambda: pool.get_stats()["pool_size"] == 1)
        async with pool.connection() as conn:
            assert await (await conn.execute("select 1")).fetchone() == (1,)


@BOTH
async def test_a_connection_past_its_lifetime_is_replaced(kind: str, dsn: str) -> None:
    async with pool_of(kind, dsn, min_size=1, max_size=1, timeout=5, max_lifetime=0.2) as pool:
        pids = set()
        until_then = time.monotonic() + 10
        while len(pids) < 3 and time.monotonic() < until_then:
            async with pool.connection() as conn:
                pids.add(conn.info.backend_pid)
            await asyncio.sleep(0.05)
        assert len(pids) == 3


@BOTH
async def test_drain_replaces_every_connection(kind: str, dsn: str) -> None:
    async with pool_of(kind, dsn, min_size=2, max_size=2, timeout=5) as pool:
        async with pool.connection() as held:
            async with pool.connection() as idle:
                before = {held.info.backend_pid, idle.info.backend_pid}
            await pool.drain()
            assert await (await held.execute("select 1")).fetchone() == (1,)
        async with pool.connection() as first, pool.connection() as second:
            assert not before & {first.info.backend_pid, second.info.backend_pid}


@pytest.mark.direct
@BOTH
async def test_check_replaces_the_idle_connections_that_are_dead(kind: str, dsn: str) -> None:
    async with pool_of(
        kind,
        dsn,
        min_size=3,
        max_size=3,
        timeout=5,
        kwargs={"application_name": f"dead-{kind}"},
    ) as pool:
        assert kill_sessions(dsn, f"dead-{kind}") == 3
        await pool.check()
        await until(lambda: pool.get_stats()["pool_available"] == 3)
        for _ in range(3):
            async with pool.connection() as conn:
                assert await (await conn.execute("select 1")).fetchone() == (1,)
        assert pool.get_stats()["connections_lost"] == 3


# --- what an acquire may end in ------------------------------------------------------------------


async def test_more_waiters_than_allowed_are_refused(make_manager: MakeManager) -> None:
    db = make_manager(min_size=1, max_size=1, timeout=5, max_waiting=2, name="orders")
    await db.open()
    async with db.connection():
        waiting = [asyncio.ensure_future(db.fetchval("select 1")) for _ in range(2)]
        await asyncio.sleep(0)
        with pytest.raises(psycopg_pool.TooManyRequests) as caught:
            await db.fetchval("select 1")
        assert isinstance(caught.value, TooManyWaitersError)
    assert await asyncio.gather(*waiting) == [1, 1]
    # Nobody waits now; those that were refused or served do not count.
    assert await db.fetchval("select 1") == 1


async def test_waiters_that_gave_up_do_not_count_as_waiting(make_manager: MakeManager) -> None:
    db = make_manager(min_size=1, max_size=1, timeout=5, max_waiting=1, name="orders")
    await db.open()
    async with db.connection():
        for _ in range(3):
            with pytest.raises(AcquireTimeout):
                await db.pool.getconn(timeout=0.01)
        cancelled = asyncio.ensure_future(db.pool.getconn())
        await asyncio.sleep(0)
        cancelled.cancel()
        await asyncio.wait([cancelled])
        assert db.pool.counts()["waiting"] == 0
        assert db.pool.get_stats()["requests_waiting"] == 0
        waiting = asyncio.ensure_future(db.fetchval("select 1"))
        await asyncio.sleep(0)
    assert await waiting == 1


async def test_an_acquire_that_times_out_is_a_pool_timeout(make_manager: MakeManager) -> None:
    db = make_manager(min_size=1, max_size=1, timeout=0.05, name="orders")
    await db.open()
    async with db.connection():
        begin = time.monotonic()
        with pytest.raises(psycopg_pool.PoolTimeout) as caught:
            await asyncio.ensure_future(db.pool.getconn())
        assert 0.04 < time.monotonic() - begin < 20  # the default is 30
    assert isinstance(caught.value, AcquireTimeout)
    assert isinstance(caught.value, psycopg.OperationalError)
    assert "total=1 in_use=1 idle=0 max=1 waiting=0" in str(caught.value)


async def test_waiters_are_served_in_their_order(make_manager: MakeManager) -> None:
    db = make_manager(min_size=1, max_size=1, timeout=5)
    await db.open()
    served: list[int] = []

    async def wait(n: int) -> None:
        async with db.connection():
            served.append(n)

    async with db.connection():
        tasks = []
        for n in range(20):
            tasks.append(asyncio.ensure_future(wait(n)))
            await asyncio.sleep(0)
        tasks[3].cancel()
    await asyncio.wait(tasks)
    assert served == [n for n in range(20) if n != 3]


async def test_a_pool_that_is_not_open_is_a_pool_closed(make_manager: MakeManager) -> None:
    db = make_manager(min_size=1, max_size=1)
    for operation in (db.pool.getconn(), db.pool.resize(1, 1), db.pool.drain(), db.pool.check()):
        with pytest.raises(psycopg_pool.PoolClosed) as caught:
            await operation
        assert isinstance(caught.value, NotOpenError)
    await db.open()
    await db.close()
    with pytest.raises(psycopg_pool.PoolClosed):
        await db.pool.getconn()


# --- where connections come from ---------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("is_async", [False, True], ids=["function", "async function"])
async def test_conninfo_and_kwargs_may_be_functions_called_for_each_connection(
    kind: str, is_async: bool, dsn: str
) -> None:
    calls: list[str] = []

    def conninfo() -> str:
        calls.append("conninfo")
        return make_conninfo(dsn, application_name=f"app-{calls.count('conninfo')}")

    def kwargs() -> dict[str, Any]:
        calls.append("kwargs")
        return {"autocommit": True, "row_factory": dict_row}

    async def async_conninfo() -> str:
        await asyncio.sleep(0)
        return conninfo()

    async def async_kwargs() -> dict[str, Any]:
        await asyncio.sleep(0)
        return kwargs()

    async with pool_of(
        kind,
        async_conninfo if is_async else conninfo,  # type: ignore[arg-type]
        kwargs=async_kwargs if is_async else kwargs,
        min_size=1,
        max_size=2,
        timeout=5,
    ) as pool:
        async with pool.connection() as first, pool.connection() as second:
            names = [
                (await (await conn.execute("show application_name")).fetchone())
                for conn in (first, second)
            ]
            assert names == [{"application_name": "app-1"}, {"application_name": "app-2"}]
            assert first.autocommit
        assert calls == ["conninfo", "kwargs"] * 2


class Tenant(psycopg.AsyncConnection[DictRow]):
    """A connection class of the user's own."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.tenant = "nobody"
        self.row_factory = dict_row

    async def whoami(self) -> Any:
        return await (await self.execute("select %s::text as tenant", (self.tenant,))).fetchone()


async def test_a_connection_class_of_the_users_own(make_manager: MakeManager) -> None:
    db = make_manager(min_size=1, max_size=1, connection_class=Tenant)
    await db.open()
    for _ in range(2):
        async with db.connection() as conn:
            assert isinstance(conn, Tenant)
            assert conn.tenant == "nobody"
            conn.tenant = "acme"
            assert await conn.whoami() == {"tenant": "acme"}
    assert await db.fetchone("select 1 as n") == {"n": 1}


async def test_a_generic_alias_as_connection_class(make_manager: MakeManager) -> None:
    db = make_manager(
        min_size=1,
        max_size=1,
        connection_class=psycopg.AsyncConnection[DictRow],
        kwargs={"row_factory": dict_row},
    )
    await db.open()
    assert await db.fetchone("select 1 as n") == {"n": 1}
    async with db.connection() as conn:
        assert isinstance(conn, psycopg.AsyncConnection)


async def test_a_sqlalchemy_url_from_a_function(dsn: str, make_manager: MakeManager) -> None:
    parts = psycopg.conninfo.conninfo_to_dict(dsn)
    url = "postgresql+psycopg://{user}@{host}:{port}/{dbname}".format(**parts)
    password = str(parts.get("password") or "")
    db = make_manager(lambda: url, min_size=1, max_size=1, kwargs={"password": password})
    await db.open()
    assert await db.fetchval("select 1") == 1


# --- names ----------------------------------------------------------------------------------------


async def app_name(db: PoolManager[Any]) -> Any:
    async with db:
        return await db.fetchval("select current_setting('application_name')")


async def test_the_server_shows_the_pools_name(dsn: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PGAPPNAME", raising=False)
    sizes = {"min_size": 1, "max_size": 1}
    assert await app_name(PoolManager(dsn, name="orders", **sizes)) == "poolkeeper:orders"
    named = make_conninfo(dsn, application_name="mine")
    assert await app_name(PoolManager(named, name="orders", **sizes)) == "mine"
    kwargs = {"application_name": "theirs"}
    assert await app_name(PoolManager(dsn, kwargs=kwargs, **sizes)) == "theirs"
    fallback = {"fallback_application_name": "last"}
    assert await app_name(PoolManager(dsn, kwargs=fallback, **sizes)) == "last"
    assert await app_name(PoolManager(named, application_name="over", **sizes)) == "over"
    monkeypatch.setenv("PGAPPNAME", "environment")
    assert await app_name(PoolManager(dsn, name="orders", **sizes)) == "environment"


async def test_a_pool_without_a_name_gets_one_and_keeps_it(dsn: str) -> None:
    first, second = (PoolManager(dsn, min_size=1, max_size=1) for _ in range(2))
    assert re.fullmatch(r"pool-\d+", first.name)
    assert first.name != second.name
    name = first.name
    assert await app_name(first) == f"poolkeeper:{name}"
    assert await app_name(first) == f"poolkeeper:{name}"
    assert first.pool.name == first.name == name


# --- a second pool --------------------------------------------------------------------------------


async def test_a_second_pool_for_the_same_server_is_warned_of(
    dsn: str, make_manager: MakeManager
) -> None:
    first = make_manager(min_size=1, max_size=1, name="first")
    second = make_manager(min_size=1, max_size=1, name="second")
    await first.open()
    with pytest.warns(DuplicatePoolWarning) as caught:
        await second.open()
    (warning,) = caught
    assert isinstance(warning.message, UserWarning)
    assert re.fullmatch(
        r'pool "second" is the second one open for the same server, database and user on this'
        rf' loop; pool "first" was opened at {HERE}:\d+ in task .*, this one at {HERE}:\d+ in task'
        r" .*\. A pool made per request or per call costs more than no pool: make one and share"
        r" it",
        str(warning.message),
    ), str(warning.message)
    assert warning.filename == __file__
    assert await second.fetchval("select 1") == 1


async def test_the_warning_of_a_second_pool_is_at_the_line_that_opens_it(
    make_manager: MakeManager,
) -> None:
    await make_manager(min_size=1, name="first").open()

    async def enter(second: PoolManager[Any]) -> None:
        async with second:
            pass

    for opening, line in (
        (PoolManager.open, sys._getframe().f_lineno + 6),
        (enter, enter.__code__.co_firstlineno + 1),
        (partial(PoolManager.open, caller="app.py:12"), 12),
    ):
        second = make_manager(min_size=1, name="second")
        with pytest.warns(DuplicatePoolWarning) as caught:
            await opening(second)
        file = "app.py" if line == 12 else __file__
        assert (caught[0].filename, caught[0].lineno) == (file, line)
        await second.close()


@pytest.mark.direct
async def test_no_warning_is_drawn_where_the_second_pool_is_another_thing(
    dsn: str, make_manager: MakeManager
) -> None:
    sizes = {"min_size": 1, "max_size": 1}
    first = make_manager(**sizes)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        await first.open()
        await first.open()  # open already
        other_database = make_manager(make_conninfo(dsn, dbname="template1"), **sizes)
        await other_database.open()
        unknown = make_manager(lambda: dsn, **sizes)
        await unknown.open()
        await first.close()
        await make_manager(**sizes).open()  # after the first was closed
        elsewhere = PoolManager(dsn, **sizes)

        def in_a_loop_of_its_own() -> None:
            async def work() -> None:
                async with elsewhere:
                    await elsewhere.fetchval("select 1")

            asyncio.run(work())

        await asyncio.to_thread(in_a_loop_of_its_own)
