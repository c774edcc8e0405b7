"""The contests of the pools themselves: nothing inside, a query in a block, a one-shot."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from time import perf_counter, process_time

from .contestants import EVERY, Alone, Autocommit, Contestant, Held
from .contests import ALONE, AUTOCOMMIT, HELD
from .timing import Turn, Turns, Work, paced
from .works import by_many, by_one, empty, held_for_a_turn, repeated

CONNECTIONS, TASKS = 4, 64
PATIENCE = 300.0
"""Seconds that a task waits for a connection where the wait itself is measured."""


@asynccontextmanager
async def enter(stage: str, contestant: str, dsn: str) -> AsyncIterator[Turns]:  # noqa: ARG001
    """Prepare one of them, and give what it does in each contest."""
    if contestant == HELD:
        async with Held(dsn) as held:
            yield {"one-shot": paced(by_one(repeated(held.query)))}
        return
    (kind,) = (kind for kind in (*EVERY, Alone, Autocommit) if kind.name == contestant)
    async with kind(dsn, CONNECTIONS, PATIENCE) as pool:
        one_shot = repeated(pool.query)
        works = {"one-shot": by_one(one_shot), "one-shot-64": by_many(one_shot, TASKS)}
        if contestant not in (ALONE, AUTOCOMMIT):
            works |= blocks(pool)
        turns = {name: paced(work) for name, work in works.items()}
        yield turns | {"one-shot-64-p99": longest(pool, TASKS)}


def blocks(pool: Contestant) -> dict[str, Work]:
    block = repeated(pool.block)
    return {
        "block": by_one(block),
        "block-64": by_many(block, TASKS),
        "acquire": by_one(empty(pool)),
        "acquire-64": by_many(held_for_a_turn(pool), TASKS),
    }


def longest(pool: Contestant, tasks: int) -> Callable[[float], Awaitable[Turn]]:
    """Return what takes a turn whose time per operation is what 1 % of them wait longer than."""

    async def turn(seconds: float) -> Turn:
        waits: list[float] = []
        until = perf_counter() + seconds

        async def one() -> None:
            began = 0.0
            while began < until:  # once at least, however busy the machine is
                began = perf_counter()
                await pool.query()
                waits.append(perf_counter() - began)

        cpu = process_time()
        await asyncio.gather(*(one() for _ in range(tasks)))
        waits.sort()
        return Turn(1, waits[len(waits) * 99 // 100], process_time() - cpu)

    return turn
