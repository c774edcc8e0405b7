"""
From facts to words: why nobody gets a connection.

Pure: the same snapshot gives the same words. Each rule below looks for one cause and, where it
finds it, says how it knows and what to do. The causes are tried in the order in which one of
them explains the others: a server that is away explains an empty pool, a stalled loop explains
connections that are held long.

A cause is named only if it can be seen in the wait that it is to explain: a stall took half of
it, the server failed in it, what the connections were held for went on for half of it or is what
they were held for all the time, and half of them were. Where that is so of fewer, it is told
after "Also:"; where nothing is seen, that is what is said.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import ceil
from typing import TypeAlias

from ._snapshot import CheckoutRow, PoolSnapshot, StepRow

HARDLY_USED = 0.2
"""Below this share of its time a connection counts as held for something else."""

HELD_LONG = 1.0
"""Seconds below which no single checkout is called long."""

STALL = 0.25
"""Seconds that the loop must stand still to be named as a cause."""

TELLING = 0.25
"""Seconds of a wait from which the load meanwhile says something."""

PROBED = 3.0
"""Seconds after a failed attempt in which the server is still known to fail."""

_NAMED = 3  # rows that are shown one by one


@dataclass(frozen=True, slots=True)
class Finding:
    """One cause, how it is known, and what to do about it."""

    cause: str
    """Stable name, such as ``"self-deadlock"``; the anchor of its docs."""

    summary: str
    """The cause in half a sentence."""

    evidence: tuple[str, ...]
    advice: str


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """
    Why connections are short, the likely cause first.

    ``str()`` gives all of it in lines; it is what `AcquireTimeout` prints.

    .. versionadded:: 0.1.0
    """

    snapshot: PoolSnapshot
    findings: tuple[Finding, ...]

    @property
    def cause(self) -> str:
        """Name of the likely cause; ``"none"`` if nothing is wrong."""
        return self.findings[0].cause if self.findings else "none"

    @property
    def summary(self) -> str:
        """The likely cause in half a sentence."""
        return self.findings[0].summary if self.findings else "nothing is wrong"

    @property
    def evidence(self) -> tuple[str, ...]:
        """How the likely cause is known."""
        return self.findings[0].evidence if self.findings else ()

    @property
    def advice(self) -> str:
        """What to do about the likely cause."""
        return self.findings[0].advice if self.findings else ""

    @property
    def detail(self) -> str:
        """The numbers and the evidence, in sentences."""
        sentences = [f"{self.snapshot.numbers()}.", *self.evidence]
        sentences += [f"Also: {finding.summary}." for finding in self.findings[1:]]
        return " ".join(sentences)

    def __str__(self) -> str:
        snapshot = self.snapshot
        lines = [f'pool "{snapshot.name}" ({snapshot.state}): {self.summary}']
        lines.append(f"DETAIL:  {self.detail}")
        if self.advice:
            lines.append(f"HINT:  {self.advice}")
        return "\n".join(lines)


def diagnose(snapshot: PoolSnapshot, in_vain: bool = False) -> Diagnosis:
    """
    Return what *snapshot* says about why connections are short.

    Args:
        snapshot: The facts.
        in_vain: True if a task did not get a connection, so that there is a cause.
    """
    if snapshot.state in ("new", "closing", "closed"):
        advice = "Open it with await manager.open()."
        not_open = Finding("not-open", f"the pool is {snapshot.state}", (), advice)
        return Diagnosis(snapshot, (not_open,))
    kinds = [kind for rule in _KINDS if (kind := rule(snapshot)) is not None]
    found = [finding for rule in _FIRST if (finding := rule(snapshot)) is not None]
    found += (finding for finding, number in kinds if _is_most(number, snapshot))
    found += (finding for rule in _RULES if (finding := rule(snapshot)) is not None)
    if not found and (known := _in_use(snapshot)) is not None:
        found.append(known)
    if not found and in_vain:
        found.append(_UNKNOWN)
    found += (finding for finding, number in kinds if not _is_most(number, snapshot))
    return Diagnosis(snapshot, tuple(found))


def _is_full(s: PoolSnapshot) -> bool:
    """Tell whether there are as many connections as there may be, and none is free."""
    return s.total >= s.max and not s.idle


def _is_most(number: int, s: PoolSnapshot) -> bool:
    return number * 2 >= s.total


def _is_long(seconds: float, s: PoolSnapshot, always: bool = False) -> bool:
    """
    Tell whether *seconds* are long, and much of the wait.

    Args:
        seconds: How long something goes on.
        s: The facts.
        always: True if it is known to have been so all the time.
    """
    # While the loop stands still everything goes on for long.
    seconds -= s.stalled_seconds
    return seconds >= HELD_LONG and (always or seconds >= s.waited_seconds / 2)


# --- what explains all the rest -----------------------------------------------------------------


def _self_deadlock(s: PoolSnapshot) -> Finding | None:
    if not s.checkouts or s.in_use < s.max or not all(row.task_waits for row in s.checkouts):
        return None
    return Finding(
        "self-deadlock",
        "every task that holds a connection waits for another one",
        (_list("Held", s.checkouts),),
        "Pass the connection that a task holds down to what it calls, instead of acquiring a"
        " second one. No max_size is enough for tasks that acquire while they hold.",
    )


def _server(s: PoolSnapshot) -> Finding | None:
    if s.last_error is None or s.total >= s.max:
        return None
    if s.last_error_seconds > max(s.waited_seconds, PROBED):
        return None  # nobody has asked it since
    evidence = [
        f"The last attempt failed {s.last_error_seconds:.1f} s ago: {s.last_error}.",
        f"{_number(s.attempts_failed, 'attempt')} failed in {s.failing_seconds:.1f} s.",
    ]
    if s.next_attempt_seconds is not None:
        evidence.append(f"The next one is due in {s.next_attempt_seconds:.2f} s.")
    return Finding(
        "server",
        f"no connection can be made: {s.last_error}",
        tuple(evidence),
        s.last_error_advice,
    )


def _stalled(s: PoolSnapshot) -> Finding | None:
    if s.stalled_seconds < max(STALL, s.waited_seconds / 2):
        return None
    ran = f" It was running {s.stalled_by}." if s.stalled_by else ""
    return Finding(
        "stalled-loop",
        f"the event loop stood still for {s.stalled_seconds:.1f} s",
        (
            f"Nothing on the loop ran for {s.stalled_seconds:.1f} s of the {s.waited_seconds:.1f} s"
            f" that the task waited: neither a release nor an acquire could go on.{ran}",
        ),
        "Find the blocking call: run with asyncio debug mode (PYTHONASYNCIODEBUG=1), and move it"
        " to asyncio.to_thread().",
    )


def _check_refuses(s: PoolSnapshot) -> Finding | None:
    if not s.checks_refused or s.check_failing_seconds * 2 < s.waited_seconds:
        return None
    if s.check_error_seconds > max(s.waited_seconds, HELD_LONG):
        return None  # nobody has asked it since
    at = f" at {s.check_site}" if s.check_site else ""
    return Finding(
        "check-refuses",
        f"the check callback refuses the connections: {s.check_error}",
        (
            f"The check callback{at} has refused {_number(s.checks_refused, 'connection')} in a"
            f" row, in {s.check_failing_seconds:.1f} s; the last {s.check_error_seconds:.1f} s ago:"
            f" {s.check_error}.",
        ),
        "Correct the callback, or what it finds: a connection that works and is refused is offered"
        " again.",
    )


_FIRST: tuple[Callable[[PoolSnapshot], Finding | None], ...] = (
    _self_deadlock,
    _server,
    _check_refuses,
    _stalled,
)


# --- what connections are held for --------------------------------------------------------------
#
# Each returns with its finding how many of them that is.

_Kind: TypeAlias = "tuple[Finding, int] | None"


def _held_through(s: PoolSnapshot, belongs: Callable[[CheckoutRow], bool]) -> list[CheckoutRow]:
    """Return which of the connections that were held for half of the wait are of a kind."""
    if not _is_full(s):
        return []
    return [row for row in s.checkouts if row.held_seconds * 2 >= s.waited_seconds and belongs(row)]


def _nested(s: PoolSnapshot) -> _Kind:
    rows = _held_through(s, lambda row: row.task_waits)
    if not rows or len(rows) == s.max:  # then it is a self-deadlock
        return None
    one = len(rows) == 1
    return Finding(
        "nested-acquire",
        f"{len(rows)} of {_number(s.max, 'connection')} {'is' if one else 'are'} held by"
        f" {'a task that waits' if one else 'tasks that wait'} for another one",
        (_list("Held", rows),),
        "Pass the connection that a task holds down to what it calls, instead of acquiring a"
        " second one. No max_size is enough for tasks that acquire while they hold.",
    ), len(rows)


def _is_leaked(row: CheckoutRow) -> bool:
    # A block gives back what it holds, however late.
    return row.task_done or (row.suspected_leak and not row.in_block)


def _leaked(s: PoolSnapshot) -> _Kind:
    rows = _held_through(s, _is_leaked)
    if not rows:
        return None
    done = sum(row.task_done for row in rows)
    summary = (
        f"{_number(len(rows), 'connection')} {'was' if len(rows) == 1 else 'were'}"
        " not given back" + (f", {done} of them by a task that has ended" if done else "")
    )
    return Finding(
        "suspected-leak",
        summary,
        (_list("Suspected", rows),),
        'Acquire with "async with manager.connection()": what getconn() took, putconn() must give'
        " back on every path.",
    ), len(rows)


def _several_by_one_task(s: PoolSnapshot) -> _Kind:
    rows = _held_through(s, lambda row: row.held_by_task > 1 and not _is_leaked(row))
    if not rows:
        return None
    worst = max(rows, key=lambda row: row.held_by_task)
    return Finding(
        "several-held-by-one-task",
        f'task "{worst.task}" holds {worst.held_by_task} connections',
        (_list("Held", rows),),
        f'Task "{worst.task}" holds {worst.held_by_task} connections; pass the first one down.',
    ), len(rows)


_KINDS: tuple[Callable[[PoolSnapshot], _Kind], ...] = (_nested, _leaked, _several_by_one_task)


# --- what else makes them short -----------------------------------------------------------------


def _hardly_used(s: PoolSnapshot) -> Finding | None:
    load = s.load
    always = load.mean_held_seconds >= HELD_LONG and load.used_share < HARDLY_USED
    rows = [
        row
        for row in s.checkouts
        if row.used_share < HARDLY_USED
        and (_is_long(row.held_seconds, s, always) or row.suspected_leak)
        and not _is_leaked(row)
        and not row.task_waits
    ]
    if not rows or not _is_full(s) or not _is_most(len(rows), s):
        return None
    askers = Counter(map(_asker, rows))
    lines = ", ".join(f"{who} ({n}x)" if n > 1 else who for who, n in askers.most_common(_NAMED))
    held = sum(row.held_seconds for row in rows)
    used = sum(row.query_seconds for row in rows)
    return Finding(
        "held-but-hardly-used",
        "connections are held while something else is waited for",
        (
            f"{_number(len(rows), 'connection')} held for {held:.1f} s in all, in queries for"
            f" {used:.1f} s of it, acquired at {lines}.",
            _list("Longest", rows),
        ),
        "Probably an HTTP call, a streamed response or a lock inside the block: give the"
        " connection back before it, and acquire again after it.",
    )


def _running(s: PoolSnapshot) -> Finding | None:
    load = s.load
    always = load.mean_held_seconds >= HELD_LONG and load.used_share >= 0.5
    rows = [
        row
        for row in s.checkouts
        if row.status == "running a query" and _is_long(row.status_seconds, s, always)
    ]
    if not rows or not _is_full(s) or not _is_most(len(rows), s):
        return None
    return Finding(
        "slow-queries",
        "all connections are in use, most by queries that take long",
        (_list("Running longest", sorted(rows, key=lambda row: -row.status_seconds)),),
        "Look at what the server does: pg_stat_activity by these process numbers, pg_locks,"
        " EXPLAIN. statement_timeout bounds them.",
    )


def _held_up(s: PoolSnapshot) -> Finding | None:
    # What usually takes no time has taken long when it took half of the wait.
    long = min(HELD_LONG, max(STALL, s.waited_seconds / 2)) + s.stalled_seconds
    rows = [row for row in s.steps if row.number != "making" and row.seconds >= long]
    # Who waits in vain beside idle ones was handed one, and was not to have it unchecked.
    if not rows or not ((s.idle and s.waited_seconds) or (_is_full(s) and _is_most(len(rows), s))):
        return None
    return Finding(
        "held-up",
        f"{_number(len(rows), 'connection')} {'is' if len(rows) == 1 else 'are'} held up before"
        f" the next task can have {'it' if len(rows) == 1 else 'one'}: {_step(rows[0])}",
        (f"{_steps(rows)}.",),
        _step_advice(rows),
    )


def _step(row: StepRow) -> str:
    return f"{row.doing} at {row.site}" if row.site else row.doing


def _steps(rows: list[StepRow]) -> str:
    kinds: dict[str, list[StepRow]] = {}
    for row in rows:
        kinds.setdefault(_step(row), []).append(row)
    return "; ".join(
        f"{_number(len(same), 'connection')} {what}, for {same[0].seconds:.1f} s"
        for what, same in kinds.items()
    )


def _step_advice(rows: list[StepRow]) -> str:
    if any(row.site for row in rows):
        return "Look at what the function at this line waits for, and give it a time-out."
    return "Look at what the server does, and at what stands between: it has not answered."


def _too_small(s: PoolSnapshot) -> Finding | None:
    load = s.load
    if not _is_full(s) or not load.released or load.window_seconds < 0.5:
        return None
    if s.waited_seconds < TELLING:
        return None  # the load of so short a time is that of before
    # Little's law: connections in use = arrivals per second x seconds that each is held. Those
    # who wait, and those who did so in vain, have arrived too.
    arrivals = (load.acquires + load.gave_up + s.waiting) / load.window_seconds
    needed = arrivals * load.mean_held_seconds
    if needed <= s.max:
        return None
    return Finding(
        "too-small",
        f"max_size={s.max} is too small for the load",
        (
            f"In the last {load.window_seconds:.1f} s {arrivals:.0f} acquires came per second, each"
            f" held for {load.mean_held_seconds * 1000:.1f} ms,"
            f" {load.used_share * 100:.0f} % of it in queries: that keeps {needed:.1f} connections"
            f" busy (Little's law), and there are {s.max}.",
        ),
        f"Hold connections for a shorter time, or set max_size to {ceil(needed * 1.2)} if the"
        " server has room for as many from every process.",
    )


def _growing(s: PoolSnapshot) -> Finding | None:
    if s.total >= s.max or s.idle or s.last_error is not None:
        return None
    yours = [row for row in s.steps if row.number == "making" and row.site]
    if yours and _is_long(yours[0].seconds, s, always=True):
        return Finding(
            "growing",
            f"the pool is still making connections: {_step(yours[0])}",
            (f"{_steps(yours)}.",),
            _step_advice(yours),
        )
    if s.connecting:
        said = f"{_number(s.connecting, 'connection attempt')} had no answer from the server yet."
    elif s.making:
        said = f"{_number(s.making, 'connection')} made, and not ready yet."
    else:
        return None
    return Finding(
        "growing",
        "the pool is still making connections",
        (said,),
        "If it is always so, give min_size more connections to start with; if the server is slow"
        " to log in, look at what stands between.",
    )


_RULES: tuple[Callable[[PoolSnapshot], Finding | None], ...] = (
    _hardly_used,
    _running,
    _held_up,
    _too_small,
    _growing,
)


# --- what is known where the cause is not -------------------------------------------------------


def _in_use(s: PoolSnapshot) -> Finding | None:
    if not _is_full(s):
        return None
    states = Counter(row.status for row in s.checkouts)
    states.update(row.doing for row in s.steps if row.number != "making")
    evidence: list[str] = []
    if states:
        evidence.append(f"{', '.join(f'{n} {state}' for state, n in states.most_common())}.")
    if s.checkouts:
        evidence.append(_list("Longest", s.checkouts))
    if s.waited_seconds:
        evidence.append("Why none of them came back in time is not known.")
    return Finding(
        "all-in-use",
        "all connections are in use" if s.in_use >= s.total else "no connection is free",
        tuple(evidence),
        "Keep a connection only while it works: not across HTTP calls or streams.",
    )


_UNKNOWN = Finding("unknown", "no connection became free", ("What kept them is not known.",), "")


def _list(word: str, rows: Iterable[CheckoutRow]) -> str:
    rows = list(rows)
    shown = "; ".join(
        f'task "{row.task}" at {_asker(row)}, held {row.held_seconds:.1f} s, in queries'
        f" {row.query_seconds:.1f} s, {row.status}{_now(row)}{_behind(row)}"
        f" (server process {row.backend_pid})"
        for row in rows[:_NAMED]
    )
    more = f"; and {len(rows) - _NAMED} more" if len(rows) > _NAMED else ""
    return f"{word}: {shown}{more}."


def _asker(row: CheckoutRow) -> str:
    return row.asker or row.site


def _now(row: CheckoutRow) -> str:
    return f", now at {row.awaits}" if row.awaits and not _asker(row).endswith(row.awaits) else ""


def _behind(row: CheckoutRow) -> str:
    return f", {_number(len(row.behind), 'one-shot')} behind it" if row.behind else ""


def _number(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
