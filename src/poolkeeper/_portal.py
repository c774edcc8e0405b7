"""
`Portal`: one event loop in a thread of its own, for code that has none.

What is called through it becomes a task on that loop, and the caller's thread waits for it. The
loop lasts, so one pool does, where each `asyncio.run()` would have to open its own.
"""
# How a one-shot is run is not the business of a manager's users.
# pyright: reportPrivateUsage=false

from __future__ import annotations

import asyncio
import atexit
import sys
import threading
import weakref
from asyncio import _get_running_loop
from collections.abc import Awaitable, Callable
from concurrent import futures
from types import FrameType, TracebackType
from typing import Any, Generic, Self, TypeVar, TypeVarTuple, cast, overload

import psycopg
from psycopg import AsyncConnection
from psycopg import sql as sql  # psycopg.abc.Query names it
from psycopg.abc import Params, Query
from psycopg.rows import AsyncRowFactory, scalar_row
from typing_extensions import override

from . import _door
from ._binding import in_forked_child, inherited
from ._calls import Call, PortalFuture, PortalThread
from ._config import require_callable, require_number
from ._manager import ACT_co, PoolManager, Row, Row2, require_manager
from ._where import Place, call_site, warn_user
from .errors import (
    BlockedLoopWarning,
    ClosedError,
    ConfigError,
    LoopMismatchError,
    PoolkeeperError,
    briefly,
    see,
)

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

_portals: weakref.WeakSet[Portal[Any]] = weakref.WeakSet()
_exiting = False


class Portal(Generic[ACT_co]):
    """
    Runs async code, and a manager's statements, from threads that have no event loop.

    Owns a thread with a loop in it, on which *manager* is open. Both begin with the first call:
    so a portal can be made at import time, and each process of a server that forks has its own,
    whether the parent had used it or not. It is closed when the program exits.

    May be called from any thread, from many at once: they share the pool. Not from the loop of
    the portal itself, which would wait for itself.

    A caller's context variables are seen by what it calls; what that changes of them stays there.
    Whatever ends the wait of a caller (a KeyboardInterrupt, the time limit of a worker) cancels
    the task first, and waits for its end: its transaction is rolled back by then. A second one
    ends that wait, too.

    Args:
        manager: The manager; not opened by anybody else.
        loop_factory: What makes the loop; ``uvloop.new_event_loop`` for uvloop. A selector loop
            if None, which is what psycopg works on, on Windows too.

    Raises:
        ConfigError: If *manager* is none, or *loop_factory* cannot be called.

    .. versionadded:: 0.1.0
    """

    _thread: PortalThread | None = None
    """The thread; None until it is needed, and in a child that was forked."""

    def __init__(
        self,
        manager: PoolManager[ACT_co],
        *,
        loop_factory: Callable[[], asyncio.AbstractEventLoop] | None = None,
    ) -> None:
        require_manager(manager)
        require_callable("what makes an event loop", loop_factory=loop_factory)
        self._manager = manager
        self._loop_factory = loop_factory or asyncio.SelectorEventLoop
        self._site = call_site()
        self._lock = threading.Lock()
        self._closed = False
        _portals.add(self)

    @property
    def manager(self) -> PoolManager[ACT_co]:
        """The manager, for what runs on the loop."""
        return self._manager

    @override
    def __repr__(self) -> str:
        thread = self._thread
        state = "closed" if self._closed else "not started" if thread is None else "running"
        return f"<Portal {state} of {self._manager!r}>"

    # --- async code -----------------------------------------------------------------------------

    def run(
        self,
        function: Callable[[*Ts], Awaitable[T]],
        *args: *Ts,
        timeout: float | None = None,
    ) -> T:
        """
        Call an async *function* on the loop, wait for it, and return what it returns.

        Opens the pool if it is not open.

        Args:
            function: The async function, or whatever returns an awaitable.
            args: Its arguments; for others take `functools.partial`.
            timeout: Seconds that it may take, opening included; None for any number. It is
                cancelled then, and waited for.

        Raises:
            ConfigError: If *function* is none, but what one has returned.
            CallTimeout: If it took longer than *timeout*. A `TimeoutError`.
            LoopMismatchError: If called on the portal's own loop.
            ClosedError: If the portal is closed, or is closed meanwhile.
            OpenError: If the pool cannot be opened.

        Whatever *function* raises comes out of here, with the traceback.

        .. versionadded:: 0.1.0
        """
        if not callable(function):
            raise _called_already(function, "run")
        call: Call[T] = Call(cast(Any, function), args, timeout, sys._getframe(1))
        error = self._wait_for(call)
        if error is None:
            return call.result
        try:
            raise error
        finally:
            del error, call  # they hold the frames that hold them

    def submit(self, function: Callable[[*Ts], Awaitable[T]], *args: *Ts) -> futures.Future[T]:
        """
        Call an async *function* on the loop as `run()` does, and return at once.

        Returns:
            The future. Its ``cancel()`` cancels the task, and it is cancelled when the task has
            ended: whoever waits for it then knows that nothing goes on.

        Raises:
            ConfigError: If *function* is none, but what one has returned.
            ClosedError: If the portal is closed.

        .. versionadded:: 0.1.0
        """
        if not callable(function):
            raise _called_already(function, "submit")
        call: Call[T] = Call(cast(Any, function), args, None, sys._getframe(1))
        call.future = future = PortalFuture(call)
        self._send(call)
        return future

    # --- one statement --------------------------------------------------------------------------

    def execute(
        self,
        query: Query,
        params: Params | None = None,
        *,
        timeout: float | None = None,
        query_timeout: float | None = None,
    ) -> int:
        """
        Run one statement by itself, as `PoolManager.execute()` does, and wait for it.

        Raises:
            LoopMismatchError: If called on the portal's own loop.
            ClosedError: If the portal is closed, or is closed meanwhile.
            OpenError: If the pool cannot be opened.

        For the other errors see `PoolManager.execute()`.

        .. versionadded:: 0.1.0
        """
        return self._ask(
            sys._getframe(1), query, params, None, _door.ROWCOUNT, timeout, query_timeout
        )

    @overload
    def fetchone(
        self: Portal[AsyncConnection[Row]],
        query: Query,
        params: Params | None = None,
        *,
        timeout: float | None = None,
        query_timeout: float | None = None,
    ) -> Row | None: ...

    @overload
    def fetchone(
        self,
        query: Query,
        params: Params | None = None,
        *,
        row_factory: AsyncRowFactory[Row2],
        timeout: float | None = None,
        query_timeout: float | None = None,
    ) -> Row2 | None: ...

    def fetchone(
        self,
        query: Query,
        params: Params | None = None,
        *,
        row_factory: AsyncRowFactory[Any] | None = None,
        timeout: float | None = None,
        query_timeout: float | None = None,
    ) -> Any:
        """
        Run one statement as `execute()` does and return its first row, None if there is none.

        .. versionadded:: 0.1.0
        """
        frame = sys._getframe(1)
        return self._ask(frame, query, params, row_factory, _door.FIRST_ROW, timeout, query_timeout)

    @overload
    def fetchall(
        self: Portal[AsyncConnection[Row]],
        query: Query,
        params: Params | None = None,
        *,
        timeout: float | None = None,
        query_timeout: float | None = None,
    ) -> list[Row]: ...

    @overload
    def fetchall(
        self,
        query: Query,
        params: Params | None = None,
        *,
        row_factory: AsyncRowFactory[Row2],
        timeout: float | None = None,
        query_timeout: float | None = None,
    ) -> list[Row2]: ...

    def fetchall(
        self,
        query: Query,
        params: Params | None = None,
        *,
        row_factory: AsyncRowFactory[Any] | None = None,
        timeout: float | None = None,
        query_timeout: float | None = None,
    ) -> list[Any]:
        """
        Run one statement as `execute()` does and return all its rows.

        .. versionadded:: 0.1.0
        """
        frame = sys._getframe(1)
        return self._ask(frame, query, params, row_factory, _door.ALL_ROWS, timeout, query_timeout)

    def fetchval(
        self,
        query: Query,
        params: Params | None = None,
        *,
        timeout: float | None = None,
        query_timeout: float | None = None,
    ) -> Any:
        """
        Run one statement as `execute()` does and return the first column of its first row.

        .. versionadded:: 0.1.0
        """
        frame = sys._getframe(1)
        return self._ask(frame, query, params, scalar_row, _door.FIRST_ROW, timeout, query_timeout)

    def _ask(
        self,
        frame: FrameType,
        query: Query,
        params: Params | None,
        row_factory: AsyncRowFactory[Any] | None,
        fetch: _door.Fetch[T],
        timeout: float | None,
        query_timeout: float | None,
    ) -> T:
        manager = self._manager
        shot = _door.OneShot(query, params, row_factory, fetch, timeout, query_timeout, frame)
        call: Call[T] = Call(manager._way(shot), (manager.pool, shot), None, frame)
        error = self._wait_for(call)
        if error is None:
            return call.result
        try:
            ours = isinstance(error, PoolkeeperError | psycopg.Error)
            raise error.with_traceback(None) if ours else error
        finally:
            del error, call

    # --- its life -------------------------------------------------------------------------------

    @briefly
    def open(self) -> None:
        """
        Open the pool now, rather than with the first call; again after `close()`, too.

        Raises:
            OpenError: If it cannot be opened.
            LoopMismatchError: If the manager is open on another loop.

        .. versionadded:: 0.1.0
        """
        with self._lock:
            self._closed = False
        error = self._wait_for(Call(self._manager.open, (), None, sys._getframe(1)))
        if error is not None:
            raise error

    @briefly
    def close(self, timeout: float | None = None) -> None:
        """
        Close the pool, then the loop, and wait until its thread has ended.

        Connections in use may finish as for `PoolManager.close()`; what runs then is cancelled.
        Does nothing if it is closed, or was not started. It refuses calls from here on, until
        `open()`.

        Args:
            timeout: As for `PoolManager.close()`.

        Raises:
            ConfigError: If *timeout* is no number of seconds.
            LoopMismatchError: If called on the portal's own loop.

        .. versionadded:: 0.1.0
        """
        if timeout is not None:
            require_number(timeout=timeout)
        thread = self._thread
        if thread is not None and _get_running_loop() is thread.loop:
            raise self._calls_itself("close the portal")
        with self._lock:
            self._closed = True
            thread, self._thread = self._thread, None
        if thread is not None:
            thread.end(timeout)

    @briefly
    def __enter__(self) -> Self:
        self.open()
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __del__(self) -> None:
        thread = self._thread
        if thread is not None:
            thread.ask_to_end(None)

    def _wait_for(self, call: Call[Any]) -> BaseException | None:
        """
        Let *call* begin, wait until it is over, and return its error.

        Whatever ends the wait cancels the task, and is raised when that has ended.
        """
        try:
            self._send(call)
            call.until_over()
        except PoolkeeperError as ex:  # it was not sent
            raise ex.with_traceback(None)  # noqa: B904 - see briefly()
        except BaseException:
            call.give_up()
            raise
        return call.error

    def _send(self, call: Call[Any]) -> None:
        """Let *call* begin on the loop, which is begun if there is none."""
        running = _get_running_loop()
        if running is not None:
            self._look_at(running, call)
        for _ in range(2):
            thread = self._thread or self._begin()
            try:
                call.send(thread)
            except RuntimeError:  # it is closed: by somebody who has just closed the portal
                with self._lock:
                    if self._thread is thread:
                        self._thread = None
            else:
                return
        raise self._closed_error()

    def _begin(self) -> PortalThread:
        with self._lock:
            if self._closed or _exiting:
                raise self._closed_error()
            if self._thread is None:
                self._thread = PortalThread(self._manager, self._loop_factory, self._site)
                _close_with_process()
            return self._thread

    def _closed_error(self) -> ClosedError:
        why = "the program is exiting" if _exiting else "open() opens it again"
        return ClosedError(
            f'the portal of pool "{self._manager.name}" is closed',
            detail=f"Made at {self._site}. Called {Place.here()}.",
            hint=f"Call it before it is closed; {why}. {see('closed')}",
        )

    def _look_at(self, running: asyncio.AbstractEventLoop, call: Call[Any]) -> None:
        """Refuse a call on the portal's own loop; warn of one on another, which stands still."""
        thread = self._thread
        if thread is not None and running is thread.loop:
            raise self._calls_itself("call it")
        # A notebook's loop has nothing to do while a cell runs; and a future blocks nobody.
        if call.future is None and "ipykernel" not in sys.modules:
            warn_user(
                f'a call through the portal of pool "{self._manager.name}" blocks the event loop'
                " that runs in this thread, and all its tasks: await the manager there, with a"
                " pool of its own (PoolPerLoop), or call the portal in a thread"
                " (asyncio.to_thread)",
                BlockedLoopWarning,
            )

    def _calls_itself(self, purpose: str) -> LoopMismatchError:
        return LoopMismatchError(
            f'the portal of pool "{self._manager.name}" was called on its own event loop',
            detail=f"Made at {self._site}. Used {Place.here()} to {purpose}: that would wait for"
            " itself.",
            hint='This code runs on the loop already: await the manager here, as in "await'
            f' manager.fetchval(...)". {see("loop-mismatch")}',
        )


def _called_already(what: Any, method: str) -> ConfigError:
    name = getattr(what, "__name__", "function")
    if asyncio.iscoroutine(what):
        what.close()  # Python would warn that nobody has awaited it
    return ConfigError(
        f"{method}() cannot call a {type(what).__name__}",
        parameter="function",
        detail="It takes the async function, which is called on the loop, and its arguments.",
        hint=f"Write portal.{method}({name}, ...), not portal.{method}({name}(...))."
        f" {see('config')}",
    )


# --- the end of a process, and the beginning of another -------------------------------------------


def _close_all() -> None:
    global _exiting
    _exiting = True
    for portal in list(_portals):
        portal.close()


def _close_with_process() -> None:
    """Let multiprocessing end in order, too: a child of its does not run what atexit has."""
    process = sys.modules.get("multiprocessing.process")
    if process is not None and cast(Any, process).parent_process() is not None:
        from multiprocessing import util

        util.Finalize(None, _close_all, exitpriority=0)


def _after_fork_in_child() -> None:
    for portal in list(_portals):
        portal._lock = threading.Lock()  # another thread of the parent may have held it
        thread, portal._thread = portal._thread, None
        if thread is not None:
            inherited.append(thread)


atexit.register(_close_all)
in_forked_child(_after_fork_in_child)
