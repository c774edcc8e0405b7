"""
The thread of a portal, and the calls that it drives: what `Portal` is made of.

A thread that calls shares nothing with the loop but two things that any thread may use:
``call_soon_threadsafe()``, and the lock, or the future, of its call.
"""
# When a manager is closed at last is not the business of its users.
# pyright: reportPrivateUsage=false

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable
from concurrent import futures
from contextlib import suppress
from contextvars import Context, copy_context
from types import FrameType
from typing import Any, Generic, TypeVar, cast

from typing_extensions import override

from ._config import require_number
from ._manager import PoolManager
from ._where import raised_at, site
from .errors import CallTimeout, ClosedError, LoopMismatchError, see

T = TypeVar("T")

_SLICE = 0.2
"""
Seconds for which a thread waits before it looks around.

An exception that was set for it (Dramatiq's time limit) is raised between two waits only, and on
Windows so is the KeyboardInterrupt.
"""

_GRACE = 3.0
"""Seconds that `PortalThread.end()` waits, beyond those that connections in use may go on."""


class PortalThread:
    """
    The thread of a portal, from its first call until it is closed.

    Args:
        manager: Is closed before the loop is.
        loop_factory: Makes the loop, in the thread.
        opened: ``file:line`` that messages name as where the pool was opened.
    """

    loop: asyncio.AbstractEventLoop

    def __init__(
        self,
        manager: PoolManager[Any],
        loop_factory: Callable[[], asyncio.AbstractEventLoop],
        opened: str,
    ) -> None:
        self.manager = manager
        self.opened = opened
        self.ending = False
        self._factory = loop_factory
        self._timeout: float | None = None
        self._started = threading.Event()
        self._failure: BaseException | None = None
        # Not one that the interpreter waits for: that would be before it is told to end.
        name = f"{manager.name}-portal"
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()
        self._started.wait()
        if self._failure is not None:
            raise self._failure

    def _run(self) -> None:
        try:
            # It cancels what is left at the end, and closes the loop.
            with asyncio.Runner(loop_factory=self._factory) as runner:
                runner.run(self._serve())
        except BaseException as ex:
            if self._started.is_set():
                raise
            self._failure = ex
            self._started.set()

    async def _serve(self) -> None:
        self.loop = asyncio.get_running_loop()
        self._asked = asyncio.Event()
        self._started.set()
        await self._asked.wait()
        # Not open here, if somebody has opened it elsewhere.
        with suppress(LoopMismatchError):
            await self.manager.close(self._timeout)

    def is_alive(self) -> bool:
        """Tell whether it has not ended."""
        return self._thread.is_alive()

    def ask_to_end(self, timeout: float | None) -> None:
        """Let the thread end; from any thread."""
        self.ending = True
        self._timeout = timeout
        with suppress(RuntimeError):  # the loop is closed
            self.loop.call_soon_threadsafe(self._asked.set)

    def end(self, timeout: float | None) -> None:
        """Let the thread end, and wait for it; not for ever, for a task may not let go."""
        self.ask_to_end(timeout)
        seconds = self.manager._close_timeout if timeout is None else timeout
        self._thread.join(seconds + _GRACE)


class Call(Generic[T]):
    """One call: made in the caller's thread, driven on the loop, and waited for."""

    result: T
    future: PortalFuture[T] | None = None

    def __init__(
        self,
        function: Callable[..., Awaitable[T]],
        args: tuple[Any, ...],
        timeout: float | None,
        frame: FrameType,
    ) -> None:
        if timeout is not None:
            require_number(timeout=timeout)
        self.error: BaseException | None = None
        self._function = function
        self._args = args
        self._timeout = timeout
        self._asked = frame.f_code, frame.f_lineno
        self._context: Context = copy_context()
        self._thread: PortalThread
        self._task: asyncio.Task[None] | None = None
        # Held until the call is over: the cheapest that a thread can wait for.
        self._running = threading.Lock()
        self._running.acquire()

    def send(self, thread: PortalThread) -> None:
        """Begin on the loop; from any thread."""
        self._thread = thread
        thread.loop.call_soon_threadsafe(self._begin)

    def _begin(self) -> None:
        task = cast(Any, self._thread.loop).create_task(self._drive(), context=self._context)
        self._task = task

    async def _drive(self) -> None:
        thread = self._thread
        manager = thread.manager
        try:
            if self._timeout is None:
                if manager.state != "open":
                    await manager.open(caller=thread.opened)
                self.result = await self._function(*self._args)
            else:
                await self._drive_in_time(self._timeout)
        except BaseException as ex:
            # Not even a SystemExit is the loop's: it is the caller's.
            entry = ex.__traceback__
            self.error = ex.with_traceback(entry.tb_next if entry is not None else None)
        finally:
            self._function, self._args = cast(Any, None), ()
            self._end()

    async def _drive_in_time(self, seconds: float) -> None:
        thread = self._thread
        limit = asyncio.timeout(seconds)
        try:
            async with limit:
                if thread.manager.state != "open":
                    await thread.manager.open(caller=thread.opened)
                self.result = await self._function(*self._args)
        except TimeoutError as ex:
            if not limit.expired():
                raise
            stood = raised_at(ex.__cause__) if ex.__cause__ is not None else ""
            raise CallTimeout(
                f'a call through the portal of pool "{thread.manager.name}" took longer than'
                f" timeout={seconds:.2f} s",
                detail=f"Called at {site(*self._asked)}. The task was cancelled"
                f"{f' at {stood}' if stood else ''}, and has ended.",
                hint="Look at what it waits for there, or give it more time. What it had committed"
                f" stays; what it had not is rolled back. {see('call-timeout')}",
            ) from None

    def _end(self) -> None:
        if isinstance(self.error, asyncio.CancelledError) and self._thread.ending:
            self.error = ClosedError(
                f'the portal of pool "{self._thread.manager.name}" was closed during a call',
                detail=f"Called at {site(*self._asked)}; the task was cancelled.",
                hint=f"Close it when its callers have finished. {see('closed')}",
            )
        if self.future is None:
            self._running.release()
        else:
            self.future.end(self)

    def cancel(self) -> None:
        """Cancel the task; from any thread."""
        with suppress(RuntimeError):  # the loop is closed, and so is the task
            self._thread.loop.call_soon_threadsafe(self._cancel)

    def _cancel(self) -> None:
        if self._task is not None:
            self._task.cancel()

    def until_over(self) -> None:
        """Wait until the call is over."""
        while not self._running.acquire(timeout=_SLICE):
            thread = self._thread
            if not thread.is_alive() and not self._running.acquire(timeout=_SLICE):
                # Sent to a loop that had turned for the last time.
                thread.ending = True
                self.error = asyncio.CancelledError()
                self._end()

    def give_up(self) -> None:
        """Cancel the task, if it was begun, and wait until it has ended."""
        if "_thread" in vars(self):
            self.cancel()
            self.until_over()


class PortalFuture(futures.Future[T]):
    """The future of a call: cancelled is what it is when the task has ended."""

    def __init__(self, call: Call[T]) -> None:
        super().__init__()
        self._call = call

    @override
    def cancel(self) -> bool:
        """Cancel the task; return False if it has ended."""
        if self.done():
            return False
        self._call.cancel()
        return True

    def end(self, call: Call[T]) -> None:
        """Take over how *call* has ended."""
        error = call.error
        if isinstance(error, asyncio.CancelledError):
            super().cancel()
            self.set_running_or_notify_cancel()
        elif error is not None:
            self.set_exception(error)
        else:
            self.set_result(call.result)
