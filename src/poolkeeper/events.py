"""
What happens to a pool, as frozen records: what `PoolManager.subscribe()` tells its subscribers.

Strings and numbers only, none of them a secret: no connection string, query or parameter. Loaded
when somebody subscribes, not by ``import poolkeeper``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

__all__ = [
    "Acquired",
    "Caller",
    "Closed",
    "ConnectFailed",
    "Connected",
    "Discarded",
    "Event",
    "GaveUp",
    "LeakReturned",
    "LeakSuspected",
    "LoopMismatch",
    "Opened",
    "OutageBegan",
    "OutageEnded",
    "Queued",
    "Released",
    "Stalled",
    "TimedOut",
    "TurnedAway",
]


@dataclass(frozen=True, slots=True)
class Caller:
    """
    Who acquires: the line of the program, and what it works for where an adapter knows that.

    ``str()`` is that in words: ``GET /orders/{id}, web.py:9 in order``.
    """

    site: str
    """``file:line``; the file relative to the working directory where it is below that."""

    function: str
    """Name of the function, with that of its class; empty outside of any."""

    method: str = ""
    """Method of the HTTP request, or ``WEBSOCKET``; empty where no adapter knows."""

    route: str = ""
    """Template of its path, ``/orders/{id}``; never the path itself."""

    asker: str = ""
    """All of these in words, as in `CheckoutRow`."""

    @property
    def file(self) -> str:
        """The file of the line."""
        return self.site.rpartition(":")[0]

    def __str__(self) -> str:
        return self.asker or self.site


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """Something that has happened to a pool; the base of all the others."""

    event_name: ClassVar[str] = ""
    """What it is called; does not change. The log has ``poolkeeper.`` before such a name."""

    pool: str
    """Name of the pool."""


# --- the life of a pool --------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Opened(Event):
    """The pool is open: its `min_size` connections are there."""

    event_name: ClassVar[str] = "opened"

    opened: str
    """Where it was opened, in words: line, task, loop, thread."""

    seconds: float
    """How long that took."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Closed(Event):
    """A pool that was open is closed, and has no connection left."""

    event_name: ClassVar[str] = "closed"

    open_seconds: float
    """How long it was open."""

    late: int
    """How many connections were taken from who still held them."""

    loop_closed: bool = False
    """True if nobody has closed it before its event loop was; noticed at the next `open()`."""


# --- who asks for a connection -------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Queued(Event):
    """A task waits in line. `Acquired`, `TimedOut` or `GaveUp` comes next of it."""

    event_name: ClassVar[str] = "queued"

    task: str
    """Name of the task."""

    caller: Caller

    waiting: int
    """How many wait by now, this one included."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Acquired(Event):
    """A task has a connection, by itself or not. `Released` comes next of it."""

    event_name: ClassVar[str] = "acquired"

    task: str
    """Name of the task."""

    caller: Caller

    waited_seconds: float
    """How long it waited: in line, and for a look at the connection; 0.0 if it had no need to."""

    queued: bool
    """True if it had to wait in line."""

    shared: bool = False
    """True if it is a one-shot, and others are at work on the same connection."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Released(Event):
    """A task has it no more, or it was taken back; of one whose `Acquired` was told."""

    event_name: ClassVar[str] = "released"

    task: str
    """Name of the task that acquired it."""

    caller: Caller
    """Who acquired it."""

    held_seconds: float
    """How long it was held."""

    query_seconds: float
    """
    How many of them were spent waiting for the server; if it was shared, for its answer to this
    task, and not to those before.
    """

    exchanges: int
    """How often the server was asked something: a COMMIT counts, and a BEGIN goes along."""

    shared: bool = False
    """True if others were at work on the same connection: a one-shot, one behind the other."""

    @property
    def used_seconds(self) -> float:
        """
        How much of a connection's time that took: `held_seconds`; if it was shared, the
        `query_seconds`. The sum over all is the number of connections in use, over time.
        """
        return self.query_seconds if self.shared else self.held_seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class TimedOut(Event):
    """A task has got `AcquireTimeout`; each of them is told, where the log tells the first."""

    event_name: ClassVar[str] = "acquire_timeout"

    task: str
    """Name of the task."""

    caller: Caller

    waited_seconds: float
    """How long it waited."""

    timeout_seconds: float
    """How long it was to wait."""

    cause: str
    """Why: one of the causes of a `Diagnosis`, such as ``held-but-hardly-used``."""

    summary: str
    """That in half a sentence."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TurnedAway(Event):
    """A task has got `TooManyWaitersError`: `max_waiting` tasks wait already."""

    event_name: ClassVar[str] = "turned_away"

    task: str
    """Name of the task."""

    caller: Caller

    waiting: int
    """How many wait."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GaveUp(Event):
    """A task waits no more, and has nothing: it was cancelled, or the pool is closed."""

    event_name: ClassVar[str] = "gave_up"

    task: str
    """Name of the task."""

    caller: Caller

    waited_seconds: float
    """How long it waited."""

    why: str
    """``cancelled``, or ``closed``."""


# --- the connections -----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Connected(Event):
    """A connection was made."""

    event_name: ClassVar[str] = "connected"

    seconds: float
    """How long it took, `configure` included."""

    backend_pid: int
    """Process number of its session on the server."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ConnectFailed(Event):
    """An attempt to make a connection has failed, or has had no answer for long."""

    event_name: ClassVar[str] = "connect_failed"

    seconds: float
    """How long it took by then."""

    reason: str
    """Why, in the server's words where it gave a reason, without secrets."""

    kind: str
    """The same for strangers, and to count by: without host, port, user or database."""

    permanent: bool
    """True if the next attempt would fail as well."""

    attempts_failed: int
    """How many have failed since one succeeded last, this one included."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Discarded(Event):
    """The pool has ended a connection, or lost it; of one whose `Connected` came before."""

    event_name: ClassVar[str] = "discarded"

    why: str
    """
    ``expired`` (`max_lifetime`), ``unused`` (`max_idle`), ``surplus`` (`resize()`), ``drained``,
    ``closing``, ``not kept`` (a null pool), ``not needed`` (made too late), ``dead`` (while it was
    idle), ``broken`` (or closed, when it came back), ``busy`` (another task was at work on it),
    ``out of order`` (`reset` has failed, or what a borrower left cannot be undone), ``server
    changed``, ``stuck`` (in `check`), ``cancelled`` (its task, from outside).
    """

    backend_pid: int
    """Process number of its session on the server."""

    lived_seconds: float
    """How long ago it was made."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LeakSuspected(Event):
    """A connection is held for longer than `leak_threshold`."""

    event_name: ClassVar[str] = "suspected_leak"

    task: str
    """Name of the task that acquired it."""

    caller: Caller
    """Who acquired it."""

    held_seconds: float
    """For how long by now."""

    stack: str
    """The stack of the acquire, in lines."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LeakReturned(Event):
    """A connection that was suspected to be leaked has come back."""

    event_name: ClassVar[str] = "suspected_leak_returned"

    task: str
    """Name of the task that acquired it."""

    caller: Caller
    """Who acquired it."""

    held_seconds: float
    """How long it was held."""


# --- loop and server -----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class LoopMismatch(Event):
    """
    The pool was used on another event loop than its own, outside of any, or in a forked process.

    Told where that was done: in the thread that gets the `LoopMismatchError`.
    """

    event_name: ClassVar[str] = "loop_mismatch"

    purpose: str
    """What for: ``acquire a connection``."""

    opened: str
    """Where the pool was opened, in words: line, task, loop, thread."""

    used: str
    """Where it was used, in words."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stalled(Event):
    """The owner loop stood still, while somebody waited for a connection."""

    event_name: ClassVar[str] = "stalled"

    seconds: float
    """For how long, about; from 0.1 on."""

    stalled_by: str
    """What ran meanwhile, where asyncio's debug mode knows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OutageBegan(Event):
    """No connection can be made: the first attempt after one that succeeded has failed."""

    event_name: ClassVar[str] = "outage_began"

    reason: str
    """Why, in the server's words where it gave a reason, without secrets."""

    kind: str
    """The same for strangers: without host, port, user or database."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OutageEnded(Event):
    """Connections can be made again."""

    event_name: ClassVar[str] = "outage_over"

    outage_seconds: float
    """For how long they could not."""

    attempts_failed: int
    """How many attempts have failed meanwhile."""


RECORDS: dict[str, type[Event]] = {
    record.event_name: record
    for record in (
        Opened, Closed, Queued, Acquired, Released, TimedOut, TurnedAway, GaveUp, Connected,
        ConnectFailed, Discarded, LeakSuspected, LeakReturned, LoopMismatch, Stalled, OutageBegan,
        OutageEnded,
    )
}  # fmt: skip
"""Each kind by its name."""
