"""
Giving back: what happens to a connection from the end of its checkout until it is idle again.

A clean one is handed on at once, in the caller's task, without an await. One that needs work (a
rollback, a setting to put back, a `reset`) gets it in a task of its own, which `close()` waits
for: a caller that is cancelled, twice even, loses no connection. It waits until its transaction
is over, for there are locks as long, and for no more.

Whatever goes wrong on the way, the connection ends in one of three places: with the next task,
among the idle ones, or replaced.
"""
# A pool's life, and what it was made with, are not its users'.
# pyright: reportPrivateUsage=false

from __future__ import annotations

import asyncio
from asyncio import _get_running_loop
from contextlib import suppress
from functools import partial
from inspect import isawaitable
from time import monotonic
from typing import Any, cast

from psycopg import pq

from . import _checking, _compat, _lost_work
from ._binding import LoopBinding
from ._checkouts import Checkout
from ._connection import BoundConnection, ReleasedConnection, RetiredConnection, RevokedConnection
from ._ending import (
    discard_busy,
    discarded,
    dismiss,
    end_checkout,
    end_connection,
    end_session,
    lost,
    replace,
    tell_end,
)
from ._life import Life, Pool, StandIn
from ._log import log
from ._session import DRAINED, MOVED, Session, part_from_pipeline, shut_down
from ._status import ACTIVE, IDLE, INERROR, INTRANS, NO_PIPELINE, UNKNOWN
from ._stock import forget, is_surplus
from ._stopping import CANCEL_GRACE
from ._tasks import set_done
from ._words import in_words
from .errors import ConfigError


def release(
    pool: Pool, conn: Any, roll_back: bool, *, tells: bool = False
) -> asyncio.Future[None] | None:
    """
    Give *conn* back: at once if it is clean, else in a task of the pool's own.

    A `reset` and what is to be put back is the pool's affair; but as long as a transaction is
    open there are locks, and its end is what the caller is to wait for: it is returned.

    Args:
        pool: Where it was acquired.
        conn: What `take()` or `wait_for_connection()` gave.
        roll_back: True if its block has ended with an exception.
        tells: True if a roll-back of what was written is to be told.

    Raises:
        ReleasedConnectionError: If it was given back before.
        LoopMismatchError: If called on another loop than the one that opened the pool.
        ValueError: If it does not come from this pool.
    """
    if _compat.owner(conn) is not pool or isinstance(conn, RetiredConnection):
        if isinstance(conn, RevokedConnection):
            return None  # close() took it back already
        if isinstance(conn, ReleasedConnection):
            raise conn.given_back_twice()
        owner = _compat.owner(conn)
        if isinstance(owner, StandIn) and owner.pool is pool:
            return owner.release(conn, roll_back, tells)
        raise _not_from_here(pool, conn)
    # The connection's own binding: the pool may have been opened anew meanwhile.
    binding: LoopBinding = conn._binding
    loop = _get_running_loop()
    if loop is None or loop is not binding.owner_loop():
        raise binding.mismatch("give a connection back")
    # No cast(): that is a call. On its loop, and neither released nor revoked: its life goes on.
    life: Any = pool._life
    if conn._under_way is not None:  # at_work, without the call
        discard_busy(life, conn)
        return None
    session: Session = conn._session
    checkout: Checkout = conn._checkout
    fresh = session.successor(conn)
    # Read only now: who begins to cancel from here on finds the handle released.
    cancelling = conn._cancelling
    now = end_checkout(life, session, checkout)
    pgconn = session.pgconn
    if (
        pgconn.transaction_status == IDLE
        and not cancelling
        and not life.ending
        and life.reset is None
        and (not checkout.used or session.parameters_unchanged)
        and pgconn.pipeline_status == NO_PIPELINE
        and session.expires_at > now
        and not life.oversized
    ):
        # Life.give(), without the call.
        if not life.line or not life.line.offer(fresh):
            life.keep(fresh)
        if checkout.told:
            tell_end(life, checkout, now)
        return None
    session.returned = checkout
    part_from_pipeline(conn)
    cleaning = start_put_back(
        life,
        fresh,
        roll_back=roll_back,
        tells=checkout if tells else None,
        cancelling=cancelling,
    )
    if checkout.told:
        tell_end(life, checkout, now)
    if pgconn.transaction_status in (IDLE, UNKNOWN):
        return None
    session.unlocked = unlocked = loop.create_future()
    cleaning.add_done_callback(lambda _: set_done(unlocked))
    return unlocked


def keep_unseen(life: Life, conn: Any, plain: bool) -> bool:
    """
    Give *conn* back as it is, whose handle nobody has seen; False if that takes `release()`.

    Its session's next borrower gets the same handle: there is nobody who could use it late.

    Args:
        life: Whose it is.
        conn: The handle.
        plain: True if no setting can have been changed, but by the server itself.
    """
    session: Session = conn._session
    checkout: Checkout = conn._checkout
    heard_at = checkout.changed_at
    if (
        session.pgconn.transaction_status != IDLE
        or life.ending
        or life.oversized
        or life.check is not None  # which has seen it
        or life.reset is not None
        or conn._cancelling
        or conn._adapters.handed_out
        or session.expires_at <= heard_at
        or not (session.unchanged_lately(heard_at) if plain else session.parameters_unchanged)
    ):
        return False
    now = end_checkout(life, session, checkout)
    conn._checkout = conn._pool = None
    if not life.line or not life.line.offer(conn):
        life.keep(conn)
    if checkout.told:
        tell_end(life, checkout, now)
    return True


def _not_from_here(pool: Pool, conn: Any) -> ValueError:
    owner = cast("Pool | None", _compat.owner(conn))
    whose = f'it comes from pool "{owner.name}"' if owner else "it does not come from any pool"
    # It begins as psycopg_pool's does, by which somebody may know it.
    return ValueError(f'can\'t return connection to pool "{pool.name}": {whose}')


def take_back_unused(life: Life, conn: Any) -> None:
    """Give a connection back that nobody has had; but `check` may have changed it."""
    if not isinstance(conn, RetiredConnection):
        conn = conn._session.successor(conn)
    start_put_back(life, conn, unused=True)


def take_back_dropped(life: Life | Any, conn: BoundConnection) -> None:
    """Take a connection back that was garbage-collected and not closed; in any thread."""
    loop = life.binding.loop
    session = conn._session
    if loop is None or loop.is_closed():
        return
    checkout = session.checkout
    if checkout is not None:
        checkout.structured = False  # who waits now is going to have it
    fresh = session.successor(conn)
    with suppress(RuntimeError):  # the loop was closed meanwhile
        loop.call_soon_threadsafe(_take_back, life, fresh, checkout)


def _take_back(life: Life, fresh: BoundConnection, checkout: Checkout | None) -> None:
    if isinstance(fresh, RetiredConnection):
        return
    if life.ending:
        fresh._session.finish()
        return
    if checkout is not None:
        log("connection_dropped", checkout.facts(), pool=life.name)
        now = end_checkout(life, fresh._session, checkout)
        fresh._session.returned = checkout
        start_put_back(life, fresh)
        if checkout.told:
            tell_end(life, checkout, now)
    else:
        start_put_back(life, fresh)


# --- in a task of its own --------------------------------------------------------------------


def start_put_back(life: Life, conn: Any, **how: Any) -> asyncio.Task[None]:
    """
    Give back a connection in a task of its own, which nobody's cancellation reaches.

    Args:
        life: Whose it is.
        conn: The handle for the next borrower.
        how: *unused*, True if nobody had it; *roll_back*, True if its block has ended with an
            exception; *tells*, of whom is to be told that what he wrote was rolled back;
            *cancelling*, the requests to cancel that its last borrower has begun.
    """
    if not isinstance(conn, RevokedConnection):
        life.between.begin(conn._session, "returning", "being put in order")
    task = life.tasks.start(partial(_put_back, life, conn, **how))
    task.add_done_callback(partial(_put_back_ended, life, conn))
    return task


def _put_back_ended(life: Life, conn: Any, task: asyncio.Task[None]) -> None:
    if not task.cancelled() and task.exception() is None:
        return
    # Somebody cancelled every task there is, ours included: it is in nobody's hands now.
    if not isinstance(conn, RetiredConnection):
        end_session(conn._session)
        lost(life, conn._session, "cancelled")
    life.between.end(conn._session)


async def _put_back(
    life: Life,
    conn: Any,
    *,
    unused: bool = False,
    roll_back: bool = False,
    tells: Checkout | None = None,
    cancelling: set[object] | None = None,
) -> None:
    session: Session = conn._session
    await _end_what_runs(life, conn, cancelling)
    if conn.pgconn.transaction_status in (INTRANS, INERROR):
        life.between.now(session, "in a rollback")
        await _end_transaction(life, conn, roll_back, tells)
    if isinstance(conn, RevokedConnection):
        return  # its life is over
    if life.oversized and is_surplus(life):
        forget(life, 1)
        dismiss(life, conn, "surplus")
    elif life.ending:
        await end_connection(life, conn, "closing")
    else:
        await _put_in_order(life, conn)
        if isinstance(conn, RevokedConnection):
            return
        await _keep_or_replace(life, conn, unused)
    life.between.end(session)


async def _end_what_runs(life: Life, conn: Any, cancelling: set[object] | None) -> None:
    """Let requests to cancel, a pipeline and a command come to their end, or end the session."""
    session: Session = conn._session
    pgconn = conn.pgconn
    if cancelling:
        life.between.now(session, "waiting for a request to cancel")
        if not await _have_ended(cancelling):
            session.finish()
    if (
        pgconn.pipeline_status != NO_PIPELINE
        and pgconn.transaction_status != UNKNOWN  # lost
        and not conn.leave_pipeline()
    ):
        log("connection_in_pipeline", pool=life.name)
        session.finish()
    if pgconn.transaction_status == ACTIVE:
        life.between.now(session, "stopping a command")
        await conn.end_command()


async def _end_transaction(life: Life, conn: Any, roll_back: bool, tells: Checkout | None) -> None:
    """Roll back, and say so where nobody has asked for it."""
    if not roll_back and tells is None:
        log("transaction_left", pool=life.name)
    pgconn = conn.pgconn
    # Shut down, the socket reads as closed by the server.
    timer = asyncio.get_running_loop().call_later(_checking.PROBE_TIMEOUT, shut_down, pgconn)
    try:
        if tells is None:
            await conn.rollback()
        elif await _lost_work.roll_back(conn):
            _lost_work.warn_of_uncommitted(life.name, tells)
        elif tells.failed_later:
            _lost_work.warn_of_failed(life.name, tells)
    except Exception as ex:
        log("rollback_failed", pool=life.name, reason=in_words(ex))
    finally:
        timer.cancel()


async def _put_in_order(life: Life, conn: Any) -> None:
    """Undo on the server what the borrower left; end the session if that cannot be."""
    status = conn.pgconn.transaction_status
    if status == UNKNOWN:
        return
    if status != IDLE:  # a rollback has failed
        await end_connection(life, conn, "out of order")
        return
    try:
        await _clean(life, conn)
        if (status := conn.pgconn.transaction_status) not in (IDLE, UNKNOWN):
            raise ConfigError(
                "the reset callback left the connection in status"
                f" {pq.TransactionStatus(status).name}",
                parameter="reset",
            )
    except Exception as ex:
        if isinstance(conn, RevokedConnection):
            return
        log("connection_out_of_order", pool=life.name, reason=in_words(ex))
        await end_connection(life, conn, "out of order")


async def _clean(life: Life, conn: Any) -> None:
    session: Session = conn._session
    if session.unlocked is not None:
        set_done(session.unlocked)
    refuses_writes = await life.cleaner.clean(conn)
    if not life.failover.accept(conn):
        return  # it is to be replaced
    if refuses_writes:
        life.failover.write_refused(conn)
    reset = life.reset
    if reset is not None and reset != "discard":
        life.between.now(session, "in the reset callback", reset)
        await called("reset", reset, conn)


async def called(name: str, callback: Any, conn: Any) -> None:
    """Call an async *callback* of the user's with *conn*; say so if it is not async."""
    given = callback(conn)
    if not isawaitable(given):
        raise ConfigError(
            f"the {name} callback is not async: it must be an async function", parameter=name
        )
    await given


_EARLY = {DRAINED: "drained", MOVED: "server changed"}


async def _keep_or_replace(life: Life, conn: Any, unused: bool) -> None:
    """Hand on a connection that is in order; one that is not, or too old, is replaced."""
    if conn.pgconn.transaction_status == UNKNOWN:
        life.counters.count("connections_lost" if unused else "returns_bad")
        discarded(life, conn._session, "dead" if unused else "broken")
    elif life.ending:
        await end_connection(life, conn, "closing")
    elif (expires := conn._session.expires_at) <= monotonic():
        await end_connection(life, conn, _EARLY.get(expires, "expired"))
    else:
        _compat.set_owner(conn, None)
        life.give(conn)
        return
    replace(life)


async def _have_ended(requests: set[object]) -> bool:
    """Tell whether *requests* to cancel, which would stop the next query, end in `CANCEL_GRACE`."""
    until = monotonic() + CANCEL_GRACE
    # Some of them may be made in other threads.
    while requests and monotonic() < until:  # noqa: ASYNC110
        await asyncio.sleep(0.001)
    return not requests
