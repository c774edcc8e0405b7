"""The `BEGIN` that travels with the first query: nobody can tell, but by the time it takes."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable
from typing import Any

import psycopg
import pytest
from psycopg import IsolationLevel, pq, sql

from poolkeeper import PoolManager
from tests.support.server import admin
from tests.support.trickle import Trickle
from tests.support.waiting import until

MakeManager = Callable[..., PoolManager[Any]]
Asks = Callable[[Any], Awaitable[object]]

OFF = pq.PipelineStatus.OFF


def asking(query: Any, params: Any = None, **kwargs: Any) -> Asks:
    """Return what asks for all rows of *query*, and for what is told of them."""

    async def ask(conn: Any) -> object:
        cursor = await conn.execute(query, params, **kwargs)
        rows = await cursor.fetchall() if cursor.description else None
        return rows, cursor.rowcount, cursor.statusmessage, cursor._query.params

    return ask


def with_cursor(cls: type[Any], query: str, params: Any) -> Asks:
    """Return what asks through a cursor of that class."""

    async def ask(conn: Any) -> object:
        cursor = cls(conn)
        await cursor.execute(query, params)
        return await cursor.fetchall()

    return ask


async def eight_times(conn: Any) -> object:
    """Ask until the query is prepared, each time in a transaction of its own."""
    found = []
    for number in range(8):
        found.append(await asking("select %s::int", (number,))(conn))
        found.append(sorted(name for name in conn._prepared._names.values()))
        await conn.commit()
    return found


async def many_prepared(conn: Any) -> object:
    """Prepare more statements than are kept."""
    conn.prepared_max = 2
    found = []
    for number in range(6):
        found.append(await asking(f"select {number}, %s::int", (1,), prepare=number % 2 == 0)(conn))
        await conn.commit()
    cursor = await conn.execute("select count(*) from pg_prepared_statements")
    return found, await cursor.fetchone()


async def serializable(conn: Any) -> object:
    """Begin with what psycopg puts into its BEGIN."""
    await conn.set_isolation_level(IsolationLevel.SERIALIZABLE)
    await conn.set_read_only(True)
    await conn.set_deferrable(True)
    names = "transaction_isolation", "transaction_read_only", "transaction_deferrable"
    query = f"select {', '.join(f'current_setting(%s) as {name}' for name in names)}"
    return await asking(query, names)(conn)


async def refused(conn: Any) -> object:
    """Begin with what the server refuses."""
    conn._begin_statement = b"BEGIN NONSENSE"
    try:
        return await asking("select %s::int", (1,))(conn)
    finally:
        conn._begin_statement = b""


async def in_a_pipeline(conn: Any) -> object:
    """Ask in a pipeline of the user's own."""
    async with conn.pipeline():
        first = await conn.execute("select %s::int", (1,))
        second = await conn.execute("select %s::int", (2,))
        return await first.fetchall(), await second.fetchall()


async def row_factory_that_fails(conn: Any) -> object:
    """Fail in what psycopg calls when the answer is there."""

    def fails(_: Any) -> Any:
        raise LookupError("in a row factory")

    return await conn.cursor(row_factory=fails).execute("select %s::int", (1,))


async def of_the_same_time(conn: Any) -> object:
    """Ask for the time of the transaction, twice."""
    first = await asking("select now() = transaction_timestamp(), %s::int", (1,))(conn)
    return first, await asking("select xact_start = now() from pg_stat_activity"
                               " where pid = pg_backend_pid() and %s", (True,))(conn)  # fmt: skip


async def many_at_once(conn: Any) -> object:
    """Let executemany() begin the transaction."""
    cursor = conn.cursor()
    await cursor.executemany("select %s::int", [(1,), (2,)], returning=True)
    return await cursor.fetchall()


async def by_stream(conn: Any) -> object:
    """Let a stream begin it."""
    return [row async for row in conn.cursor().stream("select generate_series(1, %s)", (3,))]


async def by_named_cursor(conn: Any) -> object:
    """Let a named cursor begin it."""
    async with conn.cursor("named") as cursor:
        await cursor.execute("select generate_series(1, %s)", (3,))
        return await cursor.fetchall()


BIG = "x" * 5_000_000

CASES: dict[str, Asks] = {
    "a tuple": asking("select %s::int, %s::text", (1, "a")),
    "a list": asking("select %s::int", [1]),
    "a dict": asking("select %(id)s::int", {"id": 1}),
    "a dict that nothing is asked of": asking("select 1", {"id": 1}),
    "a dict, and what looks like a name": asking("select '%%(id)s'", {"id": 1}),
    "a name that is not there": asking("select %(other)s::int", {"id": 1}),
    "no parameters": asking("select 1; select 2"),
    "none, but asked for": asking("select 1", ()),
    "too few": asking("select %s::int, %s::int", (1,)),
    "too many": asking("select 1", (1,)),
    "what cannot be adapted": asking("select %s", (object(),)),
    "what the server cannot read": asking("select %s::int", ("a",)),
    "two statements": asking("select %s::int; select 1", (1,)),
    "an error in the query": asking("select 1 / %s::int", (0,)),
    "an error in its text": asking("selekt %s", (1,)),
    "prepared at once": asking("select %s::int", (1,), prepare=True),
    "prepared, with an error in its text": asking("selekt %s", (1,), prepare=True),
    "prepared, with an error in it": asking("select 1 / %s::int", (0,), prepare=True),
    "prepared after a while": eight_times,
    "prepared, and forgotten": many_prepared,
    "binary": asking("select %s::int", (1,), binary=True),
    "composed": asking(sql.SQL("select {}, %s::int").format(sql.Literal("%")), (1,)),
    "bytes": asking(b"select %s::int", (1,)),
    "what writes": asking("insert into begin_test values (%s) returning id", (1,)),
    "what ends it": asking("do $$ begin commit; end $$ -- %s", (1,)),
    "large": asking("select %s::text || %s::text", (BIG, BIG)),
    "a client's cursor": with_cursor(psycopg.AsyncClientCursor, "select %s::int", (1,)),
    "a raw cursor": with_cursor(psycopg.AsyncRawCursor, "select $1::int", (1,)),
    "a serializable transaction": serializable,
    "one that is refused": refused,
    "a pipeline": in_a_pipeline,
    "a row factory that fails": row_factory_that_fails,
    "its time": of_the_same_time,
    "executemany()": many_at_once,
    "stream()": by_stream,
    "a named cursor": by_named_cursor,
}


async def outcome(ask: Asks, conn: Any) -> tuple[object, ...]:
    """Return how it ends, what of a transaction is open then, and whether the next one works."""
    try:
        found: object = await ask(conn)
    except Exception as ex:
        found = type(ex), str(ex), getattr(ex, "sqlstate", None)
    pgconn = conn.pgconn
    state = pgconn.transaction_status, pgconn.pipeline_status
    await conn.rollback()
    cursor = await conn.execute("select %s::text", ("next",))
    return found, state, await cursor.fetchone()


@pytest.fixture(scope="module")
def table(dsn: str) -> None:
    """Make the table that the queries write into."""
    admin(dsn, "create table if not exists begin_test (id int)")


@pytest.mark.usefixtures("table")
async def test_each_query_ends_as_it_does_on_psycopgs_own_connection(
    make_manager: MakeManager, dsn: str
) -> None:
    """The rows, the error, and what is open afterwards are the same."""
    db = make_manager(min_size=1, max_size=1, name="orders")
    await db.open()
    differences = {}
    for name, ask in CASES.items():
        async with await psycopg.AsyncConnection.connect(dsn) as bare:
            theirs = await outcome(ask, bare)
            await bare.rollback()
        async with db.connection() as conn:
            ours = await outcome(ask, conn)
            assert conn.pgconn.pipeline_status == OFF
            await conn.rollback()
        if ours != theirs:
            differences[name] = (ours, theirs)
    assert not differences


async def test_begin_and_the_first_query_are_answered_together(
    make_manager: MakeManager, tmp_path: Any
) -> None:
    """One exchange for both, and one for the commit."""
    db = make_manager(min_size=1, max_size=1, name="orders")
    await db.open()
    path = tmp_path / "trace"
    with path.open("w") as file:
        async with db.connection() as conn:
            conn.pgconn.trace(os.dup(file.fileno()))
            await conn.execute("select %s::int", (1,))
        async with db.connection() as conn:
            conn.pgconn.untrace()
    said = path.read_text()
    assert said.count("ReadyForQuery") == 2
    assert said.index("BEGIN") < said.index("select") < said.index("ReadyForQuery")


async def test_a_first_query_that_is_cancelled_keeps_its_connection(
    make_manager: MakeManager, dsn: str
) -> None:
    """The server is asked to stop it, and what is still to come of the two is read."""
    db = make_manager(min_size=1, max_size=1, name="orders")
    await db.open()
    for prepare in (False, True):
        async with db.connection() as conn:
            pid = conn.info.backend_pid

            async def sleep(conn: Any = conn, prepare: bool = prepare) -> None:
                await conn.execute("select pg_sleep(%s)", (60,), prepare=prepare)

            task = asyncio.ensure_future(sleep())
            await until(lambda: conn.pgconn.transaction_status == pq.TransactionStatus.ACTIVE)
            await asyncio.sleep(0.02)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert conn.pgconn.pipeline_status == OFF
            assert conn.pgconn.transaction_status == pq.TransactionStatus.INERROR
            await conn.rollback()
            assert await (await conn.execute("select %s::int", (1,))).fetchone() == (1,)
        async with db.connection() as conn:
            assert conn.info.backend_pid == pid


async def ends_itself(conn: Any) -> object:
    """Let the session end in the query."""
    return await conn.execute("select pg_terminate_backend(pg_backend_pid()), %s::int", (1,))


async def was_ended(conn: Any) -> object:
    """Ask on a session that has ended."""
    await asyncio.to_thread(
        admin, conn.info.dsn, f"select pg_terminate_backend({conn.info.backend_pid})"
    )
    return await conn.execute("select %s::int", (1,))


@pytest.mark.parametrize("ask", [ends_itself, was_ended])
async def test_a_session_that_ends_in_the_first_query_ends_as_psycopgs_does(
    ask: Asks, make_manager: MakeManager, dsn: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The error is the server's own, and the connection is closed."""
    db = make_manager(min_size=1, max_size=1, name="orders")
    await db.open()
    conn: Any
    found = []
    for connected in (await psycopg.AsyncConnection.connect(dsn), db.connection()):
        with pytest.raises(psycopg.OperationalError) as raised:
            async with connected as conn:
                await ask(conn)
        found.append((type(raised.value), str(raised.value), conn.closed))
    assert found[0] == found[1]
    assert await db.fetchval("select 42") == 42
    assert "in pipeline mode" not in caplog.text


@pytest.mark.parametrize("prepare", [False, True])
async def test_an_answer_that_is_torn_ends_as_psycopgs_does(
    prepare: bool, make_manager: MakeManager, dsn: str
) -> None:
    """Wherever the network ends, a lost connection is an OperationalError, which many retry."""
    found: dict[int, set[str]] = {}
    with Trickle(dsn, pause=0) as proxy:
        db = make_manager(proxy.dsn, min_size=1, max_size=1, name="orders")
        await db.open()
        for length in range(0, 100, 3):
            conn: Any
            bare = await psycopg.AsyncConnection.connect(proxy.dsn)
            for connected in (bare, db.connection()):
                await db.fetchval("select 42")
                with pytest.raises(psycopg.Error) as raised:
                    async with connected as conn:
                        proxy.cut_after = length
                        await conn.execute("select %s::int", (1,), prepare=prepare)
                        await conn.commit()
                assert conn.closed
                found.setdefault(length, set()).add(type(raised.value).__name__)
            await db.fetchval("select 42")
            proxy.cut_after = length % 60  # its answer is shorter
            with pytest.raises(psycopg.Error) as raised:
                await db.fetchone("select %s::int", (1,))
            found[length].add(type(raised.value).__name__)
    assert set.union(*found.values()) == {"OperationalError"}, found
