"""
Starlette: the pool opens and closes with the application's lifespan, requests find it.

```python
app = Starlette(routes=[...], lifespan=lifespan(db))


async def count(request: Request) -> Response:
    async with connection_from(request) as conn:
        ...
```
"""

from __future__ import annotations

import sys
from contextlib import AbstractAsyncContextManager
from typing import Any

from psycopg import AsyncConnection

from poolkeeper import PoolManager

from ._shared import (
    KEY,
    Answer,
    RequestConnection,
    alive,
    asgi_route,
    busy,
    lifespan,
    pool_in,
    ready,
    requires,
)

with requires("starlette"):
    from starlette.requests import HTTPConnection, Request
    from starlette.responses import Response

__all__ = [
    "KEY",
    "connection_from",
    "exhausted",
    "lifespan",
    "livez",
    "pool_from",
    "readyz",
    "readyz_details",
]

NO_LIFESPAN = (
    "Give the application lifespan=lifespan(manager). In tests enter the client:"
    ' "with TestClient(app) as client"; httpx.ASGITransport runs no lifespan, so wrap the'
    " application in asgi_lifespan.LifespanManager. A mounted application's lifespan never runs,"
    " and some servers (daphne) know none."
)


def pool_from(connection: HTTPConnection, key: str = KEY) -> PoolManager[Any]:
    """
    Return the manager of the application that serves this request or WebSocket.

    Args:
        connection: A ``Request`` or ``WebSocket``.
        key: The *key* that was given to `lifespan()`.

    Raises:
        NotOpenError: If the application's lifespan has not run.

    .. versionadded:: 0.1.0
    """
    return pool_in(connection.scope.get("state"), key, NO_LIFESPAN)


def connection_from(
    connection: HTTPConnection, key: str = KEY
) -> AbstractAsyncContextManager[AsyncConnection[Any]]:
    """
    Return a context manager for the connection of this request.

    Acquires on entering, so read the body first. Commits when the block ends, which is before the
    response is sent if you return it after the block, and rolls back if the block raises. Inside
    of the block, code that asks with the same request gets the same connection. Do not let
    the block enclose a streamed body or the life of a WebSocket: enter one for each piece of work.

    Raises:
        NotOpenError: If the application's lifespan has not run.

    For the other errors see `PoolManager.connection()`.

    .. versionadded:: 0.1.0
    """
    scope = connection.scope
    return RequestConnection(scope, pool_from(connection, key), sys._getframe(1), asgi_route(scope))


async def exhausted(request: Request, exc: Exception) -> Response:  # noqa: ARG001
    """
    Answer 503, with ``Retry-After``, where no connection could be had: `NoConnectionError`.

    For ``app.add_exception_handler(NoConnectionError, exhausted)``.
    Says nothing of why; that is in the log.

    .. versionadded:: 0.1.0
    """
    return _response(busy())


async def livez(request: Request) -> Response:  # noqa: ARG001
    """
    Answer 200: the process is alive.

    For ``Route("/livez", livez)``. Asks neither pool nor server.

    .. versionadded:: 0.1.0
    """
    return _response(alive())


async def readyz(request: Request) -> Response:
    """
    Answer 200 if a query can run now, 503 with the reason if not, while the pool is exhausted too.

    For ``Route("/readyz", readyz)``. See `PoolManager.check()`.

    .. versionadded:: 0.1.0
    """
    return _response(await ready(lambda: pool_from(request)))


async def readyz_details(request: Request) -> Response:
    """
    Answer as `readyz` does, with the words of the server: they name hosts, users and databases.

    For a path that only those can reach who may read the log.

    .. versionadded:: 0.1.0
    """
    return _response(await ready(lambda: pool_from(request), details=True))


def _response(answer: Answer) -> Response:
    return Response(answer.body, answer.status, dict(answer.headers), answer.content_type)
