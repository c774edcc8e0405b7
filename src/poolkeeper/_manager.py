"""
`PoolManager`: what users meet.

Holds the configuration and one `BoundPool` for good, so both can be made at import time and
handed around before anything is open.
"""
# A pool's life, and what it was made with, are not its users'.
# pyright: reportPrivateUsage=false

from __future__ import annotations

import sys
import warnings
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any, Generic, Literal, Self, TypeAlias, cast, overload

from psycopg import AsyncConnection, AsyncCursor, IsolationLevel
from psycopg import sql as sql  # psycopg.abc.Query names it
from psycopg.abc import Params, Query
from psycopg.rows import AsyncRowFactory, TupleRow, scalar_row
from typing_extensions import TypeVar

from . import _door, _facts
from ._config import bad, refuse_misplaced, require_flag, require_number
from ._later import Later
from ._pool import BoundPool
from ._where import Behalf, code_behind, coroutine_function
from .errors import (
    ConfigError,
    DuplicatePoolWarning,
    UnclosedManagerWarning,
    briefly,
)

if TYPE_CHECKING:
    from . import events, sizing
else:
    sizing = Later(".sizing")

EventT = TypeVar("EventT", bound="events.Event")
ACT_co = TypeVar(
    "ACT_co", bound=AsyncConnection[Any], default=AsyncConnection[TupleRow], covariant=True
)
Row = TypeVar("Row")
Row2 = TypeVar("Row2")

Callback: TypeAlias = Callable[[Any], Awaitable[None]]
Isolation: TypeAlias = (
    IsolationLevel
    | Literal["read uncommitted", "read committed", "repeatable read", "serializable"]
)


class _TellsOfMisplaced:
    """Tells who gives the manager an argument of ``connect()`` where that belongs."""

    # Of a base, so that the signature is that of __init__().
    def __new__(cls, *_: Any, **arguments: Any) -> Self:
        if cls.__init__ is PoolManager.__init__:
            refuse_misplaced(arguments)
        return super().__new__(cls)


class PoolManager(_TellsOfMisplaced, Generic[ACT_co]):
    """
    Keeps a psycopg connection pool alive, on the right event loop, and honest.

    Safe to create anywhere, at import time too: nothing is opened before `open()`. Takes what
    `psycopg_pool.AsyncConnectionPool` takes, under the same names and with the same defaults.

    Args:
        conninfo: Connection string or URL, SQLAlchemy's (``postgresql+psycopg://``) too, or a
            function, async or not, that returns one for each connection.
        connection_class: `psycopg.AsyncConnection`, which None stands for, or a subclass. Types
            the rows too: ``AsyncConnection[DictRow]`` beside a *row_factory* in *kwargs*.
        kwargs: Arguments of ``connect()``, or a function that returns them.
        min_size: Connections to keep. `open()` waits for as many; with 0 it waits for none,
            and finds out nothing about the server.
        max_size: Connections to grow to when they are needed; *min_size* if None.
        open: For arguments written for psycopg_pool; False or None.
        configure: Called with each new connection.
        check: Called with each connection before it is handed out.
        reset: Called with each connection that comes back. ``"discard"`` runs ``DISCARD ALL``,
            then *configure*: one round trip, or more, for each release.
        name: Name of the pool, for messages and for ``application_name``.
        close_returns: Let ``connection.close()`` give the connection back.
        timeout: Seconds to wait for a connection.
        max_waiting: How many tasks may wait at once; 0 for any number.
        max_lifetime: Seconds after which a connection is replaced.
        max_idle: Seconds after which an unused connection above *min_size* is closed.
        reconnect_timeout: Seconds of an outage after which *reconnect_failed* is called. The
            pool goes on trying to connect, and is back by itself when the server is.
        reconnect_failed: Called once for such an outage, with the pool.
        num_workers: How many connections may be made at once.
        open_timeout: Seconds that `open()` waits for *min_size* connections.
        close_timeout: Seconds that `close()` lets connections in use go on.
        application_name: Name that the server shows for the connections. By default
            ``poolkeeper:<name>``, unless *conninfo* or ``PGAPPNAME`` sets one.
        leak_threshold: Seconds after which a checkout is logged as a suspected leak, with the
            stack of its acquire; None to keep no stacks and suspect nobody. Keeping them costs
            tens of microseconds for each acquire.
        pipeline: Let `execute()`, `fetchone()`, `fetchall()` and `fetchval()` of several tasks
            share connections where they would have to wait: plain reads, in pipeline mode. With
            False each statement has a connection to itself.
        expected_processes: How many processes open this pool, on all machines together: for
            `ConnectionBudgetWarning`, and for ``application_name``, to which each adds its
            number where there are several. If None, as many as uvicorn, hypercorn, gunicorn or
            Celery have started here, or as ``WEB_CONCURRENCY`` says.

    Raises:
        ConfigError: If a parameter cannot work; names it.

    .. versionadded:: 0.1.0
    """

    _pool: BoundPool[Any]

    @briefly
    def __init__(
        self,
        conninfo: str | Callable[[], str] | Callable[[], Awaitable[str]] = "",
        *,
        connection_class: type[ACT_co] | None = None,
        kwargs: Mapping[str, Any]
        | Callable[[], dict[str, Any]]
        | Callable[[], Awaitable[dict[str, Any]]]
        | None = None,
        min_size: int = 4,
        max_size: int | None = None,
        open: bool | None = None,
        configure: Callable[[ACT_co], Awaitable[None]] | None = None,
        check: Callable[[ACT_co], Awaitable[None]] | None = None,
        reset: Callable[[ACT_co], Awaitable[None]] | Literal["discard"] | None = None,
        name: str | None = None,
        close_returns: bool = False,
        timeout: float = 30.0,
        max_waiting: int = 0,
        max_lifetime: float = 60 * 60.0,
        max_idle: float = 10 * 60.0,
        reconnect_timeout: float = 5 * 60.0,
        reconnect_failed: Callable[[Any], Awaitable[None] | None] | None = None,
        num_workers: int = 3,
        open_timeout: float = 30.0,
        close_timeout: float = 5.0,
        application_name: str | None = None,
        leak_threshold: float | None = None,
        pipeline: bool = True,
        expected_processes: int | None = None,
    ) -> None:
        if open:
            raise bad("open", open, "None or False: open it with await manager.open()")
        require_number(open_timeout=open_timeout, close_timeout=close_timeout)
        require_flag(pipeline=pipeline)
        self._pipeline = pipeline
        self._open_timeout = open_timeout
        self._close_timeout = close_timeout
        self._pool = BoundPool(
            conninfo,
            connection_class=cast(Any, connection_class),
            kwargs=cast(Any, kwargs),
            min_size=min_size,
            max_size=max_size,
            open=False,
            configure=cast(Any, configure),
            check=cast(Any, check),
            reset=cast(Any, reset),
            name=name,
            close_returns=close_returns,
            timeout=timeout,
            max_waiting=max_waiting,
            max_lifetime=max_lifetime,
            max_idle=max_idle,
            reconnect_timeout=reconnect_timeout,
            reconnect_failed=reconnect_failed,
            num_workers=num_workers,
            application_name=application_name,
            leak_threshold=leak_threshold,
            expected_processes=expected_processes,
        )

    # --- what can be read at any time ---------------------------------------------------

    @property
    def name(self) -> str:
        """Name of the pool."""
        return self._pool.name

    @property
    def pool(self) -> BoundPool[ACT_co]:
        """
        The pool itself, a guarded `psycopg_pool.AsyncConnectionPool`.

        The same object for the life of the manager, so it can be handed to a library before it
        is opened, and stays valid when it is opened again.
        """
        return self._pool

    @property
    def state(self) -> str:
        """
        Where the pool is in its life: new, opening, open, closing or closed.

        Closed too when the owner loop is closed, and in a process forked from the one that
        opened it. Instantaneous.
        """
        return self._pool.state.value

    @property
    def server(self) -> _facts.ServerFacts | None:
        """
        What was found out of the server, and of a pooler in front of it, by the first connection.

        None while nothing is known: before that, and of a pool that is not open.

        .. versionadded:: 0.1.0
        """
        return self._pool.server

    def __repr__(self) -> str:
        return f'<PoolManager "{self.name}" {self.state} {self._pool.numbers()}>'

    def snapshot(self) -> _facts.PoolSnapshot:
        """
        Return frozen numbers, who holds a connection and who waits for one.

        Instantaneous; never touches the network, so it works while the pool is exhausted and
        the server away. On another loop or thread than the owner's it may be torn, but safe.

        .. versionadded:: 0.1.0
        """
        return self._pool.snapshot()

    def diagnose(self) -> _facts.Diagnosis:
        """
        Return why connections are short: likely cause first, evidence, advice.

        From a `snapshot()` alone; ``str()`` is what `AcquireTimeout` prints.

        .. versionadded:: 0.1.0
        """
        return self._pool.diagnose()

    @overload
    def subscribe(self, callback: Callable[[events.Event], object]) -> Callable[[], None]: ...

    @overload
    def subscribe(
        self, callback: Callable[[EventT], object], kind: type[EventT], /, *kinds: type[EventT]
    ) -> Callable[[], None]: ...

    @briefly
    def subscribe(self, callback: Callable[[Any], object], *kinds: type[Any]) -> Callable[[], None]:
        """
        Tell *callback* from now on what happens to the pool, in this and all later lives of it.

        It is called at once, where something happens: in the task that acquires or gives back,
        and in its context (`contextvars`); for all else in that of `open()`. So what it does
        takes the time of the event loop: what takes long belongs into a task or a thread of its
        own. Whatever it raises is logged, once for each kind of event, and goes no further.

        May be called at any time, before `open()` too, from any thread, and by a subscriber. Each
        call is a subscription of its own; they are told in the order in which they were made. A
        checkout that was acquired before is not told of.

        Args:
            callback: A plain function that takes one event.
            kinds: The classes of `poolkeeper.events` that it wants; all if there is none.

        Returns:
            A function that ends the subscription: no call begins after it has returned. Harmless
            when called again.

        Raises:
            ConfigError: If *callback* is no function or is async, or one of *kinds* is no event.

        .. versionadded:: 0.1.0
        """
        return self._pool.subscribe(callback, *kinds)

    @briefly
    async def advise(
        self, sizes: Sequence[int] | None = None, target: float = 0.010
    ) -> sizing.Advice:
        """
        Estimate how long acquires would wait, for each size of the pool.

        From what was recorded since `poolkeeper.sizing.record()` was called for this manager.
        Takes a processor for some seconds, in a thread, while the loop goes on, slower. If
        cancelled, the thread ends by itself.

        Args:
            sizes: To look at; by default those that matter.
            target: Seconds that one acquire in a hundred may wait.

        Raises:
            ConfigError: If nothing was recorded, or a number cannot be.

        .. versionadded:: 0.1.0
        """
        from .sizing import advise_on

        return await advise_on(self._pool, sizes, target)

    @briefly
    async def check(self, timeout: float = 2.0) -> _facts.Health:
        """
        Find out whether a query can run now, for a readiness endpoint.

        Asks the server on a connection that is free, without a place in the line; if none is,
        and no query was answered in the last second, on one beside the pool, which is closed at
        once: so it works while the pool is exhausted too. Those who ask at the same time share
        one question, each with a timeout of its own, and those who ask within a second the
        answer from beside the pool. Trouble of the server or the pool is an answer, not an
        exception. If cancelled, nothing is left behind.

        A server that has no slot for the connection beside the pool has answered, as long as the
        pool holds connections of its own.

        Args:
            timeout: Seconds that the server has to answer.

        Returns:
            The answer; true, as a condition, if a query can run.

        Raises:
            ConfigError: If *timeout* is no number of seconds.
            LoopMismatchError: If called on another loop than the one that opened the pool, or
                in a forked process.

        Source:
            psycopg_pool 3.3, ``AsyncConnectionPool.check_connection``: an empty query, outside of
            a transaction.

        .. versionadded:: 0.1.0
        """
        require_number(timeout=timeout)
        return await _door.check(self._pool, timeout)

    # --- open and close -------------------------------------------------------------------

    @briefly
    async def open(
        self, *, wait: bool = True, timeout: float | None = None, caller: str | None = None
    ) -> None:
        """
        Open the pool and bind it to the running event loop and this process.

        Returns with *min_size* working connections. On a pool that is open on this loop, does
        nothing but wait for them; two tasks that open at once get one pool. A pool that was
        closed, whose loop is closed or that was opened by the parent of a forked process is
        opened anew. If it fails or is cancelled, nothing is left behind, and it can be called
        again.

        Args:
            wait: Return at once instead, and let the connections be made meanwhile.
            timeout: Seconds to wait for them, `open_timeout` if None.
            caller: ``file:line`` that messages name as the place where the pool was opened, for
                code that opens it on somebody's behalf; the caller's own if None.

        Raises:
            LoopMismatchError: If the pool is open on another loop, or no loop is running, or
                one that psycopg cannot use.
            OpenError: If connections cannot be made: at once when the server's reason is
                permanent (role, password, database, host name, conninfo), after *timeout*
                when it may pass. The reason is its ``__cause__``.

        Warns:
            ConnectionBudgetWarning: If *max_size* in each of the processes is more than the
                server allows. Where warnings are errors, the pool is closed then.
            DuplicatePoolWarning: If another manager is open for the same server, database and
                user on this loop.

        .. versionadded:: 0.1.0
        """
        seconds = self._open_timeout if timeout is None else timeout
        await self._pool.open(wait=wait, timeout=seconds, caller=caller)
        try:
            _door.note_opened(self._pool, caller)
        except DuplicatePoolWarning:  # an error, where warnings are
            await self._pool.close(0)
            raise

    @briefly
    async def close(self, timeout: float | None = None) -> None:
        """
        Close the pool.

        New acquires and waiting tasks get `ClosedError` at once. Connections in use may finish
        until *timeout*; then their queries are cancelled, their sessions closed, and their
        holders named in a warning on the logger ``poolkeeper``. No session is left on the
        server. Does nothing if closed; waits for a close that is under way. If cancelled, ends
        the pool without waiting any longer, then raises.

        Args:
            timeout: Seconds that connections in use may go on, `close_timeout` if None. A
                server that does not answer adds up to a second.

        Raises:
            LoopMismatchError: If called on another loop than the one that opened the pool, or
                in a forked process.

        .. versionadded:: 0.1.0
        """
        await self._pool.close(self._close_timeout if timeout is None else timeout)

    @briefly
    async def __aenter__(self) -> Self:
        await self.open()
        return self

    @briefly
    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if exc_type is not None and self._pool.inherited:
            return  # the block is the parent's; the child ends with its own error
        await self.close()

    def __del__(self, _warn: Any = warnings.warn) -> None:
        pool = vars(self).get("_pool")
        # What is as global as State may be gone, where this is the end of Python.
        if pool is None or pool._life.ending or pool._life.gone:
            return
        _warn(
            f'pool "{pool.name}" was never closed; opened {pool.opened}',
            UnclosedManagerWarning,
            source=self,
        )

    # --- work -----------------------------------------------------------------------------

    def connection(
        self,
        timeout: float | None = None,
        *,
        caller: FrameType | Callable[..., Any] | None = None,
    ) -> _door.CheckoutContext[ACT_co]:
        """
        Return a context manager that acquires a connection, commits or rolls back, and releases.

        psycopg's semantics: commit when the block ends, roll back if it raises. Whatever the
        block changed on the connection object, and the settings that PostgreSQL reports, is as
        before for the next borrower. The connection refuses any use after the block. As the
        decorator of an async function, it is a block around each call.

        Args:
            timeout: Seconds to wait for a connection, the pool's `timeout` if None. With 0,
                take one that is free now or fail.
            caller: Whose line `snapshot()` and `diagnose()` name, for code that acquires on
                somebody's behalf: a frame (``sys._getframe(1)``), or the function that the
                connection is for. The line that calls this method if None, and if the function
                is not written in Python.

        Raises:
            ConfigError: If *caller* is none of these.
            LoopMismatchError: If used on another loop than the one that opened the pool.
            NotOpenError, ClosedError: If the pool is not open, or is closed meanwhile.
            AcquireTimeout: If no connection was free in time.
            TooManyWaitersError: If `max_waiting` tasks wait already.

        .. versionadded:: 0.1.0
        """
        frame = sys._getframe(1)
        if caller is None:
            return _door.CheckoutContext(self._pool, timeout, frame)
        if isinstance(caller, FrameType | Behalf):
            return _door.CheckoutContext(self._pool, timeout, caller)
        if not callable(caller):
            raise bad("caller", caller, "a frame, a function or None")
        code = code_behind(caller)
        return _door.CheckoutContext(self._pool, timeout, Behalf(code, frame) if code else frame)

    def transaction(
        self,
        *,
        isolation: Isolation | None = None,
        read_only: bool | None = None,
        deferrable: bool | None = None,
        timeout: float | None = None,
    ) -> AbstractAsyncContextManager[ACT_co]:
        """
        Return a context manager for one explicit transaction block on a connection of its own.

        Commits when the block ends, rolls back if it raises; `psycopg.Rollback` rolls back and
        is not passed on. The settings apply to this block only.

        Args:
            isolation: Isolation level, by name or as `psycopg.IsolationLevel`.
            read_only: True for READ ONLY, False for READ WRITE.
            deferrable: True for DEFERRABLE, False for NOT DEFERRABLE.
            timeout: As for `connection()`.

        Raises:
            ConfigError: If *isolation* is no isolation level.

        For the other errors see `connection()`.

        .. versionadded:: 0.1.0
        """
        try:
            level = _level(isolation)
        except ConfigError as ex:
            raise ex.with_traceback(None)  # noqa: B904 - see briefly()
        checkout: _door.CheckoutContext[Any] = _door.CheckoutContext(
            self._pool, timeout, sys._getframe(1)
        )
        return _door.Block(_door.with_transaction, checkout, level, read_only, deferrable)

    @overload
    def cursor(
        self: PoolManager[AsyncConnection[Row]],
        *,
        binary: bool = False,
        timeout: float | None = None,
    ) -> AbstractAsyncContextManager[AsyncCursor[Row]]: ...

    @overload
    def cursor(
        self,
        *,
        row_factory: AsyncRowFactory[Row2],
        binary: bool = False,
        timeout: float | None = None,
    ) -> AbstractAsyncContextManager[AsyncCursor[Row2]]: ...

    def cursor(
        self,
        *,
        row_factory: AsyncRowFactory[Any] | None = None,
        binary: bool = False,
        timeout: float | None = None,
    ) -> AbstractAsyncContextManager[AsyncCursor[Any]]:
        """
        Return a context manager for a cursor on a connection of its own.

        Commits or rolls back as `connection()` does, and raises what it raises.

        Args:
            row_factory: How rows are made, for this cursor.
            binary: Ask for results in binary format.
            timeout: As for `connection()`.

        .. versionadded:: 0.1.0
        """
        frame = sys._getframe(1)
        checkout: _door.CheckoutContext[Any] = _door.CheckoutContext(self._pool, timeout, frame)
        return _door.Block(_door.with_cursor, checkout, row_factory, binary)

    # --- one statement, one round trip ------------------------------------------------------

    # Functions that return a coroutine: run as a task of its own, a coroutine has no caller to look
    # at, and who holds a connection would be asyncio.

    @coroutine_function
    def execute(
        self,
        query: Query,
        params: Params | None = None,
        *,
        timeout: float | None = None,
        query_timeout: float | None = None,
    ) -> Coroutine[Any, Any, int]:
        """
        Run one statement by itself and return how many rows it touched.

        Outside of any transaction block, so one round trip is all it costs, nothing is left
        idle in transaction, and statements that refuse to run in one (VACUUM, CREATE DATABASE)
        work. It is committed when this returns. Does not see, nor join, a `transaction()` that
        is open: that one has a connection of its own.

        Args:
            query: The statement, as for `psycopg.AsyncConnection.execute()`.
            params: Its parameters.
            timeout: Seconds to wait for a connection, as for `connection()`. How long the
                statement takes then is the matter of *query_timeout*.
            query_timeout: Seconds that the statement may take, once there is a connection; any
                number of them if None. The server is asked to stop it then, which keeps the
                connection.

        Returns:
            psycopg's ``rowcount``: rows returned or changed, -1 where the statement has none.

        Raises:
            QueryTimeout: If the statement has taken longer than *query_timeout*.
            psycopg.Error: What the server says.

        For the other errors see `connection()`.

        .. versionadded:: 0.1.0
        """
        fetch = _door.ROWCOUNT
        shot = _door.OneShot(query, params, None, fetch, timeout, query_timeout, sys._getframe(1))
        return _named("PoolManager.execute", self._way(shot)(self._pool, shot))

    @overload
    def fetchone(
        self: PoolManager[AsyncConnection[Row]],
        query: Query,
        params: Params | None = None,
        *,
        timeout: float | None = None,
        query_timeout: float | None = None,
    ) -> Coroutine[Any, Any, Row | None]: ...

    @overload
    def fetchone(
        self,
        query: Query,
        params: Params | None = None,
        *,
        row_factory: AsyncRowFactory[Row2],
        timeout: float | None = None,
        query_timeout: float | None = None,
    ) -> Coroutine[Any, Any, Row2 | None]: ...

    @coroutine_function
    def fetchone(
        self,
        query: Query,
        params: Params | None = None,
        *,
        row_factory: AsyncRowFactory[Any] | None = None,
        timeout: float | None = None,
        query_timeout: float | None = None,
    ) -> Coroutine[Any, Any, Any]:
        """
        Run one statement as `execute()` does and return its first row.

        Returns:
            The row, None if there is none, also from a statement that returns no rows at all
            (UPDATE without RETURNING): it is committed by then, so that is not an error.

        .. versionadded:: 0.1.0
        """
        fetch = _door.FIRST_ROW
        shot = _door.OneShot(
            query, params, row_factory, fetch, timeout, query_timeout, sys._getframe(1)
        )
        return _named("PoolManager.fetchone", self._way(shot)(self._pool, shot))

    @overload
    def fetchall(
        self: PoolManager[AsyncConnection[Row]],
        query: Query,
        params: Params | None = None,
        *,
        timeout: float | None = None,
        query_timeout: float | None = None,
    ) -> Coroutine[Any, Any, list[Row]]: ...

    @overload
    def fetchall(
        self,
        query: Query,
        params: Params | None = None,
        *,
        row_factory: AsyncRowFactory[Row2],
        timeout: float | None = None,
        query_timeout: float | None = None,
    ) -> Coroutine[Any, Any, list[Row2]]: ...

    @coroutine_function
    def fetchall(
        self,
        query: Query,
        params: Params | None = None,
        *,
        row_factory: AsyncRowFactory[Any] | None = None,
        timeout: float | None = None,
        query_timeout: float | None = None,
    ) -> Coroutine[Any, Any, list[Any]]:
        """
        Run one statement as `execute()` does and return all its rows.

        Returns:
            The rows; an empty list also from a statement that returns none.

        .. versionadded:: 0.1.0
        """
        fetch = _door.ALL_ROWS
        shot = _door.OneShot(
            query, params, row_factory, fetch, timeout, query_timeout, sys._getframe(1)
        )
        return _named("PoolManager.fetchall", self._way(shot)(self._pool, shot))

    @coroutine_function
    def fetchval(
        self,
        query: Query,
        params: Params | None = None,
        *,
        timeout: float | None = None,
        query_timeout: float | None = None,
    ) -> Coroutine[Any, Any, Any]:
        """
        Run one statement as `execute()` does and return the first column of its first row.

        Returns:
            The value; None if there is no row, and if the value is NULL.

        .. versionadded:: 0.1.0
        """
        fetch = _door.FIRST_ROW
        shot = _door.OneShot(
            query, params, scalar_row, fetch, timeout, query_timeout, sys._getframe(1)
        )
        return _named("PoolManager.fetchval", self._way(shot)(self._pool, shot))

    def _way(self, shot: _door.OneShot) -> Callable[..., Coroutine[Any, Any, Any]]:
        """Return what runs *shot*, called with the pool and it."""
        if shot.query_timeout is not None:
            require_number(query_timeout=shot.query_timeout)
        return _door.by_lane if self._pipeline else _door.by_cursor


def _named(name: str, coroutine: Any) -> Coroutine[Any, Any, Any]:
    """Let "coroutine ... was never awaited" give the *name* of the method that was called."""
    coroutine.__qualname__ = name
    return coroutine  # type: ignore[no-any-return]


def _level(isolation: Isolation | None) -> IsolationLevel | None:
    if isolation is None:
        return None
    try:
        if isinstance(isolation, str):
            return IsolationLevel[isolation.strip().upper().replace(" ", "_")]
        return IsolationLevel(isolation)
    except (KeyError, ValueError):
        names = ", ".join(f'"{level.name.replace("_", " ").lower()}"' for level in IsolationLevel)
        raise bad("isolation", isolation, f"one of {names}, or an IsolationLevel") from None


def require_manager(given: object) -> None:
    """
    Refuse what is no manager, where one is to be given: a connection string, say, or a pool.

    Raises:
        ConfigError: With its type only: it may hold a password.
    """
    if not isinstance(given, PoolManager):
        raise bad("manager", type(given), "a PoolManager, such as PoolManager(conninfo)")
