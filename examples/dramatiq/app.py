"""
The ledger's transfers as actors of Dramatiq.

``dramatiq examples.dramatiq.app`` works on what ``transfer.send(1, 2, 10)`` sends.
"""

import os

import dramatiq
from dramatiq.brokers.redis import RedisBroker

from examples import ledger
from poolkeeper import PoolManager
from poolkeeper.adapters.dramatiq import setup

db = PoolManager(lambda: os.environ["DATABASE_URL"], min_size=1, max_size=4, name="ledger")
broker = RedisBroker(url=os.environ.get("REDIS_URL", "redis://localhost"))
setup(broker, db)
dramatiq.set_broker(broker)


@dramatiq.actor(throws=ledger.Refused)
async def transfer(source: int, target: int, amount: int) -> None:
    async with db.connection() as conn:  # rolled back if this raises
        await ledger.transfer(conn, ledger.Transfer(source, target, amount))
