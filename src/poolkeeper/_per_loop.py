"""
`PoolPerLoop`: a pool for each event loop of a program, all under one budget of connections.

How the budget is shared:

- A loop that asks for the first time is granted its manager's `max_size`, or what is left of the
  budget, one connection at least. If nothing is left, the loops that have more than an equal share
  are cut down to it, and the new one waits until something is free.
- A loop gives back what it has when it ends. One that has less than its manager's `max_size` gets
  more when it asks again and something is left.
- A grant is kept by a gate before each connection that is made, so nothing that a pool does can
  pass it. A session counts until its process on the server is gone, which its socket tells.

The grants are shared by threads, and changed under one lock, which is never held across an await.
"""
# A pool's settings are put right before it is opened, which is nobody's business but this one's.
# pyright: reportPrivateUsage=false

from __future__ import annotations

import asyncio
import sys
import threading
import weakref
from collections import Counter
from collections.abc import AsyncGenerator, Callable
from contextlib import suppress
from time import monotonic
from types import FrameType
from typing import Any, Generic, cast

import psycopg
from psycopg import pq
from typing_extensions import override

from ._binding import beginning, in_forked_child, inherited
from ._closing import abandon, bury
from ._config import require_callable, require_integer
from ._life import Life
from ._manager import ACT_co, PoolManager
from ._sessions import Sessions
from ._where import Place, call_site, describe_loop, running_loop, site, warn_user
from .errors import (
    ConfigError,
    LoopMismatchError,
    LoopPerCallWarning,
    OpenError,
    briefly,
    see,
)

ACTIVE = pq.TransactionStatus.ACTIVE

_LOOK_EVERY = 0.01
"""Seconds between two looks whether something of the budget is free."""

_SHORT = 10.0
"""Seconds of a life up to which a loop may be one of those that are made for each call."""

_MANY = 3
"""How many loops of one line, one after the other, are loops made per call."""

_all: weakref.WeakSet[PoolPerLoop[Any]] = weakref.WeakSet()


class PoolPerLoop(Generic[ACT_co]):
    """
    Gives each event loop of the program a pool of its own, all under one budget of connections.

    For programs that truly run several loops: one in each thread, or one after the other. Where
    the code that needs connections is not async, a `Portal` is cheaper.

    Each process has its own: a forked child begins with the whole budget.

    Args:
        make: Makes a manager, which nobody else opens: ``lambda: PoolManager(DSN, max_size=4)``.
            Its `max_size` is the most that one loop gets, its `min_size` is lowered to what it
            gets, its `open_timeout` is the time that a loop waits for a share.
        budget: Connections of all loops together, at most.

    Raises:
        ConfigError: If *make* cannot be called, or *budget* is no number above 0.

    .. versionadded:: 0.1.0
    """

    def __init__(self, make: Callable[[], PoolManager[ACT_co]], *, budget: int) -> None:
        require_callable("a function that makes a manager: lambda: PoolManager(...)", make=make)
        require_integer(budget=(budget, 1))
        self._make = make
        self._budget = budget
        self._site = call_site()
        self._begin()
        _all.add(self)

    def _begin(self) -> None:
        self._lock = threading.RLock()
        self._shares: dict[asyncio.AbstractEventLoop, Share] = {}
        self._leaving: list[Sessions] = []
        """Sessions of loops that have ended, whose processes on the server may not have yet."""
        self._made: weakref.WeakSet[PoolManager[Any]] = weakref.WeakSet()
        """What *make* has returned."""
        self._waiting = 0
        """How many loops wait for a share."""
        self._short_lives: Counter[str] = Counter()
        """How many loops each line of the program has run that ended soon."""
        self._told: set[str] = set()
        """Lines that were told to run too many."""

    @property
    def budget(self) -> int:
        """Connections of all loops together, at most."""
        return self._budget

    @override
    def __repr__(self) -> str:
        with self._lock:
            shares = list(self._shares.values())
            free = self._free()
        return f"<PoolPerLoop budget={self._budget} free={free} loops={len(shares)}>"

    @briefly
    async def current(self) -> PoolManager[ACT_co]:
        """
        Return the manager of the running loop, opened on first use.

        It is closed when its loop ends: `asyncio.run()`, `asyncio.Runner` and whatever else calls
        ``loop.shutdown_asyncgens()`` wait for that. A loop that ends without is found dead by the
        next that needs something, and its sessions are ended.

        Raises:
            LoopMismatchError: If no loop is running.
            ConfigError: If *make* returns no manager, or one that it has returned before.
            OpenError: If the pool cannot be opened, or if nothing of the budget was free within
                the manager's `open_timeout`; says which loops have how much.

        .. versionadded:: 0.1.0
        """
        loop = running_loop()
        if loop is None:
            raise LoopMismatchError(
                "there is no event loop whose pool current() could return",
                detail=f"Called {Place.here()}.",
                hint=f"Await it in a coroutine; for code without one there is Portal."
                f" {see('loop-mismatch')}",
            )
        while True:
            share = self._shares.get(loop) or self._admit(loop)
            if share.is_complete() or await self._get_ready(share):
                return cast("PoolManager[ACT_co]", share.manager)

    @briefly
    async def close(self) -> None:
        """
        Close the pool of the running loop now, rather than when the loop ends.

        The next `current()` opens one again. Does nothing if there is none.

        .. versionadded:: 0.1.0
        """
        loop = running_loop()
        share = self._shares.get(loop) if loop is not None else None
        if share is not None and share.keeper is not None:
            await share.keeper.aclose()

    # --- one loop -----------------------------------------------------------------------------

    def _admit(self, loop: asyncio.AbstractEventLoop) -> Share:
        self._bury()
        share = Share(self._new_manager(), loop, self._lock)
        self._warn_of_loop_per_call(share)
        with self._lock:
            self._shares[loop] = share
        return share

    def _new_manager(self) -> PoolManager[ACT_co]:
        manager = self._make()
        what = f"a {type(manager).__name__}"
        if isinstance(cast(object, manager), PoolManager):
            with self._lock:
                if manager not in self._made:
                    self._made.add(manager)
                    return manager
            what = "the manager of another loop"
        raise ConfigError(
            f"make has returned {what}",
            parameter="make",
            detail="Each loop has a manager of its own, which is made when the loop asks first.",
            hint=f"Let it make one: lambda: PoolManager(...). {see('config')}",
        )

    async def _get_ready(self, share: Share) -> bool:
        """Grant what is free to *share*, and open its pool; return False if it is over."""
        async with share.opening:
            if self._shares.get(share.loop) is not share:
                return False
            if not self._grant(share):
                await self._wait_for_grant(share)
            if share.manager.state == "open":
                await share.follow()
                return True
            share.fit()
            try:
                await share.manager.open(caller=self._site)
            except BaseException:
                await self._end(share)
                raise
            if share.keeper is None:
                share.keeper = self._keep(share)
                await anext(share.keeper)
            return True

    async def _keep(self, share: Share) -> AsyncGenerator[None]:
        """End with the loop, which closes all generators that it knows, and close the pool."""
        try:
            yield
        finally:
            if not share.is_dead():
                await self._end(share)

    async def _end(self, share: Share) -> None:
        try:
            with suppress(LoopMismatchError):  # somebody else has opened it
                await share.manager.close()
        finally:
            self._strike_out(share)

    def _bury(self) -> None:
        """End the pools of loops that have died without a word."""
        with self._lock:
            dead = [share for share in self._shares.values() if share.is_dead()]
        for share in dead:
            share.abandon()
            self._strike_out(share)

    def _strike_out(self, share: Share) -> None:
        with self._lock:
            if self._shares.get(share.loop) is share:
                del self._shares[share.loop]
                self._leaving.append(share.sessions)
                if monotonic() - share.began < _SHORT:
                    self._short_lives[share.runner] += 1

    def _warn_of_loop_per_call(self, share: Share) -> None:
        line = share.runner
        number = self._short_lives[line]
        if number >= _MANY and line not in self._told:
            self._told.add(line)
            warn_user(
                f"{line} has run {number} event loops, one after the other, and each has opened and"
                f' closed pool "{share.manager.name}": a loop per call costs more than the work.'
                " Keep one: asyncio.run() around the whole program, or a Portal",
                LoopPerCallWarning,
                line,
            )

    # --- the budget ---------------------------------------------------------------------------

    def _free(self) -> int:
        self._leaving = [sessions for sessions in self._leaving if sessions.count()]
        taken = sum(share.taken for share in self._shares.values())
        return self._budget - taken - sum(sessions.count() for sessions in self._leaving)

    @property
    def _equal(self) -> int:
        """An equal share, if all had one."""
        return max(1, self._budget // max(1, len(self._shares)))

    def _grant(self, share: Share) -> bool:
        """Grant what is free; return whether *share* has anything."""
        with self._lock:
            # While somebody has nothing, nobody gets more than an equal share.
            most = min(share.wanted, self._equal) if self._waiting else share.wanted
            share.allowed += max(0, min(most - share.allowed, self._free()))
            return share.allowed > 0

    async def _wait_for_grant(self, share: Share) -> None:
        seconds = share.manager._open_timeout
        until = monotonic() + seconds
        with self._lock:
            self._waiting += 1
        try:
            while not self._grant(share):
                if monotonic() >= until:
                    raise self._nothing_free(share, seconds)
                self._bury()
                self._cut_down()
                await asyncio.sleep(_LOOK_EVERY)
        except BaseException:
            self._strike_out(share)
            raise
        finally:
            with self._lock:
                self._waiting -= 1

    def _cut_down(self) -> None:
        """Cut those down who have more than an equal share."""
        with self._lock:
            larger = [share for share in self._shares.values() if share.allowed > self._equal]
            for share in larger:
                share.allowed = self._equal
        for share in larger:
            share.shrink()

    def _nothing_free(self, share: Share, seconds: float) -> OpenError:
        with self._lock:
            others = [one for one in self._shares.values() if one is not share]
        used = "; ".join(map(str, others)) or "sessions that were closed and have not ended"
        close = "close those that do not run; " if any(one.is_left() for one in others) else ""
        return OpenError(
            f'pool "{share.manager.name}" could not be opened on this loop within {seconds:.2f} s:'
            f" the budget of {self._budget} connections is used up",
            detail=f"Used by others: {used}.",
            hint=f"A share is free when its loop ends: {close}run no more loops at once than the"
            f" budget has connections, or raise it. {see('budget')}",
        )


class Share:
    """
    What one loop has of the budget, and its manager.

    Args:
        manager: The manager, which was not opened yet.
        loop: The loop, which runs.
        lock: The lock of the budget.
    """

    def __init__(
        self, manager: PoolManager[Any], loop: asyncio.AbstractEventLoop, lock: threading.RLock
    ) -> None:
        self.manager = manager
        self.loop = loop
        self.runner = _who_runs(sys._getframe(1))
        self.began = monotonic()
        self.opening = asyncio.Lock()
        self.keeper: AsyncGenerator[None] | None = None
        self.allowed = 0
        """How many connections are granted."""
        self.sessions = Sessions(lambda: self.allowed, lock)
        self._in_words = describe_loop(loop)
        self._thread = threading.current_thread()
        self._resizing: asyncio.Task[None] | None = None
        options = manager._pool._options
        self._least, self.wanted = options.min_size, options.max_size
        self.sessions.watch(manager._pool)

    def __str__(self) -> str:
        number, _, kind = self._in_words.partition("/")
        left = ", which does not run and was not closed" if self.is_left() else ""
        return (
            f'{self.taken} by loop {number} ({kind}, thread "{self._thread.name}"), run at'
            f" {self.runner}, for {monotonic() - self.began:.1f} s{left}"
        )

    @property
    def taken(self) -> int:
        """How many connections nobody else can have: more than are granted, until it shrinks."""
        return max(self.allowed, self.sessions.count())

    def is_complete(self) -> bool:
        """Tell whether it is open with all that it may have."""
        return self.allowed == self.wanted and self.manager.state == "open"

    def is_dead(self) -> bool:
        """Tell whether the loop will never run again: it is closed, or its thread has ended."""
        if self.loop.is_closed():
            return True
        return not self.loop.is_running() and not self._thread.is_alive()

    def is_left(self) -> bool:
        """Tell whether the loop stands still, in a thread that may run it again, or never."""
        return not self.loop.is_running() and not self.is_dead()

    def fit(self) -> None:
        """Let the pool, which is not open, have as many connections as are granted."""
        pool = self.manager._pool
        pool._options = pool._options._replace(
            min_size=min(self._least, self.allowed), max_size=self.allowed
        )

    async def follow(self) -> None:
        """Let the pool, which is open, have as many as are granted."""
        pool = self.manager.pool
        if self.manager.state in ("opening", "open") and pool.max_size != self.allowed:
            await pool.resize(min(self._least, self.allowed), self.allowed)

    def shrink(self) -> None:
        """Let the pool close what it may not have any more; from any thread."""
        with suppress(RuntimeError):  # the loop is closed
            self.loop.call_soon_threadsafe(self._shrink)

    def _shrink(self) -> None:
        self._resizing = self.loop.create_task(self.follow(), name=f"{self.manager.name}-shrink")

    def abandon(self) -> None:
        """End the sessions, for the loop is dead."""
        with beginning():
            life = self.manager._pool._life
            if not isinstance(life, Life):
                return
            # A server that is at work does not look whether its client is still there.
            active = [
                one.pgconn for one in life.sessions if one.pgconn.transaction_status == ACTIVE
            ]
            requests = [pgconn.get_cancel() for pgconn in active]
            abandon(life)
        bury(life)
        if requests:
            threading.Thread(target=_stop, args=(requests,), daemon=True).start()


def _stop(requests: list[pq.abc.PGcancel]) -> None:
    """Let the server stop what nobody waits for; in a thread, for it may not answer."""
    for request in requests:
        with suppress(psycopg.Error):
            request.cancel()


def _who_runs(innermost: FrameType) -> str:
    """Return ``file:line`` of what runs the loop; of who asks, if that cannot be seen."""
    frame: FrameType | None = innermost
    while frame is not None and not _is_of_loop(frame):
        frame = frame.f_back
    while frame is not None and _is_of_loop(frame):
        frame = frame.f_back
    return site(frame.f_code, frame.f_lineno) if frame is not None else call_site()


def _is_of_loop(frame: FrameType) -> bool:
    package = str(frame.f_globals.get("__name__", "")).partition(".")[0]
    return package in ("asyncio", "uvloop")


def _after_fork_in_child() -> None:
    for pools in list(_all):
        inherited.append((list(pools._shares.values()), pools._leaving))
        pools._begin()


in_forked_child(_after_fork_in_child)
