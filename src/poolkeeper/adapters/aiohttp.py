"""
aiohttp: the pool opens before the application's start-up and closes after its cleanup.

```python
app = web.Application()
setup(app, db)


async def count(request: web.Request) -> web.Response:
    async with connection_from(request) as conn:
        ...
```
"""

from __future__ import annotations

import sys
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from typing import Any

from psycopg import AsyncConnection

from poolkeeper import NoConnectionError, PoolManager

from ._shared import (
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

with requires("aiohttp"):
    from aiohttp import web

__all__ = [
    "KEY",
    "connection_from",
    "exhausted",
    "livez",
    "pool_from",
    "readyz",
    "readyz_details",
    "setup",
]

KEY: web.AppKey[PoolManager[Any]] = web.AppKey("poolkeeper", PoolManager)
"""Where an application keeps its manager, unless told otherwise."""

# aiohttp 3.14 has keys of a type for requests too, and warns of others.
_HELD: Any = (
    web.RequestKey("held", dict[str, Any]) if hasattr(web, "RequestKey") else "poolkeeper.held"
)

NO_SETUP = (
    "Call setup(app, manager) where the application is made. A sub-application finds the pool of"
    " the application that it is part of, but not the other way round. In tests serve it with"
    " TestClient(TestServer(app)); a handler called with make_mocked_request() has no pool, unless"
    " you give the application of the request one: app[KEY] = manager."
)


def setup(
    app: web.Application,
    manager: PoolManager[Any],
    *,
    key: web.AppKey[PoolManager[Any]] = KEY,
) -> None:
    """
    Open *manager* when *app* starts, and close it at the end.

    The pool is open before all that you have in ``on_startup`` and ``cleanup_ctx``, and until all
    in ``on_shutdown``, ``cleanup_ctx`` and ``on_cleanup`` has ended, wherever you call this. If it
    cannot be opened, the application does not start. If a start-up hook of yours fails, or a
    cleanup hook, the pool is closed. A manager that is open on this loop already is used, and left
    open.

    Give it the outermost application. In a sub-application, call it last: there what is added to
    ``on_cleanup`` later finds the pool closed, and a failed start leaves it open.

    Args:
        app: The application, not started.
        manager: Your manager; safe to create at import time.
        key: Where to keep it in *app*. Another one for each further manager.

    Raises:
        OpenError: On start-up, with the server's reason.
        LoopMismatchError: On start-up, if the manager is open on another loop.

    .. versionadded:: 0.1.0
    """
    _Life(app, Span(manager), key)


class _Life:
    """
    The pool in one application.

    No list of hooks can end what a hook of another has failed to start: aiohttp 3.14 cleans
    nothing up when start-up fails, and ends cleanup with the first error. So `startup()` and
    `cleanup()` of the application are followed by ours. Nobody calls those of a sub-application.
    """

    def __init__(self, app: web.Application, span: Span, key: web.AppKey[PoolManager[Any]]) -> None:
        self._span = span
        self._key = key
        self._startup = app.startup
        self._cleanup = app.cleanup
        self._outermost = False
        app.on_startup.insert(0, self._on_startup)  # before cleanup_ctx, which is the first
        app.on_cleanup.append(self._on_cleanup)
        # Not setattr(): in debug mode aiohttp warns of attributes that it does not know.
        vars(app).update(startup=self.startup, cleanup=self.cleanup)

    async def startup(self) -> None:
        """Take the place of the application's."""
        self._outermost = True
        try:
            await self._startup()
        except BaseException:
            await self._span.stop()
            raise

    async def cleanup(self) -> None:
        """Take the place of the application's."""
        try:
            await self._cleanup()
        finally:
            await self._span.stop()

    async def _on_startup(self, app: web.Application) -> None:
        await self._span.start()
        app[self._key] = self._span.manager

    async def _on_cleanup(self, app: web.Application) -> None:  # noqa: ARG002
        if not self._outermost:
            await self._span.stop()


def pool_from(request: web.Request, key: web.AppKey[PoolManager[Any]] = KEY) -> PoolManager[Any]:
    """
    Return the manager of the application that serves this request or WebSocket.

    In a sub-application that has none, the one of the application it is part of.

    Args:
        request: The request.
        key: The *key* that was given to `setup()`.

    Raises:
        NotOpenError: If `setup()` was not called for the application, or it has not started.

    .. versionadded:: 0.1.0
    """
    return pool_in({str(key): request.config_dict.get(key)}, str(key), NO_SETUP)


def connection_from(
    request: web.Request, key: web.AppKey[PoolManager[Any]] = KEY
) -> AbstractAsyncContextManager[AsyncConnection[Any]]:
    """
    Return a context manager for the connection of this request.

    Acquires on entering, so read the body first. Commits when the block ends, which is before the
    response is sent if you return it after the block, and rolls back if the block raises. Inside
    of the block, code that asks with the same request gets the same connection. Do not let
    the block enclose what you write to a ``StreamResponse`` or a WebSocket: enter one for each
    piece of work.

    Raises:
        NotOpenError: If `setup()` was not called for the application, or it has not started.

    For the other errors see `PoolManager.connection()`.

    .. versionadded:: 0.1.0
    """
    store = request.setdefault(_HELD, {})
    return RequestConnection(store, pool_from(request, key), sys._getframe(1), _route(request))


def _route(request: web.Request) -> Route:
    resource = request.match_info.route.resource
    return None if resource is None else (request.method, resource.canonical)


routes_are_told_by(lambda found: _route(found) if isinstance(found, web.Request) else None)


@web.middleware
async def exhausted(
    request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
) -> web.StreamResponse:
    """
    Answer 503, with ``Retry-After``, where no connection could be had: `NoConnectionError`.

    A middleware, for ``web.Application(middlewares=[exhausted])``. Says nothing of why; that is in
    the log.

    .. versionadded:: 0.1.0
    """
    try:
        return await handler(request)
    except NoConnectionError:
        return _response(busy())


async def livez(request: web.Request) -> web.Response:  # noqa: ARG001
    """
    Answer 200: the process is alive.

    For ``web.get("/livez", livez)``. Asks neither pool nor server.

    .. versionadded:: 0.1.0
    """
    return _response(alive())


async def readyz(request: web.Request) -> web.Response:
    """
    Answer 200 if a query can run now, 503 with the reason if not, while the pool is exhausted too.

    For ``web.get("/readyz", readyz)``. See `PoolManager.check()`.

    .. versionadded:: 0.1.0
    """
    return _response(await ready(lambda: pool_from(request)))


async def readyz_details(request: web.Request) -> web.Response:
    """
    Answer as `readyz` does, with the words of the server: they name hosts, users and databases.

    For a path that only those can reach who may read the log.

    .. versionadded:: 0.1.0
    """
    return _response(await ready(lambda: pool_from(request), details=True))


def _response(answer: Answer) -> web.Response:
    return web.Response(
        status=answer.status,
        body=answer.body,
        headers=answer.headers,
        content_type=answer.content_type,
    )
