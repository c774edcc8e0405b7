"""
Who waits for a connection, first come first served.

Everything here is synchronous and belongs to the owner loop: no await stands between reading
the state and changing it, so a cancellation can never come in between.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from itertools import islice, takewhile
from time import monotonic
from typing import Any

from typing_extensions import override

from ._where import Code
from .errors import another

MOST_GRACE = 1.0
"""Seconds that a waiter is given after its time, and after a stall of the loop, at most."""


class Place:
    """What a waiter that shares may be handed instead of a connection: a place on one."""

    __slots__ = ()

    def not_taken(self) -> None:
        """Note that the task does not come: it was cancelled in that very turn."""
        raise NotImplementedError


class Waiter:
    """A task still in acquire."""

    __slots__ = (
        "code",
        "deadline",
        "due",
        "future",
        "grace",
        "lineno",
        "seen",
        "shares",
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
        since: float = 0.0,
    ) -> None:
        self.future: asyncio.Future[Any] = loop.create_future()
        self.task = asyncio.current_task(loop)
        self.since = since or monotonic()
        self.timeout = timeout
        self.deadline = self.due = deadline
        """When its time is up; when the clock looks at it next."""
        self.grace = MOST_GRACE
        self.tick: dict[Waiter, None] | None = None
        """Among whom it is, until that comes near."""
        self.seen = 0
        """How many stalls of the loop it was given back, or was not there for."""
        self.suspected = 0.0
        """Since when it may be the one that completed a self-deadlock; 0.0 if it is not."""
        self.code = code
        self.lineno = lineno
        self.shares = False
        """True if a `Place` will do."""

    def offer(self, conn: Any) -> bool:
        """Hand *conn*, or a place, to the task. False if it waits no more."""
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


class Line(OrderedDict["Waiter", None]):
    """
    The waiters, first come first served. Holds only those that still wait.

    A dict, whose length and truth cost next to nothing: they are asked on every acquire and
    release. Leaving from the middle costs the same as leaving from the front, which a deque
    could not do: with ten thousand waiters a storm of cancellations would take seconds.
    """

    def __init__(self) -> None:
        super().__init__()
        self.tasks: dict[object, Waiter] = {}
        """The tasks that wait; a task waits once."""
        self._called: set[Waiter] = set()
        """Those who were taken out to be served, until their tasks go on."""

    def first(self, number: int) -> list[Waiter]:
        """Return so many at most of those who waited longest."""
        try:
            return list(islice(self, number))
        except RuntimeError:  # in another thread, and between these two calls it changed
            return list(self)[:number]  # in one

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

    def offer_place(self, place: Place) -> bool:
        """
        Hand *place* to the one who waited longest, if a place will do.

        False if that one is to have a connection of its own; or if nobody waits.
        """
        while self:
            if not next(iter(self)).shares:
                return False
            if self.popleft().offer(place):
                return True
        return False

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
