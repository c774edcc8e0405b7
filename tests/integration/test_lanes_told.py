"""What is told of one-shots that share a connection: to subscribers, and so to metrics."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable
from time import monotonic
from typing import Any

import pytest

from poolkeeper import PoolManager, events
from poolkeeper.events import Acquired, Event, GaveUp, Queued, Released
from poolkeeper.live._observer import Observer
from poolkeeper.sizing import record
from poolkeeper.telemetry._metrics import SITE_USE_TIME, SITE_WAIT_TIME, Metric, Recorder
from tests.support.lanes import PLAIN, READ, know, locked, trust
from tests.support.server import admin

HERE = "tests/integration/test_lanes_told.py"


@pytest.fixture
def table(database: str) -> str:
    """A database with a table t: n is 1, 2, 3."""
    admin(database, "create table t (n int unique)")
    admin(database, "insert into t select generate_series(1, 3)")
    return database


@pytest.fixture
async def one(table: str) -> AsyncIterator[PoolManager[Any]]:
    """A manager with one connection, which knows two statements as quick."""
    async with PoolManager(table, min_size=1, max_size=1, name="orders", timeout=20) as db:
        await know(db, READ, PLAIN)
        yield db


@pytest.fixture
def trusting(monkeypatch: pytest.MonkeyPatch) -> None:
    """No statement is slow."""
    trust(monkeypatch)


class Heard:
    """A subscriber that remembers what it is told of each task."""

    def __init__(self, db: PoolManager[Any]) -> None:
        self.all: list[Any] = []
        kinds = Queued, Acquired, Released, GaveUp, events.TimedOut
        self.unsubscribe = db.subscribe(self, *kinds)

    def __call__(self, event: Event) -> None:
        self.all.append(event)

    def of(self, task: str) -> list[Any]:
        return [event for event in self.all if event.task == task]

    def names(self, task: str) -> list[str]:
        return [event.event_name for event in self.of(task)]


async def number(db: PoolManager[Any], n: int) -> int:
    return int(await db.fetchval(PLAIN, (n,)))


@pytest.mark.usefixtures("trusting")
async def test_each_one_shot_is_told_by_itself_whoever_shares_its_connection(
    one: PoolManager[Any], table: str
) -> None:
    heard = Heard(one)
    began = monotonic()
    with locked(table):
        head = asyncio.create_task(one.fetchall(READ), name="head")
        await asyncio.sleep(0)
        others = [asyncio.create_task(number(one, n), name=str(n)) for n in range(20)]
        await asyncio.sleep(0.1)
        assert [len(heard.of(str(n))) for n in range(20)] == [1] * 20
    await asyncio.gather(head, *others)
    seconds = monotonic() - began
    for n in range(20):
        placed = n < 15  # the others wait in line, until there is a place
        acquired, released = heard.of(str(n))[-2:]
        assert heard.names(str(n)) == [*([] if placed else ["queued"]), "acquired", "released"]
        assert (acquired.shared and released.shared) or not placed
        assert acquired.queued is not placed
        assert acquired.waited_seconds == 0.0 if placed else acquired.waited_seconds > 0.05
        assert released.held_seconds > (0.05 if placed else 0)
        assert released.held_seconds >= released.query_seconds > 0
        assert released.exchanges == 1
        for event in acquired, released:
            assert event.caller.site.startswith(f"{HERE}:")
            assert event.caller.function == "number"
    acquired, released = heard.of("head")
    assert (acquired.shared, acquired.waited_seconds, released.shared) == (False, 0.0, True)
    assert released.held_seconds >= released.query_seconds > 0.05
    assert acquired.caller == released.caller
    # What the server needs for one is not told of those behind it as well.
    told = [event for event in heard.all if isinstance(event, Released)]
    assert sum(event.used_seconds for event in told) <= seconds
    assert sum(event.held_seconds for event in told) > 15 * 0.1


async def test_one_that_has_its_connection_to_itself_is_told_as_ever(
    one: PoolManager[Any],
) -> None:
    heard = Heard(one)
    await one.fetchval(PLAIN, (1,))
    await one.execute("insert into t values (4)")
    await one.fetchval("show port")
    assert [event.event_name for event in heard.all] == ["acquired", "released"] * 3
    assert not any(event.shared for event in heard.all)
    for released in heard.all[1::2]:
        assert released.used_seconds == released.held_seconds
        assert released.held_seconds >= released.query_seconds > 0
        assert released.exchanges >= 1


async def test_one_that_is_sent_again_elsewhere_is_told_to_come_back_and_ask_again(
    table: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("poolkeeper._lane.LONG", 60.0)
    monkeypatch.setattr("poolkeeper._lane.TURN", 60.0)
    async with PoolManager(table, min_size=1, max_size=1, timeout=20) as db:
        await know(db, READ, PLAIN)
        heard = Heard(db)
        with locked(table):
            head = asyncio.create_task(db.fetchall(READ))
            await asyncio.sleep(0)
            other = asyncio.create_task(number(db, 7), name="other")
            async with asyncio.timeout(20):
                while "queued" not in heard.names("other"):
                    await asyncio.sleep(0.005)
        assert (len(await head), await other) == (3, 7)
    names = ["acquired", "released", "queued", "acquired", "released"]
    assert heard.names("other") == names
    acquired, moved, _, again, released = heard.of("other")
    assert (acquired.shared, moved.shared) == (True, True)
    assert moved.query_seconds == 0  # the server was not at it
    assert again.waited_seconds > 0
    assert released.query_seconds > 0


@pytest.mark.usefixtures("trusting")
async def test_one_that_is_cancelled_on_its_way_is_told_to_have_come_back(
    one: PoolManager[Any], table: str
) -> None:
    heard = Heard(one)
    with locked(table):
        tasks = [asyncio.create_task(one.fetchall(READ), name="head")]
        await asyncio.sleep(0)
        tasks += [asyncio.create_task(number(one, n), name=str(n)) for n in range(16)]
        await asyncio.sleep(0)
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
    for n in range(15):
        assert heard.names(str(n)) == ["acquired", "released"]
    assert heard.names("15") == ["queued", "gave_up"]
    assert heard.of("15")[-1].why == "cancelled"
    assert heard.names("head") == ["acquired", "released"]
    assert heard.of("head")[-1].query_seconds > 0


async def test_who_subscribes_meanwhile_is_told_of_none_that_had_its_place(
    one: PoolManager[Any], table: str
) -> None:
    with locked(table):
        head = asyncio.create_task(one.fetchall(READ))
        await asyncio.sleep(0.05)
        heard = Heard(one)
    await head
    assert not heard.all
    heard.unsubscribe()
    await number(one, 1)
    assert not heard.all


async def test_all_that_is_told_of_many_fits_together(one: PoolManager[Any]) -> None:
    """So that what counts in and out by it ends at none."""
    heard = Heard(one)
    tasks = [asyncio.create_task(number(one, n), name=str(n)) for n in range(100)]
    await asyncio.sleep(0.001)
    for task in tasks[::7]:
        task.cancel()
    await asyncio.wait(tasks)
    for n in range(100):
        states = {"": "", "queued": "a g", "acquired": "r", "released": "q", "gave_up": ""}
        names = heard.names(str(n))
        for before, after in zip(["", *names], names, strict=False):
            assert not before or after[0] in states[before], names
        assert not names or names[-1] in ("released", "gave_up"), names
    counted = Counter(event.event_name for event in heard.all)
    assert counted["acquired"] == counted["released"] > 50


# --- those who listen ----------------------------------------------------------------------------


@pytest.mark.usefixtures("trusting")
async def test_metrics_have_each_one_shot_under_its_own_line(
    one: PoolManager[Any], table: str
) -> None:
    recorded: dict[tuple[str, str], list[float]] = {}

    def bind(metric: Metric, attributes: Any) -> Callable[[float], object]:
        key = metric.name, attributes.get("code.function.name", "")
        return recorded.setdefault(key, []).append

    one.subscribe(Recorder("orders", 10, bind))
    began = monotonic()

    async def read() -> Any:
        return await one.fetchall(READ)

    with locked(table):
        head = asyncio.create_task(read())
        await asyncio.sleep(0)
        others = [asyncio.create_task(number(one, n)) for n in range(20)]
        await asyncio.sleep(0.1)
    await asyncio.gather(head, *others)
    seconds = monotonic() - began
    waits, uses = (recorded[m.name, "number"] for m in (SITE_WAIT_TIME, SITE_USE_TIME))
    assert len(waits) == len(uses) == 20
    assert sum(wait > 0.05 for wait in waits) == 5
    assert sum(uses) <= seconds  # so it is said which line the pool has to do with, and how much
    (of_head,) = recorded[SITE_USE_TIME.name, "read"]
    assert of_head > 0.05
    assert len(recorded["db.client.connection.wait_time", ""]) == 21
    assert len(recorded["db.client.connection.use_time", ""]) == 21


@pytest.mark.usefixtures("trusting")
async def test_who_watches_and_who_records_sees_one_connection_at_work(
    one: PoolManager[Any], table: str
) -> None:
    observer = Observer(one)
    recording = record(one)
    began = monotonic()
    with locked(table):
        head = asyncio.create_task(one.fetchall(READ))
        await asyncio.sleep(0)
        others = [asyncio.create_task(number(one, n)) for n in range(20)]
        await asyncio.sleep(0.2)
        ((held,), waiting) = (observer.state()[name] for name in ("checkouts", "waiters"))
        assert held["now"] == "running a query, 15 behind it"
        assert held["asker"].startswith(f"{HERE}:")
        assert held["status_seconds"] > 0.1
        assert len(waiting) == 5
    await asyncio.gather(head, *others)
    seconds = monotonic() - began
    state = observer.state()
    assert max(in_use for _, in_use, *_ in state["history"]) == 1
    assert max(waiting for _, _, waiting, *_ in state["history"]) == 5
    assert sum(acquired for _, _, _, acquired, *_ in state["history"]) == 21
    assert sum(in_vain for *_, in_vain, _, _ in state["history"]) == 0
    assert {site["number"] for site in state["sites"]} == {1, 20}
    observer.stop()
    uses = recording.workload().uses
    assert len(uses) == 21
    assert 0.2 < sum(use.hold for use in uses) <= seconds  # not 16 times as long
    assert recording.gave_up == 0
