"""The ledger on plain ASGI, without a framework."""

import json
import os
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping
from contextlib import asynccontextmanager
from typing import Any

from examples import ledger
from poolkeeper import PoolManager
from poolkeeper.adapters.asgi import LifespanMiddleware, connection_from, pool_from

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

db = PoolManager(lambda: os.environ["DATABASE_URL"], min_size=1, max_size=4, name="ledger")


async def account(scope: Scope, send: Send, number: int) -> None:
    async with connection_from(scope) as conn:
        balance = await ledger.balance(conn, number)
    await respond(send, 200, {"id": number, "balance": balance})


async def transfer(scope: Scope, receive: Receive, send: Send) -> None:
    # Read before a connection is taken: a client may send slowly.
    wanted = ledger.Transfer.of(await read_json(receive))
    async with connection_from(scope) as conn:  # rolled back if this raises
        number = await ledger.transfer(conn, wanted)
    await respond(send, 201, {"id": number})  # committed by now


async def transfers(scope: Scope, send: Send) -> None:
    await start(send, 200, "text/plain")
    # The pool, not a connection: a client may read slowly.
    async for line in ledger.statement(pool_from(scope)):
        await send({"type": "http.response.body", "body": line.encode(), "more_body": True})
    await send({"type": "http.response.body"})


async def route(scope: Scope, receive: Receive, send: Send) -> None:
    if scope["type"] != "http":
        raise ValueError(f"this application does not serve {scope['type']}")
    try:
        match scope["method"], scope["path"].strip("/").split("/"):
            case "GET", ["accounts", number] if number.isdecimal():
                await account(scope, send, int(number))
            case "GET", ["transfers"]:
                await transfers(scope, send)
            case "POST", ["transfers"]:
                await transfer(scope, receive, send)
            case _:
                await respond(send, 404, {"detail": "there is nothing here"})
    except ledger.Refused as ex:
        await respond(send, ex.status, {"detail": str(ex)})


@asynccontextmanager
async def prepare(app: object) -> AsyncIterator[None]:
    await ledger.prepare(db)  # the pool is open before this, and until after the end
    yield


app = LifespanMiddleware(route, db, prepare, livez="/livez", readyz="/readyz")


# --- what a framework would do ------------------------------------------------------------------


async def read_json(receive: Receive) -> Any:
    body = b""
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ConnectionError("the client went away")
        body += message.get("body", b"")
        if not message.get("more_body", False):
            break
    try:
        return json.loads(body)
    except ValueError as ex:
        raise ledger.Invalid("the body is no JSON") from ex


async def start(send: Send, status: int, content_type: str) -> None:
    headers = [(b"content-type", content_type.encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})


async def respond(send: Send, status: int, content: dict[str, Any]) -> None:
    await start(send, status, "application/json")
    await send({"type": "http.response.body", "body": json.dumps(content).encode()})
