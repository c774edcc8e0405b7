"""
One pool as it is watched: what its snapshot says, and what its events have told of late.

Written to by the events, in the thread of the pool's loop, and read by any thread: what is read
is copied in one step each, and may be a moment apart.
"""

from __future__ import annotations

import os
import sys
import time
from collections import deque
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from poolkeeper import BoundPool, ConfigError, PoolManager, events

MOST_SITES = 200
"""Call sites that are told apart; what comes from any other is counted as one."""

OTHER = "(other places)"

SECONDS = 300
"""Of history that is kept."""

RECENT = 60
"""Seconds of the waits that are told."""

MOST_WAITS = 200
"""Waits that are kept of one second, the first ones."""

ERRORS = 20
"""Kinds of errors that are kept, the last ones."""


@dataclass(slots=True)
class Site:
    """What one place in the program has had of the pool, since it is watched."""

    who: str
    number: int = 0
    held: float = 0.0
    held_most: float = 0.0
    query: float = 0.0
    waited: float = 0.0
    in_vain: int = 0


@dataclass(slots=True)
class Second:
    """What happened in one second."""

    at: int
    in_use: int = 0
    waiting: int = 0
    acquired: int = 0
    in_vain: int = 0
    waits: list[float] = field(default_factory=list[float])


class Observer:
    """
    Watches one pool until `stop()`. Does nothing by itself: it is called by events.

    Args:
        pool: The manager, or its pool.

    Raises:
        ConfigError: If *pool* is none.
    """

    def __init__(self, pool: PoolManager[Any] | BoundPool[Any]) -> None:
        self.pool: BoundPool[Any] = _bound(pool)
        self._sites: dict[str, Site] = {}
        self._seconds: deque[Second] = deque(maxlen=SECONDS)
        self._errors: dict[tuple[str, str], tuple[float, int, str]] = {}
        self._waiting = 0
        self._unsubscribe = self.pool.subscribe(self._hear)

    def stop(self) -> None:
        """Watch no more. Does nothing the second time."""
        self._unsubscribe()

    # --- what is heard --------------------------------------------------------------------------

    def _hear(self, event: events.Event) -> None:
        match event:
            case events.Queued():
                self._waiting += 1
                self._second()
            case events.Acquired():
                self._acquired(event)
            case events.Released():
                self._released(event)
            case events.TimedOut() | events.GaveUp() | events.TurnedAway():
                self._in_vain(event)
            case events.ConnectFailed():
                self._error("could not connect", event.reason)
            case events.OutageEnded():
                seconds = f"after {event.outage_seconds:.0f} s"
                self._error("connections can be made again", seconds, "")
            case events.Stalled():
                seconds = f"for {event.seconds:.1f} s"
                self._error("the event loop stood still", seconds, event.stalled_by)
            case events.LeakSuspected():
                held = f"{event.caller}, held {event.held_seconds:.0f} s"
                self._error("suspected leak", held, str(event.caller))
            case events.LoopMismatch():
                self._error("used on another event loop", event.used)
            case events.Opened() | events.Closed():
                self._waiting = 0
            case _:
                pass

    def _acquired(self, event: events.Acquired) -> None:
        if event.queued:
            self._waiting = max(0, self._waiting - 1)
        second = self._second()
        second.acquired += 1
        if len(second.waits) < MOST_WAITS:
            second.waits.append(event.waited_seconds)
        self._site(event.caller).waited += event.waited_seconds

    def _released(self, event: events.Released) -> None:
        self._second()
        site = self._site(event.caller)
        site.number += 1
        site.held += event.used_seconds
        site.query += event.query_seconds
        site.held_most = max(site.held_most, event.used_seconds)

    def _in_vain(self, event: events.TimedOut | events.GaveUp | events.TurnedAway) -> None:
        self._second().in_vain += 1
        self._site(event.caller).in_vain += 1
        if isinstance(event, events.TurnedAway):
            self._error("turned away", f"{event.caller}: {event.waiting} wait already")
            return
        self._waiting = max(0, self._waiting - 1)
        if isinstance(event, events.TimedOut):
            self._error("no connection", f"{event.caller}: {event.summary}")

    def _error(self, what: str, words: str, alike: str | None = None) -> None:
        """
        Keep it as the last one; of those that are *alike*, how many there were.

        Args:
            what: The kind of it.
            words: More of it, of which the first line is told.
            alike: By what it is told from others of its kind; by its words if None.
        """
        words = words.partition("\n")[0]
        key = what, words if alike is None else alike
        _, number, _ = self._errors.pop(key, (0.0, 0, ""))
        self._errors[key] = time.time(), number + 1, words
        if len(self._errors) > ERRORS:
            self._errors.pop(next(iter(self._errors)), None)

    def _site(self, caller: events.Caller) -> Site:
        who = str(caller)
        site = self._sites.get(who)
        if site is None:
            if len(self._sites) >= MOST_SITES:
                who = OTHER
            site = self._sites.setdefault(who, Site(who))
        return site

    def _second(self) -> Second:
        now = int(time.time())
        if not self._seconds or self._seconds[-1].at != now:
            self._seconds.append(Second(now))
        second = self._seconds[-1]
        # Not by the events: one-shots that share a connection are told each by itself.
        second.in_use = max(second.in_use, len(self.pool.checkouts()))
        second.waiting = max(second.waiting, self._waiting)
        return second

    # --- what is told -----------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """Return all of it, as what JSON can hold. Never waits; safe in any thread."""
        snapshot = self.pool.snapshot()
        now = time.time()
        seconds = [second for second in list(self._seconds) if second.at > now - SECONDS]
        told = asdict(snapshot)
        for row in told["checkouts"]:
            shared = f", {len(row['behind'])} behind it" if row["behind"] else ""
            row["now"] = row["status"] + shared
        return {
            "pid": os.getpid(),
            "program": _program(),
            "at": now,
            **{name: told[name] for name in _TOLD},
            "cause": _cause(self.pool) if snapshot.waiting else "",
            "waits": [w for second in seconds if second.at > now - RECENT for w in second.waits],
            "sites": [
                asdict(site)
                for site in sorted(self._sites.values(), key=lambda s: s.held, reverse=True)
            ],
            "errors": [
                [at, number, what, words]
                for (what, _), (at, number, words) in list(self._errors.items())
            ],
            "history": [
                [
                    s.at, s.in_use, s.waiting, s.acquired, s.in_vain,
                    percentile(s.waits, 50), percentile(s.waits, 99),
                ]
                for s in seconds
            ],
        }  # fmt: skip


_TOLD = (
    "name", "state", "total", "in_use", "idle", "max", "waiting", "min", "making", "returning",
    "checking", "opened", "checkouts", "waiters", "last_error", "failing_seconds",
    "next_attempt_seconds",
)  # fmt: skip
"""What is told of a snapshot."""


def _bound(pool: PoolManager[Any] | BoundPool[Any]) -> BoundPool[Any]:
    found = pool.pool if isinstance(pool, PoolManager) else pool
    if not isinstance(found, BoundPool):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ConfigError(
            f"cannot show a {type(pool).__name__}: it is neither a PoolManager nor a BoundPool",
            parameter="pool",
        )
    return found


def _program() -> str:
    """Return what people call this program."""
    path = Path(sys.argv[0] or sys.executable)
    return path.parent.name if path.name == "__main__.py" else path.name


def _cause(pool: BoundPool[Any]) -> str:
    """Return why somebody waits, as far as can be said."""
    return pool.diagnose().summary


def percentile(values: list[float], share: int) -> float:
    """Return a percentile, 0.0 of nothing."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, len(ordered) * share // 100)] if ordered else 0.0
