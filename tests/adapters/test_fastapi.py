"""The adapter for FastAPI."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated, Any

from fastapi import Depends, FastAPI, HTTPException
from fastapi.responses import PlainTextResponse, StreamingResponse
from psycopg import AsyncConnection

from poolkeeper.adapters.fastapi import DepConnection, DepPool, lifespan, livez, readyz

from .conformance import Conformance, Framework, Probe
from .servers import Served


async def helper(conn: DepConnection) -> AsyncConnection[Any]:
    """A dependency of the endpoint's that asks for the connection as well."""
    return conn


class OnFastAPI(Framework):
    name = extra = package = "fastapi"

    def build(self, probe: Probe) -> Any:
        @asynccontextmanager
        async def own(app: FastAPI) -> AsyncIterator[None]:
            await probe.startup()
            yield
            await probe.shutdown()

        app = FastAPI(lifespan=lifespan(probe.db, own), default_response_class=PlainTextResponse)
        app.add_route("/livez", livez)
        app.add_route("/readyz", readyz)

        @app.get("/value")
        async def value(conn: DepConnection) -> str:
            return await probe.value(conn)

        @app.get("/unasked")
        async def unasked(pool: DepPool) -> str:
            return probe.unasked()

        @app.get("/same")
        async def same(
            first: DepConnection, second: Annotated[AsyncConnection[Any], Depends(helper)]
        ) -> str:
            return probe.same(first, second)

        @app.get("/stream")
        async def stream(pool: DepPool) -> StreamingResponse:
            return StreamingResponse(probe.stream(pool))

        @app.get("/kept")
        async def kept(conn: DepConnection) -> StreamingResponse:
            return StreamingResponse(probe.kept(conn))

        @app.post("/items")
        async def items(text: str, conn: DepConnection) -> str:
            await probe.add(conn, text)
            return "ok"

        @app.post("/raise")
        async def fail(text: str, conn: DepConnection) -> str:
            await probe.add_and_raise(conn, text)
            return "ok"

        @app.post("/reject")
        async def reject(text: str, conn: DepConnection) -> str:
            await probe.add(conn, text)
            raise HTTPException(409)

        @app.post("/fail-at-commit")
        async def fail_at_commit(text: str, conn: DepConnection) -> str:
            await probe.add_twice(conn, text)
            return "ok"

        return app


class TestFastAPI(Conformance):
    framework = OnFastAPI()


class TestFastAPIServed(Served):
    example = "fastapi"
