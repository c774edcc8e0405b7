"""
Who waits for a connection, and who holds one.

Everything here is synchronous and belongs to the owner loop: no await stands between reading
the state and changing it, so a cancellation can never come in between.
"""

from __future__ import annotations

import asyncio
import logging
import traceback
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextvars import copy_context
from time import monotonic
from types import CodeType, FrameType
from typing import Any

from typing_extensions import override

from . import _facts
from ._where import site
from .errors import another

# --- those who wait ---------------------------------------------------------------------------


class Waiter:
    """
    A task still in acquire.

    Answers to `set()` and `fail()` as psycopg_pool's own waiting clients do, so that a
    connection made or returned by psycopg_pool reaches it in its turn.
    """

    __slots__ = ("code", "deadline", "future", "grace", "lineno", "since", "task", "timeout")

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        timeout: float,
        deadline: float,
        code: CodeType,
        lineno: int,
    ) -> None:
        self.future: asyncio.Future[Any] = loop.create_future()
        self.task = asyncio.current_task(loop)
        self.since = monotonic()
        self.timeout = timeout
        self.deadline = deadline
        self.grace = LineClock.MOST_GRACE
        self.code = code
        self.lineno = lineno

    def offer(self, conn: Any) -> bool:
        """Hand *conn* to the task. False if it waits no more."""
        if self.future.done():
            return False
        self.future.set_result(conn)
        return True

    def refuse(self, error: BaseException) -> None:
        """Raise *error* in the task, if it still waits."""
        if not self.future.done():
            self.future.set_exception(error)

    def was_served(self) -> bool:
        """Tell whether a connection was handed over."""
        future = self.future
        return future.done() and not future.cancelled() and future.exception() is None

    async def set(self, conn: Any) -> bool:
        """Do as `offer()`; psycopg_pool awaits this one."""
        return self.offer(conn)

    async def fail(self, error: Exception) -> bool:
        """Do as `refuse()`; psycopg_pool awaits this one."""
        self.refuse(error)
        return True


class Line(OrderedDict["Waiter", None]):
    """
    The waiters, first come first served. Holds only those that still wait.

    A dict, whose length and truth cost next to nothing: they are asked on every acquire and
    release. Leaving from the middle costs the same as leaving from the front, which a deque
    could not do: with ten thousand waiters a storm of cancellations would take seconds.
    """

    def __init__(self) -> None:
        super().__init__()
        self.tasks: set[asyncio.Task[Any] | None] = set()
        """The tasks that wait; a task waits once."""
        self._called: set[Waiter] = set()
        """Those who were taken out to be served, until their tasks go on."""

    @override
    def __iter__(self) -> Iterator[Waiter]:
        return iter(list(super().__iter__()))

    def append(self, waiter: Waiter) -> None:
        """Let *waiter* join at the end."""
        self[waiter] = None
        self.tasks.add(waiter.task)

    def popleft(self) -> Waiter:
        """Take the one who waited longest, to be served."""
        waiter = self.popitem(last=False)[0]
        self.tasks.discard(waiter.task)
        self._called.add(waiter)
        return waiter

    def leave(self, waiter: Waiter) -> None:
        """Take *waiter* out, if it is still in; what it was handed is its own from here on."""
        self._called.discard(waiter)
        if waiter in self:
            del self[waiter]
            self.tasks.discard(waiter.task)

    def handed_over(self) -> int:
        """Return how many connections are on their way to the task that they were handed to."""
        return sum(waiter.was_served() for waiter in list(self._called))

    @override
    def clear(self) -> None:
        """Take everybody out, without telling them."""
        super().clear()
        self.tasks.clear()

    def offer(self, conn: Any) -> bool:
        """Hand *conn* to the one who waited longest. False if nobody waits."""
        while self:
            if self.popleft().offer(conn):
                return True
        return False

    def refuse_all(self, error: BaseException) -> None:
        """Raise *error* in every waiter: an object of its own in each, for it has a traceback."""
        waiters = list(self)
        self.clear()
        for waiter in waiters:
            waiter.refuse(another(error))


class LineClock:
    """
    One timer for all who wait: it ends their patience, and notices when the loop stands still.

    A timer for each waiter would cost as much as the rest of its wait. While the loop is
    blocked, nobody could have been served: waiters get that time back, as far as they need it to
    be served afterwards, so that a stall does not turn into a storm of time-outs.

    Args:
        line: The waiters.
        expire: Called with each one whose time is up.
        help: Called at each look at which anybody still waits.
    """

    TICK = 0.25
    """Seconds between looks at the clock while anybody waits."""

    FINEST = 0.005
    """Seconds to which a deadline is kept; many that lie close together cost one look."""

    STALL = 0.1
    """Seconds of delay from which the loop is said to have stood still."""

    MOST_GRACE = 1.0
    """Seconds that a waiter is given after its time, and after the stall, at most."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        line: Line,
        expire: Callable[[Waiter], None],
        help: Callable[[], None] | None = None,
    ) -> None:
        self._loop = loop
        self._context = copy_context()  # of open(): its timer is for all who wait
        self._line = line
        self._expire = expire
        self._help = help
        self._due = 0.0  # 0.0: not ticking
        self._timer: asyncio.TimerHandle | None = None
        self._stall = (0.0, 0.0)  # when, for how long

    def watch(self, waiter: Waiter) -> None:
        """Look after one more waiter."""
        due = self._due
        if due == 0.0 or waiter.deadline < due:
            self._arm(waiter.deadline)

    def stop(self) -> None:
        """Stop ticking."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._due = 0.0

    def longest_stall(self, within: float) -> float:
        """Return how long the loop stood still, if it did in the last *within* seconds."""
        when, seconds = self._stall
        return seconds if seconds and monotonic() - when <= within else 0.0

    def _arm(self, deadline: float) -> None:
        now = monotonic()
        self.stop()
        self._due = max(min(deadline, now + self.TICK), now + self.FINEST)
        self._timer = self._loop.call_later(self._due - now, self._tick, context=self._context)

    def _tick(self) -> None:
        now = monotonic()
        late = now - self._due
        self._due = 0.0
        self._timer = None
        if late >= self.STALL:
            when, seconds = self._stall
            if late >= seconds or now - when > 30.0:
                self._stall = (now, late)
            for waiter in self._line:
                due = min(waiter.deadline + late, now + waiter.grace)
                if due > waiter.deadline:
                    waiter.grace -= due - max(waiter.deadline, now)
                    waiter.deadline = due
        earliest = 0.0
        for waiter in list(self._line):
            if waiter.deadline <= now:
                self._expire(waiter)
            elif earliest == 0.0 or waiter.deadline < earliest:
                earliest = waiter.deadline
        if earliest:
            self._arm(earliest)
            if self._help is not None:
                self._help()


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


# --- those who hold ---------------------------------------------------------------------------


class Checkout:
    """
    One connection held by one task: who, since when, from which line, and how much it was used.

    Keeps the task itself, for as long as the connection is held and no longer.
    """

    __slots__ = (
        "busy_seconds",
        "busy_since",
        "changed_at",
        "code",
        "lineno",
        "name",
        "reported",
        "session",
        "since",
        "stack",
        "structured",
        "task",
        "used",
    )

    def __init__(
        self,
        session: Any,
        task: asyncio.Task[Any],
        code: CodeType,
        lineno: int,
        structured: bool,
        since: float,
    ) -> None:
        self.session = session
        self.task: asyncio.Task[Any] | None = task
        self.code = code
        self.lineno = lineno
        self.structured = structured
        """True if a block of the task's own gives it back: nobody else is going to."""
        self.since = self.changed_at = since
        self.busy_seconds = self.busy_since = 0.0
        """Seconds spent in queries; when the one that runs now began, 0.0 if none does."""
        self.used = self.reported = False
        """True once anything was asked of the server; once it was logged as a suspected leak."""
        self.stack: traceback.StackSummary | None = None
        self.name = ""
        """Name of the task, once the connection was given back."""

    @property
    def by_this_task(self) -> bool:
        """True if the running task is the one that acquired."""
        return self.task is asyncio.current_task()

    @property
    def held_seconds(self) -> float:
        """How long it lasts by now."""
        return monotonic() - self.since

    def stack_text(self) -> str:
        """Return the stack of the acquire, outermost call first; empty if it was not kept."""
        return "".join(traceback.format_list(self.stack[::-1])) if self.stack else ""

    def __str__(self) -> str:
        task = self.task  # read once: a snapshot may be taken in another thread
        return (
            f'in task "{task.get_name() if task else self.name}" at {site(self.code, self.lineno)}'
        )


class _Window:
    """Sums over a stretch of time."""

    __slots__ = ("began", "busy_seconds", "ends", "held_seconds", "released")

    def __init__(self, began: float) -> None:
        self.began = began
        self.ends = began + Ledger.WINDOW
        self.released = 0
        self.held_seconds = 0.0
        self.busy_seconds = 0.0

    def add(self, checkout: Checkout, now: float) -> None:
        """Count a checkout that ends."""
        self.released += 1
        self.held_seconds += now - checkout.since
        self.busy_seconds += checkout.busy_seconds


class Ledger:
    """
    Who holds what, and how long connections are held lately.

    Args:
        leak_threshold: Seconds after which a checkout is a suspected leak; None to keep no
            stacks and suspect nobody.
    """

    WINDOW = 10.0
    """Seconds that the load is summed over; what is shown covers one to two of them."""

    def __init__(self, leak_threshold: float | None) -> None:
        self.leak_threshold = leak_threshold
        self.held: set[Checkout] = set()
        self._now = self._before = _Window(monotonic())

    def begins(self, checkout: Checkout, frame: FrameType | None) -> None:
        """Write a checkout down; *frame* is where it was asked for, if its stack is kept."""
        self.held.add(checkout)
        if frame is not None:
            checkout.stack = traceback.StackSummary.extract(
                traceback.walk_stack(frame), limit=32, lookup_lines=False
            )

    def ends(self, checkout: Checkout, now: float) -> None:
        """Strike a checkout out."""
        self.held.discard(checkout)
        task = checkout.task
        assert task is not None
        checkout.name = task.get_name()
        checkout.task = None
        window = self._now
        window.add(checkout, now)
        if now > window.ends:
            self._turn(checkout, now)

    def _turn(self, last: Checkout, now: float) -> None:
        """Begin another window; *last* was the last of the one that is over."""
        self._before, self._now = self._now, _Window(now)
        if last.since > self._before.ends + self.WINDOW:
            # Nothing was asked for a window or more: what was before is not "lately".
            self._before = self._now = _Window(last.since)
            self._now.add(last, now)

    def longest_first(self) -> list[Checkout]:
        """Return who holds a connection."""
        return sorted(self.held, key=lambda checkout: checkout.since)

    def load(self) -> _facts.LoadRow:
        """Return what was asked of the pool lately; those who hold a connection have arrived."""
        windows = {self._before, self._now}
        released = sum(window.released for window in windows)
        return _facts.LoadRow(
            window_seconds=monotonic() - self._before.began,
            acquires=released + len(self.held),
            released=released,
            held_seconds=sum(window.held_seconds for window in windows),
            query_seconds=sum(window.busy_seconds for window in windows),
        )

    def overdue(self) -> list[Checkout]:
        """Return the checkouts that are past the threshold and were not reported yet."""
        if self.leak_threshold is None:
            return []
        limit = monotonic() - self.leak_threshold
        return [c for c in self.longest_first() if c.since < limit and not c.reported]

    def completes_deadlock(
        self, task: asyncio.Task[Any] | None, line: Line, connections: int, timeout: float = 0.0
    ) -> bool:
        """
        Tell whether nobody could ever be served if *task* joined *line* now.

        That is so if each of the pool's *connections* is held by a block of a task that waits
        for one more itself. A connection from ``getconn()`` may be given back by anybody, so
        one of those is enough to say no; and so is a task that waits with a shorter time-out than
        the caller's *timeout*: it will give up first, and go on without.
        """
        if len(self.held) < connections:
            return False
        waiting = line.tasks
        if not all(
            checkout.structured and (checkout.task is task or checkout.task in waiting)
            for checkout in self.held
        ):
            return False
        holders = {checkout.task for checkout in self.held}
        return not any(w.timeout < timeout and w.task in holders for w in line)
