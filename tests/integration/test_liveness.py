"""Dead connections are not handed out, and looking for them costs nothing while all is well."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import psycopg
import pytest
from psycopg_pool import AsyncConnectionPool

from poolkeeper import PoolManager, _acquiring, _watching
from poolkeeper import _checking as checking_module
from poolkeeper._embedded import EmbeddedServer
from tests.support.inside import life
from tests.support.proxy import FaultProxy
from tests.support.server import admin, kill_sessions
from tests.support.waiting import until
from tests.support.wire import Wire, wire_of, wire_of_session

MakeManager = Callable[..., PoolManager[Any]]

NAME = "liveness"
AT_ONCE = 8.0  # seconds; the pool's own patience is 30


async def kill(dsn: str, manager: PoolManager[Any], *pids: int) -> int:
    """End *pids*, or every session, from outside; idle ones have been told when this returns."""
    await until(lambda: manager.pool.counts()["total"] == manager.pool.min_size)
    told = [c for c in idle(manager) if not pids or c.pgconn.backend_pid in pids]
    rows = await asyncio.to_thread(
        admin,
        dsn,
        "select pg_terminate_backend(pid) from pg_stat_activity"
        " where application_name = %s and (%s or pid = any(%s))",
        (NAME, not pids, list(pids)),
    )
    await until(lambda: not any(conn._session.is_quiet() for conn in told))
    return len(rows)


def idle(manager: PoolManager[Any]) -> list[Any]:
    return list(life(manager.pool).idle)


def pids(manager: PoolManager[Any]) -> set[int]:
    return {conn.pgconn.backend_pid for conn in idle(manager)}


@pytest.fixture
def make(make_manager: MakeManager) -> Callable[..., Any]:
    """A function that opens a pool whose sessions have a name of their own."""

    async def opened(conninfo: Any = None, **arguments: Any) -> PoolManager[Any]:
        arguments = {"application_name": NAME, "timeout": 30, **arguments}
        manager = make_manager(conninfo, **arguments)
        await manager.open()
        return manager

    return opened


# --- all idle connections are killed --------------------------------------------------------------


async def test_requests_one_after_another_notice_no_kill(dsn: str, make: Any) -> None:
    db = await make(min_size=4, max_size=4)
    before = pids(db)
    for _ in range(20):
        await kill(dsn, db)
        assert await db.fetchval("select 1") == 1
    assert not before & pids(db)


async def test_requests_at_once_notice_no_kill(dsn: str, make: Any) -> None:
    db = await make(min_size=4, max_size=4)

    async def request() -> int:
        async with db.connection() as conn:
            row = await (await conn.execute("select 1")).fetchone()
            return int(row[0])

    assert await kill(dsn, db) == 4
    begin = time.monotonic()
    assert await asyncio.gather(*(request() for _ in range(20))) == [1] * 20
    assert time.monotonic() - begin < AT_ONCE


async def test_a_bare_pool_fails_once_for_each_killed_connection(dsn: str) -> None:
    kwargs = {"application_name": NAME, "autocommit": True}
    failed = 0
    async with AsyncConnectionPool(dsn, open=False, min_size=4, kwargs=kwargs) as pool:
        await pool.wait()
        assert await asyncio.to_thread(kill_sessions, dsn, NAME) == 4
        for _ in range(20):
            try:
                async with pool.connection() as conn:
                    await conn.execute("select 1")
            except psycopg.OperationalError:
                failed += 1
    assert failed == 4


async def test_the_first_acquire_after_the_death_of_ten_is_served_at_once(
    dsn: str, make: Any
) -> None:
    db = await make(min_size=10, max_size=10)
    assert await kill(dsn, db) == 10
    begin = time.monotonic()
    async with db.connection() as conn:
        assert conn.pgconn.status == psycopg.pq.ConnStatus.OK
    assert time.monotonic() - begin < AT_ONCE
    assert db.pool.get_stats()["connections_lost"] == 10


async def test_one_dead_connection_is_enough_to_replace_all_that_are(dsn: str, make: Any) -> None:
    db = await make(min_size=6, max_size=6)
    dead = pids(db)
    assert await kill(dsn, db) == 6
    async with db.connection():  # nobody asks for the five others
        await until(lambda: db.pool.counts()["idle"] == 5)
        assert not pids(db) & dead
        assert all(conn._session.is_quiet() for conn in idle(db))
    assert db.pool.counts()["total"] == 6


async def test_the_living_are_not_replaced_with_the_dead(dsn: str, make: Any) -> None:
    db = await make(min_size=4, max_size=4)
    first, living, *others = (conn.pgconn.backend_pid for conn in idle(db))
    assert await kill(dsn, db, first, *others) == 3
    async with db.connection() as conn:
        # The others are dead as well, and not in the way: they are found all the same.
        assert conn.pgconn.backend_pid == living
        await until(lambda: db.pool.counts()["idle"] == 3)
        assert not pids(db) & {first, *others}
    assert db.pool.get_stats()["connections_lost"] == 3


async def test_last_words_that_come_before_the_end_are_not_taken_for_life(
    dsn: str, make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server says that it ends a session, and only then closes the socket."""
    read = set()

    def was_ended(conn: Any) -> bool:
        # As it looks between the two: there is something to read, and no end yet.
        pid = conn.pgconn.backend_pid
        if pid not in told or pid in read:
            return really(conn)
        read.add(pid)
        conn._session._poll = lambda: False
        return False

    really = _watching.was_ended
    monkeypatch.setattr(_watching, "was_ended", was_ended)
    db = await make(min_size=3, max_size=3)
    told = pids(db)
    assert await kill(dsn, db) == 3
    assert [await db.fetchval("select 1") for _ in range(6)] == [1] * 6
    await until(lambda: db.pool.counts()["idle"] == 3)
    assert not pids(db) & told


async def test_a_connection_that_dies_in_idle_hands_is_not_handed_on(dsn: str, make: Any) -> None:
    """Killed while it is held and not used: nobody knows when it is given back."""
    db = await make(min_size=1, max_size=1)
    waiting = asyncio.Event()

    async def second() -> int:
        waiting.set()
        async with db.connection() as conn:
            await conn.execute("select 1")
            return int(conn.pgconn.backend_pid)

    async with db.connection() as conn:
        task = asyncio.create_task(second())
        await waiting.wait()
        await kill(dsn, db)
        await until(lambda: not conn._session.is_quiet())
        pid = conn.pgconn.backend_pid
    async with asyncio.timeout(AT_ONCE):
        assert await task != pid


async def test_a_link_that_was_cut_is_as_good_as_a_kill(proxy: FaultProxy, make: Any) -> None:
    db = await make(proxy.dsn, min_size=4, max_size=4)
    await asyncio.to_thread(proxy.cut)
    async with asyncio.timeout(AT_ONCE):
        assert [await db.fetchval("select 1") for _ in range(8)] == [1] * 8


# --- what is no death -----------------------------------------------------------------------------


async def listening(make: Any, heard: list[str], **arguments: Any) -> PoolManager[Any]:
    """A pool of one connection that listens to a channel."""

    async def configure(conn: Any) -> None:
        await conn.set_autocommit(True)
        await conn.execute("listen liveness_channel")
        await conn.set_autocommit(False)
        conn.add_notify_handler(lambda notify: heard.append(notify.payload))

    manager: PoolManager[Any] = await make(min_size=1, max_size=1, configure=configure, **arguments)
    return manager


async def notify(dsn: str, manager: PoolManager[Any], payload: str) -> None:
    """Send a notification, and wait until it lies on the socket of the idle connection."""
    (conn,) = idle(manager)
    await asyncio.to_thread(admin, dsn, "select pg_notify('liveness_channel', %s)", (payload,))
    await until(lambda: not conn._session.is_quiet())


async def test_a_notification_on_an_idle_connection_is_not_its_end(dsn: str, make: Any) -> None:
    heard: list[str] = []
    db = await listening(make, heard)
    pid = pids(db)
    for number in range(3):
        await notify(dsn, db, str(number))
        async with db.connection():
            assert heard == [str(n) for n in range(number + 1)]
    assert pids(db) == pid
    assert db.pool.get_stats().get("connections_lost", 0) == 0


async def test_a_notification_costs_one_round_trip_once(dsn: str, make: Any) -> None:
    db = await listening(make, [])
    with wire_of(db) as wire:
        await notify(dsn, db, "x")
        async with db.connection():
            assert wire.round_trips() == 1
        wire.clear()
        async with db.connection():
            pass
        assert wire.sent() == []


async def test_a_notice_on_an_idle_connection_is_not_its_end(dsn: str, make: Any) -> None:
    said: list[str] = []

    async def configure(conn: Any) -> None:
        await conn.set_autocommit(True)
        # A session that hears of a channel that it does not listen to says so, to its own client.
        await conn.execute("set trace_notify = on")
        await conn.execute("listen liveness_other")
        await conn.execute("set client_min_messages = debug1")
        await conn.set_autocommit(False)
        conn.add_notice_handler(lambda notice: said.append(notice.message_primary))

    db = await make(min_size=1, max_size=1, configure=configure)
    said.clear()
    pid = pids(db)
    await notify(dsn, db, "x")
    async with db.connection():
        assert any("ProcessIncomingNotify" in words for words in said)
    assert pids(db) == pid


async def test_an_acquire_of_a_quiet_connection_sends_nothing(make: Any) -> None:
    db = await make(min_size=3, max_size=3)
    with ExitStack() as stack:
        wires: list[Wire] = [stack.enter_context(wire_of_session(conn.pgconn)) for conn in idle(db)]
        for _ in range(6):
            async with db.connection():
                pass
            conn = await db.pool.getconn()
            await db.pool.putconn(conn)
        assert [wire.sent() for wire in wires] == [[], [], []]
        async with db.connection() as conn:
            await conn.execute("select 1")
        assert sum(bool(wire.sent()) for wire in wires) == 1


# --- a server that does not answer ----------------------------------------------------------------


async def test_a_suspect_that_stays_silent_is_given_up_in_bounded_time(
    dsn: str, proxy: FaultProxy, make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checking_module, "PROBE_TIMEOUT", 0.3)
    # The first session goes through the proxy; the one that takes its place does not.
    targets = iter([proxy.dsn])
    db = await listening(make, [], conninfo=lambda: next(targets, dsn))
    suspect = idle(db)[0].pgconn
    await notify(dsn, db, "x")
    proxy.stall()
    begin = time.monotonic()
    async with db.connection() as conn:
        assert conn.pgconn is not suspect
        assert (await (await conn.execute("select 1")).fetchone()) == (1,)
    assert time.monotonic() - begin < AT_ONCE
    assert suspect.status == psycopg.pq.ConnStatus.BAD


async def test_a_cancelled_acquire_does_not_wait_for_a_silent_suspect_for_long(
    dsn: str, proxy: FaultProxy, make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checking_module, "PROBE_TIMEOUT", 0.5)
    targets = iter([proxy.dsn])
    db = await listening(make, [], conninfo=lambda: next(targets, dsn))
    await notify(dsn, db, "x")
    proxy.stall()
    task = asyncio.create_task(db.fetchval("select 1"))
    await asyncio.sleep(0.1)
    task.cancel()
    begin = time.monotonic()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert time.monotonic() - begin < AT_ONCE
    async with asyncio.timeout(AT_ONCE):
        assert await db.fetchval("select 1") == 1
    assert db.pool.counts()["total"] == 1


# --- the user's own check -------------------------------------------------------------------------


async def test_the_users_check_runs_on_every_acquire(make: Any) -> None:
    seen: list[int] = []

    async def check(conn: Any) -> None:
        seen.append(conn.pgconn.backend_pid)
        await conn.execute("select 1")
        await conn.rollback()

    db = await make(min_size=1, max_size=1, check=check)
    for _ in range(3):
        async with db.connection():
            pass
    conn = await db.pool.getconn()
    await db.pool.putconn(conn)
    await db.fetchval("select 1")
    assert len(seen) == 5


async def test_a_check_does_not_sleep_its_way_past_seven_dead_connections(
    dsn: str, make: Any
) -> None:
    """psycopg_pool's does: seven dead ones end in PoolTimeout after 30 s."""
    db = await make(min_size=8, max_size=8, check=AsyncConnectionPool.check_connection)
    assert await kill(dsn, db) == 8
    begin = time.monotonic()
    for _ in range(10):
        assert await db.fetchval("select 1") == 1
    assert time.monotonic() - begin < AT_ONCE


async def test_a_check_that_finds_dead_what_looks_well_does_not_sleep_either(make: Any) -> None:
    """Seven connections that only the user's check knows to be of no use any more."""
    db = await make(min_size=8, max_size=8, check=None)
    stale = pids(db)

    async def check(conn: Any) -> None:
        if conn.pgconn.backend_pid in stale:
            await conn.close()
            raise psycopg.OperationalError("no use")

    life(db.pool).check = check
    begin = time.monotonic()
    assert await db.fetchval("select 1") == 1
    assert time.monotonic() - begin < AT_ONCE
    await until(lambda: db.pool.counts()["idle"] == 8)
    assert not pids(db) & stale


async def test_a_check_that_never_passes_ends_in_the_callers_time(make: Any) -> None:
    calls = 0

    async def check(_: Any) -> None:
        nonlocal calls
        calls += 1
        raise RuntimeError("not today")

    db = await make(min_size=2, max_size=2, check=check, timeout=1)
    begin = time.monotonic()
    with pytest.raises(psycopg.OperationalError, match="could not acquire"):
        await db.fetchval("select 1")
    assert time.monotonic() - begin < AT_ONCE
    assert 1 < calls < 50  # it does not spin
    await until(lambda: db.pool.counts()["idle"] == 2)


async def test_a_pool_that_is_still_opening_serves_what_it_has_through_a_check(
    dsn: str, proxy: FaultProxy, make_manager: MakeManager
) -> None:
    """Only one of two connections can be made: the pool is not open yet, and works."""
    proxy.refuse = True
    targets = iter([dsn])
    db = make_manager(
        lambda: next(targets, proxy.dsn),
        min_size=2,
        max_size=2,
        check=AsyncConnectionPool.check_connection,
        timeout=2,
    )
    await db.pool.open()
    assert [await db.fetchval("select 1") for _ in range(3)] == [1] * 3
    assert db.state == "opening"


# --- a server that is restarted -------------------------------------------------------------------


@pytest.mark.fault
@pytest.mark.parametrize("mode", ["fast", "immediate"])
async def test_only_queries_that_were_running_fail_when_the_server_is_restarted(
    mode: str, own_server: EmbeddedServer, make: Any
) -> None:
    db = await make(own_server.dsn(), min_size=5, max_size=5)
    failures: list[BaseException] = []
    unserved: list[BaseException] = []
    served = 0
    stop = False

    async def request() -> None:
        nonlocal served
        while not stop:
            running = False
            try:
                async with db.connection() as conn:
                    running = True
                    await conn.execute("select pg_sleep(0.01)")
            except psycopg.OperationalError as ex:  # PoolTimeout is one too
                (failures if running else unserved).append(ex)
            else:
                served += 1
            await asyncio.sleep(0)

    tasks = [asyncio.create_task(request()) for _ in range(20)]
    await until(lambda: served > 50)
    assert not failures
    await asyncio.to_thread(own_server.restart, mode)
    before = served
    await until(lambda: served > before + 100)
    stop = True
    await asyncio.gather(*tasks)
    assert not unserved
    assert len(failures) <= 5  # what ran at that moment, one on each connection
    await until(lambda: db.pool.counts()["idle"] == 5)


async def test_the_connection_that_was_given_back_last_is_next_unless_another_has_rested(
    make: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is at hand, on the server too; and no connection is left to itself for ever."""
    db = await make(min_size=3, max_size=3)
    query = "select pg_backend_pid()"
    await asyncio.gather(*(db.fetchval("select pg_sleep(0.05)") for _ in range(3)))
    last = await db.fetchval(query)
    assert [await db.fetchval(query) for _ in range(10)] == [last] * 10
    monkeypatch.setattr(_acquiring, "RESTED", 0.2)
    await asyncio.sleep(0.3)
    assert {await db.fetchval(query) for _ in range(3)} == pids(db)
