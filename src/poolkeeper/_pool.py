"""
`BoundPool`: an `AsyncConnectionPool` that keeps its promises.

psycopg_pool makes, replaces, expires and shrinks connections, in tasks of its own. What a
caller touches is done here: open, acquire, release, close, each of them checked against the
event loop and the process that opened the pool.

A pool lives from `open()` to `close()`, and may live again: a *life* has one binding, one line
of waiters, one connection class. What a life owned is gone when it ends.
"""

from __future__ import annotations

import asyncio
import logging
import sys
import weakref
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from contextlib import AbstractAsyncContextManager, suppress
from enum import StrEnum
from inspect import isawaitable
from time import monotonic
from types import CodeType, TracebackType
from typing import Any, Literal, TypeAlias, cast

import psycopg
from psycopg import AsyncConnection, pq, sql
from psycopg.rows import TupleRow
from psycopg_pool import AsyncConnectionPool
from typing_extensions import TypeVar, override

from . import _compat, _recovery
from ._binding import LoopBinding, inherited
from ._checkouts import Checkout, Line, Waiter
from ._connection import (
    CANCEL_GRACE,
    BoundConnection,
    ReleasedConnection,
    RetiredConnection,
    RevokedConnection,
    Session,
    bound_class,
    retire,
    revoke,
    shut_down,
)
from ._conninfo import normalise, parse
from ._where import Place
from .errors import (
    AcquireTimeout,
    ClosedError,
    NotOpenError,
    OpenError,
    TooManyWaitersError,
    see,
)

ACT = TypeVar("ACT", bound=AsyncConnection[Any], default=AsyncConnection[TupleRow])
ConnectionCallback: TypeAlias = Callable[[Any], Awaitable[None]]

logger = logging.getLogger("poolkeeper")

IDLE = pq.TransactionStatus.IDLE
ACTIVE = pq.TransactionStatus.ACTIVE
BAD = pq.ConnStatus.BAD
NO_PIPELINE = pq.PipelineStatus.OFF


class State(StrEnum):
    """Where a pool is in its life."""

    NEW = "new"
    OPENING = "opening"
    OPEN = "open"
    CLOSING = "closing"
    CLOSED = "closed"


class BoundPool(AsyncConnectionPool[ACT]):
    """
    The pool behind a `PoolManager`; a real `AsyncConnectionPool`, with every guard.

    Made by the manager, which documents the parameters. Can be handed to any library that
    asks for an `AsyncConnectionPool`, before it is opened too.

    .. versionadded:: 0.1.0
    """

    def __init__(
        self,
        conninfo: Any,
        *,
        connection_class: type[ACT],
        kwargs: Any,
        application_name: str | None,
        configure: ConnectionCallback | None,
        check: ConnectionCallback | None,
        reset: ConnectionCallback | Literal["discard"] | None,
        **settings: Any,
    ) -> None:
        self._user_class = connection_class
        self._user_configure = configure
        self._user_check = check
        self._user_reset: ConnectionCallback | Literal["discard"] | None = reset
        self._application_name = application_name
        self._state = State.NEW
        self._binding: LoopBinding | None = None
        self._line = Line()
        self._settings: dict[str, Any] = {
            "conninfo": self._told_of_errors(conninfo) if callable(conninfo) else conninfo,
            "kwargs": self._told_of_errors(kwargs) if callable(kwargs) else kwargs,
            "connection_class": connection_class,
            "configure": self._prepare,
            "check": check,
            "reset": self._clean,
            **settings,
        }
        _compat.begin_life(self, self._line, self._settings)
        self._settings["name"] = self.name
        self._forget_life()

    def _forget_life(self) -> None:
        """Set what belongs to one life to what it is before the first connection."""
        self._sessions: weakref.WeakSet[Session] = weakref.WeakSet()
        self._openers: set[asyncio.Future[BaseException | None]] = set()
        self._returning: set[asyncio.Task[None]] = set()
        self._prepared = 0
        self._attempts_pending = 0
        self._attempts_failed = 0
        self._last_error: BaseException | None = None
        self._freed: asyncio.Future[None] | None = None
        self._ended: asyncio.Future[None] | None = None
        self._wanted = False  # by somebody who does not wait for it, or not any more

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
        """Return total, in use, idle, max and waiting, in that order. Instantaneous."""
        in_use = sum(session.checkout is not None for session in self._sessions)
        idle = len(_compat.idle(self))
        return {
            "total": in_use + idle,
            "in_use": in_use,
            "idle": idle,
            "max": self.max_size,
            "waiting": len(self._line),
        }

    def checkouts(self) -> list[Checkout]:
        """Return who holds a connection, longest first."""
        held = [session.checkout for session in self._sessions if session.checkout]
        return sorted(held, key=lambda checkout: checkout.since)

    @override
    def __repr__(self) -> str:
        numbers = " ".join(f"{name}={value}" for name, value in self.counts().items())
        return f'<poolkeeper.BoundPool "{self.name}" {self.state.value} {numbers}>'

    # --- opening --------------------------------------------------------------------------

    @override
    async def open(self, wait: bool = False, timeout: float = 30.0) -> None:
        """
        Open the pool and bind it to the running event loop.

        On a pool that is open here, do nothing but wait as asked. On one that was closed, or
        whose loop is closed, or that was opened in a parent process, begin a new life.

        Args:
            wait: Return when `min_size` connections work, instead of at once.
            timeout: Seconds to wait for them.

        Raises:
            LoopMismatchError: If it is open on another loop, which is not closed.
            OpenError: If the connections cannot be made, or not in time. The pool is closed.
        """
        while self._state is State.CLOSING and self._alive_here("opened"):
            await self._until_ended()
        if self._state not in (State.OPENING, State.OPEN) or not self._alive_here("opened"):
            self._begin_life()
            await super().open()
            _compat.make_scheduler_endable(self)
        if wait:
            await self._until_ready(timeout)
        else:
            self._wanted = True

    @override
    async def wait(self, timeout: float = 30.0) -> None:
        """
        Wait until `min_size` connections work. May be called by several tasks, and again.

        Raises:
            OpenError: If they cannot be made, or not within *timeout* seconds. The pool is
                closed, unless another task still waits for it.
        """
        self._check_usable("waited for")
        await self._until_ready(timeout)

    def _alive_here(self, doing: str) -> bool:
        """Tell whether the current life goes on; raise if it goes on elsewhere."""
        assert self._binding is not None
        if self._binding.dead:
            return False
        self._binding.check(doing)
        return True

    def _begin_life(self) -> None:
        binding = LoopBinding(self.name)  # raises where no pool can be opened
        if self._state is not State.NEW:
            if self._state is not State.CLOSED:
                self._abandon()
            self._line = Line()
            _compat.begin_life(self, self._line, self._settings)
        self._forget_life()
        self._binding = binding
        binding.pool = weakref.ref(self)
        self.connection_class = cast(
            "type[ACT]", bound_class(cast(Any, self._user_class), self, binding)
        )
        self._state = State.OPENING
        if self.min_size == 0:
            self._state = State.OPEN

    async def _until_ready(self, timeout: float) -> None:
        if self._state is State.OPEN:
            self._wanted = True
            return
        life = self._binding
        opener: asyncio.Future[BaseException | None] = asyncio.get_running_loop().create_future()
        self._openers.add(opener)
        try:
            if self._last_error is not None and _recovery.is_permanent(self._last_error):
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
            raise failure
        self._wanted = True

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

    def _open_error(self, timeout: float | None) -> OpenError:
        """Return why the pool could not be opened: *timeout* seconds passed, or it never will."""
        cause = self._last_error
        if cause is not None:
            why = _recovery.reason(cause)
            hint = _recovery.advice(cause)
        elif self._attempts_pending:
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
            f" {_attempts(self._attempts_failed)} failed, {self._attempts_pending} had no answer"
            f" yet. Opened {self._binding.opened}.",
            hint=f"{hint} {see('open')}",
        )
        if cause is not None:
            error.__cause__ = cause.with_traceback(None)
        return error

    # --- what psycopg_pool's workers tell -------------------------------------------------

    @override
    @classmethod
    async def worker(cls, q: Any) -> None:
        """Run maintenance work until told to stop, or cancelled."""
        await _compat.run_worker(super().worker, q)

    def connect_parameters(self, conninfo: str, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Return the parameters of one connection attempt."""
        conninfo = normalise(conninfo)
        parse(conninfo)  # what a function returned: psycopg's own error may quote the password
        parameters = {"conninfo": conninfo, **kwargs}
        if self._application_name is not None:
            parameters["application_name"] = self._application_name
        elif "fallback_application_name" not in kwargs:
            # libpq uses it where neither conninfo nor PGAPPNAME says otherwise.
            parameters["fallback_application_name"] = f"poolkeeper:{self.name}"
        return parameters

    def attempt_begins(self) -> None:
        """Note that a connection attempt has started."""
        self._attempts_pending += 1

    def attempt_ended(self, error: BaseException | None) -> None:
        """Note that a connection attempt has ended."""
        self._attempts_pending -= 1
        if error is not None:
            self._attempt_failed(error)

    def session_begins(self, session: Session) -> None:
        """Note a new server session."""
        self._sessions.add(session)

    def _attempt_failed(self, error: BaseException) -> None:
        if not isinstance(error, Exception):
            return  # cancelled: the attempt was given up, it did not fail
        self._attempts_failed += 1
        self._last_error = error
        if self._openers and _recovery.is_permanent(error):
            self._tell_openers(self._open_error(None))

    def _told_of_errors(
        self, function: Callable[[], Any]
    ) -> Callable[[], Coroutine[Any, Any, Any]]:
        """Return *function*, which gives conninfo or kwargs, made to tell us when it fails."""

        async def told() -> Any:
            try:
                value = function()
                return await value if isawaitable(value) else value
            except Exception as ex:
                self._attempt_failed(ex)
                raise

        return told

    async def _prepare(self, conn: Any) -> None:
        """Configure a new connection; psycopg_pool calls this in a worker."""
        try:
            if self._user_configure is not None:
                with _compat.cancellation_ends_worker():
                    await self._user_configure(conn)
                if (status := conn.pgconn.transaction_status) != IDLE:
                    raise psycopg.ProgrammingError(
                        "the configure callback left the connection in status"
                        f" {pq.TransactionStatus(status).name}: commit at its end, or set"
                        " autocommit"
                    )
        except BaseException as ex:
            self._attempt_failed(ex)
            # psycopg_pool drops it, but the traceback of what we keep holds on to it.
            self._end_session(conn._session)
            raise
        self._prepared += 1
        self._last_error = None
        if self._state is State.OPENING and self._prepared >= self.min_size:
            # Not now: psycopg_pool has yet to add the connection, which it does without
            # giving way to the loop.
            asyncio.get_running_loop().call_soon(self._note_ready)

    def _note_ready(self) -> None:
        if self._state is State.OPENING:
            self._state = State.OPEN
            self._tell_openers(None)

    # --- acquire --------------------------------------------------------------------------

    @override
    def connection(  # type: ignore[override]  # pyright: ignore[reportIncompatibleMethodOverride]
        self, timeout: float | None = None
    ) -> AbstractAsyncContextManager[ACT]:
        """
        Return a context manager that acquires a connection and gives it back.

        Commits on success and rolls back on an exception, as psycopg_pool's does. For
        arguments and errors see `getconn()`.
        """
        frame = sys._getframe(1)
        return CheckoutContext(self, timeout, frame.f_code, frame.f_lineno)

    @override
    async def getconn(self, timeout: float | None = None) -> ACT:
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
        frame = sys._getframe(1)
        return await self.acquire(timeout, frame.f_code, frame.f_lineno)

    async def acquire(self, timeout: float | None, code: CodeType, lineno: int) -> ACT:
        """Do as `getconn()`, for the line of code that is named."""
        if self._binding is None or not self._binding.is_here() or self._state is not State.OPEN:
            self._check_usable("acquired from")
        if timeout is None:
            timeout = self.timeout
        deadline = monotonic() + timeout
        _compat.count(self, self._REQUESTS_NUM)
        pause = 0.0
        while True:
            conn: Any
            idle = _compat.idle(self)
            if idle and not self._line:
                conn = idle.popleft()
                _compat.note_idle_low(self)
            else:
                conn = await self._wait_in_line(timeout, deadline)
            session: Session = conn._session
            try:
                session.settle(conn)
            except psycopg.OperationalError:
                # Found closed before anybody had it, by check() for one.
                await self._in_own_task(self._put_back(conn, from_getconn=True))
                continue
            if self._user_check is None or await self._passes_check(conn):
                break
            self._check_usable("acquired from")
            # A broken connection is replaced, so there is an end to them. One that works and
            # fails the check comes back to the pool: do not spin on it.
            if monotonic() >= deadline:
                raise self._acquire_timeout(timeout)
            if conn.pgconn.status != BAD:
                pause = min(max(0.01, pause * 2), 0.25)
                await asyncio.sleep(pause)
        session.checkout = conn._checkout = Checkout(code, lineno)
        _compat.set_owner(conn, self)
        return cast(ACT, conn)

    async def _wait_in_line(self, timeout: float, deadline: float) -> Any:
        if self.max_waiting and len(self._line) >= self.max_waiting:
            _compat.count(self, self._REQUESTS_ERRORS)
            raise TooManyWaitersError(
                f'pool "{self.name}" has {len(self._line)} tasks waiting already',
                detail=self._numbers() + f". max_waiting={self.max_waiting}.",
                hint=f"Let the caller try again later. {see('too-many-waiters')}",
            )
        remaining = deadline - monotonic()
        if remaining <= 0:
            _compat.count(self, self._REQUESTS_ERRORS)
            raise self._acquire_timeout(timeout)
        loop = asyncio.get_running_loop()
        waiter = Waiter(loop)
        self._line.append(waiter)
        _compat.count(self, self._REQUESTS_QUEUED)
        _compat.grow(self)
        since = monotonic()
        timer = loop.call_later(remaining, self._time_out, waiter, timeout)
        try:
            conn = await waiter.future
        except BaseException:
            self._line.leave(waiter)
            served = waiter.future.done() and not waiter.future.cancelled()
            if served and waiter.future.exception() is None:
                # Cancelled in the same turn of the loop in which it was served.
                self._give(waiter.future.result())
            _compat.count(self, self._REQUESTS_ERRORS)
            raise
        finally:
            timer.cancel()
            _compat.count(self, self._REQUESTS_WAIT_MS, int((monotonic() - since) * 1000))
        if self._state not in (State.OPEN, State.OPENING):
            conn.pgconn.finish()
            raise self._closed_error()
        return conn

    def _time_out(self, waiter: Waiter, timeout: float) -> None:
        if not waiter.future.done():
            self._line.leave(waiter)
            waiter.refuse(self._acquire_timeout(timeout))

    async def _passes_check(self, conn: Any) -> bool:
        assert self._user_check is not None
        passed = False
        try:
            await self._user_check(conn)
            # The pool may be closing by now, or may have been closed and opened anew.
            passed = self._state is not State.CLOSING and not conn.closed
        except Exception as ex:
            logger.info('a connection of pool "%s" failed its check: %s', self.name, ex)
        finally:
            if not passed:
                await self._in_own_task(self._put_back(conn, from_getconn=True))
        return passed

    def _acquire_timeout(self, timeout: float) -> AcquireTimeout:
        held = self.checkouts()
        counts = self.counts()
        cause = self._last_error
        if counts["in_use"] >= self.max_size:
            why = "all connections are in use"
            hint = "Keep a connection only while it works: not across HTTP calls or streams."
        elif cause is not None:
            why = f"no connection can be made: {_recovery.reason(cause)}"
            hint = _recovery.advice(cause)
        else:
            why = "the pool is making more connections"
            hint = "Give min_size more connections to start with, or the caller more time."
        oldest = f" Longest checkout: {held[0].held_seconds:.1f} s {held[0]}." if held else ""
        error = AcquireTimeout(
            f'could not acquire a connection from pool "{self.name}" within {timeout:.2f} s: {why}',
            detail=f"{self._numbers()}.{oldest}",
            hint=f"{hint} {see('acquire-timeout')}",
        )
        if cause is not None:
            error.__cause__ = cause.with_traceback(None)
        return error

    def _numbers(self) -> str:
        return " ".join(f"{name}={value}" for name, value in self.counts().items())

    # --- release --------------------------------------------------------------------------

    @override
    async def putconn(self, conn: ACT) -> None:
        """
        Give *conn* back. It refuses every use from here on.

        The release runs to its end even if the caller is cancelled.

        Raises:
            ReleasedConnectionError: If it was given back before.
            LoopMismatchError: If called on another loop than the one that opened the pool.
            ValueError: If it does not come from this pool.
        """
        if (cleaning := self._release(cast(Any, conn))) is not None:
            await asyncio.shield(cleaning)

    def _release(self, conn: BoundConnection) -> asyncio.Task[None] | None:
        """Give *conn* back at once if it is clean; else return the task that does it."""
        if isinstance(conn, RevokedConnection):
            return None  # close() took it back already
        if isinstance(conn, ReleasedConnection):
            raise conn.refusal("given back again")
        self._check_pool_putconn(conn)
        # The connection's own binding: the pool may have been opened anew meanwhile.
        if not conn._binding.is_here():
            raise conn._binding.mismatch("given a connection back")
        if conn.at_work:
            self._discard_busy(conn)
            return None
        session = conn._session
        fresh = session.successor(conn)
        pgconn = session.pgconn
        if (
            pgconn.transaction_status == IDLE
            and self._user_reset is None
            and session.parameters_unchanged
            and pgconn.pipeline_status == NO_PIPELINE
            and not _compat.is_expired(self, fresh)
            and (self._state is State.OPEN or self._state is State.OPENING)
        ):
            self._give(fresh)
            return None
        return self._start_own_task(self._put_back(fresh))

    def _discard_busy(self, conn: BoundConnection) -> None:
        """
        End a connection that comes back while another task is at work on it.

        It may be idle as the server sees it (that task waits for notifications), and must not
        be handed on nevertheless: two tasks would read from one socket.
        """
        session = conn._session
        logger.warning(
            'a connection of pool "%s" came back while another task was at work on it: closed.'
            " Acquired %s",
            self.name,
            session.checkout,
        )
        session.checkout = None
        _compat.set_owner(conn, None)
        retire(conn)
        # Not closed: see _end_session().
        shut_down(session.pgconn.socket)
        _compat.count(self, self._RETURNS_BAD)
        if not self.closed:
            _compat.replace_lost(self)
        self._note_freed()

    def _give(self, conn: Any) -> None:
        """Hand a clean connection to the task that waited longest, or keep it."""
        if not self._line.offer(conn):
            _compat.idle(self).append(conn)

    async def _put_back(self, conn: Any, *, from_getconn: bool = False) -> None:
        """Give back a connection that may need work first."""
        if isinstance(conn, RevokedConnection):
            return  # its life is over, and another one may have begun
        pgconn = conn.pgconn
        if pgconn.pipeline_status != NO_PIPELINE:
            logger.warning(
                'a connection of pool "%s" came back in pipeline mode: closed', self.name
            )
            pgconn.finish()
        await _compat.put_back(self, conn, from_getconn=from_getconn)

    def _start_own_task(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Start *work* in a task that `close()` waits for."""
        task = asyncio.get_running_loop().create_task(
            _compat.run_own(work), name=f"{self.name}-release"
        )
        self._returning.add(task)
        task.add_done_callback(self._returned)
        return task

    async def _in_own_task(self, work: Coroutine[Any, Any, None]) -> None:
        """Run *work* to its end even if the caller is cancelled."""
        await asyncio.shield(self._start_own_task(work))

    def _returned(self, task: asyncio.Task[None]) -> None:
        self._returning.discard(task)
        self._note_freed()

    def _note_freed(self) -> None:
        if self._freed is not None and not self._freed.done():
            self._freed.set_result(None)

    async def _clean(self, conn: Any) -> None:
        """Undo on the server what the borrower left; psycopg_pool calls this after rollback."""
        session: Session = conn._session
        if changed := session.changed_parameters():
            await self._restore(conn, changed)
        if self._user_reset is None:
            return
        if self._user_reset != "discard":
            await self._user_reset(conn)
            return
        async with _Autocommit(conn):
            await conn.execute("DISCARD ALL", prepare=False)
        session.forget_prepared(conn)
        if self._user_configure is not None:
            await self._user_configure(conn)
            session.forget_added_handlers(conn)

    async def _restore(self, conn: Any, changed: list[tuple[bytes, bytes | None]]) -> None:
        names = [name.decode() for name, _ in changed]
        logger.info(
            'a connection of pool "%s" came back with other settings: %s; putting them back',
            self.name,
            ", ".join(names),
        )
        identity = {"session_authorization", "is_superuser"}
        async with _Autocommit(conn):
            if identity.intersection(names):
                await conn.execute("RESET SESSION AUTHORIZATION")
                await conn.execute("RESET ROLE")
            calls = [
                sql.SQL("set_config({}, {}, false)").format(name, was.decode())
                for name, (_, was) in zip(names, changed, strict=True)
                if was is not None and name not in identity
            ]
            if calls:
                await conn.execute(sql.SQL("SELECT ") + sql.SQL(", ").join(calls))
        if left := conn._session.changed_parameters():
            raise psycopg.OperationalError(
                f"settings could not be put back: {', '.join(n.decode() for n, _ in left)}"
            )

    # --- closing --------------------------------------------------------------------------

    @override
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
            error = self._binding.mismatch("closed")
            self._abandon()
            raise error
        self._binding.check("closed")
        if self._state is State.CLOSING:
            await self._until_ended()
            return
        await self._close(timeout, None)

    async def _close(self, timeout: float, failure: BaseException | None) -> None:
        """End the life; tell those who wait *failure*, or that the pool is closed."""
        self._state = State.CLOSING
        ended = self._ended = asyncio.get_running_loop().create_future()
        self._line.refuse_all(failure or self._closed_error())
        self._tell_openers(failure or self._closed_error())
        for conn in _compat.refuse_clients(self):
            conn.pgconn.finish()
        interruption: asyncio.CancelledError | None = None
        begin = monotonic()
        try:
            await self._until_free(begin + timeout)
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
            self._revoke(session)
            self._end_session(session)
        for task in tasks:
            task.cancel()  # once more: psycopg may still be trying to stop a query of its own
        interruption = await self._settle(tasks) or interruption
        for session in self._sessions:
            if not _at_work(session):
                session.pgconn.finish()
        # Only now: who opens the pool anew must not meet what is left of this life.
        self._state = State.CLOSED
        ended.set_result(None)
        if late:
            logger.warning(
                'pool "%s" was closed after %.2f s with %d connection(s) still in use: %s',
                self.name,
                waited,
                len(late),
                "; ".join(late),
            )
        if interruption is not None:
            raise interruption

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
                    asyncio.get_running_loop().call_soon(self._revoke, session)
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
        session.checkout = None
        if handle is None or isinstance(handle, RetiredConnection):
            return
        if pgconn.status != BAD:
            handle._lost_work = pgconn.transaction_status != IDLE
        revoke(handle)

    def _end_session(self, session: Session) -> None:
        if _at_work(session):
            # Closing the socket would free its descriptor under the event loop's feet; shut
            # down, it reads as closed by the server.
            shut_down(session.pgconn.socket)
        else:
            session.pgconn.finish()

    def _stop_tasks(self) -> list[asyncio.Task[None]]:
        """Stop the tasks of this life, which are returned, and close what is idle. Synchronous."""
        idle, tasks = _compat.end_life(self)
        tasks += self._returning
        for task in tasks:
            task.cancel()
        for conn in idle:
            conn.pgconn.finish()
        return tasks

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
            logger.warning('pool "%s" is closed, but tasks go on: %s', self.name, names)
        return interruption

    async def _until_ended(self) -> None:
        assert self._ended is not None
        await asyncio.shield(self._ended)

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
        tasks += self._returning
        for task in tasks:
            _compat.forget_task(task)
        if self._binding.forked:
            inherited.append(
                (sessions, tasks, self._line, self.connection_class, vars(self).copy())
            )
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

    def _check_usable(self, doing: str) -> None:
        """Return if the pool may be used here and now, raise otherwise."""
        if self._state is State.NEW or self._binding is None:
            raise NotOpenError(
                f'pool "{self.name}" is not open',
                detail=f"It was {doing} {Place.here()}, before any open().",
                hint='Open it first: "async with manager:" or "await manager.open()", in the'
                " start-up hook of the framework. Test clients that skip the lifespan skip"
                f" that too. {see('not-open')}",
            )
        if self._state is State.CLOSED:
            raise self._closed_error(doing)
        self._binding.check(doing)
        if self._state is State.CLOSING:
            raise self._closed_error(doing)

    def _closed_error(self, doing: str = "") -> ClosedError:
        used = f" It was {doing} {Place.here()}." if doing else ""
        opened = f"Opened {self.opened}." if self.opened else ""
        word = "closing" if self._state is State.CLOSING else "closed"
        return ClosedError(
            f'pool "{self.name}" is {word}',
            detail=f"{opened}{used}",
            hint=f"open() opens it again. {see('closed')}",
        )

    @override
    async def resize(self, min_size: int, max_size: int | None = None) -> None:
        """Change `min_size` and `max_size`; for this life, not for one after `close()`."""
        self._check_usable("resized")
        await super().resize(min_size, max_size)

    @override
    async def drain(self) -> None:
        """Replace every connection: idle ones now, the others when they come back."""
        self._check_usable("drained")
        await super().drain()

    @override
    async def check(self) -> None:
        """Test the idle connections and replace those that do not work."""
        self._check_usable("checked")
        await super().check()


class CheckoutContext(AbstractAsyncContextManager[ACT]):
    """What `connection()` returns. Can be entered once."""

    __slots__ = ("_code", "_conn", "_lineno", "_pool", "_since", "_timeout")

    def __init__(
        self, pool: BoundPool[ACT], timeout: float | None, code: CodeType, lineno: int
    ) -> None:
        self._pool = pool
        self._timeout = timeout
        self._code = code
        self._lineno = lineno

    @override
    async def __aenter__(self) -> ACT:
        self._conn = await self._pool.acquire(self._timeout, self._code, self._lineno)
        self._since = monotonic()
        return self._conn

    @override
    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        conn: Any = self._conn
        pool = self._pool
        if exc_type is not None and conn._binding.forked:
            return  # the block is the parent's; the child ends with its own error
        try:
            if isinstance(conn, RevokedConnection):
                if exc_type is None and vars(conn).get("_lost_work"):
                    raise conn.refusal("committed")
            else:
                await conn.__aexit__(exc_type, exc, traceback)
        finally:
            await pool.putconn(self._conn)
            _compat.count(pool, pool._USAGE_MS, int((monotonic() - self._since) * 1000))


class _Autocommit(AbstractAsyncContextManager[None]):
    """Run statements of our own outside of a transaction."""

    def __init__(self, conn: Any) -> None:
        self._conn = conn

    async def __aenter__(self) -> None:
        self._was = self._conn.autocommit
        if not self._was:
            await self._conn.set_autocommit(True)

    async def __aexit__(self, *exc_info: object) -> None:
        if not self._was and not self._conn.closed:
            await self._conn.set_autocommit(False)


async def _request_cancel(session: Session) -> None:
    if (handle := session.handle) is not None:
        with suppress(Exception):
            await handle.cancel_safe(timeout=CANCEL_GRACE)


def _at_work(session: Session) -> bool:
    """Tell whether a task is at work on the socket of *session*, so that the loop watches it."""
    handle = session.handle
    return handle is not None and session.pgconn.status != BAD and handle.at_work


def _attempts(number: int) -> str:
    return f"{number} attempt{'' if number == 1 else 's'}"
