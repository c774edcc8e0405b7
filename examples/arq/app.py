"""
The ledger's transfers as jobs of arq.

``arq examples.arq.app.WorkerSettings`` works on what
``await redis.enqueue_job("transfer", 1, 2, 10)`` sends.
"""

import os
from typing import Any

from arq.connections import RedisSettings

from examples import ledger
from poolkeeper import PoolManager
from poolkeeper.adapters.arq import setup

db = PoolManager(lambda: os.environ["DATABASE_URL"], min_size=1, max_size=4, name="ledger")


async def transfer(ctx: dict[str, Any], source: int, target: int, amount: int) -> int:
    async with db.connection() as conn:  # rolled back if this raises
        return await ledger.transfer(conn, ledger.Transfer(source, target, amount))


class WorkerSettings:
    functions = (transfer,)
    redis_settings = RedisSettings.from_dsn(os.environ.get("REDIS_URL", "redis://localhost"))


setup(WorkerSettings, db)
