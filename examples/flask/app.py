"""
The ledger on Flask, whose views are not async: they call a portal.

``gunicorn "examples.flask.app:create_app()" --workers 2 --threads 4``
"""

import os
from typing import Any

from flask import Flask, request

from examples import ledger
from poolkeeper import PoolManager, Portal

db = PoolManager(lambda: os.environ["DATABASE_URL"], min_size=1, max_size=4, name="ledger")
portal = Portal(db)
app = Flask(__name__)


def create_app() -> Flask:
    portal.run(ledger.prepare, db)  # opens the pool: with a wrong role, the start ends here
    return app


async def balance(number: int) -> int:
    async with db.connection() as conn:
        return await ledger.balance(conn, number)


async def make(wanted: ledger.Transfer) -> int:
    async with db.connection() as conn:  # rolled back if this raises
        return await ledger.transfer(conn, wanted)


@app.get("/accounts/<int:number>")
def account(number: int) -> dict[str, int]:
    return {"id": number, "balance": portal.run(balance, number)}


@app.post("/transfers")
def transfer() -> tuple[dict[str, int], int]:
    wanted = ledger.Transfer.of(request.get_json())
    return {"id": portal.run(make, wanted)}, 201  # committed by now


@app.get("/readyz")
def readyz() -> tuple[dict[str, str], int]:
    health = portal.run(db.check)
    return {"status": health.kind}, 200 if health else 503


@app.errorhandler(ledger.Refused)
def refused(ex: ledger.Refused) -> tuple[dict[str, Any], int]:
    return {"detail": str(ex)}, ex.status
