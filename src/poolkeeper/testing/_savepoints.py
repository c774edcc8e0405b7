"""
The transactions of a sandbox: what each checkout begins, commits and rolls back is a savepoint.

They lie one upon the other on the one connection: `Savepoints` knows their order. What is done
here is done in psycopg's generators, which run to their end whoever is cancelled, and note what
the server has answered before anything else can happen.
"""

from __future__ import annotations

from itertools import count
from typing import Any

import psycopg
from psycopg import generators, pq
from psycopg.abc import PQGen

INERROR = pq.TransactionStatus.INERROR
NO_PIPELINE = pq.PipelineStatus.OFF

_FINE = (pq.ExecStatus.COMMAND_OK, pq.ExecStatus.TUPLES_OK)

_XIDS = (
    # One for each transaction and savepoint that has written; it goes with the savepoint.
    b"SELECT count(*) FROM pg_catalog.pg_locks"
    b" WHERE locktype = 'transactionid' AND pid = pg_catalog.pg_backend_pid() AND granted"
)

_CHECKS = [
    # What is deferred to the end of a transaction is looked at here, and put back as it was.
    b"SAVEPOINT poolkeeper_check",
    b"SET CONSTRAINTS ALL IMMEDIATE",
    b"ROLLBACK TO poolkeeper_check",
    b"RELEASE poolkeeper_check",
]


class Savepoints:
    """Those that are open on one connection, outermost first, each with the name of it."""

    def __init__(self) -> None:
        self._numbers = count(1)
        self._open: list[bytes] = []

    def begin(self, conn: Any) -> PQGen[bytes]:
        """Set one for a transaction of *conn*; return its name."""
        name = b"poolkeeper_%d" % next(self._numbers)
        commands = [b"SAVEPOINT " + name]
        reads = conn.read_only
        if reads is None:
            reads = conn.pgconn.parameter_status(b"default_transaction_read_only") == b"on"
        if reads:
            commands.append(b"SET TRANSACTION READ ONLY")
        yield from run(conn, commands)
        self._open.append(name)
        return name

    def commit(self, conn: Any, name: bytes) -> PQGen[None]:
        """Release one, and those within; roll back instead where it has failed, as a server."""
        if name not in self._open:
            return  # one around it has ended
        try:
            if conn._pipeline is not None:
                yield from settle(conn)
            if conn.pgconn.transaction_status == INERROR:
                yield from self.roll_back(conn, name)
                return
            yield from run(conn, [*_CHECKS, b"RELEASE " + name])
        except psycopg.Error:
            # Of a constraint that was deferred, say: that is a roll-back.
            if conn.pgconn.transaction_status == INERROR:
                yield from self.roll_back(conn, name)
            raise
        self._forget(name)

    def roll_back(self, conn: Any, name: bytes) -> PQGen[None]:
        """Undo what was done since one was set, and end it."""
        if name not in self._open:
            return
        yield from run(conn, [b"ROLLBACK TO " + name, b"RELEASE " + name])
        self._forget(name)

    def roll_back_and_tell(self, conn: Any, name: bytes) -> PQGen[bool]:
        """Do as `roll_back()`, outside of a pipeline; tell whether anything was written since."""
        if name not in self._open:
            return False
        undo = b"ROLLBACK TO " + name
        before, _, after, _ = yield from run(conn, [_XIDS, undo, _XIDS, b"RELEASE " + name])
        self._forget(name)
        return bool(before.get_value(0, 0) != after.get_value(0, 0))

    def is_open(self, name: bytes | None) -> bool:
        """Tell whether one is open, and neither it nor one around it has ended."""
        return name in self._open

    def _forget(self, name: bytes) -> None:
        del self._open[self._open.index(name) :]


def run(conn: Any, commands: list[bytes]) -> PQGen[list[Any]]:
    """
    Run *commands* in one round trip, or as a part of the pipeline that *conn* is in.

    Returns:
        Their results; none in a pipeline.
    """
    if conn._pipeline is not None:
        for command in commands:
            yield from conn._exec_command(command)
        yield from settle(conn)
        return []
    pgconn = conn.pgconn
    pgconn.send_query(b"; ".join(commands))
    results: list[Any] = yield from generators.execute(pgconn)
    for result in results:
        if result.status not in _FINE:
            raise psycopg.errors.error_from_result(result)
    return results


def settle(conn: Any) -> PQGen[None]:
    """
    Read what is still to come of the pipeline that *conn* is in: only then its status is known.

    psycopg's ``sync()`` raises the first error that it finds, and may leave the rest for later: an
    error may have come before the end of what was sent with it.
    """
    pipeline = conn._pipeline
    failure: psycopg.Error | None = None
    steps = pipeline._sync_gen()
    before = -1
    while steps is not None:
        try:
            yield from steps
        except psycopg.Error as ex:
            failure = failure or ex
        waiting = len(pipeline.result_queue)
        steps = pipeline._fetch_gen(flush=False) if waiting and waiting != before else None
        before = waiting
    if failure is not None:
        raise failure
