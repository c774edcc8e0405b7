"""Count what a session sends to the server, in libpq's own trace."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from psycopg import pq

from poolkeeper import PoolManager
from tests.support.inside import life


class Wire:
    """
    The messages that a session sent since it was traced.

    A client waits for the server's answer after each Query and each Sync, so as many of them as
    there are, as many round trips were made.
    """

    def __init__(self, file: Any) -> None:
        self._file = file
        self._skip = 0

    def sent(self) -> list[str]:
        """Return the names of the messages sent since the last `clear()`."""
        self._file.seek(0)
        lines = self._file.read().splitlines()
        fields = [line.split("\t") for line in lines[self._skip :]]
        return [field[2] for field in fields if field[0] == "F"]

    def round_trips(self) -> int:
        """Return for how many answers the client waited since the last `clear()`."""
        return sum(name in ("Query", "Sync") for name in self.sent())

    def clear(self) -> None:
        """Count from here on."""
        self._file.seek(0)
        self._skip = len(self._file.read().splitlines())


@contextmanager
def wire_of(db: PoolManager[Any]) -> Iterator[Wire]:
    """Trace the session of *db*, which has one and has it idle."""
    (idle,) = life(db.pool).idle
    with wire_of_session(idle.pgconn) as wire:
        yield wire


@contextmanager
def wire_of_session(pgconn: Any) -> Iterator[Wire]:
    """Trace one session."""
    # libpq writes to the descriptor, beside Python's own buffers.
    with tempfile.NamedTemporaryFile("r") as file, Path(file.name).open("w") as target:
        pgconn.trace(target.fileno())
        pgconn.set_trace_flags(pq.Trace.SUPPRESS_TIMESTAMPS | pq.Trace.REGRESS_MODE)
        try:
            yield Wire(file)
        finally:
            if pgconn.status == pq.ConnStatus.OK:
                pgconn.untrace()
