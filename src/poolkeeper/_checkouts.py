"""
Who waits for a connection, and who holds one.

Everything here is synchronous and belongs to the owner loop: no await stands between reading
the state and changing it, so a cancellation can never come in between.
"""

from __future__ import annotations

import asyncio
import logging
import traceback
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable
from contextvars import copy_context
from heapq import heappop, heappush
from itertools import islice, takewhile
from time import monotonic
from types import FrameType
from typing import Any, TypeAlias

from typing_extensions import override

from . import _facts
from ._where import Code, asker, function_of, site
from .errors import another

# --- those who wait ---------------------------------------------------------------------------


class Waiter:
    """
    A task still in acquire.

    Answers to `set()` and `fail()` as psycopg_pool's own waiting clients do, so that a
    connection made or returned by psycopg_pool reaches it in its turn.
    """

    __slots__ = (
        "code",
        "deadline",
        "due",
        "future",
        "grace",
        "lineno",
        "seen",
        "since",
        "suspected",
        "task",
        "tick",
        "timeout",
    )

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        timeout: float,
        deadline: float,
        code: Code,
        lineno: int,
    ) -> None:
        self.future: asyncio.Future[Any] = loop.create_future()
        self.task = asyncio.current_task(loop)
        self.since = monotonic()
        self.timeout = timeout
        self.deadline = self.due = deadline
        """When its time is up; when the clock looks at it next."""
        self.grace = LineClock.MOST_GRACE
        self.tick: dict[Waiter, None] | None = None
        """Among whom it is, until that comes near."""
        self.seen = 0
        """How many stalls of the loop it was given back, or was not there for."""
        self.suspected = 0.0
        """Since when it may be the one that completed a self-deadlock; 0.0 if it is not."""
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
        self.tasks: dict[Holder, Waiter] = {}
        """The tasks that wait; a task waits once."""
        self._called: set[Waiter] = set()
        """Those who were taken out to be served, until their tasks go on."""

    def first(self, number: int) -> list[Waiter]:
        """Return so many at most of those who waited longest."""
        # In one step, so that it can be done in another thread.
        return list(islice(self, number))

    def append(self, waiter: Waiter) -> None:
        """Let *waiter* join at the end."""
        self[waiter] = None
        self.tasks[waiter.task] = waiter

    def rejoin(self, waiter: Waiter) -> None:
        """Let *waiter*, which was handed a connection that is no good, have its place again."""
        before = list(takewhile(lambda other: other.since < waiter.since, self))
        self.append(waiter)
        for one in (waiter, *reversed(before)):
            self.move_to_end(one, last=False)

    def popleft(self) -> Waiter:
        """Take the one who waited longest, to be served."""
        waiter = self.popitem(last=False)[0]
        self.tasks.pop(waiter.task, None)
        self._called.add(waiter)
        return waiter

    def leave(self, waiter: Waiter) -> None:
        """Take *waiter* out, if it is still in; what it was handed is its own from here on."""
        self._called.discard(waiter)
        if waiter in self:
            del self[waiter]
            self.tasks.pop(waiter.task, None)

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

    MOST_GRACE = 1.0
    """Seconds that a waiter is given after its time, and after the stall, at most."""

    DEADLOCK_GRACE = 0.75
    """Seconds after which a self-deadlock is believed: a holder may stop waiting by itself."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        line: Line,
        expire: Callable[[list[Waiter]], None],
        help: Callable[[], None] | None = None,
        deadlock: Callable[[Waiter], None] | None = None,
    ) -> None:
        self._loop = loop
        self._context = copy_context()  # of open(): its timer is for all who wait
        self._line = line
        self._expire = expire
        self._help = help
        self._deadlock = deadlock
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
        self._due = max(min(due, now + self.TICK), now + self.FINEST)
        self._timer = self._loop.call_later(self._due - now, self._tick, context=self._context)

    def _tick(self) -> None:
        now = monotonic()
        late = now - self._due
        if late >= self.STALL:
            self._stalls.append((now, late))
            self._stalled += 1
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


# --- those who hold ---------------------------------------------------------------------------


class EndedTask:
    """Stands for a task that has ended, and still holds a connection."""

    __slots__ = ("_name",)

    def __init__(self, name: str) -> None:
        self._name = name

    def get_name(self) -> str:
        """Return the name that the task had."""
        return self._name

    def done(self) -> bool:
        """Return True, as the task would."""
        return True


Holder: TypeAlias = asyncio.Task[Any] | EndedTask | None
"""Who holds a connection; None once it was given back."""


class Checkout:
    """
    One connection held by one task: who, since when, from which line, and how much it was used.

    Keeps the task itself, for as long as it runs or `Ledger.let_go()` has not looked at it.
    """

    __slots__ = (
        "busy_seconds",
        "busy_since",
        "changed_at",
        "code",
        "failed_later",
        "left_in",
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
        code: Code,
        lineno: int,
        structured: bool,
        since: float,
    ) -> None:
        self.session = session
        self.task: Holder = task
        self.code = code
        self.lineno = lineno
        self.structured = structured
        """True if a block of the task's own gives it back: nobody else is going to."""
        self.since = self.changed_at = since
        self.busy_seconds = self.busy_since = 0.0
        """Seconds spent in queries; when the one that runs now began, 0.0 if none does."""
        self.used = self.reported = False
        """True once anything was asked of the server; once it was logged as a suspected leak."""
        self.left_in = 0
        """libpq's transaction status after the last exchange; 0: nothing can be lost."""
        self.failed_later = False
        """True if the transaction has failed, and not by the first thing that was asked in it."""
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
        return self.stack_in_words(self.stack)

    @staticmethod
    def stack_in_words(stack: traceback.StackSummary | None) -> str:
        """Return a stack that was kept in lines."""
        return "".join(traceback.format_list(stack[::-1])) if stack else ""

    @property
    def task_name(self) -> str:
        """Name of the task that acquired."""
        task = self.task  # read once: a snapshot may be taken in another thread
        return task.get_name() if task else self.name

    def facts(self) -> dict[str, Any]:
        """Return what a log has of it."""
        return {
            "acquired": str(self),
            "task": self.task_name,
            "site": site(self.code, self.lineno),
            "function": function_of(self.code),
            "held_seconds": self.held_seconds,
        }

    def __str__(self) -> str:
        return f'in task "{self.task_name}" at {asker(self.code, self.lineno)}'


class _Window:
    """Sums over a stretch of time."""

    __slots__ = ("began", "busy_seconds", "ends", "gave_up", "held_seconds", "released")

    def __init__(self, began: float) -> None:
        self.began = began
        self.ends = began + Ledger.WINDOW
        self.released = self.gave_up = 0
        self.held_seconds = self.busy_seconds = 0.0

    def add(self, checkout: Checkout, now: float) -> None:
        """Count a checkout that ends."""
        self.released += 1
        self.held_seconds += now - checkout.since
        self.busy_seconds += checkout.busy_seconds

    def copy(self) -> _Window:
        """Return one that does not go on."""
        window = _Window(self.began)
        for name in self.__slots__:
            setattr(window, name, getattr(self, name))
        return window


class Load:
    """What was asked of a pool lately, as it was at one moment; cheap to take and to keep."""

    __slots__ = ("_held", "_when", "_windows")

    def __init__(self, windows: tuple[_Window, ...], held: int) -> None:
        self._windows = windows
        self._held = held
        self._when = monotonic()

    def lately(self) -> _facts.LoadRow:
        """Return what was asked of late, where nobody says since when."""
        return self.over(Ledger.LATELY)

    def over(self, seconds: float) -> _facts.LoadRow:
        """Return what was asked in the last *seconds*, to the length of a window."""
        since = self._when - seconds
        windows = [w for w in self._windows if w.ends > since] or self._windows[-1:]
        released = sum(window.released for window in windows)
        return _facts.LoadRow(
            window_seconds=self._when - windows[0].began,
            acquires=released + self._held,
            released=released,
            held_seconds=sum(window.held_seconds for window in windows),
            query_seconds=sum(window.busy_seconds for window in windows),
            gave_up=sum(window.gave_up for window in windows),
        )


class Ledger:
    """
    Who holds what, and how long connections are held lately.

    Args:
        leak_threshold: Seconds after which a checkout is a suspected leak; None to keep no
            stacks and suspect nobody.
    """

    WINDOW = 1.0
    """Seconds that the load is summed over, time and again."""

    WINDOWS = 64
    """How many of these are remembered."""

    LATELY = 10.0
    """Seconds that are meant where nobody says how many."""

    def __init__(self, leak_threshold: float | None) -> None:
        self.leak_threshold = leak_threshold
        self.held: dict[Checkout, None] = {}
        """Longest first."""
        self._past: deque[_Window] = deque(maxlen=self.WINDOWS)
        self._now = _Window(monotonic())

    def begins(self, checkout: Checkout, frame: FrameType | None) -> None:
        """Write a checkout down; *frame* is where it was asked for, if its stack is kept."""
        self.held[checkout] = None
        if frame is not None:
            checkout.stack = traceback.StackSummary.extract(
                traceback.walk_stack(frame), limit=32, lookup_lines=False
            )

    def ends(self, checkout: Checkout, now: float) -> None:
        """Strike a checkout out."""
        self.held.pop(checkout, None)
        task = checkout.task
        if task is not None:  # else the one who was here before was cut short
            checkout.name = task.get_name()
            checkout.task = None
        window = self._now
        if now > window.ends:
            window = self._turn(checkout.since, now)
        window.add(checkout, now)

    def gave_up(self, number: int) -> None:
        """Count tasks that have waited in vain."""
        window, now = self._now, monotonic()
        if now > window.ends:
            window = self._turn(now, now)
        window.gave_up += number

    def _turn(self, since: float, now: float) -> _Window:
        """Begin another window, with something that began at *since*, and return it."""
        last = self._now
        self._past.append(last)
        # If nothing was asked for in between, that is not "lately".
        window = self._now = _Window(max(last.ends, since))
        window.ends = max(window.ends, now)
        return window

    @property
    def last_began(self) -> float:
        """When the last of those who hold a connection acquired it; 0.0 if nobody does."""
        return next(reversed(self.held)).since if self.held else 0.0

    def let_go(self) -> None:
        """
        Keep the tasks no longer that have ended and still hold a connection.

        A task keeps the exception that it ended by, whose traceback keeps the connection: nobody
        would ever see that it was dropped.
        """
        ended: dict[object, EndedTask] = {}
        for checkout in list(self.held):
            task = checkout.task
            if isinstance(task, asyncio.Task) and task.done():
                checkout.task = ended.setdefault(task, EndedTask(task.get_name()))

    def longest_first(self) -> list[Checkout]:
        """Return who holds a connection."""
        return list(self.held)

    def load(self) -> Load:
        """Return what was asked of the pool lately; those who hold a connection have arrived."""
        return Load((*self._past, self._now.copy()), len(self.held))

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
        Tell whether nobody could ever be served if *task*, which holds, joined *line* now.

        That is so if each of the pool's *connections* is held by a block of a task that waits
        for one more itself. A connection from ``getconn()`` may be given back by anybody, so
        one of those is enough to say no; and so is a task that waits with a shorter time-out than
        the caller's *timeout*: it will give up first, and go on without.
        """
        if len(self.held) < connections:
            return False
        holds = False
        for checkout in self.held:
            if not checkout.structured:
                return False
            if checkout.task is task:
                holds = True
            else:
                waiter = line.tasks.get(checkout.task)
                if waiter is None or waiter.timeout < timeout:
                    return False
        return holds

    def deadlock_lasts(self, line: Line, connections: int, since: float) -> bool:
        """Tell whether all who hold the pool's *connections* do and wait in *line* since then."""
        return len(self.held) >= connections and all(
            checkout.structured
            and checkout.since <= since
            and (waiter := line.tasks.get(checkout.task)) is not None
            and waiter.since <= since
            for checkout in self.held
        )
