"""The kit of faults, each as a test of a program would have it."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from contextlib import nullcontext
from time import monotonic, sleep

import psycopg
import pytest

from poolkeeper import AcquireTimeout, OpenError, PoolManager
from poolkeeper.testing import (
    EmbeddedServer,
    FaultProxy,
    exhausted,
    kill_idle,
    logins_refused,
    stopped,
)

Make = Callable[..., PoolManager]


async def test_idle_connections_that_are_killed_are_replaced(make_manager: Make, dsn: str) -> None:
    db = make_manager(min_size=2, timeout=10)
    await db.open()
    async with db.connection() as conn:
        before = conn.info.backend_pid
        assert kill_idle(db, dsn) == 1
        assert await db.fetchval("select pg_backend_pid()") != before
        assert (await (await conn.execute("select pg_backend_pid()")).fetchone()) == (before,)
    assert kill_idle(db.pool, dsn) >= 1
    assert await db.fetchval("select 1") == 1


async def test_an_exhausted_pool_says_so_and_is_back_after_the_block(make_manager: Make) -> None:
    db = make_manager(min_size=1, max_size=3, timeout=10)
    async with db:
        async with exhausted(db):
            with pytest.raises(AcquireTimeout, match="in_use=3"):
                await db.fetchval("select 1", timeout=0.05)
        assert await db.fetchval("select 1") == 1


async def test_a_network_that_stalls_is_slow_or_refuses(dsn: str, make_manager: Make) -> None:
    with FaultProxy(dsn) as proxy:
        db = make_manager(proxy.dsn, min_size=1, timeout=10)
        await db.open()
        with proxy.slow(0.1):
            began = monotonic()
            assert await db.fetchval("select 1") == 1
            assert monotonic() - began >= 0.2
        with proxy.stalled():
            asked = asyncio.create_task(db.fetchval("select 2"))
            await asyncio.wait({asked}, timeout=0.2)
            assert not asked.done()
        assert await asked == 2
        with proxy.refusing():
            proxy.cut()
            with pytest.raises(psycopg.OperationalError):  # an AcquireTimeout is one
                await db.fetchval("select 1", timeout=0.1)
        assert await db.fetchval("select 1") == 1


def test_a_network_that_resets_a_connection(dsn: str) -> None:
    with FaultProxy(dsn) as proxy:
        proxy.silent = True
        for reset in (False, True):
            with socket.create_connection(("127.0.0.1", proxy.port), timeout=60) as link:
                while proxy.accepted < 1 + reset:
                    sleep(0.01)
                proxy.cut(reset=reset)
                with pytest.raises(ConnectionResetError) if reset else nullcontext():
                    assert link.recv(1) == b""


async def test_a_network_that_tears_an_answer_does_it_once(dsn: str, make_manager: Make) -> None:
    with FaultProxy(dsn) as proxy:
        async with make_manager(proxy.dsn, min_size=1, max_size=1, timeout=60) as db:
            async with db.connection() as conn:
                await conn.execute("select 1")
                proxy.tear = True
                with pytest.raises(psycopg.OperationalError):
                    await conn.execute("select 1")
                await conn.close()
            assert await db.fetchval("select 1") == 1


async def test_logins_that_are_refused_are_taken_again(database: str, make_manager: Make) -> None:
    db = make_manager(database, min_size=1)
    with logins_refused(database), pytest.raises(OpenError, match="not currently accepting"):
        await db.open()
    await db.open()
    await db.close()


@pytest.mark.fault
async def test_a_server_that_restarts(own_server: EmbeddedServer, make_manager: Make) -> None:
    db = make_manager(own_server.dsn(), min_size=1, timeout=20)
    await db.open()
    with stopped(own_server, "immediate"):
        assert not await db.check()
    assert await db.fetchval("select 1") == 1
