"""Wait for a condition, not for a time."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable


async def until(holds: Callable[[], object], within: float = 20.0) -> None:
    """
    Wait until *holds* does, while the loop goes on.

    Raises:
        TimeoutError: If it does not within so many seconds.
    """
    async with asyncio.timeout(within):
        while not holds():
            await asyncio.sleep(0.005)


def eventually(holds: Callable[[], object], within: float = 20.0) -> bool:
    """Wait until *holds* does, with the thread; for what others do in their own time."""
    end = time.monotonic() + within
    while not holds():
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True
