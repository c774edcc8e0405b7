"""Each loop has a pool of its own, and all of them together no more than the budget."""

from __future__ import annotations

import asyncio
import gc
import os
import re
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import psycopg
import pytest

from poolkeeper import (
    ConfigError,
    LoopMismatchError,
    LoopPerCallWarning,
    OpenError,
    PoolManager,
    PoolPerLoop,
    _per_loop,
)
from poolkeeper._sessions import Wire
from tests.support.programs import run_program

NAME = f"shares-{os.getpid()}"
THERE = "select count(*) from pg_stat_activity where application_name = %s"


class Watcher:
    """Counts the sessions on the server, all the time."""

    def __init__(self, dsn: str) -> None:
        self._dsn = dsn
        self._ending = False
        self.most = self.looks = 0
        self._thread = threading.Thread(target=self._watch)

    def __enter__(self) -> Watcher:
        self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._ending = True
        self._thread.join()
        assert self.looks > 10

    def _watch(self) -> None:
        with psycopg.connect(self._dsn, autocommit=True) as conn:
            while not self._ending:
                (there,) = conn.execute(THERE, (f"poolkeeper:{NAME}",)).fetchone() or (0,)
                self.most = max(self.most, there)
                self.looks += 1
                time.sleep(0.001)


@pytest.fixture
def watcher(dsn: str) -> Iterator[Watcher]:
    with Watcher(dsn) as watcher:
        yield watcher


MakePools = Callable[..., PoolPerLoop]


@pytest.fixture
def make_pools(dsn: str) -> MakePools:
    def make(budget: int, **arguments: Any) -> PoolPerLoop:
        arguments = {"min_size": 1, "max_size": 4, "timeout": 20, "name": NAME, **arguments}
        return PoolPerLoop(lambda: PoolManager(dsn, **arguments), budget=budget)

    return make


@pytest.fixture(autouse=True)
def nothing_left(request: pytest.FixtureRequest, server_sessions: Any) -> Iterator[None]:
    yield
    until(lambda: server_sessions(f"poolkeeper:{NAME}") == 0)


def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


async def use(pools: PoolPerLoop, times: int = 3, at_once: int = 1) -> None:
    for _ in range(times):
        db = await pools.current()
        await asyncio.gather(*(db.fetchval("select 1") for _ in range(at_once)))


def in_threads(number: int, function: Callable[[], object]) -> None:
    with ThreadPoolExecutor(number) as threads:
        for future in [threads.submit(function) for _ in range(number)]:
            future.result(60)


async def test_a_loop_has_one_manager_which_is_open(make_pools: MakePools) -> None:
    pools = make_pools(8)
    first, second = await asyncio.gather(pools.current(), pools.current())
    assert first is second is await pools.current()
    assert first.state == "open"
    assert repr(pools) == "<PoolPerLoop budget=8 free=4 loops=1>"
    await pools.close()
    assert first.state == "closed"
    await pools.close()
    again = await pools.current()
    assert await again.fetchval("select 1") == 1
    await again.close()  # by its user, who comes again
    assert await pools.current() is again
    assert await again.fetchval("select 1") == 1
    await pools.close()
    assert pools.budget == 8


def test_a_pool_is_closed_with_its_loop(make_pools: MakePools) -> None:
    pools = make_pools(1, max_size=1)
    seen: list[PoolManager] = []

    async def main() -> None:
        seen.append(await pools.current())
        assert seen[0].state == "open"

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        asyncio.run(main())
    assert seen[0].state == "closed"


def test_loops_one_after_the_other_never_have_more_than_the_budget(
    make_pools: MakePools, watcher: Watcher
) -> None:
    """The next one waits until the session of the last has ended on the server, not only here."""
    pools = make_pools(1, max_size=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LoopPerCallWarning)
        for _ in range(50):
            asyncio.run(use(pools))
    assert watcher.most == 1


def test_threads_with_a_loop_each_share_the_budget(make_pools: MakePools, watcher: Watcher) -> None:
    """The first two are granted all of it, and cut down for the others to have a part."""
    pools = make_pools(8)
    together = threading.Barrier(8)

    async def main() -> None:
        await use(pools, times=10, at_once=8)
        together.wait(60)  # all eight have a pool at this moment
        await use(pools, times=10, at_once=8)

    in_threads(8, lambda: asyncio.run(main()))
    assert watcher.most <= 8
    until(lambda: repr(pools) == "<PoolPerLoop budget=8 free=8 loops=0>")


def test_what_is_given_back_is_for_those_who_have_less(make_pools: MakePools) -> None:
    pools = make_pools(4)
    full, go_on = threading.Event(), threading.Event()

    async def first() -> None:
        db = await pools.current()
        assert db.pool.max_size == 4
        full.set()
        while db.pool.max_size > 2:  # it is cut down from the other thread
            await asyncio.sleep(0.01)
        assert await asyncio.to_thread(go_on.wait, 20)

    async def second() -> None:
        assert full.wait(20)
        db = await pools.current()
        assert db.pool.max_size <= 2
        go_on.set()
        while db.pool.max_size < 4:
            assert await pools.current() is db
            await asyncio.sleep(0.01)
        assert await db.fetchval("select 1") == 1

    with ThreadPoolExecutor(2) as threads:
        for future in [threads.submit(asyncio.run, main()) for main in (first, second)]:
            future.result(30)


def refused_beside(dsn: str, kept: Callable[[PoolPerLoop, Callable[[], None]], None]) -> str:
    """Return what a loop is told that gets nothing, while *kept* lets another one have it all."""
    patience = iter([30, 0.3])
    told: list[str] = []

    def make() -> PoolManager:
        return PoolManager(dsn, min_size=1, max_size=1, name=NAME, open_timeout=next(patience))

    pools = PoolPerLoop(make, budget=1)

    def refused() -> None:
        with pytest.raises(OpenError) as error:
            asyncio.run(use(pools))
        told.append(str(error.value))

    kept(pools, refused)
    return told[0]


def test_a_loop_that_gets_nothing_is_told_who_has_it_and_since_when(dsn: str) -> None:
    def kept(pools: PoolPerLoop, refused: Callable[[], None]) -> None:
        async def holder() -> None:
            db = await pools.current()
            async with db.connection():
                await asyncio.to_thread(refused)

        asyncio.run(holder())

    text = refused_beside(dsn, kept)
    assert "within 0.30 s: the budget of 1 connections is used up" in text
    assert re.search(
        r"Used by others: 1 by loop \d+ \(\w+, thread \"MainThread\"\), run at"
        r" tests/integration/test_per_loop.py:\d+, for \d+\.\d s\.",
        text,
    )
    assert "close those" not in text


def test_a_loop_that_stands_still_and_was_not_closed_is_named(dsn: str) -> None:
    """Its thread lives on, so it may run again: it keeps its share, and is told to be closed."""

    def kept(pools: PoolPerLoop, refused: Callable[[], None]) -> None:
        loop = asyncio.new_event_loop()
        loop.run_until_complete(use(pools))
        refused()
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.close()

    text = refused_beside(dsn, kept)
    assert re.search(r" s, which does not run and was not closed\.", text)
    assert "close those that do not run" in text


@pytest.mark.parametrize("closed", [True, False], ids=["closed", "only-left"])
def test_a_loop_that_is_killed_in_the_middle_frees_its_share(
    closed: bool, make_pools: MakePools, watcher: Watcher
) -> None:
    """Without a word to anybody, with a query running: the next one finds it dead."""
    pools = make_pools(1, max_size=1)
    left: list[asyncio.AbstractEventLoop] = []

    def killed() -> None:
        loop = asyncio.new_event_loop()
        left.append(loop)

        async def main() -> None:
            db = await pools.current()
            task = asyncio.create_task(db.fetchval("select pg_sleep(100)"))
            task._log_destroy_pending = False  # type: ignore[attr-defined]
            await asyncio.sleep(0.1)
            loop.stop()

        task = loop.create_task(main())
        loop.run_forever()
        assert task.done()
        if closed:
            loop.close()

    for _ in range(3):
        thread = threading.Thread(target=killed)
        thread.start()
        thread.join()
    asyncio.run(use(pools))
    assert watcher.most == 1
    for loop in left:
        loop.close()


def test_loops_made_per_call_are_named_once(make_pools: MakePools) -> None:
    pools = make_pools(2)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always", LoopPerCallWarning)
        for _ in range(6):
            asyncio.run(use(pools))
    (warning,) = told
    assert warning.filename.endswith("tests/integration/test_per_loop.py")
    assert "test_per_loop.py:" in str(warning.message)
    assert "has run 3 event loops, one after the other" in str(warning.message)


def test_loops_that_lived_for_long_are_not_called_loops_per_call(
    make_pools: MakePools, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_per_loop, "_SHORT", 0.0)
    pools = make_pools(2)
    with warnings.catch_warnings():
        warnings.simplefilter("error", LoopPerCallWarning)
        for _ in range(5):
            asyncio.run(use(pools))


@pytest.mark.filterwarnings("error")
def test_a_loop_that_dies_unused_or_in_the_line_takes_nothing_with_it(
    make_pools: MakePools,
) -> None:
    """One has a pool and nothing that runs on the server; the other still waits for a share."""
    pools = make_pools(1, max_size=1)
    idle, waits = asyncio.new_event_loop(), asyncio.new_event_loop()
    idle.run_until_complete(use(pools))
    task: Any = waits.create_task(pools.current())
    waits.run_until_complete(asyncio.sleep(0.05))
    assert repr(pools) == "<PoolPerLoop budget=1 free=0 loops=2>"
    for loop in (idle, waits):
        loop.close()
    asyncio.run(use(pools))
    until(lambda: repr(pools) == "<PoolPerLoop budget=1 free=1 loops=0>")
    # What is left of it ends when it is collected, and strikes nobody out.
    task._log_destroy_pending = False
    task.get_coro().close()
    asyncio.run(use(pools))
    until(lambda: repr(pools) == "<PoolPerLoop budget=1 free=1 loops=0>")


def test_no_loop_and_no_budget_are_refused(make_pools: MakePools) -> None:
    pools = make_pools(2)
    with pytest.raises(LoopMismatchError, match="no event loop whose pool"):
        pools.current().send(None)
    with pytest.raises(ConfigError, match="budget"):
        make_pools(0)
    with pytest.raises(ConfigError, match="make"):
        PoolPerLoop("postgresql://", budget=1)  # type: ignore[arg-type]


def test_make_is_to_make_a_manager_for_each_loop(dsn: str) -> None:
    """One manager for all is told so, rather than that it is bound to another loop."""
    db = PoolManager(dsn, min_size=1, name=NAME)
    pools = PoolPerLoop(lambda: db, budget=4)
    asyncio.run(use(pools))
    with pytest.raises(ConfigError, match="make has returned the manager of another loop"):
        asyncio.run(use(pools))
    wrong: Any = PoolPerLoop(lambda: dsn, budget=4)  # type: ignore[arg-type, return-value]
    with pytest.raises(ConfigError, match="make has returned a str"):
        asyncio.run(use(wrong))


def test_a_pool_that_cannot_be_opened_takes_nothing(dsn: str) -> None:
    wrong = psycopg.conninfo.make_conninfo(dsn, user="nobody_there")
    pools = PoolPerLoop(lambda: PoolManager(wrong, name=NAME), budget=4)
    for _ in range(2):
        with pytest.raises(OpenError, match='role "nobody_there" does not exist'):
            asyncio.run(use(pools))
    until(lambda: repr(pools) == "<PoolPerLoop budget=4 free=4 loops=0>")


async def test_who_waits_for_a_pool_that_cannot_be_opened_asks_for_one_of_his_own(
    dsn: str,
) -> None:
    """The first of two on one loop finds no server; the second is not told of that."""
    wrong = psycopg.conninfo.make_conninfo(dsn, user="nobody_there")
    conninfos = iter([wrong, dsn])
    pools = PoolPerLoop(lambda: PoolManager(next(conninfos), min_size=1, name=NAME), budget=4)
    first, second = await asyncio.gather(pools.current(), pools.current(), return_exceptions=True)
    assert isinstance(first, OpenError)
    assert isinstance(second, PoolManager)
    assert await pools.current() is second
    assert await second.fetchval("select 1") == 1
    await pools.close()


def test_the_users_own_conninfo_and_configure_are_called(dsn: str) -> None:
    seen: list[str] = []

    async def conninfo() -> str:
        seen.append("conninfo")
        return dsn

    async def configure(conn: Any) -> None:
        seen.append("configure")

    def make() -> PoolManager:
        return PoolManager(conninfo, configure=configure, min_size=1, name=NAME)

    asyncio.run(use(PoolPerLoop(make, budget=1)))
    assert seen == ["conninfo", "configure"]


async def test_a_readiness_probe_is_answered_while_the_share_is_in_use(
    make_pools: MakePools,
) -> None:
    pools = make_pools(1, max_size=1)
    db = await pools.current()
    async with db.connection():
        assert await db.check()
    await pools.close()


async def test_a_session_that_is_configured_again_counts_once(dsn: str) -> None:
    """As after a borrower who was somebody else."""
    configured = []

    async def configure(conn: Any) -> None:
        configured.append(conn)

    pools = PoolPerLoop(
        lambda: PoolManager(dsn, configure=configure, min_size=1, max_size=1, name=NAME), budget=2
    )
    db = await pools.current()
    async with db.connection() as conn:
        await conn.set_autocommit(True)
        await conn.execute("set role pg_monitor")
    assert await db.fetchval("select 1") == 1
    assert len(configured) == 2
    assert repr(pools) == "<PoolPerLoop budget=2 free=1 loops=1>"
    await pools.close()


def test_a_connection_that_is_lost_as_it_is_counted_leaves_nothing(dsn: str) -> None:
    with psycopg.connect(dsn) as conn:
        conn.close()
        with pytest.raises(psycopg.OperationalError):
            Wire(conn.pgconn)


@pytest.mark.filterwarnings("error")
def test_a_loop_that_ends_no_generators_and_dies_takes_nothing_with_it(
    make_pools: MakePools,
) -> None:
    """As those of other makers may, and Python closes what is left of them wherever it likes."""
    pools = make_pools(1, max_size=1)
    loop = asyncio.new_event_loop()

    async def main() -> None:
        hooks = sys.get_asyncgen_hooks()
        sys.set_asyncgen_hooks(None, None)
        try:
            await pools.current()
        finally:
            sys.set_asyncgen_hooks(*hooks)

    loop.run_until_complete(main())
    loop.close()
    asyncio.run(use(pools))
    gc.collect()
    until(lambda: repr(pools) == "<PoolPerLoop budget=1 free=1 loops=0>")


FORK = """
from poolkeeper import PoolManager, PoolPerLoop

pools = PoolPerLoop(lambda: PoolManager(sys.argv[1], min_size=1, name="forked"), budget=1)


async def session():
    return await (await pools.current()).fetchval("select pg_backend_pid()")


async def parent():
    mine = await session()
    if (pid := os.fork()) == 0:
        os._exit(child(mine))
    assert os.waitpid(pid, 0)[1] == 0
    assert await session() == mine
    print("parent")


def child(before):
    asyncio.events._set_running_loop(None)
    assert run(session()) != before
    return 0


run(parent())
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="Windows does not fork")
def test_a_forked_child_has_a_budget_of_its_own(dsn: str, loop_name: str) -> None:
    ended = run_program(FORK, dsn, loop=loop_name)
    assert (ended.code, ended.out) == (0, "parent\n"), ended.err


async def test_a_socket_stays_as_libpq_has_made_it(dsn: str) -> None:
    """What is watched is a duplicate, and a mode of one is a mode of both."""
    pools = PoolPerLoop(lambda: PoolManager(dsn, min_size=1, max_size=1), budget=1)
    db = await pools.current()
    async with db.connection() as conn:
        assert not os.get_blocking(conn.pgconn.socket)
    await db.close()
