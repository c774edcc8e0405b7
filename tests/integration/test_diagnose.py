"""Why nobody gets a connection: each cause made for real, and the error that names it."""

from __future__ import annotations

import asyncio
import logging
import re
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from poolkeeper import AcquireTimeout, PoolManager, _diagnosis
from poolkeeper._clock import LineClock
from tests.support.inside import life
from tests.support.programs import run_program
from tests.support.proxy import FaultProxy
from tests.support.server import admin, endless
from tests.support.waiting import until

MakeManager = Callable[..., PoolManager[Any]]

HERE = "tests/integration/test_diagnose.py"
LONG = 1.3
"""Seconds; longer than what counts as held for long."""


@pytest.fixture(autouse=True)
def only_stalls_that_are_meant(monkeypatch: pytest.MonkeyPatch) -> None:
    """Do not let the diagnosis name what the machine does to the loop beside the test."""
    monkeypatch.setattr(LineClock, "BLOCKED", 0.7)


async def opened(make_manager: MakeManager, size: int = 2, **arguments: Any) -> PoolManager[Any]:
    """An open manager with so many connections."""
    settings = {"min_size": size, "max_size": size, "name": "orders", "timeout": 30}
    db = make_manager(**{**settings, **arguments})
    await db.open()
    return db


async def timed_out(db: PoolManager[Any], timeout: float) -> AcquireTimeout:
    """Return the error of an acquire that fails."""
    with pytest.raises(AcquireTimeout) as caught:
        await db.pool.getconn(timeout=timeout)
    assert caught.value.diagnosis is not None
    return caught.value


async def start(
    db: PoolManager[Any], number: int, work: Callable[[Any], Any]
) -> list[asyncio.Task[Any]]:
    """Let so many tasks do *work* with a connection each; return when they hold it."""
    in_use = db.pool.counts()["in_use"] + number

    async def run() -> None:
        async with db.connection() as conn:
            await work(conn)

    tasks = [asyncio.create_task(run(), name=f"worker-{n}") for n in range(number)]
    await until(lambda: db.pool.counts()["in_use"] == in_use)
    return tasks


async def end(tasks: list[asyncio.Task[Any]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


# --- the causes ---------------------------------------------------------------------------------


async def test_held_across_something_else(make_manager: MakeManager) -> None:
    db = await opened(make_manager)

    async def call_somebody(conn: Any) -> None:
        await conn.execute("select pg_sleep(0.05)")
        await asyncio.sleep(30)  # an HTTP call, say

    tasks = await start(db, 2, call_somebody)
    error = await timed_out(db, 2 * LONG)
    await end(tasks)
    line = start.__code__.co_firstlineno + 7
    assert error.diagnosis is not None
    assert error.diagnosis.cause == "held-but-hardly-used"
    first, detail, hint = str(error).splitlines()
    assert first.endswith("connections are held while something else is waited for")
    assert "total=2 in_use=2 idle=0 max=2 waiting=0." in detail
    found = re.search(
        r"2 connections held for (\d+\.\d) s in all, in queries for (\d\.\d) s of it", detail
    )
    assert found is not None
    assert float(found[1]) >= 4 * LONG  # each of the two for as long as was waited
    assert 0.1 <= float(found[2]) < 0.2 * float(found[1])
    assert f"acquired at {HERE}:{line} in run (2x)" in detail
    assert 'task "worker-0"' in detail
    assert f"idle in transaction, now at {HERE}:" in detail
    assert hint.startswith("HINT:  Probably an HTTP call")


async def test_slow_queries(make_manager: MakeManager) -> None:
    db = await opened(make_manager)
    tasks = await start(db, 2, lambda conn: conn.execute("select pg_sleep(30)"))
    error = await timed_out(db, LONG)
    pids = {row.backend_pid for row in db.snapshot().checkouts}
    await end(tasks)
    assert error.diagnosis is not None
    assert error.diagnosis.cause == "slow-queries"
    assert {row.status for row in error.diagnosis.snapshot.checkouts} == {"running a query"}
    for pid in pids:  # what to look for in pg_stat_activity
        assert f"server process {pid})" in str(error)


async def test_queries_that_wait_for_a_lock(make_manager: MakeManager, dsn: str) -> None:
    admin(dsn, "create table locked (n int)")
    db = await opened(make_manager, 3)
    async with db.connection() as conn:
        await conn.execute("lock table locked")
        tasks = await start(db, 2, lambda conn: conn.execute("select * from locked"))
        error = await timed_out(db, LONG)
    await end(tasks)
    admin(dsn, "drop table locked")
    assert error.diagnosis is not None
    assert error.diagnosis.cause == "slow-queries"
    assert "pg_locks" in str(error.hint)
    # Who holds the lock is among those who hold a connection.
    statuses = sorted(row.status for row in error.diagnosis.snapshot.checkouts)
    assert statuses == ["idle in transaction", "running a query", "running a query"]


async def test_one_task_that_holds_several(make_manager: MakeManager) -> None:
    db = await opened(make_manager, 3)
    async with db.connection(), db.connection(), db.connection():
        error = await asyncio.create_task(timed_out(db, 0.1))
    assert error.diagnosis is not None
    assert error.diagnosis.cause == "several-held-by-one-task"
    assert "holds 3 connections; pass the first one down" in str(error.hint)
    assert {row.held_by_task for row in error.diagnosis.snapshot.checkouts} == {3}


async def test_tasks_that_hold_and_wait_for_another_one(make_manager: MakeManager) -> None:
    """The other holder would end a deadlock, and is not what is waited for."""
    db = await opened(make_manager, 4, timeout=1.2)
    all_hold = asyncio.Event()
    errors: list[AcquireTimeout] = []

    async def nest(conn: Any) -> None:
        await conn.execute("select 1")
        await all_hold.wait()
        try:
            await db.fetchval("select 2")
        except AcquireTimeout as ex:
            errors.append(ex)
        await asyncio.sleep(30)  # what the first gives back would serve the next

    calling = await start(db, 1, lambda conn: asyncio.sleep(30))
    nesting = await start(db, 3, nest)
    all_hold.set()
    await until(lambda: errors)
    await end(calling + nesting)
    error = errors[0]
    assert error.diagnosis is not None
    assert error.diagnosis.cause == "nested-acquire"
    first, detail, hint = str(error).splitlines()
    assert first.endswith("3 of 4 connections are held by tasks that wait for another one")
    assert detail.count(f" at {HERE}:") == 6
    assert detail.count(" in nest (server process") == 3  # where it waits now
    assert "Pass the connection that a task holds down" in hint


async def test_a_leak_by_a_task_that_has_ended(make_manager: MakeManager) -> None:
    db = await opened(make_manager, 1)
    kept: list[Any] = []

    async def take() -> None:
        kept.append(await db.pool.getconn())

    await asyncio.create_task(take(), name="careless")
    error = await timed_out(db, 0.1)
    assert error.diagnosis is not None
    assert error.diagnosis.cause == "suspected-leak"
    assert "1 connection was not given back, 1 of them by a task that has ended" in str(error)
    assert f'task "careless" at {HERE}:{take.__code__.co_firstlineno + 1}' in str(error)
    await db.pool.putconn(kept.pop())


async def test_a_connection_that_a_generator_hands_on_is_no_leak(
    make_manager: MakeManager,
) -> None:
    """As fixtures and dependencies do: another task goes on with it, and gives it back."""
    db = await opened(make_manager, 1)

    async def fixture() -> AsyncIterator[Any]:
        async with db.connection() as conn:
            yield conn

    generator = fixture()
    conn = await asyncio.create_task(anext(generator))
    error = await timed_out(db, LONG)
    assert error.diagnosis is not None
    assert error.diagnosis.cause == "held-but-hardly-used"
    assert await (await conn.execute("select 1")).fetchone() == (1,)
    await anext(generator, None)
    assert db.snapshot().in_use == 0


async def test_a_leak_that_the_threshold_found(make_manager: MakeManager) -> None:
    db = await opened(make_manager, 1, leak_threshold=0.05)
    conn = await db.pool.getconn()
    error = await asyncio.create_task(timed_out(db, 0.3))
    await db.pool.putconn(conn)
    assert error.diagnosis is not None
    assert error.diagnosis.cause == "suspected-leak"


async def test_what_a_block_holds_is_no_leak_however_long_it_takes(
    make_manager: MakeManager,
) -> None:
    """It is given back when the block ends, and the cause is what goes on in it."""
    db = await opened(make_manager, 1, leak_threshold=0.2)
    tasks = await start(db, 1, lambda conn: conn.execute("select pg_sleep(30)"))
    error = await timed_out(db, LONG)
    await end(tasks)
    assert error.diagnosis is not None
    assert error.diagnosis.snapshot.checkouts[0].suspected_leak
    assert error.diagnosis.cause == "slow-queries"
    assert "given back" not in str(error)
    tasks = await start(db, 1, lambda conn: asyncio.sleep(30))
    error = await timed_out(db, 0.5)
    await end(tasks)
    assert error.diagnosis is not None
    assert error.diagnosis.cause == "held-but-hardly-used"


async def test_the_server_is_away(make_manager: MakeManager, proxy: FaultProxy) -> None:
    db = await opened(make_manager, 1, conninfo=proxy.dsn)
    proxy.refuse = True
    proxy.cut()
    error = await timed_out(db, 0.8)
    assert error.diagnosis is not None
    assert error.diagnosis.cause == "server"
    assert "no connection can be made: " in str(error)
    assert re.search(r"The last attempt failed \d\.\d s ago: ", str(error))
    assert re.search(r"\d+ attempts? failed in \d\.\d s\.", str(error))
    assert error.__cause__ is not None
    assert error.__cause__.__traceback__ is None
    proxy.refuse = False
    assert await db.fetchval("select 1") == 1
    assert db.diagnose().cause == "none"


async def test_the_pool_is_still_growing(make_manager: MakeManager, proxy: FaultProxy) -> None:
    db = await opened(make_manager, 1, max_size=2, conninfo=proxy.dsn)
    async with db.connection():
        proxy.silent = True
        waiter = asyncio.create_task(timed_out(db, 0.5))
        await until(lambda: db.snapshot().connecting == 1 and db.snapshot().waiting == 1)
        assert db.diagnose().cause == "growing"
        assert "1 connection attempt had no answer from the server yet" in str(db.diagnose())
        error = await waiter
        assert error.diagnosis is not None
        assert error.diagnosis.cause == "growing"
        assert "the pool is still making connections" in str(error)
        # Others are started beside the one that has no answer for half a second.
        attempts = error.diagnosis.snapshot.connecting
        assert 1 <= attempts <= db.pool.num_workers
        assert f"{attempts} connection attempt" in str(error)
        assert "had no answer from the server yet" in str(error)
        proxy.silent = False


async def test_the_loop_stood_still(make_manager: MakeManager) -> None:
    db = await opened(make_manager, 1)
    tasks = await start(db, 1, lambda conn: asyncio.sleep(30))

    async def report() -> None:
        await until(lambda: db.snapshot().waiting == 1)
        time.sleep(1.5)

    blocking = asyncio.create_task(report(), name="reporter")
    error = await timed_out(db, 0.5)
    await blocking
    await end(tasks)
    assert error.diagnosis is not None
    assert error.diagnosis.cause == "stalled-loop"
    found = re.search(r"the event loop stood still for (\d\.\d) s", str(error))
    assert found is not None
    assert 1 <= float(found[1]) < 5
    assert "to_thread" in str(error.hint)


def test_who_stopped_the_loop_is_named_in_debug_mode(dsn: str) -> None:
    """On asyncio: uvloop says nothing of slow callbacks."""
    ended = run_program(
        """
        import logging, time
        from poolkeeper import PoolManager, AcquireTimeout

        logging.getLogger("asyncio").filters.clear()  # run_program() has one
        db = PoolManager(sys.argv[1], min_size=1, max_size=1, name="orders", timeout=0.5)

        async def count_beans():
            await asyncio.sleep(0.1)
            time.sleep(1.0)

        async def main():
            async with db, db.connection():
                blocking = asyncio.create_task(count_beans())
                try:
                    await asyncio.create_task(db.fetchval("select 1"))
                except AcquireTimeout as error:
                    print(error.diagnosis.cause, error)
                await blocking

        run(main(), debug=True)
        """,
        dsn,
    )
    assert ended.code == 0, ended.err
    assert ended.out.startswith("stalled-loop")
    assert "It was running " in ended.out
    assert "count_beans" in ended.out


async def test_the_pool_is_too_small_for_the_load(make_manager: MakeManager) -> None:
    db = await opened(make_manager, 2)
    stop = False

    async def client() -> None:
        while not stop:
            async with db.connection():
                await asyncio.sleep(0.05)

    # Patient ones: who gave up and came back would let the one that is looked at overtake.
    clients = [asyncio.create_task(client()) for _ in range(60)]
    await until(lambda: len(life(db.pool).line) == 58)
    await asyncio.sleep(0.5)
    error = await timed_out(db, 0.5)
    stop = True
    await asyncio.gather(*clients)
    assert error.diagnosis is not None
    assert error.diagnosis.cause == "too-small"
    load = error.diagnosis.snapshot.load
    # Two connections, 0.05 s each: some 40 a second; a slow machine does fewer.
    assert 4 < load.released / load.window_seconds < 45
    assert 0.04 < load.mean_held_seconds < 0.5
    found = re.search(
        r"keeps (\d+\.\d) connections busy \(Little's law\), and there are 2", str(error)
    )
    assert found is not None
    assert 2 < float(found[1]) < 60
    wanted = re.search(r"set max_size to (\d+)", str(error.hint))
    assert wanted is not None
    assert float(found[1]) <= int(wanted[1]) <= 100


async def test_a_burst_that_is_none_of_these(make_manager: MakeManager) -> None:
    db = await opened(make_manager, 1)
    tasks = await start(db, 1, lambda conn: asyncio.sleep(30))
    error = await timed_out(db, 0.05)
    await end(tasks)
    assert error.diagnosis is not None
    assert error.diagnosis.cause == "all-in-use"
    assert str(error).splitlines()[0].endswith("all connections are in use")


async def test_nothing_is_wrong(make_manager: MakeManager) -> None:
    db = await opened(make_manager)
    assert str(db.diagnose()) == (
        'pool "orders" (open): nothing is wrong\nDETAIL:  total=2 in_use=0 idle=2 max=2 waiting=0.'
    )


def test_each_cause_has_its_place_in_the_docs() -> None:
    names = set(re.findall(r'Finding\(\s*"([\w-]+)"', Path(_diagnosis.__file__).read_text()))
    page = (Path(__file__).parents[2] / "docs" / "diagnose.md").read_text()
    assert len(names) > 8
    assert set(re.findall(r'<a id="([\w-]+)"></a>', page)) == names


# --- with something innocent beside it ------------------------------------------------------------


async def stall_before(db: PoolManager[Any], seconds: float = 1.3) -> None:
    """Let the loop stand still while somebody waits, who is served afterwards."""
    held = [await db.pool.getconn() for _ in range(db.pool.max_size)]
    waiter = asyncio.create_task(db.fetchval("select 1"))
    await until(lambda: db.snapshot().waiting == 1)
    time.sleep(seconds)
    await asyncio.sleep(0.3)
    assert db.snapshot().stalled_seconds > seconds / 2
    for conn in held:
        await db.pool.putconn(conn)
    assert await waiter == 1


Situation = Callable[[PoolManager[Any], FaultProxy], AsyncGenerator[float, None]]
"""Makes connections short, yields how long to wait for one, and clears up."""


async def an_http_call(db: PoolManager[Any], proxy: FaultProxy) -> AsyncGenerator[float, None]:
    tasks = await start(db, 2, lambda conn: asyncio.sleep(30))
    yield LONG
    await end(tasks)


async def a_slow_query(db: PoolManager[Any], proxy: FaultProxy) -> AsyncGenerator[float, None]:
    tasks = await start(db, 2, lambda conn: conn.execute("select pg_sleep(30)"))
    yield LONG
    await end(tasks)


async def much_to_do(db: PoolManager[Any], proxy: FaultProxy) -> AsyncGenerator[float, None]:
    async def client() -> None:
        while True:
            async with db.connection() as conn:
                await conn.execute("select pg_sleep(0.02)")

    tasks = [asyncio.create_task(client()) for _ in range(200)]
    yield 0.8
    await end(tasks)


async def careless_tasks(db: PoolManager[Any], proxy: FaultProxy) -> AsyncGenerator[float, None]:
    conns = [await asyncio.create_task(db.pool.getconn()) for _ in range(2)]
    yield 0.2
    for conn in conns:
        await db.pool.putconn(conn)


async def a_task_with_two(db: PoolManager[Any], proxy: FaultProxy) -> AsyncGenerator[float, None]:
    conns = [await db.pool.getconn() for _ in range(2)]
    yield 0.2
    for conn in conns:
        await db.pool.putconn(conn)


async def one_that_nests(db: PoolManager[Any], proxy: FaultProxy) -> AsyncGenerator[float, None]:
    tasks = await start(db, 1, lambda conn: asyncio.sleep(30))
    tasks += await start(db, 1, lambda conn: db.fetchval("select 1"))
    await until(lambda: db.snapshot().waiting == 1)
    yield 0.2
    await end(tasks)


async def no_server(db: PoolManager[Any], proxy: FaultProxy) -> AsyncGenerator[float, None]:
    proxy.refuse = True
    proxy.cut()
    await db.pool.check()  # finds out that they are dead: one that was just in use is not looked at
    yield 0.5
    proxy.refuse = False


async def a_silent_server(db: PoolManager[Any], proxy: FaultProxy) -> AsyncGenerator[float, None]:
    proxy.silent = True
    proxy.cut()
    await db.pool.check()  # as above
    yield 0.3
    proxy.silent = False


async def a_slow_reset(db: PoolManager[Any], proxy: FaultProxy) -> AsyncGenerator[float, None]:
    slow.append(db.name)
    tasks = await start(db, 2, lambda conn: asyncio.sleep(0.01))
    await until(lambda: db.snapshot().returning == 2)
    yield 0.7
    slow.clear()
    await end(tasks)


slow: list[str] = []


async def reset(conn: Any) -> None:
    if slow:
        await asyncio.sleep(30)


async def nothing_in_particular(
    db: PoolManager[Any], proxy: FaultProxy
) -> AsyncGenerator[float, None]:
    tasks = await start(db, 2, lambda conn: asyncio.sleep(30))
    yield 0.05
    await end(tasks)


SITUATIONS: dict[str, Situation] = {
    "held-but-hardly-used": an_http_call,
    "slow-queries": a_slow_query,
    "too-small": much_to_do,
    "suspected-leak": careless_tasks,
    "several-held-by-one-task": a_task_with_two,
    "nested-acquire": one_that_nests,
    "server": no_server,
    "growing": a_silent_server,
    "held-up": a_slow_reset,
    "all-in-use": nothing_in_particular,
}


@pytest.mark.parametrize("cause", SITUATIONS)
async def test_a_stall_that_was_over_before_the_wait_is_not_named(
    make_manager: MakeManager, proxy: FaultProxy, cause: str
) -> None:
    db = await opened(make_manager, 2, conninfo=proxy.dsn, reset=reset)
    await stall_before(db)
    situation = SITUATIONS[cause](db, proxy)
    seconds = await anext(situation)
    error = await asyncio.create_task(timed_out(db, seconds))
    await anext(situation, None)
    await db.close(timeout=0)
    assert error.diagnosis is not None
    assert error.diagnosis.cause == cause
    assert "stood still" not in str(error)


async def test_a_stall_that_took_a_small_part_of_the_wait_is_not_named(
    make_manager: MakeManager,
) -> None:
    db = await opened(make_manager)
    tasks = await start(db, 2, lambda conn: conn.execute("select pg_sleep(30)"))

    async def block() -> None:
        await until(lambda: db.snapshot().waiting == 1)
        time.sleep(1.2)

    blocking = asyncio.create_task(block())
    error = await timed_out(db, 5.0)
    await blocking
    await end(tasks)
    assert error.diagnosis is not None
    assert error.diagnosis.snapshot.stalled_seconds > 0.7
    assert error.diagnosis.cause == "slow-queries"


async def test_one_leak_among_others_that_work_is_told_last(make_manager: MakeManager) -> None:
    db = await opened(make_manager, 6)
    leaked = await asyncio.create_task(db.pool.getconn())
    tasks = await start(db, 5, lambda conn: conn.execute("select pg_sleep(30)"))
    error = await timed_out(db, LONG)
    await end(tasks)
    await db.pool.putconn(leaked)
    assert error.diagnosis is not None
    causes = [finding.cause for finding in error.diagnosis.findings]
    assert causes == ["slow-queries", "suspected-leak"]
    assert "Also: 1 connection was not given back" in str(error)


async def test_a_failure_of_long_ago_is_not_named(
    make_manager: MakeManager, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody has asked the server since; whoever waits now waits for its answer."""
    monkeypatch.setattr(_diagnosis, "PROBED", 0.3)
    db = await opened(make_manager, 1, max_size=2, conninfo=proxy.dsn)
    async with db.connection():
        proxy.refuse = True
        error = await asyncio.create_task(timed_out(db, 0.5))
        assert error.diagnosis is not None
        assert error.diagnosis.cause == "server"
        await until(lambda: db.snapshot().next_attempt_seconds is None)
        proxy.refuse = False
        proxy.silent = True
        await asyncio.sleep(0.6)
        error = await asyncio.create_task(timed_out(db, 0.3))
        assert error.diagnosis is not None
        assert error.diagnosis.cause == "unknown"
        assert "What kept them is not known" in str(error)
        proxy.silent = False


# --- what is measured ---------------------------------------------------------------------------


async def test_the_time_in_queries_is_told_from_the_rest(
    make_manager: MakeManager, dsn: str
) -> None:
    db = await opened(make_manager, 1)
    async with db.connection() as conn:
        await conn.execute("select pg_sleep(0.3)")
        await asyncio.sleep(0.3)
        (row,) = db.snapshot().checkouts
        assert row.held_seconds >= 0.55
        assert 0.3 <= row.query_seconds <= row.held_seconds - 0.25
        assert row.status == "idle in transaction"
        assert row.status_seconds >= 0.25
        assert row.backend_pid == conn.info.backend_pid
        with endless(dsn) as lasting:
            query = asyncio.create_task(conn.execute(f"select {lasting}"))
            await asyncio.sleep(0.3)
            (row,) = db.snapshot().checkouts
            assert row.status == "running a query"
            assert row.query_seconds >= 0.55  # what runs now is counted as well
        await query
    assert not db.snapshot().checkouts
    load = db.snapshot().load
    assert load.released == 1
    assert 0.55 <= load.query_seconds <= load.held_seconds - 0.25


async def test_a_snapshot_shows_who_holds_and_who_waits(make_manager: MakeManager) -> None:
    db = await opened(make_manager, 1)
    async with db.connection():
        waiters = [
            asyncio.create_task(db.fetchval("select 1"), name=f"waiter-{n}") for n in range(3)
        ]
        await until(lambda: db.snapshot().waiting == 3)
        shown = db.snapshot()
    assert await asyncio.gather(*waiters) == [1, 1, 1]
    assert [row.task for row in shown.waiters] == ["waiter-0", "waiter-1", "waiter-2"]
    assert shown.numbers() == "total=1 in_use=1 idle=0 max=1 waiting=3"
    assert shown.opened.startswith(f"at {HERE}:")
    assert all(row.waited_seconds >= 0 for row in shown.waiters)
    assert {row.holds for row in shown.waiters} == {0}


# --- at any time, anywhere ----------------------------------------------------------------------


async def test_a_snapshot_can_be_taken_at_any_time(make_manager: MakeManager) -> None:
    db = make_manager(min_size=1, max_size=2, name="orders")
    assert (db.snapshot().state, db.diagnose().cause) == ("new", "not-open")
    await db.open()
    async with db.connection(), db.connection():
        assert db.snapshot().in_use == 2
    await db.close()
    assert (db.snapshot().state, db.diagnose().cause) == ("closed", "not-open")
    assert db.snapshot().numbers() == "total=0 in_use=0 idle=0 max=2 waiting=0"
    assert not db.snapshot().checkouts
    await db.open()
    assert db.snapshot().state == "open"


async def test_a_snapshot_can_be_taken_in_another_thread(make_manager: MakeManager) -> None:
    db = await opened(make_manager, 4)
    stop = False

    async def client() -> None:
        while not stop:
            async with db.connection() as conn:
                await conn.execute("select 1")

    def look() -> int:
        for _ in range(300):
            str(db.diagnose())
            shown = db.snapshot()
            assert shown.in_use <= 4
        return shown.max

    clients = [asyncio.create_task(client()) for _ in range(20)]
    assert await asyncio.to_thread(look) == 4
    stop = True
    await asyncio.gather(*clients)


def test_a_snapshot_can_be_taken_in_a_forked_child(dsn: str, loop_name: str) -> None:
    ended = run_program(
        """
        from poolkeeper import PoolManager

        db = PoolManager(sys.argv[1], min_size=1, max_size=2, name="orders")

        async def main():
            async with db, db.connection():
                child = os.fork()
                if child == 0:
                    shown = db.snapshot()
                    print(shown.state, shown.numbers(), db.diagnose().cause, flush=True)
                    os._exit(0)
                await asyncio.to_thread(os.waitpid, child, 0)
                print(db.snapshot().state, db.snapshot().numbers())

        run(main())
        """,
        dsn,
        loop=loop_name,
    )
    assert ended.code == 0, ended.err
    assert ended.out.splitlines() == [
        "closed total=0 in_use=0 idle=0 max=2 waiting=0 not-open",
        "open total=1 in_use=1 idle=0 max=2 waiting=0",
    ]


async def test_neither_query_nor_parameter_nor_password_is_in_any_of_it(
    make_manager: MakeManager, scram_server: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    dsn = scram_server.dsn(user="app", password="s3cret-pw")
    db = await opened(make_manager, 1, conninfo=dsn, leak_threshold=0.05)

    async def secret(conn: Any) -> None:
        await conn.execute("select 'top' || %s || pg_sleep(30)::text", ("hushhush",))

    tasks = await start(db, 1, secret)
    error = await timed_out(db, 0.3)
    shown = [repr(db.snapshot()), str(db.diagnose()), repr(db.diagnose()), str(error), repr(error)]
    shown += [record.getMessage() for record in caplog.records if record.name == "poolkeeper"]
    await end(tasks)
    assert any("suspected leak" in text for text in shown)
    for text in shown:
        for word in ("s3cret-pw", "hushhush", "pg_sleep"):
            assert word not in text


# --- the log ------------------------------------------------------------------------------------


async def test_a_storm_of_time_outs_is_logged_once(
    make_manager: MakeManager, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.WARNING, logger="poolkeeper")

    def records() -> list[str]:
        return [r.getMessage() for r in caplog.records if "could not acquire" in r.getMessage()]

    db = await opened(make_manager, 1)
    async with db.connection():
        errors = await asyncio.gather(*(asyncio.create_task(timed_out(db, 0.1)) for _ in range(50)))
        assert len(records()) == 1
        assert records()[0] in {str(error).splitlines()[0] for error in errors}
        await asyncio.create_task(timed_out(db, 0.01))  # the storm goes on
        assert len(records()) == 1
        monkeypatch.setattr("poolkeeper._storm.Storm.CALM", 0.5)
        await asyncio.sleep(0.7)
        await asyncio.create_task(timed_out(db, 0.01))
        assert len(records()) == 2
