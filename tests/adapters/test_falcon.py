"""The adapter for Falcon."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import falcon
import falcon.asgi
import httpx
import psycopg
import pytest
from falcon.asgi import Request, Response, WebSocket
from falcon.testing import ASGIConductor, TestClient

from poolkeeper import PoolManager
from poolkeeper.adapters.falcon import (
    PoolMiddleware,
    connection_from,
    livez,
    pool_from,
    readyz,
)

from .conformance import Conformance, Framework, Probe, client, until
from .servers import Served


class Value:
    def __init__(self, probe: Probe) -> None:
        self.probe = probe

    async def on_get(self, req: Request, resp: Response) -> None:
        async with connection_from(req) as conn:
            resp.text = await self.probe.value(conn)


class Unasked(Value):
    async def on_get(self, req: Request, resp: Response) -> None:
        resp.text = self.probe.unasked()


class Same(Value):
    async def on_get(self, req: Request, resp: Response) -> None:
        async with connection_from(req) as first, connection_from(req) as second:
            resp.text = self.probe.same(first, second)


async def encoded(lines: AsyncIterator[str]) -> AsyncIterator[bytes]:
    async for line in lines:
        yield line.encode()


class Stream(Value):
    async def on_get(self, req: Request, resp: Response) -> None:
        resp.stream = encoded(self.probe.stream(pool_from(req)))


class Kept(Value):
    async def on_get(self, req: Request, resp: Response) -> None:
        async with connection_from(req) as conn:
            resp.stream = encoded(self.probe.kept(conn))


class Items(Value):
    async def on_post(self, req: Request, resp: Response) -> None:
        async with connection_from(req) as conn:
            await self.probe.add(conn, req.get_param("text", required=True))


class Fail(Value):
    async def on_post(self, req: Request, resp: Response) -> None:
        async with connection_from(req) as conn:
            await self.probe.add_and_raise(conn, req.get_param("text", required=True))


class Reject(Value):
    async def on_post(self, req: Request, resp: Response) -> None:
        async with connection_from(req) as conn:
            await self.probe.add(conn, req.get_param("text", required=True))
            raise falcon.HTTPConflict


class FailAtCommit(Value):
    async def on_post(self, req: Request, resp: Response) -> None:
        async with connection_from(req) as conn:
            await self.probe.add_twice(conn, req.get_param("text", required=True))


class Own:
    """A component of the user's own."""

    def __init__(self, probe: Probe) -> None:
        self.probe = probe

    async def process_startup(self, scope: Any, event: Any) -> None:
        await self.probe.startup()

    async def process_shutdown(self, scope: Any, event: Any) -> None:
        await self.probe.shutdown()


class OnFalcon(Framework):
    name = extra = package = "falcon"

    def build(self, probe: Probe) -> Any:
        app = falcon.asgi.App(middleware=[PoolMiddleware(probe.db), Own(probe)])
        app.add_route("/value", Value(probe))
        app.add_route("/unasked", Unasked(probe))
        app.add_route("/same", Same(probe))
        app.add_route("/stream", Stream(probe))
        app.add_route("/kept", Kept(probe))
        app.add_route("/items", Items(probe))
        app.add_route("/raise", Fail(probe))
        app.add_route("/reject", Reject(probe))
        app.add_route("/fail-at-commit", FailAtCommit(probe))
        app.add_route("/livez", livez)
        app.add_route("/readyz", readyz)
        return app

    @asynccontextmanager
    async def served(self, app: Any) -> AsyncIterator[httpx.AsyncClient]:
        # Not LifespanManager: its scope says no ASGI version, which Falcon refuses.
        async with ASGIConductor(app), client(app) as http:
            yield http


class TestFalcon(Conformance):
    framework = OnFalcon()
    wraps_start_up_errors = True


class TestFalconServed(Served):
    example = "falcon"
