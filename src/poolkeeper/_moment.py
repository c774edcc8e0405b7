"""
The facts about a pool at one moment, noted in microseconds and put into words when asked for.

Who is refused a connection may not care why: it tries again, or does without. And ten thousand
that give up together want one answer, not ten thousand. So what is noted is cheap, is shared by
all who are refused in that moment, and keeps strings, numbers and code only: neither tasks nor
connections, for an error may be kept for long.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Container, Iterable
from dataclasses import replace
from typing import Any, NamedTuple, TypeAlias

from ._checkouts import Checkout, Load
from ._clock import stalled_seconds
from ._diagnosis import Diagnosis, diagnose
from ._line import Waiter
from ._snapshot import CheckoutRow, PoolSnapshot, WaiterRow
from ._status import BAD, IDLE, UNKNOWN
from ._where import Code, answering, asker, is_library, route_of, site, where_now
from .errors import see

Task: TypeAlias = "asyncio.Task[Any]"


class Waiting(NamedTuple):
    """One task in line."""

    task: str
    of: int
    code: Code
    lineno: int
    since: float


class Held(NamedTuple):
    """One connection in use."""

    task: str
    of: int
    """Tells its task from the others."""

    code: Code
    lineno: int
    since: float
    busy_seconds: float
    busy_since: float
    changed_at: float
    in_transaction: bool
    backend_pid: int
    done: bool
    waits: bool
    in_block: bool
    reported: bool
    stack: Any
    awaits: tuple[Code, int] | None
    """What its task stands at."""
    behind: list[Waiting]
    """Whose statements are under way on it as well."""


def note_held(
    checkouts: Iterable[Checkout], waiting: Container[object], gave_up: Container[object]
) -> list[Held]:
    """Note who holds a connection, in the order of *checkouts*."""
    held: list[Held] = []
    for checkout in checkouts:
        session, task = checkout.session, checkout.task
        if session is None or task is None:
            continue  # given back just now: this is another thread
        pgconn = session.pgconn
        code, lineno = checkout.code, checkout.lineno
        awaits, outside = where_now(task, code)
        if _is_nobodys(code) and (own := outside or awaits):
            code, lineno = own
        code = answering(code, task)
        structured = checkout.structured
        held.append(
            Held(
                task.get_name(),
                id(task),
                code,
                lineno,
                checkout.since,
                checkout.busy_seconds,
                checkout.busy_since,
                checkout.changed_at,
                pgconn.transaction_status not in (IDLE, UNKNOWN),
                pgconn.backend_pid if pgconn.status != BAD else 0,
                # A block outlives its task if it is a generator's, which was handed on (pytest's
                # fixtures, dependencies of Litestar) and is not lost: the collector would end it.
                not structured and task.done(),
                task in waiting or task in gave_up,
                structured,
                checkout.reported,
                checkout.stack,
                awaits,
                _note_behind(session),
            )
        )
    return held


def _note_behind(session: Any) -> list[Waiting]:
    """Note who waits on a shared connection, but for the first, who counts as its holder."""
    # What is under way is an exchange of psycopg's mostly.
    waiting = getattr(getattr(session.handle, "_under_way", None), "waiting", None)
    return [
        Waiting(task.get_name() if task else "", id(task), code, lineno, since)
        for task, code, lineno, since in (waiting()[1:] if waiting is not None else ())
    ]


def note_waiting(waiters: Iterable[Waiter]) -> list[Waiting]:
    """Note who waits, in the order of *waiters*."""
    waiting: list[Waiting] = []
    for waiter in waiters:
        task, code, lineno = waiter.task, waiter.code, waiter.lineno
        if _is_nobodys(code) and (own := where_now(task, code)[0]):
            code, lineno = own
        code = answering(code, task)
        name = task.get_name() if task else ""
        waiting.append(Waiting(name, id(task), code, lineno, waiter.since))
    return waiting


def _is_nobodys(code: Code) -> bool:
    """Tell whether *code* is a library's, and nothing else is known of who has called it."""
    return is_library(code) and not route_of(code)


class Moment:
    """
    What is known of a pool at one moment.

    Args:
        when: The moment.
        fields: What a `PoolSnapshot` of it has as it is.
        held: Who holds a connection, longest first.
        waiting: Who waits, first in line first.
        load: What was asked lately.
        stalls: When the loop went on after it had stood still, and for how long it had.
    """

    __slots__ = (
        "_accounts",
        "_fields",
        "_held",
        "_load",
        "_snapshot",
        "_stalls",
        "_waiting",
        "when",
    )

    def __init__(
        self,
        when: float,
        fields: dict[str, Any],
        held: list[Held],
        waiting: list[Waiting],
        load: Load,
        stalls: tuple[tuple[float, float], ...],
    ) -> None:
        self.when = when
        self._fields = fields
        self._held = held
        self._waiting = waiting
        self._load = load
        self._stalls = stalls
        self._snapshot: PoolSnapshot | None = None
        self._accounts: dict[float, tuple[Diagnosis, str]] = {}

    def is_of(self, counts: dict[str, int], last_began: float) -> bool:
        """Tell whether the numbers were *counts*, and nobody has acquired since *last_began*."""
        fields = self._fields
        return (self._held[-1].since if self._held else 0.0) == last_began and all(
            fields[name] == number for name, number in counts.items()
        )

    def snapshot(self, waited: float | None = None) -> PoolSnapshot:
        """
        Return it as what users see.

        Args:
            waited: How long the task has waited that it is about; None for the longest in line.
        """
        snapshot = self._snapshot
        if snapshot is None:
            holds = Counter(one.of for one in self._held)
            fields: dict[str, Any] = {**self._fields}
            fields["opened"] = str(fields["opened"])
            snapshot = self._snapshot = PoolSnapshot(
                **fields,
                checkouts=tuple(self._checkout_row(one, holds) for one in self._held),
                waiters=self._waiter_rows(self._waiting, holds),
            )
        if waited is None:
            longest = self.when - self._waiting[0].since if self._waiting else 0.0
            load = self._load.lately()
        else:
            longest = waited
            load = self._load.over(waited)
        return replace(
            snapshot,
            waited_seconds=longest,
            stalled_seconds=stalled_seconds(self._stalls, self.when - longest, self.when),
            load=load,
        )

    def _waiter_rows(self, waiting: list[Waiting], holds: Counter[int]) -> tuple[WaiterRow, ...]:
        return tuple(
            WaiterRow(
                task=one.task,
                site=site(one.code, one.lineno),
                waited_seconds=self.when - one.since,
                holds=holds[one.of],
                asker=asker(one.code, one.lineno),
            )
            for one in waiting
        )

    def _checkout_row(self, one: Held, holds: Counter[int]) -> CheckoutRow:
        running = one.busy_since > 0.0
        if running:
            status = "running a query"
        else:
            status = "idle in transaction" if one.in_transaction else "idle"
        return CheckoutRow(
            task=one.task,
            site=site(one.code, one.lineno),
            held_seconds=self.when - one.since,
            query_seconds=one.busy_seconds + (self.when - one.busy_since if running else 0.0),
            status=status,
            status_seconds=self.when - (one.busy_since or one.changed_at),
            backend_pid=one.backend_pid,
            held_by_task=holds[one.of],
            task_done=one.done,
            task_waits=one.waits,
            in_block=one.in_block,
            suspected_leak=one.reported,
            stack=Checkout.stack_in_words(one.stack),
            asker=asker(one.code, one.lineno),
            awaits=asker(*one.awaits) if one.awaits else "",
            behind=self._waiter_rows(one.behind, holds),
        )

    def account(self, timeout: float, waited: float) -> tuple[str, str, str, Diagnosis]:
        """Return message, detail, hint and diagnosis for a task that has waited in vain."""
        # To the hundredth of a second, rounded down: many share it, and it is part of each wait.
        waited = int(waited * 100) / 100
        if waited not in self._accounts:
            diagnosis = diagnose(self.snapshot(waited), in_vain=True)
            self._accounts[waited] = diagnosis, diagnosis.detail
        diagnosis, detail = self._accounts[waited]
        return (
            f'could not acquire a connection from pool "{diagnosis.snapshot.name}" within'
            f" {timeout:.2f} s: {diagnosis.summary}",
            detail,
            f"{diagnosis.advice} {see('acquire-timeout', diagnosis.cause)}".strip(),
            diagnosis,
        )
