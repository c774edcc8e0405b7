"""
How a one-shot becomes what is sent, and its answer rows: by psycopg's own conversion.

psycopg looks up for each statement what it converts with, and makes it. A `Converter` remembers it
for those of a server session: it depends on the adapters of the session, and on parameters that
the server reports. What adapters of the user's depend on is not known (the task that asks, say):
where there are any, all is made for each statement, as psycopg does.

Nobody is shown the handle of the session itself, so it can be the next one-shot's as well: what
dumpers, loaders and row factories see is a copy.
"""
# A statement is converted with what psycopg's cursors use.
# pyright: reportPrivateUsage=false

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from psycopg._queries import PostgresQuery
from psycopg.abc import Buffer
from psycopg.adapt import Transformer

from ._asked import Asked, maker_of
from ._connection import ShownConnection

LASTS = 1.0
"""Seconds after which it is made anew: psycopg's defaults, which all share, may have changed."""

MOST = 100
"""How many texts are remembered."""

LARGE = 8192
"""Bytes of parameters that are sent behind nobody."""


class Converter:
    """
    Converts the one-shots of one session.

    Stands in for the connection that a `Transformer` is for.

    Args:
        conn: The handle of the session, which nobody has seen.
        now: The time.
    """

    __slots__ = ("_queries", "_remembers", "_until", "adapters", "connection", "transformer")

    def __init__(self, conn: Any, now: float) -> None:
        self.adapters = conn._adapters
        self.connection: Any = ShownConnection.of(conn)
        self._remembers = conn._session.converts_like_psycopg and not self.adapters.handed_out
        self._until = now + LASTS
        self.transformer = Transformer(self)
        self._queries: dict[Any, PostgresQuery] = {}

    def fits(self, conn: Any, now: float) -> bool:
        """Tell whether it is still as one that would be made now."""
        return now < self._until and conn._adapters is self.adapters

    def converted(self, asked: Asked, query: Any, params: Any, factory: Any) -> PostgresQuery:
        """
        Return what is to be sent for *asked*; good until the next is converted.

        Raises:
            psycopg.Error, or what the user's dumpers raise: It cannot be converted.
        """
        if (make_row := maker_of(factory)) is None:
            asked.cursor = cursor = self.connection.cursor(row_factory=factory)
            cursor._tx = Transformer(cursor)
            converted = cursor._query = PostgresQuery(cursor._tx)
            converted.convert(query, params)
            return converted
        # It takes no cursor, which costs as much as all the rest.
        asked.make_row = make_row
        if not self._remembers:
            asked.transformer = Transformer(self)
            converted = PostgresQuery(asked.transformer)
            converted.convert(query, params)
            return converted
        asked.transformer = transformer = self.transformer
        key = (query,) if params is None else query
        known = self._queries.get(key)
        if known is None:
            known = PostgresQuery(transformer)
            known.convert(query, params)
            if len(self._queries) >= MOST:
                del self._queries[next(iter(self._queries))]
            self._queries[key] = known
        elif params is not None:
            known.dump(params)
        return known


def are_large(values: Sequence[Buffer | None]) -> bool:
    """Tell whether *values*, as they are sent, are to be sent behind nobody."""
    try:
        return sum(map(len, filter(None, values))) > LARGE
    except (TypeError, ValueError):  # a buffer without a length, or no buffer: libpq shall see
        return True
