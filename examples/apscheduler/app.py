"""
The ledger's standing orders, made by a job of APScheduler 3.

``python -m examples.apscheduler.app`` runs until it is told to end.
"""

import asyncio
import os
import signal

from apscheduler.schedulers.asyncio import AsyncIOScheduler

from examples import ledger
from poolkeeper import PoolManager

db = PoolManager(lambda: os.environ["DATABASE_URL"], min_size=1, max_size=4, name="ledger")

SCHEMA = """
    create table if not exists orders (
        id int primary key generated always as identity, source int, target int, amount int
    )
"""
TAKE = "delete from orders where id = %s returning source, target, amount"


async def pay() -> None:
    for (order,) in await db.fetchall("select id from orders order by id"):
        try:
            async with db.connection() as conn:  # rolled back if this raises
                taken = await (await conn.execute(TAKE, (order,))).fetchone()
                if taken is not None:
                    await ledger.transfer(conn, ledger.Transfer(*taken))
        except ledger.Refused as ex:
            print(f"order {order} is dropped: {ex!r}", flush=True)
            await db.execute(TAKE, (order,))


async def main() -> None:
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    async with db:  # open before the first job, and until the last has ended
        await db.execute(SCHEMA)
        scheduler = AsyncIOScheduler()
        scheduler.add_job(pay, "interval", seconds=0.2)
        scheduler.start()
        await stop.wait()
        scheduler.shutdown()  # cancels what runs: that is rolled back


if __name__ == "__main__":
    asyncio.run(main())
