"""
The ledger's transfers as tasks of Celery.

``celery -A examples.celery.app worker`` works on what ``transfer.delay(1, 2, 10)`` sends.
"""

import os

from celery import Celery

from examples import ledger
from poolkeeper import PoolManager
from poolkeeper.adapters.celery import setup

db = PoolManager(lambda: os.environ["DATABASE_URL"], min_size=1, max_size=4, name="ledger")
app = Celery("ledger", broker=os.environ.get("REDIS_URL", "redis://localhost"))
portal = setup(app, db)


async def make(wanted: ledger.Transfer) -> int:
    async with db.connection() as conn:  # rolled back if this raises
        return await ledger.transfer(conn, wanted)


@app.task(acks_late=True)
def transfer(source: int, target: int, amount: int) -> int:
    return portal.run(make, ledger.Transfer(source, target, amount))  # committed by now
