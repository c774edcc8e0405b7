"""
Sanic: the pool opens and closes with each server process, handlers ask for a connection.

```python
app = Sanic("orders")
setup(app, db)


@app.get("/orders")
async def orders(request: Request) -> HTTPResponse:
    async with connection_from(request) as conn:
        ...
```
"""

from __future__ import annotations

import asyncio
import sys
from contextlib import AbstractAsyncContextManager
from typing import Any, cast

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

with requires("sanic"):
    from sanic import HTTPResponse, Request, Sanic

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

NO_START_UP = (
    "Give the application a pool with setup(app, manager), and let its listeners run: Sanic's own"
    " server does, so do app.test_client, ReusableClient and app.asgi_client's requests."
    " asgi_client.websocket() and httpx.ASGITransport run none, so wrap the application in"
    " asgi_lifespan.LifespanManager. Some ASGI servers (daphne) know no lifespan."
)

_OUTERMOST = sys.maxsize  # Sanic starts with the highest priority, and stops in reverse


def setup(app: Sanic[Any, Any], manager: PoolManager[Any], *, key: str = KEY) -> None:
    """
    Open *manager* when a server process of *app* starts, and close it at its end.

    Each worker has a pool of its own, on the loop that serves. The pool is open before every
    other ``before_server_start`` and until after every ``after_server_stop`` listener, wherever
    they are registered; ``main_process_...`` listeners run in another process and have none. If
    the pool cannot be opened, or a listener fails, the server does not start, and the pool is
    closed. A manager that is open on this loop already is used, and left open.

    Args:
        app: Your application.
        manager: Your manager; safe to create at import time.
        key: Name in ``app.ctx`` to keep it under. Another one for each further manager.

    Raises:
        OpenError: On start-up, with the server's reason.
        LoopMismatchError: On start-up, if the manager is open on another loop.

    .. versionadded:: 0.1.0
    """
    _Around(app, manager, key)


class _Around:
    """
    The pool around the listeners of one application.

    Sanic runs no listener to say that another one has failed. So ours comes first, runs the others
    itself, and tells Sanic by a true result that nothing is left to run.

    Source:
        Sanic 24.12, ``SignalRouter._dispatch``: a true result ends the dispatch.
    """

    def __init__(self, app: Sanic[Any, Any], manager: PoolManager[Any], key: str) -> None:
        self._span = Span(manager)
        self._key = key
        self._dispatching = False
        for event, first in {
            "server.init.before": _OUTERMOST,
            "server.init.after": _OUTERMOST,
            "server.shutdown.before": -_OUTERMOST,
            "server.shutdown.after": -_OUTERMOST,
        }.items():
            app.signal(event, priority=first)(self._handler(event))

    def _handler(self, event: str) -> Any:
        async def run(app: Any, loop: asyncio.AbstractEventLoop) -> bool:
            if self._dispatching:
                return False  # called by ourselves, for the others
            self._dispatching = True
            try:
                if event == "server.init.before":
                    await self._span.start()
                    setattr(app.ctx, self._key, self._span.manager)
                # Who waits in app.event() has been told, and must be gone before it is told again.
                await asyncio.sleep(0)
                await app.dispatch(
                    event,
                    context={"app": app, "loop": loop},
                    fail_not_found=False,
                    inline=True,
                    reverse=event.startswith("server.shutdown"),
                )
            except BaseException:
                await self._close(app)
                raise
            finally:
                self._dispatching = False
            if event == "server.shutdown.after":
                await self._close(app)
            return True

        return run

    async def _close(self, app: Any) -> None:
        setattr(app.ctx, self._key, None)
        await self._span.stop()


def pool_from(request: Request[Any, Any], key: str = KEY) -> PoolManager[Any]:
    """
    Return the manager of the application that serves this request or WebSocket.

    Args:
        request: What the handler was called with.
        key: The *key* that was given to `setup()`.

    Raises:
        NotOpenError: If the application's listeners have not run.

    .. versionadded:: 0.1.0
    """
    return pool_in({key: getattr(request.app.ctx, key, None)}, key, NO_START_UP)


def connection_from(
    request: Request[Any, Any], key: str = KEY
) -> AbstractAsyncContextManager[AsyncConnection[Any]]:
    """
    Return a context manager for the connection of this request.

    Acquires on entering. Commits when the block ends, which is before the response is sent if you
    return it after the block, and rolls back if the block raises. Inside of the block, code that
    asks with the same request gets the same connection. Do not let the block enclose
    ``request.respond()``, a streamed body or the life of a WebSocket: enter one for each piece of
    work.

    Raises:
        NotOpenError: If the application's listeners have not run.

    For the other errors see `PoolManager.connection()`.

    .. versionadded:: 0.1.0
    """
    store = cast("dict[str, Any]", vars(request.ctx))
    manager = pool_from(request, key)
    return RequestConnection(store, manager, sys._getframe(1), _route(request))


def _route(request: Request[Any, Any]) -> Route:
    path = request.uri_template
    return (request.method, path) if path else None


def _told(found: Any) -> Route:
    return _route(found) if isinstance(found, Request) else None  # pyright: ignore[reportUnknownArgumentType]


routes_are_told_by(_told)


async def exhausted(request: Request[Any, Any], exc: Exception) -> HTTPResponse:  # noqa: ARG001
    """
    Answer 503, with ``Retry-After``, where no connection could be had: `NoConnectionError`.

    For ``app.error_handler.add(NoConnectionError, exhausted)``.
    Says nothing of why; that is in the log.

    .. versionadded:: 0.1.0
    """
    return _response(busy())


async def livez(request: Request[Any, Any]) -> HTTPResponse:  # noqa: ARG001
    """
    Answer 200: the process is alive.

    For ``app.add_route(livez, "/livez")``. Asks neither pool nor server.

    .. versionadded:: 0.1.0
    """
    return _response(alive())


async def readyz(request: Request[Any, Any]) -> HTTPResponse:
    """
    Answer 200 if a query can run now, 503 with the reason if not, while the pool is exhausted too.

    For ``app.add_route(readyz, "/readyz")``. See `PoolManager.check()`.

    .. versionadded:: 0.1.0
    """
    return _response(await ready(lambda: pool_from(request)))


async def readyz_details(request: Request[Any, Any]) -> HTTPResponse:
    """
    Answer as `readyz` does, with the words of the server: they name hosts, users and databases.

    For a path that only those can reach who may read the log.

    .. versionadded:: 0.1.0
    """
    return _response(await ready(lambda: pool_from(request), details=True))


def _response(answer: Answer) -> HTTPResponse:
    return HTTPResponse(answer.body, answer.status, dict(answer.headers), answer.content_type)
