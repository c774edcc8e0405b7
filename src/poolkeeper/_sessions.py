"""
`Sessions`: how many sessions a pool has on the server, and a gate before each new one.

A session that is closed here is not over: its process on the server takes some milliseconds to
end, and holds a slot until then. Its socket says when it is gone.
"""
# A pool's settings are put right before it is opened.
# pyright: reportPrivateUsage=false

from __future__ import annotations

import asyncio
import inspect
import socket
import threading
import weakref
from collections.abc import Callable
from time import monotonic
from typing import Any

from psycopg import pq

from ._life import Life

BAD = pq.ConnStatus.BAD

_LOOK_EVERY = 0.005
"""Seconds between two looks whether there is room behind the gate."""

_LONGEST = 2.0
"""Seconds after which a process that was told to end counts no more: the network may be gone."""


class Sessions:
    """
    The sessions of one pool.

    Args:
        most: Returns how many there may be, now.
        lock: Held while they are counted, and while one passes the gate.
    """

    def __init__(self, most: Callable[[], int], lock: threading.RLock) -> None:
        self._most = most
        self._lock = lock
        self._wires: list[Wire] = []
        self._attempts: list[asyncio.Task[Any]] = []
        """Tasks that make a connection, which may be there already."""

    def watch(self, pool: Any) -> None:
        """Put the gate before each connection of *pool*, which is not open, and count it."""
        conninfo, configure = pool.conninfo, pool._options.configure

        async def admitted() -> Any:
            await self._enter(pool)
            given = conninfo() if callable(conninfo) else conninfo
            return await given if inspect.isawaitable(given) else given

        async def counted(conn: Any) -> None:
            self._add(conn.pgconn)
            if configure is not None:
                await configure(conn)

        pool.conninfo = admitted
        pool._options = pool._options._replace(configure=counted)

    def count(self) -> int:
        """Return how many there are, those included that are being made, or ended."""
        with self._lock:
            self._wires = [wire for wire in self._wires if not wire.is_gone()]
            self._attempts = [task for task in self._attempts if not task.done()]
            return len(self._wires) + len(self._attempts)

    async def _enter(self, pool: Any) -> None:
        """Wait until there may be one more, which counts from here on."""
        task = asyncio.current_task()
        life = pool._life
        if task is None or not isinstance(life, Life) or task not in life.connector._attempts:
            return  # a look at the server, beside the pool, that ends at once
        while not self._may_enter(task):  # noqa: ASYNC110 - a process of the server ends
            await asyncio.sleep(_LOOK_EVERY)

    def _may_enter(self, task: asyncio.Task[Any]) -> bool:
        with self._lock:
            if self.count() >= self._most():
                return False
            self._attempts.append(task)
            return True

    def _add(self, pgconn: pq.abc.PGconn) -> None:
        task = asyncio.current_task()
        with self._lock:
            if not any(wire.is_of(pgconn) for wire in self._wires):  # else it is configured again
                self._wires.append(Wire(pgconn))
            if task in self._attempts:
                self._attempts.remove(task)


class Wire:
    """
    Knows when the process at the other end of a connection is gone.

    Has a socket of its own to the same end: libpq closes its own before it can tell.
    """

    def __init__(self, pgconn: pq.abc.PGconn) -> None:
        self._pgconn = weakref.ref(pgconn)
        # Not socket.dup() of an object: that lets it block, and with it libpq's.
        self._socket = socket.socket(fileno=socket.dup(pgconn.socket))
        self._closed_at: float | None = None

    def is_of(self, pgconn: pq.abc.PGconn) -> bool:
        """Tell whether it is that of *pgconn*."""
        return self._pgconn() is pgconn

    def is_gone(self) -> bool:
        """Tell whether it is; asks the socket only when the connection is closed here."""
        pgconn = self._pgconn()
        if pgconn is not None and pgconn.status != BAD:
            return False
        now = monotonic()
        if self._closed_at is None:
            self._closed_at = now
        if not self._is_at_end() and now - self._closed_at < _LONGEST:
            return False
        self._socket.close()
        return True

    def _is_at_end(self) -> bool:
        try:
            while self._socket.recv(4096):
                pass
        except BlockingIOError:
            return False
        except OSError:
            pass  # it was cut
        return True

    def __del__(self) -> None:
        if own := vars(self).get("_socket"):
            own.close()
