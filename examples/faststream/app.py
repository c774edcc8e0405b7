"""
The ledger's transfers as messages of FastStream.

``faststream run examples.faststream.app:app`` works on what
``await broker.publish(Transfer(...), list="transfers")`` sends.
"""

import os

from faststream import FastStream
from faststream.redis import RedisBroker
from pydantic import BaseModel

from examples import ledger
from poolkeeper import PoolManager
from poolkeeper.adapters.faststream import lifespan

db = PoolManager(lambda: os.environ["DATABASE_URL"], min_size=1, max_size=4, name="ledger")
broker = RedisBroker(
    os.environ.get("REDIS_URL", "redis://localhost"),
    graceful_timeout=10.0,  # seconds that messages may take at the end
)
app = FastStream(broker, lifespan=lifespan(db))


class Transfer(BaseModel):
    source: int
    target: int
    amount: int


@broker.subscriber(list="transfers")
async def transfer(wanted: Transfer) -> None:
    async with db.connection() as conn:  # rolled back if this raises
        await ledger.transfer(conn, ledger.Transfer(wanted.source, wanted.target, wanted.amount))
