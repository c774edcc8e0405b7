"""
The mistakes, each a small program that knows nothing of which pool it makes them with.

``python -m poolkeeper._demo.mistakes NAME bare|poolkeeper`` runs one of them, in a process of
its own since some never end, and prints what happened: facts, as lines of JSON. The server is
named by the environment (`programs.environment`), which ``ps`` does not show.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import random
import signal
import socket
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from time import perf_counter
from typing import Any, NoReturn

import psycopg
from psycopg import AsyncConnection, sql
from psycopg.conninfo import make_conninfo
from psycopg.rows import dict_row, tuple_row
from psycopg_pool import AsyncConnectionPool

from poolkeeper import PoolManager
from poolkeeper._demo.measure import AnyPool, ask, attempt, finish, log, report

PATIENCE = 1.0
"""Seconds given where psycopg_pool's default is 30, so that the reader need not wait so long."""

HANG = 2.0
"""Seconds after which a program that should have ended is killed."""

DSN = os.environ.get("POOLKEEPER_DEMO_DSN", "")
SCHEMA = os.environ.get("POOLKEEPER_DEMO_SCHEMA", "public")
ROLE_WITH_PASSWORD = os.environ.get("POOLKEEPER_DEMO_ROLE", "")
SIDE = sys.argv[-1]


def make_pool(conninfo: Any = DSN, **settings: Any) -> AnyPool:
    """Make the pool that the program was started with."""
    settings = {"name": "orders", "min_size": 1, "timeout": PATIENCE, **settings}
    if SIDE == "poolkeeper":
        return PoolManager(conninfo, **settings)
    return AsyncConnectionPool(conninfo, open=False, **settings)


def stock(pool: AnyPool) -> AsyncConnectionPool[AsyncConnection[Any]]:
    """Return what has getconn() and putconn()."""
    return pool.pool if isinstance(pool, PoolManager) else pool


def notes(text: str) -> int:
    """Count the notes with *text*, from outside of the pool."""
    with psycopg.connect(DSN) as conn:
        query = sql.SQL("select count(*) from {}.notes where note = %s")
        row = conn.execute(query.format(sql.Identifier(SCHEMA)), (text,)).fetchone()
        return row[0] if row else 0


async def write_note(conn: AsyncConnection[Any], text: str) -> None:
    """Insert one note."""
    query = sql.SQL("insert into {}.notes values (%s)")
    await conn.execute(query.format(sql.Identifier(SCHEMA)), (text,))


# --- the event loop ---------------------------------------------------------------------------


def two_runs() -> None:
    """One pool, used under two calls of asyncio.run()."""
    pool = make_pool(min_size=1, max_size=4)

    async def first() -> None:
        await pool.open(wait=True)
        await ask(pool)

    async def request() -> dict[str, Any]:
        return await attempt(ask(pool, f"select pg_sleep({PATIENCE * 1.3})"))

    async def second() -> None:
        attempts = await asyncio.gather(request(), request())  # the pool has to grow
        opened = await attempt(pool.open(wait=True, timeout=PATIENCE))
        served = await asyncio.gather(request(), request())
        finish(attempts=attempts, opened=opened, served=served)

    asyncio.run(first())
    asyncio.run(second())


def fails_while_connecting() -> None:
    """The program raises while the pool makes its first connections."""
    pool = make_pool(min_size=4)

    async def main() -> None:
        await pool.open(wait=False)
        for _ in range(3):
            await asyncio.sleep(0)  # the pool's tasks have begun to connect
        report(raised_at=time.time(), kill_after=HANG)
        raise ValueError("no mail server is configured")

    asyncio.run(main())


def second_loop() -> None:
    """A thread with a loop of its own waits for a connection of the pool."""
    pool = make_pool(min_size=1, max_size=1)

    async def in_the_thread() -> dict[str, Any]:
        return await attempt(stock(pool).getconn(1.5 * PATIENCE))

    async def main() -> None:
        await pool.open(wait=True)
        conn = await stock(pool).getconn()
        thread = ThreadPoolExecutor(1, thread_name_prefix="worker")
        request = asyncio.get_running_loop().run_in_executor(thread, asyncio.run, in_the_thread())
        await asyncio.sleep(0.3)
        await stock(pool).putconn(conn)
        freed = perf_counter()
        tried = await request
        after = perf_counter() - freed
        finish(tried=tried, seconds_after_it_was_free=after)

    asyncio.run(main())


def connection_on_another_loop() -> None:
    """A connection is handed to a thread with a loop of its own."""
    pool = make_pool(min_size=1, max_size=1)

    async def main() -> None:
        await pool.open(wait=True)
        async with pool.connection() as conn:

            async def in_the_thread() -> dict[str, Any]:
                return await attempt(conn.execute("select 1"))

            thread = ThreadPoolExecutor(1, thread_name_prefix="worker")
            loop = asyncio.get_running_loop()
            tried = await loop.run_in_executor(thread, asyncio.run, in_the_thread())
            owner = await attempt(conn.execute("select 1"))
        finish(tried=tried, owner=owner)

    asyncio.run(main())


def fork() -> None:
    """A pool opened before the fork, used by parent and child."""
    if not hasattr(os, "fork"):
        finish(skipped="this system has no fork()")
    with asyncio.Runner() as runner:
        pool = make_pool(min_size=1, max_size=1)
        runner.run(pool.open(wait=True))
        reading, writing = os.pipe()
        pid = os.fork()
        if pid == 0:
            signal.alarm(WATCHDOG)
            asyncio.run(_child(pool, writing))
        os.close(writing)
        runner.run(_parent(pool, reading, pid))


async def _child(pool: AnyPool, writing: int) -> NoReturn:
    try:
        asked = await _ask_for_own_name(pool, "child")
        if asked["refused"]:
            asked["opened"] = await attempt(pool.open(wait=True))
            asked["served"] = await attempt(ask(pool))
        os.write(writing, json.dumps(asked).encode())
    finally:
        os._exit(0)


async def _parent(pool: AnyPool, reading: int, pid: int) -> NoReturn:
    parent = await _ask_for_own_name(pool, "parent")
    with os.fdopen(reading) as result:
        child = json.loads(result.read() or "{}")
    os.waitpid(pid, 0)  # noqa: ASYNC222 - it has nothing more to do
    finish(parent=parent, child=child)


async def _ask_for_own_name(pool: AnyPool, name: str) -> dict[str, Any]:
    """Ask the server for one's own name, again and again, and count what comes back."""
    right = wrong = errors = 0
    refused: dict[str, Any] | None = None

    async def go_on() -> None:
        nonlocal right, wrong, errors, refused
        until = perf_counter() + PATIENCE
        number = 0
        while refused is None and number < 300 and perf_counter() < until:
            number += 1
            mine = f"{name} {number}"
            answer: Any = None

            async def work(mine: str = mine) -> None:
                nonlocal answer
                answer = await ask(pool, sql.SQL("select {}").format(mine))

            tried = await attempt(work())
            if tried["error"] == "LoopMismatchError":
                refused = tried
            elif tried["error"]:
                errors += 1
            elif answer == mine:
                right += 1
            else:
                wrong += 1

    task = asyncio.create_task(go_on())
    # Not cancelled where it hangs: psycopg would wait for the server to answer to that.
    _, hanging = await asyncio.wait({task}, timeout=2 * PATIENCE)
    return {
        "right": right, "wrong": wrong, "errors": errors, "refused": refused,
        "hung": bool(hanging),
    }  # fmt: skip


# --- connections that were given back ---------------------------------------------------------


def stale_rollback() -> None:
    """A task keeps its connection and calls rollback() when it is another task's."""
    pool = make_pool(min_size=1, max_size=1)

    async def main() -> None:
        await pool.open(wait=True)
        text = f"theirs, {SIDE}"
        async with pool.connection() as mine:
            await mine.execute("select 1")
        async with pool.connection() as theirs:
            await write_note(theirs, text)
            tried = await attempt(mine.rollback())
        # Their block ended without an error: it was committed.
        finish(tried=tried, rows=notes(text))

    asyncio.run(main())


def double_return() -> None:
    """A connection is given back twice, the second time when another task has it."""
    pool = make_pool(min_size=2, max_size=2)

    async def main() -> None:
        await pool.open(wait=True)
        keep = await stock(pool).getconn()
        first = await stock(pool).getconn()
        await stock(pool).putconn(first)
        second = await stock(pool).getconn()  # the same session
        tried = await attempt(stock(pool).putconn(first))
        await stock(pool).putconn(keep)
        third = await stock(pool).getconn()
        if not tried["error"]:
            third = await stock(pool).getconn() if third is keep else third
        sessions = [conn.pgconn.backend_pid for conn in (second, third)]
        finish(tried=tried, owners=2 if len(set(sessions)) == 1 else 1)

    asyncio.run(main())


# --- opening ------------------------------------------------------------------------------------


def _open(conninfo: str) -> None:
    pool = make_pool(conninfo)

    async def main() -> None:
        finish(tried=await attempt(pool.open(wait=True, timeout=PATIENCE)))

    asyncio.run(main())


def wrong_role() -> None:
    """The role does not exist."""
    _open(make_conninfo(DSN, user="poolkeeper_demo_nobody", password="a-password"))


def wrong_password() -> None:
    """The password is not that of the role."""
    if not ROLE_WITH_PASSWORD:
        finish(skipped="not tried on a server of yours: it might lock a role")
    _open(make_conninfo(DSN, user=ROLE_WITH_PASSWORD, password="not-the-password"))


def wrong_database() -> None:
    """The database does not exist."""
    _open(make_conninfo(DSN, dbname="poolkeeper_demo_nowhere"))


def wrong_host() -> None:
    """The host does not exist."""
    report(kill_after=10)  # some resolvers take their time
    _open(make_conninfo(DSN, host="no-such-host.invalid", hostaddr=None))


# --- work -----------------------------------------------------------------------------------------


def all_held() -> None:
    """Two tasks hold the two connections there are, a third one asks."""
    pool = make_pool(min_size=2, max_size=2)

    async def write_report(started: asyncio.Event) -> None:
        async with pool.connection() as conn:
            await conn.execute("select 1")
            started.set()
            await asyncio.sleep(60)  # a slow HTTP call, say

    async def main() -> None:
        await pool.open(wait=True)
        for number in (7, 8):
            started = asyncio.Event()
            holders.append(asyncio.create_task(write_report(started), name=f"report-{number}"))
            await started.wait()
        finish(tried=await attempt(ask(pool)))

    holders: list[asyncio.Task[None]] = []
    asyncio.run(main())


def killed_idle() -> None:
    """The server ends every idle session, as a restart does."""
    pool = make_pool(min_size=4, max_size=4)

    async def main() -> None:
        await pool.open(wait=True)
        await _end_sessions(pool, 4)
        attempts = [await attempt(ask(pool)) for _ in range(8)]
        finish(attempts=attempts)

    asyncio.run(main())


def outage() -> None:
    """The server is away for a while: sessions ended, new connections refused."""
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # never listens: connections are refused
        away = make_conninfo(DSN, host="127.0.0.1", hostaddr=None, port=closed.getsockname()[1])
        where = DSN

        def conninfo() -> str:
            return where

        pool = make_pool(conninfo, min_size=4, max_size=4, timeout=15.0)

        async def main() -> None:
            nonlocal where
            await pool.open(wait=True)
            where = away
            gone = perf_counter()
            await _end_sessions(pool, 4)
            noticing = [asyncio.create_task(attempt(ask(pool))) for _ in range(4)]
            await asyncio.sleep(max(0, gone + OUTAGE - perf_counter()))
            where = DSN
            back = perf_counter()
            while (await attempt(ask(pool)))["error"]:  # noqa: ASYNC110
                await asyncio.sleep(0.02)
            late = perf_counter() - back
            await asyncio.wait(noticing)
            finish(away=OUTAGE, seconds_late=late)

        asyncio.run(main())


OUTAGE = 3.5
"""Seconds; just after psycopg_pool's third attempt, made about 3 s from the first."""


async def _end_sessions(pool: AnyPool, number: int) -> None:
    """End the sessions of all idle connections and wait until the server says they are gone."""
    held = [await stock(pool).getconn() for _ in range(number)]
    pids = [conn.pgconn.backend_pid for conn in held]
    for conn in held:
        await stock(pool).putconn(conn)
    async with await AsyncConnection.connect(DSN, autocommit=True) as conn:
        for pid in pids:
            await conn.execute("select pg_terminate_backend(%s)", (pid,))
        alive = "select from pg_stat_activity where pid = any(%s)"
        while (await conn.execute(alive, (pids,))).rowcount:  # noqa: ASYNC110
            await asyncio.sleep(0.01)


def close_with_queries() -> None:
    """The program closes the pool and ends while a task is at work."""
    pool = make_pool(min_size=1)
    text = f"work, {SIDE}"
    closing: dict[str, Any] = {}

    async def work(started: asyncio.Event) -> None:
        async with pool.connection() as conn:
            await write_note(conn, text)
            started.set()
            await conn.execute("select pg_sleep(0.5)")

    async def main() -> None:
        await pool.open(wait=True)
        started = asyncio.Event()
        tasks.add(asyncio.create_task(work(started), name="nightly-import"))
        await started.wait()
        closing.update(await attempt(pool.close()))

    tasks: set[asyncio.Task[None]] = set()
    asyncio.run(main())
    finish(tried=closing, rows=notes(text))


def cancelled_twice() -> None:
    """Clients come and go: tasks are cancelled by a timeout within a timeout."""
    size = 10
    pool = make_pool(min_size=size, max_size=size, kwargs={"autocommit": True}, timeout=30.0)
    chance = random.Random(1)
    until = 0.0

    async def request() -> None:
        async with pool.connection() as conn:
            await conn.execute("select 1")
            await asyncio.sleep(chance.random() * 0.005)

    async def client() -> None:
        while perf_counter() < until:
            with suppress(TimeoutError, ExceptionGroup, asyncio.CancelledError):  # 3.11.2
                async with asyncio.timeout(chance.random() * 0.05):
                    async with asyncio.TaskGroup() as group:
                        group.create_task(impatient())
                        group.create_task(impatient())

    async def impatient() -> None:
        async with asyncio.timeout(chance.random() * 0.05):
            await request()

    async def main() -> None:
        nonlocal until
        await pool.open(wait=True)
        until = perf_counter() + 2 * PATIENCE
        await asyncio.gather(*(client() for _ in range(75)))
        await asyncio.sleep(0.2)
        takes = [attempt(stock(pool).getconn(PATIENCE)) for _ in range(size)]
        attempts = await asyncio.gather(*takes)
        usable = sum(not tried["error"] for tried in attempts)
        rebuilt = stock(pool).get_stats().get("connections_num", size) - size
        finish(size=size, usable=usable, rebuilt=rebuilt)

    asyncio.run(main())


def settings_left() -> None:
    """One borrower changes settings, the next one looks."""

    async def left_behind(pool: AnyPool) -> list[str]:
        await pool.open(wait=True)
        async with pool.connection() as conn:
            await conn.set_autocommit(True)
            conn.row_factory = dict_row
            await conn.execute("set timezone to 'Asia/Tokyo'")
            await conn.execute("set search_path to pg_catalog")
            await conn.execute("set app.tenant to 'acme'")
        async with pool.connection() as conn:
            found = {
                "autocommit": conn.autocommit is True,
                "row_factory": conn.row_factory is dict_row,
            }
            conn.row_factory = tuple_row
            for name, value in (
                ("TimeZone", "Asia/Tokyo"),
                ("search_path", "pg_catalog"),
                ("app.tenant", "acme"),
            ):
                cursor = await conn.execute("select current_setting(%s, true)", (name,))
                found[name] = (await cursor.fetchone() or [None])[0] == value
        await pool.close()
        return [name for name, left in found.items() if left]

    async def main() -> None:
        left = await left_behind(make_pool(max_size=1))
        if SIDE == "poolkeeper":
            with_reset = await left_behind(make_pool(max_size=1, reset="discard"))
            report(with_reset=with_reset)
        finish(left=left)

    asyncio.run(main())


# --- running one --------------------------------------------------------------------------------

WATCHDOG = 40
"""Seconds after which a program ends by itself, should nobody be left to kill it."""

PROGRAMS: tuple[Callable[[], None], ...] = (
    two_runs,
    fails_while_connecting,
    second_loop,
    connection_on_another_loop,
    fork,
    stale_rollback,
    double_return,
    wrong_role,
    wrong_password,
    wrong_database,
    wrong_host,
    all_held,
    killed_idle,
    outage,
    close_with_queries,
    cancelled_twice,
    settings_left,
)


def main() -> None:
    """Run the program named by the command line."""
    if hasattr(signal, "alarm"):
        signal.alarm(WATCHDOG)
    for name in ("psycopg.pool", "poolkeeper"):
        logging.getLogger(name).addHandler(log)
    os.chdir(Path(__file__).parent)  # messages name places in this file by its name alone
    {program.__name__: program for program in PROGRAMS}[sys.argv[1]]()


if __name__ == "__main__":
    main()
