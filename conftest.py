"""
Options and fixtures of the whole suite.

The server is that of poolkeeper's own plugin: ``--poolkeeper-server=embedded`` (default) starts
one out of a wheel, ``--poolkeeper-server=container`` one in Docker, anything else is the DSN of a
server of yours whose user may create databases and roles.
Tests marked ``fault`` always use embedded servers of their own: they stop and reconfigure them.
"""

from __future__ import annotations

import asyncio
import gc
import os
import signal
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import psycopg
import pytest
from psycopg import sql

from poolkeeper import PoolManager
from poolkeeper._embedded import EmbeddedServer
from tests.support.embedded import OwnServer
from tests.support.pooler import MODES, PGBOUNCER, pgbouncer
from tests.support.proxy import FaultProxy
from tests.support.redis import REDIS
from tests.support.server import admin, empty, make_roles

pytest_plugins = ["pytest_poolkeeper"]


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("poolkeeper")
    group.addoption("--loop", default="asyncio", choices=["asyncio", "uvloop"])
    group.addoption(
        "--pooler", choices=MODES, help="put a PgBouncer of that mode in front of the server"
    )
    group.addoption(
        "--servers",
        default="most",
        choices=["all", "most", "few"],
        help="web servers to run examples on: with most, each failed start but once",
    )


def pytest_configure(config: pytest.Config) -> None:
    # A shell starts what it runs in the background with SIGINT ignored, and whatever that starts
    # ignores it too: also the programs that tests interrupt.
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_finish(session: pytest.Session) -> None:
    # What every test module has imported stays for good: a test that collects garbage, as many do
    # and Python itself does, need not look through it each time.
    gc.collect()
    gc.freeze()
    # Django has read it. A worker of Celery that a test starts would think that it is its own.
    os.environ.pop("DJANGO_SETTINGS_MODULE", None)


def pytest_asyncio_loop_factories(config: pytest.Config, item: pytest.Item) -> dict[str, Any]:
    if config.getoption("--loop") == "uvloop":
        import uvloop

        return {"uvloop": uvloop.new_event_loop}
    return {"asyncio": asyncio.SelectorEventLoop}


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--pooler") is None:
        return
    direct = ("direct", "fault", "served")
    left_out = [item for item in items if any(map(item.get_closest_marker, direct))]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in left_out]


def pytest_report_header(config: pytest.Config) -> str:
    debug = "on" if os.environ.get("PYTHONASYNCIODEBUG") else "off"
    return (
        f"poolkeeper: postgres={_server(config)}, loop={config.getoption('--loop')},"
        f" asyncio debug {debug}, pgbouncer={PGBOUNCER or 'not installed: its tests are left out'},"
        f" redis={REDIS or 'not installed: those of workers are left out'}"
    )


def _server(config: pytest.Config) -> str:
    chosen = config.getoption("--poolkeeper-server") or "embedded"
    return chosen if chosen in ("embedded", "container") else "dsn"


@pytest.fixture(scope="session")
def loop_name(pytestconfig: pytest.Config) -> str:
    """Which loop the suite runs on; programs that tests start use the same."""
    return str(pytestconfig.getoption("--loop"))


@pytest.fixture(scope="session")
def dsn(server_dsn: str, pytestconfig: pytest.Config) -> Iterator[str]:
    """What tests share, and connect to: the server, or the pooler in front of it."""
    if (mode := pytestconfig.getoption("--pooler")) is None:
        yield server_dsn
    else:
        with pgbouncer(server_dsn, mode, default_pool_size=20) as through:
            yield through


@pytest.fixture(scope="session")
def server_dsn(poolkeeper_dsn: str) -> str:
    """A server that tests share: no test stops it, or leaves anything in it."""
    return poolkeeper_dsn


@pytest.fixture(scope="session")
def _database(server_dsn: str) -> Iterator[str]:
    """The name of a database for one test after the other: to make one takes its time."""
    name = f"test_{os.getpid()}"
    with psycopg.connect(server_dsn, autocommit=True) as conn:
        conn.execute(sql.SQL("create database {}").format(sql.Identifier(name)))
    yield name
    with psycopg.connect(server_dsn, autocommit=True) as conn:
        conn.execute(sql.SQL("drop database {} with (force)").format(sql.Identifier(name)))


@pytest.fixture
def database(dsn: str, server_dsn: str, _database: str) -> Iterator[str]:
    """The DSN of a database of the test's own, which is empty."""
    yield psycopg.conninfo.make_conninfo(dsn, dbname=_database)
    empty(psycopg.conninfo.make_conninfo(server_dsn, dbname=_database))


@pytest.fixture(scope="session")
def scram_server() -> Iterator[EmbeddedServer]:
    """A server that asks for a password: role ``app``, password ``s3cret-pw``; 12 connections."""
    server = OwnServer(
        {"max_connections": 12},
        hba=[
            "host all postgres 127.0.0.1/32 trust",
            "host all all 127.0.0.1/32 scram-sha-256",
        ],
    )
    with server:
        make_roles(server)
        yield server


@pytest.fixture
def own_server() -> Iterator[EmbeddedServer]:
    """A server of the test's own, running, that it may stop and restart."""
    with OwnServer({"max_connections": 50}) as server:
        yield server


@pytest.fixture
async def proxy(dsn: str) -> AsyncIterator[FaultProxy]:
    """A proxy in front of the shared server that can refuse, stall and cut."""
    async with FaultProxy(dsn) as proxy:
        yield proxy


@pytest.fixture
async def make_manager(dsn: str) -> AsyncIterator[Callable[..., PoolManager]]:
    """A function that makes managers on the shared server; they are closed after the test."""
    made: list[PoolManager[Any]] = []

    def make(conninfo: Any = None, **arguments: Any) -> PoolManager[Any]:
        manager = PoolManager(dsn if conninfo is None else conninfo, **arguments)
        made.append(manager)
        return manager

    yield make
    for manager in made:
        await manager.close(timeout=0)


@pytest.fixture
async def db(make_manager: Callable[..., PoolManager]) -> PoolManager:
    """An open manager: two connections, at most four."""
    manager = make_manager(min_size=2, max_size=4, name="orders", timeout=5)
    await manager.open()
    return manager


@pytest.fixture(autouse=True)
async def nothing_left_behind() -> AsyncIterator[None]:
    """Fail a test that leaves a task of ours running on its loop."""
    yield
    await asyncio.sleep(0)
    ours = [
        task
        for task in asyncio.all_tasks()
        if task.get_name().endswith(("-release", "-scheduler")) or "-worker-" in task.get_name()
    ]
    assert not ours, f"tasks left behind: {ours}"


@pytest.fixture
def server_sessions(dsn: str) -> Callable[[str], int]:
    """A function that counts the server's sessions of one application name."""

    def count(application_name: str) -> int:
        rows = admin(
            dsn,
            "select count(*) from pg_stat_activity where application_name = %s",
            (application_name,),
        )
        return int(rows[0][0])

    return count
