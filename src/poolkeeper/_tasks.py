"""
The tasks of one life of a pool: those that `close()` waits for, and the one that stays.

They run in the context of `open()`: what they call of the user's (`configure`, `reset`) is to see
nothing of the request that happens to be served.

The task that stays looks, once in a while, whether the pool can shrink. It is there for another
reason besides: when `asyncio.run()` ends, it cancels every task that there is, and nobody waits
for one that is started afterwards. As long as this one goes on, others may be started.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from contextlib import suppress
from contextvars import copy_context
from typing import Any

from ._binding import LoopBinding

SOONEST, LATEST = 0.05, 86_400.0
"""Seconds between two looks of the task that stays, at least and at most."""


class Tasks:
    """
    The tasks of one life.

    Args:
        binding: Of that life.
        every: Seconds between two calls of *work*.
        work: What the task that stays does; it does not keep the pool alive.
    """

    def __init__(self, binding: LoopBinding, every: float, work: Callable[[], object]) -> None:
        self.context = copy_context()
        """That of `open()`."""
        self.running: set[asyncio.Task[None]] = set()
        """Those that `close()` waits for."""
        self._binding = binding
        self._loop = asyncio.get_running_loop()
        self._every = min(max(every, SOONEST), LATEST)
        self._work = work
        self._freed: asyncio.Future[None] | None = None
        self._staying: asyncio.Task[None] | None = None

    def __del__(self) -> None:
        # The pool was dropped while it was open; in a forked child, the task is the parent's.
        if not self._binding.forked and (task := vars(self).get("_staying")) is not None:
            with suppress(RuntimeError):  # the loop is closed; this may be another thread
                self._loop.call_soon_threadsafe(task.cancel)

    def start(
        self,
        work: Callable[[], Coroutine[Any, Any, None]],
        name: str = "release",
        callers_context: bool = False,
    ) -> asyncio.Task[None]:
        """
        Start *work* in a task that `close()` waits for.

        In the context of `open()`, but for `check`, which is called for a request.
        """
        context = copy_context() if callers_context else self.context.copy()
        coroutine = work()
        try:
            task = context.run(
                self._loop.create_task, coroutine, name=f"{self._binding.name}-{name}"
            )
        except BaseException:  # RecursionError, say: it is not to keep what it works on
            coroutine.close()
            raise
        self.running.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[None]) -> None:
        self.running.discard(task)
        self.note_freed()

    def note_freed(self) -> None:
        """Wake who waits in `until_freed()`: a task has ended, or a connection is gone."""
        if self._freed is not None:
            set_done(self._freed)

    async def until_freed(self, timeout: float) -> None:
        """Wait until one of them has ended, or a connection is gone."""
        self._freed = self._loop.create_future()
        await asyncio.wait({self._freed}, timeout=timeout)

    def stay(self) -> None:
        """Start the task that stays, unless it is there: somebody may have cancelled it."""
        if self.may_start():
            return
        name = f"{self._binding.name}-keeper"
        self._staying = task = self.context.copy().run(
            self._loop.create_task, _stay(self._every, self._work), name=name
        )
        forget(task)

    def may_start(self) -> bool:
        """Tell whether a task that is started now is not one that `asyncio.run()` will miss."""
        task = self._staying
        return task is not None and not task.done() and not task.cancelling()

    def take_all(self) -> list[asyncio.Task[None]]:
        """Return all of them, for them to be ended."""
        staying, self._staying = self._staying, None
        return [*self.running, *([staying] if staying is not None else [])]


async def _stay(every: float, work: Callable[[], object]) -> None:
    while True:
        await asyncio.sleep(every)
        work()


def forget(task: asyncio.Task[None]) -> None:
    """Let *task* be dropped without a word, should its loop end without it."""
    task._log_destroy_pending = False  # type: ignore[attr-defined]  # pyright: ignore[reportAttributeAccessIssue]


def set_done(future: asyncio.Future[None]) -> None:
    """Wake who waits for *future*; it may be done already."""
    if not future.done():
        future.set_result(None)
