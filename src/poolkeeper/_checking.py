"""
Looking at a connection before somebody gets it: whether it answers, whether `check` accepts it.

A look is made in the task that wants the connection, as psycopg_pool makes it. If that task is
cancelled, or its time is up, so is what it waits for in the look, which has a moment to end. If
it has not ended then, it is left to a task of the pool's own, and whoever waited goes. Whatever
becomes of him, the connection is the pool's to take back or to replace.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Generator
from functools import partial
from time import monotonic
from types import coroutine
from typing import Any, Protocol, TypeAlias, cast

from psycopg import pq

from . import _cleaning, _compat
from ._between import Between
from ._binding import weakly
from ._log import log
from ._moment import Moment
from ._session import shut_down
from ._stopping import CANCEL_GRACE
from ._where import code_behind, site
from ._words import in_words, raised_by

Check: TypeAlias = Callable[[Any], Awaitable[None]]

FOREVER = float("inf")

PROBE_TIMEOUT = 2.0
"""Seconds that the server has to answer on a connection that is suspected to be dead."""

LAST_LOOK = 0.5
"""Seconds that a look is given at least, if it begins before the acquire's time is up."""

FIRST_REST, LONGEST_REST = 0.01, 0.25
"""Seconds for which a connection that its check refuses is left alone, more each time."""

PATIENCE = 2 * CANCEL_GRACE
"""Seconds that a `check` that is cancelled has to end: as many as a query of its may take."""

PATIENCE_WITH_OURS = 0.02
"""Seconds that a query of our own has, for which nobody needs to wait."""


class Pool(Protocol):
    """What a look asks of the pool."""

    name: str

    def start_own_task(
        self,
        work: Callable[[], Coroutine[Any, Any, None]],
        name: str,
        callers_context: bool = False,
    ) -> asyncio.Task[None]:
        """Start *work* in a task that `close()` waits for."""
        ...

    def is_alive(self) -> bool:
        """Tell whether the pool may hand a connection out: not if it is about to close."""
        ...

    def moment(self) -> Moment:
        """Return the facts of this moment."""
        ...

    def is_right_server(self, conn: Any) -> bool:
        """Tell whether *conn*, on which no borrower has set anything, is of the server it was."""
        ...

    def take_back_unused(self, conn: Any) -> None:
        """Give a connection back that nobody has had."""
        ...

    def lose(self, conn: Any) -> None:
        """End a connection that a task is at work on, and replace it."""
        ...


class Refusals:
    """What the user's `check` refuses, since it accepted a connection last."""

    def __init__(self) -> None:
        self.number = 0
        self.error: BaseException | None = None
        """Why it refused the last; without its traceback, which would keep the connection."""
        self.words = ""
        self.check: Check | None = None
        self.since = self.last = 0.0

    def note(self, check: Check, error: BaseException) -> None:
        """Note that *check* has refused a connection."""
        self.check = check
        self.last = monotonic()
        if not self.number:
            self.since = self.last
        self.number += 1
        self.words = in_words(error)
        self.error = error.with_traceback(None)

    def end(self) -> None:
        """Note that one was accepted."""
        if self.number:
            self.number = 0
            self.error = None
            self.words = ""


class Checks:
    """
    The looks of one life of a pool.

    Args:
        pool: The pool.
        between: Where its connections are.
    """

    def __init__(self, pool: Pool, between: Between) -> None:
        self.pool = pool
        self.between = between
        self.refusals = Refusals()
        self._watched: set[Look] = set()
        self._timer: asyncio.TimerHandle | None = None
        self._due = FOREVER

    def answers(self, conn: Any, deadline: float) -> Look:
        """Return what tells, awaited until *deadline*, whether the server answers on *conn*."""
        return Look(self, conn, None, 0, deadline)

    def accepts(self, check: Check, conn: Any, refused: int, deadline: float) -> Look:
        """Return what tells whether *check* accepts *conn*, for who was refused so many before."""
        return Look(self, conn, check, refused, deadline)

    def ask(self, conn: Any) -> asyncio.Future[bool]:
        """Begin to ask the server on *conn*, which nobody waits for, whether it answers."""
        look = Look(self, conn, None, 0, FOREVER)
        verdict: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        task = self.pool.start_own_task(partial(look.tell, verdict), "check")
        task.add_done_callback(lambda _: look.end_untold(verdict))
        return verdict

    def end(self) -> None:
        """Let nobody wait for a look any more: the pool is about to close."""
        for look in list(self._watched):
            look.end()

    def stop(self) -> None:
        """Watch nothing any more."""
        self._watched.clear()
        if self._timer is not None:
            self._timer.cancel()

    def watch(self, look: Look) -> None:
        """Tell *look* when it is due: by one timer for all, for most are gone by then."""
        self._watched.add(look)
        if look.due < self._due:
            self._arm(look.due)

    def forget(self, look: Look) -> None:
        """Watch *look* no more. The timer is left as it is: the next look may need it."""
        self._watched.discard(look)

    def _arm(self, due: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._due = due
        self._timer = asyncio.get_running_loop().call_later(due - monotonic(), weakly(self._ring))

    def _ring(self) -> None:
        self._timer, self._due = None, 0.0  # nothing is to be armed until all are told
        now = monotonic()
        for look in list(self._watched):
            if look.due <= now:
                look.is_due(now)
        self._due = FOREVER
        due = min((look.due for look in self._watched), default=FOREVER)
        if due < FOREVER:
            self._arm(due)

    def facts(self, now: float) -> dict[str, Any]:
        """Return what a `PoolSnapshot` has of it."""
        refusals = self.refusals
        if not refusals.number:
            return {}
        code = code_behind(refusals.check)
        return {
            "checks_refused": refusals.number,
            "check_site": site(code, code.co_firstlineno) if code else "",
            "check_error": refusals.words,
            "check_error_seconds": now - refusals.last,
            "check_failing_seconds": now - refusals.since,
        }


class Look:
    """
    One look at one connection.

    Awaited, it is True once the connection was found good, and is the caller's; False if it is
    not, or not in time, and then the pool has it.

    psycopg_pool's own ``check_connection()`` asks whether the server answers; so the server is
    asked as the pool itself asks it, in one round trip, and given up after `PROBE_TIMEOUT`.

    Args:
        checks: Whose look it is.
        conn: The connection.
        check: The user's; None to ask whether the server answers.
        refused: How many were refused to the caller before.
        deadline: Until when the caller waits, but for `LAST_LOOK` at least.

    Attributes:
        due: When it wants to be told what time it is.
        moment: The facts of the moment at which its time was up.
    """

    due = FOREVER
    moment: Moment | None = None

    _silent_at = FOREVER  # when a server that has not answered is given up
    _patient_until = FOREVER  # when who waits goes, though the look has not ended

    _has_it = True  # the connection
    _in_hurry = False  # to end: its time is up
    _left = False  # to a task of the pool's own
    _task: asyncio.Task[Any] | None = None  # that waits for it
    _before = 0  # requests to cancel that task when it began to wait
    _ours = 0  # such requests of the look's own

    def __init__(
        self, checks: Checks, conn: Any, check: Check | None, refused: int, deadline: float
    ) -> None:
        self._checks = checks
        self._conn = conn
        self._check = check
        self._asks = check is None or check is _compat.CHECK_CONNECTION
        self._refused = refused
        self._deadline = deadline
        doing = "asked whether it still works" if check is None else "in the check callback"
        checks.between.begin(conn._session, "checking", doing, check)

    # --- what is done with the connection -----------------------------------------------------

    async def _look(self) -> bool:
        conn, check, checks = self._conn, self._check, self._checks
        pool = checks.pool
        good = False
        try:
            if self._asks:
                await _cleaning.ask(conn)
            else:
                await cast(Check, check)(conn)
            if check is not None:
                checks.refusals.end()
            if pool.is_alive() and not conn.closed:
                same = check is not None and conn._session.same_kind
                if not same and not self._asks:
                    same = await _cleaning.has_set_read_only(conn)
                good = same or pool.is_right_server(conn)
        except GeneratorExit:
            raise  # nobody will go on with it: the connection is dropped, and so taken back
        except (Exception, asyncio.CancelledError) as ex:
            if isinstance(ex, asyncio.CancelledError) and not self._is_wanted:
                self._take_back()
                raise
            self._refuse(ex)
            return False
        except BaseException:
            self._take_back()
            raise
        finally:
            checks.forget(self)
        if good and self._is_wanted:
            return True
        self._take_back()
        return False

    def _refuse(self, error: BaseException) -> None:
        checks, conn, check = self._checks, self._conn, self._check
        name = checks.pool.name
        if check is None:
            log("connection_dead", pool=name, reason=in_words(error))
            self._take_back()
            return
        why = raised_by("the check callback", error)
        checks.refusals.note(check, error)
        log("check_refused", pool=name, reason=why)
        if conn.closed or not self._is_wanted:
            self._take_back()
            return
        # Left alone: who waits for it, and keeps his place in the line, would be handed it again
        # at once.
        checks.between.now(conn._session, "left alone, for its check refused it")
        seconds = min(FIRST_REST * 2 ** min(self._refused, 10), LONGEST_REST)
        resting = checks.pool.start_own_task(partial(asyncio.sleep, seconds), "check")
        resting.add_done_callback(lambda _: self._take_back())

    def _take_back(self) -> None:
        if self._has_it:
            self._has_it = False
            self._checks.pool.take_back_unused(self._conn)

    async def tell(self, verdict: asyncio.Future[bool]) -> None:
        """Look, in a task of the pool's own."""
        self.due = self._silent_at = monotonic() + PROBE_TIMEOUT
        self._checks.watch(self)
        verdict.set_result(await self._look())

    def end_untold(self, verdict: asyncio.Future[bool]) -> None:
        """Have a verdict, though somebody has cancelled every task there is."""
        if not verdict.done():
            self._take_back()
            verdict.set_result(False)

    # --- who waits for it ---------------------------------------------------------------------

    def __await__(self) -> Generator[Any, Any, bool]:
        work = self._look()
        try:
            waits_for = work.send(None)
        except StopIteration as done:  # a check that waits for nothing
            return cast(bool, done.value)
        return (yield from self._wait(work, waits_for))

    def _wait(self, work: Coroutine[Any, Any, bool], waits_for: Any) -> Generator[Any, Any, bool]:
        task = self._task = cast("asyncio.Task[Any]", asyncio.current_task())
        self._before = task.cancelling()
        now = monotonic()
        if self._asks:
            self._silent_at = now + PROBE_TIMEOUT
        self._deadline = max(self._deadline, now + LAST_LOOK)
        self.due = min(self._silent_at, self._deadline)
        self._checks.watch(self)
        try:
            good = yield from _drive(work, waits_for, partial(self._goes, work))
            if self._is_cancelled:
                raise asyncio.CancelledError
            return cast(bool, good)
        except asyncio.CancelledError:
            if self._is_cancelled:
                raise
            return False
        finally:
            self._task = None
            for _ in range(self._ours):
                task.uncancel()

    def _goes(self, work: Coroutine[Any, Any, bool], error: BaseException) -> bool:
        """Tell whether who waits is to go with *error*, and leave the rest to the pool."""
        if not isinstance(error, asyncio.CancelledError):
            return False
        if self._left:
            self._leave(work, error)
        else:
            self._lose_patience_later()
        return self._left

    def is_due(self, now: float) -> None:
        """Do what is to be done by *now*."""
        if self._patient_until <= now:
            self._patient_until = FOREVER
            # Not where it was a time-out inside of the look, which has taken its request back.
            if not self._is_wanted:
                self._left = True
                self._interrupt()
        if self._deadline <= now and self._task is not None:
            self.moment = self._checks.pool.moment()
            self.end()
        if self._silent_at <= now:
            self._silent_at = FOREVER
            if self._conn.pgconn.status != pq.ConnStatus.BAD:
                # Shut down, the socket reads as closed by the server. Cancelled, psycopg would
                # ask the silent server to stop, and wait for it.
                shut_down(self._conn.pgconn)
        self.due = min(self._patient_until, self._deadline, self._silent_at)

    def end(self) -> None:
        """Cancel what is waited for."""
        self._deadline = FOREVER
        if self._task is not None:
            self._in_hurry = True
            self._interrupt()
            self._lose_patience_later()

    def _interrupt(self) -> None:
        if self._task is not None:
            self._ours += 1
            self._task.cancel()

    def _lose_patience_later(self) -> None:
        if self._patient_until == FOREVER:
            patience = PATIENCE_WITH_OURS if self._asks else PATIENCE
            self._patient_until = monotonic() + patience
            self.due = min(self.due, self._patient_until)
            self._checks.watch(self)

    @property
    def _is_cancelled(self) -> bool:
        """True if somebody else has cancelled the task that waits."""
        task = self._task
        return task is not None and task.cancelling() - self._ours > self._before

    @property
    def _is_wanted(self) -> bool:
        if self._in_hurry or self._left:
            return False
        return self._task is None or not self._is_cancelled

    def _leave(self, work: Coroutine[Any, Any, bool], cancellation: asyncio.CancelledError) -> None:
        """Leave the rest of the look to a task of the pool's own."""
        pool, check = self._checks.pool, self._check
        self._deadline = FOREVER
        if not self._asks:
            code = code_behind(check)
            where = site(code, code.co_firstlineno) if code else "not written in Python"
            log("check_stuck", pool=pool.name, site=where)
            self._has_it = False
            pool.lose(self._conn)
        pool.start_own_task(partial(_finish, work, cancellation), "check", callers_context=True)


async def _finish(work: Coroutine[Any, Any, bool], cancellation: asyncio.CancelledError) -> None:
    """Do what is left of *work*, which was cancelled."""
    try:
        waits_for = work.throw(cancellation)
    except StopIteration:
        return
    await coroutine(_drive)(work, waits_for)


def _drive(
    work: Coroutine[Any, Any, Any],
    waits_for: Any,
    goes: Callable[[BaseException], bool] = lambda _: False,
) -> Generator[Any, Any, Any]:
    """Go on with *work*, which waits for something; but not with an error at which one *goes*."""
    try:
        while True:
            try:
                value = yield waits_for
            except BaseException as ex:
                if goes(ex):
                    raise
                waits_for = work.throw(ex)
            else:
                waits_for = work.send(value)
    except StopIteration as done:
        return done.value
