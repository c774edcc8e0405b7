"""
When the connections of a pool are made: `Connector`.
"""

from __future__ import annotations

import asyncio
from contextvars import copy_context
from time import monotonic
from typing import Protocol, cast

from . import _attempt, _conninfo
from ._attempt import Attempt, Failure
from ._binding import weakly


class Pool(Protocol):
    """What the connector asks of the pool that it makes connections for."""

    name: str

    @property
    def num_workers(self) -> int:
        """How many connections may be made at once."""
        ...

    async def make_connection(self) -> None:
        """Make one connection, configure it and add it to the pool."""
        ...

    def may_start_tasks(self) -> bool:
        """Tell whether a task that is started now is not one that asyncio.run() will miss."""
        ...

    def spare_attempts(self, wanted: int) -> int:
        """Give up as many of *wanted* attempts as nobody needs any more, and return how many."""
        ...

    def in_need(self) -> bool:
        """Tell whether somebody waits, and there is no connection that may come back."""
        ...

    def room(self) -> int:
        """Return how many attempts may be under way: ``max_size`` less the sessions there are."""
        ...

    def connect_failed(self, failure: Failure, began: float) -> None:
        """Note that an attempt, which *began* then, has failed or has no answer for long."""
        ...

    def outage_over(self, seconds: float, attempts_failed: int) -> None:
        """Note that one can be made again, after so many *seconds*."""
        ...

    def outage_goes_on(self, seconds: float) -> None:
        """Note that for so many *seconds* no connection could be made."""
        ...


class Connector:
    """
    Makes the connections of one life of a pool.

    While the server answers, as many at once as the pool has workers. Once an attempt fails, one
    probe every `PROBE_EVERY` seconds, until one succeeds; then all that are missing, at once.
    psycopg_pool's own way is to retry each lost connection on a schedule of its own that doubles
    without a bound: the longer the outage, the later it notices that it is over.

    There are never more sessions and attempts together than ``max_size``, and an attempt is let
    go on for as long as psycopg lets it: the ``connect_timeout`` of each server of a list, one
    after the other. But one without an answer (a server that went silent, packets that are
    dropped) does not stop the probing. Where there is room, another is started beside it, and
    where there is none left, the youngest is given up for a new one. So a server that answers new
    connections only is noticed as soon, and the oldest has the time that a slow login needs.
    Where there is room for one only, see `_may_replace()`.

    What is silence is learnt from logins: before the first one has ended, one way or the other,
    an attempt is left alone for `FIRST_LOGIN` seconds.
    """

    PROBE_EVERY = 0.25
    PROBE_EVERY_IF_PERMANENT = 2.0
    PROBE_IF_PERMANENT_AND_ASKED = 0.5
    BESIDE_AFTER = 0.5
    FIRST_LOGIN = 3.0
    LOGINS = 3.0
    """How much longer than the last login an attempt may take until another is started."""
    TOLD_AFTER = 4.0
    """Seconds without an answer after which that is told of."""
    PATIENCE = 1.0
    MORE_PATIENCE = 1.5
    MOST_PATIENCE = 60.0

    def __init__(self, pool: Pool, loop: asyncio.AbstractEventLoop) -> None:
        self._pool = pool
        self._loop = loop
        self._context = copy_context()  # of open(): see BoundPool.start_own_task()
        self.wanted = 0
        """Connections to make; there may be more attempts than that, some beside others."""
        self._attempts: dict[asyncio.Task[None], Attempt] = {}
        self._given_up: set[asyncio.Task[None]] = set()
        self._login_seconds: float | None = None
        """How long the last attempt that was answered had to wait for it."""
        self._heard_at = 0.0
        """When an attempt ended last, one way or the other, that nobody gave up."""
        self._silent_since: float | None = None
        """Since when those under way, and those given up before them, have had no answer."""
        self._silence_told = False
        self._timer: asyncio.TimerHandle | None = None
        self._due = 0.0
        """When the timer calls; one of uvloop's that is due at once has no ``when()``."""
        self._patience = self.PATIENCE
        self._stopped = False
        self.last_failure: Failure | None = None
        """Why the last attempt failed; None if it succeeded."""
        self.last_failed = 0.0
        self.failing_since = 0.0
        self.failures = 0
        """Attempts that failed since the last success."""

    @property
    def pending(self) -> int:
        """How many attempts have no answer yet."""
        return len(self._attempts)

    @property
    def attempts(self) -> list[Attempt]:
        """The attempts under way, the oldest first; each tells what it waits for."""
        return list(self._attempts.values())

    @property
    def last_error(self) -> Exception | None:
        """What the last attempt raised; None if it succeeded."""
        return None if self.last_failure is None else self.last_failure.error

    @property
    def next_attempt_seconds(self) -> float | None:
        """Seconds until the next probe; None if none is due."""
        if self._timer is None or self.last_failure is None:
            return None
        return max(0.0, self._due - self._loop.time())

    def add(self) -> None:
        """Make one more connection."""
        self.wanted += 1
        self.go_on()

    def go_on(self) -> None:
        """Start what may be started now. Harmless at any time; mends what was cancelled."""
        if self._stopped or not self._pool.may_start_tasks():
            return
        if self.last_failure is None:
            while len(self._attempts) < min(self.wanted, self._pool.num_workers):
                self._start()
        self._arm()

    def answered(self) -> None:
        """Note that the server has answered the attempt that runs now."""
        attempt = _attempt.attempt_here()
        self._login_seconds = monotonic() - attempt.began
        attempt.was_answered = True

    def claim(self) -> bool:
        """Tell whether a connection that was made is still wanted; it is not, from here on."""
        if self.wanted <= 0:
            return False
        self.wanted -= 1
        return True

    def stop(self) -> list[asyncio.Task[None]]:
        """Give every attempt up; return their tasks, which end on the next turns of the loop."""
        self._stopped = True
        self._disarm()
        tasks = list(self._attempts)
        for task in tasks:
            task.cancel()
        return tasks

    def abandon(self) -> list[asyncio.Task[None]]:
        """Return the tasks of the attempts; their loop will never run again."""
        self._stopped = True
        return list(self._attempts)

    def _start(self) -> None:
        attempt = Attempt()
        task = self._context.copy().run(
            self._loop.create_task,
            self._attempt(attempt),
            name=f"{self._pool.name}-connect",
        )
        self._attempts[task] = attempt
        task.add_done_callback(self._attempted)

    async def _attempt(self, attempt: Attempt) -> None:
        # No task in a variable here: one that is cancelled would keep its frames, and a socket.
        _attempt.enter(attempt)
        try:
            await self._pool.make_connection()
        except Exception as ex:
            self._ended(asyncio.current_task())
            if self._stopped:
                return  # of no concern to the life that may have begun
            self._was_heard()
            if self._login_seconds is None and attempt.function is None:
                self._login_seconds = 0.0  # the server was heard of
            self._failed(attempt.failure(ex), attempt.began)
        else:
            self._ended(asyncio.current_task())
            self._was_heard()
            self._succeeded()

    def _was_heard(self) -> None:
        self._heard_at = monotonic()
        self._silent_since = None
        self._silence_told = False

    def _ended(self, task: asyncio.Task[None] | None) -> None:
        self._attempts.pop(cast("asyncio.Task[None]", task), None)

    def _attempted(self, task: asyncio.Task[None]) -> None:
        self._ended(task)
        if not task.cancelled() or task in self._given_up:
            self._given_up.discard(task)
            self.go_on()
        else:
            # From outside: asyncio.run() is ending, or somebody cancelled every task. It is
            # still wanted; the next waiter lets it go on.
            self._disarm()

    def _failed(self, failure: Failure, began: float) -> None:
        now = monotonic()
        before = self.last_failure
        if before is None:
            self.failing_since = now if self._silent_since is None else self._silent_since
        if before is None or before.is_permanent is not failure.is_permanent:
            self._disarm()  # the interval is another one
        self.last_failure = failure
        self.last_failed = now
        self.failures += 1
        self._pool.connect_failed(failure, began)

    def _succeeded(self) -> None:
        if self.last_failure is not None:
            self._pool.outage_over(monotonic() - self.failing_since, self.failures)
        self.last_failure = None
        self.failures = 0
        self._patience = self.PATIENCE
        self._disarm()
        silent = self._silent()
        for task in silent[max(0, self.wanted - (len(self._attempts) - len(silent))) :]:
            self._give_up(task)

    def _silent(self) -> list[asyncio.Task[None]]:
        """Return the attempts that have no answer yet, the oldest first."""
        return [task for task, attempt in self._attempts.items() if not attempt.was_answered]

    def _give_up(self, task: asyncio.Task[None]) -> None:
        self._given_up.add(task)
        task.cancel()

    def _disarm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def hurry(self) -> None:
        """Let somebody who waits now not wait for long to learn that it is in vain."""
        if self._timer is None or self.last_failure is None or not self.last_failure.is_permanent:
            return
        soon = self.last_failed + self.PROBE_IF_PERMANENT_AND_ASKED - monotonic()
        if self._due - self._loop.time() > soon:
            self._disarm()
            self._arm(max(0.0, soon))

    def _arm(self, delay: float | None = None) -> None:
        if self._timer is not None or self._stopped or not self.wanted:
            return
        if delay is None:
            failed = self.last_failure
            delay = self.PROBE_EVERY
            if failed is not None and failed.is_permanent:
                asked = self._pool.in_need()
                delay = (
                    self.PROBE_IF_PERMANENT_AND_ASKED if asked else self.PROBE_EVERY_IF_PERMANENT
                )
        self._due = self._loop.time() + delay
        self._timer = self._loop.call_later(delay, weakly(self._probe), context=self._context)

    def _probe(self) -> None:
        self._timer = None
        if not self._pool.may_start_tasks():
            return
        if self.last_failure is not None:
            self._pool.outage_goes_on(monotonic() - self.failing_since)
            self.wanted -= self._pool.spare_attempts(self.wanted - len(self._attempts))
        if self.wanted and self._may_start_beside():
            self._start()
        self.go_on()

    def _may_start_beside(self) -> bool:
        """Tell whether a probe may start although others have had no answer yet."""
        silent = self._silent()
        if not silent:
            return not self._attempts
        now = monotonic()
        oldest, youngest = self._attempts[silent[0]], self._attempts[silent[-1]]
        usual = self._login_seconds
        long = self.FIRST_LOGIN if usual is None else self.LOGINS * usual
        if self._silent_since is None:
            self._silent_since = max(oldest.began, self._heard_at)
        if not self._silence_told and now - self._silent_since >= max(self.TOLD_AFTER, long):
            self._silence_told = True
            self._failed(oldest.silence(now - self._silent_since), oldest.began)
        if now - youngest.began < max(self.BESIDE_AFTER, long):
            return False
        if len(self._attempts) < min(self._pool.room(), max(2, self._pool.num_workers)):
            return True
        if len(silent) > 1:
            if youngest.function is None:  # what the user does is not ours to give up
                self._give_up(silent[-1])
        elif self._may_replace(oldest, max(self._patience, 2 * long), now):
            self._patience = min(self._patience * self.MORE_PATIENCE, self.MOST_PATIENCE)
            self._give_up(silent[0])
        return False

    def _may_replace(self, attempt: Attempt, patience: float, now: float) -> bool:
        """
        Tell whether the only attempt that there is room for may be given up for a new one.

        Only one that may be in vain for as long as psycopg's default, two minutes for each
        address: the user has not said how long it may take, and there is no second server that
        it would come to. With growing patience, for it may be a login that has become slow.
        """
        return (
            now - attempt.began >= patience
            and attempt.function is None
            and not _conninfo.has_timeout(attempt.params)
            and _conninfo.servers(attempt.params) == 1
        )
