"""
The ledger's transfers as jobs of SAQ.

``saq examples.saq.app.settings`` works on what
``await queue.enqueue("transfer", source=1, target=2, amount=10)`` sends.
"""

import os
from typing import Any

from saq import Queue

from examples import ledger
from poolkeeper import PoolManager
from poolkeeper.adapters.saq import setup

db = PoolManager(lambda: os.environ["DATABASE_URL"], min_size=1, max_size=4, name="ledger")
queue = Queue.from_url(os.environ.get("REDIS_URL", "redis://localhost"))


async def transfer(ctx: dict[str, Any], *, source: int, target: int, amount: int) -> int:
    async with db.connection() as conn:  # rolled back if this raises
        return await ledger.transfer(conn, ledger.Transfer(source, target, amount))


settings = {
    "queue": queue,
    "functions": [transfer],
    "shutdown_grace_period_s": 3,  # that jobs may go on; without, they are cancelled at once
}
setup(settings, db)
