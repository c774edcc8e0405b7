"""One-shots that share connections: the same answers as before, each to whom it is for."""

from __future__ import annotations

import asyncio
import contextvars
import ctypes
import datetime as dt
import decimal
import functools
import json
import random
import time
import uuid
from collections.abc import AsyncIterator, Callable
from time import monotonic
from types import SimpleNamespace
from typing import Any

import psycopg
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from psycopg import cursor_async
from psycopg.adapt import Dumper, Loader
from psycopg.rows import class_row, dict_row, namedtuple_row, scalar_row
from psycopg.types.enum import EnumInfo, register_enum
from psycopg.types.json import Jsonb, set_json_dumps, set_json_loads
from typing_extensions import override

from poolkeeper import (
    ClosedError,
    LoopMismatchError,
    PoolManager,
    QueryTimeout,
    ReleasedConnectionError,
    _converting,
    _lane,
    _oneshots,
)
from tests.support.inside import life
from tests.support.lanes import PLAIN, know, lanes, trust
from tests.support.pooler import MODES, PGBOUNCER, pgbouncer, pgbouncer_version
from tests.support.server import admin, kill_sessions
from tests.support.waiting import eventually

MakeManager = Callable[..., PoolManager[Any]]


@pytest.fixture
async def db(make_manager: MakeManager) -> PoolManager[Any]:
    """A manager with two connections."""
    db = make_manager(min_size=2, max_size=2, name="orders", timeout=20, pipeline=True)
    await db.open()
    return db


@pytest.fixture
async def one(make_manager: MakeManager) -> PoolManager[Any]:
    """A manager with one connection."""
    db = make_manager(min_size=1, max_size=1, name="orders", timeout=20, pipeline=True)
    await db.open()
    return db


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """More is sent behind a statement for as long as a test may be kept from the processor."""
    monkeypatch.setattr(_lane, "LONG", 60.0)
    monkeypatch.setattr(_lane, "TURN", 60.0)


@pytest.fixture
def trusting(monkeypatch: pytest.MonkeyPatch) -> None:
    """No statement is slow."""
    trust(monkeypatch)


@pytest.fixture
def table(database: str) -> str:
    """A database with a table t: n is 1, 2, 3."""
    admin(database, "create table t (n int unique)")
    admin(database, "insert into t select generate_series(1, 3)")
    return database


def at_rest(db: PoolManager[Any]) -> bool:
    """Tell whether every connection of *db* is idle."""
    counts = db.pool.counts()
    return counts["idle"] == counts["total"] == counts["max"] and not counts["in_use"]


async def come_to_rest(db: PoolManager[Any]) -> None:
    """Wait until it is so."""
    async with asyncio.timeout(20):
        while not at_rest(db):
            await asyncio.sleep(0.005)


# --- the same answers ----------------------------------------------------------------------------

VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**63), 2**63 - 1),
    st.floats(allow_nan=False),
    st.decimals(allow_nan=False, allow_infinity=False, places=3),
    st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"])),
    st.binary(),
    st.dates(),
    st.times(),
    st.datetimes(min_value=dt.datetime(1900, 1, 1)),
    st.datetimes(min_value=dt.datetime(1900, 1, 1), timezones=st.just(dt.UTC)),
    st.timedeltas(dt.timedelta(-10_000), dt.timedelta(10_000)),
    st.uuids(),
    st.ip_addresses(),
    st.lists(st.integers(0, 100), min_size=1),
    st.lists(st.one_of(st.none(), st.text("ab'\\\"{},")), min_size=1),
    st.dictionaries(st.text("abc", max_size=3), st.integers(), max_size=3).map(Jsonb),
)


@pytest.fixture
async def both(
    make_manager: MakeManager,
) -> AsyncIterator[tuple[PoolManager[Any], PoolManager[Any]]]:
    shared = make_manager(min_size=1, name="shared", timeout=20, pipeline=True)
    alone = make_manager(min_size=1, name="alone", application_name="x", pipeline=False)
    async with shared, alone:
        yield shared, alone


async def outcome(call: Any) -> Any:
    """What a one-shot returned, with its type, or raised."""
    try:
        value = await call
    except Exception as ex:
        diag = getattr(ex, "diag", None)
        return type(ex), str(ex), getattr(ex, "sqlstate", None), diag and diag.message_primary
    return type(value), repr(value)


@pytest.mark.filterwarnings("ignore::poolkeeper.DuplicatePoolWarning")
@given(st.data())
@settings(
    max_examples=20,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
async def test_any_value_comes_back_as_by_psycopgs_cursor(
    both: tuple[PoolManager[Any], PoolManager[Any]], data: st.DataObject
) -> None:
    values = data.draw(st.lists(VALUES, min_size=1, max_size=4))
    marks = ", ".join(data.draw(st.sampled_from(["%s", "%t", "%b", "%s::text"])) for _ in values)
    factory = data.draw(st.sampled_from([None, dict_row, scalar_row]))
    query = f"select {marks}"
    calls = [
        lambda db: db.fetchone(query, values, row_factory=factory),
        lambda db: db.fetchall(f"values ({marks}), ({marks})", values * 2, row_factory=factory),
        lambda db: db.fetchval(query, values),
        lambda db: db.execute(query, values),
    ]
    for call in calls:
        first, *others = await asyncio.gather(*(outcome(call(both[0])) for _ in range(4)))
        expected = await outcome(call(both[1]))
        assert [first, *others] == [expected] * 4


class Account:
    """A row of the user's."""

    def __init__(self, a: int, b: str) -> None:
        self.pair = (a, b)

    def __repr__(self) -> str:
        return f"Account{self.pair}"


def columns(cursor: psycopg.AsyncCursor[Any]) -> Any:
    """A row factory of the user's, that looks at the cursor, and keeps it."""
    names = [c.name for c in cursor.description or ()]
    return lambda values: (names, values, cursor.rowcount, cursor.statusmessage)


STATEMENTS: list[tuple[str, Any]] = [
    ("select 1 as a, 'x' as b", None),
    ("select 1 as a, 'x' as b where false", None),
    ("select", None),
    ("select from generate_series(1, 3)", None),
    ("values (1, 'x'), (2, null)", None),
    ("select %(a)s::int as a, %(b)s::text as b, %(a)s::int + 1 as c", {"a": 1, "b": "x"}),
    ("select '%%' as a, 'x' as b", ()),
    ("select '%' as a, 'x' as b", None),
    ("select '2024-02-30'::date", None),
    ("select 1/%s", (0,)),
    ("select nothing from nowhere", None),
    ("select %s, %s", (1,)),
    ("select %(a)s", {}),
    ("select %s", (object(),)),
    ("select %x", (1,)),
    ("select 'a' || %s", ("b\0c",)),
    ("select 1; select 2", None),
    ("select 1; select %s", (2,)),
    ("insert into t values (%s) returning n, n + 1", (7,)),
    ("insert into t values (8)", None),
    ("insert into t values (1)", None),
    ("update t set n = n + 100 where n > %s", (1,)),
    ("update t set n = n where false", None),
    ("delete from t where n = %s returning n as a, 'x' as b", (1,)),
    ("with gone as (delete from t returning n) select count(*) from gone", None),
    ("select n into u from t", None),
    ("show timezone", None),
    ("copy t to stdout", None),
    ("create temp table v (n int)", None),
    ("select * from t for update", None),
    ("select $1", None),
    ("select %s", {}),
    ("select %%s", ()),
    ("select '%%'", {}),
    ("select * from t where n = $1", None),
    ("select %s", 5),
    ("select %s::int", (5,)),
    ("select %s::int", 5),
    ("select %s::int", iter([5])),
    ("select now()::timestamptz > %s", (dt.datetime(2000, 1, 1, tzinfo=dt.UTC),)),
    ("select array[%s::timestamptz]", (dt.datetime(2000, 1, 1, tzinfo=dt.UTC),)),
    ("select row(1, 'x', null::int)", None),
    ("select %s::uuid", (uuid.UUID(int=7),)),
    ("select %s::numeric", (decimal.Decimal("1.50"),)),
]


@pytest.mark.parametrize(
    "factory", [None, dict_row, scalar_row, namedtuple_row, class_row(Account), columns]
)
async def test_every_statement_ends_as_by_psycopgs_cursor(table: str, factory: Any) -> None:
    ended: list[list[Any]] = []
    for pipeline in (True, False):
        name = f"orders-{pipeline}"
        async with PoolManager(table, min_size=1, name=name, pipeline=pipeline) as db:
            await db.execute("truncate t")
            await db.execute("insert into t values (1), (2), (3)")
            ended.append(
                [
                    (query, await outcome(call))
                    for query, params in STATEMENTS
                    for call in (
                        db.fetchall(query, params, row_factory=factory),
                        db.fetchone(query, params, row_factory=factory),
                        db.fetchval(query, params),
                        db.execute(query, params),
                    )
                ]
            )
            ended[-1].append(await db.fetchall("select n from t order by n"))
            await db.execute("drop table u")
    assert ended[0] == ended[1]


@pytest.mark.parametrize("threshold", [None, 0, 5])
async def test_what_the_commit_refuses_is_no_success(database: str, threshold: int | None) -> None:
    """The server has answered the statement by then: with its rows, even."""
    admin(database, "create table d (n int unique deferrable initially deferred)")
    admin(database, "insert into d values (1)")
    insert = "insert into d values (%s)"
    kwargs = {"prepare_threshold": threshold}
    async with PoolManager(database, min_size=1, kwargs=kwargs, pipeline=True) as db:
        for _ in range(2):
            for call in (
                db.execute(insert, (1,)),
                db.execute("insert into d values (1)"),
                db.fetchone(f"{insert} returning n", (1,)),
                db.fetchval(f"{insert} returning n", (1,)),
                db.fetchall(f"{insert} returning n", (1,), row_factory=dict_row),
            ):
                with pytest.raises(psycopg.errors.UniqueViolation):
                    await call
        assert await db.execute(insert, (2,)) == 1
        assert await db.fetchall("select n from d order by n") == [(1,), (2,)]


async def test_psycopgs_prepared_statements_are_prepared_counted_and_forgotten(
    make_manager: MakeManager,
) -> None:
    db = make_manager(
        min_size=1, pipeline=True, kwargs={"prepare_threshold": 2}, configure=prepare_three
    )
    async with db:
        for n in range(8):
            for _ in range(4):
                assert await db.fetchval(f"select %s::int + {n}", (1,)) == 1 + n
        names = await db.fetchall("select name from pg_prepared_statements")
        assert len(names) <= 4
        async with db.connection() as conn:
            assert len(conn._prepared._names) <= 4
            assert {name for (name,) in names} >= {
                n.decode() for n in conn._prepared._names.values()
            }


async def prepare_three(conn: psycopg.AsyncConnection[Any]) -> None:
    """Let at most three statements be prepared."""
    conn.prepared_max = 3


async def test_what_writes_is_sent_once_however_late_what_was_sent_before_it_is(
    table: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_oneshots, "SLOW", -60.0)
    monkeypatch.setattr(_oneshots, "TICK", 0.0)
    kwargs = {"prepare_threshold": 0}
    async with PoolManager(
        table, min_size=1, kwargs=kwargs, configure=prepare_three, pipeline=True
    ) as db:
        for n in range(10, 30):
            # The server is to forget an earlier one first: that is sent for nobody.
            assert await db.execute(f"insert into t values (%s + {n})", (n,)) == 1


async def test_libpq_before_17_forgets_by_a_statement(
    make_manager: MakeManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It cannot close a prepared statement by a message."""
    monkeypatch.setattr(psycopg.capabilities, "has_send_close_prepared", lambda check=False: False)
    db = make_manager(
        min_size=1, max_size=1, pipeline=True, kwargs={"prepare_threshold": 0},
        configure=prepare_three,
    )  # fmt: skip
    async with db:
        for n in range(8):
            assert await db.fetchval(f"select %s::int + {n}", (1,)) == 1 + n
        names = {name for (name,) in await db.fetchall("select name from pg_prepared_statements")}
        assert 1 <= len(names) <= 4
        async with db.connection() as conn:
            # The server forgets all of them, and psycopg is to know.
            await conn.execute("deallocate all")
        for n in range(8):
            assert await db.fetchval(f"select %s::int + {n}", (1,)) == 1 + n


async def test_who_brings_many_rows_has_a_connection_to_himself_from_then_on(
    one: PoolManager[Any],
) -> None:
    query = "select generate_series(1, %s::int)"
    await know(one, query)
    assert len(await one.fetchall(query, (1000,))) == 1000
    assert lanes(one).texts.known(query).shares
    assert len(await one.fetchall(query, (1001,))) == 1001
    assert not lanes(one).texts.known(query).shares


async def test_who_relied_on_what_could_not_be_prepared_is_sent_again(table: str) -> None:
    query = "select n from t where n = %s"
    kwargs = {"prepare_threshold": 5}
    async with PoolManager(table, min_size=1, kwargs=kwargs, pipeline=True) as db:
        for _ in range(5):
            await db.execute(query, (1,))
        await know(db, query)
        admin(table, "alter table t rename to u")
        ended = await asyncio.gather(
            *(db.execute(query, (1,)) for _ in range(4)), return_exceptions=True
        )
        assert {type(ex) for ex in ended} == {psycopg.errors.UndefinedTable}
        admin(table, "alter table u rename to t")
        assert await asyncio.gather(*(db.execute(query, (1,)) for _ in range(8))) == [1] * 8


# --- who shares ----------------------------------------------------------------------------------


async def test_many_tasks_share_a_connection_and_each_gets_its_own_answer(
    one: PoolManager[Any],
) -> None:
    await know(one, PLAIN)
    before = one.pool.get_stats()["requests_num"]
    assert await asyncio.gather(*(one.fetchval(PLAIN, (n,)) for n in range(100))) == list(
        range(100)
    )
    assert one.pool.get_stats()["requests_num"] == before + 100
    await come_to_rest(one)


async def test_an_error_stays_alone(one: PoolManager[Any]) -> None:
    query = "select 1 / %s::int"
    await know(one, query)
    ended = await asyncio.gather(
        *(one.fetchval(query, (n % 3,)) for n in range(30)), return_exceptions=True
    )
    assert [type(ex) for ex in ended[::3]] == [psycopg.errors.DivisionByZero] * 10
    assert ended[1::3] == [1] * 10


@pytest.mark.usefixtures("trusting")
async def test_the_snapshot_shows_what_is_under_way_on_a_shared_connection(
    table: str,
) -> None:
    async with PoolManager(table, min_size=1, name="orders", pipeline=True) as db:
        await know(db, "select n from t", PLAIN)
        with psycopg.connect(table) as blocker:
            blocker.execute("lock table t")
            head = asyncio.create_task(db.fetchall("select n from t"), name="head")
            await asyncio.sleep(0)
            others = [asyncio.create_task(db.fetchval(PLAIN, (n,)), name=str(n)) for n in range(3)]
            await asyncio.sleep(0)
            (row,) = db.snapshot().checkouts
            assert (row.task, row.status) == ("head", "running a query")
            assert [one.task for one in row.behind] == ["0", "1", "2"]
            assert row.site.startswith("tests/integration/test_lanes.py:")
            assert all(one.site.startswith("tests/integration/test_lanes") for one in row.behind)
            assert "3 one-shots behind it" in str(db.diagnose())
        assert len(await head) == 3
        assert await asyncio.gather(*others) == [0, 1, 2]


@pytest.mark.usefixtures("patient")
async def test_nobody_stays_behind_a_slow_statement(table: str) -> None:
    async with PoolManager(table, min_size=2, name="orders", timeout=20, pipeline=True) as db:
        await know(db, "select n from t", PLAIN)
        with psycopg.connect(table) as blocker:
            blocker.execute("lock table t")
            async with db.connection():  # so that there is one connection left
                head = asyncio.create_task(db.fetchall("select n from t"))
                await asyncio.sleep(0)
                others = [asyncio.create_task(db.fetchval(PLAIN, (n,))) for n in range(5)]
                await asyncio.sleep(0)
                assert len(db.snapshot().checkouts[-1].behind) == 5
                assert not any(task.done() for task in others)
            assert await asyncio.gather(*others) == list(range(5))
            assert not head.done()
            # It has a connection to itself, until it was quick for a while.
            assert not lanes(db).texts.known("select n from t").shares
        assert len(await head) == 3
        await come_to_rest(db)


async def test_a_loop_that_is_late_itself_takes_nobody_for_slow(dsn: str) -> None:
    """The answer to the one before has come long since, and was not read."""
    async with PoolManager(dsn, min_size=1, max_size=1, timeout=20) as db:
        await know(db, PLAIN)
        before = asyncio.create_task(db.fetchval(PLAIN, (1,)))
        await asyncio.sleep(0)
        time.sleep(0.05)
        after = asyncio.create_task(db.fetchval(PLAIN, (2,)))
        await asyncio.sleep(0)
        assert not db.snapshot().waiting
        assert await asyncio.gather(before, after) == [1, 2]
        assert lanes(db).texts.known(PLAIN).shares


async def test_what_waits_for_a_lock_holds_up_nobody_whose_end_it_waits_for(table: str) -> None:
    """A block that holds a row asks something else, and one-shots wait for that row."""
    async with PoolManager(table, min_size=3, name="orders", timeout=20, pipeline=True) as db:
        update = "update t set n = n + 10 where n = %s"
        await know(db, PLAIN)
        async with asyncio.timeout(20), db.connection() as conn:
            await conn.execute("update t set n = n where n = 1")
            waits = asyncio.create_task(db.execute(update, (1,)))
            pid = None
            while pid is None:  # until it does
                rows = await db.fetchall("select pid from pg_locks where not granted")
                pid = rows[0] if rows else None
            assert await asyncio.gather(*(db.fetchval(PLAIN, (n,)) for n in range(20))) == list(
                range(20)
            )
        assert await waits == 1


async def test_a_block_is_served_in_its_turn_however_many_one_shots_there_are(
    one: PoolManager[Any],
) -> None:
    await know(one, PLAIN)
    ends = False

    async def ask() -> int:
        asked = 0
        while not ends:
            await one.fetchval(PLAIN, (asked,))
            asked += 1
        return asked

    tasks = [asyncio.create_task(ask()) for _ in range(40)]
    await asyncio.sleep(0.05)
    for _ in range(5):
        async with asyncio.timeout(20), one.connection() as conn:
            await conn.execute("select 1")
    ends = True
    assert all(await asyncio.gather(*tasks))
    await come_to_rest(one)


async def test_one_shots_are_served_in_their_turn_however_many_blocks_there_are(
    one: PoolManager[Any],
) -> None:
    await know(one, PLAIN)
    ends = False

    async def hold() -> None:
        while not ends:
            async with one.connection() as conn:
                await conn.execute("select 1")

    tasks = [asyncio.create_task(hold()) for _ in range(10)]
    async with asyncio.timeout(20):
        for _ in range(3):
            assert await asyncio.gather(*(one.fetchval(PLAIN, (n,)) for n in range(20))) == list(
                range(20)
            )
    ends = True
    await asyncio.gather(*tasks)
    await come_to_rest(one)


async def test_a_pool_grows_for_who_would_have_to_wait(make_manager: MakeManager) -> None:
    db = make_manager(min_size=1, max_size=3, pipeline=True)
    async with db:
        await know(db, PLAIN)
        async with asyncio.timeout(20):
            while db.pool.counts()["total"] < 3:
                await asyncio.gather(*(db.fetchval(PLAIN, (n,)) for n in range(20)))


# --- cancellation --------------------------------------------------------------------------------


@pytest.mark.parametrize("turns", range(8))
async def test_who_is_cancelled_at_any_turn_disturbs_nobody(
    one: PoolManager[Any], turns: int
) -> None:
    await know(one, PLAIN)
    for victim in range(6):
        tasks = [asyncio.create_task(one.fetchval(PLAIN, (n,))) for n in range(6)]
        for _ in range(turns):
            await asyncio.sleep(0)
        tasks[victim].cancel()
        ended = await asyncio.gather(*tasks, return_exceptions=True)
        for n, end in enumerate(ended):
            assert end == n or (n == victim and isinstance(end, asyncio.CancelledError))
    await come_to_rest(one)
    assert one.pool.get_stats().get("returns_bad", 0) == 0


async def test_all_who_are_cancelled_leave_the_connection_good(one: PoolManager[Any]) -> None:
    query = "select count(*) from generate_series(1, 20000000 * (%s - 1))"
    await know(one, query, PLAIN)
    pid = await one.fetchval("select pg_backend_pid()")
    tasks = [asyncio.create_task(one.fetchval(query, (2,))) for _ in range(5)]
    await asyncio.sleep(0.002)
    for task in tasks:
        task.cancel()
    begin = monotonic()
    await asyncio.gather(*tasks, return_exceptions=True)
    await come_to_rest(one)
    assert monotonic() - begin < 20
    assert await one.fetchval("select pg_backend_pid()") == pid


@pytest.mark.usefixtures("trusting")
async def test_who_comes_as_another_is_being_stopped_is_not_stopped_with_it(table: str) -> None:
    """In the very turn: sent behind it at once, or after a wait in the line."""
    query = "select n from t"
    async with PoolManager(table, min_size=1, name="orders", timeout=20, pipeline=True) as db:
        await know(db, query)
        for turns in range(6):
            with psycopg.connect(table) as blocker:
                blocker.execute("lock table t")
                head = asyncio.create_task(db.fetchall(query))
                await asyncio.sleep(0)
                head.cancel()
                for _ in range(turns):
                    await asyncio.sleep(0)
                others = [asyncio.create_task(db.fetchall(query)) for _ in range(3)]
                await asyncio.wait([head])
                await asyncio.sleep(0.1)  # the server is asked again and again
            for rows in await asyncio.gather(*others):
                assert len(rows) == 3
            assert head.cancelled()
        await come_to_rest(db)


async def test_a_statement_that_takes_too_long_is_stopped_if_it_is_alone(
    one: PoolManager[Any],
) -> None:
    with pytest.raises(QueryTimeout, match="took longer") as caught:
        await one.fetchval("select pg_sleep(60)", query_timeout=0.1)
    assert "is still good" in caught.value.detail
    await come_to_rest(one)


@pytest.mark.usefixtures("trusting")
async def test_a_statement_that_takes_too_long_goes_on_if_others_wait_behind_it(table: str) -> None:
    async with PoolManager(table, min_size=1, name="orders", pipeline=True) as db:
        await know(db, "select n from t", PLAIN)
        with psycopg.connect(table) as blocker:
            blocker.execute("lock table t")
            head = asyncio.create_task(db.fetchall("select n from t", query_timeout=0.1))
            await asyncio.sleep(0)
            other = asyncio.create_task(db.fetchval(PLAIN, (1,)))
            with pytest.raises(QueryTimeout) as caught:
                await head
            assert "others wait on the same connection" in caught.value.detail
        assert await other == 1


@pytest.mark.usefixtures("trusting")
async def test_the_time_of_a_statement_begins_when_the_server_has_come_to_it(table: str) -> None:
    async with PoolManager(table, min_size=1, name="orders", pipeline=True) as db:
        await know(db, "select n from t", PLAIN)
        with psycopg.connect(table) as blocker:
            blocker.execute("lock table t")
            head = asyncio.create_task(db.fetchall("select n from t"))
            await asyncio.sleep(0)
            others = [
                asyncio.create_task(db.fetchval(PLAIN, (n,), query_timeout=5.0)) for n in range(3)
            ]
            late = asyncio.create_task(db.fetchall("select n from t", query_timeout=0.1))
            await asyncio.sleep(0.3)
            assert not late.done()
            blocker.rollback()
            assert len(await head) == 3
            assert await asyncio.gather(*others) == [0, 1, 2]
            assert len(await late) == 3
            blocker.execute("lock table t")
            head = asyncio.create_task(db.fetchval(PLAIN, (4,)))
            await asyncio.sleep(0)
            with pytest.raises(QueryTimeout, match=r"0\.10 s"):
                await db.fetchall("select n from t", query_timeout=0.1)
            assert await head == 4


# --- what goes wrong -----------------------------------------------------------------------------


@pytest.mark.usefixtures("trusting")
async def test_a_session_that_is_killed_fails_the_one_at_its_head_and_no_other(
    table: str,
) -> None:
    async with PoolManager(table, min_size=1, name="killed", timeout=20, pipeline=True) as db:
        await know(db, "select n from t", PLAIN)
        with psycopg.connect(table) as blocker:
            blocker.execute("lock table t")
            head = asyncio.create_task(db.fetchall("select n from t"))
            await asyncio.sleep(0)
            others = [asyncio.create_task(db.fetchval(PLAIN, (n,))) for n in range(5)]
            await asyncio.sleep(0)
            kill_sessions(table, "poolkeeper:killed")
            with pytest.raises(psycopg.OperationalError):
                await head
            assert await asyncio.gather(*others) == list(range(5))


async def test_no_answer_reaches_a_stranger_whatever_goes_wrong(make_manager: MakeManager) -> None:
    db = make_manager(min_size=3, name="chaos", timeout=20, pipeline=True)
    chance = random.Random(7)
    async with db:
        await know(db, PLAIN)
        wrong: list[Any] = []
        answered = 0

        async def ask(n: int) -> None:
            nonlocal answered
            try:
                match n % 5:
                    case 0:
                        found = await db.fetchval("select %s::int + 0", (n,), query_timeout=0.01)
                    case 1:
                        found = await db.fetchval(f"select {n} + pg_sleep(%s)::text::int", (0,))
                    case _:
                        found = await db.fetchval(PLAIN, (n,))
                answered += 1
                if found != n:
                    wrong.append((n, found))
            except (psycopg.Error, QueryTimeout):
                pass

        n = 0
        for _ in range(20):
            tasks = [asyncio.create_task(ask(n := n + 1)) for _ in range(30)]
            for _ in range(chance.randrange(6)):
                await asyncio.sleep(0)
            for task in chance.sample(tasks, 10):
                task.cancel()
            if chance.random() < 0.2:
                await asyncio.to_thread(kill_sessions, db_dsn(db), "poolkeeper:chaos")
            await asyncio.gather(*tasks, return_exceptions=True)
        assert not wrong
        assert answered > 50
        await come_to_rest(db)


def db_dsn(db: PoolManager[Any]) -> str:
    """Where *db* is connected to."""
    return str(db.pool.conninfo)


async def test_large_parameters_get_through_while_the_server_answers(one: PoolManager[Any]) -> None:
    query = "select %s::text"
    await know(one, query, PLAIN)
    large = "x" * 20_000_000
    async with asyncio.timeout(30):
        ended = await asyncio.gather(
            one.fetchval(PLAIN, (1,)),
            one.fetchval(query, (large,)),
            one.fetchval(PLAIN, (2,)),
            one.fetchval(query, (large,)),
        )
    assert ended == [1, large, 2, large]
    await come_to_rest(one)


async def test_close_lets_what_is_under_way_finish_and_refuses_who_waits(
    one: PoolManager[Any],
) -> None:
    await know(one, PLAIN)
    tasks = [asyncio.create_task(one.fetchval(PLAIN, (n,))) for n in range(100)]
    await asyncio.sleep(0)
    await one.close()
    ended = await asyncio.gather(*tasks, return_exceptions=True)
    answered = [end for end in ended if not isinstance(end, ClosedError)]
    assert answered == list(range(len(answered)))
    assert 0 < len(answered) < 100


async def test_close_stops_what_runs_at_its_deadline(db: PoolManager[Any], dsn: str) -> None:
    task = asyncio.create_task(db.execute("select pg_sleep(60)"))
    await asyncio.sleep(0.1)
    await db.close(timeout=0.1)
    with pytest.raises(psycopg.Error):
        await task
    query = "select from pg_stat_activity where application_name = 'poolkeeper:orders'"
    assert eventually(lambda: not admin(dsn, query))


async def test_drain_replaces_connections_that_are_never_without_work(
    one: PoolManager[Any],
) -> None:
    await know(one, PLAIN)
    ends = False

    async def ask() -> None:
        while not ends:
            await one.fetchval(PLAIN, (1,))

    tasks = [asyncio.create_task(ask()) for _ in range(8)]
    pid = await one.fetchval("select pg_backend_pid()")
    await one.pool.drain()
    async with asyncio.timeout(20):
        while await one.fetchval("select pg_backend_pid()") == pid:
            pass
    ends = True
    await asyncio.gather(*tasks)


def test_another_loop_is_refused_at_once(dsn: str) -> None:
    db: PoolManager[Any] = PoolManager(dsn, min_size=1, pipeline=True)
    loop = asyncio.new_event_loop()
    loop.run_until_complete(db.open())
    loop.run_until_complete(db.fetchval("select 1"))
    with pytest.raises(LoopMismatchError):
        asyncio.run(db.fetchval("select 1"))
    loop.run_until_complete(db.close())
    loop.close()


# --- who keeps out of the way --------------------------------------------------------------------


class Traced(psycopg.AsyncCursor[Any]):
    """A cursor such as agents have."""

    seen: list[Any]

    async def execute(self, query: Any, *args: Any, **kwargs: Any) -> Any:
        self.seen.append(query)
        return await super().execute(query, *args, **kwargs)


async def test_cursors_of_a_class_of_the_users_see_every_statement(
    make_manager: MakeManager,
) -> None:
    Traced.seen = []
    db = make_manager(min_size=1, pipeline=True, kwargs={"cursor_factory": Traced})
    async with db:
        for n in range(3):
            assert await db.fetchval(PLAIN, (n,)) == n
    assert Traced.seen == [PLAIN] * 3
    stats = db.pool.get_stats()
    assert stats["requests_num"] == 3


async def test_a_cursor_that_is_patched_sees_every_statement(
    one: PoolManager[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    await know(one, PLAIN)
    seen: list[Any] = []
    execute: Any = psycopg.AsyncCursor.execute

    async def traced(self: Any, query: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append(query)
        return await execute(self, query, *args, **kwargs)

    monkeypatch.setattr(psycopg.AsyncCursor, "execute", traced)
    assert await one.fetchval(PLAIN, (1,)) == 1
    assert seen == [PLAIN]


def test_a_patch_is_known_however_early_it_came() -> None:
    execute: Any = psycopg.AsyncCursor.execute

    @functools.wraps(execute)
    async def traced(*args: Any) -> Any:
        return await execute(*args)

    assert _oneshots._unless_patched(execute, cursor_async) is execute
    assert _oneshots._unless_patched(traced, cursor_async) is None
    assert _oneshots._unless_patched(functools.partial(execute), cursor_async) is None


async def test_notice_handlers_are_called_as_ever(make_manager: MakeManager) -> None:
    notices: list[str | None] = []

    async def configure(conn: psycopg.AsyncConnection[Any]) -> None:
        conn.add_notice_handler(lambda diag: notices.append(diag.message_primary))

    db = make_manager(min_size=1, pipeline=True, configure=configure)
    async with db:
        await db.execute("select 1 from pg_stat_activity where pg_cancel_backend(0)")
    assert notices


async def test_a_borrower_may_use_a_pipeline_of_its_own_afterwards(one: PoolManager[Any]) -> None:
    await know(one, PLAIN)
    async with one.connection() as conn, conn.pipeline():
        first = await conn.execute(PLAIN, (1,))
        second = await conn.execute(PLAIN, (2,))
        assert (await first.fetchone(), await second.fetchone()) == ((1,), (2,))


async def test_what_a_statement_sets_is_put_back_before_another_one_comes(
    one: PoolManager[Any],
) -> None:
    was = await one.fetchval("select current_setting('TimeZone')")
    await one.execute("select set_config('TimeZone', 'Asia/Tokyo', false)")
    assert await one.fetchval("select current_setting('TimeZone')") == was


async def test_reset_is_called_after_each_one(make_manager: MakeManager) -> None:
    calls = 0

    async def reset(_conn: psycopg.AsyncConnection[Any]) -> None:
        nonlocal calls
        calls += 1

    db = make_manager(min_size=1, pipeline=True, reset=reset)
    async with db:
        await asyncio.gather(*(db.fetchval(PLAIN, (n,)) for n in range(10)))
    assert calls == 10


async def test_one_text_takes_whatever_parameters_it_is_given(one: PoolManager[Any]) -> None:
    query = "select %(a)s::text, '%%', 7"
    assert await one.fetchone("select '%', 7") == ("%", 7)
    assert await one.fetchone("select '%%', 7", ()) == ("%", 7)
    assert await one.fetchone("select '%%', 7") == ("%%", 7)
    for a in (1, "x", None, 2.5, "x"):
        row = await one.fetchone(query, {"a": a})
        assert row == (None if a is None else str(a), "%", 7)
        with pytest.raises(TypeError):
            await one.fetchone(query, [a])
        with pytest.raises(psycopg.ProgrammingError):
            await one.fetchone(query, {"b": a})
    for n in range(250):
        assert await one.fetchval(f"select {n} + %s", (n % 3,)) == n + n % 3


async def test_what_a_row_factory_keeps_can_send_nothing(one: PoolManager[Any]) -> None:
    kept: list[Any] = []

    def keeping(cursor: psycopg.AsyncCursor[Any]) -> Callable[..., Any]:
        conn = cursor.connection
        kept.append(conn)
        assert (conn.autocommit, conn.prepare_threshold, conn.prepared_max) == (True, 5, 100)
        assert conn.fileno() == conn.pgconn.socket
        return lambda values: (cursor.connection.info.backend_pid, *values)

    pid = await one.fetchval("select pg_backend_pid()")
    assert await one.fetchone(PLAIN, (7,), row_factory=keeping) == (pid, 7)
    for conn in kept:
        with pytest.raises(ReleasedConnectionError):
            await conn.execute("select 1")
        with pytest.raises(ReleasedConnectionError):
            await conn.cursor().execute("select 1")
    assert await one.fetchval(PLAIN, (8,)) == 8


class Hexadecimal(Loader):
    """Makes integers of the user's own."""

    @override
    def load(self, data: Any) -> str:
        return hex(int(data))


SPEAKER = contextvars.ContextVar("SPEAKER", default="nobody")


class Word:
    """Something that is said."""


class Said(Dumper):
    """Knows who has begun to speak, and counts."""

    oid = 25

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.said = [SPEAKER.get()]

    @override
    def dump(self, obj: Any) -> bytes:
        self.said.append("!")
        return "".join(self.said).encode()


class Heard(Loader):
    """Knows who has begun to listen, and counts."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.heard = [SPEAKER.get()]

    @override
    def load(self, data: Any) -> str:
        self.heard.append("?")
        return "".join(self.heard)


def dynamic(base: type) -> type:
    """A class of the user's whose module is not told."""
    return type(f"Dynamic{base.__name__}", (base,), {})


@pytest.mark.parametrize("derived", [lambda base: base, dynamic])
async def test_adapters_of_the_users_are_made_for_each_statement_in_its_task(
    make_manager: MakeManager, derived: Callable[[type], Any]
) -> None:
    async def configure(conn: psycopg.AsyncConnection[Any]) -> None:
        conn.adapters.register_dumper(Word, derived(Said))
        conn.adapters.register_loader("name", derived(Heard))

    async def speak(who: str) -> Any:
        SPEAKER.set(who)
        return await db.fetchone(query, (Word(), Word()))

    query = "select %s, %s, 'x'::name, 'x'::name"
    db = make_manager(min_size=1, max_size=1, pipeline=True, configure=configure)
    async with db:
        await know(db, query)
        people = "abcdef"
        heard = await asyncio.gather(*(asyncio.create_task(speak(who)) for who in people))
    assert heard == [(f"{who}!", f"{who}!!", f"{who}?", f"{who}??") for who in people]


async def test_psycopgs_own_adapters_are_remembered(database: str) -> None:
    async def configure(conn: psycopg.AsyncConnection[Any]) -> None:
        register_enum(await EnumInfo.fetch(conn, "mood"), conn)
        set_json_loads(lambda _: "json", conn)

    admin(database, "create type mood as enum ('good')")
    async with PoolManager(database, min_size=1, pipeline=True, configure=configure) as db:
        assert await db.fetchval("select '[]'::json") == "json"
        assert (await db.fetchval("select 'good'::mood")).name == "good"
        (session,) = life(db.pool).sessions
        assert session.converts_like_psycopg


class Keeping:
    """A row factory that is equal to others like it, and so has no hash."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Keeping)

    def __call__(self, _cursor: object) -> Callable[..., Any]:
        return list


async def test_a_row_factory_may_have_no_hash(one: PoolManager[Any]) -> None:
    assert await one.fetchone(PLAIN, (7,), row_factory=Keeping()) == [7]


class Counted(Dumper):
    """Gives what libpq takes, and has no length; or what it does not take."""

    oid = 25

    @override
    def dump(self, obj: Any) -> Any:
        return obj.value


async def test_what_a_dumper_gives_need_have_no_length(make_manager: MakeManager) -> None:
    async def configure(conn: psycopg.AsyncConnection[Any]) -> None:
        conn.adapters.register_dumper(SimpleNamespace, Counted)

    db = make_manager(min_size=1, pipeline=True, configure=configure)
    async with db:
        letter = SimpleNamespace(value=ctypes.c_char(b"x"))
        assert await db.fetchval("select %s", (letter,)) == "x"
        with pytest.raises(TypeError, match="bytes or buffer"):
            await db.fetchval("select %s", (SimpleNamespace(value=7),))


async def test_adapters_that_a_block_or_a_row_factory_registers_are_gone_with_it(
    one: PoolManager[Any],
) -> None:
    def registering(cursor: psycopg.AsyncCursor[Any]) -> Callable[..., Any]:
        cursor.connection.adapters.register_loader("int4", Hexadecimal)
        return tuple

    assert await one.fetchval(PLAIN, (7,)) == 7
    assert await one.fetchone(PLAIN, (7,), row_factory=registering) == (7,)
    assert await one.fetchval(PLAIN, (7,)) == 7
    async with one.connection() as conn:
        conn.adapters.register_loader("int4", Hexadecimal)
        cursor = await conn.execute(PLAIN, (7,))
        assert await cursor.fetchone() == ("0x7",)
    assert await one.fetchval(PLAIN, (7,)) == 7


async def test_a_new_default_of_psycopgs_is_heard_of(
    one: PoolManager[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_converting, "LASTS", 0.0)
    assert await one.fetchval("select %s::jsonb", (Jsonb({"a": 1}),)) == {"a": 1}
    set_json_dumps(lambda _: "[]")
    try:
        assert await one.fetchval("select %s::jsonb", (Jsonb({"a": 1}),)) == []
    finally:
        set_json_dumps(json.dumps)


async def test_no_answer_is_kept_once_it_was_fetched(one: PoolManager[Any]) -> None:
    assert await one.fetchval("select repeat('x', %s)", (7,)) == "x" * 7
    (session,) = life(one.pool).sessions
    assert session.lane.converter.transformer.pgresult is None
    assert [query.params for query in session.lane.converter._queries.values()] == [None]


@pytest.mark.filterwarnings("ignore::poolkeeper.DuplicatePoolWarning")
@pytest.mark.skipif(PGBOUNCER is None, reason="PgBouncer is not installed")
@pytest.mark.parametrize("mode", MODES)
async def test_behind_a_pgbouncer_one_shots_share_as_well(dsn: str, mode: str) -> None:
    """Of two pools at once, which have more connections than it has sessions, if it shares them."""
    query = "select 1 / %s::int"

    async def use(db: PoolManager[Any], mark: int) -> None:
        await know(db, query, PLAIN)
        for _ in range(5):
            tasks = [
                asyncio.create_task(
                    db.fetchval(PLAIN, (mark + n,)) if n % 2 else db.fetchval(query, (0,))
                )
                for n in range(64)
            ]
            await asyncio.sleep(0.001)
            tasks[5].cancel()
            ended = await asyncio.gather(*tasks, return_exceptions=True)
            assert {type(end) for end in ended[::2]} == {psycopg.errors.DivisionByZero}
            for n in range(1, 64, 2):
                cancelled = n == 5 and isinstance(ended[n], asyncio.CancelledError)
                assert ended[n] == mark + n or cancelled
        await come_to_rest(db)

    size = 4 if mode == "session" else 2
    tracks = {"max_prepared_statements": 20} if pgbouncer_version() >= (1, 21) else {}
    with pgbouncer(dsn, mode, default_pool_size=size, **tracks) as behind:
        one, two = (
            PoolManager(behind, min_size=2, max_size=2, name=name, timeout=20, pipeline=True)
            for name in ("one", "two")
        )
        async with one, two:
            await asyncio.gather(use(one, 1000), use(two, 2000))
            counted = [pool.pool.get_stats().get("returns_bad", 0) for pool in (one, two)]
        assert counted == [0, 0]
