"""
The internals that poolkeeper stands on, looked at on psycopg_pool's own pools.

A test here fails when a release of psycopg or psycopg_pool takes one of them away, or gives it
another meaning; `_compat` and `_connection` then have to follow.
"""

from __future__ import annotations

import asyncio
import gc
import inspect
import sys
from collections import Counter, deque
from collections.abc import AsyncIterator
from time import monotonic
from typing import Any

import psycopg
import psycopg_pool
import pytest
from psycopg import AsyncConnection, pq
from psycopg._connection_base import BaseConnection
from psycopg_pool import AsyncConnectionPool, PoolClosed
from psycopg_pool._acompat import AEvent
from psycopg_pool.pool_async import AddConnection, ShrinkPool, StopWorker

from poolkeeper import _compat
from poolkeeper._checkouts import Line, Waiter

BarePool = AsyncConnectionPool[Any]


@pytest.fixture
async def pool(dsn: str) -> AsyncIterator[BarePool]:
    """A pool of psycopg_pool's own: two connections, at most three."""
    async with AsyncConnectionPool(dsn, min_size=2, max_size=3, open=False) as pool:
        await pool.wait()
        yield pool


def a_waiter() -> Waiter:
    frame = sys._getframe()
    loop = asyncio.get_running_loop()
    return Waiter(loop, 30.0, monotonic() + 30.0, frame.f_code, frame.f_lineno)


async def make(pool: BarePool) -> AsyncConnection[Any]:
    """Make a connection for *pool*, as `BoundPool` does."""
    conninfo, kwargs = await _compat.parameters(pool)
    conn: AsyncConnection[Any] = await pool.connection_class.connect(conninfo, **kwargs)
    _compat.begin_lifetime(pool, conn)
    return conn


async def until(holds: Any) -> None:
    async with asyncio.timeout(10):
        while not holds():
            await asyncio.sleep(0.01)


async def end(tasks: list[asyncio.Task[None]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks, timeout=10)


# --- one life of a pool --------------------------------------------------------------------


def test_a_pool_that_was_never_opened_has_the_state_we_know() -> None:
    pool = AsyncConnectionPool("", min_size=2, max_size=3, open=False)
    state = vars(pool)
    assert (state["_closed"], state["_opened"], state["_growing"]) == (True, False, False)
    assert (state["_workers"], state["_sched_runner"]) == ([], None)
    assert (state["_nconns"], state["_nconns_min"], state["_drained_at"]) == (2, 2, 0.0)
    assert type(state["_pool"]) is type(state["_waiting"]) is deque
    assert type(state["_stats"]) is Counter
    assert "_lock" not in state
    assert not {"_tasks", "_sched"} & state.keys()


def test_a_constructor_leaves_no_attribute_out_of_a_new_life() -> None:
    """So running it again is a new life."""
    pool = AsyncConnectionPool("", open=False)
    names = set(vars(pool))
    for name in names:
        setattr(pool, name, "of the last life")
    _compat.begin_life(pool, Line(), {"conninfo": ""})
    assert set(vars(pool)) == names
    assert "of the last life" not in vars(pool).values()


async def test_a_pool_opens_again_only_after_begin_life(dsn: str) -> None:
    settings = {"conninfo": dsn, "min_size": 1, "name": "again"}
    pool = AsyncConnectionPool(open=False, **settings)  # type: ignore[arg-type]
    for _ in range(2):
        await pool.open(wait=True)
        assert isinstance(vars(pool)["_lock"], asyncio.Lock)
        await pool.close()
        with pytest.raises(PoolClosed):
            await pool.open()
        line = Line()
        idle = _compat.begin_life(pool, line, settings)
        assert pool._waiting is line
        assert pool._pool is idle
        assert pool.closed
        assert pool.name == "again"
        assert "_lock" not in vars(pool)


async def test_a_pool_serves_the_waiters_of_our_line_in_turn(dsn: str) -> None:
    pool = AsyncConnectionPool(dsn, min_size=1, open=False)
    line = Line()
    _compat.begin_life(pool, line, {"conninfo": dsn, "min_size": 1, "max_size": 1})
    gone, first, second = (a_waiter() for _ in range(3))
    for waiter in (gone, first, second):
        line.append(waiter)
    gone.future.cancel()
    await pool.open()
    try:
        conn = await asyncio.wait_for(asyncio.shield(first.future), 10)
        assert list(line) == [second]
        _compat.set_owner(conn, pool)
        await pool.putconn(conn)
        assert second.future.result() is conn
        _compat.set_owner(conn, pool)
        await pool.putconn(conn)
        assert list(pool._pool) == [conn]
    finally:
        await pool.close()


async def test_a_pool_that_closes_fails_the_waiters_of_our_line(dsn: str) -> None:
    pool = AsyncConnectionPool(dsn, min_size=0, max_size=1, open=False)
    line = Line()
    _compat.begin_life(pool, line, {"conninfo": dsn, "min_size": 0, "max_size": 1})
    await pool.open()
    waiter = a_waiter()
    line.append(waiter)
    await pool.close()
    assert isinstance(waiter.future.exception(), PoolClosed)
    assert not line


async def test_end_life_gives_the_connections_and_every_task_away(pool: BarePool) -> None:
    before = set(pool._pool)
    connections, tasks = _compat.end_life(pool)
    try:
        assert set(connections) == before
        assert len(before) == 2
        assert len(tasks) == pool.num_workers + 1
        ours = {task for task in asyncio.all_tasks() if task.get_name().startswith(pool.name)}
        assert set(tasks) == ours
        assert pool.closed
        assert not pool._pool
        with pytest.raises(PoolClosed):
            await pool.getconn()
    finally:
        await end(tasks)
        for conn in connections:
            await conn.close()
    assert _compat.end_life(pool) == ([], [])


async def test_end_life_of_a_pool_that_was_never_opened_gives_nothing() -> None:
    pool = AsyncConnectionPool("", open=False)
    assert _compat.end_life(pool) == ([], [])


async def test_after_refuse_clients_a_connection_that_comes_is_closed(pool: BarePool) -> None:
    held = await pool.getconn()
    made = await AsyncConnection.connect(pool.conninfo if isinstance(pool.conninfo, str) else "")
    (idle,) = _compat.refuse_clients(pool)
    assert pool.closed
    assert not pool._pool
    with pytest.raises(PoolClosed):
        await pool.getconn()
    await pool.putconn(held)
    assert held.closed
    await pool._add_to_pool(made)  # as a worker does that was connecting
    assert made.closed
    assert not idle.closed
    await idle.close()
    _, tasks = _compat.end_life(pool)
    assert len(tasks) == pool.num_workers + 1
    await end(tasks)


@pytest.mark.parametrize("forgotten", [False, True])
def test_a_forgotten_task_is_dropped_without_a_word(
    forgotten: bool, caplog: pytest.LogCaptureFixture
) -> None:
    loop = asyncio.SelectorEventLoop()

    async def wait_for_ever() -> None:
        await loop.create_future()

    task = loop.create_task(wait_for_ever())
    loop.run_until_complete(asyncio.sleep(0))
    loop.close()
    if forgotten:
        _compat.forget_task(task)
    task.get_coro().close()  # type: ignore[union-attr]
    del task
    gc.collect()
    assert ("Task was destroyed but it is pending" in caplog.text) is not forgotten


# --- a scheduler that can be cancelled --------------------------------------------------------


async def test_the_scheduler_of_a_pool_waits_on_the_event_that_we_replace(dsn: str) -> None:
    async with AsyncConnectionPool(dsn, min_size=0, max_size=1, open=False) as pool:
        assert type(pool._sched._event) is AEvent
        _compat.make_scheduler_endable(pool)
        assert type(pool._sched._event) is _compat._EndableEvent
        ran = asyncio.Event()

        async def note() -> None:
            ran.set()

        await asyncio.sleep(0)
        await pool._sched.enter(0.01, note)  # wakes it through its event
        await asyncio.wait_for(ran.wait(), 10)
        assert pool._sched_runner is not None
        pool._sched_runner.cancel()
        await asyncio.wait({pool._sched_runner}, timeout=10)
        assert pool._sched_runner.cancelled()
        pool._sched_runner = None


async def test_an_endable_event_ends_a_task_that_lost_its_cancellation() -> None:
    event = _compat._EndableEvent()
    ended = asyncio.Event()

    async def deaf() -> None:
        try:
            await asyncio.get_running_loop().create_future()
        except asyncio.CancelledError:
            event.set()
        try:
            await event.wait_timeout(0)
        finally:
            ended.set()

    task = asyncio.create_task(deaf())
    await asyncio.sleep(0)
    task.cancel()
    await asyncio.wait({task}, timeout=10)
    assert task.cancelled()
    assert ended.is_set()


async def test_an_endable_event_waits_as_an_event_does() -> None:
    event = _compat._EndableEvent()
    assert await event.wait_timeout(0.01) is False
    event.set()
    assert await event.wait_timeout(10) is True


# --- the stock of connections ----------------------------------------------------------------


async def test_the_first_idle_connection_is_the_next_one_handed_out(pool: BarePool) -> None:
    first, second = pool._pool
    assert await pool.getconn() is first
    assert list(pool._pool) == [second]
    await pool.putconn(first)
    assert list(pool._pool) == [second, first]


async def test_what_is_put_among_the_idle_is_handed_out(pool: BarePool) -> None:
    idle = pool._pool
    conn = idle.popleft()
    idle.append(conn)
    taken = [await pool.getconn() for _ in range(2)]
    assert taken[1] is conn
    for one in taken:
        await pool.putconn(one)


async def test_the_idle_connections_stay_in_one_deque_for_life(dsn: str) -> None:
    pool = AsyncConnectionPool(dsn, open=False)
    settings: dict[str, Any] = {"conninfo": dsn, "min_size": 1, "max_size": 2}
    idle = _compat.begin_life(pool, Line(), settings)
    await pool.open(wait=True)
    await pool.drain()
    await pool.resize(2, 2)
    await pool.wait()
    await pool.check()
    assert len(idle) == 2
    conn = await pool.getconn()
    assert len(idle) == 1
    await pool.putconn(conn)
    assert pool._pool is idle
    await pool.close()
    assert pool._pool is idle


async def test_the_low_mark_of_idle_connections_is_kept_as_psycopg_pool_keeps_it(
    pool: BarePool,
) -> None:
    pool._nconns_min = 2
    conn = await pool.getconn()
    assert pool._nconns_min == 1
    await pool.putconn(conn)
    pool._nconns_min = 2
    _compat.note_idle_low(pool, 1)
    assert pool._nconns_min == 1
    _compat.note_idle_low(pool, 2)
    assert pool._nconns_min == 1  # it only goes down


async def test_the_total_is_what_get_stats_calls_pool_size(pool: BarePool) -> None:
    assert _compat.total(pool) == pool.get_stats()["pool_size"] == 2
    conn = await pool.getconn()
    assert _compat.total(pool) == 2
    await pool.putconn(conn)


async def test_a_pool_grows_by_one_at_a_time_up_to_its_maximum(pool: BarePool) -> None:
    _compat.grow(pool)
    assert _compat.total(pool) == 3
    _compat.grow(pool)
    assert _compat.total(pool) == 3
    await until(lambda: len(pool._pool) == 3)
    await until(lambda: not pool._growing)
    _compat.grow(pool)
    assert _compat.total(pool) == 3


async def test_a_minimum_that_is_raised_asks_for_what_is_missing_and_no_more(
    pool: BarePool,
) -> None:
    _compat.grow(pool)
    assert _compat.total(pool) == 3
    _compat.resize(pool, 4, 5)
    assert (pool.min_size, pool.max_size, _compat.total(pool)) == (4, 5, 4)
    await until(lambda: len(pool._pool) == 4)
    _compat.resize(pool, 1, 2)
    assert (pool.min_size, pool.max_size, _compat.total(pool)) == (1, 2, 4)
    _compat.resize(pool, 2, None)
    assert (pool.min_size, pool.max_size) == (2, 2)
    with pytest.raises(ValueError, match="max_size must be greater or equal"):
        _compat.resize(pool, 3, 2)
    assert (pool.min_size, pool.max_size) == (2, 2)


async def test_a_lost_connection_is_replaced(pool: BarePool) -> None:
    conn = pool._pool.popleft()
    await conn.close()
    _compat.replace_lost(pool)
    assert _compat.total(pool) == 2
    await until(lambda: len(pool._pool) == 2)
    assert conn not in pool._pool
    assert next(iter(inspect.signature(AddConnection).parameters)) == "pool"


async def test_a_connection_found_dead_is_counted_as_lost(pool: BarePool) -> None:
    conn = pool._pool.popleft()
    await conn.close()
    _compat.replace_lost(pool, found_idle=True)
    assert pool.get_stats()["connections_lost"] == 1
    await until(lambda: len(pool._pool) == 2)


async def test_the_making_of_a_connection_is_told_from_other_work(pool: BarePool) -> None:
    assert _compat.adds_connection(AddConnection(pool))
    assert not _compat.adds_connection(ShrinkPool(pool))
    assert not _compat.adds_connection(StopWorker(pool))


async def test_psycopg_pool_asks_for_every_connection_through_run_task(dsn: str) -> None:
    """So a pool that overrides it makes them all."""
    asked: list[Any] = []

    class Redirected(AsyncConnectionPool[Any]):
        def run_task(self, task: Any) -> None:
            if _compat.adds_connection(task):
                asked.append(task)
            else:
                super().run_task(task)

    async with Redirected(dsn, min_size=2, max_size=3, open=False) as pool:
        assert len(asked) == 2  # open()
        for _ in range(2):
            await _compat.add(pool, await make(pool))
        await pool.resize(3, 4)
        assert len(asked) == 3
        await _compat.add(pool, await make(pool))
        await pool.drain()
        await until(lambda: len(asked) == 6)


async def test_the_parameters_of_a_connection_may_come_from_functions(dsn: str) -> None:
    async def conninfo() -> str:
        return dsn

    def kwargs() -> dict[str, Any]:
        return {"autocommit": True}

    pool: BarePool = AsyncConnectionPool(conninfo, kwargs=kwargs, open=False)
    assert await _compat.parameters(pool) == (dsn, {"autocommit": True})
    pool = AsyncConnectionPool(dsn, kwargs={"autocommit": True}, open=False)
    assert await _compat.parameters(pool) == (dsn, {"autocommit": True})
    pool = AsyncConnectionPool(open=False)
    assert await _compat.parameters(pool) == ("", {})


async def test_the_lifetime_of_a_connection_begins_when_it_is_told(pool: BarePool) -> None:
    conn: Any = await AsyncConnection.connect(pool.conninfo)
    assert not hasattr(conn, "_expire_at")
    _compat.begin_lifetime(pool, conn)
    assert conn._expire_at > conn._created_at > 0
    await conn.close()


async def test_a_connection_that_was_added_is_idle(pool: BarePool) -> None:
    pool._growing = True
    conn = await make(pool)
    await _compat.add(pool, conn)
    assert pool._pool[-1] is conn
    assert not pool._growing
    assert _compat.total(pool) == 2  # counted when it was asked for


async def test_the_growth_goes_on_while_anybody_waits(dsn: str) -> None:
    pool: BarePool = AsyncConnectionPool(dsn, min_size=0, max_size=2, open=False)
    line = Line()
    _compat.begin_life(pool, line, {"conninfo": dsn, "min_size": 0, "max_size": 2})
    await pool.open()
    try:
        waiters = [a_waiter() for _ in range(2)]
        for waiter in waiters:
            line.append(waiter)
        conn = await make(pool)
        pool._nconns += 1
        await _compat.add(pool, conn)
        assert waiters[0].future.result() is conn
        assert _compat.total(pool) == 2
        second = await asyncio.wait_for(waiters[1].future, 10)
        for one in (conn, second):
            await one.close()
    finally:
        await pool.close()


async def test_the_growth_goes_on_up_to_min_size(pool: BarePool) -> None:
    pool._nconns = 1
    lost = pool._pool.popleft()
    await lost.close()
    pool._growing = True
    await _compat.add(pool, await make(pool))
    assert _compat.total(pool) == 2
    await until(lambda: len(pool._pool) == 3)
    pool._nconns = 3  # what was added was not asked for


async def test_connections_that_are_not_needed_any_more_are_not_counted(pool: BarePool) -> None:
    pool._nconns += 1
    pool._growing = True
    _compat.forget_connections(pool, 1)
    assert _compat.total(pool) == 2
    assert not pool._growing


async def test_maintenance_that_works_needs_no_mending(pool: BarePool) -> None:
    before = [*pool._workers, pool._sched_runner]
    _compat.mend(pool)
    assert [*pool._workers, pool._sched_runner] == before


@pytest.mark.parametrize("killed", ["a worker", "the scheduler", "all", "forgotten"])
async def test_maintenance_that_somebody_cancelled_is_mended(pool: BarePool, killed: str) -> None:
    assert pool._sched_runner is not None
    before = [*pool._workers, pool._sched_runner]
    dead = {
        "a worker": before[:1],
        "the scheduler": before[-1:],
        "all": before,
        "forgotten": before[-1:],
    }[killed]
    await end(dead)
    if killed == "forgotten":
        pool._sched_runner = None
    _compat.mend(pool)
    after = [*pool._workers, pool._sched_runner]
    assert len(after) == len(before)
    assert not set(after) & set(before)
    await asyncio.wait(before, timeout=10)
    assert all(task.done() for task in before)
    await pool.resize(3, 3)  # the workers work
    await until(lambda: len(pool._pool) == 3)


async def test_a_connection_knows_the_pool_that_it_is_checked_out_of(pool: BarePool) -> None:
    conn = await pool.getconn()
    assert _compat.owner(conn) is pool
    await pool.putconn(conn)
    assert _compat.owner(conn) is None
    with pytest.raises(ValueError, match="doesn't come from any pool"):
        pool._check_pool_putconn(conn)
    conn = await pool.getconn()
    _compat.set_owner(conn, None)
    with pytest.raises(ValueError, match="doesn't come from any pool"):
        await pool.putconn(conn)
    _compat.set_owner(conn, pool)
    pool._check_pool_putconn(conn)
    await pool.putconn(conn)


async def test_a_connection_expires_after_max_lifetime(dsn: str) -> None:
    async with AsyncConnectionPool(dsn, min_size=1, max_lifetime=100, open=False) as pool:
        conn = await pool.getconn()
        assert not _compat.is_expired(pool, conn, monotonic())
        assert 94 < conn._expire_at - conn._created_at <= 100
        assert conn._created_at <= monotonic() < conn._expire_at
        conn._expire_at = monotonic()
        assert _compat.is_expired(pool, conn, monotonic())
        await pool.putconn(conn)
        assert conn.closed


async def test_a_connection_older_than_a_drain_is_expired(pool: BarePool) -> None:
    conn = await pool.getconn()
    await pool.drain()
    assert _compat.is_expired(pool, conn, monotonic())
    await pool.putconn(conn)
    assert conn.closed
    conn = await pool.getconn()
    assert not _compat.is_expired(pool, conn, monotonic())
    await pool.putconn(conn)


async def test_a_connection_is_put_back_idle_in_the_callers_task(pool: BarePool) -> None:
    conn = await pool.getconn()
    await conn.execute("create temporary table t ()")
    await _compat.put_back(pool, conn)
    assert conn in pool._pool
    assert conn.pgconn.transaction_status == pq.TransactionStatus.IDLE
    conn = pool._pool.pop()
    _compat.set_owner(conn, pool)
    cursor = await conn.execute("select to_regclass('t')")
    assert await cursor.fetchone() == (None,)
    await pool.putconn(conn)


async def test_a_connection_put_back_is_reset_in_the_callers_task(dsn: str) -> None:
    tasks = []

    async def reset(conn: Any) -> None:
        tasks.append(asyncio.current_task())

    async with AsyncConnectionPool(dsn, min_size=1, reset=reset, open=False) as pool:
        conn = await pool.getconn()
        await _compat.put_back(pool, conn)
        assert tasks == [asyncio.current_task()]
        assert conn in pool._pool


@pytest.mark.parametrize(
    ("from_getconn", "counter"), [(False, "returns_bad"), (True, "connections_lost")]
)
async def test_a_broken_connection_put_back_is_counted_and_replaced(
    pool: BarePool, from_getconn: bool, counter: str
) -> None:
    conn = await pool.getconn()
    conn.pgconn.finish()
    await _compat.put_back(pool, conn, from_getconn=from_getconn)
    assert pool.get_stats()[counter] == 1
    await until(lambda: len(pool._pool) == 2)
    assert conn not in pool._pool


async def test_a_connection_put_back_into_a_closed_pool_is_closed(
    dsn: str, caplog: pytest.LogCaptureFixture
) -> None:
    async def reset(conn: Any) -> None:
        raise AssertionError("nobody will use it any more")

    pool = AsyncConnectionPool(dsn, min_size=1, reset=reset, open=False)
    await pool.open(wait=True)
    conn = await pool.getconn()
    await pool.close()
    caplog.clear()
    await _compat.put_back(pool, conn)
    assert conn.closed
    assert _compat.owner(conn) is None
    assert not caplog.records


async def test_counters_are_those_of_get_stats(pool: BarePool) -> None:
    pool.pop_stats()
    counters = {
        pool._REQUESTS_NUM: "requests_num",
        pool._REQUESTS_QUEUED: "requests_queued",
        pool._REQUESTS_WAIT_MS: "requests_wait_ms",
        pool._REQUESTS_ERRORS: "requests_errors",
        pool._CONNECTIONS_NUM: "connections_num",
        pool._CONNECTIONS_ERRORS: "connections_errors",
        pool._CONNECTIONS_MS: "connections_ms",
        pool._USAGE_MS: "usage_ms",
        pool._RETURNS_BAD: "returns_bad",
    }
    for key, name in counters.items():
        _compat.count(pool, key)
        _compat.count(pool, key, 2)
        assert pool.get_stats()[name] == 3


# --- the classes that ours override ------------------------------------------------------------


def test_the_methods_that_we_override_have_the_signatures_we_know() -> None:
    def parameters(function: Any) -> list[str]:
        return list(inspect.signature(function).parameters)

    assert parameters(AsyncConnectionPool.open) == ["self", "wait", "timeout"]
    assert parameters(AsyncConnectionPool.wait) == ["self", "timeout"]
    assert parameters(AsyncConnectionPool.close) == ["self", "timeout"]
    assert parameters(AsyncConnectionPool.connection) == ["self", "timeout"]
    assert parameters(AsyncConnectionPool.getconn) == ["self", "timeout"]
    assert parameters(AsyncConnectionPool.putconn) == ["self", "conn"]
    assert parameters(AsyncConnectionPool.resize) == ["self", "min_size", "max_size"]
    assert parameters(AsyncConnectionPool.worker) == ["q"]
    assert parameters(AsyncConnection.wait)[:2] == ["self", "gen"]  # the rest is passed on
    assert parameters(AsyncConnection.cancel_safe) == ["self", "timeout"]
    assert parameters(BaseConnection._notice_handler)[0] == "wself"
    assert parameters(BaseConnection._notify_handler)[0] == "wself"


def test_there_is_no_public_method_of_a_pool_that_we_have_not_looked_at() -> None:
    public = {name for name in vars(psycopg_pool.AsyncConnectionPool) if not name.startswith("_")}
    assert public == {
        "check", "check_connection", "close", "connection", "drain", "getconn", "open", "putconn",
        "reconnect_failed", "resize", "run_task", "schedule_task", "wait", "worker",
    }  # fmt: skip


async def test_a_connection_has_the_attributes_that_a_handle_is_made_of(dsn: str) -> None:
    """
    A handle is made from all the attributes of a connection, but for those of one checkout.

    So each one that is new has to be looked at: does it belong to the session or the checkout?
    """
    settings = {
        "_autocommit", "_deferrable", "_isolation_level", "_read_only", "_begin_statement",
        "row_factory", "cursor_factory", "server_cursor_factory", "_adapters",
    }  # fmt: skip
    of_the_session = {"pgconn", "_prepared", "_closed"}
    of_the_checkout = {
        "lock", "_notice_handlers", "_notify_handlers", "_notifies_backlog", "_num_transactions",
        "_tpc", "_pipeline",
    }  # fmt: skip
    async with await AsyncConnection.connect(dsn) as conn:
        assert set(vars(conn)) == settings | of_the_session | of_the_checkout
        # Those that need no clearing for the next checkout.
        assert (conn._num_transactions, conn._tpc, conn._pipeline) == (0, None, None)
        assert conn._prepared.prepare_threshold == 5
        assert conn._prepared.prepared_max == 100
        assert isinstance(conn._notifies_backlog, deque)
        assert type(conn.lock) is asyncio.Lock


def test_a_handle_can_be_turned_into_one_that_refuses() -> None:
    """By assignment to ``__class__``, which ``__slots__`` would forbid."""
    assert not any("__slots__" in vars(cls) for cls in (BaseConnection, AsyncConnection))


def test_these_are_the_versions_that_we_support() -> None:
    def numbers(version: str) -> tuple[int, ...]:
        return tuple(int(number) for number in version.split(".")[:2])

    assert numbers(psycopg.__version__) >= (3, 3)
    assert numbers(psycopg_pool.__version__) >= (3, 3)
