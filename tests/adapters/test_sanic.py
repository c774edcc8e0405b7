"""The adapter for Sanic."""

from __future__ import annotations

import asyncio
import itertools
import socket
import warnings
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import psycopg
import pytest
from sanic import Request, Sanic, text
from sanic.exceptions import SanicException
from sanic.response import ResponseStream

from poolkeeper import PoolManager
from poolkeeper.adapters.sanic import connection_from, livez, pool_from, readyz, setup

from .conformance import Conformance, Framework, Probe, client, until
from .servers import SERVERS, Command, Served

with warnings.catch_warnings():
    warnings.filterwarnings("ignore", "websockets.legacy is deprecated", DeprecationWarning)
    from sanic_testing.reusable import ReusableClient

_numbers = itertools.count()


def new_app() -> Sanic[Any, Any]:
    """An application with a name of its own: Sanic keeps them all."""
    app = Sanic(f"probe-{next(_numbers)}", configure_logging=False)
    # It rewrites methods of the class for one application, which it can do once in a process.
    app.config.TOUCHUP = False
    app.config.MOTD = False
    return app


class OnSanic(Framework):
    """Sanic's own server, on the loop of the test."""

    name = extra = package = "sanic"

    def build(self, probe: Probe) -> Any:
        app = new_app()

        @app.get("/value")
        async def value(request: Request) -> Any:
            async with connection_from(request) as conn:
                return text(await probe.value(conn))

        @app.get("/unasked")
        async def unasked(request: Request) -> Any:
            return text(probe.unasked())

        @app.get("/same")
        async def same(request: Request) -> Any:
            async with connection_from(request) as first, connection_from(request) as second:
                return text(probe.same(first, second))

        @app.get("/stream")
        async def stream(request: Request) -> Any:
            response = await request.respond(content_type="text/plain")
            async for line in probe.stream(pool_from(request)):
                await response.send(line)

        @app.get("/kept")
        async def kept(request: Request) -> Any:
            async with connection_from(request) as conn:
                lines = probe.kept(conn)

            async def write(response: Any) -> None:
                async for line in lines:
                    await response.write(line)

            return ResponseStream(write)

        @app.post("/items")
        async def items(request: Request) -> Any:
            async with connection_from(request) as conn:
                await probe.add(conn, request.args["text"][0])
            return text("ok")

        @app.post("/raise")
        async def fail(request: Request) -> Any:
            async with connection_from(request) as conn:
                await probe.add_and_raise(conn, request.args["text"][0])
            return text("ok")

        @app.post("/reject")
        async def reject(request: Request) -> Any:
            async with connection_from(request) as conn:
                await probe.add(conn, request.args["text"][0])
                raise SanicException(status_code=409)

        @app.post("/fail-at-commit")
        async def fail_at_commit(request: Request) -> Any:
            async with connection_from(request) as conn:
                await probe.add_twice(conn, request.args["text"][0])
            return text("ok")

        # Before setup(): the order in the program does not matter.
        @app.before_server_start
        async def up(app: Any) -> None:
            await probe.startup()

        @app.after_server_stop
        async def down(app: Any) -> None:
            await probe.shutdown()

        setup(app, probe.db)
        app.add_route(livez, "/livez")
        app.add_route(readyz, "/readyz")
        return app

    @asynccontextmanager
    async def served(self, app: Any) -> AsyncIterator[httpx.AsyncClient]:
        async with listening(app) as (server, http):
            await server.before_start()
            await server.after_start()
            yield http
            await server.before_stop()
            await server.close()
            await server.after_stop()

    @asynccontextmanager
    async def served_without_startup(self, app: Any) -> AsyncIterator[httpx.AsyncClient]:
        async with listening(app) as (_, http):
            yield http


@asynccontextmanager
async def listening(app: Any) -> AsyncIterator[tuple[Any, httpx.AsyncClient]]:
    """Serve *app* on the running loop; its listeners are the caller's to run."""
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    server = await app.create_server(sock=listener, return_asyncio_server=True, access_log=False)
    try:
        await server.startup()
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=20) as http:
            yield server, http
    finally:
        await server.close()


class OnSanicASGI(OnSanic):
    """Sanic under an ASGI server."""

    @asynccontextmanager
    async def served(self, app: Any) -> AsyncIterator[httpx.AsyncClient]:
        async with asgi_lifespan(app), client(app) as http:
            yield http

    @asynccontextmanager
    async def served_without_startup(self, app: Any) -> AsyncIterator[httpx.AsyncClient]:
        app.asgi = True  # as app.asgi_client does
        await app._startup()
        async with client(app) as http:
            yield http


@asynccontextmanager
async def asgi_lifespan(app: Any) -> AsyncIterator[None]:
    """Run the lifespan as servers do; asgi_lifespan takes no notice when a start-up failed."""
    events: asyncio.Queue[Any] = asyncio.Queue()
    answers: asyncio.Queue[Any] = asyncio.Queue()
    scope = {"type": "lifespan", "asgi": {"version": "3.0"}, "state": {}}
    task = asyncio.create_task(app(scope, events.get, answers.put))
    try:
        events.put_nowait({"type": "lifespan.startup"})
        answer = await answers.get()
        if answer["type"] != "lifespan.startup.complete":
            raise RuntimeError(answer["message"])
        yield
        events.put_nowait({"type": "lifespan.shutdown"})
        answer = await answers.get()
        if answer["type"] != "lifespan.shutdown.complete":
            raise RuntimeError(answer["message"])
    finally:
        task.cancel()
        await asyncio.wait({task})


class TestSanic(Conformance):
    framework = OnSanic()


class TestSanicASGI(Conformance):
    framework = OnSanicASGI()
    wraps_start_up_errors = True  # ASGI knows messages only


class TestSanicServed(Served):
    example = "sanic"
    servers: dict[str, Command] = {
        "sanic": lambda app, port: [
            "-m", "sanic", app, f"--port={port}", "--single-process", "--no-motd",
        ],
        "sanic-2-workers": lambda app, port: [
            "-m", "sanic", app, f"--port={port}", "--workers=2", "--no-motd",
        ],
        **SERVERS,
    }  # fmt: skip
