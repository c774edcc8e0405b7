"""
What to say of work that was not committed when its borrower gives the connection back.

Not every transaction that is open has done any work: to warn of each one, as the bare pool does,
is noise where most of them have read something. PostgreSQL knows which ones have written, and is
asked in the same round trip as it is told to roll back.
"""

from __future__ import annotations

from typing import Any

import psycopg

from ._checkouts import Checkout
from ._cleaning import run
from ._connection import BoundConnection
from ._log import log
from ._status import IDLE, INERROR, INTRANS
from .errors import LostWorkError, see


def raise_if_lost(conn: Any) -> None:
    """
    Raise if *conn* was lost in the middle of a transaction, and its block ends all the same.

    Not if its user has closed it or rolled back, before the loss or after, or has lost nothing by
    its end: the last that is known of it is that all was committed, or that it may not write.

    Raises:
        LostWorkError: With the line where it was acquired.
    """
    checkout: Checkout = conn._checkout
    left = checkout.left_in
    if not conn.broken or conn.read_only:
        return
    if left == INTRANS:
        raise LostWorkError(
            f'a connection of pool "{conn._binding.name}" was lost with a transaction open:'
            " its work is not committed",
            detail=f"Acquired {checkout}. Its block has ended without an error.",
            hint="Let the error that told of the loss end the block, or do the work again. If it"
            f" was lost in the middle of commit(), look whether it is there. {see('lost-work')}",
        )
    if left == INERROR and checkout.failed_later:
        warn_of_failed(conn._binding.name, checkout)


def note_begun(conn: Any) -> None:
    """Note that a transaction was begun on *conn*, and nothing done in it so far."""
    conn._checkout.left_in = IDLE


def has_failed(conn: Any) -> bool:
    """Tell whether a transaction is open that has failed, after something was done in it."""
    return (
        not conn.closed
        and conn.pgconn.transaction_status == INERROR
        and conn._checkout.failed_later
    )


def warn_of_failed(name: str, checkout: Checkout) -> None:
    """Log that a block has ended well although its transaction had failed."""
    log("transaction_failed", checkout.facts(), pool=name)


async def roll_back(conn: BoundConnection) -> bool:
    """
    End the transaction of *conn*, and tell whether it may have written something.

    True as well where the server is another one than PostgreSQL, and does not know.
    """
    status, wrote = conn.pgconn.transaction_status, False
    if status == INTRANS:
        try:
            statements = [b"SELECT pg_catalog.txid_current_if_assigned() IS NOT NULL", b"ROLLBACK"]
            # As psycopg's rollback() does: they may be of what is rolled back. It forgets them in
            # the server at once, for later it would forget what is prepared by then.
            if conn._prepared._names:
                statements.append(b"DEALLOCATE ALL")
            asked, *_ = await run(conn, statements)
            conn._session.forget_prepared(conn)
            wrote = asked.get_value(0, 0) == b"t"
        except psycopg.Error:
            wrote = True
    await conn.rollback()  # nothing, if it is over
    return wrote


def warn_of_uncommitted(name: str, checkout: Checkout) -> None:
    """Log that a connection was given back with work that was not committed."""
    log("work_rolled_back", checkout.facts(), pool=name)
