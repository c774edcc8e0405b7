"""
Whether the server has as many connections as the processes of a program may ask for; a leaf.
"""

from __future__ import annotations

from typing import NamedTuple

from ._processes import Processes
from .errors import see


class Limits(NamedTuple):
    """What a server allows to whoever has logged in."""

    most: int
    """``max_connections``."""
    reserved: int
    """How many of these are kept for others."""
    role: int
    """Limit of the role; -1 for none."""
    database: int
    """Limit of the database; -1 for none."""

    @property
    def allowed(self) -> int:
        """How many connections can be had, if nobody else has any."""
        limits = (self.most - self.reserved, self.role, self.database)
        return min(limit for limit in limits if limit >= 0)

    def in_words(self) -> str:
        """Return all that limits them, as sentences."""
        kept = f", {self.reserved} of them reserved" if self.reserved else ""
        said = [f"The server has max_connections={self.most}{kept}."]
        if self.role >= 0:
            said.append(f"The role has a CONNECTION LIMIT of {self.role}.")
        if self.database >= 0:
            said.append(f"The database has a CONNECTION LIMIT of {self.database}.")
        return " ".join(said)


class Excess(NamedTuple):
    """More may be asked for than there is; in words."""

    message: str
    detail: str
    hint: str

    def __str__(self) -> str:
        return f"{self.message}\nDETAIL:  {self.detail}\nHINT:  {self.hint}"


def excess(pool: str, max_size: int, processes: Processes, limits: Limits) -> Excess | None:
    """Return what may be asked for too much; None if there is enough."""
    number, said_by = processes
    wanted, allowed = max_size * number, limits.allowed
    if wanted <= allowed:
        return None
    by = f" ({said_by})" if said_by else ""
    of_each = f"max_size={max_size} in {_processes(number)}{by}"
    fits = allowed // number
    smaller = f"Set max_size to {fits} or less" if fits else "Run fewer processes"
    count = "" if said_by else " Where there are several processes, say so: expected_processes=."
    return Excess(
        f'pool "{pool}" may grow to {wanted} connections, and the server has {allowed} for it',
        f"{of_each} makes {wanted}. {limits.in_words()}",
        f"{smaller}, raise the limit, or put a pooler between.{count} {see('connection-budget')}",
    )


def _processes(number: int) -> str:
    return "one process" if number == 1 else f"each of {number} processes"
