"""
Connections that know which pool they belong to, and for how long.

`BoundClasses` makes what the user's ``connect()`` returned a connection of one life of a pool: an
object of a subclass, made by `bound_class()`, that checks the event loop before each I/O.

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
import select
import socket
import sys
import weakref
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Generator, Iterable
from contextlib import suppress
from contextvars import ContextVar
from functools import partial
from time import monotonic
from types import MemberDescriptorType
from typing import Any, ClassVar, Generic, Literal, NoReturn, Protocol, cast

import psycopg
from psycopg import AsyncConnection, generators, pq, waiting
from psycopg._connection_base import BaseConnection
from psycopg._cursor_base import BaseCursor
from psycopg.abc import PQGen
from psycopg.adapt import AdaptersMap
from typing_extensions import TypeVar, override

from ._binding import LoopBinding
from ._checkouts import Checkout
from ._proxies import makers, unwrapped
from ._where import Place
from ._words import in_words
from .errors import ClosedError, ConfigError, PoolkeeperError, ReleasedConnectionError, see

T = TypeVar("T")

IDLE = pq.TransactionStatus.IDLE
ACTIVE = pq.TransactionStatus.ACTIVE
INERROR = pq.TransactionStatus.INERROR
UNKNOWN = pq.TransactionStatus.UNKNOWN
BAD = pq.ConnStatus.BAD
NO_PIPELINE = pq.PipelineStatus.OFF

_new = object.__new__  # a class of the user's may want arguments

CANCEL_GRACE = 1.0
"""Seconds that a server has to stop a query of which nobody wants the result any more."""

LEFT_OPEN = 0.2
"""Seconds after which a stream of which nobody asks for the next row is taken for left open."""

_MAKES_CURSOR = cast(Any, BaseCursor).__init__.__code__

LOSES_CANCELLATION = sys.version_info < (3, 12) and hasattr(waiting, "wait_for")
"""
True where psycopg waits with the ``asyncio.wait_for()`` of Python 3.11, as 3.3.0 does: it drops a
cancellation that arrives together with what it waits for (cpython issue 86296).
"""

_in_own_task: ContextVar[bool] = ContextVar("poolkeeper_in_own_task", default=False)


async def run_own(work: Callable[[], Awaitable[None]]) -> None:
    """Do *work* in this task, which is the pool's own: nobody waits for a server's answer."""
    _in_own_task.set(True)
    await work()


# Parameters of a session that PostgreSQL reports when they change (search_path: since 18): those
# that a client can change, and the two that tell a server that takes writes from one that does
# not. Documented in "Asynchronous Operations", protocol chapter.
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
    b"in_hot_standby",
)

READ_ONLY = b"default_transaction_read_only"
STANDBY = b"in_hot_standby"  # the server's alone to change, "on" until it is promoted
KIND_PARAMETERS = frozenset({READ_ONLY, STANDBY})
"""What tells one kind of server from another; reported since PostgreSQL 14."""

_KIND = [REPORTED_PARAMETERS.index(name) for name in (READ_ONLY, STANDBY)]


class Keeper(Protocol):
    """What a connection asks of the pool that it is made for."""

    name: str
    close_returns: bool

    def take_back_dropped(self, conn: BoundConnection) -> None:
        """Take a connection back that was garbage-collected and not closed."""
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
            raise self._binding.mismatch("work on one of its connections")
        return super().acquire()


class BoundConnection(AsyncConnection[Any]):
    """What poolkeeper adds to a connection class. Made concrete by `bound_class()`."""

    _user_class: ClassVar[type[AsyncConnection[Any]]]
    _keeper: ClassVar[weakref.ref[Any]]
    _binding: ClassVar[LoopBinding]
    _lock_class: ClassVar[type[BoundLock]]
    _released_class: ClassVar[type[RetiredConnection]]
    _revoked_class: ClassVar[type[RetiredConnection]]

    _session: Session
    _checkout: Checkout | None = None
    _under_way: PQGen[Any] | None = None
    _stopping = False  # where cancellations are lost: psycopg has noticed this one
    _dropped: asyncio.CancelledError | None = None  # and this one it has not
    _cancelling: set[object] | None = None  # requests to cancel that are under way
    _lost_work: bool  # set when it is revoked
    _given_back: Place  # set when it is given back while a task is at work on it

    exits_like_psycopg: ClassVar[bool]
    """True if the user's class leaves commit, rollback and the end of a block to psycopg."""

    closes_like_psycopg: ClassVar[bool]
    """True if the user's class leaves the end of a connection to psycopg."""

    @override
    def __init_subclass__(cls) -> None:
        pass  # what the user's class says of its subclasses is not meant for those made here

    @override
    @classmethod
    async def connect(cls, *args: Any, **kwargs: Any) -> Any:
        # What somebody makes with the class of a connection is that one's own.
        return await cls._user_class.connect(*args, **kwargs)

    @override
    async def wait(self, gen: PQGen[T], *args: Any, **kwargs: Any) -> T:
        # Every I/O of a connection, its cursors, transactions, pipelines and copies ends here.
        if not self._binding.is_here():
            raise self._binding.mismatch("work on one of its connections")
        self._under_way = gen
        if LOSES_CANCELLATION:
            self._stopping, self._dropped = False, None
            gen = self._watched(gen)
        # The arguments go on as they came: psycopg 3.3.0 knows no "timeout" yet.
        work = super().wait(gen, *args, **kwargs)
        checkout = self._checkout
        if checkout is None:  # the pool itself is at work on it
            try:
                # A task of the pool's is not worth a long wait for the server.
                patience = CANCEL_GRACE if _in_own_task.get() else None
                return await _Settled(work, patience, self._not_noticed)
            finally:
                self._under_way = None
        began = checkout.busy_since = monotonic()
        pgconn = self.pgconn
        try:
            return await _Settled(work, None, self._not_noticed)
        except asyncio.CancelledError:
            if pgconn.pipeline_status != NO_PIPELINE and _is_unfinished(self._under_way):
                # psycopg drops what it has not sent yet, and with it the end of the pipeline.
                await _Settled(self._try_cancel(), CANCEL_GRACE, self._not_noticed)
            raise
        except psycopg.errors.ReadOnlySqlTransaction:
            self._session.doubt()  # a read-only transaction of the borrower's, or a fail-over
            raise
        except psycopg.Error as ex:
            if isinstance(self, ReleasedConnection):
                raise self.given_back_at_work() from ex
            raise
        finally:
            self._under_way = None
            if checkout.session is None:
                # Taken away meanwhile, and the loop watches its socket no more. What is under
                # way shall see that it is closed, and end with the error that it has.
                pgconn.finish()
            status = pgconn.transaction_status
            # Neither in the middle of a stream, nor lost: what was before is what counts then.
            if status != checkout.left_in and status != ACTIVE and status != UNKNOWN:
                checkout.failed_later = status == INERROR and checkout.left_in != IDLE
                checkout.left_in = status
            checkout.changed_at = self._session.heard_at = now = monotonic()
            checkout.busy_seconds += now - began
            checkout.busy_since = 0.0
            checkout.used = True

    def _not_noticed(self, cancellation: asyncio.CancelledError) -> None:
        """Note a cancellation in spite of which the I/O goes on."""
        if LOSES_CANCELLATION and not self._stopping:
            self._dropped = cancellation

    def _watched(self, gen: PQGen[T]) -> PQGen[T]:
        """Run *gen*; raise in it the cancellation that psycopg has dropped, at its next step."""
        try:
            state = next(gen)
            while True:
                ready = yield state
                if (dropped := self._dropped) is not None:
                    self._dropped = None
                    raise dropped
                state = gen.send(ready)
        except StopIteration as done:
            return cast(T, done.value)

    @property
    @override
    def adapters(self) -> AdaptersMap:
        adapters = self._adapters
        if sys._getframe(1).f_code is not _MAKES_CURSOR or adapters is None:
            adapters = super().adapters
            if isinstance(adapters, _SharedAdapters):
                adapters.handed_out = True
        return adapters

    def is_in_block(self) -> bool:
        """Tell whether a transaction(), a pipeline or a two-phase transaction is open."""
        return bool(self._num_transactions or self._pipeline or self._tpc)

    @override
    async def close(self) -> None:
        if not self._binding.is_here():
            # In a forked child this would end the parent's session.
            raise self._binding.mismatch("close one of its connections")
        self._give_work_up()
        await super().close()

    @override
    async def rollback(self) -> None:
        if self.closed:
            self._give_work_up()
        await super().rollback()

    def _give_work_up(self) -> None:
        """Note that nothing is lost any more: what was not committed is not meant to be."""
        if (checkout := self._checkout) is not None:
            checkout.left_in = IDLE

    def __del__(self, *args: Any) -> None:
        session: Session | None = vars(self).get("_session")
        if (
            session is None
            or not session.in_pool
            or (self.closed and session.checkout is None)
            or self._binding.dead
        ):
            super().__del__(*args)
        elif (keeper := self._keeper()) is not None:
            # Somebody has acquired it and did not give it back: also one that is lost by now has
            # its place in the pool. Or an acquire or a release was cut short, by a RecursionError,
            # say, and the session is still good.
            keeper.take_back_dropped(self)

    @override
    def cancel(self) -> None:
        # May be called from any thread, but in a forked child the query is the parent's.
        if self._binding.forked:
            raise self._binding.mismatch("cancel a query")
        # Noted before psycopg looks whether the connection is closed: see release().
        request = object()
        self._requests_to_cancel().add(request)
        try:
            super().cancel()
        finally:
            self._requests_to_cancel().discard(request)

    @override
    async def cancel_safe(self, *, timeout: float = 30.0) -> None:
        if not self._binding.is_here():
            raise self._binding.mismatch("cancel a query")
        # In a task of its own: if the caller is cancelled, it may be on its way nevertheless.
        request = asyncio.ensure_future(self.request_cancel(timeout))
        self._requests_to_cancel().add(request)
        request.add_done_callback(self._request_to_cancel_ended)
        await asyncio.shield(request)

    async def request_cancel(self, timeout: float) -> None:
        """Do as `cancel_safe()`, without a care for what comes after: for a session's end."""
        await super().cancel_safe(timeout=timeout)

    def _requests_to_cancel(self) -> set[object]:
        return cast("set[object]", vars(self).setdefault("_cancelling", set()))

    def _request_to_cancel_ended(self, request: asyncio.Task[None]) -> None:
        self._requests_to_cancel().discard(request)
        if not request.cancelled():
            request.exception()  # nobody may be there any more to be told

    async def _try_cancel(self, *, timeout: float = 5.0) -> None:
        """
        Stop the query of a task that was cancelled, and read how it ends; psycopg calls this.

        psycopg asks the server once, which forgets a request that arrives before the query does,
        and closes the connection if the query ends by an error of its own. It gives the server
        5 s to take the request and 5 s to obey (3.3.9): whoever has cancelled waits for neither
        where the network is gone.
        """
        self._stopping, self._dropped = True, None
        timeout = min(timeout, CANCEL_GRACE)
        until = monotonic() + timeout
        gen, pgconn = self._under_way, vars(self)["pgconn"]
        if gen is None:  # the end of a stream or a COPY, which psycopg reads afterwards
            with suppress(TimeoutError):
                async with asyncio.timeout(timeout):
                    await super()._try_cancel(timeout=timeout)
            if monotonic() > until - 0.01 and not self.closed:
                shut_down(pgconn)
            return
        ended = asyncio.Event()
        asking = asyncio.ensure_future(self._keep_asking(ended, until))
        try:
            async with asyncio.timeout(timeout):
                await waiting.wait_async(gen, pgconn.socket, interval=0.1)
        except TimeoutError:
            shut_down(pgconn)
        except Exception:
            pass  # nobody is there any more to be told; psycopg finds what it reads at its end
        finally:
            ended.set()
            # A request that is on its way could stop the next query.
            await asyncio.wait({asking}, timeout=max(0.1, until - monotonic()))
            if not asking.done():
                shut_down(pgconn)
                asking.cancel()

    async def _keep_asking(self, ended: asyncio.Event, until: float) -> None:
        pause = 0.01
        while not ended.is_set() and (left := until - monotonic()) > 0:
            await super()._try_cancel(timeout=left)
            with suppress(TimeoutError):
                await asyncio.wait_for(ended.wait(), min(pause, max(0.0, until - monotonic())))
            pause *= 2

    async def end_command(self, patience: float = 0.0) -> None:
        """
        Read the answer of a command to its end; after *patience* seconds, stop the command.

        A stream that was left half-way, say, or a COPY that was cancelled and then cancelled
        again while psycopg ended it.
        """
        if self.pgconn.transaction_status != ACTIVE:
            return
        with suppress(psycopg.Error, TimeoutError):
            async with asyncio.timeout(patience):
                await self.wait(_rest_of_the_answer(self.pgconn))

    def leave_pipeline(self) -> bool:
        """
        Leave pipeline mode, if nothing was sent in it of which the end is not known.

        psycopg stays in it if it is cancelled while it enters (3.3.9).
        """
        try:
            self.pgconn.exit_pipeline_mode()
        except psycopg.Error:
            return False
        return True

    @property
    def at_work(self) -> bool:
        """
        True while a task waits for the server on the connection.

        Not while its lock is held and nothing more: by a stream or a ``notifies()`` whose client
        has left, or has not come back for the next row.
        """
        return self._under_way is not None

    async def may_go_on(self) -> bool:
        """
        Wait for the lock, and tell whether it was let go.

        False if nobody is at work for `LEFT_OPEN`, so that nobody will let it go, it seems.
        """
        lock: asyncio.Lock = self.lock
        looks, heard_at = 0, self._session.heard_at
        while lock.locked():
            with suppress(TimeoutError):
                async with asyncio.timeout(LEFT_OPEN / 5), lock:
                    pass
            looks += 1
            if self.at_work or heard_at != self._session.heard_at:
                looks, heard_at = 0, self._session.heard_at
            elif looks >= 5:
                return False
        return True


class RetiredConnection(BoundConnection):
    """
    A handle that was given back, or whose session the pool has closed.

    An instance becomes one by assignment to ``__class__``. `pgconn` and `lock` are data
    descriptors here, so they hide the attributes that the instance still has. The other
    properties reach what belongs to the session, and so to its next borrower.
    """

    def refusal(self) -> PoolkeeperError:
        """Return the error that says why the handle cannot be used any more."""
        raise NotImplementedError

    def _refuse(self, *_: Any) -> NoReturn:
        raise self.refusal()

    def _history(self, last: str) -> str:
        """Return where the handle was acquired, what was done with it *last*, and whose it was."""
        checkout: Checkout | None = vars(self).get("_checkout")
        acquired = f"Acquired {checkout}. " if checkout else ""
        given_back: Place | None = vars(self).get("_given_back")
        meanwhile = f"Given back {given_back}. " if given_back else ""
        return (
            f"{acquired}{meanwhile}{last} {Place.here()}."
            f" The pool was opened {self._binding.opened}."
        )

    exits_like_psycopg = False

    pgconn = property(_refuse)
    lock = property(_refuse)
    adapters = property(_refuse)  # pyright: ignore[reportIncompatibleMethodOverride]
    prepare_threshold = property(_refuse, _refuse)  # pyright: ignore[reportIncompatibleMethodOverride]
    prepared_max = property(_refuse, _refuse)  # pyright: ignore[reportIncompatibleMethodOverride]

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
    def refusal(self) -> ReleasedConnectionError:
        return self._released("used after it was given back", "Used")

    def given_back_at_work(self) -> ReleasedConnectionError:
        """Return the error for a task that was in a query when another gave the handle back."""
        return self._released("given back while a task was at work on it", "At work")

    def given_back_twice(self) -> ReleasedConnectionError:
        """Return the error that says that the handle was given back before."""
        return self._released("given back twice", "Given back again")

    def _released(self, what: str, last: str) -> ReleasedConnectionError:
        return ReleasedConnectionError(
            f'connection of pool "{self._binding.name}" was {what}',
            detail=self._history(last),
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
    def refusal(self) -> ClosedError:
        return ClosedError(
            f'pool "{self._binding.name}" was closed while this connection was in use',
            detail=self._history("Used"),
            hint="Work that was not committed is rolled back. Give close() a longer timeout, or"
            f" end the tasks that use the pool before it is closed. {see('closed')}",
        )


def bound_class(
    user_class: type[AsyncConnection[Any]], keeper: Keeper, binding: LoopBinding | None
) -> type[BoundConnection]:
    """Return a subclass of *user_class* whose connections belong to *keeper* and *binding*."""

    def derive(prefix: str, *bases: type, **namespace: Any) -> Any:
        name = f"{prefix}{user_class.__name__}"
        return type(name, bases, {"__module__": "poolkeeper", "__qualname__": name, **namespace})

    bound = derive(
        "Bound",
        BoundConnection,
        user_class,
        _user_class=user_class,
        _keeper=weakref.ref(keeper),
        _binding=binding,
    )
    bound.exits_like_psycopg = _leaves_to_psycopg(user_class, "__aexit__", "commit", "rollback")
    bound.closes_like_psycopg = _leaves_to_psycopg(user_class, "close")
    bound._lock_class = type("BoundLock", (BoundLock,), {"_binding": binding})
    bound._released_class = derive("Released", ReleasedConnection, bound)
    bound._revoked_class = derive("Revoked", RevokedConnection, bound)
    return cast("type[BoundConnection]", bound)


def _leaves_to_psycopg(user_class: type[AsyncConnection[Any]], *methods: str) -> bool:
    return all(getattr(user_class, name) is getattr(AsyncConnection, name) for name in methods)


_OURS = frozenset(
    name
    for name in (*BoundConnection.__annotations__, *vars(BoundConnection))
    if not name.startswith("__") and not hasattr(AsyncConnection, name)
)
"""Names of attributes that a connection must not have of its own."""


def check_class(user_class: type[AsyncConnection[Any]]) -> None:
    """
    Return if connections of *user_class* can be made a pool's.

    Raises:
        TypeError: With the reason why they cannot.
    """
    _check_names(name for name in _OURS if hasattr(user_class, name))
    try:
        retired = bound_class(user_class, cast(Any, BoundConnection), None)._released_class
        object.__new__(retired)  # of a class that has no __del__() of the user's
    except Exception as ex:
        raise TypeError(f"no subclass of it can be made and used: {in_words(ex)}") from ex


def _check_names(taken: Iterable[str]) -> None:
    if names := ", ".join(sorted(taken)):
        raise TypeError(f"it has {names}, which poolkeeper needs for itself")


class BoundClasses:
    """
    The bound classes of one life of a pool, by the class of the connections that they are for.

    Connections are made by the user's class, as psycopg_pool would make them, and become the
    pool's afterwards. So ``connect()`` may be patched, and return what it likes: a connection of
    another class, or one in a proxy.
    """

    def __init__(self, keeper: Keeper, binding: LoopBinding) -> None:
        self._keeper = keeper
        self._binding = binding
        self._by_user_class: dict[type, type[BoundConnection]] = {}

    def bind(self, given: Any) -> Any:
        """
        Make *given*, which the user's ``connect()`` returned, a connection of the pool.

        Returns:
            What to call it by: itself, or a proxy like the one that it came in.

        Raises:
            ConfigError: If it cannot be one.
        """
        conn, proxies = unwrapped(given, AsyncConnection)
        kind: Any = cast(Any, type(conn))
        try:
            bound = self._by_user_class.get(kind)
            if bound is None:
                bound = self._by_user_class[kind] = self._bound(kind)
            _check_names(name for name in _OURS if name in vars(conn))
            conn.__class__ = bound
        except TypeError as ex:
            if isinstance(conn, BaseConnection) and not isinstance(conn, BoundConnection):
                conn.pgconn.finish()
            raise ConfigError(
                f"connect() returned a {kind.__module__}.{kind.__qualname__}, which cannot be kept"
                f" in a pool: {ex}",
                parameter="connection_class",
                detail="It is connect() of the connection_class, or what has taken its place.",
                hint=f"Let it return a psycopg.AsyncConnection of its own. {see('config')}",
            ) from ex
        conn.lock = bound._lock_class()
        slots = _slots(kind)
        if not proxies and not slots:
            conn._session = Session(conn)
            return conn
        stand_in = object.__new__(bound._released_class)
        conn._session = session = DressedSession(conn, slots, makers(proxies, conn, stand_in))
        return session.dressed(conn)

    def _bound(self, kind: Any) -> type[BoundConnection]:
        if BoundConnection in kind.__mro__:
            raise TypeError("it is a pool's already")
        if AsyncConnection not in kind.__mro__:
            raise TypeError("that is no psycopg.AsyncConnection")
        check_class(kind)
        return bound_class(kind, self._keeper, self._binding)


def _slots(kind: type) -> list[Any]:
    """Return the descriptors of what an object of *kind* keeps in ``__slots__``."""
    return [
        attribute
        for cls in kind.__mro__
        for attribute in vars(cls).values()
        if isinstance(attribute, MemberDescriptorType)
    ]


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
        configured: The reported parameters that ``configure`` has set.
        in_question: True if another session was found on a server that has become another kind,
            and this one was not looked at yet.
        in_pool: True while the pool counts it, so that it must not be lost.
        returned: The checkout that has ended last, until the session is put right.
        unlocked: Done when the transaction of who gave it back last is over, if one was open.
        heard_at: When an exchange with the server ended last, or its socket was found quiet.
    """

    __slots__ = (
        "__weakref__",
        "_adapters",
        "_expected",
        "_fixed",
        "_handle",
        "_notice_handlers",
        "_notify_handlers",
        "_parameters",
        "_poll",
        "_prepare",
        "checkout",
        "configured",
        "heard_at",
        "in_pool",
        "in_question",
        "pgconn",
        "returned",
        "unlocked",
    )

    def __init__(self, conn: BoundConnection) -> None:
        self.pgconn = conn.pgconn
        self.configured: frozenset[bytes] = frozenset()
        self._parameters = self._reported_parameters()
        self.accept_parameters()
        self.heard_at = 0.0
        self.checkout: Checkout | None = None
        self.returned: Checkout | None = None
        self.in_pool = False
        self.unlocked: asyncio.Future[None] | None = None
        self._handle = weakref.ref(conn)

    @property
    def handle(self) -> BoundConnection | None:
        """The handle that stands for the session, unless it was dropped."""
        return self._handle()

    @property
    def template(self) -> dict[str, Any]:
        """The attributes of every later handle."""
        return self._fixed

    def settle(self, conn: BoundConnection) -> None:
        """
        Remember *conn* as it is: what every later borrower shall find.

        Called when it joins the pool, so after ``configure``.
        """
        conn._adapters = _SharedAdapters(conn.adapters)
        self._adapters = AdaptersMap(conn._adapters)
        self._notice_handlers = conn._notice_handlers.copy()
        self._notify_handlers = conn._notify_handlers.copy()
        self._prepare = (conn._prepared.prepare_threshold, conn._prepared.prepared_max)
        self.accept_parameters()
        self._poll = _poll_for(conn.pgconn.socket)
        # Bound once to whichever handle is current, not to each handle in turn. Through a weak
        # reference, so that a connection that is dropped is gone at once.
        current = _CurrentHandle(weakref.ref(self))
        conn.pgconn.notice_handler = partial(BaseConnection._notice_handler, cast(Any, current))
        conn.pgconn.notify_handler = partial(BaseConnection._notify_handler, cast(Any, current))
        fixed = dict(vars(conn))
        for per_handle in (
            "_adapters", "_notice_handlers", "_notify_handlers", "_notifies_backlog", "_pool",
            "_checkout", "lock", "_session", "pgconn", "_cancelling",
        ):  # fmt: skip
            fixed.pop(per_handle, None)
        fixed["_pool"] = None
        self._fixed = fixed
        self.in_pool = True

    def is_quiet(self) -> bool:
        """
        Tell whether nothing has come from the server. Costs no round trip.

        An idle session that is not quiet was ended, or has something harmless to say.
        """
        return self.pgconn.status != BAD and not self._poll()

    def _reported_parameters(self) -> tuple[bytes | None, ...]:
        return tuple(map(self.pgconn.parameter_status, REPORTED_PARAMETERS))

    def changed_parameters(self) -> list[tuple[bytes, bytes | None]]:
        """Return the reported parameters that are not as they were, with what they were."""
        now = self._reported_parameters()
        return [
            (name, was)
            for name, was, value in zip(REPORTED_PARAMETERS, self._parameters, now, strict=True)
            if was != value
        ]

    @property
    def parameters_unchanged(self) -> bool:
        """True if every reported parameter is as it was, and no doubt. Costs no round trip."""
        return self._reported_parameters() == self._expected

    def accept_parameters(self) -> bool:
        """
        Let the parameters be as they are now: whoever has changed them, no borrower has.

        Returns:
            True if the server is of another kind than it was.
        """
        same = self.same_kind
        self._parameters = now = self._reported_parameters()
        self._expected: tuple[bytes | None, ...] | None = now  # None while in doubt
        self.in_question = False
        return not same

    @property
    def same_kind(self) -> bool:
        """True if the server does not report that it has become another kind of server."""
        was, now = self._parameters, self._reported_parameters()
        return all(was[i] == now[i] for i in _KIND)

    @property
    def kind(self) -> str:
        """What kind of server this is, in the server's words; "" if it does not say."""
        pairs = [(REPORTED_PARAMETERS[i], self._parameters[i]) for i in _KIND]
        return ", ".join(f"{name.decode()}={v.decode()}" for name, v in pairs if v is not None)

    def doubt(self) -> None:
        """Let the release look, whatever is reported: this may be the wrong server by now."""
        self._expected = None

    def question(self) -> None:
        """Let it be looked at, because of another session, even if it comes back unused."""
        self.in_question = True
        self.doubt()
        if self.checkout is not None:
            self.checkout.used = True

    @property
    def in_doubt(self) -> bool:
        """True if the release is to look, whatever is reported."""
        return self._expected is None

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
        cls = conn.__class__
        old = conn.__dict__
        fresh = _new(cls)
        new = fresh.__dict__
        new.update(self._fixed)
        new["pgconn"] = self.pgconn
        new["_session"] = self
        # A generator that was left half-way still holds the lock, and will let it go some day.
        lock = old["lock"]
        new["lock"] = cls._lock_class() if lock.locked() else lock
        new["_notice_handlers"] = self._notice_handlers.copy()
        new["_notify_handlers"] = self._notify_handlers.copy()
        backlog = old["_notifies_backlog"]
        new["_notifies_backlog"] = deque() if backlog or backlog is None else backlog
        adapters = old["_adapters"]
        new["_adapters"] = _SharedAdapters(self._adapters) if adapters.handed_out else adapters
        prepared = old["_prepared"]
        threshold, most = self._prepare
        if prepared.prepare_threshold != threshold or prepared.prepared_max != most:
            prepared.prepare_threshold, prepared.prepared_max = threshold, most
        self._handle = weakref.ref(fresh)
        conn.__class__ = cls._released_class
        return fresh

    def in_place_of(self, conn: BoundConnection) -> BoundConnection:
        """Retire *conn*; return a handle like it, of the same checkout, with a lock of its own."""
        fresh = _new(conn.__class__)
        vars(fresh).update(vars(conn), lock=conn._lock_class())
        self._handle = weakref.ref(fresh)
        retire(conn)
        return fresh


class DressedSession(Session):
    """A session whose handles are more than their attributes: proxies around them, slots."""

    __slots__ = ("_makers", "_slots", "_values")

    def __init__(
        self, conn: BoundConnection, slots: list[Any], makers: list[Callable[[Any], Any]]
    ) -> None:
        super().__init__(conn)
        self._slots = slots
        self._makers = makers

    @override
    def settle(self, conn: BoundConnection) -> None:
        super().settle(conn)
        handle = self.handle
        self._values = [
            (slot, slot.__get__(handle)) for slot in self._slots if _is_set(slot, handle)
        ]

    @override
    def successor(self, conn: BoundConnection) -> BoundConnection:
        fresh = super().successor(conn)
        for slot, value in self._values:
            slot.__set__(fresh, value)
        return self.dressed(fresh)

    @override
    def in_place_of(self, conn: BoundConnection) -> BoundConnection:
        was = self.handle
        fresh = super().in_place_of(conn)
        for slot in self._slots:
            if _is_set(slot, was):
                slot.__set__(fresh, slot.__get__(was))
        return self.dressed(fresh)

    def dressed(self, conn: BoundConnection) -> BoundConnection:
        """Return *conn* in its proxies."""
        dressed: Any = conn
        for make in self._makers:
            dressed = make(dressed)
        return cast(BoundConnection, dressed)


def _is_set(slot: Any, conn: object) -> bool:
    try:
        slot.__get__(conn)
    except AttributeError:
        return False
    return True


def _is_unfinished(gen: PQGen[Any] | None) -> bool:
    return getattr(gen, "gi_frame", None) is not None


def _rest_of_the_answer(pgconn: Any) -> PQGen[None]:
    """Read all that the server sends for a command, and drop it."""
    while (result := (yield from generators.fetch(pgconn))) is not None:
        if result.status == pq.ExecStatus.COPY_OUT:
            with suppress(psycopg.Error):  # of the command
                while isinstance((yield from generators.copy_from(pgconn)), memoryview):
                    pass
        elif result.status == pq.ExecStatus.COPY_IN:
            with suppress(psycopg.Error):
                yield from generators.copy_end(pgconn, b"not ended by the client")


def remains(conn: BoundConnection) -> BoundConnection:
    """Return an object that stands for the session of *conn* once that is retired, to end it."""
    conn._session.in_pool = False
    last = _new(conn.__class__)
    vars(last).update(vars(conn), _checkout=None, _pool=None)
    return last


class _Gone:
    """Stands for a connection of libpq's that is closed."""

    status = BAD
    pipeline_status = pq.PipelineStatus.OFF
    transaction_status = UNKNOWN


def part_from_pipeline(conn: BoundConnection) -> None:
    """
    Take the session away from the pipeline of *conn*, which was given back in the middle of it.

    At its end psycopg's pipeline ends pipeline mode without a look at the connection (3.3.9).
    """
    if (pipeline := vars(conn).get("_pipeline")) is not None:
        pipeline.pgconn = _Gone


def _poll_for(fileno: int) -> Callable[[], object]:
    """Return a function that says, at once, whether *fileno* can be read."""
    if hasattr(select, "poll"):
        poller = select.poll()
        poller.register(fileno, select.POLLIN)
        return partial(poller.poll, 0)
    return lambda: select.select([fileno], [], [], 0)[0]  # Windows


def shut_down(pgconn: Any) -> None:
    """Shut the socket of *pgconn* down without closing its descriptor, which libpq owns."""
    with suppress(OSError), socket.socket(fileno=socket.dup(pgconn.socket)) as duplicate:
        duplicate.shutdown(socket.SHUT_RDWR)


class _CurrentHandle:
    """Called, as a `weakref.ref` is, gives the handle that stands for a session now."""

    __slots__ = ("_session",)

    def __init__(self, session: weakref.ref[Session]) -> None:
        self._session = session

    def __call__(self) -> BoundConnection | None:
        session = self._session()
        return session.handle if session is not None else None


class _Settled(Generic[T]):
    """
    Awaits an I/O of psycopg so that a cancellation of it runs to its end.

    Cancelled, psycopg asks the server to stop the query and waits for that, which keeps the
    connection good. A second cancellation would interrupt this and cost the connection, and
    there often is a second one: anyio repeats them on every turn of the loop, and so do
    time-outs inside of time-outs. So the rest of the I/O is moved to a task of its own, which
    nobody cancels. Then the cancellation goes on.

    An ``asyncio.timeout()`` inside of the I/O ends by a cancellation of the task as well, and
    takes it back: psycopg 3.3.0 on Python 3.12 does so every 0.1 s. Then the I/O goes on in the
    other task, and its outcome is the caller's.
    """

    __slots__ = ("_not_noticed", "_patience", "_work")

    def __init__(
        self,
        work: Coroutine[Any, Any, T],
        patience: float | None,
        not_noticed: Callable[[asyncio.CancelledError], None],
    ) -> None:
        self._work = work
        self._not_noticed = not_noticed
        """Called with a cancellation in spite of which the I/O goes on, maybe to its end."""
        self._patience = patience
        """Seconds that the rest may take from the first; None for as long as psycopg waits."""

    def __await__(self) -> Generator[Any, Any, T]:
        work = self._work
        try:
            waits_for = work.send(None)
            task = cast("asyncio.Task[Any]", asyncio.current_task())
            requests = task.cancelling()
            while True:
                try:
                    value = yield waits_for
                except asyncio.CancelledError as cancellation:
                    rest = _Rest(work, cancellation, task, requests, self._not_noticed)
                    break
                except BaseException as ex:
                    waits_for = work.throw(ex)
                else:
                    waits_for = work.send(value)
        except StopIteration as done:
            return cast(T, done.value)
        return cast(T, (yield from self._finish(rest).__await__()))

    async def _finish(self, rest: _Rest) -> Any:
        task = asyncio.ensure_future(_drive(rest))
        until = self._deadline()
        while not task.done():
            if rest.taken_back:
                until = None
            elif until is not None and monotonic() >= until:
                task.cancel()
                until += CANCEL_GRACE
            try:
                await asyncio.wait({task}, timeout=until and max(0.0, until - monotonic()))
            except asyncio.CancelledError as cancellation:
                if rest.taken_back:  # so this is the first one
                    rest.taken_back = False
                    rest.cancellation = cancellation
                    task.cancel()
                    until = self._deadline()
                else:
                    until = until or monotonic() + CANCEL_GRACE
        if rest.taken_back:
            return task.result()
        if not task.cancelled():
            task.exception()  # the cancellation is what the caller gets
        raise rest.cancellation

    def _deadline(self) -> float | None:
        return None if self._patience is None else monotonic() + self._patience


class _Rest:
    """What is left of an I/O that was cancelled in *task*, which had so many requests before."""

    __slots__ = ("_not_noticed", "_requests", "_task", "_work", "cancellation", "taken_back")

    def __init__(
        self,
        work: Coroutine[Any, Any, Any],
        cancellation: asyncio.CancelledError,
        task: asyncio.Task[Any],
        requests: int,
        not_noticed: Callable[[asyncio.CancelledError], None],
    ) -> None:
        self._work = work
        self._not_noticed = not_noticed
        self._task = task
        self._requests = requests
        self.cancellation = cancellation
        self.taken_back = False
        """True if it came from a time-out inside of the I/O, which has called ``uncancel()``."""

    def __await__(self) -> Generator[Any, Any, Any]:
        try:
            try:
                waits_for = self._work.throw(self.cancellation)
            finally:
                self.taken_back = self._task.cancelling() <= self._requests
            if not self.taken_back:
                self._not_noticed(self.cancellation)
            while True:
                try:
                    value = yield waits_for
                except BaseException as ex:
                    waits_for = self._work.throw(ex)
                else:
                    waits_for = self._work.send(value)
        except StopIteration as done:
            return done.value


async def _drive(rest: _Rest) -> Any:
    return await rest


class _SharedAdapters(AdaptersMap):
    """An adapters map that the handles of a session share, as long as nobody else has it."""

    handed_out = False
    """True once anybody but psycopg's cursors, which copy it, was given it: he may keep it."""
