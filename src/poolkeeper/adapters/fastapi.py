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
from typing import Annotated, Any, TypeAlias

from psycopg import AsyncConnection

from poolkeeper import PoolManager

from ._shared import KEY, RequestConnection, asgi_route, lifespan, requires

with requires("fastapi"):
    from fastapi import Depends
    from fastapi.requests import HTTPConnection

from . import starlette
from .starlette import connection_from, livez, readyz, readyz_details

__all__ = [
    "KEY",
    "DepConnection",
    "DepPool",
    "connection",
    "connection_from",
    "lifespan",
    "livez",
    "pool_from",
    "readyz",
    "readyz_details",
]


# FastAPI reads the parameters: one more here, such as a key, clients could set in the URL.
def pool_from(connection: HTTPConnection) -> PoolManager[Any]:
    """
    Return the manager of the application that serves this request or WebSocket.

    Raises:
        NotOpenError: If the application's lifespan has not run.

    .. versionadded:: 0.1.0
    """
    return starlette.pool_from(connection)


async def connection(connection: HTTPConnection) -> AsyncIterator[AsyncConnection[Any]]:
    """
    Yield the connection of this request: the dependency behind `DepConnection`.

    For an alias of your own, say with typed rows, and for ``app.dependency_overrides``. Give it
    ``scope="function"``: FastAPI's default ends a dependency after the response was sent, so
    a failed commit would be answered with success, and a streamed response would hold the
    connection until the client has read it.

    Raises:
        NotOpenError: If the application's lifespan has not run.

    For the other errors see `PoolManager.connection()`.

    Source:
        FastAPI 0.121, ``Depends(scope=...)``.

    .. versionadded:: 0.1.0
    """
    scope = connection.scope
    async with RequestConnection(
        scope, pool_from(connection), scope.get("endpoint"), asgi_route(scope)
    ) as conn:
        yield conn


DepPool: TypeAlias = Annotated[PoolManager[Any], Depends(pool_from)]
"""The manager, as a parameter of an endpoint or dependency; right for WebSockets and streams."""

DepConnection: TypeAlias = Annotated[AsyncConnection[Any], Depends(connection, scope="function")]
"""
The connection of the request, as a parameter of an endpoint or dependency.

The same one for all who ask in one request. Committed when the endpoint returns, before the
response is sent; rolled back if it raises, `HTTPException` included. An endpoint that does not
ask takes none. A WebSocket endpoint would hold it for all its life: ask for `DepPool` there.
"""
