"""The ledger on Quart."""

import os
from collections.abc import AsyncIterator
from typing import Any

from quart import Quart, request

from examples import ledger
from poolkeeper import PoolManager
from poolkeeper.adapters.quart import connection_from, init_app, livez, pool_from, readyz

db = PoolManager(lambda: os.environ["DATABASE_URL"], min_size=1, max_size=4, name="ledger")

app = Quart(__name__)
init_app(app, db)
app.add_url_rule("/livez", view_func=livez)
app.add_url_rule("/readyz", view_func=readyz)


@app.before_serving
async def prepare() -> None:
    await ledger.prepare(db)  # the pool is open before this, and until after the end


@app.get("/accounts/<int:account>")
async def account(account: int) -> dict[str, int]:
    async with connection_from() as conn:
        return {"id": account, "balance": await ledger.balance(conn, account)}


@app.post("/transfers")
async def transfer() -> tuple[dict[str, int], int]:
    # Read before a connection is taken: a client may send slowly.
    wanted = ledger.Transfer.of(await request.get_json())
    async with connection_from() as conn:  # rolled back if this raises
        number = await ledger.transfer(conn, wanted)
    return {"id": number}, 201  # committed by now


@app.get("/transfers")
async def transfers() -> tuple[AsyncIterator[str], dict[str, str]]:
    # The pool, not a connection: a client may read slowly.
    return ledger.statement(pool_from()), {"Content-Type": "text/plain"}


@app.errorhandler(ledger.Refused)
async def refused(ex: ledger.Refused) -> tuple[dict[str, Any], int]:
    return {"detail": str(ex)}, ex.status
