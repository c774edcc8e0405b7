"""Behind a pooler a setting may be nobody's to put back: that costs no connections."""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Callable
from typing import Any

import pytest
from psycopg_pool import AsyncConnectionPool

from poolkeeper import PoolManager
from poolkeeper._embedded import EmbeddedServer
from tests.support.pooler import PGBOUNCER, OwningPooler, pgbouncer

MakeManager = Callable[..., PoolManager[Any]]


async def discard(conn: Any) -> None:
    await conn.set_autocommit(True)
    await conn.execute("DISCARD ALL")
    await conn.set_autocommit(False)


RESETS: list[Any] = [None, "discard", discard]


def warnings_in(caplog: pytest.LogCaptureFixture) -> list[str]:
    ours = [r for r in caplog.records if r.name != "asyncio"]  # its debug mode tells of slow tasks
    return [r.getMessage() for r in ours if r.levelno >= logging.WARNING]


@pytest.mark.parametrize("statement", ["select 1", "set time zone 'Asia/Tokyo'"])
@pytest.mark.parametrize("reset", RESETS)
async def test_a_setting_that_a_pooler_owns_is_not_fought_over(
    make_manager: MakeManager,
    dsn: str,
    caplog: pytest.LogCaptureFixture,
    reset: Any,
    statement: str,
) -> None:
    """It reports a name of its own with each answer, whatever was set."""
    names = itertools.cycle(["pooler-1", "pooler-2"])
    async with OwningPooler(dsn, lambda: {"application_name": next(names)}) as pooler:
        db = make_manager(
            pooler.dsn,
            min_size=1,
            max_size=1,
            timeout=5,
            reset=reset,
            kwargs={"prepare_threshold": None},  # psycopg does not see each DISCARD ALL
        )
        await db.open()
        for _ in range(50):
            async with db.connection() as conn:
                zone = await (await conn.execute("show time zone")).fetchone()
                assert zone != ("Asia/Tokyo",)
                await conn.execute(statement)
        assert pooler.accepted == 1
        await db.close(timeout=0)
    assert warnings_in(caplog) == []


async def test_a_setting_of_configure_that_a_pooler_owns_is_told_once(
    make_manager: MakeManager, dsn: str, caplog: pytest.LogCaptureFixture
) -> None:
    """With the line that got the connection; which is kept."""
    reports: dict[str, str] = {}

    async def configure(conn: Any) -> None:
        await conn.execute("set application_name = 'mine'")
        await conn.commit()

    async with OwningPooler(dsn, lambda: reports) as pooler:
        db = make_manager(pooler.dsn, min_size=1, max_size=1, timeout=5, configure=configure)
        await db.open()
        names = itertools.cycle(["pooler-1", "pooler-2"])
        for _ in range(10):
            reports["application_name"] = next(names)
            async with db.connection() as conn:
                await conn.execute("select 1")
        assert pooler.accepted == 1
        await db.close(timeout=0)
    (told,) = warnings_in(caplog)
    assert "settings that cannot be put back: application_name" in told
    assert "test_poolers.py:" in told


# Not skipped where there is no PgBouncer, which no wheel has: the report's header says so.
if PGBOUNCER is not None:

    @pytest.mark.fault
    @pytest.mark.parametrize("statement", ["select 1", "set time zone 'Asia/Tokyo'"])
    @pytest.mark.parametrize("reset", RESETS)
    async def test_pgbouncer_sees_no_more_connections_than_of_the_bare_pool(
        own_server: EmbeddedServer,
        caplog: pytest.LogCaptureFixture,
        reset: Any,
        statement: str,
    ) -> None:
        sizes: dict[str, Any] = {"min_size": 2, "max_size": 8, "timeout": 30}
        sizes["kwargs"] = {"prepare_threshold": None}

        async def use(pool: Any) -> int:
            async def work() -> None:
                for n in range(20):
                    async with pool.connection() as conn:
                        await conn.execute(statement)
                        cursor = await conn.execute("select %s::int, pg_sleep(0.001)", (n,))
                        assert (await cursor.fetchone())[0] == n

            await asyncio.gather(*(work() for _ in range(20)))
            return int(pool.get_stats()["connections_num"])

        with pgbouncer(own_server) as dsn:
            async with AsyncConnectionPool(dsn, open=False, reset=discard, **sizes) as bare:
                await bare.wait()
                made_by_bare = await use(bare)
            async with PoolManager(dsn, reset=reset, **sizes) as db:
                assert await use(db.pool) <= max(made_by_bare, 8)
                assert db.pool.get_stats().get("returns_bad", 0) == 0
        assert warnings_in(caplog) == []
