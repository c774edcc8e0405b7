"""A thread without an event loop: psycopg_pool's synchronous pool, or a portal."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from psycopg_pool import ConnectionPool

from poolkeeper import PoolManager, Portal

from .contestants import PARAMETERS, QUERY
from .contests import OURS
from .timing import Turns, Work, paced

CONNECTIONS = 4


def by_a_thread(act: Callable[[], Any]) -> Work:
    """Let one thread do it."""

    async def work(size: int, start: Callable[[], None]) -> int:
        def all_of_it() -> None:
            start()
            for _ in range(size):
                act()

        await asyncio.to_thread(all_of_it)
        return size

    return work


@asynccontextmanager
async def enter(stage: str, contestant: str, dsn: str) -> AsyncIterator[Turns]:  # noqa: ARG001
    """Prepare one of them; the loop that runs here does nothing meanwhile."""
    acts = await asyncio.to_thread(_portal if contestant == OURS else _bare, dsn)
    yield {name: paced(by_a_thread(act)) for name, act in acts.items() if name != "close"}
    await asyncio.to_thread(acts["close"])


def _bare(dsn: str) -> dict[str, Callable[[], Any]]:
    pool = ConnectionPool(dsn, min_size=CONNECTIONS, max_size=CONNECTIONS, open=True)
    pool.wait()

    def block() -> Any:
        with pool.connection() as conn:
            return conn.execute(QUERY, PARAMETERS).fetchone()

    return {"thread": block, "thread-block": block, "close": pool.close}


def _portal(dsn: str) -> dict[str, Callable[[], Any]]:
    db = PoolManager(dsn, min_size=CONNECTIONS, max_size=CONNECTIONS)
    portal = Portal(db)
    portal.open()

    async def block() -> Any:
        async with db.connection() as conn:
            cursor = await conn.execute(QUERY, PARAMETERS)
            return await cursor.fetchone()

    return {
        "thread": lambda: portal.fetchone(QUERY, PARAMETERS),
        "thread-block": lambda: portal.run(block),
        "close": portal.close,
    }
