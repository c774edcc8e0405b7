"""
Metrics of a pool, by prometheus-client: ``pip install "poolkeeper[prometheus]"``.

They are called as OpenTelemetry's exporter for Prometheus would call those of
`poolkeeper.telemetry.opentelemetry`: ``db_client_connection_wait_time_seconds``, and so on. In
multiprocess mode (``PROMETHEUS_MULTIPROC_DIR``) too, where a collector of one's own is never
asked: so the numbers of the moment are written when something happens, at most four times a
second, and once more when it is over.
"""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import Callable
from contextlib import suppress
from contextvars import Context
from functools import partial
from typing import Any, TypeAlias

from poolkeeper import BoundPool, ConfigError
from poolkeeper.events import Closed, Event, LoopMismatch, Opened

from . import _metrics
from ._metrics import AnyPool, Attributes, Metric, Record, Recorder

try:
    from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, Histogram
except ModuleNotFoundError as _ex:
    if _ex.name != "prometheus_client":
        raise
    raise _metrics.missing("prometheus-client", "prometheus") from _ex

__all__ = ["instrument", "uninstrument"]

AnyMetric: TypeAlias = "Counter | Gauge | Histogram"

EVERY = 0.25
"""Seconds between two looks at the numbers of a pool at which something happens."""

_instrumented = _metrics.Instrumented()


def instrument(pool: AnyPool, *, registry: CollectorRegistry = REGISTRY, sites: int = 50) -> None:
    """
    Record what *pool* does, from now on and in all lives of it.

    May be called before the pool is open, at import time too, and before a fork. Several pools
    share a registry, told apart by their names. Called again for the same pool, or for its
    manager, it takes the place of the call before, so nothing is counted twice.

    Args:
        pool: A manager, or a pool.
        registry: Where the metrics are; that of prometheus-client by default.
        sites: How many places that ask for a connection are told apart, by function, file, method
            and route; the first so many in each process, and "other" for all that come after. 0
            for none.

    Raises:
        ConfigError: If *pool* is none, *sites* no number, or somebody else has metrics of these
            names in *registry*.

    .. versionadded:: 0.1.0
    """
    bound = _metrics.bound_pool(pool)
    _metrics.require_sites(sites)
    uninstrument(bound)
    bind = _metrics_in(registry).bind
    gauges = _Gauges(bound, bind)
    record = bound.subscribe(Recorder(bound.name, sites, bind))
    look = bound.subscribe(gauges)
    _instrumented.begin(bound, partial(_end, record, look, gauges))


def uninstrument(pool: AnyPool) -> None:
    """
    Record nothing more of *pool*: its numbers of the moment are 0. Harmless if nothing is recorded.

    .. versionadded:: 0.1.0
    """
    _instrumented.end(_metrics.bound_pool(pool))


def _end(record: Callable[[], None], look: Callable[[], None], gauges: _Gauges) -> None:
    record()
    look()
    gauges.clear()


class _Metrics:
    """The metrics in one registry, for all pools."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._all: dict[str, AnyMetric] = {}
        try:
            for metric in _metrics.METRICS:
                self._all[metric.name] = _made(metric, registry)
        except ValueError as ex:
            for made in self._all.values():
                registry.unregister(made)
            raise ConfigError(
                "cannot put the metrics of pools into this registry: somebody else has some of"
                " these names in it",
                parameter="registry",
                detail=f"prometheus-client: {ex}",
                hint="OpenTelemetry's exporter for Prometheus, say: use one or the other.",
            ) from ex

    def bind(self, metric: Metric, attributes: Attributes) -> Record:
        """Return what records numbers of *metric* with these *attributes*."""
        values = [attributes[name] for name in (_metrics.NAME, *metric.attributes)]
        child: Any = self._all[metric.name].labels(*values)
        record: Record = getattr(child, _RECORDS[metric.kind])
        return record


_known: weakref.WeakKeyDictionary[CollectorRegistry, _Metrics] = weakref.WeakKeyDictionary()


def _metrics_in(registry: CollectorRegistry) -> _Metrics:
    """Return those of *registry*, put there now if they are not."""
    known = _known.get(registry)
    if known is None:
        known = _known[registry] = _Metrics(registry)
    return known


_RECORDS = {"now": "set", "counter": "inc", "histogram": "observe"}


def _made(metric: Metric, registry: CollectorRegistry) -> AnyMetric:
    name = prometheus_name(metric.name)
    labels = [prometheus_name(label) for label in (_metrics.NAME, *metric.attributes)]
    if metric.kind == "counter":
        return Counter(name, metric.description, labels, registry=registry)
    if metric.kind == "histogram":
        return Histogram(
            name,
            metric.description,
            labels,
            unit="seconds",
            buckets=_metrics.BOUNDARIES,
            registry=registry,
        )
    # Of the processes that are alive, together.
    return Gauge(name, metric.description, labels, registry=registry, multiprocess_mode="livesum")


def prometheus_name(name: str) -> str:
    """Return what OpenTelemetry's *name* is in Prometheus."""
    return name.replace(".", "_")


class _Gauges:
    """
    Writes the numbers of a pool down when something happens, but not more often than `EVERY`.

    All that changes them is an event, and each of them is followed by a look: so they are right a
    quarter of a second after the last event, at the latest.
    """

    def __init__(self, pool: BoundPool[Any], bind: _metrics.Bind) -> None:
        self._pool = weakref.ref(pool)
        self._bind = bind
        self._records: dict[tuple[str, ...], Record] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._again = False
        """True if something has happened since the last look."""
        self._look()

    def __call__(self, event: Event) -> None:
        """Look at the numbers, now or soon."""
        if isinstance(event, Opened | Closed):
            self._forget()  # it may be of a loop that is gone, or of a parent process
        elif isinstance(event, LoopMismatch):
            return  # changes nothing, and is told elsewhere
        if self._timer is not None:
            self._again = True
            return
        self._look()
        with suppress(RuntimeError):  # no loop runs here: a pool is let go of, and `Closed` comes
            if not isinstance(event, Closed):
                loop = asyncio.get_running_loop()
                self._timer = loop.call_later(EVERY, self._is_due, context=Context())

    def _is_due(self) -> None:
        self._timer = None
        if self._again:
            self._again = False
            self._look()

    def _look(self) -> None:
        pool = self._pool()
        if pool is None:
            return
        for metric, attributes, number in _metrics.numbers(pool):
            key = metric.name, *attributes.values()
            record = self._records.get(key)
            if record is None:
                record = self._bind(metric, {_metrics.NAME: pool.name, **attributes})
                self._records[key] = record
            record(number)

    def _forget(self) -> None:
        timer, self._timer, self._again = self._timer, None, False
        if timer is not None:
            timer.cancel()

    def clear(self) -> None:
        """Have no numbers any more."""
        self._forget()
        for record in self._records.values():
            record(0)
