"""Measure on each loop, and write the page and the plot: ``python -m benchmarks --help``."""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psycopg

import poolkeeper
from poolkeeper._embedded import EmbeddedServer

from . import plot, report

ROOT = Path(__file__).parents[1]

# What a user of psycopg_pool may not have to load.
FRAMEWORKS = ("asyncpg", "celery", "django", "fastapi", "flask", "sqlalchemy", "starlette")

IMPORT = f"""
import json, sys
from time import perf_counter
import psycopg_pool
begin = perf_counter()
import poolkeeper
seconds = perf_counter() - begin
print(json.dumps([seconds, [name for name in {FRAMEWORKS} if name in sys.modules]]))
"""


def import_cost(runs: int) -> dict[str, Any]:
    """Import poolkeeper after psycopg_pool, in *runs* fresh interpreters and one to warm up."""
    with tempfile.TemporaryDirectory() as cache:
        # Whatever else is set, import from compiled files as an installed package does.
        env = {**os.environ, "PYTHONPYCACHEPREFIX": cache, "PYTHONDONTWRITEBYTECODE": ""}
        found = [
            json.loads(subprocess.check_output([sys.executable, "-c", IMPORT], env=env))
            for _ in range(runs + 1)
        ][1:]
    return {
        "seconds": [seconds for seconds, _ in found],
        "frameworks": sorted({name for _, names in found for name in names}),
    }


def measure(dsn: str, loop: str, flags: list[str]) -> dict[str, Any]:
    """Measure on *loop*, in processes of its own."""
    print(f"on {loop}:", file=sys.stderr, flush=True)
    where = ["--dsn", dsn, "--loop", loop]
    measured = _run("benchmarks.measure", *where, *flags)
    quick = [flag for flag in flags if flag == "--quick"]
    storms = {
        name: _run("benchmarks.storm", *where, "--pool", name, *quick)
        for name in (report.BARE, report.OURS)
    }
    return {"loop": loop, **measured, "storm": storms}


def _run(module: str, *arguments: str) -> dict[str, Any]:
    command = [sys.executable, "-m", module, *arguments]
    found: dict[str, Any] = json.loads(subprocess.check_output(command, cwd=ROOT))
    return found


def facts(dsn: str, load: float) -> list[str]:
    """Return what the numbers depend on, and nothing that tells whose machine it is."""
    with psycopg.connect(dsn) as conn:
        server = conn.info.server_version // 10000
    packages = [f"poolkeeper {poolkeeper.__version__}"]
    for name in ("psycopg", "psycopg-pool", "asyncpg", "SQLAlchemy", "uvloop"):
        try:
            packages.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            packages.append(f"{name} is not installed")
    return [
        f"{platform.python_implementation()} {platform.python_version()},"
        f" {platform.system()} {platform.machine()}, {os.cpu_count()} cores,"
        f" load {load:.1f} before the run.",
        f"PostgreSQL {server} on the same machine, over TCP; psycopg's {psycopg.pq.__impl__}"
        " implementation.",
        f"{', '.join(packages)}.",
    ]


@contextmanager
def server(dsn: str | None) -> Iterator[str]:
    """Give the DSN of the server to use."""
    if dsn is not None:
        yield dsn
    else:
        with EmbeddedServer({"max_connections": 200}) as embedded:
            yield embedded.dsn()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--dsn", help="server to use; by default one is started out of a wheel")
    parser.add_argument("--out", type=Path, default=ROOT / "docs", help="directory for the results")
    parser.add_argument("--slow", action="store_true", help="measure outages of 8 s and 60 s too")
    parser.add_argument("--quick", action="store_true", help="try that it works; says nothing")
    arguments = parser.parse_args()
    flags = [f"--{name}" for name in ("slow", "quick") if getattr(arguments, name)]
    loops = ["asyncio", "uvloop"] if find_spec("uvloop") else ["asyncio"]
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    with server(arguments.dsn) as dsn:
        about = facts(dsn, load)
        imported = import_cost(1 if arguments.quick else 15)
        results = [{**measure(dsn, loop, flags), "import": imported} for loop in loops]
    page = report.page(results, about)
    (arguments.out / "benchmarks.md").write_text(page)
    (arguments.out / "benchmarks.svg").write_text(plot.draw(results[0]["growth"]))
    print(page)


if __name__ == "__main__":
    main()
