"""What a traceback of an error shows: the line of the program is the last but one, or the last."""

from __future__ import annotations

import asyncio
import os
import re
import subprocess
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psycopg
import pytest

from poolkeeper import (
    AcquireTimeout,
    ClosedError,
    ConfigError,
    LoopMismatchError,
    LostWorkError,
    NotOpenError,
    OpenError,
    PoolManager,
    ReleasedConnectionError,
    SelfDeadlockError,
    TooManyWaitersError,
)

MakeManager = Callable[..., PoolManager[Any]]


async def connection(db: PoolManager[Any], timeout: float | None = None) -> None:
    async with db.connection(timeout):
        pass


async def transaction(db: PoolManager[Any], timeout: float | None = None) -> None:
    async with db.transaction(timeout=timeout):
        pass


async def cursor(db: PoolManager[Any], timeout: float | None = None) -> None:
    async with db.cursor(timeout=timeout):
        pass


async def one_shot(db: PoolManager[Any], timeout: float | None = None) -> None:
    await db.fetchval("select 1", timeout=timeout)


async def getconn(db: PoolManager[Any], timeout: float | None = None) -> None:
    await db.pool.getconn(timeout)


KINDS = (connection, transaction, cursor, one_shot, getconn)
EACH = pytest.mark.parametrize("acquire", KINDS, ids=lambda kind: kind.__name__)


def beyond(error: BaseException) -> list[str]:
    """Return the frames beyond the last one of this file, the outermost first."""
    frames = traceback.extract_tb(error.__traceback__)
    own = max(number for number, frame in enumerate(frames) if frame.filename == __file__)
    return [f"{Path(frame.filename).name} in {frame.name}" for frame in frames[own + 1 :]]


def assert_short(error: BaseException) -> None:
    assert len(beyond(error)) <= 1, beyond(error)


@EACH
async def test_before_open_and_after_close(make_manager: MakeManager, acquire: Any) -> None:
    db = make_manager(min_size=1, name="orders")
    with pytest.raises(NotOpenError) as not_open:
        await acquire(db)
    assert_short(not_open.value)
    await db.open()
    await db.close()
    with pytest.raises(ClosedError) as closed:
        await acquire(db)
    assert_short(closed.value)


@EACH
async def test_a_time_out(make_manager: MakeManager, acquire: Any) -> None:
    db = make_manager(min_size=1, name="orders")
    await db.open()
    async with db.connection():
        for timeout in (0, 0.05):
            with pytest.raises(AcquireTimeout) as caught:
                await asyncio.create_task(acquire(db, timeout))
            assert_short(caught.value)


@EACH
async def test_a_self_deadlock_and_a_line_that_is_full(
    make_manager: MakeManager, acquire: Any
) -> None:
    db = make_manager(min_size=1, max_waiting=1, name="orders")
    await db.open()
    async with db.connection():
        if acquire is not getconn:
            with pytest.raises(SelfDeadlockError) as deadlock:
                await acquire(db)
            assert_short(deadlock.value)
        waiting = asyncio.create_task(connection(db))
        await asyncio.sleep(0)
        with pytest.raises(TooManyWaitersError) as refused:
            await asyncio.create_task(acquire(db))
        assert_short(refused.value)
    await waiting


@EACH
async def test_another_loop(db: PoolManager[Any], acquire: Any) -> None:
    with pytest.raises(LoopMismatchError) as caught:
        await asyncio.to_thread(asyncio.run, acquire(db))
    assert_short(caught.value)


@pytest.mark.parametrize("what", ["open", "close", "check", "drain", "resize"])
async def test_another_loop_for_what_is_not_an_acquire(db: PoolManager[Any], what: str) -> None:
    async def use() -> None:
        match what:
            case "drain":
                await db.pool.drain()
            case "resize":
                await db.pool.resize(1)
            case _:
                await getattr(db, what)()

    with pytest.raises(LoopMismatchError) as caught:
        await asyncio.to_thread(asyncio.run, use())
    assert_short(caught.value)


async def test_a_pool_that_cannot_be_opened(make_manager: MakeManager) -> None:
    wrong = make_manager("host=127.0.0.1 port=1", min_size=1, open_timeout=0.1)
    with pytest.raises(OpenError) as caught:
        await wrong.open()
    assert_short(caught.value)
    assert caught.value.__cause__ is not None
    assert caught.value.__cause__.__traceback__ is None
    with pytest.raises(OpenError) as caught:
        async with wrong:
            pass
    assert_short(caught.value)
    with pytest.raises(OpenError) as caught:
        await wrong.pool.open(wait=True, timeout=0.1)
    assert_short(caught.value)


async def begin(conn: Any) -> None:
    async with conn.transaction():
        pass


async def pipeline(conn: Any) -> None:
    async with conn.pipeline():
        pass


async def notifies(conn: Any) -> None:
    async for _ in conn.notifies():
        pass


async def stream(conn: Any) -> None:
    async for _ in conn.cursor().stream("select 1"):
        pass


async def copy(conn: Any) -> None:
    async with conn.cursor().copy("copy (select 1) to stdout"):
        pass


async def backend_pid(conn: Any) -> None:
    _ = conn.info.backend_pid


@pytest.mark.parametrize(
    "use",
    [
        begin, pipeline, notifies, stream, copy, backend_pid,
        lambda conn: conn.execute("select 1"),
        lambda conn: conn.cursor().execute("select 1"),
        lambda conn: conn.commit(),
        lambda conn: conn.rollback(),
        lambda conn: conn.close(),
        lambda conn: conn.set_autocommit(True),
        lambda conn: conn.tpc_recover(),
    ],
)  # fmt: skip
async def test_whatever_is_asked_of_a_connection_that_was_given_back(
    db: PoolManager[Any], use: Any
) -> None:
    async with db.connection() as conn:
        cursor = conn.cursor()
    with pytest.raises(ReleasedConnectionError) as caught:
        await use(conn)
    assert_short(caught.value)
    with pytest.raises(ReleasedConnectionError) as caught:
        await cursor.execute("select 1")
    assert_short(caught.value)


async def test_what_was_given_back_or_lost(db: PoolManager[Any]) -> None:
    async with db.connection() as conn:
        pass
    with pytest.raises(ReleasedConnectionError) as caught:
        await conn.execute("select 1")
    assert_short(caught.value)
    with pytest.raises(ReleasedConnectionError) as caught:
        await db.pool.putconn(conn)
    assert_short(caught.value)
    with pytest.raises(LostWorkError) as lost:
        async with db.connection() as conn:
            await conn.execute("create temporary table work (n int)")
            with suppress(psycopg.Error):
                await conn.execute("select pg_terminate_backend(pg_backend_pid())")
    assert_short(lost.value)


async def test_an_error_of_the_servers_and_one_of_the_program(db: PoolManager[Any]) -> None:
    with pytest.raises(psycopg.errors.SyntaxError) as caught:
        await db.execute("selec 1")
    assert_short(caught.value)
    for block in (db.connection, db.transaction, db.cursor):
        with pytest.raises(ZeroDivisionError) as own:
            async with block():
                1 / 0  # noqa: B018
        assert beyond(own.value) == []
        with pytest.raises(NotOpenError) as passed:
            async with block():
                await connection(PoolManager(name="another"))
        assert_short(passed.value)


async def test_a_parameter_that_cannot_work(db: PoolManager[Any]) -> None:
    with pytest.raises(ConfigError) as caught:
        db.transaction(isolation="none")  # type: ignore[arg-type]
    assert_short(caught.value)
    assert caught.value.__suppress_context__
    with pytest.raises(ConfigError) as caught:
        PoolManager(min_size=3, max_size=2)
    assert_short(caught.value)


async def test_in_a_group_of_tasks(make_manager: MakeManager) -> None:
    db = make_manager(name="orders")
    with pytest.raises(ExceptionGroup) as caught:
        async with asyncio.TaskGroup() as group:
            for kind in KINDS:
                group.create_task(kind(db))
    assert caught.value.exceptions
    for error in caught.value.exceptions:
        assert_short(error)


PYTEST = """
import asyncio
from poolkeeper import PoolManager

db = PoolManager(name="orders", min_size=1)

def test_ours():
    asyncio.run(db.fetchval("select 1"))

def test_block():
    async def work():
        async with db.transaction():
            pass
    asyncio.run(work())

def test_a_fault_of_ours():
    import poolkeeper._where
    poolkeeper._where.code_behind(type("Odd", (), {"__wrapped__": property(lambda self: 1 / 0)})())
"""


def test_pytest_shows_no_frame_of_ours_but_where_the_fault_may_be_ours(tmp_path: Path) -> None:
    (tmp_path / "test_program.py").write_text(PYTEST)
    ended = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--rootdir=.", "-q"],
        cwd=tmp_path,
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(sys.path),
            "COLUMNS": "100",
            "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",  # there are many, and it needs none
        },
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    ours, block, fault = ended.stdout.split("____ test_")[1:]
    assert 'NotOpenError: pool "orders" is not open' in ours
    assert 'NotOpenError: pool "orders" is not open' in block
    frame = re.compile(r"^.*\bpoolkeeper\W\w+\.py:\d+: ", re.MULTILINE)
    assert not frame.findall(ours + block), ended.stdout
    assert len(frame.findall(fault)) == 2


def test_every_module_that_is_loaded_is_hidden() -> None:
    from poolkeeper.adapters import generic

    async def work() -> None:
        async with generic.lifespan(PoolManager(min_size=0, max_size=1))(None):
            pass

    asyncio.run(work())
    names = [name for name in sys.modules if name.partition(".")[0] == "poolkeeper"]
    assert "poolkeeper.adapters.generic" in names
    hidden = [n for n in names if callable(vars(sys.modules[n]).get("__tracebackhide__"))]
    lazy = {"poolkeeper._facts", "poolkeeper._snapshot", "poolkeeper._diagnosis"}
    assert not {n for n in names if "_demo" not in n and "_e" not in n} - {*hidden, *lazy}
