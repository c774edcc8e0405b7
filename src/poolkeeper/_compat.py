"""
The one place that touches the internals of psycopg_pool.

Every name used here was read in psycopg_pool 3.3.2 and 3.3.3; ``tests/unit/test_compat.py``
fails when one of them goes away or changes its meaning. Nothing is copied: these functions read
and set attributes, and call methods, of pools that poolkeeper made.
"""
# The point of this module.
# pyright: reportPrivateUsage=false, reportUnknownMemberType=false

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable
from contextlib import AbstractContextManager
from contextvars import ContextVar
from time import monotonic
from types import TracebackType
from typing import Any, Protocol, TypeAlias

from psycopg import AsyncConnection
from psycopg_pool import AsyncConnectionPool
from psycopg_pool._acompat import AEvent
from psycopg_pool.pool_async import AddConnection
from typing_extensions import override

AnyPool: TypeAlias = "AsyncConnectionPool[Any]"
AnyConnection: TypeAlias = "AsyncConnection[Any]"


class Line(Protocol):
    """What psycopg_pool asks of its queue of waiting clients."""

    def __len__(self) -> int: ...
    def __iter__(self) -> Any: ...
    def append(self, waiter: Any, /) -> None: ...
    def popleft(self) -> Any: ...
    def clear(self) -> None: ...


# --- one life of a pool ------------------------------------------------------------------


def begin_life(pool: AnyPool, line: Line, settings: dict[str, Any]) -> None:
    """
    Put *pool* into the state of one that was never opened, with *line* as its queue.

    psycopg_pool refuses to open a pool twice. Its constructor sets all the state there is, but
    for the lock, which it makes in ``open()`` and only where there is none.
    """
    AsyncConnectionPool.__init__(pool, open=False, **settings)
    vars(pool).pop("_lock", None)
    # Waiters are popped, and told, by _add_to_pool() and close(); the growth of the pool goes
    # on while there are any. Ours answer to the same calls: see _checkouts.Waiter.
    pool._waiting = line  # type: ignore[assignment]  # pyright: ignore[reportAttributeAccessIssue]


def end_life(pool: AnyPool) -> tuple[list[AnyConnection], list[asyncio.Task[None]]]:
    """
    Mark *pool* closed, and return its idle connections and its tasks, which it then forgets.

    Synchronous, unlike ``close()``: a cancellation cannot come half-way.
    """
    pool._closed = True
    connections = list(pool._pool)
    pool._pool.clear()
    tasks = [*pool._workers]
    if pool._sched_runner:
        tasks.append(pool._sched_runner)
    pool._workers = []
    pool._sched_runner = None
    return connections, tasks


def refuse_clients(pool: AnyPool) -> list[AnyConnection]:
    """
    Mark *pool* closed and return its idle connections; its tasks go on.

    From here on psycopg_pool closes each connection that comes back, or that a worker makes.
    """
    pool._closed = True
    connections = list(pool._pool)
    pool._pool.clear()
    return connections


def forget_task(task: asyncio.Task[None]) -> None:
    """Let *task*, whose loop will never run again, be dropped without a word."""
    task._log_destroy_pending = False  # type: ignore[attr-defined]  # pyright: ignore[reportAttributeAccessIssue]


class GivenUp(BaseException):  # not an error: psycopg_pool must not handle it
    """Raised instead of a cancellation where psycopg_pool's worker would swallow one."""


_in_worker: ContextVar[bool] = ContextVar("poolkeeper_in_worker", default=False)
_in_own_task: ContextVar[bool] = ContextVar("poolkeeper_in_own_task", default=False)


async def run_own(work: Awaitable[None]) -> None:
    """Do *work* in this task, which is the pool's own."""
    _in_own_task.set(True)
    await work


def in_own_task() -> bool:
    """Tell whether a task of a pool is running, a worker for one, not one of the user's."""
    return _in_own_task.get()


class cancellation_ends_worker(AbstractContextManager[None]):  # noqa: N801 - a statement
    """
    Let a cancellation of the block end the worker that runs it, if one does.

    Not made of a generator: from Python 3.12 on, the frames of a connection attempt that is
    cancelled inside one are kept, and its socket with them, for good.
    """

    @override
    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if isinstance(exc, asyncio.CancelledError) and _in_worker.get():
            raise GivenUp from None


async def run_worker(worker: Callable[[Any], Awaitable[None]], queue: Any) -> None:
    """
    Run psycopg_pool's *worker* on *queue* in such a way that a cancellation ends it.

    A worker swallows a cancellation that finds it at work (connecting, say), logs an empty
    message, goes back to its queue and waits there for ever, while ``asyncio.run()`` waits for
    it. What it was at goes back to the queue, for another worker.

    Source:
        psycopg_pool 3.3, ``AsyncConnectionPool.worker``; psycopg issue 1315.
    """
    _in_worker.set(True)
    _in_own_task.set(True)
    endable = _EndableQueue(queue)
    try:
        await worker(endable)
    except GivenUp:
        queue.put_nowait(endable.current)
        raise asyncio.CancelledError from None


class _EndableQueue:
    """A queue whose reader ends once its task was cancelled, even if it swallowed that."""

    def __init__(self, queue: asyncio.Queue[Any]) -> None:
        self._queue = queue
        self.current: Any = None

    async def get(self) -> Any:
        _end_if_cancelled()
        self.current = await self._queue.get()
        return self.current


class _EndableEvent(AEvent):
    """An event whose waiter ends once its task was cancelled, even if that was swallowed."""

    @override
    async def wait_timeout(self, timeout: float) -> bool:
        # Not with asyncio.wait_for(), as psycopg_pool does: that of Python 3.11 makes a task,
        # which nobody could forget when its loop is gone, and drops a cancellation that arrives
        # together with the event (cpython issue 86296).
        _end_if_cancelled()
        try:
            async with asyncio.timeout(timeout):
                return await self.wait()
        except TimeoutError:
            return False


def _end_if_cancelled() -> None:
    task = asyncio.current_task()
    if task is not None and task.cancelling():
        raise asyncio.CancelledError


def make_scheduler_endable(pool: AnyPool) -> None:
    """Let a cancellation end the scheduler of *pool*, which was made but has not run yet."""
    pool._sched._event = _EndableEvent()


# --- the stock of connections --------------------------------------------------------------


def idle(pool: AnyPool) -> deque[Any]:
    """Return the idle connections of *pool*, the next to be handed out first: the live deque."""
    return pool._pool


def note_idle_low(pool: AnyPool) -> None:
    """Tell *pool* that an idle connection was taken, for it to know what it can shrink by."""
    if len(pool._pool) < pool._nconns_min:
        pool._nconns_min = len(pool._pool)


def total(pool: AnyPool) -> int:
    """Return how many connections *pool* counts: idle, in use, being made."""
    return pool._nconns


def grow(pool: AnyPool) -> None:
    """Start one more connection if *pool* has room and is not growing already."""
    pool._maybe_grow_pool()


def replace_lost(pool: AnyPool) -> None:
    """Start a connection in place of one that is gone."""
    pool.run_task(AddConnection(pool))


def set_owner(conn: AnyConnection, pool: AnyPool | None) -> None:
    """Mark *conn* as checked out of *pool*, or as idle in it."""
    conn._pool = pool


def owner(conn: AnyConnection) -> object:
    """Return the pool that *conn* is checked out of, None where it is not."""
    return getattr(conn, "_pool", None)


def is_expired(pool: AnyPool, conn: AnyConnection) -> bool:
    """Tell whether *conn* is past its lifetime, or older than the last ``drain()``."""
    return conn._expire_at <= monotonic() or conn._created_at <= pool._drained_at


async def put_back(pool: AnyPool, conn: AnyConnection, *, from_getconn: bool = False) -> None:
    """
    Return *conn*, in whatever state, the way psycopg_pool does it.

    Roll back, reset, close and replace where needed, else hand it on. In the caller's task:
    ``putconn()`` leaves it to a worker where there is a ``reset``, and a worker may be gone.
    """
    if pool.closed:
        await pool._close_connection(conn)
        return
    await pool._return_connection(conn, from_getconn=from_getconn)


def count(pool: AnyPool, key: str, by: int = 1) -> None:
    """Add to one of the counters that ``get_stats()`` shows."""
    pool._stats[key] += by
