"""The line of waiters: first come first served, and nobody in it who does not wait."""

from __future__ import annotations

import asyncio
import gc
import importlib
import logging
import random
import time
import tracemalloc
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, suppress
from time import monotonic
from types import FrameType, FunctionType, ModuleType
from typing import Any, cast

import pytest
from psycopg import AsyncConnection
from psycopg_pool import AsyncConnectionPool, TooManyRequests

from poolkeeper import AcquireTimeout, PoolManager, TooManyWaitersError
from poolkeeper._clock import LineClock
from tests.support.inside import life
from tests.support.waiting import until

MakeManager = Callable[..., PoolManager[Any]]

AT_ONCE = 8.0
"""Seconds; far below the 30 that a wait here would take."""


@pytest.fixture
async def one(make_manager: MakeManager) -> PoolManager[Any]:
    """An open manager with a single connection."""
    db = make_manager(min_size=1, max_size=1, name="orders", timeout=30)
    await db.open()
    return db


@pytest.fixture
async def hold(one: PoolManager[Any]) -> AsyncIterator[Callable[[], Awaitable[Any]]]:
    """A function that takes the only connection, until the test is over or gives it back."""
    async with AsyncExitStack() as stack:

        async def take() -> Any:
            conn = await one.pool.getconn()

            async def give_back() -> None:
                if not conn.closed:
                    await one.pool.putconn(conn)

            stack.push_async_callback(give_back)
            return conn

        yield take


async def ended(*tasks: asyncio.Task[Any]) -> list[Any]:
    """Return how *tasks* have ended."""
    return await asyncio.gather(*tasks, return_exceptions=True)


def nobody_waits(db: PoolManager[Any]) -> bool:
    """Tell whether the line is empty, for us, for psycopg_pool and for the clock."""
    pool = db.pool
    return (
        len(life(pool).line) == 0
        and not life(pool).line.tasks
        and pool.get_stats().get("requests_waiting", 0) == 0
        and db.snapshot().waiting == 0
    )


# --- in turn ------------------------------------------------------------------------------------


async def test_waiters_are_served_in_the_order_in_which_they_came(
    make_manager: MakeManager,
) -> None:
    db = make_manager(min_size=3, max_size=3, name="orders", timeout=30)
    await db.open()
    chance = random.Random(7)
    served: list[int] = []

    async def work(number: int, seconds: float, query: bool) -> None:
        async with db.connection() as conn:
            served.append(number)
            if query:
                await conn.execute("select pg_sleep(%s)", (seconds,))
            else:
                await asyncio.sleep(seconds)

    await asyncio.gather(
        *(work(n, chance.choice((0, 0, 0.001, 0.01)), chance.random() < 0.5) for n in range(200))
    )
    assert served == list(range(200))
    assert nobody_waits(db)


async def test_waiters_that_leave_do_not_change_the_order_of_the_others(
    make_manager: MakeManager,
) -> None:
    db = make_manager(min_size=2, max_size=2, name="orders", timeout=30)
    await db.open()
    chance = random.Random(11)
    served: list[int] = []

    async def work(number: int, patience: float) -> None:
        async with db.connection(timeout=patience) as conn:
            served.append(number)
            await conn.execute("select pg_sleep(0.002)")

    tasks = [
        asyncio.create_task(work(n, 0.02 if n % 5 == 1 else 30.0), name=f"t{n}") for n in range(200)
    ]
    await until(lambda: len(life(db.pool).line) > 100)
    left = [n for n in chance.sample(range(100, 200), 30) if n not in served]
    for number in left:
        tasks[number].cancel()
    results = await ended(*tasks)
    gone = {n for n, result in enumerate(results) if result is not None}
    assert set(left) <= gone
    assert any(isinstance(result, AcquireTimeout) for result in results)
    assert served == sorted(served)
    assert set(served) | gone == set(range(200))
    assert nobody_waits(db)
    assert db.pool.counts() == {"total": 2, "in_use": 0, "idle": 2, "max": 2, "waiting": 0}


async def test_who_comes_while_others_wait_joins_at_the_end(
    one: PoolManager[Any], hold: Callable[[], Awaitable[Any]]
) -> None:
    """Also in the turn of the loop in which a connection comes back."""
    held = await hold()
    served: list[str] = []

    async def work(name: str) -> None:
        async with one.connection():
            served.append(name)

    first = asyncio.create_task(work("first"))
    await until(lambda: len(life(one.pool).line) == 1)
    await one.pool.putconn(held)  # handed to the first, who does not run before we do
    await work("second")
    await first
    assert served == ["first", "second"]


async def test_ten_thousand_waiters_on_ten_connections(make_manager: MakeManager) -> None:
    number = 10_000
    db = make_manager(min_size=10, max_size=10, name="orders", timeout=100)
    await db.open()
    holders = [await db.pool.getconn() for _ in range(10)]
    served: list[int] = []
    waits: list[float] = []
    begin = 0.0

    async def work(n: int) -> None:
        async with db.connection():
            served.append(n)
            waits.append(monotonic() - begin)
            await asyncio.sleep(0)

    # What a waiting task costs without a pool is taken off: the task, its coroutine, a future.
    gate = asyncio.get_running_loop().create_future()

    async def idle(n: int) -> None:
        await asyncio.shield(gate)

    async def size(coroutines: list[Any]) -> tuple[int, list[asyncio.Task[None]]]:
        gc.collect()
        before = tracemalloc.get_traced_memory()[0]
        tasks = [asyncio.create_task(coroutine) for coroutine in coroutines]
        for _ in range(3):
            await asyncio.sleep(0)
        return tracemalloc.get_traced_memory()[0] - before, tasks

    tracemalloc.start()
    try:
        plain, idlers = await size([idle(n) for n in range(number)])
        waiting, tasks = await size([work(n) for n in range(number)])
    finally:
        tracemalloc.stop()
    assert len(life(db.pool).line) == number
    gate.set_result(None)
    await asyncio.gather(*idlers)
    begin = monotonic()
    for conn in holders:
        await db.pool.putconn(conn)
    await asyncio.gather(*tasks)
    assert served == list(range(number))
    waits.sort()
    # A fair line lets each wait about as long as its place in it says: from none to all of it.
    print(
        f"\n{number} waiters on 10 connections: served within {waits[-1]:.2f} s;"
        f" wait p1 {waits[number // 100]:.3f} s, median {waits[number // 2]:.3f} s,"
        f" p99 {waits[-number // 100]:.3f} s; memory of a waiter: {waiting / number:.0f} bytes,"
        f" of a task that waits without a pool: {plain / number:.0f} bytes"
    )
    assert waiting / number < 4096
    assert nobody_waits(db)
    assert len(life(db.pool).idle) == 10


# --- patience -----------------------------------------------------------------------------------


async def test_without_patience_a_free_connection_is_taken(one: PoolManager[Any]) -> None:
    async with one.connection(timeout=0) as conn:
        assert await (await conn.execute("select 1")).fetchone() == (1,)
    conn = await one.pool.getconn(timeout=0)
    await one.pool.putconn(conn)
    assert await one.fetchval("select 1", timeout=0) == 1


async def test_without_patience_an_acquire_fails_at_once(
    one: PoolManager[Any], hold: Callable[[], Awaitable[Any]]
) -> None:
    await hold()
    begin = monotonic()
    for attempt in (one.pool.getconn(timeout=0), one.fetchval("select 1", timeout=0)):
        with pytest.raises(AcquireTimeout, match=r"within 0\.00 s"):
            await attempt
    assert monotonic() - begin < AT_ONCE
    assert nobody_waits(one)


async def test_a_waiter_that_times_out_leaves_nothing_behind(
    one: PoolManager[Any], hold: Callable[[], Awaitable[Any]]
) -> None:
    held = await hold()
    with pytest.raises(AcquireTimeout):
        await one.pool.getconn(timeout=0.05)
    assert nobody_waits(one)
    await until(lambda: life(one.pool).clock._timer is None)
    assert life(one.pool).clock._due == 0.0
    await one.pool.putconn(held)
    assert len(life(one.pool).idle) == 1


async def test_time_outs_are_kept_to_while_others_wait_for_longer(
    one: PoolManager[Any], hold: Callable[[], Awaitable[Any]]
) -> None:
    await hold()
    begin = monotonic()
    seconds: dict[float, float] = {}

    async def wait(patience: float) -> None:
        with suppress(AcquireTimeout):
            await one.pool.getconn(timeout=patience)
        seconds[patience] = monotonic() - begin

    patient = asyncio.create_task(wait(30.0))
    await asyncio.gather(*(wait(patience) for patience in (0.6, 0.05, 0.3)))
    assert list(seconds) == [0.05, 0.3, 0.6]
    for patience, waited in seconds.items():
        assert patience <= waited < patience + AT_ONCE
    patient.cancel()
    await ended(patient)
    assert nobody_waits(one)


@pytest.mark.parametrize("stall", [1.2, 3.0])
async def test_a_stalled_loop_does_not_time_waiters_out(
    make_manager: MakeManager, stall: float
) -> None:
    """A connection that comes back after the stall is in time for who would have had it before."""
    db = make_manager(min_size=2, max_size=2, name="orders", timeout=1.0)
    await db.open()

    async def work() -> int:
        async with db.connection() as conn:
            await conn.execute("select pg_sleep(0.1)")
            return 1

    tasks = [asyncio.create_task(work()) for _ in range(6)]
    await asyncio.sleep(0)
    assert len(life(db.pool).line) == 4
    time.sleep(stall)
    assert await asyncio.gather(*tasks) == [1] * 6


async def test_after_a_stall_patience_ends_soon(
    one: PoolManager[Any], hold: Callable[[], Awaitable[Any]]
) -> None:
    await hold()
    waiter = asyncio.create_task(one.pool.getconn(timeout=0.3))
    await until(lambda: len(life(one.pool).line) == 1)
    time.sleep(0.8)
    begin = monotonic()
    with pytest.raises(AcquireTimeout):
        await waiter
    assert monotonic() - begin < AT_ONCE


# --- many whose patience ends together ----------------------------------------------------------


async def worst_stall(work: Awaitable[Any]) -> tuple[Any, float]:
    """
    Return what comes of *work*, and for how long the loop stood still meanwhile at worst.

    In seconds of this process: what the machine does beside it is not counted.
    """
    worst = 0.0

    async def beat() -> None:
        nonlocal worst
        while True:
            before = time.process_time()
            await asyncio.sleep(0.01)
            worst = max(worst, time.process_time() - before)

    beating = asyncio.create_task(beat())
    try:
        return await work, worst
    finally:
        beating.cancel()
        await ended(beating)


@pytest.fixture
def only_stalls_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    """Do not let the diagnosis name what the machine does to the loop beside the test."""
    monkeypatch.setattr(LineClock, "BLOCKED", 60.0)


@pytest.mark.usefixtures("only_stalls_of_ours")
async def test_ten_thousand_time_outs_do_not_stop_the_loop_and_name_the_cause(
    make_manager: MakeManager,
) -> None:
    """It stood still for ten seconds and more, and most were told of that as the cause."""
    number = 10_000
    db = make_manager(min_size=20, max_size=20, name="orders", timeout=2)
    await db.open()
    go_on = asyncio.Event()

    async def hold() -> None:
        async with db.connection():
            await go_on.wait()  # an HTTP call, say

    holders = [asyncio.create_task(hold()) for _ in range(20)]
    await until(lambda: db.snapshot().in_use == 20)
    tasks = [asyncio.create_task(db.fetchval("select 1")) for _ in range(number)]
    await until(lambda: len(life(db.pool).line) == number)
    errors, stall = await worst_stall(ended(*tasks))
    go_on.set()
    await asyncio.gather(*holders)
    assert stall < 2
    assert {type(error) for error in errors} == {AcquireTimeout}
    assert len({id(error) for error in errors}) == number
    assert Counter(error.diagnosis.cause for error in errors) == {"held-but-hardly-used": number}
    # Few facts, shared by many.
    assert len({id(error.diagnosis) for error in errors}) < number / 10
    assert nobody_waits(db)


@pytest.mark.usefixtures("only_stalls_of_ours")
async def test_a_load_that_is_too_much_is_named_by_all_who_give_up(
    make_manager: MakeManager,
) -> None:
    """The last of them, too, when the others have left the line."""
    db = make_manager(min_size=5, max_size=5, name="orders", timeout=2)
    await db.open()

    async def work() -> None:
        async with db.connection() as conn:
            await conn.execute("select pg_sleep(0.05)")

    results, stall = await worst_stall(ended(*(asyncio.create_task(work()) for _ in range(3000))))
    assert stall < 2
    errors = [error for error in results if error is not None]
    assert len(errors) > 1000
    assert {error.diagnosis.cause for error in errors} == {"too-small"}


async def test_a_log_that_fails_leaves_nobody_waiting(
    one: PoolManager[Any], hold: Callable[[], Awaitable[Any]]
) -> None:
    def broken(record: logging.LogRecord) -> bool:
        raise RuntimeError("no space left on device")

    told: list[Any] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: told.append(context))
    await hold()
    log = logging.getLogger("poolkeeper")
    log.addFilter(broken)
    try:
        async with asyncio.timeout(10):
            errors = await ended(
                *(asyncio.create_task(one.pool.getconn(timeout=t)) for t in (0.1, 0.1, 0.4))
            )
    finally:
        log.removeFilter(broken)
        asyncio.get_running_loop().set_exception_handler(None)
    assert {type(error) for error in errors} == {AcquireTimeout}
    assert [str(context["exception"]) for context in told] == ["no space left on device"]


async def test_a_refusal_whose_reason_nobody_reads_costs_little(
    one: PoolManager[Any], hold: Callable[[], Awaitable[Any]]
) -> None:
    for name in ("litestar", "quart", "aiohttp", "falcon"):  # whose requests are looked for
        importlib.import_module(f"poolkeeper.adapters.{name}")
    await hold()
    waiting = [asyncio.create_task(one.pool.getconn()) for _ in range(1000)]
    await until(lambda: len(life(one.pool).line) == 1000)
    gc.disable()  # a collection takes as long as all of them
    try:
        begin = time.process_time()
        for _ in range(1000):
            with suppress(AcquireTimeout):
                await one.pool.getconn(timeout=0)
        assert time.process_time() - begin < 0.4  # it was 0.8 ms for each
    finally:
        gc.enable()
    for task in waiting:
        task.cancel()
    await ended(*waiting)


async def test_a_reason_is_of_the_moment_of_the_refusal_whenever_it_is_read(
    make_manager: MakeManager,
) -> None:
    db = make_manager(min_size=2, max_size=2, name="orders", timeout=30)
    await db.open()

    async def refused() -> AcquireTimeout:
        with pytest.raises(AcquireTimeout) as caught:
            await db.pool.getconn(timeout=0)
        return caught.value

    async def hold(name: str) -> Any:
        return await asyncio.create_task(db.pool.getconn(), name=name)

    first, second = await hold("a"), await hold("b")
    before = await refused()
    await db.pool.putconn(first)
    third = await hold("c")
    after = await refused()  # in the same millisecond
    await db.pool.putconn(second)
    await db.pool.putconn(third)
    for error, names in ((before, ["a", "b"]), (after, ["b", "c"])):
        assert error.diagnosis is not None
        assert [row.task for row in error.diagnosis.snapshot.checkouts] == names
        assert "in_use=2" in str(error)


async def test_an_error_keeps_neither_task_nor_connection(
    one: PoolManager[Any], hold: Callable[[], Awaitable[Any]]
) -> None:
    """Read or not: it may be kept for long."""
    await hold()
    errors = []
    for _ in range(2):
        task = asyncio.create_task(one.pool.getconn(timeout=0.01))
        await ended(task)
        errors.append(cast(AcquireTimeout, task.exception()).with_traceback(None))
    assert "all connections are in use" in str(errors[0])
    reached = {type(found) for error in errors for found in everything_in(error)}
    assert not {t for t in reached if issubclass(t, asyncio.Future | AsyncConnection | FrameType)}


def everything_in(thing: object) -> list[object]:
    """Return what *thing* keeps alive, modules, classes and functions aside."""
    found: dict[int, object] = {}
    queue = [thing]
    while queue:
        one = queue.pop()
        if id(one) in found or isinstance(one, type | ModuleType | FunctionType):
            continue
        found[id(one)] = one
        queue += gc.get_referents(one)
    return list(found.values())


# --- how many may wait --------------------------------------------------------------------------


async def test_max_waiting_counts_those_who_wait(make_manager: MakeManager) -> None:
    db = make_manager(min_size=1, max_size=1, max_waiting=2, name="orders", timeout=30)
    await db.open()
    async with db.connection():
        gone = [asyncio.create_task(db.fetchval("select 1", timeout=0.05)) for _ in range(2)]
        assert all(isinstance(how, AcquireTimeout) for how in await ended(*gone))
        for _ in range(3):
            cancelled = [asyncio.create_task(db.fetchval("select 1")) for _ in range(2)]
            await until(lambda: len(life(db.pool).line) == 2)
            for task in cancelled:
                task.cancel()
            await ended(*cancelled)
        alive = [asyncio.create_task(db.fetchval("select 1")) for _ in range(2)]
        await until(lambda: len(life(db.pool).line) == 2)
        with pytest.raises(TooManyWaitersError, match="2 tasks wait already"):
            await asyncio.create_task(db.fetchval("select 1"))
        # Refused for max_waiting, not for want of patience: no time-out either.
        assert len(life(db.pool).line) == 2
    assert await asyncio.gather(*alive) == [1, 1]


async def test_the_bare_pool_counts_those_who_are_gone_and_turns_the_living_away(
    dsn: str, make_manager: MakeManager
) -> None:
    """What `max_waiting` does without poolkeeper, beside what it does with it."""
    bare = AsyncConnectionPool(dsn, min_size=1, max_size=1, max_waiting=2, open=False)
    db = make_manager(min_size=1, max_size=1, max_waiting=2, name="orders")
    await bare.open(wait=True)
    await db.open()
    refused: list[BaseException] = []
    for pool in (bare, db.pool):
        conn = await pool.getconn()
        for _ in range(2):
            with suppress(Exception):
                await pool.getconn(timeout=0.05)
        # Nobody waits now; two may.
        waiter = asyncio.create_task(pool.getconn(timeout=0.5))
        (how,) = await ended(waiter)
        refused.append(how)
        await pool.putconn(conn)
    await bare.close()
    assert isinstance(refused[0], TooManyRequests)
    assert isinstance(refused[1], AcquireTimeout)


# --- resize -------------------------------------------------------------------------------------


async def test_a_pool_that_is_made_larger_serves_those_who_wait(
    one: PoolManager[Any], hold: Callable[[], Awaitable[Any]]
) -> None:
    await hold()
    entered: list[int] = []
    go_on = asyncio.Event()

    async def work(number: int) -> None:
        async with one.connection():
            entered.append(number)
            await go_on.wait()

    tasks = [asyncio.create_task(work(n)) for n in range(3)]
    await until(lambda: len(life(one.pool).line) == 3)
    await one.pool.resize(1, 4)
    await until(lambda: len(entered) == 3)
    assert entered == [0, 1, 2]
    assert one.pool.counts() == {"total": 4, "in_use": 4, "idle": 0, "max": 4, "waiting": 0}
    go_on.set()
    await asyncio.gather(*tasks)


async def test_a_larger_minimum_makes_no_more_than_are_missing(make_manager: MakeManager) -> None:
    """psycopg_pool 3.3 makes as many as the minimum is raised by: seven, here."""
    db = make_manager(min_size=1, max_size=4, name="orders", timeout=30)
    await db.open()
    holders = [await db.pool.getconn() for _ in range(4)]
    await db.pool.resize(4, 4)
    for conn in holders:
        await db.pool.putconn(conn)
    assert db.pool.get_stats()["pool_size"] == 4
    assert await db.fetchval("select 1") == 1
    await asyncio.sleep(0.1)  # what was asked for would have been made by now
    assert db.pool.counts()["total"] == 4


async def test_a_pool_that_is_made_smaller_closes_what_is_too_much(
    make_manager: MakeManager, server_sessions: Callable[[str], int]
) -> None:
    db = make_manager(min_size=6, max_size=6, name="orders", timeout=30, application_name="smaller")
    await db.open()
    holders = [await db.pool.getconn() for _ in range(4)]
    await db.pool.resize(1, 3)
    # The idle ones went at once, those in use go when they come back.
    assert db.pool.counts() == {"total": 4, "in_use": 4, "idle": 0, "max": 3, "waiting": 0}
    waiter = asyncio.create_task(db.fetchval("select 1"))
    await until(lambda: len(life(db.pool).line) == 1)
    await db.pool.putconn(holders.pop())
    await until(lambda: db.pool.counts()["total"] == 3)
    assert len(life(db.pool).line) == 1
    await db.pool.putconn(holders.pop())
    assert await waiter == 1
    for conn in holders:
        await db.pool.putconn(conn)
    assert db.pool.counts() == {"total": 3, "in_use": 0, "idle": 3, "max": 3, "waiting": 0}
    await until(lambda: server_sessions("smaller") == 3)
    assert db.pool.get_stats()["pool_size"] == 3


async def test_a_pool_that_is_made_smaller_while_it_grows_ends_up_small(
    make_manager: MakeManager,
) -> None:
    db = make_manager(min_size=1, max_size=6, name="orders", timeout=30)
    await db.open()
    tasks = [asyncio.create_task(db.fetchval("select pg_sleep(0.1)")) for _ in range(12)]
    await until(lambda: db.pool.counts()["total"] > 1)
    await db.pool.resize(1, 2)
    await asyncio.gather(*tasks)
    await until(lambda: db.pool.counts()["total"] <= 2)
    assert db.pool.get_stats()["pool_size"] <= 2
    assert await db.fetchval("select 1") == 1
