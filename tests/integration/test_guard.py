"""Every use of a pool from where it does not belong is refused at once, and harms nothing."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import logging
import re
import threading
import time
from asyncio import proactor_events
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from dataclasses import dataclass
from typing import Any, Self

import psycopg
import pytest
from psycopg.conninfo import make_conninfo
from psycopg_pool import AsyncConnectionPool

from poolkeeper import BoundPool, LoopMismatchError, PoolManager, ReleasedConnectionError
from tests.support.server import endless, is_at_work
from tests.support.waiting import eventually

SECRET = "hunter2-pw"
HERE = "tests/integration/test_guard.py"


def new_loop(loop_name: str) -> asyncio.AbstractEventLoop:
    if loop_name == "uvloop":
        import uvloop

        return uvloop.new_event_loop()
    return asyncio.SelectorEventLoop()


@dataclass
class Held:
    """What the owner has in hand when somebody else comes along."""

    db: PoolManager[Any]
    conn: Any
    server_cursor: Any
    pid: int

    @property
    def pool(self) -> BoundPool[Any]:
        return self.db.pool


async def take_hold(db: PoolManager[Any]) -> Held:
    await open_it(db)
    conn = await db.pool.getconn()
    server_cursor = conn.cursor("far")
    await server_cursor.execute("select generate_series(1, 1000)")
    assert await server_cursor.fetchone() == (1,)
    return Held(db, conn, server_cursor, conn.info.backend_pid)


async def open_it(db: PoolManager[Any]) -> None:
    await db.open()


def open_line() -> str:
    lines, first = inspect.getsourcelines(open_it)
    return f"{HERE}:{first + len(lines) - 1}"


async def still_works(held: Held) -> None:
    """The owner's checkout and the owner's pool are as they were."""
    assert await held.server_cursor.fetchone() == (2,)
    await held.server_cursor.close()
    assert (await (await held.conn.execute("select pg_backend_pid()")).fetchone())[0] == held.pid
    await held.conn.commit()
    await held.pool.putconn(held.conn)
    assert (held.db.state, held.pool.min_size, held.pool.max_size) == ("open", 2, 2)
    seen = set()
    async with contextlib.AsyncExitStack() as stack:
        for _ in range(2):
            conn = await stack.enter_async_context(held.db.connection())
            seen.add(conn.info.backend_pid)
    assert held.pid in seen
    await held.db.close()


class Place:
    """
    An owner loop, and a place that is not it.

    When the test is over, all that the owner still has is ended, and after one that passed there
    is nothing to end. Left to the collector, it would fail a later test, for its loop is closed.
    """

    def __init__(self, loop_name: str) -> None:
        self.loop_name = loop_name
        self.owner = new_loop(loop_name)
        self.db: PoolManager[Any] | None = None
        self.held: Held | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, exc_type: type[BaseException] | None, *rest: object) -> None:
        left: list[str] = []
        try:
            if not self.owner.is_closed():
                left = self.own(self._end())
            elif self.db is not None and self.db.pool.state == "open":
                # It is told that its loop is closed, and ends what is its own nevertheless.
                with pytest.raises(LoopMismatchError):
                    self.foreign(self.db.close())
        finally:
            self.shut()
        if self.held is not None:
            # psycopg warns of one that nobody closed, and nobody can any more.
            self.held.server_cursor._closed = True
        if exc_type is None:
            assert not left

    async def _end(self) -> list[str]:
        """End everything, and return what had not ended by itself."""
        left = []
        if self.db is not None and self.db.state != "closed":
            left.append(repr(self.db))
            await self.db.close(timeout=0)
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        left += map(repr, tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        return left

    def hold(self, dsn: str) -> Held:
        """Let the owner open a pool, and take a connection of it."""
        self.db = PoolManager(
            make_conninfo(dsn, password=SECRET), min_size=2, max_size=2, name="orders", timeout=5
        )
        self.held = held = self.own(take_hold(self.db))
        return held

    def own(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        return self.owner.run_until_complete(coroutine)

    def foreign(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        loop = new_loop(self.loop_name)
        try:
            return loop.run_until_complete(coroutine)
        finally:
            loop.close()

    def leave(self) -> None:
        pass

    def shut(self) -> None:
        self.owner.close()


class SameThread(Place):
    """Another loop in the thread of the owner, which rests but is not closed."""

    refused = 'pool "orders" is bound to a different event loop'
    hint = "Open the pool on the loop that uses it: the one that opened it does not run"


class OtherThread(SameThread):
    """The owner runs, in a thread of its own."""

    hint = "Open one PoolManager per event loop, or hand the work to the owner loop"

    def __init__(self, loop_name: str) -> None:
        super().__init__(loop_name)
        self.thread = threading.Thread(target=self.owner.run_forever, name="owner")
        self.thread.start()

    def own(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self.owner).result(20)

    def shut(self) -> None:
        self.owner.call_soon_threadsafe(self.owner.stop)
        self.thread.join(20)
        super().shut()


class NoLoop(Place):
    """A coroutine driven by hand."""

    refused = r'pool "orders" was used outside of its event loop'
    hint = "Await it from a coroutine on the loop that opened the pool"

    def foreign(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        try:
            coroutine.send(None)
        finally:
            coroutine.close()


class OwnerClosed(Place):
    """The owner is closed; another loop runs in the thread."""

    refused = 'pool "orders" is bound to an event loop that is closed'
    hint = "Every asyncio.run() makes a new loop: open the pool in the one that uses it"

    def leave(self) -> None:
        self.owner.close()


PLACES: list[type[Any]] = [SameThread, OtherThread, NoLoop, OwnerClosed]

# --- what may be tried ------------------------------------------------------------------------

Operation = Callable[[Held], Awaitable[Any]]


async def manager_connection(held: Held) -> None:
    async with held.db.connection():
        pass


async def pool_connection(held: Held) -> None:
    async with held.pool.connection():
        pass


async def transaction(held: Held) -> None:
    async with held.db.transaction():
        pass


async def cursor(held: Held) -> None:
    async with held.db.cursor():
        pass


async def fetchone(held: Held) -> None:
    await held.db.fetchone("select 1")


async def fetchall(held: Held) -> None:
    await held.db.fetchall("select 1")


async def fetchval(held: Held) -> None:
    await held.db.fetchval("select 1")


async def execute(held: Held) -> None:
    await held.db.execute("select 1")


async def getconn(held: Held) -> None:
    await held.pool.getconn()


async def getconn_at_once(held: Held) -> None:
    await held.pool.getconn(timeout=0)


async def putconn(held: Held) -> None:
    await held.pool.putconn(held.conn)


async def resize(held: Held) -> None:
    await held.pool.resize(1, 7)


async def drain(held: Held) -> None:
    await held.pool.drain()


async def check(held: Held) -> None:
    await held.pool.check()


async def wait(held: Held) -> None:
    await held.pool.wait()


async def manager_close(held: Held) -> None:
    await held.db.close()


async def pool_close(held: Held) -> None:
    await held.pool.close()


async def conn_execute(held: Held) -> None:
    await held.conn.execute("select 1")


async def conn_cursor_execute(held: Held) -> None:
    await held.conn.cursor().execute("select 1")


async def conn_executemany(held: Held) -> None:
    await held.conn.cursor().executemany("select %s", [(1,), (2,)])


async def conn_stream(held: Held) -> None:
    async for _ in held.conn.cursor().stream("select 1"):
        pass


async def conn_copy(held: Held) -> None:
    async with held.conn.cursor().copy("copy (select 1) to stdout"):
        pass


async def conn_transaction(held: Held) -> None:
    async with held.conn.transaction():
        pass


async def conn_pipeline(held: Held) -> None:
    async with held.conn.pipeline():
        pass


async def conn_notifies(held: Held) -> None:
    async for _ in held.conn.notifies(timeout=0):
        pass


async def conn_commit(held: Held) -> None:
    await held.conn.commit()


async def conn_rollback(held: Held) -> None:
    await held.conn.rollback()


async def conn_set_autocommit(held: Held) -> None:
    await held.conn.set_autocommit(True)


async def conn_set_isolation_level(held: Held) -> None:
    await held.conn.set_isolation_level(None)


async def conn_cancel_safe(held: Held) -> None:
    await held.conn.cancel_safe()


async def conn_close(held: Held) -> None:
    await held.conn.close()


async def server_cursor_fetch(held: Held) -> None:
    await held.server_cursor.fetchone()


async def server_cursor_scroll(held: Held) -> None:
    await held.server_cursor.scroll(1)


async def server_cursor_close(held: Held) -> None:
    await held.server_cursor.close()


OPERATIONS: list[Operation] = [
    manager_connection,
    pool_connection,
    transaction,
    cursor,
    fetchone,
    fetchall,
    fetchval,
    execute,
    getconn,
    getconn_at_once,
    putconn,
    resize,
    drain,
    check,
    wait,
    manager_close,
    pool_close,
    conn_execute,
    conn_cursor_execute,
    conn_executemany,
    conn_stream,
    conn_copy,
    conn_transaction,
    conn_pipeline,
    conn_notifies,
    conn_commit,
    conn_rollback,
    conn_set_autocommit,
    conn_set_isolation_level,
    conn_cancel_safe,
    conn_close,
    server_cursor_fetch,
    server_cursor_scroll,
    server_cursor_close,
]


def assert_says(error: LoopMismatchError, place: Any, operation: Any) -> None:
    """Name the pool, where it was opened, where it was used, and what to do."""
    first, detail, hint = str(error).split("\n")
    assert re.fullmatch(place.refused, first), first
    assert detail.startswith(f"DETAIL:  Opened at {open_line()} in task ")
    body, start = inspect.getsourcelines(operation)
    used = re.search(rf"{re.escape(HERE)}:(\d+)", detail.partition(". Used ")[2])
    assert used, detail
    assert start < int(used[1]) < start + len(body), detail
    assert hint.startswith(f"HINT:  {place.hint}")
    assert "See https://" in hint


def by_name(value: Any) -> str:
    return str(value.__name__)


@pytest.mark.parametrize("operation", OPERATIONS, ids=by_name)
@pytest.mark.parametrize("kind", PLACES, ids=by_name)
def test_an_operation_from_elsewhere_is_refused_and_the_owner_goes_on(
    kind: type[Any],
    operation: Operation,
    dsn: str,
    loop_name: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.DEBUG)
    with kind(loop_name) as place:
        held = place.hold(dsn)
        place.leave()
        begin = time.monotonic()
        with pytest.raises(LoopMismatchError) as caught:
            place.foreign(operation(held))
        assert time.monotonic() - begin < 20  # or it would wait for ever
        assert isinstance(caught.value, RuntimeError)
        assert_says(caught.value, place, operation)
        if kind is OwnerClosed:
            asyncio.run(works_on_a_new_loop(held))
        else:
            place.own(still_works(held))
    for text in (str(caught.value), repr(caught.value), repr(held.db), repr(held.pool)):
        assert SECRET not in text
    assert SECRET not in caplog.text


async def works_on_a_new_loop(held: Held) -> None:
    async with held.db:
        assert await held.db.fetchval("select 1") == 1


@pytest.mark.parametrize("kind", [SameThread, OtherThread], ids=by_name)
@pytest.mark.parametrize("through_pool", [False, True], ids=["manager", "pool"])
def test_opening_a_pool_that_is_open_elsewhere_is_refused(
    kind: type[Any], through_pool: bool, dsn: str, loop_name: str
) -> None:
    async def opening(held: Held) -> None:
        await (held.pool.open(wait=True) if through_pool else held.db.open())

    with kind(loop_name) as place:
        held = place.hold(dsn)
        with pytest.raises(LoopMismatchError) as caught:
            place.foreign(opening(held))
        assert_says(caught.value, place, opening)
        place.own(still_works(held))


@pytest.mark.parametrize("through_pool", [False, True], ids=["manager", "pool"])
def test_opening_outside_of_any_loop_is_refused_and_touches_nothing(
    through_pool: bool, dsn: str, loop_name: str
) -> None:
    async def opening(held: Held) -> None:
        await (held.pool.open(wait=True) if through_pool else held.db.open())

    with NoLoop(loop_name) as place:
        held = place.hold(dsn)
        with pytest.raises(LoopMismatchError, match=r"bound to a different|outside of"):
            place.foreign(opening(held))
        place.own(still_works(held))
        # Closed by its owner, it is free to be opened, but still not here.
        with pytest.raises(
            LoopMismatchError, match='pool "orders" cannot be opened outside of an event loop'
        ):
            place.foreign(opening(held))
        assert held.db.state == "closed"
        asyncio.run(works_on_a_new_loop(held))


class FakeProactorLoop(asyncio.SelectorEventLoop, proactor_events.BaseProactorEventLoop):  # type: ignore[name-defined,misc]
    """Has the type of Windows' default loop, and works here."""

    run_forever = asyncio.BaseEventLoop.run_forever


@pytest.mark.parametrize("through_pool", [False, True], ids=["manager", "pool"])
def test_a_proactor_loop_is_refused_on_open(through_pool: bool, dsn: str) -> None:
    db: PoolManager[Any] = PoolManager(dsn, min_size=1, name="orders")

    async def opening() -> None:
        await (db.pool.open(wait=True) if through_pool else db.open())

    loop = asyncio.SelectorEventLoop()
    loop.__class__ = FakeProactorLoop
    try:
        with pytest.raises(LoopMismatchError) as caught:
            loop.run_until_complete(opening())
    finally:
        loop.__class__ = asyncio.SelectorEventLoop
        loop.close()
    first, detail, hint = str(caught.value).split("\n")
    assert first == 'pool "orders" cannot be opened on a ProactorEventLoop'
    assert f"open() was called at {HERE}:{opening.__code__.co_firstlineno + 1}" in detail
    assert "asyncio.run(main(), loop_factory=asyncio.SelectorEventLoop)" in hint
    assert db.state == "new"

    async def works() -> None:
        async with db:
            assert await db.fetchval("select 1") == 1

    asyncio.run(works())


# --- the owner at work, in another thread -----------------------------------------------------


@contextlib.contextmanager
def a_query(place: Place, held: Held, dsn: str) -> Iterator[asyncio.Task[Any]]:
    """Let the owner run a query, which the server is at until the block is left."""

    async def start(lasting: str) -> asyncio.Task[Any]:
        await held.server_cursor.close()
        await held.conn.commit()
        return asyncio.ensure_future(held.conn.execute(f"select {lasting}, 42"))

    with endless(dsn) as lasting:
        query = place.own(start(lasting))
        assert eventually(lambda: is_at_work(dsn, held.pid))
        yield query


@pytest.mark.parametrize(
    "operation", [conn_execute, conn_commit, conn_notifies, conn_copy, putconn], ids=by_name
)
def test_a_connection_at_work_on_its_own_loop_is_not_disturbed_from_another_thread(
    operation: Operation, dsn: str, loop_name: str
) -> None:
    """The stranger must not wait for the lock either: it could not be woken, nor the owner then."""
    with OtherThread(loop_name) as place:
        held = place.hold(dsn)
        with a_query(place, held, dsn) as query:
            with pytest.raises(LoopMismatchError) as caught:
                place.foreign(asyncio.wait_for(operation(held), 10))
            assert not query.done()  # refused at once, not when the lock was free
        assert_says(caught.value, place, operation)

        async def finish() -> None:
            # Two at once, so that the lock is contended by its owner's tasks too.
            second = asyncio.ensure_future(held.conn.execute("select 43"))
            assert await (await query).fetchone() == ("", 42)
            assert await (await second).fetchone() == (43,)
            await held.pool.putconn(held.conn)
            assert held.pool.get_stats()["pool_available"] == 2
            await held.db.close()

        place.own(finish())


def test_a_task_waiting_in_line_is_not_disturbed_by_a_stranger(dsn: str, loop_name: str) -> None:
    with OtherThread(loop_name) as place:
        held = place.hold(dsn)

        async def hold_all() -> tuple[Any, asyncio.Task[Any]]:
            second = await held.pool.getconn()
            waiting = asyncio.ensure_future(held.pool.getconn())
            await asyncio.sleep(0)
            return second, waiting

        second, waiting = place.own(hold_all())
        for operation in (getconn, manager_connection, fetchone):
            with pytest.raises(LoopMismatchError):
                place.foreign(operation(held))

        async def release() -> None:
            await held.pool.putconn(second)
            third = await asyncio.wait_for(waiting, 5)
            await held.pool.putconn(third)
            await still_works(held)

        place.own(release())


# --- what else belongs to a guard -------------------------------------------------------------


async def test_the_pool_of_a_manager_is_a_real_psycopg_pool(db: PoolManager[Any]) -> None:
    assert isinstance(db.pool, AsyncConnectionPool)
    assert isinstance(db.pool, BoundPool)
    assert db.pool is db.pool


def test_cancel_may_be_called_from_any_thread(dsn: str, loop_name: str) -> None:
    """Documented by psycopg as thread-safe; it opens a connection of its own."""
    with OtherThread(loop_name) as place:
        held = place.hold(dsn)
        with a_query(place, held, dsn) as query:
            held.conn.cancel()

            async def cancelled() -> None:
                with pytest.raises(psycopg.errors.QueryCanceled, match="due to user request"):
                    await query
                await held.conn.rollback()
                await held.pool.putconn(held.conn)
                await held.db.close()

            place.own(cancelled())


def test_a_handle_that_was_given_back_is_refused_elsewhere_too(dsn: str, loop_name: str) -> None:
    """Which of the two mistakes is named matters less than that it is refused."""
    with SameThread(loop_name) as place:
        held = place.hold(dsn)

        async def give_back() -> None:
            await held.server_cursor.close()
            await held.pool.putconn(held.conn)

        place.own(give_back())
        with pytest.raises((LoopMismatchError, ReleasedConnectionError)):
            place.foreign(conn_execute(held))
        with pytest.raises((LoopMismatchError, ReleasedConnectionError)):
            place.foreign(putconn(held))

        async def close() -> None:
            assert held.pool.counts()["idle"] == 2
            await held.db.close()

        place.own(close())


class OwnWait(psycopg.AsyncConnection[Any]):
    """A class with a wait() of its own, which may do without ours."""

    async def wait(self, gen: Any, *args: Any, **kwargs: Any) -> Any:
        return await super().wait(gen, *args, **kwargs)


@pytest.mark.parametrize("connection_class", [psycopg.AsyncConnection, OwnWait])
async def test_who_drives_an_exchange_himself_elsewhere_is_refused(
    connection_class: Any, dsn: str
) -> None:
    """He does not ask for the lock, which would have refused him."""
    async with (
        PoolManager(
            dsn, min_size=1, max_size=1, name="orders", connection_class=connection_class
        ) as db,
        db.connection() as conn,
    ):
        conn.pgconn.send_query(b"select 42")

        def elsewhere() -> None:
            asyncio.run(conn.wait(psycopg.generators.execute(conn.pgconn)))

        with pytest.raises(LoopMismatchError, match="work on one of its connections"):
            await asyncio.to_thread(elsewhere)
        (result,) = await conn.wait(psycopg.generators.execute(conn.pgconn))
        assert result.get_value(0, 0) == b"42"
        await conn.rollback()


def test_reading_numbers_needs_no_loop(dsn: str, loop_name: str) -> None:
    with SameThread(loop_name) as place:
        held = place.hold(dsn)
        assert held.pool.get_stats()["pool_size"] == 2
        assert held.pool.pop_stats()["pool_size"] == 2
        assert (held.db.state, held.db.name) == ("open", "orders")
        assert "in_use=1" in repr(held.db)
        place.own(still_works(held))
