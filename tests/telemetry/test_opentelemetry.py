"""What OpenTelemetry gets: names, kinds and units of the conventions; spans; each thing once."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import psycopg_pool
import pytest
from opentelemetry import trace
from opentelemetry.exporter.prometheus import PrometheusMetricReader
from opentelemetry.instrumentation.psycopg import PsycopgInstrumentor
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from prometheus_client import REGISTRY, CollectorRegistry

from poolkeeper import BoundNullPool, BoundPool, ConfigError, PoolManager
from poolkeeper.adapters._shared import RequestConnection
from poolkeeper.telemetry import _metrics, prometheus
from poolkeeper.telemetry.opentelemetry import instrument, uninstrument
from tests.support.waiting import until

from .conftest import MakeManager, report, work

HERE = "tests/telemetry/conftest.py"


class Metrics:
    """A provider whose metrics are read in memory."""

    def __init__(self) -> None:
        self.reader = InMemoryMetricReader()
        self.provider = MeterProvider([self.reader])

    def read(self) -> dict[str, Any]:
        data = self.reader.get_metrics_data()
        if data is None:
            return {}
        metrics = [m for r in data.resource_metrics for s in r.scope_metrics for m in s.metrics]
        assert len({metric.name for metric in metrics}) == len(metrics)
        return {metric.name: metric for metric in metrics}

    def points(self, name: str, **attributes: str) -> list[Any]:
        metric = self.read().get(name)
        wanted = {key.replace("_", "."): value for key, value in attributes.items()}.items()
        found = metric.data.data_points if metric else []
        return [point for point in found if wanted <= point.attributes.items()]

    def value(self, name: str, **attributes: str) -> Any:
        (point,) = self.points(name, **attributes)
        return point.value if hasattr(point, "value") else point.count


@pytest.fixture
def metrics() -> Iterator[Metrics]:
    made = Metrics()
    yield made
    made.provider.shutdown()


class Spans:
    def __init__(self) -> None:
        self.exporter = InMemorySpanExporter()
        self.provider = TracerProvider()
        self.provider.add_span_processor(SimpleSpanProcessor(self.exporter))
        self.tracer = self.provider.get_tracer("test")

    @property
    def waits(self) -> list[ReadableSpan]:
        spans = self.exporter.get_finished_spans()
        return [span for span in spans if span.name == "acquire connection"]


CONVENTIONS = {
    "db.client.connection.count": ("Sum", "{connection}", False),
    "db.client.connection.max": ("Sum", "{connection}", False),
    "db.client.connection.idle.max": ("Sum", "{connection}", False),
    "db.client.connection.idle.min": ("Sum", "{connection}", False),
    "db.client.connection.pending_requests": ("Sum", "{request}", False),
    "db.client.connection.timeouts": ("Sum", "{timeout}", True),
    "db.client.connection.create_time": ("Histogram", "s", None),
    "db.client.connection.wait_time": ("Histogram", "s", None),
    "db.client.connection.use_time": ("Histogram", "s", None),
}
"""Kind, unit, and whether it only grows; by the conventions of 2026 (document version 1.41)."""


async def test_the_metrics_are_those_of_the_conventions(
    make_manager: MakeManager, metrics: Metrics
) -> None:
    db = make_manager(min_size=1, name="orders")
    instrument(db, meter_provider=metrics.provider)
    await db.open()
    await work(db)
    read = metrics.read()
    for name, (kind, unit, grows) in CONVENTIONS.items():
        metric = read[name]
        assert (type(metric.data).__name__, metric.unit) == (kind, unit), name
        assert getattr(metric.data, "is_monotonic", None) is grows, name
        for point in metric.data.data_points:
            assert point.attributes["db.client.connection.pool.name"] == "orders"
    for name in ("create_time", "wait_time", "use_time"):
        (point,) = metrics.points(f"db.client.connection.{name}")
        assert point.explicit_bounds == (0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1.0, 5.0, 10.0)
    assert metrics.value("db.client.connection.create_time") == 1
    assert metrics.value("db.client.connection.wait_time") == 3
    assert metrics.value("db.client.connection.use_time") == 3
    assert metrics.value("db.client.connection.timeouts", error_type="all-in-use") == 1
    (waits,) = metrics.points("db.client.connection.wait_time")
    assert waits.max >= 0.06


async def test_what_happens_once_in_a_while_is_at_zero_when_the_pool_is_open(
    make_manager: MakeManager,
) -> None:
    """Those who get the numbers may have come after it was instrumented; what they missed."""
    recorded: list[tuple[str, float]] = []
    db = make_manager(min_size=1)
    db.subscribe(
        _metrics.Recorder(db.name, 0, lambda metric, _: lambda n: recorded.append((metric.name, n)))
    )
    recorded.clear()
    await db.open()
    assert sorted(name for name, number in recorded if number == 0) == [
        "poolkeeper.loop_mismatches",
        "poolkeeper.suspected_leaks",
        "poolkeeper.turned_away",
    ]


async def test_the_numbers_are_those_of_the_moment(
    make_manager: MakeManager, metrics: Metrics
) -> None:
    db = make_manager(min_size=2, max_size=3, name="orders")
    instrument(db, meter_provider=metrics.provider)

    def numbers() -> list[int]:
        of = "db.client.connection"
        return [
            metrics.value(f"{of}.count", db_client_connection_state="used"),
            metrics.value(f"{of}.count", db_client_connection_state="idle"),
            *(metrics.value(f"{of}.{name}") for name in ("idle.min", "idle.max", "max")),
            metrics.value(f"{of}.pending_requests"),
        ]

    async with db:
        async with db.connection():
            assert numbers() == [1, 1, 2, 3, 3, 0]
            async with db.connection(), db.connection():
                waiting = asyncio.create_task(report(db))
                await until(lambda: numbers() == [3, 0, 2, 3, 3, 1])
        await waiting
    assert numbers() == [0, 0, 0, 0, 0, 0]
    async with db:  # and in the next life
        await until(lambda: numbers() == [0, 2, 2, 3, 3, 0])


async def test_a_null_pool_without_a_bound_has_none(dsn: str, metrics: Metrics) -> None:
    async with BoundNullPool(dsn, open=False, name="null") as pool:
        instrument(pool, meter_provider=metrics.provider)
        async with pool.connection():
            assert metrics.value("db.client.connection.count", db_client_connection_state="used")
        assert not metrics.points("db.client.connection.max")


async def test_who_holds_and_waits_is_told_by_function_and_route_up_to_a_bound(
    make_manager: MakeManager, metrics: Metrics
) -> None:
    db = make_manager(min_size=1, name="orders")
    instrument(db, meter_provider=metrics.provider, sites=2)
    await db.open()
    for route in ("/orders/{id}", "/customers", "/reports"):
        for _ in range(2):
            async with RequestConnection({}, db, report, ("GET", route)):
                pass
    await work(db)
    points = metrics.points("poolkeeper.site.use_time")
    counts = {p.attributes.get("http.route", p.attributes["code.function.name"]): p for p in points}
    assert {key: point.count for key, point in counts.items()} == {
        "/orders/{id}": 2, "/customers": 2, "other": 5,
    }  # fmt: skip
    assert counts["/customers"].attributes == {
        "db.client.connection.pool.name": "orders",
        "code.function.name": "report",
        "code.file.path": HERE,
        "http.request.method": "GET",
        "http.route": "/customers",
    }
    assert {p.count for p in metrics.points("poolkeeper.site.wait_time")} == {2, 5}


async def test_with_no_sites_none_is_told_apart(
    make_manager: MakeManager, metrics: Metrics
) -> None:
    db = make_manager(min_size=1)
    instrument(db, meter_provider=metrics.provider, sites=0)
    await db.open()
    await work(db)
    assert not metrics.points("poolkeeper.site.use_time")
    assert metrics.points("db.client.connection.use_time")


async def test_each_is_counted_once_however_often_it_is_instrumented(
    make_manager: MakeManager, metrics: Metrics
) -> None:
    db, other = make_manager(min_size=1, name="orders"), make_manager(min_size=1, name="reports")
    for pool in (db, db.pool, db, other):
        instrument(pool, meter_provider=metrics.provider)
    await db.open()
    await other.open()
    for pool in (db, other):
        await report(pool)
    names = [
        p.attributes["db.client.connection.pool.name"]
        for p in metrics.points("db.client.connection.wait_time")
    ]
    assert sorted(names) == ["orders", "reports"]
    assert {p.count for p in metrics.points("db.client.connection.wait_time")} == {1}
    assert len(metrics.points("db.client.connection.max")) == 2
    uninstrument(db)
    uninstrument(db)  # harmless
    await report(db)
    assert {p.count for p in metrics.points("db.client.connection.wait_time")} == {1}
    assert len(metrics.points("db.client.connection.max")) == 1


async def test_a_pool_that_is_dropped_is_observed_no_more(metrics: Metrics) -> None:
    db = PoolManager(name="orders")
    instrument(db, meter_provider=metrics.provider)
    assert metrics.points("db.client.connection.max")
    del db
    gc.collect()
    assert not metrics.points("db.client.connection.max")


async def test_a_wait_is_a_child_of_the_requests_span(make_manager: MakeManager) -> None:
    spans = Spans()
    db = make_manager(min_size=1, name="orders")
    instrument(db, tracer_provider=spans.provider)
    await db.open()

    async def request() -> None:
        with spans.tracer.start_as_current_span("GET /orders"):
            await work(db)

    await work(db)  # of no request
    assert not spans.waits
    await request()
    by_outcome = {span.status.status_code.name: span for span in spans.waits}
    assert len(spans.waits) == 2
    waited, failed = by_outcome["UNSET"], by_outcome["ERROR"]
    (parent,) = [s for s in spans.exporter.get_finished_spans() if s.name == "GET /orders"]
    for span in (waited, failed):
        assert span.parent is not None
        assert parent.context is not None
        assert span.parent.span_id == parent.context.span_id
        assert span.attributes is not None
        assert span.attributes["db.client.connection.pool.name"] == "orders"
        assert span.attributes["db.system.name"] == "postgresql"
        assert span.attributes["code.function.name"] == "report"
        assert span.attributes["code.file.path"] == HERE
        assert span.start_time is not None
        assert span.end_time is not None
        assert parent.start_time is not None
        assert parent.start_time <= span.start_time <= span.end_time
    assert (waited.end_time or 0) - (waited.start_time or 0) >= 0.06e9
    assert (failed.attributes or {})["error.type"] == "all-in-use"
    assert failed.status.description == "all connections are in use"


async def test_who_leaves_while_it_waits_leaves_a_span(make_manager: MakeManager) -> None:
    spans = Spans()
    db = make_manager(min_size=1)
    instrument(db, tracer_provider=spans.provider)
    await db.open()
    async with db.connection():
        with spans.tracer.start_as_current_span("GET /orders"):
            waiting = asyncio.create_task(report(db))
            await until(lambda: db.snapshot().waiting)
            await asyncio.sleep(0.01)
            waiting.cancel()
            await asyncio.wait({waiting})
    (span,) = spans.waits
    assert (span.attributes or {})["poolkeeper.reason"] == "cancelled"


async def test_spans_can_be_left_out(make_manager: MakeManager) -> None:
    spans = Spans()
    db = make_manager(min_size=1)
    instrument(db, tracer_provider=spans.provider, span_after=None)
    await db.open()
    with spans.tracer.start_as_current_span("GET /orders"):
        await work(db)
    assert not spans.waits


async def test_beside_psycopgs_instrumentation_each_thing_is_told_once(
    make_manager: MakeManager, metrics: Metrics
) -> None:
    spans = Spans()
    instrumentor: Any = PsycopgInstrumentor()
    classes = (psycopg.Connection, psycopg.AsyncConnection)
    connects = [(cls, vars(cls)["connect"]) for cls in classes]
    instrumentor.instrument(tracer_provider=spans.provider, meter_provider=metrics.provider)
    try:
        db = make_manager(min_size=1, name="orders")
        instrument(db, tracer_provider=spans.provider, meter_provider=metrics.provider)
        await db.open()
        with spans.tracer.start_as_current_span("GET /orders"):
            await work(db)
        names = [span.name for span in spans.exporter.get_finished_spans()]
        assert names.count("acquire connection") == 2
        queries = [
            span
            for span in spans.exporter.get_finished_spans()
            if span.kind is trace.SpanKind.CLIENT
        ]
        assert len(queries) == 2
        assert metrics.value("db.client.connection.wait_time") == 3
        read = [name for name in metrics.read() if name.startswith("db.client.connection")]
        assert set(read) == set(CONVENTIONS)
    finally:
        instrumentor.uninstrument()
        for cls, connect in connects:  # it leaves one that makes no subclass any more
            cls.connect = connect  # type: ignore[method-assign]


def test_psycopg_has_no_metrics_of_its_own_yet() -> None:
    """When this fails, look whether a pool of ours would be counted twice (psycopg #1265)."""
    for package in (psycopg, psycopg_pool):
        assert package.__file__ is not None
        for path in Path(package.__file__).parent.rglob("*.py"):
            text = path.read_text(encoding="utf-8").lower()
            assert "opentelemetry" not in text, path
            assert "db.client.connection" not in text, path


async def test_both_exporters_tell_prometheus_the_same(make_manager: MakeManager) -> None:
    reader = PrometheusMetricReader()
    provider = MeterProvider([reader])
    mine = CollectorRegistry()
    db = make_manager(min_size=1, name="orders")
    instrument(db, meter_provider=provider)
    prometheus.instrument(db, registry=mine)
    try:
        await db.open()
        await work(db)
        idle = {
            "db_client_connection_pool_name": "orders",
            "db_client_connection_state": "idle",
        }
        await until(lambda: mine.get_sample_value("db_client_connection_count", idle) == 1)
        theirs = {
            sample.name: {
                name: value
                for name, value in sample.labels.items()
                if value and not name.startswith("otel_")
            }
            for family in REGISTRY.collect()
            for sample in family.samples
            if family.name.startswith(("db_client", "poolkeeper"))
        }
        ours = {
            sample.name: {name: value for name, value in sample.labels.items() if value}
            for family in mine.collect()
            for sample in family.samples
            if not sample.name.endswith("_created")
        }
        assert set(ours) == set(theirs)
        assert len(theirs) > 20
        for name, labels in theirs.items():
            assert set(ours[name]) == set(labels), name
    finally:
        provider.shutdown()


@pytest.mark.parametrize("wrong", [-1, 1.5, True, "many"])
def test_sites_are_a_number(wrong: Any) -> None:
    for module in (instrument, prometheus.instrument):
        with pytest.raises(ConfigError, match="sites cannot be") as caught:
            module(PoolManager(), sites=wrong)
        assert caught.value.parameter == "sites"


def test_only_a_pool_of_ours_can_be_instrumented(dsn: str) -> None:
    theirs: Any = psycopg_pool.AsyncConnectionPool(dsn, open=False)
    for function in (instrument, prometheus.instrument):
        with pytest.raises(ConfigError, match="cannot instrument a AsyncConnectionPool"):
            function(theirs)
    assert isinstance(PoolManager().pool, BoundPool)


def test_each_metric_is_named_as_its_kind_wants() -> None:
    for metric in _metrics.METRICS:
        assert metric.name.startswith(("db.client.connection.", "poolkeeper."))
        assert (metric.unit == "s") == (metric.kind == "histogram")
