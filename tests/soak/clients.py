"""
Those who borrow as they should: one small function for each kind of work.

Each gets a `Visit`, works, and returns; what must not be seen it raises. What may go wrong because
of the monkey passes through, and the book decides whether it may have.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import psycopg
from psycopg import sql
from psycopg.rows import tuple_row

from poolkeeper import AcquireTimeout, PoolManager, ReleasedConnectionError

from .book import AWAY, LOST, Book, require

TIME_ZONE = "Asia/Tokyo"
STATEMENT_TIMEOUT = "77s"


async def configure(conn: Any) -> None:
    """What both pools are made with, so that it can be told from what the server begins with."""
    await conn.execute(
        f"set time zone '{TIME_ZONE}'; set statement_timeout = '{STATEMENT_TIMEOUT}'; commit"
    )


class Oops(Exception):
    """An error of the borrower's own."""


@dataclass
class Visit:
    """One request: who it is, and what it works with."""

    token: str
    """In every row that it asks for; in nobody else's."""
    db: PoolManager[Any]
    discards: bool
    """True if its pool has ``reset="discard"``."""
    random: random.Random
    book: Book
    since: float

    def chance(self, share: float) -> bool:
        return self.random.random() < share

    def owns(self, rows: list[Any], number: int) -> None:
        """Raise unless *rows* are so many, in order, and all of them this request's."""
        expected = [(self.token, i) for i in range(1, number + 1)]
        require(rows == expected, f"{self.token} asked for {number} rows and got {_short(rows)}")


MINE = "select %s::text, i from generate_series(1, %s) i"
"""Rows that bear the token of who asked for them."""

WORKS: dict[str, tuple[float, Callable[[Visit], Awaitable[None]]]] = {}
"""Every kind of work, with how often it is chosen."""


def work(name: str, weight: float) -> Callable[[Any], Any]:
    """Register a kind of work."""

    def register(function: Callable[[Visit], Awaitable[None]]) -> Any:
        WORKS[name] = (weight, function)
        return function

    return register


def forget(task: asyncio.Task[Any]) -> None:
    """Let nobody complain that the outcome of *task* was not looked at."""
    task.add_done_callback(lambda task: task.cancelled() or task.exception())


# --- money --------------------------------------------------------------------------------------


@work("transfer", 14)
async def transfer(visit: Visit) -> None:
    """Move money in the transaction of a block; sometimes fail, and it has not happened."""
    money = visit.book.money
    number = money.begins(visit.token)
    with suppress(Oops):
        async with visit.db.connection() as conn:
            await move(conn, visit, number)
            if visit.chance(0.1):
                raise Oops
            money.tell(number, "unknown")
        money.tell(number, "committed")


@work("transfer in transaction()", 6)
async def transfer_in_transaction(visit: Visit) -> None:
    """Move money in an explicit transaction, beside a savepoint that is rolled back."""
    money = visit.book.money
    number, never = money.begins(visit.token), money.begins(visit.token)
    async with visit.db.transaction() as conn:
        await move(conn, visit, number)
        if visit.chance(0.3):
            async with conn.transaction(force_rollback=True):
                await move(conn, visit, never)
        money.tell(number, "unknown")
    money.tell(number, "committed")


@work("transfer in a pipeline", 5)
async def transfer_in_pipeline(visit: Visit) -> None:
    """Move money by statements whose answers come together."""
    money = visit.book.money
    number = money.begins(visit.token)
    async with visit.db.connection() as conn:
        async with conn.pipeline():
            await move(conn, visit, number)
        money.tell(number, "unknown")
    money.tell(number, "committed")


@work("transfer in one shot", 6)
async def transfer_in_one_shot(visit: Visit) -> None:
    """Move money by one statement, which is committed when it returns."""
    money = visit.book.money
    number = money.begins(visit.token)
    source, target = _two_accounts(visit)
    money.tell(number, "unknown")
    await visit.db.execute(
        """
        with taken as (update accounts set balance = balance - 7 where id = %(source)s),
            given as (update accounts set balance = balance + 7 where id = %(target)s)
        insert into transfers values (%(id)s, %(source)s, %(target)s, 7)
        """,
        {"id": number, "source": source, "target": target},
    )
    money.tell(number, "committed")


@work("transfer by a read", 10)
async def transfer_by_a_read(visit: Visit) -> None:
    """Write down a transfer of nothing by what looks like a plain read: it may be sent twice."""
    money = visit.book.money
    number = money.begins(visit.token)
    money.tell(number, "unknown")
    # The pool finds out that it writes, and remembers it by its text.
    query = f"select !@ %s::bigint -- {visit.random.randrange(20)}"
    answer = await visit.db.fetchval(query, (number,))
    require(answer == number, f"transfer {number} was answered with {answer}")
    money.tell(number, "committed")


async def move(conn: Any, visit: Visit, number: int) -> None:
    """Take from one account, give to another, and write it down."""
    source, target = _two_accounts(visit)
    amount = visit.random.randint(1, 50)
    take = "update accounts set balance = balance - %s where id = %s"
    give = "update accounts set balance = balance + %s where id = %s"
    await conn.execute(take, (amount, source))
    await conn.execute(give, (amount, target))
    await conn.execute(
        "insert into transfers values (%s, %s, %s, %s)", (number, source, target, amount)
    )


def _two_accounts(visit: Visit) -> tuple[int, int]:
    """Choose accounts, mostly in the order in which nobody is in another's way."""
    source, target = visit.random.sample(range(1, visit.book.money.ACCOUNTS + 1), 2)
    if source > target and visit.chance(0.95):
        source, target = target, source
    return source, target


# --- readers ------------------------------------------------------------------------------------


@work("one-shot", 12)
async def one_shot(visit: Visit) -> None:
    """Ask one question, by each of the helpers."""
    number = visit.random.randint(1, 20)
    match visit.random.randrange(4):
        case 0:
            visit.owns(await visit.db.fetchall(MINE, (visit.token, number)), number)
        case 1:
            row = await visit.db.fetchone(MINE, (visit.token, number))
            visit.owns([row], 1)
        case 2:
            require(
                await visit.db.fetchval("select %s::text", (visit.token,)) == visit.token,
                "fetchval() gave another one's value",
            )
        case _:
            require(await visit.db.execute(MINE, (visit.token, number)) == number, "rowcount")


@work("reader", 10)
async def reader(visit: Visit) -> None:
    """Look whether the connection is clean, read, and keep it for a while."""
    async with visit.db.connection() as conn:
        await find_it_clean(visit, conn)
        number = visit.random.choice([1, 5, 50, 500])
        visit.owns(await (await conn.execute(MINE, (visit.token, number))).fetchall(), number)
        if visit.chance(0.2):
            await asyncio.sleep(visit.random.random() * 0.1)
        if visit.chance(0.2):
            await conn.execute("select pg_sleep(%s)", (visit.random.random() * 0.1,))


@work("cursor", 4)
async def cursor(visit: Visit) -> None:
    """Read through `cursor()`, in binary too."""
    async with visit.db.cursor(row_factory=tuple_row, binary=visit.chance(0.5)) as cur:
        await cur.execute(MINE, (visit.token, 30))
        visit.owns(await cur.fetchall(), 30)


@work("server cursor", 5)
async def server_cursor(visit: Visit) -> None:
    """Read from a cursor of the server's, in pieces; to its end or not."""
    async with visit.db.connection() as conn, conn.cursor(name="pieces") as cur:
        # Not "async for": psycopg 3.3.0 ends that after itersize rows.
        await cur.execute(MINE, (visit.token, 200))
        rows: list[Any] = []
        until = 200 if visit.chance(0.7) else 80
        while len(rows) < until and (more := await cur.fetchmany(40)):
            rows += more
        visit.owns(rows, until)


@work("stream", 5)
async def stream(visit: Visit) -> None:
    """Read rows as they come, to the end."""
    async with visit.db.connection() as conn, conn.cursor() as cur:
        rows = [row async for row in cur.stream(MINE, (visit.token, 100), size=10)]
        visit.owns(rows, 100)


@work("pipeline", 6)
async def pipeline(visit: Visit) -> None:
    """Ask several questions before the first answer; each cursor has its own rows."""
    async with visit.db.connection() as conn:
        async with conn.pipeline():
            cursors = [await conn.execute(MINE, (visit.token, n)) for n in range(1, 9)]
        for number, cur in enumerate(cursors, 1):
            visit.owns(await cur.fetchall(), number)


@work("copy out", 4)
async def copy_out(visit: Visit) -> None:
    """Copy rows from the server."""
    query = sql.SQL("copy (select {}::text, i from generate_series(1, 300) i) to stdout").format(
        visit.token
    )
    async with visit.db.connection() as conn, conn.cursor() as cur:
        rows = []
        async with cur.copy(query) as copy:
            copy.set_types(["text", "int4"])
            async for row in copy.rows():
                rows.append(row)
        visit.owns(rows, 300)


@work("copy in", 4)
async def copy_in(visit: Visit) -> None:
    """Copy rows to the server, read them, and leave none."""
    number = visit.random.choice([1, 100, 2000])
    with suppress(Oops):
        async with visit.db.connection() as conn:
            async with conn.cursor() as cur:
                async with cur.copy("copy copied from stdin") as copy:
                    for i in range(1, number + 1):
                        await copy.write_row((visit.token, i))
                await cur.execute("select token, i from copied order by i")
                visit.owns(await cur.fetchall(), number)
            raise Oops


@work("executemany", 2)
async def execute_many(visit: Visit) -> None:
    """Run one statement with many parameters, which psycopg does in a pipeline of its own."""
    async with visit.db.connection() as conn, conn.cursor() as cur:
        parameters = [(visit.token, n) for n in range(1, 6)]
        try:
            await cur.executemany(MINE, parameters, returning=True)
        except AssertionError as ex:
            # psycopg 3.3.9, cancelled as it enters its pipeline: on the bare pool, too.
            if not isinstance(ex.__context__, asyncio.CancelledError):
                raise
            raise ex.__context__ from None
        for number in range(1, 6):
            visit.owns(await cur.fetchall(), number)
            cur.nextset()


@work("notifications", 3)
async def notifications(visit: Visit) -> None:
    """Listen on a channel of its own, where the next one is not left listening."""
    if not visit.discards:
        return
    async with visit.db.connection() as conn:
        await conn.set_autocommit(True)
        channel = sql.Identifier(visit.token)
        await conn.execute(sql.SQL("listen {}").format(channel))
        await conn.execute("select pg_notify(%s, %s)", (visit.token, visit.token))
        async for notify in conn.notifies(timeout=2, stop_after=1):
            require(
                (notify.channel, notify.payload) == (visit.token, visit.token),
                f"{visit.token} was notified of {notify.channel}, {notify.payload}",
            )


# --- ways to ask ----------------------------------------------------------------------------------


@work("getconn", 5)
async def getconn(visit: Visit) -> None:
    """Acquire and give back by hand."""
    conn = await visit.db.pool.getconn()
    try:
        await find_it_clean(visit, conn)
        visit.owns(await (await conn.execute(MINE, (visit.token, 3))).fetchall(), 3)
        await conn.commit()
    finally:
        await visit.db.pool.putconn(conn)


@work("at once or not", 4)
async def at_once_or_not(visit: Visit) -> None:
    """Take a connection if one is free now."""
    with suppress(AcquireTimeout):
        async with visit.db.connection(timeout=0) as conn:
            visit.owns(await (await conn.execute(MINE, (visit.token, 2))).fetchall(), 2)


@work("impatient", 8)
async def impatient(visit: Visit) -> None:
    """Give up somewhere in the middle, with time-outs inside of time-outs."""
    seconds = visit.random.random() * 0.06
    outer, inner = asyncio.timeout(seconds), asyncio.timeout(seconds * 0.8)
    async with outer, inner, visit.db.connection() as conn:
        await conn.execute("select pg_sleep(0.02)")
        visit.owns(await (await conn.execute(MINE, (visit.token, 5))).fetchall(), 5)


@work("two at once", 3)
async def two_at_once(visit: Visit) -> None:
    """Hold one connection and ask for another, as nobody should."""
    async with visit.db.connection() as first:
        visit.owns(await (await first.execute(MINE, (visit.token, 1))).fetchall(), 1)
        with suppress(AcquireTimeout):
            async with visit.db.connection(timeout=0.2) as second:
                require(first.pgconn is not second.pgconn, "one session was lent to two")
                visit.owns(await (await second.execute(MINE, (visit.token, 2))).fetchall(), 2)


@work("group", 3)
async def group(visit: Visit) -> None:
    """Work in tasks of its own, which end together."""

    async def member(number: int) -> None:
        rows = await visit.db.fetchall(MINE, (visit.token, number))
        visit.owns(rows, number)

    async with asyncio.TaskGroup() as tasks:
        for number in range(1, 4):
            tasks.create_task(member(number))


@work("stops its own query", 3)
async def stops_its_own_query(visit: Visit) -> None:
    """Have the server stop a query of its own, and nobody else's."""
    async with visit.db.connection() as conn:
        query = asyncio.create_task(conn.execute("select pg_sleep(0.05)"))
        forget(query)
        try:
            await asyncio.sleep(visit.random.random() * 0.06)
            await conn.cancel_safe(timeout=2)
        finally:
            await asyncio.wait({query})
        if (error := query.exception()) is None:
            return
        if not isinstance(error, psycopg.errors.QueryCanceled):
            raise error
        await conn.rollback()


@work("fails", 4)
async def fails(visit: Visit) -> None:
    """End a block by an error of its own, or of the server's."""
    with suppress(Oops, psycopg.errors.DivisionByZero):
        async with visit.db.connection() as conn:
            await conn.execute("select 1")
            if visit.chance(0.5):
                await conn.execute("select 1 / 0")
            raise Oops


@work("too late", 4)
async def too_late(visit: Visit) -> None:
    """Use a connection, and a cursor, that were given back: refused each time."""
    async with visit.db.connection() as conn:
        cur = await conn.execute(MINE, (visit.token, 3))
    visit.owns(await cur.fetchall(), 3)
    for use in (
        lambda: conn.execute("rollback"),
        lambda: cur.execute("rollback"),
        lambda: conn.rollback(),
        lambda: visit.db.pool.putconn(conn),
    ):
        try:
            await use()
        except ReleasedConnectionError:
            continue
        require(
            visit.book.troubles.any_of(frozenset({"close"}), visit.since),
            "a connection that was given back could be used",
        )


# --- those who only look ------------------------------------------------------------------------


@work("readiness", 4)
async def readiness(visit: Visit) -> None:
    """Ask whether a query can run, and do not believe a wrong answer."""
    health = await visit.db.check(timeout=5)
    if not health:
        require(
            visit.book.troubles.any_of(LOST | AWAY, visit.since),
            f"not ready, and nothing was wrong: {health.reason}",
        )


@work("onlooker", 2)
async def onlooker(visit: Visit) -> None:
    """Look at the pool in every way there is."""
    for text in (str(visit.db.diagnose()), repr(visit.db), visit.db.snapshot().numbers()):
        require(text, "a pool that has nothing to say")
    require(visit.db.pool.get_stats()["pool_max"] > 0, "statistics")


# --- clean hands --------------------------------------------------------------------------------

_STATE = """
    select current_setting('TimeZone'), current_setting('DateStyle'),
        current_setting('search_path'), current_setting('application_name'),
        current_setting('default_transaction_read_only'),
        current_setting('statement_timeout'), session_user = current_user,
        (select count(*) from pg_listening_channels()), to_regclass('pg_temp.mess') is null,
        (select count(*) from pg_locks where locktype = 'advisory' and pid = pg_backend_pid()),
        (select count(*) from pg_prepared_statements where name = 'mess'),
        (select count(*) from pg_cursors where is_holdable)
"""


_ATTRIBUTES: dict[str, Any] = {
    "autocommit": False,
    "isolation_level": None,
    "read_only": None,
    "deferrable": None,
    "row_factory": tuple_row,
    "prepare_threshold": 5,
    "cursor_factory": psycopg.AsyncCursor,
    "server_cursor_factory": psycopg.AsyncServerCursor,
    "_notice_handlers": [],
    "_notify_handlers": [],
}


async def find_it_clean(visit: Visit, conn: Any) -> None:
    """Raise unless a connection that was just acquired is as `configure` left it."""
    require(conn.pgconn.transaction_status == psycopg.pq.TransactionStatus.IDLE, "in transaction")
    require(conn.pgconn.pipeline_status == psycopg.pq.PipelineStatus.OFF, "in a pipeline")
    state = [getattr(conn, name) for name in _ATTRIBUTES]
    require(
        state == list(_ATTRIBUTES.values()),
        f"a borrower's attributes are there for the next: {state}",
    )
    (row,) = await (await conn.execute(_STATE)).fetchall()
    promised = (TIME_ZONE, "ISO, MDY", '"$user", public', f"soak-{visit.db.name}", "off")
    require(row[:5] == promised, f"a borrower's settings are there for the next: {row[:5]}")
    if visit.discards:
        require(
            row[5:] == (STATEMENT_TIMEOUT, True, 0, True, 0, 0, 0),
            f"reset='discard' has left something: {row[5:]}",
        )
    await conn.commit()


def _short(rows: list[Any]) -> str:
    return f"{len(rows)}: {rows[:3]} ... {rows[-3:]}"
