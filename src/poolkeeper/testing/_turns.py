"""
Who has the one connection of a sandbox: one task at a time, others in line.

What a task acquires while it holds lies inside of what it holds, as a savepoint. So does what is
acquired while the task that holds has ended, and so has handed its connection on.
"""
# pyright: reportPrivateUsage=false

from __future__ import annotations

import asyncio
import weakref
from collections import deque
from collections.abc import Coroutine
from contextlib import suppress
from time import monotonic
from typing import Any

import psycopg
from psycopg import pq
from psycopg.abc import PQGen

from poolkeeper import AcquireTimeout
from poolkeeper.errors import see

from ._errors import A_DATABASE, OwnershipError, SandboxError, impossible
from ._graph import waits_for
from ._handles import Exchange, Sandboxed
from ._savepoints import Savepoints
from ._seam import Base, Checkout

LOOK = 0.05
"""Seconds between two looks of a waiter, whether it waits for itself."""

STOP = 2.0
"""Seconds that a query has to end which is stopped, for its connection was given back."""

ACTIVE = pq.TransactionStatus.ACTIVE
NO_PIPELINE = pq.PipelineStatus.OFF


class Hold:
    """
    One checkout of a sandbox.

    Attributes:
        savepoint: Name of that which the borrower's transaction is, if one is open.
        closed: True once the borrower has closed the connection.
        ends: True once it was given back, or dropped.
        in_block: True in a block of psycopg's, which in autocommit is a transaction as well.
    """

    def __init__(self, turns: Turns, checkout: Checkout) -> None:
        self.turns = turns
        self.checkout = checkout
        self.task: Any = checkout.task
        self.where = str(checkout)
        self.savepoint: bytes | None = None
        self.closed = False
        self.ends = False
        self.in_block = False
        self.conn: weakref.ref[Any]

    def begin(self, conn: Sandboxed) -> PQGen[None]:
        """Begin a transaction."""
        self.savepoint = yield from self.turns.savepoints.begin(conn)

    def commit(self, conn: Sandboxed) -> PQGen[None]:
        """End it, if there is one."""
        if (name := self.savepoint) is None:
            return
        self.turns.refuse_in_disorder(self)
        try:
            yield from self.turns.savepoints.commit(conn, name)
        finally:
            self._look(name)

    def roll_back(self, conn: Sandboxed) -> PQGen[None]:
        """Undo it, if there is one."""
        if (name := self.savepoint) is None:
            return
        try:
            yield from self.turns.savepoints.roll_back(conn, name)
        finally:
            self._look(name)
        # As psycopg's own: what was prepared may be of what is undone.
        conn._prepared.clear()
        yield from conn._prepared.maintain_gen(conn)

    def _look(self, name: bytes) -> None:
        if not self.turns.savepoints.is_open(name):
            self.savepoint = None

    def dropped(self) -> None:
        """Note that its connection was dropped without being given back; in any thread."""
        with suppress(RuntimeError):  # the loop is closed
            self.turns.loop.call_soon_threadsafe(self.turns.take_back_dropped, self)


class Turns:
    """
    The checkouts of one sandbox, and who waits for one.

    Args:
        base: Its connection.
        name: Of the pool.
        timeout: Seconds to wait, for who says nothing.
    """

    def __init__(self, base: Base, name: str, timeout: float) -> None:
        self.name = name
        self.base = base
        self.loop = asyncio.get_running_loop()
        self.savepoints = Savepoints()
        self.exchange = Exchange(name)
        self.holds: list[Hold] = []
        self.dropped: list[Hold] = []
        self.left: Hold | None = None
        self._timeout = timeout
        self._line: deque[asyncio.Future[None]] = deque()
        self._tasks: set[asyncio.Task[None]] = set()
        self._over = False

    # --- acquire ------------------------------------------------------------------------------

    async def acquire(self, timeout: float | None, frame: Any, lineno: int) -> Any:
        """Return a connection for the running task."""
        task: Any = asyncio.current_task()
        if not self._lies_within(task) and (self.holds or self._line):
            await self._wait(task, self._timeout if timeout is None else timeout)
        if self._over or self.left is not None:
            raise self.was_left(self.left) if self.left else over(self.name)
        checkout = self.base.checkout(task, frame, lineno)
        hold = Hold(self, checkout)
        conn = self.base.handle(checkout, hold)
        hold.conn = weakref.ref(conn)
        self.holds.append(hold)
        return conn

    def _lies_within(self, task: asyncio.Task[Any]) -> bool:
        if not self.holds:
            return False
        holder = self.holds[-1].task
        return holder is task or holder.done()

    async def _wait(self, task: asyncio.Task[Any], timeout: float) -> None:
        until = monotonic() + timeout
        place: asyncio.Future[None] = self.loop.create_future()
        self._line.append(place)
        try:
            while not self._over:
                if self._line[0] is place and (not self.holds or self._lies_within(task)):
                    return
                holder = self.holds[-1] if self.holds else None
                if holder is not None and waits_for(holder.task, task):
                    raise self._would_wait_for_itself(task, holder)
                left = until - monotonic()
                if left <= 0:
                    raise self._timed_out(timeout, holder)
                await asyncio.wait({place}, timeout=min(left, LOOK))
                if place.done():
                    self._line[self._line.index(place)] = place = self.loop.create_future()
        finally:
            self._line.remove(place)
            if self._line and not self.holds:
                self._pass_on()

    def _pass_on(self) -> None:
        if self._line and not self._line[0].done():
            self._line[0].set_result(None)

    # --- release --------------------------------------------------------------------------------

    def release(self, conn: Any) -> asyncio.Future[None] | None:
        """Take *conn* back; return what ends when nothing of what it left open is there."""
        hold: Hold = conn._hold
        lock, commits = conn.lock, conn._autocommit
        busy, in_pipeline = conn.at_work, conn._pipeline is not None
        hold.ends = True
        fresh = self.base.successor(conn, hold)
        if in_pipeline:
            self.base.part_from_pipeline(conn)
        elif hold.savepoint is None and not lock.locked() and self.base.is_in_order():
            self._end(hold)
            return None
        return self._start(self._put_back(hold, fresh, commits, lock, busy, in_pipeline))

    def _start(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = self.loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _put_back(
        self,
        hold: Hold,
        fresh: Any,
        commits: bool,
        lock: Any = None,
        busy: bool = False,
        in_pipeline: bool = False,
    ) -> None:
        """
        Put in order what was given back.

        Args:
            hold: The checkout.
            fresh: A handle to do it by.
            commits: True if what is open is one statement, in autocommit.
            lock: That of the connection; None if that was dropped.
            busy: True if a task is at work on it.
            in_pipeline: True if it is in a pipeline.
        """
        try:
            good = not busy or await self._stopped(fresh, lock)
            if in_pipeline:
                good = fresh.leave_pipeline() and good
            if not good:
                self.base.finish()
            elif lock is not None and lock.locked():  # a stream was left open
                await fresh.end_command()
                self.exchange.end(lock)
            async with fresh.lock:
                ending = hold.commit if commits else hold.roll_back
                await fresh.wait(ending(fresh))
            await self.base.clean(fresh, hold.checkout)
        except (psycopg.Error, SandboxError):
            await self._undo(hold, fresh)
        finally:
            self._end(hold)

    async def _undo(self, hold: Hold, fresh: Any) -> None:
        """Roll back what could not be committed."""
        if self.left is None and not fresh.closed:
            with suppress(psycopg.Error, SandboxError):
                async with fresh.lock:
                    await fresh.wait(hold.roll_back(fresh))

    async def _stopped(self, fresh: Any, lock: Any) -> bool:
        """Stop the query of a task that is at work on what was given back."""
        until = monotonic() + STOP
        while lock.locked() and monotonic() < until:
            with suppress(psycopg.Error, OSError):
                await fresh.request_cancel(STOP)
            await asyncio.sleep(0.01)
        return not lock.locked()

    def _end(self, hold: Hold) -> None:
        if hold in self.holds:
            self.holds.remove(hold)
        self.base.end(hold.checkout, self.holds[-1].conn if self.holds else None)
        self._pass_on()

    def take_back_dropped(self, hold: Hold) -> None:
        """Take back what somebody has dropped."""
        if hold in self.holds and not hold.ends and not self._over:
            hold.ends = True
            self.dropped.append(hold)
            self._start(self._put_back(hold, self.base.new(hold), False))

    async def end(self) -> list[Hold]:
        """Admit nobody any more, and take all connections back; return who had one."""
        self._over = True
        for place in self._line:
            if not place.done():
                place.set_result(None)
        left = [*self.dropped, *(hold for hold in self.holds if not hold.ends)]
        for hold in reversed(self.holds.copy()):
            conn = hold.conn()
            if conn is not None and not hold.ends and (ending := self.release(conn)) is not None:
                await ending
        if self._tasks:
            await asyncio.wait(self._tasks.copy())
        return left

    # --- what is said ----------------------------------------------------------------------------

    def refuse_in_disorder(self, hold: Hold) -> None:
        """Raise if the transaction of *hold* is to end before one that lies within."""
        if hold not in self.holds:
            return
        for inner in self.holds[self.holds.index(hold) + 1 :]:
            if self.savepoints.is_open(inner.savepoint) and inner.savepoint:
                raise impossible(
                    self.name,
                    "the end of a transaction before that of one within",
                    f"The inner one is on the connection acquired {inner.where}.",
                    "End the inner block first",
                )

    def was_left(self, hold: Hold) -> SandboxError:
        """Return the error for a statement that has ended the transaction of the test."""
        self.left = hold
        return SandboxError(
            f'a statement has ended the transaction of the sandbox of pool "{self.name}"',
            detail=f"It was run on the connection acquired {hold.where}. What a COMMIT in SQL has"
            " stored stays in the database, and the sandbox can serve nobody any more.",
            hint="Commit and roll back by psycopg's methods and blocks: commit(), rollback(),"
            f" transaction(). Or {A_DATABASE}. {see('sandbox')}",
        )

    def _would_wait_for_itself(self, task: asyncio.Task[Any], holder: Hold) -> SandboxError:
        return SandboxError(
            f'task "{task.get_name()}" cannot get a connection in the sandbox of pool'
            f' "{self.name}": it would wait for itself',
            detail=f"A test has one connection. It is held {holder.where}, by a task that waits for"
            " this one: by gather(), a task group or the like inside of its block.",
            hint="End the block before the tasks are started, give them its connection, or"
            f" {A_DATABASE}. {see('sandbox')}",
        )

    def _timed_out(self, timeout: float, holder: Hold | None) -> AcquireTimeout:
        held = f"It is held {holder.where}." if holder else "Others are before this task in line."
        return AcquireTimeout(
            f'could not acquire a connection in the sandbox of pool "{self.name}" within'
            f" {max(0.0, timeout):.2f} s: a test has one connection",
            detail=held,
            hint="Give it back before another task needs it; the holder may wait for that task in"
            f" a way that cannot be seen from here. Or {A_DATABASE}. {see('sandbox')}",
        )


def over(name: str) -> OwnershipError:
    """Return the error for a task that goes on after its test."""
    task = asyncio.current_task()
    return OwnershipError(
        f'the sandbox of pool "{name}" to which this task belongs has ended',
        detail=f'Task "{task.get_name() if task else ""}" has outlived its test, and asks for a'
        " connection.",
        hint=f"Let the test wait for its tasks, or cancel them. {see('ownership')}",
    )
