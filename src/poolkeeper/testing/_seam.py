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

from psycopg import IsolationLevel, pq
from typing_extensions import override

from poolkeeper import BoundPool
from poolkeeper._acquiring import take, wait_for_connection
from poolkeeper._binding import _bindings
from poolkeeper._checkouts import ACQUIRED
from poolkeeper._checkouts import Checkout as Checkout
from poolkeeper._cleaning import IDENTITY, run
from poolkeeper._compat import CHECK_CONNECTION
from poolkeeper._ending import tell_end
from poolkeeper._life import Life
from poolkeeper._life import StandIn as StandIn
from poolkeeper._log import log
from poolkeeper._manager import require_manager as require_manager
from poolkeeper._releasing import called
from poolkeeper._session import REPORTED_PARAMETERS, STANDBY, part_from_pipeline
from poolkeeper._status import IDLE, INERROR, INTRANS
from poolkeeper._where import Place, _loop_numbers, is_library, program_frame, site, where_now
from poolkeeper._words import in_words, raised_by
from poolkeeper.errors import ConfigError

from ._handles import Exchange, HandleLock, Sandboxed


def life_of(pool: BoundPool[Any]) -> Life:
    """Return the life of a pool that is open here; raise if it is not."""
    pool._life.check_usable("use it in a test")
    return cast(Life, pool._life)


_DISCARDS = [
    # What DISCARD ALL does, which the server runs outside of a transaction only.
    *(b"CLOSE ALL", b"SET SESSION AUTHORIZATION DEFAULT", b"RESET ALL", b"DEALLOCATE ALL"),
    *(b"UNLISTEN *", b"SELECT pg_catalog.pg_advisory_unlock_all()"),
    *(b"DISCARD PLANS", b"DISCARD TEMP", b"DISCARD SEQUENCES"),
]


class SandboxCheckout(Checkout):
    """The record of a checkout of a sandbox: it knows its own transaction, not the test's."""

    __slots__ = ("conn",)

    conn: weakref.ref[Any]
    failed_later: bool

    @override
    def note_exchange(self, status: int, seconds: float, now: float) -> None:
        if status in (INTRANS, INERROR) and not getattr(self.conn(), "in_transaction", False):
            status = IDLE
        super().note_exchange(status, seconds, now)


class KeptCheckout(Checkout):
    """The record of the sandbox's own, which is held as long as the test lasts, and no leak."""

    __slots__ = ()

    @property
    @override
    def reported(self) -> bool:
        return True


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

        conn._checkout.__class__ = KeptCheckout

    @classmethod
    async def acquire(cls, life: Life, stand_in: StandIn, timeout: float | None) -> Base:
        """Acquire one, in the pool's own way."""
        frame = program_frame(sys._getframe())
        conn = take(life, frame, frame.f_lineno, False)
        if conn is None:
            conn = await wait_for_connection(life, timeout, frame, frame.f_lineno, False)
        return cls(life, conn, stand_in)

    async def begin(self, isolation: IsolationLevel | None) -> None:
        """Begin the transaction of the test, of that level; None for the connection's own."""
        conn = self.conn
        command = b"BEGIN"
        level = isolation or conn.isolation_level
        if level is not None:
            command += b" ISOLATION LEVEL " + level.name.replace("_", " ").encode()
        if conn.pgconn.parameter_status(STANDBY) != b"on":
            command += b" READ WRITE"  # what is read-only says so by itself
        await conn.set_autocommit(True)
        await conn.execute(command)

    def let_talk(self, exchange: Exchange) -> None:
        """Let those handles talk by turns that are made from here on."""
        bound = cast(Any, type(self.conn))
        lock_class = type("SandboxLock", (HandleLock, bound._lock_class), {"exchange": exchange})
        name = f"Sandboxed{bound._user_class.__name__}"
        namespace = {"__module__": "poolkeeper", "__qualname__": name, "_lock_class": lock_class}
        self._class = type(name, (Sandboxed, bound), namespace)

    def checkout(self, task: Any, frame: FrameType | Any, lineno: int) -> SandboxCheckout:
        """Return the record of a checkout that begins."""
        return SandboxCheckout(self._session, task, frame.f_code, lineno, True, monotonic())

    def handle(self, checkout: SandboxCheckout, hold: Any) -> Any:
        """Return a connection for a checkout."""
        conn = self.new(hold)
        conn._checkout = checkout
        checkout.conn = weakref.ref(conn)
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

    # --- what is put in order ---------------------------------------------------------------

    @property
    def check(self) -> Any:
        """The user's callback that looks at a connection; psycopg_pool's asks for nothing here."""
        check = self._life.check
        return None if check is CHECK_CONNECTION else check

    def settings(self) -> Any:
        """Return those that the server reports, as they are."""
        return self._session._reported_parameters()

    def is_in_order(self) -> bool:
        """True if no setting is other than it was, and nothing else is to be done."""
        return self._life.reset is None and bool(self._session.parameters_unchanged)

    async def put_settings_back(self, fresh: Any, checkout: Checkout, were: Any) -> None:
        """Undo what a borrower has set; as *were*, if it lay within another one."""
        life, session = self._life, self._session
        if were is not None:
            literal = pq.Escaping(session.pgconn).escape_literal
            await run(
                fresh,
                [
                    b"SELECT pg_catalog.set_config('%b', %b, false)" % (name, bytes(literal(was)))
                    for name, was, now in zip(
                        REPORTED_PARAMETERS, were, self.settings(), strict=True
                    )
                    if was is not None and was != now and name not in (*IDENTITY, STANDBY)
                ],
            )
        elif life.cleaner.discards and not life.cleaner.shared:
            await run(fresh, _DISCARDS)
            session.forget_prepared(fresh)
        elif not session.parameters_unchanged:
            session.returned = checkout
            await life.cleaner.clean(fresh)

    async def reset(self, fresh: Any) -> None:
        """Call what the user has given to put a connection in order, if there is anything."""
        life = self._life
        if life.reset is None:
            return
        if life.reset != "discard":
            await called("reset", life.reset, fresh)
        elif (configure := life.cleaner._configure) is not None:
            await configure(fresh)
            self._session.forget_added_handlers(fresh)
        if fresh.in_transaction:
            raise ConfigError(
                "the reset callback left the connection in a transaction", parameter="reset"
            )

    def end(self, checkout: Checkout, outer: weakref.ref[Any] | None) -> None:
        """Note that a checkout has ended; *outer* is the handle that stands for the session now."""
        if checkout.task is not None:
            checkout.name = checkout.task.get_name()
        checkout.task = checkout.session = None
        self._session._handle = weakref.ref(self.conn) if outer is None else outer

    # --- what is told, as the pool tells it -------------------------------------------------

    def tell_begun(self, conn: Any, frame: Any, waited: float, queued: bool) -> None:
        """Tell who has subscribed that a checkout has begun."""
        checkout, listeners = conn._checkout, self._life.listeners
        if listeners.of_checkouts:
            checkout.caller = listeners.caller(checkout.code, checkout.lineno, frame)
            checkout.told = ACQUIRED
            listeners.send(
                listeners.records.Acquired(
                    pool=self._life.name,
                    task=checkout.task_name,
                    caller=checkout.caller,
                    waited_seconds=waited,
                    queued=queued,
                )
            )

    def tell_end(self, checkout: Checkout) -> None:
        """Tell them that it has ended."""
        tell_end(self._life, checkout, monotonic())

    def tell(self, event: str, checkout: Checkout | None = None, **fields: Any) -> None:
        """Log one of the pool's events."""
        facts = () if checkout is None else (checkout.facts(),)
        log(event, *facts, pool=self._life.name, **fields)

    def tell_busy(self, conn: Any) -> None:
        """Tell that a connection was given back while another task is at work on it."""
        conn._given_back = Place.here()
        self.tell("connection_busy", conn._checkout)

    def tell_refused(self, error: Exception) -> None:
        """Tell that `check` has refused the connection."""
        self.tell("check_refused", reason=raised_by("the check callback", error))

    def tell_out_of_order(self, error: Exception) -> None:
        """Tell that a connection could not be put in order."""
        self.tell("connection_out_of_order", reason=in_words(error))

    # --- how it ends --------------------------------------------------------------------------

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
