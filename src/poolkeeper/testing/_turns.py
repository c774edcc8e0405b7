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
from enum import Enum
from time import monotonic
from typing import Any

import psycopg
from psycopg import pq
from psycopg.abc import PQGen

from poolkeeper import AcquireTimeout
from poolkeeper.errors import see

from ._errors import A_DATABASE, OwnershipError, SandboxError, impossible
from ._graph import stands_for, waits_for
from ._handles import Exchange, Sandboxed
from ._savepoints import Savepoints
from ._seam import Base, SandboxCheckout

LOOK = 0.05
"""Seconds between two looks of a waiter, whether it waits for itself."""

STOP = 10.0
"""Seconds that a query has to end which is stopped, for its connection was given back."""

FIRST_REST, LONGEST_REST = 0.01, 0.25
"""Seconds until a connection that its check refuses is tried again, as the pool does."""

ACTIVE = pq.TransactionStatus.ACTIVE
INERROR = pq.TransactionStatus.INERROR


class Hold:
    """
    One checkout of a sandbox.

    Attributes:
        savepoint: Name of that which the borrower's transaction is, if one is open.
        closed: True once the borrower has closed the connection.
        ends: True once it was given back, or dropped.
        in_block: True in a block of psycopg's, which in autocommit is a transaction as well.
        settings: Those of the session when it began, if it lies within another one.
    """

    def __init__(self, turns: Turns, checkout: SandboxCheckout) -> None:
        self.turns = turns
        self.checkout = checkout
        self.task: Any = checkout.task
        self.where = str(checkout)
        self.savepoint: bytes | None = None
        self.closed = False
        self.ends = False
        self.in_block = False
        self.settings: Any = None
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

    def roll_back(self, conn: Sandboxed, asks: bool = False) -> PQGen[bool]:
        """Undo it, if there is one; if *asks*, tell whether anything was written in it."""
        wrote = False
        if (name := self.savepoint) is None:
            return wrote
        try:
            if asks:
                wrote = yield from self.turns.savepoints.roll_back_and_tell(conn, name)
            else:
                yield from self.turns.savepoints.roll_back(conn, name)
        finally:
            self._look(name)
        # As psycopg's own: what was prepared may be of what is undone.
        conn._prepared.clear()
        yield from conn._prepared.maintain_gen(conn)
        return wrote

    def _look(self, name: bytes) -> None:
        if not self.turns.savepoints.is_open(name):
            self.savepoint = None

    def dropped(self) -> None:
        """Note that its connection was dropped without being given back; in any thread."""
        with suppress(RuntimeError):  # the loop is closed
            self.turns.loop.call_soon_threadsafe(self.turns.take_back_dropped, self)


class Ending(Enum):
    """What becomes of what is open when a connection is given back."""

    COMMIT = "committed"
    QUIET = "rolled back: its block has raised"
    TELL = "rolled back, which is told if anything was written"
    LEFT = "rolled back, which is told"


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
        began = monotonic()
        timeout = self._timeout if timeout is None else timeout
        rest = FIRST_REST
        while True:
            task: Any = asyncio.current_task()
            queued = not self._lies_within(task) and bool(self.holds or self._line)
            if queued:
                await self._wait(task, began, timeout)
            conn = self._next(task, frame, lineno)
            refusal = await self._refusal(conn)
            if refusal is None:
                self.base.tell_begun(conn, frame, monotonic() - began, queued)
                return conn
            if monotonic() + rest - began > timeout:
                raise self._refused(refusal) from refusal
            await asyncio.sleep(rest)
            rest = min(2 * rest, LONGEST_REST)

    def _next(self, task: asyncio.Task[Any], frame: Any, lineno: int) -> Any:
        """Return a connection for *task*, whose turn it is."""
        if self._over or self.left is not None:
            raise self.was_left(self.left) if self.left else over(self.name)
        if self.base.conn.closed:
            raise self._lost()
        checkout = self.base.checkout(task, frame, lineno)
        hold = Hold(self, checkout)
        conn = self.base.handle(checkout, hold)
        hold.conn = weakref.ref(conn)
        if self.holds:
            hold.settings = self.base.settings()
        self.holds.append(hold)
        return conn

    async def _refusal(self, conn: Any) -> Exception | None:
        """Let the pool's `check` look at *conn*; return why it refuses, and take it back then."""
        if (check := self.base.check) is None:
            return None
        good = False
        try:
            await check(conn)
            good = True
        except Exception as ex:
            self.base.tell_refused(ex)
            return ex.with_traceback(None)
        finally:
            if not good and (ending := self.release(conn, True, False)) is not None:
                await asyncio.shield(ending)
        return None

    def _lies_within(self, task: asyncio.Task[Any]) -> bool:
        """Tell whether *task* may go on within what is held now, which is not about to end."""
        if not self.holds or self.holds[-1].ends:
            return False
        holder = self.holds[-1].task
        return holder.done() or is_or_waits_only_for(holder, task)

    async def _wait(self, task: asyncio.Task[Any], began: float, timeout: float) -> None:
        until = began + timeout
        place: asyncio.Future[None] = self.loop.create_future()
        self._line.append(place)
        try:
            while not self._over:
                holder = self.holds[-1] if self.holds else None
                # Those before a task that holds itself wait for its end.
                may_pass = holder is not None and is_or_waits_only_for(holder.task, task)
                free = holder is None or self._lies_within(task)
                if free and (may_pass or self._line[0] is place):
                    return
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

    def release(self, conn: Any, roll_back: bool, tells: bool) -> asyncio.Future[None] | None:
        """
        Take *conn* back; return what ends when nothing of what it left open is there.

        Args:
            conn: The connection.
            roll_back: True if its block has ended with an exception.
            tells: True if a roll-back of what was written is to be told.
        """
        hold: Hold = conn._hold
        lock, busy, pipeline = conn.lock, conn.at_work, conn._pipeline
        ending = Ending.COMMIT  # of one statement, in autocommit
        if conn.in_transaction:
            ending = Ending.TELL if tells else Ending.QUIET if roll_back else Ending.LEFT
        hold.ends = True
        if busy:
            self.base.tell_busy(conn)
        fresh = self.base.successor(conn, hold)
        if pipeline is not None:
            self.base.part_from_pipeline(conn)
        elif hold.savepoint is None and not lock.locked() and self._is_in_order(hold):
            self._end(hold)
            return None
        return self._start(self._put_back(hold, fresh, ending, lock, busy, pipeline is not None))

    def _is_in_order(self, hold: Hold) -> bool:
        if hold.settings is not None:
            return bool(hold.settings == self.base.settings())
        return self.base.is_in_order()

    def _start(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = self.loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _put_back(
        self,
        hold: Hold,
        fresh: Any,
        ending: Ending,
        lock: Any = None,
        busy: bool = False,
        in_pipeline: bool = False,
    ) -> None:
        """
        Put in order what was given back.

        Args:
            hold: The checkout.
            fresh: A handle to do it by.
            ending: What becomes of what is open.
            lock: That of the connection; None if that was dropped.
            busy: True if a task is at work on it.
            in_pipeline: True if it is in a pipeline.
        """
        try:
            good = not busy or await self._stopped(fresh, lock)
            if in_pipeline and not fresh.leave_pipeline():
                self.base.tell("connection_in_pipeline")
                good = False
            if not good:
                self.base.finish()
            elif lock is not None and lock.locked():  # a stream was left open
                await fresh.end_command()
                self.exchange.end(lock)
            elif fresh.pgconn.transaction_status == ACTIVE:  # a COPY was
                async with fresh.lock:
                    await fresh.end_command()
            await self._end_transaction(hold, fresh, ending)
            await self._put_in_order(hold, fresh)
        except (psycopg.Error, SandboxError):
            await self._undo(hold, fresh)
        finally:
            self._end(hold)

    async def _end_transaction(self, hold: Hold, fresh: Any, ending: Ending) -> None:
        """Commit or roll back what is open, and tell of it as the pool does."""
        checkout = hold.checkout
        if ending is Ending.LEFT:
            self.base.tell("transaction_left")
        failed = bool(fresh.pgconn.transaction_status == INERROR)
        if ending is Ending.TELL and failed and checkout.failed_later:
            self.base.tell("transaction_failed", checkout)
        async with fresh.lock:
            if ending is Ending.COMMIT:
                await fresh.wait(hold.commit(fresh))
            elif await fresh.wait(hold.roll_back(fresh, ending is Ending.TELL and not failed)):
                self.base.tell("work_rolled_back", checkout)

    async def _put_in_order(self, hold: Hold, fresh: Any) -> None:
        """Put settings back, and let the user's `reset` do its work, as the pool does."""
        if self._is_in_order(hold) or fresh.closed:
            return
        try:
            async with fresh.lock:
                await fresh.wait(hold.begin(fresh))
            await self.base.put_settings_back(fresh, hold.checkout, hold.settings)
            async with fresh.lock:
                await fresh.wait(hold.commit(fresh))
            if hold.settings is None:
                await self.base.reset(fresh)
        except Exception as ex:
            self.base.tell_out_of_order(ex)
            await self._undo(hold, fresh)

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
        self.holds.remove(hold)
        self.base.end(hold.checkout, self.holds[-1].conn if self.holds else None)
        self._pass_on()
        self.base.tell_end(hold.checkout)

    def take_back_dropped(self, hold: Hold) -> None:
        """Take back what somebody has dropped."""
        if hold in self.holds and not hold.ends and not self._over:
            hold.ends = True
            self.dropped.append(hold)
            self._start(self._put_back(hold, self.base.new(hold), Ending.QUIET))

    async def end(self) -> list[Hold]:
        """Admit nobody any more, and take all connections back; return who had one."""
        self._over = True
        for place in self._line:
            if not place.done():
                place.set_result(None)
        left = [*self.dropped, *(hold for hold in self.holds if not hold.ends)]
        for hold in reversed(self.holds.copy()):
            conn = hold.conn()
            if (
                conn is not None
                and not hold.ends
                and (ending := self.release(conn, True, False)) is not None
            ):
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

    def _lost(self) -> SandboxError:
        return SandboxError(
            f'the session of the sandbox of pool "{self.name}" is gone, and all that the test has'
            " done with it",
            detail="It was closed or killed, or the network was cut. A test has one connection.",
            hint=f"For a test of that, {A_DATABASE}. {see('sandbox')}",
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

    def _refused(self, refusal: Exception) -> AcquireTimeout:
        return AcquireTimeout(
            f'could not acquire a connection in the sandbox of pool "{self.name}": its check'
            " callback refuses it",
            detail=f"A test has one connection. It was refused by {type(refusal).__qualname__}.",
            hint="Let the check accept a connection that is inside of a transaction, or"
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


def is_or_waits_only_for(holder: asyncio.Task[Any], task: asyncio.Task[Any]) -> bool:
    """Tell whether what *task* does is done by *holder*, as who has written it sees it."""
    return holder is task or stands_for(task, holder)


def over(name: str) -> OwnershipError:
    """Return the error for a task that goes on after its test."""
    task = asyncio.current_task()
    return OwnershipError(
        f'the sandbox of pool "{name}" to which this task belongs has ended',
        detail=f'Task "{task.get_name() if task else ""}" has outlived its test, and asks for a'
        " connection.",
        hint=f"Let the test wait for its tasks, or cancel them. {see('ownership')}",
    )
