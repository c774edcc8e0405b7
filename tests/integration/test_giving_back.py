"""What a borrower waits for when it gives a connection back, and what the pool does afterwards."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import psycopg
import pytest

from poolkeeper import OpenError, PoolManager, ReleasedConnectionError
from tests.support.server import is_at_work
from tests.support.waiting import until

MakeManager = Callable[..., PoolManager[Any]]
HERE = "tests/integration/test_giving_back.py"
PATIENCE = 10.0  # seconds after which something that does not happen is said not to


class Gate:
    """A callback that waits until it is let go on."""

    def __init__(self) -> None:
        self.entered = asyncio.Event()
        self.let_go = asyncio.Event()

    async def __call__(self, conn: Any) -> None:
        self.entered.set()
        await self.let_go.wait()


@pytest.fixture
def opened(make_manager: MakeManager) -> Any:
    """A function that opens a manager with a single connection."""

    async def opened(**arguments: Any) -> PoolManager[Any]:
        db = make_manager(min_size=1, max_size=1, name="orders", timeout=5, **arguments)
        await db.open()
        return db

    return opened


def others(db: PoolManager[Any]) -> tuple[int, int, int]:
    now = db.snapshot()
    return now.making, now.returning, now.checking


# --- reset ------------------------------------------------------------------------------------


async def test_the_borrower_does_not_wait_for_reset(opened: Any) -> None:
    gate = Gate()
    db = await opened(reset=gate)
    async with asyncio.timeout(PATIENCE):
        async with db.connection() as conn:
            await conn.execute("select 1")
        await gate.entered.wait()
    assert db.snapshot().numbers() == "total=1 in_use=0 idle=0 max=1 waiting=0 returning=1"
    gate.let_go.set()
    assert await db.fetchval("select 1") == 1


async def test_the_caller_of_putconn_does_not_wait_for_reset(opened: Any) -> None:
    gate = Gate()
    db = await opened(reset=gate)
    async with asyncio.timeout(PATIENCE):
        await db.pool.putconn(await db.pool.getconn())
        await gate.entered.wait()
    assert others(db) == (0, 1, 0)
    gate.let_go.set()


@pytest.mark.parametrize("by_hand", [False, True])
async def test_the_borrower_waits_until_its_locks_are_gone(
    opened: Any, dsn: str, by_hand: bool
) -> None:
    """A rollback it does wait for, and not for the reset that comes after it."""
    gate = Gate()
    db = await opened(reset=gate)
    async with asyncio.timeout(PATIENCE):
        if by_hand:
            conn = await db.pool.getconn()
            await conn.execute("select pg_advisory_xact_lock(4711)")
            await db.pool.putconn(conn)
        else:
            with pytest.raises(ZeroDivisionError):
                async with db.connection() as conn:
                    await conn.execute("select pg_advisory_xact_lock(4711)")
                    _ = 1 / 0
    assert not gate.let_go.is_set()
    async with await psycopg.AsyncConnection.connect(dsn) as other:
        cursor = await other.execute("select pg_try_advisory_xact_lock(4711)")
        assert await cursor.fetchone() == (True,)
    gate.let_go.set()


async def test_close_waits_for_reset(opened: Any) -> None:
    gate = Gate()
    db = await opened(reset=gate)
    async with db.connection():
        pass
    closing = asyncio.create_task(db.close(timeout=PATIENCE))
    await gate.entered.wait()
    await asyncio.sleep(0.05)
    assert not closing.done()
    gate.let_go.set()
    begin = time.monotonic()
    await closing
    assert time.monotonic() - begin < PATIENCE / 2


@pytest.mark.parametrize("uses_it", [True, False])
async def test_a_reset_that_ignores_the_end_of_the_pool_does_not_get_on_with_the_connection(
    opened: Any, caplog: pytest.LogCaptureFixture, uses_it: bool
) -> None:
    """It was taken from it: what that raises there is no fault of the reset's."""
    began = asyncio.Event()
    refused: list[str] = []

    async def reset(conn: Any) -> None:
        began.set()
        with suppress(asyncio.CancelledError):
            await asyncio.Event().wait()
        await asyncio.sleep(0)
        if uses_it:
            try:
                await conn.execute("select 1")
            except Exception as ex:
                refused.append(str(ex))
                raise
        else:
            refused.append("")

    before = asyncio.all_tasks()
    db = await opened(reset=reset)
    async with asyncio.timeout(PATIENCE):
        await db.fetchval("select 1")
        await began.wait()
        await db.close(timeout=0)
        await until(lambda: refused)
        await until(lambda: not asyncio.all_tasks() - before)
    assert db.state == "closed"
    assert all("was closed while this connection was in use" in words for words in refused if words)
    events = [vars(record).get("event_name") for record in caplog.records]
    assert "poolkeeper.connection_out_of_order" not in events


async def test_an_error_in_reset_is_logged_and_is_not_the_borrowers(
    opened: Any, caplog: pytest.LogCaptureFixture
) -> None:
    async def reset(conn: Any) -> None:
        raise RuntimeError("no reset today")

    db = await opened(reset=reset)
    async with db.connection() as conn:
        first = conn.info.backend_pid
    async with db.connection() as conn:
        assert conn.info.backend_pid != first
    assert any("reset" in record.getMessage() for record in caplog.records)


async def test_one_whose_rollback_fails_is_not_handed_on(
    opened: Any, caplog: pytest.LogCaptureFixture
) -> None:
    class Stubborn(psycopg.AsyncConnection[Any]):
        async def rollback(self) -> None:
            raise RuntimeError("no rollback today")

    db = await opened(connection_class=Stubborn)
    with pytest.raises(LookupError):
        async with db.connection() as conn:
            await conn.execute("create temporary table never (n int)")
            first = conn.info.backend_pid
            raise LookupError
    async with asyncio.timeout(PATIENCE):
        assert await db.fetchval("select pg_backend_pid()") != first
    assert await db.fetchval("select to_regclass('never')") is None
    events = [vars(record).get("event_name") for record in caplog.records]
    assert "poolkeeper.rollback_failed" in events


# --- while one is made ----------------------------------------------------------------------------


@pytest.mark.parametrize("function", ["conninfo", "kwargs", "configure"])
async def test_an_open_that_is_held_up_by_a_function_names_it(
    make_manager: MakeManager, dsn: str, function: str
) -> None:
    async def hangs(*_: Any) -> Any:
        await asyncio.sleep(3600)

    arguments: dict[str, Any] = {"conninfo": dsn, function: hangs}
    db = make_manager(min_size=2, open_timeout=0.5, **arguments)
    with pytest.raises(OpenError) as caught:
        await db.open()
    message = str(caught.value.args[0])
    kind = "callback" if function == "configure" else "function"
    assert f"a connection is in the {function} {kind} at {HERE}:" in message
    assert ", 0 had no answer yet" in str(caught.value.detail)
    assert "firewall" not in str(caught.value)


# --- while a task is at work on it --------------------------------------------------------------


async def test_a_task_whose_connection_is_given_back_is_told_so(opened: Any, dsn: str) -> None:
    """And not that somebody has cancelled its statement."""
    db = await opened()
    conn = await db.pool.getconn()

    async def work() -> None:
        await conn.execute("select pg_sleep(3600)")

    async with asyncio.timeout(PATIENCE):
        working = asyncio.create_task(work(), name="worker")
        await asyncio.sleep(0)
        while not await asyncio.to_thread(is_at_work, dsn, conn.pgconn.backend_pid):
            await asyncio.sleep(0.01)
        await db.pool.putconn(conn)
        with pytest.raises(ReleasedConnectionError) as caught:
            await working
    error = caught.value
    assert str(error.args[0]) == (
        'connection of pool "orders" was given back while a task was at work on it'
    )
    assert error.detail is not None
    assert error.detail.count(HERE) == 4  # acquired, given back, at work, opened
    assert "At work" in error.detail
    assert 'in task "worker"' in error.detail
    assert isinstance(error.__cause__, psycopg.errors.QueryCanceled)
    assert await db.fetchval("select 1") == 1


async def test_a_task_that_listens_is_told_that_its_connection_was_given_back(opened: Any) -> None:
    db = await opened(kwargs={"autocommit": True})
    conn = await db.pool.getconn()
    await conn.execute("listen news")

    async def listen() -> None:
        async for _ in conn.notifies():
            pass

    listening = asyncio.create_task(listen())
    await asyncio.sleep(0.05)
    async with asyncio.timeout(PATIENCE):
        await db.pool.putconn(conn)
        with pytest.raises(ReleasedConnectionError, match="given back"):
            await listening
