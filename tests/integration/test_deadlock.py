"""
Self-deadlock is raised soon by the task that completes it, and by nobody else.

It is complete when each connection is held by a block of a task that waits for one more itself.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from time import monotonic
from typing import Any

import pytest
from psycopg_pool import PoolTimeout

from poolkeeper import AcquireTimeout, PoolManager, SelfDeadlockError
from tests.support.inside import life
from tests.support.proxy import FaultProxy
from tests.support.waiting import until

MakeManager = Callable[..., PoolManager[Any]]

HERE = "tests/integration/test_deadlock.py"
AT_ONCE = 8.0
"""Seconds; far below the 30 that a wait here would take."""


@pytest.fixture
async def pool_of(make_manager: MakeManager) -> Callable[..., Any]:
    """A function that opens a manager with so many connections."""

    async def open_one(size: int, **arguments: Any) -> PoolManager[Any]:
        settings = {"min_size": size, "max_size": size, "name": "orders", "timeout": 30}
        db = make_manager(**{**settings, **arguments})
        await db.open()
        return db

    return open_one


# --- raised -------------------------------------------------------------------------------------


async def test_a_task_that_holds_the_only_connection_and_asks_for_another(pool_of: Any) -> None:
    db = await pool_of(1)
    begin = monotonic()
    with pytest.raises(SelfDeadlockError) as caught:
        async with db.connection(), db.connection():
            pass
    assert monotonic() - begin < AT_ONCE
    error = caught.value
    assert str(error).startswith(
        'cannot acquire a connection from pool "orders": every task that holds a connection waits'
        " for another one\nDETAIL:  total=1 in_use=1 idle=0 max=1 waiting=1. Held: task "
    )
    assert f"{HERE}:" in str(error)
    assert error.diagnosis is not None
    assert error.diagnosis.cause == "self-deadlock"
    assert "errors#self-deadlock" in str(error.hint)
    assert db.pool.counts() == {"total": 1, "in_use": 0, "idle": 1, "max": 1, "waiting": 0}
    assert not life(db.pool).line.tasks
    assert db.pool.get_stats()["requests_errors"] == 1
    assert await db.fetchval("select 1") == 1


async def test_it_is_caught_as_what_psycopg_pool_raises(pool_of: Any) -> None:
    db = await pool_of(1)
    async with db.connection():
        for kind in (PoolTimeout, AcquireTimeout):
            with pytest.raises(kind):
                await db.pool.getconn()
        with pytest.raises(PoolTimeout):
            await db.fetchval("select 1")


Nested = Callable[[PoolManager[Any]], Any]


@asynccontextmanager
async def in_a_generator(db: PoolManager[Any]) -> AsyncIterator[Any]:
    """As a dependency of a web framework does it."""
    async with db.connection() as conn:
        yield conn


@pytest.mark.parametrize(
    "block",
    [
        lambda db: db.connection(),
        lambda db: db.pool.connection(),
        lambda db: db.transaction(),
        lambda db: db.cursor(),
        in_a_generator,
    ],
    ids=["connection", "pool", "transaction", "cursor", "generator"],
)
async def test_in_whichever_block_the_connection_is_held(pool_of: Any, block: Nested) -> None:
    db = await pool_of(1)
    begin = monotonic()
    with pytest.raises(SelfDeadlockError):
        async with block(db):
            await db.fetchval("select 1")
    with pytest.raises(SelfDeadlockError):
        async with db.connection(), block(db):
            pass
    assert monotonic() - begin < AT_ONCE


@pytest.mark.parametrize("size", [2, 4])
async def test_the_last_of_several_tasks_is_told_and_the_others_go_on(
    pool_of: Any, size: int
) -> None:
    db = await pool_of(size)
    hold = asyncio.Barrier(size)
    begin = monotonic()

    async def work() -> int:
        async with db.connection():
            await hold.wait()
            return int(await db.fetchval("select 1"))

    results = await asyncio.gather(*(work() for _ in range(size)), return_exceptions=True)
    assert monotonic() - begin < AT_ONCE
    assert results.count(1) == size - 1
    (error,) = (result for result in results if result != 1)
    assert type(error) is SelfDeadlockError
    assert f"waiting={size}" in str(error)
    assert db.pool.counts()["idle"] == size


async def test_tasks_that_hold_nothing_and_wait_already_do_not_hide_it(pool_of: Any) -> None:
    db = await pool_of(1)
    async with db.connection():
        others = [asyncio.create_task(db.fetchval("select 1")) for _ in range(3)]
        await until(lambda: len(life(db.pool).line) == 3)
        with pytest.raises(SelfDeadlockError):
            await db.fetchval("select 1")
    assert await asyncio.gather(*others) == [1, 1, 1]


# --- not raised ---------------------------------------------------------------------------------


async def test_a_holder_that_waits_for_something_else(pool_of: Any) -> None:
    db = await pool_of(2)
    go_on = asyncio.Event()

    async def hold() -> None:
        async with db.connection():
            await go_on.wait()

    async def nest() -> int:
        async with db.connection():
            return int(await db.fetchval("select 1"))

    holder = asyncio.create_task(hold())
    await until(lambda: db.pool.counts()["in_use"] == 1)
    nesting = asyncio.create_task(nest())
    await until(lambda: len(life(db.pool).line) == 1)
    go_on.set()
    assert await nesting == 1
    await holder


async def test_a_connection_from_getconn_that_another_task_gives_back(pool_of: Any) -> None:
    db = await pool_of(1)
    conn = await db.pool.getconn()

    async def give_back() -> None:
        await until(lambda: len(life(db.pool).line) == 1)
        await db.pool.putconn(conn)

    other = asyncio.create_task(give_back())
    assert await db.fetchval("select 1") == 1
    await other


async def test_a_block_in_an_exit_stack_that_another_task_closes(pool_of: Any) -> None:
    db = await pool_of(1)
    for block in (db.connection(), db.transaction(), db.cursor(), db.pool.connection()):
        stack = AsyncExitStack()
        await stack.enter_async_context(block)

        async def close(stack: AsyncExitStack = stack) -> None:
            await until(lambda: len(life(db.pool).line) == 1)
            await stack.aclose()

        other = asyncio.create_task(close())
        assert await db.fetchval("select 1") == 1
        await other


async def test_what_a_task_holds_in_an_exit_stack_is_found_when_the_time_is_up(
    pool_of: Any,
) -> None:
    """The price of the test above."""
    db = await pool_of(1)
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(db.connection())
        with pytest.raises(AcquireTimeout) as caught:
            await stack.enter_async_context(db.connection(timeout=0.1))
    assert not isinstance(caught.value, SelfDeadlockError)
    assert caught.value.diagnosis is not None
    assert caught.value.diagnosis.cause == "self-deadlock"


async def test_max_size_is_not_reached(pool_of: Any) -> None:
    db = await pool_of(1, max_size=3)
    async with db.connection(), db.connection():
        assert await db.fetchval("select 1") == 1
        async with db.connection():
            with pytest.raises(SelfDeadlockError):
                await db.fetchval("select 1")


async def test_a_connection_is_being_made(
    pool_of: Any, proxy: FaultProxy, make_manager: MakeManager
) -> None:
    db = make_manager(proxy.dsn, min_size=1, max_size=2, name="orders", timeout=30)
    await db.open()
    async with db.connection():
        proxy.stall()
        task = asyncio.create_task(db.fetchval("select 1"))
        await until(lambda: db.snapshot().connecting == 1)

        async def nest() -> Any:
            return await db.fetchval("select 2")

        # The holder asks for one more as well: the one that is being made.
        timer = threading.Timer(0.2, proxy.resume)
        timer.start()
        assert await nest() == 2
        assert await task == 1
        timer.join()


async def test_the_server_is_away_and_may_come_back(
    proxy: FaultProxy, make_manager: MakeManager
) -> None:
    db = make_manager(proxy.dsn, min_size=1, max_size=2, name="orders", timeout=30)
    await db.open()
    async with db.connection():
        proxy.refuse = True
        waiter = asyncio.create_task(db.fetchval("select 1"))
        await until(lambda: db.snapshot().attempts_failed)
        threading.Timer(0.2, lambda: setattr(proxy, "refuse", False)).start()
        assert await db.fetchval("select 2") == 2
        assert await waiter == 1


async def test_a_connection_is_on_its_way_back(pool_of: Any) -> None:
    async def reset(conn: Any) -> None:
        await asyncio.sleep(0.2)

    db = await pool_of(2, reset=reset)

    async def use() -> None:
        async with db.connection():
            pass

    async with db.connection():
        user = asyncio.create_task(use())
        await until(lambda: life(db.pool).tasks.running)
        assert await db.fetchval("select 1") == 1
        await user


async def test_a_connection_is_handed_over_but_its_task_has_not_run_yet(pool_of: Any) -> None:
    db = await pool_of(2)
    held = await db.pool.getconn()
    async with db.connection():
        waiter = asyncio.create_task(db.fetchval("select 1"))
        await until(lambda: len(life(db.pool).line) == 1)
        await db.pool.putconn(held)
        assert await db.fetchval("select 2") == 2
        assert await waiter == 1


async def test_a_holder_that_will_give_up_first(pool_of: Any) -> None:
    """It asks with a short time-out of its own: it has something else to do without."""
    db = await pool_of(2)
    hold = asyncio.Barrier(2)

    async def try_for_more() -> str:
        async with db.connection():
            await hold.wait()
            with suppress(PoolTimeout):
                await db.fetchval("select 1", timeout=0.2)
                return "had two"
            return "did without"

    async def nest() -> int:
        async with db.connection():
            await hold.wait()
            await until(lambda: len(life(db.pool).line) == 1)
            return int(await db.fetchval("select 1"))

    assert await asyncio.gather(try_for_more(), nest()) == ["did without", 1]


async def test_who_would_give_up_first_himself_is_told_at_once(pool_of: Any) -> None:
    """The other side of the test above: nobody gives anything back in his time."""
    db = await pool_of(2)
    hold = asyncio.Barrier(2)
    begin = monotonic()

    async def nest() -> int:
        async with db.connection():
            await hold.wait()
            return int(await db.fetchval("select 1"))

    async def try_for_more() -> None:
        async with db.connection():
            await hold.wait()
            await until(lambda: len(life(db.pool).line) == 1)
            with pytest.raises(SelfDeadlockError):
                await db.fetchval("select 1", timeout=10)

    nesting, _ = await asyncio.gather(nest(), try_for_more())
    assert nesting == 1
    assert monotonic() - begin < AT_ONCE


async def test_an_acquire_without_patience_fails_as_any_other(pool_of: Any) -> None:
    db = await pool_of(1)
    async with db.connection():
        with pytest.raises(AcquireTimeout) as caught:
            await db.fetchval("select 1", timeout=0)
    assert type(caught.value) is AcquireTimeout


async def test_a_pool_that_was_made_larger_meanwhile(pool_of: Any) -> None:
    db = await pool_of(1)
    async with db.connection():
        await db.pool.resize(1, 2)
        assert await db.fetchval("select 1") == 1


async def test_hundreds_of_tasks_that_use_one_connection_each(pool_of: Any) -> None:
    db = await pool_of(3)

    async def work() -> int:
        async with db.connection() as conn:
            cursor = await conn.execute("select 1")
            return int((await cursor.fetchone())[0])

    assert await asyncio.gather(*(work() for _ in range(300))) == [1] * 300


async def test_a_holder_whose_wait_ends_by_itself(pool_of: Any) -> None:
    """In a time-out of its own, which the pool knows nothing of: it goes on without."""
    db = await pool_of(2)
    hold = asyncio.Barrier(2)

    async def try_for_more() -> str:
        async with db.connection():
            await hold.wait()
            with suppress(TimeoutError):
                async with asyncio.timeout(0.2):
                    await db.fetchval("select 1")
                return "had two"
            return "did without"

    async def nest() -> int:
        async with db.connection():
            await hold.wait()
            await until(lambda: len(life(db.pool).line) == 1)
            return int(await db.fetchval("select 1"))

    assert await asyncio.gather(try_for_more(), nest()) == ["did without", 1]


async def test_a_holder_that_begins_to_wait_anew(pool_of: Any) -> None:
    """It has done something in between, and may go on without the next time."""
    db = await pool_of(2)
    hold = asyncio.Barrier(2)

    async def try_often() -> str:
        async with db.connection():
            await hold.wait()
            for _ in range(6):
                with suppress(TimeoutError):
                    async with asyncio.timeout(0.2):
                        await db.fetchval("select 1")
                    return "had two"
            return "did without"

    async def nest() -> int:
        async with db.connection():
            await hold.wait()
            await until(lambda: len(life(db.pool).line) == 1)
            return int(await db.fetchval("select 1"))

    assert await asyncio.gather(try_often(), nest()) == ["did without", 1]


async def test_a_short_time_out_is_kept_to_and_names_the_deadlock(pool_of: Any) -> None:
    db = await pool_of(1)
    async with db.connection():
        with pytest.raises(AcquireTimeout) as caught:
            await db.fetchval("select 1", timeout=0.1)
    assert type(caught.value) is AcquireTimeout
    assert caught.value.diagnosis is not None
    assert caught.value.diagnosis.cause == "self-deadlock"
