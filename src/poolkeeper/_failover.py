"""
When a server is not the one any more that its sessions were made for.

A primary that is frozen before a switchover, or a standby that is promoted, keeps its sessions.
PostgreSQL 14 and later report that, to a session that asks something: the session is replaced,
by the host list or by the name that may lead elsewhere by now, and all the others are looked at.

Where nothing is reported (an older server, a pooler, a session that was made when its server was
frozen already) a write is refused that the borrower has not asked to be refused. Then a
connection beside the pool looks whether there is a server that takes writes by now.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterable
from time import monotonic
from typing import Any, Protocol

from . import _cleaning
from ._log import log
from ._session import MOVED, Session
from ._words import class_name


class Pool(Protocol):
    """What is asked of the pool."""

    name: str

    @property
    def sessions(self) -> Iterable[Session]:
        """Its sessions, idle and in use."""
        ...

    def look_at_idle(self) -> object:
        """Ask the server on each idle connection; `Failover.accept()` sees the answer."""
        ...

    async def connect_beside(self) -> Any:
        """Make a connection that is not the pool's."""
        ...

    def dismiss(self, conn: Any) -> object:
        """End a connection that nobody holds."""
        ...

    def drain(self) -> None:
        """Replace every connection, those in use when they come back."""
        ...

    def start_own_task(
        self, work: Callable[[], Coroutine[Any, Any, None]], name: str
    ) -> asyncio.Task[None]:
        """Start *work* in a task that `close()` waits for."""
        ...


class Failover:
    """What one life of a pool knows of its servers' changes."""

    LOOK_EVERY = 0.5
    """Seconds between two looks for a server that takes writes, while writes are refused."""
    LOOK_TIMEOUT = 2.0
    MOST = 10
    EVERY = 2.0
    """
    After `MOST` changes, one in so many seconds is acted upon: a pooler in front of several
    servers may report another one with each query.
    """

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._credit = float(self.MOST)
        self._credited_at = monotonic()
        self._looked_at = float("-inf")
        self._look: asyncio.Task[None] | None = None

    def accept(self, conn: Any) -> bool:
        """
        Let what *conn* reports be as it should, for no borrower has set it.

        Returns:
            False if it stands for another kind of server by now, and is to be replaced: what was
            a primary, or took writes, and is none, or does not, any more; or the other way about.
        """
        mine: Session = conn._session
        alone = not mine.in_question
        if not mine.accept_parameters() or (alone and not self._may_act()):
            return True
        mine.expires_at = MOVED
        if alone:
            log("server_changed", pool=self._pool.name, kind=mine.kind)
            for session in self._pool.sessions:
                session.question()
            self._pool.look_at_idle()
        return False

    def write_refused(self, conn: Any) -> None:
        """Look for a server that takes writes: that of *conn* does not, and reports nothing new."""
        if (
            (self._look is None or self._look.done())
            and monotonic() - self._looked_at >= self.LOOK_EVERY
            and _wants_to_write(conn)
        ):
            self._looked_at = monotonic()
            self._look = self._pool.start_own_task(self._look_elsewhere, "look")

    def stop(self) -> None:
        """Look no more."""
        if self._look is not None:
            self._look.cancel()

    async def _look_elsewhere(self) -> None:
        try:
            async with asyncio.timeout(self.LOOK_TIMEOUT):
                conn = await self._pool.connect_beside()
                try:
                    found = await _cleaning.takes_writes(conn)
                finally:
                    self._pool.dismiss(conn)
        except Exception as ex:
            log("writable_server_missing", pool=self._pool.name, reason=class_name(ex))
            return
        if found and self._may_act():
            log("writable_server_found", pool=self._pool.name)
            self._pool.drain()

    def _may_act(self) -> bool:
        now = monotonic()
        earned = (now - self._credited_at) / self.EVERY
        self._credit = min(float(self.MOST), self._credit + earned)
        self._credited_at = now
        if self._credit < 1.0:
            return False
        self._credit -= 1.0
        return True


def _wants_to_write(conn: Any) -> bool:
    """Tell whether the connection parameters do not ask for a server that takes no writes."""
    wants = [option.val for option in conn.pgconn.info if option.keyword == b"target_session_attrs"]
    return wants not in ([b"read-only"], [b"standby"], [b"prefer-standby"])
