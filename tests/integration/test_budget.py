"""On open: more connections than the server has are warned of, and who is who is shown."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import subprocess
import sys
import warnings
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import psycopg
import pytest

from poolkeeper import BoundPool, ConnectionBudgetWarning, PoolManager, ServerFacts
from poolkeeper._embedded import EmbeddedServer
from tests.support.server import PASSWORD, admin
from tests.support.waiting import eventually

# The server has max_connections=12, 3 of them for superusers.


@pytest.fixture(autouse=True)
def one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WEB_CONCURRENCY", raising=False)


@pytest.fixture
def small(scram_server: EmbeddedServer) -> str:
    return scram_server.dsn(user="app", password=PASSWORD)


@asynccontextmanager
async def opened(dsn: str, **arguments: Any) -> AsyncIterator[list[str]]:
    """Open a pool; give what it warns of, also later."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        async with PoolManager(dsn, **{"name": "orders", "min_size": 1} | arguments) as db:
            said: list[str] = []
            await db.fetchval("select 1")
            for one in caught:
                assert one.category is ConnectionBudgetWarning
                assert one.filename == __file__
                said.append(str(one.message))
            yield said


async def test_more_than_there_are_is_told_with_the_arithmetic(small: str) -> None:
    async with opened(small, max_size=5, expected_processes=2) as (said,):
        first, detail, hint = said.splitlines()
        assert first == 'pool "orders" may grow to 10 connections, and the server has 9 for it'
        assert detail == (
            "DETAIL:  max_size=5 in each of 2 processes (expected_processes) makes 10."
            " The server has max_connections=12, 3 of them reserved."
        )
        assert hint.startswith("HINT:  Set max_size to 4 or less, ")
        assert "poolkeeper explain connection-budget" in hint


async def test_what_was_found_out_can_be_asked_for(small: str) -> None:
    db = PoolManager(small, min_size=1)
    assert db.server is None
    async with db:
        assert db.server == ServerFacts(
            pooled=False,
            shares_sessions=False,
            tracks_prepared=False,
            max_connections=12,
            reserved=3,
            allowed=9,
        )
        assert db.pool.server == db.server
    assert db.server is None


async def test_before_the_first_connection_nothing_was_found_out(small: str) -> None:
    async with PoolManager(small, min_size=0, max_size=1) as db:
        assert db.server is None
        assert await db.fetchval("select 1") == 1
        assert db.server is not None


async def test_what_fits_is_not_told(small: str) -> None:
    async with opened(small, max_size=9) as said:
        assert said == []
    async with opened(small, max_size=3, expected_processes=3) as said:
        assert said == []


async def test_a_superuser_may_have_all_of_them(scram_server: EmbeddedServer) -> None:
    async with opened(scram_server.dsn(), max_size=12) as said:
        assert said == []
    async with opened(scram_server.dsn(), max_size=13) as (told,):
        assert "has 12 for it" in told


@pytest.fixture
def limited(scram_server: EmbeddedServer) -> Iterator[str]:
    """A role and a database of the test's own, each with a limit."""
    dsn = scram_server.dsn()
    admin(dsn, f"create role few login password '{PASSWORD}' connection limit 4")
    admin(dsn, "create database few connection limit 2")
    yield scram_server.dsn(user="few", password=PASSWORD)
    admin(dsn, "drop database few with (force)")
    admin(dsn, "drop role few")


async def test_the_limits_of_role_and_database_count(
    limited: str, scram_server: EmbeddedServer
) -> None:
    async with opened(limited, max_size=5) as (said,):
        assert "has 4 for it" in said
        assert "The role has a CONNECTION LIMIT of 4." in said
    async with opened(psycopg.conninfo.make_conninfo(limited, dbname="few"), max_size=3) as (said,):
        assert "has 2 for it" in said
        assert "The database has a CONNECTION LIMIT of 2." in said
    few = scram_server.dsn(dbname="few")
    async with opened(few, max_size=12) as said:  # a superuser is not limited
        assert said == []


async def test_it_is_told_once_for_each_life(small: str) -> None:
    db = PoolManager(small, min_size=1, max_size=10)
    for _ in range(2):
        with pytest.warns(ConnectionBudgetWarning) as caught:
            await asyncio.gather(db.open(), db.open(), db.open())
        await db.open()
        assert len(caught) == 1
        await db.close()


async def test_where_it_is_an_error_nothing_is_left(small: str, scram_server: Any) -> None:
    db = PoolManager(small, min_size=2, max_size=10, name="strict")
    with pytest.raises(ConnectionBudgetWarning):
        await db.open()
    assert db.state == "closed"
    count = "select count(*) from pg_stat_activity where application_name = 'poolkeeper:strict'"
    assert eventually(lambda: admin(scram_server.dsn(), count) == [(0,)])


@pytest.mark.parametrize("arguments", [{"min_size": 0}, {"open": False}])
async def test_what_is_found_out_later_is_told_for_the_line_that_opened_it(
    small: str, arguments: dict[str, Any]
) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        async with BoundPool(small, **{"open": False, "max_size": 10} | arguments) as pool:
            async with pool.connection():
                pass
            await asyncio.sleep(0)
            (told,) = caught
            assert told.category is ConnectionBudgetWarning
            assert Path(told.filename).resolve() == Path(__file__)


async def test_what_is_found_out_later_is_logged_where_warnings_are_errors(
    small: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with PoolManager(small, min_size=0, max_size=10, name="orders") as db:
        await db.fetchval("select 1")
    (record,) = (r for r in caplog.records if r.name == "poolkeeper")
    assert record.levelno == logging.WARNING
    assert record.getMessage().startswith('pool "orders" may grow to 10 connections')
    assert vars(record)["event_name"] == "poolkeeper.budget_exceeded"


async def test_a_server_that_does_not_tell_is_asked_no_more(
    dsn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some that speak the protocol have no such tables; what they refuse costs nothing."""
    from poolkeeper import _front

    monkeypatch.setattr(_front, "_LIMITS", b"SELECT nothing_of_the_kind()")
    async with PoolManager(dsn, min_size=2, max_size=1000) as db:
        assert await db.fetchval("select 1") == 1
        assert db.snapshot().total == 2


async def test_a_server_that_tells_nothing_of_its_limits_has_none(
    dsn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where the login is no role that it lists."""
    from poolkeeper import _front

    monkeypatch.setattr(_front, "_LIMITS", b"SELECT 1 WHERE false")
    async with PoolManager(dsn, min_size=1, max_size=1000) as db:
        assert db.server == ServerFacts(
            pooled=False,
            shares_sessions=False,
            tracks_prepared=False,
            max_connections=None,
            reserved=None,
            allowed=None,
        )


# --- who is who ----------------------------------------------------------------------------------

NAMES = "select application_name from pg_stat_activity where application_name like %s order by 1"


async def test_of_several_processes_each_has_its_number(dsn: str) -> None:
    async with PoolManager(dsn, min_size=1, name="several", expected_processes=2) as db:
        assert admin(dsn, NAMES, ("%several%",)) == [(f"poolkeeper:several:{os.getpid()}",)]
        assert await db.fetchval("show application_name") == f"poolkeeper:several:{os.getpid()}"


async def test_a_name_of_the_users_own_stays(dsn: str) -> None:
    arguments: dict[str, Any] = {"min_size": 1, "expected_processes": 2}
    async with PoolManager(dsn, application_name="mine", **arguments) as db:
        assert await db.fetchval("show application_name") == "mine"
    named = psycopg.conninfo.make_conninfo(dsn, application_name="theirs")
    async with PoolManager(named, **arguments) as db:
        assert await db.fetchval("show application_name") == "theirs"


# --- what has started the workers says how many there are ---------------------------------------

APP = """
import os

from poolkeeper import PoolManager

db = PoolManager(os.environ["DATABASE_URL"], min_size=1, max_size=5, name="workers")


async def app(scope, receive, send):
    assert scope["type"] == "lifespan"
    while True:
        message = await receive()
        if message["type"] == "lifespan.startup":
            await db.open()
        else:
            await db.close()
        await send({"type": message["type"] + ".complete"})
"""

TASKS = """
import asyncio
import os

from celery import Celery
from celery.signals import worker_process_init

from poolkeeper import PoolManager

app = Celery("tasks", broker="memory://")


async def ask():
    async with PoolManager(os.environ["DATABASE_URL"], min_size=1, max_size=5) as db:
        await db.fetchval("select 1")


@worker_process_init.connect
def begin(**_):
    asyncio.run(ask())
"""

SERVERS = {
    "uvicorn": ("-m", "uvicorn", "app:app", "--workers", "2", "--port", "0"),
    "hypercorn": ("-m", "hypercorn", "app:app", "--workers", "2", "-b", "127.0.0.1:0"),
    "gunicorn": (
        *("-m", "gunicorn", "app:app", "-w", "2", "-k", "uvicorn_worker.UvicornWorker"),
        *("-b", "127.0.0.1:0"),
    ),
}


@contextmanager
def started(
    directory: Path, dsn: str, commands: dict[str, tuple[str, ...]]
) -> Iterator[Callable[[str], str]]:
    """Run Python with each of *commands*; give a function that returns what one has printed."""
    running: list[subprocess.Popen[bytes]] = []
    environment = {**os.environ, "DATABASE_URL": dsn, "PYTHONWARNINGS": "always"}
    try:
        for name, command in commands.items():
            with (directory / f"{name}.log").open("wb") as log:
                running.append(
                    subprocess.Popen(
                        [sys.executable, *command],
                        cwd=directory,
                        stdout=log,
                        stderr=log,
                        start_new_session=True,
                        env=environment,
                    )
                )
        yield lambda name: (directory / f"{name}.log").read_text(errors="replace")
    finally:
        for process in running:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def test_what_has_started_the_workers_says_how_many_there_are(small: str, tmp_path: Path) -> None:
    """Each of the two warns."""
    (tmp_path / "app.py").write_text(APP)
    with started(tmp_path, small, SERVERS) as output:
        for server in SERVERS:
            said = f"max_size=5 in each of 2 processes ({server}, workers) makes 10."
            assert eventually(lambda: output(server).count(said) == 2, 40), output(server)  # noqa: B023


def test_celery_says_how_many_there_are(small: str, tmp_path: Path) -> None:
    pytest.importorskip("celery")
    (tmp_path / "tasks.py").write_text(TASKS)
    command = ("-m", "celery", "-A", "tasks", "worker", "-c", "2", "-l", "WARNING")
    with started(tmp_path, small, {"celery": command}) as output:
        said = "max_size=5 in each of 2 processes (Celery, concurrency) makes 10."
        assert eventually(lambda: output("celery").count(said) == 2, 40), output("celery")
