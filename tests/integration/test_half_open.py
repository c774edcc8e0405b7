"""A network that swallows what is sent: who has cancelled does not wait for the server."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from time import monotonic
from typing import Any

import psycopg
import pytest
from psycopg import _copy_async

from poolkeeper import PoolManager
from tests.support.proxy import FaultProxy

MakeManager = Callable[..., PoolManager[Any]]

ENOUGH = 4.5
"""Seconds: psycopg gives the server five to take the request to cancel, and five to obey."""


REPLACED = not hasattr(_copy_async, "logger")
"""True where an error at the end of a COPY replaces the cancellation, as in psycopg 3.3.0."""


def was_cancelled(task: asyncio.Task[None]) -> bool:
    """Tell whether *task* ended by its cancellation."""
    if task.cancelled() or not REPLACED:
        return task.cancelled()
    error = task.exception()
    while isinstance(error, psycopg.OperationalError):
        error = error.__context__
    return isinstance(error, asyncio.CancelledError)


async def query(conn: Any, stall: Callable[[], None]) -> None:
    stall()
    await conn.execute("select 1")


async def query_by_query(conn: Any, stall: Callable[[], None]) -> None:
    await conn.execute("select 1")
    stall()
    await conn.execute("select 1")


async def pipeline(conn: Any, stall: Callable[[], None]) -> None:
    async with conn.pipeline():
        stall()
        cursor = await conn.execute("select 1")
        await cursor.fetchone()


async def stream(conn: Any, stall: Callable[[], None]) -> None:
    async for _ in conn.cursor().stream(
        "select n, repeat('x', 1000) from generate_series(1, 20000) n"
    ):
        stall()


async def copy_out(conn: Any, stall: Callable[[], None]) -> None:
    query = "copy (select repeat('x', 1000) from generate_series(1, 20000)) to stdout"
    async with conn.cursor().copy(query) as copy:
        stall()
        async for _ in copy:
            pass


async def copy_in(conn: Any, stall: Callable[[], None]) -> None:
    await conn.execute("create temp table half_open (n text)")
    async with conn.cursor().copy("copy half_open from stdin") as copy:
        stall()
        while True:
            await copy.write_row(("x" * 1000,))


async def copy_out_idle(conn: Any, stall: Callable[[], None]) -> None:
    query = "copy (select repeat('x', 1000) from generate_series(1, 20000)) to stdout"
    async with conn.cursor().copy(query) as copy:
        await copy.read()
        stall()
        await asyncio.sleep(60)


async def between_queries(conn: Any, stall: Callable[[], None]) -> None:
    await conn.execute("select 1")
    stall()
    await asyncio.sleep(60)


@pytest.mark.parametrize("times", [1, 2])
@pytest.mark.parametrize(
    "work",
    [query, query_by_query, pipeline, stream, copy_out, copy_out_idle, copy_in, between_queries],
    ids=lambda work: work.__name__,
)
async def test_a_time_out_ends_a_second_later_at_most(
    make_manager: MakeManager,
    proxy: FaultProxy,
    work: Callable[[Any, Callable[[], None]], Awaitable[None]],
    times: int,
) -> None:
    db = make_manager(proxy.dsn, min_size=1, max_size=1, name="orders", timeout=20)
    await db.open()
    stalled = asyncio.Event()

    def stall() -> None:
        proxy.stall()
        proxy.silent = True
        stalled.set()

    async def use() -> None:
        async with db.connection() as conn:
            await work(conn, stall)

    task = asyncio.ensure_future(use())
    await stalled.wait()
    await asyncio.sleep(0.3)
    begin = monotonic()
    for _ in range(times):
        task.cancel()
        await asyncio.wait({task}, timeout=0.2)
    await asyncio.wait({task}, timeout=30)
    took = monotonic() - begin
    proxy.silent = False
    proxy.cut()
    proxy.resume()
    assert was_cancelled(task)
    assert took < ENOUGH
    assert await db.fetchval("select 42") == 42
