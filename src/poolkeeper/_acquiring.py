"""
Acquiring: from the question for a connection to the record of a checkout.

`take()` is what every request pays: one function, no await. Where nothing is free, or it must be
looked at first, `wait_for_connection()` goes on: in the line, first come first served, and with a
look at each connection that is handed over. A waiter that goes, at its timeout or because it is
cancelled, costs nothing: what it was handed in that very turn is passed on.

Who is refused is told why, in words that are found when somebody reads them.
"""

from __future__ import annotations

import asyncio
from asyncio import _get_running_loop, current_task
from functools import partial
from time import monotonic
from types import FrameType
from typing import Any, TypeAlias

from . import _reporting
from ._checkouts import ACQUIRED, Checkout
from ._diagnosis import diagnose
from ._life import Life
from ._line import Place, Waiter
from ._moment import Moment
from ._no_life import closed_error
from ._session import Session
from ._stock import help_growth
from ._watching import answers
from ._where import Behalf, Code, function_of, site
from .errors import (
    AcquireTimeout,
    PoolkeeperError,
    SelfDeadlockError,
    TooManyWaitersError,
    see,
)

LONGEST = 1e9
"""Seconds that the longest wait may take: for ever."""

FRESH = 0.001
"""Seconds for which a connection that was heard of, or looked at, is not looked at again."""

ASKED = 0.25
"""Seconds that an acquire without a timeout waits for an idle connection that is being asked."""

RESTED = 30.0
"""Seconds after which an idle connection is next, whichever was given back last."""

TRIED = 0.5
"""Seconds that an acquire without a timeout goes on to try idle ones, if `check` refuses some."""


Wait: TypeAlias = tuple[float, bool]
"""How many seconds an acquire took, and whether it was in line."""

NO_WAIT = 0.0, False

_current_task: Any = current_task


def take(
    life: Life | Any, frame: FrameType | Behalf, lineno: int, structured: bool, loop: Any = None
) -> Any:
    """
    Acquire a connection that is free, sound and needs no check; None if that takes waiting.

    Args:
        life: The pool's, or what stands in its place.
        frame: Where it is asked for.
        lineno: At which line of it.
        structured: True if a block of the calling task's own will give it back.
        loop: The one that runs, if it was asked already whether that is the pool's.

    Raises:
        LoopMismatchError, NotOpenError, ClosedError: As `getconn()`.
    """
    # The one question: a loop that has no pool, and a pool that has no loop, are never the same.
    if loop is None:
        loop = _get_running_loop()
        if loop is None or loop is not life.binding.admits():
            life.check_usable("acquire a connection")
            if life.stand_in is not None:
                return None
    life.counters.requests += 1
    idle = life.idle
    if not idle or life.line or life.check is not None:
        return None
    # As _take_next(), without the call, and after a look at it.
    now = monotonic()
    rested = now - idle[0]._session.heard_at > RESTED
    conn: Any = idle[0] if rested else idle[-1]
    session: Session = conn._session
    if now - session.heard_at > FRESH:
        if not session.is_quiet():
            return None
        session.heard_at = now
    if rested:
        idle.popleft()
    else:
        idle.pop()
    if len(idle) < life.idle_low:
        life.idle_low = len(idle)
    return _check_out(life, conn, session, loop, frame, lineno, structured, now)


def _take_next(life: Life) -> Any:
    """
    Take the idle connection that was given back last.

    The server's process for it is at hand then, as is all that we have of it: that saves a third
    of the CPU of a short query. But none is left to itself for so long that a firewall might
    forget it.
    """
    if monotonic() - life.idle[0]._session.heard_at > RESTED:
        return life.take_idle()
    conn = life.idle.pop()
    life.note_idle_low()
    return conn


def _check_out(
    life: Life,
    conn: Any,
    session: Session,
    loop: Any,
    frame: FrameType | Behalf,
    lineno: int,
    structured: bool,
    now: float,
    wait: Wait = NO_WAIT,
) -> Any:
    # Which loop this is need not be asked again. The task is in no variable, which would hold its
    # own error, and that the connection, if this is cut short by a RecursionError, say.
    checkout = Checkout(session, _current_task(loop), frame.f_code, lineno, structured, now)
    session.checkout = conn._checkout = checkout
    conn._pool = life.pool
    if life.listeners.quiet:
        life.held[checkout] = None
    else:
        _begin_loudly(life, checkout, frame, wait)
    return conn


def _begin_loudly(life: Life, checkout: Checkout, frame: FrameType | Behalf, wait: Wait) -> None:
    """Write a checkout down of which somebody wants to know more; and tell who has subscribed."""
    stack_of = frame.f_back if isinstance(frame, Behalf) else frame
    life.ledger.begins(checkout, None if life.leak_threshold is None else stack_of)
    listeners = life.listeners
    if listeners.of_checkouts:
        caller = checkout.caller = listeners.caller(checkout.code, checkout.lineno, frame)
        checkout.told = ACQUIRED
        listeners.send(
            listeners.records.Acquired(
                pool=life.name,
                task=checkout.task_name,
                caller=caller,
                waited_seconds=wait[0],
                queued=wait[1],
            )
        )


async def wait_for_connection(
    life: Life,
    timeout: float | None,
    frame: FrameType | Behalf,
    lineno: int,
    structured: bool,
    shares: bool = False,
    since: float = 0.0,
) -> Any:
    """
    Acquire a connection when `take()` had none.

    Args:
        life: The pool's.
        timeout: Seconds to wait; None for the pool's own.
        frame: Where it is asked for.
        lineno: At which line of it.
        structured: True if a block of the calling task's own will give it back.
        shares: True if a `Place` will do, which is returned then.
        since: Since when it has waited, if it was served before, but not well; 0.0 if now.
    """
    conn: Any
    if life.stand_in is not None:
        conn = await life.stand_in.acquire(timeout, frame, lineno)
        if conn is not None:
            return conn
        life.counters.requests += 1
    if timeout is None:
        timeout = life.pool.timeout
    entered = monotonic()
    began = since or entered
    try:
        # It may be infinite, or NaN.
        deadline = began + (timeout if timeout < LONGEST else LONGEST)
        code = frame.f_code
        joined = since
        queued = False
        refused = 0
        tries = len(life.idle)
        while True:
            if life.ending:
                life.check_usable("acquire a connection")
            if life.idle and not life.line:
                conn = _take_next(life)
            else:
                conn = await _wait_in_line(
                    life, timeout, deadline, code, lineno, joined, shares, again=queued
                )
                queued = True
                if shares and isinstance(conn, Place):
                    return conn
            joined = began
            session: Session = conn._session
            now = monotonic()
            fresh = now - session.heard_at <= FRESH
            if fresh or session.is_quiet() or await answers(life, conn, deadline):
                session.heard_at = now
                check = life.check
                look = check and life.checks.accepts(check, conn, refused, deadline)
                if look is None or await look:
                    life.between.end(session)
                    loop = life.binding.owner_loop()
                    wait = monotonic() - entered, queued
                    return _check_out(
                        life, conn, session, loop, frame, lineno, structured, now, wait
                    )
                refused += 1
                if (now := monotonic()) >= deadline and not (
                    # Each of those that are free now is one that it may have.
                    life.idle and refused < tries and now < began + TRIED
                ):
                    life.counters.count("requests_errors")
                    raise _refusal(life, timeout, now - began, code, lineno, look.moment)
    except BaseException as ex:
        if life.listeners.want_failures:
            _tell_in_vain(life, ex, timeout, monotonic() - entered, (frame.f_code, lineno))
        raise


async def _wait_in_line(
    life: Life,
    timeout: float,
    deadline: float,
    code: Code,
    lineno: int,
    joined: float,
    shares: bool,
    again: bool,
) -> Any:
    """
    Wait until a connection is handed over.

    Args:
        life: The pool's.
        timeout: Seconds that the task was to wait.
        deadline: Until when.
        code: Where it asks.
        lineno: At which line of it.
        joined: When it joined, if it was handed one that is no good; 0.0 if it joins now.
        shares: True if a place will do.
        again: True if it was told already that it waits.
    """
    line = life.line
    if life.pool.max_waiting and len(line) >= life.pool.max_waiting and not joined:
        life.counters.count("requests_errors")
        raise _too_many(life)
    comes_back = life.asked_idle > len(line)  # what a readiness probe has taken, say
    now = monotonic()
    if deadline <= now and comes_back:
        deadline = now + ASKED
    elif deadline <= now:
        life.counters.count("requests_errors")
        raise _refusal(life, timeout, now - joined if joined else None, code, lineno)
    loop: Any = life.binding.owner_loop()
    waiter = Waiter(loop, timeout, deadline, code, lineno, now)
    waiter.shares = shares
    if life.ledger.completes_deadlock(waiter.task, line, life.max_size, timeout):
        waiter.suspected = waiter.since
    try:
        if joined:
            waiter.since = joined
            line.rejoin(waiter)
        else:
            line.append(waiter)
        life.counters.queued += 1
        if life.listeners.want_queued and not again:
            _tell_queued(life, waiter)
        if not comes_back and (life.made < life.max_size or life.connector.wanted):
            help_growth(life)
        life.clock.watch(waiter)
        conn = await waiter.future
        line.leave(waiter)
    except BaseException:
        line.leave(waiter)
        if waiter.was_served():
            # Cancelled in the same turn of the loop in which it was served, say.
            _pass_on(life, waiter.future.result())
        life.counters.count("requests_errors")
        raise
    finally:
        life.clock.forget(waiter)
        life.counters.wait_seconds += monotonic() - now
    if life.ending:
        if isinstance(conn, Place):
            conn.not_taken()
        else:
            conn._session.finish()
        raise closed_error(life.name, life.state, life.opened)
    return conn


def _pass_on(life: Life, handed: Any) -> None:
    """Give *handed* to the next, for it came too late."""
    if isinstance(handed, Place):
        handed.not_taken()
    else:
        life.give(handed)


# --- those who are refused ---------------------------------------------------------------------


def _too_many(life: Life) -> TooManyWaitersError:
    waiting = len(life.line)
    tasks_wait = "1 task waits" if waiting == 1 else f"{waiting} tasks wait"
    return TooManyWaitersError(
        f'cannot wait for a connection from pool "{life.name}": {tasks_wait} already',
        detail=f"{_reporting.numbers(life)}. max_waiting={life.pool.max_waiting}.",
        hint=f"Let the caller try again later. {see('too-many-waiters')}",
    )


def time_out(life: Life, waiters: list[Waiter]) -> None:
    """Tell all of *waiters* that their time is up, and why."""
    for waiter in waiters:
        life.line.leave(waiter)
    life.ledger.gave_up(len(waiters))
    moment = _reporting.moment(life, {waiter.task for waiter in waiters})
    errors = [
        _acquire_timeout(life, waiter.timeout, moment.when - waiter.since, moment)
        for waiter in waiters
    ]
    for waiter, error in zip(waiters, errors, strict=True):
        waiter.refuse(error)
    # When all are told: a filter or handler of the user's may raise.
    first = waiters[0]
    who = partial(_who, first.timeout, first.task, first.code, first.lineno)
    life.storm.goes_on(errors[0], len(errors), who)


def _refusal(
    life: Life,
    timeout: float,
    waited: float | None,
    code: Code,
    lineno: int,
    moment: Moment | None = None,
) -> AcquireTimeout:
    """
    Return why an acquire fails that is not in line; it is logged.

    Args:
        life: The pool's.
        timeout: How long it was to wait.
        waited: How long it did, in line; None if it never was.
        code: Where it asks.
        lineno: At which line of it.
        moment: When its time was up; None if that is now.
    """
    moment = moment or _recent_moment(life)
    error = _acquire_timeout(life, timeout, max(0.0, timeout) if waited is None else waited, moment)
    life.storm.goes_on(error, 1, partial(_who, timeout, current_task(), code, lineno))
    return error


def _who(timeout: float, task: asyncio.Task[Any] | None, code: Code, lineno: int) -> dict[str, Any]:
    """Return what is logged of a task that gave up."""
    return {
        "timeout_seconds": timeout,
        "task": task.get_name() if task else "",
        "site": site(code, lineno),
        "function": function_of(code),
    }


def _recent_moment(life: Life) -> Moment:
    moment, now = life.last_moment, monotonic()
    # Who tries again and again would spend more time on the reasons than on the tries: those are
    # good for a while, and for twenty times as long as it took to find them.
    if (
        moment is None
        or now > life.moment_until
        or not moment.is_of(_reporting.counts(life), life.ledger.last_began)
    ):
        moment = life.last_moment = _reporting.moment(life)
        found = monotonic()
        life.moment_until = max(now + FRESH, found + 20 * (found - now))
    return moment


def _acquire_timeout(life: Life, timeout: float, waited: float, moment: Moment) -> AcquireTimeout:
    """Return why an acquire has failed, in words that are found when they are read."""
    error = AcquireTimeout.told_later(partial(moment.account, timeout, waited))
    cause = life.connector.last_error or life.checks.refusals.error
    if cause is not None:
        error.__cause__ = cause.with_traceback(None)
    return error


def end_deadlock(life: Life, waiter: Waiter) -> None:
    """Tell the one who completed a self-deadlock, if nobody has stopped waiting since."""
    if not life.ledger.deadlock_lasts(life.line, life.max_size, waiter.suspected):
        return
    moment = _reporting.moment(life)
    life.line.leave(waiter)
    diagnosis = diagnose(moment.snapshot(moment.when - waiter.since))
    error = SelfDeadlockError(
        f'cannot acquire a connection from pool "{life.name}": {diagnosis.summary}',
        detail=diagnosis.detail,
        hint=f"{diagnosis.advice} {see('self-deadlock')}",
        diagnosis=diagnosis,
    )
    waiter.refuse(error)


# --- what is told of those who had to wait, or did so in vain ----------------------------------


def _tell_queued(life: Life, waiter: Waiter) -> None:
    at = waiter.code, waiter.lineno
    life.listeners.tell("queued", at=at, task=task_name(), waiting=len(life.line))


def _tell_in_vain(
    life: Life, error: BaseException, timeout: float, waited: float, at: tuple[Code, int]
) -> None:
    """Tell of an acquire that *error* has ended; in its task."""
    tell = partial(life.listeners.tell, at=at, task=task_name())
    if isinstance(error, TooManyWaitersError):
        tell("turned_away", waiting=len(life.line))
    elif not isinstance(error, AcquireTimeout):
        why = "closed" if isinstance(error, PoolkeeperError) else "cancelled"
        tell("gave_up", waited_seconds=waited, why=why)
    elif (diagnosis := error.diagnosis) is not None:
        tell(
            "acquire_timeout",
            waited_seconds=waited,
            timeout_seconds=timeout,
            cause=diagnosis.cause,
            summary=diagnosis.summary,
        )


def task_name() -> str:
    """Return the name of the running task; "" outside of any."""
    task = current_task()
    return task.get_name() if task else ""
