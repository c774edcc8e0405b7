"""The `check` callback: what an acquire waits for, what it is told, who keeps its place."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable
from typing import Any

import pytest

from poolkeeper import AcquireTimeout, PoolManager
from tests.support.server import kill_sessions

MakeManager = Callable[..., PoolManager[Any]]
HERE = "tests/integration/test_checking.py"
PATIENCE = 20.0  # seconds after which something that does not happen is said not to


@pytest.fixture
def opened(make_manager: MakeManager) -> Any:
    """A function that opens a manager, with a single connection if nothing else is asked for."""

    async def opened(**arguments: Any) -> PoolManager[Any]:
        arguments = {"min_size": 1, "max_size": 1, "name": "orders", "timeout": 5, **arguments}
        db = make_manager(**arguments)
        await db.open()
        return db

    return opened


async def until(holds: Callable[[], object]) -> None:
    async with asyncio.timeout(PATIENCE):
        while not holds():
            await asyncio.sleep(0.005)


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


# --- one that hangs -----------------------------------------------------------------------------


async def test_an_acquire_ends_at_its_timeout_although_check_hangs(opened: Any) -> None:
    hang = [True, True]

    async def check(conn: Any) -> None:
        if hang and hang.pop():
            await asyncio.sleep(3600)

    db = await opened(min_size=2, max_size=2, check=check)
    before = {conn.info.backend_pid for conn in db.pool._idle}
    errors = await asyncio.gather(fails(db, 1), fails(db, 1))
    for error in errors:
        assert error.diagnosis is not None
        assert error.diagnosis.cause == "held-up"
        assert f"in the check callback at {HERE}:" in str(error)
    await until(lambda: db.snapshot().idle == 2)
    assert {conn.info.backend_pid for conn in db.pool._idle} == before


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
    (idle,) = db.pool._idle
    session = idle._session
    error = await fails(db, timeout)
    assert "in the check callback" in str(error)
    await until(lambda: db.snapshot().idle == 1)
    (another,) = db.pool._idle
    assert another._session is not session
    assert "goes on although it was cancelled" in caplog.text
    let_go.set()
    assert await db.fetchval("select 1") == 1
    await until(lambda: not db.pool._returning)
    assert db.snapshot().numbers() == "total=1 in_use=0 idle=1 max=1 waiting=0"


async def test_who_is_cancelled_in_check_goes_at_once(opened: Any) -> None:
    entered = asyncio.Event()

    async def check(conn: Any) -> None:
        entered.set()
        try:
            await asyncio.sleep(3600)
        finally:
            await asyncio.sleep(0.2)

    db = await opened(check=check)
    task = asyncio.create_task(db.fetchval("select 1"))
    await entered.wait()
    assert db.snapshot().numbers() == "total=1 in_use=0 idle=0 max=1 waiting=0 checking=1"
    task.cancel()
    begin = time.monotonic()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert time.monotonic() - begin < 0.15
    await until(lambda: db.snapshot().idle == 1)


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
            (session,) = db.pool._sessions
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
