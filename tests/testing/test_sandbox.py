"""A sandbox: whatever a test does with a pool, by whatever means, is rolled back at its end."""

from __future__ import annotations

import asyncio
import contextvars
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from typing import Any

import psycopg
import psycopg_pool
import pytest
from psycopg import IsolationLevel
from psycopg.pq import TransactionStatus

from poolkeeper import AcquireTimeout, ConfigError, PoolManager
from poolkeeper.testing import (
    LeftBehindError,
    OwnershipError,
    SandboxError,
    outside,
    sandbox,
)

IDLE, INTRANS = TransactionStatus.IDLE, TransactionStatus.INTRANS


@pytest.fixture(scope="module")
def things(dsn: str) -> str:
    """A database with a table, which is empty before each test and after it."""
    with psycopg.connect(dsn, autocommit=True) as conn:
        conn.execute("drop database if exists sandbox_tests")
        conn.execute("create database sandbox_tests")
    url = psycopg.conninfo.make_conninfo(dsn, dbname="sandbox_tests")
    with psycopg.connect(url, autocommit=True) as conn:
        conn.execute(
            "create table things (n int primary key,"
            " like_n int references things deferrable initially deferred)"
        )
    return url


@pytest.fixture
async def db(things: str, make_manager: Callable[..., PoolManager]) -> AsyncIterator[PoolManager]:
    manager = make_manager(things, min_size=1, max_size=3, timeout=60)
    await manager.open()
    yield manager
    assert await manager.fetchall("select n from things") == []
    assert manager.snapshot().in_use == 0


async def numbers(db: PoolManager) -> list[int]:
    return [n for (n,) in await db.fetchall("select n from things order by n")]


# --- what psycopg does -----------------------------------------------------------------------


async def test_what_a_block_commits_is_there_until_the_end_of_the_test(db: PoolManager) -> None:
    async with sandbox(db):
        async with db.connection() as conn:
            await conn.execute("insert into things values (1)")
        assert await numbers(db) == [1]
        await db.execute("insert into things values (2)")
        assert await numbers(db) == [1, 2]


async def test_a_block_that_raises_takes_back_its_own_work_only(db: PoolManager) -> None:
    async with sandbox(db):
        await db.execute("insert into things values (1)")
        with pytest.raises(ZeroDivisionError):
            async with db.connection() as conn:
                await conn.execute("insert into things values (2)")
                raise ZeroDivisionError
        assert await numbers(db) == [1]


async def test_commit_and_rollback_are_those_of_the_borrower(db: PoolManager) -> None:
    async with sandbox(db), db.connection() as conn:
        await conn.execute("insert into things values (1)")
        await conn.commit()
        await conn.execute("insert into things values (2)")
        await conn.rollback()
        await conn.commit()
        await conn.rollback()
        cursor = await conn.execute("select n from things")
        assert await cursor.fetchall() == [(1,)]


async def test_an_error_fails_the_transaction_until_it_is_rolled_back(db: PoolManager) -> None:
    async with sandbox(db), db.connection() as conn:
        await conn.execute("insert into things values (1)")
        await conn.commit()
        with pytest.raises(psycopg.errors.UniqueViolation):
            await conn.execute("insert into things values (1)")
        with pytest.raises(psycopg.errors.InFailedSqlTransaction):
            await conn.execute("select 1")
        await conn.rollback()
        await conn.execute("insert into things values (2)")


async def test_a_commit_of_what_has_failed_is_a_rollback(db: PoolManager) -> None:
    async with sandbox(db):
        async with db.connection() as conn:
            await conn.execute("insert into things values (1)")
            with pytest.raises(psycopg.errors.UniqueViolation):
                await conn.execute("insert into things values (1)")
        assert await numbers(db) == []


async def test_blocks_of_psycopg_are_savepoints_as_deep_as_they_go(db: PoolManager) -> None:
    async with sandbox(db), db.connection() as conn:
        async with conn.transaction():
            await conn.execute("insert into things values (1)")
            with pytest.raises(ZeroDivisionError):
                async with conn.transaction():
                    await conn.execute("insert into things values (2)")
                    raise ZeroDivisionError
            async with conn.transaction(force_rollback=True):
                await conn.execute("insert into things values (3)")
        async with conn.transaction(force_rollback=True):
            await conn.execute("insert into things values (4)")
        async with conn.transaction() as block:
            await conn.execute("insert into things values (5)")
            raise psycopg.Rollback(block)
        await conn.execute("insert into things values (6)")
        async with conn.transaction(savepoint_name="mine"):
            await conn.execute("insert into things values (7)")
        await conn.commit()
        cursor = await conn.execute("select n from things order by n")
        assert await cursor.fetchall() == [(1,), (6,), (7,)]


async def test_no_commit_within_a_block_there_as_here(db: PoolManager) -> None:
    async with sandbox(db), db.connection() as conn, conn.transaction():
        with pytest.raises(psycopg.ProgrammingError, match="forbidden"):
            await conn.commit()
        with pytest.raises(psycopg.ProgrammingError, match="forbidden"):
            await conn.rollback()


async def test_the_status_is_that_of_the_borrower_s_own_transaction(db: PoolManager) -> None:
    async with sandbox(db), db.connection() as conn:
        assert conn.info.transaction_status == IDLE
        await conn.execute("select 1")
        assert conn.info.transaction_status == INTRANS
        with pytest.raises(psycopg.ProgrammingError, match="autocommit"):
            await conn.set_autocommit(True)
        await conn.commit()
        assert conn.info.transaction_status == IDLE
        await conn.set_autocommit(True)
        await conn.execute("select 1")
        assert conn.info.transaction_status == IDLE
        await conn.set_autocommit(False)


async def test_in_autocommit_each_statement_is_by_itself(db: PoolManager) -> None:
    async with sandbox(db):
        async with db.connection() as conn:
            await conn.set_autocommit(True)
            await conn.execute("insert into things values (1)")
            with pytest.raises(psycopg.errors.UniqueViolation):
                await conn.execute("insert into things values (1)")
            await conn.execute("insert into things values (2)")
            await conn.rollback()  # of nothing
            with pytest.raises(ZeroDivisionError):
                async with conn.transaction():
                    await conn.execute("insert into things values (3)")
                    raise ZeroDivisionError
            with pytest.raises(psycopg.errors.UniqueViolation):
                await conn.execute("insert into things values (2)")
        assert await numbers(db) == [1, 2]
        with pytest.raises(ZeroDivisionError):
            async with db.connection() as conn:
                await conn.set_autocommit(True)
                await conn.execute("insert into things values (3)")
                raise ZeroDivisionError
        assert await numbers(db) == [1, 2, 3]


async def test_one_shots_are_by_themselves(db: PoolManager) -> None:
    async with sandbox(db):
        await db.execute("insert into things values (1)")
        with pytest.raises(psycopg.errors.UniqueViolation):
            await db.execute("insert into things values (1)")
        assert await db.fetchone("select n from things") == (1,)
        assert await db.fetchval("insert into things values (2) returning n") == 2
        assert await numbers(db) == [1, 2]
        async with db.cursor() as cursor:
            await cursor.execute("select count(*) from things")
            assert await cursor.fetchone() == (2,)


@pytest.mark.parametrize("pipeline", [True, False])
async def test_one_shots_that_would_share_a_connection_take_turns(
    things: str, make_manager: Callable[..., PoolManager], pipeline: bool
) -> None:
    db = make_manager(things, min_size=1, max_size=2, pipeline=pipeline)
    async with db:
        async with sandbox(db):
            await db.execute("insert into things values (%s)", (1,))
            for _ in range(3):  # what is known to be quick is shared
                count = db.fetchval, "select count(*) from things where n < %s", (9,)
                assert await asyncio.gather(*(count[0](*count[1:]) for _ in range(9))) == [1] * 9
                with pytest.raises(psycopg.errors.UniqueViolation):
                    await db.execute("insert into things values (%s)", (1,))
                with outside():
                    assert await count[0](*count[1:]) == 0
        assert await numbers(db) == []


async def test_a_constraint_that_is_deferred_is_looked_at_by_each_commit(db: PoolManager) -> None:
    async with sandbox(db):
        with pytest.raises(psycopg.errors.ForeignKeyViolation):
            async with db.connection() as conn:
                await conn.execute("insert into things values (1, 2)")
        with pytest.raises(psycopg.errors.ForeignKeyViolation):
            await db.execute("insert into things values (1, 2)")
        async with db.connection() as conn:
            with pytest.raises(psycopg.errors.ForeignKeyViolation):
                async with conn.transaction():
                    await conn.execute("insert into things values (1, 2)")
        async with db.connection() as conn:
            await conn.execute("insert into things values (1, 2)")
            await conn.execute("insert into things values (2)")
        async with db.connection() as conn:  # still deferred
            await conn.execute("insert into things values (3, 4), (4, null)")
        assert await numbers(db) == [1, 2, 3, 4]


async def test_read_only_holds_for_its_transaction_and_no_longer(db: PoolManager) -> None:
    async with sandbox(db):
        with pytest.raises(psycopg.errors.ReadOnlySqlTransaction):
            async with db.transaction(read_only=True) as conn:
                await conn.execute("insert into things values (1)")
        async with db.transaction(read_only=True) as conn:
            await conn.execute("select 1")
        await db.execute("insert into things values (2)")
        async with db.transaction(isolation="serializable", deferrable=True) as conn:
            assert conn.isolation_level == IsolationLevel.SERIALIZABLE
            await conn.execute("insert into things values (3)")
        assert await numbers(db) == [2, 3]


@pytest.mark.parametrize("before", [0, 0.1])
@pytest.mark.parametrize("after", [0, 0.1])
async def test_pipelines_go_on_after_an_error_as_they_do(
    before: float, after: float, db: PoolManager
) -> None:
    """What is between two syncs is one transaction, whenever its error and its end come."""
    async with sandbox(db):
        async with db.connection() as conn:
            async with conn.pipeline() as pipeline:
                await conn.execute("insert into things values (1)")
                await conn.execute("insert into things values (2)")
                await pipeline.sync()
                async with conn.transaction():
                    await conn.execute("insert into things values (3)")
            await conn.commit()
            await conn.set_autocommit(True)
            async with conn.pipeline() as pipeline:
                await conn.execute("insert into things values (4)")
                await pipeline.sync()
                with pytest.raises(psycopg.errors.UniqueViolation):
                    await conn.execute("insert into things values (4)")
                    await asyncio.sleep(before)
                    await pipeline.sync()
                await asyncio.sleep(after)
                await conn.execute("insert into things values (5)")
            async with conn.cursor() as cursor:
                await cursor.executemany("insert into things values (%s)", [(6,), (7,)])
        assert await numbers(db) == [1, 2, 3, 4, 5, 6, 7]


async def test_copy_streams_and_server_side_cursors_work(db: PoolManager) -> None:
    async with sandbox(db):
        async with db.connection() as conn:
            async with conn.cursor() as cursor:
                async with cursor.copy("copy things (n) from stdin") as copy:
                    for n in range(5):
                        await copy.write_row((n,))
                assert [n async for (n,) in cursor.stream("select n from things")] == [*range(5)]
            async with conn.cursor("named") as cursor:
                await cursor.execute("select n from things")
                assert await cursor.fetchmany(2) == [(0,), (1,)]
                await db.execute("insert into things values (9)")  # within
                assert len(await cursor.fetchall()) == 3
        async with db.connection() as conn, conn.cursor() as cursor:
            await conn.set_autocommit(True)
            async with cursor.copy("copy things to stdout") as copy:
                assert len([row async for row in copy.rows()]) == 6


async def test_a_stream_that_is_left_open_holds_nobody_up(db: PoolManager) -> None:
    async with sandbox(db):
        async with db.connection() as conn:
            stream = conn.cursor().stream("select generate_series(1, 100000)")
            assert await anext(stream) == (1,)
        await db.execute("insert into things values (1)")
        await stream.aclose()
        assert await numbers(db) == [1]


async def test_a_cancelled_query_takes_back_its_block_only(db: PoolManager) -> None:
    async with sandbox(db):
        await db.execute("insert into things values (1)")
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.1), db.connection() as conn:
                await conn.execute("insert into things values (2)")
                await conn.execute("select pg_sleep(60)")
        assert await numbers(db) == [1]


async def test_close_rolls_back_and_keeps_the_session_of_the_test(db: PoolManager) -> None:
    async with sandbox(db):
        async with db.connection() as conn:
            await conn.execute("insert into things values (1)")
            await conn.close()
            assert conn.closed
            with pytest.raises(psycopg.OperationalError, match="closed"):
                await conn.execute("select 1")
        await db.execute("insert into things values (2)")
        assert await numbers(db) == [2]


async def test_getconn_and_putconn_take_part(db: PoolManager) -> None:
    async with sandbox(db):
        conn = await db.pool.getconn()
        await conn.execute("insert into things values (1)")
        await conn.commit()
        await conn.execute("insert into things values (2)")
        await db.pool.putconn(conn)
        with pytest.raises(psycopg.InterfaceError, match="given back"):
            await conn.execute("select 1")
        with pytest.raises(psycopg.InterfaceError, match="twice"):
            await db.pool.putconn(conn)
        assert await numbers(db) == [1]


async def test_settings_are_put_back_when_a_connection_is(db: PoolManager) -> None:
    async with sandbox(db):
        before = await db.fetchval("show timezone")
        async with db.connection() as conn:
            await conn.execute("set timezone to 'Asia/Tokyo'")
            conn.row_factory = psycopg.rows.dict_row
        assert await db.fetchval("show timezone") == before


async def test_a_block_that_fails_stops_the_query_of_a_task_that_is_at_work_in_it(
    db: PoolManager,
) -> None:
    async with sandbox(db):
        await db.execute("insert into things values (1)")
        with pytest.raises(ZeroDivisionError):
            async with db.connection() as conn:
                await conn.execute("insert into things values (2)")
                task = asyncio.create_task(conn.execute("select pg_sleep(60)"))
                while not conn.lock.locked():
                    await asyncio.sleep(0)
                raise ZeroDivisionError
        with pytest.raises(psycopg.Error):
            await task
        assert await numbers(db) == [1]


async def test_a_block_that_ends_waits_for_a_task_that_is_at_work_in_it(db: PoolManager) -> None:
    async with sandbox(db):
        async with db.connection() as conn:
            task = asyncio.create_task(
                conn.execute("insert into things select 1 from pg_sleep(0.01)")
            )
            while not conn.lock.locked():
                await asyncio.sleep(0)
        await task
        assert await numbers(db) == [1]


async def test_a_connection_that_comes_back_in_a_pipeline_is_good_for_the_next(
    db: PoolManager,
) -> None:
    async with sandbox(db):
        conn = await db.pool.getconn()
        pipeline = conn.pipeline()
        await pipeline.__aenter__()
        await db.pool.putconn(conn)
        await db.execute("insert into things values (1)")
        assert await numbers(db) == [1]
        with pytest.raises(psycopg.Error):
            await pipeline.__aexit__(None, None, None)


async def test_in_autocommit_a_statement_tells_of_its_deferred_constraint(
    db: PoolManager,
) -> None:
    async with sandbox(db), db.connection() as conn:
        await conn.set_autocommit(True)
        with pytest.raises(psycopg.errors.ForeignKeyViolation):
            await conn.execute("insert into things values (1, 2)")
        async with conn.transaction():
            await conn.execute("insert into things values (1, 2)")
            await conn.execute("insert into things values (2)")
        async with conn.pipeline():
            await conn.execute("insert into things values (3, 4)")
        with pytest.raises(psycopg.errors.ForeignKeyViolation):
            await conn.execute("select 1")


async def test_in_autocommit_what_a_pipeline_has_done_stays(db: PoolManager) -> None:
    async with sandbox(db):
        async with db.connection() as conn:
            await conn.set_autocommit(True)
            async with conn.pipeline():
                await conn.execute("insert into things values (1)")
            await conn.set_autocommit(False)
            await conn.execute("insert into things values (2)")
            await conn.rollback()
        assert await numbers(db) == [1]


async def test_a_rollback_in_a_pipeline_takes_back_what_was_sent_in_it(db: PoolManager) -> None:
    async with sandbox(db), db.connection() as conn:
        async with conn.pipeline():
            await conn.execute("insert into things values (1)")
            await conn.rollback()
            await conn.execute("insert into things values (2)")
            await conn.commit()
        cursor = await conn.execute("select n from things")
        assert await cursor.fetchall() == [(2,)]


async def test_a_commit_in_a_pipeline_tells_of_an_error_before_it(db: PoolManager) -> None:
    async with sandbox(db):
        await db.execute("insert into things values (1)")
        with pytest.raises(psycopg.errors.UniqueViolation):
            async with db.connection() as conn, conn.pipeline():
                await conn.execute("insert into things values (2)")
                await conn.execute("insert into things values (1)")
                await conn.commit()
        assert await numbers(db) == [1]


async def test_a_connection_may_be_closed_twice_unused_and_in_a_block(db: PoolManager) -> None:
    async with sandbox(db):
        async with db.connection() as conn:
            await conn.close()
            await conn.close()
            assert conn.closed
        async with db.connection() as conn:
            with suppress(psycopg.Error):
                async with conn.transaction():
                    await conn.execute("insert into things values (1)")
                    await conn.close()
            assert conn.closed
        assert await numbers(db) == []


async def test_an_outer_transaction_ends_beside_a_connection_that_has_begun_none(
    db: PoolManager,
) -> None:
    async with sandbox(db):
        async with db.connection() as outer, db.connection() as inner:
            await outer.execute("insert into things values (1)")
            await outer.commit()
            await outer.execute("insert into things values (2)")
            await inner.execute("insert into things values (3)")
            await outer.rollback()  # and what lies within
            await inner.commit()
            await outer.execute("insert into things values (4)")
            await inner.execute("insert into things values (5)")
            await outer.rollback()
            await inner.rollback()
        assert await numbers(db) == [1]


# --- what cannot be ------------------------------------------------------------------------------


async def two_phase(conn: Any) -> None:
    await conn.tpc_begin("one")


async def vacuum(conn: Any) -> None:
    await conn.set_autocommit(True)
    await conn.execute("vacuum things")


async def create_database(conn: Any) -> None:
    await conn.set_autocommit(True)
    await conn.execute("create database elsewhere")


async def notified(conn: Any) -> None:
    await conn.execute("listen news")
    async for _ in conn.notifies(timeout=60):
        pass


async def level(conn: Any) -> None:
    await conn.execute("set transaction isolation level serializable")


@pytest.mark.parametrize("does", [two_phase, vacuum, create_database, notified, level])
async def test_what_cannot_be_in_a_transaction_is_told(
    db: PoolManager, does: Callable[[Any], Any]
) -> None:
    async with sandbox(db):
        way_out = r"sandbox\(manager, isolation" if does is level else "fresh_database"
        with pytest.raises(SandboxError, match=way_out):
            async with db.connection() as conn:
                await does(conn)
        assert await numbers(db) == []


async def test_a_statement_that_ends_the_transaction_is_told_at_once(db: PoolManager) -> None:
    async with sandbox(db):
        with pytest.raises(SandboxError, match=r"test_sandbox.py:\d+"):
            async with db.connection() as conn:
                await conn.execute("select 1")
                await conn.execute("rollback")
        with pytest.raises(SandboxError, match="has ended the transaction"):
            await db.fetchval("select 1")


# --- whose turn it is ---------------------------------------------------------------------------


async def test_tasks_take_turns(db: PoolManager) -> None:
    async def insert(n: int) -> None:
        async with db.connection() as conn:
            await conn.execute("insert into things values (%s)", (n,))
            await asyncio.sleep(0)
            if n == 3:
                raise ZeroDivisionError

    async with sandbox(db):
        done = await asyncio.gather(*map(insert, range(5)), return_exceptions=True)
        assert [type(ex) for ex in done if ex] == [ZeroDivisionError]
        assert await numbers(db) == [0, 1, 2, 4]


async def test_a_block_within_a_block_is_a_savepoint(db: PoolManager) -> None:
    async with sandbox(db):
        async with db.connection() as outer:
            await outer.execute("insert into things values (1)")
            await db.execute("insert into things values (2)")
            with pytest.raises(ZeroDivisionError):
                async with db.connection() as inner:
                    await inner.execute("insert into things values (3)")
                    raise ZeroDivisionError
            await outer.execute("insert into things values (4)")
            async with db.connection() as inner:
                await inner.execute("select 1")
                with pytest.raises(SandboxError, match="before that of one within"):
                    await outer.commit()
        assert await numbers(db) == [1, 2, 4]


async def gathered(work: Any) -> None:
    await asyncio.gather(work(), work())


async def grouped(work: Any) -> None:
    async with asyncio.TaskGroup() as group:
        group.create_task(work())


async def awaited(work: Any) -> None:
    await asyncio.wait_for(asyncio.shield(asyncio.create_task(gathered(work))), 60)


async def waited(work: Any) -> None:
    (task,), _ = await asyncio.wait({asyncio.create_task(work())})
    await task


async def in_anyio(work: Any) -> None:
    import anyio

    async with anyio.create_task_group() as group:
        group.start_soon(work)


@pytest.mark.parametrize("start", [gathered, grouped, awaited, waited, in_anyio])
async def test_what_would_wait_for_itself_is_told_at_once(
    db: PoolManager, start: Callable[[Any], Any]
) -> None:
    async def work() -> None:
        await db.fetchval("select 1")

    async with sandbox(db, timeout=60):
        async with asyncio.timeout(20):
            with pytest.raises((SandboxError, ExceptionGroup)) as told:
                async with db.connection():
                    await start(work)
            error: BaseException = told.value
            while isinstance(error, ExceptionGroup):
                error = error.exceptions[0]
            assert "it would wait for itself" in str(error)
            assert "test_sandbox.py" in str(error)
        await start(work)  # outside of a block they take turns


async def test_what_wait_for_is_given_is_no_task_of_its_own(db: PoolManager) -> None:
    """Up to Python 3.11 it makes one of it, which would wait for its own block."""

    async def inner() -> None:
        async with db.connection() as conn:
            await conn.execute("insert into things values (1)")
            assert await asyncio.wait_for(db.fetchval("select count(*) from things"), 30) == 1

    async with sandbox(db):
        async with db.connection() as conn:
            await conn.execute("select 1")
            await asyncio.wait_for(asyncio.wait_for(inner(), 30), 30)
            await conn.rollback()
        assert await numbers(db) == []


async def test_a_session_that_is_killed_is_told_to_who_asks_next(
    db: PoolManager, things: str
) -> None:
    async with sandbox(db):
        async with db.connection() as conn:
            pid = conn.info.backend_pid
        with outside():
            await db.execute("select pg_terminate_backend(%s, 10000)", (pid,))
        with suppress(psycopg.Error):  # it finds out
            await db.fetchval("select 1")
        with pytest.raises(SandboxError, match=r"the session of the sandbox of pool .* is gone"):
            await db.fetchval("select 1")


async def test_a_commit_on_a_session_that_is_killed_fails(db: PoolManager) -> None:
    async with sandbox(db):
        with pytest.raises(psycopg.OperationalError):
            async with db.connection() as conn:
                await conn.execute("insert into things values (1)")
                with outside():
                    pid = conn.info.backend_pid
                    await db.execute("select pg_terminate_backend(%s, 10000)", (pid,))
                await conn.commit()
        with pytest.raises(SandboxError, match=r"the session of the sandbox of pool .* is gone"):
            await db.fetchval("select 1")


async def test_a_stream_is_told_that_there_is_one_connection(db: PoolManager) -> None:
    async with sandbox(db):
        async with db.connection() as conn:
            stream = conn.cursor().stream("select generate_series(1, 9)")
            await anext(stream)
            with pytest.raises(SandboxError, match="in the middle of a stream"):
                await db.fetchval("select 1")
            await stream.aclose()
        assert await db.fetchval("select 1") == 1


async def test_who_waits_in_vain_is_told_who_holds(db: PoolManager) -> None:
    async with sandbox(db):
        until = asyncio.Event()

        async def holds() -> None:
            async with db.connection():
                await until.wait()

        task = asyncio.create_task(holds())
        await asyncio.sleep(0)
        with pytest.raises(AcquireTimeout, match="in holds"):
            async with db.connection(timeout=0.1):
                pass
        with pytest.raises(AcquireTimeout, match="in holds"):
            await db.pool.getconn(timeout=0)
        waiting = asyncio.create_task(db.fetchval("select 1"))
        await asyncio.sleep(0)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        until.set()
        await task
        assert await db.fetchval("select 1") == 1


async def test_who_is_cancelled_in_a_turn_to_talk_passes_it_on(db: PoolManager) -> None:
    async with (
        sandbox(db),
        db.connection() as first,
        db.connection() as second,
        db.connection() as third,
        db.connection() as fourth,
    ):
        stream = first.cursor().stream("select generate_series(1, 9)")
        assert await anext(stream) == (1,)
        tasks = [asyncio.create_task(conn.execute("select 1")) for conn in (second, third, fourth)]
        while not all(conn.lock.locked() for conn in (second, third, fourth)):
            await asyncio.sleep(0)
        await stream.aclose()  # it is the turn of the second now
        tasks[0].cancel()
        tasks[1].cancel()
        cursor = await asyncio.wait_for(tasks[2], 60)
        assert await cursor.fetchone() == (1,)
        await asyncio.wait(tasks)
        assert [task.cancelled() for task in tasks] == [True, True, False]


async def test_who_is_cancelled_before_a_turn_to_talk_leaves_the_line(db: PoolManager) -> None:
    async with sandbox(db), db.connection() as outer, db.connection() as inner:
        stream = outer.cursor().stream("select generate_series(1, 9)")
        assert await anext(stream) == (1,)
        task = asyncio.create_task(inner.execute("select 1"))
        while not inner.lock.locked():
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert [row async for row in stream] == [(n,) for n in range(2, 10)]
        cursor = await inner.execute("select 2")
        assert await cursor.fetchone() == (2,)


async def test_who_waits_when_the_test_ends_is_told(db: PoolManager) -> None:
    holds = asyncio.Event()

    async def hold() -> None:
        async with db.connection():
            holds.set()
            await asyncio.Event().wait()

    with pytest.raises(LeftBehindError, match="in hold"):
        async with sandbox(db):
            holder = asyncio.create_task(hold())
            await holds.wait()
            waiting = [asyncio.create_task(db.fetchval("select 1")) for _ in range(2)]
            await asyncio.sleep(0)
    done = await asyncio.gather(*waiting, return_exceptions=True)
    assert [type(ex) for ex in done] == [OwnershipError] * 2
    holder.cancel()
    await asyncio.wait({holder})


async def test_whose_turn_it_was_when_the_test_ended_is_told(db: PoolManager) -> None:
    async with sandbox(db):
        conn = await db.pool.getconn()
        waiting = asyncio.create_task(db.fetchval("select 1"))
        await asyncio.sleep(0)
        await db.pool.putconn(conn)
    with pytest.raises(OwnershipError, match="has ended"):
        await waiting


async def test_a_connection_that_another_task_has_handed_on_is_there(db: PoolManager) -> None:
    async with sandbox(db):
        conn = await asyncio.create_task(db.pool.getconn())
        await conn.execute("insert into things values (1)")
        assert await numbers(db) == [1]  # within
        await db.pool.putconn(conn)
        assert await numbers(db) == []


# --- whose it is ---------------------------------------------------------------------------------


async def test_tests_side_by_side_do_not_see_each_other(db: PoolManager) -> None:
    async def one_test(n: int) -> None:
        async with sandbox(db):
            await db.execute("insert into things values (%s)", (n,))
            await asyncio.sleep(0.01)
            assert await asyncio.create_task(numbers(db)) == [n]

    await asyncio.gather(*map(one_test, range(3)))


async def test_who_has_no_owner_is_told_and_may_be_allowed(db: PoolManager) -> None:
    asked: asyncio.Queue[asyncio.Future[Any]] = asyncio.Queue()

    async def background() -> None:
        while True:
            answer = await asked.get()
            try:
                answer.set_result(await numbers(db))
            except Exception as ex:
                answer.set_exception(ex)

    async def ask() -> Any:
        answer = asyncio.get_running_loop().create_future()
        asked.put_nowait(answer)
        return await answer

    task = asyncio.create_task(background())
    assert await ask() == []
    async with sandbox(db) as box:
        await db.execute("insert into things values (1)")
        with pytest.raises(OwnershipError, match="belongs to no test"):
            await ask()
        box.allow(task)
        assert await ask() == [1]
    async with sandbox(db, shared=True):
        await db.execute("insert into things values (2)")
        assert await ask() == [2]
        with pytest.raises(SandboxError, match="a sandbox of pool"):
            await sandbox(db).__aenter__()
    assert await ask() == []
    task.cancel()


async def test_a_thread_is_told_and_may_be_allowed(db: PoolManager) -> None:
    loop = asyncio.get_running_loop()

    def in_thread(results: list[Any]) -> None:
        future = asyncio.run_coroutine_threadsafe(numbers(db), loop)
        try:
            results.append(future.result(10))
        except Exception as ex:
            results.append(ex)

    async def run(function: Callable[[list[Any]], None]) -> Any:
        results: list[Any] = []
        thread = threading.Thread(target=function, args=(results,))
        thread.start()
        while thread.is_alive():
            await asyncio.sleep(0.01)
        return results[0]

    async with sandbox(db) as box:
        await db.execute("insert into things values (1)")
        assert isinstance(await run(in_thread), OwnershipError)
        assert await run(box.allow(in_thread)) == [1]

        @box.allow
        async def later() -> list[int]:
            return await numbers(db)

        assert await later() == [1]


async def test_outside_of_the_sandbox_the_pool_is_as_ever(db: PoolManager) -> None:
    async with sandbox(db):
        with outside():
            await db.execute("insert into things values (1)")
        assert await numbers(db) == [1]
        await db.execute("delete from things")
        with outside():
            assert await numbers(db) == [1]
            async with db.transaction() as conn:
                await conn.execute("set local lock_timeout to '5s'")
        assert await numbers(db) == []
    await db.execute("delete from things")


async def test_a_task_that_outlives_its_test_is_told(db: PoolManager) -> None:
    go = asyncio.Event()

    async def late() -> None:
        await go.wait()
        await db.fetchval("select 1")

    async with sandbox(db):
        task = asyncio.create_task(late())
    async with sandbox(db):
        go.set()
        with pytest.raises(OwnershipError, match="has ended"):
            await task


async def test_a_connection_that_is_left_behind_fails_the_test_with_its_line(
    db: PoolManager,
) -> None:
    with pytest.raises(LeftBehindError, match=r"test_sandbox.py:\d+ in test_a_connection"):
        async with sandbox(db):
            conn = await db.pool.getconn()
            await conn.execute("insert into things values (1)")
    with pytest.raises(psycopg.InterfaceError):
        await conn.execute("select 1")
    with pytest.raises(LeftBehindError):
        async with sandbox(db):
            conn = await db.pool.getconn()
            del conn
            await db.fetchval("select 1")
    with pytest.raises(ZeroDivisionError):
        async with sandbox(db):
            await db.pool.getconn()
            raise ZeroDivisionError


async def test_a_sandbox_opens_a_manager_that_is_closed_and_closes_it(
    things: str, make_manager: Callable[..., PoolManager]
) -> None:
    db = make_manager(things, min_size=1)
    for _ in range(2):
        async with sandbox(db):
            await db.execute("insert into things values (1)")
        assert db.state == "closed"
    async with db, sandbox(db.pool):
        await db.execute("insert into things values (1)")
    async with sandbox(db):
        await db.close()
        with pytest.raises(psycopg.OperationalError):
            await db.fetchval("select 1")


async def test_a_sandbox_is_entered_once_and_not_within_another(db: PoolManager) -> None:
    async with sandbox(db) as box:
        with pytest.raises(SandboxError, match="around this one"):
            await sandbox(db).__aenter__()
        with pytest.raises(SandboxError, match="once"):
            await box.__aenter__()
        assert "open" in repr(box)
    with pytest.raises(SandboxError, match="ended"):
        box.allow(print)
    assert await db.fetchval("select 1") == 1


async def test_a_shared_sandbox_is_the_only_one_of_its_pool(db: PoolManager) -> None:
    async def shared() -> None:
        with pytest.raises(SandboxError, match=r"beside another one(.|\n)*test_sandbox.py:\d+"):
            await sandbox(db, shared=True).__aenter__()

    elsewhere = contextvars.copy_context()  # another test's
    async with sandbox(db):
        await asyncio.create_task(shared(), context=elsewhere)


async def test_a_manager_that_a_sandbox_has_opened_is_closed_where_it_cannot_begin(
    things: str, make_manager: Callable[..., PoolManager]
) -> None:
    refuses = True

    async def check(_: Any) -> None:
        if refuses:
            raise ValueError("no")

    db = make_manager(things, min_size=1, check=check, timeout=60)
    box = sandbox(db, timeout=0.1)
    assert "new" in repr(box)
    with pytest.raises(AcquireTimeout):
        await box.__aenter__()
    assert db.state == "closed"
    refuses = False
    async with sandbox(db):
        assert await db.fetchval("select 1") == 1


async def test_what_is_no_pool_of_poolkeeper_s_is_refused() -> None:
    bare = psycopg_pool.AsyncConnectionPool("host=nowhere password=secret", open=False)
    for manager in ("host=nowhere password=secret", bare):
        with pytest.raises(ConfigError, match="manager cannot be <class ") as refused:
            sandbox(manager)  # type: ignore[arg-type]
        assert "secret" not in str(refused.value)


async def test_a_connection_class_of_the_user_s_takes_part(
    things: str, make_manager: Callable[..., PoolManager]
) -> None:
    class Mine(psycopg.AsyncConnection[Any]):
        __slots__ = ("notes",)

        async def commit(self) -> None:
            self.notes = "committed"
            await super().commit()

    db = make_manager(things, min_size=1, connection_class=Mine)
    async with sandbox(db), db.connection() as conn:
        assert isinstance(conn, Mine)
        await conn.execute("insert into things values (1)")
        await conn.commit()
        assert conn.notes == "committed"
