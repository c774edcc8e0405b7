"""
The socket of a session, as the event loop sees it.

A `Wire` watches the socket for as long as the session lives: to tell the event loop of it anew
for each exchange, and to start a timer, costs more than all guards together.
"""

from __future__ import annotations

import asyncio
import select
import socket
import weakref
from asyncio import get_running_loop
from collections.abc import Callable
from contextvars import Context
from time import monotonic
from typing import Protocol

import psycopg
from psycopg import waiting

from ._binding import LoopBinding

READ = waiting.Wait.R
WRITE = waiting.Wait.W
READABLE = waiting.Ready.R
WRITABLE = waiting.Ready.W
NOT_READY = waiting.Ready.NONE

LOOK = 0.25
"""Seconds between looks at a socket that is waited for, however quiet the event loop is."""

CORK: int | None = getattr(socket, "TCP_CORK", None)
"""The option of a socket that holds back what does not fill a packet; Linux has it."""

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
    (a notification, a stream's next rows, the end of the session): the wire is watched no more
    then, or the loop would call again and again, and anew by the next exchange.

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
        holds_back: True while the kernel holds back what does not fill a packet, or if it cannot.
    """

    __slots__ = (
        "__weakref__", "_binding", "_descriptor", "_look", "_poll", "asked", "busy_since",
        "holds_back", "looking", "socket", "waiter", "watched",
    )  # fmt: skip

    def __init__(self, fileno: int, binding: LoopBinding) -> None:
        self.socket = fileno
        self.watched = self.looking = self.holds_back = False
        self.asked: int = READ
        self.waiter: Told | None = None
        self.busy_since = 0.0
        self._binding = binding
        self._descriptor = -1
        self._poll: Callable[[], int] | None = None
        self._look: asyncio.TimerHandle | None = None

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
            self._poll = None
        return self._descriptor

    def look_later(self, loop: asyncio.AbstractEventLoop) -> None:
        """
        Look at the socket in a while, and from then on until nobody waits.

        uvloop does not call for a socket that has failed (a connection that was reset, say), and
        watches it no more (0.23). psycopg finds that out by a timer for each exchange.

        And this timer keeps who waits: of a task, asyncio itself keeps no more than a weak
        reference, and that of an ``aclose()`` after a stream that was dropped is nobody else's.
        """
        self._look = loop.call_later(LOOK, self.look, context=Context())
        self.looking = True

    def look(self) -> None:
        """Wake who waits for the socket if it is ready."""
        self.looking, self._look = False, None
        waiter = self.waiter
        if waiter is None or waiter.done():
            return  # the next exchange starts the timer again
        if found := self.ready_now(self.asked):
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
        if found := self.ready_now(state):
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

    def ready_now(self, state: int) -> int:
        """Return for which part of *state* the socket is ready now."""
        poll = self._poll
        if poll is None:
            fileno = self.socket if self._descriptor < 0 else self._descriptor
            poll = self._poll = _poll_for(fileno)
        return poll() & state

    def hold_back(self) -> bool:
        """Let the kernel hold back what does not fill a packet; False if it cannot."""
        self.holds_back = True
        return self._descriptor >= 0 and self._cork(1)

    def send(self) -> None:
        """Let the kernel send what it holds back, if there is still somewhere to send it."""
        self.holds_back = False
        if self._descriptor >= 0:
            self._cork(0)

    def _cork(self, on: int) -> bool:
        if CORK is None:
            return False
        try:
            # A socket object that lives longer would close the descriptor when it is collected.
            option = socket.SocketType(socket.AF_INET, socket.SOCK_STREAM, 0, self._descriptor)
            try:
                option.setsockopt(socket.IPPROTO_TCP, CORK, on)
            finally:
                option.detach()
        except OSError:  # a Unix socket, or one that is gone
            return False
        return True

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
        if self.holds_back:
            self.send()
        watched, self.watched, self._descriptor = self.watched, False, -1
        self._poll = None
        loop = self._binding.loop
        gone = loop is None or loop.is_closed()
        # Who waits on a loop that is closed waits for ever, and cannot be told.
        if (waiter := self.waiter) is not None and not waiter.done() and not gone:
            waiter.set_exception(closed_error())
        if self._look is not None and self._binding.is_here():
            self._look.cancel()  # it would keep what is let go
            self.looking, self._look = False, None
        if loop is None or gone or not watched:
            socket.close(descriptor)
        elif self._binding.is_here() or not loop.is_running():
            _forget(loop, descriptor)
        else:
            try:  # the collector has come by in another thread
                loop.call_soon_threadsafe(_forget, loop, descriptor)
            except RuntimeError:  # the loop was closed meanwhile
                socket.close(descriptor)


def _poll_for(fileno: int) -> Callable[[], int]:
    """Return a function that says, at once, for what *fileno* is ready."""
    if not hasattr(select, "poll"):  # Windows

        def selected() -> int:
            readable, writable, _ = select.select([fileno], [fileno], [], 0)
            return (READABLE if readable else 0) | (WRITABLE if writable else 0)

        return selected
    poller = select.poll()
    poller.register(fileno, select.POLLIN | select.POLLOUT)
    ask, known = poller.poll, _READY

    def polled() -> int:
        events = ask(0)
        return known[events[0][1]] if events else 0

    return polled


class _Ready(dict[int, int]):
    """For what a socket is ready, by what poll() says of it."""

    def __missing__(self, events: int) -> int:
        ended = events & ~(select.POLLIN | select.POLLOUT)  # psycopg is to find out
        readable = READABLE if ended or events & select.POLLIN else 0
        writable = WRITABLE if ended or events & select.POLLOUT else 0
        self[events] = readable | writable
        return self[events]


_READY = _Ready()


def _forget(loop: asyncio.AbstractEventLoop, descriptor: int) -> None:
    loop.remove_reader(descriptor)
    socket.close(descriptor)


def _on_readable(reference: weakref.ref[Wire]) -> None:
    wire = reference()
    if wire is None:
        return  # it is being let go
    waiter = wire.waiter
    if waiter is None:
        wire.unwatch()  # the descriptor stays: in a pipeline, the next step may watch it again
    elif not waiter.done():
        waiter.set_result(READABLE)


def _wake(waiter: asyncio.Future[int], ready: int) -> None:
    if not waiter.done():
        waiter.set_result(ready)


def closed_error() -> psycopg.OperationalError:
    """Return what psycopg raises when the socket is closed under a task that waits for it."""
    return psycopg.OperationalError("connection socket closed")
