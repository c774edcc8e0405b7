"""
Who holds a connection, since when, and how long connections are held lately.

Everything here is synchronous and belongs to the owner loop: no await stands between reading
the state and changing it, so a cancellation can never come in between.
"""

from __future__ import annotations

import asyncio
import traceback
from collections import deque
from time import monotonic
from types import FrameType
from typing import Any, TypeAlias

from ._line import Line
from ._snapshot import LoadRow
from ._status import ACTIVE, IDLE, INERROR, UNKNOWN
from ._where import Code, answering, asker, function_of, site


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


ACQUIRED, SUSPECTED = 1, 2
"""What may have been told of a checkout, so that its end is to be told as well."""


class Checkout:
    """
    One connection held by one task: who, since when, from which line, and how much it was used.

    Keeps the task itself, for as long as it runs or `Ledger.let_go()` has not looked at it.
    """

    __slots__ = (
        "busy_seconds",
        "busy_since",
        "caller",
        "changed_at",
        "code",
        "failed_later",
        "left_in",
        "lineno",
        "name",
        "session",
        "since",
        "stack",
        "structured",
        "task",
        "told",
        "used",
    )

    caller: Any
    """Who acquires, as events have it; only if `ACQUIRED` was told."""

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
        self.used = self.told = 0
        """How often the server was asked something; what was told of it, `ACQUIRED` and so on."""
        self.left_in = 0
        """libpq's transaction status after the last exchange; 0: nothing can be lost."""
        self.failed_later = False
        """True if the transaction has failed, and not by the first thing that was asked in it."""
        self.stack: traceback.StackSummary | None = None
        self.name = ""
        """Name of the task, once the connection was given back."""

    def note_exchange(self, status: int, seconds: float, now: float) -> None:
        """
        Note that something was asked of the server.

        Args:
            status: libpq's transaction status after it.
            seconds: How long it took.
            now: When it ended.
        """
        # Neither in the middle of a stream, nor lost: what was before is what counts then.
        if status != self.left_in and status != UNKNOWN:
            if status == ACTIVE:
                if self.session is not None:
                    self.session.streamed = True
            else:
                self.failed_later = status == INERROR and self.left_in != IDLE
                self.left_in = status
        self.changed_at = now
        self.busy_seconds += seconds
        self.busy_since = 0.0
        self.used += 1

    @property
    def reported(self) -> bool:
        """True once it was told as a suspected leak."""
        return bool(self.told & SUSPECTED)

    @property
    def at(self) -> tuple[Code, int]:
        """Where it was acquired."""
        return self.code, self.lineno

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
        code = answering(self.code, self.task)
        return f'in task "{self.task_name}" at {asker(code, self.lineno)}'


class _Window:
    """Sums over a stretch of time."""

    __slots__ = ("began", "busy_seconds", "ends", "gave_up", "held_seconds", "released")

    def __init__(self, began: float) -> None:
        self.began = began
        self.ends = began + Ledger.WINDOW
        self.released = self.gave_up = 0
        self.held_seconds = self.busy_seconds = 0.0

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

    def lately(self) -> LoadRow:
        """Return what was asked of late, where nobody says since when."""
        return self.over(Ledger.LATELY)

    def over(self, seconds: float) -> LoadRow:
        """Return what was asked in the last *seconds*, to the length of a window."""
        since = self._when - seconds
        windows = [w for w in self._windows if w.ends > since] or self._windows[-1:]
        released = sum(window.released for window in windows)
        return LoadRow(
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
        window.released += 1
        window.held_seconds += now - checkout.since
        window.busy_seconds += checkout.busy_seconds

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
