"""
The book of one soak: what was done, what went wrong, and whether it may have.

An error is allowed if the monkey was doing what causes it while the request ran; all others, and
every class of error that is nobody's business (AttributeError, say), are violations.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import sys
import time
import traceback
import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import psycopg

from poolkeeper import (
    AcquireTimeout,
    ClosedError,
    OpenError,
    ReleasedConnectionError,
    SelfDeadlockError,
)

GRACE = 2.0
"""Seconds after the end of some trouble in which a request may still meet it."""

LOST = frozenset({"kill", "network", "server", "close"})
"""What may cost a request its connection."""

AWAY = frozenset({"network", "server", "close"})
"""What may keep a pool from having a connection."""


class Wrong(AssertionError):
    """Something does not hold that must."""


def require(holds: object, what: str) -> None:
    """Raise unless what must hold *holds*."""
    if not holds:
        raise Wrong(what)


@dataclass
class Violation:
    """What must not be, and what happened just before."""

    what: str
    details: str
    events: list[str]


class Troubles:
    """What the monkey does, and when it did it last."""

    def __init__(self) -> None:
        self._now: Counter[str] = Counter()
        self._ended: dict[str, float] = {}

    @contextmanager
    def during(self, kind: str) -> Iterator[None]:
        """Note that there is trouble of this *kind* until the block is left."""
        self._now[kind] += 1
        try:
            yield
        finally:
            self._now[kind] -= 1
            self._ended[kind] = time.monotonic()

    def any_of(self, kinds: frozenset[str], since: float) -> bool:
        """Tell whether a request that runs *since* then may have met one of them."""
        return any(self._now[kind] or self._ended.get(kind, -1e9) > since - GRACE for kind in kinds)


class Money:
    """
    Transfers between accounts, and what was said of each.

    A transfer that was told to be committed must be on the server, one that was rolled back must
    not, and of one whose commit had no answer either may be true. The accounts hold what these
    transfers make of them, so their sum never changes.
    """

    ACCOUNTS = 24
    EACH = 1000

    def __init__(self) -> None:
        self._numbers = itertools.count(1)
        self._told: dict[int, tuple[str, str]] = {}
        self.totals: Counter[str] = Counter()

    def begins(self, token: str) -> int:
        """Return the number of a new transfer; until more is said of it, it is rolled back."""
        number = next(self._numbers)
        self._told[number] = ("rolled back", token)
        return number

    def tell(self, number: int, outcome: str) -> None:
        """Note what is known of a transfer: "committed", "rolled back" or "unknown"."""
        self._told[number] = (outcome, self._told[number][1])

    @staticmethod
    def set_up(admin: psycopg.Connection[Any]) -> None:
        """Make the tables."""
        admin.execute("create table accounts (id int primary key, balance bigint not null)")
        admin.execute(
            "create table transfers"
            " (id bigint not null, source int, target int, amount bigint not null)"
        )
        admin.execute(
            "insert into accounts select i, %s from generate_series(1, %s) i",
            (Money.EACH, Money.ACCOUNTS),
        )
        admin.execute(
            "create or replace function of_nothing(bigint) returns bigint language sql"
            " as 'insert into transfers values ($1, 1, 1, 0) returning id'"
        )
        admin.execute("drop operator if exists !@ (none, bigint)")
        admin.execute("create operator !@ (rightarg = bigint, function = of_nothing)")

    def check(self, admin: psycopg.Connection[Any]) -> Iterator[str]:
        """Compare what was said with what is there; give what is wrong, and begin anew."""
        rows = admin.execute("select id, source, target, amount from transfers").fetchall()
        times = Counter(row[0] for row in rows)
        there = times.keys()
        balances = dict.fromkeys(range(1, self.ACCOUNTS + 1), self.EACH)
        for _, source, target, amount in rows:
            balances[source] -= amount
            balances[target] += amount
        found = dict(admin.execute("select id, balance from accounts").fetchall())
        if sum(found.values()) != self.EACH * self.ACCOUNTS:
            yield f"the sum of all accounts is {sum(found.values())}, not what it was"
        if found != balances:
            wrong = {
                i: (balances[i], found.get(i)) for i in balances if balances[i] != found.get(i)
            }
            yield f"accounts do not hold what their transfers make (expected, found): {wrong}"
        for number, (told, token) in self._told.items():
            self.totals[told] += 1
            if told == "unknown":
                self.totals["unknown, but committed"] += number in there
            elif (told == "committed") != (number in there):
                seen = "is on the server" if number in there else "is not on the server"
                yield f"transfer {number} of {token}, which was told to be {told}, {seen}"
        for number in (number for number, many in times.items() if many > 1):
            yield f"transfer {number} was made {times[number]} times"
        for number in there - self._told.keys():
            yield f"transfer {number} is on the server, and nobody made it"
        self._told.clear()
        with admin.transaction():
            admin.execute("truncate transfers")
            admin.execute("update accounts set balance = %s", (self.EACH,))


class Book:
    """What was done, by kind and outcome, what the monkey did, and what must not be."""

    EVENTS = 60

    def __init__(self) -> None:
        self.began = time.monotonic()
        self.dsn = ""
        self.troubles = Troubles()
        self.money = Money()
        self.outcomes: Counter[tuple[str, str]] = Counter()
        self.mischief: Counter[str] = Counter()
        self.logged: Counter[str] = Counter()
        self.violations: list[Violation] = []
        self._events: deque[str] = deque(maxlen=self.EVENTS)
        self._undo: list[Callable[[], None]] = []

    @property
    def operations(self) -> int:
        """How many requests were made."""
        return sum(self.outcomes.values())

    def note(self, event: str) -> None:
        """Keep *event* among the last ones, which a violation is shown with."""
        self._events.append(f"{time.monotonic() - self.began:9.3f} {event}")

    def did(self, mischief: str) -> None:
        """Count a deed of the monkey's."""
        self.mischief[mischief] += 1
        if not mischief.startswith("cancel"):
            self.note(mischief)

    def violation(self, what: str, error: BaseException | None = None, details: str = "") -> None:
        """Note what must not be. The first ones are kept whole."""
        if error is not None:
            details += "".join(traceback.format_exception(error))
        self.note(f"VIOLATION: {what}")
        if len(self.violations) < 20:
            self.violations.append(Violation(what, details, list(self._events)))

    # --- errors of requests -----------------------------------------------------------------

    def ended(self, kind: str, task: asyncio.Task[None], since: float, cancelled: bool) -> None:
        """Write down how a request ended, and whether it may have."""
        error: BaseException | None
        error = asyncio.CancelledError() if task.cancelled() else task.exception()
        outcome = "done" if error is None else self.excuse(error, kind, since, cancelled)
        if outcome is None:
            outcome = "violation"
            self.violation(f"{kind} ended with {_in_short(error)}", error)
        self.outcomes[kind, outcome] += 1
        if outcome not in ("done", "cancelled", "gave up"):
            self.note(f"{kind}: {outcome}: {_in_short(error)}")

    def excuse(self, error: BaseException, kind: str, since: float, cancelled: bool) -> str | None:
        """Return in a word or two why a request may have ended with *error*, None if it may not."""
        troubles = self.troubles
        if isinstance(error, BaseExceptionGroup):
            words = [self.excuse(e, kind, since, cancelled) for e in error.exceptions]
            return None if None in words else words[0]
        if isinstance(error, asyncio.CancelledError):
            return "cancelled" if cancelled else None
        if isinstance(error, SelfDeadlockError):
            return "self-deadlock" if kind == "two at once" else None
        if isinstance(error, AcquireTimeout):
            return "no connection" if self._is_plausible(error, since) else None
        if isinstance(error, ClosedError):
            return "closed" if troubles.any_of(frozenset({"close"}), since) else None
        if isinstance(error, OpenError | ReleasedConnectionError):
            return None
        if type(error) is TimeoutError:
            return "gave up" if kind == "impatient" else None
        if isinstance(error, psycopg.errors.DeadlockDetected):
            return "deadlock" if kind.startswith("transfer") else None
        if isinstance(error, psycopg.errors.QueryCanceled):
            # By close(). Whoever else cancels queries shall hit his own.
            return "stopped" if troubles.any_of(frozenset({"close"}), since) else None
        if isinstance(error, psycopg.OperationalError | psycopg.InterfaceError):
            return "lost" if troubles.any_of(LOST, since) else None
        return None

    def _is_plausible(self, error: AcquireTimeout, since: float) -> bool:
        """Tell whether what a time-out says of its cause can be true."""
        if error.diagnosis is None:
            return False
        snapshot, cause = error.diagnosis.snapshot, error.diagnosis.cause
        if cause in ("server", "not-open"):
            # Attempts that failed are remembered until one succeeds.
            return self.troubles.any_of(LOST, since - 10)
        return snapshot.in_use > 0 or self.troubles.any_of(AWAY, since - 10)

    # --- what nobody awaits -----------------------------------------------------------------

    def listen(self) -> None:
        """Take for a violation what Python says when nobody is there to be told."""
        handler = _Listener(self)
        logging.getLogger().addHandler(handler)
        hook, show = sys.unraisablehook, warnings.showwarning
        filters = warnings.filters[:]

        def unraisable(what: Any) -> None:
            self.violation(
                f"{what.err_msg or 'exception ignored in'}: {what.object!r}", what.exc_value
            )

        def warned(message: Warning | str, category: type[Warning], *place: Any, **_: Any) -> None:
            if "AsyncServerCursor" in str(message):
                return  # of psycopg's, cancelled while it closes its cursor
            self.violation(f"{category.__name__}: {message}", details=str(place))

        sys.unraisablehook = unraisable
        warnings.showwarning = warned
        for category in (ResourceWarning, RuntimeWarning, UserWarning):
            warnings.simplefilter("always", category)

        def undo() -> None:
            logging.getLogger().removeHandler(handler)
            sys.unraisablehook, warnings.showwarning = hook, show
            warnings.filters[:] = filters

        self._undo.append(undo)

    def stop_listening(self) -> None:
        """Leave these hooks as they were."""
        while self._undo:
            self._undo.pop()()

    def loop_complains(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """Do as an exception handler of the event loop."""
        self.violation(
            f"the loop says: {context['message']}", context.get("exception"), str(context)
        )


class _Listener(logging.Handler):
    """Counts warnings by their text; those of asyncio, and all errors, are violations."""

    def __init__(self, book: Book) -> None:
        super().__init__(logging.WARNING)
        self._book = book

    def emit(self, record: logging.LogRecord) -> None:
        if record.name == "asyncio" and record.msg.startswith("Executing "):
            return  # in debug mode, of a turn that took long: that is the machine
        self._book.logged[f"{record.name}: {record.msg[:100]}"] += 1
        if record.name == "asyncio" or record.levelno >= logging.ERROR:
            error = record.exc_info[1] if record.exc_info else None
            self._book.violation(f"logged by {record.name}: {record.getMessage()}", error)


def _in_short(error: BaseException | None) -> str:
    if isinstance(error, BaseExceptionGroup):
        return f"{type(error).__name__}({', '.join(_in_short(e) for e in error.exceptions)})"
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
