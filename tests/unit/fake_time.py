"""A clock that stands still until it is told to go on, and the timers of a loop that follows it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from contextvars import Context
from typing import Any


class FakeTimer:
    """What `call_later()` returns: without ``when()``, as uvloop's that are due at once."""

    def __init__(self, due: float, callback: Callable[[], object]) -> None:
        self.due = due
        self.callback = callback
        self.cancelled = False

    def cancel(self) -> None:
        self.cancelled = True


class FakeLoop:
    """The running loop with the clock of the test; tasks run on the real one."""

    def __init__(self) -> None:
        self.now = 1000.0
        self._timers: list[FakeTimer] = []

    def time(self) -> float:
        return self.now

    def call_later(
        self, delay: float, callback: Callable[[], object], *, context: Context | None = None
    ) -> FakeTimer:
        timer = FakeTimer(self.now + delay, callback)
        self._timers.append(timer)
        return timer

    def call_soon(
        self, callback: Callable[[], object], *, context: Context | None = None
    ) -> FakeTimer:
        return self.call_later(0.0, callback)

    def create_task(
        self, work: Coroutine[Any, Any, Any], *, name: str | None = None
    ) -> asyncio.Task[Any]:
        return asyncio.get_running_loop().create_task(work, name=name)

    @property
    def timers(self) -> list[FakeTimer]:
        """Those that are still to come."""
        return sorted((t for t in self._timers if not t.cancelled), key=lambda timer: timer.due)

    def pass_time(self, seconds: float) -> None:
        """Let time pass; every timer is called when it is due."""
        until = self.now + seconds
        while (timers := self.timers) and timers[0].due <= until:
            self.now = max(self.now, timers[0].due)
            self._call(timers[0])
        self.now = until

    def stand_still(self, seconds: float) -> None:
        """Let time pass while nothing runs; timers that were due are called late, once."""
        self.now += seconds
        for timer in self.timers:
            if timer.due <= self.now:
                self._call(timer)

    def _call(self, timer: FakeTimer) -> None:
        self._timers.remove(timer)
        timer.callback()
