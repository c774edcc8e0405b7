"""
One connection on which the one-shots of several tasks are under way.

A `Lane` is a checkout like any other: acquired by the one-shot that opens it, and given back when
the last answer was fetched. Meanwhile it is in libpq's pipeline mode, and each statement has a
sync of its own: so each is a transaction of its own, and an error stays alone.

What each task does itself, in its own context: convert its parameters, send (see `_sending`), and
make its rows.
What comes back is read in a callback of the event loop, by whoever's turn it is, and handed to the
task that has asked. The answers come in the order of the statements, so no answer can reach
a stranger: a task that does not wait any more leaves its place in the row, and what comes for it
is dropped.

Only plain reads share a lane (see `_statements`). When the one at its head takes long, those
behind it are sent again elsewhere: what the lane answers them later is dropped. A read can write
nevertheless, by a view that calls a function: so the copy runs in a transaction that is read-only,
and if the server refuses it there, the answer to the first is waited for after all.
"""
# A statement is converted and read with what psycopg's cursors use.
# pyright: reportPrivateUsage=false

from __future__ import annotations

import asyncio
from collections import deque
from contextvars import Context
from time import monotonic
from typing import Any, Protocol

import psycopg
from psycopg import pq
from typing_extensions import override

from ._asked import Asked, last_word, received
from ._begin import lost
from ._checkouts import Checkout
from ._converting import Converter
from ._gathering import Gathering
from ._life import Life
from ._line import Place
from ._releasing import keep_unseen, release
from ._session import Session
from ._stopping import StopLane, in_own_task
from ._where import Code
from ._wire import Wire

BAD = pq.ConnStatus.BAD
COMMAND_OK = pq.ExecStatus.COMMAND_OK
TUPLES_OK = pq.ExecStatus.TUPLES_OK
SYNC = pq.ExecStatus.PIPELINE_SYNC

DEPTH = 16
"""How many may be under way on one connection."""

TURN = 0.1
"""Seconds after which a lane takes nothing more, and its connection is given back."""

LONG = 0.002
"""Seconds after which nothing more is sent behind a statement."""


class Room(Protocol):
    """What a lane tells the room that it is in."""

    life: Life
    loop: asyncio.AbstractEventLoop
    gathering: Gathering

    def lane_ended(self, lane: Lane) -> None:
        """Forget *lane*."""
        ...

    def lane_stays(self, lane: Lane) -> None:
        """End it later."""
        ...

    def lane_has_room(self, lane: Lane) -> None:
        """Let who waits in line have a place."""
        ...


class Lane(Place):
    """
    One connection that one-shots share.

    Its session keeps it between two uses, with all that was found out for the first, as long as
    nothing about it is out of order. It keeps nothing of a connection then.

    Stands in for the future that its `Wire` tells that there is something to read.

    Args:
        room: Where it is.
        session: Whose connection it is.
    """

    __slots__ = (
        "__weakref__", "_gathering", "_loop", "_room", "_stopping", "_writer", "checkout", "closed",
        "conn", "converter", "drained", "head_since", "joined", "loud", "pgconn", "plain",
        "promised", "session", "shared", "stopped", "under_way", "unprepared", "until", "users",
        "wire",
    )  # fmt: skip

    conn: Any
    session: Session
    checkout: Checkout
    converter: Converter

    def __init__(self, room: Room, session: Session) -> None:
        self._room, self._loop, self._gathering = room, room.loop, room.gathering
        self.wire: Wire = session.wire
        self.pgconn: Any = session.pgconn
        self.users = self.promised = 0
        """Tasks that wait here, or fetch their answer; that were told to come."""
        self.under_way: deque[Asked] = deque()
        """What is under way, in the order of the answers."""
        self.until = self.head_since = 0.0
        """Until when more may come; since when the first of them is the first."""
        self.drained: asyncio.Future[None] | None = None
        self.unprepared: set[bytes] = set()
        """Names that could not be prepared, on which those behind may have relied."""
        self._stopping = self.stopped = False
        """True while what runs is being stopped; once that was begun."""
        self._writer = -1

    def open(self, conn: Any, shared: bool, plain: bool) -> None:
        """Begin with *conn*, just acquired; *shared* if others may come, who are all *plain*."""
        self.conn = conn
        self.session = session = conn._session
        self.checkout = checkout = conn._checkout
        since = checkout.since
        self.shared, self.plain = shared, plain
        self.closed = not shared
        self.loud = self.joined = False
        """True if somebody is told who uses it; and of one beside who has opened it."""
        if not self.until or not self.converter.fits(conn, since):
            self.converter = Converter(conn, since)
        self.until = min(since + TURN, session.expires_at)
        self.pgconn.enter_pipeline_mode()
        self.users = 1
        if session.streamed:
            # What a stream has set holds for the first command of a pipeline, too (libpq 18).
            session.streamed = False
            self.sync_for_nobody()

    # --- who may come -----------------------------------------------------------------------

    def takes_more(self, now: float) -> bool:
        """Tell whether one more statement may be sent."""
        under_way = self.under_way
        return (
            not self.closed
            and len(under_way) + self.promised < DEPTH
            and now < self.until
            and (not under_way or now - self.head_since < LONG)
        )

    def waiting(self) -> list[tuple[asyncio.Task[Any] | None, Code, int, float]]:
        """Return for whom what is under way, from which line and since when."""
        return [
            (one.task, one.code, one.lineno, one.since)
            for one in list(self.under_way)
            if not one.left
        ]

    @override
    def not_taken(self) -> None:
        self.promised -= 1
        self.look_for_users()

    # --- sending ------------------------------------------------------------------------------

    def prepare_to_send(self, asked: Asked) -> None:
        """Do what must not come between a statement and its sync: see `sync()`."""
        asked.done = self._loop.create_future()
        if self.under_way:
            now = monotonic()
            if not self.wire.holds_back or now > self._gathering.until:
                self._gathering.hold_back(self.wire, now)

    def sync_for_nobody(self) -> None:
        """End what the pool itself has sent."""
        asked = Asked(None, Lane.__init__.__code__, 0)
        asked.left = True
        asked.done = self._loop.create_future()
        self.sync(asked)

    def sync(self, asked: Asked) -> None:
        """
        End what was sent for *asked*, and see that its answer is read.

        Whatever may be cut short, by a RecursionError say, comes before or after: a statement
        without a sync would have the answer of the next one, and that one a stranger's.
        """
        first, pending = not self.under_way, 0
        self.under_way.append(asked)
        try:
            self.pgconn.pipeline_sync()
            pending = self.pgconn.flush()
        except psycopg.Error:
            pass  # to read tells why
        asked.since = now = monotonic()
        if first:
            self.head_since = self.checkout.busy_since = now
            if self.checkout.used:  # else it is as who has opened it
                self._served(asked)
            self.conn._under_way = self
            wire = self.wire
            wire.waiter = self
            if not wire.watched or not wire.looking:
                self._watch()
        if pending:
            self._flush()

    def _served(self, asked: Asked) -> None:
        """Let the ledger know for whom the server is at work."""
        checkout = self.checkout
        checkout.task, checkout.code, checkout.lineno = asked.task, asked.code, asked.lineno

    def _watch(self) -> None:
        wire, loop = self.wire, self._loop
        if wire.socket != self.pgconn.socket:
            wire.let_go()
            wire.socket = self.pgconn.socket
        if not wire.watched:
            wire.watch(loop)
        if not wire.looking:
            wire.look_later(loop)

    def _flush(self) -> None:
        """Send what there is, as far as the socket takes it, and the rest when it does."""
        try:
            pending = self.pgconn.flush()
        except psycopg.Error:
            pending = 0  # to read tells why
        if not pending:
            self._stop_writing()
        elif self._writer < 0:
            self._writer = self.wire.descriptor
            Context().run(self._loop.add_writer, self._writer, self._flush)

    def _stop_writing(self) -> None:
        if self._writer >= 0:
            descriptor, self._writer = self._writer, -1
            self._loop.remove_writer(descriptor)

    # --- receiving: what the wire asks of a future ------------------------------------------------

    def done(self) -> bool:
        """Return False: as long as something is under way there is something to read."""
        return False

    def set_result(self, _ready: int) -> None:
        """Read what has come."""
        wire = self.wire
        if not wire.watched:  # it has told of an error, or by a look
            wire.watch(self._loop)
        self.read()
        if self.under_way and not wire.looking:
            wire.look_later(self._loop)

    def set_exception(self, error: BaseException) -> None:
        """Note that the connection is gone."""
        self._fail(error)

    def read(self) -> None:
        """Read what has come, and wake those whom it is for."""
        under_way, answered = self.under_way, 0
        try:
            for results in received(self.pgconn):
                if results[0].status != SYNC:
                    under_way[0].results += results
                else:
                    answered += 1
                    self._answer(under_way[0])
                    under_way.popleft()
        except psycopg.Error as ex:
            self._fail(ex)
            return
        except BaseException as ex:
            self.torn(ex)
            raise
        if under_way and self.pgconn.status == BAD:
            self._fail(lost())
        elif answered:
            self.checkout.used += answered
            self._went_on()

    def _went_on(self) -> None:
        """Note that some were answered."""
        checkout = self.checkout
        now = self.head_since = self.session.heard_at = checkout.changed_at = monotonic()
        checkout.busy_seconds += now - checkout.busy_since
        checkout.busy_since = now
        if self.under_way:
            self._served(head := self.under_way[0])
            if head.begins is not None:
                head.begins()
        else:
            self._idle()
        if self._room.life.line:
            self._room.lane_has_room(self)
        if not self.users:
            self.look_for_users()

    def _idle(self) -> None:
        self.checkout.busy_since = 0.0
        self.conn._under_way = None
        self.wire.waiter = None
        if self.drained is not None and not self.drained.done():
            self.drained.set_result(None)

    def _answer(self, asked: Asked) -> None:
        results = asked.results
        if self.loud:
            asked.seconds, self.head_since = (now := monotonic()) - self.head_since, now
        if asked.guarded and results:
            if results[0].status != TUPLES_OK:  # a server that knows no such setting
                asked.error = psycopg.errors.ReadOnlySqlTransaction("a copy cannot be run")
            del results[0]  # of the guard
        if asked.prepares and len(results) > 1:
            if results[0].status == COMMAND_OK:
                del results[0]  # of the preparation
            else:
                self.unprepared.add(asked.name)
        elif asked.name in self.unprepared and self.shared:
            asked.moved, asked.goes_on = True, False  # it relied on the one before it
        if asked.entry is not None:
            asked.validate(self.conn._prepared)
        asked.wake()

    async def cancelled(self, asked: Asked) -> None:
        """
        Note that the task of *asked* was cancelled: the answer is nobody's.

        If nobody waits for anything here, the server is asked to stop what runs, and that is waited
        for.
        """
        asked.left = True
        if self.under_way and self.nobody_waits and not self._room.life.gone:
            self.closed = True  # now: who comes before that task begins would be stopped as well
            await in_own_task(self.stop())

    # --- what goes wrong ------------------------------------------------------------------------

    def move_others(self) -> None:
        """Send those behind the head elsewhere, for it takes long; take nobody more."""
        self.closed = True
        for asked in list(self.under_way)[1:]:
            if not asked.left and not asked.goes_on:
                asked.left = asked.moved = asked.goes_on = True
                asked.wake()
                asked.done = self._loop.create_future()  # its end, if anybody asks

    def torn(self, error: BaseException) -> None:
        """Close the connection, for *error* came in between: the next answer is anybody's."""
        why = lost()
        why.__cause__ = error
        self._fail(why, 0)

    def _fail(self, error: BaseException, first: int = 1) -> None:
        """Tell the one at the head why the connection is gone; from *first* on, send elsewhere."""
        self.closed = True
        failed = list(self.under_way)
        sent = self._writer < 0 or len(failed) > 1
        self._stop_writing()
        self.under_way.clear()
        for index, asked in enumerate(failed):
            if index >= first and self.shared:
                asked.moved = asked.goes_on = True  # or it has, for all that can be known
                asked.error = last_word(self.pgconn, asked, lost(), True)
            elif asked.goes_on or not asked.left:
                asked.seconds = monotonic() - self.head_since
                asked.error = last_word(self.pgconn, asked, error, sent)
            asked.wake()
        if failed:
            self._idle()
        self.checkout.used += 1
        if self.pgconn.status != BAD or self.checkout.session is None:
            self.session.finish()
        self.look_for_users()

    # --- the end ----------------------------------------------------------------------------------

    def leave(self, asked: Asked) -> None:
        """Note that the task of *asked* is gone: it has its answer, or does not want it."""
        asked.left = True
        self.left()

    def left(self) -> None:
        """Note that a task is gone."""
        self.users -= 1
        self.look_for_users()

    def look_for_users(self) -> None:
        """Give the connection back if nobody needs it; stop what runs if nobody waits for it."""
        if self.users or self.promised or self._stopping:
            return
        if not self.under_way:
            self._end()
        elif self.nobody_waits and not all(asked.moved for asked in self.under_way):
            self.stop_for_nobody()

    @property
    def nobody_waits(self) -> bool:
        """True if nobody waits for anything that is under way, or is about to come."""
        return not self.promised and all(asked.left for asked in self.under_way)

    async def stop(self) -> None:
        """Ask the server to stop what runs, and read its end; close the connection if it won't."""
        self.closed = True
        if not self.under_way or self._stopping:
            return
        self._stopping = self.stopped = True
        try:
            await StopLane(self).run()
        finally:
            self._stopping = False

    def stop_for_nobody(self) -> None:
        """Stop what runs in a task of the pool's; not if its loop is gone, and so all of it."""
        self.closed = True
        if self._room.life.gone:
            return
        self.users += 1
        try:
            task = self._room.life.tasks.start(self.stop, "stop")
            task.add_done_callback(self._was_stopped)  # close() may cancel it before it begins
        except BaseException:
            self.users -= 1
            raise

    def _was_stopped(self, _task: asyncio.Task[None]) -> None:
        self.left()

    def _end(self) -> None:
        """Give the connection back; if nothing is out of order, it is the same for the next."""
        room, conn, session, checkout = self._room, self.conn, self.session, self.checkout
        room.lane_ended(self)
        del self.conn, self.session
        try:
            self._give_back(conn, session, checkout)
        except BaseException:
            if session.handle is conn and session.checkout is checkout:  # else it is on its way
                self.conn, self.session = conn, session
                room.lane_stays(self)
            raise

    def _give_back(self, conn: Any, session: Session, checkout: Checkout) -> None:
        life = self._room.life
        self.closed = True
        self.converter.transformer.set_pgresult(None)  # it would keep the answer
        try:
            self.pgconn.exit_pipeline_mode()
        except psycopg.Error:
            self.stopped = True
        if checkout.session is None:
            session.finish()  # it was taken away meanwhile
        elif not self.stopped and not self.unprepared and keep_unseen(life, conn, self.plain):
            return
        session.lane = None
        release(life.pool, conn, True)
