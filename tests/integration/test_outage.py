"""An outage is over for the pool as soon as it is over for the server, and cheap meanwhile."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable
from typing import Any

import psycopg
import pytest

from poolkeeper import AcquireTimeout, PoolManager
from poolkeeper import _checking as checking_module
from poolkeeper._embedded import EmbeddedServer
from poolkeeper._recovery import Connector
from tests.support.inside import life
from tests.support.proxy import FaultProxy
from tests.support.server import PASSWORD, admin, kill_sessions
from tests.support.waiting import until

MakeManager = Callable[..., PoolManager[Any]]

NAME = "outage"
SOON = 4.0  # seconds after the server accepts again; one is promised, on a quiet machine
AT_ONCE = 8.0  # seconds; the pool's own patience is 30
FEW = 5  # connection attempts in a second


def complete(manager: PoolManager[Any]) -> bool:
    """Tell whether every connection that the pool should have is there, and idle."""
    counts = manager.pool.counts()
    return counts["idle"] == counts["total"] >= manager.pool.min_size


def accounted(manager: PoolManager[Any]) -> bool:
    """Tell whether psycopg_pool counts as many connections as there are or will be."""
    pool = manager.pool
    return life(pool).total == pool.counts()["total"] + life(pool).connector.wanted


@pytest.fixture
def make(make_manager: MakeManager) -> Callable[..., Any]:
    """A function that opens a pool whose sessions have a name of their own."""

    async def opened(conninfo: Any = None, **arguments: Any) -> PoolManager[Any]:
        manager = make_manager(conninfo, **{"application_name": NAME, **arguments})
        await manager.open()
        return manager

    return opened


async def query_for(db: PoolManager[Any], timeout: float) -> float:
    """Run one query, waiting up to *timeout* for a connection; return when it was done."""
    async with db.connection(timeout) as conn:
        await conn.execute("select 1")
    return time.monotonic()


class Away:
    """A server that is stopped, and starts again after a while, in a thread of its own."""

    def __init__(self, server: EmbeddedServer, seconds: float, mode: str = "fast") -> None:
        self._server = server
        self._seconds = seconds
        self._mode = mode
        self._thread = threading.Thread(target=self._come_back, daemon=True)
        self.accepts = 0.0

    def leave(self) -> None:
        self._server.stop(self._mode)
        self._thread.start()

    def _come_back(self) -> None:
        time.sleep(self._seconds)
        watch = threading.Thread(target=self._watch, daemon=True)
        watch.start()
        self._server.start()
        watch.join(30)

    def _watch(self) -> None:
        while True:
            try:
                psycopg.connect(self._server.dsn(), connect_timeout=2).close()
            except psycopg.OperationalError:
                time.sleep(0.02)
            else:
                self.accepts = time.monotonic()
                return

    async def back(self) -> float:
        """Wait until the server is back; return since when it accepted connections."""
        await asyncio.to_thread(self._thread.join, 60)
        assert self.accepts
        return self.accepts


# --- a server that stops ------------------------------------------------------------------------


@pytest.mark.fault
@pytest.mark.parametrize("mode", ["fast", "immediate"])
async def test_service_is_back_as_soon_as_the_server_after_three_seconds(
    mode: str, own_server: EmbeddedServer, make: Any
) -> None:
    db = await make(own_server.dsn(), min_size=4, max_size=4)
    away = Away(own_server, 3.0, mode)
    await asyncio.to_thread(away.leave)
    served = await asyncio.gather(*(query_for(db, 30) for _ in range(20)))
    accepts = await away.back()
    assert max(served) - accepts < SOON
    await until(lambda: complete(db))
    assert accounted(db)


@pytest.mark.fault
async def test_service_is_back_as_soon_as_the_server_after_twenty_seconds(
    own_server: EmbeddedServer, make: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """In real time, with requests that come all the while and wait for a second each."""
    db = await make(own_server.dsn(), min_size=4, max_size=10)
    away = Away(own_server, 20.0)
    first_served = 0.0
    failed: list[tuple[float, AcquireTimeout]] = []

    async def requests() -> None:
        nonlocal first_served
        while not first_served:
            try:
                first_served = await query_for(db, 1.0)
            except AcquireTimeout as ex:
                failed.append((time.monotonic(), ex))

    with caplog.at_level(logging.INFO):
        await asyncio.to_thread(away.leave)
        await asyncio.gather(*(requests() for _ in range(5)))
        accepts = await away.back()
        assert first_served - accepts < SOON
        await until(lambda: complete(db))
    # Later, one may come too late for the first of the new connections.
    meanwhile = [ex for when, ex in failed if when < accepts - 0.5]
    assert len(meanwhile) > 50
    assert all(isinstance(ex.__cause__, psycopg.OperationalError) for ex in meanwhile)
    told = [r for r in caplog.records if r.name == "poolkeeper" and r.levelno >= logging.WARNING]
    assert len([r for r in told if "trying again until" in r.message]) == 1
    assert len([r for r in told if "could not acquire" in r.message]) == 1
    assert len([r for r in told if "can be made again" in r.message]) == 1
    assert len(told) == 3
    assert not [r for r in caplog.records if r.name == "psycopg.pool" and r.levelno > logging.INFO]


@pytest.mark.fault
async def test_the_pool_is_whole_again_with_nobody_asking(
    own_server: EmbeddedServer, make: Any
) -> None:
    """One look at a dead connection is enough to know; then nobody asks any more."""
    db = await make(own_server.dsn(), min_size=6, max_size=6)
    away = Away(own_server, 1.0)
    await asyncio.to_thread(away.leave)
    with pytest.raises(AcquireTimeout):
        await query_for(db, 0.2)
    assert db.pool.counts()["total"] == 0
    accepts = await away.back()
    await until(lambda: complete(db))
    assert time.monotonic() - accepts < AT_ONCE
    assert accounted(db)


@pytest.mark.fault
async def test_no_more_sessions_than_max_size_while_all_come_back(
    own_server: EmbeddedServer, make: Any
) -> None:
    db = await make(own_server.dsn(), min_size=5, max_size=5)
    await asyncio.to_thread(own_server.stop)
    requests = [asyncio.create_task(query_for(db, 30)) for _ in range(100)]
    await asyncio.sleep(0.5)
    await asyncio.to_thread(own_server.start)
    most = 0

    def sample() -> None:
        nonlocal most
        with psycopg.connect(own_server.dsn(), autocommit=True) as conn:
            for _ in range(100):
                row = conn.execute(
                    "select count(*) from pg_stat_activity where application_name = %s", (NAME,)
                ).fetchone()
                most = max(most, row[0] if row else 0)
                time.sleep(0.01)

    await asyncio.gather(asyncio.to_thread(sample), *requests)
    assert 0 < most <= 5
    await until(lambda: complete(db))
    assert db.pool.counts()["total"] == 5
    assert accounted(db)


@pytest.mark.fault
async def test_waiters_with_time_left_are_served_the_others_learn_the_reason(
    own_server: EmbeddedServer, make: Any
) -> None:
    db = await make(own_server.dsn(), min_size=2, max_size=2)
    away = Away(own_server, 2.0)
    await asyncio.to_thread(away.leave)
    patient = [asyncio.create_task(query_for(db, 30)) for _ in range(5)]
    hasty = [asyncio.create_task(query_for(db, 0.5 + 0.1 * n)) for n in range(5)]
    for error in await asyncio.gather(*hasty, return_exceptions=True):
        assert isinstance(error, AcquireTimeout)
        assert isinstance(error.__cause__, psycopg.OperationalError)
        assert "refused" in str(error.__cause__)
        assert "refused" in str(error)
    served = await asyncio.gather(*patient)
    assert max(served) - await away.back() < SOON


# --- a server that cannot be reached ------------------------------------------------------------


@pytest.mark.parametrize("waiters", [0, 100])
async def test_attempts_are_few_while_connections_are_refused(
    waiters: int, proxy: FaultProxy, make: Any
) -> None:
    db = await make(proxy.dsn, min_size=10, max_size=10)
    proxy.refuse = True
    await asyncio.to_thread(proxy.cut)
    with pytest.raises(AcquireTimeout):
        await query_for(db, 0.5)
    requests = [asyncio.create_task(query_for(db, 30)) for _ in range(waiters)]
    before = proxy.accepted
    await asyncio.sleep(3.0)
    assert 3 <= proxy.accepted - before <= 3 * FEW
    proxy.refuse = False
    begin = time.monotonic()
    await asyncio.gather(*requests)
    await until(lambda: complete(db))
    assert time.monotonic() - begin < AT_ONCE
    assert db.pool.counts()["total"] == 10
    assert accounted(db)


@pytest.mark.parametrize("size", [1, 4])
async def test_a_server_that_accepts_and_says_nothing_does_not_hold_the_pool_up(
    size: int, proxy: FaultProxy, make: Any
) -> None:
    """It never answers what it accepted meanwhile; new connections work again."""
    db = await make(proxy.dsn, min_size=size, max_size=size)
    proxy.silent = True
    await asyncio.to_thread(proxy.cut)
    request = asyncio.create_task(query_for(db, 30))
    await asyncio.sleep(1.5)
    before = proxy.accepted
    await asyncio.sleep(3.0)
    assert 1 <= proxy.accepted - before <= 3 * FEW
    proxy.silent = False
    begin = time.monotonic()
    assert await request - begin < SOON
    await until(lambda: complete(db))
    assert db.pool.counts()["total"] == size
    assert accounted(db)


async def test_a_refusing_server_that_falls_silent_does_not_hold_the_pool_up(
    proxy: FaultProxy, make: Any
) -> None:
    db = await make(proxy.dsn, min_size=2, max_size=2)
    proxy.refuse = True
    await asyncio.to_thread(proxy.cut)
    request = asyncio.create_task(query_for(db, 30))
    await asyncio.sleep(1.0)
    proxy.silent, proxy.refuse = True, False
    await asyncio.sleep(6.0)
    proxy.silent = False
    begin = time.monotonic()
    assert await request - begin < SOON
    await until(lambda: complete(db))
    assert accounted(db)


@pytest.mark.parametrize("size", [1, 3])
async def test_a_silent_server_that_wakes_up_answers_what_waited(
    size: int, dsn: str, proxy: FaultProxy, make: Any
) -> None:
    db = await make(proxy.dsn, min_size=size, max_size=size)
    await asyncio.to_thread(kill_sessions, dsn, NAME)
    # Until the proxy has passed it on.
    await until(lambda: not any(conn._session.is_quiet() for conn in life(db.pool).idle))
    proxy.stall()
    requests = [asyncio.create_task(query_for(db, 30)) for _ in range(10)]
    await asyncio.sleep(3.0)
    proxy.resume()
    begin = time.monotonic()
    assert max(await asyncio.gather(*requests)) - begin < SOON
    await until(lambda: complete(db))
    assert db.pool.counts()["total"] == size
    assert accounted(db)
    # Attempts that were given up or not needed any more leave no session behind.
    await until(lambda: len(_sessions(dsn)) == size)


def _sessions(dsn: str) -> list[tuple[Any, ...]]:
    return admin(dsn, "select pid from pg_stat_activity where application_name = %s", (NAME,))


async def test_a_server_that_says_nothing_is_told_of_and_reported(
    dsn: str, proxy: FaultProxy, make: Any, caplog: pytest.LogCaptureFixture
) -> None:
    db = await make(proxy.dsn, min_size=1, max_size=1)
    proxy.silent = True
    await asyncio.to_thread(proxy.cut)
    with pytest.raises(AcquireTimeout) as caught:
        await query_for(db, 6.0)
    assert isinstance(caught.value.__cause__, psycopg.OperationalError)
    assert "no answer" in str(caught.value)
    assert len([r for r in caplog.records if "trying again until" in r.message]) == 1


async def test_a_slow_login_is_given_the_time_it_needs(proxy: FaultProxy, make: Any) -> None:
    """Longer than what makes the pool start another attempt beside it."""
    db = await make(proxy.dsn, min_size=0, max_size=3)

    def slow_logins() -> None:
        while not done.wait(0.02):
            proxy.stall()
            done.wait(2.0)
            proxy.resume()

    done = threading.Event()
    thread = threading.Thread(target=slow_logins)
    thread.start()
    try:
        served = await asyncio.gather(*(query_for(db, 20) for _ in range(3)))
    finally:
        done.set()
        thread.join()
        proxy.resume()
    assert len(served) == 3
    assert db.pool.counts()["total"] <= 3
    await until(lambda: accounted(db))


async def test_growth_with_a_slow_login_does_not_keep_returns_from_the_waiting(
    proxy: FaultProxy, dsn: str, make: Any
) -> None:
    targets = iter([dsn])
    db = await make(lambda: next(targets, proxy.dsn), min_size=1, max_size=3)
    proxy.stall()
    async with asyncio.timeout(AT_ONCE):
        for _ in range(10):
            # Each of them makes the pool grow, which hangs; each is served by the one before.
            await asyncio.gather(*(query_for(db, 30) for _ in range(5)))
    proxy.resume()
    await until(lambda: life(db.pool).connector.wanted == 0)
    assert accounted(db)


# --- a reason that stays ------------------------------------------------------------------------


@pytest.mark.fault
async def test_a_wrong_password_is_tried_slowly_and_gets_better_by_itself(
    scram_server: EmbeddedServer, make: Any
) -> None:
    dsn = scram_server.dsn(user="app", password=PASSWORD)
    admin_dsn = scram_server.dsn()
    calls = 0

    def conninfo() -> str:
        nonlocal calls
        calls += 1
        return dsn

    db = await make(conninfo, min_size=2, max_size=2)
    try:
        admin(admin_dsn, "alter role app password 'another'")
        await asyncio.to_thread(kill_sessions, admin_dsn, NAME)
        with pytest.raises(AcquireTimeout, match="password") as caught:
            await query_for(db, 0.5)
        assert "password authentication failed" in str(caught.value.__cause__)
        before = calls
        await asyncio.sleep(4.5)
        assert 1 <= calls - before <= 5
    finally:
        admin(admin_dsn, f"alter role app password '{PASSWORD}'")
    async with asyncio.timeout(AT_ONCE + 2):
        await query_for(db, 10)
        await until(lambda: complete(db))
    assert accounted(db)


@pytest.mark.fault
async def test_who_waits_when_the_last_connection_is_lost_is_told_why_none_can_be_made(
    scram_server: EmbeddedServer, make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reason was permanent before; it is asked for again at once, not when it is due."""
    dsn = scram_server.dsn(user="app", password=PASSWORD)
    admin_dsn = scram_server.dsn()
    monkeypatch.setattr(Connector, "PROBE_EVERY_IF_PERMANENT", 60.0)
    db = await make(dsn, min_size=1, max_size=2)
    conn = await db.pool.getconn()
    try:
        admin(admin_dsn, "alter role app password 'another'")
        waiting = asyncio.create_task(query_for(db, 30))
        await until(lambda: db.snapshot().attempts_failed)
        await asyncio.to_thread(kill_sessions, admin_dsn, NAME)
        async with asyncio.timeout(AT_ONCE):
            await db.pool.putconn(conn)
            with pytest.raises(AcquireTimeout, match="password"):
                await waiting
    finally:
        admin(admin_dsn, f"alter role app password '{PASSWORD}'")


# --- who is told ----------------------------------------------------------------------------------


async def test_reconnect_failed_is_called_once_in_an_outage(proxy: FaultProxy, make: Any) -> None:
    called: list[float] = []

    async def reconnect_failed(pool: Any) -> None:
        assert pool is db.pool
        called.append(time.monotonic())

    db = await make(
        proxy.dsn, min_size=3, max_size=3, reconnect_timeout=1, reconnect_failed=reconnect_failed
    )
    for outage in (1, 2):
        proxy.refuse = True
        await asyncio.to_thread(proxy.cut)
        begin = time.monotonic()
        with pytest.raises(AcquireTimeout):
            await query_for(db, 3.0)
        assert len(called) == outage
        assert called[-1] - begin > 0.9
        proxy.refuse = False
        await until(lambda: complete(db))


async def test_a_reconnect_failed_that_raises_harms_nobody(
    proxy: FaultProxy, make: Any, caplog: pytest.LogCaptureFixture
) -> None:
    def reconnect_failed(pool: Any) -> None:
        raise RuntimeError("the callback is broken")

    db = await make(
        proxy.dsn, min_size=1, max_size=1, reconnect_timeout=0.1, reconnect_failed=reconnect_failed
    )
    proxy.refuse = True
    await asyncio.to_thread(proxy.cut)
    with pytest.raises(AcquireTimeout):
        await query_for(db, 1.0)
    proxy.refuse = False
    async with asyncio.timeout(AT_ONCE):
        await query_for(db, 10)
    assert "the reconnect_failed callback (" in caplog.text
    assert "in reconnect_failed) raised RuntimeError" in caplog.text
    assert "the callback is broken" not in caplog.text
    assert "never retrieved" not in caplog.text


async def test_the_log_tells_of_an_outage_once_and_of_its_end_once(
    proxy: FaultProxy, make: Any, caplog: pytest.LogCaptureFixture
) -> None:
    db = await make(proxy.dsn, min_size=10, max_size=10, name="told")
    for outage in (1, 2):
        caplog.clear()
        with caplog.at_level(logging.INFO):
            proxy.refuse = True
            await asyncio.to_thread(proxy.cut)
            requests = [asyncio.create_task(query_for(db, 30)) for _ in range(20)]
            await asyncio.sleep(1.5)
            proxy.refuse = False
            await asyncio.gather(*requests)
            await until(lambda: complete(db))
        ours = [r for r in caplog.records if r.name == "poolkeeper"]
        warnings = [r.message for r in ours if r.levelno >= logging.WARNING]
        assert len(warnings) == 2, outage
        assert 'pool "told": no connection can be made' in warnings[0]
        assert 'pool "told": connections can be made again' in warnings[1]
        assert len(ours) <= 4, [r.message for r in ours]
        loud = [r for r in caplog.records if r.name == "psycopg.pool" and r.levelno > logging.INFO]
        assert not loud


# --- what else happens meanwhile ------------------------------------------------------------------


@pytest.mark.parametrize("how", ["refuse", "silent"])
async def test_a_pool_can_be_closed_during_an_outage(
    how: str, proxy: FaultProxy, make: Any
) -> None:
    db = await make(proxy.dsn, min_size=4, max_size=4)
    setattr(proxy, how, True)
    await asyncio.to_thread(proxy.cut)
    request = asyncio.create_task(query_for(db, 30))
    await asyncio.sleep(1.0)
    begin = time.monotonic()
    await db.close()
    assert time.monotonic() - begin < AT_ONCE
    with pytest.raises(psycopg.OperationalError, match="clos"):
        await request
    after = proxy.accepted
    await asyncio.sleep(1.0)
    assert proxy.accepted == after


@pytest.mark.parametrize("how", ["refuse", "silent"])
async def test_a_pool_opened_during_an_outage_opens_when_it_is_over(
    how: str, proxy: FaultProxy, make_manager: MakeManager
) -> None:
    db = make_manager(proxy.dsn, min_size=4, max_size=4, application_name=NAME)
    setattr(proxy, how, True)
    opening = asyncio.create_task(db.open(timeout=30))
    await asyncio.sleep(2.5)
    assert not opening.done()
    setattr(proxy, how, False)
    begin = time.monotonic()
    await opening
    # Before the first login nothing is known of how long one takes.
    patience = Connector.FIRST_LOGIN if how == "silent" else 0.0
    assert time.monotonic() - begin < patience + SOON
    assert db.pool.counts()["idle"] >= 4
    await until(lambda: accounted(db))
    assert db.pool.counts()["total"] == 4


async def test_resize_during_an_outage_counts_when_it_is_over(proxy: FaultProxy, make: Any) -> None:
    db = await make(proxy.dsn, min_size=2, max_size=4)
    proxy.refuse = True
    await asyncio.to_thread(proxy.cut)
    with pytest.raises(AcquireTimeout):
        await query_for(db, 0.5)
    await db.pool.resize(6, 8)
    await asyncio.sleep(0.5)
    await db.pool.resize(3, 3)
    await asyncio.sleep(0.5)
    proxy.refuse = False
    await until(lambda: complete(db))
    assert db.pool.counts()["total"] == 3
    assert accounted(db)


async def test_drain_during_an_outage_loses_nothing(proxy: FaultProxy, make: Any) -> None:
    db = await make(proxy.dsn, min_size=3, max_size=3)
    async with db.connection() as held:
        proxy.refuse = True
        await db.pool.drain()
        assert db.pool.counts()["idle"] == 0
        await held.execute("select 1")
    with pytest.raises(AcquireTimeout):
        await query_for(db, 0.5)
    proxy.refuse = False
    await until(lambda: complete(db))
    assert db.pool.counts()["total"] == 3
    assert accounted(db)


# --- helpers of the pool that somebody kills ------------------------------------------------------


def _tasks(word: str) -> list[asyncio.Task[Any]]:
    return [task for task in asyncio.all_tasks() if word in task.get_name()]


async def kill_tasks(*words: str) -> None:
    tasks = [task for word in words for task in _tasks(word)]
    assert tasks
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)


async def test_a_keeper_that_somebody_cancelled_is_replaced(dsn: str, make: Any) -> None:
    db = await make(min_size=1, max_size=3, name="mended", max_idle=0.5)
    await kill_tasks("mended-keeper")
    async with asyncio.timeout(AT_ONCE):
        await asyncio.gather(*(query_for(db, 10) for _ in range(6)))
    assert len(_tasks("mended-keeper")) == 1
    # It works: the pool shrinks again.
    await until(lambda: db.pool.counts()["total"] == 1)
    assert accounted(db)


async def test_a_keeper_of_a_pool_at_its_maximum_is_replaced_too(dsn: str, make: Any) -> None:
    db = await make(min_size=1, max_size=2, name="mended", max_idle=0.5)
    async with db.connection(), db.connection():
        await kill_tasks("mended-keeper")
        waiting = asyncio.create_task(query_for(db, 10))
        await until(lambda: len(_tasks("mended-keeper")) == 1)
    await waiting
    await until(lambda: db.pool.counts()["total"] == 1)


async def test_attempts_that_somebody_cancelled_are_made_by_the_next_waiter(
    dsn: str, proxy: FaultProxy, make: Any
) -> None:
    db = await make(proxy.dsn, min_size=2, max_size=2, name="mended")
    proxy.silent = True
    await asyncio.to_thread(proxy.cut)
    with pytest.raises(AcquireTimeout):
        await query_for(db, 0.3)
    await kill_tasks("mended-connect")
    proxy.silent = False
    async with asyncio.timeout(AT_ONCE):
        await query_for(db, 10)
        await until(lambda: complete(db))
    assert db.pool.counts()["total"] == 2
    assert accounted(db)


async def test_every_task_of_the_loop_may_be_cancelled(dsn: str, make: Any) -> None:
    """Some shut-down recipes and test runners do that, and the pool goes on to be used."""
    db = await make(min_size=2, max_size=4)
    requests = [asyncio.create_task(query_for(db, 10)) for _ in range(20)]
    await asyncio.sleep(0)
    this = asyncio.current_task()
    for _ in range(3):
        for task in asyncio.all_tasks() - {this}:
            task.cancel()
        await asyncio.sleep(0)
    await asyncio.wait(requests)
    async with asyncio.timeout(AT_ONCE):
        await asyncio.gather(*(query_for(db, 10) for _ in range(20)))
    await until(lambda: complete(db) and accounted(db))


async def test_a_check_of_the_pool_that_is_cancelled_loses_no_connection(
    dsn: str, proxy: FaultProxy, make: Any
) -> None:
    db = await make(proxy.dsn, min_size=4, max_size=4)
    proxy.stall()
    checking = asyncio.create_task(db.pool.check())
    await asyncio.sleep(0.2)
    checking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await checking
    proxy.resume()
    await until(lambda: complete(db))
    assert db.pool.counts()["total"] == 4
    assert accounted(db)


async def test_a_check_of_the_pool_gives_a_silent_server_up(
    dsn: str, proxy: FaultProxy, make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checking_module, "PROBE_TIMEOUT", 0.3)
    targets = iter([proxy.dsn] * 4)
    db = await make(lambda: next(targets, dsn), min_size=4, max_size=4)
    proxy.stall()
    async with asyncio.timeout(AT_ONCE):
        await db.pool.check()
        await until(lambda: complete(db))
        await asyncio.gather(*(query_for(db, 10) for _ in range(8)))
    assert accounted(db)


async def test_a_check_of_a_pool_that_works_leaves_it_as_it_is(make: Any) -> None:
    db = await make(min_size=4, max_size=6)
    before = {conn.pgconn.backend_pid for conn in life(db.pool).idle}
    await db.pool.check()
    assert {conn.pgconn.backend_pid for conn in life(db.pool).idle} == before
    assert accounted(db)


# --- psycopg_pool's own ways ----------------------------------------------------------------------


async def test_a_resize_of_a_pool_that_has_grown_does_not_overfill_it(make: Any) -> None:
    """psycopg_pool adds what the minimum grew by, however many there are."""
    db = await make(min_size=1, max_size=4)
    async with db.connection(), db.connection(), db.connection(), db.connection():
        await db.pool.resize(4, 4)
        await asyncio.sleep(0.3)
        assert db.pool.counts()["total"] == 4
    await until(lambda: complete(db))
    assert db.pool.counts()["total"] == 4
    assert accounted(db)


async def test_a_smaller_pool_closes_what_is_too_much(make: Any, server_sessions: Any) -> None:
    db = await make(min_size=4, max_size=4, max_idle=0.2)
    await db.pool.resize(1, 2)
    await until(lambda: db.pool.counts()["total"] == 1)
    assert accounted(db)
    await until(lambda: server_sessions(NAME) == 1)


async def test_a_connection_past_its_lifetime_is_replaced_when_it_comes_back(make: Any) -> None:
    db = await make(min_size=2, max_size=2, max_lifetime=0.3)
    before = {conn.pgconn.backend_pid for conn in life(db.pool).idle}
    await asyncio.sleep(0.4)
    await asyncio.gather(*(query_for(db, 10) for _ in range(2)))
    await until(lambda: complete(db))
    assert not before & {conn.pgconn.backend_pid for conn in life(db.pool).idle}
    assert accounted(db)
