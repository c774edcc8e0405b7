"""The ledger on FastAPI."""

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import BaseModel, PositiveInt

from examples import ledger
from poolkeeper import PoolManager
from poolkeeper.adapters.fastapi import DepConnection, DepPool, lifespan, livez, readyz

db = PoolManager(lambda: os.environ["DATABASE_URL"], min_size=1, max_size=4, name="ledger")


@asynccontextmanager
async def prepare(app: FastAPI) -> AsyncIterator[None]:
    await ledger.prepare(db)  # the pool is open before this, and until after the end
    yield


app = FastAPI(lifespan=lifespan(db, prepare))
app.add_route("/livez", livez)
app.add_route("/readyz", readyz)


class Transfer(BaseModel):
    source: int
    target: int
    amount: PositiveInt


@app.get("/accounts/{account}")
async def account(account: int, conn: DepConnection) -> dict[str, int]:
    return {"id": account, "balance": await ledger.balance(conn, account)}


@app.post("/transfers", status_code=201)
async def transfer(body: Transfer, conn: DepConnection) -> dict[str, int]:
    wanted = ledger.Transfer(body.source, body.target, body.amount)
    # Rolled back if this raises; committed before the client is told.
    return {"id": await ledger.transfer(conn, wanted)}


@app.get("/transfers")
async def transfers(pool: DepPool) -> StreamingResponse:
    # The pool, not a connection: a client may read slowly.
    return StreamingResponse(ledger.statement(pool), media_type="text/plain")


@app.exception_handler(ledger.Refused)
async def refused(request: Request, ex: ledger.Refused) -> JSONResponse:
    return JSONResponse({"detail": str(ex)}, ex.status)
