"""What subscribers are told, when and where; and that none of them harms the pool."""

from __future__ import annotations

import asyncio
import logging
import os
import pickle
import re
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from contextvars import ContextVar
from dataclasses import FrozenInstanceError, fields
from functools import partial
from pathlib import Path
from typing import Any

import psycopg
import pytest

from poolkeeper import (
    AcquireTimeout,
    BoundNullPool,
    BoundPool,
    ClosedError,
    ConfigError,
    LoopMismatchError,
    OpenError,
    PoolManager,
    SelfDeadlockError,
    TooManyWaitersError,
    events,
)
from poolkeeper._log import EVENTS
from poolkeeper.adapters._shared import RequestConnection
from poolkeeper.events import RECORDS, Acquired, Closed, Connected, Discarded, Event, Released
from tests.integration.test_logging import fields_of
from tests.support.inside import life, shrink
from tests.support.programs import run_program
from tests.support.proxy import FaultProxy
from tests.support.waiting import until

MakeManager = Callable[..., PoolManager[Any]]
HERE = "tests/integration/test_events.py"

request: ContextVar[str] = ContextVar("request", default="nobody's")


class Heard:
    """A subscriber that remembers."""

    def __init__(self, pool: Any = None, *kinds: Any) -> None:
        self.all: list[Any] = []
        if pool is not None:
            self.unsubscribe = pool.subscribe(self, *kinds)

    def __call__(self, event: Event) -> None:
        self.all.append(event)

    @property
    def names(self) -> list[str]:
        return [event.event_name for event in self.all]

    def of(self, *kinds: type[Any]) -> list[Any]:
        return [event for event in self.all if isinstance(event, kinds)]


def logged(caplog: pytest.LogCaptureFixture, name: str) -> list[dict[str, Any]]:
    wanted = f"poolkeeper.{name}"
    return [vars(r) for r in caplog.records if vars(r).get("event_name") == wanted]


# --- what is told --------------------------------------------------------------------------------


async def test_the_whole_life_of_a_pool_is_told_in_order(make_manager: MakeManager) -> None:
    db = make_manager(min_size=1, name="orders")
    heard = Heard(db)
    await db.open()

    async def report() -> None:
        async with db.connection() as conn:
            await conn.execute("select 1")
            await conn.execute("select pg_sleep(0.05)")

    await asyncio.create_task(report(), name="report-7")
    await db.close()
    assert heard.names == ["connected", "opened", "acquired", "released", "discarded", "closed"]
    assert {event.pool for event in heard.all} == {"orders"}
    connected, opened, acquired, released, discarded, closed = heard.all
    assert opened.opened.startswith(f"at {HERE}:")
    assert opened.seconds >= connected.seconds > 0
    assert (acquired.waited_seconds, acquired.queued) == (0.0, False)
    for event in (acquired, released):
        assert event.task == "report-7"
        line = report.__code__.co_firstlineno + 1
        assert event.caller.site == f"{HERE}:{line}"
        assert event.caller.function == "report"
        assert (event.caller.method, event.caller.route) == ("", "")
        assert str(event.caller) == f"{HERE}:{line} in report"
    assert released.held_seconds >= released.query_seconds >= 0.05
    assert released.exchanges == 3  # COMMIT is one of them
    assert (discarded.why, discarded.backend_pid) == ("closing", connected.backend_pid)
    assert closed.open_seconds >= released.held_seconds
    assert (closed.late, closed.loop_closed) == (0, False)


async def test_each_life_is_told_to_who_has_subscribed_once(make_manager: MakeManager) -> None:
    db = make_manager(min_size=0, max_size=1)
    heard = Heard(db, events.Opened, Closed)
    for _ in range(2):
        async with db:
            pass
    assert heard.names == ["opened", "closed"] * 2


async def test_a_pool_that_never_was_open_is_not_told_as_closed(
    make_manager: MakeManager, proxy: FaultProxy
) -> None:
    proxy.refuse = True
    db = make_manager(proxy.dsn, min_size=1)
    heard = Heard(db)
    with pytest.raises(OpenError):
        await db.open(timeout=0.3)
    assert set(heard.names) == {"connect_failed", "outage_began"}
    proxy.refuse = False
    await db.open()
    assert heard.names[-2:] == ["connected", "opened"]


async def test_a_bound_pool_tells_whoever_holds_it(dsn: str) -> None:
    async with BoundPool(dsn, min_size=1, open=False, name="theirs") as pool:
        await pool.wait()
        heard = Heard(pool)
        conn = await pool.getconn()
        await pool.putconn(conn)
        assert heard.names == ["acquired", "released"]
        assert heard.all[1].exchanges == 0


async def test_a_wait_is_told_from_the_line_to_the_connection(make_manager: MakeManager) -> None:
    db = make_manager(min_size=1)
    await db.open()
    heard = Heard(db)
    async with db.connection():
        waiting = asyncio.create_task(db.fetchval("select 1"), name="waits")
        await until(lambda: "queued" in heard.names)
        queued = heard.all[-1]
        assert (queued.task, queued.waiting) == ("waits", 1)
        await asyncio.sleep(0.05)
    await waiting
    acquired = heard.of(Acquired)[1]
    assert acquired.queued
    assert acquired.waited_seconds >= 0.05
    assert acquired.caller == queued.caller
    assert heard.names == ["acquired", "queued", "released", "acquired", "released"]


async def test_each_time_out_is_told_with_its_cause_in_its_own_context(
    make_manager: MakeManager,
) -> None:
    db = make_manager(min_size=1)
    await db.open()
    whose: list[str] = []
    heard = Heard(db, events.TimedOut)
    db.subscribe(lambda _: whose.append(request.get()), events.TimedOut)

    async def serve(name: str, timeout: float) -> None:
        request.set(name)
        with suppress(AcquireTimeout):
            await db.fetchval("select 1", timeout=timeout)

    async with db.connection():
        await asyncio.gather(*(serve(f"r{n}", 0.1) for n in range(3)), serve("at once", 0))
    assert sorted(whose) == ["at once", "r0", "r1", "r2"]
    first = heard.all[0]
    assert (first.cause, first.timeout_seconds) == ("all-in-use", 0)
    assert {event.cause for event in heard.all} == {"all-in-use"}
    assert all(event.waited_seconds >= 0.1 for event in heard.all[1:])
    assert first.caller.function.endswith("serve")


async def test_a_self_deadlock_is_a_time_out_with_that_cause(make_manager: MakeManager) -> None:
    db = make_manager(min_size=1)
    await db.open()
    heard = Heard(db, events.TimedOut)
    async with db.connection():
        with pytest.raises(SelfDeadlockError):
            await db.fetchval("select 1")
    assert [event.cause for event in heard.all] == ["self-deadlock"]


async def test_who_waits_no_more_is_told(make_manager: MakeManager) -> None:
    db = make_manager(min_size=1, max_waiting=1)
    await db.open()
    heard = Heard(db, events.Queued, events.GaveUp, events.TurnedAway)
    async with db.connection():
        waiting = asyncio.create_task(db.fetchval("select 1"))
        await until(lambda: "queued" in heard.names)
        with pytest.raises(TooManyWaitersError):
            await asyncio.create_task(db.fetchval("select 1"))
        waiting.cancel()
        with suppress(asyncio.CancelledError):
            await waiting
        waiting = asyncio.create_task(db.fetchval("select 1"))
        await until(lambda: len(heard.all) == 4)
        await db.close(0)
        with pytest.raises(ClosedError):
            await waiting
    assert heard.names == ["queued", "turned_away", "gave_up", "queued", "gave_up"]
    assert heard.all[1].waiting == 1
    assert [event.why for event in heard.of(events.GaveUp)] == ["cancelled", "closed"]


async def test_a_connection_that_close_takes_away_is_told_as_released(
    make_manager: MakeManager,
) -> None:
    db = make_manager(min_size=1)
    await db.open()
    heard = Heard(db)

    async def hold() -> None:
        async with db.connection():
            await asyncio.sleep(60)

    holding = asyncio.create_task(hold())
    await until(lambda: heard.of(Acquired))
    await db.close(0)
    holding.cancel()
    with suppress(asyncio.CancelledError):
        await holding
    assert heard.names == ["acquired", "released", "discarded", "closed"]
    assert heard.all[-1].late == 1


async def test_trouble_with_the_server_is_told_until_it_is_over(
    make_manager: MakeManager, proxy: FaultProxy
) -> None:
    db = make_manager(proxy.dsn, min_size=1)
    await db.open()
    heard = Heard(db)
    proxy.refuse = True
    await asyncio.to_thread(proxy.cut)
    with suppress(psycopg.Error):
        await db.fetchval("select 1", timeout=1)
    await until(lambda: heard.of(events.ConnectFailed))
    proxy.refuse = False
    await until(lambda: heard.of(Connected))
    failed, began, ended = (
        heard.of(kind)[-1]
        for kind in (events.ConnectFailed, events.OutageBegan, events.OutageEnded)
    )
    assert failed.attempts_failed == len(heard.of(events.ConnectFailed)) == ended.attempts_failed
    assert (failed.reason, failed.kind) == (began.reason, began.kind)
    assert not failed.permanent
    assert ended.outage_seconds > 0
    assert "127.0.0.1" not in failed.kind
    assert heard.of(Discarded)[0].why in ("dead", "broken")


async def test_a_suspected_leak_and_its_return_are_told(make_manager: MakeManager) -> None:
    db = make_manager(min_size=1, leak_threshold=0.05)
    await db.open()
    heard = Heard(db, events.LeakSuspected, events.LeakReturned)
    async with db.connection():
        await until(lambda: heard.all)
    suspected, returned = heard.all
    assert suspected.caller == returned.caller
    assert HERE in suspected.stack
    assert returned.held_seconds >= suspected.held_seconds >= 0.05


async def test_a_loop_that_stood_still_is_told(make_manager: MakeManager) -> None:
    db = make_manager(min_size=1)
    await db.open()
    heard = Heard(db, events.Stalled)
    async with db.connection():
        waiting = asyncio.create_task(db.fetchval("select 1"))
        await until(lambda: db.snapshot().waiting)
        time.sleep(0.6)
        await until(lambda: heard.all)
    await waiting
    assert heard.all[0].seconds >= 0.1


async def test_a_mismatch_is_told_where_it_happens(make_manager: MakeManager) -> None:
    db = make_manager(min_size=1)
    await db.open()
    where: list[int] = []
    heard = Heard(db, events.LoopMismatch)

    def misuse_again(event: Event) -> None:
        where.append(threading.get_ident())
        with suppress(LoopMismatchError):
            db.connection().__aenter__().send(None)

    db.subscribe(misuse_again, events.LoopMismatch)

    def use() -> int:
        with pytest.raises(LoopMismatchError):
            asyncio.run(db.fetchval("select 1"))
        return threading.get_ident()

    thread = await asyncio.to_thread(use)
    assert where == [thread]  # what it does itself it is not told
    assert heard.all[0].purpose == "acquire a connection"
    assert heard.all[0].opened.startswith(f"at {HERE}:")
    assert heard.all[0].used.startswith(f"at {HERE}:")


def test_a_mismatch_is_told_of_who_cannot_even_open_it(dsn: str) -> None:
    db = PoolManager(dsn, min_size=0, max_size=1)
    heard = Heard(db)
    opening = db.open()
    with pytest.raises(LoopMismatchError):
        opening.send(None)  # type: ignore[attr-defined]
    assert heard.names == ["loop_mismatch"]
    assert heard.all[0].purpose == "open it"


def test_a_life_whose_loop_is_gone_is_told_as_closed_when_that_is_noticed(dsn: str) -> None:
    db = PoolManager(dsn, min_size=1)
    heard = Heard(db)
    with asyncio.Runner() as runner:
        runner.run(db.open())
    asyncio.run(reopened(db))
    assert heard.names == [
        "connected", "opened", "discarded", "closed", "connected", "opened", "discarded", "closed",
    ]  # fmt: skip
    assert [event.loop_closed for event in heard.of(Closed)] == [True, False]


async def reopened(db: PoolManager[Any]) -> None:
    async with db:
        pass


# --- why a connection goes -----------------------------------------------------------------------


async def give_back(db: PoolManager[Any], spoil: Callable[[Any], Any] | None = None) -> None:
    conn = await db.pool.getconn()
    if spoil is not None:
        await spoil(conn)
    await db.pool.putconn(conn)


async def expire(db: PoolManager[Any], dsn: str) -> None:
    for session in life(db.pool).sessions:
        session.expires_at = 0.001
    await give_back(db)


async def kill(db: PoolManager[Any], dsn: str) -> None:
    pids = [session.backend_pid for session in life(db.pool).sessions]
    async with await psycopg.AsyncConnection.connect(dsn) as other:
        await other.execute("select pg_terminate_backend(pid, 5000) from unnest(%s) pid", [pids])
    await give_back(db)


async def be_busy(db: PoolManager[Any], dsn: str) -> None:
    conn = await db.pool.getconn()
    at_work = asyncio.create_task(conn.execute("select pg_sleep(60)"))
    await until(lambda: conn.at_work)
    await db.pool.putconn(conn)
    with suppress(psycopg.Error):
        await at_work


async def fail_in_reset(db: PoolManager[Any], dsn: str) -> None:
    async def reset(conn: Any) -> None:
        raise ZeroDivisionError

    life(db.pool).reset = reset
    await give_back(db)


async def stay_unused(db: PoolManager[Any], dsn: str) -> None:
    life(db.pool).min_size = 0
    shrink(db.pool)


WHY: dict[str, Callable[[PoolManager[Any], str], Any]] = {
    "expired": expire,
    "unused": stay_unused,
    "surplus": lambda db, dsn: db.pool.resize(0, 1),
    "drained": lambda db, dsn: db.pool.drain(),
    "dead": kill,
    "broken": lambda db, dsn: give_back(db, lambda conn: conn.close()),
    "busy": be_busy,
    "out of order": fail_in_reset,
}


@pytest.mark.parametrize("why", WHY)
async def test_a_connection_that_goes_is_told_with_the_reason(
    why: str, make_manager: MakeManager, dsn: str
) -> None:
    db = make_manager(min_size=2, max_size=2)
    heard = Heard(db, Connected, Discarded)
    await db.open()
    await WHY[why](db, dsn)
    await until(lambda: heard.of(Discarded))
    assert heard.of(Discarded)[0].why == why
    await db.close()
    # Each that came has gone, once.
    made, gone = (Counter(e.backend_pid for e in heard.of(kind)) for kind in (Connected, Discarded))
    assert made == gone
    assert 0 not in made
    assert all(event.lived_seconds > 0 for event in heard.of(Discarded))


async def test_a_connection_in_use_that_is_drained_goes_when_it_comes_back(
    make_manager: MakeManager,
) -> None:
    db = make_manager(min_size=1)
    await db.open()
    heard = Heard(db, Released, Discarded)
    async with db.connection():
        await db.pool.drain()
    await until(lambda: heard.of(Discarded))
    assert heard.names == ["released", "discarded"]
    assert heard.all[1].why == "drained"


async def test_a_null_pool_keeps_none(dsn: str) -> None:
    async with BoundNullPool(dsn, max_size=1, open=False) as pool:
        heard = Heard(pool)
        async with pool.connection():
            pass
    assert heard.names == ["queued", "connected", "acquired", "discarded", "released", "closed"]
    assert heard.of(Discarded)[0].why == "not kept"


# --- who asks ------------------------------------------------------------------------------------


async def test_the_route_is_told_where_an_adapter_knows_it(make_manager: MakeManager) -> None:
    db = make_manager(min_size=1)
    await db.open()
    heard = Heard(db, Acquired)

    async def order() -> None: ...

    for _ in range(2):  # another object for each request, and the same words
        async with RequestConnection({}, db, order, ("GET", "/orders/{id}")):
            pass
    first, second = (event.caller for event in heard.all)
    assert first is second
    assert (first.method, first.route) == ("GET", "/orders/{id}")
    assert first.function.endswith("order")
    assert first.file == HERE
    assert str(first).startswith(f"GET /orders/{{id}}, {HERE}:")


async def test_where_a_library_asks_the_line_that_called_it_is_told(
    make_manager: MakeManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = "async def ask(db):\n    async with db.connection(): pass\n"
    path = str(Path(pytest.__file__).parent / "library.py")
    library: dict[str, Any] = {"__name__": "library"}
    exec(compile(source, path, "exec"), library)
    db = make_manager(min_size=1)
    await db.open()
    heard = Heard(db, Acquired)
    await library["ask"](db)
    assert heard.all[0].caller.site.startswith(f"{HERE}:")


# --- subscribing ---------------------------------------------------------------------------------


async def test_a_subscriber_gets_the_kinds_that_it_wants(make_manager: MakeManager) -> None:
    db = make_manager(min_size=1)
    everything, some = Heard(db), Heard(db, Acquired, Closed)
    await db.open()
    await db.fetchval("select 1")
    await db.close()
    assert some.names == ["acquired", "closed"]
    assert set(everything.names) > set(some.names)


async def test_who_has_unsubscribed_is_told_nothing_more(make_manager: MakeManager) -> None:
    db = make_manager(min_size=1)
    await db.open()
    first, second = Heard(db), Heard(db)
    async with db.connection():
        first.unsubscribe()
        first.unsubscribe()  # harmless
    assert (first.names, second.names) == (["acquired"], ["acquired", "released"])


async def test_a_checkout_from_before_is_not_told(make_manager: MakeManager) -> None:
    db = make_manager(min_size=1)
    await db.open()
    async with db.connection():
        heard = Heard(db)
    await db.fetchval("select 1")
    assert heard.names == ["acquired", "released"]


async def test_a_subscriber_may_change_who_is_subscribed(make_manager: MakeManager) -> None:
    db = make_manager(min_size=1)
    await db.open()
    told: list[str] = []
    late = Heard()

    def first(event: Event) -> None:
        told.append(f"first: {event.event_name}")
        stop_first()
        stop_second()
        db.subscribe(late)

    def second(event: Event) -> None:
        told.append("second")

    stop_first = db.subscribe(first)
    stop_second = db.subscribe(second)
    await db.fetchval("select 1")
    assert told == ["first: acquired"]
    assert late.names == ["released"]


async def test_subscribers_come_and_go_in_other_threads_while_the_pool_is_at_work(
    make_manager: MakeManager,
) -> None:
    db = make_manager(min_size=2)
    await db.open()
    stays = Heard(db, Acquired)
    end = threading.Event()

    def come_and_go() -> int:
        times = 0
        while not end.is_set():
            Heard(db).unsubscribe()
            times += 1
        return times

    threads = [asyncio.create_task(asyncio.to_thread(come_and_go)) for _ in range(2)]
    for _ in range(60):
        await db.fetchval("select 1")
    end.set()
    assert all(await asyncio.gather(*threads))
    assert len(stays.all) == 60
    stays.unsubscribe()
    assert life(db.pool).listeners.quiet


class Async:
    async def __call__(self, event: Event) -> None: ...


async def is_async(event: Event) -> None: ...


@pytest.mark.parametrize("callback", [is_async, Async(), partial(is_async), Async().__call__])
def test_what_is_async_cannot_be_subscribed(callback: Any) -> None:
    with pytest.raises(ConfigError, match="is async: it must be a plain function") as caught:
        PoolManager().subscribe(callback)
    assert caught.value.parameter == "callback"
    assert "asyncio.Queue" in str(caught.value)


def test_what_cannot_be_called_or_told_cannot_be_subscribed() -> None:
    wrong: Any = "acquired"
    with pytest.raises(ConfigError, match="must be a function that takes an event, not str"):
        PoolManager().subscribe(wrong)
    for kind in (wrong, str, AcquireTimeout):
        with pytest.raises(ConfigError, match="it is no kind of event") as caught:
            PoolManager().subscribe(print, kind)
        assert caught.value.parameter == "kinds"


# --- no subscriber harms the pool ----------------------------------------------------------------


async def use(db: PoolManager[Any]) -> None:
    """Do all that a subscriber is told of: a checkout, one that waits, one in vain."""
    assert await db.fetchval("select 1") == 1
    async with db.connection():
        waiting = asyncio.create_task(db.fetchval("select 2"))
        with pytest.raises(AcquireTimeout):
            await asyncio.create_task(db.fetchval("select 3", timeout=0.01))
    assert await waiting == 2


ERRORS = [
    ZeroDivisionError("hushhush"),
    asyncio.CancelledError(),
    GeneratorExit(),
    RecursionError(),
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
async def test_what_a_subscriber_raises_is_logged_once_for_each_kind(
    error: BaseException, make_manager: MakeManager, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "poolkeeper")
    db = make_manager(min_size=1, name="orders")

    def fail(event: Event) -> None:
        raise error

    db.subscribe(fail)
    heard = Heard(db)
    await db.open()
    for _ in range(3):
        await use(db)
    await db.close()
    said = logged(caplog, "subscriber_failed")
    assert sorted(entry["told"] for entry in said) == sorted(set(heard.names))
    assert heard.names.count("acquired") == 9
    assert all(entry["subscriber"].endswith("<locals>.fail") for entry in said)
    assert all("hushhush" not in entry["message"] for entry in said)
    assert f"test_events.py:{fail.__code__.co_firstlineno + 1}" in said[0]["message"]


async def test_a_coroutine_that_a_subscriber_returns_is_told_as_a_mistake(
    make_manager: MakeManager, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "poolkeeper")
    db = make_manager(min_size=1)
    db.subscribe(lambda event: is_async(event), Acquired)
    await db.open()
    await use(db)
    (said,) = logged(caplog, "subscriber_failed")
    assert "is async" in said["message"]


async def test_an_interrupt_in_a_subscriber_goes_on_and_costs_no_connection(
    make_manager: MakeManager,
) -> None:
    db = make_manager(min_size=1)
    await db.open()

    def interrupt(event: Event) -> None:
        raise KeyboardInterrupt

    unsubscribe = db.subscribe(interrupt, Acquired)
    getting = db.pool.getconn()
    with pytest.raises(KeyboardInterrupt):  # in a task it would end the loop
        getting.send(None)
    unsubscribe()
    del getting
    await until(lambda: db.snapshot().idle == 1)
    db.subscribe(lambda _: None, Acquired)
    giving = db.pool.putconn(await db.pool.getconn())
    db.subscribe(interrupt, Released)
    with pytest.raises(KeyboardInterrupt):
        giving.send(None)
    assert db.snapshot().idle == 1


async def test_a_slow_subscriber_is_told_once_and_costs_nobody_a_time_out(
    make_manager: MakeManager, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "poolkeeper")
    db = make_manager(min_size=1, name="orders")
    await db.open()

    def dawdle(event: Event) -> None:
        time.sleep(0.3)

    unsubscribe = db.subscribe(dawdle, Released)
    async with db.connection():
        # Its time is up while the subscriber sleeps; that is given back.
        waiting = asyncio.create_task(db.fetchval("select 1", timeout=0.25))
        await until(lambda: db.snapshot().waiting)
        await asyncio.sleep(0.1)
    assert await waiting == 1
    unsubscribe()
    (said,) = logged(caplog, "subscriber_slow")
    assert said["told"] == "released"
    assert said["seconds"] >= 0.3
    assert said["subscriber"].endswith("dawdle")


async def test_a_subscriber_may_ask_the_pool_and_start_work_on_it(
    make_manager: MakeManager,
) -> None:
    db = make_manager(min_size=2, max_size=2)
    totals: set[int] = set()
    answers: list[asyncio.Task[Any]] = []
    await db.open()

    def ask(event: Event) -> None:
        totals.add(db.snapshot().total)
        db.diagnose()
        if len(answers) < 3:
            answers.append(asyncio.get_running_loop().create_task(db.fetchval("select 1")))

    db.subscribe(ask, Acquired, Released, events.Queued, events.TimedOut)
    async with db.connection():
        await use(db)
    assert totals == {2}  # each connection is somewhere whenever a subscriber looks
    assert await asyncio.gather(*answers) == [1, 1, 1]


async def test_a_log_that_fails_as_well_harms_nobody(
    make_manager: MakeManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    db = make_manager(min_size=1)
    await db.open()

    def refuse(record: logging.LogRecord) -> bool:
        raise ZeroDivisionError

    def fail(event: Event) -> None:
        time.sleep(0.26)
        raise ValueError

    db.subscribe(fail, Acquired)
    logger = logging.getLogger("poolkeeper")
    logger.addFilter(refuse)
    try:
        assert await db.fetchval("select 1") == 1
    finally:
        logger.removeFilter(refuse)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_child_tells_of_its_own_life_and_not_of_its_parents(dsn: str) -> None:
    ended = run_program(
        """
        from poolkeeper import LoopMismatchError, PoolManager

        db = PoolManager(sys.argv[1], min_size=1)
        names = []
        db.subscribe(lambda event: names.append(event.event_name))

        async def child():
            async with db:
                await db.fetchval("select 1")

        async def main():
            async with db:
                async with db.connection():
                    if os.fork() == 0:
                        names.clear()
                        try:
                            await db.fetchval("select 1")
                        except LoopMismatchError:
                            pass
                        asyncio.events._set_running_loop(None)
                        run(child())
                        print("child:", *names, flush=True)
                        os._exit(0)
                    os.wait()
            print("parent:", *names, flush=True)

        run(main())
        """,
        dsn,
    )
    life_of_one = "connected opened acquired released discarded closed"
    assert ended.out.splitlines() == [
        f"child: loop_mismatch {life_of_one}",
        f"parent: {life_of_one}",
    ], ended.err


# --- what they are -------------------------------------------------------------------------------


def test_an_event_is_frozen_and_can_be_sent_elsewhere() -> None:
    caller = events.Caller("app.py:1", "main")
    event = Acquired(pool="orders", task="t", caller=caller, waited_seconds=0.0, queued=False)
    with pytest.raises(FrozenInstanceError):
        event.task = "other"  # type: ignore[misc]
    assert pickle.loads(pickle.dumps(event)) == event
    assert str(caller) == "app.py:1"


def test_what_is_logged_and_told_is_told_with_the_same_names() -> None:
    assert set(RECORDS) & set(EVENTS) == {
        "acquire_timeout", "outage_began", "outage_over", "suspected_leak",
        "suspected_leak_returned",
    }  # fmt: skip
    for name in set(RECORDS) & set(EVENTS):
        of_event = {field.name for field in fields(RECORDS[name])} - {"caller"}
        assert of_event <= set(fields_of(name)), name
    named = {record.__name__ for record in RECORDS.values()} | {"Caller", "Event"}
    assert named == set(events.__all__)


def test_the_page_has_each_event() -> None:
    page = Path(__file__).parents[2] / "docs" / "semantics.md"
    rows = re.findall(r"^\| ((?:`\w+`(?:, )?)+) \| [^|]+ \|$", page.read_text(), re.M)
    named = {name for row in rows for name in re.findall(r"`(\w+)`", row)}
    assert {record.__name__ for record in RECORDS.values()} <= named


def test_a_pool_that_nobody_listens_to_has_loaded_no_event(dsn: str) -> None:
    ended = run_program(
        """
        import poolkeeper

        async def main():
            async with poolkeeper.PoolManager(sys.argv[1], min_size=1) as db:
                await db.fetchval("select 1")
            print([name for name in sys.modules if name.startswith("poolkeeper.events")])

        run(main())
        """,
        dsn,
    )
    assert ended.out.strip() == "[]", ended.err


async def test_an_acquire_that_nobody_listens_to_takes_no_step_more(
    make_manager: MakeManager,
) -> None:
    """Counted in calls, of Python's and of C's, not in time."""
    db = make_manager(min_size=1)
    await db.open()

    async def steps() -> Counter[str]:
        # Of several, for a connection that has rested is looked at, and the
        # machine may be busy.
        return min([await steps_of_one() for _ in range(5)], key=Counter.total)

    async def steps_of_one() -> Counter[str]:
        await db.fetchval("select 1")  # once for what is found out once
        counted: Counter[str] = Counter()

        def count(frame: Any, event: str, argument: Any) -> None:
            if event in ("call", "c_call"):
                code = frame.f_code
                counted[f"{code.co_filename}:{code.co_name} {event} {argument}"] += 1

        sys.setprofile(count)
        try:
            async with db.connection():
                pass
        finally:
            sys.setprofile(None)
        return counted

    def of_events(counted: Counter[str]) -> set[str]:
        return {step for step in counted if "/_events.py" in step or "loudly" in step}

    before = await steps()
    heard = Heard(db, Acquired)
    assert of_events(await steps())
    heard.unsubscribe()
    for kind in (Closed, events.TimedOut):  # not of those that each checkout has
        Heard(db, kind)
    after = await steps()
    assert not of_events(before)
    assert sum(before.values()) == sum(after.values()) > 10
