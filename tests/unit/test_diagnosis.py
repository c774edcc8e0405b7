"""Each cause is told from the others, from the facts alone, with its evidence and advice."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from poolkeeper._diagnosis import Diagnosis, diagnose
from poolkeeper._snapshot import CheckoutRow, LoadRow, PoolSnapshot, StepRow

ROW = CheckoutRow(
    task="report-7",
    site="app/report.py:52",
    held_seconds=41.2,
    query_seconds=40.0,
    status="idle",
    status_seconds=0.1,
    backend_pid=4711,
)


def row(**fields: Any) -> CheckoutRow:
    return replace(ROW, **fields)


def full(*rows: CheckoutRow, **fields: Any) -> PoolSnapshot:
    """A pool of as many connections as there are rows, all in use, one task waiting."""
    n = len(rows)
    return PoolSnapshot("orders", "open", n, n, 0, n, 1, n, checkouts=rows, **fields)


def room(**fields: Any) -> PoolSnapshot:
    """A pool that could have four connections and has none."""
    return PoolSnapshot("orders", "open", 0, 0, 0, 4, 1, 2, **fields)


def step(doing: str, site: str, seconds: float, number: str = "returning") -> StepRow:
    return StepRow(number, doing, site, seconds)


def held_up(*steps: StepRow, **fields: Any) -> PoolSnapshot:
    """A pool of as many connections as there are steps, all being given back."""
    n = len(steps)
    return PoolSnapshot("orders", "open", n, 0, 0, n, 1, n, returning=n, steps=steps, **fields)


CASES: list[tuple[str, PoolSnapshot, list[str]]] = [
    (
        "self-deadlock",
        full(row(task_waits=True, task="a"), row(task_waits=True, task="b")),
        ["every task that holds a connection waits for another one", 'task "a"', 'task "b"'],
    ),
    (
        "server",
        room(
            last_error='password authentication failed for user "app"',
            last_error_advice="Check user and password.",
            last_error_seconds=0.2,
            attempts_failed=12,
            failing_seconds=3.0,
            next_attempt_seconds=0.05,
        ),
        ['password authentication failed for user "app"', "12 attempts failed in 3.0 s", "0.05 s"],
    ),
    (
        "stalled-loop",
        full(row(), waited_seconds=9.0, stalled_seconds=5.0, stalled_by="<Handle cruncher()>"),
        [
            "for 5.0 s of the 9.0 s that the task waited",
            "<Handle cruncher()>",
            "PYTHONASYNCIODEBUG=1",
        ],
    ),
    (
        "suspected-leak",
        full(row(task_done=True, in_block=False), row(suspected_leak=True, in_block=False)),
        ["2 connections were not given back, 1 of them by a task that has ended"],
    ),
    (
        "nested-acquire",
        full(row(task_waits=True, task="a"), row(task_waits=True, task="b"), row()),
        [
            "2 of 3 connections are held by tasks that wait for another one",
            'task "a"',
            'task "b"',
            "Pass the connection that a task holds down",
        ],
    ),
    (
        "nested-acquire",
        full(row(task_waits=True, task="a"), row()),
        ["1 of 2 connections is held by a task that waits for another one", 'task "a"'],
    ),
    (
        "several-held-by-one-task",
        full(row(held_by_task=2), row(held_by_task=2)),
        ['task "report-7" holds 2 connections', "pass the first one down"],
    ),
    (
        "held-but-hardly-used",
        full(row(query_seconds=0.3), row(query_seconds=0.3, site="app/web.py:9")),
        ["held for 82.4 s in all, in queries for 0.6 s", "app/report.py:52, app/web.py:9"],
    ),
    (
        "slow-queries",
        full(row(status="running a query", status_seconds=40.0)),
        ["queries that take long", "server process 4711", "pg_stat_activity"],
    ),
    (
        "held-up",
        held_up(step("in the reset callback", "app/db.py:7", 2.3), step("in a rollback", "", 1.1)),
        [
            "2 connections are held up before the next task can have one:"
            " in the reset callback at app/db.py:7",
            "1 connection in the reset callback at app/db.py:7, for 2.3 s; 1 connection in a"
            " rollback, for 1.1 s.",
            "what the function at this line waits for",
        ],
    ),
    (
        "held-up",
        held_up(step("in a rollback", "", 0.7), waited_seconds=1.0),
        [
            "1 connection is held up before the next task can have it: in a rollback",
            "Look at what the server does",
        ],
    ),
    (
        "all-in-use",
        held_up(step("in a rollback", "", 0.1), waited_seconds=1.0),
        ["no connection is free", "1 in a rollback. Why none of them came back"],
    ),
    (
        "too-small",
        full(
            row(held_seconds=0.05, query_seconds=0.04),
            row(held_seconds=0.04, query_seconds=0.04),
            waited_seconds=1.0,
            load=LoadRow(10.0, acquires=1999, released=1990, held_seconds=99.5, query_seconds=90.0),
        ),
        ["max_size=2 is too small", "200 acquires came per second", "50.0 ms", "90 %", "to 12"],
    ),
    (
        "all-in-use",
        full(row(held_seconds=0.5, status="idle in transaction"), row(held_seconds=0.2)),
        ["all connections are in use", "1 idle in transaction, 1 idle", "held 0.5 s"],
    ),
    (
        "all-in-use",
        full(row(held_seconds=0.5), waited_seconds=0.7),
        ["Why none of them came back in time is not known."],
    ),
    (
        "growing",
        room(connecting=1),
        ["still making connections", "1 connection attempt had no answer"],
    ),
    (
        "growing",
        room(making=1, steps=(step("in configure", "a.py:1", 0.1, "making"),)),
        ["1 connection made, and not ready yet"],
    ),
    (
        "growing",
        room(making=1, steps=(step("in the configure callback", "a.py:1", 3.0, "making"),)),
        ["still making connections: in the configure callback at a.py:1", "for 3.0 s", "this line"],
    ),
    ("none", PoolSnapshot("orders", "open", 2, 0, 2, 4, 0), ["nothing is wrong"]),
    ("not-open", PoolSnapshot("orders", "new", 0, 0, 0, 4, 0), ["the pool is new"]),
]


@pytest.mark.parametrize(("cause", "snapshot", "words"), CASES, ids=[case[0] for case in CASES])
def test_each_cause_is_named_with_its_evidence(
    cause: str, snapshot: PoolSnapshot, words: list[str]
) -> None:
    diagnosis = diagnose(snapshot)
    assert diagnosis.cause == cause
    for word in words:
        assert word in str(diagnosis)


def test_the_same_facts_give_the_same_words() -> None:
    for _, snapshot, _ in CASES:
        assert str(diagnose(snapshot)) == str(diagnose(replace(snapshot)))


def test_the_numbers_come_in_their_order() -> None:
    assert "total=1 in_use=1 idle=0 max=1 waiting=1" in diagnose(full(row())).detail


def test_a_cause_that_explains_another_comes_first() -> None:
    away = room(last_error="refused", waited_seconds=5.0, stalled_seconds=2.6)
    diagnosis = diagnose(away)
    assert [finding.cause for finding in diagnosis.findings] == ["server", "stalled-loop"]
    assert "Also: the event loop stood still for 2.6 s." in diagnosis.detail


def test_what_half_of_the_connections_are_held_for_comes_before_what_fewer_are() -> None:
    leaked = row(task_done=True, in_block=False)
    used = row(query_seconds=0.1)
    diagnosis = diagnose(full(leaked, used, used))
    assert [f.cause for f in diagnosis.findings] == ["held-but-hardly-used", "suspected-leak"]
    assert "Also: 1 connection was not given back, 1 of them by a task" in diagnosis.detail
    diagnosis = diagnose(full(leaked, leaked, used))
    assert diagnosis.cause == "suspected-leak"


def test_what_fewer_than_half_are_held_for_is_told_where_nothing_else_is_known() -> None:
    short = row(held_seconds=0.2)
    diagnosis = diagnose(full(row(task_done=True, in_block=False), short, short, short))
    assert [f.cause for f in diagnosis.findings] == ["all-in-use", "suspected-leak"]


def test_a_check_that_nobody_has_asked_for_long_is_not_named() -> None:
    refusing = room(
        checks_refused=3,
        check_error="LookupError()",
        check_failing_seconds=9.0,
        waited_seconds=5.0,
    )
    assert diagnose(replace(refusing, check_error_seconds=0.5)).cause == "check-refuses"
    assert diagnose(replace(refusing, check_error_seconds=60.0)).cause != "check-refuses"


def test_where_it_is_not_known_who_has_them_none_is_counted() -> None:
    diagnosis = diagnose(PoolSnapshot("orders", "open", 2, 2, 0, 2, 1, 2))
    assert diagnosis.cause == "all-in-use"
    assert diagnosis.findings[0].evidence == ()


# --- what is not seen in the wait is not named --------------------------------------------------

SHORT = {"held_seconds": 0.3, "query_seconds": 0.2, "status_seconds": 0.1}
BUSY = LoadRow(6.0, acquires=12, released=10, held_seconds=50.0, query_seconds=49.0)
IDLE = LoadRow(6.0, acquires=12, released=10, held_seconds=50.0, query_seconds=1.0)

CauseAndSnapshot = tuple[str, PoolSnapshot]

# The wait is of five seconds, where nothing else is said.
SEEN: dict[str, CauseAndSnapshot] = {
    "half of it": ("stalled-loop", full(row(**SHORT), stalled_seconds=2.5)),
    "failed in it": ("server", room(last_error="refused", last_error_seconds=4.0)),
    "fails every two seconds": (
        "server",
        room(last_error="no such role", last_error_seconds=1.9, waited_seconds=0.1),
    ),
    "held for half of it": ("held-but-hardly-used", full(row(held_seconds=2.6, query_seconds=0.1))),
    "held for long, as all of them are": (
        "held-but-hardly-used",
        full(row(held_seconds=1.2, query_seconds=0.1), load=IDLE),
    ),
    "past the threshold of the user's": (
        "held-but-hardly-used",
        full(row(held_seconds=0.5, query_seconds=0.0, suspected_leak=True), waited_seconds=0.3),
    ),
    "runs for half of it": (
        "slow-queries",
        full(row(held_seconds=2.6, status="running a query", status_seconds=2.6)),
    ),
    "runs for long, as all of them do": (
        "slow-queries",
        full(row(held_seconds=1.2, status="running a query", status_seconds=1.2), load=BUSY),
    ),
    "a block past the threshold with a slow query": (
        "slow-queries",
        full(row(status="running a query", status_seconds=40.0, suspected_leak=True)),
    ),
    "those who gave up had arrived": (
        "too-small",
        full(
            row(**SHORT),
            load=LoadRow(5.0, 16, released=15, held_seconds=4.8, query_seconds=4.0, gave_up=9),
        ),
    ),
}

UNSEEN: dict[str, CauseAndSnapshot] = {
    "less than half of it": ("stalled-loop", full(row(**SHORT), stalled_seconds=2.4)),
    "no time at all": ("stalled-loop", full(row(), waited_seconds=0.2, stalled_seconds=0.2)),
    "failed long before": (
        "server",
        room(last_error="refused", last_error_seconds=5.1, connecting=1),
    ),
    "as many as there may be": ("server", full(row(**SHORT), last_error="refused")),
    "held for less than half of it": (
        "held-but-hardly-used",
        full(row(held_seconds=2.4, query_seconds=0.1)),
    ),
    "held for long, but others are used": (
        "held-but-hardly-used",
        full(row(held_seconds=1.2, query_seconds=0.1), load=BUSY),
    ),
    "held while the loop stood still": (
        "held-but-hardly-used",
        full(row(held_seconds=3.0, query_seconds=0.1), stalled_seconds=2.1),
    ),
    "runs for less than half of it": (
        "slow-queries",
        full(row(held_seconds=2.6, status="running a query", status_seconds=1.2)),
    ),
    "answered, but nobody has read it": (
        "slow-queries",
        full(row(status="running a query", status_seconds=3.0), stalled_seconds=2.1),
    ),
    "one of three leaks": ("suspected-leak", full(row(task_done=True), row(), row())),
    "a block past the threshold": (
        "suspected-leak",
        full(row(suspected_leak=True, status="running a query", status_seconds=40.0)),
    ),
    "nests since just now": ("nested-acquire", full(row(**SHORT, task_waits=True), row(**SHORT))),
    "one of three nests": ("nested-acquire", full(row(task_waits=True), row(), row())),
    "two for a moment": ("several-held-by-one-task", full(row(**SHORT, held_by_task=2))),
    "as many as are needed": (
        "too-small",
        full(
            row(**SHORT),
            load=LoadRow(5.0, 16, released=15, held_seconds=4.2, query_seconds=4.0),
        ),
    ),
    "asked before a wait that was short": (
        "too-small",
        full(row(**SHORT), waited_seconds=0.1, load=LoadRow(1.0, 16, 15, 4.8, 4.0, gave_up=9)),
    ),
    "nothing is being made": ("growing", room()),
    "one is free": ("growing", replace(room(connecting=1), idle=1, total=1)),
}


def in_five_seconds(snapshot: PoolSnapshot) -> PoolSnapshot:
    return snapshot if snapshot.waited_seconds else replace(snapshot, waited_seconds=5.0)


@pytest.mark.parametrize("what", SEEN)
def test_what_is_seen_in_the_wait_is_named(what: str) -> None:
    cause, snapshot = SEEN[what]
    assert diagnose(in_five_seconds(snapshot), in_vain=True).cause == cause


@pytest.mark.parametrize("what", UNSEEN)
def test_what_is_not_seen_in_the_wait_is_not_named(what: str) -> None:
    cause, snapshot = UNSEEN[what]
    diagnosis = diagnose(in_five_seconds(snapshot), in_vain=True)
    assert diagnosis.cause != cause
    assert diagnosis.cause != "none"


def test_what_is_not_known_is_said_not_to_be() -> None:
    diagnosis = diagnose(room(), in_vain=True)
    assert diagnosis.cause == "unknown"
    assert str(diagnosis) == (
        'pool "orders" (open): no connection became free\n'
        "DETAIL:  total=0 in_use=0 idle=0 max=4 waiting=1. What kept them is not known."
    )
    assert diagnose(room()).cause == "none"  # nobody has waited in vain


times = st.floats(0.0, 100.0, allow_nan=False)
rows = st.builds(
    CheckoutRow,
    task=st.sampled_from(["a", "b"]),
    site=st.just("app.py:1"),
    held_seconds=times,
    query_seconds=times,
    status=st.sampled_from(["running a query", "idle", "idle in transaction"]),
    status_seconds=times,
    backend_pid=st.just(1),
    held_by_task=st.integers(1, 2),
    task_done=st.booleans(),
    task_waits=st.booleans(),
    in_block=st.booleans(),
    suspected_leak=st.booleans(),
)
loads = st.builds(
    LoadRow, times, *[st.integers(0, 1000)] * 2, times, times, gave_up=st.integers(0, 1000)
)


@given(
    checkouts=st.lists(rows, max_size=6).map(tuple),
    free=st.integers(0, 2),
    room_for=st.integers(0, 2),
    load=loads,
    waited=times,
    stalled=times,
    error=st.none() | st.just("refused"),
    failed=times,
    connecting=st.integers(0, 2),
)
def test_whatever_is_named_is_seen(
    checkouts: tuple[CheckoutRow, ...],
    free: int,
    room_for: int,
    load: LoadRow,
    waited: float,
    stalled: float,
    error: str | None,
    failed: float,
    connecting: int,
) -> None:
    """Of any facts, possible ones or not: a cause is named, and by what the page of docs says."""
    in_use = len(checkouts)
    total, most = in_use + free, max(1, in_use + free + room_for)
    snapshot = PoolSnapshot(
        "orders", "open", total, in_use, free, most, 1,
        checkouts=checkouts, load=load, waited_seconds=waited, stalled_seconds=stalled,
        last_error=error, last_error_seconds=failed, connecting=connecting,
    )  # fmt: skip
    diagnosis = diagnose(snapshot, in_vain=True)
    full = total >= most and not free

    def are_most(belongs: Callable[[CheckoutRow], bool]) -> bool:
        return full and sum(map(belongs, checkouts)) * 2 >= total

    def lasted(seconds: float) -> bool:
        return seconds - stalled >= 1.0

    assert {
        "self-deadlock": in_use >= most and all(r.task_waits for r in checkouts),
        "server": error is not None and total < most and failed <= max(waited, 3.0),
        "stalled-loop": stalled >= 0.25 and stalled * 2 >= waited,
        "nested-acquire": are_most(lambda r: r.task_waits),
        "suspected-leak": are_most(lambda r: r.task_done or not r.in_block),
        "several-held-by-one-task": are_most(lambda r: r.held_by_task > 1),
        "held-but-hardly-used": are_most(
            lambda r: r.used_share < 0.2 and (lasted(r.held_seconds) or r.suspected_leak)
        ),
        "slow-queries": are_most(lambda r: "running" in r.status and lasted(r.status_seconds)),
        "too-small": full and load.released > 0 and waited >= 0.25,
        "growing": total < most and not free and connecting > 0 and error is None,
        "all-in-use": full,
        "unknown": not full,
    }[diagnosis.cause]
    assert diagnosis.summary
    assert str(diagnosis) == str(diagnose(snapshot, in_vain=True))


# --- how it reads -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "snapshot",
    [
        full(row(task_waits=True), row()),
        replace(full(row(task_waits=True)), max=2),
    ],
    ids=["one holder does not wait", "there is room"],
)
def test_no_deadlock_where_somebody_could_go_on(snapshot: PoolSnapshot) -> None:
    assert diagnose(snapshot).cause != "self-deadlock"


@pytest.mark.parametrize(
    "rows",
    [
        (row(held_seconds=0.9, query_seconds=0.0),),
        (row(query_seconds=20.0),),
        (row(query_seconds=0.1), row(), row()),
    ],
    ids=["not for long", "used half of the time", "one of three"],
)
def test_a_connection_that_works_is_not_called_hardly_used(rows: tuple[CheckoutRow, ...]) -> None:
    assert diagnose(full(*rows)).cause != "held-but-hardly-used"


def test_a_server_that_fails_now_and_then_is_not_blamed_for_a_full_pool() -> None:
    assert diagnose(full(row(), last_error="refused")).cause == "all-in-use"


def test_a_pool_that_is_large_enough_is_not_called_too_small() -> None:
    load = LoadRow(10.0, acquires=100, released=100, held_seconds=10.0, query_seconds=9.0)
    assert diagnose(full(row(held_seconds=0.1), row(held_seconds=0.1), load=load)).cause != (
        "too-small"
    )


def test_a_checkout_that_was_not_held_yet_is_not_divided_by() -> None:
    assert row(held_seconds=0.0, query_seconds=0.0).used_share == 1.0
    assert LoadRow(0.0, 0, 0, 0.0, 0.0).arrivals_per_second == 0.0
    assert LoadRow(0.0, 0, 0, 0.0, 0.0).mean_held_seconds == 0.0


def test_long_lists_are_cut() -> None:
    rows = [row(task=f"t{n}") for n in range(5)]
    assert "; and 2 more." in diagnose(full(*rows)).detail


def test_a_diagnosis_of_nothing_has_nothing_to_say() -> None:
    snapshot = PoolSnapshot("orders", "open", 2, 0, 2, 4, 0)
    diagnosis = Diagnosis(snapshot, ())
    assert (diagnosis.evidence, diagnosis.advice) == ((), "")


def test_a_pool_without_trouble_is_described_without_advice() -> None:
    diagnosis = diagnose(PoolSnapshot("orders", "open", 4, 1, 3, 4, 0, 4, checkouts=(row(),)))
    assert str(diagnosis) == (
        'pool "orders" (open): nothing is wrong\nDETAIL:  total=4 in_use=1 idle=3 max=4 waiting=0.'
    )


def test_a_server_that_is_away_is_told_of_without_an_attempt_that_is_due() -> None:
    snapshot = room(last_error="Connection refused", attempts_failed=1, next_attempt_seconds=None)
    diagnosis = diagnose(snapshot)
    assert diagnosis.cause == "server"
    assert len(diagnosis.evidence) == 2
    assert "due" not in str(diagnosis)
