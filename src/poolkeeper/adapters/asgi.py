"""
Plain ASGI, and Django: a middleware that opens the pool before the application and closes it after.

```python
app = LifespanMiddleware(app, db)


async def count(scope: Scope, receive: Receive, send: Send) -> None:
    async with connection_from(scope) as conn:
        ...
```
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Awaitable, Callable, MutableMapping
from contextlib import AbstractAsyncContextManager, suppress
from contextvars import Context
from typing import Any, TypeAlias, cast

from psycopg import AsyncConnection

from poolkeeper import NoConnectionError, PoolManager

from ._shared import (
    KEY,
    Answer,
    InnerLifespan,
    RequestConnection,
    Route,
    State,
    alive,
    asgi_route,
    busy,
    lifespan,
    log,
    pool_in,
    ready,
    routes_are_told_by,
)

__all__ = ["KEY", "LifespanMiddleware", "connection_from", "exhausted", "pool_from"]

Scope: TypeAlias = MutableMapping[str, Any]
Message: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[Message]]
Send: TypeAlias = Callable[[Message], Awaitable[None]]
Application: TypeAlias = Callable[[Any, Any, Any], Awaitable[None]]

NO_LIFESPAN = (
    "Wrap the application in LifespanMiddleware, outside of all others. A server that knows no"
    " lifespan, such as daphne, and an application that this one is mounted in, need"
    " open_on_first_request=True. In tests wrap it in asgi_lifespan.LifespanManager:"
    " httpx.ASGITransport runs no lifespan. Django's AsyncClient goes past the middleware: open"
    " the manager in the test, and use it in the view without asking the request."
)
NO_SCOPE = (
    "This request did not come through ASGI. Django's synchronous test client, and any WSGI"
    ' server ("manage.py runserver" is one, without daphne), run each async view on an event loop'
    " of its own, where no pool can stay open: use AsyncClient, and an ASGI server."
)


def exhausted(app: Application) -> Application:
    """
    Return *app* with an answer of 503, with ``Retry-After``, where no connection could be had.

    Where it raises `NoConnectionError` before it has begun to answer, that is. Put it directly
    around the application, and `LifespanMiddleware` around both. Says nothing of why; that is in
    the log.

    .. versionadded:: 0.1.0
    """

    async def answering(scope: Scope, receive: Receive, send: Send) -> None:
        begun = scope["type"] != "http"

        async def watched(message: Message) -> None:
            nonlocal begun
            begun = True
            await send(message)

        try:
            await app(scope, receive, watched)
        except NoConnectionError:
            if begun:
                raise
            await _respond(scope, send, busy())

    return answering


class LifespanMiddleware:
    """
    Opens *manager* when the server starts *app*, and closes it after *app* has ended.

    Put it outside of all others. The application's own lifespan runs inside of it, so its
    start-up and shutdown code has the pool; an application that knows none, such as Django's,
    need not. If the pool cannot be opened, the server is told so with the reason and the error is
    raised: some servers look at one and some at the other. A manager that is open on this loop
    already is used, and left open.

    Args:
        app: The ASGI application.
        manager: Your manager; safe to create at import time.
        inner: A lifespan of your own around that of *app*, as `lifespan()` takes it: start-up
            code for an application that knows no lifespan. What it yields is kept.
        key: Where to keep the manager in the state of each request; see `pool_from()`.
        livez: Path on which to answer 200: the process is alive.
        readyz: Path on which to answer 200 if a query can run now, 503 with the reason if not,
            while the pool is exhausted too. See `PoolManager.check()`.
        readyz_details: Path on which to answer so with the words of the server, which name hosts,
            users and databases; one that only those can reach who may read the log.
        open_on_first_request: For servers that know no lifespan, such as daphne, and for an
            application that is mounted in another: start when the first request comes, the
            one for *readyz* included. What hinders the start then fails requests, and each tries
            again. Shutdown comes when the event loop cancels its tasks, as ``asyncio.run()`` does
            in the end; where the process ends without, as under daphne, that is what closes
            the connections.

    .. versionadded:: 0.1.0
    """

    def __init__(
        self,
        app: Application,
        manager: PoolManager[Any],
        inner: InnerLifespan[Any] | None = None,
        *,
        key: str = KEY,
        livez: str | None = None,
        readyz: str | None = None,
        readyz_details: str | None = None,
        open_on_first_request: bool = False,
    ) -> None:
        self._app = app
        self._manager = manager
        self._lifespan = lifespan(manager, inner, key=key)
        self._key = key
        self._livez = livez
        self._readyz = readyz
        self._readyz_details = readyz_details
        self._by_itself = open_on_first_request
        self._stand_in: _StandIn | None = None
        self._state: State | None = None
        """What the lifespan has yielded, while it lasts."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection of the server: its lifespan, a request or a WebSocket."""
        if scope["type"] == "lifespan":
            await self._live(scope, receive, send)
        elif (answer := await self._health(scope)) is not None:
            await _respond(scope, send, answer)
        else:
            await self._started()
            scope = self._with_state(scope)  # errors read here which route the inside has found
            await self._app(scope, receive, send)

    # --- lifespan -------------------------------------------------------------------------------

    async def _live(self, scope: Scope, receive: Receive, send: Send) -> None:
        inside = _Inside(await receive(), receive, send)
        try:
            async with self._lifespan(self._app) as state:
                self._state = state
                if "state" in scope:
                    scope["state"].update(state)
                await inside.live(self._app, scope)
        except Exception as ex:
            await inside.end(ex)
            raise
        finally:
            self._state = None
        await inside.end()

    async def _started(self, timeout: float | None = None) -> None:
        """Wait for the start-up if no server runs it; not longer than *timeout* seconds."""
        if not self._by_itself:
            return
        if self._state is None and (self._stand_in is None or self._stand_in.ended):
            self._stand_in = _StandIn(self._live)
        if self._stand_in is not None and not self._stand_in.ended:
            await self._stand_in.started(timeout)

    def _with_state(self, scope: Scope) -> Scope:
        """Return *scope* with the state of the lifespan, which not every server hands on."""
        there: State = scope.get("state", {})
        if self._state is None or there.get(self._key) is self._manager:
            return scope
        return {**scope, "state": {**self._state, **there, self._key: self._manager}}

    # --- health ---------------------------------------------------------------------------------

    async def _health(self, scope: Scope) -> Answer | None:
        if scope["type"] != "http" or scope["method"] not in ("GET", "HEAD"):
            return None
        # Servers put the path that the application is mounted on in front, or leave it away.
        path: str = scope["path"].removeprefix(scope.get("root_path", "").rstrip("/"))
        if path == self._livez:
            return alive()
        if path in (self._readyz, self._readyz_details):
            return await ready(lambda: self._found(scope), details=path == self._readyz_details)
        return None

    async def _found(self, scope: Scope) -> PoolManager[Any]:
        # A balancer sends requests only when this says so: it must not wait for the first one.
        await self._started(timeout=1)
        if self._by_itself:
            return self._manager
        return pool_from(self._with_state(scope), self._key)


class _Inside:
    """
    What passes between the server and the application inside, in its lifespan.

    An application that raises or returns before it has answered says that way that it knows no
    lifespan; start-up is then complete without it. Its last word is held back until the pool is
    closed. One that waits for more after its last word is cancelled: there is no more.

    Args:
        event: The start-up event.
        receive: The server's.
        send: The server's.
    """

    def __init__(self, event: Message, receive: Receive, send: Send) -> None:
        self._event: Message | None = event
        self._receive = receive
        self._send = send
        self._serving = False
        """True once the server was told that start-up is complete."""
        self._ending = False
        """True once the server has said that it shuts down."""
        self._answer: Message | None = None
        """The last word of the application: that start-up failed, or how shutdown went."""
        self._dismissed = False

    async def live(self, app: Application, scope: Scope) -> None:
        """
        Run the lifespan of *app*. Return when it has ended and the server shuts down.

        Raises:
            Exception: What *app* has raised after its first answer.
        """
        failure = None
        try:
            await app(scope, self._next, self._say)
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if not self._dismissed or (task is not None and task.cancelling()):
                raise
        except Exception as ex:
            failure = ex
        if not self._serving and self._answer is None:
            self._log_refusal(failure)
            failure = None
            await self._say({"type": "lifespan.startup.complete"})
        if self._serving and not self._ending:
            if failure is not None:
                log("lifespan_failed", error=failure)
            await self._receive()
        if failure is not None:
            raise failure

    async def end(self, failure: Exception | None = None) -> None:
        """Tell the server how it ended, unless the application told it that start-up failed."""
        answer = self._answer
        if self._serving:
            if failure is not None and (answer is None or not answer["type"].endswith("failed")):
                answer = _failed("shutdown", failure)
            await self._send(answer or {"type": "lifespan.shutdown.complete"})
        elif answer is None and failure is not None:
            await self._send(_failed("startup", failure))

    async def _next(self) -> Message:
        if self._event is not None:
            event, self._event = self._event, None
            return event
        if self._answer is not None:
            self._dismissed = True
            raise asyncio.CancelledError
        event = await self._receive()
        self._ending = True
        return event

    async def _say(self, message: Message) -> None:
        if message["type"] in ("lifespan.shutdown.complete", "lifespan.shutdown.failed"):
            self._answer = message
            return
        if message["type"] == "lifespan.startup.complete":
            self._serving = True
        elif message["type"] == "lifespan.startup.failed":
            self._answer = message
        await self._send(message)

    def _log_refusal(self, failure: Exception | None) -> None:
        if failure is not None and self._event is None:
            # It has read the event: rather a failure than a refusal. The standard has servers
            # go on in both cases.
            log("lifespan_unanswered", error=failure)
        else:
            said = "it returned" if failure is None else _first_line(failure)
            log("lifespan_refused", reason=said)


class _StandIn:
    """
    Stands in for a server that knows no lifespan, in a task of its own.

    So neither a client that goes away nor a probe that waits no longer ends a start-up that others
    wait for. Says that it shuts down when the task is cancelled, as ``asyncio.run()`` does in
    the end.
    """

    def __init__(self, run: Callable[[Scope, Receive, Send], Awaitable[None]]) -> None:
        self._told = False
        self._up = asyncio.Event()
        self._failure: Exception | None = None
        # Not in the context of the request that happens to be the first.
        self._task = asyncio.create_task(
            self._serve(run), name="poolkeeper-lifespan", context=Context()
        )

    @property
    def ended(self) -> bool:
        return self._task.done()

    async def started(self, timeout: float | None) -> None:
        """Wait until start-up is complete; raise what has hindered it."""
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout):
                await self._up.wait()
        if self._failure is not None:
            raise self._failure

    async def _serve(self, run: Callable[[Scope, Receive, Send], Awaitable[None]]) -> None:
        asgi = {"version": "3.0", "spec_version": "2.0"}
        try:
            await run({"type": "lifespan", "asgi": asgi, "state": {}}, self._receive, self._send)
        except Exception as ex:
            if self._up.is_set():
                log("shutdown_failed", error=ex)
            self._failure = ex
        finally:
            self._up.set()

    async def _receive(self) -> Message:
        if not self._told:
            self._told = True
            return {"type": "lifespan.startup"}
        try:
            await asyncio.get_running_loop().create_future()
        except asyncio.CancelledError:
            cast("asyncio.Task[Any]", asyncio.current_task()).uncancel()
        return {"type": "lifespan.shutdown"}

    async def _send(self, message: Message) -> None:
        if message["type"] == "lifespan.startup.complete":
            self._up.set()


def _failed(event: str, error: Exception) -> Message:
    return {"type": f"lifespan.{event}.failed", "message": _first_line(error)}


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".partition("\n")[0]


async def _respond(scope: Scope, send: Send, answer: Answer) -> None:
    headers = {
        "content-type": answer.content_type,
        "content-length": str(len(answer.body)),
        **answer.headers,
    }
    raw = [(name.encode(), value.encode()) for name, value in headers.items()]
    body = answer.body if scope["method"] == "GET" else b""
    await send({"type": "http.response.start", "status": answer.status, "headers": raw})
    await send({"type": "http.response.body", "body": body})


# --- the manager and the connection of a request ------------------------------------------------


def pool_from(request: object, key: str = KEY) -> PoolManager[Any]:
    """
    Return the manager of the application that serves this request or WebSocket.

    Args:
        request: An ASGI scope, or what has one as ``.scope``, such as Django's requests.
        key: The *key* that was given to `LifespanMiddleware`.

    Raises:
        NotOpenError: If the lifespan has not run, or the request did not come through ASGI.

    .. versionadded:: 0.1.0
    """
    scope = _scope(request)
    if scope is None:
        return pool_in(None, key, NO_SCOPE)
    return pool_in(scope.get("state"), key, NO_LIFESPAN)


def connection_from(
    request: object, key: str = KEY
) -> AbstractAsyncContextManager[AsyncConnection[Any]]:
    """
    Return a context manager for the connection of this request.

    Acquires on entering, so read the body first. Commits when the block ends, which is before the
    response is sent if you send it after the block, and rolls back if the block raises. Inside
    of the block, code that asks with the same request gets the same connection. Do not let
    the block enclose a streamed body or the life of a WebSocket: enter one for each piece of work.

    Args:
        request: As for `pool_from()`.
        key: As for `pool_from()`.

    Raises:
        NotOpenError: As `pool_from()` does.

    For the other errors see `PoolManager.connection()`.

    .. versionadded:: 0.1.0
    """
    manager = pool_from(request, key)
    scope = cast("Scope", _scope(request))
    route = asgi_route(scope) or _django_route(request)
    return RequestConnection(scope, manager, sys._getframe(1), route)


def _django_route(request: Any) -> Route:
    path: str | None = getattr(getattr(request, "resolver_match", None), "route", None)
    return None if path is None else (request.method, f"/{path}")


routes_are_told_by(_django_route)


def _scope(request: object) -> Scope | None:
    scope = getattr(request, "scope", request)
    return cast("Scope", scope) if isinstance(scope, MutableMapping) else None
