"""
Watching: whether a connection that nobody holds is still good, and of the right server.

A look at the socket costs no round trip, and tells a session that is quiet from one that was
ended, or has something to say. What came is read; only where that does not tell is the server
asked, in a task that has the connection until it knows. One that is dead makes the pool look at
all the idle ones, for it is seldom alone.
"""
# A pool's life, and what it was made with, are not its users'.
# pyright: reportPrivateUsage=false

from __future__ import annotations

import asyncio
import weakref
from collections.abc import Iterable
from functools import partial
from time import monotonic
from typing import Any

import psycopg

from . import _reporting
from ._checkouts import SUSPECTED
from ._ending import discarded, dismiss, lost, replace
from ._health import Question
from ._life import Life, Pool
from ._log import log
from ._making import connect_beside
from ._releasing import start_put_back, take_back_unused
from ._session import Session, retire, shut_down
from ._snapshot import Health
from ._status import BAD, IDLE, INERROR, INTRANS
from ._stock import drain


async def answers(life: Life, conn: Any, deadline: float) -> bool:
    """
    Tell whether a connection that is not quiet works; if not, replace all that are dead.

    What came may be the end of the session, or a notice: read it, which costs no round
    trip, and ask the server only if that does not tell.
    """
    if was_ended(conn):
        _replace_dead(life, [conn])
        return False
    if await life.checks.answers(conn, deadline):
        return True
    _replace_dead(life, [])
    return False


def look_at_idle(life: Life) -> list[asyncio.Future[bool]]:
    """Ask the server on each idle connection; keep or replace it when the answer has come."""
    return [_check_idle(life, conn) for conn in life.take_all_idle()]


def _check_idle(life: Life, conn: Any) -> asyncio.Future[bool]:
    """Ask the server whether *conn*, which was idle, works; keep it or replace it."""
    verdict = life.checks.ask(conn)
    verdict.add_done_callback(partial(_checked, life, conn))
    life.asked_idle += 1
    return verdict


def _checked(life: Life, conn: Any, verdict: asyncio.Future[bool]) -> None:
    life.asked_idle -= 1
    if not verdict.result():
        _replace_dead(life, [])  # this one was taken back; it may not be alone
    elif life.oversized or conn._session.expires_at <= monotonic():
        start_put_back(life, conn, unused=True)
    else:
        life.between.end(conn._session)
        life.give(conn)


def _replace_dead(life: Life, dead: list[Any]) -> None:
    """Replace *dead*, which were idle, and those of the idle ones that are dead as well."""
    idle = life.idle
    for conn in [c for c in idle if not c._session.is_quiet()]:
        idle.remove(conn)
        if was_ended(conn):
            dead.append(conn)
        else:
            # Said something, which is read by now. It may have been its last words, and
            # the end still to come: it must not go back as it is, looking well.
            _check_idle(life, conn)
    if not dead:
        return
    log("connections_replaced", pool=life.name, number=len(dead))
    life.counters.count("connections_lost", len(dead))
    for conn in dead:
        discarded(life, conn._session, "dead")
        replace(life)


def was_ended(conn: Any) -> bool:
    """Read what came on an idle connection, and tell whether that was its end."""
    try:
        conn.pgconn.consume_input()
    except psycopg.OperationalError:
        return True
    return bool(conn.pgconn.status == BAD)


class Watch:
    """
    What those beneath ask of the house, which they do not know: see their `Pool`.

    They are `_checking`, `_failover`, `_health` and `_storm`.
    """

    def __init__(self, life: Life) -> None:
        self._life = life
        self.name = life.name
        self.sessions: Iterable[Session] = life.sessions
        self.start_own_task = life.tasks.start
        self.take_back_unused = partial(take_back_unused, life)
        self.look_at_idle = partial(look_at_idle, life)
        self.connect_beside = partial(connect_beside, life)
        self.dismiss = partial(dismiss, life, why="not needed")
        self.drain = partial(drain, life)
        self.moment = partial(_reporting.moment, life)
        self.counts = partial(_reporting.counts, life)

    def is_alive(self) -> bool:
        """Tell whether a connection may be handed out."""
        return not self._life.ending

    def is_right_server(self, conn: Any) -> bool:
        """Tell whether *conn* is of the kind of server that it was; it is replaced if not."""
        return self._life.failover.accept(conn)

    def lose(self, conn: Any) -> None:
        """End a connection that a task of the user's does not let go of, and replace it."""
        session: Session = conn._session
        retire(conn)
        shut_down(session.pgconn)
        lost(self._life, session, "stuck")

    def answered_lately(self, seconds: float) -> bool:
        """
        Tell whether the server has answered whoever holds a connection, so long ago at most.

        A query that failed was answered, too; one that was lost, or is under way, was not.
        """
        since = monotonic() - seconds
        return any(
            checkout.used
            and checkout.changed_at > since
            and (session := checkout.session) is not None
            and session.pgconn.transaction_status in (IDLE, INTRANS, INERROR)
            and session.is_quiet()
            for checkout in self._life.held
        )

    def ask_idle(self) -> asyncio.Future[bool] | None:
        """
        Ask the server on a connection that nobody waits for; None if none is free.

        The connection is kept, or replaced, when the answer has come.
        """
        life = self._life
        if not life.idle or life.line:
            return None
        return _check_idle(life, life.take_idle())


# --- whether a query can run --------------------------------------------------------------------


async def check(pool: Pool, timeout: float) -> Health:
    """Return whether the server answers within *timeout* seconds."""
    began = monotonic()
    ok, beside = False, False
    life = pool._life
    reason = kind = life.out_of_service("check it")
    if reason is None and isinstance(life, Life):
        question = life.question
        if question is None or not question.is_open:
            question = life.question = Question(life.watch, question)
        ok, reason, kind = await question.answer_within(timeout)
        beside = question.beside
    seconds = monotonic() - began
    return Health(
        ok, reason or "", seconds, beside, _reporting.snapshot(pool._life), kind or reason or ""
    )


# --- suspected leaks ----------------------------------------------------------------------------


def watch_for_leaks(life: Life, threshold: float) -> None:
    """Look, time and again, for connections that are held for longer than the threshold."""
    every = min(max(threshold / 4, 0.01), 1.0)
    life.leak_timer = asyncio.get_running_loop().call_later(
        every, _look_for_leaks, weakref.ref(life), context=life.tasks.context
    )


def _look_for_leaks(reference: weakref.ref[Life]) -> None:
    life = reference()
    if life is None or life.leak_threshold is None:
        return
    watch_for_leaks(life, life.leak_threshold)
    life.ledger.let_go()
    for checkout in life.ledger.overdue():
        checkout.told |= SUSPECTED
        stack = checkout.stack_text().rstrip()
        numbers = _reporting.counts(life)
        life.tell("suspected_leak", checkout.facts(), numbers, at=checkout.at, stack=stack)
