"""What a pool says of a program, and does for it, a sandbox does as well."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from typing import Any

import psycopg
import pytest
from psycopg import IsolationLevel

from poolkeeper import AcquireTimeout, PoolManager
from poolkeeper.events import Acquired, LeakSuspected, Released
from poolkeeper.testing import SandboxError, sandbox

MakeManager = Callable[..., PoolManager]
Program = Callable[[PoolManager], Awaitable[Any]]


@pytest.fixture
def things(database: str) -> str:
    with psycopg.connect(database, autocommit=True) as conn:
        conn.execute("create table things (n int primary key)")
    return database


@pytest.fixture
async def db(things: str, make_manager: MakeManager) -> AsyncIterator[PoolManager]:
    async with make_manager(things, min_size=1, max_size=3, timeout=60, name="things") as manager:
        yield manager
        assert manager.snapshot().in_use == 0


def event_names(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [name for record in caplog.records if (name := getattr(record, "event_name", ""))]


# --- what is told of work that is not committed ----------------------------------------------


async def work_that_is_given_back(db: PoolManager) -> None:
    conn = await db.pool.getconn()
    await conn.execute("insert into things values (1)")
    await db.pool.putconn(conn)


async def reading_that_is_given_back(db: PoolManager) -> None:
    conn = await db.pool.getconn()
    await conn.execute("select 1")
    await db.pool.putconn(conn)


async def reading_after_work_that_is_committed(db: PoolManager) -> None:
    conn = await db.pool.getconn()
    await conn.execute("insert into things values (1)")
    await conn.commit()
    await conn.execute("select * from things")
    await db.pool.putconn(conn)


async def work_that_has_failed_and_is_given_back(db: PoolManager) -> None:
    conn = await db.pool.getconn()
    await conn.execute("insert into things values (1)")
    with suppress(psycopg.Error):
        await conn.execute("select 1/0")
    await db.pool.putconn(conn)


async def an_error_that_is_swallowed(db: PoolManager) -> None:
    async with db.connection() as conn:
        await conn.execute("insert into things values (1)")
        with suppress(psycopg.Error):
            await conn.execute("select 1/0")


async def an_error_of_the_first_statement_that_is_swallowed(db: PoolManager) -> None:
    async with db.connection() as conn:
        with suppress(psycopg.Error):
            await conn.execute("select 1/0")


async def the_same_after_a_commit(db: PoolManager) -> None:
    async with db.connection() as conn:
        await conn.execute("insert into things values (1)")
        await conn.commit()
        with suppress(psycopg.Error):
            await conn.execute("select 1/0")


async def an_error_that_a_transaction_swallows(db: PoolManager) -> None:
    async with db.transaction() as conn:
        await conn.execute("insert into things values (1)")
        with suppress(psycopg.Error):
            await conn.execute("select 1/0")


async def a_block_that_is_left_open_in_autocommit(db: PoolManager) -> None:
    conn = await db.pool.getconn()
    await conn.set_autocommit(True)
    block = conn.transaction()
    await block.__aenter__()
    await conn.execute("insert into things values (1)")
    await db.pool.putconn(conn)
    with suppress(psycopg.Error):
        await block.__aexit__(None, None, None)


async def a_stream_that_is_left_open(db: PoolManager) -> None:
    conn = await db.pool.getconn()
    await conn.execute("insert into things values (1)")
    stream = conn.cursor().stream("select generate_series(1, 3)")
    await anext(stream)
    await db.pool.putconn(conn)
    with suppress(psycopg.Error):
        await stream.aclose()


async def a_copy_that_is_left_open(db: PoolManager) -> None:
    conn = await db.pool.getconn()
    await conn.execute("insert into things values (1)")
    await conn.cursor().copy("copy things from stdin").__aenter__()
    await db.pool.putconn(conn)


async def a_copy_of_rows_that_is_left_open(db: PoolManager) -> None:
    conn = await db.pool.getconn()
    await conn.cursor().copy("copy (select generate_series(1, 9)) to stdout").__aenter__()
    await db.pool.putconn(conn)


async def one_that_a_task_is_at_work_on(db: PoolManager) -> None:
    conn = await db.pool.getconn()
    task = asyncio.create_task(conn.execute("select pg_sleep(60)"))
    while not conn.lock.locked():
        await asyncio.sleep(0)
    await db.pool.putconn(conn)
    with pytest.raises(psycopg.InterfaceError, match="given back while a task was at work on it"):
        await task


async def settings_that_are_put_back(db: PoolManager) -> str:
    async with db.connection() as conn:
        await conn.execute("set timezone to 'Asia/Tokyo'")
    return str(await db.fetchval("show timezone"))


PROGRAMS: list[Program] = [
    work_that_is_given_back,
    reading_that_is_given_back,
    reading_after_work_that_is_committed,
    work_that_has_failed_and_is_given_back,
    an_error_that_is_swallowed,
    an_error_of_the_first_statement_that_is_swallowed,
    the_same_after_a_commit,
    an_error_that_a_transaction_swallows,
    a_block_that_is_left_open_in_autocommit,
    a_stream_that_is_left_open,
    a_copy_that_is_left_open,
    a_copy_of_rows_that_is_left_open,
    one_that_a_task_is_at_work_on,
    settings_that_are_put_back,
]


@pytest.mark.leaves_behind
@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.__name__)
async def test_it_tells_what_the_pool_tells(
    things: str, make_manager: MakeManager, caplog: pytest.LogCaptureFixture, program: Program
) -> None:
    """The events that are logged, with their lines, and what is there afterwards."""
    caplog.set_level(logging.INFO, "poolkeeper")

    async def outcome(db: PoolManager) -> tuple[Any, ...]:
        caplog.clear()
        result = await program(db)
        rows = await db.fetchall("select n from things")
        said = [
            (getattr(record, "event_name", ""), getattr(record, "site", ""))
            for record in caplog.records
            if record.name == "poolkeeper"
        ]
        return result, rows, said

    async with make_manager(things, min_size=1, max_size=3, name="things") as db:
        real = await outcome(db)
        await db.execute("delete from things")
    async with make_manager(things, min_size=1, max_size=3, name="things") as db, sandbox(db):
        assert await outcome(db) == real


async def test_a_class_whose_block_leaves_a_transaction_open_is_told_of(
    things: str, make_manager: MakeManager, caplog: pytest.LogCaptureFixture
) -> None:
    class Careless(psycopg.AsyncConnection[Any]):
        async def __aexit__(self, *_: object) -> None:
            pass

    async with make_manager(things, min_size=1, connection_class=Careless) as db, sandbox(db):
        async with db.connection() as conn:
            await conn.execute("insert into things values (1)")
        assert await db.fetchall("select n from things") == []
    assert event_names(caplog) == ["poolkeeper.transaction_left"]


async def test_what_an_outer_transaction_has_undone_is_not_told_again(
    db: PoolManager, caplog: pytest.LogCaptureFixture
) -> None:
    async with sandbox(db):
        async with db.connection() as outer:
            await outer.execute("select 1")
            inner = await db.pool.getconn()
            await inner.execute("insert into things values (1)")
            await outer.rollback()
            await db.pool.putconn(inner)
        assert await db.fetchall("select n from things") == []
    assert event_names(caplog) == []


async def test_a_session_in_a_pipeline_that_has_not_ended_is_not_used_again(
    db: PoolManager, caplog: pytest.LogCaptureFixture
) -> None:
    async with sandbox(db):
        conn = await db.pool.getconn()
        pipeline = conn.pipeline()
        await pipeline.__aenter__()
        await conn.execute("insert into things values (1)")
        await db.pool.putconn(conn)
        with pytest.raises(SandboxError, match="is gone"):
            await db.fetchval("select 1")
        with pytest.raises(psycopg.Error):
            await pipeline.__aexit__(None, None, None)
    assert event_names(caplog) == ["poolkeeper.connection_in_pipeline"]
    assert await db.fetchall("select n from things") == []


async def test_who_has_subscribed_is_told_of_each_checkout(db: PoolManager) -> None:
    told: list[Any] = []
    async with sandbox(db):
        unsubscribe = db.subscribe(told.append, Acquired, Released)
        async with db.connection() as conn:
            await conn.execute("select 1")
        unsubscribe()
        await db.fetchval("select 1")
    acquired, released = told
    assert isinstance(acquired, Acquired)
    assert isinstance(released, Released)
    function = "test_who_has_subscribed_is_told_of_each_checkout"
    assert acquired.caller.function == released.caller.function == function
    assert released.exchanges >= 1


async def test_a_test_that_takes_long_is_no_leak(
    things: str, make_manager: MakeManager, caplog: pytest.LogCaptureFixture
) -> None:
    told: list[LeakSuspected] = []
    async with make_manager(things, min_size=1, max_size=2, leak_threshold=0.02) as db:
        db.subscribe(told.append, LeakSuspected)
        async with sandbox(db):
            await asyncio.sleep(0.2)
            assert not told
        assert "leak" not in caplog.text
        conn = await db.pool.getconn()
        while not told:
            await asyncio.sleep(0.01)
        await db.pool.putconn(conn)


# --- the user's callbacks --------------------------------------------------------------------


async def test_check_and_reset_are_called(things: str, make_manager: MakeManager) -> None:
    """And what they do on the server is there, as it is by the pool."""
    called: list[str] = []

    async def check(conn: Any) -> None:
        called.append("check")
        await conn.execute("select 1")
        await conn.rollback()

    async def reset(conn: Any) -> None:
        called.append("reset")
        await conn.set_autocommit(True)
        await conn.execute("select set_config('app.tenant', '', false)")

    async with make_manager(things, min_size=1, check=check, reset=reset) as db, sandbox(db):
        called.clear()
        async with db.connection() as conn:
            await conn.execute("select set_config('app.tenant', 'tenant-1', false)")
            async with db.connection() as inner:  # it lies within: reset would be its too
                cursor = await inner.execute("select current_setting('app.tenant', true)")
                assert await cursor.fetchone() == ("tenant-1",)
            cursor = await conn.execute("select current_setting('app.tenant', true)")
            assert await cursor.fetchone() == ("tenant-1",)
        assert called == ["check", "check", "reset"]
        assert await db.fetchval("select current_setting('app.tenant', true)") == ""


async def test_a_reset_that_fails_is_told_and_takes_nothing_back(
    things: str, make_manager: MakeManager, caplog: pytest.LogCaptureFixture
) -> None:
    async def reset(conn: Any) -> None:
        await conn.execute("select 1/0")

    async with make_manager(things, min_size=1, reset=reset) as db, sandbox(db):
        await db.execute("insert into things values (1)")
        assert await db.fetchall("select n from things") == [(1,)]
    assert "poolkeeper.connection_out_of_order" in {
        getattr(record, "event_name", "") for record in caplog.records
    }


async def test_discard_is_done_as_far_as_a_transaction_can(
    things: str, make_manager: MakeManager
) -> None:
    async def configure(conn: Any) -> None:
        await conn.set_autocommit(True)
        await conn.execute("set statement_timeout to '7s'")
        await conn.set_autocommit(False)

    db = make_manager(things, min_size=1, configure=configure, reset="discard")
    async with db, sandbox(db):
        async with db.connection() as conn:
            await conn.execute("set statement_timeout to '9s'")
            await conn.execute("create temporary table own (n int)")
            await conn.execute("select 1", prepare=True)
        assert await db.fetchval("show statement_timeout") == "7s"
        assert await db.fetchval("select to_regclass('own')") is None
        assert await db.fetchval("select count(*) from pg_prepared_statements") == 0


async def test_discard_needs_no_configure(things: str, make_manager: MakeManager) -> None:
    async with make_manager(things, min_size=1, reset="discard") as db, sandbox(db):
        before = await db.fetchval("show statement_timeout")
        async with db.connection() as conn:
            await conn.execute("set statement_timeout to '9s'")
        assert await db.fetchval("show statement_timeout") == before


async def test_a_reset_that_leaves_a_transaction_is_told(
    things: str, make_manager: MakeManager, caplog: pytest.LogCaptureFixture
) -> None:
    async def reset(conn: Any) -> None:
        await conn.execute("insert into things values (2)")

    async with make_manager(things, min_size=1, reset=reset) as db, sandbox(db):
        async with db.connection() as conn:
            await conn.execute("insert into things values (1)")
        async with db.connection() as conn:
            cursor = await conn.execute("select n from things")
            assert await cursor.fetchall() == [(1,)]
    assert "left the connection in a transaction" in caplog.text


async def test_what_a_check_leaves_open_is_taken_back_where_it_refuses(
    things: str, make_manager: MakeManager
) -> None:
    refuses = False

    async def check(conn: Any) -> None:
        nonlocal refuses
        if refuses:
            refuses = False
            await conn.execute("insert into things values (1)")
            raise ValueError("no")

    async with make_manager(things, min_size=1, check=check, timeout=60) as db, sandbox(db):
        refuses = True
        assert await db.fetchval("select count(*) from things") == 0
        assert not refuses
        await db.execute("insert into things values (2)")
        assert await db.fetchall("select n from things") == [(2,)]


async def test_a_check_that_refuses_is_asked_again_and_then_told(
    things: str, make_manager: MakeManager
) -> None:
    refuses = 0

    async def check(_: Any) -> None:
        nonlocal refuses
        if refuses:
            refuses -= 1
            raise ValueError("no")

    async with make_manager(things, min_size=1, check=check, timeout=60) as db, sandbox(db):
        refuses = 2
        assert await db.fetchval("select 1") == 1
        refuses = 1_000_000
        with pytest.raises(AcquireTimeout, match="its check callback refuses it") as told:
            await db.fetchval("select 1", timeout=0.1)
        assert isinstance(told.value.__cause__, ValueError)
        refuses = 0
        assert await db.fetchval("select 1") == 1


# --- what lies within, and what is ended --------------------------------------------------------


async def test_settings_of_a_block_stay_when_one_within_it_ends(db: PoolManager) -> None:
    async def zone(conn: Any) -> str:
        (value,) = await (await conn.execute("show timezone")).fetchone()
        return str(value)

    async with sandbox(db):
        before = await db.fetchval("show timezone")
        async with db.connection() as outer:
            await outer.execute("set timezone to 'Asia/Tokyo'")
            async with db.connection() as inner:
                await inner.execute("set timezone to 'Europe/Paris'")
            assert await zone(outer) == "Asia/Tokyo"
            await db.fetchval("select 1")
            assert await zone(outer) == "Asia/Tokyo"
        assert await db.fetchval("show timezone") == before


async def test_what_is_acquired_while_a_connection_comes_back_does_not_lie_within_it(
    db: PoolManager,
) -> None:
    """Its roll-back would take with it what was done meanwhile."""
    async with sandbox(db):
        conn = await db.pool.getconn()
        await conn.execute("insert into things values (1)")
        task = asyncio.create_task(conn.execute("select pg_sleep(60)"))
        while not conn.lock.locked():
            await asyncio.sleep(0)
        with suppress(TimeoutError):
            async with asyncio.timeout(0):
                await db.pool.putconn(conn)  # goes on, and is not waited for
        async with db.connection() as conn:
            await conn.execute("insert into things values (2)")
        with suppress(psycopg.Error):
            await task
        assert await db.fetchall("select n from things") == [(2,)]


# --- levels --------------------------------------------------------------------------------------


async def test_the_level_is_the_pool_s_or_what_the_sandbox_is_given(
    things: str, make_manager: MakeManager
) -> None:
    async def configure(conn: Any) -> None:
        await conn.set_isolation_level(IsolationLevel.REPEATABLE_READ)

    level = "show transaction_isolation"
    async with make_manager(things, min_size=1, configure=configure) as db:
        async with sandbox(db):
            assert await db.fetchval(level) == "repeatable read"
        lower = db.transaction(isolation=IsolationLevel.READ_COMMITTED)
        async with sandbox(db, isolation=IsolationLevel.SERIALIZABLE), lower as conn:
            cursor = await conn.execute(level)
            assert await cursor.fetchone() == ("serializable",)


async def test_the_default_of_a_session_that_only_reads_is_kept(
    things: str, make_manager: MakeManager
) -> None:
    options = "-c default_transaction_read_only=on"
    db = make_manager(things, min_size=1, kwargs={"options": options})
    async with db, sandbox(db):
        with pytest.raises(psycopg.errors.ReadOnlySqlTransaction):
            await db.execute("insert into things values (1)")
        async with db.transaction(read_only=False) as conn:
            await conn.execute("insert into things values (2)")
        assert await db.fetchall("select n from things") == [(2,)]
