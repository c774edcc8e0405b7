"""What the server or an administrator has changed is not the pool's to undo, and is noticed."""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from typing import Any

import psycopg
import pytest

from poolkeeper import PoolManager
from poolkeeper._embedded import EmbeddedServer
from poolkeeper._failover import Failover
from poolkeeper._session import REPORTED_PARAMETERS, Session
from tests.support.inside import life
from tests.support.pair import Pair, pair, set_read_only
from tests.support.pooler import OwningPooler
from tests.support.proxy import FaultProxy
from tests.support.server import admin

pytestmark = pytest.mark.fault

MakeManager = Callable[..., PoolManager[Any]]

SOON = 5.0  # seconds from the promotion to the first write there; one is promised


@pytest.fixture
def servers() -> Iterator[Pair]:
    """A primary and its standby, of the test's own."""
    with pair() as servers:
        yield servers


async def opened(make_manager: MakeManager, dsn: str, **arguments: Any) -> PoolManager[Any]:
    db = make_manager(
        dsn, **{"min_size": 4, "max_size": 4, "timeout": 5, "name": "orders"} | arguments
    )
    await db.open()
    return db


async def pids(db: PoolManager[Any]) -> set[int]:
    """The sessions of the pool, when all of its connections are there."""
    async with asyncio.timeout(10):
        while (counts := db.pool.counts())["idle"] < db.pool.min_size:
            await asyncio.sleep(0.01)
    assert counts["in_use"] == 0
    return {conn.pgconn.backend_pid for conn in life(db.pool).idle}


class Writers:
    """Tasks that write all the time, and when they could."""

    def __init__(self, db: PoolManager[Any]) -> None:
        self._db = db
        self.served: list[float] = []
        self.failed: list[Exception] = []

    async def _write(self) -> None:
        while True:
            try:
                await self._db.execute("insert into written values (1)")
                self.served.append(time.monotonic())
            except Exception as ex:
                self.failed.append(ex)
            await asyncio.sleep(0.02)

    @asynccontextmanager
    async def at_work(self) -> AsyncIterator[None]:
        tasks = [asyncio.create_task(self._write()) for _ in range(8)]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)

    async def serve_after(self, moment: float) -> float:
        """Return how long after *moment* the next write was served."""
        async with asyncio.timeout(30):
            while not self.served or self.served[-1] < moment:
                await asyncio.sleep(0.01)
        return next(at for at in self.served if at >= moment) - moment


def rows(server: EmbeddedServer) -> int:
    return int(admin(server.dsn(), "select count(*) from written")[0][0])


async def test_after_a_switchover_writes_go_to_the_new_primary_only(
    make_manager: MakeManager, servers: Pair
) -> None:
    """The old primary lives on, frozen, and with it the sessions there."""
    db = await opened(make_manager, servers.dsn("read-write"))
    writers = Writers(db)
    async with writers.at_work():
        await writers.serve_after(0.0)
        await asyncio.to_thread(servers.freeze)
        await asyncio.sleep(0.5)  # what was under way may still be written
        written = rows(servers.primary)
        await asyncio.to_thread(servers.standby.promote)
        assert await writers.serve_after(time.monotonic()) < SOON
    assert rows(servers.primary) == written
    assert rows(servers.standby) > 0
    for pid in await pids(db):
        assert admin(servers.standby.dsn(), "select 1 from pg_stat_activity where pid=%s", (pid,))


async def test_after_the_primary_was_killed_writes_go_to_the_new_one(
    make_manager: MakeManager, servers: Pair
) -> None:
    db = await opened(make_manager, servers.dsn("read-write"))
    writers = Writers(db)
    async with writers.at_work():
        await writers.serve_after(0.0)
        await asyncio.to_thread(servers.primary.stop, "immediate")
        await asyncio.to_thread(servers.standby.promote)
        assert await writers.serve_after(time.monotonic()) < SOON
    assert len(await pids(db)) == 4


async def test_a_name_that_leads_to_the_new_primary_is_followed(
    make_manager: MakeManager, servers: Pair
) -> None:
    """One name in front: its old sessions go on, to the server that takes no writes any more."""
    async with FaultProxy(servers.primary.dsn()) as name:
        db = await opened(make_manager, name.dsn)
        writers = Writers(db)
        async with writers.at_work():
            await writers.serve_after(0.0)
            await asyncio.to_thread(servers.standby.promote)
            name.lead_to(servers.standby.dsn())
            await asyncio.to_thread(servers.freeze)
            assert await writers.serve_after(time.monotonic()) < SOON
        for _ in range(8):
            assert await db.fetchval("show port") == str(servers.standby.port)
        await db.close(timeout=0)


async def test_a_name_that_leads_elsewhere_only_later_is_followed(
    make_manager: MakeManager, servers: Pair
) -> None:
    """The sessions were made anew at the frozen server: nothing is reported to them any more."""
    async with FaultProxy(servers.primary.dsn()) as name:
        db = await opened(make_manager, name.dsn)
        before = await pids(db)
        writers = Writers(db)
        await asyncio.to_thread(servers.freeze)
        async with writers.at_work():
            async with asyncio.timeout(10):
                while len(writers.failed) < 100:
                    await asyncio.sleep(0.01)
            assert not writers.served
            await asyncio.to_thread(servers.standby.promote)
            name.lead_to(servers.standby.dsn())
            assert await writers.serve_after(time.monotonic()) < SOON
        assert not before & await pids(db)
        assert rows(servers.standby) > 0
        await db.close(timeout=0)


async def test_a_server_that_reports_nothing_is_found_out_by_its_refusal(
    make_manager: MakeManager, servers: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As PostgreSQL 13, which does not report the two settings."""
    silent = (b"in_hot_standby", b"default_transaction_read_only")
    monkeypatch.setattr(
        Session,
        "_reported_parameters",
        lambda session: tuple(
            None if name in silent else session.pgconn.parameter_status(name)
            for name in REPORTED_PARAMETERS
        ),
    )
    db = await opened(make_manager, servers.dsn("read-write"))
    writers = Writers(db)
    async with writers.at_work():
        await writers.serve_after(0.0)
        await asyncio.to_thread(servers.switch_over)
        assert await writers.serve_after(time.monotonic()) < SOON
    assert rows(servers.standby) > 0


async def test_a_pool_that_asks_for_a_standby_does_not_look_for_a_primary(
    make_manager: MakeManager, servers: Pair
) -> None:
    async with FaultProxy(servers.standby.dsn()) as name:
        db = await opened(make_manager, f"{name.dsn}?target_session_attrs=standby")
        accepted = name.accepted
        for _ in range(3):
            with pytest.raises(psycopg.errors.ReadOnlySqlTransaction):
                await db.execute("insert into written values (1)")
            await pids(db)
        assert name.accepted == accepted
        await db.close(timeout=0)


@pytest.mark.parametrize("own", [False, True], ids=["the server's doing", "the check's doing"])
async def test_a_check_that_learns_of_another_kind_of_server(
    make_manager: MakeManager, own_server: EmbeddedServer, own: bool
) -> None:
    """It is replaced before it is handed out, unless the check itself has set it."""

    async def check(conn: Any) -> None:
        await conn.set_autocommit(True)
        await conn.execute("set default_transaction_read_only = on" if own else "select 1")
        await conn.set_autocommit(False)

    db = await opened(make_manager, own_server.dsn(), check=check)
    before = await pids(db)
    if not own:
        set_read_only(own_server, True)
    for _ in range(12):
        assert await db.fetchval("show default_transaction_read_only") == "on"
    after = await pids(db)
    assert after == before if own else not after & before


async def test_a_pooler_that_reports_now_this_server_now_that_costs_few_sessions(
    make_manager: MakeManager, dsn: str
) -> None:
    turns = itertools.cycle(["on", "off"])
    async with OwningPooler(dsn, lambda: {"in_hot_standby": next(turns)}) as pooler:
        db = await opened(make_manager, pooler.dsn, min_size=1, max_size=1)
        began = time.monotonic()
        for n in range(300):
            assert await db.fetchval("select %s::int", (n,)) == n
        seconds = time.monotonic() - began
        assert pooler.accepted <= 2 + Failover.MOST + seconds / Failover.EVERY
        await db.close(timeout=0)


async def test_readers_of_a_standby_that_was_promoted_go_by_the_host_list(
    make_manager: MakeManager, servers: Pair
) -> None:
    db = await opened(make_manager, servers.dsn("prefer-standby", standby_first=True))
    before = await pids(db)
    assert await db.fetchval("show in_hot_standby") == "on"
    await asyncio.to_thread(servers.standby.promote)
    assert await db.fetchval("show in_hot_standby") == "off"  # it answers, and is found out
    assert not before & await pids(db)
    after = await pids(db)
    for _ in range(8):
        assert await db.fetchval("show in_hot_standby") == "off"
    assert await pids(db) == after


async def test_readers_of_a_standby_that_was_killed_go_by_the_host_list(
    make_manager: MakeManager, servers: Pair
) -> None:
    db = await opened(make_manager, servers.dsn("prefer-standby", standby_first=True))
    assert await db.fetchval("show in_hot_standby") == "on"
    await asyncio.to_thread(servers.standby.stop, "immediate")
    began = time.monotonic()
    assert await db.fetchval("show in_hot_standby") == "off"
    assert time.monotonic() - began < SOON


async def test_a_write_freeze_is_not_lifted_and_costs_each_session_once(
    make_manager: MakeManager, own_server: EmbeddedServer
) -> None:
    """With one server only there is nowhere to go: reads go on, writes are refused."""
    db = await opened(make_manager, own_server.dsn())
    await db.execute("create table written (n bigint)")
    before = await pids(db)
    set_read_only(own_server, True)
    for _ in range(8):
        with pytest.raises(psycopg.errors.ReadOnlySqlTransaction):
            await db.execute("insert into written values (1)")
        await pids(db)
    frozen = await pids(db)
    assert not before & frozen
    for _ in range(20):
        with suppress(psycopg.errors.ReadOnlySqlTransaction):
            await db.execute("insert into written values (1)")
        assert await db.fetchval("select count(*) from written") == 0
    assert await pids(db) == frozen
    set_read_only(own_server, False)
    assert await db.fetchval("select 1") == 1  # the server tells that it takes writes again
    assert not frozen & await pids(db)
    assert await db.execute("insert into written values (1)") == 1


async def test_a_session_in_use_is_looked_at_when_it_comes_back(
    make_manager: MakeManager, own_server: EmbeddedServer
) -> None:
    """Whether or not it was used; and whatever it was set to."""
    db = await opened(make_manager, own_server.dsn())
    async with db.connection() as unused, db.connection() as overridden:
        held = {unused.info.backend_pid, overridden.info.backend_pid}
        set_read_only(own_server, True)
        await overridden.set_autocommit(True)
        await overridden.execute("set default_transaction_read_only = off")
        await db.fetchval("select 1")
        async with asyncio.timeout(10):
            while db.pool.counts()["idle"] < 2:
                await asyncio.sleep(0.01)
    assert not held & await pids(db)
    for _ in range(8):
        assert await db.fetchval("show default_transaction_read_only") == "on"


async def test_a_session_found_on_another_kind_of_server_is_not_handed_out(
    make_manager: MakeManager, own_server: EmbeddedServer
) -> None:
    """Its socket had something to say, so it was looked at first."""

    async def configure(conn: Any) -> None:
        await conn.execute("listen orders")
        await conn.commit()

    db = await opened(make_manager, own_server.dsn(), configure=configure, min_size=1, max_size=1)
    before = await pids(db)
    set_read_only(own_server, True)
    with psycopg.connect(own_server.dsn(), autocommit=True) as conn:
        conn.execute("notify orders")
    await asyncio.sleep(0.1)
    async with db.connection() as conn:
        assert conn.info.backend_pid not in before
        assert conn.info.parameter_status("default_transaction_read_only") == "on"


OWN = [
    "set default_transaction_read_only = on",
    "set session characteristics as transaction read only",
]


@pytest.mark.parametrize("statement", OWN)
async def test_a_borrower_that_sets_read_only_is_no_failover(
    make_manager: MakeManager, caplog: pytest.LogCaptureFixture, statement: str
) -> None:
    db = await opened(make_manager, None)
    before = await pids(db)
    for _ in range(4):
        async with db.connection() as conn:
            await conn.set_autocommit(True)
            await conn.execute(statement)
            with pytest.raises(psycopg.errors.ReadOnlySqlTransaction):
                await conn.execute("create table refused (n int)")
        assert await db.fetchval("show default_transaction_read_only") == "off"
    assert await pids(db) == before
    assert "another kind" not in caplog.text


async def test_a_write_refused_in_a_read_only_transaction_is_no_failover(
    make_manager: MakeManager, caplog: pytest.LogCaptureFixture
) -> None:
    db = await opened(make_manager, None)
    before = await pids(db)
    for _ in range(4):
        with pytest.raises(psycopg.errors.ReadOnlySqlTransaction):
            async with db.transaction(read_only=True) as conn:
                await conn.execute("create table refused (n int)")
        async with db.connection() as conn:
            await conn.set_autocommit(True)
            await conn.execute("begin read only")
            with pytest.raises(psycopg.errors.ReadOnlySqlTransaction):
                await conn.execute("create table refused (n int)")
            await conn.execute("rollback")
    assert await pids(db) == before
    assert "another kind" not in caplog.text


async def test_a_setting_of_an_administrator_is_what_is_put_back(
    make_manager: MakeManager, own_server: EmbeddedServer, caplog: pytest.LogCaptureFixture
) -> None:
    db = await opened(make_manager, own_server.dsn(), min_size=1, max_size=1)
    before = await pids(db)
    caplog.set_level(logging.INFO, "poolkeeper")
    for zone in ("Asia/Tokyo", "Europe/Paris"):
        admin(own_server.dsn(), f"alter system set timezone = '{zone}'")
        own_server.reload()
        async with asyncio.timeout(10):
            while await db.fetchval("show timezone") != zone:
                await asyncio.sleep(0.01)
        for _ in range(3):
            assert await db.fetchval("show timezone") == zone
        async with db.connection() as conn:
            await conn.execute("set timezone = 'Africa/Lagos'")
        assert await db.fetchval("show timezone") == zone
    assert await pids(db) == before


async def test_a_setting_that_configure_has_set_stays_whatever_an_administrator_sets(
    make_manager: MakeManager, own_server: EmbeddedServer
) -> None:
    async def configure(conn: Any) -> None:
        await conn.execute("set timezone = 'Asia/Tokyo'")
        await conn.commit()

    db = await opened(make_manager, own_server.dsn(), configure=configure, min_size=1, max_size=1)
    admin(own_server.dsn(), "alter system set timezone = 'Europe/Paris'")
    own_server.reload()
    await asyncio.sleep(0.1)
    for statement in ("select 1", "reset timezone", "set timezone = 'Africa/Lagos'"):
        async with db.connection() as conn:
            await conn.execute(statement)
        assert await db.fetchval("show timezone") == "Asia/Tokyo"
