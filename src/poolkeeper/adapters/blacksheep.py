"""
BlackSheep: the pool opens and closes with the application, handlers ask for a connection.

```python
app = Application()
use_pool(app, db)


@get("/orders")
async def orders(conn: DepConnection) -> int: ...
```
"""

from __future__ import annotations

import sys
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from functools import wraps
from inspect import unwrap
from typing import TYPE_CHECKING, Any, TypeAlias

from psycopg import AsyncConnection
from typing_extensions import override

from poolkeeper import PoolkeeperError, PoolManager

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

with requires("blacksheep"):
    from blacksheep import Application, Content, Request, Response
    from blacksheep.server import bindings

__all__ = [
    "KEY",
    "DepConnection",
    "connection_from",
    "exhausted",
    "livez",
    "pool_from",
    "readyz",
    "readyz_details",
    "use_pool",
]

NO_STARTUP = (
    "Call use_pool(app, manager), and in tests await app.start() before requests and"
    " await app.stop() after them."
)
_OPENED = "poolkeeper.opened"
_ROUTER = "poolkeeper.router"
# Those that wait for the client to send.
_BODY_BINDERS = tuple(
    getattr(bindings, name)
    for name in ("BodyBinder", "BytesBinder", "FileBinder", "FilesBinder")
    if hasattr(bindings, name)
)

if TYPE_CHECKING:
    DepConnection: TypeAlias = AsyncConnection[Any]
else:

    class DepConnection:
        """
        The type of a handler's parameter that is to be the connection of the request.

        The same one for all who ask in one request. Acquired after the body was read, for other
        parameters that come from it. Committed when the handler returns, before the response is
        sent; rolled back if it raises, `HTTPException` included. A handler that does not ask
        takes none. A WebSocket handler would hold it for all its life: ask for a `PoolManager`
        there.
        """


def use_pool(app: Application, manager: PoolManager[Any], *, key: str = KEY) -> None:
    """
    Open *manager* when *app* starts, close it at the end, and let handlers ask for it.

    The pool is open before any ``on_start`` handler or lifespan of yours begins, and until all
    have ended, wherever this is called. It opens on the loop that serves. If it cannot be opened,
    or one of those fails, the application does not start, and the pool is closed. A manager
    that is open on this loop already is used, and left open.

    A handler with a parameter of type `PoolManager` gets the manager, one of type `DepConnection`
    the connection of the request.

    Args:
        app: Your application.
        manager: Your manager; safe to create at import time.
        key: Where to keep it in the state of each request; see `pool_from()`. Another one for
            each further manager; what handlers get by type is then the first.

    Source:
        BlackSheep 2.6, ``Application.extend()``: events of the application would run in the order
        in which they were registered, at the end as well.

    .. versionadded:: 0.1.0
    """
    span = Span(manager)

    def keep(scope: Any) -> None:
        scope["state"] = {**scope.get("state", {}), key: manager}

    class Pool(Application):
        @override
        async def start(self) -> None:
            base: Any = super()
            await span.start()
            try:
                await base.start()
            except BaseException:
                await span.stop()
                raise

        @override
        async def stop(self) -> None:
            base: Any = super()
            try:
                await base.stop()
            finally:
                await span.stop()

        @override
        async def handle(self, request: Request) -> Response:
            if self.started:
                keep(request.scope)
                _scope(request)[_ROUTER] = self.router
            return await super().handle(request)

        @override
        async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
            base: Any = super()
            if scope["type"] == "websocket":
                keep(scope)
            await base.__call__(scope, receive, send)

    extended: Any = app
    extended.extend(Pool)
    extended.on_middlewares_configuration += _lend
    if PoolManager not in extended.services:
        extended.services.register(PoolManager, instance=manager)


def _lend(app: Application) -> None:
    """Let the handlers that ask for a connection give it back: inside of all middlewares."""
    for route in app.router:
        parameters: list[Any] = getattr(route.handler, "binders", [])
        asking = [one for one in parameters if isinstance(one, _ConnectionBinder)]
        if asking and not hasattr(route.handler, _OPENED):
            for one in asking:
                one.prepare(unwrap(route.handler), parameters)
            route.handler = _lending(route.handler)


def _lending(handler: Callable[[Any], Awaitable[Any]]) -> Callable[[Any], Awaitable[Any]]:
    @wraps(handler)
    async def lending(request: Request) -> Any:
        async with AsyncExitStack() as opened:
            scope = _scope(request)
            scope[_OPENED] = opened
            try:
                return await handler(request)
            finally:
                del scope[_OPENED]

    setattr(lending, _OPENED, True)
    return lending


class _ConnectionBinder(bindings.Binder):
    type_alias = DepConnection

    def __init__(self) -> None:
        base: Any = super()
        base.__init__(DepConnection, implicit=True)

    def prepare(self, handler: Callable[..., Any], parameters: list[Any]) -> None:
        self._handler = handler
        after = parameters[parameters.index(self) :]
        self._bodies = [one for one in after if isinstance(one, _BODY_BINDERS)]

    @override
    async def get_value(self, request: Request) -> AsyncConnection[Any]:
        opened: AsyncExitStack | None = _scope(request).get(_OPENED)
        if opened is None:
            raise PoolkeeperError(
                "cannot inject a connection here",
                hint="Only handlers of an application with use_pool() can ask for one; elsewhere,"
                " such as in a middleware: async with connection_from(request) as conn",
            )
        for body in self._bodies:
            await body.get_value(request)  # kept by the request; a client may send slowly
        return await opened.enter_async_context(
            RequestConnection(_scope(request), pool_from(request), self._handler, _route(request))
        )


def pool_from(request: Request, key: str = KEY) -> PoolManager[Any]:
    """
    Return the manager of the application that serves this request or WebSocket.

    Args:
        request: A ``Request`` or ``WebSocket``.
        key: The *key* that was given to `use_pool()`.

    Raises:
        NotOpenError: If the application has not been started.

    .. versionadded:: 0.1.0
    """
    return pool_in(_scope(request).get("state"), key, NO_STARTUP)


def connection_from(
    request: Request, key: str = KEY
) -> AbstractAsyncContextManager[AsyncConnection[Any]]:
    """
    Return a context manager for the connection of this request.

    For a handler that wants it for a part of its time only, and where nothing is injected, such
    as middlewares. Acquires on entering, so read the body first. Commits when the block ends,
    and rolls back if it raises. Inside of the block, and where `DepConnection` was injected, it
    is the same connection. Do not let the block enclose a streamed body or the life of a
    WebSocket: enter one for each piece of work.

    Raises:
        NotOpenError: If the application has not been started.

    For the other errors see `PoolManager.connection()`.

    .. versionadded:: 0.1.0
    """
    scope, manager = _scope(request), pool_from(request, key)
    return RequestConnection(scope, manager, sys._getframe(1), _route(request))


async def exhausted(app: Application, request: Request, exc: Exception) -> Response:  # noqa: ARG001
    """
    Answer 503, with ``Retry-After``, where no connection could be had: `NoConnectionError`.

    For ``app.exceptions_handlers[NoConnectionError] = exhausted``.
    Says nothing of why; that is in the log.

    .. versionadded:: 0.1.0
    """
    return _response(busy())


async def livez(request: Request) -> Response:  # noqa: ARG001
    """
    Answer 200: the process is alive.

    For ``app.router.add_get("/livez", livez)``. Asks neither pool nor server.

    .. versionadded:: 0.1.0
    """
    return _response(alive())


async def readyz(request: Request) -> Response:
    """
    Answer 200 if a query can run now, 503 with the reason if not, while the pool is exhausted too.

    For ``app.router.add_get("/readyz", readyz)``. See `PoolManager.check()`.

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


def _scope(request: Request) -> dict[str, Any]:
    scope: Any = request.scope
    return scope or {}  # BlackSheep takes it away after the response


def _route(request: Request) -> Route:
    router = _scope(request).get(_ROUTER)
    # The request does not say. That it was matched just now is in the router's cache.
    match = router.get_match(request) if router is not None else None
    return None if match is None else (request.method, match.pattern.decode())


routes_are_told_by(lambda found: _route(found) if isinstance(found, Request) else None)


def _response(answer: Answer) -> Response:
    headers = [(name.encode(), value.encode()) for name, value in answer.headers.items()]
    return Response(answer.status, headers, Content(answer.content_type.encode(), answer.body))
