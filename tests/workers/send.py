"""
Send transfers to the worker of an example: ``python -m tests.workers.send celery``.

One for each line that is read, such as ``1 2 10``; says ``sent`` when it is.
"""

from __future__ import annotations

import asyncio
import importlib
import os
import sys
from collections.abc import Awaitable, Callable
from typing import Any

import psycopg

Send = Callable[[int, int, int], Awaitable[object]]


async def celery(app: Any) -> Send:
    return lambda *order: asyncio.to_thread(app.transfer.delay, *order)


async def dramatiq(app: Any) -> Send:
    return lambda *order: asyncio.to_thread(app.transfer.send, *order)


async def taskiq(app: Any) -> Send:
    await app.broker.startup()
    return lambda *order: app.transfer.kiq(*order)


async def arq(app: Any) -> Send:
    from arq import create_pool

    redis = await create_pool(app.WorkerSettings.redis_settings)
    return lambda *order: redis.enqueue_job("transfer", *order)


async def saq(app: Any) -> Send:
    await app.queue.connect()
    return lambda source, target, amount: app.queue.enqueue(
        "transfer", source=source, target=target, amount=amount
    )


async def faststream(app: Any) -> Send:
    await app.broker.connect()
    return lambda source, target, amount: app.broker.publish(
        app.Transfer(source=source, target=target, amount=amount), list="transfers"
    )


async def apscheduler(app: Any) -> Send:
    dsn = os.environ["DATABASE_URL"]
    conn = await psycopg.AsyncConnection.connect(dsn, autocommit=True)
    made = "select from pg_class where relname = 'orders'"
    while not (await conn.execute(made)).rowcount:
        await asyncio.sleep(0.05)
    insert = "insert into orders (source, target, amount) values (%s, %s, %s)"
    return lambda *order: conn.execute(insert, order)


async def main(tool: str) -> None:
    send = await globals()[tool](importlib.import_module(f"examples.{tool}.app"))
    while line := await asyncio.to_thread(sys.stdin.readline):
        await send(*map(int, line.split()))
        print("sent", flush=True)


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1]))
