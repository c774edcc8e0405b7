"""
What is told of a pool: its numbers, a snapshot, the facts of one moment.

Only reads, and never the network: it may be asked at any time, from any thread, of a pool that is
exhausted, closing or not open at all.
"""

from __future__ import annotations

from collections.abc import Container
from time import monotonic

from . import _diagnosis
from ._config import shown_size
from ._life import Life
from ._moment import Moment, note_held, note_waiting
from ._no_life import NoLife, State
from ._snapshot import PoolSnapshot
from .errors import OpenError, see


def counts(life: Life | NoLife) -> dict[str, int]:
    """
    Return total, in use, idle, max and waiting, in that order. Instantaneous.

    After them those of making, returning and checking that are not 0.
    """
    if isinstance(life, NoLife):
        return {"total": 0, "in_use": 0, "idle": 0, "max": life.max_size, "waiting": 0}
    in_use, idle = len(life.held), len(life.idle)
    others = _counts_between(life)
    return {
        "total": in_use + idle + others["returning"] + others["checking"],
        "in_use": in_use,
        "idle": idle,
        "max": life.max_size,
        "waiting": len(life.line),
        **{name: number for name, number in others.items() if number},
    }


def _counts_between(life: Life) -> dict[str, int]:
    """Return how many connections are being made, given back and checked."""
    return {
        "making": life.connector.pending,
        "returning": life.between.count("returning"),
        "checking": life.between.count("checking") + life.line.handed_over(),
    }


def numbers(life: Life | NoLife) -> str:
    """Return the numbers of `counts()` in words."""
    return " ".join(f"{name}={value}" for name, value in counts(life).items())


def measures(life: Life | NoLife) -> dict[str, int]:
    """Return what psycopg_pool tells of this moment beside what it counts, under its keys."""
    # psycopg_pool counts those that it is going to make before it is opened.
    size, available, waiting = life.min_size if life.state is State.NEW else 0, 0, 0
    if isinstance(life, Life):
        size, available, waiting = life.total, len(life.idle), len(life.line)
    return {
        "pool_min": life.min_size,
        "pool_max": shown_size(life.max_size),
        "pool_size": size,
        "pool_available": available,
        "requests_waiting": waiting,
    }


def unanswered(life: Life) -> int:
    """Return how many attempts wait for a server's answer."""
    return sum(attempt.asks_server for attempt in list(life.connector.attempts))


def snapshot(life: Life | NoLife) -> PoolSnapshot:
    """Return the facts of this moment as users see them."""
    if isinstance(life, NoLife) and life.facts is not None:
        return life.facts()
    if isinstance(life, NoLife) or life.gone:
        state = "closed" if isinstance(life, Life) else life.state.value
        return PoolSnapshot(life.name, state, 0, 0, 0, life.max_size, 0, life.min_size)
    return moment(life).snapshot()


def moment(life: Life, gave_up: Container[object] = ()) -> Moment:
    """
    Note the facts of this moment.

    Args:
        life: The life of the pool.
        gave_up: Tasks that have waited until now.
    """
    now = monotonic()
    held = life.ledger.longest_first()
    idle = len(life.idle)
    others = _counts_between(life)
    connector = life.connector
    failure = connector.last_failure
    return Moment(
        now,
        {
            "name": life.name,
            "state": life.state.value,
            "total": len(held) + idle + others["returning"] + others["checking"],
            "in_use": len(held),
            "idle": idle,
            "max": life.max_size,
            "waiting": len(life.line),
            "min": life.min_size,
            **others,
            "opened": life.opened,
            "steps": life.between.rows(connector.attempts),
            "connecting": unanswered(life),
            "attempts_failed": connector.failures,
            "last_error": failure.words if failure else None,
            "last_error_advice": failure.advice if failure else "",
            "last_error_seconds": now - connector.last_failed if failure else 0.0,
            "failing_seconds": now - connector.failing_since if failure else 0.0,
            "next_attempt_seconds": connector.next_attempt_seconds,
            "stalled_by": life.slow_callbacks.last if life.slow_callbacks else "",
            **life.checks.facts(now),
        },
        note_held(held, life.line.tasks, gave_up),
        note_waiting(life.line.first(100)),
        life.ledger.load(),
        life.clock.stalls,
    )


def diagnose(life: Life | NoLife) -> _diagnosis.Diagnosis:
    """Return why connections are short, from a `snapshot()` of this moment."""
    return _diagnosis.diagnose(snapshot(life))


def open_error(life: Life, timeout: float | None) -> OpenError:
    """Return why the pool could not be opened: *timeout* seconds passed, or it never will."""
    failed = life.connector.last_failure
    why, hint = _why_not_open(life)
    verb = "cannot open" if timeout is None else "could not open"
    within = "" if timeout is None else f" within {timeout:.2f} s"
    error = OpenError(
        f'{verb} pool "{life.name}"{within}: {why}',
        detail=f"{life.prepared} of {life.min_size} connections were made,"
        f" {_attempts(life.connector.failures)} failed, {unanswered(life)} had no answer yet."
        f" Opened {life.opened}.",
        hint=f"{hint} {see('open')}",
    )
    if failed is not None:
        error.__cause__ = failed.error
        error.kind = failed.kind
    return error


def _why_not_open(life: Life) -> tuple[str, str]:
    """Return why, and what to do."""
    failed = life.connector.last_failure
    if failed is not None:
        return failed.words, failed.advice
    in_functions = [a for a in life.connector.attempts if a.function is not None]
    if in_functions:
        longest = min(in_functions, key=lambda attempt: attempt.since).row(monotonic())
        at = f" at {longest.site}" if longest.site else ""
        return (
            f"a connection is {longest.doing}{at} for {longest.seconds:.1f} s by now",
            "Look at what that function waits for, and give it a time-out.",
        )
    if unanswered(life):
        return (
            "the server does not answer",
            "Something accepts the connection, or drops its packets, and says nothing:"
            " check host and port, and whether a firewall or proxy stands between.",
        )
    return (
        f"{life.prepared} of {life.min_size} connections are ready",
        "Give open() more time, or ask for fewer connections with min_size.",
    )


def _attempts(number: int) -> str:
    return f"{number} attempt{'' if number == 1 else 's'}"
