"""Work that is not committed is not lost without a word, and nobody is warned who lost nothing."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
from collections.abc import Callable, Iterator
from typing import Any

import psycopg
import pytest

from poolkeeper import LostWorkError, PoolManager
from tests.support.server import admin

MakeManager = Callable[..., PoolManager[Any]]
HERE = "tests/integration/test_lost_work.py"


@pytest.fixture
def table(dsn: str, request: pytest.FixtureRequest) -> Iterator[str]:
    """The name of an empty table of the test's own."""
    name = "lost_" + re.sub(r"\W", "_", request.node.name)[:50].lower()
    admin(dsn, f"drop table if exists {name}; create table {name} (n int unique)")
    yield name
    admin(dsn, f"drop table {name}")


class OwnEnd(psycopg.AsyncConnection[Any]):
    """Ends its blocks itself, as psycopg does."""

    async def __aexit__(self, *exc_info: Any) -> None:
        await super().__aexit__(*exc_info)


@pytest.fixture(params=[psycopg.AsyncConnection, OwnEnd], ids=["psycopg", "own end"])
async def one(
    make_manager: MakeManager, request: pytest.FixtureRequest, caplog: pytest.LogCaptureFixture
) -> PoolManager[Any]:
    """A manager with a single connection."""
    caplog.set_level(logging.INFO)
    db = make_manager(
        connection_class=request.param, min_size=1, max_size=1, name="orders", timeout=10
    )
    await db.open()
    return db


async def lose(conn: Any, dsn: str) -> None:
    """End the session of *conn*, and let it find out."""
    await asyncio.to_thread(
        admin, dsn, "select pg_terminate_backend(%s, 5000)", (conn.info.backend_pid,)
    )
    with contextlib.suppress(psycopg.Error):
        await conn.execute("select 1")
    assert conn.broken


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What was logged as a warning, but for what psycopg_pool says of the lost connection."""
    return [
        record.getMessage()
        for record in caplog.records
        if record.levelno >= logging.WARNING and record.name == "poolkeeper"
    ]


# --- the connection was lost --------------------------------------------------------------------


async def test_a_block_that_swallows_the_loss_of_its_work_is_told(
    one: PoolManager[Any], table: str, dsn: str
) -> None:
    with pytest.raises(LostWorkError) as caught:
        async with one.connection() as conn:
            await conn.execute(f"insert into {table} values (1)")
            await lose(conn, dsn)
    assert isinstance(caught.value, psycopg.OperationalError)
    first, detail, hint = str(caught.value).split("\n")
    assert first == (
        'a connection of pool "orders" was lost with a transaction open: its work is not committed'
    )
    assert re.fullmatch(
        rf'DETAIL:  Acquired in task "[^"]+" at {HERE}:\d+ in \w+\. Its block has ended without an'
        r" error\.",
        detail,
    )
    assert "errors#lost-work or run: " in hint
    assert await one.fetchval(f"select count(*) from {table}") == 0


async def test_an_explicit_transaction_that_swallows_it_is_told(
    one: PoolManager[Any], table: str, dsn: str
) -> None:
    with pytest.raises(LostWorkError):
        async with one.connection() as conn, conn.transaction():
            await conn.execute(f"insert into {table} values (1)")
            await lose(conn, dsn)
    with pytest.raises(LostWorkError):
        async with one.transaction() as conn:
            await conn.execute(f"insert into {table} values (1)")
            await lose(conn, dsn)


async def test_who_has_committed_before_is_told_nothing(
    one: PoolManager[Any], table: str, dsn: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with one.connection() as conn:
        await conn.execute(f"insert into {table} values (1)")
        await conn.commit()
        await lose(conn, dsn)
    async with one.connection() as conn:
        await conn.set_autocommit(True)
        await conn.execute(f"insert into {table} values (2)")
        await lose(conn, dsn)
    async with one.connection() as conn:
        await conn.set_read_only(True)
        await conn.execute(f"select n from {table}")
        await lose(conn, dsn)
    async with one.connection() as conn:
        await conn.execute(f"insert into {table} values (3)")
        await conn.close()  # on purpose
    async with one.connection() as conn:
        await lose(conn, dsn)
    assert await one.fetchall(f"select n from {table} order by n") == [(1,), (2,)]
    assert warnings(caplog) == []


async def test_who_gives_up_the_work_that_is_lost_is_told_nothing(
    one: PoolManager[Any], table: str, dsn: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with one.connection() as conn:
        await conn.execute(f"insert into {table} values (1)")
        await lose(conn, dsn)
        await conn.close()
    async with one.connection() as conn:
        await conn.execute(f"insert into {table} values (1)")
        await lose(conn, dsn)
        with pytest.raises(psycopg.OperationalError):
            await conn.rollback()
    async with one.transaction() as conn:
        await lose(conn, dsn)  # before anything was done
    assert warnings(caplog) == []


async def test_an_error_that_ends_the_block_is_the_error(
    one: PoolManager[Any], table: str, dsn: str
) -> None:
    with pytest.raises(ZeroDivisionError):
        async with one.connection() as conn:
            await conn.execute(f"insert into {table} values (1)")
            await lose(conn, dsn)
            raise ZeroDivisionError


# --- its transaction had failed -----------------------------------------------------------------


async def test_a_block_that_ends_well_in_a_transaction_that_has_failed_is_warned_of(
    one: PoolManager[Any], table: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with one.connection() as conn:
        await conn.execute(f"insert into {table} values (1)")
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(0.1):
                await conn.execute("select pg_sleep(30)")
    async with one.transaction() as conn:
        await conn.execute(f"insert into {table} values (1)")
        with contextlib.suppress(psycopg.Error):
            await conn.execute("select 1/0")
    assert await one.fetchval(f"select count(*) from {table}") == 0
    first, second = warnings(caplog)
    for message in (first, second):
        assert re.fullmatch(
            'pool "orders": a transaction had failed, and its error was not passed on: what was'
            rf' done in it before is rolled back. Acquired in task "[^"]+" at {HERE}:\d+ in \w+',
            message,
        )


async def test_a_statement_that_fails_by_itself_loses_nothing(
    one: PoolManager[Any], table: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with one.connection() as conn:
        await conn.execute(f"insert into {table} values (1)")
    async with one.connection() as conn:
        with contextlib.suppress(psycopg.errors.UniqueViolation):
            await conn.execute(f"insert into {table} values (1)")
    async with one.transaction() as conn:
        with contextlib.suppress(psycopg.errors.UniqueViolation):
            await conn.execute(f"insert into {table} values (1)")
    async with one.connection() as conn:
        await conn.execute(f"insert into {table} values (2)")
        with contextlib.suppress(psycopg.errors.UniqueViolation):
            async with conn.transaction():
                await conn.execute(f"insert into {table} values (1)")
    async with one.connection() as conn:
        await conn.execute(f"insert into {table} values (3)")
        with contextlib.suppress(psycopg.Error):
            await conn.execute("select 1/0")
        await conn.rollback()
    async with one.connection() as conn:  # psycopg stops the rest, which fails
        async for _ in conn.cursor().stream("select generate_series(1, 100000)"):
            break
    assert await one.fetchall(f"select n from {table} order by n") == [(1,), (2,)]
    assert warnings(caplog) == []


# --- given back by hand -------------------------------------------------------------------------


async def test_putconn_of_work_that_is_not_committed_is_warned_of(
    one: PoolManager[Any], table: str, caplog: pytest.LogCaptureFixture
) -> None:
    conn = await one.pool.getconn()
    pid = conn.info.backend_pid
    await conn.execute(f"insert into {table} values (1)")
    await one.pool.putconn(conn)
    assert await one.fetchval(f"select count(*) from {table}") == 0
    (message,) = warnings(caplog)
    assert re.fullmatch(
        'pool "orders": a connection was given back with work that is not committed: rolled back.'
        rf' Acquired in task "[^"]+" at {HERE}:\d+ in \w+',
        message,
    )
    assert await one.fetchval("select pg_backend_pid()") == pid


async def test_putconn_after_reading_is_not(
    one: PoolManager[Any], table: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The bare pool warns of each one."""
    conn = await one.pool.getconn()
    for _ in range(8):  # so that it is prepared
        await conn.execute(f"select n from {table}")
    await one.pool.putconn(conn)
    conn = await one.pool.getconn()
    assert await (await conn.execute(f"select n from {table}")).fetchall() == []
    with contextlib.suppress(psycopg.Error):
        await conn.execute("select 1/0")
    await conn.rollback()
    await one.pool.putconn(conn)
    assert warnings(caplog) == []
    assert "rolling back" not in caplog.text


async def test_putconn_on_the_way_out_with_an_error_is_not(
    one: PoolManager[Any], table: str, caplog: pytest.LogCaptureFixture
) -> None:
    conn = await one.pool.getconn()
    with pytest.raises(ZeroDivisionError):
        try:
            await conn.execute(f"insert into {table} values (1)")
            raise ZeroDivisionError
        finally:
            await one.pool.putconn(conn)
    assert await one.fetchval(f"select count(*) from {table}") == 0
    assert warnings(caplog) == []


async def test_what_was_prepared_before_a_roll_back_is_not_missed_after_it(
    one: PoolManager[Any],
) -> None:
    """The server forgets it with the roll-back, and not when the next borrower has prepared."""
    conn = await one.pool.getconn()
    await conn.execute("select 1", prepare=True)
    await one.pool.putconn(conn)
    for _ in range(2):
        async with one.connection() as conn:
            for query in ("select 1", "select 2"):
                await conn.execute(query, prepare=True)
                await conn.execute(query, prepare=True)
