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
from collections.abc import Awaitable, Callable, Coroutine, Generator
from contextlib import suppress
from contextvars import ContextVar
from time import monotonic
from typing import Any, ClassVar, Generic, Literal, NoReturn, Protocol, cast

import psycopg
from psycopg import AsyncConnection, generators, pq, waiting
from psycopg._cursor_base import BaseCursor
from psycopg.abc import PQGen
from psycopg.adapt import AdaptersMap
from typing_extensions import TypeVar, override

from ._binding import LoopBinding
from ._checkouts import Checkout
from ._session import UNKNOWN, Handle, Session, SharedAdapters, shut_down
from ._where import Place
from .errors import ClosedError, PoolkeeperError, ReleasedConnectionError, see

T = TypeVar("T")

IDLE = pq.TransactionStatus.IDLE
ACTIVE = pq.TransactionStatus.ACTIVE
INERROR = pq.TransactionStatus.INERROR
NO_PIPELINE = pq.PipelineStatus.OFF

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


class BoundConnection(Handle):
    """What poolkeeper adds to a connection class. Made concrete by `bound_class()`."""

    _user_class: ClassVar[type[AsyncConnection[Any]]]
    _keeper: ClassVar[weakref.ref[Any]]
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
            if isinstance(adapters, SharedAdapters):
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
