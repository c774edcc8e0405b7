"""
Connections that know which pool they belong to, and for how long.

A `BoundConnection` checks the event loop before each I/O. One that was given back, or whose
session the pool has closed, is a `RetiredConnection` and refuses everything.
"""
# A connection is bound by way of the attributes that psycopg gives it.
# pyright: reportPrivateUsage=false

from __future__ import annotations

import asyncio
import sys
import weakref
from asyncio import _get_running_loop
from collections.abc import Awaitable, Coroutine, Iterator
from contextlib import suppress
from time import monotonic
from typing import Any, ClassVar, Literal, NoReturn, Protocol, cast

import psycopg
from psycopg import AsyncConnection, generators, pq
from psycopg._cursor_base import BaseCursor
from psycopg.abc import PQGen
from psycopg.adapt import AdaptersMap
from typing_extensions import TypeVar, override

from ._binding import LoopBinding
from ._checkouts import Checkout
from ._session import Handle, Session, SharedAdapters, shut_down
from ._status import ACTIVE, BAD, IDLE
from ._stopping import Patience
from ._where import Handler, Place
from .errors import ClosedError, PoolkeeperError, ReleasedConnectionError, see

T = TypeVar("T")


LEFT_OPEN = 0.2
"""Seconds after which a stream of which nobody asks for the next row is taken for left open."""

_MAKES_CURSOR = cast(Any, BaseCursor).__init__.__code__


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

    `wait()` comes too late: a stranger would wait for the lock first, while
    its owner is at work, with nobody to wake it; and to let a lock go from another thread
    leaves the owner's own tasks asleep.
    """

    _binding: ClassVar[LoopBinding]

    _locked: bool  # asyncio's own
    _waiters: Any

    @override
    def acquire(self) -> Coroutine[Any, Any, Literal[True]]:  # pyright: ignore[reportIncompatibleMethodOverride]
        if not self._binding.is_here():
            raise self._binding.mismatch("work on one of its connections")
        return super().acquire()

    # Each exchange takes the lock, which is free nearly always: that takes no coroutine.

    @override
    def __aenter__(self) -> Awaitable[Any]:  # type: ignore[override]  # pyright: ignore[reportIncompatibleMethodOverride]
        loop = _get_running_loop()
        if self._locked or self._waiters or loop is None or loop is not self._binding.owner_loop():
            return self.acquire()
        self._locked = True
        return _DONE

    @override
    def __aexit__(self, *_: object) -> Awaitable[None]:  # type: ignore[override]  # pyright: ignore[reportIncompatibleMethodOverride]
        if self._waiters or not self._locked:
            self.release()
        self._locked = False
        return _DONE


class _Done:
    """Awaited, has ended."""

    def __await__(self) -> Iterator[Any]:
        return _NOTHING


_NOTHING: Iterator[Any] = iter(())
_DONE = cast("Awaitable[Any]", _Done())


class BoundConnection(Handle):
    """What poolkeeper adds to a connection class. Made concrete by `bound_class()`."""

    _user_class: ClassVar[type[AsyncConnection[Any]]]
    _keeper: ClassVar[weakref.ref[Any]]
    _under_way: PQGen[Any] | None = None
    _cancelling: set[object] | None = None  # requests to cancel that are under way
    _lost_work: bool  # set when it is revoked
    _given_back: Place  # set when it is given back while a task is at work on it

    exits_like_psycopg: ClassVar[bool]
    """True if the user's class leaves commit, rollback and the end of a block to psycopg."""

    closes_like_psycopg: ClassVar[bool]
    """True if the user's class leaves the end of a connection to psycopg."""

    sets_like_psycopg: ClassVar[bool]
    """True if the user's class leaves it to psycopg to switch autocommit on."""

    runs_like_psycopg: ClassVar[bool]
    """True if the user's class leaves it to psycopg to run a statement."""

    @override
    def __init_subclass__(cls) -> None:
        pass  # what the user's class says of its subclasses is not meant for those made here

    @override
    @classmethod
    async def connect(cls, *args: Any, **kwargs: Any) -> Any:
        # What somebody makes with the class of a connection is that one's own.
        return await cls._user_class.connect(*args, **kwargs)

    @property
    @override
    def adapters(self) -> AdaptersMap:
        adapters = self._adapters
        if sys._getframe(1).f_code is not _MAKES_CURSOR or adapters is None:
            adapters = super().adapters
            if isinstance(adapters, SharedAdapters):
                adapters.handed_out = True
        return adapters

    def autocommits(self) -> bool:
        """Switch autocommit on, without an exchange; False if that takes `set_autocommit()`."""
        if not self.sets_like_psycopg or self.pgconn.transaction_status != IDLE:
            return self._autocommit
        self._autocommit = True
        return True

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
        if self._session.pgconn.status == BAD:  # it was not given back instead
            self._session.finish()

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
        Stop a stream or a COPY that is left half-way; psycopg calls this, and reads its rest.

        psycopg gives the server 5 s to take the request (3.3.9). Whoever has cancelled does not
        wait for that where the network is gone.
        """
        pgconn = vars(self)["pgconn"]
        asking = asyncio.ensure_future(super()._try_cancel(timeout=timeout))
        if not await Patience().lasts_for(asking):
            shut_down(pgconn)

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


class GuardedWait(AsyncConnection[Any]):
    """
    Stands above a user's class that has a ``wait()`` of its own, which may do without ours.

    Who uses it shall be where the pool belongs, and what it does be noted all the same.
    """

    _binding: ClassVar[LoopBinding]
    _session: Session
    _checkout: Checkout | None
    _under_way: PQGen[Any] | None

    @override
    async def wait(self, gen: PQGen[T], *args: Any, **kwargs: Any) -> T:
        # The arguments go on as they came: psycopg 3.3.0 knows no "timeout" yet.
        if not self._binding.is_here():
            raise self._binding.mismatch("work on one of its connections")
        checkout, began = self._checkout, monotonic()
        self._under_way = gen
        try:
            return await super().wait(gen, *args, **kwargs)
        finally:
            self._under_way = None
            if checkout is not None and checkout.changed_at < began:  # it did without ours
                self._session.heard_at = now = monotonic()
                checkout.note_exchange(self._session.pgconn.transaction_status, now - began, now)


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

    def _refuse(self, *_: Any, **__: Any) -> NoReturn:
        raise self.refusal()

    async def _refuse_when_awaited(self, *_: Any, **__: Any) -> NoReturn:
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
    async def close(self) -> None:
        keeper = self._keeper()
        if keeper is not None and keeper.close_returns:
            return  # close() gave it back; closing twice is allowed
        raise self.refusal()

    @override
    def __repr__(self) -> str:
        return f"<{type(self).__module__}.{type(self).__qualname__} at 0x{id(self):x}>"

    @override
    def __del__(self, *_: Any) -> None:
        pass  # the session is not ours any more


# All of them would refuse, when they come to the session. So that the line of whoever calls is next
# to the last in the traceback, they do it at once; and those that are awaited, when they are.
for _name in ("cursor", "wait", "transaction", "pipeline", "notifies", "fileno"):
    setattr(RetiredConnection, _name, RetiredConnection._refuse)
for _name in (
    *("execute", "commit", "rollback", "set_autocommit", "set_isolation_level", "set_read_only"),
    *("set_deferrable", "tpc_begin", "tpc_prepare", "tpc_commit", "tpc_rollback", "tpc_recover"),
):
    setattr(RetiredConnection, _name, RetiredConnection._refuse_when_awaited)
RetiredConnection.info = property(RetiredConnection._refuse)  # type: ignore[assignment]  # pyright: ignore[reportAttributeAccessIssue]


_AFTER_BLOCK = (
    'Keep the work inside the "async with" block, acquire a connection of its own for work that'
    " outlives it, and give a connection back once."
)
_AFTER_RESPONSE = (
    "It was the request's, and was given back before the response was sent: give what runs later,"
    " such as a background task or a streamed body, the manager, and let it acquire a connection"
    ' of its own: "async with manager.connection() as conn".'
)


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
            hint="The session may be another task's by now."
            f" {_AFTER_RESPONSE if self._was_of_request() else _AFTER_BLOCK} {see('released')}",
        )

    def _was_of_request(self) -> bool:
        checkout: Checkout | None = vars(self).get("_checkout")
        return checkout is not None and isinstance(checkout.code, Handler)


class ShownConnection(ReleasedConnection):
    """
    What those who convert a one-shot's values and rows are shown in place of the handle.

    They may ask what they like of the session, while it is the one-shot's, but send it nothing.
    """

    @property
    def pgconn(self) -> Any:  # type: ignore[override]
        return vars(self)["pgconn"]

    @staticmethod
    def of(conn: BoundConnection) -> Any:
        """Return one for the handle *conn*; it does not keep the session alive."""
        shown = object.__new__(cast("type[ShownConnection]", conn._shown_class))
        vars(shown).update(vars(conn), _checkout=None, _pool=None, _autocommit=True)
        del vars(shown)["_session"]
        return shown


for _name in ("adapters", "broken", "closed", "cursor", "fileno", "info"):
    setattr(ShownConnection, _name, getattr(BoundConnection, _name))
for _name in ("prepare_threshold", "prepared_max"):
    setattr(ShownConnection, _name, property(getattr(BoundConnection, _name).fget))


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
