"""
What a type checker must refuse.

Each ignore below is used: both checkers are told to complain about one that is not.
"""

from __future__ import annotations

from typing import Any

import psycopg
from psycopg import AsyncConnection
from psycopg.rows import DictRow, TupleRow, dict_row
from psycopg_pool import AsyncConnectionPool

import poolkeeper
from poolkeeper import PoolManager, events


class MyConn(AsyncConnection[DictRow]):
    """A user's own class."""


def not_async(conn: AsyncConnection[Any]) -> None: ...


async def for_mine(conn: MyConn) -> None: ...


def of_names() -> None:
    """Although some are loaded later, by a function that is asked for any name."""
    print(poolkeeper.Snapshot)  # type: ignore[attr-defined]  # pyright: ignore[reportAttributeAccessIssue, reportUnknownMemberType, reportUnknownArgumentType]


def of_the_constructor() -> None:
    PoolManager(42)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    PoolManager("", 4)  # type: ignore[call-arg, arg-type]  # pyright: ignore[reportCallIssue]
    PoolManager(min_size="4")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    PoolManager(minsize=4)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    PoolManager(reset="drop")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    PoolManager(check="discard")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    PoolManager(configure=not_async)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    PoolManager(kwargs=[("autocommit", True)])  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    PoolManager(connection_class=psycopg.Connection)  # type: ignore[type-var]  # pyright: ignore[reportArgumentType]
    # A callback for another class than the pool's.
    PoolManager(connection_class=AsyncConnection[TupleRow], configure=for_mine)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]


def of_annotations(tuples: PoolManager[AsyncConnection[TupleRow]]) -> None:
    dicts: PoolManager[AsyncConnection[DictRow]]
    dicts = tuples  # type: ignore[assignment]  # pyright: ignore[reportAssignmentType]
    mine: PoolManager[MyConn]
    mine = dicts  # type: ignore[assignment]  # pyright: ignore[reportAssignmentType]
    del mine


def of_arguments_of_the_type(db: PoolManager[int]) -> None: ...  # type: ignore[type-var]  # pyright: ignore[reportInvalidTypeArguments]


def asks_for_a_pool_of_dict_rows(pool: AsyncConnectionPool[AsyncConnection[DictRow]]) -> None: ...


async def of_use(db: PoolManager, query: str) -> None:
    db.connection("5")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    db.transaction(isolation="paranoid")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    db.transaction("serializable")  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    db.cursor(row_factory=dict)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    await db.execute(1)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    # psycopg asks for a literal, as a guard against SQL injection; so do we.
    await db.execute(f"select {query}")  # pyright: ignore[reportArgumentType]
    await db.execute("select %s", 1)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    await db.fetchall("select 1", row_factory=42)  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType]
    (await db.fetchone("select 1"))[0]  # type: ignore[index]  # pyright: ignore[reportOptionalSubscript]
    count: str = await db.execute("select 1")  # type: ignore[assignment]  # pyright: ignore[reportAssignmentType]
    db.name = "other"  # type: ignore[misc]  # pyright: ignore[reportAttributeAccessIssue]
    asks_for_a_pool_of_dict_rows(db.pool)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    with db:  # type: ignore[attr-defined]  # pyright: ignore[reportGeneralTypeIssues]
        pass
    with db.connection():  # type: ignore[attr-defined]  # pyright: ignore[reportGeneralTypeIssues]
        pass
    del count


async def rows_that_a_row_factory_alone_does_not_type() -> None:
    # kwargs are plain values to a type checker: say it with connection_class too.
    db = PoolManager("", kwargs={"row_factory": dict_row})
    row = await db.fetchone("select 1 as n")
    assert row is not None
    row["n"]  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType,reportCallIssue]


def of_one_kind(event: events.TimedOut) -> None: ...


def of_events(db: PoolManager) -> None:
    db.subscribe(of_one_kind)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    db.subscribe(of_one_kind, events.Closed)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    db.subscribe("print")  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType]
