"""The ledger on Falcon."""

import os
from typing import Any

import falcon
import falcon.asgi
from falcon.asgi import Request, Response

from examples import ledger
from poolkeeper import PoolManager
from poolkeeper.adapters.falcon import PoolMiddleware, connection_from, livez, pool_from, readyz

db = PoolManager(lambda: os.environ["DATABASE_URL"], min_size=1, max_size=4, name="ledger")


class Account:
    async def on_get(self, req: Request, resp: Response, account: int) -> None:
        async with connection_from(req) as conn:
            resp.media = {"id": account, "balance": await ledger.balance(conn, account)}


class Transfers:
    async def on_post(self, req: Request, resp: Response) -> None:
        # Read before a connection is taken: a client may send slowly.
        wanted = ledger.Transfer.of(await req.get_media())
        async with connection_from(req) as conn:  # rolled back if this raises
            number = await ledger.transfer(conn, wanted)
        resp.status = falcon.HTTP_CREATED  # committed by now
        resp.media = {"id": number}

    async def on_get(self, req: Request, resp: Response) -> None:
        # The pool, not a connection: a client may read slowly.
        resp.content_type = falcon.MEDIA_TEXT
        resp.stream = (line.encode() async for line in ledger.statement(pool_from(req)))


class Prepare:
    async def process_startup(self, scope: Any, event: Any) -> None:
        await ledger.prepare(db)  # the pool is open before this


async def refused(req: Request, resp: Response, ex: ledger.Refused, params: Any) -> None:
    resp.status = ex.status
    resp.media = {"detail": str(ex)}


app = falcon.asgi.App(middleware=[PoolMiddleware(db), Prepare()])
app.add_error_handler(ledger.Refused, refused)
app.add_route("/accounts/{account:int}", Account())
app.add_route("/transfers", Transfers())
app.add_route("/livez", livez)
app.add_route("/readyz", readyz)
