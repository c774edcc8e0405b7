"""
The ledger's transfers as tasks of taskiq.

``taskiq worker examples.taskiq.app:broker --max-fails 1`` works on what
``await transfer.kiq(1, 2, 10)`` sends.
"""

import os

from taskiq_redis import ListQueueBroker

from examples import ledger
from poolkeeper import PoolManager
from poolkeeper.adapters.taskiq import setup

db = PoolManager(lambda: os.environ["DATABASE_URL"], min_size=1, max_size=4, name="ledger")
broker = ListQueueBroker(
    os.environ.get("REDIS_URL", "redis://localhost"),
    socket_timeout=None,  # redis-py 8 gives up reading after 5 s
)
setup(broker, db)


@broker.task
async def transfer(source: int, target: int, amount: int) -> int:
    async with db.connection() as conn:  # rolled back if this raises
        return await ledger.transfer(conn, ledger.Transfer(source, target, amount))
