"""
How a connection waits for the server, and what is done when nobody wants to wait any more.

A `Wire` watches the socket of a session for as long as that lives: to tell the event loop of it
anew for each exchange, and to start a timer, costs more than all guards together.
`WaitingConnection` drives psycopg's generators on it.

An exchange that is cancelled is not over. The server is asked to stop it, and its end is read,
which keeps the connection good; a second cancellation would interrupt this and cost the
connection. So it is done in a task that nobody cancels. Then the cancellation goes on.
"""
# A time-out is told by an error that psycopg keeps to itself.
# pyright: reportPrivateUsage=false

from __future__ import annotations

import asyncio
import select
import socket
import weakref
from asyncio import get_running_loop
from collections.abc import Coroutine
from contextlib import suppress
from contextvars import Context
from time import monotonic
from typing import Any, Protocol, TypeVar

import psycopg
from psycopg import AsyncConnection, pq, waiting
from psycopg.abc import PQGen
from typing_extensions import override

from ._binding import LoopBinding
from ._log import log

T = TypeVar("T")

READ = waiting.Wait.R
WRITE = waiting.Wait.W
READABLE = waiting.Ready.R
WRITABLE = waiting.Ready.W
NOT_READY = waiting.Ready.NONE

ACTIVE = pq.TransactionStatus.ACTIVE
NO_PIPELINE = pq.PipelineStatus.OFF

CANCEL_GRACE = 1.0
"""Seconds that a server has to stop a query of which nobody wants the result any more."""

TICK = 0.1
"""Seconds that one look at a query which is being stopped takes, and counts, at most."""

LOOK = 0.25
"""Seconds between looks at a socket that is waited for, however quiet the event loop is."""

BUSY = 0.005
"""Seconds after which a task that never has to wait for its socket lets others run."""


class Told(Protocol):
    """What a wire tells that its socket is ready, or gone: a future, or what stands in for one."""

    def done(self) -> bool:
        """Tell whether it needs no telling any more."""
        ...

    def set_result(self, ready: int, /) -> None:
        """Go on: the socket is *ready*."""
        ...

    def set_exception(self, error: BaseException, /) -> None:
        """Go on: the connection is closed."""
        ...


class Wire:
    """
    The socket of one session, as the event loop sees it.

    It is watched from the first exchange on. What comes while nobody waits is nobody's to read
    (a notification, a stream's next rows, the end of the session): the wire is let go then, or
    the loop would call again and again, and is watched anew by the next exchange.

    What is watched is a duplicate of libpq's descriptor. libpq closes its own where it likes, in
    the middle of a read, and the number may be another socket's at once, of which the loop would
    then believe that it is watched already. So nothing has to happen in time before that. And
    whoever watches the connection's own descriptor, as its ``fileno()`` allows, is not disturbed.

    Attributes:
        asked: For what it is waited, for reading mostly.
        looking: True while the timer of a look runs.
        socket: libpq's descriptor.
        watched: True while the loop watches.
        waiter: What is done when the socket is ready, while somebody waits.
        busy_since: Since when nobody had to wait; 0.0 if somebody has since.
    """

    __slots__ = (
        "__weakref__", "_binding", "_descriptor", "asked", "busy_since", "looking", "socket",
        "waiter", "watched",
    )  # fmt: skip

    def __init__(self, fileno: int, binding: LoopBinding) -> None:
        self.socket = fileno
        self.watched = self.looking = False
        self.asked: int = READ
        self.waiter: Told | None = None
        self.busy_since = 0.0
        self._binding = binding
        self._descriptor = -1

    def watch(self, loop: asyncio.AbstractEventLoop) -> None:
        """Let *loop*, which is the owner's and runs, watch the socket."""
        # Neither does the loop keep the session alive, nor the session the request (by its
        # context) that happened to be the first.
        reference: weakref.ref[Wire] = weakref.ref(self)
        Context().run(loop.add_reader, self.descriptor, _on_readable, reference)
        self.watched = True

    @property
    def descriptor(self) -> int:
        """What is watched."""
        if self._descriptor < 0:
            self._descriptor = socket.dup(self.socket)
        return self._descriptor

    def look_later(self, loop: asyncio.AbstractEventLoop) -> None:
        """
        Look at the socket in a while, and from then on until nobody waits.

        uvloop does not call for a socket that has failed (a connection that was reset, say), and
        watches it no more (0.23). psycopg finds that out by a timer for each exchange.
        """
        reference: weakref.ref[Wire] = weakref.ref(self)
        loop.call_later(LOOK, _look, reference, context=Context())
        self.looking = True

    def look(self) -> None:
        """Wake who waits for the socket if it is ready."""
        self.looking = False
        waiter = self.waiter
        if waiter is None or waiter.done():
            return  # the next exchange starts the timer again
        if found := self._ready_now(self.asked):
            self.unwatch()
            waiter.set_result(found)
        else:
            self.look_later(get_running_loop())

    def unwatch(self) -> None:
        """Let the owner loop, which must be the running one, watch it no more."""
        if self.watched:
            self.watched = False
            get_running_loop().remove_reader(self._descriptor)

    async def ready(self, state: int, seconds: float | None) -> int:
        """Wait until the socket is ready for *state*, *seconds* at most; return for what it is."""
        loop = get_running_loop()
        await self.let_others_run()
        # uvloop watches a socket no more once it has told of an error there, as of a session
        # that the server has ended: a look at the socket still tells.
        if found := self._ready_now(state):
            return found
        if not state & READ:
            self.unwatch()  # nobody is going to read what comes, and it would come on each turn
        waiter: asyncio.Future[int] = loop.create_future()
        self.waiter = waiter
        self.asked = state
        timer = None if seconds is None else loop.call_later(seconds, _wake, waiter, NOT_READY)
        try:
            if not self.looking:
                self.look_later(loop)
            if state & READ and not self.watched:
                self.watch(loop)
            if state & WRITE:
                loop.add_writer(self.descriptor, _wake, waiter, WRITABLE)
            return await waiter
        finally:
            self.waiter = None
            self.asked = READ
            self.busy_since = 0.0
            if timer is not None:
                timer.cancel()
            if state & WRITE and self._descriptor >= 0:
                loop.remove_writer(self._descriptor)

    async def let_others_run(self) -> None:
        """Give the loop a turn if a task has had no need to wait for long: COPY, say."""
        if not self.busy_since:
            self.busy_since = monotonic()
        elif monotonic() - self.busy_since > BUSY:
            await asyncio.sleep(0)
            self.busy_since = 0.0

    def _ready_now(self, state: int) -> int:
        """Return for which part of *state* the socket is ready now."""
        fileno = self.socket if self._descriptor < 0 else self._descriptor
        reads, writes = state & READ, state & WRITE
        if hasattr(select, "poll"):
            poller = select.poll()
            poller.register(
                fileno, (select.POLLIN if reads else 0) | (select.POLLOUT if writes else 0)
            )
            events = sum(event for _, event in poller.poll(0))
            ended = events & (select.POLLERR | select.POLLHUP)
            readable = reads and (events & select.POLLIN or ended)
            writable = writes and (events & select.POLLOUT or ended)
        else:  # Windows
            readable, writable, _ = select.select(  # type: ignore[assignment]
                [fileno] if reads else [], [fileno] if writes else [], [], 0
            )
        return (READABLE if readable else 0) | (WRITABLE if writable else 0)

    @property
    def pool(self) -> str:
        """The name of the pool that it belongs to."""
        return self._binding.name

    def let_go(self) -> None:
        """
        Let the loop forget the socket, for now or for good. May be called in any thread.

        In a forked child nothing is touched: the selector is the parent's.
        """
        descriptor = self._descriptor
        if descriptor < 0 or self._binding.forked:
            return
        watched, self.watched, self._descriptor = self.watched, False, -1
        loop = self._binding.loop
        gone = loop is None or loop.is_closed()
        # Who waits on a loop that is closed waits for ever, and cannot be told.
        if (waiter := self.waiter) is not None and not waiter.done() and not gone:
            waiter.set_exception(_closed())
        if loop is None or gone or not watched:
            socket.close(descriptor)
        elif self._binding.is_here() or not loop.is_running():
            _forget(loop, descriptor)
        else:
            try:  # the collector has come by in another thread
                loop.call_soon_threadsafe(_forget, loop, descriptor)
            except RuntimeError:  # the loop was closed meanwhile
                socket.close(descriptor)

    def __del__(self) -> None:
        self.let_go()


def _forget(loop: asyncio.AbstractEventLoop, descriptor: int) -> None:
    loop.remove_reader(descriptor)
    socket.close(descriptor)


def _on_readable(reference: weakref.ref[Wire]) -> None:
    wire = reference()
    if wire is None:
        return  # it is being let go
    waiter = wire.waiter
    if waiter is None:
        wire.let_go()
    elif not waiter.done():
        waiter.set_result(READABLE)


def _look(reference: weakref.ref[Wire]) -> None:
    if (wire := reference()) is not None:
        wire.look()


def _wake(waiter: asyncio.Future[int], ready: int) -> None:
    if not waiter.done():
        waiter.set_result(ready)


def _closed() -> psycopg.OperationalError:
    return psycopg.OperationalError("connection socket closed")


class WaitingConnection(AsyncConnection[Any]):
    """
    A connection that waits on the `Wire` of its session.

    Stands below the user's class, whose own ``wait()``, if it has one, comes first.
    """

    _session: Any

    @override
    async def wait(
        self, gen: PQGen[T], interval: float | None = None, timeout: float | None = None
    ) -> T:
        """
        Do what psycopg's does, on the wire.

        Args:
            gen: Of psycopg's, for an exchange.
            interval: Seconds after which *gen* goes on without the socket, as psycopg 3.3.0 lets
                ``notifies()``. Otherwise there is no need to: who cancels is heard at once.
            timeout: Seconds after which the exchange fails.
        """
        pgconn: Any = self.pgconn
        wire: Wire = self._session.wire
        if wire.socket != pgconn.socket:  # which raises if the connection is closed
            wire.let_go()
            wire.socket = pgconn.socket
        state: int | None = None
        try:
            try:
                state = next(gen)
            except StopIteration as done:
                await wire.let_others_run()
                return done.value  # type: ignore[no-any-return]
            loop = get_running_loop()
            until = None if timeout is None else monotonic() + timeout
            simple = until is interval is None
            while True:
                if simple and state == READ:
                    # As wire.ready() does, without its look at the socket: each query comes here
                    # once, with no answer yet.
                    simple = False
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
                    raise _closed()  # psycopg's generators, in C, would use what is freed
                state = gen.send(ready)
                if until is not None and monotonic() >= until:
                    raise psycopg.errors._WaitTimeout("wait timeout expired")
        except StopIteration as done:
            return done.value  # type: ignore[no-any-return]
        except asyncio.CancelledError:
            if pgconn.transaction_status == ACTIVE or pgconn.pipeline_status != NO_PIPELINE:
                await in_own_task(_StopExchange(self, gen, state).run())
            raise
        except OSError as ex:
            raise _closed() from ex


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
