"""
Cancelled at any point, any number of times: no connection is lost, and none is made anew.

A client that disconnects, a time-out inside of a time-out and a task group that fails all cancel
a task, often more than once, wherever it happens to be.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from time import monotonic
from typing import Any

import anyio
import psycopg
import pytest
from psycopg import AsyncConnection
from psycopg_pool import AsyncConnectionPool

from poolkeeper import PoolManager, _closing, _releasing, _stopping
from poolkeeper._releasing import release
from tests.support.inside import life
from tests.support.proxy import FaultProxy
from tests.support.server import kill_sessions
from tests.support.waiting import until

MakeManager = Callable[..., PoolManager[Any]]
Body = Callable[[PoolManager[Any]], Awaitable[Any]]


@pytest.fixture(autouse=True)
def a_server_that_is_given_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """
    Let nothing be given up because the machine is slow: what is lost here was lost to a mistake.

    It takes a second, and more, to have a hundred queries stopped where the cores are busy.
    """
    for module in (_stopping, _releasing, _closing):
        monkeypatch.setattr(module, "CANCEL_GRACE", 20.0)


def pids(db: PoolManager[Any]) -> set[int]:
    """The server processes of the idle connections."""
    return {conn.info.backend_pid for conn in life(db.pool).idle}


async def is_whole(db: PoolManager[Any]) -> None:
    """Wait until every connection of *db* is idle, and look that nothing else is left."""
    pool = db.pool
    # What is given back by a task of the pool's own takes a moment.
    await until(lambda: not life(pool).tasks.running and len(life(pool).idle) == pool.max_size)
    assert pool.counts() == {
        "total": pool.max_size, "in_use": 0, "idle": pool.max_size, "max": pool.max_size,
        "waiting": 0,
    }  # fmt: skip
    assert not life(pool).ledger.held
    assert not life(pool).line.tasks
    assert all(conn.pgconn.transaction_status == psycopg.pq.TransactionStatus.IDLE
               for conn in life(pool).idle)  # fmt: skip
    assert not any(conn._session.checkout for conn in life(pool).idle)


async def works(db: PoolManager[Any]) -> None:
    """Use every connection of *db*."""
    async with asyncio.timeout(30):
        results = await asyncio.gather(
            *(db.fetchval("select %s::int", (n,)) for n in range(db.pool.max_size * 3))
        )
    assert results == list(range(db.pool.max_size * 3))


@pytest.fixture
async def ten(make_manager: MakeManager) -> AsyncIterator[PoolManager[Any]]:
    """Ten connections, which have to be there in the end: the same ones."""
    db = make_manager(min_size=10, max_size=10, name="orders", timeout=30)
    await db.open()
    before = pids(db)
    made = db.pool.get_stats()["connections_num"]
    yield db
    await is_whole(db)
    assert pids(db) == before
    assert db.pool.get_stats()["connections_num"] == made == 10
    assert db.pool.get_stats().get("connections_lost", 0) == 0
    await works(db)


# --- at every point -----------------------------------------------------------------------------


async def commits(db: PoolManager[Any]) -> None:
    async with db.connection() as conn:
        await conn.execute("select 1")


async def rolls_back(db: PoolManager[Any]) -> None:
    with suppress(ZeroDivisionError):
        async with db.connection() as conn:
            await conn.execute("select 1")
            raise ZeroDivisionError


async def fails_on_the_server(db: PoolManager[Any]) -> None:
    with suppress(psycopg.errors.DivisionByZero):
        async with db.connection() as conn:
            await conn.execute("select 1/0")


async def runs_long(db: PoolManager[Any]) -> None:
    async with db.connection() as conn:
        await conn.execute("select pg_sleep(30)")


async def in_a_transaction(db: PoolManager[Any]) -> None:
    async with db.transaction(read_only=True) as conn:
        await conn.execute("select 1")
        async with conn.transaction():
            await conn.execute("select 2")


async def streams(db: PoolManager[Any]) -> None:
    async with db.cursor() as cursor:
        async for _ in cursor.stream("select generate_series(1, 100)"):
            pass


async def copies(db: PoolManager[Any]) -> None:
    query = "copy (select generate_series(1, 1000)) to stdout"
    async with db.cursor() as cursor, cursor.copy(query) as copy:
        async for _ in copy:
            pass


async def changes_settings(db: PoolManager[Any]) -> None:
    """So that the release has statements to run."""
    async with db.connection() as conn:
        await conn.set_autocommit(True)
        await conn.execute("set timezone to 'Asia/Tokyo'")


async def by_hand(db: PoolManager[Any]) -> None:
    conn = await db.pool.getconn()
    try:
        await conn.execute("select 1")
    finally:
        await db.pool.putconn(conn)


async def in_one_shot(db: PoolManager[Any]) -> None:
    await db.fetchval("select 1")


BODIES: list[Body] = [
    commits, rolls_back, fails_on_the_server, runs_long, in_a_transaction, streams, copies,
    changes_settings, by_hand, in_one_shot,
]  # fmt: skip


async def cancel(task: asyncio.Task[Any], times: int) -> None:
    """Cancel *task* so many times, on turns of the loop that follow each other."""
    for _ in range(times):
        task.cancel()
        await asyncio.sleep(0)
    # psycopg 3.3.0 miscounts its blocks when one is cancelled while it begins, and says so.
    with suppress(asyncio.CancelledError, psycopg.ProgrammingError):
        await task


@pytest.mark.parametrize("body", BODIES, ids=lambda body: body.__name__)
async def test_nothing_is_lost_wherever_a_task_is_cancelled(
    ten: PoolManager[Any], body: Body
) -> None:
    for turn in range(25):
        tasks = [asyncio.create_task(body(ten)) for _ in range(3)]
        for _ in range(turn):
            await asyncio.sleep(0)
        await asyncio.gather(*(cancel(task, n + 1) for n, task in enumerate(tasks)))
    for seconds in (0.001, 0.002, 0.004, 0.008):
        tasks = [asyncio.create_task(body(ten)) for _ in range(4)]
        await asyncio.sleep(seconds)
        await asyncio.gather(*(cancel(task, n * n + 1) for n, task in enumerate(tasks)))
    await is_whole(ten)


async def set_zone(conn: Any) -> None:
    await conn.execute("set timezone to 'UTC'")
    await conn.commit()


@pytest.mark.parametrize("callback", ["reset", "check", "discard"])
async def test_nothing_is_lost_where_callbacks_run(
    make_manager: MakeManager, callback: str
) -> None:
    callbacks: dict[str, Any] = {
        "reset": {"reset": set_zone},
        "check": {"check": AsyncConnectionPool.check_connection},
        "discard": {"reset": "discard"},
    }
    db = make_manager(min_size=4, max_size=4, name="orders", timeout=30, **callbacks[callback])
    await db.open()
    before = pids(db)
    for turn in range(40):
        tasks = [asyncio.create_task(commits(db)) for _ in range(6)]
        for _ in range(turn):
            await asyncio.sleep(0)
        await asyncio.gather(*(cancel(task, n + 1) for n, task in enumerate(tasks)))
    await is_whole(db)
    assert pids(db) == before
    await works(db)


async def test_a_release_that_is_cancelled_again_and_again_runs_to_its_end(
    make_manager: MakeManager,
) -> None:
    ran: list[str] = []
    began = asyncio.Event()

    class Slow(psycopg.AsyncConnection[Any]):
        async def rollback(self) -> None:
            began.set()
            await asyncio.sleep(0.2)
            await super().rollback()
            ran.append("rollback")

    async def reset(conn: Any) -> None:
        ran.append("reset")

    async def gives_back() -> None:
        conn = await db.pool.getconn()
        await conn.execute("select 1")
        await db.pool.putconn(conn)

    db = make_manager(
        min_size=1, max_size=1, name="orders", timeout=30, reset=reset, connection_class=Slow
    )
    await db.open()
    before = pids(db)
    task = asyncio.create_task(gives_back())
    await began.wait()
    for _ in range(5):
        task.cancel()
        await asyncio.sleep(0.005)
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not ran  # nobody had to wait for it
    await is_whole(db)
    assert ran == ["rollback", "reset"]
    assert pids(db) == before


# --- in acquire ---------------------------------------------------------------------------------


async def test_a_waiter_that_is_cancelled_costs_nothing(ten: PoolManager[Any]) -> None:
    holders = [await ten.pool.getconn() for _ in range(10)]
    tasks = [asyncio.create_task(commits(ten)) for _ in range(100)]
    await until(lambda: len(life(ten.pool).line) == 100)
    for task in tasks[::2]:
        task.cancel()
    await asyncio.sleep(0)
    assert len(life(ten.pool).line) == 50
    for task in tasks[1::2]:
        task.cancel()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert all(isinstance(result, asyncio.CancelledError) for result in results)
    assert len(life(ten.pool).line) == 0
    assert ten.pool.get_stats()["requests_waiting"] == 0
    for conn in holders:
        await ten.pool.putconn(conn)


@pytest.mark.parametrize("cancelled_first", [True, False])
async def test_cancelled_in_the_turn_in_which_it_is_served(
    make_manager: MakeManager, cancelled_first: bool
) -> None:
    db = make_manager(min_size=1, max_size=1, name="orders", timeout=30)
    await db.open()
    before = pids(db)
    for _ in range(20):
        conn = await db.pool.getconn()
        task = asyncio.create_task(commits(db))
        next_one = asyncio.create_task(db.fetchval("select 1"))
        await until(lambda: len(life(db.pool).line) == 2)
        if cancelled_first:
            task.cancel()
            assert release(db.pool, conn, False) is None
        else:
            assert release(db.pool, conn, False) is None
            task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await next_one == 1  # who has the connection now
    await is_whole(db)
    assert pids(db) == before


async def test_a_waiter_that_is_cancelled_while_the_pool_grows_leaves_the_connection_to_others(
    make_manager: MakeManager,
) -> None:
    db = make_manager(min_size=0, max_size=3, name="orders", timeout=30)
    await db.open()
    for turn in range(12):
        tasks = [asyncio.create_task(commits(db)) for _ in range(5)]
        for _ in range(turn):
            await asyncio.sleep(0)
        await asyncio.gather(*(cancel(task, n + 1) for n, task in enumerate(tasks)))
        assert db.pool.counts()["total"] <= 3
    await works(db)
    await until(lambda: db.pool.counts()["in_use"] == 0 and not life(db.pool).tasks.running)
    await until(lambda: db.pool.counts()["idle"] == db.pool.get_stats()["pool_size"])
    assert db.pool.counts()["total"] <= 3


# --- a disconnect costs no reconnect ------------------------------------------------------------


@pytest.mark.parametrize("times", [1, 2, 20])
async def test_a_query_that_is_cancelled_stops_on_the_server_and_keeps_its_connection(
    ten: PoolManager[Any], times: int
) -> None:
    tasks = [asyncio.create_task(runs_long(ten)) for _ in range(10)]
    await until(
        lambda: sum(row.status == "running a query" for row in ten.snapshot().checkouts) == 10
    )
    begin = monotonic()
    await asyncio.gather(*(cancel(task, times) for task in tasks))
    assert all(task.cancelled() for task in tasks)
    await is_whole(ten)
    assert monotonic() - begin < 10  # and not the 30 s of the query


async def test_a_time_out_inside_of_an_io_is_no_cancellation(make_manager: MakeManager) -> None:
    """As psycopg 3.3.0 on Python 3.12 waits in steps of 0.1 s, each with a time-out."""

    class Ticking(AsyncConnection[Any]):
        async def wait(self, gen: Any, *args: Any, **kwargs: Any) -> Any:
            for _ in range(2):
                with suppress(TimeoutError):
                    async with asyncio.timeout(0.01):
                        await asyncio.sleep(30)
            return await super().wait(gen, *args, **kwargs)

    db = make_manager(connection_class=Ticking, min_size=1, max_size=1, name="orders")
    await db.open()
    before = pids(db)
    assert await db.fetchval("select 41 + 1") == 42
    task = asyncio.current_task()
    assert task is not None
    assert task.cancelling() == 0
    # One that is meant for the task still arrives, during the time-out and after it.
    for seconds in (0.005, 0.015, 0.1):
        query = asyncio.create_task(db.fetchval("select pg_sleep(30)"))
        await asyncio.sleep(seconds)
        begin = monotonic()
        await cancel(query, 1)
        assert query.cancelled()
        assert monotonic() - begin < 10
    await is_whole(db)
    assert pids(db) == before


# --- who cancels, and what he is told -----------------------------------------------------------


async def test_anyio_scopes(ten: PoolManager[Any]) -> None:
    """They cancel again on every turn of the loop until the scope is left."""
    caught = 0

    async def request(seconds: float) -> None:
        nonlocal caught
        with anyio.move_on_after(seconds) as scope:
            async with ten.connection() as conn:
                await conn.execute("select pg_sleep(0.02)")
                await conn.execute("select pg_sleep(0.02)")
        # The time may be up in the very turn in which the block ends by itself.
        assert scope.cancelled_caught <= scope.cancel_called
        caught += scope.cancelled_caught

    for seconds in (0, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.03, 0.041):
        async with anyio.create_task_group() as group:
            for _ in range(15):
                group.start_soon(request, seconds)
    assert caught > 50
    task = asyncio.current_task()
    assert task is not None
    assert task.cancelling() == 0


async def test_an_anyio_scope_around_a_whole_task_group(ten: PoolManager[Any]) -> None:
    for seconds in (0.005, 0.03, 0.06):
        with anyio.move_on_after(seconds) as scope:
            async with anyio.create_task_group() as group:
                for _ in range(20):
                    group.start_soon(runs_long, ten)
        assert scope.cancelled_caught
        await is_whole(ten)


async def test_time_outs_inside_of_a_task_group_inside_of_a_time_out(
    ten: PoolManager[Any],
) -> None:
    inner = 0

    async def request(seconds: float) -> None:
        nonlocal inner
        try:
            async with asyncio.timeout(seconds):
                await runs_long(ten)
        except TimeoutError:
            inner += 1

    for outer in (0.01, 0.03, 0.05, None):
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(outer) as time_out:
                async with asyncio.TaskGroup() as group:
                    for n in range(20):
                        group.create_task(request(0.005 * n))
                    if outer is None:  # as soon as one of the inner ones has come to its end
                        await until(lambda: inner > 0)
                        time_out.reschedule(asyncio.get_running_loop().time())
                    await asyncio.sleep(30)
        await is_whole(ten)
    task = asyncio.current_task()
    assert task is not None
    assert task.cancelling() == 0


async def test_a_time_out_around_a_query_is_a_time_out(ten: PoolManager[Any]) -> None:
    task = asyncio.current_task()
    assert task is not None
    for _ in range(5):
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.02):
                await runs_long(ten)
        assert task.cancelling() == 0
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.02), asyncio.timeout(0.02):  # both at once
                await runs_long(ten)
        assert task.cancelling() == 0
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(runs_long(ten), 0.02)
        async with asyncio.timeout(30):
            assert await ten.fetchval("select 1") == 1


async def test_a_query_may_time_out_and_its_connection_be_used_on(ten: PoolManager[Any]) -> None:
    async with ten.connection() as conn:
        await conn.set_autocommit(True)
        for _ in range(3):
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.02):
                    await conn.execute("select pg_sleep(30)")
            assert await (await conn.execute("select 1")).fetchone() == (1,)


async def test_a_task_group_that_fails_cancels_the_queries_of_the_others(
    ten: PoolManager[Any],
) -> None:
    async def fail() -> None:
        await asyncio.sleep(0.02)
        raise ZeroDivisionError

    with pytest.raises(ExceptionGroup) as caught:
        async with asyncio.TaskGroup() as group:
            for _ in range(12):
                group.create_task(runs_long(ten))
            group.create_task(fail())
    assert [type(error) for error in caught.value.exceptions] == [ZeroDivisionError]


class Interrupt(BaseException):
    """Stands for a KeyboardInterrupt, which would end the test run."""


@pytest.mark.parametrize("error", [Interrupt, GeneratorExit, asyncio.CancelledError])
async def test_an_error_that_is_no_exception_rolls_back_and_gives_back(
    ten: PoolManager[Any], error: type[BaseException]
) -> None:
    for _ in range(12):
        with pytest.raises(error):
            async with ten.connection() as conn:
                await conn.execute("create temporary table interrupted (n int)")
                raise error
    assert await ten.fetchval("select to_regclass('interrupted')") is None


# --- everybody is cancelled ---------------------------------------------------------------------


async def cancel_everybody() -> None:
    """What some programs do when they shut a part of themselves down: our own tasks included."""
    me = asyncio.current_task()
    tasks = [task for task in asyncio.all_tasks() if task is not me]
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def test_the_pool_works_after_all_tasks_were_cancelled(make_manager: MakeManager) -> None:
    db = make_manager(
        min_size=2,
        max_size=6,
        name="orders",
        timeout=30,
        application_name="everybody",
        max_idle=0.5,
    )
    await db.open()
    for seconds in (0.0, 0.001, 0.003, 0.01, 0.02):
        tasks = [asyncio.create_task(body(db)) for body in BODIES for _ in range(2)]
        await asyncio.sleep(seconds)
        await cancel_everybody()
        assert all(task.done() for task in tasks)
        await works(db)
    await cancel_everybody()
    kill_sessions_in_thread = asyncio.to_thread(kill_sessions, db_dsn(db), "everybody")
    assert await kill_sessions_in_thread
    await works(db)
    # Back to its minimum: the scheduler runs, and a worker does what it asks for.
    holders = [asyncio.create_task(db.fetchval("select pg_sleep(0.3)")) for _ in range(7)]
    await asyncio.gather(*holders)
    await until(lambda: db.pool.counts() == {
        "total": 2, "in_use": 0, "idle": 2, "max": 6, "waiting": 0
    })  # fmt: skip
    assert not life(db.pool).ledger.held


def db_dsn(db: PoolManager[Any]) -> str:
    """The connection string that *db* was made with."""
    return str(db.pool.conninfo)


async def test_who_waits_already_is_served_after_our_tasks_were_cancelled(
    make_manager: MakeManager, proxy: FaultProxy
) -> None:
    """Nobody else may come who would make the pool go on."""
    db = make_manager(proxy.dsn, min_size=1, max_size=3, name="orders", timeout=30)
    await db.open()
    async with db.connection():
        proxy.silent = True
        waiter = asyncio.create_task(db.fetchval("select 1"))
        await until(lambda: db.snapshot().connecting == 1)
        for task in asyncio.all_tasks() - {waiter, asyncio.current_task()}:
            task.cancel()
        proxy.silent = False
        async with asyncio.timeout(10):
            assert await waiter == 1


# --- at random ----------------------------------------------------------------------------------


async def storm(
    use: Callable[[random.Random], Awaitable[Any]], seed: int, tasks: int, seconds: float
) -> int:
    """Let so many tasks use a pool, and cancel them at random. Returns how often."""
    end = monotonic() + seconds
    cancellations = 0

    async def client(chance: random.Random) -> None:
        nonlocal cancellations
        while monotonic() < end:
            request = asyncio.ensure_future(use(chance))
            if chance.random() < 0.3:
                await asyncio.wait({request})
            else:
                await asyncio.sleep(chance.choice((0, 0, 0.0005, 0.002, 0.01, 0.03)))
                for _ in range(chance.choice((1, 1, 2, 3, 10))):
                    request.cancel()
                    cancellations += 1
                    await asyncio.sleep(chance.choice((0, 0, 0.0005, 0.002)))
            await asyncio.gather(request, return_exceptions=True)

    chance = random.Random(seed)
    await asyncio.gather(*(client(random.Random(chance.random())) for _ in range(tasks)))
    return cancellations


async def any_body(db: PoolManager[Any], chance: random.Random) -> None:
    body = chance.choice(BODIES)
    with suppress(TimeoutError):
        async with asyncio.timeout(0.05):
            if chance.random() < 0.5:
                await body(db)
            else:
                with anyio.move_on_after(0.03):
                    await body(db)


@asynccontextmanager
async def bare_pool(dsn: str) -> AsyncIterator[AsyncConnectionPool[Any]]:
    pool: AsyncConnectionPool[Any] = AsyncConnectionPool(
        dsn, min_size=10, max_size=10, open=False, timeout=0.2
    )
    await pool.open(wait=True)
    try:
        yield pool
    finally:
        await pool.close()


async def test_a_storm_of_cancellations_loses_no_connection(
    ten: PoolManager[Any], dsn: str
) -> None:
    cancellations = await storm(lambda chance: any_body(ten, chance), 20, 150, 10.0)
    await is_whole(ten)
    print(f"\n150 tasks on 10 connections, cancelled {cancellations} times in 10 s: 0 lost, 0 made")
    assert cancellations > 500

    # Beside it, with a tenth of the time; what comes out differs, so it is only shown.
    async with bare_pool(dsn) as bare:

        async def use(chance: random.Random) -> None:
            async with asyncio.timeout(0.05), bare.connection() as conn:
                await conn.execute("select pg_sleep(0.005)")

        cancellations = await storm(use, 20, 150, 1.0)
        await asyncio.sleep(0.5)
        stats = bare.get_stats()
        print(
            f"the bare pool, cancelled {cancellations} times in 1 s:"
            f" {10 - stats['pool_available']} of 10 lost, {stats['connections_num'] - 10} made"
        )
