"""One life of a pool: who owns it, in whose context it works, what is left if it is dropped."""

from __future__ import annotations

import asyncio
import gc
import logging
import threading
import time
import traceback
import warnings
import weakref
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import psycopg_pool
import pytest

from poolkeeper import (
    ClosedError,
    LoopMismatchError,
    OpenError,
    PoolManager,
)
from tests.support.programs import run_program
from tests.support.waiting import eventually

MakeManager = Callable[..., PoolManager[Any]]
CountSessions = Callable[[str], int]

PATIENT = 30.0
AT_ONCE = 10.0  # seconds; the patience of what is asked here is 30

tenant: ContextVar[str] = ContextVar("tenant", default="nobody")


class Server:
    """A server that can be taken out of reach of new connections."""

    def __init__(self, dsn: str) -> None:
        self._dsn = dsn
        self.in_reach = True

    def conninfo(self) -> str:
        """Return where it is, or a port at which nobody listens."""
        return self._dsn if self.in_reach else "host=127.0.0.1 port=1"


@pytest.fixture
def server(dsn: str) -> Server:
    return Server(dsn)


# --- one owner ------------------------------------------------------------------------------------


def test_of_threads_that_open_at_once_one_is_the_owner(dsn: str) -> None:
    """The others are refused at once, and all that the owner does works."""
    for _ in range(5):
        db = PoolManager(dsn, min_size=1, max_size=2, open_timeout=PATIENT)
        together = threading.Barrier(4)
        outcomes: list[str] = []

        async def use(
            db: PoolManager[Any] = db,
            together: threading.Barrier = together,
            outcomes: list[str] = outcomes,
        ) -> None:
            together.wait()
            began = time.monotonic()
            try:
                await db.open()
            except LoopMismatchError:
                assert time.monotonic() - began < AT_ONCE
                outcomes.append("refused")
            else:
                for number in range(20):
                    assert await db.fetchval("select %s::int", (number,)) == number
                outcomes.append("owner")
            await asyncio.to_thread(together.wait)
            if db.pool.is_here():
                await db.close()

        threads = [threading.Thread(target=asyncio.run, args=(use(),)) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert sorted(outcomes) == ["owner", "refused", "refused", "refused"]


def test_a_child_forked_while_another_thread_begins_a_life_can_begin_one(
    dsn: str, loop_name: str
) -> None:
    ended = run_program(
        """
        from poolkeeper import PoolManager
        from poolkeeper._binding import beginning
        db = PoolManager(sys.argv[1], min_size=1)

        async def use():
            async with db:
                print(await db.fetchval("select 42"))

        with beginning():
            pid = os.fork()
            if pid == 0:
                run(use())
                sys.stdout.flush()
                os._exit(0)
            os.waitpid(pid, 0)
        """,
        dsn,
        loop=loop_name,
    )
    assert (ended.code, ended.out, ended.err) == (0, "42\n", "")


async def test_an_open_that_is_cancelled_twice_leaves_no_session(
    make_manager: MakeManager, server_sessions: CountSessions
) -> None:
    """At whatever point, and before the garbage collector has run, with its task at hand."""
    kept = []
    gc.collect()
    gc.disable()
    try:
        for number in range(24):
            manager = make_manager(min_size=2, application_name="twice")
            opening = asyncio.create_task(manager.open())
            await asyncio.sleep(0.0005 * number)
            opening.cancel()
            await asyncio.sleep(0)
            opening.cancel()
            await asyncio.wait({opening})
            if not opening.cancelled():
                await manager.close()
            kept.append(opening)
        assert await asyncio.to_thread(eventually, lambda: server_sessions("twice") == 0)
    finally:
        gc.enable()


# --- in whose context -----------------------------------------------------------------------------


@pytest.mark.parametrize("bare", [True, False])
async def test_callbacks_see_the_context_of_open_and_check_that_of_who_asks(
    dsn: str, bare: bool
) -> None:
    seen: set[tuple[str, str]] = set()

    def see(callback: str) -> Any:
        async def seeing(*_: Any) -> None:
            seen.add((callback, tenant.get()))

        return seeing

    async def conninfo() -> str:
        seen.add(("conninfo", tenant.get()))
        return dsn

    arguments: dict[str, Any] = {
        "conninfo": conninfo,
        "min_size": 0,
        "max_size": 2,
        "configure": see("configure"),
        "check": see("check"),
        "reset": see("reset"),
    }

    async def request(name: str) -> None:
        tenant.set(name)
        async with pool.connection() as conn:
            await conn.execute("select 1")

    tenant.set("whoever opens")
    manager = PoolManager(**arguments)
    pool = psycopg_pool.AsyncConnectionPool(open=False, **arguments) if bare else manager.pool
    async with pool:
        await asyncio.gather(request("acme"), request("umbrella"))
        if not bare:
            await asyncio.create_task(manager.check())
        async with pool.connection():  # so every reset has begun
            pass
    opener = {(name, "whoever opens") for name in ("conninfo", "configure", "reset", "check")}
    assert seen == opener | {("check", "acme"), ("check", "umbrella")}


async def test_an_outage_is_told_in_the_context_of_open(
    make_manager: MakeManager, server: Server
) -> None:
    seen: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    def told(_pool: Any) -> None:
        seen.set_result(tenant.get())

    tenant.set("whoever opens")
    db = make_manager(
        server.conninfo, min_size=1, reconnect_timeout=0, reconnect_failed=told, timeout=1
    )
    await db.open()
    server.in_reach = False
    await db.pool.drain()

    async def request() -> None:
        tenant.set("acme")
        with pytest.raises(psycopg_pool.PoolTimeout):
            await db.fetchval("select 1")

    await asyncio.create_task(request())
    assert await asyncio.wait_for(seen, PATIENT) == "whoever opens"


# --- wait() ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["wait", "open"])
async def test_waiting_for_an_open_pool_is_over_when_it_has_its_connections(
    make_manager: MakeManager, how: str
) -> None:
    begun, go_on = asyncio.Event(), asyncio.Event()
    go_on.set()

    async def configure(conn: Any) -> None:
        begun.set()
        await go_on.wait()

    db = make_manager(min_size=2, max_size=4, configure=configure)
    await db.open()
    begun.clear()
    go_on.clear()
    await db.pool.drain()
    waiting = asyncio.create_task(db.pool.wait(PATIENT) if how == "wait" else db.open())
    await begun.wait()
    assert not waiting.done()
    go_on.set()
    await waiting
    assert db.snapshot().idle == 2


async def test_connections_in_use_are_there(make_manager: MakeManager) -> None:
    """psycopg_pool would wait for them to be idle, and close the pool if they stay in use."""
    db = make_manager(min_size=1, max_size=1)
    await db.open()
    async with db.connection():
        async with asyncio.timeout(AT_ONCE):
            await db.pool.wait(PATIENT)


async def test_a_wait_for_an_open_pool_that_ends_in_vain_leaves_it_open(
    make_manager: MakeManager, server: Server
) -> None:
    db = make_manager(server.conninfo, min_size=2, max_size=2)
    await db.open()
    async with db.connection() as conn:
        server.in_reach = False
        await db.pool.drain()
        with pytest.raises(OpenError):
            await db.pool.wait(0.2)
        assert db.state == "open"
        await conn.execute("select 1")
        server.in_reach = True
    await db.pool.wait(PATIENT)
    assert await db.fetchval("select 42") == 42


async def test_who_waits_for_more_connections_than_are_wanted_by_now_is_told(
    make_manager: MakeManager, server: Server
) -> None:
    db = make_manager(server.conninfo, min_size=2, max_size=2)
    await db.open()
    server.in_reach = False
    await db.pool.drain()
    waiting = asyncio.create_task(db.pool.wait(PATIENT))
    await asyncio.sleep(0)
    await db.pool.resize(0, 2)
    async with asyncio.timeout(AT_ONCE):
        await waiting


# --- an error for each ----------------------------------------------------------------------------


def functions_of(error: BaseException) -> set[str]:
    return {frame.name for frame in traceback.extract_tb(error.__traceback__)}


async def test_tasks_that_wait_when_the_pool_closes_get_an_error_each(
    make_manager: MakeManager,
) -> None:
    db = make_manager(min_size=1)
    await db.open()

    async def orders() -> None:
        async with db.connection():
            pass

    async def billing() -> None:
        async with db.connection():
            pass

    async with db.connection():
        tasks = [asyncio.create_task(work()) for work in (orders, billing)]
        while db.snapshot().waiting < 2:
            await asyncio.sleep(0)
        await db.close(0)
    first, second = await asyncio.gather(*tasks, return_exceptions=True)
    assert isinstance(first, ClosedError)
    assert isinstance(second, ClosedError)
    assert first is not second
    assert str(first) == str(second)
    assert "billing" not in functions_of(first)
    assert "orders" not in functions_of(second)


async def test_tasks_that_open_in_vain_get_an_error_each_with_the_cause(
    make_manager: MakeManager, server: Server
) -> None:
    server.in_reach = False
    db = make_manager(server.conninfo, min_size=1, open_timeout=1)
    first, second = await asyncio.gather(db.open(), db.open(), return_exceptions=True)
    assert isinstance(first, OpenError)
    assert isinstance(second, OpenError)
    assert first is not second
    assert first.__cause__ is not None
    assert second.__cause__ is not None


# --- what psycopg_pool counts ---------------------------------------------------------------------


async def test_time_is_counted_from_the_first_use_on_and_no_fraction_is_dropped(
    make_manager: MakeManager,
) -> None:
    db = make_manager(min_size=1)
    await db.open()
    assert "usage_ms" not in db.pool.get_stats()
    async with db.connection():
        pass
    assert "usage_ms" in db.pool.get_stats()
    began = time.monotonic()
    used, shortest = db.pool.pop_stats()["usage_ms"], 0.0
    while shortest < 0.05:
        async with db.connection():
            one = time.monotonic()
            while time.monotonic() - one < 0.0003:
                pass
        shortest += 0.0003
        used += db.pool.pop_stats()["usage_ms"]
    assert 49 <= used <= (time.monotonic() - began) * 1000 + 1


async def test_the_wait_of_one_who_had_to_wait_is_counted(make_manager: MakeManager) -> None:
    db = make_manager(min_size=1)
    await db.open()
    async with db.connection():
        waiter = asyncio.create_task(db.fetchval("select 1"))
        while not db.snapshot().waiting:
            await asyncio.sleep(0)
    await waiter
    stats = db.pool.get_stats()
    assert stats["requests_queued"] == 1
    assert stats["requests_wait_ms"] >= 0


# --- the logging of the user's --------------------------------------------------------------------


def test_an_open_pool_leaves_asyncios_own_messages_where_they_were(
    dsn: str, loop_name: str
) -> None:
    """In debug mode, with no logging configured: they go to stderr."""
    ended = run_program(
        """
        import gc
        from poolkeeper import PoolManager

        async def fails():
            raise RuntimeError("boom")

        async def main():
            asyncio.get_running_loop().set_debug(True)
            async with PoolManager(sys.argv[1], min_size=1) as db:
                task = asyncio.create_task(fails())
                await asyncio.sleep(0.05)
                del task
                gc.collect()

        run(main())
        """,
        dsn,
        loop=loop_name,
    )
    assert ended.code == 0
    assert "Task exception was never retrieved" in ended.err
    assert "RuntimeError: boom" in ended.err


async def test_an_open_pool_adds_no_handler_to_a_logger(make_manager: MakeManager) -> None:
    logger = logging.getLogger("asyncio")
    before = list(logger.handlers), list(logger.filters)
    asyncio.get_running_loop().set_debug(True)
    try:
        async with make_manager(min_size=1):
            assert logger.handlers == before[0]
    finally:
        asyncio.get_running_loop().set_debug(False)
    assert (logger.handlers, logger.filters) == before


# --- dropped while open ---------------------------------------------------------------------------


def test_a_pool_that_is_dropped_while_open_says_so_and_nothing_else(
    dsn: str, loop_name: str
) -> None:
    ended = run_program(
        """
        import gc, warnings, weakref
        from poolkeeper import PoolManager
        warnings.simplefilter("always")
        warnings.showwarning = lambda message, category, *_, **__: print(category.__name__)

        async def main():
            gc.disable()
            before = asyncio.all_tasks()
            db = PoolManager(sys.argv[1], min_size=2, name="dropped", leak_threshold=1)
            await db.open()
            assert await db.fetchval("select 1") == 1
            gone = weakref.ref(db.pool)
            del db
            async with asyncio.timeout(10):
                while gone() is not None or asyncio.all_tasks() != before:
                    gc.collect()
                    await asyncio.sleep(0.01)
            print("gone")

        run(main())
        """,
        dsn,
        loop=loop_name,
    )
    assert (ended.code, ended.out, ended.err) == (0, "UnclosedManagerWarning\ngone\n", "")


async def test_the_sessions_of_a_pool_that_is_dropped_are_closed(
    dsn: str, server_sessions: CountSessions
) -> None:
    db = PoolManager(dsn, min_size=2, application_name="dropped")
    await db.open()
    assert await asyncio.to_thread(server_sessions, "dropped") == 2
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # one that is recorded keeps the manager
        del db
        gc.collect()
    assert await asyncio.to_thread(eventually, lambda: server_sessions("dropped") == 0)


async def test_a_pool_that_is_dropped_in_an_outage_stops_trying(server: Server) -> None:
    db = PoolManager(server.conninfo, min_size=1)
    await db.open()
    server.in_reach = False
    await db.pool.drain()
    gone = weakref.ref(db.pool)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        del db
        async with asyncio.timeout(AT_ONCE):
            while gone() is not None:
                gc.collect()
                await asyncio.sleep(0.01)
