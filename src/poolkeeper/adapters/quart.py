"""
Quart: the pool opens before the application's start-up and closes after its shutdown.

```python
app = Quart(__name__)
init_app(app, db)


@app.get("/count")
async def count() -> str:
    async with connection_from() as conn:
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
    Route,
    Span,
    alive,
    busy,
    pool_in,
    ready,
    requires,
    routes_are_told_by,
)

with requires("quart"):
    from quart import (
        Quart,
        Request,
        Response,
        Websocket,
        current_app,
        g,
        has_request_context,
        has_websocket_context,
        request,
        websocket,
    )

__all__ = [
    "KEY",
    "connection_from",
    "exhausted",
    "init_app",
    "livez",
    "pool_from",
    "readyz",
    "readyz_details",
]

NO_STARTUP = (
    "Call init_app(app, manager). In tests enter the application, say"
    ' "async with app.test_app() as started": app.test_client() by itself runs no start-up. Some'
    " servers (daphne) run none either."
)


def init_app(app: Quart, manager: PoolManager[Any], *, key: str = KEY) -> None:
    """
    Open *manager* when *app* starts to serve, and close it at the end.

    The pool is open before all of your ``before_serving`` and ``while_serving``, and until all of
    your ``while_serving``, ``after_serving`` and background tasks have ended, wherever you call
    this. If it cannot be opened, the application does not start. If a hook of yours fails,
    the pool is closed. A manager that is open on this loop already is used, and left open.

    Args:
        app: The application.
        manager: Your manager; safe to create at import time.
        key: Where to keep it in ``app.extensions``. Another one for each further manager.

    Raises:
        OpenError: On start-up, with the server's reason.
        LoopMismatchError: On start-up, if the manager is open on another loop.

    .. versionadded:: 0.1.0
    """
    _Life(app, Span(manager), key)


class _Life:
    """
    The pool in one application.

    No list of hooks can end what a hook of another has failed to start: Quart 0.22 ends nothing
    when one fails, and which kind comes last at shutdown differs from release to release. So
    `startup()` and `shutdown()` of the application are followed by ours.
    """

    def __init__(self, app: Quart, span: Span, key: str) -> None:
        self._app = app
        self._span = span
        self._key = key
        self._startup = app.startup
        self._shutdown = app.shutdown
        app.before_serving_funcs.insert(0, self._start)
        vars(app).update(startup=self.startup, shutdown=self.shutdown)

    async def startup(self) -> None:
        """Take the place of the application's."""
        try:
            await self._startup()
        except BaseException:
            await self._stop()
            raise

    async def shutdown(self) -> None:
        """Take the place of the application's."""
        try:
            await self._shutdown()
        finally:
            await self._stop()

    async def _start(self) -> None:
        await self._span.start()
        self._app.extensions[self._key] = self._span.manager

    async def _stop(self) -> None:
        self._app.extensions.pop(self._key, None)
        await self._span.stop()


def pool_from(key: str = KEY) -> PoolManager[Any]:
    """
    Return the manager of the current application.

    Wherever Quart knows one: in a request, a WebSocket, a background task, a hook. Not in a body
    that is streamed after the view has returned: ask in the view.

    Args:
        key: The *key* that was given to `init_app()`.

    Raises:
        NotOpenError: If the application has not started.

    .. versionadded:: 0.1.0
    """
    return pool_in(current_app.extensions, key, NO_STARTUP)


def connection_from(key: str = KEY) -> AbstractAsyncContextManager[AsyncConnection[Any]]:
    """
    Return a context manager for the connection of the current request.

    Acquires on entering, so read the body first. Commits when the block ends, which is before the
    response is sent if you return it after the block, and rolls back if the block raises. Inside
    of the block, code that asks in the same request gets the same connection. Do not let the block
    enclose a streamed body or the life of a WebSocket: enter one for each piece of work.

    Raises:
        NotOpenError: If the application has not started.

    For the other errors see `PoolManager.connection()`.

    .. versionadded:: 0.1.0
    """
    return RequestConnection(vars(g), pool_from(key), sys._getframe(1), _route())


def _route() -> Route:
    served = request if has_request_context() else websocket if has_websocket_context() else None
    return None if served is None else _route_of(served)


def _route_of(served: Request | Websocket) -> Route:
    rule = served.url_rule
    return None if rule is None else (getattr(served, "method", "WEBSOCKET"), rule.rule)


routes_are_told_by(
    lambda found: _route_of(found) if isinstance(found, Request | Websocket) else None
)


async def exhausted(error: Exception) -> Response:  # noqa: ARG001
    """
    Answer 503, with ``Retry-After``, where no connection could be had: `NoConnectionError`.

    For ``app.register_error_handler(NoConnectionError, exhausted)``.
    Says nothing of why; that is in the log.

    .. versionadded:: 0.1.0
    """
    return _response(busy())


async def livez() -> Response:
    """
    Answer 200: the process is alive.

    For ``app.add_url_rule("/livez", view_func=livez)``. Asks neither pool nor server.

    .. versionadded:: 0.1.0
    """
    return _response(alive())


async def readyz() -> Response:
    """
    Answer 200 if a query can run now, 503 with the reason if not, while the pool is exhausted too.

    For ``app.add_url_rule("/readyz", view_func=readyz)``. See `PoolManager.check()`.

    .. versionadded:: 0.1.0
    """
    return _response(await ready(pool_from))


async def readyz_details() -> Response:
    """
    Answer as `readyz` does, with the words of the server: they name hosts, users and databases.

    For a path that only those can reach who may read the log.

    .. versionadded:: 0.1.0
    """
    return _response(await ready(pool_from, details=True))


def _response(answer: Answer) -> Response:
    return Response(answer.body, answer.status, dict(answer.headers), answer.content_type)
