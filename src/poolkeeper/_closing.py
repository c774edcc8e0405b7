"""
Closing: the end of a life, in order, at a deadline, or because its loop is gone.

New work is refused at once; holders may finish until the deadline, then their queries are
cancelled and their connections taken away. However it goes, and whoever cancels it, nothing is
left behind: no session on the server, no task on the loop.
"""
# A pool's life, and what it was made with, are not its users'.
# pyright: reportPrivateUsage=false

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import partial
from time import monotonic
from typing import Any, cast

from ._binding import beginning, inherited
from ._ending import at_work, dismiss, end_session, revoke_session
from ._life import Life
from ._log import log
from ._no_life import closed_error
from ._reporting import moment
from ._session import Session, remains
from ._status import ACTIVE
from ._stopping import CANCEL_GRACE, GLANCE, Asking, Patience
from ._tasks import forget
from ._where import own_call_site
from ._words import in_words

LONGEST = 5.0
"""Seconds that a server has to stop what runs, however many it stops one after the other."""


async def close(life: Life, timeout: float) -> None:
    """End *life*: see `BoundPool.close()`."""
    if life.gone:
        error = life.binding.mismatch("close it")
        _let_go(life)
        raise error
    life.binding.check("close it")
    if life.ending:
        await life.until_ended()
    else:
        await end(life, timeout, None)


async def end(life: Life, timeout: float, failure: BaseException | None) -> None:
    """End the life; tell those who wait *failure*, or that the pool is closed."""
    closed = own_call_site() if failure is None else ""
    life.begin_to_end()
    try:
        await _in_order(life, timeout, failure)
    finally:
        # Whatever was raised, of the user's own or not: this life is over.
        try:
            _stop_tasks(life)
            for session in life.sessions:
                if not at_work(session):
                    session.finish()
        finally:
            # Only now: who opens the pool anew must not meet what is left of this life.
            over = life.end()
            over.facts = moment(life).snapshot
            over.closed = closed
            life.tell_closed()


async def _in_order(life: Life, timeout: float, failure: BaseException | None) -> None:
    farewells = _refuse_new_work(life, failure)
    interruption: asyncio.CancelledError | None = None
    begin = monotonic()
    try:
        await _until_free(life, begin + timeout)
        if farewells:
            await asyncio.wait(farewells, timeout=CANCEL_GRACE)
    except asyncio.CancelledError as ex:
        interruption = ex
    waited = monotonic() - begin
    late = [f"{one}, held for {one.held_seconds:.1f} s" for one in life.ledger.longest_first()]
    life.late = len(late)
    tasks = _stop_tasks(life)
    if _active(life):
        # In a task, so that no cancellation leaves the server at work.
        stopping = asyncio.create_task(_stop_queries(life), name=f"{life.name}-close")
        interruption = await _settle(life, [stopping], LONGEST + CANCEL_GRACE) or interruption
    for session in life.sessions:
        _ignoring_errors(life, revoke_session, life, session)
        _ignoring_errors(life, end_session, session)
    for task in tasks:
        task.cancel()  # once more: psycopg may still be trying to stop a query of its own
    interruption = await _settle(life, tasks) or interruption
    if late:
        log(
            "closed_late",
            pool=life.name,
            waited_seconds=waited,
            number=len(late),
            late="; ".join(late),
        )
    if interruption is not None:
        raise interruption


def _refuse_new_work(life: Life, failure: BaseException | None) -> list[asyncio.Task[None]]:
    """Tell all who wait, end what is idle; return the tasks of what the user's own close() does."""
    refusal = failure or closed_error(life.name, life.state, life.opened)
    life.line.refuse_all(refusal)
    life.openers.tell(refusal)
    if life.question is not None:
        life.question.refuse("the pool is closing")
    life.failover.stop()
    life.checks.end()
    return [task for conn in life.take_all_idle() if (task := dismiss(life, conn, "closing"))]


def _ignoring_errors(life: Life, step: Callable[..., object], *arguments: object) -> None:
    """Take a *step* that others shall follow, whatever it raises."""
    try:
        step(*arguments)
    except Exception as ex:
        log("close_failed", pool=life.name, what="close()", reason=in_words(ex))


async def _until_free(life: Life, deadline: float) -> None:
    """Wait until nobody but the caller holds a connection, or the deadline."""
    while life.tasks.running or any(
        session.checkout and not session.checkout.by_this_task for session in life.sessions
    ):
        remaining = deadline - monotonic()
        if remaining <= 0:
            return
        await life.tasks.until_freed(remaining)


# --- what still runs ------------------------------------------------------------------------------


async def _stop_queries(life: Life) -> None:
    """
    Have what runs stopped, and let its task roll back; within `CANCEL_GRACE`.

    A server does not look for a client that is gone before it has something to send: what
    is not cancelled goes on, and keeps its session. The query's task may run another one, so at
    last it is not let. Many may have been sent already on one connection, which are stopped one
    after the other: as long as one more ends in time the next has as much, up to `LONGEST`.
    """
    begin = heard = monotonic()
    until = begin + CANCEL_GRACE
    asking: dict[Session, asyncio.Task[None]] = {}
    may_go_on = True
    while (active := _active(life)) and (now := monotonic()) < until:
        for session in active:
            if session not in asking or asking[session].done():
                last = remains(session.handle)
                requests = Asking(last, partial(_is_active, session), Patience())
                asking[session] = asyncio.create_task(requests.ask())
        latest = max(session.heard_at for session in active)
        if not may_go_on and latest > heard:
            heard, until = latest, min(latest + CANCEL_GRACE, begin + LONGEST)
        if may_go_on and now > begin + 0.75 * CANCEL_GRACE:
            may_go_on = False
            for session in life.sessions:
                _ignoring_errors(life, revoke_session, life, session)
        # libpq has no event for it: the task of the query reads the answer.
        await asyncio.sleep(GLANCE)
    for task in asking.values():
        task.cancel()
    if asking:
        await asyncio.wait(asking.values())


def _active(life: Life) -> list[Session]:
    """Return the sessions that run a query."""
    return [session for session in life.sessions if _is_active(session) and session.handle]


def _is_active(session: Session) -> bool:
    return bool(session.pgconn.transaction_status == ACTIVE)


def _stop_tasks(life: Life) -> list[asyncio.Task[None]]:
    """Stop the tasks of this life, which are returned, and close what is idle. Synchronous."""
    tasks = [*life.tasks.take_all(), *life.connector.stop()]
    life.clock.stop()
    life.storm.end()
    life.checks.stop()
    if life.leak_timer is not None:
        life.leak_timer.cancel()
    if life.slow_callbacks is not None:
        life.slow_callbacks.stop()
    for task in tasks:
        task.cancel()
    for conn in life.take_all_idle():
        conn._session.finish()
    return tasks


async def _settle(
    life: Life, tasks: Iterable[asyncio.Task[None]], seconds: float = 2 * CANCEL_GRACE
) -> asyncio.CancelledError | None:
    """
    Wait until *tasks*, which were told to stop, have; return a cancellation met meanwhile.

    None of them can take longer than *seconds*, but for callbacks of the user's.
    """
    interruption: asyncio.CancelledError | None = None
    pending: set[asyncio.Task[None]] = {task for task in tasks if not task.done()}
    until = monotonic() + seconds
    while pending and (remaining := until - monotonic()) > 0:
        try:
            _, pending = await asyncio.wait(pending, timeout=remaining)
        except asyncio.CancelledError as ex:
            interruption = ex
            pending = {task for task in pending if not task.done()}
    if pending:
        names = ", ".join(sorted(task.get_name() for task in pending))
        log("tasks_left", pool=life.name, tasks=names)
    return interruption


# --- a life whose loop is gone --------------------------------------------------------------------


def _let_go(life: Life) -> None:
    """Abandon a life whose loop is dead, unless another thread has just begun a new one."""
    with beginning():
        if life.pool._life is not life:
            return
        abandon(life)
    bury(life)


def abandon(life: Life) -> None:
    """Let go of a life whose loop will never run again, or that is another process's."""
    life.begin_to_end()
    life.late = len(life.held)
    life.end()


def bury(life: Life) -> None:
    """
    End what there is of a life that was let go of; no other is held up by it.

    In the same process the sessions are ended, which needs no loop. In a forked child nothing
    is touched, and all of it is kept: to close or finalise it would be to write into the
    parent's sessions and its selector.
    """
    sessions = list(life.sessions)
    tasks = [*life.tasks.take_all(), *life.connector.abandon()]
    if life.slow_callbacks is not None:
        life.slow_callbacks.stop()
    for task in tasks:
        forget(task)
    if life.binding.forked:
        inherited.append((life, sessions, tasks, life.take_all_idle()))
    else:
        for session in sessions:
            revoke_session(life, session)
            session.finish()
        for task in tasks:
            # Its awaits end in "Event loop is closed".
            with suppress(BaseException):
                cast(Any, task.get_coro()).close()
    life.tell_closed()
