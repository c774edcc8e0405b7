"""
How long those wait who wait: one timer ends their patience, and notices when the loop stands still.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Iterable
from contextvars import copy_context
from heapq import heappop, heappush
from itertools import islice
from time import monotonic

from typing_extensions import override

from ._line import Line, Waiter


class LineClock:
    """
    One timer for all who wait: it ends their patience, and notices when the loop stands still.

    A timer for each waiter would cost as much as the rest of its wait. They are kept by the
    quarter of a second in which their time is up, and put in order only when that comes near:
    what a look costs does not depend on how long the line is.

    While the loop is blocked, nobody could have been served: waiters get that time back, as far
    as they need it to be served afterwards, so that a stall does not turn into a storm of
    time-outs. Nor does a storm of time-outs turn into a stall: those whose time is up together
    are told in slices, between which the loop goes on.

    Args:
        line: The waiters.
        expire: Called with those whose time is up.
        help: Called at each look at which anybody still waits.
        deadlock: Called with one who was suspected to have completed a self-deadlock, when that
            has had the time to pass.
        stood_still: Called when the loop goes on after it has stood still, with the seconds.
    """

    TICK = 0.25
    """Seconds between looks at the clock while anybody waits."""

    FINEST = 0.005
    """Seconds to which a deadline is kept; many that lie close together cost one look."""

    SLICE = 250
    """How many are told in one turn of the loop, at most."""

    STALL = 0.1
    """Seconds of delay from which the loop is said to have stood still."""

    BLOCKED = 0.25
    """Seconds of delay from which that is one call's doing, and not that of many short ones."""

    DEADLOCK_GRACE = 0.75
    """Seconds after which a self-deadlock is believed: a holder may stop waiting by itself."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        line: Line,
        expire: Callable[[list[Waiter]], None],
        help: Callable[[], None] | None = None,
        deadlock: Callable[[Waiter], None] | None = None,
        stood_still: Callable[[float], None] | None = None,
    ) -> None:
        self._loop = loop
        self._context = copy_context()  # of open(): its timer is for all who wait
        self._line = line
        self._expire = expire
        self._help = help
        self._deadlock = deadlock
        self._stood_still = stood_still
        self._due = 0.0  # 0.0: not ticking
        self._timer: asyncio.Handle | None = None
        self._later: dict[int, dict[Waiter, None]] = {}
        """Who is to be looked at, by the tick in which that is due."""
        self._ticks: list[int] = []
        """The keys of these; a heap."""
        self._soon: list[tuple[float, int, Waiter]] = []
        """Who is to be looked at before the next tick, and when; a heap."""
        self._near = 0
        """The last tick whose waiters are among those."""
        self._number = 0
        self._stalls: deque[tuple[float, float]] = deque(maxlen=128)
        self._stalled = 0

    @property
    def stalls(self) -> tuple[tuple[float, float], ...]:
        """When the loop went on after it had stood still, and for how long it had."""
        return tuple(self._stalls)

    def watch(self, waiter: Waiter) -> None:
        """Look after one more waiter."""
        waiter.seen = self._stalled
        due = waiter.deadline
        if waiter.suspected:
            due = waiter.due = min(due, waiter.suspected + self.DEADLOCK_GRACE)
        # _place(), without the call where others are looked at in the same tick.
        tick = self._later.get(int(due / self.TICK))
        if tick is not None:
            waiter.tick = tick
            tick[waiter] = None
        else:
            self._place(waiter)
        next_due = self._due
        if next_due == 0.0 or due < next_due:
            self._arm(due)

    def forget(self, waiter: Waiter) -> None:
        """Look after *waiter* no more."""
        if waiter.tick is not None:
            waiter.tick.pop(waiter, None)
        if not self._line:
            # No look will come before somebody waits: these were served, and would keep for so
            # long what they were served with.
            self._soon.clear()

    def stop(self) -> None:
        """Stop ticking."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._due = 0.0

    def _place(self, waiter: Waiter) -> None:
        tick = int(waiter.due / self.TICK)
        if tick <= self._near:
            self._number += 1
            heappush(self._soon, (waiter.due, self._number, waiter))
            return
        if tick not in self._later:
            self._later[tick] = {}
            heappush(self._ticks, tick)
        waiter.tick = self._later[tick]
        waiter.tick[waiter] = None

    def _arm(self, due: float) -> None:
        now = monotonic()
        self.stop()
        due = max(min(due, now + self.TICK), now + self.FINEST)
        self._timer = self._loop.call_later(due - now, self._tick, context=self._context)
        self._due = due  # only now: if that was cut short, nobody would be looked at any more

    def _tick(self) -> None:
        now = monotonic()
        late = now - self._due
        if late >= self.STALL:
            self._stalls.append((now, late))
            self._stalled += 1
            if self._stood_still is not None:
                self._stood_still(late)
        self._look()

    def _look(self) -> None:
        now = monotonic()
        self._timer = None
        self._due = now  # nothing is to be armed until it is known what comes next
        soon, ticks = self._soon, self._ticks
        self._near = int(now / self.TICK) + 1
        while ticks and ticks[0] <= self._near:
            for waiter in self._later.pop(heappop(ticks)):
                self._place(waiter)
        expired: list[Waiter] = []
        while soon and soon[0][0] <= now and len(expired) < self.SLICE:
            waiter = heappop(soon)[2]
            if waiter.future.done():
                continue
            self._give_back_stalls(waiter)
            if waiter.suspected:
                self._look_at_suspect(waiter, now)
                if waiter.future.done():
                    continue
            if waiter.deadline <= now:
                expired.append(waiter)
            else:
                waiter.due = max(waiter.due, now) if waiter.suspected else waiter.deadline
                self._place(waiter)
        try:
            if expired:
                self._expire(expired)
        finally:
            if len(expired) == self.SLICE:
                # No timer: what the loop does meanwhile is to tell them, and no stall.
                self._timer = self._loop.call_soon(self._look, context=self._context)
            else:
                self._due = 0.0
                if self._line:
                    self._arm(soon[0][0] if soon else now + self.TICK)
        if self._due and self._help is not None:
            self._help()

    def _give_back_stalls(self, waiter: Waiter) -> None:
        """Let *waiter* have the time in which nobody could be served."""
        missed = min(self._stalled - waiter.seen, len(self._stalls))
        waiter.seen = self._stalled
        for when, seconds in islice(self._stalls, len(self._stalls) - missed, None):
            deadline = min(waiter.deadline + seconds, when + waiter.grace)
            if deadline > waiter.deadline:
                waiter.grace -= deadline - max(waiter.deadline, when)
                waiter.deadline = deadline
            if waiter.suspected:
                waiter.suspected = when  # nobody could stop waiting either

    def _look_at_suspect(self, waiter: Waiter, now: float) -> None:
        waiter.due = waiter.suspected + self.DEADLOCK_GRACE
        if waiter.due <= now:
            if self._deadlock is not None:
                self._deadlock(waiter)
            waiter.suspected = 0.0


def stalled_seconds(stalls: Iterable[tuple[float, float]], since: float, until: float) -> float:
    """Return for how much of the time from *since* to *until* something blocked the loop."""
    return sum(
        max(0.0, min(when, until) - max(when - seconds, since))
        for when, seconds in stalls
        if seconds >= LineClock.BLOCKED
    )


class SlowCallbacks(logging.Filter):
    """
    Remembers what asyncio's debug mode said last about a callback that took long.

    A filter, which lets everything pass: with a handler of its own, the logger would not go to
    the one of last resort, and what asyncio has to say would be lost where none is configured.
    """

    def __init__(self) -> None:
        super().__init__()
        self.last = ""
        logging.getLogger("asyncio").addFilter(self)

    @override
    def filter(self, record: logging.LogRecord) -> bool:
        """Keep the name of the callback; called by logging."""
        if record.levelno == logging.WARNING:
            message = record.getMessage()
            if message.startswith("Executing ") and " took " in message:
                self.last = message.removeprefix("Executing ").rpartition(" took ")[0]
        return True

    def stop(self) -> None:
        """Listen no more."""
        logging.getLogger("asyncio").removeFilter(self)
