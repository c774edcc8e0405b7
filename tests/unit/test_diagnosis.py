"""Each cause is told from the others, from the facts alone, with its evidence and advice."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from poolkeeper._diagnosis import Diagnosis, diagnose
from poolkeeper._snapshot import CheckoutRow, LoadRow, PoolSnapshot

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
        full(row(), stalled_seconds=5.0, stalled_by="<Handle cruncher()>"),
        ["stood still for 5.0 s", "<Handle cruncher()>", "PYTHONASYNCIODEBUG=1"],
    ),
    (
        "suspected-leak",
        full(row(task_done=True), row(suspected_leak=True)),
        ["2 connections were not given back, 1 of them by a task that has ended"],
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
        "too-small",
        full(
            row(held_seconds=0.05, query_seconds=0.04),
            row(held_seconds=0.04, query_seconds=0.04),
            load=LoadRow(10.0, acquires=1999, released=1990, held_seconds=99.5, query_seconds=90.0),
        ),
        ["max_size=2 is too small", "200 acquires came per second", "50.0 ms", "10.0", "to 12"],
    ),
    (
        "all-in-use",
        full(row(held_seconds=0.5, status="idle in transaction"), row(held_seconds=0.2)),
        ["all connections are in use", "1 idle in transaction, 1 idle", "held 0.5 s"],
    ),
    (
        "growing",
        room(connecting=1),
        ["still making connections", "1 connection attempt had no answer"],
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
    stalled = full(row(query_seconds=0.1), stalled_seconds=2.0)
    diagnosis = diagnose(stalled)
    assert [finding.cause for finding in diagnosis.findings][:2] == [
        "stalled-loop",
        "held-but-hardly-used",
    ]
    assert "Also: connections are held while something else is waited for." in diagnosis.detail


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
