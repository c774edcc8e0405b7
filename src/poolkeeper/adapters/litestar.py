"""
Litestar: a plugin opens the pool and closes it, handlers ask for a connection.

```python
@get("/orders")
async def orders(db_connection: DepConnection) -> int: ...


app = Litestar([orders], plugins=[PoolPlugin(db)])
```
"""

from __future__ import annotations

import sys
from collections.abc import AsyncGenerator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any, TypeAlias

from psycopg import AsyncConnection
from typing_extensions import override

from poolkeeper import PoolManager

from ._shared import (
    KEY,
    Answer,
    RequestConnection,
    Route,
    Span,
    alive,
    busy,
    call_site,
    pool_in,
    ready,
    requires,
    routes_are_told_by,
    scope_in,
)

with requires("litestar"):
    from litestar import Litestar, Request, Response, get
    from litestar.config.app import AppConfig
    from litestar.connection import ASGIConnection
    from litestar.di import NamedDependency, Provide
    from litestar.plugins import InitPlugin
    from litestar.types import Scope

__all__ = [
    "KEY",
    "DepConnection",
    "DepPool",
    "PoolPlugin",
    "connection_from",
    "exhausted",
    "livez",
    "pool_from",
    "readyz",
    "readyz_details",
]

NO_STARTUP = (
    "Give the application plugins=[PoolPlugin(manager)]. In tests enter the client:"
    ' "with TestClient(app) as client", "async with AsyncTestClient(app) as client";'
    " httpx.ASGITransport runs no start-up, so use it inside of"
    " asgi_lifespan.LifespanManager(app). A mounted application's start-up never runs."
)
_INJECTED = "poolkeeper.injected"

DepPool: TypeAlias = NamedDependency[PoolManager[Any]]
"""The type of the parameter ``db_pool``: the manager; right for WebSockets and streams."""

DepConnection: TypeAlias = NamedDependency[AsyncConnection[Any]]
"""The type of the parameter ``db_connection``: the connection of the request."""


class PoolPlugin(InitPlugin):
    """
    Opens *manager* when the application starts, closes it at the end, and lets handlers ask for it.

    The pool is open before lifespans, start-up hooks and event listeners of yours begin, and
    until they and the shutdown hooks have ended. It opens on the loop that serves. If it cannot
    be opened, or one of those fails, the application does not start, and the pool is closed. A
    manager that is open on this loop already is used, and left open.

    A handler or dependency with a parameter ``db_connection`` gets the connection of the request:
    the same one for all who ask in one request. It is acquired after the body was read into
    ``data``, committed when the handler returns, before the response is sent, and rolled back if
    anything raises, ``HTTPException`` included. Who does not ask takes none. A WebSocket handler
    would hold it for all its life: ask for ``db_pool`` there.

    Args:
        manager: Your manager; safe to create at import time.
        key: Where to keep it in ``app.state``. Another one for each further manager.
        pool_dependency_key: Name of the parameter that asks for the manager.
        connection_dependency_key: Name of the parameter that asks for the connection.

    .. versionadded:: 0.1.0
    """

    def __init__(
        self,
        manager: PoolManager[Any],
        *,
        key: str = KEY,
        pool_dependency_key: str = "db_pool",
        connection_dependency_key: str = "db_connection",
    ) -> None:
        self.manager = manager
        self.key = key
        self.pool_dependency_key = pool_dependency_key
        self.connection_dependency_key = connection_dependency_key
        self._site = call_site()

    @override
    def on_app_init(self, app_config: AppConfig) -> AppConfig:
        """Take part in the application; called by Litestar."""
        key, manager, span = self.key, self.manager, Span(self.manager, self._site)

        @asynccontextmanager
        async def opened(app: Litestar) -> AsyncGenerator[None]:
            await span.start()
            app.state[key] = manager
            yield

        async def close(app: Litestar) -> None:
            app.state.pop(key, None)
            await span.stop()

        async def pool(scope: Scope) -> PoolManager[Any]:
            return _pool_in(scope, key)

        async def connection(scope: Scope) -> AsyncGenerator[AsyncConnection[Any]]:
            # The handler's line, however many dependencies lie between.
            injected = RequestConnection(
                _as_dict(scope), _pool_in(scope, key), _handler(scope), _route(_as_dict(scope))
            )
            _as_dict(scope).setdefault(_INJECTED, []).append(injected)
            async with injected as conn:
                yield conn

        config: Any = app_config
        config.lifespan.insert(0, opened)
        # The end of a lifespan would come before the hooks. This is run if start-up fails, too.
        config.on_shutdown.append(close)
        config.after_exception.insert(0, _roll_back)
        config.dependencies.setdefault(self.pool_dependency_key, Provide(pool))
        config.dependencies.setdefault(self.connection_dependency_key, Provide(connection))
        config.signature_types += [AsyncConnection, PoolManager]
        # Plugins that follow may put theirs first or last as well. This one follows them all.
        config.plugins.append(_Outermost(opened, close))
        return app_config


class _Outermost(InitPlugin):
    """Lets *opened* come first and *close* last, whatever plugins have added meanwhile."""

    def __init__(self, opened: Any, close: Any) -> None:
        self._opened = opened
        self._close = close

    @override
    def on_app_init(self, app_config: AppConfig) -> AppConfig:
        config: Any = app_config
        config.lifespan.remove(self._opened)
        config.lifespan.insert(0, self._opened)
        config.on_shutdown.remove(self._close)
        config.on_shutdown.append(self._close)
        return app_config


async def _roll_back(exc: Exception, scope: Scope) -> None:
    """
    Give back what was injected, before an error is answered.

    Litestar 2.25 leaves the generator of a dependency to the garbage collector when another
    dependency raises; otherwise this finds nothing left to do.
    """
    for injected in _as_dict(scope).pop(_INJECTED, ()):
        await injected.__aexit__(type(exc), exc, exc.__traceback__)


def pool_from(connection: ASGIConnection[Any, Any, Any, Any], key: str = KEY) -> PoolManager[Any]:
    """
    Return the manager of the application that serves this request or WebSocket.

    For guards, middleware and hooks; handlers and dependencies have `DepPool`.

    Args:
        connection: A ``Request`` or ``WebSocket``.
        key: The *key* that was given to `PoolPlugin`.

    Raises:
        NotOpenError: If the application's start-up has not run.

    .. versionadded:: 0.1.0
    """
    return _pool_in(connection.scope, key)


def connection_from(
    connection: ASGIConnection[Any, Any, Any, Any], key: str = KEY
) -> AbstractAsyncContextManager[AsyncConnection[Any]]:
    """
    Return a context manager for the connection of this request.

    For a handler that wants it for a part of its time only, and where nothing is injected, such
    as guards and middleware. Acquires on entering, so read the body first. Commits when the block
    ends, and rolls back if it raises. Inside of the block, and where `DepConnection` was
    injected, it is the same connection. Do not let the block enclose a streamed body or the
    life of a WebSocket: enter one for each piece of work.

    Raises:
        NotOpenError: If the application's start-up has not run.

    For the other errors see `PoolManager.connection()`.

    .. versionadded:: 0.1.0
    """
    scope = connection.scope
    manager = _pool_in(scope, key)
    return RequestConnection(_as_dict(scope), manager, sys._getframe(1), _route(_as_dict(scope)))


def exhausted(request: Request[Any, Any, Any], exc: Exception) -> Response[bytes]:  # noqa: ARG001
    """
    Answer 503, with ``Retry-After``, where no connection could be had: `NoConnectionError`.

    For ``Litestar(..., exception_handlers={NoConnectionError: exhausted})``.
    Says nothing of why; that is in the log.

    .. versionadded:: 0.1.0
    """
    return _response(busy())


@get("/livez", include_in_schema=False)
async def livez() -> Response[bytes]:
    """
    Answer 200: the process is alive.

    One of the application's ``route_handlers``. Asks neither pool nor server.

    .. versionadded:: 0.1.0
    """
    return _response(alive())


@get("/readyz", include_in_schema=False)
async def readyz(request: Request[Any, Any, Any]) -> Response[bytes]:
    """
    Answer 200 if a query can run now, 503 with the reason if not, while the pool is exhausted too.

    One of the application's ``route_handlers``. See `PoolManager.check()`.

    .. versionadded:: 0.1.0
    """
    return _response(await ready(lambda: pool_from(request)))


@get("/readyz-details", include_in_schema=False)
async def readyz_details(request: Request[Any, Any, Any]) -> Response[bytes]:
    """
    Answer as `readyz` does, with the words of the server: they name hosts, users and databases.

    For a path that only those can reach who may read the log.

    .. versionadded:: 0.1.0
    """
    return _response(await ready(lambda: pool_from(request), details=True))


def _response(answer: Answer) -> Response[bytes]:
    return Response(
        answer.body,
        status_code=answer.status,
        headers=answer.headers,
        media_type=answer.content_type,
    )


def _pool_in(scope: Scope, key: str) -> PoolManager[Any]:
    return pool_in(Litestar.from_scope(scope).state, key, NO_STARTUP)


def _handler(scope: Scope) -> Any:
    fn = getattr(scope["route_handler"], "fn", None)
    return getattr(fn, "_fn", fn)  # behind the object that websocket_listener() puts in its place


def _route(found: dict[str, Any]) -> Route:
    path: str | None = found.get("path_template")
    return (found.get("method", "WEBSOCKET"), path) if path else None


routes_are_told_by(lambda found: _route(scope_in(found)))


def _as_dict(scope: Scope) -> dict[str, Any]:
    return scope  # type: ignore[return-value]  # pyright: ignore[reportReturnType] - Scope names a few keys
