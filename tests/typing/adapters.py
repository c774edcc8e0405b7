"""What the adapters give to a type checker: lifespans that fit, connections and managers."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Annotated, Any, TypeAlias, TypedDict, assert_type

from fastapi import APIRouter, Depends, FastAPI
from fastapi import Request as FastAPIRequest
from mcp.server.mcpserver import MCPServer
from psycopg import AsyncConnection
from psycopg.rows import DictRow, dict_row
from starlette.applications import Starlette
from starlette.requests import HTTPConnection, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.websockets import WebSocket

from poolkeeper import PoolManager
from poolkeeper.adapters import fastapi, generic, starlette

db = PoolManager("postgresql:///orders")
reports: PoolManager[AsyncConnection[DictRow]] = PoolManager(
    "", connection_class=AsyncConnection[DictRow], kwargs={"row_factory": dict_row}
)


class Own(TypedDict):
    """The state of an application."""

    cache: dict[str, str]


# --- lifespans --------------------------------------------------------------------------------


@asynccontextmanager
async def of_any(app: object) -> AsyncGenerator[None, None]:
    yield


@asynccontextmanager
async def of_starlette(app: Starlette) -> AsyncGenerator[Own, None]:
    yield {"cache": {}}


@asynccontextmanager
async def of_fastapi(app: FastAPI) -> AsyncGenerator[Mapping[str, int], None]:
    yield {"n": 1}


@asynccontextmanager
async def of_mcp(server: MCPServer[Any]) -> AsyncGenerator[None, None]:
    yield


def lifespans() -> None:
    Starlette(lifespan=starlette.lifespan(db))
    Starlette(lifespan=starlette.lifespan(db, of_starlette))
    Starlette(lifespan=starlette.lifespan(reports, of_any, key="reports"))
    Starlette(lifespan=starlette.lifespan(db, starlette.lifespan(reports, key="reports")))
    FastAPI(lifespan=fastapi.lifespan(db))
    FastAPI(lifespan=fastapi.lifespan(db, of_fastapi))
    FastAPI(lifespan=fastapi.lifespan(db, of_any))
    APIRouter(lifespan=fastapi.lifespan(reports, key="reports"))
    MCPServer("orders", lifespan=generic.lifespan(db))
    MCPServer("orders", lifespan=generic.lifespan(db, of_mcp))


async def by_hand() -> None:
    span = generic.lifespan(db)(None)
    assert_type(span, AbstractAsyncContextManager[Mapping[str, Any]])
    async with generic.lifespan(db, of_any)("anything") as state:
        assert_type(state, Mapping[str, Any])


# --- Starlette ----------------------------------------------------------------------------------


async def endpoint(request: Request) -> Response:
    assert_type(starlette.pool_from(request), PoolManager[Any])
    assert_type(starlette.pool_from(request, "reports"), PoolManager[Any])
    typed: PoolManager[AsyncConnection[DictRow]] = starlette.pool_from(request, "reports")
    assert_type(await typed.fetchone("select 1"), DictRow | None)
    async with starlette.connection_from(request) as conn:
        assert_type(conn, AsyncConnection[Any])
    async with starlette.connection_from(request, key="reports") as conn:
        assert_type(conn, AsyncConnection[Any])
    return Response()


async def live(websocket: WebSocket) -> None:
    assert_type(starlette.pool_from(websocket), PoolManager[Any])


routes = [
    Route("/", endpoint),
    Route("/livez", starlette.livez),
    Route("/readyz", starlette.readyz),
]

# --- FastAPI --------------------------------------------------------------------------------------

app = FastAPI(lifespan=fastapi.lifespan(db))
app.add_route("/livez", fastapi.livez)
app.add_route("/readyz", fastapi.readyz)

Rows: TypeAlias = Annotated[AsyncConnection[DictRow], Depends(fastapi.connection, scope="function")]
"""An alias of the user's own."""


@app.get("/")
async def orders(conn: fastapi.DepConnection, pool: fastapi.DepPool) -> int:
    assert_type(conn, AsyncConnection[Any])
    assert_type(pool, PoolManager[Any])
    return pool.snapshot().in_use


@app.get("/rows")
async def rows(conn: Rows) -> None:
    cursor = await conn.execute("select 1")
    assert_type(await cursor.fetchone(), DictRow | None)


@app.websocket("/live")
async def fastapi_live(websocket: WebSocket, pool: fastapi.DepPool) -> None:
    assert_type(await pool.fetchall("select 1"), list[Any])


async def other(request: HTTPConnection) -> AsyncIterator[AsyncConnection[Any]]:
    """A dependency for another manager."""
    async with fastapi.connection_from(request, "reports") as conn:
        assert_type(conn, AsyncConnection[Any])
        yield conn


async def other_pool(request: FastAPIRequest) -> PoolManager[Any]:
    return assert_type(fastapi.pool_from(request), PoolManager[Any])


def overrides(conn: AsyncConnection[Any]) -> None:
    app.dependency_overrides[fastapi.connection] = lambda: conn
    app.dependency_overrides[fastapi.pool_from] = lambda: db


# --- what is refused ------------------------------------------------------------------------------


@asynccontextmanager
async def of_none() -> AsyncGenerator[None, None]:
    yield


def mistakes(request: dict[str, Any]) -> None:
    generic.lifespan("orders")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    generic.lifespan(db, of_none)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    generic.lifespan(db, of_any, "key")  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    generic.lifespan(db, db)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    starlette.pool_from(request)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    starlette.connection_from(request)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    fastapi.pool_from(request, "reports")  # type: ignore[call-arg, arg-type]  # pyright: ignore[reportCallIssue]


async def that_is_not_awaited(request: Request) -> None:
    with starlette.connection_from(request):  # type: ignore[attr-defined]  # pyright: ignore[reportGeneralTypeIssues]
        pass
