"""What the adapters share: the life of a manager, the connection of a request, missing packages."""

from __future__ import annotations

import asyncio
import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from psycopg.conninfo import make_conninfo

from poolkeeper import MissingDependencyError, NotOpenError, PoolManager
from poolkeeper.adapters._shared import RequestConnection, Span, pool_in, ready, requires
from poolkeeper.errors import see

HERE = "tests/adapters/test_shared.py"


# --- Span ---------------------------------------------------------------------------------------


async def test_what_it_has_opened_it_closes_once(make_manager: Any) -> None:
    db = make_manager(min_size=1)
    span = Span(db)
    await span.start()
    await span.start()  # a framework that fires its hooks twice
    assert db.state == "open"
    await span.stop()
    assert db.state == "closed"
    await db.open()
    await span.stop()
    assert db.state == "open"


async def test_a_manager_that_is_being_opened_is_the_openers(make_manager: Any) -> None:
    db = make_manager(min_size=1)
    opening = asyncio.create_task(db.open())
    await asyncio.sleep(0)
    async with Span(db):
        await opening
    assert db.state == "open"


# --- RequestConnection ----------------------------------------------------------------------------


async def test_a_task_gets_the_connection_it_holds_and_the_outermost_block_ends_it(
    db: PoolManager[Any],
) -> None:
    request: dict[str, Any] = {}
    async with RequestConnection(request, db, None) as outer:
        async with RequestConnection(request, db, None) as inner:
            assert inner is outer
            await inner.execute("create temporary table here (n int)")
        assert db.snapshot().in_use == 1
        assert (await (await outer.execute("select count(*) from here")).fetchone()) == (0,)
    assert db.snapshot().in_use == 0
    async with RequestConnection(request, db, None) as later:
        assert later is not outer


async def test_an_error_in_the_inner_block_rolls_back_what_the_outer_did(
    db: PoolManager[Any],
) -> None:
    request: dict[str, Any] = {}
    with pytest.raises(LookupError):
        async with RequestConnection(request, db, None) as outer:
            await outer.execute("create table never (n int)")
            async with RequestConnection(request, db, None):
                raise LookupError
    assert await db.fetchval("select to_regclass('never')") is None


@pytest.mark.filterwarnings("ignore::poolkeeper.errors.DuplicatePoolWarning")
async def test_another_task_or_another_request_or_manager_gets_its_own(
    db: PoolManager[Any], make_manager: Any
) -> None:
    request: dict[str, Any] = {}
    other_db = make_manager(min_size=1, name="other", application_name="other")
    await other_db.open()

    async def ask(request: dict[str, Any], db: PoolManager[Any]) -> Any:
        async with RequestConnection(request, db, None) as conn:
            return conn

    async with RequestConnection(request, db, None) as conn:
        assert await asyncio.create_task(ask(request, db)) is not conn
        assert await ask({}, db) is not conn
        assert await ask(request, other_db) is not conn
        assert await ask(request, db) is conn


async def test_one_that_was_cancelled_while_it_waited_holds_nothing(make_manager: Any) -> None:
    db = make_manager(min_size=1, max_size=1)
    await db.open()
    request: dict[str, Any] = {}

    async def ask() -> None:
        async with RequestConnection(request, db, None):
            pass

    async with db.connection():
        waiting = asyncio.create_task(ask())
        while not db.snapshot().waiting:
            await asyncio.sleep(0)
        waiting.cancel()
        await asyncio.wait([waiting])
    assert db.snapshot().in_use == 0
    await ask()


async def test_the_diagnosis_names_the_line_or_the_function_that_it_was_acquired_for(
    db: PoolManager[Any],
) -> None:
    def endpoint() -> None: ...

    line = endpoint.__code__.co_firstlineno
    async with RequestConnection({}, db, endpoint), RequestConnection({}, db, sys._getframe()):
        sites = {row.site for row in db.snapshot().checkouts}
    assert sites == {f"{HERE}:{line}", f"{HERE}:{line + 3}"}


async def test_where_the_route_is_known_no_line_of_a_librarys_is_named(
    db: PoolManager[Any],
) -> None:
    def asked_by(caller: Any) -> Any:
        return RequestConnection({}, db, caller, ("GET", "/orders"))

    async with asked_by(json.dumps), asked_by(asked_by):
        library, own = (row.asker for row in db.snapshot().checkouts)
    assert library == "GET /orders"
    assert own == f"GET /orders, {HERE}:{asked_by.__code__.co_firstlineno} in asked_by"


# --- what is not there ----------------------------------------------------------------------------


def test_without_a_manager_the_hint_is_the_frameworks() -> None:
    with pytest.raises(NotOpenError) as caught:
        pool_in({"other": 1}, "poolkeeper", "Call setup().")
    assert str(caught.value) == (
        "there is no pool in this application: its start-up has not run\n"
        "DETAIL:  The pool is opened by the application's start-up, which keeps it under"
        ' "poolkeeper"; nothing is there.\n'
        f"HINT:  Call setup(). {see('no-startup')}"
    )


async def test_readiness_passes_an_error_of_the_program_on() -> None:
    def find() -> PoolManager[Any]:
        raise LookupError("a bug")

    with pytest.raises(LookupError, match="a bug"):
        await ready(find)


def test_a_missing_package_names_the_extra() -> None:
    with pytest.raises(MissingDependencyError) as caught, requires("a_framework"):
        importlib.import_module("a_framework.requests")
    assert str(caught.value) == (
        "cannot import poolkeeper.adapters.a_framework: a_framework is not installed\n"
        'HINT:  Install it with: pip install "poolkeeper[a_framework]"'
    )
    assert isinstance(caught.value.__cause__, ModuleNotFoundError)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("import what_it_needs", "No module named 'what_it_needs'"),
        ("from os import nothing_of_the_kind", "cannot import name"),
        ("import broken_framework.parts", "No module named 'broken_framework.parts'"),
    ],
)
def test_a_broken_or_older_package_is_not_called_a_missing_one(
    source: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "broken_framework"
    package.mkdir()
    (package / "__init__.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ImportError, match=message) as caught, requires("broken_framework"):
        importlib.import_module("broken_framework")
    assert not isinstance(caught.value, MissingDependencyError)


# --- health ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "kind", "words"),
    [
        ({"port": "1"}, "nobody answers at this host and port", "Connection refused"),
        ({"user": "stranger"}, "the server refuses the login", 'role "stranger" does not exist'),
        ({"dbname": "elsewhere"}, "the server refuses the database", 'database "elsewhere"'),
        (
            {"host": "db.elsewhere.invalid", "hostaddr": ""},
            "the host name cannot be resolved",
            "db.elsewhere.invalid",
        ),
    ],
)
async def test_strangers_are_told_what_kind_of_reason_it_is_and_the_log_its_words(
    change: dict[str, str],
    kind: str,
    words: str,
    dsn: str,
    make_manager: Any,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO")
    db = make_manager(make_conninfo(dsn, **change), min_size=0, max_size=1, name="orders")
    await db.open()
    answer = await ready(lambda: db)
    assert answer.status == 503
    reason = json.loads(answer.body)["reason"]
    assert kind in reason
    for named in ("stranger", "elsewhere", "127.0.0.1", "localhost", "port 1", "postgres"):
        assert named not in answer.body.decode()
    assert words in caplog.text
    told = json.loads((await ready(lambda: db, details=True)).body)["reason"]
    assert words in told
    health = await db.check()
    assert (health.kind, health.reason) == (reason, told)


@pytest.mark.parametrize(
    "name",
    ["aiohttp", "blacksheep", "falcon", "fastapi", "litestar", "quart", "sanic", "starlette"],
)
def test_each_adapter_has_a_handler_for_those_who_may_know_more(name: str) -> None:
    adapter = importlib.import_module(f"poolkeeper.adapters.{name}")
    assert "readyz_details" in adapter.__all__
    assert adapter.readyz_details is not adapter.readyz
