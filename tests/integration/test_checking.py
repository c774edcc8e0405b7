"""The `check` callback: what an acquire waits for, what it is told, who keeps its place."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from typing import Any

import pytest
from psycopg.pq import TransactionStatus
from psycopg_pool import AsyncConnectionPool

from poolkeeper import AcquireTimeout, ClosedError, PoolManager
from tests.support.inside import life
from tests.support.proxy import FaultProxy
from tests.support.server import kill_sessions
from tests.support.waiting import until
from tests.support.wire import wire_of_session

MakeManager = Callable[..., PoolManager[Any]]
HERE = "tests/integration/test_checking.py"
IDLE = TransactionStatus.IDLE
PATIENCE = 20.0  # seconds after which something that does not happen is said not to


@pytest.fixture
def opened(make_manager: MakeManager) -> Any:
    """A function that opens a manager, with a single connection if nothing else is asked for."""

    async def opened(**arguments: Any) -> PoolManager[Any]:
        arguments = {"min_size": 1, "max_size": 1, "name": "orders", "timeout": 5, **arguments}
        db = make_manager(arguments.pop("conninfo", None), **arguments)
        await db.open()
        return db

    return opened


async def fails(db: PoolManager[Any], timeout: float) -> AcquireTimeout:
    async with asyncio.timeout(PATIENCE):
        with pytest.raises(AcquireTimeout) as caught:
            async with db.connection(timeout):
                pass
    return caught.value


# --- one that refuses ---------------------------------------------------------------------------


@pytest.mark.parametrize("timeout", [0, 0.3])
async def test_a_check_that_refuses_is_named_with_its_error(opened: Any, timeout: float) -> None:
    async def check(conn: Any) -> None:
        raise LookupError("replica of tenant-4711 is 95 s behind")

    error = await fails(await opened(min_size=2, max_size=2, check=check), timeout)
    assert error.diagnosis is not None
    assert error.diagnosis.cause == "check-refuses"
    message, detail, hint = str(error).split("\n")
    assert f"the check callback refuses the connections: LookupError, raised at {HERE}:" in message
    assert f"The check callback at {HERE}:" in detail
    assert "tenant-4711" not in message + detail + hint
    assert isinstance(error.__cause__, LookupError)


async def test_who_waits_behind_is_told_too(opened: Any) -> None:
    async def check(conn: Any) -> None:
        raise LookupError

    db = await opened(check=check)
    first, second = await asyncio.gather(fails(db, 0.5), fails(db, 0.5))
    for error in (first, second):
        assert error.diagnosis is not None
        assert error.diagnosis.cause == "check-refuses"


async def test_a_check_that_accepts_again_is_no_cause_any_more(opened: Any) -> None:
    answers = [True, False]

    async def check(conn: Any) -> None:
        if not answers.pop():
            raise LookupError

    db = await opened(check=check)
    async with db.connection():
        answers.append(True)
        error = await asyncio.create_task(fails(db, 0.1))
        assert error.diagnosis is not None
        assert error.diagnosis.cause == "all-in-use"
        assert error.__cause__ is None
    assert db.snapshot().checks_refused == 0


async def test_an_acquire_without_a_timeout_tries_each_of_those_that_are_free(opened: Any) -> None:
    bad: set[int] = set()

    async def check(conn: Any) -> None:
        if conn.info.backend_pid in bad:
            raise LookupError

    db = await opened(min_size=3, max_size=3, check=check)
    bad |= {conn.info.backend_pid for conn in list(life(db.pool).idle)[:2]}
    async with db.connection(timeout=0) as conn:
        assert conn.info.backend_pid not in bad
    bad |= {conn.info.backend_pid for conn in life(db.pool).idle}
    await fails(db, 0)


# --- one that hangs -----------------------------------------------------------------------------


async def test_an_acquire_ends_at_its_timeout_although_check_hangs(opened: Any) -> None:
    hang = [True, True]

    async def check(conn: Any) -> None:
        if hang and hang.pop():
            await asyncio.sleep(3600)

    db = await opened(min_size=2, max_size=2, check=check)
    before = {conn.info.backend_pid for conn in life(db.pool).idle}
    errors = await asyncio.gather(fails(db, 1), fails(db, 1))
    for error in errors:
        assert error.diagnosis is not None
        assert error.diagnosis.cause == "held-up"
        assert f"in the check callback at {HERE}:" in str(error)
    await until(lambda: db.snapshot().idle == 2)
    assert {conn.info.backend_pid for conn in life(db.pool).idle} == before


@pytest.mark.parametrize("timeout", [0, 0.1])
async def test_a_check_that_swallows_its_cancellation_costs_the_connection_and_no_more(
    opened: Any, timeout: float, caplog: pytest.LogCaptureFixture
) -> None:
    let_go = asyncio.Event()

    async def check(conn: Any) -> None:
        while not let_go.is_set():
            with contextlib.suppress(asyncio.CancelledError):
                await let_go.wait()

    db = await opened(check=check)
    (idle,) = life(db.pool).idle
    session = idle._session
    error = await fails(db, timeout)
    assert "in the check callback" in str(error)
    await until(lambda: db.snapshot().idle == 1)
    (another,) = life(db.pool).idle
    assert another._session is not session
    assert "goes on although it was cancelled" in caplog.text
    let_go.set()
    assert await db.fetchval("select 1") == 1
    await until(lambda: not life(db.pool).tasks.running)
    assert db.snapshot().numbers() == "total=1 in_use=0 idle=1 max=1 waiting=0"


async def test_who_is_cancelled_in_check_goes_when_it_has_ended(opened: Any) -> None:
    entered = asyncio.Event()
    ended = False

    async def check(conn: Any) -> None:
        nonlocal ended
        entered.set()
        try:
            await asyncio.sleep(3600)
        finally:
            await asyncio.sleep(0.05)
            ended = True

    db = await opened(check=check)
    (session,) = life(db.pool).sessions
    task = asyncio.create_task(db.fetchval("select 1"))
    await entered.wait()
    assert db.snapshot().numbers() == "total=1 in_use=0 idle=0 max=1 waiting=0 checking=1"
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert ended
    await until(lambda: db.snapshot().idle == 1)
    assert set(life(db.pool).sessions) == {session}


async def test_who_is_cancelled_does_not_wait_for_a_check_that_does_not_end(
    opened: Any, caplog: pytest.LogCaptureFixture
) -> None:
    entered, let_go = asyncio.Event(), asyncio.Event()

    async def check(conn: Any) -> None:
        entered.set()
        try:
            await asyncio.sleep(3600)
        finally:
            while not let_go.is_set():
                with contextlib.suppress(asyncio.CancelledError):
                    await let_go.wait()

    db = await opened(check=check)
    task = asyncio.create_task(db.fetchval("select 1"))
    await entered.wait()
    for _ in range(3):
        task.cancel()
        await asyncio.sleep(0)
    async with asyncio.timeout(PATIENCE):
        with pytest.raises(asyncio.CancelledError):
            await task
    assert "goes on although it was cancelled" in caplog.text
    await until(lambda: db.snapshot().idle == 1)
    let_go.set()
    await until(lambda: not life(db.pool).tasks.running)
    assert db.snapshot().numbers() == "total=1 in_use=0 idle=1 max=1 waiting=0"


async def test_a_timeout_inside_of_check_is_the_checks_own(opened: Any) -> None:
    """It cancels the task that acquires, and takes that back."""
    slow = [True]

    async def check(conn: Any) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(0.01):
                await asyncio.sleep(3600)
        if slow:
            slow.clear()
            async with asyncio.timeout(0.01):
                await conn.execute("select pg_sleep(3600)")

    db = await opened(check=check)
    async with db.connection(PATIENCE):
        task = asyncio.current_task()
        assert task is not None
        assert not task.cancelling()


async def test_check_runs_in_the_task_that_acquires(opened: Any) -> None:
    tasks: list[Any] = []

    async def check(conn: Any) -> None:
        tasks.append(asyncio.current_task())
        await asyncio.sleep(0)
        tasks.append(asyncio.current_task())

    db = await opened(check=check)
    async with db.connection():
        pass
    assert tasks == [asyncio.current_task()] * 2


async def test_close_ends_the_wait_for_a_check(opened: Any) -> None:
    entered = asyncio.Event()

    async def check(conn: Any) -> None:
        entered.set()
        await asyncio.sleep(3600)

    db = await opened(check=check)
    task = asyncio.create_task(db.fetchval("select 1"))
    await entered.wait()
    async with asyncio.timeout(PATIENCE):
        await db.close(timeout=3600)
        with pytest.raises(ClosedError):
            await task
    assert not task.cancelling()


# --- psycopg_pool's own -------------------------------------------------------------------------


async def test_check_connection_costs_one_round_trip_and_leaves_no_trace(opened: Any) -> None:
    db = await opened(check=AsyncConnectionPool.check_connection)
    (idle,) = life(db.pool).idle
    with wire_of_session(idle.pgconn) as wire:
        async with db.connection() as conn:
            assert not conn.autocommit
            assert conn.pgconn.transaction_status == IDLE
        assert len(wire.sent()) == 1


async def test_who_is_cancelled_or_out_of_time_does_not_wait_for_a_silent_server(
    opened: Any, proxy: FaultProxy, dsn: str
) -> None:
    targets = iter([proxy.dsn] * 2)
    db = await opened(
        conninfo=lambda: next(targets, dsn),
        min_size=2,
        max_size=2,
        check=AsyncConnectionPool.check_connection,
    )
    proxy.stall()
    cancelled = asyncio.create_task(db.fetchval("select 1"))
    await until(lambda: db.snapshot().checking == 1)
    cancelled.cancel()
    with pytest.raises(asyncio.CancelledError):
        await cancelled
    error = await fails(db, 0.1)
    assert error.diagnosis is not None
    assert error.diagnosis.cause == "held-up"
    assert await db.fetchval("select 1") == 1
    await until(lambda: db.snapshot().idle == 2)


# --- the place in the line ----------------------------------------------------------------------


@pytest.mark.parametrize("fault", ["dead", "refused"])
async def test_who_is_handed_a_bad_connection_keeps_its_place(
    opened: Any, dsn: str, fault: str
) -> None:
    refuse: list[bool] = []

    async def check(conn: Any) -> None:
        if refuse:
            refuse.pop()
            raise LookupError

    served: list[int] = []

    async def waits(number: int) -> None:
        async with db.connection(PATIENCE):
            served.append(number)

    db = await opened(check=check if fault == "refused" else None, application_name="places")
    async with db.connection():
        tasks = [asyncio.create_task(waits(number)) for number in range(6)]
        await until(lambda: db.snapshot().waiting == 6)
        if fault == "dead":
            (session,) = life(db.pool).sessions
            await asyncio.to_thread(kill_sessions, dsn, "places")
            await until(lambda: not session.is_quiet())
        else:
            refuse.append(True)
    await asyncio.gather(*tasks)
    assert served == list(range(6))


async def test_several_who_are_handed_bad_ones_keep_their_places(opened: Any) -> None:
    refuse = 3

    async def check(conn: Any) -> None:
        nonlocal refuse
        if refuse:
            refuse -= 1
            raise LookupError

    served: list[int] = []

    async def waits(number: int) -> None:
        async with db.connection(PATIENCE):
            served.append(number)

    refuse = 0
    db = await opened(min_size=2, max_size=2, check=check)
    async with db.connection(), db.connection():
        tasks = [asyncio.create_task(waits(number)) for number in range(6)]
        await until(lambda: db.snapshot().waiting == 6)
        refuse = 3
    await asyncio.gather(*tasks)
    assert sorted(served) == list(range(6))
    assert set(served[:2]) == {0, 1}


async def test_a_place_is_kept_though_the_line_is_full(opened: Any) -> None:
    """`max_waiting` is for who joins."""
    refuse: list[bool] = []

    async def check(conn: Any) -> None:
        if refuse:
            await until(lambda: db.snapshot().waiting == 1)
            refuse.pop()
            raise LookupError

    db = await opened(check=check, max_waiting=1)

    async def waits() -> None:
        async with db.connection(PATIENCE):
            await asyncio.sleep(0)

    async with db.connection():
        first = asyncio.create_task(waits())
        await until(lambda: db.snapshot().waiting == 1)
        refuse.append(True)
    second = asyncio.create_task(waits())
    await asyncio.gather(first, second)
