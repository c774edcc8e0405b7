"""
One-shots: which way a statement goes that somebody runs by itself.

By psycopg's cursor on a connection of its own; on a `Lane` of its own, which costs less; or on one
that it shares with others. A one-shot takes an idle connection where there is one, as any acquire
does. Where none is, a plain read that was quick before is sent behind others like it, if nobody
stands in the line; else it joins the line, where a place on a lane serves it as well as a
connection. So the line is what it was: first come, first served. A lane takes nobody more as
soon as the first in line wants a connection of its own, and gives its own up when it is empty.

While anything is under way a clock looks, each `TICK`. If the server has not answered the one at
the head of a lane for `SLOW`, its text is remembered, and those behind it are moved: they stand
in line again, at the place that they would have. The server runs what was sent already, when its
turn comes, for nobody; unless the copy turned out to write, and so was refused.
"""
# A pool's life, and what it was made with, are not its users'.
# pyright: reportPrivateUsage=false

from __future__ import annotations

import asyncio
from asyncio import _get_running_loop, current_task
from contextvars import Context
from functools import partial
from math import inf
from time import monotonic
from types import FunctionType, ModuleType
from typing import Any

import psycopg
from psycopg import AsyncConnection, AsyncCursor, connection_async, cursor_async, pq

from ._acquiring import take, task_name, wait_for_connection
from ._asked import Asked, result_of
from ._checkouts import ACQUIRED
from ._gathering import Gathering
from ._lane import Lane
from ._life import Life, Pool
from ._releasing import release
from ._sending import send
from ._session import Session
from ._shot import OneShot, by_cursor, query_timeout
from ._statements import Known, Texts, Way
from ._status import BAD
from ._stock import grow
from .errors import PoolkeeperError

TICK = 0.005
"""Seconds between two looks at what is under way."""

SLOW = 0.01
"""Seconds after which a statement is slow."""

MANY = 1000
"""Rows of an answer that takes its time, however quick the server was."""


def _unless_patched(method: Any, module: ModuleType) -> object:
    """Return *method* if it is the one of *module*, however early somebody may have come."""
    own = type(method) is FunctionType and method.__globals__ is vars(module)
    return method if own else None


_EXECUTE = _unless_patched(AsyncCursor.execute, cursor_async)
_CURSOR = _unless_patched(AsyncConnection.cursor, connection_async)


class Lanes:
    """
    The connections that one-shots have, in one life of a pool.

    Args:
        life: That.
    """

    def __init__(self, life: Life) -> None:
        self.life = life
        self.loop = asyncio.get_running_loop()
        self.gathering = Gathering(self.loop)
        self.texts = Texts()
        # Agents and users change all connections, or none: one that is idle tells.
        self.refused = not psycopg.capabilities.has_pipeline() or not all(map(_is_plain, life.idle))
        """True if connections of this pool are to be used by psycopg's cursors only."""
        self._shares = life.check is None and life.reset is None
        """False if each checkout has something of its own that others must not share."""
        self._all: dict[Lane, None] = {}
        self._cut_short: list[Any] = []
        """Connections that the clock gives back."""
        self._clock: asyncio.TimerHandle | None = None

    @property
    def serve(self) -> bool:
        """True if connections may be lanes here and now."""
        return not self.refused and self.life.stand_in is None

    # --- a place for one ------------------------------------------------------------------------

    def place_now(self, shot: OneShot) -> Lane | None:
        """Return a lane on which *shot* may be sent at once; None if that takes waiting."""
        life = self.life
        shares = shot.shares = self._shares and shot.known.shares
        if shares and not life.idle and not life.line and (lane := self._with_room()):
            life.counters.requests += 1
            if not life.growing and life.made < life.max_size:
                grow(life)  # as if it had to wait
            if life.listeners.of_checkouts:
                self._tell_joined(lane, shot, 0.0)
            lane.users += 1  # when nothing can cut it short any more
            return lane
        if self._clock is None:
            self._start_clock()  # before there is anything to lose
        conn = take(life, shot.frame, shot.lineno, True, self.loop)
        return None if conn is None else self._opened(conn, shot)

    async def place(self, shot: OneShot) -> Lane | None:
        """Wait for one; None if connections of this pool are used by psycopg's cursors."""
        life = self.life
        if not self.serve:
            return None
        began = monotonic()
        given = await wait_for_connection(
            life, shot.timeout, shot.frame, shot.lineno, True, shot.shares, shot.since
        )
        if isinstance(given, Lane):
            try:
                if life.listeners.of_checkouts:
                    self._tell_joined(given, shot, monotonic() - began)
            except BaseException:
                given.not_taken()
                raise
            given.promised -= 1
            given.users += 1
            return given
        return self._opened(given, shot)

    def _with_room(self) -> Lane | None:
        """Return a lane with room, each in turn."""
        now = monotonic()
        for lane in self._all:
            if lane.takes_more(now):
                del self._all[lane]
                self._all[lane] = None
                return lane
        for lane in list(self._all):  # it may be this loop that is late
            if not lane.closed and lane.under_way and not lane.session.is_quiet():
                lane.read()
                if lane in self._all and lane.takes_more(monotonic()):
                    return lane
        return None

    def _opened(self, conn: Any, shot: OneShot) -> Lane | None:
        """Return a lane on *conn*, just acquired; None if that is for psycopg's cursors only."""
        life, session, shares = self.life, conn._session, shot.shares
        try:
            lane: Lane | None = session.lane
            if not _is_unpatched() if lane is not None else not _is_plain(conn):
                self.refused = True
                life.counters.requests -= 1  # it asks again
                release(life.pool, conn, False)
                return None
            if self._clock is None:
                self._start_clock()
            if lane is None:
                lane = session.lane = Lane(self, session)
            lane.open(conn, shares, shot.known.way is Way.SHARED)
        except BaseException:
            session.lane = None
            if self._clock is None:
                release(life.pool, conn, False)
            else:  # where the stack is not as deep
                self._cut_short.append(conn)
            raise
        self._all[lane] = None
        if (checkout := lane.checkout).told & ACQUIRED:
            checkout.told &= ~ACQUIRED  # when the lane ends, nobody wants to know
            shot.told, lane.loud = (checkout.caller, checkout.since), True
        if shares and life.line:
            try:
                self.lane_has_room(lane)
            except BaseException:
                lane.left()
                raise
        return lane

    def lane_ended(self, lane: Lane) -> None:
        """Forget *lane*."""
        self._all.pop(lane, None)

    def lane_stays(self, lane: Lane) -> None:
        """Let the clock end *lane*, for it could not be."""
        self._all[lane] = None

    def lane_has_room(self, lane: Lane) -> None:
        """Let those who wait in line have the places of *lane*, or it end."""
        line, now = self.life.line, monotonic()
        while lane.takes_more(now):
            lane.promised += 1
            if not line.offer_place(lane):
                lane.promised -= 1
                # Whoever is first wants a connection of his own.
                lane.closed = bool(line) or lane.closed
                return

    # --- what is told -----------------------------------------------------------------------------

    def _tell_joined(self, lane: Lane, shot: OneShot, waited: float) -> None:
        """Tell that *shot* has a place on *lane*, which another one has opened."""
        listeners = self.life.listeners
        caller = listeners.caller(shot.frame.f_code, shot.lineno, shot.frame)
        shot.told = caller, monotonic()
        lane.loud = lane.joined = True
        listeners.send(
            listeners.records.Acquired(
                pool=self.life.name,
                task=task_name(),
                caller=caller,
                waited_seconds=waited,
                queued=waited > 0,
                shared=True,
            )
        )

    def tell_left(self, lane: Lane, shot: OneShot, asked: Asked) -> None:
        """Tell that *shot*, of which it was told that it had a place, has it no more."""
        assert shot.told is not None
        (caller, since), shot.told = shot.told, None
        now, listeners = monotonic(), self.life.listeners
        if lane.under_way and lane.under_way[0] is asked:  # it goes on, for nobody
            asked.seconds = now - lane.head_since
        if listeners.want("released") and not self.life.forked:
            listeners.send(
                listeners.records.Released(
                    pool=self.life.name,
                    task=asked.task.get_name() if asked.task else "",
                    caller=caller,
                    held_seconds=now - since,
                    query_seconds=asked.seconds,
                    exchanges=1 if asked.since else 0,
                    shared=lane.joined,
                )
            )

    # --- the clock ------------------------------------------------------------------------------

    def _start_clock(self) -> None:
        self._clock = self.loop.call_later(TICK, self._tick, context=Context())

    def _tick(self) -> None:
        self._clock = None
        while self._cut_short and not self.life.gone:
            release(self.life.pool, self._cut_short.pop(), False)
        if not self._all or self.life.gone or self.life.pool._life is not self.life:
            return
        self._start_clock()
        late = monotonic() - SLOW
        for lane in list(self._all):
            if lane.under_way and lane.head_since < late:
                # It may be this loop that has stood still.
                if not lane.session.is_quiet():
                    lane.read()
                if lane.under_way and lane.head_since < late:
                    _note_slow(lane)
            elif not lane.under_way:
                lane.look_for_users()  # whoever was the last may have been cut short


def _note_slow(lane: Lane) -> None:
    head = lane.under_way[0]
    if head.known is not None:
        head.known.was_slow()
        head.known = None
    if not lane.users and not lane.promised:
        lane.stop_for_nobody()  # what was moved, and is slow itself
    elif lane.shared and len(lane.under_way) > 1:  # else what goes before was sent for nobody
        lane.move_others()


def _is_plain(conn: Any) -> bool:
    """
    Tell whether *conn* does what psycopg's connections do, and nobody looks at its cursors.

    The agents that make spans do so by a proxy, by a cursor class or by a patch; whoever is told of
    notices may want to know whose they are.
    """
    return (
        type(conn._session) is Session
        and conn.runs_like_psycopg
        and conn.cursor_factory is AsyncCursor
        and not conn._notice_handlers
        and not conn._notify_handlers
        and _is_unpatched()
    )


def _is_unpatched() -> bool:
    """Tell whether psycopg's classes are as they were."""
    return AsyncCursor.execute is _EXECUTE and AsyncConnection.cursor is _CURSOR


async def by_lane(pool: Pool, shot: OneShot) -> Any:
    """Run *shot* on a lane if it may be, else by psycopg's cursor."""
    try:
        life: Any = pool._life
        loop = _get_running_loop()
        if loop is None or loop is not life.binding.admits():
            life.check_usable("acquire a connection")
        lanes: Lanes | None = life.lanes
        if lanes is None:
            lanes = life.lanes = Lanes(life)
        known = shot.known = lanes.texts.known(shot.query)
        if known.way is not Way.CURSOR and lanes.serve and not _lacks_parameters(known, shot):
            asked = Asked(known, shot.frame.f_code, shot.lineno)
            lane = lanes.place_now(shot) or await lanes.place(shot)
            while lane is not None:
                try:
                    asked.task = current_task(loop)
                    if send(lane, asked, shot.query, shot.params, shot.row_factory):
                        if shot.query_timeout is None:
                            await asked.done
                        else:
                            await _answered_in_time(lane, asked, shot.query_timeout)
                        if not asked.moved:
                            return _fetched(shot, lane, asked)
                        shot.since = asked.since
                        if asked.goes_on and shot.first is None:
                            shot.first = (lane, asked)
                    else:
                        shot.since, shot.shares = shot.since or monotonic(), False
                except psycopg.errors.ReadOnlySqlTransaction:
                    if not asked.guarded:
                        lane.session.doubt()
                        raise
                    known.writes()
                    break
                except psycopg.OperationalError:
                    if asked.since or lane.pgconn.status != BAD:
                        raise
                    lane.closed = True  # nothing was sent, and nothing will be
                    shot.since = shot.since or monotonic()
                except asyncio.CancelledError:
                    await lane.cancelled(asked)
                    raise
                finally:
                    lane.leave(asked)
                    if shot.told is not None:
                        lanes.tell_left(lane, shot, asked)
                asked = Asked(known, shot.frame.f_code, shot.lineno)
                asked.guarded = shot.first is not None
                lane = await lanes.place(shot)
        if shot.first is not None:
            return await _by_first(pool, shot, *shot.first)
        return await by_cursor(pool, shot)
    except (PoolkeeperError, psycopg.Error) as ex:
        raise ex.with_traceback(None)  # noqa: B904 - see briefly()


def _lacks_parameters(known: Known, shot: OneShot) -> bool:
    """Tell whether *shot* may have less of them than it takes: each protocol has its own error."""
    if (params := shot.params) is None:
        return known.numbers
    return not len(params) and (known.numbers or "%" in shot.query)


def _fetched(shot: OneShot, lane: Lane, asked: Asked) -> Any:
    result = result_of(asked, lane.converter.connection)
    if (known := asked.known) is not None:  # the clock has not seen it
        if result.ntuples > MANY:
            known.was_slow()
        elif not known.shares:
            known.was_quick()
    return shot.fetch.at_once(result, asked.transformer, asked.make_row)


async def _by_first(pool: Pool, shot: OneShot, lane: Lane, first: Asked) -> Any:
    """Return the answer to what was sent *first*, for a copy must not do what it does."""
    if not first.done.done():  # so its lane is what it was
        lane.users += 1
        first.left = False
        try:
            await _answered_in_time(lane, first, shot.query_timeout)
        finally:
            lane.leave(first)
    if first.error is None and (not first.goes_on or _was_stopped(first)):
        shot.first, shot.shares = None, False  # it has done nothing
        return await by_lane(pool, shot)
    return _fetched(shot, lane, first)


def _was_stopped(asked: Asked) -> bool:
    """Tell whether the server was asked to stop it, when nobody waited for it."""
    last = asked.results[-1] if asked.results else None
    return last is None or last.error_field(pq.DiagnosticField.SQLSTATE) == b"57014"


async def _answered_in_time(lane: Lane, asked: Asked, seconds: float | None) -> None:
    """Wait for the answer, *seconds* from when the server is at it; from now on if it was moved."""
    if seconds is None:
        seconds = inf
    try:
        async with asyncio.timeout(None) as limit:
            begin = partial(_limit, limit, seconds)
            if asked.goes_on or (lane.under_way and lane.under_way[0] is asked):
                begin()
            else:
                asked.begins = begin
            try:
                await asked.done
            except asyncio.CancelledError:
                asked.begins = None
                await lane.cancelled(asked)
                raise
            finally:
                asked.begins = None
    except TimeoutError:
        raise query_timeout(
            lane.conn._binding.name, asked.in_words(), seconds, lane.conn.closed, lane.stopped
        ) from None  # before it is our own cancellation


def _limit(limit: asyncio.Timeout, seconds: float) -> None:
    if seconds < inf:
        limit.reschedule(asyncio.get_running_loop().time() + seconds)
