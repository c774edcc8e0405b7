"""
Everything that can go wrong, all at once and for a while; afterwards nothing is missing.

``POOLKEEPER_STORM=60`` makes it last a minute.
"""

from __future__ import annotations

import asyncio
import gc
import os
import random
import time
from contextlib import suppress
from typing import Any

import psycopg
import pytest

from poolkeeper import PoolManager
from poolkeeper._embedded import EmbeddedServer
from tests.support.inside import life
from tests.support.proxy import FaultProxy
from tests.support.server import admin
from tests.support.waiting import until

SECONDS = float(os.environ.get("POOLKEEPER_STORM", "10"))
NAME = "storm"
TASKS = 60
SIZE = 8


class Storm:
    """What troubles the pool: those who use it badly, and those who take the server away."""

    def __init__(self, db: PoolManager[Any], server: EmbeddedServer, proxy: FaultProxy) -> None:
        self.db = db
        self.server = server
        self.proxy = proxy
        self.random = random.Random(20)
        self.until = time.monotonic() + SECONDS
        self.served = self.failed = self.cancelled = 0
        self.requests: set[asyncio.Task[None]] = set()
        self.unexpected: list[BaseException] = []

    @property
    def over(self) -> bool:
        return time.monotonic() > self.until

    async def user(self) -> None:
        """Makes one request after the other, each in a task that may be cancelled."""
        while not self.over:
            request = asyncio.create_task(self._request())
            self.requests.add(request)
            request.add_done_callback(self.requests.discard)
            await asyncio.wait({request})
            if request.cancelled():
                self.cancelled += 1
            elif (error := request.exception()) is None:
                self.served += 1
            elif isinstance(error, psycopg.Error | TimeoutError):
                self.failed += 1  # PoolTimeout is one too
            else:
                self.unexpected.append(error)
            await asyncio.sleep(self.random.random() * 0.01)

    async def _request(self) -> None:
        kind = self.random.randrange(6)
        if kind == 0:
            async with asyncio.timeout(self.random.random() * 0.05):
                async with self.db.connection() as conn:
                    await conn.execute("select pg_sleep(0.03)")
        elif kind == 1:
            with suppress(ZeroDivisionError):
                async with self.db.connection(timeout=0.5) as conn:
                    await conn.execute("select 1")
                    _ = 1 / 0
        elif kind == 2:
            async with asyncio.TaskGroup() as group:
                for _ in range(2):
                    group.create_task(self._nested())
        elif kind == 3:
            conn = await self.db.pool.getconn(timeout=1)
            try:
                await conn.execute("select 1")
            finally:
                await self.db.pool.putconn(conn)
        elif kind == 4:
            async with self.db.transaction(read_only=True) as conn:
                await conn.execute("select pg_sleep(0.005)")
        else:
            assert await self.db.fetchval("select 1") == 1

    async def _nested(self) -> None:
        """Time-outs inside of time-outs: one release is cancelled several times."""
        with suppress(TimeoutError, psycopg.Error):
            async with asyncio.timeout(0.04), asyncio.timeout(0.03), self.db.connection() as conn:
                await conn.set_autocommit(True)
                await conn.execute("select pg_sleep(0.1)")

    async def canceller(self) -> None:
        while not self.over:
            await asyncio.sleep(0.005)
            if self.requests:
                victim = self.random.choice(list(self.requests))
                for _ in range(self.random.randint(1, 3)):
                    victim.cancel()
                    await asyncio.sleep(0)

    async def killer(self) -> None:
        query = (
            "select pg_terminate_backend(pid) from pg_stat_activity"
            " where application_name = %s and random() < %s"
        )
        while not self.over:
            await asyncio.sleep(0.3)
            with suppress(psycopg.Error):
                share = self.random.choice([0.2, 0.5, 1.0])
                await asyncio.to_thread(admin, self.server.dsn(), query, (NAME, share))

    async def network(self) -> None:
        while not self.over:
            await asyncio.sleep(1.5)
            fault = self.random.choice(["cut", "refuse", "silent", "stall"])
            if fault == "cut":
                await asyncio.to_thread(self.proxy.cut)
            elif fault == "stall":
                self.proxy.stall()
                await asyncio.sleep(0.5)
                self.proxy.resume()
            else:
                setattr(self.proxy, fault, True)
                await asyncio.to_thread(self.proxy.cut)
                await asyncio.sleep(0.7)
                setattr(self.proxy, fault, False)

    async def operator(self) -> None:
        while not self.over:
            await asyncio.sleep(0.7)
            pool = self.db.pool
            match self.random.randrange(4):
                case 0:
                    most = self.random.randint(2, SIZE)
                    await pool.resize(self.random.randint(0, most), most)
                case 1:
                    await pool.drain()
                case 2:
                    await pool.check()
                case _:
                    self.db.diagnose()

    async def restarter(self) -> None:
        pause = min(5.0, SECONDS / 4)
        while self.until - time.monotonic() > pause + 1:
            await asyncio.sleep(pause)
            mode = self.random.choice(["fast", "immediate"])
            await asyncio.to_thread(self.server.restart, mode)

    async def run(self) -> None:
        async with asyncio.TaskGroup() as group:
            for _ in range(TASKS):
                group.create_task(self.user())
            for trouble in (
                self.canceller, self.killer, self.network, self.operator, self.restarter,
            ):  # fmt: skip
                group.create_task(trouble())


@pytest.mark.fault
@pytest.mark.timeout(SECONDS + 90)
async def test_a_storm_leaves_nothing_behind_and_nothing_missing(
    own_server: EmbeddedServer,
) -> None:
    before = asyncio.all_tasks()
    async with FaultProxy(own_server.dsn()) as proxy:
        db = PoolManager(
            proxy.dsn, application_name=NAME, min_size=4, max_size=SIZE, timeout=3, max_idle=2
        )
        await db.open()
        pool = db.pool
        storm = Storm(db, own_server, proxy)
        await storm.run()
        assert not storm.unexpected
        print(f"served {storm.served}, failed {storm.failed}, cancelled {storm.cancelled}")
        assert min(storm.served, storm.failed, storm.cancelled) > 20

        # The books balance, by themselves, and the pool is at its minimum at least.
        await pool.resize(4, SIZE)
        await until(lambda: not life(pool).tasks.running and not life(pool).connector.wanted)
        counts = pool.counts()
        assert counts["in_use"] == counts["waiting"] == 0
        assert 4 <= counts["idle"] == life(pool).total <= SIZE

        # Every connection can be had, and works.
        conns = [await pool.getconn(10) for _ in range(SIZE)]
        for conn in conns:
            assert await (await conn.execute("select 1")).fetchone() == (1,)
        assert len({conn.pgconn.backend_pid for conn in conns}) == SIZE
        for conn in conns:
            await pool.putconn(conn)
        await until(lambda: pool.counts()["total"] == 4)  # it shrinks again

        begin = time.monotonic()
        await db.close()
        assert time.monotonic() - begin < 4.5  # nobody is waited for, which would be 5
        del conns, conn
        query = "select count(*) from pg_stat_activity where application_name = %s"
        await until(lambda: admin(own_server.dsn(), query, (NAME,)) == [(0,)])
    await asyncio.sleep(0)
    assert asyncio.all_tasks() == before
    gc.collect()
