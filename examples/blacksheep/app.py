"""The ledger on BlackSheep."""

import os
from collections.abc import AsyncIterator
from dataclasses import dataclass

from blacksheep import Application, FromJSON, Request, Response, Router, StreamedContent, json

from examples import ledger
from poolkeeper import PoolManager
from poolkeeper.adapters.blacksheep import DepConnection, livez, readyz, use_pool

db = PoolManager(lambda: os.environ["DATABASE_URL"], min_size=1, max_size=4, name="ledger")

router = Router()
app = Application(router=router)
use_pool(app, db)
router.add_get("/livez", livez)
router.add_get("/readyz", readyz)


@app.on_start
async def prepare() -> None:
    await ledger.prepare(db)  # the pool is open before this, and until after the end


@dataclass
class Transfer:
    source: int
    target: int
    amount: int


@router.get("/accounts/{account}")
async def account(account: int, conn: DepConnection) -> dict[str, int]:
    return {"id": account, "balance": await ledger.balance(conn, account)}


@router.post("/transfers")
async def transfer(body: FromJSON[Transfer], conn: DepConnection) -> Response:
    wanted = ledger.Transfer.of(vars(body.value))
    # Rolled back if this raises; committed before the client is told.
    return json({"id": await ledger.transfer(conn, wanted)}, 201)


@router.get("/transfers")
async def transfers(pool: PoolManager) -> Response:
    async def lines() -> AsyncIterator[bytes]:
        # The pool, not a connection: a client may read slowly.
        async for line in ledger.statement(pool):
            yield line.encode()

    return Response(200, content=StreamedContent(b"text/plain", lines))


@app.exception_handler(ledger.Refused)
async def refused(app: Application, request: Request, ex: ledger.Refused) -> Response:
    return json({"detail": str(ex)}, ex.status)
