"""
What is put right on the server when a connection comes back: the only SQL of the pool's own.

A borrower's settings are told from everybody else's by RESET, in one round trip: it takes away
what the session itself has set, and changes nothing where the server, an administrator or a
pooler has. So what is still different after it is none of our business. It is as it is from
there on: to set it to what it was would be to lift, session by session, the write freeze of a
server that is being replaced.

None of this uses the user's cursors or row factories.
"""

from __future__ import annotations

from typing import Any

import psycopg
from psycopg import generators, pq
from psycopg.abc import PQGen

from ._connection import IN_HOT_STANDBY, BoundConnection

IDENTITY = frozenset({b"session_authorization", b"is_superuser"})
"""Not settings of their own: RESET SESSION AUTHORIZATION and RESET ROLE bring them back."""

_READ_ONLY = b"default_transaction_read_only"


async def put_settings_back(conn: BoundConnection) -> None:
    """
    Undo what the session has set since ``configure``.

    Raises:
        psycopg.OperationalError: If the session is still another user's.
    """
    session = conn._session
    changed = dict(session.changed_parameters())
    if session.in_doubt:
        changed.setdefault(_READ_ONLY, None)  # set, it may be, to what it was
    statements: list[bytes] = []
    if IDENTITY.intersection(changed):
        statements += [b"RESET SESSION AUTHORIZATION", b"RESET ROLE"]
    literal = pq.Escaping(conn.pgconn).escape_literal
    for name, was in changed.items():
        if name in IDENTITY or name == IN_HOT_STANDBY:
            continue
        if name not in session.configured:
            statements.append(b"RESET " + name)
        elif was is not None:
            statements.append(b"SELECT set_config('%b', %b, false)" % (name, bytes(literal(was))))
    if statements:
        await _run(conn, statements)
    left = [name.decode() for name, _ in session.changed_parameters() if name in IDENTITY]
    if left:
        raise psycopg.OperationalError(f"settings could not be put back: {', '.join(left)}")


async def note_configured(conn: BoundConnection) -> None:
    """Find out which of the reported parameters ``configure`` has set, if any are different."""
    session = conn._session
    if not session.parameters_unchanged:
        (result,) = await _run(conn, [b"SELECT name FROM pg_settings WHERE source = 'session'"])
        names = {result.get_value(row, 0) for row in range(result.ntuples)}
        session.configured = frozenset(n for n, _ in session.changed_parameters() if n in names)


async def discard(conn: BoundConnection) -> None:
    """Run DISCARD ALL."""
    await _run(conn, [b"DISCARD ALL"])
    conn._session.forget_prepared(conn)


async def ask(conn: BoundConnection) -> None:
    """Run an empty query: raise if the server does not answer."""
    await _run(conn, [b""])


async def _run(conn: BoundConnection, statements: list[bytes]) -> list[Any]:
    """Run *statements* outside of any transaction block, all in one round trip."""
    async with conn.lock:
        return await conn.wait(_execute(conn.pgconn, b"; ".join(statements)))


_FINE = (pq.ExecStatus.COMMAND_OK, pq.ExecStatus.TUPLES_OK, pq.ExecStatus.EMPTY_QUERY)


def _execute(pgconn: Any, statements: bytes) -> PQGen[list[Any]]:
    pgconn.send_query(statements)
    results: list[Any] = yield from generators.execute(pgconn)
    for result in results:
        if result.status not in _FINE:
            raise psycopg.errors.error_from_result(result)
    return results
