"""A portal runs async code for threads without a loop: one loop, one pool, in order to the end."""

from __future__ import annotations

import asyncio
import contextvars
import gc
import os
import re
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, ThreadPoolExecutor
from functools import partial
from typing import Any

import psycopg
import pytest

from poolkeeper import (
    BlockedLoopWarning,
    CallTimeout,
    ClosedError,
    ConfigError,
    LoopMismatchError,
    OpenError,
    PoolManager,
    Portal,
)
from tests.support.programs import Ended, run_program

MakePortal = Callable[..., Portal]


@pytest.fixture
def make_portal(dsn: str) -> Iterator[MakePortal]:
    made: list[Portal[Any]] = []

    def make(conninfo: str = dsn, **arguments: Any) -> Portal[Any]:
        db = PoolManager(conninfo, min_size=1, max_size=2, name="orders", timeout=30)
        made.append(Portal(db, **arguments))
        return made[-1]

    yield make
    for portal in made:
        portal.close(0)


@pytest.fixture
def portal(make_portal: MakePortal) -> Portal:
    return make_portal()


def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


class Stuck:
    """An async function that goes on until it is cancelled, and takes its time to end then."""

    def __init__(self) -> None:
        self.began = threading.Event()
        self.then: Callable[[], object] = lambda: None
        self.ended = False

    async def __call__(self) -> None:
        self.began.set()
        self.then()
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0.1)
            self.ended = True


# --- what it does -----------------------------------------------------------------------------


def test_threads_share_one_loop_and_one_pool(portal: Portal) -> None:
    async def where(number: int) -> tuple[int, str, int]:
        async with portal.manager.connection() as conn:
            pid = conn.info.backend_pid
        return number, threading.current_thread().name, pid

    with ThreadPoolExecutor(8) as threads:
        answers = list(threads.map(lambda n: portal.run(where, n, timeout=20), range(40)))
    assert [number for number, _, _ in answers] == list(range(40))
    assert {name for _, name, _ in answers} == {"orders-portal"}
    assert len({pid for _, _, pid in answers}) <= 2


def test_nothing_is_opened_before_the_first_call(portal: Portal) -> None:
    threads = threading.active_count()
    assert portal.manager.state == "new"
    assert portal.fetchval("select 42") == 42
    assert portal.manager.state == "open"
    assert threading.active_count() == threads + 1
    portal.close()
    assert portal.manager.state == "closed"
    assert threading.active_count() == threads


def test_a_statement_is_run_as_by_the_manager(portal: Portal) -> None:
    portal.execute("create temp table t (n int)")
    assert portal.execute("select generate_series(1, 3)") == 3
    assert portal.fetchone("select %s::int", (1,)) == (1,)
    assert portal.fetchone("select 1 where false") is None
    assert portal.fetchone("select 1 as a", row_factory=psycopg.rows.dict_row) == {"a": 1}
    assert portal.fetchall("select generate_series(1, 2)") == [(1,), (2,)]
    assert portal.fetchall("select 1 as a", row_factory=psycopg.rows.dict_row) == [{"a": 1}]
    with pytest.raises(psycopg.errors.QueryCanceled):
        portal.fetchval("select pg_sleep(30)", query_timeout=0.1)


def test_who_holds_a_connection_is_known_by_the_line_of_the_thread(portal: Portal) -> None:
    portal.open()
    thread = threading.Thread(target=lambda: portal.fetchval("select pg_sleep(0.5)"))
    thread.start()
    until(portal.manager.pool.checkouts)
    (checkout,) = portal.manager.snapshot().checkouts
    thread.join()
    assert re.fullmatch(r"tests/integration/test_portal.py:\d+", checkout.site)


def test_context_variables_are_seen_and_what_is_set_stays_there(portal: Portal) -> None:
    language = contextvars.ContextVar("language", default="en")

    async def translate() -> str:
        before = language.get()
        language.set("fr")
        return before

    language.set("de")
    assert portal.run(translate) == "de"
    assert language.get() == "de"


def test_an_error_comes_out_with_the_lines_of_who_called_and_who_raised(portal: Portal) -> None:
    async def fail() -> None:
        raise KeyError("of the program")

    with pytest.raises(KeyError) as failed:
        portal.run(fail)
    names = [frame.name for frame in traceback.extract_tb(failed.value.__traceback__)]
    assert names[0].startswith("test_an_error")
    assert names[-1] == "fail"
    assert len(names) <= 4, names
    with pytest.raises(psycopg.errors.DivisionByZero) as refused:
        portal.fetchval("select 1/0")
    assert len(traceback.extract_tb(refused.value.__traceback__)) <= 3
    with pytest.raises(SystemExit):  # is the caller's, and the loop goes on
        portal.run(partial(asyncio.to_thread, exit, 3))
    assert portal.fetchval("select 1") == 1


def test_a_portal_runs_on_the_loop_that_is_asked_for(make_portal: MakePortal) -> None:
    uvloop = pytest.importorskip("uvloop")
    portal = make_portal(loop_factory=uvloop.new_event_loop)

    async def kind() -> str:
        return type(asyncio.get_running_loop()).__module__

    assert portal.run(kind) == "uvloop"
    with pytest.raises(ConfigError, match="loop_factory"):
        make_portal(loop_factory="uvloop")


def test_a_factory_that_fails_is_told_to_the_caller(make_portal: MakePortal) -> None:
    def fail() -> asyncio.AbstractEventLoop:
        raise RuntimeError("no loop today")

    with pytest.raises(RuntimeError, match="no loop today"):
        make_portal(loop_factory=fail).fetchval("select 1")


class WillNotClose(asyncio.SelectorEventLoop):
    def close(self) -> None:
        super().close()
        raise RuntimeError("no end today")


def test_a_loop_that_fails_at_its_end_is_told_as_any_thread_tells(
    make_portal: MakePortal, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[Any] = []
    monkeypatch.setattr(threading, "excepthook", lambda args: told.append(args.exc_value))
    portal = make_portal(loop_factory=WillNotClose)
    assert portal.fetchval("select 42") == 42
    portal.close()
    assert list(map(str, told)) == ["no end today"]
    assert portal.manager.state == "closed"


@pytest.mark.filterwarnings("error")
def test_what_is_no_function_or_no_manager_is_refused_at_once(portal: Portal) -> None:
    """Nothing begins, nothing is left unawaited, and no connection string is repeated."""

    async def put() -> None: ...

    for call in (portal.run, portal.submit):
        with pytest.raises(ConfigError, match=rf"Write portal.{call.__name__}\(put, \.\.\.\)"):
            call(put())  # type: ignore[operator]
        with pytest.raises(ConfigError, match=rf"{call.__name__}\(\) cannot call a int"):
            call(42)  # type: ignore[operator]
    with pytest.raises(ConfigError, match="manager cannot be <class 'str'>") as refused:
        Portal("postgresql://me:secret@localhost")  # type: ignore[arg-type]
    assert "secret" not in str(refused.value)
    assert portal.manager.state == "new"


# --- what ends a call before it is over ---------------------------------------------------------


def test_a_call_that_takes_too_long_is_stopped_before_the_caller_goes_on(portal: Portal) -> None:
    portal.open()

    async def sleep() -> None:
        await portal.manager.fetchval("select pg_sleep(60)")

    with pytest.raises(CallTimeout) as late:
        portal.run(sleep, timeout=0.3)
    assert isinstance(late.value, TimeoutError)
    assert 'portal of pool "orders" took longer than timeout=0.30 s' in str(late.value)
    assert re.search(r"Called at tests/integration/test_portal.py:\d+\.", str(late.value))
    assert re.search(r"cancelled at tests/.*test_portal.py:\d+ in sleep", str(late.value))
    assert portal.manager.snapshot().in_use == 0
    with pytest.raises(ConfigError, match="timeout"):
        portal.run(sleep, timeout=-1)


def test_a_time_out_of_the_functions_own_is_left_as_it_is(portal: Portal) -> None:
    async def fail() -> None:
        raise TimeoutError("my own")

    with pytest.raises(TimeoutError, match="my own") as failed:
        portal.run(fail, timeout=20)
    assert type(failed.value) is TimeoutError


@pytest.mark.skipif(not hasattr(signal, "SIGUSR1"), reason="Windows has no such signals")
def test_a_signal_that_raises_cancels_the_task_and_waits_for_its_end(portal: Portal) -> None:
    """A KeyboardInterrupt, or the soft time limit of Celery, which comes in the same way."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    stuck = Stuck()
    stuck.then = lambda: os.kill(os.getpid(), signal.SIGUSR1)
    before = signal.signal(signal.SIGUSR1, interrupt)
    try:
        with pytest.raises(KeyboardInterrupt):
            portal.run(stuck)
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert stuck.ended
    assert portal.fetchval("select 1") == 1


def test_an_exception_set_for_a_thread_ends_its_call_as_well(portal: Portal) -> None:
    """As Dramatiq's time limit is."""
    import ctypes

    class TimeLimit(Exception):
        pass

    stuck = Stuck()
    seen: list[type[BaseException]] = []

    def call() -> None:
        try:
            portal.run(stuck)
        except BaseException as ex:
            seen.append(type(ex))

    thread = threading.Thread(target=call)
    thread.start()
    assert stuck.began.wait(20)
    ctypes.pythonapi.PyThreadState_SetAsyncExc(
        ctypes.c_ulong(thread.ident or 0), ctypes.py_object(TimeLimit)
    )
    thread.join(20)
    assert seen == [TimeLimit]
    assert stuck.ended


def test_a_future_that_is_cancelled_is_so_when_its_task_has_ended(portal: Portal) -> None:
    stuck = Stuck()
    future = portal.submit(stuck)
    assert stuck.began.wait(20)
    assert future.cancel()
    with pytest.raises(CancelledError):
        future.result(20)
    assert stuck.ended
    assert future.cancelled()
    assert not future.cancel()
    assert portal.submit(asyncio.sleep, 0, "done").result(20) == "done"
    with pytest.raises(ZeroDivisionError):
        portal.submit(partial(asyncio.to_thread, lambda: 1 // 0)).result(20)


# --- where it must not be called, or should not -------------------------------------------------


def test_a_call_on_its_own_loop_is_refused(portal: Portal) -> None:
    async def call() -> None:
        portal.fetchval("select 1")

    async def close() -> None:
        portal.close()

    for function in (call, close):
        with pytest.raises(LoopMismatchError) as refused:
            portal.run(function)
        assert str(refused.value).startswith(
            'the portal of pool "orders" was called on its own event loop\nDETAIL:  Made at tests/'
        )
        assert "await the manager here" in str(refused.value)
    assert portal.fetchval("select 1") == 1


async def test_a_call_where_another_loop_runs_is_told_that_it_blocks_it(portal: Portal) -> None:
    with pytest.warns(BlockedLoopWarning, match="blocks the event loop") as told:
        assert portal.fetchval("select 1") == 1
    assert told[0].filename == __file__
    assert await asyncio.to_thread(portal.fetchval, "select 2") == 2
    assert await asyncio.wrap_future(portal.submit(portal.manager.fetchval, "select 3")) == 3


async def test_a_manager_that_is_open_elsewhere_is_not_the_portals(portal: Portal) -> None:
    async with portal.manager:
        with pytest.raises(LoopMismatchError):
            await asyncio.to_thread(portal.fetchval, "select 1")
        await asyncio.to_thread(portal.close)
        assert portal.manager.state == "open"


# --- its end ------------------------------------------------------------------------------------


def test_a_closed_portal_refuses_until_it_is_opened(portal: Portal) -> None:
    with portal:
        assert "running" in repr(portal)
        assert portal.fetchval("select 1") == 1
    assert "closed" in repr(portal)
    portal.close()
    with pytest.raises(ClosedError, match='portal of pool "orders" is closed'):
        portal.fetchval("select 1")
    portal.open()
    assert portal.fetchval("select 1") == 1


def test_who_waits_when_it_is_closed_is_told_so(portal: Portal) -> None:
    stuck = Stuck()
    with ThreadPoolExecutor() as threads:
        waiting = threads.submit(portal.run, stuck)
        assert stuck.began.wait(20)
        portal.close()
        with pytest.raises(ClosedError, match="was closed during a call"):
            waiting.result(20)
    assert stuck.ended


def test_a_call_that_was_sent_too_late_does_not_wait_for_ever(portal: Portal) -> None:
    """The loop is there, but turns no more: as between its last turn and its end."""
    portal.open()
    thread: Any = portal._thread
    loop = thread.loop
    portal.close()
    portal._closed = False
    portal._thread = thread
    thread.loop = asyncio.new_event_loop()
    try:
        with pytest.raises(ClosedError):
            portal.fetchval("select 1")
    finally:
        thread.loop.close()
        thread.loop = loop
    assert portal.fetchval("select 1") == 1  # the dead one is found closed, and replaced


class Closed(asyncio.SelectorEventLoop):
    """A loop that is closed at the very moment at which a call is sent to it."""

    close_first: Callable[[], None] | None = None

    def call_soon_threadsafe(self, *args: Any, **kwargs: Any) -> Any:
        close, Closed.close_first = Closed.close_first, None
        if close is not None:
            close()
        return super().call_soon_threadsafe(*args, **kwargs)


@pytest.mark.parametrize("opens", [False, True], ids=["closed", "closed-and-opened"])
def test_who_calls_as_it_is_being_closed_is_refused_or_served_by_the_next_loop(
    make_portal: MakePortal, monkeypatch: pytest.MonkeyPatch, opens: bool
) -> None:
    portal = make_portal(loop_factory=Closed)

    def close() -> None:
        portal.close()
        if opens:
            portal.open()

    portal.open()
    monkeypatch.setattr(Closed, "close_first", close)
    if opens:
        assert portal.fetchval("select 42") == 42
    else:
        with pytest.raises(ClosedError, match='portal of pool "orders" is closed'):
            portal.fetchval("select 42")
    assert Closed.close_first is None


def test_who_calls_as_it_is_being_closed_twice_is_refused(
    make_portal: MakePortal, monkeypatch: pytest.MonkeyPatch
) -> None:
    portal = make_portal(loop_factory=Closed)

    def close_again() -> None:
        portal.close()
        portal.open()
        Closed.close_first = portal.close

    portal.open()
    monkeypatch.setattr(Closed, "close_first", close_again)
    with pytest.raises(ClosedError, match='portal of pool "orders" is closed'):
        portal.fetchval("select 42")
    assert Closed.close_first is None


def test_threads_that_call_first_at_the_same_time_begin_one_loop(make_portal: MakePortal) -> None:
    begun = threading.Semaphore(0)
    made: list[asyncio.AbstractEventLoop] = []

    def loop() -> asyncio.AbstractEventLoop:
        for _ in range(4):
            assert begun.acquire(timeout=20)
        time.sleep(0.05)  # for them to come to where one has to wait
        made.append(asyncio.SelectorEventLoop())
        return made[-1]

    portal = make_portal(loop_factory=loop)

    def call(number: int) -> Any:
        begun.release()
        return portal.fetchval("select %s::int", (number,))

    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(call, range(4))) == [0, 1, 2, 3]
    assert len(made) == 1


def test_one_that_is_dropped_closes_its_pool(dsn: str) -> None:
    portal = Portal(PoolManager(dsn, min_size=1, name="orders"))
    manager = portal.manager
    portal.open()
    del portal
    gc.collect()
    until(lambda: manager.state == "closed")


def test_a_pool_that_cannot_be_opened_says_why_each_time(make_portal: MakePortal, dsn: str) -> None:
    portal = make_portal(psycopg.conninfo.make_conninfo(dsn, user="nobody_there"))
    for call in (portal.open, partial(portal.fetchval, "select 1"), partial(portal.run, Stuck())):
        with pytest.raises(OpenError, match='role "nobody_there" does not exist') as failed:
            call()
        assert "test_portal.py" in str(failed.value)


def clean(ended: Ended) -> list[str]:
    assert ended.code == 0, ended
    assert ended.err == ""
    return ended.out.splitlines()


EXIT = """
import contextlib, threading
from poolkeeper import ClosedError, PoolManager, Portal

portal = Portal(PoolManager(sys.argv[1], min_size=1, name="exit"))


def work():
    time.sleep(0.3)  # a thread that the interpreter waits for still has the portal
    print(portal.fetchval("select 2"))


import atexit, time
atexit.register(lambda: print(portal.fetchval("select 3")))
print(portal.fetchval("select 1"))
threading.Thread(target=work).start()


def stay():
    with contextlib.suppress(ClosedError):
        portal.run(asyncio.sleep, 60)


threading.Thread(target=stay, daemon=True).start()
"""


def test_a_program_that_forgets_it_ends_in_order(dsn: str, server_sessions: Any) -> None:
    """With a call of a daemon thread still under way, which is cancelled."""
    ended = run_program("import warnings; warnings.simplefilter('error')\n" + EXIT, dsn)
    assert clean(ended) == ["1", "2", "3"]
    assert ended.seconds < 20
    until(lambda: server_sessions("poolkeeper:exit") == 0)


FORK = """
import multiprocessing, threading, warnings
from poolkeeper import PoolManager, Portal

warnings.simplefilter("error")
portal = Portal(PoolManager(sys.argv[1], min_size=1, max_size=2, name="fork"))


def child(before):
    mine = portal.fetchval("select pg_backend_pid()")
    assert mine != before, "the session of the parent"
    assert portal.run(asyncio.sleep, 0, 7) == 7
    print("child", flush=True)


def main():
    before = portal.fetchval("select pg_backend_pid()") if sys.argv[2] == "used" else None
    for _ in range(2):
        if (pid := os.fork()) == 0:
            child(before)
            sys.exit()  # at its exit, the child closes its own, and only that
        assert os.waitpid(pid, 0)[1] == 0
    process = multiprocessing.get_context("fork").Process(target=child, args=(before,))
    process.start()
    process.join()
    assert process.exitcode == 0
    if before is not None:
        assert portal.fetchval("select pg_backend_pid()") == before
    assert portal.fetchval("select 1") == 1
    print("parent")


main()
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="Windows does not fork")
@pytest.mark.parametrize("parent", ["used", "unused"])
def test_a_forked_child_has_a_loop_and_a_pool_of_its_own(
    parent: str, dsn: str, server_sessions: Any
) -> None:
    fork = FORK
    if parent == "used":  # Python 3.12 warns of any fork where threads run
        fork = FORK.replace(
            '("error")', '("error"); warnings.simplefilter("ignore", DeprecationWarning)'
        )
    assert clean(run_program(fork, dsn, parent)) == ["child", "child", "child", "parent"]
    until(lambda: server_sessions("poolkeeper:fork") == 0)
