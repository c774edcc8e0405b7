"""Closing: what runs may finish, what does not is ended, and the server keeps nothing."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import re
import sys
import warnings
from collections.abc import Callable, Coroutine
from time import monotonic
from typing import Any

import psycopg
import pytest
from psycopg_pool import PoolClosed

from poolkeeper import (
    AcquireTimeout,
    ClosedError,
    LoopMismatchError,
    OpenError,
    PoolManager,
    UnclosedManagerWarning,
    _closing,
)
from poolkeeper._embedded import EmbeddedServer
from tests.support.inside import life
from tests.support.programs import run_program
from tests.support.proxy import FaultProxy
from tests.support.server import admin
from tests.support.waiting import eventually

MakeManager = Callable[..., PoolManager[Any]]
CountSessions = Callable[[str], int]

AT_ONCE = 8.0
BUSY = 4.0  # seconds that the machine may need for something else
"""Seconds; far below the 30 and 60 that the slow things here would take."""


class Holder:
    """A task that holds a connection until it is told what to do next."""

    def __init__(self, manager: PoolManager[Any], *, query: str = "", name: str = "holder") -> None:
        self.manager = manager
        self.query = query
        self.holds = asyncio.Event()
        self.go_on = asyncio.Event()
        self.conn: Any = None
        self.task = asyncio.create_task(self._hold(), name=name)

    async def _hold(self) -> Any:
        async with self.manager.connection() as conn:
            self.conn = conn
            if self.query:
                await conn.execute(self.query)
            self.holds.set()
            await self.go_on.wait()
            cursor = await conn.execute("select 41 + 1")
            return (await cursor.fetchone())[0]


async def running(manager: PoolManager[Any], query: str, **arguments: Any) -> asyncio.Task[Any]:
    """Return a task that runs *query*, as soon as the server is at it."""
    return await running_task(manager, manager.fetchval(query, **arguments))


async def running_task(
    manager: PoolManager[Any], work: Coroutine[Any, Any, Any]
) -> asyncio.Task[Any]:
    """Return a task that does *work*, as soon as a query of the pool runs."""
    task = asyncio.create_task(work, name="slow")
    while not _closing._active(life(manager.pool)):
        await asyncio.sleep(0)
    return task


async def closed_within(seconds: float, manager: PoolManager[Any], **arguments: Any) -> float:
    """Close *manager*: in so many seconds, on a machine that has nothing else to do."""
    begin = monotonic()
    await manager.close(**arguments)
    took = monotonic() - begin
    assert took < seconds + BUSY
    assert manager.state == "closed"
    assert manager.pool.counts()["total"] == 0
    return took


@pytest.fixture
def no_sessions(server_sessions: CountSessions) -> Callable[..., bool]:
    """A function that tells whether the server loses all sessions of a pool soon."""

    def check(name: str = "orders", within: float = 3.0) -> bool:
        return eventually(lambda: server_sessions(f"poolkeeper:{name}") == 0, within)

    return check


# --- what may finish -----------------------------------------------------------------------


async def test_close_with_nothing_in_use_is_immediate(
    db: PoolManager, no_sessions: Callable[..., bool], caplog: pytest.LogCaptureFixture
) -> None:
    await closed_within(AT_ONCE, db, timeout=30)
    assert no_sessions()
    assert caplog.text == ""


async def test_a_query_that_ends_in_time_has_its_result(
    db: PoolManager, no_sessions: Callable[..., bool], caplog: pytest.LogCaptureFixture
) -> None:
    task = await running(db, "select 42 from pg_sleep(0.5)")
    took = await closed_within(5, db, timeout=30)
    assert took > 0.2
    assert await task == 42
    assert no_sessions()
    assert caplog.text == ""


async def test_a_transaction_that_ends_in_time_is_committed(
    db: PoolManager, dsn: str, no_sessions: Callable[..., bool]
) -> None:
    admin(dsn, "create table closing_in_time (id int)")
    try:
        holder = Holder(db, query="insert into closing_in_time values (1)")
        await holder.holds.wait()
        closing = asyncio.create_task(db.close(timeout=30))
        await asyncio.sleep(0.05)
        assert not closing.done()
        assert db.state == "closing"
        holder.go_on.set()
        assert await holder.task == 42
        await closing
        assert admin(dsn, "select id from closing_in_time") == [(1,)]
        assert no_sessions()
    finally:
        admin(dsn, "drop table closing_in_time")


async def test_a_connection_given_back_while_closing_ends_the_close(
    make_manager: MakeManager, no_sessions: Callable[..., bool]
) -> None:
    """Also where giving it back takes a rollback and a reset callback."""
    cleaned = []

    async def reset(conn: Any) -> None:
        await conn.execute("select pg_sleep(0.2)")
        await conn.commit()
        cleaned.append(conn)

    manager = make_manager(reset=reset, min_size=1, name="orders")
    await manager.open()
    conn = await manager.pool.getconn()
    await conn.execute("select 1")
    closing = asyncio.create_task(closed_within(AT_ONCE, manager, timeout=30))
    await asyncio.sleep(0)
    await manager.pool.putconn(conn)
    await closing
    assert no_sessions()


# --- what may not --------------------------------------------------------------------------


async def test_a_query_past_the_deadline_is_cancelled_on_the_server(
    db: PoolManager, no_sessions: Callable[..., bool]
) -> None:
    task = await running(db, "select pg_sleep(60)")
    took = await closed_within(0.3 + 2, db, timeout=0.3)
    assert took > 0.2
    with pytest.raises(psycopg.errors.QueryCanceled):
        await task
    assert no_sessions()


@pytest.mark.parametrize("number", [1, 4])
async def test_a_query_blocked_on_a_lock_is_cancelled(
    db: PoolManager, dsn: str, no_sessions: Callable[..., bool], number: int
) -> None:
    with psycopg.connect(dsn, autocommit=True) as other:
        other.execute("select pg_advisory_lock(4711)")
        tasks = [await running(db, "select pg_advisory_lock(4711)") for _ in range(number)]
        while db.pool.counts()["in_use"] < number:
            await asyncio.sleep(0.01)
        await closed_within(0.2 + 2, db, timeout=0.2)
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert {type(result) for result in results} == {psycopg.errors.QueryCanceled}
        assert no_sessions()


async def test_with_timeout_zero_nothing_is_waited_for(
    db: PoolManager, no_sessions: Callable[..., bool]
) -> None:
    task = await running(db, "select pg_sleep(60)")
    holder = Holder(db)
    await holder.holds.wait()
    await closed_within(2, db, timeout=0)
    with pytest.raises(psycopg.errors.QueryCanceled):
        await task
    holder.go_on.set()
    with pytest.raises(ClosedError):
        await holder.task
    assert no_sessions()


async def test_the_close_timeout_of_the_manager_is_the_default(
    make_manager: MakeManager, no_sessions: Callable[..., bool]
) -> None:
    manager = make_manager(close_timeout=0.1, name="orders")
    with contextlib.suppress(psycopg.errors.QueryCanceled):
        async with manager:
            task = await running(manager, "select pg_sleep(60)")
            begin = monotonic()
    assert monotonic() - begin < 2.1 + BUSY
    with pytest.raises(psycopg.errors.QueryCanceled):
        await task
    assert no_sessions()


async def test_a_holder_that_tries_again_cannot_outlast_the_close(
    db: PoolManager, no_sessions: Callable[..., bool]
) -> None:
    """Its next query would run on for as long as it likes, unseen by anybody."""
    cancelled = 0

    async def stubborn() -> None:
        nonlocal cancelled
        async with db.connection() as conn:
            await conn.set_autocommit(True)
            while True:
                try:
                    await conn.execute("select pg_sleep(60)")
                except psycopg.errors.QueryCanceled:
                    cancelled += 1

    task = await running_task(db, stubborn())
    await closed_within(2, db, timeout=0)
    with pytest.raises(psycopg.OperationalError):
        await task
    assert cancelled > 0
    assert no_sessions()


async def test_a_holder_idle_in_transaction_finds_the_pool_closed_on_next_use(
    db: PoolManager, no_sessions: Callable[..., bool]
) -> None:
    holder = Holder(db, query="select 1")
    await holder.holds.wait()
    await closed_within(0.1 + 2, db, timeout=0.1)
    assert no_sessions()
    assert holder.conn.closed
    holder.go_on.set()
    with pytest.raises(ClosedError) as caught:
        await holder.task
    lines = str(caught.value).splitlines()
    assert lines[0] == 'pool "orders" was closed while this connection was in use'
    assert re.search(
        r'Acquired in task "holder" at tests/integration/test_close\.py:\d+ in \w+\.', lines[1]
    )
    assert "not committed is rolled back" in lines[2]


async def test_work_that_was_lost_is_not_passed_off_as_committed(
    db: PoolManager, dsn: str, no_sessions: Callable[..., bool]
) -> None:
    admin(dsn, "create table lost (id int)")
    try:

        async def insert() -> None:
            async with db.connection() as conn:
                await conn.execute("insert into lost values (1)")
                inserted.set()
                await go_on.wait()

        async def insert_in_a_block() -> None:
            async with db.transaction() as conn:
                await conn.execute("insert into lost values (2)")
                inserted.set()
                await go_on.wait()

        for work in (insert, insert_in_a_block):
            await db.open()
            inserted, go_on = asyncio.Event(), asyncio.Event()
            task = asyncio.create_task(work())
            await inserted.wait()
            await closed_within(2, db, timeout=0)
            go_on.set()
            with pytest.raises(ClosedError, match="was closed while this connection was in use"):
                await task
        assert admin(dsn, "select id from lost") == []
        assert no_sessions()
    finally:
        admin(dsn, "drop table lost")


@pytest.mark.parametrize("entrance", ["connection", "transaction", "cursor"])
async def test_the_holders_own_exception_is_not_replaced(db: PoolManager, entrance: str) -> None:
    holds, go_on = asyncio.Event(), asyncio.Event()

    async def work() -> None:
        async with getattr(db, entrance)() as it:
            await it.execute("select 1")
            holds.set()
            await go_on.wait()
            raise ZeroDivisionError("the holder's own")

    task = asyncio.create_task(work())
    await holds.wait()
    await db.close(timeout=0)
    go_on.set()
    with pytest.raises(ZeroDivisionError, match="the holder's own"):
        await task


@pytest.mark.parametrize("entrance", ["connection", "transaction", "cursor"])
@pytest.mark.parametrize("at_work", [True, False], ids=["in a query", "idle"])
async def test_a_holder_cancelled_together_with_the_close_stays_cancelled(
    db: PoolManager, no_sessions: Callable[..., bool], entrance: str, at_work: bool
) -> None:
    holds = asyncio.Event()

    async def work() -> None:
        async with getattr(db, entrance)() as it:
            await it.execute("select 1")
            holds.set()
            if at_work:
                await it.execute("select pg_sleep(60)")
            else:
                await asyncio.sleep(60)

    task = asyncio.create_task(work())
    await holds.wait()
    await asyncio.sleep(0.05)
    task.cancel()
    await closed_within(2, db, timeout=0)
    with pytest.raises(asyncio.CancelledError):
        await task
    assert no_sessions()


async def test_who_was_late_is_named(db: PoolManager, caplog: pytest.LogCaptureFixture) -> None:
    begin = monotonic()
    holder = Holder(db, name="report-7")
    await holder.holds.wait()
    await db.close(timeout=0.1)
    seconds = monotonic() - begin
    records = [record for record in caplog.records if record.name == "poolkeeper"]
    assert [record.levelname for record in records] == ["WARNING"]
    said = re.fullmatch(
        r'pool "orders" was closed after (\d\.\d\d) s with 1 connection\(s\) still in use:'
        r' in task "report-7" at tests/integration/test_close\.py:\d+ in Holder\._hold,'
        r" held for (\d\.\d) s",
        records[0].getMessage(),
    )
    assert said is not None
    assert float(said[1]) >= 0.1
    assert 0.1 <= float(said[2]) <= seconds + 0.05
    holder.task.cancel()
    await asyncio.wait({holder.task})


# --- who waits, and who comes too late ------------------------------------------------------


async def test_waiters_are_told_at_once_while_others_finish(
    make_manager: MakeManager, no_sessions: Callable[..., bool]
) -> None:
    manager = make_manager(min_size=1, name="orders")
    await manager.open()
    holder = Holder(manager)
    await holder.holds.wait()
    waiters = [asyncio.create_task(manager.fetchval("select 1")) for _ in range(3)]
    await asyncio.sleep(0)
    closing = asyncio.create_task(manager.close(timeout=30))
    done, _ = await asyncio.wait(waiters, timeout=AT_ONCE)
    assert len(done) == 3
    for waiter in waiters:
        with pytest.raises(ClosedError, match=r'^pool "orders" is closing'):
            await waiter
    assert not closing.done()
    with pytest.raises(ClosedError, match=r'^pool "orders" is closing'):
        await manager.fetchval("select 1")
    with pytest.raises(ClosedError):
        await manager.pool.getconn()
    with pytest.raises(PoolClosed):
        await manager.pool.wait()
    holder.go_on.set()
    assert await holder.task == 42
    await closing
    assert no_sessions()


async def test_a_closed_pool_says_so(db: PoolManager) -> None:
    await db.close()
    with pytest.raises(ClosedError) as caught:
        await db.fetchval("select 1")
    assert re.fullmatch(
        r'pool "orders" is closed\n'
        r"DETAIL:  Opened at .*conftest\.py:\d+ in task \"[^\"]+\" on loop \d+"
        r" \(\w+, thread \"MainThread\"\)\. Closed at tests/integration/test_close\.py:\d+\."
        r" Used at tests/integration/test_close\.py:\d+ in task \"[^\"]+\" on loop"
        r" \d+ \(\w+, thread \"MainThread\"\) to acquire a connection\.\n"
        r"HINT:  open\(\) opens it again\. See https://\S+#closed or run: .+ closed",
        str(caught.value),
    )
    assert isinstance(caught.value, PoolClosed)


# --- several times, interrupted --------------------------------------------------------------


async def test_close_twice_is_the_same_as_once(
    db: PoolManager, no_sessions: Callable[..., bool]
) -> None:
    await db.close()
    await db.close()
    await db.pool.close()
    assert db.state == "closed"
    assert no_sessions()


async def test_closes_that_meet_end_together(
    db: PoolManager, no_sessions: Callable[..., bool]
) -> None:
    holder = Holder(db)
    await holder.holds.wait()
    closes = [asyncio.create_task(db.close(timeout=30)) for _ in range(3)]
    await asyncio.sleep(0.05)
    assert not any(close.done() for close in closes)
    closes[1].cancel()
    with pytest.raises(asyncio.CancelledError):
        await closes[1]
    assert not closes[0].done()
    holder.go_on.set()
    assert await holder.task == 42
    await asyncio.gather(closes[0], closes[2])
    assert db.state == "closed"
    assert no_sessions()


async def test_close_of_a_manager_that_was_never_opened_does_nothing(dsn: str) -> None:
    manager = PoolManager(dsn)
    await manager.close()
    assert manager.state == "new"


@pytest.mark.parametrize("times", [1, 2, 5])
async def test_a_cancelled_close_closes_nevertheless(
    db: PoolManager, no_sessions: Callable[..., bool], times: int
) -> None:
    task = await running(db, "select pg_sleep(60)")
    holder = Holder(db, query="select 1")
    await holder.holds.wait()
    closing = asyncio.create_task(db.close(timeout=30))
    begin = monotonic()
    for _ in range(times):
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        closing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await closing
    assert monotonic() - begin < AT_ONCE
    assert db.state == "closed"
    with pytest.raises(psycopg.OperationalError):
        await task
    holder.go_on.set()
    with pytest.raises(ClosedError):
        await holder.task
    assert no_sessions()
    await db.open()
    assert await db.fetchval("select 42") == 42


async def test_a_timeout_around_close_is_kept(
    db: PoolManager, no_sessions: Callable[..., bool]
) -> None:
    task = await running(db, "select pg_sleep(60)")
    begin = monotonic()
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.2):
            await db.close(timeout=30)
    assert monotonic() - begin < AT_ONCE
    assert db.state == "closed"
    with pytest.raises(psycopg.errors.QueryCanceled):
        await task
    assert no_sessions()


async def test_who_closes_while_holding_a_connection_does_not_wait_for_itself(
    db: PoolManager, no_sessions: Callable[..., bool]
) -> None:
    async with db.connection() as conn:
        await conn.set_autocommit(True)
        await conn.execute("select 1")
        await closed_within(AT_ONCE, db, timeout=30)
        with pytest.raises(ClosedError):
            await conn.execute("select 1")
    assert no_sessions()


async def test_who_closes_while_holding_work_is_told_that_it_is_lost(db: PoolManager) -> None:
    with pytest.raises(ClosedError, match="was closed while this connection was in use"):
        async with db.connection() as conn:
            await conn.execute("select 1")
            await db.close(timeout=30)


async def test_a_connection_of_an_earlier_life_cannot_come_back(
    db: PoolManager, no_sessions: Callable[..., bool]
) -> None:
    """Not the one that was in use, and not the one that was broken when the pool was closed."""
    healthy = await db.pool.getconn()
    broken = await db.pool.getconn()
    await broken.close()
    await db.close(timeout=0)
    await db.open()
    await db.pool.putconn(healthy)
    await db.pool.putconn(broken)
    await asyncio.sleep(0.2)
    assert db.pool.counts() == {"total": 2, "in_use": 0, "idle": 2, "max": 4, "waiting": 0}
    assert await db.fetchval("select 42") == 42
    await db.close()
    assert no_sessions()


# --- callbacks, growing ------------------------------------------------------------------------


async def test_a_reset_callback_at_work_may_finish(
    make_manager: MakeManager, no_sessions: Callable[..., bool]
) -> None:
    at_work = asyncio.Event()
    finished = []

    async def reset(conn: Any) -> None:
        at_work.set()
        await conn.execute("select pg_sleep(0.3)")
        await conn.commit()
        finished.append(True)

    manager = make_manager(reset=reset, min_size=1, name="orders")
    await manager.open()
    release = asyncio.create_task(manager.fetchval("select 1"))
    await at_work.wait()
    await closed_within(AT_ONCE, manager, timeout=30)
    assert finished == [True]
    assert await release == 1
    assert no_sessions()


async def test_a_reset_callback_past_the_deadline_is_ended(
    make_manager: MakeManager, no_sessions: Callable[..., bool]
) -> None:
    at_work = asyncio.Event()

    async def reset(conn: Any) -> None:
        at_work.set()
        await conn.execute("select pg_sleep(60)")

    manager = make_manager(reset=reset, min_size=1, name="orders")
    await manager.open()
    release = asyncio.create_task(manager.fetchval("select 1"))
    await at_work.wait()
    await closed_within(0.2 + 2, manager, timeout=0.2)
    await asyncio.wait({release}, timeout=AT_ONCE)
    assert release.done()
    with contextlib.suppress(asyncio.CancelledError):
        await release
    assert no_sessions()


async def test_a_reset_callback_that_will_not_end_does_not_hold_up_the_close(
    make_manager: MakeManager, no_sessions: Callable[..., bool], caplog: pytest.LogCaptureFixture
) -> None:
    at_work, let_go = asyncio.Event(), asyncio.Event()

    async def reset(conn: Any) -> None:
        at_work.set()
        while not let_go.is_set():
            with contextlib.suppress(asyncio.CancelledError):
                await let_go.wait()

    manager = make_manager(reset=reset, min_size=1, name="orders")
    await manager.open()
    release = asyncio.create_task(manager.fetchval("select 1"))
    await at_work.wait()
    await closed_within(0.1 + 4, manager, timeout=0.1)
    assert 'pool "orders" is closed, but tasks go on: orders-release' in caplog.text
    assert no_sessions()
    let_go.set()
    await asyncio.wait({release})


async def test_close_while_the_pool_grows(
    make_manager: MakeManager, proxy: FaultProxy, no_sessions: Callable[..., bool]
) -> None:
    manager = make_manager(proxy.dsn, min_size=1, max_size=4, name="orders")
    await manager.open()
    holder = Holder(manager)
    await holder.holds.wait()
    proxy.silent = True
    accepted = proxy.accepted
    waiting = asyncio.create_task(manager.fetchval("select 1"))
    await asyncio.sleep(0)
    assert await asyncio.to_thread(eventually, lambda: proxy.accepted > accepted)
    holder.go_on.set()
    await holder.task
    with contextlib.suppress(ClosedError):
        await waiting
    await closed_within(AT_ONCE, manager, timeout=30)
    assert no_sessions()


async def test_close_while_a_new_connection_is_configured(
    make_manager: MakeManager, no_sessions: Callable[..., bool]
) -> None:
    slow = False
    configuring = asyncio.Event()

    async def configure(conn: Any) -> None:
        await conn.set_autocommit(True)
        if slow:
            configuring.set()
            await conn.execute("select pg_sleep(60)")

    manager = make_manager(min_size=1, max_size=4, configure=configure, name="orders")
    await manager.open()
    slow = True
    holder = Holder(manager)
    await holder.holds.wait()
    waiting = asyncio.create_task(manager.fetchval("select 1"))
    await configuring.wait()
    holder.go_on.set()
    await asyncio.wait({holder.task, waiting})
    await closed_within(2, manager, timeout=30)
    assert no_sessions()


async def test_close_while_a_check_callback_is_at_work(
    make_manager: MakeManager, no_sessions: Callable[..., bool]
) -> None:
    async def check(conn: Any) -> None:
        await conn.set_autocommit(True)
        await conn.execute("select pg_sleep(60)")

    manager = make_manager(min_size=1, check=check, name="orders")
    await manager.open()
    acquiring = await running(manager, "select 1")
    await closed_within(2, manager, timeout=0)
    with pytest.raises((psycopg.OperationalError, PoolClosed)):
        await asyncio.wait_for(acquiring, AT_ONCE)
    assert no_sessions()


async def test_close_while_a_connection_that_failed_its_check_is_taken_back(
    make_manager: MakeManager, proxy: FaultProxy
) -> None:
    """Whoever acquires is told that the pool is closed, and not cancelled."""

    async def check(conn: Any) -> None:
        await conn.execute("select 1")
        proxy.stall()  # nor is there an answer to the rollback
        refused.set()
        raise RuntimeError

    refused = asyncio.Event()
    manager = make_manager(proxy.dsn, min_size=1, check=check, name="orders")
    await manager.open()
    acquiring = asyncio.create_task(manager.fetchval("select 1"))
    await refused.wait()
    await manager.close(timeout=0)
    await asyncio.wait({acquiring}, timeout=AT_ONCE)
    assert not acquiring.cancelled()
    assert isinstance(acquiring.exception(), PoolClosed)


# --- the server is gone -------------------------------------------------------------------------


@pytest.mark.fault
async def test_close_after_the_server_has_crashed(
    make_manager: MakeManager, own_server: EmbeddedServer
) -> None:
    manager = make_manager(own_server.dsn(), min_size=2, max_size=4, name="orders")
    await manager.open()
    task = await running(manager, "select pg_sleep(60)")
    holder = Holder(manager, query="select 1")
    await holder.holds.wait()
    await asyncio.to_thread(own_server.stop, "immediate")
    await closed_within(0.5 + 2, manager, timeout=0.5)
    with pytest.raises(psycopg.OperationalError):
        await task
    holder.go_on.set()
    with pytest.raises(psycopg.OperationalError):
        await holder.task


async def test_close_when_the_network_passes_nothing_on(
    make_manager: MakeManager, proxy: FaultProxy
) -> None:
    """Not the queries, and not the requests to cancel them."""
    manager = make_manager(proxy.dsn, min_size=2, max_size=4, name="stalled")
    await manager.open()
    task = await running(manager, "select pg_sleep(5)")
    holder = Holder(manager, query="select 1")
    await holder.holds.wait()
    proxy.stall()
    holder.go_on.set()
    releasing = await running(manager, "select 1")
    before = asyncio.all_tasks()
    await closed_within(0.5 + 2, manager, timeout=0.5)
    done, _ = await asyncio.wait({task, holder.task, releasing}, timeout=AT_ONCE)
    assert len(done) == 3
    for ended in done:
        assert isinstance(ended.exception(), psycopg.OperationalError)
    assert asyncio.all_tasks() <= before
    proxy.resume()


async def test_close_while_a_rollback_gets_no_answer(
    make_manager: MakeManager, proxy: FaultProxy
) -> None:
    manager = make_manager(proxy.dsn, min_size=1, name="orders")
    await manager.open()
    conn = await manager.pool.getconn()
    await conn.execute("select 1")
    proxy.stall()
    release = asyncio.create_task(manager.pool.putconn(conn))
    while not life(manager.pool).tasks.running:
        await asyncio.sleep(0)
    await closed_within(0.3 + 2, manager, timeout=0.3)
    await asyncio.wait({release}, timeout=AT_ONCE)
    assert release.done()
    with contextlib.suppress(asyncio.CancelledError):
        await release
    proxy.resume()


async def test_close_while_connections_are_made_anew(
    make_manager: MakeManager, proxy: FaultProxy
) -> None:
    manager = make_manager(proxy.dsn, min_size=2, name="orders")
    await manager.open()
    proxy.refuse = True
    proxy.cut()
    with pytest.raises(psycopg.OperationalError):
        await manager.fetchval("select 1", timeout=0.3)
    assert await asyncio.to_thread(eventually, lambda: proxy.accepted > 3)
    await closed_within(AT_ONCE, manager, timeout=30)


# --- from elsewhere ---------------------------------------------------------------------------


async def test_close_on_another_loop_is_refused_and_harms_nothing(
    db: PoolManager, server_sessions: CountSessions
) -> None:
    with pytest.raises(LoopMismatchError, match='pool "orders" is bound to a different event loop'):
        await asyncio.to_thread(asyncio.run, db.close())
    assert server_sessions("poolkeeper:orders") == 2
    assert await db.fetchval("select 42") == 42


async def test_close_after_the_owner_loop_died_ends_the_sessions_and_says_so(
    make_manager: MakeManager, server_sessions: CountSessions, no_sessions: Callable[..., bool]
) -> None:
    manager = make_manager(min_size=2, name="orders")

    def live_and_die() -> None:
        loop = asyncio.new_event_loop()
        loop.run_until_complete(manager.open())
        loop.close()

    await asyncio.to_thread(live_and_die)
    assert manager.state == "closed"
    assert server_sessions("poolkeeper:orders") == 2
    with pytest.raises(LoopMismatchError, match="is bound to an event loop that is closed"):
        await manager.close()
    assert no_sessions()
    await manager.close()
    await manager.open()
    assert await manager.fetchval("select 42") == 42


def test_close_in_a_forked_child_is_refused_and_leaves_the_parent_alone(
    dsn: str, loop_name: str
) -> None:
    ended = run_program(
        """
        from poolkeeper import LoopMismatchError, PoolManager

        async def main():
            async with PoolManager(sys.argv[1], min_size=2, name="orders") as db:
                async with db.connection() as conn:
                    before = conn.info.backend_pid
                child = os.fork()
                if not child:
                    os._exit(in_child(db))
                _, status = os.waitpid(child, 0)
                assert os.waitstatus_to_exitcode(status) == 7, status
                for _ in range(4):
                    assert await db.fetchval("select 42") == 42
                assert db.pool.get_stats().get("connections_lost", 0) == 0
                assert db.pool.get_stats()["connections_num"] == 2
            print("parent closed", db.state)

        def in_child(db):
            assert db.state == "closed"
            try:
                asyncio._set_running_loop(None)
                asyncio.run(db.close())
            except LoopMismatchError as error:
                assert str(error).startswith('pool "orders" was opened in another process')
                asyncio.run(db.close())
                return 7
            return 1

        run(main())
        """,
        dsn,
        loop=loop_name,
    )
    assert (ended.code, ended.out, ended.err) == (0, "parent closed closed\n", "")


# --- never closed ----------------------------------------------------------------------------


async def test_a_manager_that_is_dropped_while_open_warns(dsn: str) -> None:
    manager = PoolManager(dsn, min_size=1, name="dropped")
    await manager.open()
    pool = manager.pool
    with pytest.warns(UnclosedManagerWarning) as caught:
        del manager
    assert re.fullmatch(
        r'pool "dropped" was never closed; opened at tests/integration/test_close\.py:\d+ .*',
        str(caught[0].message),
    )
    await pool.close()


async def test_a_manager_that_was_closed_or_never_opened_or_failed_does_not_warn(dsn: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        PoolManager(dsn)
        manager = PoolManager(dsn, min_size=1)
        await manager.open()
        await manager.close()
        del manager
        manager = PoolManager(psycopg.conninfo.make_conninfo(dsn, dbname="no_such_db"))
        with contextlib.suppress(OpenError):
            await manager.open()
        del manager
        gc.collect()


async def test_what_was_known_of_a_pool_is_known_after_its_end(make_manager: MakeManager) -> None:
    manager = make_manager(min_size=1, max_size=1)
    await manager.open()
    async with manager.connection():
        with pytest.raises(AcquireTimeout):
            await asyncio.create_task(manager.fetchval("select 1", timeout=0.01))
    await manager.close()
    told = manager.snapshot()
    assert (told.state, told.total, told.load.gave_up, told.load.released) == ("closed", 0, 1, 1)
    await manager.open()
    assert manager.snapshot().load.released == 0


@pytest.mark.parametrize("module", ["_manager", "_pool", "_no_life"])
def test_a_manager_that_goes_with_the_interpreter_goes_quietly(
    module: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it would look up may be None by then: Python takes modules apart one by one."""
    db = PoolManager("host=nowhere")
    there = sys.modules[f"poolkeeper.{module}"]
    for name in vars(there).copy():
        if not name.startswith("__"):
            monkeypatch.setattr(there, name, None)
    db.__del__()
