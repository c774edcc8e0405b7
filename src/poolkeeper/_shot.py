"""
One-shots: what is asked, and the plain way to run it: by psycopg's cursor, on its own connection.

`_oneshots` knows a faster one, for most statements; this one is for all.
"""
# A pool's life, and what it was made with, are not its users'.
# pyright: reportPrivateUsage=false

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from types import FrameType, TracebackType
from typing import Any, Generic, NamedTuple, TypeVar

import psycopg
from psycopg import AsyncCursor
from typing_extensions import override

from ._asked import Asked, all_rows, first_row, rowcount
from ._block import CheckoutContext
from ._life import Pool
from ._statements import Known
from .errors import PoolkeeperError, QueryTimeout, see

T = TypeVar("T")


class Fetch(NamedTuple, Generic[T]):
    """What a one-shot returns."""

    by_cursor: Callable[[AsyncCursor[Any]], Awaitable[T]]
    """Asks any cursor for it."""

    at_once: Callable[[Any, Any, Any], T]
    """Makes it of a result, with a transformer and what makes a row."""


class OneShot:
    """
    One statement that is run by itself.

    Args:
        query: The statement.
        params: Its parameters.
        row_factory: How its rows are made; None for the connection's way.
        fetch: What is returned.
        timeout: Seconds to wait for a connection; None for the pool's own.
        query_timeout: Seconds that the statement may take.
        frame: Who asks.
    """

    __slots__ = (
        "fetch", "first", "frame", "known", "lineno", "params", "query", "query_timeout",
        "row_factory", "shares", "since", "timeout", "told",
    )  # fmt: skip

    def __init__(
        self,
        query: Any,
        params: Any,
        row_factory: Any,
        fetch: Fetch[Any],
        timeout: float | None,
        query_timeout: float | None,
        frame: FrameType,
    ) -> None:
        self.query = query
        self.params = params
        self.row_factory = row_factory
        self.fetch = fetch
        self.timeout = timeout
        self.query_timeout = query_timeout
        self.frame: Any = frame
        self.lineno = frame.f_lineno
        self.since = 0.0
        """Since when it waits for a connection, if it was sent and moved."""
        self.shares = False
        """True if a place on a lane will do."""
        self.first: tuple[Any, Asked] | None = None
        """The lane that it was on first, if the server runs it there all the same."""
        self.told: tuple[Any, float] | None = None
        """By whom, and since when it has its connection, if that was told."""
        self.known: Known


async def by_cursor(pool: Pool, shot: OneShot) -> Any:
    """Run *shot* by a cursor, on a connection of its own."""
    checkout: Any = CheckoutContext(pool, shot.timeout, shot.frame, True)
    shot.frame = None  # a frame keeps all its variables alive
    if shot.query_timeout is not None:
        checkout = _TimedCheckout(checkout, shot.query_timeout)
    try:
        async with checkout as conn:
            if not conn.autocommits():
                # For this checkout only: what comes back is made as it was.
                await conn.set_autocommit(True)
            factory = shot.row_factory
            cursor: AsyncCursor[Any] = (
                conn.cursor(row_factory=factory) if factory else conn.cursor()
            )
            # psycopg takes a Template only without params, and says so.
            await cursor.execute(shot.query, shot.params)
            return await shot.fetch.by_cursor(cursor)
    except (PoolkeeperError, psycopg.Error) as ex:
        raise ex.with_traceback(None)  # noqa: B904 - see briefly()


class _TimedCheckout(AbstractAsyncContextManager[Any]):
    """A checkout that ends by itself: *seconds* after its connection was acquired."""

    def __init__(self, checkout: CheckoutContext[Any], seconds: float) -> None:
        self._checkout = checkout
        self._seconds = seconds

    @override
    async def __aenter__(self) -> Any:
        self._conn = await self._checkout.__aenter__()
        self._limit = asyncio.timeout(self._seconds)
        await self._limit.__aenter__()
        return self._conn

    @override
    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            await self._limit.__aexit__(exc_type, exc, traceback)
        except TimeoutError:
            error = self._timed_out()
            await self._checkout.__aexit__(type(error), error, None)
            raise error from None  # before it is our own cancellation, through all of psycopg
        await self._checkout.__aexit__(exc_type, exc, traceback)

    def _timed_out(self) -> QueryTimeout:
        conn = self._conn
        return query_timeout(conn._binding.name, str(conn._checkout), self._seconds, conn.closed)


def query_timeout(
    name: str, asked: str, seconds: float, closed: bool, stopped: bool = True
) -> QueryTimeout:
    """
    Return the error for a statement that took longer than *seconds*.

    Args:
        name: Of the pool.
        asked: By whom, and where.
        seconds: The `query_timeout`.
        closed: True if its connection is.
        stopped: True if the server was asked to stop it.
    """
    if closed:
        end = "did not stop it within a second, so its connection was closed"
    elif stopped:
        end = "was asked to stop it, and its connection is still good"
    else:
        end = "goes on with it, for others wait on the same connection: nobody gets its answer"
    return QueryTimeout(
        f'a statement on pool "{name}" took longer than query_timeout={seconds:.2f} s',
        detail=f"Asked {asked}. There was a connection; the server {end}.",
        hint="Look at what the server does meanwhile: EXPLAIN, pg_locks; or give it more time."
        " What the statement changes may be done all the same, if it was at its end: look"
        f" before you do it again. {see('query-timeout')}",
    )


async def _rowcount(cursor: AsyncCursor[Any]) -> int:
    return cursor.rowcount


async def _first_row(cursor: AsyncCursor[Any]) -> Any:
    # As cursor.description would tell, which describes each column for it.
    return await cursor.fetchone() if cursor.rownumber is not None else None


async def _all_rows(cursor: AsyncCursor[Any]) -> list[Any]:
    return await cursor.fetchall() if cursor.rownumber is not None else []


ROWCOUNT = Fetch(_rowcount, rowcount)
FIRST_ROW = Fetch(_first_row, first_row)
ALL_ROWS = Fetch(_all_rows, all_rows)
