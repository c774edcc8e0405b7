"""
Can a query run now? What `PoolManager.check()` asks, and how the answer is found.

One question is open at a time, shared by all who ask meanwhile: a probe that is slow to be
answered does not turn into many, and an exhausted pool costs the server one more connection,
not one for each probe.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from time import monotonic
from typing import Any, Protocol

from . import _cleaning
from ._attempt import Attempt, Failure, enter
from ._session import shut_down


class Pool(Protocol):
    """What a question asks of the pool."""

    def answered_lately(self, seconds: float) -> bool:
        """Tell whether the server has answered whoever holds a connection, so long ago at most."""
        ...

    def ask_idle(self) -> asyncio.Future[bool] | None:
        """Ask the server on a connection that nobody waits for; None if none is free."""
        ...

    async def connect_beside(self) -> Any:
        """Make a connection that is not the pool's."""
        ...

    def dismiss(self, conn: Any) -> object:
        """End a connection that nobody holds."""
        ...

    def start_own_task(
        self, work: Callable[[], Coroutine[Any, Any, None]], name: str
    ) -> asyncio.Task[None]:
        """Start *work* in a task that `close()` waits for."""
        ...

    def counts(self) -> dict[str, int]:
        """Return its numbers."""
        ...


class Question:
    """
    One question to the server, and all who wait for the answer.

    It is asked on a connection of the pool that is free, which is then the pool's to take back or
    to replace, however long that takes. If there is none, a query that was answered just now is an
    answer. Else it is asked on one beside the pool, which is closed when the answer is known, or
    as soon as nobody waits for it any more; once in `SHARED` seconds, whoever asks.

    Args:
        pool: Whose server is asked.
        before: The question before this one; what it has beside the pool goes first.
    """

    SHARED = 1.0
    """Seconds for which an answer from beside the pool is the answer for all who ask."""

    def __init__(self, pool: Pool, before: Question | None) -> None:
        self._pool = pool
        self._before = before
        self._asked_beside = 0.0
        self._said_beside: tuple[bool, str, str] | None = None
        """When it was asked beside the pool last, and what the answer was; also before it."""
        self._answer: asyncio.Future[tuple[bool, str, str]] = (
            asyncio.get_running_loop().create_future()
        )
        self._askers = 0
        self._conn: Any = None
        self.is_open: bool = True
        """True while whoever comes may wait for the answer as well."""
        self.beside: bool = False
        """True once it is asked beside the pool."""
        self._task: asyncio.Task[None] = pool.start_own_task(self._ask, "check")
        self._task.add_done_callback(self._ended)

    async def answer_within(self, timeout: float) -> tuple[bool, str, str]:
        """Return whether a query can run, why, and why for strangers; "" if that is the same."""
        self._askers += 1
        try:
            # A wait of its own for each: neither its timeout nor its cancellation is the others'.
            await asyncio.wait({self._answer}, timeout=timeout)
        finally:
            self._askers -= 1
            if not self._askers and self.beside:
                self._stop()
        if self._answer.done():
            return self._answer.result()
        return False, f"no answer within {timeout:.2f} s", ""

    def refuse(self, reason: str) -> None:
        """Answer no, and ask no more: the pool is about to close."""
        self._tell(False, reason)
        self._stop()

    def _tell(self, ok: bool, reason: str, kind: str = "") -> None:
        self.is_open = False
        if not self._answer.done():
            self._answer.set_result((ok, reason, kind))

    def _stop(self) -> None:
        self.is_open = False
        if self._conn is None:
            self._task.cancel()
        elif not self._conn.closed:
            # Not cancelled: psycopg would ask the server to stop, and wait for it.
            shut_down(self._conn.pgconn)

    async def _ask(self) -> None:
        await asyncio.sleep(0)  # who asks is to be counted first, also where tasks are eager
        before, self._before = self._before, None
        if before is not None:
            await asyncio.wait({before._task})
            self._asked_beside, self._said_beside = before._asked_beside, before._said_beside
            before = None
        while self._askers and (verdict := self._pool.ask_idle()) is not None:
            await asyncio.wait({verdict})  # not its own to cancel
            if verdict.result():
                self._tell(True, "the server answered")
                return
        if self._askers and self._pool.answered_lately(self.SHARED):
            self._tell(True, "the server has answered a query in the last second")
        elif self._askers:
            self.beside = True
            await self._find_out_beside()
        self.is_open = False

    async def _find_out_beside(self) -> None:
        pause = self._asked_beside + self.SHARED - monotonic()
        if pause > 0 and self._said_beside is not None:
            self._tell(*self._said_beside)
            return
        if pause > 0:  # nobody waited for the answer
            await asyncio.sleep(pause)
        self._asked_beside, self._said_beside = monotonic(), None
        await self._ask_beside()

    async def _ask_beside(self) -> None:
        attempt = Attempt()
        enter(attempt)
        try:
            self._conn = await self._pool.connect_beside()
            await _cleaning.ask(self._conn)
        except Exception as ex:
            self._say(*self._refused(attempt.failure(ex)))
        except asyncio.CancelledError:
            if self.is_open:
                raise
            # By us. It goes no further: its traceback would keep the socket open.
        else:
            self._say(True, "the server answered beside the pool, which has no connection free")
        finally:
            if self._conn is not None:
                self._pool.dismiss(self._conn)
                self._conn = None

    def _say(self, ok: bool, reason: str, kind: str = "") -> None:
        if self.is_open:  # else it was given up, and what came of it is our own doing
            self._said_beside = ok, reason, kind
        self._tell(ok, reason, kind)

    def _refused(self, failure: Failure) -> tuple[bool, str, str]:
        if failure.has_no_slot and self._pool.counts()["in_use"]:
            full = "the server answered that it has no slot beside the pool's own"
            return True, f"{full}: {failure.words}", full
        return False, failure.words, failure.kind

    def _ended(self, _task: asyncio.Task[None]) -> None:
        # Somebody cancelled every task there is, or the connection class failed in a way of its
        # own: nobody shall wait for an answer that will not come.
        self._tell(False, "the check was cancelled")
