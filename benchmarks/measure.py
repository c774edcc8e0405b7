"""
Measure everything on one event loop, and print it as JSON.

Run by ``python -m benchmarks`` in a process for each loop.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import statistics
import sys
import threading
import timeit
import tracemalloc
from collections.abc import Callable, Coroutine
from contextlib import AsyncExitStack, suppress
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from time import perf_counter
from typing import Any

import psycopg
from psycopg import AsyncConnection
from psycopg.conninfo import make_conninfo

from poolkeeper import LoopMismatchError, OpenError, PoolManager
from poolkeeper._embedded import EmbeddedServer

from .contestants import Bare, Contestant, Poolkeeper, installed
from .timing import Samples, Work, interleave

PATIENCE = 300.0
"""Seconds that a task waits for a connection where the wait itself is measured."""

REQUESTS = 20
GIVE_UP = 100.0
"""Seconds after an outage in which a pool has to serve again."""


@dataclass(frozen=True)
class Scale:
    """How much is measured."""

    rounds: int
    seconds: float  # each sample
    growth_rounds: int
    growth_seconds: float
    tasks: tuple[int, ...]
    sizes: tuple[int, ...]
    waiters: int
    faults: int  # repetitions of what is not a timing
    outages: tuple[float, ...]


NORMAL = Scale(25, 0.06, 3, 0.02, (1, 8, 64, 1000, 10_000), (4, 16), 10_000, 5, ())
QUICK = Scale(1, 0.001, 1, 0.001, (1, 8, 64), (4,), 100, 1, ())
SLOW = (8.0, 60.0)


# --- what an acquire costs --------------------------------------------------------------------


def alone(contestant: Contestant) -> Work:
    """Acquire and release, nobody waiting."""

    async def work(size: int, start: Callable[[], None]) -> int:
        connection = contestant.connection
        start()
        for _ in range(size):
            async with connection():
                pass
        return size

    return work


def crowd(contestant: Contestant, tasks: int) -> Work:
    """Acquire, hold for one turn of the loop, release; in *tasks* tasks at once."""

    async def one(gate: asyncio.Future[None], times: int) -> None:
        connection = contestant.connection
        await gate
        for _ in range(times):
            async with connection():
                await asyncio.sleep(0)

    async def work(size: int, start: Callable[[], None]) -> int:
        times = -(-size // tasks)
        gate = asyncio.get_running_loop().create_future()
        all_done = asyncio.gather(*(one(gate, times) for _ in range(tasks)))
        await asyncio.sleep(0)  # now they stand at the gate
        start()
        gate.set_result(None)
        await all_done
        return times * tasks

    return work


def repeat(query: Callable[[], Coroutine[Any, Any, Any]]) -> Work:
    """Fetch one row, time and again."""

    async def work(size: int, start: Callable[[], None]) -> int:
        start()
        for _ in range(size):
            await query()
        return size

    return work


async def costs(dsn: str, scale: Scale) -> dict[str, Samples]:
    async with AsyncExitStack() as stack:
        pools = [await stack.enter_async_context(c(dsn, 4, PATIENCE)) for c in installed()]
        queries = {pool.name: repeat(pool.query) for pool in pools}
        for pool in pools:
            if isinstance(pool, Poolkeeper):
                queries["poolkeeper, in a block"] = repeat(pool.query_in_block)
        rows = {
            "alone": {pool.name: alone(pool) for pool in pools},
            "crowd": {pool.name: crowd(pool, 64) for pool in pools},
            "query": queries,
        }
        return {
            row: await interleave(works, scale.rounds, scale.seconds) for row, works in rows.items()
        }


async def growth(dsn: str, scale: Scale) -> dict[int, dict[int, Samples]]:
    """Return seconds per acquire by number of connections, then of tasks."""
    found: dict[int, dict[int, Samples]] = {}
    for size in scale.sizes:
        async with AsyncExitStack() as stack:
            pools = [await stack.enter_async_context(c(dsn, size, PATIENCE)) for c in installed()]
            found[size] = {
                tasks: await interleave(
                    {pool.name: crowd(pool, tasks) for pool in pools},
                    scale.growth_rounds,
                    scale.growth_seconds,
                )
                for tasks in scale.tasks
            }
    return found


# --- many who wait ----------------------------------------------------------------------------


async def fairness(dsn: str, scale: Scale) -> dict[str, dict[str, float]]:
    """Let all ask at once for 10 connections, and see in which order they are served."""
    found = {}
    for contestant in installed():
        async with contestant(dsn, 10, PATIENCE) as pool:
            asked: dict[int, float] = {}
            waits: dict[int, float] = {}

            async def one(
                number: int,
                pool: Contestant = pool,
                asked: dict[int, float] = asked,
                waits: dict[int, float] = waits,
            ) -> None:
                asked[number] = perf_counter()
                async with pool.connection():
                    waits[number] = perf_counter() - asked[number]
                    await asyncio.sleep(0.001)

            begin = perf_counter()
            await asyncio.gather(*(one(number) for number in range(scale.waiters)))
            turns = {number: turn for turn, number in enumerate(asked)}
            served = [turns[number] for number in waits]
            found[pool.name] = {
                "seconds": perf_counter() - begin,
                "median": statistics.median(waits.values()),
                "max": max(waits.values()),
                "out_of_turn": sum(a > b for a, b in pairwise(served)),
            }
    return found


async def memory(dsn: str, scale: Scale) -> dict[str, float]:
    """Return the bytes of one task that waits; "future" is one that waits for nothing."""
    waiters = max(100, scale.waiters // 5)  # tracing is slow

    async def grown(wait: Callable[[], Coroutine[Any, Any, None]]) -> float:
        tracemalloc.start()
        tasks = [asyncio.create_task(wait()) for _ in range(waiters)]
        for _ in range(20):
            await asyncio.sleep(0)
        size = tracemalloc.get_traced_memory()[0] / waiters
        tracemalloc.stop()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        return size

    async def nothing() -> None:
        await asyncio.get_running_loop().create_future()

    found = {"future": await grown(nothing)}
    for contestant in installed():
        async with contestant(dsn, 1, PATIENCE) as pool:

            async def wait(pool: Contestant = pool) -> None:
                async with pool.connection():
                    pass

            async with pool.connection():
                found[pool.name] = await grown(wait)
    return found


async def clean_hands(dsn: str, scale: Scale) -> dict[str, float]:
    """Return what clean hands cost, in seconds for each release; the best of several runs."""
    number = 200 if scale is QUICK else 10_000

    def best(statement: Callable[[], object]) -> float:
        return min(timeit.repeat(statement, number=number, repeat=7)) / number

    manager = PoolManager(dsn, min_size=1)
    await manager.open()
    try:
        handle: Any = await manager.pool.getconn()
        session = handle._session

        def renew() -> None:
            nonlocal handle
            handle = session.successor(handle)

        return {
            "unchanged": best(lambda: session.parameters_unchanged),
            "handle": best(renew),
        }
    finally:
        await manager.close(timeout=0)


# --- what goes wrong --------------------------------------------------------------------------


async def cross_loop(dsn: str, scale: Scale) -> list[float]:
    """Return how long an acquire on another loop takes to be rejected."""

    async def reject(manager: PoolManager) -> list[float]:
        found = []
        for _ in range(20 * scale.faults):
            begin = perf_counter()
            try:
                async with manager.connection():
                    raise AssertionError("a connection was acquired on another loop")
            except LoopMismatchError:
                found.append(perf_counter() - begin)
        return found[len(found) // 5 :]

    async with PoolManager(dsn, min_size=1) as manager:
        return await asyncio.to_thread(lambda: asyncio.run(reject(manager)))


async def wrong_role(dsn: str, scale: Scale) -> dict[str, Any]:
    """Return how long opening takes to fail with an unknown role, and if the cause is told."""
    dsn = make_conninfo(dsn, user="poolkeeper_nobody", password="x")
    bound = 1.0  # psycopg_pool takes all of it
    found: dict[str, Any] = {c.name: [] for c in installed()}
    found |= {"server": [], "bound": bound, "cause": True}
    for _ in range(scale.faults):
        begin = perf_counter()
        with suppress(psycopg.OperationalError):
            await AsyncConnection.connect(dsn)
        found["server"].append(perf_counter() - begin)
        for contestant in installed():
            pool = contestant(dsn, 2, bound if contestant is Bare else None)
            begin = perf_counter()
            try:
                await pool.open()
            except Exception as ex:
                found[pool.name].append(perf_counter() - begin)
                if isinstance(ex, OpenError):
                    found["cause"] &= isinstance(ex.__cause__, psycopg.OperationalError)
                with suppress(AttributeError):  # asyncpg has no pool to close then
                    await pool.close()
            else:
                raise AssertionError(f"{pool.name} opened with a wrong role")
    return found


async def killed(dsn: str, scale: Scale) -> dict[str, int]:
    """End the sessions of all idle connections, and return how many requests fail, at worst."""
    found = {}
    for contestant in installed():
        found[contestant.name] = 0
        for _ in range(scale.faults):
            async with contestant(dsn, 4) as pool:
                async with AsyncExitStack() as stack:
                    conns = [
                        await stack.enter_async_context(pool.connection()) for _ in range(pool.size)
                    ]
                    pids = [await pool.backend_pid(conn) for conn in conns]
                await asyncio.to_thread(_end_sessions, dsn, pids)
                failed = 0
                for _ in range(REQUESTS):
                    try:
                        await pool.query()
                    except Exception:
                        failed += 1
                found[pool.name] = max(failed, found[pool.name])
    return found


def _end_sessions(dsn: str, pids: list[int]) -> None:
    with psycopg.connect(dsn, autocommit=True) as conn:
        conn.execute("select pg_terminate_backend(pid, 5000) from unnest(%s::int[]) pid", (pids,))


async def outage(away: float) -> dict[str, float | None]:
    """
    Stop a server for *away* seconds; return how late each pool serves after it accepts again.

    All of them live through the same outage, with four clients each that ask all the time.
    """
    server = await asyncio.to_thread(lambda: EmbeddedServer({"max_connections": 50}).__enter__())
    try:
        async with AsyncExitStack() as stack:
            pools = [await stack.enter_async_context(c(server.dsn(), 4)) for c in installed()]
            served = {pool.name: 0.0 for pool in pools}
            clients = [asyncio.create_task(_ask(pool, served)) for pool in pools for _ in range(4)]
            await asyncio.sleep(0.5)
            await asyncio.to_thread(server.stop)
            await asyncio.sleep(away)
            accepted: list[float] = []
            prober = threading.Thread(target=_probe, args=(server.dsn(), accepted))
            prober.start()
            await asyncio.to_thread(server.start)
            await asyncio.to_thread(prober.join)
            for name in served:
                served[name] = 0.0  # by the first that is served from here on
            late: dict[str, float | None] = {pool.name: None for pool in pools}
            until = accepted[0] + GIVE_UP
            while None in late.values() and perf_counter() < until:
                await asyncio.sleep(0.01)
                for name, seconds in late.items():
                    if seconds is None and served[name]:
                        late[name] = max(0.0, served[name] - accepted[0])
            pending = set(clients)
            while pending:  # psycopg_pool swallows a cancellation that comes with a connection
                for client in pending:
                    client.cancel()
                _, pending = await asyncio.wait(pending, timeout=0.2)
            return late
    finally:
        await asyncio.to_thread(server.close)


async def _ask(pool: Contestant, served: dict[str, float]) -> None:
    while True:
        with suppress(Exception):
            await pool.query()
            served[pool.name] = served[pool.name] or perf_counter()
        await asyncio.sleep(0.05)


def _probe(dsn: str, accepted: list[float]) -> None:
    while not accepted:
        with suppress(psycopg.OperationalError):
            psycopg.connect(dsn).close()
            accepted.append(perf_counter())


# --- all of it --------------------------------------------------------------------------------


async def measure(dsn: str, scale: Scale) -> dict[str, Any]:
    """Return everything, by the name of what measures it."""
    found: dict[str, Any] = {"scale": asdict(scale)}
    for measurement in (
        costs, growth, fairness, memory, clean_hands, cross_loop, wrong_role, killed,
    ):  # fmt: skip
        begin = perf_counter()
        found[measurement.__name__] = await measurement(dsn, scale)
        _say(f"{measurement.__name__}: {perf_counter() - begin:.0f} s")
    found["outage"] = {}
    for away in scale.outages:
        found["outage"][away] = await outage(away)
        _say(f"outage of {away:.0f} s: done")
    return found


def _say(text: str) -> None:
    print(f"  {text}", file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.measure")
    parser.add_argument("--dsn", required=True)
    parser.add_argument("--loop", required=True, choices=["asyncio", "uvloop"])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--slow", action="store_true")
    arguments = parser.parse_args()
    scale = QUICK if arguments.quick else NORMAL
    if arguments.slow:
        scale = replace(scale, outages=SLOW)
    # What the pools log about the faults made here is no news.
    for name in ("psycopg", "psycopg.pool", "poolkeeper", "sqlalchemy", "asyncpg"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    factory = None
    if arguments.loop == "uvloop":
        import uvloop

        factory = uvloop.new_event_loop
    with asyncio.Runner(loop_factory=factory) as runner:
        json.dump(runner.run(measure(arguments.dsn, scale)), sys.stdout)


if __name__ == "__main__":
    main()
