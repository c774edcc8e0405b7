"""
`BoundPool`: an `AsyncConnectionPool` that keeps its promises.

psycopg_pool keeps the stock of connections: it counts, expires, shrinks and drains them. What a
caller touches is done here: open, acquire, release, close, each of them checked against the
event loop and the process that opened the pool.

A pool lives from `open()` to `close()`, and may live again: a *life* has one binding, one line
of waiters, one ledger, one connector, one connection class. What a life owned is gone when it
ends.
"""

from __future__ import annotations

import asyncio
import sys
import weakref
from asyncio import _get_running_loop, current_task
from collections.abc import (
    AsyncGenerator,
    Awaitable,
    Callable,
    Container,
    Coroutine,
    Iterable,
)
from contextlib import (
    AbstractAsyncContextManager,
    AsyncExitStack,
    asynccontextmanager,
    suppress,
)
from contextvars import copy_context
from enum import StrEnum
from functools import partial, wraps
from math import modf
from time import monotonic
from traceback import clear_frames
from types import FrameType, TracebackType
from typing import Any, Literal, ParamSpec, TypeAlias, cast

import psycopg
from psycopg import AsyncConnection, pq
from psycopg.rows import TupleRow
from typing_extensions import TypeVar, override

from . import _attempt, _checking, _cleaning, _compat, _facts, _lost_work
from ._attempt import Failure
from ._between import Between
from ._binding import LoopBinding, beginning, inherited, weakly
from ._checking import Checks
from ._checkouts import Checkout, Holder, Ledger, Line, LineClock, SlowCallbacks, Waiter
from ._classes import BoundClasses
from ._cleaning import Cleaner
from ._connection import (
    LEFT_OPEN,
    BoundConnection,
    ReleasedConnection,
    RetiredConnection,
    RevokedConnection,
)
from ._conninfo import normalise, parse
from ._failover import Failover
from ._health import Question
from ._log import log
from ._moment import Moment, note_held, note_waiting
from ._recovery import Connector
from ._session import Session, part_from_pipeline, remains, retire, revoke, shut_down
from ._storm import Storm
from ._waiting import CANCEL_GRACE
from ._where import Behalf, Code, Place, code_behind, coroutine_function, function_of, site
from ._words import in_words, raised_by
from .errors import (
    AcquireTimeout,
    ClosedError,
    ConfigError,
    NotOpenError,
    OpenError,
    PoolkeeperError,
    SelfDeadlockError,
    TooManyWaitersError,
    another,
    briefly,
    see,
)

ACT = TypeVar("ACT", bound=AsyncConnection[Any], default=AsyncConnection[TupleRow])
P = ParamSpec("P")
T = TypeVar("T")
Returned = TypeVar("Returned")
ConnectionCallback: TypeAlias = Callable[[Any], Awaitable[None]]

IDLE = pq.TransactionStatus.IDLE
ACTIVE = pq.TransactionStatus.ACTIVE
INTRANS = pq.TransactionStatus.INTRANS
INERROR = pq.TransactionStatus.INERROR
UNKNOWN = pq.TransactionStatus.UNKNOWN
BAD = pq.ConnStatus.BAD
NO_PIPELINE = pq.PipelineStatus.OFF


LONGEST = 1e9
"""Seconds that the longest wait may take: for ever."""

FRESH = 0.001
"""Seconds for which a connection that was heard of, or looked at, is not looked at again."""

ASKED = 0.25
"""Seconds that an acquire without a timeout waits for an idle connection that is being asked."""


class State(StrEnum):
    """Where a pool is in its life."""

    NEW = "new"
    OPENING = "opening"
    OPEN = "open"
    CLOSING = "closing"
    CLOSED = "closed"


_OPEN = State.OPEN
_OPENING = State.OPENING
_CLOSED = State.CLOSED


class BoundPool(_compat.TellingPool[ACT]):
    """
    The pool behind a `PoolManager`; a real `AsyncConnectionPool`, with every guard.

    Made by the manager, which documents the parameters. Can be handed to any library that
    asks for an `AsyncConnectionPool`, before it is opened too.

    .. versionadded:: 0.1.0
    """

    _clock: LineClock
    _connector: Connector
    _failover: Failover
    _storm: Storm

    def __init__(
        self,
        conninfo: Any,
        *,
        connection_class: type[ACT],
        kwargs: Any,
        application_name: str | None,
        leak_threshold: float | None,
        configure: ConnectionCallback | None,
        check: ConnectionCallback | None,
        reset: ConnectionCallback | Literal["discard"] | None,
        **settings: Any,
    ) -> None:
        self._user_configure = configure
        self._user_check = check
        self._user_reset: ConnectionCallback | Literal["discard"] | None = reset
        self._application_name = application_name
        self._leak_threshold = leak_threshold
        self._state = State.NEW
        self._binding: LoopBinding | None = None
        self._line = Line()
        self._settings: dict[str, Any] = {
            "conninfo": conninfo,
            "kwargs": kwargs,
            "connection_class": connection_class,
            "configure": configure,
            "check": check,
            "reset": self._clean,
            **settings,
        }
        self._idle = _compat.begin_life(self, self._line, self._settings)
        self._settings["name"] = self.name
        self._forget_life()

    def _forget_life(self) -> None:
        """Set what belongs to one life to what it is before the first connection."""
        self._sessions: weakref.WeakSet[Session] = weakref.WeakSet()
        self._ledger = Ledger(self._leak_threshold)
        self._held = self._ledger.held
        self._between = Between()
        self._cleaner = Cleaner(
            self.name, self._user_configure, self._user_reset == "discard", self._between.now
        )
        self._checks = Checks(self, self._between)
        self._openers: set[asyncio.Future[BaseException | None]] = set()
        self._returning: set[asyncio.Task[None]] = set()
        self._prepared = 0
        self._configuring = 0
        self._asked_idle = 0  # idle connections that are being asked, and nobody's else
        self._freed: asyncio.Future[None] | None = None
        self._ended: asyncio.Future[None] | None = None
        self._wanted = False  # by somebody who does not wait for it, or not any more
        self._oversized = False  # there are more than max_size, for it was lowered
        self._last_moment: Moment | None = None
        self._outage_told = False
        self._open_until = 0.0
        self._leak_timer: asyncio.TimerHandle | None = None
        self._slow_callbacks: SlowCallbacks | None = None
        self.question: Question | None = None  # the last one that check() of the manager asked
        # psycopg_pool's counters, as far as they are counted on the way: see _pour_counters().
        self._requests = self._requests_queued = 0
        self._wait_seconds = self._usage_seconds = 0.0
        self._wait_rest = self._usage_rest = 0.0  # of a millisecond

    def __del__(self) -> None:
        # Dropped while open: its connections go with it, its tasks would wait for work for ever.
        if vars(self).get("_binding") is None or self.inherited:
            return
        for task in _compat.maintenance_tasks(self):
            # Not that of the binding: the collector has cleared its weak reference by now.
            loop = task.get_loop()
            with suppress(RuntimeError):  # it is closed; this may be another thread than its own
                loop.call_soon_threadsafe(task.cancel)

    # --- what can be read at any time ---------------------------------------------------

    @property
    def state(self) -> State:
        """Where the pool is in its life; closed too when its loop or process is not here."""
        if self._binding is not None and self._binding.dead and self._state is not State.NEW:
            return State.CLOSED
        return self._state

    def is_here(self) -> bool:
        """Tell whether the caller runs on the loop, in the process, that opened the pool."""
        return self._binding is not None and self._binding.is_here()

    @property
    def inherited(self) -> bool:
        """True if a parent process opened the pool."""
        return self._binding is not None and self._binding.forked

    @property
    def opened(self) -> Place | None:
        """Where the pool was opened last."""
        return self._binding.opened if self._binding else None

    def counts(self) -> dict[str, int]:
        """
        Return total, in use, idle, max and waiting, in that order. Instantaneous.

        After them those of making, returning and checking that are not 0.
        """
        in_use, idle = len(self._ledger.held), len(self._idle)
        others = self._counts_between()
        counts = {
            "total": in_use + idle + others["returning"] + others["checking"],
            "in_use": in_use,
            "idle": idle,
            "max": self.max_size,
            "waiting": len(self._line),
        }
        return counts | {name: number for name, number in others.items() if number}

    def _counts_between(self) -> dict[str, int]:
        """Return how many connections are being made, given back and checked."""
        return {
            "making": self._connector.pending if self._binding is not None else 0,
            "returning": self._between.count("returning"),
            "checking": self._between.count("checking") + self._line.handed_over(),
        }

    def numbers(self) -> str:
        """Return the numbers of `counts()` in words."""
        return " ".join(f"{name}={value}" for name, value in self.counts().items())

    def checkouts(self) -> list[Checkout]:
        """Return who holds a connection, longest first."""
        return self._ledger.longest_first()

    def snapshot(self) -> _facts.PoolSnapshot:
        """Return the facts of this moment. Never touches the network."""
        if self._binding is None or self._binding.dead:
            return _facts.PoolSnapshot(
                self.name, self.state.value, 0, 0, 0, self.max_size, 0, self.min_size
            )
        return self.moment().snapshot()

    def moment(self, gave_up: Container[Holder] = ()) -> Moment:
        """
        Note the facts of this moment.

        Args:
            gave_up: Tasks that have waited until now.
        """
        now = monotonic()
        held = self._ledger.longest_first()
        idle = len(self._idle)
        others = self._counts_between()
        connector = self._connector
        failure = connector.last_failure
        return Moment(
            now,
            {
                "name": self.name,
                "state": self.state.value,
                "total": len(held) + idle + others["returning"] + others["checking"],
                "in_use": len(held),
                "idle": idle,
                "max": self.max_size,
                "waiting": len(self._line),
                "min": self.min_size,
                **others,
                "opened": self.opened,
                "steps": self._between.rows(),
                "connecting": self._unanswered(),
                "attempts_failed": connector.failures,
                "last_error": failure.words if failure else None,
                "last_error_advice": failure.advice if failure else "",
                "last_error_seconds": now - connector.last_failed if failure else 0.0,
                "failing_seconds": now - connector.failing_since if failure else 0.0,
                "next_attempt_seconds": connector.next_attempt_seconds,
                "stalled_by": self._slow_callbacks.last if self._slow_callbacks else "",
                **self._checks.facts(now),
            },
            note_held(held, self._line.tasks, gave_up),
            note_waiting(self._line.first(100)),
            self._ledger.load(),
            self._clock.stalls,
        )

    def diagnose(self) -> _facts.Diagnosis:
        """Return why connections are short, from a `snapshot()` of this moment."""
        return _facts.diagnose(self.snapshot())

    @override
    def __repr__(self) -> str:
        return f'<poolkeeper.BoundPool "{self.name}" {self.state.value} {self.numbers()}>'

    @override
    def get_stats(self) -> dict[str, int]:
        """Return psycopg_pool's statistics, under its keys."""
        self._pour_counters()
        return super().get_stats()

    @override
    def pop_stats(self) -> dict[str, int]:
        """Return psycopg_pool's statistics and set its counters to zero."""
        self._pour_counters()
        return super().pop_stats()

    def _pour_counters(self) -> None:
        """Add what was counted on the way to psycopg_pool's counters."""
        for key, number in (
            (self._REQUESTS_NUM, self._requests),
            (self._REQUESTS_QUEUED, self._requests_queued),
        ):
            if number:
                _compat.count(self, key, number)
        if self._wait_seconds:
            whole, self._wait_rest = _milliseconds(self._wait_seconds, self._wait_rest)
            _compat.count(self, self._REQUESTS_WAIT_MS, whole)
        if self._usage_seconds:
            whole, self._usage_rest = _milliseconds(self._usage_seconds, self._usage_rest)
            _compat.count(self, self._USAGE_MS, whole)
        self._requests = self._requests_queued = 0
        self._wait_seconds = self._usage_seconds = 0.0

    # --- opening --------------------------------------------------------------------------

    @override
    @briefly
    async def open(
        self, wait: bool = False, timeout: float = 30.0, *, caller: str | None = None
    ) -> None:
        """
        Open the pool and bind it to the running event loop.

        On a pool that is open here, do nothing but wait as asked. On one that was closed, or
        whose loop is closed, or that was opened in a parent process, begin a new life.

        Args:
            wait: Return when `min_size` connections work, instead of at once.
            timeout: Seconds to wait for them.
            caller: As for `PoolManager.open()`.

        Raises:
            LoopMismatchError: If it is open on another loop, which is not closed.
            OpenError: If the connections cannot be made, or not in time. The pool is closed,
                unless it was open before.
        """
        while self._state is State.CLOSING and self._alive_here("open it"):
            await self._until_ended()
        if self._claim_life(caller):
            await super().open()
            _compat.make_scheduler_endable(self)
        if wait:
            await self._until_ready(timeout)
        else:
            self._wanted = True

    @override
    @briefly
    async def wait(self, timeout: float = 30.0) -> None:
        """
        Wait until there are `min_size` connections. May be called by several tasks, and again.

        Those in use count: a pool that is at work is ready.

        Raises:
            OpenError: If they cannot be made, or not within *timeout* seconds. A pool that did
                not come to be open is closed, unless another task still waits for it.
        """
        self._check_usable("wait for it")
        await self._until_ready(timeout)

    def _alive_here(self, purpose: str) -> bool:
        """Tell whether the current life goes on; raise if it goes on elsewhere."""
        assert self._binding is not None
        if self._binding.dead:
            return False
        self._binding.check(purpose)
        return True

    def _claim_life(self, caller: str | None) -> bool:
        """Begin a life where none goes on; one of the threads that come at once does."""
        _facts.load()
        with beginning():
            begins = self._state not in (_OPENING, _OPEN) or not self._alive_here("open it")
            if begins:
                self._begin_life(caller)
        return begins

    def _begin_life(self, caller: str | None) -> None:
        binding = LoopBinding(self.name, caller)  # raises where no pool can be opened
        if self._state is not State.NEW:
            if self._state is not State.CLOSED:
                self._abandon()
            self._line = Line()
            self._idle = _compat.begin_life(self, self._line, self._settings)
        self._forget_life()
        self._binding = binding
        loop = asyncio.get_running_loop()
        self._context = copy_context()
        self._clock = LineClock(
            loop, self._line, self._time_out, self._help_growth, self._end_deadlock
        )
        self._storm = Storm(self, loop, self._context)
        self._connector = Connector(self, loop)
        self._failover = Failover(self)
        if loop.get_debug():
            self._slow_callbacks = SlowCallbacks()
        if self._leak_threshold is not None:
            self._watch_for_leaks()
        binding.pool = weakref.ref(self)
        self._bound_classes = BoundClasses(self, binding)
        self._state = State.OPENING
        if self.min_size == 0:
            self._state = State.OPEN

    async def _until_ready(self, timeout: float) -> None:
        if self._state is State.OPEN and self._has_minimum:
            self._wanted = True
            return
        life = self._binding
        opener: asyncio.Future[BaseException | None] = asyncio.get_running_loop().create_future()
        self._openers.add(opener)
        self._open_until = max(self._open_until, monotonic() + timeout)
        try:
            failed = self._connector.last_failure
            if failed is not None and failed.is_permanent:
                self._tell_openers(self._open_error(None))
            await asyncio.wait({opener}, timeout=timeout)
        except BaseException:
            self._openers.discard(opener)
            if not self._wanted:
                await self._give_up(life, None)
            raise
        self._openers.discard(opener)
        failure = opener.result() if opener.done() else self._open_error(timeout)
        if failure is not None:
            await self._give_up(life, failure)
            raise another(failure)
        self._wanted = True

    @property
    def _has_minimum(self) -> bool:
        """True if there are `min_size` connections, in whosever hands."""
        return _compat.total(self) - self._connector.wanted >= self.min_size

    def _tell_openers(self, failure: BaseException | None) -> None:
        for opener in self._openers:
            if not opener.done():
                opener.set_result(failure)

    async def _give_up(self, life: LoopBinding | None, failure: BaseException | None) -> None:
        """End *life*, which did not come to be open, unless another task waits for it."""
        if self._binding is not life or self._openers:
            return
        # Open already, if a cancellation came together with the last connection: an opener
        # that was cancelled will not close what it does not know to be open.
        if self._state is State.OPENING or (self._state is State.OPEN and not self._wanted):
            await self._close(0.0, failure)

    def _unanswered(self) -> int:
        """Return how many attempts wait for a server's answer."""
        return self._connector.pending - self._configuring - self._between.ask_nobody()

    def _open_error(self, timeout: float | None) -> OpenError:
        """Return why the pool could not be opened: *timeout* seconds passed, or it never will."""
        failed = self._connector.last_failure
        pending = self._unanswered()
        held_up = self._between.held_up()
        if failed is not None:
            why = failed.words
            hint = failed.advice
        elif held_up is not None:
            at = f" at {held_up.site}" if held_up.site else ""
            why = f"a connection is {held_up.doing}{at} for {held_up.seconds:.1f} s by now"
            hint = "Look at what that function waits for, and give it a time-out."
        elif pending:
            why = "the server does not answer"
            hint = (
                "Something accepts the connection, or drops its packets, and says nothing:"
                " check host and port, and whether a firewall or proxy stands between."
            )
        else:
            why = f"{self._prepared} of {self.min_size} connections are ready"
            hint = "Give open() more time, or ask for fewer connections with min_size."
        verb = "cannot open" if timeout is None else "could not open"
        within = "" if timeout is None else f" within {timeout:.2f} s"
        assert self._binding is not None
        error = OpenError(
            f'{verb} pool "{self.name}"{within}: {why}',
            detail=f"{self._prepared} of {self.min_size} connections were made,"
            f" {_attempts(self._connector.failures)} failed, {pending} had no answer yet."
            f" Opened {self._binding.opened}.",
            hint=f"{hint} {see('open')}",
        )
        if failed is not None:
            error.__cause__ = failed.error
            error.kind = failed.kind
        return error

    # --- making connections ----------------------------------------------------------------

    async def connect_beside(self) -> Any:
        """Make a connection that is neither configured nor counted."""
        conninfo, kwargs = await _compat.parameters(self)
        return await self._connect_with(conninfo, kwargs)

    async def _connect_with(self, conninfo: str, kwargs: dict[str, Any]) -> Any:
        conninfo = normalise(conninfo)
        # What a function returned: psycopg's own error may quote the password.
        _attempt.attempt_here().params = {**parse(conninfo), **kwargs}
        kwargs = dict(kwargs)
        if self._application_name is not None:
            kwargs["application_name"] = self._application_name
        else:
            # libpq uses it where neither conninfo nor PGAPPNAME says otherwise.
            kwargs.setdefault("fallback_application_name", f"poolkeeper:{self.name}")
        # By the user's class, as psycopg_pool would: it and what it makes may be patched.
        try:
            made = await self.connection_class.connect(conninfo, **kwargs)
        except asyncio.CancelledError as ex:
            # Its frames hold the socket, and whoever keeps the cancelled task holds the frames.
            _clear_frames(ex)
            raise
        conn = self._bound_classes.bind(made)
        self._sessions.add(conn._session)
        return conn

    @override
    def run_task(self, task: Any) -> None:
        """Run a piece of psycopg_pool's maintenance work; connections are made by `Connector`."""
        if _compat.adds_connection(task):
            self._connector.add()
        else:
            super().run_task(task)

    async def make_connection(self) -> None:
        """Make one connection, configure it and add it to the pool; the connector calls this."""
        # Not in a variable: a task that fails, with its own frame in the traceback, is a cycle.
        self._between.begin(current_task(), "making", _attempt.SERVER)
        try:
            await self._make_connection()
        finally:
            self._between.end(current_task())

    async def _make_connection(self) -> None:
        _compat.count(self, self._CONNECTIONS_NUM)
        conninfo, kwargs = await _compat.parameters(self)
        began = monotonic()
        try:
            conn = await self._connect_with(conninfo, kwargs)
        except Exception:
            _compat.count(self, self._CONNECTIONS_ERRORS)
            raise
        _compat.count(self, self._CONNECTIONS_MS, int((monotonic() - began) * 1000))
        _compat.set_owner(conn, self)
        await self._prepare(conn)
        _compat.begin_lifetime(self, conn)
        conn._session.settle(conn)
        if not self._connector.claim():  # another attempt, made beside this one, was faster
            self.dismiss(conn)
            return
        try:
            await _compat.add(self, conn)
        except BaseException:
            conn.pgconn.finish()
            self._connector.unclaim()
            raise
        self._prepared += 1
        if self._oversized:
            self._close_surplus()
        if self._state is _OPENING and self._prepared >= self.min_size:
            self._state = _OPEN
        if self._openers and self._state is _OPEN and self._has_minimum:
            self._tell_openers(None)

    @override
    def calls(self, doing: str, function: object = None) -> None:
        """Note what the attempt that runs now is at."""
        self._between.now(current_task(), doing, function)
        _attempt.attempt_here().is_at(doing, function)

    def spare_attempts(self, wanted: int) -> int:
        """Forget those of *wanted* connections that nobody needs any more; return how many."""
        counted = _compat.total(self)
        made = self._sessions_made()
        needed = min(self.max_size, max(self.min_size, made + len(self._line)))
        spare = max(0, min(wanted, counted - needed))
        if spare:
            _compat.forget_connections(self, spare)
        return spare

    def in_need(self) -> bool:
        """Tell whether somebody waits, and there is no connection that may come back."""
        return bool(self._line) and not self._sessions_made()

    def room(self) -> int:
        """Return how many attempts may be under way: `max_size` less the sessions there are."""
        return self.max_size - self._sessions_made()

    def _sessions_made(self) -> int:
        """Return how many connections there are, in whosever hands."""
        return _compat.total(self) - self._connector.wanted

    def may_start_tasks(self) -> bool:
        """Tell whether the tasks of this life go on: not if asyncio.run() is ending them."""
        return _compat.tasks_go_on(self)

    def connect_failed(self, failure: Failure, began: float) -> None:
        """Note that an attempt has failed; the connector goes on by itself."""
        if self._openers and failure.is_permanent:
            self._tell_openers(self._open_error(None))
        elif self._connector.failures == 1:
            self._outage_told = False
            left = self._open_until - monotonic()
            waits = f", open() waits for {left:.1f} s more" if self._openers else ""
            log(
                "outage_began",
                self.counts(),
                pool=self.name,
                reason=failure.words,
                kind=failure.kind,
                then=f"trying again until one can{waits}",
                hint=f"{failure.advice} {see('open', 'open' if self._openers else 'server')}",
            )
        if failure.is_permanent and not self._sessions_made():
            self._refuse_waiters(failure, began)

    def _refuse_waiters(self, failure: Failure, began: float) -> None:
        """Tell those who wait in vain: an attempt that *began* later has failed, for good."""
        waiters = [waiter for waiter in self._line if waiter.since <= began]
        if not waiters:
            return
        diagnosis = self.diagnose()
        for waiter in waiters:
            self._line.leave(waiter)
            error = AcquireTimeout(
                f'cannot acquire a connection from pool "{self.name}": {failure.words}',
                detail=diagnosis.detail,
                hint=f"{failure.advice} {see('acquire-timeout')}",
                diagnosis=diagnosis,
            )
            error.__cause__ = failure.error
            waiter.refuse(error)

    def outage_goes_on(self, seconds: float) -> None:
        """Call `reconnect_failed` once for an outage that is longer than `reconnect_timeout`."""
        if not self._outage_told and seconds > self.reconnect_timeout:
            self._outage_told = True
            self.start_own_task(self._tell_reconnect_failed)

    async def _tell_reconnect_failed(self) -> None:
        try:
            await self.reconnect_failed()
        except Exception as ex:
            reason = raised_by("the reconnect_failed callback", ex)
            log("callback_failed", pool=self.name, reason=reason)

    async def _prepare(self, conn: Any) -> None:
        """Configure a new connection."""
        self._configuring += 1
        self._connector.answered()
        try:
            if self._user_configure is not None:
                self.calls("in the configure callback", self._user_configure)
                await self._user_configure(conn)
                self.calls(_attempt.SERVER)
                if (status := conn.pgconn.transaction_status) != IDLE:
                    raise ConfigError(
                        "the configure callback left the connection in status"
                        f" {pq.TransactionStatus(status).name}: commit at its end, or set"
                        " autocommit",
                        parameter="configure",
                        hint=see("config"),
                    )
                await _cleaning.note_configured(conn)
        except BaseException:
            # It is dropped, but the traceback of what we keep holds on to it.
            self._end_session(conn._session)
            raise
        finally:
            self._configuring -= 1

    # --- acquire --------------------------------------------------------------------------

    @override
    def connection(  # type: ignore[override]  # pyright: ignore[reportIncompatibleMethodOverride]
        self, timeout: float | None = None
    ) -> CheckoutContext[ACT]:
        """
        Return a context manager that acquires a connection and gives it back.

        Commits on success and rolls back on an exception, as psycopg_pool's does. As the
        decorator of an async function, it does so around each call. For
        arguments and errors see `getconn()`.
        """
        return CheckoutContext(self, timeout, sys._getframe(1))

    @override
    @coroutine_function
    def getconn(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, timeout: float | None = None
    ) -> Coroutine[Any, Any, ACT]:
        """
        Acquire a connection. Give it back with `putconn()`; better, use `connection()`.

        Args:
            timeout: Seconds to wait, the pool's own `timeout` if None. With 0, take one that is
                free now or fail.

        Raises:
            LoopMismatchError: If called on another loop than the one that opened the pool.
            NotOpenError, ClosedError: If the pool is not open, or is closed meanwhile.
            AcquireTimeout: If none was free in time.
            TooManyWaitersError: If `max_waiting` tasks wait already.
        """
        # Not "async def": run as a task of its own, the coroutine has no caller to look at.
        frame = sys._getframe(1)
        return self._getconn(timeout, frame, frame.f_lineno)

    async def _getconn(self, timeout: float | None, frame: FrameType, lineno: int) -> ACT:
        try:
            conn: Any = self.take(frame, lineno, False)
            if conn is None:
                conn = await self.wait_for_connection(timeout, frame, lineno, False)
        except PoolkeeperError as ex:
            raise ex.with_traceback(None)  # noqa: B904 - see briefly()
        return cast(ACT, conn)

    def take(self, frame: FrameType | Behalf, lineno: int, structured: bool) -> Any:
        """
        Acquire a connection that is free, sound and needs no check; None if that takes waiting.

        This is what every request pays: one function, no await.

        Args:
            frame: Where it is asked for.
            lineno: At which line of it.
            structured: True if a block of the calling task's own will give it back.

        Raises:
            LoopMismatchError, NotOpenError, ClosedError: As `getconn()`.
        """
        # LoopBinding.is_here(), without the call; open implies a binding.
        loop = _get_running_loop()
        if self._state is not _OPEN or loop is None or loop is not self._binding.owner_loop():  # type: ignore[union-attr]  # pyright: ignore[reportOptionalMemberAccess]
            self._check_usable("acquire a connection")
        self._requests += 1
        idle = self._idle
        if not idle or self._line or self._user_check is not None:
            return None
        conn: Any = idle[0]
        session: Session = conn._session
        now = monotonic()
        if now - session.heard_at > FRESH:
            if not session.is_quiet():
                return None
            session.heard_at = now
        idle.popleft()
        _compat.note_idle_low(self, len(idle))
        return self._check_out(conn, session, frame, lineno, structured, now)

    def _check_out(
        self,
        conn: Any,
        session: Session,
        frame: FrameType | Behalf,
        lineno: int,
        structured: bool,
        now: float,
    ) -> Any:
        task: Any = current_task()
        checkout = Checkout(session, task, frame.f_code, lineno, structured, now)
        session.checkout = conn._checkout = checkout
        conn._pool = self
        if self._leak_threshold is None:
            self._held[checkout] = None
        else:
            self._ledger.begins(checkout, frame.f_back if isinstance(frame, Behalf) else frame)
        return conn

    async def wait_for_connection(
        self, timeout: float | None, frame: FrameType | Behalf, lineno: int, structured: bool
    ) -> Any:
        """Acquire a connection when `take()` had none."""
        if timeout is None:
            timeout = self.timeout
        began = monotonic()
        deadline = began + min(LONGEST, timeout)  # it may be infinite, or NaN
        code = frame.f_code
        joined = 0.0
        refused = 0
        while True:
            if self._state is not _OPEN:
                self._check_usable("acquire a connection")
            conn: Any
            idle = self._idle
            if idle and not self._line:
                conn = idle.popleft()
                _compat.note_idle_low(self, len(idle))
            else:
                conn = await self._wait_in_line(timeout, deadline, code, lineno, joined)
            joined = began
            session: Session = conn._session
            now = monotonic()
            fresh = now - session.heard_at <= FRESH
            if fresh or session.is_quiet() or await self._answers(conn, deadline):
                session.heard_at = now
                check = self._user_check
                look = check and self._checks.accepts(check, conn, refused, deadline)
                if look is None or await look:
                    self._between.end(session)
                    return self._check_out(conn, session, frame, lineno, structured, now)
                refused += 1
                if (now := monotonic()) >= deadline:
                    _compat.count(self, self._REQUESTS_ERRORS)
                    raise self._refusal(timeout, now - began, code, lineno, look.moment)

    async def _wait_in_line(
        self, timeout: float, deadline: float, code: Code, lineno: int, joined: float
    ) -> Any:
        """
        Wait until a connection is handed over.

        Args:
            timeout: Seconds that the task was to wait.
            deadline: Until when.
            code: Where it asks.
            lineno: At which line of it.
            joined: When it joined, if it was handed one that is no good; 0.0 if it joins now.
        """
        line = self._line
        if self.max_waiting and len(line) >= self.max_waiting and not joined:
            _compat.count(self, self._REQUESTS_ERRORS)
            raise TooManyWaitersError(
                f'cannot wait for a connection from pool "{self.name}":'
                f" {_tasks_wait(len(line))} already",
                detail=f"{self.numbers()}. max_waiting={self.max_waiting}.",
                hint=f"Let the caller try again later. {see('too-many-waiters')}",
            )
        comes_back = self._asked_idle > len(line)  # what a readiness probe has taken, say
        now = monotonic()
        if deadline <= now and comes_back:
            deadline = now + ASKED
        elif deadline <= now:
            _compat.count(self, self._REQUESTS_ERRORS)
            raise self._refusal(timeout, now - joined if joined else None, code, lineno)
        waiter = Waiter(asyncio.get_running_loop(), timeout, deadline, code, lineno)
        if self._ledger.completes_deadlock(waiter.task, line, self.max_size, timeout):
            waiter.suspected = waiter.since
        if joined:
            waiter.since = joined
            line.rejoin(waiter)
        else:
            line.append(waiter)
        self._requests_queued += 1
        if not comes_back and (_compat.total(self) < self.max_size or self._connector.wanted):
            self._help_growth()
        self._clock.watch(waiter)
        if self._connector.last_failure is not None and self.in_need():
            self._connector.hurry()
        try:
            conn = await waiter.future
            line.leave(waiter)
        except BaseException:
            line.leave(waiter)
            if waiter.was_served():
                # Cancelled in the same turn of the loop in which it was served.
                self._give(waiter.future.result())
            _compat.count(self, self._REQUESTS_ERRORS)
            raise
        finally:
            self._clock.forget(waiter)
            self._wait_seconds += monotonic() - now
        if self._state is not _OPEN and self._state is not _OPENING:
            conn.pgconn.finish()
            raise self._closed_error()
        return conn

    def _help_growth(self) -> None:
        """Let the pool grow, and mend what somebody may have cancelled or dropped."""
        self._ledger.let_go()
        self._mend()
        _compat.grow(self)
        self._connector.go_on()

    def _mend(self) -> None:
        """Start psycopg_pool's tasks again if somebody has cancelled them."""
        self._context.copy().run(_compat.mend, self)

    def _time_out(self, waiters: list[Waiter]) -> None:
        """Tell all of *waiters* that their time is up, and why."""
        for waiter in waiters:
            self._line.leave(waiter)
        self._ledger.gave_up(len(waiters))
        moment = self.moment({waiter.task for waiter in waiters})
        errors = [
            self._acquire_timeout(waiter.timeout, moment.when - waiter.since, moment)
            for waiter in waiters
        ]
        for waiter, error in zip(waiters, errors, strict=True):
            waiter.refuse(error)
        # When all are told: a filter or handler of the user's may raise.
        first = waiters[0]
        self._storm.goes_on(
            errors[0],
            len(errors),
            timeout_seconds=first.timeout,
            task=first.task.get_name() if first.task else "",
            site=site(first.code, first.lineno),
            function=function_of(first.code),
        )

    def _refusal(
        self,
        timeout: float,
        waited: float | None,
        code: Code,
        lineno: int,
        moment: Moment | None = None,
    ) -> AcquireTimeout:
        """
        Return why an acquire fails that is not in line; it is logged.

        Args:
            timeout: How long it was to wait.
            waited: How long it did, in line; None if it never was.
            code: Where it asks.
            lineno: At which line of it.
            moment: When its time was up; None if that is now.
        """
        moment = moment or self._recent_moment()
        error = self._acquire_timeout(
            timeout, max(0.0, timeout) if waited is None else waited, moment
        )
        task = current_task()
        self._storm.goes_on(
            error,
            1,
            timeout_seconds=timeout,
            task=task.get_name() if task else "",
            site=site(code, lineno),
            function=function_of(code),
        )
        return error

    def _recent_moment(self) -> Moment:
        moment = self._last_moment
        # Who tries again and again would spend more time on the reasons than on the tries.
        if (
            moment is None
            or monotonic() - moment.when > FRESH
            or not moment.is_of(self.counts(), self._ledger.last_began)
        ):
            moment = self._last_moment = self.moment()
        return moment

    def _acquire_timeout(self, timeout: float, waited: float, moment: Moment) -> AcquireTimeout:
        """Return why an acquire has failed, in words that are found when they are read."""
        error = AcquireTimeout.told_later(partial(moment.account, timeout, waited))
        cause = self._connector.last_error or self._checks.refusals.error
        if cause is not None:
            error.__cause__ = cause.with_traceback(None)
        return error

    def _end_deadlock(self, waiter: Waiter) -> None:
        """Tell the one who completed a self-deadlock, if nobody has stopped waiting since."""
        if not self._ledger.deadlock_lasts(self._line, self.max_size, waiter.suspected):
            return
        moment = self.moment()
        self._line.leave(waiter)
        diagnosis = _facts.diagnose(moment.snapshot(moment.when - waiter.since))
        error = SelfDeadlockError(
            f'cannot acquire a connection from pool "{self.name}": {diagnosis.summary}',
            detail=diagnosis.detail,
            hint=f"{diagnosis.advice} {see('self-deadlock')}",
            diagnosis=diagnosis,
        )
        waiter.refuse(error)

    # --- liveness -------------------------------------------------------------------------

    async def _answers(self, conn: Any, deadline: float) -> bool:
        """
        Tell whether a connection that is not quiet works; if not, replace all that are dead.

        What came may be the end of the session, or a notice: read it, which costs no round
        trip, and ask the server only if that does not tell.
        """
        if _was_ended(conn):
            self._replace_dead([conn])
            return False
        if await self._checks.answers(conn, deadline):
            return True
        self._replace_dead([])
        return False

    def _check_idle(self, conn: Any) -> asyncio.Future[bool]:
        """Ask the server whether *conn*, which was idle, works; keep it or replace it."""
        verdict = self._checks.ask(conn)
        verdict.add_done_callback(partial(self._checked, conn))
        self._asked_idle += 1
        return verdict

    def _checked(self, conn: Any, verdict: asyncio.Future[bool]) -> None:
        self._asked_idle -= 1
        if not verdict.result():
            self._replace_dead([])  # this one was taken back; it may not be alone
        elif self._oversized or _compat.is_expired(self, conn, monotonic()):
            self._start_put_back(conn, from_getconn=True)
        else:
            self._between.end(conn._session)
            self._give(conn)

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
            for checkout in self._held
        )

    def ask_idle(self) -> asyncio.Future[bool] | None:
        """
        Ask the server on a connection that nobody waits for; None if none is free.

        The connection is kept, or replaced, when the answer has come.
        """
        idle = self._idle
        if not idle or self._line:
            return None
        conn = idle.popleft()
        _compat.note_idle_low(self, len(idle))
        return self._check_idle(conn)

    def _replace_dead(self, dead: list[Any]) -> None:
        """Replace *dead*, which were idle, and those of the idle ones that are dead as well."""
        idle = self._idle
        for conn in [c for c in idle if not c._session.is_quiet()]:
            idle.remove(conn)
            if _was_ended(conn):
                dead.append(conn)
            else:
                # Said something, which is read by now. It may have been its last words, and
                # the end still to come: it must not go back as it is, looking well.
                self._check_idle(conn)
        if not dead:
            return
        log("connections_replaced", pool=self.name, number=len(dead))
        for _ in dead:
            _compat.replace_lost(self, found_idle=True)

    def is_alive(self) -> bool:
        """Tell whether a connection may be handed out."""
        return self._state is _OPEN or self._state is _OPENING

    def is_right_server(self, conn: Any) -> bool:
        """Tell whether *conn* is of the kind of server that it was; it is replaced if not."""
        return self._failover.accept(conn)

    def take_back_unused(self, conn: Any) -> None:
        """Give a connection back that nobody has had; but `check` may have changed it."""
        if not isinstance(conn, RetiredConnection):
            conn = conn._session.successor(conn)
        self._start_put_back(conn, from_getconn=True)

    def lose(self, conn: Any) -> None:
        """End a connection that a task of the user's does not let go of, and replace it."""
        session: Session = conn._session
        retire(conn)
        shut_down(session.pgconn)
        self._replace(session)

    def _replace(self, session: Session) -> None:
        """Make a connection in place of *session*, which is gone; unless its life is over."""
        if session in self._between:
            self._between.end(session)
            if not self.closed:
                _compat.replace_lost(self)

    @property
    def sessions(self) -> Iterable[Session]:
        """The sessions of this life."""
        return self._sessions

    def look_at_idle(self) -> None:
        """Ask the server on each idle connection; keep or replace it when the answer has come."""
        idle = list(self._idle)
        self._idle.clear()
        for conn in idle:
            self._check_idle(conn)

    # --- suspected leaks --------------------------------------------------------------------

    def _watch_for_leaks(self) -> None:
        assert self._leak_threshold is not None
        every = min(max(self._leak_threshold / 4, 0.01), 1.0)
        self._leak_timer = asyncio.get_running_loop().call_later(
            every, weakly(self._watch_for_leaks), context=self._context
        )
        self._ledger.let_go()
        for checkout in self._ledger.overdue():
            checkout.reported = True
            stack = checkout.stack_text().rstrip()
            log("suspected_leak", checkout.facts(), self.counts(), pool=self.name, stack=stack)

    def take_back_dropped(self, conn: BoundConnection) -> None:
        """Take a connection back that was garbage-collected and not closed."""
        assert self._binding is not None
        loop = self._binding.loop
        session = conn._session
        if loop is None or loop.is_closed():
            return
        checkout = session.checkout
        if checkout is not None:
            checkout.structured = False  # who waits now is going to have it
        # The collector may run in any thread.
        fresh = session.successor(conn)
        with suppress(RuntimeError):  # the loop was closed meanwhile
            loop.call_soon_threadsafe(self._take_back, fresh, checkout)

    def _take_back(self, fresh: BoundConnection, checkout: Checkout | None) -> None:
        if isinstance(fresh, RetiredConnection):
            return
        if fresh._binding is not self._binding or self._state not in (_OPEN, _OPENING):
            fresh.pgconn.finish()  # its life is over, and another one may have begun
            return
        if checkout is not None:
            log("connection_dropped", checkout.facts(), pool=self.name)
            self._end_checkout(fresh._session, checkout)
            fresh._session.returned = checkout
        self._start_put_back(fresh)

    # --- release --------------------------------------------------------------------------

    @override
    @briefly
    async def putconn(self, conn: ACT) -> None:
        """
        Give *conn* back. It refuses every use from here on.

        The release runs to its end even if the caller is cancelled.

        Raises:
            ReleasedConnectionError: If it was given back before.
            LoopMismatchError: If called on another loop than the one that opened the pool.
            ValueError: If it does not come from this pool.
        """
        # On the way out with an error there is nothing to be told that the error does not tell.
        failing = sys.exc_info()[1] is not None
        if (unlocking := self.release(cast(Any, conn), failing, tells=not failing)) is not None:
            await asyncio.shield(unlocking)

    def release(
        self, conn: Any, roll_back: bool, *, tells: bool = False
    ) -> asyncio.Future[None] | None:
        """
        Give *conn* back: at once if it is clean, else in a task of the pool's own.

        A `reset` and what is to be put back is the pool's affair; but as long as a transaction
        is open there are locks, and its end is what the caller is to wait for: it is returned.

        Args:
            conn: What `take()` or `wait_for_connection()` gave.
            roll_back: True if its block has ended with an exception.
            tells: True if a roll-back of what was written is to be told.
        """
        if _compat.owner(conn) is not self or isinstance(conn, RetiredConnection):
            if isinstance(conn, RevokedConnection):
                return None  # close() took it back already
            if isinstance(conn, ReleasedConnection):
                raise conn.given_back_twice()
            self._check_pool_putconn(conn)  # raises
        # The connection's own binding: the pool may have been opened anew meanwhile.
        binding: LoopBinding = conn._binding
        loop = _get_running_loop()
        if loop is None or loop is not binding.owner_loop():
            raise binding.mismatch("give a connection back")
        if conn._under_way is not None:  # at_work, without the call
            self._discard_busy(conn)
            return None
        session: Session = conn._session
        # No cast(): that is a call.
        checkout: Checkout = conn._checkout  # pyright: ignore[reportAssignmentType]
        fresh = session.successor(conn)
        # Read only now: who begins to cancel from here on finds the handle released.
        cancelling = conn._cancelling
        now = self._end_checkout(session, checkout)
        pgconn = session.pgconn
        if (
            pgconn.transaction_status == IDLE
            and not cancelling
            and self._state is _OPEN
            and self._user_reset is None
            and (not checkout.used or session.parameters_unchanged)
            and pgconn.pipeline_status == NO_PIPELINE
            and not _compat.is_expired(self, fresh, now)
            and not self._oversized
        ):
            self._give(fresh)
            return None
        session.returned = checkout
        part_from_pipeline(conn)
        cleaning = self._start_put_back(
            fresh, roll_back=roll_back, tells=checkout if tells else None, cancelling=cancelling
        )
        if pgconn.transaction_status in (IDLE, UNKNOWN):
            return None
        session.unlocked = unlocked = loop.create_future()
        cleaning.add_done_callback(lambda _: _set_done(unlocked))
        return unlocked

    def _end_checkout(self, session: Session, checkout: Checkout) -> float:
        """Strike a checkout out, and return the time."""
        now = monotonic()
        self._ledger.ends(checkout, now)
        session.checkout = checkout.session = None
        if checkout.structured:
            self._usage_seconds += now - checkout.since
        if checkout.reported:
            log("suspected_leak_returned", checkout.facts(), pool=self.name)
        return now

    def _discard_busy(self, conn: BoundConnection) -> None:
        """
        End a connection that comes back while another task is at work on it.

        It may be idle as the server sees it (that task waits for notifications), and must not
        be handed on nevertheless: two tasks would read from one socket.
        """
        session = conn._session
        conn._given_back = Place.here()
        assert session.checkout is not None
        log("connection_busy", session.checkout.facts(), pool=self.name)
        self._end_checkout(session, session.checkout)
        _compat.set_owner(conn, None)
        last = remains(conn)
        retire(conn)
        self._between.begin(session, "returning", "stopping the query of another task")
        _compat.count(self, self._RETURNS_BAD)
        if session.pgconn.transaction_status == ACTIVE:
            # The server has it until the query ends: there shall not be one more meanwhile.
            ending = self.start_own_task(partial(_end_query, last))
            ending.add_done_callback(lambda _: self._replace(session))
        else:
            # Not closed: see _end_session().
            shut_down(session.pgconn)
            self._replace(session)
        self._note_freed()

    def _give(self, conn: Any) -> None:
        """Hand a clean connection to the task that waited longest, or keep it."""
        if not self._line or not self._line.offer(conn):
            self._idle.append(conn)

    async def _put_back(
        self,
        conn: Any,
        *,
        from_getconn: bool = False,
        roll_back: bool = False,
        tells: Checkout | None = None,
        cancelling: set[object] | None = None,
    ) -> None:
        """
        Give back a connection that may need work first.

        Args:
            conn: The handle for the next borrower.
            from_getconn: True if nobody had it yet.
            roll_back: True if its block has ended with an exception.
            tells: Of whom is to be told that what he wrote was rolled back.
            cancelling: The requests to cancel that its last borrower has begun.
        """
        session: Session = conn._session
        dangerous = False
        if cancelling:
            self._between.now(session, "waiting for a request to cancel")
            dangerous = not await _have_ended(cancelling)
        pgconn = conn.pgconn
        if dangerous:
            pgconn.finish()
        if pgconn.pipeline_status != NO_PIPELINE and not conn.leave_pipeline():
            log("connection_in_pipeline", pool=self.name)
            pgconn.finish()
        if pgconn.transaction_status == ACTIVE:
            self._between.now(session, "stopping a command")
            await conn.end_command()
        if pgconn.transaction_status in (INTRANS, INERROR):
            self._between.now(session, "in a rollback")
        if (roll_back or tells) and pgconn.transaction_status in (INTRANS, INERROR):
            # Shut down, the socket reads as closed by the server.
            timer = asyncio.get_running_loop().call_later(
                _checking.PROBE_TIMEOUT, shut_down, pgconn
            )
            try:
                if tells is None:
                    await conn.rollback()
                elif await _lost_work.roll_back(conn):
                    _lost_work.warn_of_uncommitted(self.name, tells)
                elif tells.failed_later:
                    _lost_work.warn_of_failed(self.name, tells)
            except Exception as ex:
                log("rollback_failed", pool=self.name, reason=in_words(ex))
            finally:
                timer.cancel()
        if isinstance(conn, RevokedConnection):
            return  # its life is over, and another one may have begun
        if self._oversized and self._is_surplus():
            _compat.forget_connections(self, 1)
            self.dismiss(conn)
        else:
            await _compat.put_back(self, conn, from_getconn=from_getconn)
        self._between.end(session)

    def _start_put_back(self, conn: Any, **how: Any) -> asyncio.Task[None]:
        """Give back a connection in a task of its own, which nobody's cancellation reaches."""
        if not isinstance(conn, RevokedConnection):
            self._between.begin(conn._session, "returning", "being put in order")
        task = self.start_own_task(partial(self._put_back, conn, **how))
        task.add_done_callback(partial(self._put_back_ended, conn))
        return task

    def _put_back_ended(self, conn: Any, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and task.exception() is None:
            return
        # Somebody cancelled every task there is, ours included: it is in nobody's hands now.
        if not self.closed and not isinstance(conn, RetiredConnection):
            self._end_session(conn._session)
            _compat.replace_lost(self)
        self._between.end(conn._session)

    def start_own_task(
        self,
        work: Callable[[], Coroutine[Any, Any, None]],
        name: str = "release",
        callers_context: bool = False,
    ) -> asyncio.Task[None]:
        """
        Start *work* in a task that `close()` waits for.

        In the context of `open()`, as all tasks of the pool's own: what they call of the user's
        (`configure`, `reset`) is to see nothing of the request that happens to be served. But
        for `check`, which is called for a request.
        """
        context = copy_context() if callers_context else self._context.copy()
        task = context.run(
            asyncio.get_running_loop().create_task, work(), name=f"{self.name}-{name}"
        )
        self._returning.add(task)
        task.add_done_callback(self._returned)
        return task

    def _returned(self, task: asyncio.Task[None]) -> None:
        self._returning.discard(task)
        self._note_freed()

    def _note_freed(self) -> None:
        if self._freed is not None:
            _set_done(self._freed)

    async def _clean(self, conn: Any) -> None:
        """Undo on the server what the borrower left; psycopg_pool calls this after rollback."""
        try:
            await self._put_in_order(conn)
        except Exception as ex:
            # It writes what it is told into its log, as it is.
            raise psycopg.OperationalError(in_words(ex)) from ex
        finally:
            if isinstance(conn, RevokedConnection):
                raise _LifeIsOver  # or it would be replaced, in the life that may have begun

    async def _put_in_order(self, conn: Any) -> None:
        session: Session = conn._session
        if session.unlocked is not None:
            _set_done(session.unlocked)
        refuses_writes = await self._cleaner.clean(conn)
        if not self._failover.accept(conn):
            return  # it is to be replaced
        if refuses_writes:
            self._failover.write_refused(conn)
        reset = self._user_reset
        if reset is not None and reset != "discard":
            self._between.now(session, "in the reset callback", reset)
            await reset(conn)

    # --- closing --------------------------------------------------------------------------

    @override
    @briefly
    async def close(self, timeout: float = 5.0) -> None:
        """
        Close the pool: refuse new work, let what runs finish, then end it.

        Waiting tasks get `ClosedError` at once. Connections in use may finish until *timeout*;
        after that their queries are cancelled, their sessions closed and their holders logged
        as late. The caller's own connections are not waited for. A second call returns when the
        first is done. If cancelled, it ends the pool without waiting any longer, then raises.

        Args:
            timeout: Seconds that connections in use may go on. A server that does not answer
                adds up to `CANCEL_GRACE`.

        Raises:
            LoopMismatchError: If called on another loop than the one that opened the pool, or
                in a forked process. If that loop is closed, sockets are closed nevertheless.
        """
        if self._state in (State.NEW, State.CLOSED):
            return
        assert self._binding is not None
        if self._binding.dead:
            error = self._binding.mismatch("close it")
            self._let_go()
            raise error
        self._binding.check("close it")
        if self._state is State.CLOSING:
            await self._until_ended()
            return
        await self._close(timeout, None)

    async def _close(self, timeout: float, failure: BaseException | None) -> None:
        """End the life; tell those who wait *failure*, or that the pool is closed."""
        self._state = State.CLOSING
        ended = self._ended = asyncio.get_running_loop().create_future()
        try:
            await self._end_life(timeout, failure)
        finally:
            # Whatever was raised, of the user's own or not: this life is over.
            try:
                self._stop_tasks()
                for session in self._sessions:
                    if not _at_work(session):
                        session.pgconn.finish()
            finally:
                # Only now: who opens the pool anew must not meet what is left of this life.
                self._state = State.CLOSED
                self._between.clear()
                ended.set_result(None)

    async def _end_life(self, timeout: float, failure: BaseException | None) -> None:
        self._line.refuse_all(failure or self._closed_error())
        self._tell_openers(failure or self._closed_error())
        if self.question is not None:
            self.question.refuse("the pool is closing")
        self._failover.stop()
        self._checks.end()
        farewells = [task for c in _compat.refuse_clients(self) if (task := self.dismiss(c))]
        interruption: asyncio.CancelledError | None = None
        begin = monotonic()
        try:
            await self._until_free(begin + timeout)
            if farewells:
                await asyncio.wait(farewells, timeout=CANCEL_GRACE)
        except asyncio.CancelledError as ex:
            interruption = ex
        waited = monotonic() - begin
        late = [
            f"{checkout}, held for {checkout.held_seconds:.1f} s" for checkout in self.checkouts()
        ]
        tasks = self._stop_tasks()
        if self._active():
            # In a task, so that no cancellation leaves the server at work.
            stopping = asyncio.create_task(self._stop_queries(), name=f"{self.name}-close")
            interruption = await self._settle([stopping]) or interruption
        for session in self._sessions:
            self._ignoring_errors(self._revoke, session)
            self._ignoring_errors(self._end_session, session)
        for task in tasks:
            task.cancel()  # once more: psycopg may still be trying to stop a query of its own
        interruption = await self._settle(tasks) or interruption
        if late:
            log(
                "closed_late",
                pool=self.name,
                waited_seconds=waited,
                number=len(late),
                late="; ".join(late),
            )
        if interruption is not None:
            raise interruption

    def _ignoring_errors(self, step: Callable[..., object], *arguments: object) -> None:
        """Take a *step* that others shall follow, whatever it raises."""
        try:
            step(*arguments)
        except Exception as ex:
            log("close_failed", pool=self.name, what="close()", reason=in_words(ex))

    def dismiss(self, conn: Any) -> asyncio.Task[None] | None:
        """End a connection that nobody holds; return the task of a close() of the user's own."""
        conn._session.in_pool = False
        if conn.closes_like_psycopg:
            conn.pgconn.finish()
            return None
        return self.start_own_task(partial(self.end_connection, conn), "close")

    @override
    async def end_connection(self, conn: Any) -> None:
        conn._session.in_pool = False
        try:
            _compat.set_owner(conn, None)  # close_returns is not meant here
            await conn.close()
        except Exception as ex:
            what = "close() of a connection"
            log("close_failed", pool=self.name, what=what, reason=in_words(ex))
        finally:
            self._end_session(conn._session)

    async def _until_free(self, deadline: float) -> None:
        """Wait until nobody but the caller holds a connection, or the deadline."""
        while self._returning or any(
            session.checkout and not session.checkout.by_this_task for session in self._sessions
        ):
            remaining = deadline - monotonic()
            if remaining <= 0:
                return
            self._freed = asyncio.get_running_loop().create_future()
            await asyncio.wait({self._freed}, timeout=remaining)

    async def _stop_queries(self) -> None:
        """
        Cancel what runs, and let its task roll back; within `CANCEL_GRACE`.

        A server does not look for a client that is gone before it has something to send: what
        is not cancelled goes on, and keeps its session. It forgets a request to cancel that
        arrives before the query does, so one is not enough; and the query's task may run
        another one, so at last it is not let.
        """
        begin = monotonic()
        pause = 0.05
        last = False
        while not last and (active := self._active()):
            elapsed = monotonic() - begin
            last = elapsed + pause > 0.75 * CANCEL_GRACE
            until = begin + (CANCEL_GRACE if last else elapsed + pause)
            requests = [asyncio.create_task(_request_cancel(session)) for session in active]
            if last:
                # In this order: to cancel what a revoked connection runs does nothing.
                for session in self._sessions:
                    asyncio.get_running_loop().call_soon(
                        self._ignoring_errors, self._revoke, session
                    )
            await asyncio.wait(requests, timeout=until - monotonic())
            for request in requests:
                request.cancel()
            await asyncio.wait(requests)
            # libpq has no event for it: the task of the query reads the answer.
            while monotonic() < until and self._active():  # noqa: ASYNC110
                await asyncio.sleep(0.005)
            pause *= 2

    def _active(self) -> list[Session]:
        """Return the sessions that run a query."""
        return [s for s in self._sessions if s.pgconn.transaction_status == ACTIVE and s.handle]

    def _revoke(self, session: Session) -> None:
        """Take a connection from whoever uses it."""
        handle, pgconn = session.handle, session.pgconn
        if session.checkout is not None:
            self._end_checkout(session, session.checkout)
        if handle is None or isinstance(handle, RetiredConnection):
            return
        if pgconn.status != BAD:
            handle._lost_work = pgconn.transaction_status != IDLE
        revoke(handle)

    def _end_session(self, session: Session) -> None:
        if _at_work(session):
            # Closing the socket would free its descriptor under the event loop's feet; shut
            # down, it reads as closed by the server.
            shut_down(session.pgconn)
        else:
            session.pgconn.finish()

    def _stop_tasks(self) -> list[asyncio.Task[None]]:
        """Stop the tasks of this life, which are returned, and close what is idle. Synchronous."""
        idle, tasks = _compat.end_life(self)
        tasks += [*self._returning, *self._connector.stop()]
        self._stop_timers()
        for task in tasks:
            task.cancel()
        for conn in idle:
            conn.pgconn.finish()
        return tasks

    def _stop_timers(self) -> None:
        self._clock.stop()
        self._storm.end()
        self._checks.stop()
        if self._leak_timer is not None:
            self._leak_timer.cancel()
        if self._slow_callbacks is not None:
            self._slow_callbacks.stop()

    async def _settle(self, tasks: Iterable[asyncio.Task[None]]) -> asyncio.CancelledError | None:
        """
        Wait until *tasks*, which were told to stop, have; return a cancellation met meanwhile.

        None of them can take longer than `CANCEL_GRACE`, but for callbacks of the user's.
        """
        interruption: asyncio.CancelledError | None = None
        pending: set[asyncio.Task[None]] = {task for task in tasks if not task.done()}
        until = monotonic() + 2 * CANCEL_GRACE
        while pending and (remaining := until - monotonic()) > 0:
            try:
                _, pending = await asyncio.wait(pending, timeout=remaining)
            except asyncio.CancelledError as ex:
                interruption = ex
                pending = {task for task in pending if not task.done()}
        if pending:
            names = ", ".join(sorted(task.get_name() for task in pending))
            log("tasks_left", pool=self.name, tasks=names)
        return interruption

    async def _until_ended(self) -> None:
        assert self._ended is not None
        await asyncio.shield(self._ended)

    def _let_go(self) -> None:
        """Abandon a life whose loop is dead, unless another thread has just begun a new one."""
        with beginning():
            if self._binding is not None and self._binding.dead and self._state is not _CLOSED:
                self._abandon()

    def _abandon(self) -> None:
        """
        Let go of a life whose loop will never run again, or that is another process's.

        In the same process the sessions are ended, which needs no loop. In a forked child
        nothing is touched, and all of it is kept: to close or finalise it would be to write
        into the parent's sessions and its selector.
        """
        assert self._binding is not None
        sessions = list(self._sessions)
        _, tasks = _compat.end_life(self)
        tasks += [*self._returning, *self._connector.abandon()]
        if self._slow_callbacks is not None:
            self._slow_callbacks.stop()
        for task in tasks:
            _compat.forget_task(task)
        if self._binding.forked:
            inherited.append((sessions, tasks, self._line, vars(self).copy()))
        else:
            for session in sessions:
                self._revoke(session)
                session.pgconn.finish()
            for task in tasks:
                # Its awaits end in "Event loop is closed".
                with suppress(BaseException):
                    cast(Any, task.get_coro()).close()
        self._state = State.CLOSED

    # --- refusals -------------------------------------------------------------------------

    def _check_usable(self, purpose: str) -> None:
        """Return if the pool may be used here and now for *purpose*, raise otherwise."""
        if self._state is State.NEW or self._binding is None:
            raise NotOpenError(
                f'pool "{self.name}" is not open',
                detail=f"Used {Place.here()} to {purpose}, before any open().",
                hint='Open it first: "async with manager:" or "await manager.open()", in the'
                " start-up hook of the framework. Test clients that skip the lifespan skip"
                f" that too. {see('not-open')}",
            )
        if self._state is State.CLOSED:
            raise self._closed_error(purpose)
        self._binding.check(purpose)
        if self._state is State.CLOSING:
            raise self._closed_error(purpose)

    def out_of_service(self, purpose: str) -> str | None:
        """Do as `_check_usable()`, but return in words that it is not open."""
        if self._state is State.NEW or self._binding is None:
            return "the pool is not open"
        if self._state is State.CLOSED:
            return "the pool is closed"
        self._binding.check(purpose)
        return "the pool is closing" if self._state is State.CLOSING else None

    def _closed_error(self, purpose: str = "") -> ClosedError:
        used = f" Used {Place.here()} to {purpose}." if purpose else ""
        opened = f"Opened {self.opened}." if self.opened else ""
        word = "closing" if self._state is State.CLOSING else "closed"
        return ClosedError(
            f'pool "{self.name}" is {word}',
            detail=f"{opened}{used}",
            hint=f"open() opens it again. {see('closed')}",
        )

    @override
    @briefly
    async def resize(self, min_size: int, max_size: int | None = None) -> None:
        """
        Change `min_size` and `max_size`; for this life, not for one after `close()`.

        Tasks that wait are served as soon as there is room for more connections. Those that are
        too many are closed now where they are idle, the others when they come back.
        """
        self._check_usable("resize it")
        _compat.resize(self, min_size, max_size)
        self._oversized = True
        self._close_surplus()
        if self._state is _OPEN and self._has_minimum:
            self._tell_openers(None)
        if self._line:
            self._help_growth()

    def _is_surplus(self) -> bool:
        """Tell whether there are more connections than `max_size`."""
        self._oversized = _compat.total(self) > self.max_size
        return self._oversized

    def _close_surplus(self) -> None:
        """Close idle connections as long as there are more than `max_size`."""
        while self._is_surplus() and self._idle:
            _compat.forget_connections(self, 1)
            self.dismiss(self._idle.popleft())
            _compat.note_idle_low(self, len(self._idle))

    @override
    @briefly
    async def drain(self) -> None:
        """Replace every connection: idle ones now, the others when they come back."""
        self._check_usable("drain it")
        for conn in _compat.drain(self):
            self.dismiss(conn)
            _compat.replace_lost(self)

    @override
    @briefly
    async def check(self) -> None:
        """Test the idle connections and replace those that do not work."""
        self._check_usable("check it")
        # Not psycopg_pool's: that one swallows a cancellation, and waits for a silent server for
        # as long as psycopg does, with all idle connections out of everybody's reach.
        self._connector.go_on()
        self._mend()
        idle = list(self._idle)
        self._idle.clear()
        if checks := [self._check_idle(conn) for conn in idle]:
            await asyncio.wait(checks)


class _LifeIsOver(BaseException):
    """Ends a release; psycopg_pool goes on after any other exception, a cancellation too."""


class CheckoutContext(AbstractAsyncContextManager[ACT]):
    """
    What `connection()` returns. Can be entered once, or decorate a function.

    Args:
        pool: Where to acquire.
        timeout: Seconds to wait; None for the pool's own.
        frame: Where it was asked for, or on whose behalf.
        enclosed: True if it is certain that the task that enters leaves it as well.
    """

    __slots__ = ("_conn", "_enclosed", "_frame", "_lineno", "_pool", "_timeout")

    def __init__(
        self,
        pool: BoundPool[ACT],
        timeout: float | None,
        frame: FrameType | Behalf,
        enclosed: bool = False,
    ) -> None:
        self._pool = pool
        self._timeout = timeout
        self._frame: Any = frame
        """A frame until it is entered, then the code of it: a frame keeps its variables alive."""
        self._lineno = frame.f_lineno
        self._enclosed = enclosed

    def __call__(
        self, function: Callable[P, Coroutine[Any, Any, T]]
    ) -> Callable[P, Coroutine[Any, Any, T]]:
        """Return *function* with a block, and so a connection, of its own around each call."""
        again = self.for_calls_of(function)

        @wraps(function)
        async def in_block(*args: P.args, **kwargs: P.kwargs) -> T:
            async with again(sys._getframe()):
                return await function(*args, **kwargs)

        return in_block

    def for_calls_of(
        self, function: Callable[..., object]
    ) -> Callable[[FrameType], CheckoutContext[ACT]]:
        """Return what makes one like this, for *function*, which the frame calls."""
        pool, timeout, code = self._pool, self._timeout, code_behind(function)
        self._frame = None  # a frame keeps all its variables alive
        return lambda frame: CheckoutContext(
            pool, timeout, Behalf(code, frame) if code else frame, True
        )

    @override
    async def __aenter__(self) -> ACT:
        pool, frame = self._pool, self._frame
        self._frame = frame.f_code
        structured = self._enclosed
        if not structured:
            entering = sys._getframe(1)
            structured = entering is frame or not _by_exit_stack(entering)
        try:
            conn = pool.take(frame, self._lineno, structured)
            if conn is None:
                conn = await pool.wait_for_connection(
                    self._timeout, frame, self._lineno, structured
                )
        except PoolkeeperError as ex:
            raise ex.with_traceback(None)  # noqa: B904 - see briefly()
        self._conn: Any = conn
        return conn  # type: ignore[no-any-return]

    @override
    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        conn, pool = self._conn, self._pool
        if exc_type is not None and conn._binding.forked:
            return  # the block is the parent's; the child ends with its own error
        roll_back = True  # what is still open then, by an error or a commit that was cancelled
        try:
            if conn.exits_like_psycopg:
                # What AsyncConnection.__aexit__() does: nothing when nothing is open, else
                # commit here, or roll back; that is part of the release, which nobody cancels.
                if exc_type is None and (
                    conn.pgconn.transaction_status != IDLE or conn.is_in_block()
                ):
                    if conn.closed:
                        _lost_work.raise_if_lost(conn)
                        return
                    if conn.lock.locked() and not await conn.may_go_on():
                        conn = conn._session.in_place_of(conn)
                        await conn.end_command(LEFT_OPEN)
                    failed = _lost_work.has_failed(conn)
                    await conn.commit()
                    if failed:  # so that was a roll-back
                        _lost_work.warn_of_failed(pool.name, conn._checkout)
            elif isinstance(conn, RevokedConnection):
                if exc_type is None and vars(conn).get("_lost_work"):
                    raise conn.refusal()
            else:
                if exc_type is None and conn.lock.locked() and not await conn.may_go_on():
                    conn = conn._session.in_place_of(conn)
                    await conn.end_command(LEFT_OPEN)
                lost, failed = conn.closed, _lost_work.has_failed(conn)
                await conn.__aexit__(exc_type, exc, traceback)
                roll_back = False  # what the user's own leaves open, psycopg_pool tells of
                if exc_type is None and lost:
                    _lost_work.raise_if_lost(conn)
                elif exc_type is None and failed:
                    _lost_work.warn_of_failed(pool.name, conn._checkout)
        except PoolkeeperError as ex:
            raise ex if ex is exc else ex.with_traceback(None)  # noqa: B904 - see briefly()
        finally:
            unlocking = pool.release(conn, roll_back)
            if unlocking is not None:
                await asyncio.shield(unlocking)


class Block(AbstractAsyncContextManager[T]):
    """
    What runs a generator around a block, on a connection of its own; can decorate a function.

    As contextlib's, but a function that it decorates is named as the one that acquires, and the
    traceback of an error of ours ends at the line of the block.

    Args:
        generator: Yields once, with the connection of the checkout that is its first argument.
        checkout: That.
        arguments: The others.
    """

    __slots__ = ("_arguments", "_checkout", "_generator", "_running")

    def __init__(
        self,
        generator: Callable[..., AsyncGenerator[T]],
        checkout: CheckoutContext[Any],
        *arguments: object,
    ) -> None:
        self._generator = generator
        self._checkout = checkout
        self._arguments = arguments

    def __call__(
        self, function: Callable[P, Coroutine[Any, Any, Returned]]
    ) -> Callable[P, Coroutine[Any, Any, Returned]]:
        """Return *function* with such a block of its own around each call."""
        again = self._checkout.for_calls_of(function)

        @wraps(function)
        async def in_block(*args: P.args, **kwargs: P.kwargs) -> Returned:
            async with Block(self._generator, again(sys._getframe()), *self._arguments):
                return await function(*args, **kwargs)

        return in_block

    @override
    async def __aenter__(self) -> T:
        self._running = asynccontextmanager(self._generator)(self._checkout, *self._arguments)
        try:
            return await self._running.__aenter__()
        except PoolkeeperError as ex:
            raise ex.with_traceback(None)  # noqa: B904 - see briefly()

    @override
    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> bool | None:
        try:
            return await self._running.__aexit__(exc_type, exc, traceback)
        except PoolkeeperError as ex:
            raise ex if ex is exc else ex.with_traceback(None)  # noqa: B904 - see briefly()


async def _end_query(conn: BoundConnection) -> None:
    """
    Let the server stop what runs on a connection, which goes on there otherwise; end it.

    It forgets a request to cancel that arrives before the query does, so one is not enough: ask
    until it answers, within `CANCEL_GRACE`.
    """
    pgconn = conn.pgconn
    until = monotonic() + CANCEL_GRACE
    pause = 0.01
    try:
        unanswered = pgconn.transaction_status == ACTIVE
        while unanswered and (left := until - monotonic()) > 0:
            with suppress(Exception):
                await conn.request_cancel(left)
            ask_again = min(until, monotonic() + pause)
            # libpq has no event for it: the task of the query, if it still reads, has the answer.
            while (unanswered := _is_unanswered(conn)) and monotonic() < ask_again:  # noqa: ASYNC110
                await asyncio.sleep(0.005)
            pause *= 2
    finally:
        if pgconn.status != BAD:
            shut_down(pgconn)


async def _have_ended(requests: set[object]) -> bool:
    """Tell whether *requests* to cancel, which would stop the next query, end in `CANCEL_GRACE`."""
    until = monotonic() + CANCEL_GRACE
    # Some of them may be made in other threads.
    while requests and monotonic() < until:  # noqa: ASYNC110
        await asyncio.sleep(0.001)
    return not requests


def _is_unanswered(conn: BoundConnection) -> bool:
    """Tell whether a query runs, of which the server has said nothing that was not read yet."""
    return conn.pgconn.transaction_status == ACTIVE and conn._session.is_quiet()


async def _request_cancel(session: Session) -> None:
    if (handle := session.handle) is not None:
        with suppress(Exception):
            await handle.request_cancel(CANCEL_GRACE)


_ENTERS_BLOCK = cast(Any, Block).__aenter__.__code__
_ENTERS_STACK = AsyncExitStack.enter_async_context.__code__


def _by_exit_stack(entering: FrameType) -> bool:
    """Tell whether an AsyncExitStack enters: it may be handed on, to a task that gives back."""
    driver = entering.f_back
    if driver is not None and driver.f_globals.get("__name__") == "contextlib":
        # transaction(), cursor() or the like: contextlib runs their generator.
        outside = driver.f_back
        if outside is not None and outside.f_code is _ENTERS_BLOCK:
            outside = outside.f_back
        return outside is not None and outside.f_code is _ENTERS_STACK
    return entering.f_code is _ENTERS_STACK


def _set_done(future: asyncio.Future[None]) -> None:
    """Wake who waits for *future*; it may be done already."""
    if not future.done():
        future.set_result(None)


def _at_work(session: Session) -> bool:
    """Tell whether a task is at work on the socket of *session*, so that the loop watches it."""
    handle = session.handle
    return handle is not None and session.pgconn.status != BAD and handle.at_work


def _milliseconds(seconds: float, rest: float) -> tuple[int, float]:
    """Return the whole milliseconds in *seconds* and the *rest* of before, and what is left."""
    rest, whole = modf(seconds * 1000 + rest)
    return int(whole), rest


def _clear_frames(error: BaseException | None) -> None:
    """Let go of what the functions that *error* has ended had in their variables."""
    while error is not None:
        clear_frames(error.__traceback__)
        error = error.__context__


def _tasks_wait(number: int) -> str:
    return "1 task waits" if number == 1 else f"{number} tasks wait"


def _attempts(number: int) -> str:
    return f"{number} attempt{'' if number == 1 else 's'}"


def _was_ended(conn: Any) -> bool:
    """Read what came on an idle connection, and tell whether that was its end."""
    try:
        conn.pgconn.consume_input()
    except psycopg.OperationalError:
        return True
    return bool(conn.pgconn.status == BAD)
