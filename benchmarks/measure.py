"""
Measure what the pools do beside the contests, on one event loop, and print it as JSON.

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
from dataclasses import asdict, dataclass
from itertools import pairwise
from time import perf_counter
from typing import Any

import psycopg
from psycopg import AsyncConnection
from psycopg.conninfo import make_conninfo

from poolkeeper import LoopMismatchError, OpenError, PoolManager
from poolkeeper._embedded import EmbeddedServer

from .contestants import Bare, Contestant, installed
from .contests import LOOPS
from .timing import Samples, interleave, runner
from .works import by_many, held_for_a_turn

PATIENCE = 300.0
"""Seconds that a task waits for a connection where the wait itself is measured."""

REQUESTS = 20
GIVE_UP = 100.0
"""Seconds after an outage in which a pool has to serve again."""


@dataclass(frozen=True)
class Scale:
    """How much is measured."""

    growth_rounds: int
    growth_seconds: float  # each sample
    tasks: tuple[int, ...]
    sizes: tuple[int, ...]
    waiters: int
    faults: int  # repetitions of what is not a timing
    outages: tuple[float, ...]


NORMAL = Scale(3, 0.02, (1, 8, 64, 1000, 10_000), (4, 16), 10_000, 5, (8.0, 60.0))
QUICK = Scale(1, 0.001, (1, 8, 64), (4,), 100, 1, (1.0,))


# --- how the cost grows -----------------------------------------------------------------------


async def growth(dsn: str, scale: Scale) -> dict[int, dict[int, Samples]]:
    """Return seconds per acquire by number of connections, then of tasks."""
    found: dict[int, dict[int, Samples]] = {}
    for size in scale.sizes:
        async with AsyncExitStack() as stack:
            pools = [await stack.enter_async_context(c(dsn, size, PATIENCE)) for c in installed()]
            found[size] = {
                tasks: await interleave(
                    {pool.name: by_many(held_for_a_turn(pool), tasks) for pool in pools},
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


async def waiters(dsn: str, scale: Scale) -> dict[str, Any]:
    return {"fairness": await fairness(dsn, scale), "memory": await memory(dsn, scale)}


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


async def outages(dsn: str, scale: Scale) -> dict[float, dict[str, float | None]]:  # noqa: ARG001
    """Return how late each pool serves, by how long a server was away."""
    found = {}
    for away in scale.outages:
        found[away] = await outage(away)
        _say(f"outage of {away:.0f} s: done")
    return found


# --- all of it --------------------------------------------------------------------------------

MEASUREMENTS: dict[str, Callable[[str, Scale], Coroutine[Any, Any, Any]]] = {
    measurement.__name__.replace("_", "-"): measurement
    for measurement in (
        growth, waiters, clean_hands, cross_loop, wrong_role, killed, outages,
    )
}  # fmt: skip


async def measure(dsn: str, scale: Scale, wanted: list[str]) -> dict[str, Any]:
    """Return what was measured, by the name of what measures it."""
    found: dict[str, Any] = {"scale": asdict(scale)}
    for name in wanted:
        begin = perf_counter()
        found[name] = await MEASUREMENTS[name](dsn, scale)
        _say(f"{name}: {perf_counter() - begin:.0f} s")
    return found


def _say(text: str) -> None:
    print(f"  {text}", file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.measure")
    parser.add_argument("--dsn", required=True)
    parser.add_argument("--loop", required=True, choices=LOOPS)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("wanted", nargs="+", choices=MEASUREMENTS)
    arguments = parser.parse_args()
    scale = QUICK if arguments.quick else NORMAL
    # What the pools log about the faults made here is no news.
    for name in ("psycopg", "psycopg.pool", "poolkeeper", "sqlalchemy", "asyncpg"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    with runner(arguments.loop) as run:
        json.dump(run.run(measure(arguments.dsn, scale, arguments.wanted)), sys.stdout)


if __name__ == "__main__":
    main()
