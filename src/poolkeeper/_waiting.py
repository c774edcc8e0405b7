"""
How a connection waits for the server, and what is done when nobody wants to wait any more.

`WaitingConnection` drives psycopg's generators on the `Wire` of the session. Every exchange of a
connection, its cursors, transactions, pipelines and copies ends in its `wait()`: there the loop
is checked, and the checkout notes how long the server was asked.

An exchange that is cancelled is not over. The server is asked to stop it, and its end is read,
which keeps the connection good; a second cancellation would interrupt this and cost the
connection. So it is done in a task that nobody cancels. Then the cancellation goes on.
"""
# A time-out is told by an error that psycopg keeps to itself.
# pyright: reportPrivateUsage=false

from __future__ import annotations

import asyncio
from asyncio import _get_running_loop
from collections.abc import Coroutine
from contextlib import suppress
from time import monotonic
from typing import Any, ClassVar, TypeVar

import psycopg
from psycopg import AsyncConnection
from psycopg.abc import PQGen
from typing_extensions import override

from ._begin import begins_with_query, with_begin
from ._binding import LoopBinding
from ._log import log
from ._status import ACTIVE, IDLE, NO_PIPELINE
from ._wire import BUSY, READ, WRITE, Wire, closed_error

T = TypeVar("T")

CANCEL_GRACE = 1.0
"""Seconds that a server has to stop a query of which nobody wants the result any more."""

TICK = 0.1
"""Seconds that one look at a query which is being stopped takes, and counts, at most."""


class WaitingConnection(AsyncConnection[Any]):
    """
    A connection that waits on the `Wire` of its session.

    Stands below the user's class, whose own ``wait()``, if it has one, comes first.
    """

    _binding: ClassVar[LoopBinding]
    _session: Any
    _checkout: Any
    _under_way: PQGen[Any] | None

    @override
    async def wait(
        self, gen: PQGen[T], interval: float | None = None, timeout: float | None = None
    ) -> T:
        """
        Do what psycopg's does, on the wire, for who is on the owner loop.

        One coroutine, without those that it could be put together from: each query pays for it.

        Args:
            gen: Of psycopg's, for an exchange.
            interval: Seconds after which *gen* goes on without the socket, as psycopg 3.3.0 lets
                ``notifies()``. Otherwise there is no need to: who cancels is heard at once.
            timeout: Seconds after which the exchange fails.
        """
        loop = _get_running_loop()
        if loop is None or loop is not self._binding.owner_loop():
            raise self._binding.mismatch("work on one of its connections")
        session, checkout = self._session, self._checkout
        pgconn: Any = self.pgconn
        wire: Wire = session.wire
        began = monotonic()
        self._under_way = gen
        if checkout is not None:  # else the pool itself is at work on it
            checkout.busy_since = began
        state: int | None = None
        try:
            if wire.socket != pgconn.socket:  # which raises if the connection is closed
                wire.let_go()
                wire.socket = pgconn.socket
            if (
                not self._autocommit
                and pgconn.transaction_status == IDLE
                and begins_with_query(self, gen)
            ):
                gen = with_begin(self, gen)
            try:
                state = next(gen)
            except StopIteration as done:
                if not wire.busy_since or began - wire.busy_since > BUSY:
                    await wire.let_others_run()
                return done.value  # type: ignore[no-any-return]
            until = None if timeout is None else began + timeout
            fresh = until is interval is None
            while True:
                if state & WRITE and (ready := wire.ready_now(state)):
                    # A socket nearly always is: each step of a pipeline comes here.
                    if not wire.busy_since or monotonic() - wire.busy_since > BUSY:
                        await wire.let_others_run()
                elif fresh and state == READ:
                    # As wire.ready() does, without its look at the socket: each query comes here
                    # once, with no answer yet.
                    fresh = False
                    waiter = wire.waiter = loop.create_future()
                    try:
                        if not wire.watched:
                            wire.watch(loop)
                        if not wire.looking:
                            wire.look_later(loop)
                        ready = await waiter
                    finally:
                        wire.waiter = None
                        wire.busy_since = 0.0
                else:
                    ready = await wire.ready(state, _seconds(interval, until))
                if pgconn.pgconn_ptr is None:
                    raise closed_error()  # psycopg's generators, in C, would use what is freed
                state = gen.send(ready)
                if until is not None and monotonic() >= until:
                    raise psycopg.errors._WaitTimeout("wait timeout expired")
        except StopIteration as done:
            return done.value  # type: ignore[no-any-return]
        except asyncio.CancelledError:
            if pgconn.transaction_status == ACTIVE or pgconn.pipeline_status != NO_PIPELINE:
                await in_own_task(_StopExchange(self, gen, state).run())
            raise
        except (psycopg.Error, OSError) as ex:
            self._note_failure(ex)
            raise
        finally:
            self._under_way = None
            if checkout is not None:
                if checkout.session is None:
                    # Taken away meanwhile. What is under way shall see that it is closed, and end
                    # with the error that it has.
                    session.finish()
                session.heard_at = now = monotonic()
                checkout.note_exchange(pgconn.transaction_status, now - began, now)

    def _note_failure(self, ex: Exception) -> None:
        """Note that an exchange has failed; raise what it is to be called, if it has no name."""
        if isinstance(ex, psycopg.errors.ReadOnlySqlTransaction):
            if self._checkout is not None:
                self._session.doubt()  # a read-only transaction of the borrower's, or a fail-over
        elif given_back := getattr(self, "given_back_at_work", None):
            raise given_back() from ex
        elif isinstance(ex, OSError):
            raise closed_error() from ex


def _seconds(interval: float | None, until: float | None) -> float | None:
    if until is None:
        return interval
    left = max(0.0, until - monotonic())
    return left if interval is None else min(interval, left)


async def in_own_task(work: Coroutine[Any, Any, None]) -> None:
    """Do *work* to its end, however often the caller is cancelled, and whatever it raises."""
    task = asyncio.ensure_future(work)
    while not task.done():
        with suppress(asyncio.CancelledError):
            await asyncio.wait({task})
    _look_at(task)


def _look_at(task: asyncio.Task[Any]) -> None:
    """Let asyncio know that nobody else is going to ask how *task* ended."""
    if not task.cancelled():
        task.exception()


class Patience:
    """
    `CANCEL_GRACE`, as far as it is not over.

    What counts is the time in which the server could have been heard: not that in which this
    loop stood still, or another process had the machine.
    """

    def __init__(self) -> None:
        self._left = CANCEL_GRACE

    def __bool__(self) -> bool:
        return self._left > 0

    def count(self, seconds: float) -> None:
        """Count one look, which took so long and was to take a `TICK` at most."""
        self._left -= min(seconds, TICK)

    def renew(self) -> None:
        """Begin anew: the server has been heard."""
        self._left = CANCEL_GRACE

    async def lasts_for(self, task: asyncio.Task[Any]) -> bool:
        """Wait for *task*, and tell whether it has ended in time. It is cancelled if not."""
        try:
            while not task.done() and self:
                began = monotonic()
                await asyncio.wait({task}, timeout=TICK)
                self.count(monotonic() - began)
            if not task.done():
                return False
            _look_at(task)
            return True
        finally:
            task.cancel()


class Stop:
    """
    The rest of what was cancelled: ask the server to stop it, and read its end.

    psycopg asks once, which the server forgets if it comes before the query does, and gives it
    5 s to take the request and 5 s to obey (3.3.9). Whoever has cancelled waits for neither where
    the network is gone. So the server is asked until the query ends. It has `CANCEL_GRACE` to
    take a request, and as much again after that: one that does is there, and only slow.
    """

    def __init__(self, conn: Any) -> None:
        self._conn = conn
        self._session = conn._session
        self._patience = Patience()
        self._over = False
        self._on_its_way = False  # a request
        self._taken = False  # one of them

    async def run(self) -> None:
        """Stop it, or close the connection."""
        asking = asyncio.ensure_future(self._keep_asking())
        ended = False
        try:
            ended = await self._read()
        finally:
            self._over = True
            # One that is on its way could stop the next query.
            if self._on_its_way and not await self._patience.lasts_for(asking):
                ended = False
            asking.cancel()
            if not ended:
                log(
                    "query_not_stopped",
                    pool=self._session.wire.pool,
                    reason="the server was told" if self._taken else "no server could be told",
                )
                self._session.finish()

    async def _read(self) -> bool:
        """Read what the server sends, and tell whether it has ended."""
        raise NotImplementedError

    async def _keep_asking(self) -> None:
        pause = 0.01
        while True:
            began = monotonic()
            self._on_its_way = True
            try:
                # For longer than our patience, which ends it: one that ended by itself, for this
                # loop has stood still, may be on its way nevertheless.
                await self._conn.request_cancel(30.0)
            except Exception:
                pass
            else:
                if not self._taken:
                    self._taken = True
                    self._patience.renew()
            self._on_its_way = False
            if self._over:
                return
            # Where it takes long, many ask: no need to ask more often than they are heard.
            await asyncio.sleep(max(pause, min(monotonic() - began, TICK)))
            pause = min(2 * pause, 2 * TICK)


class _StopExchange(Stop):
    """
    Stops an exchange of psycopg's.

    Args:
        conn: The connection.
        gen: What is left of the exchange.
        state: For what it waits; None if it never had to.
    """

    def __init__(self, conn: Any, gen: PQGen[Any], state: int | None) -> None:
        super().__init__(conn)
        self._gen = gen
        self._state = state

    @override
    async def _read(self) -> bool:
        """Read what the server sends, and tell whether the exchange has ended."""
        gen, state, patience = self._gen, self._state, self._patience
        if state is None:  # it never had to wait, but is a part of what goes on: a COPY
            await asyncio.sleep(0)  # one request is on its way then
            return True
        pgconn, wire = self._session.pgconn, self._session.wire
        try:
            while patience:
                began = monotonic()
                ready = await wire.ready(state, TICK)
                patience.count(monotonic() - began)
                if pgconn.pgconn_ptr is None:
                    return True
                if ready:
                    state = gen.send(ready)
        except Exception:
            return True  # by an error, maybe: nobody is there any more to be told
        return False
