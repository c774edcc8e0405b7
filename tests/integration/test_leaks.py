"""Suspected leaks are reported once, and what was dropped is taken back."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import re
import threading
from collections.abc import Callable
from typing import Any, cast

import psycopg
import pytest

from poolkeeper import PoolManager
from tests.support.inside import life
from tests.support.programs import run_program
from tests.support.server import admin
from tests.support.waiting import until

MakeManager = Callable[..., PoolManager[Any]]

HERE = "tests/integration/test_leaks.py"


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> Callable[[str], list[str]]:
    """A function that returns poolkeeper's warnings with a word in them."""
    caplog.set_level(logging.WARNING, logger="poolkeeper")

    def find(word: str) -> list[str]:
        return [
            record.getMessage()
            for record in caplog.records
            if record.name == "poolkeeper" and word in record.getMessage()
        ]

    return find


Said = Callable[[str], list[str]]


# --- held for too long --------------------------------------------------------------------------


async def outer_caller(db: PoolManager[Any], until_then: asyncio.Event) -> None:
    await inner_caller(db, until_then)


async def inner_caller(db: PoolManager[Any], until_then: asyncio.Event) -> None:
    async with db.connection():
        await until_then.wait()


async def test_a_suspected_leak_is_reported_once_with_the_calls_that_led_to_it(
    make_manager: MakeManager, said: Said, caplog: pytest.LogCaptureFixture
) -> None:
    db = make_manager(min_size=2, name="orders", leak_threshold=0.1)
    await db.open()
    go_on = asyncio.Event()
    task = asyncio.create_task(outer_caller(db, go_on), name="report-7")
    await until(lambda: said("suspected leak"))
    assert [row.suspected_leak for row in db.snapshot().checkouts] == [True]
    await asyncio.sleep(0.4)
    (message,) = said("suspected leak")
    line = inner_caller.__code__.co_firstlineno + 1
    (record,) = (r for r in caplog.records if r.getMessage() == message)
    stack = vars(record)["stack"].splitlines()
    assert record.stack_info == vars(record)["stack"]  # where a formatter for people prints it
    assert re.match(r'pool "orders": suspected leak: a connection is held for \d\.\d s,', message)
    assert message.endswith(f' acquired in task "report-7" at {HERE}:{line} in inner_caller')
    assert any("in outer_caller" in entry for entry in stack)
    assert any("in inner_caller" in entry for entry in stack)
    assert "async with db.connection():" in stack[-1]
    assert db.snapshot().checkouts[0].stack == "\n".join(stack) + "\n"

    assert not said("no leak after all")
    go_on.set()
    await task
    (message,) = said("no leak after all")
    seconds = re.match(
        r'pool "orders": no leak after all: a connection was returned after (\d\.\d) s,', message
    )
    assert seconds is not None
    assert 0.4 <= float(seconds[1]) < 5
    assert message.endswith(f' acquired in task "report-7" at {HERE}:{line} in inner_caller')
    assert len(said("suspected leak")) == 1


async def test_nothing_is_reported_below_the_threshold(
    make_manager: MakeManager, said: Said
) -> None:
    db = make_manager(min_size=2, name="orders", leak_threshold=1.0)
    await db.open()
    for _ in range(5):
        async with db.connection():
            await asyncio.sleep(0.1)
    assert not said("leak")
    async with db.connection():
        await until(lambda: said("suspected leak"))
    assert len(said("leak")) == 2


async def test_each_checkout_is_suspected_for_itself(make_manager: MakeManager, said: Said) -> None:
    db = make_manager(min_size=2, name="orders", leak_threshold=0.05)
    await db.open()
    async with db.connection(), db.connection():
        await until(lambda: len(said("suspected leak")) == 2)
    async with db.connection():
        await until(lambda: len(said("suspected leak")) == 3)


async def test_without_a_threshold_nothing_is_kept_and_nothing_watched(
    make_manager: MakeManager, said: Said
) -> None:
    db = make_manager(min_size=1, name="orders")
    await db.open()
    assert life(db.pool).leak_timer is None
    async with db.connection():
        await asyncio.sleep(0.2)
        (row,) = db.snapshot().checkouts
        assert row.stack == ""
        assert not row.suspected_leak
    assert not said("leak")


async def test_the_watch_ends_with_the_pool(make_manager: MakeManager, said: Said) -> None:
    db = make_manager(min_size=1, name="orders", leak_threshold=0.05)
    await db.open()
    conn = await db.pool.getconn()
    timer = life(db.pool).leak_timer
    await db.close(timeout=0)
    assert timer is not None
    assert timer.cancelled()
    reports = len(said("suspected leak"))
    await asyncio.sleep(0.2)
    assert len(said("suspected leak")) == reports
    del conn


# --- dropped ------------------------------------------------------------------------------------


async def take_and_drop(db: PoolManager[Any], query: str = "select 1") -> int:
    """Acquire, use, and forget."""
    conn = await db.pool.getconn()
    await conn.execute(query)
    return int(conn.info.backend_pid)


async def test_a_connection_that_was_dropped_is_taken_back(
    make_manager: MakeManager, said: Said
) -> None:
    db = make_manager(min_size=1, max_size=1, name="orders", timeout=30)
    await db.open()
    pid = await asyncio.create_task(take_and_drop(db), name="careless")
    gc.collect()
    async with asyncio.timeout(10):
        assert await db.fetchval("select pg_backend_pid()") == pid
    (message,) = said("was dropped")
    assert re.match(
        r'pool "orders": a connection was dropped without being given back, after \d\.\d s,',
        message,
    )
    line = take_and_drop.__code__.co_firstlineno + 2
    assert message.endswith(
        f'acquired in task "careless" at {HERE}:{line} in take_and_drop; taken back'
    )
    await until(lambda: not life(db.pool).tasks.running)
    assert db.pool.counts() == {"total": 1, "in_use": 0, "idle": 1, "max": 1, "waiting": 0}
    assert not life(db.pool).ledger.held


async def test_a_connection_that_was_lost_and_dropped_leaves_its_place(
    make_manager: MakeManager, dsn: str
) -> None:
    db = make_manager(min_size=1, max_size=1, name="orders", timeout=30)
    await db.open()
    conn = await db.pool.getconn()
    admin(dsn, "select pg_terminate_backend(%s)", (conn.info.backend_pid,))
    with contextlib.suppress(psycopg.OperationalError):
        await conn.execute("select 1")
    assert conn.closed
    del conn
    gc.collect()
    async with asyncio.timeout(10):
        assert await db.fetchval("select 1") == 1
    assert not life(db.pool).ledger.held


async def test_a_task_that_waits_gets_what_another_has_dropped(make_manager: MakeManager) -> None:
    db = make_manager(min_size=1, max_size=1, name="orders", timeout=30)
    await db.open()
    conn = await db.pool.getconn()
    waiter = asyncio.create_task(db.fetchval("select 1"))
    await until(lambda: len(life(db.pool).line) == 1)
    del conn
    gc.collect()
    async with asyncio.timeout(10):
        assert await waiter == 1


@pytest.mark.parametrize("how", ["fails", "is cancelled"])
async def test_what_a_task_that_has_failed_still_held_is_taken_back(
    make_manager: MakeManager, said: Said, how: str
) -> None:
    """Its exception, which the task keeps, holds the frame that holds the connection."""

    async def take_and_fail() -> None:
        conn = await db.pool.getconn()
        await conn.execute("select 1")
        if how == "fails":
            raise RuntimeError
        cast("asyncio.Task[Any]", asyncio.current_task()).cancel()
        await asyncio.sleep(10)

    db = make_manager(min_size=1, max_size=1, name="orders", timeout=30)
    await db.open()
    failing = asyncio.create_task(take_and_fail(), name="careless")
    failing.add_done_callback(lambda task: task.cancelled() or task.exception())
    await asyncio.wait({failing})
    del failing
    async with asyncio.timeout(10):
        assert await db.fetchval("select 1") == 1
    (message,) = said("was dropped")
    assert 'in task "careless"' in message


async def test_what_was_open_on_a_dropped_connection_is_rolled_back(
    make_manager: MakeManager, dsn: str
) -> None:
    admin(dsn, "create table leaked (n int)")
    try:
        db = make_manager(min_size=1, max_size=1, name="orders", timeout=30)
        await db.open()
        await take_and_drop(db, "insert into leaked values (1)")
        gc.collect()
        async with asyncio.timeout(10):
            assert await db.fetchval("select count(*) from leaked") == 0
            async with db.connection() as conn:
                assert conn.info.transaction_status.name == "IDLE"
    finally:
        await db.close()
        admin(dsn, "drop table leaked")


async def test_the_collector_may_run_in_another_thread(
    make_manager: MakeManager, said: Said
) -> None:
    db = make_manager(min_size=1, max_size=1, name="orders", timeout=30)
    await db.open()
    box = [await db.pool.getconn()]
    pid = box[0].info.backend_pid

    dropped = threading.Event()

    def drop() -> None:
        box.clear()
        gc.collect()
        dropped.set()

    threading.Thread(target=drop).start()
    await asyncio.to_thread(dropped.wait)
    async with asyncio.timeout(10):
        assert await db.fetchval("select pg_backend_pid()") == pid
    assert len(said("was dropped")) == 1


async def test_a_cycle_of_references_is_collected_too(make_manager: MakeManager) -> None:
    db = make_manager(min_size=1, max_size=1, name="orders", timeout=30)
    await db.open()
    conn = await db.pool.getconn()
    conn.myself = conn  # type: ignore[attr-defined]
    del conn
    gc.collect()
    async with asyncio.timeout(10):
        assert await db.fetchval("select 1") == 1


async def test_a_block_that_is_dropped_half_way_gives_its_connection_back(
    make_manager: MakeManager,
) -> None:
    """A generator that nobody reads to its end, say."""
    db = make_manager(min_size=1, max_size=1, name="orders", timeout=30)
    await db.open()
    block = db.connection()
    await block.__aenter__()
    del block
    gc.collect()
    async with asyncio.timeout(10):
        assert await db.fetchval("select 1") == 1


async def test_a_dropped_connection_of_a_pool_that_was_closed_is_none_of_its_business(
    make_manager: MakeManager, said: Said, server_sessions: Callable[[str], int]
) -> None:
    db = make_manager(min_size=1, max_size=1, name="orders", application_name="dropped")
    await db.open()
    conn = await db.pool.getconn()
    await db.close(timeout=0)
    del conn
    gc.collect()
    await asyncio.sleep(0.05)
    assert not said("was dropped")
    await until(lambda: server_sessions("dropped") == 0)
    # Nor of the next life.
    await db.open()
    assert db.pool.counts() == {"total": 1, "in_use": 0, "idle": 1, "max": 1, "waiting": 0}


async def test_a_connection_dropped_just_before_the_pool_is_closed(
    make_manager: MakeManager, server_sessions: Callable[[str], int]
) -> None:
    db = make_manager(min_size=1, max_size=1, name="orders", application_name="dropped-late")
    for _ in range(3):
        await db.open()
        conn = await db.pool.getconn()
        del conn
        gc.collect()
        await db.close(timeout=0.2)
        await until(lambda: server_sessions("dropped-late") == 0)


async def test_a_connection_that_was_given_back_can_be_dropped_in_silence(
    make_manager: MakeManager, said: Said
) -> None:
    db = make_manager(min_size=1, max_size=1, name="orders")
    await db.open()
    conn = await db.pool.getconn()
    await db.pool.putconn(conn)
    del conn
    async with db.connection():
        pass
    gc.collect()
    await asyncio.sleep(0.02)
    assert not said("was dropped")


def test_in_a_forked_child_what_is_dropped_stays_the_parents(dsn: str, loop_name: str) -> None:
    ended = run_program(
        """
        import gc, logging
        logging.basicConfig(level=logging.INFO)
        from poolkeeper import PoolManager

        db = PoolManager(sys.argv[1], min_size=1, max_size=1, name="orders")

        async def main():
            await db.open()
            conn = await db.pool.getconn()
            await conn.execute("select 1")
            child = os.fork()
            if child == 0:
                del conn
                gc.collect()
                os._exit(0)
            _, status = await asyncio.to_thread(os.waitpid, child, 0)
            assert status == 0, status
            await conn.execute("select 2")       # the session is alive
            await conn.commit()
            await db.pool.putconn(conn)
            print("alive:", await db.fetchval("select 1"))
            await db.close()

        run(main())
        """,
        dsn,
        loop=loop_name,
    )
    assert ended.code == 0, ended.err
    assert ended.out == "alive: 1\n"
    assert "dropped" not in ended.err


async def test_many_are_dropped_and_none_is_lost(make_manager: MakeManager) -> None:
    # In autocommit: psycopg_pool logs a connection that it rolls back, and pytest keeps the record.
    db = make_manager(
        min_size=4, max_size=4, name="orders", timeout=30, kwargs={"autocommit": True}
    )
    await db.open()
    pids = {conn.info.backend_pid for conn in life(db.pool).idle}
    for _ in range(10):
        # More than there are connections: the later ones get what the earlier ones dropped.
        assert set(await asyncio.gather(*(take_and_drop(db) for _ in range(12)))) <= pids
    await until(lambda: len(life(db.pool).idle) == 4)
    assert {conn.info.backend_pid for conn in life(db.pool).idle} == pids


async def test_an_interrupted_owner_is_no_leak(make_manager: MakeManager, said: Said) -> None:
    db = make_manager(min_size=1, max_size=1, name="orders", leak_threshold=10)
    await db.open()
    task = asyncio.create_task(inner_caller(db, asyncio.Event()))
    await until(lambda: db.pool.counts()["in_use"] == 1)
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task
    assert db.pool.counts()["in_use"] == 0
    assert not said("leak")
    assert not said("dropped")
