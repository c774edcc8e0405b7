"""
Falcon: a middleware opens and closes the pool, responders ask for a connection.

```python
app = falcon.asgi.App(middleware=[PoolMiddleware(db)])


class Orders:
    async def on_get(self, req: Request, resp: Response) -> None:
        async with connection_from(req) as conn:
            ...
```
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Mapping
from contextlib import AbstractAsyncContextManager, suppress
from typing import Any

from psycopg import AsyncConnection

from poolkeeper import PoolManager

from ._shared import (
    KEY,
    Answer,
    RequestConnection,
    Route,
    Span,
    alive,
    busy,
    pool_in,
    ready,
    requires,
    routes_are_told_by,
)

with requires("falcon"):
    from falcon.asgi import Request, Response, WebSocket

__all__ = [
    "KEY",
    "PoolMiddleware",
    "connection_from",
    "exhausted",
    "livez",
    "pool_from",
    "readyz",
    "readyz_details",
]

NO_START_UP = (
    "Give the application middleware=[PoolMiddleware(manager)], before all others. In tests use"
    ' falcon.testing, as TestClient(app) or "async with ASGIConductor(app) as conductor";'
    " httpx.ASGITransport runs no lifespan, so enter an ASGIConductor around it. Some servers"
    " (daphne) know none."
)


class PoolMiddleware:
    """
    Opens *manager* when the application starts, and closes it at the end.

    Put it first: Falcon starts components in their order and stops them in reverse, so those
    that come later have the pool while they start and stop. It opens on the loop that serves.
    If it cannot be opened, or a later component fails to start, the application does not
    start, and the pool is closed. A manager that is open on this loop already is used, and left
    open.

    Args:
        manager: Your manager; safe to create at import time.
        key: Name in ``req.context`` to keep it under. Another one for each further manager.

    Raises:
        OpenError: On start-up, with the server's reason.
        LoopMismatchError: On start-up, if the manager is open on another loop.

    .. versionadded:: 0.1.0
    """

    def __init__(self, manager: PoolManager[Any], *, key: str = KEY) -> None:
        self._span = Span(manager)
        self._key = key
        self._keeper: asyncio.Task[None] | None = None

    async def process_startup(self, scope: Mapping[str, Any], event: Mapping[str, Any]) -> None:  # noqa: ARG002
        """Open the pool."""
        await self._span.start()
        lifespan = asyncio.current_task()
        assert lifespan is not None
        self._keeper = asyncio.create_task(self._keep(lifespan), name="poolkeeper-falcon")

    async def _keep(self, lifespan: asyncio.Task[Any]) -> None:
        # Falcon tells nobody when a later component fails to start or to stop, or when the
        # lifespan is cancelled: ASGIConductor does that to one whose test has failed.
        with suppress(asyncio.CancelledError):
            await asyncio.wait({lifespan})
        self._keeper = None
        await self._span.stop()

    async def process_shutdown(self, scope: Mapping[str, Any], event: Mapping[str, Any]) -> None:  # noqa: ARG002
        """Close the pool."""
        await self._span.stop()
        if (keeper := self._keeper) is not None:
            keeper.cancel()
            await asyncio.wait({keeper})

    async def process_request(self, req: Request, resp: Response) -> None:  # noqa: ARG002
        """Let `pool_from()` find the pool."""
        self._hand_on(req)

    async def process_request_ws(self, req: Request, ws: WebSocket) -> None:  # noqa: ARG002
        """Let `pool_from()` find the pool."""
        self._hand_on(req)

    def _hand_on(self, req: Request) -> None:
        if self._keeper is not None:
            setattr(req.context, self._key, self._span.manager)


def pool_from(req: Request, key: str = KEY) -> PoolManager[Any]:
    """
    Return the manager of the application that serves this request or WebSocket.

    Args:
        req: What the responder was called with.
        key: The *key* that was given to `PoolMiddleware`.

    Raises:
        NotOpenError: If the application's start-up has not run.

    .. versionadded:: 0.1.0
    """
    return pool_in({key: getattr(req.context, key, None)}, key, NO_START_UP)


def connection_from(
    req: Request, key: str = KEY
) -> AbstractAsyncContextManager[AsyncConnection[Any]]:
    """
    Return a context manager for the connection of this request.

    Acquires on entering, so read the media first. Commits when the block ends, which is before
    the response is sent, and rolls back if the block raises. Inside of the block, code that
    asks with the same request gets the same connection. A stream or server-sent events run after
    the responder, and a WebSocket lives long: let them enter a block for each piece of work.

    Raises:
        NotOpenError: If the application's start-up has not run.

    For the other errors see `PoolManager.connection()`.

    .. versionadded:: 0.1.0
    """
    return RequestConnection(req.scope, pool_from(req, key), sys._getframe(1), _route(req))


def _route(req: Request) -> Route:
    path = req.uri_template
    return (req.scope.get("method", "WEBSOCKET"), path) if path else None


routes_are_told_by(lambda found: _route(found) if isinstance(found, Request) else None)


async def exhausted(req: Request, resp: Response, ex: Exception, params: Any) -> None:  # noqa: ARG001
    """
    Answer 503, with ``Retry-After``, where no connection could be had: `NoConnectionError`.

    For ``app.add_error_handler(NoConnectionError, exhausted)``.
    Says nothing of why; that is in the log.

    .. versionadded:: 0.1.0
    """
    _give(resp, busy())


class _Livez:
    async def on_get(self, req: Request, resp: Response) -> None:  # noqa: ARG002
        _give(resp, alive())


class _Readyz:
    def __init__(self, details: bool) -> None:
        self._details = details

    async def on_get(self, req: Request, resp: Response) -> None:
        _give(resp, await ready(lambda: pool_from(req), details=self._details))


def _give(resp: Response, answer: Answer) -> None:
    resp.status = answer.status
    resp.content_type = answer.content_type
    resp.set_headers(dict(answer.headers))
    resp.data = answer.body


livez: _Livez = _Livez()
"""
A resource that answers 200: the process is alive.

For ``app.add_route("/livez", livez)``. Asks neither pool nor server.

.. versionadded:: 0.1.0
"""

readyz: _Readyz = _Readyz(details=False)
"""
A resource that answers 200 if a query can run now, 503 with the reason if not, while the pool is
exhausted too.

For ``app.add_route("/readyz", readyz)``. See `PoolManager.check()`.

.. versionadded:: 0.1.0
"""

readyz_details: _Readyz = _Readyz(details=True)
"""
A resource that answers as `readyz` does, with the words of the server: they name hosts, users and
databases.

For a path that only those can reach who may read the log.

.. versionadded:: 0.1.0
"""
