"""Measure everything or a part, write the page and the plot: ``python -m benchmarks --help``."""

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
from pathlib import Path
from time import perf_counter
from typing import Any

import psycopg

import poolkeeper
from poolkeeper._embedded import EmbeddedServer

from . import plot, report, turns
from .contests import BARE, LOOPS, OURS, STAGES, is_installed
from .load import generator
from .measure import MEASUREMENTS
from .turns import ROOT

ROUNDS = 7
QUICK_ROUNDS, QUICK_SECONDS = 1, 0.005

PARTS = list(
    dict.fromkeys(
        [
            *(part for name, stage in STAGES.items() for part in (name, *stage.contests)),
            *MEASUREMENTS,
            "storm",
            "import",
        ]
    )
)
"""What can be measured by itself: a stage, a contest, or another measurement."""

PACKAGES = (
    "psycopg", "psycopg-pool", "asyncpg", "SQLAlchemy", "uvloop", "procrastinate",
    "langgraph-checkpoint-postgres", "psycopg-toolkit", "fastapi", "uvicorn", "httptools",
)  # fmt: skip

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


def measure(dsn: str, loop: str, wanted: Wanted, quick: bool) -> dict[str, Any]:
    """Measure on *loop*, in processes of its own."""
    found: dict[str, Any] = {"loop": loop, "contests": {}}
    rounds = QUICK_ROUNDS if quick else ROUNDS
    for name, stage in STAGES.items():
        contests = [contest for contest in stage.contests if wanted(contest, name)]
        if contests and loop in stage.loops:
            begin = perf_counter()
            seconds = QUICK_SECONDS if quick else stage.seconds
            found["contests"] |= turns.measure(name, contests, dsn, loop, rounds, seconds)
            say(f"{name} on {loop}: {perf_counter() - begin:.0f} s")
    flags = ["--dsn", dsn, "--loop", loop, *(["--quick"] if quick else [])]
    if measurements := list(filter(wanted, MEASUREMENTS)):
        say(f"on {loop}:")
        found |= _run("benchmarks.measure", *flags, *measurements)
    if wanted("storm"):
        found["storm"] = {
            name: _run("benchmarks.storm", *flags, "--pool", name) for name in (BARE, OURS)
        }
        say(f"storm on {loop}: done")
    return found


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _run(module: str, *arguments: str) -> dict[str, Any]:
    command = [sys.executable, "-m", module, *arguments]
    found: dict[str, Any] = json.loads(subprocess.check_output(command, cwd=ROOT))
    return found


def facts(dsn: str, load: float) -> list[str]:
    """Return what the numbers depend on, and nothing that tells whose machine it is."""
    with psycopg.connect(dsn) as conn:
        server = conn.info.server_version // 10000
    packages = [f"poolkeeper {poolkeeper.__version__}"]
    for name in PACKAGES:
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
        f"FastAPI is put under load by {generator(1.0)}.",
    ]


@contextmanager
def server(dsn: str | None) -> Iterator[str]:
    """Give the DSN of the server to use."""
    if dsn is not None:
        yield dsn
    else:
        with EmbeddedServer({"max_connections": 200}) as embedded:
            yield embedded.dsn()


class Wanted:
    """
    What to measure: *only* what is named there, or everything but the outages.

    Raises:
        ValueError: If nothing has one of the names.
    """

    def __init__(self, only: str, slow: bool) -> None:
        names = only.replace(",", " ").split()
        if unknown := set(names) - set(PARTS):
            raise ValueError(
                f"there is no {', '.join(sorted(unknown))}; there is {', '.join(PARTS)}"
            )
        self.everything = not names
        self.parts = set(names) or set(PARTS) - {"outages"}
        if slow:
            self.parts.add("outages")

    def __call__(self, *names: str) -> bool:
        """Tell whether one of *names* is wanted."""
        return not self.parts.isdisjoint(names)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--dsn", help="server to use; by default one is started out of a wheel")
    parser.add_argument("--out", type=Path, help="directory for the results, instead of docs/")
    parser.add_argument(
        "--only",
        default="",
        metavar="PARTS",
        help=f"print those of {', '.join(PARTS)}, and write nothing",
    )
    parser.add_argument("--loop", choices=LOOPS, help="the only one to measure on; prints")
    parser.add_argument("--slow", action="store_true", help="measure outages of 8 s and 60 s too")
    parser.add_argument("--quick", action="store_true", help="try that it works; says nothing")
    options = parser.parse_args()
    try:
        wanted = Wanted(options.only, options.slow)
    except ValueError as ex:
        parser.error(str(ex))
    loops = [
        loop
        for loop in LOOPS
        if options.loop in {None, loop} and (loop == "asyncio" or is_installed(loop))
    ]
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    with server(options.dsn) as dsn:
        about = facts(dsn, load)
        # First: what comes later makes the machine busy.
        imported = {"import": import_cost(1 if options.quick else 15)} if wanted("import") else {}
        results = [{**measure(dsn, loop, wanted, options.quick), **imported} for loop in loops]
    rounds = QUICK_ROUNDS if options.quick else ROUNDS
    page = report.page(results, about, rounds, whole=wanted.everything)
    # Less than everything would take the place of more.
    if wanted.everything and (options.out or not options.loop):
        out = options.out or ROOT / "docs"
        (out / "benchmarks.md").write_text(page)
        (out / "benchmarks.svg").write_text(plot.draw(results[0]["growth"]))
    print(page)


if __name__ == "__main__":
    main()
