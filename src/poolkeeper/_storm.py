"""
Time-outs that come together: the first is logged, and at their end how many there were.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from contextvars import Context
from time import monotonic
from typing import Any, Protocol

from ._binding import weakly
from ._log import log
from .errors import AcquireTimeout


class Pool(Protocol):
    """What is asked of the pool."""

    name: str

    def counts(self) -> dict[str, int]:
        """Return its numbers."""
        ...


class Storm:
    """
    The time-outs of one life of a pool that come together.

    Args:
        pool: The pool.
        loop: Its owner loop.
        context: For the timer.
    """

    CALM = 5.0
    """Seconds without a time-out after which a storm is over."""

    def __init__(self, pool: Pool, loop: asyncio.AbstractEventLoop, context: Context) -> None:
        self._pool = pool
        self._loop = loop
        self._context = context
        self._number = 0
        self._began = self._last = 0.0
        self._timer: asyncio.TimerHandle | None = None

    def goes_on(
        self, error: AcquireTimeout, number: int, who: Callable[[], Mapping[str, Any]]
    ) -> None:
        """
        Note that acquires have failed; log it if it is the first of a storm.

        Args:
            error: That of one of them.
            number: How many.
            who: Returns what else is known of that one; called only if it is logged.
        """
        now = monotonic()
        if self._number and now - self._last > self.CALM:
            self.end()  # the loop stood still
        begins = not self._number
        self._number += number
        self._last = now
        if not begins:
            return
        self._began = now
        self._arm(self.CALM)
        diagnosis = error.diagnosis
        assert diagnosis is not None
        log(
            "acquire_timeout",
            {name: getattr(diagnosis.snapshot, name) for name in self._pool.counts()},
            who(),
            pool=self._pool.name,
            cause=diagnosis.cause,
            summary=diagnosis.summary,
            waited_seconds=diagnosis.snapshot.waited_seconds,
            detail=error.detail,
            hint=error.hint,
        )

    def end(self) -> None:
        """Say how many there were, unless one was all, which is told."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        number, self._number = self._number, 0
        if number > 1:
            log(
                "acquire_timeouts_over",
                self._pool.counts(),
                pool=self._pool.name,
                number=number,
                storm_seconds=self._last - self._began,
            )

    def _arm(self, seconds: float) -> None:
        self._timer = self._loop.call_later(seconds, weakly(self._look), context=self._context)

    def _look(self) -> None:
        left = self._last + self.CALM - monotonic()
        if left > 0:
            self._arm(left)
        else:
            self.end()
