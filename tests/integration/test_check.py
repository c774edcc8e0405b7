"""`PoolManager.check()` tells whether a query can run now, whatever goes on."""

from __future__ import annotations

import asyncio
import copy
import gc
import logging
import pickle
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from typing import Any

import psycopg
import pytest
from psycopg import AsyncConnection
from psycopg.rows import dict_row

from poolkeeper import (
    AcquireTimeout,
    ConfigError,
    Health,
    LoopMismatchError,
    OpenError,
    PoolManager,
    SelfDeadlockError,
    _cleaning,
)
from poolkeeper import _checking as checking_module
from poolkeeper._embedded import EmbeddedServer
from poolkeeper._health import Question
from poolkeeper._watching import Watch
from tests.support.embedded import OwnServer
from tests.support.inside import life, shrink
from tests.support.programs import run_program
from tests.support.proxy import FaultProxy
from tests.support.server import admin
from tests.support.waiting import eventually, until
from tests.support.wire import wire_of

MakeManager = Callable[..., PoolManager[Any]]

NAME = "check"
AT_ONCE = 8.0  # seconds; the patience of what is asked here is 30
PATIENT = 30.0
IDLE = psycopg.pq.TransactionStatus.IDLE

ANSWERED = "the server answered"
BESIDE = "the server answered beside the pool, which has no connection free"


@contextmanager
def at_once() -> Iterator[None]:
    """Fail if the block takes as long as a timeout would."""
    began = time.monotonic()
    yield
    assert time.monotonic() - began < AT_ONCE


def checks() -> list[asyncio.Task[Any]]:
    """Return the tasks that ask."""
    return [task for task in asyncio.all_tasks() if task.get_name().endswith("-check")]


@pytest.fixture(autouse=True)
async def no_task_goes_on_asking() -> AsyncIterator[None]:
    """Fail a test that leaves a question open on its loop."""
    yield
    await until(lambda: not checks())


@pytest.fixture
def make(make_manager: MakeManager) -> Callable[..., Any]:
    """A function that opens a pool of one connection whose sessions have a name of their own."""

    async def opened(conninfo: Any = None, **arguments: Any) -> PoolManager[Any]:
        manager = make_manager(
            conninfo, **{"min_size": 1, "application_name": NAME, "timeout": 30, **arguments}
        )
        await manager.open()
        return manager

    return opened


@asynccontextmanager
async def exhausted(db: PoolManager[Any]) -> AsyncIterator[None]:
    """Hold every connection that *db* can have."""
    async with AsyncExitStack() as held:
        for _ in range(db.pool.max_size):
            await held.enter_async_context(db.connection())
        yield


async def works(db: PoolManager[Any]) -> None:
    """Fail if *db* does not serve as many as it has connections, or more than it may."""
    async with exhausted(db):
        assert db.snapshot().in_use == db.snapshot().total == db.pool.max_size
    assert await db.fetchval("select 42") == 42


# --- the answer ---------------------------------------------------------------------------------


async def test_a_free_connection_is_asked(make: Any, server_sessions: Any) -> None:
    db = await make()
    health = await db.check()
    assert (health.ok, health.reason, health.beside) == (True, ANSWERED, False)
    assert 0 < health.seconds < AT_ONCE
    assert health.snapshot.numbers() == "total=1 in_use=0 idle=1 max=1 waiting=0"
    assert await asyncio.to_thread(server_sessions, NAME) == 1


async def test_it_costs_one_round_trip_and_leaves_no_transaction(make: Any) -> None:
    db = await make()
    with wire_of(db) as wire:
        assert await db.check()
        assert wire.round_trips() == 1
    async with db.connection() as conn:
        assert conn.pgconn.transaction_status == IDLE
        assert not conn.autocommit


async def test_it_is_no_request_of_the_pool_and_no_failure_of_one(make: Any) -> None:
    db = await make()
    db.pool.pop_stats()
    assert await db.check()
    async with exhausted(db):
        assert await db.check()
    stats = db.pool.get_stats()
    assert stats["requests_num"] == 1  # that of the block
    names = ("requests_errors", "requests_queued", "connections_num", "connections_lost")
    assert {stats.get(name, 0) for name in names} == {0}


async def test_a_connection_that_is_asked_is_not_one_that_nobody_needs(make: Any) -> None:
    """Or the pool would close it after `max_idle`, and each check make one of its own."""
    db = await make(min_size=0, max_size=1)
    assert await db.fetchval("select 1") == 1
    life(db.pool).idle_low = 1
    assert await db.check()
    shrink(db.pool)
    assert db.snapshot().idle == 1


def test_health_is_a_condition_frozen_and_fit_for_pickle_and_copy() -> None:
    snapshot = PoolManager(name="orders").snapshot()
    good = Health(True, ANSWERED, 0.1, False, snapshot)
    bad = Health(False, "no answer within 2.00 s", 2.0, False, snapshot)
    assert good
    assert not bad
    assert pickle.loads(pickle.dumps(bad)) == copy.copy(bad) == bad
    with pytest.raises(AttributeError):
        bad.ok = True  # type: ignore[misc]


@pytest.mark.parametrize("timeout", [-1, None, "2", True, float("nan")])
async def test_a_timeout_that_cannot_be_is_refused(db: PoolManager[Any], timeout: Any) -> None:
    with pytest.raises(ConfigError, match=r"^timeout cannot be ") as info:
        await db.check(timeout)
    assert info.value.parameter == "timeout"


async def test_no_time_is_not_enough(make: Any) -> None:
    db = await make()
    health = await db.check(timeout=0)
    assert (health.ok, health.reason) == (False, "no answer within 0.00 s")
    assert await db.check(timeout=float("inf"))
    await works(db)


# --- a pool that is not open --------------------------------------------------------------------


async def test_a_pool_that_is_not_open_is_an_answer(make_manager: MakeManager) -> None:
    db = make_manager(min_size=1)
    health = await db.check()
    assert (health.ok, health.reason) == (False, "the pool is not open")
    assert health.snapshot.state == "new"
    await db.open()
    assert await db.check()
    await db.close()
    health = await db.check()
    assert (health.ok, health.reason) == (False, "the pool is closed")
    assert health.snapshot.state == "closed"
    await db.open()
    assert await db.check()


async def test_a_pool_that_is_closing_is_an_answer(make: Any) -> None:
    db = await make(max_size=2)
    conn = await db.pool.getconn()
    closing = asyncio.create_task(db.close(PATIENT))
    await until(lambda: db.state == "closing")
    # Its caller's own connection is not waited for, so it is another task that closes.
    health = await db.check()
    assert (health.ok, health.reason) == (False, "the pool is closing")
    await db.pool.putconn(conn)
    await closing


async def test_a_pool_that_is_opening_asks_beside_it(make_manager: MakeManager, dsn: str) -> None:
    configuring, go_on = asyncio.Event(), asyncio.Event()

    async def configure(conn: Any) -> None:
        configuring.set()
        await go_on.wait()

    db = make_manager(min_size=1, configure=configure)
    await db.open(wait=False)
    await configuring.wait()
    health = await db.check()
    assert (health.ok, health.reason, health.beside) == (True, BESIDE, True)
    assert health.snapshot.state == "opening"
    go_on.set()
    await db.open()
    await works(db)


def test_another_loop_than_the_owners_is_refused(dsn: str) -> None:
    db = PoolManager(dsn, min_size=1)

    async def main() -> None:
        async with db:
            with pytest.raises(LoopMismatchError, match="bound to a different event loop") as info:
                await asyncio.to_thread(asyncio.run, db.check())
            assert "to check it." in str(info.value)
            assert await db.check()

    asyncio.run(main())


def test_a_loop_that_is_closed_is_refused(dsn: str) -> None:
    db = PoolManager(dsn, min_size=1)
    asyncio.run(db.open())
    with pytest.raises(LoopMismatchError, match="bound to an event loop that is closed"):
        asyncio.run(db.check())

    async def again() -> Health:
        async with db:
            return await db.check()

    assert asyncio.run(again())


def test_a_forked_child_is_refused_and_can_open_its_own(dsn: str, loop_name: str) -> None:
    ended = run_program(
        """
        from poolkeeper import LoopMismatchError, PoolManager
        db = PoolManager(sys.argv[1], min_size=1, name="orders")

        async def in_child():
            try:
                await db.check()
            except LoopMismatchError as ex:
                print(str(ex).splitlines()[0])
            async with db:
                print("child:", (await db.check()).reason)

        async def main():
            await db.open()
            if (pid := os.fork()) == 0:
                asyncio._set_running_loop(None)
                run(in_child())
                sys.stdout.flush()
                os._exit(0)
            os.waitpid(pid, 0)
            print("parent:", (await db.check()).reason)
            await db.close()

        run(main())
        """,
        dsn,
        loop=loop_name,
    )
    assert ended.code == 0, ended.err
    assert ended.out.splitlines() == [
        'pool "orders" was opened in another process',
        f"child: {ANSWERED}",
        f"parent: {ANSWERED}",
    ]


# --- a pool that is exhausted -------------------------------------------------------------------


async def test_an_exhausted_pool_is_asked_beside_it(
    make: Any, server_sessions: Callable[[str], int]
) -> None:
    configured: list[Any] = []

    async def configure(conn: Any) -> None:
        configured.append(conn)

    db = await make(min_size=2, configure=configure)
    async with exhausted(db):
        health = await db.check()
        assert (health.ok, health.reason, health.beside) == (True, BESIDE, True)
        assert health.snapshot.numbers() == "total=2 in_use=2 idle=0 max=2 waiting=0"
        assert await asyncio.to_thread(eventually, lambda: server_sessions(NAME) == 2)
    assert len(configured) == 2
    await works(db)


async def test_a_pool_that_could_grow_does_not_grow_for_it(make: Any) -> None:
    db = await make(min_size=1, max_size=4)
    async with db.connection():
        health = await db.check()
        assert (health.ok, health.beside) == (True, True)
        assert health.snapshot.numbers() == "total=1 in_use=1 idle=0 max=4 waiting=0"
    assert db.pool.get_stats()["pool_size"] == 1


class Mine(AsyncConnection[Any]):
    """A user's own class, which knows what it was connected with."""

    made: list[tuple[str, dict[str, Any]]]

    @classmethod
    async def connect(cls, conninfo: str = "", **kwargs: Any) -> Any:
        cls.made.append((conninfo, kwargs))
        return await super().connect(conninfo, **kwargs)


async def test_the_connection_beside_is_made_as_those_of_the_pool(make: Any, dsn: str) -> None:
    Mine.made = []
    tokens: list[str] = []

    async def conninfo() -> str:
        tokens.append("one more")
        return dsn

    async def kwargs() -> dict[str, Any]:
        return {"row_factory": dict_row, "autocommit": True}

    db = await make(conninfo, kwargs=kwargs, connection_class=Mine)
    async with exhausted(db):
        assert await db.check()
    assert len(tokens) == 2
    for_pool, beside = Mine.made
    assert beside == for_pool
    assert beside[1]["application_name"] == NAME
    assert beside[1]["row_factory"] is dict_row


async def test_the_line_is_as_if_nobody_had_asked(
    make: Any, caplog: pytest.LogCaptureFixture
) -> None:
    db = await make()
    served: list[int] = []
    caplog.set_level(logging.INFO, logger="poolkeeper")

    async def wait(number: int) -> None:
        async with db.connection():
            served.append(number)
            await asyncio.sleep(0)

    async with exhausted(db):
        tasks = []
        for number in range(6):
            tasks.append(asyncio.create_task(wait(number)))
            await asyncio.sleep(0)
            health = await db.check()
            assert (health.ok, health.beside) == (True, True)
            assert health.snapshot.waiting == number + 1
        tasks += [asyncio.create_task(db.check()) for _ in range(6)]
        await asyncio.sleep(0)
    await asyncio.gather(*tasks)
    assert served == list(range(6))
    assert not caplog.records
    await works(db)


async def test_while_anybody_waits_no_free_connection_is_taken_from_them(make: Any) -> None:
    """A connection that came back, and stands between the waiter that left and the next one."""
    db = await make()
    async with exhausted(db):
        waiter = asyncio.create_task(db.fetchval("select 1"))
        await until(lambda: db.snapshot().waiting == 1)
        idle = life(db.pool).idle
        idle.append(object())
        assert Watch(life(db.pool)).ask_idle() is None
        idle.clear()
    assert await waiter == 1


async def test_one_who_comes_while_the_only_connection_is_asked_is_served_next(make: Any) -> None:
    db = await make()
    checking = asyncio.create_task(db.check())
    while db.snapshot().idle:
        await asyncio.sleep(0)
    assert await db.fetchval("select 1") == 1
    assert await checking
    assert db.snapshot().numbers() == "total=1 in_use=0 idle=1 max=1 waiting=0"


async def test_one_who_holds_a_connection_can_ask(make: Any) -> None:
    db = await make()
    async with db.connection():
        assert await db.check()
        with pytest.raises(SelfDeadlockError):
            await db.fetchval("select 1")


async def test_a_thousand_who_ask_cost_one_session_in_a_second(
    make: Any, server_sessions: Callable[[str], int]
) -> None:
    connects = 0

    def conninfo() -> str:
        nonlocal connects
        connects += 1
        return dsn

    db = await make()
    dsn = db.pool.conninfo
    db.pool.conninfo = conninfo
    async with exhausted(db):
        began = time.monotonic()
        for _ in range(200):
            answers = await asyncio.gather(*(db.check() for _ in range(5)))
            assert {(health.ok, health.beside) for health in answers} == {(True, True)}
        assert connects <= 1 + (time.monotonic() - began) / Question.SHARED


async def test_a_query_that_was_answered_just_now_is_an_answer(make: Any) -> None:
    db = await make()
    async with db.connection() as conn:
        await conn.execute("select 1")
        health = await db.check()
        assert (health.ok, health.beside) == (True, False)
        assert health.reason == "the server has answered a query in the last second"


async def test_a_query_that_was_lost_is_none(make: Any, proxy: FaultProxy) -> None:
    db = await make(proxy.dsn)
    with pytest.raises(psycopg.OperationalError):
        async with db.connection() as conn:
            await conn.execute("select 1")
            proxy.cut()
            health = await db.check()
            assert (health.ok, health.beside) == (True, True)
            await conn.execute("select 1")


@pytest.mark.parametrize("arguments", [{}, {"min_size": 2, "max_size": 4}])
async def test_an_acquire_without_a_timeout_gets_what_a_probe_has_taken(
    make: Any, arguments: dict[str, Any]
) -> None:
    """And the pool does not grow for it."""
    db = await make(**arguments)
    size = db.pool.min_size
    going = True

    async def probe() -> None:
        while going:
            assert await db.check()

    probes = [asyncio.create_task(probe()) for _ in range(3)]
    for _ in range(100):
        async with db.connection(timeout=0):
            await asyncio.sleep(0)
    going = False
    await asyncio.gather(*probes)
    assert db.snapshot().total == size


async def test_an_acquire_without_a_timeout_does_not_wait_for_a_silent_server(
    make: Any, proxy: FaultProxy
) -> None:
    db = await make(proxy.dsn)
    proxy.stall()
    checking = asyncio.create_task(db.check(1))
    await until(lambda: not db.snapshot().idle)
    with at_once(), pytest.raises(AcquireTimeout):
        await db.fetchval("select 1", timeout=0)
    proxy.resume()
    await checking


if sys.version_info >= (3, 12):

    def eagerly(loop: Any, coro: Any, **options: Any) -> Any:
        """Make a task that begins at once; uvloop 0.23 tells Python 3.13.0 what 3.13.3 takes."""
        options.pop("eager_start", None)
        return asyncio.eager_task_factory(loop, coro, **options)

    async def test_it_is_right_where_tasks_are_eager(make: Any) -> None:
        asyncio.get_running_loop().set_task_factory(eagerly)
        try:
            db = await make()
            health = await db.check()
            assert (health.ok, health.reason) == (True, ANSWERED)
            async with exhausted(db):
                health = await db.check()
                assert (health.ok, health.reason) == (True, BESIDE)
            await db.close()
        finally:
            asyncio.get_running_loop().set_task_factory(None)


# --- a server that has no slot left -------------------------------------------------------------


@pytest.fixture(scope="module")
def narrow() -> Iterator[EmbeddedServer]:
    """A server with room for eight: three of them for superusers, one for the role ``few``."""
    with OwnServer({"max_connections": 8, "superuser_reserved_connections": 3}) as server:
        admin(server.dsn(), "create role app login")
        admin(server.dsn(), "create role few login connection limit 1")
        yield server


@contextmanager
def crowd(dsn: str) -> Iterator[None]:
    """
    Take every slot that the server has for the user of *dsn*.

    A session that has just been closed keeps its slot for a moment, so one refusal is not enough.
    """
    taken: list[psycopg.Connection[Any]] = []
    refusals = 0
    try:
        while refusals < 5:
            try:
                taken.append(psycopg.connect(dsn))
                refusals = 0
            except psycopg.OperationalError:
                refusals += 1
                time.sleep(0.05)
        yield
    finally:
        for conn in taken:
            conn.close()


SLOTS = {
    "too many clients": ("postgres", "too many clients"),
    "reserved": ("app", "remaining connection slots are reserved"),
    "limit of the role": ("few", "too many connections for role"),
}


@pytest.mark.parametrize("kind", SLOTS)
async def test_a_server_that_is_full_has_answered(
    make: Any, narrow: EmbeddedServer, kind: str
) -> None:
    user, said = SLOTS[kind]
    db = await make(narrow.dsn(user=user))
    async with exhausted(db):
        with crowd(narrow.dsn(user=user)):
            health = await db.check()
    assert (health.ok, health.beside) == (True, True)
    assert health.reason.startswith(
        "the server answered that it has no slot beside the pool's own: "
    )
    assert said in health.reason
    await works(db)
    await db.close()


async def test_a_full_server_is_no_good_to_a_pool_that_has_no_connection(
    make: Any, narrow: EmbeddedServer
) -> None:
    db = await make(narrow.dsn(user="few"), min_size=0, max_size=1)
    with crowd(narrow.dsn(user="few")):
        health = await db.check()
    assert not health.ok
    assert "too many connections for role" in health.reason
    assert "no slot beside" not in health.reason
    await db.close()


# --- a server that is silent, or away -----------------------------------------------------------


def open_sockets(proxy: FaultProxy) -> int:
    """Return how many connections of clients the proxy has, at most."""
    return len(proxy._writers)


async def test_a_silent_server_is_no_longer_waited_for_than_asked(
    make: Any, proxy: FaultProxy
) -> None:
    db = await make(proxy.dsn)
    async with exhausted(db):
        before = open_sockets(proxy)
        proxy.silent = True
        with at_once():
            health = await db.check(timeout=0.2)
        assert (health.ok, health.reason, health.beside) == (
            False, "no answer within 0.20 s", True,
        )  # fmt: skip
        assert 0.19 <= health.seconds < AT_ONCE  # timers of uvloop may be a millisecond early
        await until(lambda: proxy.accepted == 2)
        gc.disable()  # what keeps the socket open must not wait for a collection
        try:
            await until(lambda: open_sockets(proxy) == before)
        finally:
            gc.enable()
        proxy.silent = False
        assert await db.check()
    await works(db)


async def test_a_free_connection_to_a_silent_server_is_the_pools_to_replace(
    make: Any, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And that is all: nobody waits for the answer of another one."""
    db = await make(proxy.dsn, min_size=2)
    monkeypatch.setattr(checking_module, "PROBE_TIMEOUT", 0.5)
    _, second = life(db.pool).idle
    proxy.stall()
    with at_once():
        health = await db.check(timeout=0.1)
    assert (health.ok, health.reason, health.beside) == (False, "no answer within 0.10 s", False)
    question = life(db.pool).question
    assert question is not None
    await until(lambda: not checks())
    assert not question.beside
    assert list(life(db.pool).idle) == [second]
    proxy.resume()
    await works(db)


async def test_who_waits_longer_than_a_free_connection_takes_to_be_given_up_is_answered(
    make: Any, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    db = await make(proxy.dsn)
    monkeypatch.setattr(checking_module, "PROBE_TIMEOUT", 0.2)
    async with db.connection() as conn:
        pid = conn.pgconn.backend_pid
    proxy.stall()
    checking = asyncio.create_task(db.check(PATIENT))
    await until(lambda: life(db.pool).question is not None and life(db.pool).question.beside)
    proxy.resume()
    with at_once():
        health = await checking
    assert (health.ok, health.beside) == (True, True)
    async with db.connection() as conn:
        assert conn.pgconn.backend_pid != pid
    await works(db)


async def test_a_query_beside_that_gets_no_answer_is_given_up(make: Any, proxy: FaultProxy) -> None:
    made = 0

    class Stalls(AsyncConnection[Any]):
        @classmethod
        async def connect(cls, *args: Any, **kwargs: Any) -> Any:
            nonlocal made
            conn = await super().connect(*args, **kwargs)
            made += 1
            if made == 2:
                proxy.stall()
            return conn

    db = await make(proxy.dsn, connection_class=Stalls)
    async with exhausted(db):
        with at_once():
            health = await db.check(timeout=2)  # for a login, and an answer that does not come
        assert (health.ok, health.beside) == (False, True)
        await until(lambda: not checks())
        assert made == 2
        live = [s for s in life(db.pool).sessions if s.pgconn.status == psycopg.pq.ConnStatus.OK]
        assert len(live) == 1
        proxy.resume()
        assert await db.check()
    await works(db)


async def test_a_server_that_is_away_is_an_answer_with_its_reason(
    make: Any, own_server: EmbeddedServer
) -> None:
    db = await make(own_server.dsn(), min_size=2, max_size=2)
    await asyncio.to_thread(own_server.stop)
    with at_once():
        health = await db.check(PATIENT)
    assert (health.ok, health.beside) == (False, True)
    assert "refused" in health.reason
    assert "\n" not in health.reason
    assert "postgresql://" not in health.reason
    assert health.snapshot.idle == health.snapshot.in_use == 0
    failures = db.snapshot().attempts_failed
    for _ in range(20):
        assert not await db.check(PATIENT)
    assert db.snapshot().attempts_failed <= failures + 20  # the pool's own: four a second
    await asyncio.to_thread(own_server.start)
    with at_once():
        await until(lambda: db.snapshot().idle == 2)  # by itself
    assert (await db.check()).reason == ANSWERED
    await works(db)
    await db.close()


async def test_asking_does_not_count_as_an_attempt_of_the_pool(
    make: Any, proxy: FaultProxy
) -> None:
    db = await make(proxy.dsn)
    async with exhausted(db):
        proxy.refuse = True
        for _ in range(5):
            health = await db.check()
            assert not health.ok
            assert health.snapshot.attempts_failed == 0
            assert health.snapshot.last_error is None
        proxy.refuse = False
    await works(db)


async def test_no_password_is_told(scram_server: EmbeddedServer, make_manager: MakeManager) -> None:
    db = make_manager(scram_server.dsn(user="app", password="wr0ng-pw"), min_size=1)
    with pytest.raises(OpenError):
        await db.open()
    db = make_manager(scram_server.dsn(user="app", password="wr0ng-pw"), min_size=0, max_size=1)
    await db.open()
    health = await db.check()
    assert (health.ok, health.beside) == (False, True)
    assert health.reason == 'password authentication failed for user "app"'
    await db.close()


async def test_an_error_of_the_users_own_is_an_answer(make: Any, dsn: str) -> None:
    broken = False

    def conninfo() -> str:
        if broken:
            raise LookupError("no secret in the vault")
        return dsn

    db = await make(conninfo)
    async with exhausted(db):
        broken = True
        health = await db.check()
        assert not health.ok
        assert health.reason.startswith("the conninfo function (")
        assert health.reason.endswith(" in conninfo) raised LookupError")
        broken = False
        async with asyncio.timeout(PATIENT):
            while not await db.check():  # for a second that was the answer for all who ask
                await asyncio.sleep(0.05)
    await works(db)


# --- idle connections that are dead -------------------------------------------------------------


async def kill(dsn: str, db: PoolManager[Any], idle: list[Any]) -> None:
    """End the sessions of *idle* from outside; the client has been told when this returns."""
    pids = [conn.pgconn.backend_pid for conn in idle]
    query = "select pg_terminate_backend(pid) from unnest(%s::int[]) pid"
    await asyncio.to_thread(admin, dsn, query, (pids,))
    await until(lambda: not any(conn._session.is_quiet() for conn in idle))


async def test_a_dead_connection_is_passed_over_and_replaced(make: Any, dsn: str) -> None:
    """And makes the pool look at all the others, as in an acquire."""
    db = await make(min_size=3, max_size=3)
    first, second, third = life(db.pool).idle
    await kill(dsn, db, [first, third])
    health = await db.check()
    assert (health.ok, health.reason, health.beside) == (True, ANSWERED, False)
    assert second in life(db.pool).idle
    assert third not in life(db.pool).idle
    await until(lambda: db.snapshot().idle == 3)
    assert db.pool.get_stats()["connections_lost"] == 2
    await works(db)


async def test_when_all_are_dead_it_is_asked_beside(make: Any, dsn: str) -> None:
    db = await make(min_size=2, max_size=2)
    await kill(dsn, db, list(life(db.pool).idle))
    health = await db.check()
    assert (health.ok, health.beside) == (True, True)
    await until(lambda: db.snapshot().idle == 2)
    await works(db)


async def test_one_that_has_something_harmless_to_say_is_asked(make: Any, dsn: str) -> None:
    db = await make()
    async with db.connection() as conn:
        await conn.execute("listen orders")
    (idle,) = life(db.pool).idle
    await asyncio.to_thread(admin, dsn, "notify orders")
    await until(lambda: not idle._session.is_quiet())
    health = await db.check()
    assert (health.ok, health.beside) == (True, False)
    assert list(life(db.pool).idle) == [idle]


async def test_a_lifetime_that_is_over_ends_with_the_answer(make: Any) -> None:
    db = await make(max_lifetime=0.0)
    (idle,) = life(db.pool).idle
    assert await db.check()
    await until(lambda: db.snapshot().idle == 1 and idle.pgconn.status != psycopg.pq.ConnStatus.OK)


# --- many who ask at once -----------------------------------------------------------------------


@pytest.mark.parametrize("holding", [True, False], ids=["exhausted", "free"])
async def test_fifty_at_once_are_one_question(make: Any, proxy: FaultProxy, holding: bool) -> None:
    db = await make(proxy.dsn)
    accepted = proxy.accepted
    async with AsyncExitStack() as stack:
        if holding:
            await stack.enter_async_context(exhausted(db))
        answers = await asyncio.gather(*(db.check() for _ in range(50)))
    assert {(a.ok, a.reason, a.beside) for a in answers} == {
        (True, BESIDE if holding else ANSWERED, holding)
    }
    assert proxy.accepted == accepted + holding
    await works(db)


async def test_there_is_never_more_than_one_connection_beside_the_pool(
    make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = 0
    most = 0

    class Counted(AsyncConnection[Any]):
        @classmethod
        async def connect(cls, *args: Any, **kwargs: Any) -> Any:
            nonlocal there, most
            there += 1
            most = max(most, there)
            try:
                return await super().connect(*args, **kwargs)
            except BaseException:
                await asyncio.sleep(0.002)  # it takes its time to go
                there -= 1
                raise

    db = await make(connection_class=Counted)
    async with exhausted(db):
        original = _cleaning.ask

        async def asked(conn: Any) -> None:
            nonlocal there
            try:
                await original(conn)
            finally:
                there -= 1

        monkeypatch.setattr(_cleaning, "ask", asked)
        there = most = 0

        async def ask(number: int) -> None:
            for turn in range(5):
                # Some give up while it connects, some while it asks, some get an answer.
                await db.check((number * 5 + turn) % 7 * 0.001)
                await asyncio.sleep(0)

        await asyncio.gather(*(ask(number) for number in range(20)))
        assert await db.check()
        await until(lambda: not checks())
    assert (there, most) == (0, 1)
    await works(db)


async def test_each_has_a_timeout_of_its_own(make: Any, proxy: FaultProxy) -> None:
    db = await make(proxy.dsn)
    async with exhausted(db):
        proxy.stall()
        patient = asyncio.create_task(db.check(PATIENT))
        await until(lambda: proxy.accepted == 2)
        with at_once():
            hasty = await db.check(timeout=0.1)
        assert hasty.reason == "no answer within 0.10 s"
        assert not patient.done()
        proxy.resume()
        with at_once():
            health = await patient
        assert (health.ok, health.reason) == (True, BESIDE)
        assert proxy.accepted == 2
    await works(db)


async def test_one_who_is_cancelled_takes_nothing_from_the_others(
    make: Any, proxy: FaultProxy
) -> None:
    db = await make(proxy.dsn)
    async with exhausted(db):
        proxy.stall()
        first = asyncio.create_task(db.check(PATIENT))
        await until(lambda: proxy.accepted == 2)
        others = [asyncio.create_task(db.check(PATIENT)) for _ in range(3)]
        await asyncio.sleep(0)
        for task in (first, others.pop()):
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        proxy.resume()
        with at_once():
            assert all(await asyncio.gather(*others))
        assert proxy.accepted == 2
    await works(db)


async def test_when_all_are_cancelled_nothing_is_left(make: Any, proxy: FaultProxy) -> None:
    db = await make(proxy.dsn)
    async with exhausted(db):
        before = open_sockets(proxy)
        proxy.silent = True
        tasks = [asyncio.create_task(db.check(PATIENT)) for _ in range(3)]
        await until(lambda: proxy.accepted == 2)
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        with at_once():
            await until(lambda: not checks())
            await until(lambda: open_sockets(proxy) == before)
        proxy.silent = False
        assert await db.check()
    await works(db)


async def test_a_cancelled_check_of_a_free_connection_loses_none(make: Any) -> None:
    db = await make(min_size=2, max_size=2)
    for turns in range(12):
        task = asyncio.create_task(db.check())
        for _ in range(turns):
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait({task})
    await until(lambda: db.snapshot().idle == 2)
    assert db.pool.get_stats()["connections_num"] == 2
    await works(db)


async def test_when_somebody_cancels_every_task_those_who_ask_are_told(
    make: Any, proxy: FaultProxy
) -> None:
    db = await make(proxy.dsn)
    async with exhausted(db):
        proxy.silent = True
        checking = asyncio.create_task(db.check(PATIENT))
        await until(lambda: proxy.accepted == 2)
        for task in checks():
            task.cancel()
        with at_once():
            health = await checking
        assert (health.ok, health.reason) == (False, "the check was cancelled")
        proxy.silent = False
        assert await db.check()
    await works(db)


# --- the end of the pool, or of the program -----------------------------------------------------


@pytest.mark.parametrize("how", ["silent", "stall"])
async def test_closing_ends_a_check_beside_the_pool(make: Any, proxy: FaultProxy, how: str) -> None:
    db = await make(proxy.dsn)
    conn = await db.pool.getconn()
    if how == "silent":
        proxy.silent = True
    else:
        proxy.stall()
    checking = asyncio.create_task(db.check(PATIENT))
    await until(lambda: proxy.accepted == 2)
    closing = asyncio.create_task(db.close(PATIENT))
    with at_once():
        health = await checking
        assert (health.ok, health.reason) == (False, "the pool is closing")
        await until(lambda: not checks())
    proxy.resume()
    await db.pool.putconn(conn)
    with at_once():
        await closing
    assert db.state == "closed"
    proxy.silent = False
    await db.open()
    assert await db.check()


async def test_closing_ends_a_check_of_a_free_connection(
    make: Any, proxy: FaultProxy, caplog: pytest.LogCaptureFixture
) -> None:
    db = await make(proxy.dsn)
    proxy.stall()
    checking = asyncio.create_task(db.check(PATIENT))
    await until(lambda: db.snapshot().idle == 0)
    with at_once():
        await db.close(timeout=0)
        health = await checking
    assert (health.ok, health.reason) == (False, "the pool is closing")
    assert health.snapshot.state in ("closing", "closed")
    told = [record for record in caplog.records if record.name == "asyncio"]
    assert not [record for record in told if record.levelno >= logging.ERROR]


async def test_closing_at_any_moment_of_a_check_leaves_no_session(
    make: Any, server_sessions: Callable[[str], int]
) -> None:
    db = await make()
    for turns in range(20):
        conn = await db.pool.getconn()
        checking = asyncio.create_task(db.check(PATIENT))
        for _ in range(turns):
            await asyncio.sleep(0)
        with at_once():
            await db.close(timeout=0)
            await checking
        assert not checks()
        assert conn.closed
        await db.open()
    await db.close()
    assert await asyncio.to_thread(eventually, lambda: server_sessions(NAME) == 0)


@pytest.mark.parametrize("holding", [True, False], ids=["exhausted", "free"])
def test_a_program_that_ends_during_a_check_ends(dsn: str, loop_name: str, holding: bool) -> None:
    ended = run_program(
        f"""
        from poolkeeper import PoolManager
        from tests.support.proxy import FaultProxy

        async def main():
            proxy = FaultProxy(sys.argv[1])
            proxy.start()
            db = PoolManager(proxy.dsn, min_size=1)
            await db.open()
            conn = await db.pool.getconn() if {holding} else None
            proxy.stall()
            asyncio.create_task(db.check(60))
            await asyncio.sleep(0.2)
            await db.close(timeout=0)
            print("closed")

        async def careless():
            proxy = FaultProxy(sys.argv[1])
            proxy.start()
            global db, conn
            db = PoolManager(proxy.dsn, min_size=1)
            await db.open()
            conn = await db.pool.getconn() if {holding} else None
            proxy.stall()
            asyncio.create_task(db.check(60))
            await asyncio.sleep(0.2)
            print("not closed")

        run(main())
        run(careless())
        """,
        dsn,
        loop=loop_name,
    )
    assert ended.code == 0, ended.err
    assert ended.out.split("\n") == ["closed", "not closed", ""]
    assert ended.seconds < 15


def test_a_loop_that_ends_during_a_check_leaves_a_pool_that_can_be_opened(
    dsn: str, loop_name: str
) -> None:
    """Nobody cancels the tasks of a loop that is stopped and closed."""
    ended = run_program(
        """
        from poolkeeper import PoolManager
        db = PoolManager(sys.argv[1], min_size=1)
        kept = []

        async def begin():
            await db.open()
            kept.append(await db.pool.getconn())
            kept.append(asyncio.ensure_future(db.check(60)))
            for _ in range(3):
                await asyncio.sleep(0)
            assert db.pool._life.question.beside

        async def again():
            async with db:
                print((await db.check()).reason)

        loop = asyncio.SelectorEventLoop()
        loop.run_until_complete(begin())
        loop.close()
        run(again())
        """,
        dsn,
        loop=loop_name,
    )
    # Of the tasks of its own that were not ended it is told, but not by us.
    assert (ended.code, ended.out) == (0, f"{ANSWERED}\n"), ended.err
    assert "-check" not in ended.err


async def test_a_thread_may_not_ask(db: PoolManager[Any]) -> None:
    raised: list[BaseException] = []

    def ask() -> None:
        try:
            asyncio.run(db.check())
        except LoopMismatchError as ex:
            raised.append(ex)

    thread = threading.Thread(target=ask)
    thread.start()
    await asyncio.to_thread(thread.join)
    assert len(raised) == 1
    await works(db)
