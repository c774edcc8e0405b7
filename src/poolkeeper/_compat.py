"""
The one place that touches the internals of psycopg_pool.

Every name used here was read in psycopg_pool 3.3.2 and 3.3.3; ``tests/unit/test_compat.py``
fails when one of them goes away or changes its meaning. In the hands of users the import fails
then, and says so: nothing shall fail later. Nothing is copied: these functions read and set
attributes, and call methods, of pools that poolkeeper made.
"""
# The point of this module.
# pyright: reportPrivateUsage=false, reportUnknownMemberType=false

from __future__ import annotations

import asyncio
from collections import deque
from time import monotonic
from typing import Any, Protocol, TypeAlias

from psycopg import AsyncConnection
from psycopg.rows import TupleRow
from psycopg_pool import AsyncConnectionPool
from typing_extensions import TypeVar, override

from .errors import MissingDependencyError, see_site

NEEDED = (
    "_CONNECTIONS_ERRORS", "_CONNECTIONS_LOST", "_CONNECTIONS_MS", "_CONNECTIONS_NUM",
    "_REQUESTS_ERRORS", "_REQUESTS_NUM", "_REQUESTS_QUEUED", "_REQUESTS_WAIT_MS", "_RETURNS_BAD",
    "_USAGE_MS", "_add_to_pool", "_check_pool_putconn", "_check_size", "_close_connection",
    "_closed", "_drained_at", "_growing", "_max_size", "_maybe_grow_pool", "_min_size", "_nconns",
    "_nconns_min", "_pool", "_resolve_conninfo", "_resolve_kwargs", "_return_connection",
    "_sched_runner", "_set_connection_expiry_date", "_start_workers", "_stats", "_waiting",
    "_workers", "check", "closed", "drain", "get_stats", "max_size", "min_size", "open",
    "pop_stats", "reconnect_failed", "run_task",
)  # fmt: skip
"""What poolkeeper needs of a pool that is not open."""

SET_BY = {"_open": ("_sched",), "_set_connection_expiry_date": ("_created_at", "_expire_at")}
"""What it needs besides, by the method of the pool that sets it."""


def _cannot_work(lacks: str) -> MissingDependencyError:
    from importlib.metadata import PackageNotFoundError, version  # only now: it takes time

    def of(package: str) -> str:
        try:
            return version(package)
        except PackageNotFoundError:
            return "(not installed as a package)"

    return MissingDependencyError(
        f"poolkeeper {of('poolkeeper')} does not work with psycopg_pool {of('psycopg-pool')}",
        detail=f"It needs what that version does not have: {lacks}.",
        hint="Install a newer poolkeeper, or a psycopg_pool that this one was tried with:"
        f' pip install "psycopg-pool>=3.3.2,<3.4". {see_site("missing-dependency")}',
    )


def require() -> None:
    """
    Raise if psycopg_pool lacks anything that poolkeeper needs.

    Raises:
        MissingDependencyError: With both versions, and what to install.
    """
    try:
        specimen = AsyncConnectionPool(open=False, name="poolkeeper")
        scheduler = AsyncScheduler()
    except Exception as ex:
        raise _cannot_work(f"a constructor that takes what it did ({ex})") from ex
    lacks = [name for name in NEEDED if not hasattr(specimen, name)]
    for method, names in SET_BY.items():
        code = getattr(getattr(specimen, method, None), "__code__", None)
        lacks += [name for name in names if code is None or name not in code.co_names]
    if not hasattr(scheduler, "_event"):
        lacks.append("AsyncScheduler._event")
    if lacks:
        raise _cannot_work(", ".join(lacks))


try:
    from psycopg_pool._acompat import AEvent
    from psycopg_pool.pool_async import AddConnection
    from psycopg_pool.sched_async import AsyncScheduler
except ImportError as ex:
    raise _cannot_work(str(ex)) from ex

require()

ACT = TypeVar("ACT", bound="AsyncConnection[Any]", default="AsyncConnection[TupleRow]")
CHECK_CONNECTION = AsyncConnectionPool.check_connection

AnyPool: TypeAlias = "AsyncConnectionPool[Any]"
AnyConnection: TypeAlias = "AsyncConnection[Any]"


class TellingPool(AsyncConnectionPool[ACT]):
    """A pool that tells which function of the user's it calls to make or to end a connection."""

    def calls(self, doing: str, function: object = None) -> None:
        """Note what the running attempt does from here on: "in the conninfo function"."""
        raise NotImplementedError

    @override
    async def _resolve_conninfo(self) -> str:
        if not callable(self.conninfo):
            return await super()._resolve_conninfo()
        self.calls("in the conninfo function", self.conninfo)
        given = await super()._resolve_conninfo()
        self.calls("waiting for the server")  # not if it raises: it is known by that who did
        return given

    @override
    async def _resolve_kwargs(self) -> dict[str, Any]:
        if not callable(self.kwargs):
            return await super()._resolve_kwargs()
        self.calls("in the kwargs function", self.kwargs)
        given = await super()._resolve_kwargs()
        self.calls("waiting for the server")  # not if it raises: it is known by that who did
        return given

    async def end_connection(self, conn: Any) -> None:
        """End *conn*, which nobody holds, whatever its ``close()`` raises."""
        raise NotImplementedError

    @override
    async def _close_connection(self, conn: Any) -> None:
        await self.end_connection(conn)


class Line(Protocol):
    """What psycopg_pool asks of its queue of waiting clients."""

    def __len__(self) -> int: ...
    def __iter__(self) -> Any: ...
    def append(self, waiter: Any, /) -> None: ...
    def popleft(self) -> Any: ...
    def clear(self) -> None: ...


# --- one life of a pool ------------------------------------------------------------------


def begin_life(pool: AnyPool, line: Line, settings: dict[str, Any]) -> deque[Any]:
    """
    Put *pool* into the state of one that was never opened, with *line* as its queue.

    Returns:
        Its idle connections, the next to be handed out first: the live deque, which psycopg_pool
        changes and never replaces.

    psycopg_pool refuses to open a pool twice. Its constructor sets all the state there is, but
    for the lock, which it makes in ``open()`` and only where there is none.
    """
    AsyncConnectionPool.__init__(pool, open=False, **settings)
    vars(pool).pop("_lock", None)
    # Waiters are popped, and told, by _add_to_pool() and close(); the growth of the pool goes
    # on while there are any. Ours answer to the same calls: see _checkouts.Waiter.
    pool._waiting = line  # type: ignore[assignment]  # pyright: ignore[reportAttributeAccessIssue]
    return pool._pool


def refuse_clients(pool: AnyPool) -> list[AnyConnection]:
    """
    Mark *pool* closed and return its idle connections; its tasks go on.

    From here on psycopg_pool closes each connection that comes back, or that a worker makes.
    """
    pool._closed = True
    connections = list(pool._pool)
    pool._pool.clear()
    return connections


def end_life(pool: AnyPool) -> tuple[list[AnyConnection], list[asyncio.Task[None]]]:
    """
    Mark *pool* closed, and return its idle connections and its tasks, which it then forgets.

    Synchronous, unlike ``close()``: a cancellation cannot come half-way.
    """
    connections = refuse_clients(pool)
    tasks = maintenance_tasks(pool)
    pool._workers = []
    pool._sched_runner = None
    return connections, tasks


def maintenance_tasks(pool: AnyPool) -> list[asyncio.Task[None]]:
    """Return the tasks of *pool* itself, which hold it by weak references only."""
    return [*pool._workers, *([pool._sched_runner] if pool._sched_runner else [])]


def forget_task(task: asyncio.Task[None]) -> None:
    """Let *task*, whose loop will never run again, be dropped without a word."""
    task._log_destroy_pending = False  # type: ignore[attr-defined]  # pyright: ignore[reportAttributeAccessIssue]


class _EndableEvent(AEvent):
    """An event whose waiter ends once its task was cancelled, even if that was swallowed."""

    tied: list[asyncio.Task[None]]
    """What lives as long as who waits."""

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
    _tie_tasks(pool)


def _tie_tasks(pool: AnyPool) -> None:
    """
    Let the maintenance tasks of *pool* outlive it, so that they can be ended if it is dropped.

    They hold it by weak references. The loop holds the scheduler, by the timer of its next look,
    and that one the workers, which nothing else does: they would be destroyed with the pool.
    """
    tasks = maintenance_tasks(pool)
    event: Any = pool._sched._event
    event.tied = tasks
    for task in tasks:
        forget_task(task)


# --- the stock of connections --------------------------------------------------------------


def note_idle_low(pool: AnyPool, left: int) -> None:
    """Tell *pool* how many idle connections are left, for it to know what it can shrink by."""
    if left < pool._nconns_min:
        pool._nconns_min = left


def total(pool: AnyPool) -> int:
    """Return how many connections *pool* counts: idle, in use, being made."""
    return pool._nconns


def grow(pool: AnyPool) -> None:
    """Ask for one more connection if *pool* has room and is not growing already."""
    pool._maybe_grow_pool()


def adds_connection(task: object) -> bool:
    """Tell whether a piece of maintenance work is the making of a connection."""
    return isinstance(task, AddConnection)


def replace_lost(pool: AnyPool, *, found_idle: bool = False) -> None:
    """Ask for a connection in place of one that is gone."""
    if found_idle:
        pool._stats[pool._CONNECTIONS_LOST] += 1
    pool.run_task(AddConnection(pool))


async def parameters(pool: AnyPool) -> tuple[str, dict[str, Any]]:
    """Return what one connection of *pool* is to be made with."""
    return await pool._resolve_conninfo(), await pool._resolve_kwargs()


def begin_lifetime(pool: AnyPool, conn: AnyConnection) -> None:
    """Let *conn* expire `max_lifetime` seconds from now, a little more or less."""
    pool._set_connection_expiry_date(conn)


async def add(pool: AnyPool, conn: AnyConnection) -> None:
    """
    Add a new connection to *pool* and let the growth go on, one connection at a time.

    Source:
        psycopg_pool 3.3 does the same in a worker.
    """
    await pool._add_to_pool(conn)
    pool._growing = False
    if pool._nconns < pool._min_size or pool._waiting:
        pool._maybe_grow_pool()


def resize(pool: AnyPool, min_size: int, max_size: int | None) -> None:
    """
    Set the sizes, and ask for the connections that are missing at the new minimum.

    psycopg_pool 3.3 asks for as many as the minimum is raised by, whatever there are already:
    it may come to have more than its maximum.
    """
    pool._min_size, pool._max_size = pool._check_size(min_size, max_size)
    while pool._nconns < pool._min_size:
        pool._nconns += 1
        pool.run_task(AddConnection(pool))


def drain(pool: AnyPool) -> list[AnyConnection]:
    """Let what is in use be replaced when it comes back; return the idle ones."""
    pool._drained_at = monotonic()
    connections = list(pool._pool)
    pool._pool.clear()
    return connections


def forget_connections(pool: AnyPool, number: int) -> None:
    """Count *number* fewer connections: they were to be made, and are not needed any more."""
    pool._nconns -= number
    pool._growing = False


def tasks_go_on(pool: AnyPool) -> bool:
    """Tell whether nobody has cancelled the maintenance tasks of *pool*."""
    tasks = [*pool._workers, pool._sched_runner]
    return all(task and not task.done() and not task.cancelling() for task in tasks)


def mend(pool: AnyPool) -> None:
    """Start the maintenance tasks of *pool* again if somebody has cancelled them."""
    if tasks_go_on(pool):
        return
    for task in (*pool._workers, pool._sched_runner):
        if task is not None:
            task.cancel()
    pool._workers = []
    pool._start_workers()
    _tie_tasks(pool)


def set_owner(conn: AnyConnection, pool: AnyPool | None) -> None:
    """Mark *conn* as checked out of *pool*, or as idle in it."""
    conn._pool = pool


def owner(conn: AnyConnection) -> object:
    """Return the pool that *conn* is checked out of, None where it is not."""
    return getattr(conn, "_pool", None)


def is_expired(pool: AnyPool, conn: AnyConnection, now: float) -> bool:
    """Tell whether *conn* is past its lifetime, or older than the last ``drain()``."""
    return conn._expire_at <= now or conn._created_at <= pool._drained_at


def expire(conn: AnyConnection, template: dict[str, Any]) -> None:
    """Let *conn*, and what is made of its *template* in its place, be replaced on its return."""
    conn._expire_at = template["_expire_at"] = 0.0


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
