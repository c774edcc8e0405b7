"""
What tasks send behind each other in one turn of the event loop, as one packet for each socket.

libpq sends each statement at once: a system call, a packet, a server process that is woken. One
that goes behind others is served no sooner by that, and it is a third of the CPU of a shared
one-shot, and as much at the server. So the kernel is asked to hold back what does not fill a packet
until the turn is over: nobody could read an answer before that. On Linux, with TCP.

In a turn in which each task has much to do the server would have nothing to do meanwhile: so what
is held back is sent after `MOST` as well, by whoever sends behind others next.
"""

from __future__ import annotations

import asyncio
from contextvars import Context

from ._wire import Wire

MOST = 0.001
"""Seconds that anything is held back, if there is somebody who sends meanwhile."""

NEVER = float("inf")


class Gathering:
    """
    The wires of one event loop on which something is held back.

    Args:
        loop: That.

    Attributes:
        until: When it is to be sent, whoever sends something next.
    """

    __slots__ = ("_context", "_loop", "_wires", "until")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop, self._context = loop, Context()
        self._wires: list[Wire] = []
        self.until = NEVER

    def hold_back(self, wire: Wire, now: float) -> None:
        """Hold back what is sent on *wire* from *now* on; send what waits too long already."""
        if now > self.until:
            self.send()
        if not wire.holds_back and wire.hold_back():
            if not self._wires:
                self.until = now + MOST
                self._loop.call_soon(self.send, context=self._context)
            self._wires.append(wire)

    def send(self) -> None:
        """Send what is held back."""
        self.until = NEVER
        while self._wires:
            self._wires.pop().send()
