"""
Who waits for a connection, and who holds one.

Everything here is synchronous and belongs to the owner loop: no await stands between reading
the state and changing it, so a cancellation can never come in between.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Iterator
from time import monotonic
from types import CodeType
from typing import Any
from weakref import ref

from ._where import site


class Waiter:
    """
    A task still in acquire.

    Answers to `set()` and `fail()` as psycopg_pool's own waiting clients do, so that a
    connection made or returned by psycopg_pool reaches it in its turn.
    """

    __slots__ = ("future",)

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.future: asyncio.Future[Any] = loop.create_future()

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

    async def set(self, conn: Any) -> bool:
        """Do as `offer()`; psycopg_pool awaits this one."""
        return self.offer(conn)

    async def fail(self, error: Exception) -> bool:
        """Do as `refuse()`; psycopg_pool awaits this one."""
        self.refuse(error)
        return True


class Line:
    """
    The waiters, first come first served. Holds only those that still wait.

    Leaving from the middle costs the same as leaving from the front, which a deque could not
    do: with ten thousand waiters a storm of cancellations would take seconds.
    """

    __slots__ = ("_waiters",)

    def __init__(self) -> None:
        self._waiters: OrderedDict[Waiter, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._waiters)

    def __iter__(self) -> Iterator[Waiter]:
        return iter(list(self._waiters))

    def append(self, waiter: Waiter) -> None:
        """Let *waiter* join at the end."""
        self._waiters[waiter] = None

    def popleft(self) -> Waiter:
        """Take the one who waited longest."""
        return self._waiters.popitem(last=False)[0]

    def leave(self, waiter: Waiter) -> None:
        """Take *waiter* out, if it is still in."""
        self._waiters.pop(waiter, None)

    def clear(self) -> None:
        """Take everybody out, without telling them."""
        self._waiters.clear()

    def offer(self, conn: Any) -> bool:
        """Hand *conn* to the one who waited longest. False if nobody waits."""
        while self._waiters:
            if self.popleft().offer(conn):
                return True
        return False

    def refuse_all(self, error: BaseException) -> None:
        """Raise *error* in every waiter."""
        waiters = list(self._waiters)
        self._waiters.clear()
        for waiter in waiters:
            waiter.refuse(error)


class Checkout:
    """One connection held by one task: who, since when, from which line."""

    __slots__ = ("code", "lineno", "since", "task", "task_name")

    def __init__(self, code: CodeType, lineno: int) -> None:
        task = asyncio.current_task()
        assert task is not None  # the caller has checked that it is on the owner loop
        self.task = ref(task)
        self.task_name = task.get_name()
        self.code = code
        self.lineno = lineno
        self.since = monotonic()

    @property
    def by_this_task(self) -> bool:
        """True if the running task is the one that acquired."""
        return self.task() is asyncio.current_task()

    @property
    def held_seconds(self) -> float:
        """How long it lasts by now."""
        return monotonic() - self.since

    def __str__(self) -> str:
        return f'in task "{self.task_name}" at {site(self.code, self.lineno)}'
