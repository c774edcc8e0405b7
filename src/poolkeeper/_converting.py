"""
How a one-shot becomes what is sent, and its answer rows: by psycopg's own conversion.

psycopg looks up for each statement what it converts with. A `Converter` remembers it for those of
a server session: it depends on the adapters of the session, and on parameters that the server
reports.

Nobody is shown the handle of the session itself, so it can be the next one-shot's as well: what
dumpers, loaders and row factories see is a copy.
"""
# A statement is converted with what psycopg's cursors use.
# pyright: reportPrivateUsage=false

from __future__ import annotations

from typing import Any

from psycopg._queries import PostgresQuery
from psycopg.adapt import Transformer

from ._asked import MAKERS, Asked
from ._connection import ShownConnection

LASTS = 1.0
"""Seconds after which it is made anew: psycopg's defaults, which all share, may have changed."""

MOST = 100
"""How many texts are remembered."""


class Converter:
    """
    Converts the one-shots of one session.

    Stands in for the connection that a `Transformer` is for.

    Args:
        conn: The handle of the session, which nobody has seen.
        now: The time.
    """

    __slots__ = ("_queries", "_until", "adapters", "connection", "transformer")

    def __init__(self, conn: Any, now: float) -> None:
        self.adapters = conn._adapters
        self.connection: Any = ShownConnection.of(conn)
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
        asked.make_row = MAKERS.get(factory)
        if asked.make_row is None:
            asked.cursor = cursor = self.connection.cursor(row_factory=factory)
            cursor._tx = Transformer(cursor)
            converted = cursor._query = PostgresQuery(cursor._tx)
            converted.convert(query, params)
            return converted
        # It takes no cursor, which costs as much as all the rest.
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
