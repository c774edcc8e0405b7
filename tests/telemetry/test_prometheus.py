"""What Prometheus gets: by a scrape, of several pools, and of several processes."""

from __future__ import annotations

import asyncio
import gc
import json
import os
import re
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, Counter, start_http_server
from prometheus_client.parser import text_string_to_metric_families

from poolkeeper import BoundNullPool, ConfigError, PoolManager
from poolkeeper.events import OutageEnded
from poolkeeper.telemetry import prometheus
from poolkeeper.telemetry._metrics import METRICS
from poolkeeper.telemetry.prometheus import instrument, uninstrument
from tests.support.programs import run_program
from tests.support.waiting import until

from .conftest import MakeManager, report, work

ROOT = Path(__file__).parents[2]
POOL = "db_client_connection_pool_name"
STATE = "db_client_connection_state"


def samples(text: str) -> dict[tuple[str, ...], float]:
    """The samples of a scrape, by name and the values of their labels, as sorted by name."""
    return {
        (sample.name, *(value for _, value in sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def scrape(port: int) -> dict[tuple[str, ...], float]:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=20) as answer:
        return samples(answer.read().decode())


async def test_a_scrape_has_the_metrics_of_two_pools(make_manager: MakeManager) -> None:
    registry = CollectorRegistry()
    server, thread = start_http_server(0, "127.0.0.1", registry=registry)
    try:
        db, reports = (
            make_manager(min_size=1, max_size=size, name=name)
            for size, name in ((1, "orders"), (4, "reports"))
        )
        for pool in (db, db.pool, reports):  # more than once is no error
            instrument(pool, registry=registry)
        await db.open()
        await reports.open()
        await work(db)
        await report(reports)

        def read() -> dict[tuple[str, ...], float]:
            return scrape(server.server_port)

        async def seen(key: tuple[str, ...], value: float) -> None:
            async with asyncio.timeout(30):
                while (await asyncio.to_thread(read)).get(key) != value:
                    await asyncio.sleep(0.05)

        of = "db_client_connection"
        await seen((f"{of}_count", "orders", "idle"), 1)
        found = await asyncio.to_thread(read)
        assert found[f"{of}_max", "orders"] == found[f"{of}_idle_max", "orders"] == 1
        assert found[f"{of}_max", "reports"] == 4
        assert found[f"{of}_idle_min", "reports"] == 1
        assert found[f"{of}_timeouts_total", "orders", "all-in-use"] == 1
        assert found[f"{of}_wait_time_seconds_count", "orders"] == 3
        assert found[f"{of}_wait_time_seconds_bucket", "orders", "0.05"] == 2
        assert found[f"{of}_wait_time_seconds_bucket", "orders", "10.0"] == 3
        assert found[f"{of}_use_time_seconds_sum", "orders"] >= 0.06
        assert found[f"{of}_create_time_seconds_count", "reports"] == 1
        here = "tests/telemetry/conftest.py"
        by_site = "poolkeeper_site_use_time_seconds_count"
        assert found[by_site, here, "report", "orders", "", ""] == 2
        assert found[by_site, here, "work", "orders", "", ""] == 1
        # Nothing happens while they are held, and the numbers are right nevertheless.
        async with db.connection():
            waiting = asyncio.create_task(report(db))
            await seen((f"{of}_pending_requests", "orders"), 1)
            await seen((f"{of}_count", "orders", "used"), 1)
        await waiting
        await db.close()
        await seen((f"{of}_count", "orders", "idle"), 0)
        await seen((f"{of}_max", "orders"), 0)
    finally:
        await asyncio.to_thread(server.shutdown)
        server.server_close()
        thread.join()


async def test_nothing_is_left_to_be_done_when_the_pool_is_closed(
    make_manager: MakeManager,
) -> None:
    registry = CollectorRegistry()
    db = make_manager(min_size=1)
    instrument(db, registry=registry)
    async with db:
        await work(db)
    assert [t for t in timers() if "_Gauges" in repr(t)] == []
    await db.open()  # its next life is looked at as well
    of = {POOL: db.name, STATE: "idle"}
    await until(lambda: registry.get_sample_value("db_client_connection_count", of) == 1)


def test_a_pool_whose_loop_is_gone_goes_on_in_its_next_life(dsn: str) -> None:
    registry = CollectorRegistry()
    db = PoolManager(dsn, min_size=1, name="orders")
    instrument(db, registry=registry)

    def count(state: str) -> float | None:
        of = {POOL: "orders", STATE: state}
        return registry.get_sample_value("db_client_connection_count", of)

    async def leave_open() -> None:
        await db.open()
        await report(db)

    async def reopen() -> None:
        async with db, db.connection():
            await until(lambda: count("used") == 1)

    with asyncio.Runner() as runner:
        runner.run(leave_open())
    asyncio.run(reopen())
    assert count("used") == count("idle") == 0


def timers() -> list[Any]:
    scheduled: list[Any] = getattr(asyncio.get_running_loop(), "_scheduled", [])
    return [timer for timer in scheduled if not timer.cancelled()]


async def test_who_is_instrumented_no_more_is_at_nothing(make_manager: MakeManager) -> None:
    registry = CollectorRegistry()
    db = make_manager(min_size=1, name="orders")
    instrument(db, registry=registry)
    await db.open()
    await report(db)
    uninstrument(db)
    uninstrument(db)  # harmless
    await report(db)

    def value(name: str, **labels: str) -> float | None:
        return registry.get_sample_value(name, {POOL: "orders", **labels})

    assert value("db_client_connection_max") == 0
    assert value("db_client_connection_count", **{STATE: "idle"}) == 0
    assert value("db_client_connection_use_time_seconds_count") == 1


async def test_a_null_pool_has_no_bound_and_keeps_none(dsn: str) -> None:
    registry = CollectorRegistry()
    for name, size in (("free", 0), ("bound", 2)):
        async with BoundNullPool(dsn, max_size=size, open=False, name=name) as pool:
            instrument(pool, registry=registry)
            async with pool.connection():
                pass
    assert registry.get_sample_value("db_client_connection_max", {POOL: "free"}) is None
    assert registry.get_sample_value("db_client_connection_idle_max", {POOL: "bound"}) == 0


async def test_what_happens_once_in_a_while_is_counted(make_manager: MakeManager, dsn: str) -> None:
    registry = CollectorRegistry()
    db = make_manager(min_size=1, leak_threshold=0.02, max_waiting=1, name="orders")
    instrument(db, registry=registry)
    await db.open()

    def count(name: str, **labels: str) -> float:
        of = {POOL: "orders", **labels}
        return registry.get_sample_value(f"poolkeeper_{name}_total", of) or 0

    async with db.connection():
        waiting = asyncio.create_task(report(db))
        await until(lambda: db.snapshot().waiting)
        with pytest.raises(Exception, match="1 task waits already"):
            await asyncio.create_task(report(db))
        await until(lambda: count("suspected_leaks"))
    await waiting
    with pytest.raises(RuntimeError):
        await asyncio.to_thread(lambda: asyncio.run(db.fetchval("select 1")))
    await db.pool.drain()
    await until(lambda: count("discarded", poolkeeper_reason="drained"))
    assert count("turned_away") == count("loop_mismatches") == 1
    assert count("suspected_leaks") >= 1  # on a busy machine others hold theirs as long

    elsewhere = make_manager("host=127.0.0.1 port=1", min_size=1, name="orders")
    instrument(elsewhere, registry=registry)
    with pytest.raises(Exception, match="could not open"):
        await elsewhere.open(timeout=0.2)
    kind = "no connection can be made: nobody answers at this host and port"
    assert count("connect_failures", error_type=kind) >= 1


def test_names_that_somebody_else_has_are_refused_with_the_reason() -> None:
    registry = CollectorRegistry()
    Counter("db_client_connection_timeouts", "theirs", registry=registry)
    for _ in range(2):  # nothing was left behind by the first
        with pytest.raises(ConfigError, match="somebody else has some of these names") as caught:
            instrument(PoolManager(), registry=registry)
        assert caught.value.parameter == "registry"
        assert "db_client_connection_timeouts" in str(caught.value.detail)


WORKER = """
import asyncio, os, sys, time

from poolkeeper import PoolManager
from poolkeeper.telemetry.prometheus import instrument

db = PoolManager(os.environ["DATABASE_URL"], min_size=2, max_size=3, name="orders")
instrument(db)  # before the fork, as under gunicorn --preload


async def report(db):
    await db.fetchval("select 1")


async def serve():
    async with db, db.connection():
        for _ in range(5):
            await report(db)
        print("ready", flush=True)
        await asyncio.to_thread(sys.stdin.read)


if __name__ == "__main__":
    workers = []
    for _ in range(2):
        if (pid := os.fork()) == 0:
            asyncio.run(serve())
            os._exit(0)
        workers.append(pid)
    for pid in workers:
        os.waitpid(pid, 0)
"""

SCRAPER = """
import sys

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead

for pid in sys.argv[1:]:
    mark_process_dead(pid)
registry = CollectorRegistry()
MultiProcessCollector(registry)
sys.stdout.write(generate_latest(registry).decode())
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_two_worker_processes_are_told_as_one(dsn: str, tmp_path: Path) -> None:
    """The multiprocess mode of prometheus-client, with workers that were forked."""
    directory = tmp_path / "metrics"
    directory.mkdir()
    (tmp_path / "app.py").write_text(WORKER)
    environment = {
        **os.environ,
        "DATABASE_URL": dsn,
        "PROMETHEUS_MULTIPROC_DIR": str(directory),
        "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path]),
    }

    def collected(*dead: str) -> dict[tuple[str, ...], float]:
        done = subprocess.run(
            [sys.executable, "-c", SCRAPER, *dead],
            env=environment, capture_output=True, text=True, timeout=60, check=True,
        )  # fmt: skip
        return samples(done.stdout)

    with subprocess.Popen(
        [sys.executable, "app.py"], cwd=tmp_path, env=environment, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    ) as workers:  # fmt: skip
        assert workers.stdout is not None
        assert workers.stdin is not None
        try:
            assert [workers.stdout.readline() for _ in range(2)] == ["ready\n"] * 2
            for _ in range(100):  # the gauges are written a moment later
                found = collected()
                if found["db_client_connection_count", "orders", "used"] == 2:
                    break
        finally:
            workers.stdin.close()
            workers.wait(30)
    assert found["db_client_connection_count", "orders", "used"] == 2
    assert found["db_client_connection_count", "orders", "idle"] == 2
    assert found["db_client_connection_max", "orders"] == 6
    assert found["db_client_connection_wait_time_seconds_count", "orders"] == 12
    by_site = "poolkeeper_site_use_time_seconds_count"
    assert found[by_site, "app.py", "report", "orders", "", ""] == 10
    pids = {path.stem.rpartition("_")[2] for path in directory.glob("gauge_livesum_*.db")}
    assert len(pids) == 3  # the parent, which has opened nothing, is one
    ended = collected(*pids)
    assert ("db_client_connection_max", "orders") not in ended
    assert ended["db_client_connection_use_time_seconds_count", "orders"] == 12


@pytest.mark.parametrize(
    ("module", "package", "missing"),
    [
        ("opentelemetry", "opentelemetry-api", "opentelemetry"),
        ("prometheus", "prometheus-client", "prometheus_client"),
    ],
)
def test_a_missing_package_is_told_with_the_extra(module: str, package: str, missing: str) -> None:
    ended = run_program(
        f"""
        sys.modules[{missing!r}] = None
        import importlib.abc

        class Gone(importlib.abc.MetaPathFinder):
            def find_spec(self, name, path=None, target=None):
                if name == {missing!r}:
                    raise ModuleNotFoundError("gone", name=name)

        del sys.modules[{missing!r}]
        sys.meta_path.insert(0, Gone())
        from poolkeeper import MissingDependencyError
        try:
            import poolkeeper.telemetry.{module}
        except MissingDependencyError as ex:
            print(ex)
        """
    )
    assert ended.out.splitlines() == [
        f"cannot import poolkeeper.telemetry.{module}: {package} is not installed",
        f'HINT:  Install it with: pip install "poolkeeper[{module}]"',
    ], ended.err


def test_a_package_that_is_broken_is_not_called_missing() -> None:
    """What it misses itself is told as Python tells it."""
    ended = run_program(
        """
        import importlib.abc

        class Broken(importlib.abc.MetaPathFinder):
            def find_spec(self, name, path=None, target=None):
                if name in ("opentelemetry", "prometheus_client"):
                    raise ModuleNotFoundError(f"{name} misses a part", name="part")

        sys.meta_path.insert(0, Broken())
        for module in ("opentelemetry", "prometheus"):
            try:
                importlib.import_module(f"poolkeeper.telemetry.{module}")
            except ModuleNotFoundError as ex:
                print(type(ex).__name__, ex)
        """
    )
    assert ended.out.splitlines() == [
        "ModuleNotFoundError opentelemetry misses a part",
        "ModuleNotFoundError prometheus_client misses a part",
    ], ended.err


def test_numbers_are_looked_at_when_something_has_happened_and_while_there_is_a_pool() -> None:
    seen: list[float] = []
    pool = PoolManager("host=nowhere", name="orders").pool
    event = OutageEnded(pool="orders", outage_seconds=1.0, attempts_failed=2)
    gauges = prometheus._Gauges(pool, lambda *_: seen.append)
    of_one_look = len(seen)
    assert of_one_look > 0
    gauges._is_due()  # nothing has happened since
    assert len(seen) == of_one_look
    gauges(event)
    assert len(seen) == 2 * of_one_look
    del pool
    gc.collect()
    gauges(event)
    assert len(seen) == 2 * of_one_look


def test_names_are_those_of_opentelemetrys_exporter() -> None:
    assert prometheus.prometheus_name("db.client.connection.max") == "db_client_connection_max"


def exported() -> set[str]:
    """What a scrape may have, but for its histograms' own endings."""
    registry = CollectorRegistry()
    instrument(PoolManager(), registry=registry)
    return {family.name for family in registry.collect()}


def test_a_dashboard_asks_for_metrics_and_labels_that_there_are() -> None:
    dashboard = json.loads((ROOT / "examples" / "grafana" / "poolkeeper.json").read_text())
    queries = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    asked = {name for query in queries for name in re.findall(r"(\w+)\{", query)}
    ends = ("_bucket", "_sum", "_count", "_total")
    known = {name + end for name in exported() for end in ("", *ends)}
    assert asked <= known
    labels = {prometheus.prometheus_name(label) for m in METRICS for label in m.attributes}
    groups = re.findall(r"by \(([^)]*)\)", " ".join(queries))
    assert {name for group in groups for name in group.split(", ")} <= labels | {"le", POOL}
    # What is measured is shown, but for what is the same as max_size and min_size.
    shown = {name.removesuffix(end) for name in asked for end in ("", *ends)}
    assert exported() - shown == {
        "db_client_connection_idle_max", "db_client_connection_idle_min",
        "db_client_connection_use_time_seconds",
    }  # fmt: skip
    places = [tuple(panel["gridPos"][key] for key in "xy") for panel in dashboard["panels"]]
    assert len(set(places)) == len(places)


@pytest.mark.parametrize("page", ["prometheus", "opentelemetry"])
def test_the_page_names_each_metric(page: str) -> None:
    text = (ROOT / "docs" / "howto" / f"{page}.md").read_text()
    for metric in METRICS:
        name = metric.name
        if page == "prometheus":
            name = prometheus.prometheus_name(name)
        last = name.removeprefix(prometheus.prometheus_name("db.client.connection"))
        short = name.removeprefix("db.client.connection")
        assert any(f"`{n}" in text for n in (name, last, short)), name
