"""
Connections that know which pool they belong to, and for how long.

`bound_class()` makes, for one life of a pool, a subclass of the user's connection class that
checks the event loop before each I/O and tells the pool why a connection could not be made.

What a borrower holds is a *handle*: one connection object for one checkout. When it is given
back, `Session.successor()` makes a new object of the same class over the same server session,
from a template taken after ``configure``, and `retire()` turns the old one into an object that
refuses everything. So a late use is refused even when the session is somebody else's by then,
and what a borrower changed on the object is gone with the object.
"""
# A handle is made from the attributes that psycopg gives a connection.
# pyright: reportPrivateUsage=false

from __future__ import annotations

import asyncio
import socket
import weakref
from collections import deque
from collections.abc import Coroutine
from contextlib import suppress
from functools import partial
from typing import Any, ClassVar, Literal, NoReturn, Protocol, Self, cast

import psycopg
from psycopg import AsyncConnection
from psycopg._connection_base import BaseConnection
from psycopg.abc import PQGen
from psycopg.adapt import AdaptersMap
from psycopg.types import TypesRegistry
from typing_extensions import TypeVar, override

from . import _compat
from ._binding import LoopBinding
from ._checkouts import Checkout
from ._where import Place
from .errors import ClosedError, PoolkeeperError, ReleasedConnectionError, see

T = TypeVar("T")

CANCEL_GRACE = 1.0
"""Seconds that a server has to stop a query of which nobody wants the result any more."""

# Parameters of a session that PostgreSQL reports when they change (search_path: since 18) and
# that a client can change. Documented in "Asynchronous Operations", protocol chapter.
REPORTED_PARAMETERS = (
    b"client_encoding",
    b"DateStyle",
    b"IntervalStyle",
    b"TimeZone",
    b"application_name",
    b"search_path",
    b"default_transaction_read_only",
    b"standard_conforming_strings",
    b"session_authorization",
    b"is_superuser",
)


class Keeper(Protocol):
    """What a connection asks of the pool that it is made for."""

    name: str
    close_returns: bool

    def connect_parameters(self, conninfo: str, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Return *kwargs* completed for one connection attempt."""
        ...

    def attempt_begins(self) -> None:
        """Note that a connection attempt has started."""
        ...

    def attempt_ended(self, error: BaseException | None) -> None:
        """Note that it ended; with what error, if it failed."""
        ...

    def session_begins(self, session: Session) -> None:
        """Note a new server session."""
        ...


class BoundLock(asyncio.Lock):
    """
    The lock of a connection, for its owner loop only.

    `BoundConnection.wait()` comes too late: a stranger would wait for the lock first, while
    its owner is at work, with nobody to wake it; and to let a lock go from another thread
    leaves the owner's own tasks asleep.
    """

    _binding: ClassVar[LoopBinding]

    @override
    def acquire(self) -> Coroutine[Any, Any, Literal[True]]:  # pyright: ignore[reportIncompatibleMethodOverride]
        if not self._binding.is_here():
            raise self._binding.mismatch("used through one of its connections")
        return super().acquire()


class BoundConnection(AsyncConnection[Any]):
    """What poolkeeper adds to a connection class. Made concrete by `bound_class()`."""

    _keeper: ClassVar[weakref.ref[Any]]
    _binding: ClassVar[LoopBinding]
    _lock_class: ClassVar[type[BoundLock]]
    _released_class: ClassVar[type[RetiredConnection]]
    _revoked_class: ClassVar[type[RetiredConnection]]

    _session: Session
    _lost_work: bool  # set when it is revoked

    @override
    @classmethod
    async def connect(cls, conninfo: str = "", **kwargs: Any) -> Self:
        keeper: Keeper | None = cls._keeper()
        if keeper is None:  # the pool is gone; its last worker is about to find out
            raise psycopg.InterfaceError("the pool of this connection class is gone")
        keeper.attempt_begins()
        try:
            parameters = keeper.connect_parameters(conninfo, kwargs)
            with _compat.cancellation_ends_worker():
                conn = await super().connect(**parameters)
        except BaseException as ex:
            # Not kept in a variable: a cycle with the traceback would keep the socket open.
            keeper.attempt_ended(ex)
            raise
        keeper.attempt_ended(None)
        conn.lock = cls._lock_class()
        conn._session = Session(conn)
        keeper.session_begins(conn._session)
        return conn

    @override
    def wait(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, gen: PQGen[T], *args: Any, **kwargs: Any
    ) -> Coroutine[Any, Any, T]:
        # Every I/O of a connection, its cursors, transactions, pipelines and copies ends here.
        # Not a coroutine function: one frame less for each.
        if not self._binding.is_here():
            raise self._binding.mismatch("used through one of its connections")
        # The rest goes on as it came: psycopg 3.3.0 knows no "timeout" yet.
        return super().wait(gen, *args, **kwargs)

    @override
    async def close(self) -> None:
        if not self._binding.is_here():
            # In a forked child this would end the parent's session.
            raise self._binding.mismatch("used to close one of its connections")
        await super().close()

    @override
    def cancel(self) -> None:
        # May be called from any thread, but in a forked child the query is the parent's.
        if self._binding.forked:
            raise self._binding.mismatch("used to cancel a query")
        super().cancel()

    @override
    async def cancel_safe(self, *, timeout: float = 30.0) -> None:
        if not self._binding.is_here():
            raise self._binding.mismatch("used to cancel a query")
        if not _compat.in_own_task():
            await super().cancel_safe(timeout=timeout)
            return
        # psycopg stops the query of a task that is cancelled, here at the end of the program:
        # it gives the server 5 s to take the request and 5 s to obey (psycopg 3.3).
        try:
            await super().cancel_safe(timeout=min(timeout, CANCEL_GRACE))
        except BaseException:
            shut_down(self.pgconn.socket)
            raise

    @property
    def at_work(self) -> bool:
        """True while a task is at work on the connection."""
        return cast(asyncio.Lock, vars(self)["lock"]).locked()


class RetiredConnection(BoundConnection):
    """
    A handle that was given back, or whose session the pool has closed.

    An instance becomes one by assignment to ``__class__``. `pgconn` and `lock` are data
    descriptors here, so they hide the attributes that the instance still has.
    """

    def refusal(self, doing: str) -> PoolkeeperError:
        """Return the error that says why the handle cannot be *doing* ("used") any more."""
        raise NotImplementedError

    def _refuse(self) -> NoReturn:
        raise self.refusal("used")

    pgconn = property(_refuse)
    lock = property(_refuse)

    @property
    @override
    def closed(self) -> bool:
        return True

    @property
    @override
    def broken(self) -> bool:
        return False

    @override
    def wait(self, *args: Any, **kwargs: Any) -> NoReturn:
        self._refuse()

    @override
    def cursor(self, *args: Any, **kwargs: Any) -> NoReturn:
        self._refuse()

    @override
    async def close(self) -> None:
        keeper = self._keeper()
        if keeper is not None and keeper.close_returns:
            return  # close() gave it back; closing twice is allowed
        self._refuse()

    @override
    def __repr__(self) -> str:
        return f"<{type(self).__module__}.{type(self).__qualname__} at 0x{id(self):x}>"

    @override
    def __del__(self, *_: Any) -> None:
        pass  # the session is not ours any more


class ReleasedConnection(RetiredConnection):
    """A handle that was given back."""

    @override
    def refusal(self, doing: str) -> ReleasedConnectionError:
        name = self._binding.name
        checkout: Checkout | None = vars(self).get("_checkout")
        got = f"Acquired {checkout}. " if checkout else ""
        return ReleasedConnectionError(
            f'connection of pool "{name}" was {doing} after it was given back',
            detail=f"{got}It was {doing} {Place.here()}."
            f" The pool was opened {self._binding.opened}.",
            hint="The session may be another task's by now. Keep the work inside the"
            ' "async with" block, acquire a connection of its own for work that outlives it, and'
            f" give a connection back once. {see('released')}",
        )


class RevokedConnection(RetiredConnection):
    """A handle whose session was closed by the pool while it was in use."""

    @property
    def pgconn(self) -> Any:  # type: ignore[override]
        # What was under way looks at it on its way out. It is closed, or about to be.
        return vars(self)["pgconn"]

    @override
    async def close(self) -> None:
        pass  # it is closed

    @override
    def refusal(self, doing: str) -> ClosedError:
        name = self._binding.name
        checkout: Checkout | None = vars(self).get("_checkout")
        got = f"Acquired {checkout}. " if checkout else ""
        return ClosedError(
            f'pool "{name}" was closed while this connection was in use',
            detail=f"{got}It was {doing} {Place.here()}."
            f" The pool was opened {self._binding.opened}.",
            hint="Work that was not committed is rolled back. Give close() a longer timeout, or"
            f" end the tasks that use the pool before it is closed. {see('closed')}",
        )


def bound_class(
    user_class: type[AsyncConnection[Any]], keeper: Keeper, binding: LoopBinding
) -> type[BoundConnection]:
    """Return a subclass of *user_class* whose connections belong to *keeper* and *binding*."""

    def derive(prefix: str, *bases: type, **namespace: Any) -> Any:
        name = f"{prefix}{user_class.__name__}"
        return type(name, bases, {"__module__": "poolkeeper", "__qualname__": name, **namespace})

    bound = derive(
        "Bound", BoundConnection, user_class, _keeper=weakref.ref(keeper), _binding=binding
    )
    bound._lock_class = type("BoundLock", (BoundLock,), {"_binding": binding})
    bound._released_class = derive("Released", ReleasedConnection, bound)
    bound._revoked_class = derive("Revoked", RevokedConnection, bound)
    return cast("type[BoundConnection]", bound)


def retire(conn: BoundConnection) -> None:
    """Refuse every further use of *conn*, which was given back."""
    conn.__class__ = conn._released_class


def revoke(conn: BoundConnection) -> None:
    """Refuse every further use of *conn*, whose session the pool closes."""
    conn.__class__ = conn._revoked_class


class Session:
    """
    One server session, whichever handle stands for it now.

    Attributes:
        checkout: Who holds it; None while nobody does.
    """

    __slots__ = (
        "__weakref__",
        "_adapters",
        "_fixed",
        "_handle",
        "_notice_handlers",
        "_notify_handlers",
        "_parameters",
        "_prepare",
        "checkout",
        "pgconn",
    )

    def __init__(self, conn: BoundConnection) -> None:
        self.pgconn = conn.pgconn
        self.checkout: Checkout | None = None
        self._handle = _Current(conn)
        self._fixed: dict[str, Any] | None = None

    @property
    def handle(self) -> BoundConnection | None:
        """The handle that stands for the session, unless it was dropped."""
        return self._handle()

    def settle(self, conn: BoundConnection) -> None:
        """
        Remember *conn* as it is: what every later borrower shall find.

        Called when it is handed out for the first time, so after ``configure``.
        """
        if self._fixed is not None:
            return
        conn._adapters = _WatchedAdapters(conn.adapters)
        self._adapters = AdaptersMap(conn._adapters)
        self._notice_handlers = tuple(conn._notice_handlers)
        self._notify_handlers = tuple(conn._notify_handlers)
        self._prepare = (conn._prepared.prepare_threshold, conn._prepared.prepared_max)
        self._parameters = tuple(map(conn.pgconn.parameter_status, REPORTED_PARAMETERS))
        # Bound once to whichever handle is current, not to each handle in turn.
        current = cast("weakref.ref[Any]", self._handle)
        conn.pgconn.notice_handler = partial(BaseConnection._notice_handler, current)
        conn.pgconn.notify_handler = partial(BaseConnection._notify_handler, current)
        fixed = dict(vars(conn))
        for per_handle in (
            "_adapters", "_notice_handlers", "_notify_handlers", "_notifies_backlog", "_pool",
            "_checkout", "lock", "pgconn",
        ):  # fmt: skip
            fixed.pop(per_handle, None)
        self._fixed = fixed

    def changed_parameters(self) -> list[tuple[bytes, bytes | None]]:
        """Return the reported parameters that are not as they were, with what they were."""
        now = tuple(map(self.pgconn.parameter_status, REPORTED_PARAMETERS))
        if now == self._parameters:
            return []
        return [
            (name, was)
            for name, was, value in zip(REPORTED_PARAMETERS, self._parameters, now, strict=True)
            if was != value
        ]

    @property
    def parameters_unchanged(self) -> bool:
        """True if every reported parameter is as it was. Costs no round trip."""
        return tuple(map(self.pgconn.parameter_status, REPORTED_PARAMETERS)) == self._parameters

    @staticmethod
    def forget_prepared(conn: BoundConnection) -> None:
        """
        Forget the prepared statements of the session: the server has, by DISCARD ALL.

        psycopg 3.3 looks for that command only the first time that it runs it.
        """
        conn._prepared.clear()
        conn._prepared._to_flush.clear()

    def forget_added_handlers(self, conn: BoundConnection) -> None:
        """Take away the handlers that ``configure``, run again, added a second time."""
        conn._notice_handlers = list(self._notice_handlers)
        conn._notify_handlers = list(self._notify_handlers)

    def successor(self, conn: BoundConnection) -> BoundConnection:
        """
        Retire *conn*, which was given back, and return the next handle of the session.

        The new one is as the first one was when it left ``configure``.
        """
        assert self._fixed is not None
        cls = type(conn)
        adapters = conn._adapters
        fresh = cls.__new__(cls)
        attributes = vars(fresh)
        attributes.update(self._fixed)
        attributes["pgconn"] = self.pgconn
        attributes["lock"] = cls._lock_class()
        attributes["_notice_handlers"] = list(self._notice_handlers)
        attributes["_notify_handlers"] = list(self._notify_handlers)
        attributes["_notifies_backlog"] = deque()
        attributes["_pool"] = None
        if type(adapters) is not _WatchedAdapters or adapters.touched:
            adapters = _WatchedAdapters(self._adapters)
        attributes["_adapters"] = adapters
        prepared = conn._prepared
        if (prepared.prepare_threshold, prepared.prepared_max) != self._prepare:
            prepared.prepare_threshold, prepared.prepared_max = self._prepare
        self._handle.set(fresh)
        self.checkout = None
        conn.__class__ = cls._released_class
        return fresh


def shut_down(fileno: int) -> None:
    """Shut a socket down without closing its descriptor, which libpq owns."""
    with suppress(OSError), socket.socket(fileno=socket.dup(fileno)) as duplicate:
        duplicate.shutdown(socket.SHUT_RDWR)


class _Current:
    """A weak reference that can be pointed elsewhere; called, as a `weakref.ref` is."""

    __slots__ = ("_ref",)

    def __init__(self, conn: BoundConnection) -> None:
        self._ref = weakref.ref(conn)

    def __call__(self) -> BoundConnection | None:
        return self._ref()

    def set(self, conn: BoundConnection) -> None:
        self._ref = weakref.ref(conn)


class _WatchedTypes(TypesRegistry):
    """A types registry that remembers that it was added to."""

    touched = False

    @override
    def add(self, info: Any) -> None:
        self.touched = True
        super().add(info)


class _WatchedAdapters(AdaptersMap):
    """An adapters map that remembers that it was changed."""

    def __init__(self, template: AdaptersMap) -> None:
        super().__init__(template)
        self._touched = False
        self.types = _WatchedTypes(template.types)

    @property
    def touched(self) -> bool:
        return self._touched or cast(_WatchedTypes, self.types).touched

    @override
    def register_dumper(self, cls: Any, dumper: Any) -> None:
        self._touched = True
        super().register_dumper(cls, dumper)

    @override
    def register_loader(self, oid: Any, loader: Any) -> None:
        self._touched = True
        super().register_loader(oid, loader)
