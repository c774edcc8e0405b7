"""`query_timeout=`: how long a statement may take, beside `timeout=`, the wait for a connection."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from time import monotonic
from typing import Any

import psycopg
import pytest

from poolkeeper import AcquireTimeout, ConfigError, PoolManager, QueryTimeout
from tests.support.proxy import FaultProxy
from tests.support.server import admin

MakeManager = Callable[..., PoolManager[Any]]


@pytest.fixture
async def one(make_manager: MakeManager) -> PoolManager[Any]:
    """A manager with one connection."""
    db = make_manager(min_size=1, name="orders", timeout=20)
    await db.open()
    return db


@pytest.mark.parametrize("name", ["execute", "fetchone", "fetchall", "fetchval"])
async def test_the_server_stops_the_statement_and_the_connection_stays(
    one: PoolManager[Any], name: str
) -> None:
    pid = await one.fetchval("select pg_backend_pid()")
    begin = monotonic()
    with pytest.raises(QueryTimeout) as caught:
        await getattr(one, name)("select pg_sleep(60)", query_timeout=0.1)
    assert monotonic() - begin < 20
    assert "is still good" in str(caught.value.detail)
    assert isinstance(caught.value, psycopg.errors.QueryCanceled)
    assert caught.value.sqlstate == "57014"
    assert await one.fetchval("select pg_backend_pid()") == pid
    assert one.pool.counts() == {"total": 1, "in_use": 0, "idle": 1, "max": 1, "waiting": 0}
    assert one.pool.get_stats().get("returns_bad", 0) == 0


async def test_nothing_runs_on_the_server_any_more(one: PoolManager[Any], dsn: str) -> None:
    pid = await one.fetchval("select pg_backend_pid()")
    with pytest.raises(QueryTimeout):
        await one.execute("select pg_sleep(60)", query_timeout=0.1)
    ((state,),) = admin(dsn, "select state from pg_stat_activity where pid = %s", (pid,))
    assert state == "idle"


async def test_what_is_stopped_is_not_done(one: PoolManager[Any], database: str) -> None:
    admin(database, "create table t (n int)")
    async with PoolManager(database, min_size=1, name="another") as db:
        with pytest.raises(QueryTimeout):
            await db.execute("insert into t select 1 from pg_sleep(60)", query_timeout=0.1)
        assert await db.fetchval("select count(*) from t") == 0


async def test_the_wait_for_a_connection_is_not_counted_and_has_an_error_of_its_own(
    one: PoolManager[Any],
) -> None:
    async with one.connection():
        with pytest.raises(AcquireTimeout):
            await asyncio.create_task(one.fetchval("select 1", timeout=0.3, query_timeout=0.01))
        waiting = asyncio.create_task(one.fetchval("select 42", query_timeout=5))
        await asyncio.sleep(0.3)
    assert await waiting == 42


async def test_a_statement_in_time_is_as_without(one: PoolManager[Any]) -> None:
    assert await one.fetchval("select 42", query_timeout=20) == 42
    with pytest.raises(psycopg.errors.DivisionByZero):
        await one.fetchval("select 1 / 0", query_timeout=20)
    task = asyncio.current_task()
    assert task is not None
    assert task.cancelling() == 0


async def test_the_servers_own_statement_timeout_is_told_by_psycopgs_error(
    make_manager: MakeManager,
) -> None:
    kwargs = {"options": "-c statement_timeout=100"}
    db = make_manager(min_size=1, name="orders", kwargs=kwargs)
    await db.open()
    with pytest.raises(psycopg.errors.QueryCanceled) as caught:
        await db.execute("select pg_sleep(60)", query_timeout=20)
    assert not isinstance(caught.value, QueryTimeout)


async def test_a_cancellation_from_outside_stays_one(one: PoolManager[Any]) -> None:
    task = asyncio.create_task(one.execute("select pg_sleep(60)", query_timeout=20))
    await asyncio.sleep(0.2)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.2):
            await one.execute("select pg_sleep(60)", query_timeout=20)
    assert await one.fetchval("select 42") == 42


async def test_a_server_that_does_not_stop_it_costs_the_connection(
    proxy: FaultProxy, make_manager: MakeManager
) -> None:
    db = make_manager(proxy.dsn, min_size=1, name="orders", timeout=20)
    await db.open()
    await db.fetchval("select 1")
    proxy.stall()
    with pytest.raises(QueryTimeout) as caught:
        await db.execute("select 1", query_timeout=0.1)
    assert "so its connection was closed" in str(caught.value.detail)
    proxy.resume()
    assert await db.fetchval("select 42") == 42


class OwnAutocommit(psycopg.AsyncConnection[Any]):
    """Sees who switches autocommit on, so it is left to psycopg's cursors."""

    switched = 0

    async def set_autocommit(self, value: bool) -> None:
        OwnAutocommit.switched += 1
        await super().set_autocommit(value)


async def test_a_statement_that_goes_by_psycopgs_cursor_is_limited_as_well(
    make_manager: MakeManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(OwnAutocommit, "switched", 0)
    db = make_manager(min_size=1, max_size=1, name="orders", connection_class=OwnAutocommit)
    async with db:
        pid = await db.fetchval("select pg_backend_pid()", query_timeout=20)
        with pytest.raises(QueryTimeout, match=r"query_timeout=0\.10 s") as caught:
            await db.execute("select pg_sleep(60)", query_timeout=0.1)
        assert "is still good" in str(caught.value.detail)
        assert "tests/integration/test_query_timeout.py" in str(caught.value.detail)
        with pytest.raises(psycopg.errors.DivisionByZero):
            await db.execute("select 1 / 0", query_timeout=20)
        assert await db.fetchval("select pg_backend_pid()", query_timeout=20) == pid
        # Once for each, and none of them was left in a transaction.
        assert OwnAutocommit.switched == 4
        assert db.pool.counts()["idle"] == 1


@pytest.mark.parametrize("seconds", [-1, "5", True])
async def test_what_is_no_number_of_seconds_is_refused(one: PoolManager[Any], seconds: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        await one.execute("select 1", query_timeout=seconds)
    assert caught.value.parameter == "query_timeout"
