"""
Metrics and spans of a pool, by OpenTelemetry's API: ``pip install "poolkeeper[opentelemetry]"``.

The metrics are those of the semantic conventions for database connection pools, and some of our
own, among them who waits and who holds, by function and route. Whatever SDK and exporter the
program has configured gets them; without one nothing is recorded.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from poolkeeper import BoundPool, __version__
from poolkeeper.events import Acquired, Caller, Event, GaveUp, TimedOut

from . import _metrics
from ._metrics import AnyPool, Attributes, Metric, Record, Recorder

try:
    from opentelemetry import metrics, trace
    from opentelemetry.metrics import CallbackOptions, MeterProvider, Observation
    from opentelemetry.trace import SpanKind, Status, StatusCode, TracerProvider
except ModuleNotFoundError as _ex:
    if _ex.name not in ("opentelemetry", "opentelemetry.metrics", "opentelemetry.trace"):
        raise
    raise _metrics.missing("opentelemetry-api", "opentelemetry") from _ex

__all__ = ["instrument", "uninstrument"]

_instrumented = _metrics.Instrumented()


def instrument(
    pool: AnyPool,
    *,
    meter_provider: MeterProvider | None = None,
    tracer_provider: TracerProvider | None = None,
    sites: int = 50,
    span_after: float | None = 0.001,
) -> None:
    """
    Record what *pool* does, from now on and in all lives of it.

    May be called before the pool is open, at import time too, and before the providers are
    configured. Called again for the same pool, or for its manager, it takes the place of the call
    before, so nothing is counted twice.

    A wait is a span of its own, "acquire connection", if it belongs to a span that is recorded
    (the request's, say) and was long enough: it is a child of that, and has the pool, the function
    and the route as attributes. A time-out is one whose status is an error and whose
    ``error.type`` is the cause that the diagnosis names.

    Args:
        pool: A manager, or a pool.
        meter_provider: Where metrics go; the global one if None.
        tracer_provider: Where spans go; the global one if None.
        sites: How many places that ask for a connection are told apart, by function, file, method
            and route; the first so many, and "other" for all that come after. 0 for none.
        span_after: Seconds from which a wait is a span; None for no spans.

    Raises:
        ConfigError: If *pool* is none, or *sites* no number.

    .. versionadded:: 0.1.0
    """
    bound = _metrics.bound_pool(pool)
    _metrics.require_sites(sites)
    uninstrument(bound)
    meters = _meters_of(meter_provider or metrics.get_meter_provider())
    ends = [bound.subscribe(Recorder(bound.name, sites, meters.bind)), meters.watch(bound)]
    if span_after is not None:
        spans = _Spans(tracer_provider, span_after)
        ends.append(bound.subscribe(spans, Acquired, TimedOut, GaveUp))
    _instrumented.begin(bound, partial(_all, ends))


def uninstrument(pool: AnyPool) -> None:
    """
    Record nothing more of *pool*. Harmless if nothing is recorded.

    .. versionadded:: 0.1.0
    """
    _instrumented.end(_metrics.bound_pool(pool))


def _all(ends: Iterable[Callable[[], None]]) -> None:
    for end in ends:
        end()


class _Meters:
    """The instruments of one provider, and the pools whose numbers they observe."""

    def __init__(self, provider: MeterProvider) -> None:
        meter = provider.get_meter("poolkeeper", __version__)
        self._pools: dict[int, weakref.ref[BoundPool[Any]]] = {}
        self._records: dict[str, Callable[..., None]] = {}
        for metric in _metrics.METRICS:
            told = {"unit": metric.unit, "description": metric.description}
            if metric.kind == "now":
                meter.create_observable_up_down_counter(
                    metric.name, [partial(self._observe, metric)], **told
                )
            elif metric.kind == "counter":
                self._records[metric.name] = meter.create_counter(metric.name, **told).add
            else:
                self._records[metric.name] = meter.create_histogram(
                    metric.name,
                    **told,
                    explicit_bucket_boundaries_advisory=_metrics.BOUNDARIES,
                ).record

    def bind(self, metric: Metric, attributes: Attributes) -> Record:
        """Return what records numbers of *metric* with these *attributes*."""
        known = {name: value for name, value in attributes.items() if value}
        return partial(self._records[metric.name], attributes=known)

    def watch(self, pool: BoundPool[Any]) -> Callable[[], None]:
        """Observe the numbers of *pool*; return what ends that."""
        number = id(pool)

        def forget(*_: object) -> None:
            self._pools.pop(number, None)

        self._pools[number] = weakref.ref(pool, forget)
        return forget

    def _observe(self, metric: Metric, _: CallbackOptions) -> Iterable[Observation]:
        # In the thread of whoever reads.
        for reference in tuple(self._pools.values()):
            if (pool := reference()) is None:
                continue
            for measured, attributes, number in _metrics.numbers(pool):
                if measured is metric:
                    yield Observation(number, {_metrics.NAME: pool.name, **attributes})


_meters: weakref.WeakKeyDictionary[MeterProvider, _Meters] = weakref.WeakKeyDictionary()


def _meters_of(provider: MeterProvider) -> _Meters:
    found = _meters.get(provider)
    if found is None:
        found = _meters[provider] = _Meters(provider)
    return found


class _Spans:
    """Makes a span of each wait that is worth one: a subscriber."""

    def __init__(self, provider: TracerProvider | None, after: float) -> None:
        self._tracer = trace.get_tracer("poolkeeper", __version__, provider)
        self._after = after

    def __call__(self, event: Event) -> None:
        """Make a span of the wait that is over, in the task that has waited."""
        assert isinstance(event, Acquired | TimedOut | GaveUp)
        waited = event.waited_seconds
        if waited < self._after and not isinstance(event, TimedOut):
            return
        if not trace.get_current_span().is_recording():
            return
        now = time.time_ns()
        span = self._tracer.start_span(
            "acquire connection",
            kind=SpanKind.INTERNAL,
            attributes=_attributes(event.pool, event.caller),
            start_time=now - int(waited * 1e9),
        )
        if isinstance(event, TimedOut):
            span.set_attribute(_metrics.ERROR, event.cause)
            span.set_status(Status(StatusCode.ERROR, event.summary))
        elif isinstance(event, GaveUp):
            span.set_attribute(_metrics.WHY, event.why)
        span.end(now)


def _attributes(pool: str, caller: Caller) -> dict[str, str]:
    site = (caller.function, caller.file, caller.method, caller.route)
    of_site = {name: value for name, value in zip(_metrics.SITE, site, strict=True) if value}
    return {"db.system.name": "postgresql", _metrics.NAME: pool, **of_site}
