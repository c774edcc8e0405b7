"""The ledger on Sanic."""

import os

from sanic import HTTPResponse, Request, Sanic, json

from examples import ledger
from poolkeeper import PoolManager
from poolkeeper.adapters.sanic import connection_from, livez, pool_from, readyz, setup

db = PoolManager(lambda: os.environ["DATABASE_URL"], min_size=1, max_size=4, name="ledger")

app = Sanic("ledger")
setup(app, db)
app.add_route(livez, "/livez")
app.add_route(readyz, "/readyz")


@app.before_server_start
async def prepare(app: Sanic) -> None:
    await ledger.prepare(db)  # the pool is open before this, and until after the end


@app.get("/accounts/<account:int>")
async def account(request: Request, account: int) -> HTTPResponse:
    async with connection_from(request) as conn:
        return json({"id": account, "balance": await ledger.balance(conn, account)})


@app.post("/transfers")
async def transfer(request: Request) -> HTTPResponse:
    wanted = ledger.Transfer.of(request.json)
    async with connection_from(request) as conn:  # rolled back if this raises
        number = await ledger.transfer(conn, wanted)
    return json({"id": number}, 201)  # committed by now


@app.get("/transfers")
async def transfers(request: Request) -> None:
    # The pool, not a connection: a client may read slowly.
    lines = ledger.statement(pool_from(request))
    response = await request.respond(content_type="text/plain")
    async for line in lines:
        await response.send(line)
    await response.eof()


@app.exception(ledger.Refused)
async def refused(request: Request, ex: ledger.Refused) -> HTTPResponse:
    return json({"detail": str(ex)}, ex.status)
