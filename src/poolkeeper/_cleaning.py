"""
What is put right on the server when a connection comes back, by the pool's own SQL.

A borrower's settings are told from everybody else's by RESET, in one round trip: it takes away
what the session itself has set, and changes nothing where the server, an administrator or a
pooler has. So what is still different after it is none of our business. It is as it is from
there on: to set it to what it was would be to lift, session by session, the write freeze of a
server that is being replaced.

None of this uses the user's cursors or row factories.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from typing import Any

import psycopg
from psycopg import generators, pq
from psycopg.abc import PQGen

from ._checkouts import Checkout
from ._connection import BoundConnection
from ._log import log
from ._session import KIND_PARAMETERS, READ_ONLY, SEARCH_PATH, STANDBY, Session

IDENTITY = frozenset({b"session_authorization", b"is_superuser"})
"""Not settings of their own: RESET SESSION AUTHORIZATION and RESET ROLE bring them back."""

GOES_ASTRAY = frozenset({READ_ONLY, SEARCH_PATH})
"""
What no pooler keeps for its client. A RESET does no harm in a session that it was not meant for,
where the next transaction has found another one; to set it there would be to set it for others.
"""

_TAKES_NO_WRITES = (
    # Not transaction_read_only: a transaction is what its beginning was, before the RESET.
    b"SELECT pg_is_in_recovery() OR current_setting('default_transaction_read_only')::bool"
)


class Cleaner:
    """
    Puts sessions right when they come back, for one life of a pool.

    Args:
        name: Of the pool.
        configure: The user's callback; it is run again where that is undone which it may have set
            and nobody can see: by DISCARD ALL, and by RESET ROLE.
        discards: True for ``reset="discard"``.
        step: Called with what is done with a session from here on, and in whose function.
    """

    def __init__(
        self,
        name: str,
        configure: Callable[[Any], Awaitable[None]] | None,
        discards: bool,
        step: Callable[..., None],
    ) -> None:
        self._name = name
        self._configure = configure
        self.discards = discards
        self.shared = False
        """True if the next transaction may run in another session, for a pooler shares them."""
        self._step = step
        self._told: set[str] = set()

    async def clean(self, conn: BoundConnection) -> bool:
        """
        Undo what the session has set since ``configure``.

        Returns:
            True if the session was in doubt, and the server takes no writes.

        Raises:
            psycopg.OperationalError: If the session is still another user's.
        """
        session = conn._session
        checkout, session.returned = session.returned, None
        changed = session.changed_parameters()
        doubt = session.in_doubt and READ_ONLY not in session.configured
        discards = self.discards and not self.shared
        if discards:
            self._step(session, "in DISCARD ALL")
            await run(conn, [b"DISCARD ALL"])
            session.forget_prepared(conn)
            refuses_writes = doubt and not await takes_writes(conn)
        elif changed or doubt:
            self._step(session, "putting its settings back")
            refuses_writes = await self._put_settings_back(conn, dict(changed), doubt)
        else:
            return False
        if self._configure is not None and (
            discards or not IDENTITY.isdisjoint(name for name, _ in changed)
        ):
            self._step(session, "in the configure callback", self._configure)
            await self._configure(conn)
            session.forget_added_handlers(conn)
        left = {name for name, _ in session.changed_parameters()}
        if strange := IDENTITY & left:
            raise psycopg.OperationalError(f"could not be put back: {_names(strange)}")
        if changed:
            self._tell({name for name, _ in changed}, left, session, checkout)
        return refuses_writes

    async def _put_settings_back(
        self, conn: BoundConnection, changed: dict[bytes, bytes | None], doubt: bool
    ) -> bool:
        """Put back what is *changed*; in *doubt*, ask as well if the server takes no writes."""
        configured = conn._session.configured
        if doubt:
            changed.setdefault(READ_ONLY, None)  # set, it may be, to what it was
        statements: list[bytes] = []
        if not IDENTITY.isdisjoint(changed):
            statements += [b"RESET SESSION AUTHORIZATION", b"RESET ROLE"]
        literal = pq.Escaping(conn.pgconn).escape_literal
        for name, was in changed.items():
            if name in IDENTITY or name == STANDBY:
                continue
            if name not in configured:
                statements.append(b"RESET " + name)
            elif was is not None and not (self.shared and name in GOES_ASTRAY):
                statement = b"SELECT set_config('%b', %b, false)"
                statements.append(statement % (name, bytes(literal(was))))
        if doubt:
            statements.append(_TAKES_NO_WRITES)
        results = await run(conn, statements) if statements else []
        return doubt and results[-1].get_value(0, 0) == b"t"

    def _tell(
        self, changed: set[bytes], left: set[bytes], session: Session, checkout: Checkout | None
    ) -> None:
        """Say each kind of thing once, with the line where the connection was acquired."""
        by = checkout.facts() if checkout else {"acquired": "by the pool, for a check"}
        for event, names in (
            ("settings_put_back", changed - left),
            ("settings_left", left & session.configured),
            ("settings_of_server", left - session.configured - KIND_PARAMETERS),
        ):
            if names:
                quietly = event in self._told
                log(event, by, quietly=quietly, pool=self._name, settings=_names(names))
                self._told.add(event)


def _names(names: Iterable[bytes]) -> str:
    return ", ".join(sorted(name.decode() for name in names))


async def note_configured(conn: BoundConnection) -> None:
    """Find out which of the reported parameters ``configure`` has set, if any are different."""
    session = conn._session
    if not session.parameters_unchanged:
        names = await _set_by_session(conn)
        session.configured = frozenset(n for n, _ in session.changed_parameters() if n in names)


async def takes_writes(conn: BoundConnection) -> bool:
    """Ask the server whether it takes writes, where a transaction does not say otherwise."""
    (result,) = await run(conn, [_TAKES_NO_WRITES])
    return bool(result.get_value(0, 0) == b"f")


async def has_set_read_only(conn: BoundConnection) -> bool:
    """Ask whether it is the session itself that has set what its transactions are by default."""
    return READ_ONLY in await _set_by_session(conn)


async def _set_by_session(conn: BoundConnection) -> set[bytes]:
    (result,) = await run(conn, [b"SELECT name FROM pg_settings WHERE source = 'session'"])
    return {result.get_value(row, 0) for row in range(result.ntuples)}


async def ask(conn: BoundConnection) -> None:
    """Run an empty query: raise if the server does not answer."""
    await run(conn, [b""])


async def run(conn: BoundConnection, statements: list[bytes]) -> list[Any]:
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
