"""The short ways of a manager: one statement, a transaction, a cursor."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from typing import Any

import psycopg
import pytest
from psycopg import IsolationLevel, sql
from psycopg.rows import class_row, dict_row, scalar_row

from poolkeeper import AcquireTimeout, ConfigError, PoolManager
from tests.support.server import admin
from tests.support.wire import wire_of

MakeManager = Callable[..., PoolManager[Any]]
HERE = "tests/integration/test_helpers.py"


@pytest.fixture
async def one(make_manager: MakeManager) -> PoolManager[Any]:
    """A manager with a single connection."""
    db = make_manager(min_size=1, max_size=1, name="orders", timeout=5)
    await db.open()
    return db


@pytest.fixture
def table(dsn: str, request: pytest.FixtureRequest) -> Any:
    """The name of a table of the test's own: n is 1, 2, 3."""
    name = "helpers_" + re.sub(r"\W", "_", request.node.name)[:50].lower()
    admin(dsn, f"drop table if exists {name}")
    admin(dsn, f"create table {name} (n int unique)")
    admin(dsn, f"insert into {name} select generate_series(1, 3)")
    yield name
    admin(dsn, f"drop table {name}")


# --- one round trip -------------------------------------------------------------------------------


@pytest.mark.parametrize("params", [None, (7,)], ids=["plain", "with parameters"])
@pytest.mark.parametrize("helper", ["execute", "fetchone", "fetchall", "fetchval"])
async def test_a_helper_makes_one_round_trip(
    one: PoolManager[Any], helper: str, params: Any
) -> None:
    query = "select 7" if params is None else "select %s::int"
    with wire_of(one) as wire:
        for _ in range(3):
            wire.clear()
            await getattr(one, helper)(query, params)
            assert wire.round_trips() == 1, wire.sent()


async def test_a_helper_makes_one_round_trip_with_a_prepared_statement(
    make_manager: MakeManager,
) -> None:
    db = make_manager(min_size=1, max_size=1, kwargs={"prepare_threshold": 0})
    await db.open()
    await db.fetchval("select %s::int", (7,))
    with wire_of(db) as wire:
        assert await db.fetchval("select %s::int", (8,)) == 8
        assert wire.round_trips() == 1, wire.sent()
        assert "Parse" not in wire.sent()


async def test_the_idiomatic_block_makes_three(one: PoolManager[Any]) -> None:
    """What the helpers save: BEGIN and COMMIT."""
    with wire_of(one) as wire:
        async with one.connection() as conn:
            assert await (await conn.execute("select 7")).fetchone() == (7,)
        assert wire.round_trips() == 3, wire.sent()


@pytest.mark.direct
async def test_after_a_helper_nothing_is_idle_in_transaction(
    one: PoolManager[Any], dsn: str
) -> None:
    pid = await one.fetchval("select pg_backend_pid()")
    states = "select state from pg_stat_activity where pid = %s"
    assert admin(dsn, states, (pid,)) == [("idle",)]


# --- what they return -----------------------------------------------------------------------------


async def test_execute_returns_how_many_rows_were_touched(
    one: PoolManager[Any], table: str
) -> None:
    assert await one.execute(f"update {table} set n = n + 10 where n > %s", (1,)) == 2
    assert await one.execute(f"insert into {table} values (7)") == 1
    assert await one.execute(f"select * from {table}") == 4
    assert await one.execute(f"delete from {table} where n = 99") == 0


async def test_execute_returns_minus_one_where_there_is_no_count(one: PoolManager[Any]) -> None:
    assert await one.execute("do $$ begin end $$") == -1


async def test_fetch_returns_rows_a_row_and_a_value(one: PoolManager[Any], table: str) -> None:
    query = f"select n, n * 10 from {table} order by n"
    assert await one.fetchone(query) == (1, 10)
    assert await one.fetchall(query) == [(1, 10), (2, 20), (3, 30)]
    assert await one.fetchval(query) == 1


async def test_fetch_from_no_rows(one: PoolManager[Any], table: str) -> None:
    query = f"select n from {table} where n > 100"
    assert await one.fetchone(query) is None
    assert await one.fetchall(query) == []
    assert await one.fetchval(query) is None
    assert await one.fetchval("select null::int") is None


@pytest.mark.parametrize(
    ("helper", "nothing"),
    [("execute", 1), ("fetchone", None), ("fetchall", []), ("fetchval", None)],
)
async def test_a_statement_that_returns_nothing_is_run_once(
    one: PoolManager[Any], table: str, helper: str, nothing: Any
) -> None:
    found = await getattr(one, helper)(f"insert into {table} values (100)")
    assert found == nothing
    assert await one.fetchval(f"select count(*) from {table} where n = 100") == 1


@pytest.mark.parametrize(
    ("helper", "returned"),
    [("execute", 1), ("fetchone", (100,)), ("fetchall", [(100,)]), ("fetchval", 100)],
)
async def test_a_statement_with_returning_is_run_once_and_committed(
    one: PoolManager[Any], table: str, dsn: str, helper: str, returned: Any
) -> None:
    found = await getattr(one, helper)(f"insert into {table} values (100) returning n")
    assert found == returned
    assert admin(dsn, f"select count(*) from {table} where n = 100") == [(1,)]


@pytest.mark.parametrize("helper", ["execute", "fetchone", "fetchall", "fetchval"])
async def test_a_statement_that_refuses_to_run_in_a_transaction_works(
    one: PoolManager[Any], table: str, helper: str
) -> None:
    assert await getattr(one, helper)(f"vacuum {table}") in (-1, None, [])
    async with one.connection() as conn:
        with pytest.raises(psycopg.errors.ActiveSqlTransaction):
            await conn.execute(f"vacuum {table}")


# --- what they are given --------------------------------------------------------------------------


async def test_parameters_by_position_and_by_name(one: PoolManager[Any]) -> None:
    assert await one.fetchone("select %s::int, %s::text", (1, "a")) == (1, "a")
    assert await one.fetchone("select %(n)s::int, %(n)s::int", {"n": 4}) == (4, 4)
    assert await one.fetchall("select %s::int", [5]) == [(5,)]
    assert await one.execute("select 1 where %(yes)s", {"yes": True}) == 1
    # Without parameters a percent sign is one; with an empty tuple it is doubled.
    assert await one.fetchval("select 'a%'") == "a%"
    assert await one.fetchval("select 'a%%'", ()) == "a%"


async def test_a_composed_query(one: PoolManager[Any], table: str) -> None:
    query = sql.SQL("select count(*) from {}").format(sql.Identifier(table))
    assert await one.fetchval(query) == 3


async def test_a_row_factory_for_one_statement(one: PoolManager[Any], table: str) -> None:
    class Row:
        def __init__(self, n: int) -> None:
            self.n = n

    query = f"select n from {table} order by n"
    assert await one.fetchone(query, row_factory=dict_row) == {"n": 1}
    assert await one.fetchall(query, row_factory=scalar_row) == [1, 2, 3]
    row = await one.fetchone(query + " desc", row_factory=class_row(Row))
    assert row is not None
    assert row.n == 3
    assert await one.fetchone(query) == (1,)


async def test_the_row_factory_of_the_connection_is_used_where_none_is_given(
    make_manager: MakeManager,
) -> None:
    db = make_manager(min_size=1, max_size=1, kwargs={"row_factory": dict_row})
    await db.open()
    assert await db.fetchone("select 1 as a, 2 as b") == {"a": 1, "b": 2}
    assert await db.fetchall("select 1 as a") == [{"a": 1}]
    assert await db.fetchval("select 1 as a, 2 as b") == 1
    async with db.cursor() as cursor:
        assert await (await cursor.execute("select 1 as a")).fetchone() == {"a": 1}


async def test_helpers_work_on_connections_in_autocommit(make_manager: MakeManager) -> None:
    db = make_manager(min_size=1, max_size=1, kwargs={"autocommit": True})
    await db.open()
    with wire_of(db) as wire:
        assert await db.fetchval("select 1") == 1
        assert wire.round_trips() == 1
    async with db.connection() as conn:
        assert conn.autocommit
    async with db.transaction() as conn:
        assert conn.info.transaction_status.name == "INTRANS"


@pytest.mark.parametrize("helper", ["execute", "fetchone", "fetchall", "fetchval"])
async def test_a_helper_leaves_the_settings_of_the_connection(
    one: PoolManager[Any], helper: str
) -> None:
    await getattr(one, helper)("select 1")
    async with one.connection() as conn:
        assert not conn.autocommit
        await conn.execute("select 1")
        assert conn.info.transaction_status.name == "INTRANS"


@pytest.mark.parametrize("helper", ["execute", "fetchone", "fetchall", "fetchval"])
async def test_an_error_leaves_the_connection_usable(
    one: PoolManager[Any], table: str, helper: str
) -> None:
    pid = await one.fetchval("select pg_backend_pid()")
    with pytest.raises(psycopg.errors.UniqueViolation):
        await getattr(one, helper)(f"insert into {table} values (1) returning n")
    with pytest.raises(psycopg.errors.SyntaxError):
        await getattr(one, helper)("selec")
    with pytest.raises(psycopg.ProgrammingError):
        await getattr(one, helper)("select %s", ())
    assert await one.fetchval("select pg_backend_pid()") == pid
    async with one.connection() as conn:
        assert conn.info.transaction_status.name == "IDLE"


@pytest.mark.parametrize("helper", ["execute", "fetchone", "fetchall", "fetchval"])
async def test_a_helper_waits_for_a_connection_as_long_as_it_is_told(
    one: PoolManager[Any], helper: str
) -> None:
    async with one.connection():
        with pytest.raises(AcquireTimeout) as caught:
            await getattr(one, helper)("select 1", timeout=0)
        # In a task of its own: the holder's own wait could never end, and is refused at once.
        waits = asyncio.ensure_future(getattr(one, helper)("select 1", timeout=0.05))
        with pytest.raises(AcquireTimeout, match=r"within 0\.05 s"):
            await waits
    assert f"at {HERE}:" in str(caught.value)


async def test_a_cancelled_helper_gives_its_connection_back(one: PoolManager[Any]) -> None:
    task = asyncio.ensure_future(one.fetchval("select pg_sleep(30)"))
    await asyncio.sleep(0.1)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await one.fetchval("select 1") == 1


async def test_a_helper_inside_of_a_block_has_a_connection_of_its_own(
    db: PoolManager[Any], table: str
) -> None:
    async with db.transaction() as conn:
        await conn.execute(f"delete from {table}")
        assert await db.fetchval(f"select count(*) from {table}") == 3
    assert await db.fetchval(f"select count(*) from {table}") == 0


async def test_the_holder_is_named_by_its_line_not_by_ours(one: PoolManager[Any]) -> None:
    async def hold(block: Any) -> str:
        async with block:
            return str(one.pool.checkouts()[0])

    for block in (one.connection(), one.transaction(), one.cursor(), one.pool.connection()):
        assert f"at {HERE}:" in await hold(block)

    async def fetch() -> None:
        await one.fetchval("select pg_sleep(0.3)")

    task = asyncio.ensure_future(fetch())
    while not one.pool.checkouts():
        await asyncio.sleep(0.01)
    assert f"at {HERE}:" in str(one.pool.checkouts()[0])
    await task


# --- transaction() --------------------------------------------------------------------------------

SETTINGS = """
    select current_setting('transaction_isolation'),
           current_setting('transaction_read_only'),
           current_setting('transaction_deferrable')
"""
DEFAULT = ("read committed", "off", "off")


@pytest.mark.parametrize(
    ("options", "inside"),
    [
        ({}, DEFAULT),
        ({"isolation": "serializable"}, ("serializable", "off", "off")),
        ({"isolation": "Repeatable Read"}, ("repeatable read", "off", "off")),
        ({"isolation": IsolationLevel.READ_UNCOMMITTED}, ("read uncommitted", "off", "off")),
        ({"isolation": "read committed"}, DEFAULT),
        ({"read_only": True}, ("read committed", "on", "off")),
        ({"read_only": False}, DEFAULT),
        (
            {"isolation": "serializable", "read_only": True, "deferrable": True},
            ("serializable", "on", "on"),
        ),
        ({"deferrable": False}, DEFAULT),
    ],
    ids=str,
)
@pytest.mark.parametrize("autocommit", [False, True], ids=["default", "autocommit"])
async def test_the_settings_of_a_transaction_are_for_it_alone(
    make_manager: MakeManager, options: dict[str, Any], inside: Any, autocommit: bool
) -> None:
    db = make_manager(min_size=1, max_size=1, kwargs={"autocommit": autocommit})
    await db.open()
    async with db.transaction(**options) as conn:
        pid = conn.info.backend_pid
        assert await (await conn.execute(SETTINGS)).fetchone() == inside
    async with db.connection() as conn:
        assert conn.info.backend_pid == pid
        assert (conn.isolation_level, conn.read_only, conn.deferrable) == (None, None, None)
        assert await (await conn.execute(SETTINGS)).fetchone() == DEFAULT
    async with db.transaction() as conn:
        assert await (await conn.execute(SETTINGS)).fetchone() == DEFAULT


async def test_the_settings_of_a_transaction_are_put_back_to_what_configure_left(
    make_manager: MakeManager,
) -> None:
    async def configure(conn: Any) -> None:
        await conn.set_isolation_level(IsolationLevel.REPEATABLE_READ)
        await conn.set_read_only(True)

    db = make_manager(min_size=1, max_size=1, configure=configure)
    await db.open()
    async with db.transaction(isolation="serializable", read_only=False) as conn:
        assert (await (await conn.execute(SETTINGS)).fetchone())[:2] == ("serializable", "off")
    async with db.transaction() as conn:
        assert (await (await conn.execute(SETTINGS)).fetchone())[:2] == ("repeatable read", "on")


async def test_a_transaction_commits_on_success_and_rolls_back_on_error(
    one: PoolManager[Any], table: str, dsn: str
) -> None:
    async with one.transaction() as conn:
        await conn.execute(f"insert into {table} values (10)")
        assert admin(dsn, f"select count(*) from {table}") == [(3,)]
    assert admin(dsn, f"select count(*) from {table}") == [(4,)]
    with pytest.raises(KeyError):
        async with one.transaction(isolation="serializable") as conn:
            await conn.execute(f"insert into {table} values (11)")
            raise KeyError
    assert admin(dsn, f"select count(*) from {table}") == [(4,)]
    async with one.connection() as conn:
        assert conn.isolation_level is None


async def test_rollback_ends_a_transaction_and_is_not_passed_on(
    one: PoolManager[Any], table: str, dsn: str
) -> None:
    async with one.transaction() as conn:
        await conn.execute(f"insert into {table} values (10)")
        raise psycopg.Rollback
    assert admin(dsn, f"select count(*) from {table}") == [(3,)]


async def test_a_transaction_inside_a_transaction_is_a_savepoint(
    one: PoolManager[Any], table: str, dsn: str
) -> None:
    async with one.transaction() as conn:
        await conn.execute(f"insert into {table} values (10)")
        with pytest.raises(psycopg.errors.UniqueViolation):
            async with conn.transaction():
                await conn.execute(f"insert into {table} values (1)")
        async with conn.transaction():
            await conn.execute(f"insert into {table} values (11)")
            raise psycopg.Rollback
        async with conn.transaction():
            await conn.execute(f"insert into {table} values (12)")
    assert admin(dsn, f"select n from {table} where n >= 10 order by n") == [(10,), (12,)]


async def test_commit_inside_a_transaction_block_is_refused_as_psycopg_does(
    one: PoolManager[Any],
) -> None:
    with pytest.raises(psycopg.ProgrammingError, match="Explicit commit"):
        async with one.transaction() as conn:
            await conn.commit()
    assert await one.fetchval("select 1") == 1


@pytest.mark.parametrize("isolation", ["chaos", "", "READ-COMMITTED", 9, object])
async def test_an_isolation_level_that_does_not_exist_is_refused_at_once(
    one: PoolManager[Any], isolation: Any
) -> None:
    with pytest.raises(ConfigError) as caught:
        one.transaction(isolation=isolation)
    assert caught.value.parameter == "isolation"
    assert isinstance(caught.value, ValueError)
    assert '"read committed", "repeatable read", "serializable"' in str(caught.value)
    assert one.pool.counts()["idle"] == 1


async def test_a_transaction_waits_for_a_connection_as_long_as_it_is_told(
    one: PoolManager[Any],
) -> None:
    async with one.connection():
        with pytest.raises(AcquireTimeout):
            async with one.transaction(timeout=0):
                pass
        with pytest.raises(AcquireTimeout):
            async with one.cursor(timeout=0):
                pass


# --- cursor() -------------------------------------------------------------------------------------


async def test_a_cursor_commits_and_rolls_back(one: PoolManager[Any], table: str, dsn: str) -> None:
    async with one.cursor() as cursor:
        await cursor.execute(f"insert into {table} values (10) returning n")
        assert await cursor.fetchone() == (10,)
    with pytest.raises(KeyError):
        async with one.cursor() as cursor:
            await cursor.execute(f"insert into {table} values (11)")
            raise KeyError
    assert admin(dsn, f"select n from {table} where n >= 10") == [(10,)]
    assert cursor.closed


async def test_a_cursor_takes_a_row_factory_and_the_binary_format(one: PoolManager[Any]) -> None:
    async with one.cursor(row_factory=dict_row) as cursor:
        await cursor.execute("select 1 as n")
        assert await cursor.fetchone() == {"n": 1}
    async with one.cursor(binary=True) as cursor:
        assert cursor.format == psycopg.pq.Format.BINARY
        await cursor.execute("select 5::int4 as n")
        assert cursor.description
        assert cursor.pgresult.fformat(0) == psycopg.pq.Format.BINARY
        assert await cursor.fetchone() == (5,)
    async with one.cursor() as cursor:
        assert cursor.format == psycopg.pq.Format.TEXT
        await cursor.execute("select 1 as n")
        assert await cursor.fetchone() == (1,)


async def test_a_cursor_copies_and_runs_many(one: PoolManager[Any], table: str) -> None:
    async with one.cursor() as cursor:
        await cursor.executemany(f"insert into {table} values (%s)", [(n,) for n in range(10, 20)])
        async with cursor.copy(f"copy {table} from stdin") as copy:
            for n in range(20, 30):
                await copy.write_row((n,))
    assert await one.fetchval(f"select count(*) from {table}") == 23


# --- what is often written instead ----------------------------------------------------------------


async def test_a_connection_that_is_awaited_says_what_to_write(one: PoolManager[Any]) -> None:
    awaited: Any = one.connection()
    with pytest.raises(
        TypeError, match=r'"orders" cannot be awaited: write "async with \.\.\.conn'
    ):
        await awaited
    async with awaited:  # nothing has happened yet
        assert one.snapshot().in_use == 1
    assert one.snapshot().in_use == 0
