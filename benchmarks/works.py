"""What is done again and again while the clock runs: by one task, or by many at once."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

from .contestants import Contestant
from .timing import Work

Some = Callable[[int], Coroutine[Any, Any, None]]
"""Does one thing so many times, one after the other."""


def empty(pool: Contestant) -> Some:
    """Acquire and release."""

    async def some(times: int) -> None:
        connection = pool.connection
        for _ in range(times):
            async with connection():
                pass

    return some


def held_for_a_turn(pool: Contestant) -> Some:
    """Acquire, hold for one turn of the loop, release."""

    async def some(times: int) -> None:
        connection = pool.connection
        for _ in range(times):
            async with connection():
                await asyncio.sleep(0)

    return some


def repeated(act: Callable[[], Coroutine[Any, Any, Any]]) -> Some:
    """Do whatever *act* does."""

    async def some(times: int) -> None:
        for _ in range(times):
            await act()

    return some


def by_one(some: Some) -> Work:
    """Let one task do it."""

    async def work(size: int, start: Callable[[], None]) -> int:
        start()
        await some(size)
        return size

    return work


def by_many(some: Some, tasks: int) -> Work:
    """Let *tasks* tasks do it at once."""

    async def one(gate: asyncio.Future[None], times: int) -> None:
        await gate
        await some(times)

    async def work(size: int, start: Callable[[], None]) -> int:
        times = -(-size // tasks)
        gate = asyncio.get_running_loop().create_future()
        all_done = asyncio.gather(*(one(gate, times) for _ in range(tasks)))
        await asyncio.sleep(0)  # now they stand at the gate
        start()
        gate.set_result(None)
        await all_done
        return times * tasks

    return work
