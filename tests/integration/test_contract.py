"""What docs/semantics.md says of psycopg_pool, point by point: complete, and tried on both."""

from __future__ import annotations

import asyncio
import inspect
import itertools
import re
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import psycopg
import psycopg_pool
import pytest
from psycopg_pool import AsyncConnectionPool

from poolkeeper import NotOpenError, PoolManager, ReleasedConnectionError

SEMANTICS = Path(__file__).parents[2] / "docs/semantics.md"
OPEN = "open="  # the parameter; open() is a row of its own

POOLS = ["psycopg_pool", "poolkeeper"]
AnyPool = AsyncConnectionPool[Any]


def named() -> set[str]:
    """Return what the first column of the table names."""
    table = SEMANTICS.read_text().partition("## psycopg_pool, point by point")[2]
    cells = [line.split("|")[1] for line in table.splitlines() if line.startswith("| ")]
    return {name for cell in cells for name in re.findall(r"`([^`]+)`", cell)}


def parameters(function: Any) -> list[str]:
    return [name for name in inspect.signature(function).parameters if name != "self"]


def test_the_table_names_every_parameter_of_a_pool() -> None:
    wanted = {OPEN if name == "open" else name for name in parameters(AsyncConnectionPool)}
    assert wanted - named() == set()


def test_the_table_names_every_public_method_with_its_parameters() -> None:
    names = named()
    for name, member in inspect.getmembers(AsyncConnectionPool):
        if name.startswith("_"):
            continue
        if not callable(member):
            assert name in names
            continue
        assert f"{name}()" in names
        for parameter in parameters(member):
            assert {parameter, f"{parameter}="} & names, f"{name}({parameter})"


def test_the_table_names_nothing_that_is_gone() -> None:
    public = {f"{name}()" for name in dir(AsyncConnectionPool)}
    assert {name for name in named() if name.endswith("()")} <= public


@asynccontextmanager
async def pool_of(kind: str, dsn: str, **arguments: Any) -> AsyncIterator[AnyPool]:
    """Open a pool of *kind* for the block."""
    arguments = {"min_size": 1, **arguments}
    pool: AnyPool = (
        AsyncConnectionPool(dsn, open=False, **arguments)
        if kind == "psycopg_pool"
        else PoolManager(dsn, **arguments).pool
    )
    await pool.open(wait=True)
    try:
        yield pool
    finally:
        await pool.close()


async def test_what_is_too_much_is_closed_at_once(dsn: str) -> None:
    left = {}
    for kind in POOLS:
        async with pool_of(kind, dsn, min_size=6) as pool:
            await pool.resize(1, 2)
            left[kind] = pool.get_stats()["pool_size"]
    assert left == {"psycopg_pool": 6, "poolkeeper": 2}


async def test_a_session_whose_query_still_runs_is_kept(dsn: str) -> None:
    kept = {}
    for kind in POOLS:
        async with pool_of(kind, dsn) as pool:
            conn = await pool.getconn()
            session = conn.info.backend_pid
            conn.pgconn.send_query(b"select pg_sleep(60)")
            await pool.putconn(conn)
            async with pool.connection() as conn:
                kept[kind] = conn.info.backend_pid == session
                assert conn.info.transaction_status.name == "IDLE"
    assert kept == {"psycopg_pool": False, "poolkeeper": True}


async def test_the_pause_after_a_connection_that_is_refused_is_short(dsn: str) -> None:
    longest = {}
    for kind in POOLS:
        looks: list[float] = []

        async def check(_conn: Any, looks: list[float] = looks) -> None:
            looks.append(time.monotonic())
            if len(looks) < 4:
                raise ValueError("not this time")

        async with pool_of(kind, dsn, check=check) as pool, pool.connection(timeout=30):
            longest[kind] = max(b - a for a, b in itertools.pairwise(looks))
    assert longest["poolkeeper"] < longest["psycopg_pool"]


@pytest.mark.parametrize("kind", POOLS)
async def test_what_is_the_same_is_the_same(dsn: str, kind: str) -> None:
    async with pool_of(kind, dsn, min_size=2, max_size=3) as pool:
        assert (pool.min_size, pool.max_size, pool.closed) == (2, 3, False)
        conn = await pool.getconn()
        await conn.execute("select 1")
        await pool.putconn(conn)  # in a transaction: it is rolled back
        async with pool.connection() as conn:
            assert conn.info.transaction_status.name == "IDLE"
            await pool.check_connection(conn)
        other = await psycopg.AsyncConnection.connect(dsn)
        with pytest.raises(ValueError, match="can't return connection to pool"):
            await pool.putconn(other)
        await other.close()
        await pool.drain()
        await pool.check()
        await pool.wait(30)
        assert {"pool_min", "pool_max", "usage_ms", "requests_num"} <= pool.pop_stats().keys()
        await pool.reconnect_failed()  # no callback: nothing
    assert pool.closed
    await pool.close()


@pytest.mark.parametrize("timeout", [float("inf"), 1e30, float("nan")])
async def test_a_wait_without_end_ends_when_a_connection_is_free(dsn: str, timeout: float) -> None:
    async with pool_of("poolkeeper", dsn) as pool:

        async def use() -> None:
            async with pool.connection(timeout):
                pass

        conn = await pool.getconn()
        using = asyncio.create_task(use())
        await asyncio.wait({using}, timeout=0.1)
        assert not using.done()
        await pool.putconn(conn)
        await using
        assert pool.get_stats()["pool_available"] == 1


async def test_given_back_twice(dsn: str) -> None:
    errors: dict[str, type[Exception]] = {
        "psycopg_pool": ValueError,
        "poolkeeper": ReleasedConnectionError,
    }
    for kind, error in errors.items():
        async with pool_of(kind, dsn) as pool:
            conn = await pool.getconn()
            await pool.putconn(conn)
            with pytest.raises(error):
                await pool.putconn(conn)


async def test_a_pool_can_be_opened_again(dsn: str) -> None:
    async with pool_of("psycopg_pool", dsn) as bare:
        await bare.close()
        with pytest.raises(psycopg_pool.PoolClosed):
            await bare.open()
    async with pool_of("poolkeeper", dsn) as pool:
        await pool.close()
        await pool.open()
        async with pool.connection() as conn:
            await conn.execute("select 1")


async def test_a_connection_in_use_may_finish_when_the_pool_closes(dsn: str) -> None:
    for kind, finishes in (("psycopg_pool", False), ("poolkeeper", True)):
        async with pool_of(kind, dsn) as pool:
            conn = await pool.getconn()
            closing = asyncio.create_task(pool.close(30))
            await asyncio.wait({closing}, timeout=0.2)
            assert closing.done() is not finishes
            await conn.execute("select 1")
            await conn.commit()
            await pool.putconn(conn)
            await closing


@pytest.mark.parametrize("method", ["drain", "check", "wait", "getconn"])
async def test_a_pool_that_is_not_open_says_so(method: str) -> None:
    call: Callable[[], Any] = getattr(PoolManager(min_size=1).pool, method)
    with pytest.raises(NotOpenError):
        await call()
    with pytest.raises(NotOpenError):
        await PoolManager(min_size=1).pool.resize(2, 3)
