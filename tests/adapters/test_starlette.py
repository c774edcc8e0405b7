"""The adapter for Starlette."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from poolkeeper.adapters.starlette import connection_from, lifespan, livez, pool_from, readyz

from .conformance import Conformance, Framework, Probe
from .servers import Served


class OnStarlette(Framework):
    name = extra = package = "starlette"

    def build(self, probe: Probe) -> Any:
        async def value(request: Request) -> Response:
            async with connection_from(request) as conn:
                return PlainTextResponse(await probe.value(conn))

        async def unasked(request: Request) -> Response:
            return PlainTextResponse(probe.unasked())

        async def same(request: Request) -> Response:
            async with connection_from(request) as first, connection_from(request) as second:
                return PlainTextResponse(probe.same(first, second))

        async def stream(request: Request) -> Response:
            return StreamingResponse(probe.stream(pool_from(request)))

        async def kept(request: Request) -> Response:
            async with connection_from(request) as conn:
                return StreamingResponse(probe.kept(conn))

        async def items(request: Request) -> Response:
            async with connection_from(request) as conn:
                await probe.add(conn, request.query_params["text"])
            return PlainTextResponse("ok")

        async def fail(request: Request) -> Response:
            async with connection_from(request) as conn:
                await probe.add_and_raise(conn, request.query_params["text"])
            return PlainTextResponse("ok")

        async def reject(request: Request) -> Response:
            async with connection_from(request) as conn:
                await probe.add(conn, request.query_params["text"])
                raise HTTPException(409)

        async def fail_at_commit(request: Request) -> Response:
            async with connection_from(request) as conn:
                await probe.add_twice(conn, request.query_params["text"])
            return PlainTextResponse("ok")

        @asynccontextmanager
        async def own(app: Starlette) -> AsyncIterator[None]:
            await probe.startup()
            yield
            await probe.shutdown()

        return Starlette(
            routes=[
                Route("/value", value),
                Route("/unasked", unasked),
                Route("/same", same),
                Route("/stream", stream),
                Route("/kept", kept),
                Route("/items", items, methods=["POST"]),
                Route("/raise", fail, methods=["POST"]),
                Route("/reject", reject, methods=["POST"]),
                Route("/fail-at-commit", fail_at_commit, methods=["POST"]),
                Route("/livez", livez),
                Route("/readyz", readyz),
            ],
            lifespan=lifespan(probe.db, own),
        )


class TestStarlette(Conformance):
    framework = OnStarlette()


class TestStarletteServed(Served):
    example = "starlette"
