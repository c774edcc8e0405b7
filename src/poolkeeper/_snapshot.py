"""
Frozen facts about a pool at one moment: what `snapshot()` and `check()` return.

Strings and numbers only; `_diagnosis` reads them.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class CheckoutRow:
    """One connection in use. Instantaneous, but for the times, which count from its acquire."""

    task: str
    """Name of the task that acquired it."""

    site: str
    """``file:line`` that acquired it."""

    held_seconds: float
    """Seconds since it was acquired."""

    query_seconds: float
    """How many of them were spent waiting for the server."""

    status: str
    """What it does now: "running a query", "idle in transaction" or "idle"."""

    status_seconds: float
    """Seconds since it last began or ended a query."""

    backend_pid: int
    """Process number of its session on the server."""

    held_by_task: int = 1
    """How many connections its task holds, this one included."""

    task_done: bool = False
    """True if the task has ended without giving it back, and no block of its own will."""

    task_waits: bool = False
    """True if the task waits for one more connection, or has just given up."""

    in_block: bool = True
    """True if a block of its task's gives it back; what ``getconn()`` took, anybody may."""

    suspected_leak: bool = False
    """True if it is held for longer than ``leak_threshold``."""

    stack: str = ""
    """Stack of the acquire; kept only where ``leak_threshold`` is set."""

    asker: str = ""
    """
    Who acquired it, as people think of it, as far as that is known:
    ``GET /orders/{id}, web.py:9 in order``.
    """

    awaits: str = ""
    """``file:line in function`` of yours that its task stands at now; empty while it runs."""

    behind: tuple[WaiterRow, ...] = ()
    """
    Whose one-shots were sent on it behind the one that the server is at, which is this task's;
    first to be answered first.
    """

    @property
    def used_share(self) -> float:
        """Share of the held time that was spent waiting for the server, 0 to 1."""
        return min(1.0, self.query_seconds / self.held_seconds) if self.held_seconds > 0 else 1.0


@dataclass(frozen=True, slots=True)
class WaiterRow:
    """One task waiting for a connection. Instantaneous."""

    task: str
    site: str
    waited_seconds: float
    holds: int
    """How many connections the task holds already."""

    asker: str = ""
    """Who waits, as in `CheckoutRow`."""


@dataclass(frozen=True, slots=True)
class StepRow:
    """What is done with one connection that is neither idle nor in use. Instantaneous."""

    number: str
    """Which number counts it: ``making``, ``returning`` or ``checking``."""

    doing: str
    """What is done: "in the reset callback", "in a rollback", "waiting for the server"."""

    site: str
    """``file:line`` of the function that is called, where it is yours; empty otherwise."""

    seconds: float
    """For how long."""


@dataclass(frozen=True, slots=True)
class LoadRow:
    """What was asked of the pool lately. Over the last *window_seconds*."""

    window_seconds: float
    acquires: int
    """Connections acquired."""

    released: int
    """Connections given back."""

    held_seconds: float
    """Sum of the time that those given back were held."""

    query_seconds: float
    """Sum of the time that those given back spent waiting for the server."""

    gave_up: int = 0
    """Tasks that have waited in vain."""

    @property
    def arrivals_per_second(self) -> float:
        """Acquires per second."""
        return self.acquires / self.window_seconds if self.window_seconds > 0 else 0.0

    @property
    def mean_held_seconds(self) -> float:
        """Mean time that a connection was held."""
        return self.held_seconds / self.released if self.released else 0.0

    @property
    def used_share(self) -> float:
        """Share of the held time that was spent waiting for the server, 0 to 1."""
        return min(1.0, self.query_seconds / self.held_seconds) if self.held_seconds > 0 else 1.0


@dataclass(frozen=True, slots=True)
class PoolSnapshot:
    """
    A pool at one moment.

    Each connection of the pool is in exactly one of *in_use*, *idle*, *returning* and *checking*,
    whose sum is *total*; those that *making* counts are not there yet. `opened` and the rows hold
    places and names, never a connection string, a query or a parameter.

    .. versionadded:: 0.1.0
    """

    name: str
    state: str
    total: int
    in_use: int
    idle: int
    max: int
    waiting: int
    """These five, like the next four, are instantaneous."""

    min: int = 0
    making: int = 0
    """Attempts to make a connection that are under way, ``configure`` included."""

    returning: int = 0
    """Connections that are being given back: rolled back, put in order, in ``reset``."""

    checking: int = 0
    """Connections that are looked at before somebody gets them, or on their way to who does."""

    opened: str = ""
    checkouts: tuple[CheckoutRow, ...] = ()
    """Longest held first."""

    waiters: tuple[WaiterRow, ...] = ()
    """First in line first; at most a hundred of them."""

    steps: tuple[StepRow, ...] = ()
    """What is done with those that are being made, given back and checked; longest first."""

    connecting: int = 0
    """Connection attempts that have no answer yet."""

    attempts_failed: int = 0
    """Connection attempts that failed since the last that succeeded."""

    last_error: str | None = None
    """Why the last of them failed; None if none has failed since the last success."""

    checks_refused: int = 0
    """Connections that the `check` callback refused since it accepted one last."""

    check_site: str = ""
    """``file:line`` of the callback."""

    check_error: str = ""
    """Why it refused the last of them."""

    check_error_seconds: float = 0.0
    """Seconds since that."""

    check_failing_seconds: float = 0.0
    """Seconds since it refused the first of them."""

    last_error_advice: str = ""
    last_error_seconds: float = 0.0
    """Seconds since it failed."""

    failing_seconds: float = 0.0
    """Seconds since the first of them failed."""

    next_attempt_seconds: float | None = None
    """Seconds until the next attempt; None if none is due."""

    waited_seconds: float = 0.0
    """
    How long the task has waited whose time-out this is about; of a snapshot that was asked for,
    how long the first in line waits.
    """

    stalled_seconds: float = 0.0
    """For how much of that time something blocked the owner loop."""

    stalled_by: str = ""
    """What ran meanwhile, where asyncio's debug mode knows."""

    load: LoadRow = field(default_factory=lambda: LoadRow(0.0, 0, 0, 0.0, 0.0))
    """While that task waited; of a snapshot that was asked for, lately."""

    def numbers(self) -> str:
        """Return the five numbers, in their order; then those of the other three that are not 0."""
        others = {"making": self.making, "returning": self.returning, "checking": self.checking}
        return (
            f"total={self.total} in_use={self.in_use} idle={self.idle} max={self.max}"
            f" waiting={self.waiting}"
            + "".join(f" {name}={number}" for name, number in others.items() if number)
        )


@dataclass(frozen=True, slots=True)
class Health:
    """
    Whether a query could run at one moment. True as a condition if it could.

    .. versionadded:: 0.1.0
    """

    ok: bool
    """True if the server answered."""

    reason: str
    """Why, in one line: the server's own words where it gave a reason."""

    seconds: float
    """How long it took to find out."""

    beside: bool
    """True if it was asked beside the pool, which had no connection free."""

    snapshot: PoolSnapshot
    """The pool when that was known."""

    kind: str = ""
    """Why, for strangers: what kind of reason it is, without host, port, user or database."""

    def __bool__(self) -> bool:
        return self.ok


@dataclass(frozen=True, slots=True)
class ServerFacts:
    """
    What `open()` has found out of the server, and of a pooler in front of it.

    .. versionadded:: 0.1.0
    """

    pooled: bool
    """True if a pooler, such as PgBouncer, stands between."""

    shares_sessions: bool
    """
    True if that was seen to give one session to several clients in turn: nothing of a session (a
    setting, ``LISTEN``, an advisory lock) is there in the next transaction for sure. False, behind
    a pooler, says nothing.
    """

    tracks_prepared: bool
    """True if the pooler keeps track of prepared statements, so that they work."""

    max_connections: int | None
    """The server's; None if it does not tell."""

    reserved: int | None
    """How many of these are kept for others; None if that is not known."""

    allowed: int | None
    """
    How many connections the server allows to whoever has logged in, if nobody else has any: the
    least of what is not reserved, the limit of the role, that of the database. None if that is
    not known; behind a pooler it holds for all of its clients together.
    """
