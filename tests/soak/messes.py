"""
Borrowers who leave a mess: one function for each, and the next borrower must not see it.

What only ``reset="discard"`` promises to clear is done in that pool alone.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any

import psycopg
from psycopg.rows import dict_row
from psycopg.types.string import TextLoader

from poolkeeper import ReleasedConnectionError

from .book import require
from .clients import MINE, Visit, forget, work


def mess(function: Callable[[Visit], Awaitable[None]]) -> Callable[[Visit], Awaitable[None]]:
    """Register a borrower."""
    work(f"mess: {function.__name__.replace('_', ' ')}", 1)(function)
    return function


Later = Callable[[Callable[[], Awaitable[Any]]], None]


@asynccontextmanager
async def borrowed(visit: Visit) -> AsyncIterator[tuple[Any, Later]]:
    """
    Acquire with getconn(), and give back with putconn() whatever state it is in.

    What was left open is closed after that, in vain: else the garbage collector would do it, and
    asyncio complain.
    """
    conn = await visit.db.pool.getconn()
    left_open: list[Callable[[], Awaitable[Any]]] = []
    try:
        yield conn, left_open.append
    finally:
        try:
            await visit.db.pool.putconn(conn)
        finally:
            for close in left_open:
                with suppress(psycopg.Error):
                    await close()


@mess
async def attributes(visit: Visit) -> None:
    """Change what can be changed on the object."""
    async with visit.db.connection() as conn:
        await conn.set_isolation_level(psycopg.IsolationLevel.SERIALIZABLE)
        await conn.set_read_only(True)
        await conn.set_deferrable(True)
        await conn.set_autocommit(visit.chance(0.5))
        conn.row_factory = dict_row
        conn.prepare_threshold = visit.random.choice([0, None])
        conn.cursor_factory = psycopg.AsyncClientCursor
        conn.server_cursor_factory = psycopg.AsyncRawServerCursor
        conn.add_notice_handler(print)
        conn.add_notify_handler(print)
        await conn.execute("select 1")


@mess
async def adapters(visit: Visit) -> None:
    """Read numbers as text."""
    async with visit.db.connection() as conn:
        conn.adapters.register_loader("int4", TextLoader)
        rows = await (await conn.execute(MINE, (visit.token, 1))).fetchall()
        require(rows == [(visit.token, "1")], f"own loaders are not used: {rows}")


@mess
async def settings(visit: Visit) -> None:
    """Change settings that the server reports, and others where they are discarded."""
    async with visit.db.connection() as conn:
        await conn.set_autocommit(visit.chance(0.5))
        for statement in visit.random.sample(
            [
                "set time zone 'America/Lima'",
                "set datestyle = 'German'",
                "set search_path = pg_catalog",
                "set application_name = 'somebody'",
                "set default_transaction_read_only = on",
            ],
            2,
        ):
            await conn.execute(statement)
        if visit.discards:
            await conn.execute("set statement_timeout = '99s'")
            await conn.execute("set role stranger")


@mess
async def objects(visit: Visit) -> None:
    """Leave what lives as long as the session."""
    if not visit.discards:
        return
    async with visit.db.connection() as conn:
        await conn.set_autocommit(True)
        for statement in (
            "create temporary table mess (i int)",
            "listen mess",
            "select pg_advisory_lock_shared(1)",
            "prepare mess as select 1",
            "declare mess cursor with hold for select 1",
        ):
            await conn.execute(statement)


@mess
async def open_transaction(visit: Visit) -> None:
    """Give back without a commit: what was done is undone."""
    number = visit.book.money.begins(visit.token)  # and it stays rolled back
    async with borrowed(visit) as (conn, _):
        await conn.execute("insert into transfers values (%s, 1, 2, 5)", (number,))
        if visit.chance(0.3):
            with suppress(psycopg.errors.DivisionByZero):
                await conn.execute("select 1 / 0")


@mess
async def open_block(visit: Visit) -> None:
    """Give back in the middle of a transaction()."""
    async with borrowed(visit) as (conn, later):
        block = conn.transaction()
        await block.__aenter__()
        later(lambda: block.__aexit__(None, None, None))
        await conn.execute("select 1")


@mess
async def open_pipeline(visit: Visit) -> None:
    """Give back in pipeline mode, with answers that are still to come."""
    async with borrowed(visit) as (conn, later):
        pipeline = conn.pipeline()
        await pipeline.__aenter__()
        later(lambda: pipeline.__aexit__(None, None, None))
        for _ in range(visit.random.randrange(3)):
            await conn.execute(MINE, (visit.token, 5))


@mess
async def unread_stream(visit: Visit) -> None:
    """Give back with rows that nobody has read."""
    async with borrowed(visit) as (conn, later):
        rows = conn.cursor().stream(MINE, (visit.token, 5000))
        later(rows.aclose)
        require(await anext(rows) == (visit.token, 1), "the first row of a stream")


@mess
async def left_stream(visit: Visit) -> None:
    """Leave a stream, and the block, as soon as there is a row."""
    async with visit.db.connection() as conn:
        async for row in conn.cursor().stream(MINE, (visit.token, 5000)):
            require(row == (visit.token, 1), "the first row of a stream")
            break


@mess
async def unended_copy(visit: Visit) -> None:
    """Give back in the middle of a COPY, in either direction."""
    async with borrowed(visit) as (conn, later):
        out = visit.chance(0.5)
        copying = conn.cursor().copy(
            "copy (select generate_series(1, 5000)) to stdout" if out else "copy copied from stdin"
        )
        copy = await copying.__aenter__()
        later(lambda: copying.__aexit__(None, None, None))
        await (copy.read() if out else copy.write_row((visit.token, 1)))


@mess
async def running_query(visit: Visit) -> None:
    """Give back while another task of the same borrower is at work on it."""
    async with borrowed(visit) as (conn, _):
        query = asyncio.create_task(conn.execute("select pg_sleep(0.2)"))
        forget(query)  # it is told something; its own fault
        await asyncio.sleep(visit.random.random() * 0.02)
    await asyncio.wait({query})


@mess
async def closed(visit: Visit) -> None:
    """Close the connection instead of giving it back."""
    async with visit.db.connection() as conn:
        await conn.execute("select 1")
        await conn.close()


@mess
async def dropped(visit: Visit) -> None:
    """Forget the connection."""
    conn = await visit.db.pool.getconn()
    if visit.chance(0.5):
        await conn.execute("select 1")
    del conn


@mess
async def twice(visit: Visit) -> None:
    """Give back twice."""
    conn = await visit.db.pool.getconn()
    try:
        await conn.execute("select 1")
    finally:
        await visit.db.pool.putconn(conn)
    with suppress(ReleasedConnectionError):
        await visit.db.pool.putconn(conn)
