"""
The connections of a sandbox: psycopg's, for which BEGIN, COMMIT and ROLLBACK mean a savepoint.

`Sandboxed` is put before the class of a pool's own connections. What it overrides beside psycopg's
public methods are the generators in which psycopg begins and ends a transaction; all else of
psycopg's stays as it is.
"""
# A transaction begins and ends in methods of psycopg's that are not public.
# pyright: reportPrivateUsage=false

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, Literal, cast

import psycopg
from psycopg import AsyncConnection, AsyncPipeline, AsyncTransaction, ConnectionInfo, Notify, pq
from psycopg.abc import PQGen
from typing_extensions import override

from ._errors import SandboxError, impossible
from ._savepoints import settle

if TYPE_CHECKING:
    from ._turns import Hold

IDLE = pq.TransactionStatus.IDLE
ACTIVE = pq.TransactionStatus.ACTIVE
INTRANS = pq.TransactionStatus.INTRANS
INERROR = pq.TransactionStatus.INERROR


class Exchange:
    """Who talks to the server: one handle at a time, for all have one session."""

    def __init__(self, pool: str) -> None:
        self._pool = pool
        self._owner: HandleLock | None = None
        self._waiting: deque[asyncio.Future[None]] = deque()

    async def begin(self, lock: HandleLock) -> None:
        """Wait until nobody else talks."""
        while (owner := self._owner) is not None:
            if owner.task is asyncio.current_task():
                raise impossible(
                    self._pool,
                    "a second connection in the middle of a stream",
                    "This task reads the rows of a stream(), a COPY or a pipeline, and asks for"
                    " something else on another connection meanwhile: both are one here.",
                    "Read all rows first, or use a server-side cursor",
                )
            waiter = asyncio.get_running_loop().create_future()
            self._waiting.append(waiter)
            try:
                await waiter
            except asyncio.CancelledError:
                if waiter.done() and not waiter.cancelled():
                    self._wake()
                raise
            finally:
                if waiter in self._waiting:
                    self._waiting.remove(waiter)
        self._owner = lock

    def end(self, lock: HandleLock) -> None:
        """Let others talk, if it is *lock* by which somebody does."""
        if self._owner is lock:
            self._owner = None
            self._wake()

    def _wake(self) -> None:
        while self._waiting:
            waiter = self._waiting.popleft()
            if not waiter.done():
                waiter.set_result(None)
                return


class HandleLock(asyncio.Lock):
    """The lock of one handle: whoever has it, and nobody else, talks to the server."""

    exchange: Exchange
    task: asyncio.Task[Any] | None = None

    @override
    async def acquire(self) -> Literal[True]:
        await super().acquire()
        try:
            await self.exchange.begin(self)
        except BaseException:
            super().release()
            raise
        self.task = asyncio.current_task()
        return True

    @override
    def release(self) -> None:
        self.exchange.end(self)
        super().release()

    @override
    async def __aenter__(self) -> None:
        await self.acquire()

    @override
    async def __aexit__(self, *_: object) -> None:
        self.release()


class SandboxInfo(ConnectionInfo):
    """What is known of a connection, as whoever has it may see it."""

    def __init__(self, conn: Sandboxed) -> None:
        super().__init__(conn.pgconn)
        self._conn = conn

    @property
    @override
    def transaction_status(self) -> pq.TransactionStatus:
        """That of the checkout's own transaction, not of the test's."""
        status = super().transaction_status
        return status if status == ACTIVE or self._conn.in_transaction else IDLE


class SandboxedPipeline(AsyncPipeline):
    """
    Knows where an implicit transaction ends: what is asked between two syncs is one.

    Attributes:
        synced: True if nothing was asked since the last one.
    """

    synced = True

    @override
    def _enqueue_sync(self) -> None:
        super()._enqueue_sync()
        self.synced = True


class Sandboxed(AsyncConnection[Any]):
    """One checkout of a sandbox; put before the class of the pool's own connections."""

    _hold: Hold

    @property
    def in_transaction(self) -> bool:
        """True if the borrower has begun a transaction, or a statement of his has."""
        hold = self._hold
        return bool(self._num_transactions) or (
            hold.savepoint is not None and (hold.in_block or not self._autocommit)
        )

    # --- what psycopg does by generators ------------------------------------------------------

    @override
    def _start_query(self) -> PQGen[None]:
        if self._num_transactions:
            return
        hold = self._hold
        pipeline: Any = self._pipeline
        if pipeline is not None:
            pipeline.__class__ = SandboxedPipeline
        if (
            hold.savepoint is not None
            and self._autocommit
            and (pipeline is None or pipeline.synced)
        ):
            yield from hold.commit(self)
        if hold.savepoint is None:
            yield from hold.begin(self)
        if pipeline is not None:
            pipeline.synced = False

    @override
    def _commit_gen(self) -> PQGen[None]:
        if self._num_transactions:
            yield from super()._commit_gen()  # which refuses it
        yield from self._hold.commit(self)

    @override
    def _rollback_gen(self) -> PQGen[None]:
        if self._num_transactions:
            yield from super()._rollback_gen()  # which refuses it
        if self._pipeline:
            yield from self._pipeline._sync_gen()  # it may have been aborted
        yield from self._undo_gen()

    def _undo_gen(self) -> PQGen[None]:
        # In autocommit there is nothing to undo: what is open is one statement, and it was done.
        hold = self._hold
        yield from hold.commit(self) if self._autocommit else hold.roll_back(self)

    @override
    def _check_intrans_gen(self, attribute: str) -> PQGen[None]:
        if self.in_transaction:
            yield from super()._check_intrans_gen(attribute)  # which refuses it
        elif self._hold.savepoint is not None:
            yield from self._hold.commit(self)

    # --- what it does by methods ----------------------------------------------------------------

    @property
    @override
    def info(self) -> ConnectionInfo:
        """What is known of the connection."""
        return SandboxInfo(self)

    @property
    @override
    def closed(self) -> bool:
        """True if the borrower has closed it, or the session is gone."""
        return self._hold.closed or super().closed

    @override
    def _check_connection_ok(self) -> None:
        if self._hold.closed:
            raise psycopg.OperationalError("the connection is closed")
        super()._check_connection_ok()

    def autocommits(self) -> bool:
        """Switch autocommit on, without an exchange, if that can be done."""
        if self._hold.savepoint is None and not self._num_transactions:
            self._autocommit = True
        return self._autocommit

    async def may_go_on(self) -> bool:
        """Do as every connection of the pool does; a stream that was left open talks no more."""
        above: Any = super()
        goes_on = bool(await above.may_go_on())
        if not goes_on:
            self._hold.turns.exchange.end(cast(HandleLock, self.lock))
        return goes_on

    @asynccontextmanager
    @override
    async def transaction(
        self, savepoint_name: str | None = None, force_rollback: bool = False
    ) -> AsyncGenerator[AsyncTransaction]:
        """Start a block, which is a savepoint in any case."""
        hold, outermost = self._hold, not self.in_transaction
        if outermost:
            hold.in_block = True
            async with self.lock:
                await self.wait(self._start_query())
        try:
            async with super().transaction(savepoint_name, force_rollback) as block:
                yield block
                if self._pipeline is not None:
                    async with self.lock:
                        await self.wait(settle(self))
                if outermost and self.pgconn.transaction_status == INERROR:
                    raise psycopg.Rollback(block)  # a COMMIT would be one, and say nothing
        finally:
            # A block within may be open still, by its own fault: psycopg has said so then.
            if outermost and not self._num_transactions:
                hold.in_block = False
                if not self.closed:
                    # What is to be undone was, within: this is the end of an empty one then.
                    await self.commit()

    @override
    async def tpc_begin(self, xid: Any) -> None:
        """Refuse it: what is prepared outlives its session."""
        raise self._impossible("a two-phase transaction", "What is prepared outlives its session.")

    @override
    async def close(self) -> None:
        """Roll back and refuse every use, but end no session; or give it back, if that is meant."""
        if self.closed:
            return
        keeper: Any = cast(Any, self)._keeper()
        if keeper is not None and keeper.close_returns:
            await keeper.putconn(self)
        else:
            if self._hold.savepoint is not None:
                async with self.lock:
                    await self.wait(self._undo_gen())
            self._hold.closed = True

    @override
    def notifies(
        self, *, timeout: float | None = None, stop_after: int | None = None
    ) -> AsyncGenerator[Notify]:
        """Refuse it at once: it would wait for ever."""
        raise self._impossible(
            "a notification", "The server sends one when the transaction of NOTIFY is committed."
        )

    @override
    async def wait(self, gen: PQGen[Any], *args: Any, **kwargs: Any) -> Any:
        """Talk to the server; say what cannot work, and notice if the sandbox has been left."""
        try:
            result = await super().wait(gen, *args, **kwargs)
            if _is_one_statement(self):
                await super().wait(self._hold.commit(self))
        except psycopg.errors.ActiveSqlTransaction as ex:
            raise self._refused(ex) from ex
        except psycopg.Error:
            if _is_one_statement(self):
                await super().wait(self._hold.commit(self))
            raise
        if self.pgconn.transaction_status == IDLE:
            raise self._hold.turns.was_left(self._hold)
        return result

    def _refused(self, error: psycopg.Error) -> SandboxError:
        said = error.diag.message_primary or ""
        what, instead = "a command that the server runs outside of a transaction only", ""
        if "ISOLATION LEVEL" in said:
            what = "a level of its own for a transaction"
            instead = "Give the sandbox the level: sandbox(manager, isolation=...)"
        return impossible(self._hold.turns.name, what, f"The server says: {said}.", instead)

    def _impossible(self, what: str, why: str) -> SandboxError:
        return impossible(self._hold.turns.name, what, why)

    def __del__(self, *_: Any) -> None:
        if "_hold" in vars(self):
            self._hold.dropped()


def _is_one_statement(conn: Any) -> bool:
    """Tell whether what is open on *conn* is a statement by itself, which has ended."""
    return (
        isinstance(conn, Sandboxed)  # it may have been given back meanwhile
        and conn._hold.savepoint is not None
        and conn._autocommit
        and not conn.in_transaction
        and conn._pipeline is None
        and conn.pgconn.transaction_status in (INTRANS, INERROR)
    )
