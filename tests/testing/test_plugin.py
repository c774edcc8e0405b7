"""The pytest plugin, as a run of pytest's own has it: servers, databases, what is left behind."""

from __future__ import annotations

import asyncio
import logging
import os
import re
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psycopg
import pytest
import pytest_asyncio

import pytest_poolkeeper
from poolkeeper import ConfigError, LoopMismatchError, MissingDependencyError, PoolManager
from poolkeeper.testing import LeftBehindError, OwnershipError, Template, server
from poolkeeper.testing._watch import Watch

CONFTEST = """
import pytest
import pytest_asyncio
from poolkeeper import PoolManager

@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def db(poolkeeper_dsn):
    async with PoolManager(poolkeeper_dsn, min_size=1, max_size=9, name="wide") as db:
        db.held = await db.pool.getconn()
        yield db
        await db.pool.putconn(db.held)

@pytest.fixture(scope="session")
def poolkeeper_schema():
    return "create table things (n int)"
"""

TESTS = """
import asyncio
import pytest
from poolkeeper import PoolManager

kept = []

async def forever():
    await asyncio.sleep(1000)

@pytest.mark.asyncio(loop_scope="session")
class TestOnTheLoopOfTheSession:
    async def test_nothing(self, db):
        await db.fetchval("select 1")
        await asyncio.create_task(asyncio.sleep(0))

    async def test_checkout(self, db):
        kept.append(await db.pool.getconn())

    async def test_dropped(self, db):
        await db.pool.getconn()
        await asyncio.sleep(0.1)

    async def test_transaction(self, db):
        conn = await db.pool.getconn()
        await conn.execute("create table if not exists lost (n int)")
        await db.pool.putconn(conn)

    async def test_task(self, db):
        kept.append(asyncio.create_task(forever()))

    @pytest.mark.leaves_behind
    async def test_marked(self, db):
        kept.append(asyncio.create_task(forever()))

@pytest.fixture
async def narrow(poolkeeper_dsn):
    db = PoolManager(poolkeeper_dsn, min_size=1, name="narrow")
    await db.open()
    yield db
    await db.close()

@pytest.fixture
async def careless(poolkeeper_dsn):
    db = PoolManager(poolkeeper_dsn, min_size=1, name="careless")
    await db.open()
    kept.append(db)
    yield db

async def test_own_pool(narrow):
    await narrow.fetchval("select 1")

async def test_manager(poolkeeper_dsn):
    db = PoolManager(poolkeeper_dsn, min_size=1, name="own")
    await db.open()
    kept.append(db)

async def test_careless_fixture(careless):
    await careless.fetchval("select 1")

async def test_task_on_own_loop(narrow):
    kept.append(asyncio.create_task(forever()))

async def test_without_a_pool_tasks_are_nobodys_business():
    kept.append(asyncio.create_task(forever()))

async def test_mismatch(db):
    await db.fetchval("select 1")

async def test_loop_in_a_thread(narrow):
    await asyncio.to_thread(lambda: asyncio.run(narrow.fetchval("select 1")))

async def test_committed(fresh_database):
    async with PoolManager(fresh_database, min_size=1) as db:
        await db.execute("insert into things values (1)")
        assert await db.fetchval("select count(*) from things") == 1

async def test_committed_again(fresh_database):
    async with PoolManager(fresh_database, min_size=1) as db:
        assert await db.fetchval("select count(*) from things") == 0
"""

LINES = {
    "test_checkout": r'pool "wide" was not given back: acquired in task ".*" at test_it.py:18 in',
    "test_dropped": r"Pool \"wide\": a connection was dropped .* test_it.py:21",
    "test_transaction": r"work that is not committed: rolled back. Acquired .* test_it.py:25",
    "test_task": r'Task ".*" goes on at test_it.py:9',
    "test_manager": r'Pool "own" is open: opened at test_it.py:\d+',
    "test_careless_fixture": r'Pool "careless" is open: opened at test_it.py:\d+',
    "test_task_on_own_loop": r'Task ".*" goes on at test_it.py:9',
    "test_mismatch": "Write both into pyproject.toml, and no other loop_scope beside them:"
    ' asyncio_default_fixture_loop_scope = "session" and'
    ' asyncio_default_test_loop_scope = "session"',
    "test_loop_in_a_thread": r"HINT:  (?!.*_loop_scope)",
}


def run_pytest(
    directory: Path, *arguments: str, **variables: str
) -> subprocess.CompletedProcess[str]:
    source = Path(pytest_poolkeeper.__file__).parents[1]
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "pytest_poolkeeper"]
    return subprocess.run(
        [*command, "-p", "no:ddtrace", "-p", "no:langsmith_plugin", "--tb=short", *arguments],
        cwd=directory,
        env={**os.environ, "PYTHONPATH": str(source), "COLUMNS": "500", **variables},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )


@pytest.fixture(scope="module")
def ran(dsn: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """What pytest says of a suite that leaves things behind."""
    directory = tmp_path_factory.mktemp("suite")
    (directory / "conftest.py").write_text(CONFTEST)
    (directory / "test_it.py").write_text(TESTS)
    (directory / "pyproject.toml").write_text(
        '[tool.pytest.ini_options]\nasyncio_mode = "auto"\n'
        'asyncio_default_fixture_loop_scope = "function"\n'
        'filterwarnings = ["ignore::poolkeeper.errors.DuplicatePoolWarning"]\n'
    )
    return run_pytest(directory, "-rA", f"--poolkeeper-server={dsn}").stdout


def test_what_a_test_leaves_behind_fails_it_with_the_line_and_nobody_else(ran: str) -> None:
    failed = re.findall(r"^(ERROR|FAILED) test_it.py::(?:.*::)?(\w+)", ran, re.MULTILINE)
    assert {name for _, name in failed} == set(LINES)
    by_themselves = {name for outcome, name in failed if outcome == "FAILED"}
    assert by_themselves == {"test_mismatch", "test_loop_in_a_thread"}
    for name, said in LINES.items():
        section = re.split(rf"^_+ .*{name}\b.* _+$", ran, maxsplit=1, flags=re.MULTILINE)[1]
        assert re.search(said, re.split(r"^_{3,} ", section, flags=re.MULTILINE)[0]), name


class OldItem:
    """A test of pytest-asyncio's, as its versions before 0.25 have it."""

    @property
    def config(self) -> OldItem:
        return self

    inipath = None

    def getini(self, name: str) -> str:
        raise ValueError(f"unknown configuration value: {name!r}")

    def get_closest_marker(self, name: str) -> pytest.Mark | None:
        return pytest.mark.asyncio.mark if name == "asyncio" else None


async def test_a_pytest_asyncio_that_is_too_old_is_told_so(
    make_manager: Callable[..., PoolManager], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It knows not both settings, and keeps a fixture's context from the test."""
    monkeypatch.setattr(pytest_asyncio, "__version__", "0.24.0")
    monkeypatch.setattr(logging.getLogger("poolkeeper"), "handlers", [])
    fixture = types.SimpleNamespace(scope="module", func=None, argname="pool")
    async with make_manager(min_size=1, name="old"):
        watch = Watch()
        watch.fixture_was_set_up(fixture)
        mismatch = LoopMismatchError('pool "old" is bound to a different event loop')
        unowned = OwnershipError("belongs to no test", hint="Allow it")
        for error in (mismatch, unowned):
            watch.advise(OldItem(), error)
    assert "Install pytest-asyncio 0.26 or later. Write both" in str(mismatch)
    assert "Install pytest-asyncio 0.25 or later" in str(unowned)


class Item(OldItem):
    """A test with those markers, and the settings of pytest-asyncio as they are at first."""

    def __init__(self, *markers: str) -> None:
        self.markers = markers

    def getini(self, name: str) -> str:
        return ""

    def get_closest_marker(self, name: str) -> pytest.Mark | None:
        return getattr(pytest.mark, name).mark if name in self.markers else None


@pytest.mark.parametrize(
    ("item", "scope", "of_pool"),
    [
        (Item("asyncio"), "module", "another"),  # which no fixture has opened
        (Item("asyncio"), "function", "narrow"),  # on the same loop
        (Item("anyio"), "function", "narrow"),
        (Item(), "module", "narrow"),  # of another plugin
    ],
)
async def test_a_hint_stays_where_settings_are_not_what_is_wrong(
    make_manager: Callable[..., PoolManager],
    monkeypatch: pytest.MonkeyPatch,
    item: Item,
    scope: str,
    of_pool: str,
) -> None:
    monkeypatch.setattr(pytest_asyncio, "__version__", "0.25.0")
    monkeypatch.setattr(logging.getLogger("poolkeeper"), "handlers", [])
    fixture = types.SimpleNamespace(scope=scope, func=None, argname="pool")
    async with make_manager(min_size=1, name="narrow"):
        watch = Watch()
        watch.fixture_was_set_up(fixture)
        mismatch = LoopMismatchError(f'pool "{of_pool}" is bound to another loop', hint="As ever")
        unowned = OwnershipError("belongs to no test", hint="Allow it")
        for error in (mismatch, unowned):
            watch.advise(item, error)
    assert (mismatch.hint, unowned.hint) == ("As ever", "Allow it")


def test_a_fixture_that_is_only_named_like_a_runner_is_let_be(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(logging.getLogger("poolkeeper"), "handlers", [])
    finalizers: list[Callable[[], object]] = []
    for result in (object(), asyncio.Runner()):
        fixture = types.SimpleNamespace(
            argname="my_scoped_runner",
            cached_result=(result, None, None),
            addfinalizer=finalizers.append,
        )
        Watch().watch_runner(fixture)
        assert len(finalizers) == isinstance(result, asyncio.Runner)


def test_the_module_of_the_plugin_loads_nothing_of_poolkeeper_or_psycopg() -> None:
    source = Path(pytest_poolkeeper.__file__).parents[1]
    program = (
        "import sys, pytest; before = set(sys.modules); import pytest_poolkeeper;"
        "print(*sorted(set(sys.modules) - before))"
    )
    said = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": str(source)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert said.stdout.split() == ["pytest_poolkeeper"]


def test_a_run_that_does_not_use_poolkeeper_does_not_load_it(tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text(
        "import sys\n\n"
        "def test_one(tmp_path):\n    pass\n\n"
        "def test_two(poolkeeper_schema):\n"
        "    assert poolkeeper_schema == ''\n"
        "    assert not [name for name in sys.modules if name.startswith('poolkeeper')]\n"
    )
    ran = run_pytest(tmp_path, PYTEST_DISABLE_PLUGIN_AUTOLOAD="1")
    assert "2 passed" in ran.stdout


# --- servers and templates ------------------------------------------------------------------------


def test_a_server_is_a_dsn_or_one_of_two_words(monkeypatch: pytest.MonkeyPatch) -> None:
    with server("postgresql://localhost/x") as dsn:
        assert dsn == "postgresql://localhost/x"
    with pytest.raises(ConfigError, match="container"):
        server("embeded")
    monkeypatch.setitem(sys.modules, "testcontainers.postgres", None)
    with pytest.raises(MissingDependencyError, match="testcontainers"), server("container"):
        pass


def test_a_container_is_a_server_or_it_is_said_why_not(monkeypatch: pytest.MonkeyPatch) -> None:
    class NoDocker(Exception):
        __module__ = "docker.errors"

    class Container:
        fails: Exception | None = None

        def __init__(self, image: str, driver: str | None) -> None:
            if self.fails is not None:
                raise self.fails
            self.told = [image]

        def with_command(self, command: str) -> None:
            self.told.append(command)

        def __enter__(self) -> Container:
            return self

        def __exit__(self, *_: object) -> None:
            self.told.clear()

        def get_connection_url(self) -> str:
            return f"postgresql://there/?{self.told}"

    module: Any = types.ModuleType("testcontainers.postgres")
    module.PostgresContainer = Container
    monkeypatch.setitem(sys.modules, "testcontainers", types.ModuleType("testcontainers"))
    monkeypatch.setitem(sys.modules, "testcontainers.postgres", module)
    with server("container") as dsn:
        assert dsn.startswith("postgresql://there/?['postgres:")
        assert "max_connections" in dsn
    Container.fails = NoDocker("Connection refused")
    with (
        pytest.raises(MissingDependencyError, match=r"no Docker here(.|\n)*Connection refused"),
        server("container"),
    ):
        pass
    Container.fails = ZeroDivisionError("another fault")
    with pytest.raises(ZeroDivisionError, match="another fault"), server("container"):
        pass


def test_a_template_may_be_empty(dsn: str) -> None:
    with Template(dsn) as template, template.copy() as copy, psycopg.connect(copy) as conn:
        tables = conn.execute("select count(*) from pg_tables where schemaname = 'public'")
        assert tables.fetchone() == (0,)


def test_copies_of_a_template_do_not_know_each_other(dsn: str) -> None:
    def fill(address: str) -> None:
        with psycopg.connect(address) as conn:
            conn.execute("create table things (n int)")

    def insert(address: str) -> Any:
        with psycopg.connect(address) as conn:
            conn.execute("insert into things values (1)")
            return conn.execute("select count(*) from things").fetchone()

    with Template(dsn, fill) as template:
        with template.copy() as one, template.copy() as two:
            assert insert(one) == insert(two) == (1,)
        with pytest.raises(psycopg.OperationalError, match="does not exist"):
            insert(one)
        somebody = psycopg.conninfo.make_conninfo(dsn, dbname=template.name)
        with (
            psycopg.connect(somebody),
            pytest.raises(ConfigError, match="somebody is connected"),
            template.copy(),
        ):
            pass
    with pytest.raises(psycopg.errors.SyntaxError), Template(dsn, "no sql"):
        pass
    assert issubclass(LeftBehindError, AssertionError)
