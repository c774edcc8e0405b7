"""Reads that write, through a view that calls a function, say: each is done once."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import psycopg
import pytest

from poolkeeper import PoolManager, _oneshots, _sending
from poolkeeper._statements import Way
from poolkeeper.errors import QueryTimeout
from tests.support.lanes import PLAIN, READ, know, lanes, locked, trust
from tests.support.server import admin, kill_sessions
from tests.support.waiting import until

VIEW = "select noted from v"
SENT = ["The statement had been sent to the server: what it changes may be done all the same."]


@pytest.fixture
def table(database: str) -> str:
    """A database with a table t, and a view that writes a line into another one when it is read."""
    admin(database, "create table t (n int)")
    admin(database, "create table lines (pid int)")
    admin(
        database,
        "create function note() returns int language sql"
        " as 'insert into lines values (pg_backend_pid()) returning pid'",
    )
    admin(database, "create view v as select note() as noted")
    return database


@pytest.fixture(autouse=True)
def trusting(monkeypatch: pytest.MonkeyPatch) -> None:
    """No statement is slow until a test wants it."""
    trust(monkeypatch)


def lines(dsn: str) -> int:
    with psycopg.connect(dsn) as conn:
        row = conn.execute("select count(*) from lines").fetchone()
    assert row is not None
    return int(row[0])


class Behind:
    """A reader of the view, sent behind another who waits for a lock, on one of two connections."""

    def __init__(self, db: PoolManager[Any], patch: pytest.MonkeyPatch) -> None:
        self.db = db
        self.patch: pytest.MonkeyPatch | None = patch
        self.seconds: float | None = None

    @asynccontextmanager
    async def sent(self) -> AsyncIterator[None]:
        """Send both, and a plain one; in the block there is no other connection."""
        await know(self.db, READ, VIEW, PLAIN)
        async with self.db.connection():
            self.head = asyncio.create_task(self.db.fetchall(READ))
            await asyncio.sleep(0)
            self.reader = asyncio.create_task(self.db.fetchval(VIEW, query_timeout=self.seconds))
            self.plain = asyncio.create_task(self.db.fetchval(PLAIN, (7,)))
            await asyncio.sleep(0)
            assert [len(row.behind) for row in self.db.snapshot().checkouts[1:]] == [2]
            if self.patch:
                self.patch.setattr(_oneshots, "SLOW", 0.01)  # which it is from now on
            yield

    async def refused(self) -> None:
        """Wait until the copy was refused, so that the first is waited for."""
        await until(lambda: lanes(self.db).texts.known(VIEW).way is Way.ALONE)
        assert not self.reader.done()


@pytest.fixture
async def behind(table: str, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Behind]:
    async with PoolManager(table, min_size=2, max_size=2, timeout=20, name="behind") as db:
        yield Behind(db, monkeypatch)


async def test_what_is_sent_again_elsewhere_writes_once(behind: Behind, table: str) -> None:
    with locked(table):
        async with behind.sent():
            pass
        assert await behind.plain == 7  # while the head still waits
        await behind.refused()
        assert lines(table) == 0
    assert await behind.head == []
    assert await behind.reader in {
        row[0] for row in await behind.db.fetchall("select pid from lines")
    }
    assert lines(table) == 1
    # From now on it has a connection to itself.
    assert await asyncio.gather(*(behind.db.fetchval(VIEW) for _ in range(20)))
    assert not lanes(behind.db).texts.known(VIEW).shares
    assert lines(table) == 21


async def test_nothing_is_sent_again_where_the_server_has_no_read_only_transactions(
    behind: Behind, table: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_sending, "GUARD", b"select no_such_function()")
    with locked(table):
        async with behind.sent():
            pass
        await behind.refused()
    assert await behind.head == []
    assert await behind.reader
    assert await behind.plain == 7
    assert lines(table) == 1


async def test_what_is_sent_again_and_was_stopped_is_run_by_itself(
    behind: Behind, table: str
) -> None:
    """Nobody waited for the one before it any more, nor, just then, for this one."""
    with locked(table):
        async with behind.sent():
            await until(lambda: behind.db.snapshot().waiting == 2)  # to be sent again
            behind.head.cancel()
            await until(lambda: behind.head.done())
        assert await behind.reader
    assert lines(table) == 1


async def test_what_cannot_be_sent_again_is_said_to_be_lost(behind: Behind, table: str) -> None:
    """The server may have run it before the connection was gone."""
    behind.patch = None
    with locked(table):
        async with behind.sent():
            kill_sessions(table, "poolkeeper:behind")
        with pytest.raises(psycopg.errors.AdminShutdown):
            await behind.head
        with pytest.raises(psycopg.OperationalError) as lost:
            await behind.reader
        assert lost.value.__notes__ == SENT
        assert await behind.plain == 7
    assert lines(table) == 0


async def test_who_waits_for_the_first_after_all_can_be_cancelled(
    behind: Behind, table: str
) -> None:
    with locked(table):
        async with behind.sent():
            pass
        await behind.refused()
        behind.reader.cancel()
        with pytest.raises(asyncio.CancelledError):
            await behind.reader
    assert await behind.head == []
    assert await behind.db.fetchval(PLAIN, (8,)) == 8


async def test_who_waits_for_the_first_after_all_is_told_when_that_takes_too_long(
    behind: Behind, table: str
) -> None:
    behind.seconds = 0.5
    with locked(table):
        async with behind.sent():
            pass
        with pytest.raises(QueryTimeout):
            await behind.reader
    assert await behind.head == []
