"""`PoolManager` is generic over the connection class, and so over the rows."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, assert_type

from psycopg import AsyncConnection, AsyncCursor, IsolationLevel
from psycopg.rows import DictRow, TupleRow, class_row, dict_row, namedtuple_row, scalar_row
from psycopg.sql import SQL, Identifier
from psycopg_pool import AsyncConnectionPool

from poolkeeper import BoundPool, Health, OpenError, PoolManager, PoolSnapshot, events


@dataclass
class Order:
    id: int
    label: str


class MyConn(AsyncConnection[DictRow]):
    """A user's own class, whose rows are dicts."""

    tenant: str = ""


# --- by default: psycopg's own connection and tuples ---------------------------------------


async def by_default() -> None:
    db = PoolManager("postgresql:///orders")
    assert_type(db, PoolManager[AsyncConnection[TupleRow]])
    assert_type(db.pool, BoundPool[AsyncConnection[TupleRow]])
    assert_type(db.name, str)
    assert_type(db.state, str)

    async with db as entered:
        assert_type(entered, PoolManager[AsyncConnection[TupleRow]])

    async with db.connection() as conn:
        assert_type(conn, AsyncConnection[TupleRow])
        cur = await conn.execute("select 1")
        assert_type(cur, AsyncCursor[TupleRow])
        assert_type(await cur.fetchone(), TupleRow | None)

    async with db.connection(timeout=1) as conn:
        assert_type(conn, AsyncConnection[TupleRow])
    async with db.connection(1, caller=by_default) as conn:
        assert_type(conn, AsyncConnection[TupleRow])
    async with db.connection(caller=sys._getframe(1)) as conn:
        assert_type(conn, AsyncConnection[TupleRow])

    async with db.transaction() as conn:
        assert_type(conn, AsyncConnection[TupleRow])
    async with db.transaction(
        isolation="serializable", read_only=True, deferrable=True, timeout=1
    ) as conn:
        assert_type(conn, AsyncConnection[TupleRow])
    async with db.transaction(isolation=IsolationLevel.REPEATABLE_READ) as conn:
        assert_type(conn, AsyncConnection[TupleRow])

    async with db.cursor() as cursor:
        assert_type(cursor, AsyncCursor[TupleRow])
        assert_type(await cursor.fetchall(), list[TupleRow])
    async with db.cursor(binary=True, timeout=1) as cursor:
        assert_type(cursor, AsyncCursor[TupleRow])

    assert_type(await db.fetchone("select 1"), TupleRow | None)
    assert_type(await db.fetchall("select 1"), list[TupleRow])
    assert_type(await db.fetchval("select 1"), Any)
    assert_type(await db.execute("delete from orders"), int)

    health = await db.check()
    assert_type(health, Health)
    assert_type(await db.check(0.5), Health)
    assert_type(await db.check(timeout=1), Health)
    assert_type((health.ok, health.reason, health.beside), tuple[bool, str, bool])
    assert_type((health.kind, OpenError().kind), tuple[str, str])
    assert_type(health.seconds, float)
    assert_type(health.snapshot, PoolSnapshot)

    assert_type(await db.open(), None)
    assert_type(await db.open(wait=False, timeout=3), None)
    assert_type(await db.close(), None)
    assert_type(await db.close(timeout=3), None)


class OnAnObject:
    """An attribute without a type argument has psycopg's default too."""

    db: PoolManager

    async def row(self) -> TupleRow | None:
        assert_type(self.db, PoolManager[AsyncConnection[TupleRow]])
        return await self.db.fetchone("select 1")


# --- rows of another kind, for the whole pool ----------------------------------------------


async def rows_by_connection_class() -> None:
    db = PoolManager(
        "postgresql:///orders",
        connection_class=AsyncConnection[DictRow],
        kwargs={"row_factory": dict_row},
    )
    assert_type(db, PoolManager[AsyncConnection[DictRow]])
    await dict_rows(db)


async def rows_by_annotation() -> None:
    db: PoolManager[AsyncConnection[DictRow]] = PoolManager(
        "postgresql:///orders", kwargs={"row_factory": dict_row}
    )
    await dict_rows(db)


async def rows_by_type_argument() -> None:
    db = PoolManager[AsyncConnection[DictRow]](
        "postgresql:///orders", kwargs={"row_factory": dict_row}
    )
    assert_type(db, PoolManager[AsyncConnection[DictRow]])
    await dict_rows(db)


class Repository:
    """The annotation stands here, the manager is made elsewhere."""

    db: PoolManager[AsyncConnection[DictRow]]


async def rows_on_an_object(repository: Repository) -> None:
    await dict_rows(repository.db)


async def dict_rows(db: PoolManager[AsyncConnection[DictRow]]) -> None:
    async with db.connection() as conn:
        assert_type(conn, AsyncConnection[DictRow])
        assert_type(await (await conn.execute("select 1 as n")).fetchone(), DictRow | None)
    async with db.transaction() as conn:
        assert_type(conn, AsyncConnection[DictRow])
    async with db.cursor() as cursor:
        assert_type(cursor, AsyncCursor[DictRow])
    row = await db.fetchone("select 1 as n")
    assert_type(row, DictRow | None)
    rows = await db.fetchall("select 1 as n")
    assert_type(rows, list[DictRow])
    assert_type([row["n"] for row in rows], list[Any])
    assert_type(db.pool, BoundPool[AsyncConnection[DictRow]])


# --- a connection class of the user's own --------------------------------------------------


async def own_class() -> None:
    db = PoolManager("postgresql:///orders", connection_class=MyConn)
    assert_type(db, PoolManager[MyConn])
    assert_type(db.pool, BoundPool[MyConn])
    async with db.connection() as conn:
        assert_type(conn, MyConn)
        assert_type(conn.tenant, str)
    async with db.transaction() as conn:
        assert_type(conn, MyConn)
    async with db.cursor() as cursor:
        assert_type(cursor, AsyncCursor[DictRow])
    assert_type(await db.fetchone("select 1 as n"), DictRow | None)
    assert_type(await db.fetchall("select 1 as n"), list[DictRow])
    # What needs rows only takes it as well: the manager is covariant.
    await dict_rows_of_any_class(db)


async def dict_rows_of_any_class(db: PoolManager[AsyncConnection[DictRow]]) -> None: ...


# --- rows of another kind, for one statement -----------------------------------------------


async def rows_of_one_statement(db: PoolManager) -> None:
    assert_type(
        await db.fetchone("select id, label from orders", row_factory=class_row(Order)),
        Order | None,
    )
    assert_type(
        await db.fetchall("select id, label from orders", row_factory=class_row(Order)),
        list[Order],
    )
    async with db.cursor(row_factory=class_row(Order)) as cursor:
        assert_type(cursor, AsyncCursor[Order])
        assert_type(await cursor.fetchone(), Order | None)
        async for order in cursor:
            assert_type(order, Order)
    assert_type(await db.fetchone("select 1 as n", row_factory=dict_row), DictRow | None)
    assert_type(await db.fetchall("select 1", row_factory=scalar_row), list[Any])
    assert_type(await db.fetchall("select 1 as n", row_factory=namedtuple_row), list[NamedTuple])


async def rows_of_one_statement_on_own_class(db: PoolManager[MyConn]) -> None:
    assert_type(await db.fetchone("select 1", row_factory=class_row(Order)), Order | None)
    async with db.cursor(row_factory=class_row(Order), binary=True) as cursor:
        assert_type(cursor, AsyncCursor[Order])


# --- queries and parameters ----------------------------------------------------------------


async def queries(db: PoolManager) -> None:
    await db.execute("update orders set label = %s where id = %s", ("x", 1))
    await db.execute("update orders set label = %(label)s", {"label": "x"})
    await db.execute(b"select 1", [1], timeout=2)
    await db.execute(SQL("truncate {}").format(Identifier("orders")))
    await db.fetchval("select %s", (1,), timeout=2)
    await db.fetchone("select %s", (1,), timeout=2)
    await db.fetchall("select %s", (1,), timeout=2)


# --- what the constructor takes ------------------------------------------------------------


async def conninfo_later() -> str:
    return "postgresql:///orders"


def conninfo_now() -> str:
    return "postgresql:///orders"


async def kwargs_later() -> dict[str, Any]:
    return {"autocommit": True}


def kwargs_now() -> dict[str, Any]:
    return {"autocommit": True}


async def configure(conn: AsyncConnection[Any]) -> None:
    await conn.execute("select 1")


async def configure_mine(conn: MyConn) -> None:
    conn.tenant = "x"


def gave_up(pool: AsyncConnectionPool[Any]) -> None: ...


async def gave_up_later(pool: AsyncConnectionPool[Any]) -> None: ...


async def arguments() -> None:
    assert_type(PoolManager(), PoolManager[AsyncConnection[TupleRow]])
    PoolManager(conninfo_now, kwargs=kwargs_now, reconnect_failed=gave_up)
    PoolManager(conninfo_later, kwargs=kwargs_later, reconnect_failed=gave_up_later)
    PoolManager(configure=configure, check=configure, reset=configure)
    PoolManager(check=AsyncConnectionPool.check_connection, reset="discard")
    assert_type(
        PoolManager(connection_class=MyConn, configure=configure_mine, reset=configure),
        PoolManager[MyConn],
    )
    PoolManager(
        "",
        min_size=1,
        max_size=2,
        open=False,
        name="orders",
        close_returns=True,
        timeout=3,
        max_waiting=10,
        max_lifetime=60,
        max_idle=60,
        reconnect_timeout=5,
        num_workers=1,
        open_timeout=5,
        close_timeout=5,
        application_name="orders",
        expected_processes=4,
    )


# --- the pool, for libraries that ask for psycopg's ----------------------------------------


def asks_for_any_pool(pool: AsyncConnectionPool[Any]) -> None: ...


def asks_for_a_pool_of_connections(pool: AsyncConnectionPool[AsyncConnection[Any]]) -> None: ...


def asks_for_a_pool_of_dict_rows(pool: AsyncConnectionPool[AsyncConnection[DictRow]]) -> None: ...


def asks_for_a_pool(pool: AsyncConnectionPool) -> None: ...


async def hand_over(
    db: PoolManager, dicts: PoolManager[AsyncConnection[DictRow]], mine: PoolManager[MyConn]
) -> None:
    asks_for_any_pool(db.pool)
    asks_for_a_pool_of_connections(db.pool)
    asks_for_a_pool(db.pool)
    asks_for_any_pool(dicts.pool)
    asks_for_a_pool_of_connections(dicts.pool)
    asks_for_a_pool_of_dict_rows(dicts.pool)
    asks_for_any_pool(mine.pool)

    async with db.pool.connection(timeout=1) as conn:
        assert_type(conn, AsyncConnection[TupleRow])
    conn = await db.pool.getconn()
    assert_type(conn, AsyncConnection[TupleRow])
    assert_type(await db.pool.putconn(conn), None)
    async with mine.pool.connection() as own:
        assert_type(own, MyConn)
    assert_type(db.pool.get_stats(), dict[str, int])


# --- what happens to it ------------------------------------------------------------------------


def of_any_event(event: events.Event) -> None: ...


def of_a_time_out(event: events.TimedOut) -> str:
    return event.cause


def of_a_checkout(event: events.Acquired | events.Released) -> None:
    assert_type(event.caller, events.Caller)


def subscribe(db: PoolManager, pool: BoundPool) -> None:
    assert_type(db.subscribe(of_any_event), Callable[[], None])
    assert_type(db.subscribe(of_a_time_out, events.TimedOut), Callable[[], None])
    db.subscribe(of_any_event, events.TimedOut, events.Closed)
    pool.subscribe(of_a_time_out, events.TimedOut)
