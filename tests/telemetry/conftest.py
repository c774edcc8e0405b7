"""What the tests of both exporters do with a pool."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from poolkeeper import AcquireTimeout, PoolManager
from tests.support.waiting import until

MakeManager = Callable[..., PoolManager[Any]]


async def report(db: PoolManager[Any], timeout: float | None = None) -> None:
    with suppress(AcquireTimeout):
        await db.fetchval("select 1", timeout=timeout)


async def work(db: PoolManager[Any]) -> None:
    """Acquire three times, one of them after a wait; and time out once."""
    await report(db)
    async with db.connection():
        waiting = asyncio.create_task(report(db))
        await until(lambda: db.snapshot().waiting)
        await asyncio.create_task(report(db, 0))
        await asyncio.sleep(0.06)
    await waiting
