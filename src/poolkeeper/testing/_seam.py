"""
What a sandbox needs of the pool's rooms: the one module in here that knows what is not public.

A sandbox is a `StandIn`, acquires one connection as everybody does, and makes handles over its
session, as the pool makes one for each checkout.
"""
# pyright: reportPrivateUsage=false

from __future__ import annotations

import asyncio
import sys
import weakref
from time import monotonic
from types import FrameType
from typing import Any, cast

from poolkeeper import BoundPool
from poolkeeper._acquiring import take, wait_for_connection
from poolkeeper._binding import _bindings
from poolkeeper._checkouts import Checkout as Checkout
from poolkeeper._life import Life
from poolkeeper._life import StandIn as StandIn
from poolkeeper._session import part_from_pipeline
from poolkeeper._where import _loop_numbers, is_library, program_frame, site, where_now

from ._handles import Exchange, HandleLock, Sandboxed


def life_of(pool: BoundPool[Any]) -> Life:
    """Return the life of a pool that is open here; raise if it is not."""
    pool._life.check_usable("use it in a test")
    return cast(Life, pool._life)


class Base:
    """
    The connection that a sandbox has of the pool, and what is made over its session.

    Args:
        life: Of the pool.
        conn: The connection.
        stand_in: Whose it is from now on.
    """

    def __init__(self, life: Life, conn: Any, stand_in: StandIn) -> None:
        self.conn = conn
        self._life = life
        self._session = conn._session
        self._stand_in = stand_in
        self._class: Any = None

    @classmethod
    async def acquire(cls, life: Life, stand_in: StandIn, timeout: float | None) -> Base:
        """Acquire one, in the pool's own way."""
        frame = program_frame(sys._getframe())
        conn = take(life, frame, frame.f_lineno, False)
        if conn is None:
            conn = await wait_for_connection(life, timeout, frame, frame.f_lineno, False)
        return cls(life, conn, stand_in)

    def let_talk(self, exchange: Exchange) -> None:
        """Let those handles talk by turns that are made from here on."""
        bound = cast(Any, type(self.conn))
        lock_class = type("SandboxLock", (HandleLock, bound._lock_class), {"exchange": exchange})
        name = f"Sandboxed{bound._user_class.__name__}"
        namespace = {"__module__": "poolkeeper", "__qualname__": name, "_lock_class": lock_class}
        self._class = type(name, (Sandboxed, bound), namespace)

    def checkout(self, task: Any, frame: FrameType | Any, lineno: int) -> Checkout:
        """Return the record of a checkout that begins."""
        return Checkout(self._session, task, frame.f_code, lineno, True, monotonic())

    def handle(self, checkout: Checkout, hold: Any) -> Any:
        """Return a connection for a checkout."""
        conn = self.new(hold)
        conn._checkout = checkout
        conn._pool = self._stand_in
        return conn

    def new(self, hold: Any) -> Any:
        """Return a handle that is as `configure` left the first one."""
        # Of one like the base, for who is made anew is retired.
        like: Any = object.__new__(self._class)
        like.__dict__.update(self.conn.__dict__, lock=self._class._lock_class())
        return self.successor(like, hold)

    def successor(self, conn: Any, hold: Any) -> Any:
        """Retire *conn*; return a handle for the same checkout, to put things in order by."""
        fresh = self._session.successor(conn)
        fresh.lock = self._class._lock_class()
        fresh._hold = hold
        return fresh

    def part_from_pipeline(self, conn: Any) -> None:
        """Take the session away from the pipeline of *conn*, which was given back."""
        part_from_pipeline(conn)

    def is_in_order(self) -> bool:
        """True if no setting is other than it was."""
        return bool(self._session.parameters_unchanged)

    async def clean(self, fresh: Any, checkout: Checkout) -> None:
        """Put settings back that a borrower has changed."""
        if not self.is_in_order():
            self._session.returned = checkout
            await self._life.cleaner.clean(fresh)

    def end(self, checkout: Checkout, outer: weakref.ref[Any] | None) -> None:
        """Note that a checkout has ended; *outer* is the handle that stands for the session now."""
        if checkout.task is not None:
            checkout.name = checkout.task.get_name()
        checkout.task = checkout.session = None
        self._session._handle = weakref.ref(self.conn) if outer is None else outer

    def finish(self) -> None:
        """End the session, which cannot be saved."""
        self._session.finish()

    async def put_back(self) -> None:
        """Undo all, and give the connection back to the pool."""
        self._session._handle = weakref.ref(self.conn)
        pool: Any = self._life.pool
        if pool._life is not self._life:  # it was closed meanwhile
            self.finish()
            return
        try:
            if not self.conn.closed:
                async with asyncio.timeout(10):
                    await self.conn.rollback()
        finally:
            await pool.putconn(self.conn)


# --- what there is, for who looks at what tests leave behind ------------------------------------


def live_pools() -> list[Any]:
    """Return the pools that are open, on whichever loop, alive or not."""
    found: list[Any] = []
    for binding in list(_bindings):
        pool: Any = binding.pool() if binding.pool is not None else None
        if pool is not None and not pool._life.ending and pool._life.binding is binding:
            found.append(pool)
    return found


def loops_with_pools() -> list[asyncio.AbstractEventLoop]:
    """Return the loops on which a pool was opened, and that are not closed."""
    return [loop for loop in list(_loop_numbers) if not loop.is_closed()]


def idle_pids(pool: Any) -> list[int]:
    """Return the server processes of the connections that nobody holds."""
    return [conn.info.backend_pid for conn in life_of(pool).idle]


def where_opened(pool: Any) -> str:
    """Return where a pool was opened, in words."""
    return str(pool._life.binding.opened)


def checkouts(pool: Any) -> list[Checkout]:
    """Return who holds a connection of a pool."""
    return cast("list[Checkout]", pool.checkouts())


def line_of_task(task: asyncio.Task[Any]) -> str | None:
    """Return the line at which a task of the program's own stands; None if it is a library's."""
    code = getattr(task.get_coro(), "cr_code", None)
    if code is None or is_library(code):
        return None
    now, _ = where_now(task, code)
    return site(*now) if now is not None else site(code, code.co_firstlineno)
