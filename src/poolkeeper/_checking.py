"""
Looking at a connection before somebody gets it: whether it answers, whether `check` accepts it.

Each look is a task of its own. So who waits for it may go at any time, at its timeout or because
it is cancelled, whatever the look is doing; and the connection is the pool's to take back or to
replace, whatever becomes of who wanted it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from time import monotonic
from typing import Any, Protocol, TypeAlias

from . import _cleaning
from ._between import Between
from ._log import log
from ._session import Session, shut_down
from ._waiting import CANCEL_GRACE
from ._where import code_behind, site
from ._words import in_words, raised_by

Check: TypeAlias = Callable[[Any], Awaitable[None]]

PROBE_TIMEOUT = 2.0
"""Seconds that the server has to answer on a connection that is suspected to be dead."""

LAST_LOOK = 0.5
"""Seconds that a look is given at least, if it begins before the acquire's time is up."""

FIRST_REST, LONGEST_REST = 0.01, 0.25
"""Seconds for which a connection that its check refuses is left alone, more each time."""


class Pool(Protocol):
    """What a look asks of the pool."""

    name: str

    def start_own_task(
        self, work: Callable[[], Coroutine[Any, Any, None]], name: str, callers_context: bool
    ) -> asyncio.Task[None]:
        """Start *work* in a task that `close()` waits for."""
        ...

    def is_alive(self) -> bool:
        """Tell whether the pool may hand a connection out: not if it is about to close."""
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
        self.error: Exception | None = None
        """Why it refused the last; without its traceback, which would keep the connection."""
        self.words = ""
        self.check: Check | None = None
        self.since = self.last = 0.0

    def note(self, check: Check, error: Exception) -> None:
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

    def ask(self, conn: Any) -> Look:
        """Begin to ask the server on *conn* whether it answers."""
        return _Asking(self, conn)

    def pass_check(self, check: Check, conn: Any, refused: int) -> Look:
        """Begin to let *check* look at *conn*, for a task that was refused so many before."""
        return _Checking(self, check, conn, min(FIRST_REST * 2 ** min(refused, 10), LONGEST_REST))

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

    Attributes:
        verdict: True once the connection was found good, and is whoever's that waits for it;
            False if it is not, and the pool has it.
    """

    def __init__(self, checks: Checks, conn: Any) -> None:
        self._checks = checks
        self._conn = conn
        self._ended = False
        loop = asyncio.get_running_loop()
        self.verdict: asyncio.Future[bool] = loop.create_future()

    def _start(self, doing: str, function: object, callers_context: bool) -> None:
        self._checks.between.begin(self._session, "checking", doing, function)
        self._task = self._checks.pool.start_own_task(self._look, "check", callers_context)
        self._task.add_done_callback(self._task_ended)

    async def _look(self) -> None:
        raise NotImplementedError

    async def found_good(self, deadline: float) -> bool:
        """Wait for the verdict until *deadline*, but for `LAST_LOOK` at least."""
        loop = asyncio.get_running_loop()
        timer = loop.call_later(max(LAST_LOOK, deadline - monotonic()), self._give_up)
        try:
            return await self.verdict
        except BaseException:
            if self.verdict.done() and not self.verdict.cancelled() and self.verdict.result():
                # Cancelled in the same turn of the loop in which it was found good.
                self._checks.pool.take_back_unused(self._conn)
            else:
                self._give_up()
            raise
        finally:
            timer.cancel()

    def _give_up(self) -> None:
        """Let nobody wait any more. The look goes on, to an end of its own."""
        self._tell(False)

    @property
    def _session(self) -> Session:
        session: Session = self._conn._session
        return session

    def _tell(self, good: bool) -> None:
        if not self.verdict.done():
            self.verdict.set_result(good)

    def _end(self, good: bool) -> None:
        """Hand the connection to who waits, if it is *good*; else let the pool have it."""
        if self._ended:
            return
        self._ended = True
        if good and not self.verdict.done():
            self._tell(True)
        else:
            self._checks.pool.take_back_unused(self._conn)
            self._tell(False)

    def _task_ended(self, _task: asyncio.Task[None]) -> None:
        # Somebody cancelled every task there is, this one before it began.
        self._end(False)


class _Asking(Look):
    """Spends a round trip to find out whether the server answers, within `PROBE_TIMEOUT`."""

    def __init__(self, checks: Checks, conn: Any) -> None:
        super().__init__(checks, conn)
        self._start("asked whether it still works", None, callers_context=False)

    async def _look(self) -> None:
        conn, pool = self._conn, self._checks.pool
        # Shut down, the socket reads as closed by the server. Cancelled, psycopg would ask the
        # silent server to stop, and wait for it.
        timer = asyncio.get_running_loop().call_later(PROBE_TIMEOUT, shut_down, conn.pgconn)
        good = False
        try:
            await _cleaning.ask(conn)
            good = pool.is_alive() and not conn.closed and pool.is_right_server(conn)
        except Exception as ex:
            log("connection_dead", pool=pool.name, reason=in_words(ex))
        finally:
            timer.cancel()
            self._end(good)


class _Checking(Look):
    """
    Lets the user's `check` look, in the context of the task that the connection is for.

    One that it refuses is left alone for a moment: who waits for it, and keeps its place in the
    line, would be handed it again at once. One that hangs is cancelled when nobody waits for it
    any more; if it does not end then, the connection is taken away from it.
    """

    def __init__(self, checks: Checks, check: Check, conn: Any, rest: float) -> None:
        super().__init__(checks, conn)
        self._check = check
        self._rest = rest
        self._start("in the check callback", check, callers_context=True)

    async def _look(self) -> None:
        conn, checks = self._conn, self._checks
        good = False
        try:
            await self._check(conn)
            same = conn.closed or self._session.same_kind or await _cleaning.has_set_read_only(conn)
            checks.refusals.end()
            good = checks.pool.is_alive() and not conn.closed
            good = good and (same or checks.pool.is_right_server(conn))
        except Exception as ex:
            why = raised_by("the check callback", ex)
            checks.refusals.note(self._check, ex)
            log("check_refused", pool=checks.pool.name, reason=why)
            if not self._ended and not conn.closed:
                checks.between.now(self._session, "left alone, for its check refused it")
                self._tell(False)
                await asyncio.sleep(self._rest)
        finally:
            self._end(good)

    def _give_up(self) -> None:
        super()._give_up()
        if not self._task.done():
            self._task.cancel()
            asyncio.get_running_loop().call_later(2 * CANCEL_GRACE, self._take_away)

    def _take_away(self) -> None:
        if self._ended or self._task.done():
            return
        self._ended = True
        code = code_behind(self._check)
        where = site(code, code.co_firstlineno) if code else "not written in Python"
        log("check_stuck", pool=self._checks.pool.name, site=where)
        self._checks.pool.lose(self._conn)
