"""The soak runs, passes, and would not if something were wrong."""

from __future__ import annotations

import asyncio
import gc
import os
import subprocess
import sys
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg.rows import dict_row

from tests.soak import report
from tests.soak.clients import Oops, Visit, one_shot, reader
from tests.soak.leftovers import Sample, grows
from tests.soak.outside import Outside
from tests.soak.run import Soak

ROOT = Path(__file__).parents[2]

kept: list[Any] = []
"""What a fault leaves behind."""


@pytest.fixture(scope="module")
def outside() -> Iterator[Outside]:
    """A server and a network for all of these tests."""
    with Outside() as outside:
        yield outside


@pytest.fixture(autouse=True)
def nothing_kept() -> Iterator[None]:
    """Hide what other tests have left in this process, and let go of what a fault has kept."""
    gc.collect()
    gc.freeze()  # gc.get_objects(), by which the soak counts, finds none of it
    yield
    for thing in kept:
        if hasattr(thing, "finish"):
            thing.finish()
        elif hasattr(thing, "close"):
            thing.close()
    kept.clear()


@pytest.mark.fault
def test_a_short_soak_passes_and_says_how_to_run_it_again(loop_name: str) -> None:
    """What `make soak` runs, for a few seconds."""
    ended = subprocess.run(
        [sys.executable, "-m", "tests.soak", "--time", "4", "--seed", "1", "--loop", loop_name],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert f"again: make soak TIME=4 SEED=1 LOOP={loop_name}" in ended.stdout
    assert "passed: the sums balance" in ended.stdout
    for what in ("transfers committed", "cancel twice", "memory: at the end"):
        assert what in ended.stdout


# --- faults: one for each thing that must hold --------------------------------------------------


async def steals(visit: Visit) -> None:
    await visit.db.execute("update accounts set balance = balance - 1 where id = 1")


async def forges(visit: Visit) -> None:
    await visit.db.execute("insert into transfers values (-1, 1, 2, 0) on conflict do nothing")


async def loses(visit: Visit) -> None:
    number = visit.book.money.begins(visit.token)
    visit.book.money.tell(number, "committed")


async def commits_what_failed(visit: Visit) -> None:
    number = visit.book.money.begins(visit.token)
    await visit.db.execute("insert into transfers values (%s, 1, 2, 0)", (number,))


async def reads_a_strangers_row(visit: Visit) -> None:
    visit.owns([("somebody 1", 1)], 1)


async def dirties_the_template(visit: Visit) -> None:
    async with visit.db.connection() as conn:
        conn._session._fixed["row_factory"] = dict_row


async def has_a_mistake(visit: Visit) -> None:
    _ = visit.nothing  # type: ignore[attr-defined]


async def ends_by_an_error_without_a_reason(visit: Visit) -> None:
    raise psycopg.OperationalError("the connection is lost")


async def leaves_a_task(visit: Visit) -> None:
    kept.append(asyncio.create_task(asyncio.sleep(3600)).get_coro())


async def leaves_an_error_that_nobody_sees(visit: Visit) -> None:
    async def fails() -> None:
        raise Oops

    await asyncio.wait({asyncio.create_task(fails())})


async def leaves_a_descriptor(visit: Visit) -> None:
    kept.append(Path(os.devnull).open())  # noqa: SIM115


async def leaves_a_session(visit: Visit) -> None:
    if not kept:
        conn = await psycopg.AsyncConnection.connect(visit.book.dsn, user="plain")
        kept.append(conn.pgconn)


async def keeps_a_handle(visit: Visit) -> None:
    async with visit.db.connection() as conn:
        kept.append((conn,))


async def keeps_a_connection(visit: Visit) -> None:
    if not kept:
        kept.append((await visit.db.pool.getconn(),))


async def hangs(visit: Visit) -> None:
    await asyncio.Event().wait()


FAULTS: dict[Callable[[Visit], Awaitable[None]], str] = {
    steals: "the sum of all accounts is",
    forges: "transfer -1 is on the server, and nobody made it",
    loses: "which was told to be committed, is not on the server",
    commits_what_failed: "which was told to be rolled back, is on the server",
    reads_a_strangers_row: "asked for 1 rows and got 1: [('somebody 1', 1)]",
    dirties_the_template: "a borrower's attributes are there for the next",
    has_a_mistake: "fault ended with AttributeError",
    ends_by_an_error_without_a_reason: "fault ended with OperationalError",
    leaves_a_task: "left over when the pools are closed: <Task pending",
    leaves_an_error_that_nobody_sees: "the loop says: Task exception was never retrieved",
    leaves_a_descriptor: "left over when the pools are closed: ",
    leaves_a_session: "left over when the pools are closed: sessions on the server",
    keeps_a_handle: "BoundConnection for",
    keeps_a_connection: "a pool has no rest",
    hangs: "fault hangs",
}


@pytest.mark.fault
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_what_must_not_be_is_told(
    fault: Callable[[Visit], Awaitable[None]], outside: Outside, loop_name: str
) -> None:
    """A client that does it, among others, makes the soak fail."""
    works = {"fault": (1, fault), "one-shot": (1, one_shot), "reader": (1, reader)}
    for seconds in (0.4, 2, 10):  # a busy machine may not come to it at once
        soak = Soak(outside, seconds, 1, works=works, regulars=2, patience=1, rounds=("quiet",))
        soak.run()
        told = [violation.what for violation in soak.book.violations]
        if told:
            break
    assert any(FAULTS[fault] in what for what in told), told
    assert "VIOLATION 1: " in report.text(soak, loop_name)
    assert "FAILED: " in report.verdict(soak)


@pytest.mark.fault
def test_without_a_fault_the_same_passes(outside: Outside) -> None:
    """So it was the faults that were told."""
    works = {"one-shot": (1, one_shot), "reader": (1, reader)}
    soak = Soak(outside, 0.4, 1, works=works, regulars=2, rounds=("quiet",))
    soak.run()
    assert not soak.book.violations
    assert soak.book.operations
    assert "passed" in report.verdict(soak)


def test_memory_that_grows_is_told_and_noise_is_not() -> None:
    """The second half of a run decides, if it is long enough."""

    def run(seconds: float, rate: float) -> str | None:
        noise = [0.0, 0.6, 0.1, 0.7, 0.3]
        samples = [
            Sample(t, t, 50 + min(t, 120) / 10 + rate * t / 60 + noise[t % 5], 40_000)
            for t in range(0, int(seconds), 12)
        ]
        return grows(samples, seconds)

    assert run(900, 0) is None
    assert "memory grew by 4." in str(run(900, 0.6))
    assert "memory grew by 6." in str(run(3600, 0.2))
    assert run(60, 10) is None
