"""
What is measured, whoever exports it: names, units, boundaries, and how events become numbers.

The names are those of OpenTelemetry's semantic conventions for connection pools, and ours beside
them begin with ``poolkeeper.``. Prometheus gets them as OpenTelemetry's own exporter would write
them, so that one dashboard shows either.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, TypeAlias

from poolkeeper import BoundPool, ConfigError, MissingDependencyError, PoolManager
from poolkeeper.events import (
    Acquired,
    Caller,
    Connected,
    ConnectFailed,
    Discarded,
    Event,
    LeakSuspected,
    LoopMismatch,
    Opened,
    Released,
    TimedOut,
    TurnedAway,
)

AnyPool: TypeAlias = PoolManager[Any] | BoundPool[Any]
Attributes: TypeAlias = Mapping[str, str]
Record: TypeAlias = Callable[[float], object]

NAME = "db.client.connection.pool.name"
STATE = "db.client.connection.state"
ERROR = "error.type"
WHY = "poolkeeper.reason"
FUNCTION = "code.function.name"
FILE = "code.file.path"
METHOD = "http.request.method"
ROUTE = "http.route"
SITE = (FUNCTION, FILE, METHOD, ROUTE)

BOUNDARIES = (0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1.0, 5.0, 10.0)
"""
Of all histograms. The conventions give none for the times of a pool: these are those that they
give for ``db.client.operation.duration``.
"""


class Metric(NamedTuple):
    """One of what is measured."""

    name: str
    kind: str
    """``now``, a number of this moment; ``counter``; ``histogram``."""

    unit: str
    description: str
    attributes: tuple[str, ...] = ()
    """Those beside the name of the pool."""


COUNT = Metric(
    "db.client.connection.count",
    "now",
    "{connection}",
    "The number of connections that are currently in state described by the state attribute",
    (STATE,),
)
MAX = Metric(
    "db.client.connection.max",
    "now",
    "{connection}",
    "The maximum number of open connections allowed",
)
IDLE_MAX = Metric(
    "db.client.connection.idle.max",
    "now",
    "{connection}",
    "The maximum number of idle open connections allowed",
)
IDLE_MIN = Metric(
    "db.client.connection.idle.min",
    "now",
    "{connection}",
    "The minimum number of idle open connections allowed",
)
PENDING = Metric(
    "db.client.connection.pending_requests",
    "now",
    "{request}",
    "The number of current pending requests for an open connection",
)
TIMEOUTS = Metric(
    "db.client.connection.timeouts",
    "counter",
    "{timeout}",
    "The number of connection timeouts that have occurred trying to obtain a connection from the"
    " pool",
    (ERROR,),
)
CREATE_TIME = Metric(
    "db.client.connection.create_time",
    "histogram",
    "s",
    "The time it took to create a new connection",
)
WAIT_TIME = Metric(
    "db.client.connection.wait_time",
    "histogram",
    "s",
    "The time it took to obtain an open connection from the pool",
)
USE_TIME = Metric(
    "db.client.connection.use_time",
    "histogram",
    "s",
    "The time between borrowing a connection and returning it to the pool",
)

SITE_WAIT_TIME = Metric(
    "poolkeeper.site.wait_time",
    "histogram",
    "s",
    "The time it took to obtain a connection, by who asked for it",
    SITE,
)
SITE_USE_TIME = Metric(
    "poolkeeper.site.use_time",
    "histogram",
    "s",
    "The time between borrowing a connection and returning it, by who borrowed it",
    SITE,
)
TURNED_AWAY = Metric(
    "poolkeeper.turned_away",
    "counter",
    "{request}",
    "The number of requests for a connection that were refused because max_waiting wait already",
)
CONNECT_FAILURES = Metric(
    "poolkeeper.connect_failures",
    "counter",
    "{attempt}",
    "The number of attempts to make a connection that have failed",
    (ERROR,),
)
DISCARDED = Metric(
    "poolkeeper.discarded",
    "counter",
    "{connection}",
    "The number of connections that the pool has ended or lost",
    (WHY,),
)
SUSPECTED_LEAKS = Metric(
    "poolkeeper.suspected_leaks",
    "counter",
    "{connection}",
    "The number of connections that were held for longer than leak_threshold",
)
LOOP_MISMATCHES = Metric(
    "poolkeeper.loop_mismatches",
    "counter",
    "{use}",
    "The number of uses of the pool where it does not belong",
)

METRICS = (
    COUNT, MAX, IDLE_MAX, IDLE_MIN, PENDING, TIMEOUTS, CREATE_TIME, WAIT_TIME, USE_TIME,
    SITE_WAIT_TIME, SITE_USE_TIME, TURNED_AWAY, CONNECT_FAILURES, DISCARDED, SUSPECTED_LEAKS,
    LOOP_MISMATCHES,
)  # fmt: skip

OTHER = dict.fromkeys(SITE, "") | {FUNCTION: "other"}
"""Stands for all who ask for a connection beside those that are told apart."""

Bind: TypeAlias = Callable[[Metric, Attributes], Record]
"""Gives what records numbers of a metric with these attributes."""


def numbers(pool: BoundPool[Any]) -> Iterator[tuple[Metric, dict[str, str], int]]:
    """Return the numbers of this moment; a pool that is not open has none of anything."""
    snapshot = pool.snapshot()
    is_open = snapshot.state not in ("new", "closed")
    idle = snapshot.idle if is_open else 0
    # What is being given back, or looked at, is nobody's to take.
    yield COUNT, {STATE: "idle"}, idle
    yield COUNT, {STATE: "used"}, snapshot.total - idle if is_open else 0
    yield PENDING, {}, snapshot.waiting if is_open else 0
    yield IDLE_MIN, {}, snapshot.min if is_open else 0
    if most := pool.max_size:  # a null pool may have no bound
        yield MAX, {}, most if is_open else 0
        yield IDLE_MAX, {}, most if is_open and pool.keeps else 0


class Recorder:
    """
    Records what the events of one pool say: a subscriber.

    Args:
        pool: Name of the pool.
        sites: How many places that ask for a connection are told apart; those that come after are
            one, `OTHER`.
        bind: Gives what records.
    """

    def __init__(self, pool: str, sites: int, bind: Bind) -> None:
        self._pool = {NAME: pool}
        self._most_sites = sites
        self._bind = bind
        self._of_site: dict[tuple[str, ...], tuple[Record, Record]] = {}
        self._other: tuple[Record, Record] | None = None
        self._counters: dict[tuple[str, str], Record] = {}
        self._wait, self._use, self._create = (
            bind(metric, self._pool) for metric in (WAIT_TIME, USE_TIME, CREATE_TIME)
        )
        self._begin()

    def __call__(self, event: Event) -> None:
        """Record what *event* says."""
        match event:
            case Acquired():
                self._wait(event.waited_seconds)
                self._site(event.caller)[0](event.waited_seconds)
            case Released():
                self._use(event.used_seconds)
                self._site(event.caller)[1](event.used_seconds)
            case Connected():
                self._create(event.seconds)
            case TimedOut():
                self._count(TIMEOUTS, event.cause)
            case TurnedAway():
                self._count(TURNED_AWAY)
            case ConnectFailed():
                self._count(CONNECT_FAILURES, event.kind)
            case Discarded():
                self._count(DISCARDED, event.why)
            case LeakSuspected():
                self._count(SUSPECTED_LEAKS)
            case LoopMismatch():
                self._count(LOOP_MISMATCHES)
            case Opened():
                self._begin()  # once more: who gets the numbers may be there by now
            case _:
                pass

    def _begin(self) -> None:
        """Have what happens once in a while at 0, or the first of them would be no increase."""
        for metric in (TURNED_AWAY, SUSPECTED_LEAKS, LOOP_MISMATCHES):
            self._count(metric, by=0)

    def _count(self, metric: Metric, value: str = "", by: int = 1) -> None:
        key = metric.name, value
        count = self._counters.get(key)
        if count is None:
            of_value = dict.fromkeys(metric.attributes, value)
            count = self._counters[key] = self._bind(metric, self._pool | of_value)
        count(by)

    def _site(self, caller: Caller) -> tuple[Record, Record]:
        if not self._most_sites:
            return _nothing, _nothing
        key = caller.function, caller.file, caller.method, caller.route
        found = self._of_site.get(key)
        if found is None and len(self._of_site) < self._most_sites:
            found = self._of_site[key] = self._records(dict(zip(SITE, key, strict=True)))
        elif found is None:
            found = self._other = self._other or self._records(OTHER)
        return found

    def _records(self, site: dict[str, str]) -> tuple[Record, Record]:
        attributes = self._pool | site
        return self._bind(SITE_WAIT_TIME, attributes), self._bind(SITE_USE_TIME, attributes)


def _nothing(_: float) -> None:
    pass


class Instrumented:
    """Which pools are being recorded, by one exporter; each of them once."""

    def __init__(self) -> None:
        self._ends: weakref.WeakKeyDictionary[BoundPool[Any], Callable[[], None]] = (
            weakref.WeakKeyDictionary()
        )

    def begin(self, pool: BoundPool[Any], end: Callable[[], None]) -> None:
        """Remember how it *ends* for *pool*."""
        self._ends[pool] = end

    def end(self, pool: BoundPool[Any]) -> None:
        """End it for *pool*; do nothing if there is nothing to end."""
        end = self._ends.pop(pool, None)
        if end is not None:
            end()


def bound_pool(pool: AnyPool) -> BoundPool[Any]:
    """Return the pool itself, which a manager has."""
    found = pool.pool if isinstance(pool, PoolManager) else pool
    if not isinstance(found, BoundPool):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ConfigError(
            f"cannot instrument a {type(pool).__name__}: it is neither a PoolManager nor a"
            " BoundPool",
            parameter="pool",
        )
    return found


def require_sites(sites: object) -> None:
    """Refuse a number of sites that is none."""
    if isinstance(sites, bool) or not isinstance(sites, int) or sites < 0:
        raise ConfigError(
            f"sites cannot be {sites!r}", parameter="sites", detail="It takes a whole number, or 0."
        )


def missing(package: str, extra: str) -> MissingDependencyError:
    """Return the error that says which extra to install."""
    return MissingDependencyError(
        f"cannot import poolkeeper.telemetry.{extra}: {package} is not installed",
        hint=f'Install it with: pip install "poolkeeper[{extra}]"',
    )
