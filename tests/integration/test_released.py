"""A connection, or something made from it, refuses every use after it was given back."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from types import SimpleNamespace
from typing import Any

import psycopg
import pytest
from psycopg.rows import dict_row
from psycopg.types import TypeInfo
from psycopg.types.string import TextLoader
from psycopg_pool import AsyncConnectionPool

from poolkeeper import PoolManager, ReleasedConnectionError
from tests.support.inside import life
from tests.support.server import admin, endless, is_at_work
from tests.support.waiting import eventually

MakeManager = Callable[..., PoolManager[Any]]
HERE = "tests/integration/test_released.py"


@pytest.fixture
def table(dsn: str, request: pytest.FixtureRequest) -> Any:
    """The name of an empty table of the test's own."""
    name = "released_" + re.sub(r"\W", "_", request.node.name)[:50].lower()
    admin(dsn, f"drop table if exists {name}")
    admin(dsn, f"create table {name} (n int)")
    yield name
    admin(dsn, f"drop table {name}")


@pytest.fixture
async def one(make_manager: MakeManager) -> PoolManager[Any]:
    """A manager with a single connection, so that the next borrower gets the same session."""
    db = make_manager(min_size=1, max_size=1, name="orders", timeout=5)
    await db.open()
    return db


# --- what somebody may still hold after the release -------------------------------------------
# Each of them sets the thing up on a connection, and says how it is used late.

Late = Callable[[], Awaitable[Any]]
Setup = Callable[[Any], Awaitable[Late]]


async def execute(conn: Any) -> Late:
    return lambda: conn.execute("select 1")


async def commit(conn: Any) -> Late:
    return conn.commit


async def rollback(conn: Any) -> Late:
    return conn.rollback


async def close(conn: Any) -> Late:
    return lambda: conn.close()


async def set_autocommit(conn: Any) -> Late:
    return lambda: conn.set_autocommit(not conn.autocommit)


async def new_cursor(conn: Any) -> Late:
    async def late() -> None:
        conn.cursor()

    return late


async def new_server_cursor(conn: Any) -> Late:
    async def late() -> None:
        conn.cursor("late")

    return late


async def new_transaction(conn: Any) -> Late:
    async def late() -> None:
        async with conn.transaction():
            pass

    return late


async def new_pipeline(conn: Any) -> Late:
    async def late() -> None:
        async with conn.pipeline():
            pass

    return late


async def new_notifies(conn: Any) -> Late:
    return lambda: anext(conn.notifies(timeout=0))


async def pgconn(conn: Any) -> Late:
    async def late() -> None:
        _ = conn.pgconn

    return late


async def info(conn: Any) -> Late:
    async def late() -> None:
        _ = conn.info.transaction_status

    return late


async def adapters(conn: Any) -> Late:
    async def late() -> None:
        conn.adapters.register_loader("int4", TextLoader)

    return late


async def prepare_threshold(conn: Any) -> Late:
    async def late() -> None:
        conn.prepare_threshold = None

    return late


async def prepared_max(conn: Any) -> Late:
    async def late() -> None:
        conn.prepared_max = 0

    return late


async def cursor(conn: Any) -> Late:
    made = await conn.execute("select 1")
    return lambda: made.execute("select 1")


async def cursor_executemany(conn: Any) -> Late:
    made = conn.cursor()
    return lambda: made.executemany("select %s", [(1,)])


async def cursor_stream(conn: Any) -> Late:
    made = conn.cursor()
    return lambda: anext(made.stream("select 1"))


async def cursor_copy(conn: Any) -> Late:
    made = conn.cursor()

    async def late() -> None:
        async with made.copy("copy (select 1) to stdout"):
            pass

    return late


async def server_cursor(conn: Any) -> Late:
    made = conn.cursor("far")
    await made.execute("select generate_series(1, 100)")
    await made.fetchone()
    made._closed = True  # psycopg warns of one that nobody can close any more
    return made.fetchone


async def server_cursor_close(conn: Any) -> Late:
    made = conn.cursor("far")
    await made.execute("select generate_series(1, 100)")

    async def late() -> None:
        try:
            await made.close()
        finally:
            made._closed = True

    return late


async def transaction_half_way(conn: Any) -> Late:
    block = conn.transaction()
    await block.__aenter__()
    await conn.execute("select 1")
    return lambda: block.__aexit__(None, None, None)


async def transaction_half_way_failing(conn: Any) -> Late:
    block = conn.transaction()
    await block.__aenter__()
    return lambda: block.__aexit__(KeyError, KeyError(1), None)


async def pipeline_half_way(conn: Any) -> Late:
    block = conn.pipeline()
    pipeline = await block.__aenter__()
    await conn.execute("select 1")

    async def late() -> None:
        with pytest.raises(ReleasedConnectionError):
            await pipeline.sync()
        await block.__aexit__(None, None, None)

    return late


async def copy_half_way(conn: Any) -> Late:
    await conn.execute("create temp table half (n int)")
    block = conn.cursor().copy("copy half from stdin")
    copy = await block.__aenter__()
    await copy.write_row((1,))

    return lambda: block.__aexit__(None, None, None)


async def stream_half_way(conn: Any) -> Late:
    rows = conn.cursor().stream("select generate_series(1, 100000)")
    assert await anext(rows) == (1,)
    return lambda: anext(rows)


async def notifies_half_way(conn: Any) -> Late:
    await conn.set_autocommit(True)
    await conn.execute("listen half_way")
    await conn.execute("notify half_way, 'first'")
    notices = conn.notifies(timeout=5)
    assert (await anext(notices)).payload == "first"
    return lambda: anext(notices)


SETUPS: list[Setup] = [
    execute,
    commit,
    rollback,
    close,
    set_autocommit,
    new_cursor,
    new_server_cursor,
    new_transaction,
    new_pipeline,
    new_notifies,
    pgconn,
    info,
    adapters,
    prepare_threshold,
    prepared_max,
    cursor,
    cursor_executemany,
    cursor_stream,
    cursor_copy,
    server_cursor,
    server_cursor_close,
    transaction_half_way,
    transaction_half_way_failing,
    pipeline_half_way,
    copy_half_way,
    stream_half_way,
    notifies_half_way,
]


def by_name(value: Any) -> str:
    return str(value.__name__)


@pytest.mark.parametrize("setup", SETUPS, ids=by_name)
async def test_a_late_use_is_refused_while_nobody_else_has_the_session(
    one: PoolManager[Any], setup: Setup
) -> None:
    conn = await one.pool.getconn()
    late = await setup(conn)
    await one.pool.putconn(conn)
    with pytest.raises(ReleasedConnectionError) as caught:
        await late()
    assert_says(caught.value)
    assert await one.fetchval("select 42") == 42


@pytest.mark.parametrize("setup", SETUPS, ids=by_name)
async def test_a_late_use_does_not_touch_the_work_of_whoever_has_the_session_now(
    one: PoolManager[Any], setup: Setup, table: str, dsn: str
) -> None:
    conn = await one.pool.getconn()
    late = await setup(conn)
    await one.pool.putconn(conn)
    async with one.connection() as other:
        await other.execute(f"insert into {table} values (7)")
        with pytest.raises(ReleasedConnectionError) as caught:
            await late()
        assert_says(caught.value)
        assert other.info.transaction_status.name == "INTRANS"
        assert await (await other.execute(f"select n from {table}")).fetchall() == [(7,)]
        assert admin(dsn, f"select n from {table}") == []  # not committed by anybody else
    assert admin(dsn, f"select n from {table}") == [(7,)]


def assert_says(error: ReleasedConnectionError) -> None:
    """Name the pool, who held the connection, where it was used, where the pool was opened."""
    assert isinstance(error, psycopg.InterfaceError)
    first, detail, hint = str(error).split("\n")
    assert first == 'connection of pool "orders" was used after it was given back'
    assert re.fullmatch(
        rf"DETAIL:  Acquired in task \"[^\"]+\" at {HERE}:\d+ in \w+\."
        rf"( Given back at {HERE}:\d+ in task .*\.)? Used at {HERE}:\d+"
        rf" in task .* The pool was opened at {HERE}:\d+ in task .*\.",
        detail,
    ), detail
    assert hint.startswith("HINT:  The session may be another task's by now. Keep the work inside")


async def test_the_session_is_the_same_where_nothing_was_left_open(one: PoolManager[Any]) -> None:
    """So the tests above did meet the work of the next one, not a session beside it."""
    async with one.connection() as first:
        pid = first.info.backend_pid
    async with one.connection() as second:
        assert second.info.backend_pid == pid
        assert second is not first


async def test_what_was_taken_from_a_handle_does_not_reach_its_next_borrower(
    one: PoolManager[Any],
) -> None:
    """The adapters, their types and a cursor, which a library may keep."""
    async with one.connection() as first:
        kept, types, cursor = first.adapters, first.adapters.types, first.cursor()
    async with one.connection() as second:
        for late in (kept, cursor.adapters):
            late.register_loader("int4", TextLoader)
        types.add(TypeInfo("late", 900001, 900002))
        first.add_notice_handler(print)
        first.row_factory = dict_row
        assert await (await second.execute("select 1")).fetchone() == (1,)
        assert second.adapters.types.get("late") is None
        assert not second._notice_handlers
    async with one.connection() as third:
        assert third.adapters.types.get("late") is None
        assert await (await third.execute("select 1")).fetchone() == (1,)


async def test_queries_alone_leave_the_adapters_shared(one: PoolManager[Any]) -> None:
    """To copy them costs as much as the rest of a release."""
    async with one.connection() as first:
        await first.execute("select 1")
        shared = vars(first)["_adapters"]
    async with one.connection() as second:
        assert vars(second)["_adapters"] is shared


# --- beside it: what the bare pool does --------------------------------------------------------


@contextlib.asynccontextmanager
async def bare_pool(dsn: str) -> AsyncIterator[AsyncConnectionPool[Any]]:
    async with AsyncConnectionPool(dsn, min_size=1, max_size=1, open=False, timeout=5) as pool:
        await pool.wait()
        yield pool


async def test_on_the_bare_pool_a_late_rollback_undoes_the_work_of_another(
    dsn: str, table: str
) -> None:
    async with bare_pool(dsn) as pool:
        async with pool.connection() as stale:
            await stale.execute("select 1")
        async with pool.connection() as other:
            await other.execute(f"insert into {table} values (7)")
            await stale.rollback()
        assert admin(dsn, f"select n from {table}") == []


async def test_on_the_bare_pool_a_second_putconn_gives_one_session_two_owners(dsn: str) -> None:
    async with bare_pool(dsn) as pool:
        conn = await pool.getconn()
        await pool.putconn(conn)
        first = await pool.getconn()
        await pool.putconn(conn)
        second = await pool.getconn()
        assert first is second
        await pool.putconn(second)


# --- given back twice ---------------------------------------------------------------------------


async def test_a_second_putconn_is_refused_at_once(one: PoolManager[Any]) -> None:
    conn = await one.pool.getconn()
    await one.pool.putconn(conn)
    with pytest.raises(ReleasedConnectionError) as caught:
        await one.pool.putconn(conn)
    assert str(caught.value).startswith('connection of pool "orders" was given back twice\n')
    assert one.pool.counts() == {"total": 1, "in_use": 0, "idle": 1, "max": 1, "waiting": 0}


async def test_a_second_putconn_does_not_take_the_session_from_its_next_owner(
    one: PoolManager[Any],
) -> None:
    conn = await one.pool.getconn()
    await one.pool.putconn(conn)
    owner = await one.pool.getconn()
    with pytest.raises(ReleasedConnectionError):
        await one.pool.putconn(conn)
    with pytest.raises(psycopg.OperationalError, match="could not acquire"):
        await one.pool.getconn(timeout=0)
    assert await (await owner.execute("select 1")).fetchone() == (1,)
    await one.pool.putconn(owner)


async def test_a_connection_given_back_inside_its_block_is_an_error_of_the_block(
    one: PoolManager[Any],
) -> None:
    with pytest.raises(ReleasedConnectionError):
        async with one.connection() as conn:
            await one.pool.putconn(conn)
    assert await one.fetchval("select 1") == 1


async def test_the_connection_of_another_pool_is_refused(
    one: PoolManager[Any], make_manager: MakeManager, dsn: str
) -> None:
    other = make_manager(min_size=1, max_size=1, name="others", application_name="others")
    with pytest.warns(UserWarning, match="second one open"):
        await other.open()
    foreign = await other.pool.getconn()
    with pytest.raises(ValueError, match=r'pool "orders"|pool .orders.'):
        await one.pool.putconn(foreign)
    assert await (await foreign.execute("select 1")).fetchone() == (1,)
    await other.pool.putconn(foreign)
    async with await psycopg.AsyncConnection.connect(dsn) as alone:
        with pytest.raises(ValueError, match="can't return connection"):
            await one.pool.putconn(alone)
    assert one.pool.counts()["idle"] == 1


async def test_an_idle_handle_cannot_be_given_back(one: PoolManager[Any]) -> None:
    async with one.connection() as conn:
        pass
    (idle,) = life(one.pool).idle
    with pytest.raises(ValueError):
        await one.pool.putconn(idle)
    with pytest.raises(ReleasedConnectionError):
        await one.pool.putconn(conn)
    assert len(life(one.pool).idle) == 1


# --- what a handle is, once it was given back --------------------------------------------------


async def test_a_released_handle_is_closed_and_has_a_repr(one: PoolManager[Any]) -> None:
    async with one.connection() as conn:
        assert not conn.closed
    assert conn.closed
    assert not conn.broken
    assert re.fullmatch(r"<poolkeeper\.ReleasedAsyncConnection at 0x[0-9a-f]+>", repr(conn))


async def test_cancel_on_a_released_handle_does_nothing(one: PoolManager[Any], dsn: str) -> None:
    """As psycopg's does on a closed connection: it may be called late, as a callback."""
    async with one.connection() as stale:
        pass
    async with one.connection() as other:
        pid = other.info.backend_pid
        with endless(dsn) as lasting:
            query = asyncio.ensure_future(other.execute(f"select {lasting}, 5"))
            assert await asyncio.to_thread(eventually, lambda: is_at_work(dsn, pid))
            stale.cancel()
            await stale.cancel_safe()
        assert await (await query).fetchone() == ("", 5)


async def test_rows_that_were_fetched_can_be_read_after_the_release(one: PoolManager[Any]) -> None:
    async with one.connection() as conn:
        cursor = await conn.execute("select n, n::text from generate_series(1, 4) n")
    assert await cursor.fetchone() == (1, "1")
    assert await cursor.fetchmany(2) == [(2, "2"), (3, "3")]
    assert [row async for row in cursor] == [(4, "4")]
    assert cursor.rowcount == 4
    assert [column.name for column in cursor.description or ()] == ["n", "n"]
    await cursor.close()


async def test_the_end_of_a_handle_closes_nothing(one: PoolManager[Any]) -> None:
    async with one.connection() as conn:
        pid = conn.info.backend_pid
        keep = SimpleNamespace(cursor=conn.cursor(), conn=conn)
        keep.myself = keep  # a cycle: freed by the collector, at any time
    async with one.connection() as other:
        await other.execute("create temp table mine (n int) on commit drop")
        del conn, keep
        gc.collect()
        await other.execute("insert into mine values (1)")
        assert other.info.backend_pid == pid


async def test_a_handle_outlives_its_pool(make_manager: MakeManager) -> None:
    db = make_manager(min_size=1, max_size=1, name="orders")
    await db.open()
    async with db.connection() as conn:
        pass
    await db.close()
    with pytest.raises(ReleasedConnectionError):
        await conn.execute("select 1")
    assert conn.closed


# --- closed by its user -------------------------------------------------------------------------


async def test_close_returns_gives_back_and_twice_is_fine(make_manager: MakeManager) -> None:
    db = make_manager(min_size=1, max_size=1, name="orders", close_returns=True, timeout=5)
    await db.open()
    conn = await db.pool.getconn()
    pid = conn.info.backend_pid
    await conn.close()
    await conn.close()
    assert db.pool.counts()["idle"] == 1
    with pytest.raises(ReleasedConnectionError):
        await conn.execute("select 1")
    with pytest.raises(ReleasedConnectionError):
        await db.pool.putconn(conn)
    other = await db.pool.getconn()
    assert other.info.backend_pid == pid
    await conn.close()  # a third time, with the session in other hands
    assert not other.closed
    assert await (await other.execute("select 1")).fetchone() == (1,)
    await other.close()
    assert db.pool.counts()["idle"] == 1


async def test_close_returns_rolls_back_what_was_not_committed(
    make_manager: MakeManager, table: str, dsn: str
) -> None:
    db = make_manager(min_size=1, max_size=1, name="orders", close_returns=True, timeout=5)
    await db.open()
    conn = await db.pool.getconn()
    await conn.execute(f"insert into {table} values (1)")
    await conn.close()
    assert await db.fetchall(f"select n from {table}") == []


async def test_a_connection_that_its_user_closed_is_replaced(one: PoolManager[Any]) -> None:
    conn = await one.pool.getconn()
    pid = conn.info.backend_pid
    await conn.close()
    await one.pool.putconn(conn)
    async with one.connection() as other:
        assert other.info.backend_pid != pid
    assert one.pool.get_stats()["returns_bad"] == 1


async def test_a_connection_closed_inside_its_block_is_replaced(one: PoolManager[Any]) -> None:
    async with one.connection() as conn:
        pid = conn.info.backend_pid
        await conn.close()
    assert await one.fetchval("select pg_backend_pid()") != pid


# --- given back by one task while another works on it ------------------------------------------


async def child_query(conn: Any) -> None:
    await conn.execute("select pg_sleep(30)")


async def child_notifies(conn: Any) -> None:
    async for _ in conn.notifies(timeout=30):
        pass


async def child_copy(conn: Any) -> None:
    async with conn.cursor().copy("copy (select pg_sleep(30)) to stdout") as copy:
        await copy.read()


async def child_stream(conn: Any) -> None:
    async for _ in conn.cursor().stream("select pg_sleep(30)"):
        pass


async def child_pipeline(conn: Any) -> None:
    async with conn.pipeline():
        cursor = await conn.execute("select pg_sleep(30)")
        await cursor.fetchone()


@pytest.mark.parametrize(
    "work",
    [child_query, child_notifies, child_copy, child_stream, child_pipeline],
    ids=by_name,
)
async def test_a_connection_that_another_task_is_at_work_on_is_not_handed_on(
    one: PoolManager[Any], work: Callable[[Any], Awaitable[None]], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    conn = await one.pool.getconn()
    await conn.set_autocommit(True)
    pid = conn.info.backend_pid
    child = asyncio.ensure_future(work(conn))
    while not conn.lock.locked():
        await asyncio.sleep(0)
    await asyncio.sleep(0.05)  # until it waits for the server
    await one.pool.putconn(conn)
    async with asyncio.timeout(10):
        async with one.connection() as other:
            assert other.info.backend_pid != pid
            # Its socket may have got the number of the one that was closed.
            for n in range(20):
                assert await (await other.execute("select %s", (n,))).fetchone() == (n,)
        with pytest.raises(psycopg.Error):
            await child
    assert one.pool.counts() == {"total": 1, "in_use": 0, "idle": 1, "max": 1, "waiting": 0}
    assert 'pool "orders"' in caplog.text
    assert one.pool.get_stats()["returns_bad"] == 1


class Forgotten(psycopg.AsyncConnection[Any]):
    """Its first request to cancel is lost, as one is that comes before the query does."""

    requests = 0

    async def cancel_safe(self, *, timeout: float = 30.0) -> None:
        self.requests += 1
        if self.requests > 1:
            await super().cancel_safe(timeout=timeout)


@pytest.mark.parametrize("kind", [psycopg.AsyncConnection, Forgotten], ids=by_name)
async def test_what_another_task_ran_on_it_is_stopped_at_the_server(
    make_manager: MakeManager, dsn: str, kind: type[Any]
) -> None:
    db = make_manager(connection_class=kind, min_size=1, max_size=1, name="orders", timeout=5)
    await db.open()
    conn = await db.pool.getconn()
    pid = conn.info.backend_pid
    with endless(dsn) as lasting:
        child = asyncio.ensure_future(conn.execute(f"select {lasting}"))
        assert await asyncio.to_thread(eventually, lambda: is_at_work(dsn, pid))
        await db.pool.putconn(conn)
        with pytest.raises(psycopg.Error):
            await child
        gone = "select 1 from pg_stat_activity where pid = %s"
        assert await asyncio.to_thread(eventually, lambda: not admin(dsn, gone, (pid,)))
    assert await db.fetchval("select 1") == 1


async def test_a_block_that_is_cancelled_while_its_child_works_gives_no_busy_connection_on(
    one: PoolManager[Any],
) -> None:
    """Commit waits for the child; the cancellation ends that wait, not the child."""
    children: list[asyncio.Task[None]] = []
    pids = []

    async def parent() -> None:
        async with one.connection() as conn:
            pids.append(conn.info.backend_pid)
            children.append(asyncio.ensure_future(child_query(conn)))
            await asyncio.sleep(0.05)

    task = asyncio.ensure_future(parent())
    await asyncio.sleep(0.2)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    async with asyncio.timeout(10):
        assert await one.fetchval("select pg_backend_pid()") not in pids
        with pytest.raises(psycopg.Error):
            await children[0]


async def test_a_child_that_waits_for_its_turn_is_refused_after_the_release(
    one: PoolManager[Any],
) -> None:
    """It has not sent anything yet, so the connection is fine."""
    conn = await one.pool.getconn()
    await conn.set_autocommit(True)
    ready = asyncio.Event()

    async def child() -> None:
        await ready.wait()
        await conn.execute("select 1")

    task = asyncio.ensure_future(child())
    await asyncio.sleep(0)
    pid = conn.info.backend_pid
    await one.pool.putconn(conn)
    ready.set()
    with pytest.raises(ReleasedConnectionError):
        await task
    assert await one.fetchval("select pg_backend_pid()") == pid
