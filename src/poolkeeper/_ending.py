"""
How a checkout ends, and how a connection does.

Whoever ends a session here has taken it from the idle ones, or from its holder, before. To end
one is never to wait for the server, but for a ``close()`` of the user's own, which is called in a
task.
"""

from __future__ import annotations

import asyncio
from functools import partial
from time import monotonic
from typing import Any

from typing_extensions import override

from . import _compat
from ._checkouts import ACQUIRED, SUSPECTED, Checkout
from ._connection import BoundConnection, RetiredConnection
from ._life import Life
from ._log import log
from ._session import Session, remains, retire, revoke, shut_down
from ._status import ACTIVE, BAD, IDLE
from ._stopping import GLANCE, Stop
from ._where import Place
from ._words import in_words


def end_checkout(life: Life, session: Session, checkout: Checkout) -> float:
    """Strike a checkout out, and return the time."""
    now = monotonic()
    life.ledger.ends(checkout, now)
    session.checkout = checkout.session = None
    if checkout.structured:
        life.counters.usage_seconds += now - checkout.since
    return now


def tell_end(life: Life, checkout: Checkout, now: float) -> None:
    """Tell of the end of a checkout whose beginning was told; when the connection is in place."""
    listeners = life.listeners
    if checkout.told & ACQUIRED and listeners.want("released"):
        listeners.send(
            listeners.records.Released(
                pool=life.name,
                task=checkout.task_name,
                caller=checkout.caller,
                held_seconds=now - checkout.since,
                query_seconds=checkout.busy_seconds,
                exchanges=checkout.used,
            )
        )
    if checkout.told & SUSPECTED:
        life.tell("suspected_leak_returned", checkout.facts(), at=checkout.at)


# --- of a connection that nobody holds -----------------------------------------------------------


def discarded(life: Life, session: Session, why: str) -> None:
    """Tell, once, that the pool is without a connection that it had; for *why* see `Discarded`."""
    if not session.in_pool:
        return
    session.in_pool = False
    if life.listeners.want("discarded"):
        seconds = monotonic() - session.made_at
        pid = session.backend_pid
        life.listeners.tell("discarded", why=why, backend_pid=pid, lived_seconds=seconds)


def dismiss(life: Life, conn: Any, why: str) -> asyncio.Task[None] | None:
    """End a connection that nobody holds; return the task of a close() of the user's own."""
    discarded(life, conn._session, why)
    if conn.closes_like_psycopg:
        conn._session.finish()
        return None
    return life.tasks.start(partial(end_connection, life, conn, why), "close")


async def end_connection(life: Life, conn: Any, why: str) -> None:
    """End a connection that nobody holds, whatever its ``close()`` raises."""
    discarded(life, conn._session, why)
    try:
        _compat.set_owner(conn, None)  # close_returns is not meant here
        await conn.close()
    except Exception as ex:
        what = "close() of a connection"
        log("close_failed", pool=life.name, what=what, reason=in_words(ex))
    finally:
        end_session(conn._session)


def end_session(session: Session) -> None:
    """Close the socket, or let the task that is at work on it find that it is closed."""
    if at_work(session):
        # Closing the socket would free its descriptor under the event loop's feet; shut
        # down, it reads as closed by the server.
        shut_down(session.pgconn)
    else:
        session.finish()


def at_work(session: Session) -> bool:
    """Tell whether a task is at work on the socket of *session*, so that the loop watches it."""
    handle = session.handle
    return handle is not None and session.pgconn.status != BAD and handle.at_work


# --- of one that is taken from somebody ----------------------------------------------------------


def lost(life: Life, session: Session, why: str) -> None:
    """Make a connection in place of *session*, which is gone."""
    if session in life.between:
        life.between.end(session)
        replace(life)
    discarded(life, session, why)


def replace(life: Life) -> None:
    """Make a connection in place of one that is gone, unless the life is about to be over."""
    if not life.ending:
        life.made -= 1
        if life.keeps or life.connector.wanted < len(life.line):
            life.connector.add()


def discard_busy(life: Life, conn: BoundConnection) -> None:
    """
    End a connection that comes back while another task is at work on it.

    It may be idle as the server sees it (that task waits for notifications), and must not
    be handed on nevertheless: two tasks would read from one socket.
    """
    session = conn._session
    conn._given_back = Place.here()
    assert session.checkout is not None
    log("connection_busy", session.checkout.facts(), pool=life.name)
    checkout = session.checkout
    now = end_checkout(life, session, checkout)
    _compat.set_owner(conn, None)
    life.between.begin(session, "returning", "stopping the query of another task")
    if checkout.told:
        tell_end(life, checkout, now)
    discarded(life, session, "busy")
    last = remains(conn)
    retire(conn)
    life.counters.count("returns_bad")
    if session.pgconn.transaction_status == ACTIVE:
        # The server has it until the query ends: there shall not be one more meanwhile.
        stopping = life.tasks.start(_StopAnothers(last, session).run)
        stopping.add_done_callback(lambda _: lost(life, session, "busy"))
    else:
        # Not closed: see end_session().
        shut_down(session.pgconn)
        lost(life, session, "busy")
    life.tasks.note_freed()


def revoke_session(life: Life, session: Session) -> None:
    """Take a connection from whoever uses it."""
    handle, pgconn = session.handle, session.pgconn
    if (checkout := session.checkout) is not None:
        now = end_checkout(life, session, checkout)
        if checkout.told:
            tell_end(life, checkout, now)
    discarded(life, session, "closing")
    if handle is None or isinstance(handle, RetiredConnection):
        return
    if pgconn.status != BAD:
        handle._lost_work = pgconn.transaction_status != IDLE
    revoke(handle)


class _StopAnothers(Stop):
    """
    Stops what runs on a connection in another task, which goes on there, and ends the session.

    Args:
        conn: What `remains()` of the connection.
        session: Its session.
    """

    @override
    async def run(self) -> None:
        try:
            await super().run()
        finally:
            self._give_up()

    @override
    async def _read(self) -> bool:
        pgconn = self._session.pgconn
        # libpq has no event for it: the task of the query, if it still reads, has the answer.
        while pgconn.transaction_status == ACTIVE and self._session.is_quiet():
            if not self._patience:
                return False
            await asyncio.sleep(GLANCE)
            self._patience.count(GLANCE)
        return True

    @override
    def _give_up(self) -> None:
        if self._session.pgconn.status != BAD:
            shut_down(self._session.pgconn)
