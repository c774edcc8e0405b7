"""
`BoundPool` and `BoundNullPool` in the place of psycopg_pool's classes, by one line.

From the default of ``connection_class`` pyright infers nothing, with psycopg_pool's classes as
with these; so where none is given the type is written down.
"""

from __future__ import annotations

from typing import Any, assert_type

from psycopg import AsyncConnection
from psycopg.rows import DictRow, TupleRow
from psycopg_pool import AsyncConnectionPool as TheirPool
from psycopg_pool import AsyncNullConnectionPool as TheirNullPool

from poolkeeper import BoundNullPool as AsyncNullConnectionPool
from poolkeeper import BoundPool as AsyncConnectionPool


class MyConn(AsyncConnection[DictRow]):
    """A user's own class, whose rows are dicts."""


async def configure(conn: AsyncConnection[Any]) -> None:
    """Set up a connection."""


async def by_default() -> None:
    pool: AsyncConnectionPool[AsyncConnection[TupleRow]] = AsyncConnectionPool(
        "postgresql:///orders", check=AsyncConnectionPool.check_connection, open=False
    )
    async with pool as entered:
        assert_type(entered, AsyncConnectionPool[AsyncConnection[TupleRow]])
    async with pool.connection() as conn:
        assert_type(conn, AsyncConnection[TupleRow])
    conn = await pool.getconn(timeout=1)
    assert_type(conn, AsyncConnection[TupleRow])
    await pool.putconn(conn)
    await pool.wait(timeout=1)


async def with_a_class_of_ones_own() -> None:
    pool = AsyncConnectionPool(
        "postgresql:///orders",
        connection_class=MyConn,
        configure=configure,
        open=False,
    )
    assert_type(pool, AsyncConnectionPool[MyConn])
    async with pool.connection() as conn:
        assert_type(conn, MyConn)


async def of_a_class_that_is_written_down() -> None:
    pool: AsyncConnectionPool[AsyncConnection[DictRow]] = AsyncConnectionPool(
        "postgresql:///orders",
        connection_class=AsyncConnection[DictRow],
        kwargs={"autocommit": True},
        open=False,
    )
    async with pool.connection() as conn:
        assert_type(conn, AsyncConnection[DictRow])


async def without_keeping_any() -> None:
    pool: AsyncNullConnectionPool[AsyncConnection[TupleRow]] = AsyncNullConnectionPool(
        "postgresql:///orders", max_size=4, open=False
    )
    async with pool, pool.connection() as conn:
        assert_type(conn, AsyncConnection[TupleRow])


def theirs(pool: TheirPool[AsyncConnection[TupleRow]]) -> None:
    """Take what a library's annotation asks for."""


def their_null_pool(pool: TheirNullPool[AsyncConnection[TupleRow]]) -> None:
    """Take what a library's annotation asks for."""


def handed_to_a_library() -> None:
    theirs(AsyncConnectionPool("postgresql:///orders", open=False))
    theirs(AsyncNullConnectionPool("postgresql:///orders", open=False))
    their_null_pool(AsyncNullConnectionPool("postgresql:///orders", open=False))
