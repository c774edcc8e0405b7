"""
How a query is stopped that nobody wants to wait for any more.

An exchange that is cancelled is not over. The server is asked to stop it, and its end is read,
which keeps the connection good; a second cancellation would interrupt this and cost the
connection. So it is done in a task that nobody cancels. Then the cancellation goes on.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from contextlib import suppress
from time import monotonic
from typing import Any

from psycopg.abc import PQGen
from typing_extensions import override

from ._log import log

CANCEL_GRACE = 1.0
"""Seconds that a server has to stop a query of which nobody wants the result any more."""

GLANCE = 0.005
"""Seconds between two looks whether a query has ended whose answer another task reads."""

TICK = 0.1
"""Seconds that one look at a query which is being stopped takes, and counts, at most."""


async def in_own_task(work: Coroutine[Any, Any, None]) -> None:
    """Do *work* to its end, however often the caller is cancelled, and whatever it raises."""
    task = asyncio.ensure_future(work)
    while not task.done():
        with suppress(asyncio.CancelledError):
            await asyncio.wait({task})
    _look_at(task)


def _look_at(task: asyncio.Task[Any]) -> None:
    """Let asyncio know that nobody else is going to ask how *task* ended."""
    if not task.cancelled():
        task.exception()


class Patience:
    """
    `CANCEL_GRACE`, as far as it is not over.

    What counts is the time in which the server could have been heard: not that in which this
    loop stood still, or another process had the machine.
    """

    def __init__(self) -> None:
        self._left = CANCEL_GRACE

    def __bool__(self) -> bool:
        return self._left > 0

    def count(self, seconds: float) -> None:
        """Count one look, which took so long and was to take a `TICK` at most."""
        self._left -= min(seconds, TICK)

    def renew(self) -> None:
        """Begin anew: the server has been heard."""
        self._left = CANCEL_GRACE

    async def lasts_for(self, task: asyncio.Task[Any]) -> bool:
        """Wait for *task*, and tell whether it has ended in time. It is cancelled if not."""
        try:
            while not task.done() and self:
                began = monotonic()
                await asyncio.wait({task}, timeout=TICK)
                self.count(monotonic() - began)
            if not task.done():
                return False
            _look_at(task)
            return True
        finally:
            task.cancel()


class Asking:
    """
    Asks the server to stop what runs on a connection, again and again.

    It forgets a request that comes before the query does, so one is not enough.

    Args:
        conn: The connection; if it is no borrower's any more, what `remains()` of it.
        goes_on: Tells whether it is to be asked once more.
        patience: Is renewed when the server takes the first request.

    Attributes:
        on_its_way: True while a request is, which could stop the next query.
        taken: True once the server has taken one.
    """

    def __init__(self, conn: Any, goes_on: Callable[[], bool], patience: Patience) -> None:
        self._conn = conn
        self._goes_on = goes_on
        self._patience = patience
        self.on_its_way = self.taken = False

    async def ask(self) -> None:
        """Ask, in a task; which is nothing that this knows, or both would keep the connection."""
        pause = 0.01
        while self._goes_on():
            began = monotonic()
            self.on_its_way = True
            try:
                # For longer than our patience, which ends it: one that ended by itself, for this
                # loop has stood still, may be on its way nevertheless.
                await self._conn.request_cancel(30.0)
            except Exception:
                pass
            else:
                if not self.taken:
                    self.taken = True
                    self._patience.renew()
            self.on_its_way = False
            # Where it takes long, many ask: no need to ask more often than they are heard.
            await asyncio.sleep(max(pause, min(monotonic() - began, TICK)))
            pause = min(2 * pause, 2 * TICK)


class Stop:
    """
    Has what runs on a connection stopped by the server, until `_read()` sees its end.

    psycopg asks once, and gives the server 5 s to take the request and 5 s to obey (3.3.9).
    Whoever has cancelled waits for neither where the network is gone. So the server is asked
    until the query ends. It has `CANCEL_GRACE` to take a request, and as much again after that:
    one that does is there, and only slow.
    """

    def __init__(self, conn: Any, session: Any) -> None:
        self._conn = conn
        self._session = session
        self._patience = Patience()
        self._over = False

    async def run(self) -> None:
        """Stop it, or close the connection."""
        asking = Asking(self._conn, lambda: not self._over, self._patience)
        task = asyncio.ensure_future(asking.ask())
        ended = False
        try:
            ended = await self._read()
        finally:
            self._over = True
            if asking.on_its_way and not await self._patience.lasts_for(task):
                ended = False
            task.cancel()
            if not ended:
                log(
                    "query_not_stopped",
                    pool=self._session.wire.pool,
                    reason="the server was told" if asking.taken else "no server could be told",
                )
                self._give_up()

    async def _read(self) -> bool:
        """Read what the server sends, and tell whether it has ended."""
        raise NotImplementedError

    def _give_up(self) -> None:
        """Close the connection."""
        self._session.finish()


class StopExchange(Stop):
    """
    Stops an exchange of psycopg's.

    Args:
        conn: The connection.
        gen: What is left of the exchange.
        state: For what it waits; None if it never had to.
    """

    def __init__(self, conn: Any, gen: PQGen[Any], state: int | None) -> None:
        super().__init__(conn, conn._session)
        self._gen = gen
        self._state = state

    @override
    async def _read(self) -> bool:
        """Read what the server sends, and tell whether the exchange has ended."""
        gen, state, patience = self._gen, self._state, self._patience
        if state is None:  # it never had to wait, but is a part of what goes on: a COPY
            await asyncio.sleep(0)  # one request is on its way then
            return True
        pgconn, wire = self._session.pgconn, self._session.wire
        try:
            while patience:
                began = monotonic()
                ready = await wire.ready(state, TICK)
                patience.count(monotonic() - began)
                if pgconn.pgconn_ptr is None:
                    return True
                if ready:
                    state = gen.send(ready)
        except Exception:
            return True  # by an error, maybe: nobody is there any more to be told
        return False


class StopLane(Stop):
    """Stops what is under way on a lane, whose answers are read as ever."""

    def __init__(self, lane: Any) -> None:
        super().__init__(lane.conn, lane.session)
        self._lane = lane

    @override
    async def _read(self) -> bool:
        lane = self._lane
        while lane.under_way and self._patience:
            lane.drained = asyncio.get_running_loop().create_future()
            began = monotonic()
            await asyncio.wait({lane.drained}, timeout=0.1)
            self._patience.count(monotonic() - began)
        return not lane.under_way
