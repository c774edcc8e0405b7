"""
The same as a page: an ASGI application to mount, which shows what the pools of its process do.

Read-only, and of one piece: it refers to nothing elsewhere. Who may see it is the affair of the
application that mounts it.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from importlib.resources import files
from typing import Any, TypeAlias

from poolkeeper import BoundPool, ConfigError, PoolManager

from ._observer import Observer

Scope: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send: TypeAlias = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Headers: TypeAlias = Iterable[tuple[bytes, bytes]]

EVERY = 1.0
"""Seconds between two states."""

LONGEST = 5
"""
States of one stream; then the browser asks anew. A server that shuts down waits for the streams
that are open, and does not tell them.
"""

_SAFE: tuple[tuple[bytes, bytes], ...] = (
    (b"cache-control", b"no-store"),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (
        b"content-security-policy",
        b"default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline';"
        b" connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'",
    ),
)


def page(*pools: PoolManager[Any] | BoundPool[Any]) -> Page:
    """
    Return an ASGI application that shows pools, to be mounted in another one.

    ```python
    app.mount("/pool", page(db))
    ```

    Numbers, who holds connections and awaits what, who waits, call sites by hold time, the last
    errors, and charts of the last minutes; live, by server-sent events. It tells no query,
    parameter or connection string; it does tell functions, routes, lines of code and the reasons
    of the server. **Anybody who reaches it may read it**: put the application's own
    authentication in front of it.

    Watches from when it is made, at import time too. It tells of the process that serves it, so
    with several workers behind one port each answer is of one of them.

    Args:
        pools: The managers, or their pools; one that is given twice is shown once.

    Raises:
        ConfigError: If there is none, or something is no pool.

    .. versionadded:: 0.1.0
    """
    if not pools:
        raise ConfigError("there is no pool to show", parameter="pools", hint="page(manager)")
    return Page(pools)


class Page:
    """What `page()` returns."""

    def __init__(self, pools: Iterable[PoolManager[Any] | BoundPool[Any]]) -> None:
        observers = {(observer := Observer(pool)).pool: observer for pool in pools}
        self._observers = list(observers.values())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] == "lifespan":
            await _lifespan(receive, send)
            return
        if scope["type"] != "http":
            raise ValueError(f"a page has no answer to {scope['type']}")
        path, root = scope["path"], scope.get("root_path", "").rstrip("/")
        # Where it is mounted is a part of the path, in what follows the newer ASGI, or not.
        rest = path[len(root) :] if root and path.startswith(root) else path
        if scope["method"] not in ("GET", "HEAD"):
            await _answer(send, 405, b"GET only\n", [(b"allow", b"GET, HEAD")])
        elif rest == "":
            # Relative addresses need the slash; so does the one that this sends to.
            await _answer(send, 307, b"", [(b"location", path.rpartition("/")[2].encode() + b"/")])
        elif rest == "/":
            body = files("poolkeeper.live").joinpath("page.html").read_bytes()
            await _answer(send, 200, body, [(b"content-type", b"text/html; charset=utf-8")])
        elif rest == "/state":
            await _answer(send, 200, self._told(), [(b"content-type", b"application/json")])
        elif rest == "/events":
            await self._stream(scope, receive, send)
        else:
            await _answer(send, 404, b"there is no such page\n")

    def _told(self) -> bytes:
        return json.dumps([observer.state() for observer in self._observers]).encode()

    async def _stream(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = [*_SAFE, (b"content-type", b"text/event-stream"), (b"x-accel-buffering", b"no")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        number = 0 if scope["method"] == "HEAD" else LONGEST
        gone = asyncio.ensure_future(_until_gone(receive))
        try:
            for left in reversed(range(number)):
                body = b"retry: 500\ndata: " + self._told() + b"\n\n"
                await send({"type": "http.response.body", "body": body, "more_body": True})
                if left and (await asyncio.wait([gone], timeout=EVERY))[0]:
                    break
            await send({"type": "http.response.body", "body": b""})
        except OSError:
            pass  # who has asked is gone
        finally:
            gone.cancel()


async def _until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _answer(send: Send, status: int, body: bytes, headers: Headers = ()) -> None:
    length = (b"content-length", str(len(body)).encode())
    start = {"type": "http.response.start", "status": status, "headers": [*_SAFE, *headers, length]}
    await send(start)
    await send({"type": "http.response.body", "body": body})


async def _lifespan(receive: Receive, send: Send) -> None:
    """Where it is served by itself."""
    for step in ("startup", "shutdown"):
        await receive()
        await send({"type": f"lifespan.{step}.complete"})
