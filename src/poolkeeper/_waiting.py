"""
How a connection waits for the server.

`WaitingConnection` drives psycopg's generators on the `Wire` of the session. Every exchange of a
connection, its cursors, transactions, pipelines and copies ends in its `wait()`: there the loop
is checked, and the checkout notes how long the server was asked.
"""
# A time-out is told by an error that psycopg keeps to itself.
# pyright: reportPrivateUsage=false

from __future__ import annotations

import asyncio
from asyncio import _get_running_loop
from time import monotonic
from typing import Any, ClassVar, TypeVar

import psycopg
from psycopg import AsyncConnection
from psycopg.abc import PQGen
from typing_extensions import override

from ._begin import begins_with_query, with_begin
from ._binding import LoopBinding
from ._status import ACTIVE, IDLE, NO_PIPELINE
from ._stopping import StopExchange, in_own_task
from ._wire import BUSY, READ, WRITE, Wire, closed_error

T = TypeVar("T")


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
                if not wire.busy_since:
                    wire.busy_since = began
                elif began - wire.busy_since > BUSY:
                    await wire.let_others_run()
                return done.value  # type: ignore[no-any-return]
            until = None if timeout is None else began + timeout
            fresh = until is interval is None
            while True:
                if state & WRITE and (ready := wire.ready_now(state)):
                    # A socket nearly always is: each step of a pipeline comes here.
                    if not wire.busy_since:
                        wire.busy_since = began
                    elif monotonic() - wire.busy_since > BUSY:
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
                await in_own_task(StopExchange(self, gen, state).run())
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
