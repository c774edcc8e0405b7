"""The socket of a session is watched as long as it lives, and nobody is the worse for it."""

from __future__ import annotations

import asyncio
import errno
import gc
import os
import select
import socket
import threading
import time
import weakref
from collections.abc import Callable
from contextlib import suppress
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import psycopg
import pytest

from poolkeeper import PoolManager
from poolkeeper._binding import LoopBinding
from poolkeeper._wire import READ, READABLE, WRITABLE, WRITE, Wire
from tests.support.inside import life
from tests.support.programs import run_program
from tests.support.server import admin, kill_sessions
from tests.support.waiting import until

MakeManager = Callable[..., PoolManager[Any]]

FD = Path("/proc/self/fd")


def sockets() -> int:
    """Return how many descriptors of this process are sockets."""
    number = 0
    for descriptor in FD.iterdir():
        with suppress(OSError):  # that of the directory
            number += str(descriptor.readlink()).startswith("socket:")
    return number


needs_proc = pytest.mark.skipif(not FD.is_dir(), reason="there is no /proc")


async def busy_for(seconds: float) -> int:
    """Return how busy this process is meanwhile, in per cent of a processor."""
    began, used = time.monotonic(), time.process_time()
    await asyncio.sleep(seconds)
    return round(100 * (time.process_time() - used) / (time.monotonic() - began))


async def test_what_comes_unasked_keeps_nobody_busy_and_is_there_when_it_is_asked_for(
    make_manager: MakeManager, dsn: str
) -> None:
    """A notification that nobody waits for can be read for as long as nobody reads it."""
    db = make_manager(min_size=1, max_size=1, name="orders")
    await db.open()
    async with db.connection() as conn:
        await conn.set_autocommit(True)
        await conn.execute("listen waiting_test")
        await asyncio.to_thread(admin, dsn, "notify waiting_test, 'unasked'")
        await until(lambda: not conn._session.is_quiet())
        await asyncio.sleep(0.05)
        assert await busy_for(0.5) < 50
        assert [n.payload async for n in conn.notifies(timeout=5, stop_after=1)] == ["unasked"]
        assert await (await conn.execute("select 42")).fetchone() == (42,)
        await asyncio.to_thread(admin, dsn, "notify waiting_test, 'again'")
        assert [n.payload async for n in conn.notifies(timeout=5, stop_after=1)] == ["again"]
        assert [n.payload async for n in conn.notifies(timeout=0.05)] == []
        await conn.execute("unlisten *")
    assert await db.fetchval("select 42") == 42


async def test_an_idle_session_that_is_ended_keeps_nobody_busy(
    make_manager: MakeManager, dsn: str
) -> None:
    db = make_manager(min_size=3, max_size=3, name="orders", application_name="ended_idle")
    await db.open()
    await asyncio.gather(*(db.fetchval("select pg_sleep(0.05)") for _ in range(3)))
    assert await asyncio.to_thread(kill_sessions, dsn, "ended_idle") == 3
    await until(lambda: not any(c._session.is_quiet() for c in life(db.pool).idle))
    await asyncio.sleep(0.05)
    assert await busy_for(0.5) < 50
    assert await db.fetchval("select 42") == 42


@needs_proc
async def test_a_session_that_is_dropped_lets_go_of_its_socket_at_once(
    make_manager: MakeManager,
) -> None:
    """Also within the quarter of a second in which a timer would still look at it."""
    db = make_manager(min_size=1, max_size=1, name="orders")
    await db.open()
    assert await db.fetchval("select 42") == 42
    gc.collect()
    before = sockets()
    conn: Any = life(db.pool).idle.pop()
    conn._session.in_pool = False
    conn.pgconn.finish()
    del conn
    gc.collect()
    assert sockets() == before - 2  # libpq's and its duplicate


@needs_proc
async def test_no_descriptor_is_left_however_a_session_ends(
    make_manager: MakeManager, dsn: str
) -> None:
    gc.collect()
    before = sockets()
    db = make_manager(min_size=2, max_size=2, name="orders", application_name="no_descriptor")
    for _ in range(3):
        await db.open()
        await asyncio.gather(*(db.fetchval("select pg_sleep(0.05)") for _ in range(2)))
        async with db.connection() as conn:
            await conn.execute("select 1")
            await conn.close()
        async with db.connection() as conn:
            await conn.execute("select 1")
            await conn.commit()
            conn.pgconn.finish()
        query = asyncio.create_task(db.fetchval("select pg_sleep(30)"))
        await until(lambda: db.snapshot().in_use)
        await asyncio.sleep(0.05)
        await asyncio.to_thread(kill_sessions, dsn, "no_descriptor")
        with pytest.raises(psycopg.OperationalError):
            await query
        assert await db.fetchval("select 42") == 42
        await db.close()
    del conn, query
    gc.collect()
    await until(lambda: sockets() == before)


async def test_the_number_of_a_socket_that_was_lost_is_used_again_and_nobody_disturbed(
    make_manager: MakeManager, dsn: str
) -> None:
    """Libpq closes its descriptor in the middle of a read; the next socket gets its number."""
    db = make_manager(min_size=4, max_size=4, name="orders", application_name="same_number")
    await db.open()
    for _ in range(5):
        queries = [asyncio.create_task(db.fetchval("select pg_sleep(30)")) for _ in range(4)]
        await until(lambda: all(c.status == "running a query" for c in db.snapshot().checkouts))
        await until(lambda: len(db.snapshot().checkouts) == 4)
        await asyncio.to_thread(kill_sessions, dsn, "same_number")
        pairs: list[tuple[socket.socket, socket.socket]] = []
        while not all(query.done() for query in queries):
            await asyncio.sleep(0)
            pairs.append(socket.socketpair())  # takes the numbers that are free by now
        for query in queries:
            with pytest.raises(psycopg.OperationalError):
                await query
        loop = asyncio.get_running_loop()
        for one, other in pairs[-4:]:
            one.setblocking(False)
            other.send(b"heard")
            async with asyncio.timeout(10):
                assert await loop.sock_recv(one, 5) == b"heard"
        for one, other in pairs:
            one.close()
            other.close()
        async with asyncio.timeout(20):
            assert await asyncio.gather(*(db.fetchval("select 42") for _ in range(8))) == [42] * 8


async def test_a_reader_of_the_users_own_hears_of_notifications_and_outlives_queries(
    make_manager: MakeManager, dsn: str
) -> None:
    """Who watches ``conn.fileno()`` is not disturbed; psycopg's own waiting would remove it."""
    db = make_manager(min_size=1, max_size=1, name="orders")
    await db.open()
    loop = asyncio.get_running_loop()
    heard = asyncio.Event()
    async with db.connection() as conn:
        await conn.set_autocommit(True)
        await conn.execute("listen own_reader")
        loop.add_reader(conn.fileno(), heard.set)
        for _ in range(3):
            await conn.execute("select 1")
        heard.clear()
        await asyncio.to_thread(admin, dsn, "notify own_reader, 'x'")
        async with asyncio.timeout(10):
            await heard.wait()
        loop.remove_reader(conn.fileno())
        assert [n.payload async for n in conn.notifies(timeout=5, stop_after=1)] == ["x"]
        await conn.execute("unlisten *")


@pytest.mark.parametrize("how", ["close", "finish"])
async def test_a_query_whose_connection_another_task_closes_ends_at_once(
    make_manager: MakeManager, dsn: str, how: str
) -> None:
    db = make_manager(min_size=1, max_size=1, name="orders")
    await db.open()
    async with db.connection() as conn:
        await conn.set_autocommit(True)
        query = asyncio.create_task(conn.execute("select pg_sleep(30)"))
        await until(lambda: conn.info.transaction_status == 1)
        await asyncio.sleep(0.05)
        if how == "close":
            await conn.close()
        else:
            conn.pgconn.finish()
            # The server has been told, and ends its side when the query does.
            await asyncio.to_thread(
                admin, db.pool.conninfo, "select pg_terminate_backend(pid) from"
                " pg_stat_activity where query = 'select pg_sleep(30)'"
            )  # fmt: skip
        async with asyncio.timeout(10):
            with pytest.raises(psycopg.OperationalError, match="clos"):
                await query
    assert await db.fetchval("select 42") == 42


async def test_a_copy_lets_others_run(make_manager: MakeManager) -> None:
    """Its socket takes what it is given, nearly always: it never has to wait."""
    db = make_manager(min_size=1, max_size=1, name="orders")
    await db.open()
    longest = 0.0
    over = asyncio.Event()

    async def watch() -> None:
        nonlocal longest
        while not over.is_set():
            began = time.monotonic()
            await asyncio.sleep(0)
            longest = max(longest, time.monotonic() - began)

    async with db.connection() as conn:
        await conn.execute("create temporary table copied (line text)")
        watching = asyncio.create_task(watch())
        began = time.monotonic()
        async with conn.cursor().copy("copy copied from stdin") as copy:
            for _ in range(40_000):
                await copy.write("x" * 100 + "\n")
        took = time.monotonic() - began
        over.set()
        await watching
        assert await (await conn.execute("select count(*) from copied")).fetchone() == (40_000,)
    assert longest < took / 2


async def test_pipelines_and_large_results(make_manager: MakeManager) -> None:
    db = make_manager(min_size=1, max_size=1, name="orders")
    await db.open()
    async with db.connection() as conn:
        await conn.execute("create temporary table piped (n int, t text)")
        async with conn.pipeline():
            for n in range(500):
                await conn.execute("insert into piped values (%s, %s)", (n, "x" * 5000))
        async with conn.cursor() as cursor:
            await cursor.executemany(
                "insert into piped values (%s, 'y')", [(n,) for n in range(500)]
            )
            await cursor.execute("select n, t from piped")
            assert len(await cursor.fetchall()) == 1000
        rows = 0
        async with conn.cursor().copy("copy piped to stdout") as copy:
            async for _ in copy.rows():
                rows += 1
                if rows % 100 == 0:
                    await asyncio.sleep(0.001)
        assert rows == 1000


current: ContextVar[Any] = ContextVar("current")


class Request:
    """What a framework keeps in a context."""


async def test_the_first_request_is_not_kept_alive_by_the_session_that_it_used(
    make_manager: MakeManager,
) -> None:
    db = make_manager(min_size=1, max_size=1, name="orders")
    await db.open()

    async def serve() -> weakref.ref[Request]:
        request = Request()
        current.set(request)
        assert await db.fetchval("select 42") == 42
        return weakref.ref(request)

    gone = await asyncio.create_task(serve())
    await asyncio.sleep(0.01)  # the loop has a hold on it for a turn
    gc.collect()
    assert gone() is None
    assert await db.fetchval("select 42") == 42


async def test_a_loop_that_stands_still_loses_no_connection_that_is_being_cancelled(
    make_manager: MakeManager,
) -> None:
    """The second that the server has is one in which it can be heard."""
    db = make_manager(min_size=1, max_size=1, name="orders")
    await db.open()
    pid = await db.fetchval("select pg_backend_pid()")
    for turns in (2, 3, 4, 6):
        query = asyncio.create_task(db.fetchval("select pg_sleep(30)"))
        await until(lambda: db.snapshot().in_use == 1)
        await asyncio.sleep(0.1)
        query.cancel()
        for _ in range(turns):
            await asyncio.sleep(0)
        time.sleep(1.3)
        with pytest.raises(asyncio.CancelledError):
            await query
        assert await db.fetchval("select pg_backend_pid()") == pid


# --- without a server -------------------------------------------------------------------------


async def test_who_waits_to_write_is_not_kept_busy_by_what_there_is_to_read() -> None:
    one, other = socket.socketpair()
    with one, other:
        one.setblocking(False)
        wire = Wire(one.fileno(), LoopBinding("orders"))
        try:
            assert await wire.ready(WRITE, 5) == WRITABLE
            try:
                while True:
                    one.send(b"x" * 65536)
            except BlockingIOError:
                pass
            other.send(b"unread")
            assert await wire.ready(READ | WRITE, 5) == READABLE
            used = time.process_time()
            assert await wire.ready(WRITE, 0.5) == 0
            assert time.process_time() - used < 0.25
            assert await wire.ready(READ, 5) == READABLE
            loop = asyncio.get_running_loop()
            loop.call_later(0.05, other.recv, 1 << 20)
            while await wire.ready(WRITE, 5) != WRITABLE:
                pass
        finally:
            wire.let_go()


@pytest.mark.parametrize("state", [READ, READ | WRITE])
async def test_a_connection_that_is_reset_is_noticed_on_every_loop(state: int) -> None:
    """As one is that the server has ended when something more is sent: uvloop does not tell."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        one = socket.create_connection(server.getsockname())
        other, _ = server.accept()
    with one:
        one.setblocking(False)
        wire = Wire(one.fileno(), LoopBinding("orders"))
        try:
            other.close()
            one.send(b"x")
            await asyncio.sleep(0.05)
            async with asyncio.timeout(20):
                assert await wire.ready(state, None)
        finally:
            wire.let_go()


async def test_a_wire_without_poll_says_for_what_it_is_ready(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As on Windows."""
    monkeypatch.delattr(select, "poll")
    one, other = socket.socketpair()
    with one, other:
        wire = Wire(one.fileno(), LoopBinding("orders"))
        assert wire.ready_now(READ | WRITE) == WRITABLE
        assert wire.ready_now(READ) == 0
        other.send(b"unread")
        assert wire.ready_now(READ | WRITE) == READABLE | WRITABLE
        assert wire.ready_now(READ) == READABLE


@needs_proc
async def test_a_wire_that_another_thread_lets_go_is_forgotten_by_its_loop() -> None:
    """As a collection of garbage does, wherever it comes by; something may have come by then."""
    loop, failed = asyncio.get_running_loop(), []
    loop.set_exception_handler(lambda _loop, context: failed.append(context))
    one, other = socket.socketpair()
    with one, other:
        one.setblocking(False)
        wires = [Wire(one.fileno(), LoopBinding("orders"))]
        wires[0].watch(loop)
        descriptor = wires[0].descriptor

        def is_open() -> bool:
            with suppress(OSError):
                return os.path.sameopenfile(descriptor, one.fileno())
            return False

        assert is_open()
        other.send(b"unread")
        await asyncio.sleep(0)  # the loop is about to tell of it
        thread = threading.Thread(target=lambda: wires.pop().let_go())
        thread.start()
        thread.join()
        await until(lambda: not is_open())
        assert one.recv(100) == b"unread"
    assert not failed


async def test_a_process_without_descriptors_is_told_by_psycopgs_error(
    make_manager: MakeManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To watch a socket takes one."""

    def dup(_number: int) -> int:
        raise OSError(errno.EMFILE, "Too many open files")

    db = make_manager(min_size=1, max_size=1, name="orders", timeout=20)
    await db.open()
    with pytest.raises(psycopg.OperationalError, match="socket closed") as caught:
        async with db.connection() as conn:
            with monkeypatch.context() as full:
                full.setattr(socket, "dup", dup)
                conn._session.wire.let_go()  # what it has is closed
                await conn.execute("select 42")
    assert isinstance(caught.value.__cause__, OSError)
    assert await db.fetchval("select 42") == 42


async def test_a_connection_that_its_borrower_resets_goes_on_with_its_new_socket(
    make_manager: MakeManager,
) -> None:
    free = os.open(os.devnull, os.O_RDONLY)
    db = make_manager(min_size=1, max_size=1, name="orders")
    await db.open()
    async with db.connection() as conn:
        await conn.set_autocommit(True)
        await conn.execute("select 1")
        old = conn.pgconn.socket
        os.close(free)  # a number that the new socket gets
        conn.pgconn.reset()
        assert conn.pgconn.socket != old
        cursor = await conn.execute("select 42 from pg_sleep(0.05)")
        assert await cursor.fetchone() == (42,)


@needs_proc
def test_a_loop_that_ends_with_its_pool_open_leaves_no_descriptor(dsn: str, loop_name: str) -> None:
    source = """
    import asyncio, gc, os, sys, warnings
    from poolkeeper import PoolManager

    def sockets():
        names = [f"/proc/self/fd/{name}" for name in os.listdir("/proc/self/fd")]
        return sum(os.readlink(n).startswith("socket:") for n in names if os.path.lexists(n))

    async def main():
        db = PoolManager(sys.argv[1], min_size=2, name="orders")
        await db.open()
        assert await db.fetchval("select 42") == 42
        return db

    warnings.simplefilter("ignore")
    before = sockets()
    for _ in range(3):
        db = run(main())
        del db
        gc.collect()
    print(sockets() - before)
    """
    ended = run_program(source, dsn, loop=loop_name, timeout=60)
    assert (ended.code, ended.out) == (0, "0\n"), ended.err


async def test_whoever_waits_for_the_server_is_kept_as_psycopg_keeps_him(dsn: str) -> None:
    """A task that nobody refers to: the ``aclose()`` of a stream that was dropped, say."""
    answers: list[Any] = []

    async def ask() -> None:
        async with PoolManager(dsn, min_size=1, max_size=1, name="orders") as db:
            answers.append(await db.fetchone("select 42 from pg_sleep(0.5)", query_timeout=60))
            async with db.connection() as conn:
                await conn.execute("select 42 from pg_sleep(0.5)")
            answers.append((42,))

    asyncio.create_task(ask())  # noqa: RUF006
    async with asyncio.timeout(20):
        while len(answers) < 2:
            gc.collect()
            await asyncio.sleep(0.05)
    assert answers == [(42,), (42,)]
