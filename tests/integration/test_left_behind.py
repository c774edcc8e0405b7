"""What a borrower leaves under way when it gives its connection back: streams, cancellations."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable
from typing import Any

import psycopg
import pytest
from psycopg import waiting

from poolkeeper import PoolManager, ReleasedConnectionError
from tests.support.proxy import FaultProxy
from tests.support.server import admin, endless, is_at_work
from tests.support.waiting import eventually

MakeManager = Callable[..., PoolManager[Any]]
MANY = "select generate_series(1, 20000)"


@pytest.fixture
async def one(make_manager: MakeManager, caplog: pytest.LogCaptureFixture) -> PoolManager[Any]:
    """A manager with a single connection."""
    caplog.set_level(logging.WARNING)
    db = make_manager(min_size=1, max_size=1, name="orders", timeout=10)
    await db.open()
    return db


async def pid_of(db: PoolManager[Any]) -> int:
    """The server process that the next borrower gets."""
    async with db.connection() as conn:
        return conn.info.backend_pid


def by_name(value: Any) -> str:
    return str(value.__name__)


# --- a client that leaves in the middle of a stream ---------------------------------------------


async def next_of_stream(conn: Any) -> Any:
    rows = conn.cursor().stream(MANY)
    await anext(rows)
    return rows


async def next_of_notifies(conn: Any) -> Any:
    await conn.set_autocommit(True)
    await conn.execute("listen left_behind")
    await conn.execute("notify left_behind")
    await conn.execute("notify left_behind")
    notices = conn.notifies(timeout=30)
    await anext(notices)
    return notices


async def next_of_copy(conn: Any) -> Any:
    block = conn.cursor().copy(f"copy ({MANY}) to stdout")
    await (await block.__aenter__()).read()
    return block


HALF_WAY = [next_of_stream, next_of_notifies, next_of_copy]


@pytest.mark.parametrize("kept", [True, False], ids=["kept", "dropped"])
@pytest.mark.parametrize("start", HALF_WAY, ids=by_name)
@pytest.mark.parametrize("leave", ["raise", "cancel", "end", "putconn"])
async def test_a_client_that_leaves_half_way_costs_no_connection(
    one: PoolManager[Any],
    caplog: pytest.LogCaptureFixture,
    start: Callable[[Any], Awaitable[Any]],
    leave: str,
    kept: bool,
) -> None:
    """Whether or not anybody holds the generator, which holds the lock of the connection."""
    keep = []
    begun = asyncio.Event()
    pid = await pid_of(one)

    async def by_block() -> None:
        async with one.connection() as conn:
            half_way = await start(conn)
            if kept:
                keep.append(half_way)
            del half_way
            begun.set()
            if leave == "cancel":
                await asyncio.sleep(60)
            if leave == "raise":
                raise KeyError(1)

    async def by_hand() -> None:
        conn = await one.pool.getconn()
        keep.append(await start(conn))
        await one.pool.putconn(conn)

    task = asyncio.ensure_future(by_hand() if leave == "putconn" else by_block())
    if leave == "cancel":
        await begun.wait()
        task.cancel()
    async with asyncio.timeout(10):
        await asyncio.wait({task})
    if not task.cancelled():
        assert isinstance(task.exception(), KeyError if leave == "raise" else type(None))
    assert await pid_of(one) == pid
    assert await one.fetchval("select 42") == 42
    assert "at work" not in caplog.text
    assert one.pool.get_stats().get("returns_bad", 0) == 0


async def test_what_was_done_before_a_stream_that_was_left_open_is_committed(
    one: PoolManager[Any], dsn: str
) -> None:
    """The rest of it is read, not cancelled: that would abort the transaction."""
    admin(dsn, "drop table if exists left_open; create table left_open (n int)")
    async with asyncio.timeout(10):
        async with one.connection() as conn:
            await conn.execute("insert into left_open values (1)")
            rows = conn.cursor().stream("select generate_series(1, 100)")
            assert await anext(rows) == (1,)
    assert admin(dsn, "select n from left_open") == [(1,)]
    with pytest.raises(ReleasedConnectionError):
        await anext(rows)
    admin(dsn, "drop table left_open")


async def test_a_client_that_leaves_while_its_block_commits_is_rolled_back_without_a_warning(
    one: PoolManager[Any], caplog: pytest.LogCaptureFixture
) -> None:
    """As one that leaves before: psycopg_pool warns of an open transaction, without a line."""
    keep = []
    ends = asyncio.Event()

    async def block() -> None:
        async with one.connection() as conn:
            keep.append(await next_of_stream(conn))  # so the end of the block takes a while
            ends.set()

    pid = await pid_of(one)
    task = asyncio.create_task(block())
    await ends.wait()
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await pid_of(one) == pid
    assert not caplog.records


@pytest.mark.parametrize("start", HALF_WAY, ids=by_name)
async def test_who_comes_to_its_end_late_does_not_disturb_the_next_borrower(
    one: PoolManager[Any], dsn: str, start: Callable[[Any], Awaitable[Any]]
) -> None:
    """A generator's end cancels what runs on the session, as far as psycopg is concerned."""
    conn = await one.pool.getconn()
    half_way = await start(conn)
    await one.pool.putconn(conn)
    async with one.connection() as other:
        pid = other.info.backend_pid
        with endless(dsn) as lasting:
            query = asyncio.ensure_future(other.execute(f"select {lasting}, 5"))
            assert await asyncio.to_thread(eventually, lambda: is_at_work(dsn, pid))
            with contextlib.suppress(ReleasedConnectionError):
                if hasattr(half_way, "aclose"):
                    await half_way.aclose()
                else:
                    await half_way.__aexit__(KeyError, KeyError(1), None)
        assert await (await query).fetchone() == ("", 5)
        assert other.lock.locked() is False


async def test_a_child_that_works_off_its_stream_is_waited_for(one: PoolManager[Any]) -> None:
    """As psycopg's commit does."""
    rows = []

    async def child(conn: Any) -> None:
        async for row in conn.cursor().stream("select generate_series(1, 20)"):
            rows.append(row)
            await asyncio.sleep(0.01)

    async with one.connection() as conn:
        task = asyncio.ensure_future(child(conn))
        while not rows:
            await asyncio.sleep(0)
    await task
    assert len(rows) == 20


# --- cancelled while it enters pipeline mode ----------------------------------------------------


async def pipeline(conn: Any) -> None:
    async with conn.pipeline():
        await conn.execute("select 1")


async def pipeline_and_transaction(conn: Any) -> None:
    async with conn.pipeline(), conn.transaction():
        await conn.execute("select 1")


async def executemany(conn: Any) -> None:
    await conn.cursor().executemany("select %s::int", [(n,) for n in range(5)], returning=True)


@pytest.mark.parametrize("work", [pipeline, pipeline_and_transaction, executemany], ids=by_name)
async def test_a_cancellation_at_any_turn_of_a_pipeline_keeps_the_connection(
    one: PoolManager[Any], monkeypatch: pytest.MonkeyPatch, work: Callable[[Any], Awaitable[None]]
) -> None:
    monkeypatch.setattr(waiting, "MAX_BUSY_TIME", 0.0, raising=False)  # it yields where it can
    pid = await pid_of(one)

    async def use() -> None:
        async with one.connection() as conn:
            await work(conn)

    for turns in range(20):
        task = asyncio.ensure_future(use())
        for _ in range(turns):
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait({task})
        async with one.connection() as conn:
            assert conn.info.backend_pid == pid
            assert conn.pgconn.pipeline_status == psycopg.pq.PipelineStatus.OFF
            assert await (await conn.execute("select 42")).fetchone() == (42,)


async def test_the_late_end_of_a_pipeline_does_not_end_that_of_the_next_borrower(
    one: PoolManager[Any],
) -> None:
    conn = await one.pool.getconn()
    block = conn.pipeline()
    await block.__aenter__()
    await one.pool.putconn(conn)
    async with one.connection() as other, other.pipeline():
        with pytest.raises(ReleasedConnectionError):
            await block.__aexit__(None, None, None)
        assert other.pgconn.pipeline_status == psycopg.pq.PipelineStatus.ON
        cursor = await other.execute("select 42")
        assert await cursor.fetchone() == (42,)


# --- a request to cancel that is under way ------------------------------------------------------


async def cancel_safe(conn: Any) -> None:
    await conn.cancel_safe(timeout=5)


async def cancel_in_thread(conn: Any) -> None:
    await asyncio.to_thread(conn.cancel)


async def cancel_safe_cancelled(conn: Any) -> None:
    request = asyncio.ensure_future(conn.cancel_safe(timeout=5))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    request.cancel()
    await asyncio.wait({request})


@pytest.mark.parametrize("cancel", [cancel_safe, cancel_in_thread, cancel_safe_cancelled],
                         ids=by_name)  # fmt: skip
async def test_a_request_to_cancel_does_not_reach_the_query_of_the_next_borrower(
    one: PoolManager[Any], cancel: Callable[[Any], Awaitable[None]]
) -> None:
    """A watchdog, say, whose time was up just as its query ended."""
    pid = await pid_of(one)
    for turn in range(20):
        async with one.connection() as conn:
            await conn.set_autocommit(True)
            await conn.execute("select 1")
            watchdog = asyncio.ensure_future(cancel(conn))
            for _ in range(1 + turn % 4):
                await asyncio.sleep(0)
        assert await one.fetchval("select 42 from pg_sleep(0.02)") == 42
        await watchdog
    assert await pid_of(one) == pid


async def test_a_request_to_cancel_that_is_not_answered_ends_its_session(
    make_manager: MakeManager, proxy: FaultProxy
) -> None:
    """It may arrive at any time, and nobody is to have a session that it stops."""
    db = make_manager(proxy.dsn, min_size=1, max_size=1, name="orders", timeout=20)
    await db.open()
    async with db.connection() as conn:
        pid = conn.info.backend_pid
        await conn.set_autocommit(True)
        proxy.silent = True
        request = asyncio.ensure_future(conn.cancel_safe(timeout=20))
        await asyncio.sleep(0.05)
    proxy.silent = False
    assert await pid_of(db) != pid
    request.cancel()
    proxy.cut()
    await asyncio.wait({request})


async def test_a_request_to_cancel_may_be_cancelled_with_all_tasks(
    make_manager: MakeManager, proxy: FaultProxy
) -> None:
    """As at the end of a loop. No callback fails."""
    loop, failed = asyncio.get_running_loop(), []
    loop.set_exception_handler(lambda _loop, context: failed.append(context))
    db = make_manager(proxy.dsn, min_size=1, max_size=1, name="orders", timeout=20)
    await db.open()
    async with db.connection() as conn:
        before = asyncio.all_tasks()
        proxy.silent = True
        request = asyncio.ensure_future(conn.cancel_safe(timeout=20))
        await asyncio.sleep(0.05)
        its = asyncio.all_tasks() - before
        assert len(its) > 1
        for task in its:
            task.cancel()
        await asyncio.wait(its)
        assert request.cancelled()
        proxy.silent = False
    assert await db.fetchval("select 42") == 42
    assert not failed


async def test_a_stream_that_is_left_on_a_connection_that_is_lost_meanwhile_ends_in_silence(
    make_manager: MakeManager, proxy: FaultProxy
) -> None:
    """While the server is asked to stop it, the session is closed under it: nothing is raised."""
    db = make_manager(proxy.dsn, min_size=1, max_size=1, name="orders", timeout=20)
    await db.open()
    async with db.connection() as conn:
        stream = conn.cursor().stream("select generate_series(1, 100000)")
        assert await anext(stream) == (1,)
        proxy.silent = True  # to the request to stop it
        closing = asyncio.ensure_future(stream.aclose())
        await asyncio.sleep(0.1)
        conn.pgconn.finish()
        await closing
        proxy.silent = False
    assert await db.fetchval("select 42") == 42
