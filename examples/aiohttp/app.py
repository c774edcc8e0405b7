"""The ledger on aiohttp."""

import os
from collections.abc import AsyncIterator

from aiohttp import web
from aiohttp.typedefs import Handler

from examples import ledger
from poolkeeper import PoolManager
from poolkeeper.adapters.aiohttp import connection_from, livez, pool_from, readyz, setup

db = PoolManager(lambda: os.environ["DATABASE_URL"], min_size=1, max_size=4, name="ledger")

routes = web.RouteTableDef()


@routes.get(r"/accounts/{account:\d+}")
async def account(request: web.Request) -> web.Response:
    number = int(request.match_info["account"])
    async with connection_from(request) as conn:
        return web.json_response({"id": number, "balance": await ledger.balance(conn, number)})


@routes.post("/transfers")
async def transfer(request: web.Request) -> web.Response:
    # Read before a connection is taken: a client may send slowly.
    wanted = ledger.Transfer.of(await request.json())
    async with connection_from(request) as conn:  # rolled back if this raises
        number = await ledger.transfer(conn, wanted)
    return web.json_response({"id": number}, status=201)  # committed by now


@routes.get("/transfers")
async def transfers(request: web.Request) -> web.StreamResponse:
    # The pool, not a connection: a client may read slowly.
    lines = ledger.statement(pool_from(request))
    response = web.StreamResponse(headers={"Content-Type": "text/plain"})
    await response.prepare(request)
    async for line in lines:
        await response.write(line.encode())
    return response


@web.middleware
async def refusals(request: web.Request, handler: Handler) -> web.StreamResponse:
    try:
        return await handler(request)
    except ledger.Refused as ex:
        return web.json_response({"detail": str(ex)}, status=ex.status)


async def prepare(app: web.Application) -> AsyncIterator[None]:
    await ledger.prepare(db)  # the pool is open before this, and until after the end
    yield


def make_app(argv: list[str] | None = None) -> web.Application:
    app = web.Application(middlewares=[refusals])
    setup(app, db)
    app.cleanup_ctx.append(prepare)
    app.add_routes(routes)
    app.add_routes([web.get("/livez", livez), web.get("/readyz", readyz)])
    return app
