"""The contests of the pools themselves: nothing inside, a query in a block, a one-shot."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from .contestants import EVERY, Autocommit, Contestant, Held
from .contests import AUTOCOMMIT, HELD
from .timing import Turns, Work, paced
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
    (kind,) = (kind for kind in (*EVERY, Autocommit) if kind.name == contestant)
    async with kind(dsn, CONNECTIONS, PATIENCE) as pool:
        one_shot = repeated(pool.query)
        works = {"one-shot": by_one(one_shot), "one-shot-64": by_many(one_shot, TASKS)}
        if contestant != AUTOCOMMIT:
            works |= blocks(pool)
        yield {name: paced(work) for name, work in works.items()}


def blocks(pool: Contestant) -> dict[str, Work]:
    block = repeated(pool.block)
    return {
        "block": by_one(block),
        "block-64": by_many(block, TASKS),
        "acquire": by_one(empty(pool)),
        "acquire-64": by_many(held_for_a_turn(pool), TASKS),
    }
