"""
Let thousands of tasks give up waiting together, and see what that does to everybody else.

Run by ``python -m benchmarks`` in a process for each pool: memory that one has used is not given
back for the next.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import resource
import sys
from contextlib import AsyncExitStack, suppress
from time import perf_counter

from .contestants import EVERY, Contestant
from .contests import LOOPS
from .timing import runner

HELD = 10
"""How many connections there are, each held by a task that waits for something else."""

TRUE_CAUSE = "connections are held while something else is waited for"


def most_memory() -> float:
    """Return how many MiB of memory this process has had at most so far."""
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most / 2**20 if sys.platform == "darwin" else most / 2**10


async def storm(pool: Contestant, waiters: int, timeout: float) -> dict[str, float]:
    """Return how long the loop stood still, how much memory it took, and how many were told why."""
    worst = 0.0

    async def beat() -> None:
        nonlocal worst
        while True:
            before = perf_counter()
            await asyncio.sleep(0.005)
            worst = max(worst, perf_counter() - before - 0.005)

    async def wait() -> Exception:
        try:
            async with pool.connection():
                raise AssertionError("a connection became free")
        except Exception as ex:
            str(ex)  # somebody logs it
            return ex

    async with AsyncExitStack() as held:
        for _ in range(HELD):
            await held.enter_async_context(pool.connection())
        tasks = [asyncio.create_task(wait()) for _ in range(waiters)]
        await asyncio.sleep(timeout / 2)
        before = most_memory()
        beating = asyncio.create_task(beat())
        errors = await asyncio.gather(*tasks)
        beating.cancel()
        with suppress(asyncio.CancelledError):
            await beating
        return {
            "stall": worst,
            "memory": most_memory() - before,
            "told": sum(TRUE_CAUSE in str(error) for error in errors) / waiters,
        }


async def measure(name: str, dsn: str, waiters: int, timeout: float) -> dict[str, float]:
    (contestant,) = (c for c in EVERY if c.name == name)
    async with contestant(dsn, HELD, timeout) as pool:
        return await storm(pool, waiters, timeout)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.storm")
    parser.add_argument("--dsn", required=True)
    parser.add_argument("--loop", required=True, choices=LOOPS)
    parser.add_argument("--pool", required=True)
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    for name in ("psycopg.pool", "poolkeeper"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    waiters, timeout = (100, 1.5) if arguments.quick else (10_000, 3.0)
    with runner(arguments.loop) as run:
        work = measure(arguments.pool, arguments.dsn, waiters, timeout)
        json.dump({"waiters": waiters, **run.run(work)}, sys.stdout)


if __name__ == "__main__":
    main()
