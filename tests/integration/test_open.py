"""Opening: it returns with working connections, or says why not and leaves nothing behind."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import threading
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from time import monotonic, sleep
from typing import Any

import psycopg
import pytest
from psycopg_pool import PoolClosed

from poolkeeper import (
    ClosedError,
    DuplicatePoolWarning,
    LoopMismatchError,
    NotOpenError,
    OpenError,
    PoolManager,
)
from poolkeeper._embedded import EmbeddedServer, free_port
from tests.support.proxy import FaultProxy
from tests.support.server import PASSWORD, admin
from tests.support.waiting import eventually

MakeManager = Callable[..., PoolManager[Any]]
CountSessions = Callable[[str], int]

AT_ONCE = 8.0
"""Seconds; far below the 30 that open() waits by default, far above what it takes."""

SECRET = "wr0ng-h1dden"


def sockets() -> int:
    """Count the sockets of this process that are open."""
    count = 0
    for entry in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):
            count += str(entry.readlink()).startswith("socket:")
    return count


class Before:
    """What there was before a test opened anything."""

    def __init__(self) -> None:
        self.tasks = asyncio.all_tasks()
        self.sockets = sockets()

    async def is_back(self) -> None:
        """Fail unless there are no more tasks and sockets than there were."""
        assert asyncio.all_tasks() == self.tasks
        # The proxy runs in this process, and closes its ends in its own time.
        assert await asyncio.to_thread(eventually, lambda: sockets() == self.sockets)
        gc.collect()  # to find what warns when it is collected


async def fails_to_open(manager: PoolManager[Any], **arguments: Any) -> tuple[OpenError, float]:
    """Open *manager*, which must fail and leave nothing; return the error and the seconds."""
    before = Before()
    begin = monotonic()
    with pytest.raises(OpenError) as caught:
        await manager.open(**arguments)
    seconds = monotonic() - begin
    assert manager.state == "closed"
    await before.is_back()
    return caught.value, seconds


async def value(manager: PoolManager[Any]) -> Any:
    """Return what a query on *manager* does."""
    return await manager.fetchval("select 41 + 1")


# --- reasons that stay ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"user": "nobody_here"}, 'role "nobody_here" does not exist'),
        ({"dbname": "no_such_db"}, 'database "no_such_db" does not exist'),
        ({"dbname": "closed_db"}, "not currently accepting connections"),
        ({"user": "app", "password": SECRET}, 'password authentication failed for user "app"'),
        ({"user": "nologin_app", "password": "x"}, "is not permitted to log in"),
        ({"user": "app"}, "no password supplied"),
    ],
    ids=["role", "database", "closed database", "password", "role without login", "no password"],
)
async def test_a_reason_that_stays_is_raised_at_once_in_the_servers_words(
    make_manager: MakeManager,
    scram_server: EmbeddedServer,
    change: dict[str, str],
    reason: str,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("PGPASSWORD", raising=False)
    monkeypatch.setenv("PGPASSFILE", "/nonexistent")
    caplog.set_level("DEBUG", "poolkeeper")
    hba_trusts_roles = change.get("user") == "nobody_here"
    if hba_trusts_roles:  # a scram server answers an unknown role as it does a wrong password
        scram_server.set_hba(["host all all 127.0.0.1/32 trust"])
        scram_server.reload()
    try:
        manager = make_manager(
            psycopg.conninfo.make_conninfo(scram_server.dsn(), **change), name="orders"
        )
        error, seconds = await fails_to_open(manager)
    finally:
        if hba_trusts_roles:
            scram_server.set_hba(
                [
                    "host all postgres 127.0.0.1/32 trust",
                    "host all all 127.0.0.1/32 scram-sha-256",
                ]
            )
            scram_server.reload()
    assert seconds < AT_ONCE
    first_line = str(error).splitlines()[0]
    assert first_line.startswith('cannot open pool "orders": ')
    assert reason in first_line
    assert isinstance(error.__cause__, psycopg.OperationalError)
    assert reason in str(error.__cause__)
    shown = [str(error), repr(error), caplog.text, repr(manager), repr(manager.pool)]
    shown.append("".join(traceback.format_exception(error)))
    for secret in (SECRET, PASSWORD):
        assert not [text for text in shown if secret in text]


@pytest.mark.fault
async def test_a_server_that_does_not_let_us_in_is_an_error_at_once(
    make_manager: MakeManager, own_server: EmbeddedServer
) -> None:
    own_server.set_hba(["host all postgres 127.0.0.1/32 trust"])
    own_server.reload()
    admin(own_server.dsn(), "create role stranger login")
    error, seconds = await fails_to_open(make_manager(own_server.dsn(user="stranger")))
    assert seconds < AT_ONCE
    assert 'no pg_hba.conf entry for host "127.0.0.1", user "stranger"' in str(error)
    assert "pg_hba.conf accept" in str(error.hint)


async def test_an_unknown_host_is_an_error_at_once(make_manager: MakeManager) -> None:
    manager = make_manager("host=no-such-host.invalid dbname=postgres user=postgres")
    error, seconds = await fails_to_open(manager)
    assert seconds < AT_ONCE
    assert "no-such-host.invalid" in str(error)
    assert isinstance(error.__cause__, psycopg.OperationalError)


async def test_an_option_that_libpq_does_not_know_is_an_error_at_once(
    make_manager: MakeManager,
) -> None:
    manager = make_manager(lambda: "host=localhost colour=red")
    error, seconds = await fails_to_open(manager)
    assert seconds < AT_ONCE
    assert 'invalid connection option "colour"' in str(error)


@pytest.mark.parametrize(
    "bad",
    [
        f"postgresql://app:{SECRET}@[half/db",
        f"host=localhost password='{SECRET}",
        f"host=localhost {SECRET}",
        f"postgresql://app:{SECRET}%zz@localhost/db",
        f"postgresql://app:pass@{SECRET}@localhost:notaport/db",
    ],
)
async def test_a_conninfo_that_cannot_be_read_is_an_error_at_once_without_the_password(
    make_manager: MakeManager, caplog: pytest.LogCaptureFixture, bad: str
) -> None:
    """What libpq cannot read it quotes, and that may be a piece of the password."""
    caplog.set_level("DEBUG")
    manager = make_manager(lambda: bad)
    error, seconds = await fails_to_open(manager)
    assert seconds < AT_ONCE
    assert error.__cause__ is not None
    shown = [str(error), repr(error), caplog.text, repr(manager), repr(manager.pool)]
    shown.append("".join(traceback.format_exception(error)))
    assert not [text for text in shown if SECRET in text]


async def test_a_setting_that_the_server_refuses_is_an_error_at_once(
    make_manager: MakeManager,
) -> None:
    error, seconds = await fails_to_open(make_manager(kwargs={"options": "-c no_such=1"}))
    assert seconds < AT_ONCE
    assert "no_such" in str(error)


async def test_an_unknown_parameter_from_a_function_is_an_error_at_once(
    make_manager: MakeManager,
) -> None:
    error, seconds = await fails_to_open(make_manager(kwargs=lambda: {"colour": "red"}))
    assert seconds < AT_ONCE
    assert "colour" in str(error)


@pytest.mark.parametrize("parameter", ["conninfo", "kwargs"])
@pytest.mark.parametrize("is_async", [False, True], ids=["function", "coroutine function"])
async def test_a_function_that_raises_is_an_error_at_once(
    make_manager: MakeManager, dsn: str, parameter: str, is_async: bool
) -> None:
    """If it is a fault of the program; see the next one for what may pass."""

    def plain() -> Any:
        raise KeyError("DATABASE_URL")

    async def coroutine() -> Any:
        raise KeyError("DATABASE_URL")

    function = coroutine if is_async else plain
    manager = make_manager(
        function if parameter == "conninfo" else dsn,
        kwargs=function if parameter == "kwargs" else None,
    )
    error, seconds = await fails_to_open(manager)
    assert seconds < AT_ONCE
    first = str(error).splitlines()[0]
    assert f"the {parameter} function (" in first
    assert "test_open.py:" in first
    assert first.endswith(f" in {function.__name__}) raised KeyError")
    assert "DATABASE_URL" not in str(error)
    assert isinstance(error.__cause__, KeyError)


@pytest.mark.parametrize("error_class", [ConnectionRefusedError, RuntimeError, ValueError])
async def test_a_function_that_cannot_reach_its_source_is_asked_again(
    make_manager: MakeManager,
    dsn: str,
    error_class: type[Exception],
    caplog: pytest.LogCaptureFixture,
) -> None:
    calls = []

    async def token() -> str:
        calls.append(1)
        if len(calls) < 3:
            raise error_class("the vault does not answer: password authentication failed")
        return dsn

    manager = make_manager(token, min_size=1, max_size=1)
    await manager.open()
    assert await value(manager) == 42
    await manager.close()
    told = [record.message for record in caplog.records]
    assert len(told) == 2
    assert "the conninfo function (" in told[0]
    assert f"raised {error_class.__name__}; trying again" in told[0]
    assert "open() waits for" in told[0]
    assert "can be made again" in told[1]
    assert "vault" not in caplog.text

    def never() -> str:
        raise TimeoutError("the vault does not answer")

    error, _ = await fails_to_open(make_manager(never), timeout=1)
    assert "in never) raised TimeoutError" in str(error)
    assert isinstance(error.__cause__, TimeoutError)


async def test_a_configure_callback_that_raises_is_an_error_at_once(
    make_manager: MakeManager, server_sessions: CountSessions
) -> None:
    async def configure(conn: Any) -> None:
        await conn.execute("select 1 / 0")

    manager = make_manager(configure=configure, name="misconfigured")
    error, seconds = await fails_to_open(manager)
    assert seconds < AT_ONCE
    assert "division by zero" in str(error)
    assert "configure" in str(error)
    assert isinstance(error.__cause__, psycopg.errors.DivisionByZero)
    assert eventually(lambda: server_sessions("poolkeeper:misconfigured") == 0)


async def test_a_configure_callback_that_is_not_async_is_told_so_at_once(
    make_manager: MakeManager,
) -> None:
    def configure(conn: Any) -> None:
        conn.prepare_threshold = None

    error, seconds = await fails_to_open(make_manager(configure=configure, name="sync"))
    assert seconds < AT_ONCE
    assert "the configure callback is not async" in str(error)


async def test_fewer_are_asked_for_while_it_opens(make_manager: MakeManager) -> None:
    made = asyncio.Semaphore(1)

    async def configure(conn: Any) -> None:
        await made.acquire()

    manager = make_manager(min_size=3, max_size=3, configure=configure)
    opening = asyncio.create_task(manager.open())
    while manager.snapshot().idle < 1:
        await asyncio.sleep(0.01)
    assert manager.state == "opening"
    await manager.pool.resize(1, 3)
    assert manager.state == "open"
    async with asyncio.timeout(AT_ONCE):
        await opening
    made.release()
    made.release()


async def test_a_configure_callback_that_leaves_a_transaction_is_an_error_at_once(
    make_manager: MakeManager, server_sessions: CountSessions
) -> None:
    async def configure(conn: Any) -> None:
        await conn.execute("select 1")

    manager = make_manager(configure=configure, name="intrans")
    error, seconds = await fails_to_open(manager)
    assert seconds < AT_ONCE
    assert "configure callback left the connection in status INTRANS" in str(error)
    assert eventually(lambda: server_sessions("poolkeeper:intrans") == 0)


# --- reasons that may pass -----------------------------------------------------------------


async def test_a_port_that_nobody_listens_on_is_tried_until_the_timeout(
    make_manager: MakeManager,
) -> None:
    manager = make_manager(f"postgresql://postgres@127.0.0.1:{free_port()}/postgres", name="shut")
    error, seconds = await fails_to_open(manager, timeout=1.5)
    assert 1.4 < seconds < AT_ONCE
    first_line = str(error).splitlines()[0]
    assert first_line.startswith('could not open pool "shut" within 1.50 s: ')
    assert "refused" in first_line.lower()
    assert isinstance(error.__cause__, psycopg.OperationalError)
    assert "Check that the server runs" in str(error.hint)


@pytest.mark.fault
async def test_a_server_that_comes_up_meanwhile_is_found(
    make_manager: MakeManager, own_server: EmbeddedServer
) -> None:
    own_server.stop("immediate")  # so that it has to recover when it starts
    starter = threading.Thread(target=lambda: (sleep(1.5), own_server.start()))
    starter.start()
    manager = make_manager(own_server.dsn(), open_timeout=30)
    try:
        await manager.open()
        assert await value(manager) == 42
        assert manager.pool.counts()["total"] == 4
        await manager.close()
    finally:
        await asyncio.to_thread(starter.join)


async def test_a_server_that_is_full_is_tried_until_it_has_room(
    make_manager: MakeManager, scram_server: EmbeddedServer
) -> None:
    conninfo = scram_server.dsn(user="app", password=PASSWORD)
    taken: list[psycopg.Connection[Any]] = []
    try:
        with contextlib.suppress(psycopg.OperationalError):
            while True:
                taken.append(psycopg.connect(conninfo))
        assert len(taken) > 2
        manager = make_manager(conninfo, min_size=2, name="crowded")
        error, seconds = await fails_to_open(manager, timeout=1)
        assert 0.9 < seconds < AT_ONCE
        assert "connection" in str(error.__cause__)
        assert "lower max_size" in str(error.hint)
        for text in (str(error), "".join(traceback.format_exception(error)), repr(manager)):
            assert PASSWORD not in text

        opening = asyncio.create_task(manager.open(timeout=30))
        while manager.pool.state.value != "opening":
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.3)  # some attempts fail first
        assert not opening.done()
        for _ in range(3):
            taken.pop().close()
        await opening
        assert await value(manager) == 42
        await manager.close()
    finally:
        for conn in taken:
            conn.close()


async def test_a_server_that_stays_silent_does_not_outlast_the_timeout(
    make_manager: MakeManager, proxy: FaultProxy
) -> None:
    proxy.silent = True
    manager = make_manager(proxy.dsn, name="mute")
    error, seconds = await fails_to_open(manager, timeout=1)
    assert 0.9 < seconds < AT_ONCE
    assert str(error).splitlines()[0] == (
        'could not open pool "mute" within 1.00 s: the server does not answer'
    )
    assert error.__cause__ is None
    assert "firewall" in str(error.hint)
    proxy.silent = False
    await manager.open()
    assert await value(manager) == 42
    await manager.close()


async def test_a_slow_configure_callback_is_told_from_a_silent_server(
    make_manager: MakeManager,
) -> None:
    async def configure(conn: Any) -> None:
        await asyncio.sleep(60)

    error, _ = await fails_to_open(make_manager(configure=configure), timeout=0.7)
    assert "the server does not answer" not in str(error)
    assert "a connection is in the configure callback at " in str(error)
    assert "0 of 4 connections were made, 0 attempts failed, 0 had no answer yet" in str(error)


async def test_the_open_timeout_of_the_manager_is_the_default(
    make_manager: MakeManager, proxy: FaultProxy
) -> None:
    proxy.silent = True
    manager = make_manager(proxy.dsn, open_timeout=0.5)
    error, seconds = await fails_to_open(manager)
    assert "within 0.50 s" in str(error)
    assert seconds < AT_ONCE
    error, _ = await fails_to_open(manager, timeout=0)
    assert "within 0.00 s" in str(error)


# --- nothing is left behind ------------------------------------------------------------------


async def test_a_failed_open_can_be_called_again(
    make_manager: MakeManager, dsn: str, server_sessions: CountSessions
) -> None:
    right = False

    def conninfo() -> str:
        return dsn if right else psycopg.conninfo.make_conninfo(dsn, dbname="no_such_db")

    manager = make_manager(conninfo, name="again")
    for _ in range(3):
        await fails_to_open(manager)
    right = True
    before = Before()
    await manager.open()
    assert manager.state == "open"
    assert await value(manager) == 42
    assert server_sessions("poolkeeper:again") == 4
    await manager.close()
    await before.is_back()
    assert eventually(lambda: server_sessions("poolkeeper:again") == 0)


@pytest.mark.parametrize("delay", [0, 0.001, 0.003, 0.01, 0.02, 0.05])
async def test_a_cancelled_open_leaves_nothing_and_can_be_called_again(
    make_manager: MakeManager, server_sessions: CountSessions, delay: float
) -> None:
    manager = make_manager(name="cancelled")
    before = Before()
    opening = asyncio.create_task(manager.open())
    await asyncio.sleep(delay)
    if opening.cancel():
        with pytest.raises(asyncio.CancelledError):
            await opening
        assert manager.state in ("new", "closed")
        del opening
        await before.is_back()
        assert eventually(lambda: server_sessions("poolkeeper:cancelled") == 0)
    await manager.open()
    assert await value(manager) == 42
    await manager.close()
    assert eventually(lambda: server_sessions("poolkeeper:cancelled") == 0)


async def test_a_cancellation_that_meets_the_last_connection_leaves_nothing(
    make_manager: MakeManager, server_sessions: CountSessions
) -> None:
    """The pool is open by then, but its opener does not know and will not close it."""
    manager = make_manager(name="photo-finish")
    before = Before()
    opening = asyncio.create_task(manager.open())
    while manager.state != "open":
        await asyncio.sleep(0)
    assert not opening.done()
    opening.cancel()
    with pytest.raises(asyncio.CancelledError):
        await opening
    del opening
    assert manager.state == "closed"
    await before.is_back()
    assert eventually(lambda: server_sessions("poolkeeper:photo-finish") == 0)


async def test_a_cancelled_open_of_a_silent_server_ends_at_once(
    make_manager: MakeManager, proxy: FaultProxy
) -> None:
    proxy.silent = True
    manager = make_manager(proxy.dsn)
    before = Before()
    opening = asyncio.create_task(manager.open())
    await asyncio.to_thread(eventually, lambda: proxy.accepted >= 3)
    begin = monotonic()
    opening.cancel()
    with pytest.raises(asyncio.CancelledError):
        await opening
    assert monotonic() - begin < AT_ONCE
    del opening
    await before.is_back()


async def test_asyncio_timeout_around_open_is_kept(
    make_manager: MakeManager, proxy: FaultProxy
) -> None:
    proxy.silent = True
    manager = make_manager(proxy.dsn)
    before = Before()
    begin = monotonic()
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.3), manager:
            pytest.fail("the server says nothing")
    assert monotonic() - begin < AT_ONCE
    assert manager.state == "closed"
    await before.is_back()


async def test_a_cancelled_open_ends_a_configure_callback_at_work(
    make_manager: MakeManager, server_sessions: CountSessions
) -> None:
    at_work = asyncio.Event()

    async def configure(conn: Any) -> None:
        await conn.set_autocommit(True)
        at_work.set()
        await conn.execute("select pg_sleep(60)")

    manager = make_manager(configure=configure, name="sleepy")
    before = Before()
    opening = asyncio.create_task(manager.open())
    await at_work.wait()
    begin = monotonic()
    opening.cancel()
    with pytest.raises(asyncio.CancelledError):
        await opening
    assert monotonic() - begin < AT_ONCE
    del opening
    await before.is_back()
    assert eventually(lambda: server_sessions("poolkeeper:sleepy") == 0)


async def test_a_duplicate_that_is_an_error_leaves_nothing(
    db: PoolManager[Any], make_manager: MakeManager, server_sessions: CountSessions
) -> None:
    before = Before()
    manager = make_manager(min_size=1, name="second")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(DuplicatePoolWarning):
            await manager.open()
    assert manager.state == "closed"
    await before.is_back()
    assert eventually(lambda: server_sessions("poolkeeper:second") == 0)


# --- several at once -----------------------------------------------------------------------


async def test_two_tasks_that_open_at_once_get_one_pool(
    make_manager: MakeManager, server_sessions: CountSessions
) -> None:
    manager = make_manager(min_size=2, name="shared")
    await asyncio.gather(*(manager.open() for _ in range(5)))
    assert server_sessions("poolkeeper:shared") == 2
    assert manager.pool.get_stats()["connections_num"] == 2
    assert await value(manager) == 42


async def test_two_tasks_that_open_at_once_both_learn_why_it_failed(
    make_manager: MakeManager, dsn: str
) -> None:
    manager = make_manager(psycopg.conninfo.make_conninfo(dsn, dbname="no_such_db"))
    before = Before()
    results = await asyncio.gather(manager.open(), manager.open(), return_exceptions=True)
    assert [type(result) for result in results] == [OpenError, OpenError]
    assert all("no_such_db" in str(result) for result in results)
    assert manager.state == "closed"
    del results
    await before.is_back()


async def test_two_tasks_that_open_at_once_each_have_their_own_timeout(
    make_manager: MakeManager, proxy: FaultProxy
) -> None:
    proxy.silent = True
    manager = make_manager(proxy.dsn, min_size=1, kwargs={"connect_timeout": 2})
    hasty = asyncio.create_task(manager.open(timeout=0.3))
    patient = asyncio.create_task(manager.open(timeout=30))
    with pytest.raises(OpenError, match=r"within 0\.30 s"):
        await hasty
    assert manager.state == "opening"
    proxy.silent = False
    proxy.cut()
    await patient
    assert await value(manager) == 42
    await manager.close()


@pytest.mark.parametrize("which", [0, 1])
async def test_if_one_of_two_openers_is_cancelled_the_other_gets_the_pool(
    make_manager: MakeManager, proxy: FaultProxy, which: int
) -> None:
    proxy.stall()
    manager = make_manager(proxy.dsn)
    tasks = [asyncio.create_task(manager.open()) for _ in range(2)]
    await asyncio.to_thread(eventually, lambda: proxy.accepted >= 1)
    tasks[which].cancel()
    with pytest.raises(asyncio.CancelledError):
        await tasks[which]
    assert manager.state == "opening"
    proxy.resume()
    await tasks[1 - which]
    assert await value(manager) == 42
    await manager.close()


async def test_if_both_openers_are_cancelled_nothing_is_left(
    make_manager: MakeManager, proxy: FaultProxy
) -> None:
    proxy.silent = True
    manager = make_manager(proxy.dsn)
    before = Before()
    tasks = [asyncio.create_task(manager.open()) for _ in range(2)]
    await asyncio.to_thread(eventually, lambda: proxy.accepted >= 1)
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)
    assert all(task.cancelled() for task in tasks)
    assert manager.state == "closed"
    tasks.clear()
    del task
    await before.is_back()


async def test_an_opener_that_comes_while_a_failed_one_cleans_up_gets_a_pool_of_its_own(
    make_manager: MakeManager, dsn: str, server_sessions: CountSessions
) -> None:
    right = False

    def conninfo() -> str:
        return dsn if right else psycopg.conninfo.make_conninfo(dsn, dbname="no_such_db")

    manager = make_manager(conninfo, min_size=2, name="next")
    failing = asyncio.create_task(manager.open())
    while manager.snapshot().last_error is None:
        await asyncio.sleep(0)
    right = True
    for _ in range(3):  # the failed one is told in one turn and tidies up in the next ones
        await asyncio.sleep(0)
        if manager.state != "opening":
            break
    await manager.open()
    with pytest.raises(OpenError):
        await failing
    assert manager.state == "open"
    assert await value(manager) == 42
    assert manager.snapshot().connecting == 0
    assert server_sessions("poolkeeper:next") == 2


async def test_a_task_that_acquires_while_the_pool_opens_waits_and_is_served(
    make_manager: MakeManager, proxy: FaultProxy
) -> None:
    proxy.stall()
    manager = make_manager(proxy.dsn)
    opening = asyncio.create_task(manager.open())
    await asyncio.sleep(0)
    early = asyncio.create_task(value(manager))
    await asyncio.to_thread(eventually, lambda: proxy.accepted >= 1)
    assert not early.done()
    proxy.resume()
    assert await early == 42
    await opening
    assert manager.pool.counts() == {"total": 4, "in_use": 0, "idle": 4, "max": 4, "waiting": 0}
    await manager.close()


async def test_a_task_that_acquires_while_the_pool_opens_learns_why_it_failed(
    make_manager: MakeManager, proxy: FaultProxy
) -> None:
    proxy.silent = True
    manager = make_manager(proxy.dsn, name="mute")
    opening = asyncio.create_task(manager.open(timeout=0.5))
    await asyncio.sleep(0)
    early = asyncio.create_task(value(manager))
    with pytest.raises(OpenError):
        await opening
    with pytest.raises(OpenError, match='could not open pool "mute" within'):
        await early


async def test_a_task_that_acquires_while_the_pool_opens_is_told_of_the_cancellation(
    make_manager: MakeManager, proxy: FaultProxy
) -> None:
    proxy.silent = True
    manager = make_manager(proxy.dsn, name="mute")
    opening = asyncio.create_task(manager.open())
    await asyncio.sleep(0)
    early = asyncio.create_task(value(manager))
    await asyncio.sleep(0)
    opening.cancel()
    with pytest.raises(asyncio.CancelledError):
        await opening
    with pytest.raises(ClosedError):
        await early


async def test_a_connection_in_use_when_opening_fails_is_taken_back(
    make_manager: MakeManager, dsn: str, proxy: FaultProxy, server_sessions: CountSessions
) -> None:
    """The first of two connections works and is acquired; the second never comes."""
    proxy.silent = True
    conninfos = iter([dsn, proxy.dsn])

    def conninfo() -> str:
        return next(conninfos)

    manager = make_manager(conninfo, min_size=2, name="halfway", num_workers=1)
    before = Before()
    opening = asyncio.create_task(manager.open(timeout=1))
    await asyncio.sleep(0)
    running = asyncio.create_task(manager.execute("select pg_sleep(60)"))
    with pytest.raises(OpenError, match="1 of 2 connections were made"):
        await opening
    with pytest.raises((psycopg.OperationalError, PoolClosed)):
        await running
    del opening, running
    await before.is_back()
    assert eventually(lambda: server_sessions("poolkeeper:halfway") == 0)


# --- open in other ways --------------------------------------------------------------------


async def test_open_twice_is_the_same_as_once(
    make_manager: MakeManager, server_sessions: CountSessions
) -> None:
    manager = make_manager(min_size=2, name="twice")
    await manager.open()
    await manager.open()
    await manager.open(wait=False)
    async with manager.connection() as conn:
        pid = conn.info.backend_pid
        await manager.open()
        assert (await (await conn.execute("select pg_backend_pid()")).fetchone()) == (pid,)
    assert server_sessions("poolkeeper:twice") == 2


async def test_open_on_another_loop_that_runs_is_refused(
    make_manager: MakeManager, server_sessions: CountSessions
) -> None:
    manager = make_manager(min_size=2, name="taken")
    await manager.open()
    with pytest.raises(LoopMismatchError, match='pool "taken" is bound to a different event loop'):
        await asyncio.to_thread(asyncio.run, manager.open())
    assert server_sessions("poolkeeper:taken") == 2
    assert await value(manager) == 42


async def test_open_on_another_loop_while_opening_is_refused(
    make_manager: MakeManager, proxy: FaultProxy
) -> None:
    proxy.stall()
    manager = make_manager(proxy.dsn)
    opening = asyncio.create_task(manager.open())
    await asyncio.to_thread(eventually, lambda: proxy.accepted >= 1)
    with pytest.raises(LoopMismatchError, match="is bound to a different event loop"):
        await asyncio.to_thread(asyncio.run, manager.open())
    proxy.resume()
    await opening
    assert await value(manager) == 42
    await manager.close()


async def test_open_during_close_waits_for_it_and_opens_anew(
    make_manager: MakeManager, server_sessions: CountSessions
) -> None:
    manager = make_manager(min_size=2, name="revolving")
    await manager.open()
    acquired, go_on = asyncio.Event(), asyncio.Event()

    async def hold() -> int:
        async with manager.connection() as conn:
            acquired.set()
            await go_on.wait()
            return conn.info.backend_pid

    holder = asyncio.create_task(hold())
    await acquired.wait()
    closing = asyncio.create_task(manager.close(timeout=30))
    await asyncio.sleep(0)
    assert manager.state == "closing"
    opening = asyncio.create_task(manager.open())
    await asyncio.sleep(0.1)
    assert not opening.done()
    go_on.set()
    await asyncio.gather(holder, closing, opening)
    assert manager.state == "open"
    assert await value(manager) == 42
    assert eventually(lambda: server_sessions("poolkeeper:revolving") == 2)


async def test_open_at_any_turn_of_a_close_opens_anew(
    make_manager: MakeManager, server_sessions: CountSessions
) -> None:
    manager = make_manager(min_size=2, name="turns")
    for turns in range(12):
        await manager.open()
        closing = asyncio.create_task(manager.close())
        for _ in range(turns):
            await asyncio.sleep(0)
        await manager.open() if turns else None
        await closing
        if manager.state == "open":
            assert await value(manager) == 42
            await manager.close()
        assert manager.state == "closed"
    assert eventually(lambda: server_sessions("poolkeeper:turns") == 0)


async def test_open_without_wait_returns_before_anything_is_connected(
    make_manager: MakeManager, proxy: FaultProxy
) -> None:
    proxy.stall()
    manager = make_manager(proxy.dsn)
    await manager.open(wait=False)
    assert manager.state == "opening"
    assert manager.pool.counts()["total"] == 0
    waiting = asyncio.create_task(manager.open())
    proxy.resume()
    await waiting
    assert manager.state == "open"
    assert await value(manager) == 42
    await manager.close()


async def test_a_reason_found_before_anybody_waited_is_raised_at_once(
    make_manager: MakeManager, dsn: str
) -> None:
    manager = make_manager(psycopg.conninfo.make_conninfo(dsn, dbname="no_such_db"))
    await manager.open(wait=False)
    while manager.snapshot().last_error is None:
        await asyncio.sleep(0.01)
    begin = monotonic()
    with pytest.raises(OpenError, match="no_such_db"):
        await manager.open()
    assert monotonic() - begin < AT_ONCE
    assert manager.state == "closed"


async def test_with_min_size_zero_open_asks_nothing_of_the_server(
    make_manager: MakeManager, proxy: FaultProxy
) -> None:
    manager = make_manager(proxy.dsn, min_size=0, max_size=2)
    await manager.open()
    assert manager.state == "open"
    await asyncio.sleep(0.1)
    assert proxy.accepted == 0
    assert await value(manager) == 42
    assert proxy.accepted == 1
    await manager.close()


# --- the pool itself -----------------------------------------------------------------------


async def test_the_pool_can_be_opened_without_the_manager(make_manager: MakeManager) -> None:
    manager = make_manager()
    pool = manager.pool
    with pytest.raises(NotOpenError):
        await pool.wait()
    await pool.open()
    assert manager.state == "opening"
    await asyncio.gather(pool.wait(), pool.wait(), pool.wait(timeout=30))
    assert manager.state == "open"
    await pool.wait(timeout=0)
    async with pool.connection() as conn:
        assert (await (await conn.execute("select 1")).fetchone()) == (1,)
    await pool.close()
    assert manager.state == "closed"
    async with pool:
        assert manager.state in ("opening", "open")
        await pool.wait()
        assert await value(manager) == 42
    assert manager.state == "closed"
    await pool.open(wait=True, timeout=30)
    assert manager.state == "open"


async def test_a_cancelled_wait_takes_nothing_from_others(
    make_manager: MakeManager, proxy: FaultProxy
) -> None:
    """Whoever opened without waiting wants the pool, whether or not somebody waits for it."""
    proxy.stall()
    pool = make_manager(proxy.dsn).pool
    await pool.open()
    waits = [asyncio.create_task(pool.wait()) for _ in range(2)]
    await asyncio.sleep(0)
    for task in waits:
        task.cancel()
    await asyncio.wait(waits)
    assert pool.state.value == "opening"
    again = asyncio.create_task(pool.wait())
    proxy.resume()
    await again
    assert pool.state.value == "open"
    await pool.close()


async def test_a_wait_that_fails_closes_the_pool(
    make_manager: MakeManager, proxy: FaultProxy
) -> None:
    proxy.silent = True
    pool = make_manager(proxy.dsn, name="mute").pool
    before = Before()
    await pool.open()
    with pytest.raises(OpenError, match="the server does not answer"):
        await pool.wait(timeout=0.3)
    assert pool.state.value == "closed"
    await before.is_back()
    with pytest.raises(ClosedError):
        await pool.wait()


async def test_close_ends_an_open_that_is_under_way(
    make_manager: MakeManager, proxy: FaultProxy
) -> None:
    proxy.silent = True
    manager = make_manager(proxy.dsn, name="mute")
    before = Before()
    opening = asyncio.create_task(manager.open())
    await asyncio.to_thread(eventually, lambda: proxy.accepted >= 1)
    begin = monotonic()
    await manager.close()
    with pytest.raises(ClosedError):
        await opening
    assert monotonic() - begin < AT_ONCE
    del opening
    await before.is_back()


def test_open_takes_no_socket_before_it_is_awaited(dsn: str) -> None:
    before = sockets()
    manager = PoolManager(dsn)
    coroutine = manager.open()
    assert sockets() == before
    coroutine.close()
    assert manager.state == "new"
