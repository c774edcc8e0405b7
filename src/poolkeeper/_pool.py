"""
`BoundPool`: an `AsyncConnectionPool` that keeps its promises.

This is its face: psycopg_pool's public methods, and what a `PoolManager` asks of it. What each
of them does is in the room that it leads to; what there is from open to close, in a `Life`.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Awaitable, Callable, Coroutine
from types import FrameType
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self, cast, overload

from psycopg import AsyncConnection
from psycopg.rows import TupleRow
from psycopg_pool import AsyncConnectionPool, AsyncNullConnectionPool
from typing_extensions import TypeVar, override

from . import _compat, _config, _door, _facts
from ._no_life import NoLife, Options, State, warn_of_constructor
from ._where import Place, coroutine_function
from .errors import PoolkeeperError, briefly

if TYPE_CHECKING:
    from . import events

ACT = TypeVar("ACT", bound=AsyncConnection[Any], default=AsyncConnection[TupleRow])
EventT = TypeVar("EventT", bound="events.Event")


_compat.require()

_PSYCOPGS: Any = AsyncConnection


class BoundPool(AsyncConnectionPool[ACT]):
    """
    The pool behind a `PoolManager`; a real `AsyncConnectionPool`, with every guard.

    Can be handed to any library that asks for an `AsyncConnectionPool`, before it is opened too.
    Made without a manager, it takes the place of one, in one line:
    ``from poolkeeper import BoundPool as AsyncConnectionPool``.

    Args:
        conninfo: As for `AsyncConnectionPool`; so is whatever is not named here.
        open: As there: False to open it later. With None or True it opens in the constructor,
            on the running loop, and warns; with None not before it is used, and not if it was
            entered as a context manager.
        reset: As there; or ``"discard"``, for `PoolManager`'s.
        application_name: As for `PoolManager`.
        leak_threshold: As for `PoolManager`.
        expected_processes: As for `PoolManager`.

    Raises:
        ConfigError: If a parameter cannot work; names it.
        LoopMismatchError: If it is to open in the constructor, and no loop is running.

    .. versionadded:: 0.1.0
    """

    keeps: ClassVar[bool] = True
    """False for a null pool."""

    _life: _door.Life | NoLife
    _options: Options

    @briefly
    def __init__(
        self,
        conninfo: str | Callable[[], str] | Callable[[], Awaitable[str]] = "",
        *,
        connection_class: type[ACT] = _PSYCOPGS,
        kwargs: dict[str, Any]
        | Callable[[], dict[str, Any]]
        | Callable[[], Awaitable[dict[str, Any]]]
        | None = None,
        min_size: int = 4,
        max_size: int | None = None,
        open: bool | None = None,
        configure: Callable[[ACT], Awaitable[None]] | None = None,
        check: Callable[[ACT], Awaitable[None]] | None = None,
        reset: Callable[[ACT], Awaitable[None]] | Literal["discard"] | None = None,
        name: str | None = None,
        close_returns: bool = False,
        timeout: float = 30.0,
        max_waiting: int = 0,
        max_lifetime: float = 60 * 60.0,
        max_idle: float = 10 * 60.0,
        reconnect_timeout: float = 5 * 60.0,
        reconnect_failed: Callable[[Any], Awaitable[None] | None] | None = None,
        num_workers: int = 3,
        application_name: str | None = None,
        leak_threshold: float | None = None,
        expected_processes: int | None = None,
    ) -> None:
        settings: dict[str, Any] = {
            "conninfo": conninfo,
            "connection_class": connection_class,
            "kwargs": kwargs,
            "min_size": min_size,
            "max_size": min_size if max_size is None else max_size,
            "name": name,
            "close_returns": close_returns,
            "timeout": timeout,
            "max_waiting": max_waiting,
            "max_lifetime": max_lifetime,
            "max_idle": max_idle,
            "reconnect_timeout": reconnect_timeout,
            "reconnect_failed": reconnect_failed,
            "num_workers": num_workers,
        }
        own = {
            "configure": configure,
            "check": check,
            "reset": reset,
            "application_name": application_name,
            "leak_threshold": leak_threshold,
            "expected_processes": expected_processes,
        }
        most = _config.settle(self.keeps, settings, own)
        if settings["connection_class"] is not AsyncConnection:
            _door.require_class(settings["connection_class"])
        self._server = _config.server(settings)
        """Which server it is for; None if that is not known."""
        if open:
            warn_of_constructor(type(self).__name__)
        # It keeps the settings, and never comes to open anything.
        super().__init__(open=False, **settings)
        self._options = Options(self.keeps, min_size, most, **cast("dict[str, Any]", own))
        self._life = NoLife(self.name, self._options)
        if open or open is None:
            _door.open_in_constructor(self, warned=bool(open))

    # --- what can be read at any time ---------------------------------------------------

    @property
    def state(self) -> State:
        """Where the pool is in its life; closed too when its loop or process is not here."""
        life = self._life
        return State.CLOSED if life.gone else life.state

    @property
    @override
    def closed(self) -> bool:
        """True unless the pool is open, or opening."""
        return self._life.ending

    @property
    @override
    def min_size(self) -> int:
        """Connections to keep."""
        return self._life.min_size

    @property
    @override
    def max_size(self) -> int:
        """Connections to grow to; 0 for a null pool that makes any number."""
        return _config.shown_size(self._life.max_size)

    def is_here(self) -> bool:
        """Tell whether the caller runs on the loop, in the process, that opened the pool."""
        return self._life.binding.is_here()

    @property
    def server(self) -> _facts.ServerFacts | None:
        """What is known of the server, and of a pooler in front of it; None while nothing is."""
        life = self._life
        return None if isinstance(life, NoLife) else life.front.facts()

    @property
    def inherited(self) -> bool:
        """True if a parent process opened the pool."""
        return self._life.forked

    @property
    def opened(self) -> Place | None:
        """Where the pool was opened last."""
        return self._life.opened

    def counts(self) -> dict[str, int]:
        """
        Return total, in use, idle, max and waiting, in that order. Instantaneous.

        After them those of making, returning and checking that are not 0.
        """
        return _door.counts(self._life)

    def numbers(self) -> str:
        """Return the numbers of `counts()` in words."""
        return _door.numbers(self._life)

    def checkouts(self) -> list[_door.Checkout]:
        """Return who holds a connection, longest first."""
        return list(self._life.held)

    def snapshot(self) -> _facts.PoolSnapshot:
        """Return the facts of this moment. Never touches the network."""
        return _door.snapshot(self._life)

    def diagnose(self) -> _facts.Diagnosis:
        """Return why connections are short, from a `snapshot()` of this moment."""
        return _door.diagnose(self._life)

    @overload
    def subscribe(self, callback: Callable[[events.Event], object]) -> Callable[[], None]: ...

    @overload
    def subscribe(
        self, callback: Callable[[EventT], object], kind: type[EventT], /, *kinds: type[EventT]
    ) -> Callable[[], None]: ...

    @briefly
    def subscribe(self, callback: Callable[[Any], object], *kinds: type[Any]) -> Callable[[], None]:
        """Tell *callback* what happens to the pool: see `PoolManager.subscribe()`."""
        return _door.listeners_of(self).subscribe(callback, kinds)

    @override
    def __repr__(self) -> str:
        return f'<poolkeeper.BoundPool "{self.name}" {self.state.value} {self.numbers()}>'

    @override
    def get_stats(self) -> dict[str, int]:
        """Return psycopg_pool's statistics, under its keys."""
        return self._life.counters.read() | _door.measures(self._life)

    @override
    def pop_stats(self) -> dict[str, int]:
        """Return psycopg_pool's statistics and set its counters to zero."""
        return self._life.counters.pop() | _door.measures(self._life)

    # --- open and close -------------------------------------------------------------------

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
        await _door.open_pool(self, wait, timeout, caller)

    @override
    @briefly
    async def __aenter__(self) -> Self:
        await self.open()
        return self

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
        await _door.until_ready(self._usable("wait for it"), timeout)

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
        life = self._life
        if not isinstance(life, NoLife):
            await _door.close(life, timeout)

    def _usable(self, purpose: str) -> _door.Life:
        """Return the life that goes on here and now, raise if there is none."""
        self._life.check_usable(purpose)
        return cast("_door.Life", self._life)

    # --- acquire and release --------------------------------------------------------------

    @override
    def connection(  # type: ignore[override]  # pyright: ignore[reportIncompatibleMethodOverride]
        self, timeout: float | None = None
    ) -> _door.CheckoutContext[ACT]:
        """
        Return a context manager that acquires a connection and gives it back.

        Commits on success and rolls back on an exception, as psycopg_pool's does. As the
        decorator of an async function, it does so around each call. For
        arguments and errors see `getconn()`.
        """
        return _door.CheckoutContext(self, timeout, sys._getframe(1))

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
        life = cast("_door.Life", self._life)
        try:
            conn: Any = _door.take(life, frame, lineno, False)
            if conn is None:
                conn = await _door.wait_for_connection(life, timeout, frame, lineno, False)
        except PoolkeeperError as ex:
            raise ex.with_traceback(None)  # noqa: B904 - see briefly()
        return cast(ACT, conn)

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
        unlocking = _door.release(self, conn, failing, tells=not failing)
        if unlocking is not None:
            await asyncio.shield(unlocking)

    def take_back_dropped(self, conn: Any) -> None:
        """Take a connection back that was garbage-collected and not closed."""
        life = self._life
        if conn._binding is life.binding:
            _door.take_back_dropped(life, conn)

    # --- the stock ------------------------------------------------------------------------

    @override
    @briefly
    async def resize(self, min_size: int, max_size: int | None = None) -> None:
        """
        Change `min_size` and `max_size`; for this life, not for one after `close()`.

        Tasks that wait are served as soon as there is room for more connections. Those that are
        too many are closed now where they are idle, the others when they come back.
        """
        _door.resize(self._usable("resize it"), min_size, max_size)

    @override
    @briefly
    async def drain(self) -> None:
        """Replace every connection: idle ones now, the others when they come back."""
        _door.drain(self._usable("drain it"))

    @override
    @briefly
    async def check(self) -> None:
        """Test the idle connections and replace those that do not work."""
        life = self._usable("check it")
        # Not psycopg_pool's: that one swallows a cancellation, and waits for a silent server for
        # as long as psycopg does, with all idle connections out of everybody's reach.
        life.connector.go_on()
        life.tasks.stay()
        if checks := _door.look_at_idle(life):
            await asyncio.wait(checks)


class BoundNullPool(BoundPool[ACT], AsyncNullConnectionPool[ACT]):  # pyright: ignore[reportIncompatibleMethodOverride]
    """
    A pool that keeps no connections, for programs behind a pooler; with every guard.

    An `AsyncNullConnectionPool`: an acquire makes a connection, and one that comes back goes to
    who waits, or is closed. With *max_size*, no more than so many are there at once.

    Args:
        min_size: 0.
        max_size: How many connections there may be at once; any number if it is 0 or None.
        reconnect_failed: Has no use here, as in `AsyncNullConnectionPool`: no connection is lost
            that would be made again.
        close_returns: Has no use here either.

    The others are those of `BoundPool`.

    .. versionadded:: 0.1.0
    """

    keeps = False

    def __init__(
        self,
        conninfo: str | Callable[[], str] | Callable[[], Awaitable[str]] = "",
        *,
        connection_class: type[ACT] = _PSYCOPGS,
        kwargs: dict[str, Any]
        | Callable[[], dict[str, Any]]
        | Callable[[], Awaitable[dict[str, Any]]]
        | None = None,
        min_size: int = 0,
        max_size: int | None = None,
        open: bool | None = None,
        configure: Callable[[ACT], Awaitable[None]] | None = None,
        check: Callable[[ACT], Awaitable[None]] | None = None,
        reset: Callable[[ACT], Awaitable[None]] | Literal["discard"] | None = None,
        name: str | None = None,
        close_returns: bool = False,
        timeout: float = 30.0,
        max_waiting: int = 0,
        max_lifetime: float = 60 * 60.0,
        max_idle: float = 10 * 60.0,
        reconnect_timeout: float = 5 * 60.0,
        reconnect_failed: Callable[[Any], Awaitable[None] | None] | None = None,
        num_workers: int = 3,
        application_name: str | None = None,
        leak_threshold: float | None = None,
        expected_processes: int | None = None,
    ) -> None:
        super().__init__(
            conninfo,
            connection_class=connection_class,
            kwargs=kwargs,
            min_size=min_size,
            max_size=max_size,
            open=open,
            configure=configure,
            check=check,
            reset=reset,
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
