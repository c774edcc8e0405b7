"""
What every program of the demo uses to tell what happened.

A module of its own, inside the package, so that poolkeeper's messages name the line of the
program and not one of these.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Awaitable
from time import perf_counter
from typing import Any, NoReturn, TypeAlias

from psycopg import AsyncConnection
from psycopg_pool import AsyncConnectionPool

from poolkeeper import PoolManager

AnyPool: TypeAlias = "AsyncConnectionPool[AsyncConnection[Any]] | PoolManager[AsyncConnection[Any]]"


class _Log(logging.Handler):
    """Keeps what the libraries log, which would be noise on the screen."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(f"{record.levelname} {record.name}: {record.getMessage()}")


log = _Log()


def report(**facts: Any) -> None:
    """Print what happened, for `programs.run()` to read."""
    sys.stdout.write(json.dumps(facts, default=str) + "\n")
    sys.stdout.flush()


def finish(**facts: Any) -> NoReturn:
    """Print what happened and end, in whatever state the pool is."""
    report(**facts)
    os._exit(0)


async def attempt(work: Awaitable[Any]) -> dict[str, Any]:
    """Await *work*, and return how long it took and what error it raised."""
    begin = perf_counter()
    error: Exception | None = None
    try:
        await work
    except Exception as ex:
        error = ex
    seconds = perf_counter() - begin
    return {
        "seconds": seconds,
        "error": type(error).__name__ if error else None,
        "message": str(error) if error else None,
        "cause": str(error.__cause__) if error and error.__cause__ else None,
        "log": log.lines[-1] if log.lines else None,
    }


async def ask(pool: AnyPool, query: Any = "select 1") -> Any:
    """Run one query on a connection of its own and return its one value."""
    async with pool.connection() as conn:
        row = await (await conn.execute(query)).fetchone()
        return row[0] if row else None
