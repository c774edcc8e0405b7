"""The ledger on Litestar."""

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated, Any

from litestar import Litestar, Request, Response, get, post
from litestar.params import FromPath, JSONBody
from litestar.response import Stream
from msgspec import Meta, Struct

from examples import ledger
from poolkeeper import PoolManager
from poolkeeper.adapters.litestar import DepConnection, DepPool, PoolPlugin, livez, readyz

db = PoolManager(lambda: os.environ["DATABASE_URL"], min_size=1, max_size=4, name="ledger")


class Transfer(Struct):
    source: int
    target: int
    amount: Annotated[int, Meta(gt=0)]


@get("/accounts/{number:int}")
async def account(number: FromPath[int], db_connection: DepConnection) -> dict[str, int]:
    return {"id": number, "balance": await ledger.balance(db_connection, number)}


@post("/transfers")
async def transfer(data: JSONBody[Transfer], db_connection: DepConnection) -> dict[str, int]:
    wanted = ledger.Transfer(data.source, data.target, data.amount)
    # Rolled back if this raises; committed before the client is told.
    return {"id": await ledger.transfer(db_connection, wanted)}


@get("/transfers")
async def transfers(db_pool: DepPool) -> Stream:
    # The pool, not a connection: a client may read slowly.
    return Stream(ledger.statement(db_pool), media_type="text/plain")


def refused(request: Request[Any, Any, Any], ex: ledger.Refused) -> Response[dict[str, str]]:
    return Response({"detail": str(ex)}, status_code=ex.status)


@asynccontextmanager
async def prepare(app: Litestar) -> AsyncIterator[None]:
    await ledger.prepare(db)  # the pool is open before this, and until after the end
    yield


app = Litestar(
    [account, transfer, transfers, livez, readyz],
    plugins=[PoolPlugin(db)],
    lifespan=[prepare],
    exception_handlers={ledger.Refused: refused},
)
