"""Why no connection can be made: who is told, when, and what is kept to meanwhile."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from time import monotonic
from typing import Any, cast

import psycopg
import psycopg_pool
import pytest
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from poolkeeper import AcquireTimeout, OpenError, PoolManager
from poolkeeper._embedded import EmbeddedServer
from tests.support.proxy import FaultProxy
from tests.support.server import PASSWORD, admin

MakeManager = Callable[..., PoolManager[Any]]

TOLD = 5.0
"""Seconds; far below the timeouts that are given, far above what it takes."""


Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@contextlib.asynccontextmanager
async def listener(serve: Serve) -> AsyncIterator[int]:
    """Listen on a port and *serve* those who connect, until the block ends."""
    tasks: set[asyncio.Task[Any]] = set()

    async def serve_one(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        tasks.add(cast("asyncio.Task[Any]", asyncio.current_task()))
        # Cancelled in the last line, too: those who connect come and go as the test ends.
        with contextlib.suppress(OSError, asyncio.CancelledError):
            try:
                await serve(reader, writer)
            finally:
                await end(writer)

    server = await asyncio.start_server(serve_one, "127.0.0.1", 0)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks)


async def end(writer: asyncio.StreamWriter) -> None:
    writer.close()
    with contextlib.suppress(OSError):
        await writer.wait_closed()


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


# --- a reason that stays, and no connection left --------------------------------------------------


@pytest.fixture
def doomed(dsn: str) -> str:
    """The DSN of a database that the test drops."""
    admin(dsn, "drop database if exists doomed")
    admin(dsn, "create database doomed")
    return make_conninfo(dsn, dbname="doomed")


async def test_who_waits_in_vain_is_told_at_once(
    dsn: str, doomed: str, make_manager: MakeManager
) -> None:
    db = make_manager(doomed, min_size=2, name="orders")
    await db.open()
    await asyncio.to_thread(admin, dsn, "drop database doomed with (force)")
    for _ in range(3):
        begin = monotonic()
        with pytest.raises(AcquireTimeout) as caught:
            await db.fetchval("select 1", timeout=30)
        assert monotonic() - begin < TOLD
        assert str(caught.value).splitlines()[0] == (
            'cannot acquire a connection from pool "orders": database "doomed" does not exist'
        )
        assert "Check the database in conninfo" in str(caught.value.hint)
        assert isinstance(caught.value.__cause__, psycopg.OperationalError)
        assert caught.value.diagnosis is not None
    # It goes on by itself.
    await asyncio.to_thread(admin, dsn, "create database doomed")
    until = monotonic() + 10
    while not await db.check():
        assert monotonic() < until
        await asyncio.sleep(0.1)
    assert await db.fetchval("select 1", timeout=30) == 1
    await db.close()
    admin(dsn, "drop database doomed with (force)")


@pytest.mark.fault
async def test_who_waits_before_the_first_answer_is_told_by_a_later_one(
    scram_server: EmbeddedServer, make_manager: MakeManager
) -> None:
    """The first attempt may have begun before the password was put right."""
    db = make_manager(scram_server.dsn(user="app", password="wr0ng-pw"), min_size=2, max_size=2)
    await db.open(wait=False)
    begin = monotonic()
    waiting = [asyncio.create_task(db.fetchval("select 1", timeout=30)) for _ in range(20)]
    errors = await asyncio.gather(*waiting, return_exceptions=True)
    assert monotonic() - begin < TOLD
    assert {type(error) for error in errors} == {AcquireTimeout}
    assert len({id(error) for error in errors}) == 20
    assert all("password authentication failed" in str(error) for error in errors)


@pytest.mark.fault
async def test_nobody_is_refused_for_what_was_so_before_he_came(
    scram_server: EmbeddedServer, make_manager: MakeManager
) -> None:
    password = "wr0ng-pw"
    server = scram_server.dsn(user="app")
    db = make_manager(lambda: make_conninfo(server, password=password), min_size=1, max_size=1)
    await db.open(wait=False)
    while not db.snapshot().attempts_failed:
        await asyncio.sleep(0.01)
    for _ in range(3):
        with pytest.raises(AcquireTimeout, match="password authentication failed"):
            await db.fetchval("select 1", timeout=30)
    password = PASSWORD
    assert await db.fetchval("select 1", timeout=30) == 1


async def test_while_there_is_a_connection_its_return_is_waited_for(
    dsn: str, make_manager: MakeManager
) -> None:
    good = True

    def conninfo() -> str:
        return dsn if good else make_conninfo(dsn, dbname="no_such_db")

    db = make_manager(conninfo, min_size=1, max_size=2)
    await db.open()
    good = False
    async with db.connection():
        waiting = asyncio.create_task(db.fetchval("select 1", timeout=30))
        await asyncio.sleep(1.0)
        assert db.snapshot().attempts_failed
        assert not waiting.done()
    assert await waiting == 1


# --- what is logged -------------------------------------------------------------------------------


async def test_the_first_failure_is_logged_while_open_waits(
    make_manager: MakeManager, caplog: pytest.LogCaptureFixture
) -> None:
    db = make_manager(f"host=127.0.0.1 port={free_port()} user=postgres", min_size=1, name="away")
    opening = asyncio.create_task(db.open(timeout=20))
    until = monotonic() + TOLD
    while not caplog.records and monotonic() < until:
        await asyncio.sleep(0.02)
    (told,) = caplog.records
    assert told.levelname == "WARNING"
    assert "Connection refused; trying again until one can, open() waits for " in told.message
    assert told.message.endswith(" s more")
    opening.cancel()
    await asyncio.wait([opening])


@pytest.mark.parametrize("say", [b"HTTP/1.1 400 Bad\r\n\r\n", b"220 mail.example ESMTP\r\n"])
async def test_what_answers_and_is_no_postgresql_is_told_at_once(
    say: bytes, make_manager: MakeManager
) -> None:
    async def serve(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(say)
        await asyncio.sleep(0.05)

    async with listener(serve) as port:
        for mode in ("disable", "prefer"):
            db = make_manager(f"host=127.0.0.1 port={port} user=x sslmode={mode}")
            begin = monotonic()
            with pytest.raises(OpenError) as caught:
                await db.open(timeout=30)
            assert monotonic() - begin < TOLD
            assert "no PostgreSQL server" in str(caught.value.hint)


async def test_a_time_out_of_open_and_wait_is_a_pool_timeout(make_manager: MakeManager) -> None:
    db = make_manager(f"host=127.0.0.1 port={free_port()} user=postgres", min_size=1)
    with pytest.raises(psycopg_pool.PoolTimeout):
        await db.pool.open(wait=True, timeout=0.3)
    await db.pool.open()
    with pytest.raises(psycopg_pool.PoolTimeout):
        await db.pool.wait(0.3)


# --- no more than max_size, no less than psycopg's time -------------------------------------------


@pytest.mark.parametrize("size", [1, 5])
async def test_slow_logins_make_no_more_connections_than_are_wanted(
    size: int, dsn: str, make_manager: MakeManager
) -> None:
    params = conninfo_to_dict(dsn)
    accepted = 0

    async def slowly(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal accepted
        accepted += 1
        await asyncio.sleep(1.5)
        above, below = await asyncio.open_connection(
            str(params.get("host") or "127.0.0.1"), int(params.get("port") or 5432)
        )
        try:
            await asyncio.gather(pass_on(reader, below), pass_on(above, writer))
        finally:
            await end(below)

    async with listener(slowly) as port:
        there = make_conninfo(dsn, host="127.0.0.1", port=port, gssencmode="disable")
        db = make_manager(there, min_size=size, max_size=size)
        await db.open()
        await asyncio.sleep(1.0)
        assert accepted == size
        await db.close()


async def pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(65536):
        writer.write(data)
        await writer.drain()
    writer.close()


@pytest.mark.parametrize("size", [1, 2, 3])
async def test_sessions_and_attempts_are_never_more_than_max_size(
    size: int, dsn: str, proxy: FaultProxy, make_manager: MakeManager
) -> None:
    db = make_manager(proxy.dsn, min_size=size, max_size=size)
    await db.open()
    proxy.silent = True
    await asyncio.to_thread(proxy.cut)
    until = monotonic() + 4
    while monotonic() < until:
        assert db.snapshot().total + db.snapshot().connecting <= size
        await asyncio.sleep(0.01)
    proxy.silent = False
    assert await db.fetchval("select 1", timeout=30) == 1


@pytest.mark.parametrize("size", [1, 4])
async def test_a_silent_first_server_of_a_list_has_its_connect_timeout_and_no_more(
    size: int, dsn: str, make_manager: MakeManager
) -> None:
    """As with psycopg itself: then it is the next one's turn, in the same attempt."""
    params = conninfo_to_dict(dsn)

    async def says_nothing(*_: object) -> None:
        await asyncio.sleep(60)

    async with listener(says_nothing) as port:
        both = make_conninfo(
            dsn,
            host=f"127.0.0.1,{params.get('host') or '127.0.0.1'}",
            port=f"{port},{params.get('port') or 5432}",
            connect_timeout=5,
        )
        db = make_manager(both, min_size=1, max_size=size)
        begin = monotonic()
        await db.open(timeout=30)
        assert 4.5 < monotonic() - begin < 9.5
        assert db.snapshot().total == 1


async def test_one_server_of_a_list_that_refuses_for_good_is_not_all_of_them(
    dsn: str, proxy: FaultProxy, make_manager: MakeManager
) -> None:
    """The other is only starting."""
    params = conninfo_to_dict(proxy.dsn)
    port = free_port()
    both = make_conninfo(
        proxy.dsn, host="127.0.0.1,127.0.0.1", port=f"{port},{params['port']}", dbname="not_there"
    )
    db = make_manager(both, min_size=1)
    opening = asyncio.create_task(db.open(timeout=30))
    await asyncio.sleep(1.0)
    assert not opening.done()
    assert 'database "not_there" does not exist' in str(db.snapshot().last_error)
    assert "refused" in str(db.snapshot().last_error)
    await asyncio.to_thread(admin, dsn, "create database not_there")
    await asyncio.wait_for(opening, TOLD)
    await db.close()
    await asyncio.to_thread(admin, dsn, "drop database not_there with (force)")


# --- what a traceback prints ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        {"dbname": "s3cret@elsewhere:5432/shop"},
        {"options": "-c work_mem=s3cret"},
        {"options": "s3cret"},
    ],
)
async def test_what_a_server_quotes_of_what_it_was_given_is_not_in_the_chain(
    change: dict[str, str], dsn: str, make_manager: MakeManager, caplog: pytest.LogCaptureFixture
) -> None:
    db = make_manager(make_conninfo(dsn, **change), min_size=1)
    with pytest.raises(OpenError) as caught:
        await db.open(timeout=1)
    assert isinstance(caught.value.__cause__, psycopg.OperationalError)
    text = "".join(traceback.format_exception(caught.value))
    assert "s3cret" not in text + caplog.text
    assert "***" in text
    assert Path(__file__).name in text
