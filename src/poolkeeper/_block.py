"""
The block of one checkout: what `connection()` returns.

It acquires when it is entered, and commits, or rolls back, and gives back when it is left. Left
by an error, a cancellation or at its end, it gives back what it has acquired, once.
"""
# A pool's life, and what it was made with, are not its users'.
# pyright: reportPrivateUsage=false

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from functools import wraps
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any, NoReturn, ParamSpec, cast

from psycopg import AsyncConnection, IsolationLevel
from psycopg.rows import AsyncRowFactory, TupleRow
from typing_extensions import TypeVar, override

from . import _lost_work
from ._acquiring import take, wait_for_connection
from ._connection import LEFT_OPEN, RevokedConnection
from ._life import Life, Pool
from ._releasing import release
from ._status import IDLE
from ._where import Behalf, code_behind
from .errors import PoolkeeperError

ACT = TypeVar("ACT", bound=AsyncConnection[Any], default=AsyncConnection[TupleRow])
P = ParamSpec("P")
T = TypeVar("T")
Returned = TypeVar("Returned")


class CheckoutContext(AbstractAsyncContextManager[ACT]):
    """
    What `connection()` returns. Can be entered once, or decorate a function.

    Args:
        pool: Where to acquire.
        timeout: Seconds to wait; None for the pool's own.
        frame: Where it was asked for, or on whose behalf.
        enclosed: True if it is certain that the task that enters leaves it as well.
    """

    __slots__ = ("_conn", "_enclosed", "_frame", "_lineno", "_pool", "_timeout")

    def __init__(
        self,
        pool: Pool,
        timeout: float | None,
        frame: FrameType | Behalf,
        enclosed: bool = False,
    ) -> None:
        self._pool = pool
        self._timeout = timeout
        self._frame: Any = frame
        """A frame until it is entered, then the code of it: a frame keeps its variables alive."""
        self._lineno = frame.f_lineno
        self._enclosed = enclosed

    def __call__(
        self, function: Callable[P, Coroutine[Any, Any, T]]
    ) -> Callable[P, Coroutine[Any, Any, T]]:
        """Return *function* with a block, and so a connection, of its own around each call."""
        again = self.for_calls_of(function)

        @wraps(function)
        async def in_block(*args: P.args, **kwargs: P.kwargs) -> T:
            async with again(sys._getframe()):
                return await function(*args, **kwargs)

        return in_block

    if not TYPE_CHECKING:  # type checkers say so as well

        def __await__(self) -> NoReturn:
            raise TypeError(
                f'connection() of pool "{self._pool.name}" cannot be awaited: write "async with'
                ' ...connection() as conn:", which gives the connection back, too'
            )

    def for_calls_of(
        self, function: Callable[..., object]
    ) -> Callable[[FrameType], CheckoutContext[ACT]]:
        """Return what makes one like this, for *function*, which the frame calls."""
        pool, timeout, code = self._pool, self._timeout, code_behind(function)
        self._frame = None  # a frame keeps all its variables alive
        return lambda frame: CheckoutContext(
            pool, timeout, Behalf(code, frame) if code else frame, True
        )

    @override
    async def __aenter__(self) -> ACT:
        pool, frame = self._pool, self._frame
        self._frame = frame.f_code
        structured = self._enclosed
        if not structured:
            entering = sys._getframe(1)
            structured = entering is frame or not _by_exit_stack(entering)
        try:
            life = pool._life
            conn = take(life, frame, self._lineno, structured)
            if conn is None:
                conn = await wait_for_connection(
                    cast(Life, life), self._timeout, frame, self._lineno, structured
                )
        except PoolkeeperError as ex:
            raise ex.with_traceback(None)  # noqa: B904 - see briefly()
        self._conn: Any = conn
        return conn  # type: ignore[no-any-return]

    @override
    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        conn, pool = self._conn, self._pool
        if exc_type is not None and conn._binding.forked:
            return  # the block is the parent's; the child ends with its own error
        roll_back = True  # what is still open then, by an error or a commit that was cancelled
        try:
            if conn.exits_like_psycopg:
                # What AsyncConnection.__aexit__() does: nothing when nothing is open, else
                # commit here, or roll back; that is part of the release, which nobody cancels.
                if exc_type is None and (
                    conn.pgconn.transaction_status != IDLE or conn.is_in_block()
                ):
                    if conn.closed:
                        _lost_work.raise_if_lost(conn)
                        return
                    if conn.lock.locked() and not await conn.may_go_on():
                        conn = conn._session.in_place_of(conn)
                        await conn.end_command(LEFT_OPEN)
                    failed = _lost_work.has_failed(conn)
                    await conn.commit()
                    if failed:  # so that was a roll-back
                        _lost_work.warn_of_failed(pool.name, conn._checkout)
            elif isinstance(conn, RevokedConnection):
                if exc_type is None and vars(conn).get("_lost_work"):
                    raise conn.refusal()
            else:
                if exc_type is None and conn.lock.locked() and not await conn.may_go_on():
                    conn = conn._session.in_place_of(conn)
                    await conn.end_command(LEFT_OPEN)
                lost, failed = conn.closed, _lost_work.has_failed(conn)
                await conn.__aexit__(exc_type, exc, traceback)
                roll_back = False  # what the user's own leaves open, psycopg_pool tells of
                if exc_type is None and lost:
                    _lost_work.raise_if_lost(conn)
                elif exc_type is None and failed:
                    _lost_work.warn_of_failed(pool.name, conn._checkout)
        except PoolkeeperError as ex:
            raise ex if ex is exc else ex.with_traceback(None)  # noqa: B904 - see briefly()
        finally:
            unlocking = release(pool, conn, roll_back)
            if unlocking is not None:
                await asyncio.shield(unlocking)


class Block(AbstractAsyncContextManager[T]):
    """
    What runs a generator around a block, on a connection of its own; can decorate a function.

    As contextlib's, but a function that it decorates is named as the one that acquires, and the
    traceback of an error of ours ends at the line of the block.

    Args:
        generator: Yields once, with the connection of the checkout that is its first argument.
        checkout: That.
        arguments: The others.
    """

    __slots__ = ("_arguments", "_checkout", "_generator", "_running")

    def __init__(
        self,
        generator: Callable[..., AsyncGenerator[T]],
        checkout: CheckoutContext[Any],
        *arguments: object,
    ) -> None:
        self._generator = generator
        self._checkout = checkout
        self._arguments = arguments

    def __call__(
        self, function: Callable[P, Coroutine[Any, Any, Returned]]
    ) -> Callable[P, Coroutine[Any, Any, Returned]]:
        """Return *function* with such a block of its own around each call."""
        again = self._checkout.for_calls_of(function)

        @wraps(function)
        async def in_block(*args: P.args, **kwargs: P.kwargs) -> Returned:
            async with Block(self._generator, again(sys._getframe()), *self._arguments):
                return await function(*args, **kwargs)

        return in_block

    @override
    async def __aenter__(self) -> T:
        self._running = asynccontextmanager(self._generator)(self._checkout, *self._arguments)
        try:
            return await self._running.__aenter__()
        except PoolkeeperError as ex:
            raise ex.with_traceback(None)  # noqa: B904 - see briefly()

    @override
    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> bool | None:
        try:
            return await self._running.__aexit__(exc_type, exc, traceback)
        except PoolkeeperError as ex:
            raise ex if ex is exc else ex.with_traceback(None)  # noqa: B904 - see briefly()


async def with_transaction(
    checkout: CheckoutContext[Any],
    isolation: IsolationLevel | None,
    read_only: bool | None,
    deferrable: bool | None,
) -> AsyncGenerator[Any]:
    """Yield a connection, with a transaction block of these settings around."""
    async with checkout as conn:
        if isolation is not None:
            await conn.set_isolation_level(isolation)
        if read_only is not None:
            await conn.set_read_only(read_only)
        if deferrable is not None:
            await conn.set_deferrable(deferrable)
        failed = False
        async with conn.transaction():
            _lost_work.note_begun(conn)
            yield conn
            failed = _lost_work.has_failed(conn)
        if failed:  # so its COMMIT was a roll-back
            _lost_work.warn_of_failed(conn._binding.name, conn._checkout)


async def with_cursor(
    checkout: CheckoutContext[Any], row_factory: AsyncRowFactory[Any] | None, binary: bool
) -> AsyncGenerator[Any]:
    """Yield a cursor."""
    async with checkout as conn:
        factory = row_factory or conn.row_factory
        async with conn.cursor(binary=binary, row_factory=factory) as cursor:
            yield cursor


_ENTERS_STACK = AsyncExitStack.enter_async_context.__code__
_ENTERS_BLOCK = cast(Any, Block).__aenter__.__code__


def _by_exit_stack(entering: FrameType) -> bool:
    """Tell whether an AsyncExitStack enters: it may be handed on, to a task that gives back."""
    driver = entering.f_back
    if driver is not None and driver.f_globals.get("__name__") == "contextlib":
        # transaction(), cursor() or the like: contextlib runs their generator.
        outside = driver.f_back
        if outside is not None and outside.f_code is _ENTERS_BLOCK:
            outside = outside.f_back
        return outside is not None and outside.f_code is _ENTERS_STACK
    return entering.f_code is _ENTERS_STACK
