"""Who holds a connection is the line that asked for it, also when a task of its own acquires."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from poolkeeper import PoolManager

HERE = "tests/integration/test_call_sites.py"

Call = Callable[[PoolManager[Any]], Coroutine[Any, Any, Any]]

CALLS: dict[str, Call] = {
    "execute": lambda db: db.execute("select pg_sleep(0.5)"),
    "fetchone": lambda db: db.fetchone("select pg_sleep(0.5)"),
    "fetchall": lambda db: db.fetchall("select pg_sleep(0.5)"),
    "fetchval": lambda db: db.fetchval("select pg_sleep(0.5)"),
    "getconn": lambda db: db.pool.getconn(),
}


def line_of(call: Call) -> str:
    return f"{HERE}:{call.__code__.co_firstlineno}"


async def holder(db: PoolManager[Any]) -> str:
    """Return where the connection in use was acquired, once there is one."""
    async with asyncio.timeout(10):
        while not db.snapshot().checkouts:
            await asyncio.sleep(0.001)
    (row,) = db.snapshot().checkouts
    return row.site


async def give_back(db: PoolManager[Any], result: Any) -> None:
    if db.snapshot().checkouts:
        await db.pool.putconn(result)


@pytest.mark.parametrize("name", CALLS)
async def test_the_holder_is_the_line_that_awaits(db: PoolManager[Any], name: str) -> None:
    call = CALLS[name]

    async def work() -> Any:
        return await call(db)

    task = asyncio.create_task(work())
    assert await holder(db) == line_of(call)
    await give_back(db, await task)


@pytest.mark.parametrize("name", CALLS)
async def test_the_holder_is_the_line_that_makes_a_task_of_it(
    db: PoolManager[Any], name: str
) -> None:
    call = CALLS[name]
    task = asyncio.create_task(call(db))
    assert await holder(db) == line_of(call)
    await give_back(db, await task)


@pytest.mark.parametrize("name", CALLS)
async def test_the_holder_is_the_line_that_gathers(db: PoolManager[Any], name: str) -> None:
    call = CALLS[name]
    together = asyncio.gather(call(db))
    assert await holder(db) == line_of(call)
    await give_back(db, *await together)


async def test_the_line_is_that_of_the_call_and_not_where_its_code_is_by_now(
    db: PoolManager[Any],
) -> None:
    coroutine = db.pool.getconn()
    line = inspect.currentframe().f_lineno - 1  # type: ignore[union-attr]
    task = asyncio.create_task(coroutine)
    conn = await task
    assert await holder(db) == f"{HERE}:{line}"
    await db.pool.putconn(conn)


async def test_one_who_waits_is_the_line_that_asked_too(db: PoolManager[Any]) -> None:
    conns = [await db.pool.getconn() for _ in range(4)]
    call = CALLS["fetchval"]
    task = asyncio.create_task(call(db))
    await asyncio.sleep(0)
    (row,) = db.snapshot().waiters
    assert row.site == line_of(call)
    for conn in conns:
        await db.pool.putconn(conn)
    await task


async def test_a_call_that_nobody_awaits_is_told_at_once(db: PoolManager[Any]) -> None:
    for name, call in CALLS.items():
        with pytest.warns(RuntimeWarning, match=f"{name}.* was never awaited"):
            call(db)
    assert db.snapshot().in_use == 0
