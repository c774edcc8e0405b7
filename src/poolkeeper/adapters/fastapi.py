"""
FastAPI: the pool opens and closes with the application's lifespan, endpoints ask for a connection.

```python
app = FastAPI(lifespan=lifespan(db))


@app.get("/orders")
async def orders(conn: DepConnection) -> int:
    ...
```
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import Annotated, Any, TypeAlias

from psycopg import AsyncConnection

from poolkeeper import PoolManager

from ._shared import KEY, RequestConnection, asgi_route, code_behind, lifespan, requires

with requires("fastapi"):
    from fastapi import Depends
    from fastapi.dependencies.utils import solve_dependencies
    from fastapi.requests import HTTPConnection

from . import starlette
from .starlette import connection_from, exhausted, livez, readyz, readyz_details

__all__ = [
    "KEY",
    "DepConnection",
    "DepPool",
    "connection",
    "connection_from",
    "exhausted",
    "lifespan",
    "livez",
    "pool",
    "pool_from",
    "readyz",
    "readyz_details",
]


_STACK = "fastapi_function_astack"


# FastAPI reads the parameters: one more here, such as a key, clients could set in the URL.
def pool_from(connection: HTTPConnection) -> PoolManager[Any]:
    """
    Return the manager of the application that serves this request or WebSocket.

    Raises:
        NotOpenError: If the application's lifespan has not run.

    .. versionadded:: 0.1.0
    """
    return starlette.pool_from(connection)


async def pool(connection: HTTPConnection) -> PoolManager[Any]:
    """
    Return what `pool_from()` does: the dependency behind `DepPool`.

    For ``app.dependency_overrides``. FastAPI calls what is not async in a thread.

    Raises:
        NotOpenError: If the application's lifespan has not run.

    .. versionadded:: 0.1.0
    """
    return starlette.pool_from(connection)


async def connection(connection: HTTPConnection) -> AsyncConnection[Any]:  # pyright: ignore[reportRedeclaration]
    """
    Return the connection of this request: the dependency behind `DepConnection`.

    For an alias of your own, say with typed rows, and for ``app.dependency_overrides``. Give it
    ``scope="function"``, so that FastAPI tells who asks for it and lives longer.

    Raises:
        NotOpenError: If the application's lifespan has not run.

    For the other errors see `PoolManager.connection()`.

    Source:
        FastAPI 0.121, ``Depends(scope=...)``, and the exit stack that the dependencies of this
        scope share. To enter that by ourselves costs half of what a dependency with ``yield``
        does; where it is not there, this is one.

    .. versionadded:: 0.1.0
    """
    stack: AsyncExitStack = connection.scope[_STACK]
    return await stack.enter_async_context(_of_request(connection))


def _of_request(connection: HTTPConnection) -> RequestConnection:
    scope = connection.scope
    manager = starlette.pool_from(connection)
    return RequestConnection(scope, manager, scope.get("endpoint"), asgi_route(scope))


_solving = code_behind(solve_dependencies)
if _solving is None or _STACK not in _solving.co_consts:

    async def connection(connection: HTTPConnection) -> AsyncIterator[AsyncConnection[Any]]:  # type: ignore[misc]  # noqa: D103
        async with _of_request(connection) as conn:
            yield conn


DepPool: TypeAlias = Annotated[PoolManager[Any], Depends(pool)]
"""The manager, as a parameter of an endpoint or dependency; right for WebSockets and streams."""

DepConnection: TypeAlias = Annotated[AsyncConnection[Any], Depends(connection, scope="function")]
"""
The connection of the request, as a parameter of an endpoint or dependency.

The same one for all who ask in one request. Committed when the endpoint returns, before the
response is sent; rolled back if it raises, `HTTPException` included. An endpoint that does not
ask takes none. A WebSocket endpoint would hold it for all its life: ask for `DepPool` there.
"""
