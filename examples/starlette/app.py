"""The ledger on Starlette."""

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, StreamingResponse
from starlette.routing import Route

from examples import ledger
from poolkeeper import PoolManager
from poolkeeper.adapters.starlette import connection_from, lifespan, livez, pool_from, readyz

db = PoolManager(lambda: os.environ["DATABASE_URL"], min_size=1, max_size=4, name="ledger")


async def account(request: Request) -> JSONResponse:
    number = request.path_params["account"]
    async with connection_from(request) as conn:
        return JSONResponse({"id": number, "balance": await ledger.balance(conn, number)})


async def transfer(request: Request) -> JSONResponse:
    # Read before a connection is taken: a client may send slowly.
    wanted = ledger.Transfer.of(await request.json())
    async with connection_from(request) as conn:  # rolled back if this raises
        number = await ledger.transfer(conn, wanted)
    return JSONResponse({"id": number}, 201)  # committed by now


async def transfers(request: Request) -> StreamingResponse:
    # The pool, not a connection: a client may read slowly.
    return StreamingResponse(ledger.statement(pool_from(request)), media_type="text/plain")


async def refused(request: Request, ex: Exception) -> JSONResponse:
    assert isinstance(ex, ledger.Refused)
    return JSONResponse({"detail": str(ex)}, ex.status)


@asynccontextmanager
async def prepare(app: Starlette) -> AsyncIterator[None]:
    await ledger.prepare(db)  # the pool is open before this, and until after the end
    yield


app = Starlette(
    routes=[
        Route("/accounts/{account:int}", account),
        Route("/transfers", transfers),
        Route("/transfers", transfer, methods=["POST"]),
        Route("/livez", livez),
        Route("/readyz", readyz),
    ],
    exception_handlers={ledger.Refused: refused},
    lifespan=lifespan(db, prepare),
)
