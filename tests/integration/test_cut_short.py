"""An acquire or a release that is cut short half-way, by Python itself, loses nothing."""

from __future__ import annotations

import asyncio
import gc
import sys
from collections.abc import Callable
from contextlib import suppress
from types import SimpleNamespace
from typing import Any

import psycopg
import pytest

from poolkeeper import AcquireTimeout, PoolManager, _acquiring, _lane, _oneshots, _releasing
from poolkeeper._asked import Asked
from poolkeeper._checkouts import Ledger
from poolkeeper._session import Session
from tests.support.inside import life
from tests.support.lanes import PLAIN, know

MakeManager = Callable[..., PoolManager[Any]]


async def is_whole(db: PoolManager[Any], pids: set[int]) -> None:
    """See that every connection can be had, and is the one that it was."""
    for _ in range(5):
        gc.collect()
        await asyncio.sleep(0.01)
    conns = [await db.pool.getconn(timeout=10) for _ in range(db.pool.max_size)]
    assert {conn.info.backend_pid for conn in conns} == pids
    assert db.snapshot().in_use == db.pool.max_size
    for conn in conns:
        assert await (await conn.execute("select 42")).fetchone() == (42,)
        await conn.rollback()
        await db.pool.putconn(conn)
    assert db.snapshot().in_use == 0


async def use(db: PoolManager[Any]) -> None:
    async with db.connection() as conn:
        await conn.execute("select 1")


async def use_and_fail(db: PoolManager[Any]) -> None:
    async with db.connection() as conn:
        await conn.execute("select 1")
        raise ZeroDivisionError


class CutShort(BaseException):
    """Stands for a KeyboardInterrupt, which would end the test run."""


@pytest.mark.parametrize("body", [use, use_and_fail])
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (_acquiring, "Checkout"),
        (_acquiring, "_current_task"),
        (Ledger, "ends"),
        (Session, "successor"),
        (asyncio.Lock, "locked"),  # in the middle of successor()
        (Session, "is_quiet"),
        (_acquiring, "_check_out"),
        (_releasing, "end_checkout"),
        (_releasing, "start_put_back"),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
async def test_an_error_at_any_step_loses_no_connection(
    make_manager: MakeManager,
    monkeypatch: pytest.MonkeyPatch,
    owner: Any,
    name: str,
    when: str,
    body: Any,
) -> None:
    db = make_manager(min_size=2, max_size=2, name="orders", timeout=10)
    await db.open()
    pids = {conn.info.backend_pid for conn in life(db.pool).idle}
    step = getattr(owner, name)

    def fails(*args: Any, **kwargs: Any) -> Any:
        monkeypatch.setattr(owner, name, step)
        if when == "after":
            step(*args, **kwargs)
        raise CutShort

    await asyncio.sleep(0.01)  # so that sockets are looked at
    monkeypatch.setattr(owner, name, fails)
    with suppress(CutShort, ZeroDivisionError):
        await body(db)
    monkeypatch.setattr(owner, name, step)
    await is_whole(db, pids)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (_lane.Lane, "open"),
        (_lane.Lane, "look_for_users"),
        (_lane.Lane, "_give_back"),
        (_lane, "keep_unseen"),
        (_oneshots, "grow"),
        (_oneshots.Lanes, "_tell_joined"),
        (Asked, "__init__"),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
async def test_a_one_shot_that_is_cut_short_at_any_step_loses_no_connection(
    make_manager: MakeManager, monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, when: str
) -> None:
    """Nor does any other that shares one have anything else than its own answer."""
    db = make_manager(min_size=1, max_size=2, name="orders", timeout=10)
    await db.open()
    await know(db, PLAIN)
    db.subscribe(lambda _event: None)
    step, calls = getattr(owner, name), 0

    def fails(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls != 1:
            return step(*args, **kwargs)
        if when == "after":
            step(*args, **kwargs)
        raise CutShort

    monkeypatch.setattr(owner, name, fails)
    tasks = [asyncio.create_task(db.fetchval(PLAIN, (n,))) for n in range(12)]
    await asyncio.wait(tasks)
    for n, task in enumerate(tasks):
        error = task.exception()
        assert isinstance(error, CutShort) or task.result() == n
    del tasks, task, error
    async with asyncio.timeout(20):
        while db.pool.counts()["idle"] < 2 or db.pool.counts()["in_use"]:
            gc.collect()
            await asyncio.gather(*(db.fetchval(PLAIN, (n,)) for n in range(20)))
            await asyncio.sleep(0.005)


async def test_who_is_cut_short_when_joining_the_line_stands_in_nobodys_way(
    make_manager: MakeManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No connection is handed to who has gone, and those who wait after that still give up."""
    db = make_manager(min_size=1, max_size=1, name="orders", timeout=10)
    await db.open()

    def fails(*args: Any, **kwargs: Any) -> Any:
        raise CutShort

    async with db.connection():
        with monkeypatch.context() as patched, pytest.raises(CutShort):
            patched.setattr(life(db.pool).clock, "_loop", SimpleNamespace(call_later=fails))
            await asyncio.create_task(use(db))
        assert db.snapshot().waiting == 0
        with pytest.raises(AcquireTimeout):
            await db.fetchval("select 1", timeout=0.1)
    assert await db.fetchval("select 1") == 1


# psycopg 3.3.0 gives it to wait_for(), which may be one call too many.
@pytest.mark.filterwarnings("ignore:coroutine 'Event.wait' was never awaited:RuntimeWarning")
async def test_the_recursion_limit_met_at_any_depth_loses_no_connection(
    make_manager: MakeManager,
) -> None:
    db = make_manager(min_size=2, max_size=2, name="orders", timeout=10)
    await db.open()
    pids = {conn.info.backend_pid for conn in life(db.pool).idle}

    async def deep(depth: int) -> None:
        await (deep(depth - 1) if depth else use(db))

    limit = sys.getrecursionlimit()
    met = 0
    gc.collect()
    gc.disable()  # who waits for a connection does not wait for a collection
    try:
        for depth in range(limit - 90, limit - 10):
            try:
                await asyncio.ensure_future(deep(depth))
            except (RecursionError, psycopg.Error):
                met += 1
        assert met
        async with db.connection(), db.connection():
            pass
    finally:
        gc.enable()
    await is_whole(db, pids)
