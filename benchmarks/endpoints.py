"""
One endpoint of FastAPI, written in each way, and uvicorn to serve it.

The server runs in the contestant's process, as ``uvicorn`` would on the same loop; the load
comes from a process of its own.
"""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from time import process_time
from typing import Annotated, Any
from urllib.request import urlopen

import uvicorn
from fastapi import Depends, FastAPI, Request
from psycopg import AsyncConnection
from psycopg_pool import AsyncConnectionPool

from poolkeeper import PoolManager
from poolkeeper.adapters.fastapi import DepConnection, connection_from, lifespan

from . import contests
from .contestants import QUERY, Asyncpg, SQLAlchemy
from .load import load
from .timing import Turn, Turns

CONNECTIONS = 10
ANSWER = {"id": 7, "name": "x"}
PATH = "/rows/7"
ROW = "/rows/{number}"

Row = dict[str, Any]


async def fetch(conn: AsyncConnection[Any], number: int) -> Row:
    cursor = await conn.execute(QUERY, (number,))
    row: Any = await cursor.fetchone()
    return {"id": row[0], "name": row[1]}


# --- the bare pool ------------------------------------------------------------------------------


def bare(dsn: str) -> FastAPI:
    """Return an application with a lifespan as everybody writes it."""

    @asynccontextmanager
    async def life(app: FastAPI) -> AsyncIterator[None]:
        async with AsyncConnectionPool(
            dsn, min_size=CONNECTIONS, max_size=CONNECTIONS, open=False
        ) as pool:
            await pool.wait()
            app.state.pool = pool
            yield

    return FastAPI(lifespan=life)


def by_hand(dsn: str) -> FastAPI:
    app = bare(dsn)

    @app.get(ROW)
    async def row(number: int, request: Request) -> Row:
        async with request.app.state.pool.connection() as conn:
            return await fetch(conn, number)

    return app


async def _connection(request: Request) -> AsyncIterator[AsyncConnection[Any]]:
    async with request.app.state.pool.connection() as conn:
        yield conn


def by_yield(dsn: str) -> FastAPI:
    app = bare(dsn)

    @app.get(ROW)
    async def row(
        number: int, conn: Annotated[AsyncConnection[Any], Depends(_connection, scope="function")]
    ) -> Row:
        return await fetch(conn, number)

    return app


# --- ours ---------------------------------------------------------------------------------------


def ours(dsn: str) -> tuple[FastAPI, PoolManager[Any]]:
    db = PoolManager(dsn, min_size=CONNECTIONS, max_size=CONNECTIONS)
    return FastAPI(lifespan=lifespan(db)), db


def dependency(dsn: str) -> FastAPI:
    app, _ = ours(dsn)

    @app.get(ROW)
    async def row(number: int, conn: DepConnection) -> Row:
        return await fetch(conn, number)

    return app


def from_request(dsn: str) -> FastAPI:
    app, _ = ours(dsn)

    @app.get(ROW)
    async def row(number: int, request: Request) -> Row:
        async with connection_from(request) as conn:
            return await fetch(conn, number)

    return app


def connection(dsn: str) -> FastAPI:
    app, db = ours(dsn)

    @app.get(ROW)
    async def row(number: int) -> Row:
        async with db.connection() as conn:
            return await fetch(conn, number)

    return app


def fetchone(dsn: str) -> FastAPI:
    app, db = ours(dsn)

    @app.get(ROW)
    async def row(number: int) -> Row:
        found: Any = await db.fetchone(QUERY, (number,))
        return {"id": found[0], "name": found[1]}

    return app


# --- others -------------------------------------------------------------------------------------


def with_asyncpg(dsn: str) -> FastAPI:
    contestant = Asyncpg(dsn, CONNECTIONS)
    query = QUERY.replace("%s", "$1")

    @asynccontextmanager
    async def life(_: FastAPI) -> AsyncIterator[None]:
        async with contestant:
            yield

    app = FastAPI(lifespan=life)

    @app.get(ROW)
    async def row(number: int) -> Row:
        return dict(await contestant.pool.fetchrow(query, number))

    return app


def with_sqlalchemy(dsn: str) -> FastAPI:
    from sqlalchemy import text

    contestant = SQLAlchemy(dsn, CONNECTIONS)
    query = text(QUERY.replace("%s::int4", "cast(:id as int4)"))

    @asynccontextmanager
    async def life(_: FastAPI) -> AsyncIterator[None]:
        async with contestant:
            yield

    app = FastAPI(lifespan=life)

    @app.get(ROW)
    async def row(number: int) -> Row:
        async with contestant.pool.connect() as conn:
            return dict((await conn.execute(query, {"id": number})).mappings().one())

    return app


APPLICATIONS: dict[str, Callable[[str], FastAPI]] = {
    contests.BY_HAND: by_hand,
    contests.BY_YIELD: by_yield,
    contests.DEPENDENCY: dependency,
    contests.FROM_REQUEST: from_request,
    contests.CONNECTION: connection,
    contests.FETCHONE: fetchone,
    contests.ASYNCPG: with_asyncpg,
    contests.SQLALCHEMY: with_sqlalchemy,
}


# --- the server ---------------------------------------------------------------------------------


@asynccontextmanager
async def served(app: FastAPI) -> AsyncIterator[int]:
    """Serve *app* on the running loop, and give the port."""
    listening = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, lifespan="on", log_level="error", access_log=False))
    serving = asyncio.create_task(server.serve([listening]))
    while not server.started:
        if serving.done():
            raise RuntimeError("uvicorn did not start")
        await asyncio.sleep(0.01)
    try:
        yield listening.getsockname()[1]
    finally:
        server.should_exit = True
        await serving


def answer(port: int) -> Any:
    with urlopen(f"http://127.0.0.1:{port}{PATH}") as response:
        return json.load(response)


@asynccontextmanager
async def enter(stage: str, contestant: str, dsn: str) -> AsyncIterator[Turns]:
    """Serve one of `APPLICATIONS`, and give what puts it under load."""
    async with served(APPLICATIONS[contestant](dsn)) as port:
        answered = await asyncio.to_thread(answer, port)
        if answered != ANSWER:
            raise RuntimeError(f"{contestant} answers {answered}")
        warm = False

        async def turn(seconds: float) -> Turn:
            nonlocal warm
            if not warm:
                await load(port, PATH, seconds / 2)
                warm = True
            begin = process_time()
            requests, took = await load(port, PATH, seconds)
            return Turn(requests, took, process_time() - begin)

        yield {stage: turn}
