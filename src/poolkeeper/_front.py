"""
What stands in front of the server, and what the server allows: asked on the first connection.

A pooler answers like a server, but for one thing: the number of the server process that it gives
at login is made up, for there is none yet. Which process runs a query is asked together with
what the server allows, in one round trip; where both numbers are the same, that was all.

Behind a pooler two more facts count. Whether it shares its sessions between clients (transaction
and statement mode of PgBouncer) can be seen and not be asked: two connections, both open, were
answered by one process. Whether prepared statements work in any of its sessions shows in the name
that one has there: who keeps track of them (PgBouncer since 1.21, if ``max_prepared_statements``
is not 0) gives them names of its own.
"""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import Mapping
from contextlib import suppress
from time import monotonic
from typing import Any

import psycopg
from psycopg import capabilities, generators, pq
from psycopg.abc import PQGen

from . import _cleaning
from ._budget import Excess, Limits, excess
from ._config import UNLIMITED
from ._connection import BoundConnection
from ._log import log
from ._processes import Processes, session_name
from ._session import Session, shut_down
from ._snapshot import ServerFacts
from ._status import BAD
from ._where import warn_user
from .errors import ConnectionBudgetWarning, see_page

_PID = b"SELECT pg_backend_pid()"

_LIMITS = b"""
SELECT pg_backend_pid(), current_setting('max_connections'),
    CASE WHEN rolsuper THEN 0 ELSE current_setting('superuser_reserved_connections')::int +
        CASE WHEN pg_has_role(session_user, to_regrole('pg_use_reserved_connections'), 'USAGE')
        THEN 0 ELSE coalesce(nullif(current_setting('reserved_connections', true), '')::int, 0)
        END
    END,
    CASE WHEN rolsuper THEN -1 ELSE rolconnlimit END,
    CASE WHEN rolsuper THEN -1 ELSE datconnlimit END
FROM pg_roles, pg_database WHERE rolname = session_user AND datname = current_database()
"""

_PREPARED = b"poolkeeper"
_PREPARED_AS = (
    b"SELECT name FROM pg_prepared_statements"
    b" WHERE statement LIKE '%name that poolkeeper has asked for%'"
)

HIGHEST_PID = 4_194_304
"""The highest number that Linux gives a process; those that poolers make up are mostly higher."""


class Front:
    """
    What one life of a pool knows of what stands in front of its server.

    Attributes:
        pooled: True once it is known that a pooler stands there.
        shares: True once it was seen that the pooler gives its sessions to several clients in
            turn: nothing of a session (a setting, ``LISTEN``, an advisory lock, a temporary
            table) is there in the next transaction for sure.
        translates: True if the pooler keeps track of prepared statements, so that they work in
            any of its sessions.
        limits: What the server allows; None if that is not known.

    Args:
        name: Of the pool.
        processes: How many of them there are.
        cleaner: Who is to know that sessions are shared.
    """

    MOST = 8
    """How many connections are asked, behind a pooler that was not seen to share its sessions."""
    PATIENCE = 1.0
    """Seconds that a question may take; nobody is to wait long for what is good to know."""

    def __init__(self, name: str, processes: Processes, cleaner: _cleaning.Cleaner) -> None:
        self._name = name
        self._processes = processes
        self._cleaner = cleaner
        self.pooled = False
        self.shares = False
        self.translates = False
        self.limits: Limits | None = None
        self._questions = self.MOST
        """How many more may be asked; none, once one had no answer."""
        self._known = False
        self._turn = asyncio.Lock()  # one after the other, or a pooler would need several sessions
        self._pids: weakref.WeakKeyDictionary[Session, int] = weakref.WeakKeyDictionary()
        self._told: object = None
        self._budget_told = False
        self._excess: Excess | None = None

    @property
    def session_name(self) -> str:
        """
        What the server is to show for a connection.

        With the number of the process where there are several; not behind a pooler, which would
        have to change it whenever a session goes from one process to the next.
        """
        return session_name(self._name, self._processes.number > 1 and not self.pooled)

    def facts(self) -> ServerFacts | None:
        """Return what is known; None while nothing was asked."""
        if not self._known:
            return None
        limits = self.limits
        return ServerFacts(
            pooled=self.pooled,
            shares_sessions=self.shares,
            tracks_prepared=self.translates,
            max_connections=None if limits is None else limits.most,
            reserved=None if limits is None else limits.reserved,
            allowed=None if limits is None else limits.allowed,
        )

    async def meet(self, conn: Any, kwargs: Mapping[str, Any]) -> bool:
        """
        Find out what a new connection can tell, and adapt it to what is known.

        Args:
            conn: The connection; nobody has configured it yet.
            kwargs: What the user has it made with.

        Returns:
            False if a question had no answer in time, which the connection has not survived.

        Raises:
            psycopg.OperationalError: If it was lost.
        """
        if not self._known or (self.pooled and not self.shares and self._questions):
            async with self._turn:
                if not await self._ask(conn):
                    return False
                await self._adapt(conn, kwargs)
        else:
            await self._adapt(conn, kwargs)
        return True

    async def _ask(self, conn: BoundConnection) -> bool:
        if not self._questions:
            return True
        self._questions -= 1
        await self._until_configured(conn)
        patience = _Patience(conn, self.PATIENCE)
        try:
            if not self._known:
                await self._look(conn)
                self._known = True
            elif self.pooled and not self.shares:
                (result,) = await _cleaning.run(conn, [_PID])
                self._note_process(conn, int(result.get_value(0, 0)))
        except psycopg.Error:
            if patience.is_over:
                self._questions, self._known = 0, True
                self.pooled = self.pooled or not 0 < conn.pgconn.backend_pid <= HIGHEST_PID
                return False
            if conn.pgconn.status == BAD:
                raise
            self._known = True  # as much as the server tells
        finally:
            patience.end()
        return True

    async def _until_configured(self, conn: BoundConnection) -> None:
        """Wait, not for long, for those asked before: what they run occupies another session."""
        until = monotonic() + self.PATIENCE
        while monotonic() < until and any(  # noqa: ASYNC110 - a session has no event for it
            not (session.in_pool or session is conn._session or session.pgconn.status == BAD)
            for session in self._pids
        ):
            await asyncio.sleep(0.005)

    async def _look(self, conn: BoundConnection) -> None:
        """Ask for all that can be known from one connection."""
        (result,) = await _cleaning.run(conn, [_LIMITS])
        if not result.ntuples:
            return
        pid, *limits = (int(result.get_value(0, column)) for column in range(5))
        self.limits = Limits(*limits)
        self.pooled = pid != conn.pgconn.backend_pid
        if not self.pooled:
            return
        self._note_process(conn, pid)
        # Without it psycopg deallocates by name, in SQL, and that is not the name there.
        if capabilities.has_send_close_prepared():
            self.translates = await _translates(conn)
            if self.translates:
                self._note_sharing()

    def _note_process(self, conn: BoundConnection, pid: int) -> None:
        mine: Session = conn._session
        if any(pid == other for session, other in self._pids.items() if session is not mine):
            self._note_sharing()
        self._pids[mine] = pid

    def _note_sharing(self) -> None:
        self.shares = True
        self._cleaner.shared = True

    async def _adapt(self, conn: Any, kwargs: Mapping[str, Any]) -> None:
        if not self.pooled:
            return
        if not self.translates and "prepare_threshold" not in kwargs:
            conn.prepare_threshold = None
        named = session_name(self._name, several=True).encode()
        if self._processes.number > 1 and named == conn.pgconn.parameter_status(
            b"application_name"
        ):
            literal = pq.Escaping(conn.pgconn).escape_literal(self.session_name.encode())
            await _cleaning.run(conn, [b"SET application_name = %b" % bytes(literal)])
            conn._session.accept_parameters()

    # --- telling -------------------------------------------------------------------------------

    def tell(self) -> None:
        """Log what stands there, if anything: once, and again if more is known."""
        if not self.pooled or self._told == (told := (self.shares, self.translates)):
            return
        self._told = told
        discards = self.shares and self._cleaner.discards
        log(
            "pooler_found",
            pool=self._name,
            mode="which shares its sessions" if self.shares else "of a mode that is not known",
            prepared="on, for it keeps track of them" if self.translates else "off by default",
            forgone=", DISCARD ALL is not run" if discards else "",
            hint=_ADVICE[self.shares] + see_page("howto/poolers"),
        )

    def warn(self, max_size: int, caller: str | None) -> None:
        """
        Warn whoever has opened the pool if more connections may be asked for than there are.

        Once; not behind a pooler, which has limits of its own that it does not tell.

        Raises:
            ConnectionBudgetWarning: Where warnings are errors.
        """
        if self.limits is None or self._budget_told or max_size == UNLIMITED:
            return
        self._budget_told = True
        if self.pooled:
            return
        self._excess = excess(self._name, max_size, self._processes, self.limits)
        if self._excess is not None:
            warn_user(str(self._excess), ConnectionBudgetWarning, caller)

    def tell_later(self, max_size: int, caller: str) -> None:
        """Tell what was found out when nobody waited for it; who has opened it has gone on."""
        self.tell()
        try:
            self.warn(max_size, caller)
        except ConnectionBudgetWarning:  # an error, where warnings are
            assert self._excess is not None
            message, detail, hint = self._excess
            log("budget_exceeded", pool=self._name, said=message, detail=detail, hint=hint)


_ADVICE = {
    True: "LISTEN, session-level advisory locks, temporary tables and what SET changes do not"
    " last from one transaction to the next. ",
    False: "If it keeps a session for each client (PgBouncer's session mode), prepared statements"
    ' work: kwargs={"prepare_threshold": 5}. ',
}


class _Patience:
    """Ends a connection on which a question has no answer, unless it is the loop that is late."""

    SLICES = 4

    def __init__(self, conn: BoundConnection, seconds: float) -> None:
        self._pgconn = conn.pgconn
        self._slice = seconds / self.SLICES
        self._left = self.SLICES
        self.is_over = False
        self._wait()

    def _wait(self) -> None:
        self._timer = asyncio.get_running_loop().call_later(self._slice, self._tick)

    def _tick(self) -> None:
        self._left -= 1
        if self._left:
            self._wait()
        else:
            self.is_over = True
            # Not cancelled: psycopg would ask the server to stop, and wait for it.
            shut_down(self._pgconn)

    def end(self) -> None:
        self._timer.cancel()


# --- what a pooler does with prepared statements -------------------------------------------------


async def _translates(conn: BoundConnection) -> bool:
    """Tell whether a prepared statement has another name on the server than it was given here."""
    async with conn.lock:
        names = await conn.wait(_prepare(conn.pgconn))
    return bool(names) and _PREPARED not in names


def _prepare(pgconn: Any) -> PQGen[list[bytes | None]]:
    """Prepare, run and close a statement in one round trip, and so in one session of a pooler."""
    pgconn.enter_pipeline_mode()
    try:
        pgconn.send_prepare(_PREPARED, _PREPARED_AS)
        pgconn.send_query_prepared(_PREPARED, None)
        pgconn.send_close_prepared(_PREPARED)
        pgconn.pipeline_sync()
        names: list[bytes | None] = []
        yield from generators.send(pgconn)
        while True:
            results = yield from generators.fetch_many(pgconn)
            if results and results[0].status == pq.ExecStatus.PIPELINE_SYNC:
                return names
            for result in results:
                if result.status == pq.ExecStatus.TUPLES_OK:
                    names += [result.get_value(row, 0) for row in range(result.ntuples)]
    finally:
        with suppress(psycopg.OperationalError):
            pgconn.exit_pipeline_mode()
