"""Behind a pooler: what is found out on open, what is done otherwise, what works in each mode."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import itertools
import logging
import operator
from collections.abc import Callable, Iterator
from typing import Any

import psycopg
import pytest
from psycopg_pool import AsyncConnectionPool

from poolkeeper import PoolManager, _cleaning
from poolkeeper._embedded import EmbeddedServer
from tests.support.inside import life
from tests.support.pooler import (
    MODES,
    PGBOUNCER,
    OwningPooler,
    TranslatingPooler,
    pgbouncer,
    pgbouncer_version,
)
from tests.support.waiting import eventually

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


# --- what is found out on open -------------------------------------------------------------------


def found(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What was told of poolers."""
    records = [r for r in caplog.records if vars(r).get("event_name") == "poolkeeper.pooler_found"]
    return [r.getMessage() for r in records]


@pytest.fixture(autouse=True)
def log_of_everything(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "poolkeeper")


async def use(db: PoolManager[Any], times: int = 10) -> list[Any]:
    """Run one query as often, each in a block of its own, in four tasks at once."""

    async def work() -> list[Any]:
        values: list[Any] = []
        for n in range(times):
            async with db.connection() as conn:
                values += await (await conn.execute("select %s::int", (n,))).fetchone() or ()
        return values

    return functools.reduce(operator.iadd, await asyncio.gather(*(work() for _ in range(4))), [])


async def test_a_server_of_its_own_is_no_pooler(
    db: PoolManager[Any], caplog: pytest.LogCaptureFixture
) -> None:
    assert not life(db.pool).front.pooled
    assert found(caplog) == []
    async with db.connection() as conn:
        assert conn.prepare_threshold == 5


async def test_a_pooler_that_keeps_track_of_prepared_statements_gets_them(
    make_manager: MakeManager, dsn: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with TranslatingPooler(dsn) as pooler:
        db = make_manager(pooler.dsn, min_size=2, max_size=2, name="orders")
        await db.open()
        assert sorted(await use(db)) == sorted([*range(10)] * 4)
        names = "select name from pg_prepared_statements where statement like 'select $1%%'"
        assert await db.fetchval(names) == "POOLER__pg3_0"
        await db.close()
    assert found(caplog) == [
        'pool "orders" stands behind a pooler, which shares its sessions: prepared statements are'
        " on, for it keeps track of them"
    ]


@pytest.mark.parametrize(("threshold", "wanted"), [({}, None), ({"prepare_threshold": 3}, 3)])
async def test_prepared_statements_are_off_where_closing_one_needs_its_name(
    make_manager: MakeManager,
    dsn: str,
    monkeypatch: pytest.MonkeyPatch,
    threshold: dict[str, Any],
    wanted: int | None,
) -> None:
    """With a libpq before 17; unless somebody has said otherwise."""
    monkeypatch.setattr(psycopg.capabilities, "has_send_close_prepared", lambda: False)
    async with TranslatingPooler(dsn) as pooler:
        db = make_manager(pooler.dsn, min_size=1, max_size=1, kwargs=threshold)
        await db.open()
        for _ in range(2):  # the first handle, and the next
            async with db.connection() as conn:
                assert conn.prepare_threshold == wanted
        await db.close()


# --- PgBouncer -----------------------------------------------------------------------------------

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

        with pgbouncer(own_server.dsn()) as dsn:
            async with AsyncConnectionPool(dsn, open=False, reset=discard, **sizes) as bare:
                await bare.wait()
                made_by_bare = await use(bare)
            async with PoolManager(dsn, reset=reset, **sizes) as db:
                assert await use(db.pool) <= max(made_by_bare, 8)
                assert db.pool.get_stats().get("returns_bad", 0) == 0
        assert warnings_in(caplog) == []

    TRACKS = pgbouncer_version() >= (1, 22)
    """Whether it can keep track of prepared statements, DEALLOCATE ALL included."""
    UNTRACKED: dict[str, Any] = {"max_prepared_statements": 0} if TRACKS else {}

    @pytest.fixture(scope="module")
    def modes(server_dsn: str) -> Iterator[dict[str, str]]:
        """The DSN of a PgBouncer in each mode."""
        with contextlib.ExitStack() as stack:
            yield {
                mode: stack.enter_context(pgbouncer(server_dsn, mode, **UNTRACKED))
                for mode in MODES
            }

    SHARES = ["transaction", "statement"]
    AUTOCOMMIT = {"kwargs": {"autocommit": True}}

    @pytest.mark.parametrize("mode", MODES)
    async def test_it_is_found_and_told_in_one_line(
        modes: dict[str, str], mode: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        """No budget is counted either, for it has one of its own."""
        async with PoolManager(
            modes[mode], min_size=2, max_size=2, name="orders", expected_processes=500, **AUTOCOMMIT
        ) as db:
            assert sorted(await use(db)) == sorted([*range(10)] * 4)
            assert await db.fetchval("show application_name") == "poolkeeper:orders"
        how = "which shares its sessions" if mode in SHARES else "of a mode that is not known"
        assert found(caplog) == [
            f'pool "orders" stands behind a pooler, {how}: prepared statements are off by default'
        ]
        assert warnings_in(caplog) == []

    if TRACKS:

        @pytest.mark.parametrize("mode", SHARES)
        async def test_it_gets_prepared_statements_if_it_keeps_track_of_them(
            server_dsn: str, mode: str, caplog: pytest.LogCaptureFixture
        ) -> None:
            with pgbouncer(server_dsn, mode, max_prepared_statements=100) as dsn:
                async with PoolManager(dsn, min_size=2, max_size=8, **AUTOCOMMIT) as db:
                    for _ in range(3):
                        assert sorted(await use(db, 30)) == sorted([*range(30)] * 4)
                        await db.execute("drop table if exists nothing_of_the_kind")
                    async with db.connection() as conn:
                        assert conn.prepare_threshold == 5
            assert "prepared statements are on" in found(caplog)[0]

    async def test_prepared_statements_work_in_session_mode_if_asked_for(
        modes: dict[str, str],
    ) -> None:
        kwargs = {"prepare_threshold": 0}
        async with PoolManager(modes["session"], min_size=2, max_size=2, kwargs=kwargs) as db:
            assert sorted(await use(db)) == sorted([*range(10)] * 4)
            assert await db.fetchval("select count(*) > 0 from pg_prepared_statements")

    @pytest.mark.parametrize("mode", MODES)
    async def test_transactions_work_but_in_statement_mode(
        modes: dict[str, str], mode: str
    ) -> None:
        async with PoolManager(modes[mode], min_size=1, max_size=2) as db:
            if mode == "statement":
                with pytest.raises(psycopg.Error, match="statement pooling mode"):
                    async with db.transaction() as conn:
                        await conn.execute("select 1")
            else:
                async with db.transaction() as conn:
                    await conn.execute("create temporary table once (n int) on commit drop")
                    await conn.execute("insert into once values (1)")
                    cursor = await conn.execute("select count(*) from once")
                    assert await cursor.fetchone() == (1,)
            assert await db.fetchval("select 42") == 42

    @pytest.mark.parametrize("mode", MODES)
    async def test_copy_and_streams_work(modes: dict[str, str], mode: str) -> None:
        db = PoolManager(modes[mode], min_size=1, max_size=1, **AUTOCOMMIT)
        async with db, db.cursor() as cur:
            async with cur.copy("copy (select generate_series(1, 5)) to stdout") as copy:
                assert [row[0] async for row in copy.rows()] == ["1", "2", "3", "4", "5"]
            rows = [row async for row in cur.stream("select generate_series(1, 5)")]
            assert rows == [(n,) for n in range(1, 6)]

    @pytest.mark.parametrize("mode", MODES)
    async def test_a_query_can_be_cancelled_and_its_connection_is_kept(
        modes: dict[str, str], mode: str
    ) -> None:
        async with PoolManager(modes[mode], min_size=1, max_size=1, **AUTOCOMMIT) as db:
            with pytest.raises(psycopg.errors.QueryCanceled):
                await db.execute("select pg_sleep(60)", query_timeout=0.2)
            assert await db.fetchval("select 42") == 42
            assert db.pool.get_stats()["connections_num"] == 1

    @pytest.mark.parametrize("mode", MODES)
    async def test_what_pgbouncer_keeps_for_its_client_is_put_back(
        modes: dict[str, str], mode: str
    ) -> None:
        async def configure(conn: Any) -> None:
            await conn.execute("set time zone 'Europe/Berlin'")

        async with PoolManager(
            modes[mode], min_size=2, max_size=2, configure=configure, **AUTOCOMMIT
        ) as db:
            await db.execute("set time zone 'Asia/Tokyo'")
            await asyncio.gather(*(db.fetchval("select pg_sleep(0.01)") for _ in range(4)))
            zones = await asyncio.gather(*(db.fetchval("show time zone") for _ in range(4)))
            assert set(zones) == {"Europe/Berlin"}

    @pytest.mark.parametrize("mode", ["session", "transaction"])
    async def test_what_no_pooler_keeps_is_set_again_only_in_a_session_of_the_clients_own(
        modes: dict[str, str], mode: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Elsewhere it might be set for anybody; to reset it does no harm there."""
        sent: list[bytes] = []

        async def run(conn: Any, statements: list[bytes]) -> list[Any]:
            sent.extend(statements)
            return await run_it(conn, statements)

        async def configure(conn: Any) -> None:
            await conn.execute("set default_transaction_read_only = on")

        run_it = _cleaning.run
        async with PoolManager(
            modes[mode], min_size=2, max_size=2, configure=configure, **AUTOCOMMIT
        ) as db:
            monkeypatch.setattr(_cleaning, "run", run)
            await db.execute("set default_transaction_read_only = off")
            async with db.connection(), db.connection():
                pass
            again = any(b"set_config('default_transaction_read_only'" in one for one in sent)
            assert again is (mode == "session")
            # The next test gets these sessions.
            await asyncio.gather(
                *(db.execute("reset default_transaction_read_only") for _ in range(4))
            )

    @pytest.mark.parametrize("mode", MODES)
    async def test_discard_all_is_run_where_a_session_is_the_clients_own(
        modes: dict[str, str], mode: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        """Elsewhere it would be run in anybody's."""
        configured = 0

        async def configure(conn: Any) -> None:
            nonlocal configured
            configured += 1

        async with PoolManager(
            modes[mode], min_size=2, max_size=2, configure=configure, reset="discard", **AUTOCOMMIT
        ) as db:
            async with db.connection() as conn:
                await conn.execute("set statement_timeout = '7s'")
            async with db.connection(), db.connection():  # whichever it was
                pass
            assert eventually(lambda: db.snapshot().idle == 2 or not db.snapshot().in_use)
            assert (configured > 2) is (mode == "session")
            if mode == "session":
                values = [await db.fetchval("show statement_timeout") for _ in range(3)]
                assert "7s" not in values
        assert found(caplog)[0].endswith(", DISCARD ALL is not run") is (mode in SHARES)

    @pytest.mark.parametrize("mode", MODES)
    async def test_what_belongs_to_a_session_is_the_clients_own_in_session_mode_only(
        modes: dict[str, str], mode: str
    ) -> None:
        """An advisory lock, say, which two clients have at once otherwise."""
        lock = "select pg_try_advisory_lock(4711)"
        db = PoolManager(modes[mode], min_size=2, max_size=2, **AUTOCOMMIT)
        async with db, db.connection() as one, db.connection() as other:
            mine = await (await one.execute(lock)).fetchone()
            theirs = await (await other.execute(lock)).fetchone()
            assert (mine, theirs) == ((True,), (mode in SHARES,))
            await one.execute("select pg_advisory_unlock_all()")

    async def test_notifications_arrive_in_session_mode(modes: dict[str, str]) -> None:
        db = PoolManager(modes["session"], min_size=2, max_size=2, **AUTOCOMMIT)
        async with db, db.connection() as conn:
            await conn.execute("listen news")
            await db.execute("notify news, 'hot'")
            assert [n.payload async for n in conn.notifies(timeout=20, stop_after=1)] == ["hot"]
            await conn.execute("unlisten news")

    @pytest.mark.parametrize("mode", SHARES)
    async def test_notifications_go_to_whoever_has_the_session_where_sessions_are_shared(
        modes: dict[str, str], mode: str
    ) -> None:
        heard: list[str] = []
        db = PoolManager(modes[mode], min_size=2, max_size=2, **AUTOCOMMIT)
        async with db, db.connection() as one, db.connection() as other:
            other.add_notify_handler(lambda notify: heard.append(notify.payload))
            await one.execute("listen news")
            async with asyncio.timeout(20):
                while not heard:  # until it gets the session in which the other one has listened
                    await other.execute("notify news, 'hot'")
            assert [n.payload async for n in one.notifies(timeout=0.1)] == []
            await asyncio.gather(*(one.execute("unlisten *"), other.execute("unlisten *")))

    async def test_one_that_has_no_session_free_does_not_hold_the_opening_up(
        server_dsn: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        """It takes clients nevertheless; that it is one shows in the number that it makes up."""
        settings = {**UNTRACKED, "default_pool_size": 1}
        with pgbouncer(server_dsn, **settings) as dsn, psycopg.connect(dsn) as busy:
            busy.execute("select 1")
            db = PoolManager(dsn, min_size=2, max_size=2, open_timeout=20)
            await db.open()
            assert life(db.pool).front.pooled
            assert len(found(caplog)) == 1
            busy.rollback()
            assert sorted(await use(db)) == sorted([*range(10)] * 4)
            await db.close()
