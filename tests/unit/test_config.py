"""What the constructor of `PoolManager` accepts, and that it does nothing but look."""

from __future__ import annotations

import asyncio
import inspect
import math
import os
import re
import socket
import threading
from functools import partial
from pathlib import Path
from typing import Any

import psycopg
import psycopg_pool
import pytest
from psycopg import AsyncConnection, IsolationLevel
from psycopg.rows import DictRow, dict_row

from poolkeeper import ConfigError, PoolManager, Portal
from poolkeeper.adapters.generic import lifespan
from poolkeeper.errors import see


async def callback(conn: Any) -> None: ...


class MyConn(AsyncConnection[DictRow]):
    """A user's own class."""


class TakesAnything(AsyncConnection[Any]):
    """A user's own class, with parameters of its own."""

    @classmethod
    async def connect(cls, conninfo: str = "", *, tenant: str = "", **kwargs: Any) -> Any:
        return await super().connect(conninfo, **kwargs)


SECONDS = [
    "timeout",
    "max_lifetime",
    "max_idle",
    "reconnect_timeout",
    "open_timeout",
    "close_timeout",
]


def named(value: object) -> str:
    """Return *value* in words that are the same in every run, without addresses."""
    return re.sub(r" at 0x[0-9a-f]+", "", repr(value))


BAD: list[tuple[str, Any]] = [
    *[(name, value) for name in SECONDS for value in (-1, -0.5, math.nan, "5", None, True, [1])],
    *[("leak_threshold", value) for value in (-1, -0.5, math.nan, "5", True, [1])],
    *[("expected_processes", value) for value in (0, -1, 1.0, "4", True)],
    *[("min_size", value) for value in (-1, 1.0, "4", None, True)],
    *[("max_size", value) for value in (-1, 0, 3, 4.0, "4", True)],
    *[("max_waiting", value) for value in (-1, 1.0, "4", None, False)],
    *[("num_workers", value) for value in (0, -1, 1.0, "4", None, True)],
    *[("open", value) for value in (True, 1, "yes")],
    *[("configure", value) for value in ("discard", 1, object())],
    *[("check", value) for value in ("discard", 1, True)],
    *[("reset", value) for value in ("drop", "DISCARD", 1, True)],
    *[("reconnect_failed", value) for value in ("give up", 1)],
    *[("name", value) for value in (1, b"orders", ["orders"])],
    *[("application_name", value) for value in (1, b"orders")],
    *[(name, value) for name in ("close_returns", "pipeline") for value in ("no", 1, None)],
    *[
        ("connection_class", value)
        for value in (psycopg.Connection, int, list[int], "AsyncConnection", 1, callback)
    ],
    *[
        ("kwargs", value)
        for value in (
            [("autocommit", True)],
            "autocommit=True",
            1,
            {"colour": "red"},
            {"autocomit": True},
            {"host": "h", "password": "x", "pasword": "y"},
            {"conninfo": "host=h"},
            {1: "x"},
            {"port": "five"},
        )
    ],
    *[("conninfo", value) for value in (b"host=h", 1, None, ["host=h"], "colour=red", "=")],
]


@pytest.mark.parametrize(
    ("parameter", "value"), BAD, ids=lambda value: value if isinstance(value, str) else named(value)
)
def test_a_value_that_cannot_work_is_refused_by_name(parameter: str, value: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        PoolManager(**{parameter: value})
    error = caught.value
    assert error.parameter == parameter
    assert str(error).startswith(parameter)
    assert error.hint is not None
    assert error.hint.endswith(see("config"))


def test_every_parameter_is_in_the_table() -> None:
    parameters = set(inspect.signature(PoolManager).parameters)
    assert parameters == {name for name, _ in BAD}


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (
            {"max_size": 3},
            "max_size cannot be 3\nDETAIL:  It takes min_size or more, and min_size is 4.",
        ),
        (
            {"min_size": 0, "max_size": 0},
            "max_size cannot be 0\nDETAIL:  It takes a whole number, 1 or more.",
        ),
        (
            {"min_size": 0},
            "max_size cannot be 0\nDETAIL:  It takes a whole number, 1 or more.",
        ),
        (
            {"timeout": -1},
            "timeout cannot be -1\nDETAIL:  It takes a number of seconds, not negative.",
        ),
        (
            {"open": True},
            "open cannot be True\nDETAIL:  It takes None or False:"
            " open it with await manager.open().",
        ),
        (
            {"reset": "drop"},
            "reset cannot be 'drop'\nDETAIL:  It takes an async function that is called with one"
            " argument.",
        ),
        ({"name": 1}, "name cannot be 1\nDETAIL:  It takes a string or None."),
        ({"close_returns": 1}, "close_returns cannot be 1\nDETAIL:  It takes True or False."),
        (
            {"connection_class": int},
            "connection_class cannot be <class 'int'>\nDETAIL:  It takes AsyncConnection or a"
            " subclass of it.",
        ),
        (
            {"kwargs": {"colour": "red"}},
            "kwargs cannot hold 'colour'\nDETAIL:  It takes parameters of connect().",
        ),
        (
            {"kwargs": ["x"]},
            "kwargs cannot be <class 'list'>\nDETAIL:  It takes a dict, a function that returns"
            " one, or None.",
        ),
        (
            {"conninfo": b"host=h"},
            "conninfo cannot be <class 'bytes'>\nDETAIL:  It takes a string or a function that"
            " returns one.",
        ),
    ],
)
def test_the_error_says_what_would_work(arguments: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        PoolManager(**arguments)
    assert str(caught.value) == f"{text}\nHINT:  {see('config')}"


def test_no_conninfo_is_probably_a_variable_that_is_not_set(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("DATABASE_URL", raising=False)
    conninfo: Any = os.environ.get("DATABASE_URL")
    with pytest.raises(ConfigError) as caught:
        PoolManager(conninfo)
    assert caught.value.args == ("conninfo cannot be None",)
    assert "Probably an environment variable that is not set" in str(caught.value)


def test_what_is_no_manager_is_refused_where_one_is_wanted_without_a_word_of_what_it_is() -> None:
    url: Any = "postgresql://me:sEcr3t@db/shop"
    for make in (Portal, lifespan):
        with pytest.raises(ConfigError) as caught:
            make(url)
        assert str(caught.value) == (
            "manager cannot be <class 'str'>\nDETAIL:  It takes a PoolManager, such as"
            f" PoolManager(conninfo).\nHINT:  {see('config')}"
        )


@pytest.mark.parametrize("name", ["row_factory", "autocommit", "prepare_threshold"])
def test_an_argument_of_connect_that_is_given_to_the_manager_says_where_it_belongs(
    name: str,
) -> None:
    arguments: dict[str, Any] = {name: None}
    with pytest.raises(ConfigError) as caught:
        PoolManager("", **arguments)
    assert caught.value.parameter == name
    assert str(caught.value).splitlines()[0] == f"{name} is no parameter of PoolManager"
    assert f'Write PoolManager(..., kwargs={{"{name}": ...}}).' in str(caught.value)


def test_a_subclass_may_take_it() -> None:
    class Rows(PoolManager[Any]):
        def __init__(self, row_factory: Any) -> None:
            super().__init__("", kwargs={"row_factory": row_factory})

    assert Rows(row_factory=dict_row).state == "new"


@pytest.mark.parametrize("where", ["conninfo", "kwargs"])
def test_no_value_that_may_hold_a_password_is_in_the_error(where: str) -> None:
    bad: Any = b"password=sEcr3t" if where == "conninfo" else ["password=sEcr3t"]
    with pytest.raises(ConfigError) as caught:
        PoolManager(**{where: bad})
    assert "sEcr3t" not in str(caught.value)
    with pytest.raises(ConfigError) as caught:
        PoolManager(kwargs={"pasword": "sEcr3t"})
    assert "sEcr3t" not in str(caught.value)
    assert "pasword" in str(caught.value)


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"conninfo": ""},
        {"conninfo": "postgresql+psycopg://u:p@h/db"},
        {"conninfo": lambda: "host=h"},
        {"conninfo": callback},
        {"kwargs": None},
        {"kwargs": {}},
        {"kwargs": {"autocommit": True, "row_factory": dict_row, "prepare_threshold": None}},
        {"kwargs": {"host": "h", "port": 5432, "connect_timeout": 5, "options": "-c x.y=1"}},
        {"kwargs": {"cursor_factory": psycopg.AsyncClientCursor, "context": None}},
        {"kwargs": lambda: {"autocommit": True}},
        {"connection_class": TakesAnything, "kwargs": {"tenant": "x"}},
        {"connection_class": None},
        {"connection_class": AsyncConnection},
        {"connection_class": AsyncConnection[DictRow]},
        {"connection_class": MyConn},
        {"min_size": 0, "max_size": 1},
        {"min_size": 1, "max_size": 1},
        {"min_size": 1, "max_size": None},
        {"open": False},
        {"open": None},
        {"configure": callback, "check": callback, "reset": callback},
        {"configure": partial(callback)},
        {"check": psycopg_pool.AsyncConnectionPool.check_connection},
        {"reset": "discard"},
        {"reconnect_failed": print},
        {"name": "orders"},
        {"name": None, "application_name": None},
        {"application_name": ""},
        {"expected_processes": None},
        {"expected_processes": 1},
        {"close_returns": True},
        {"max_waiting": 0},
        {"num_workers": 1},
        *[{name: 0} for name in SECONDS],
        *[{name: 2.5} for name in SECONDS],
        *[{name: math.inf} for name in SECONDS],
    ],
    ids=named,
)
def test_a_value_that_works_is_taken(arguments: dict[str, Any]) -> None:
    assert PoolManager(**arguments).state == "new"


def test_every_parameter_of_psycopg_pool_is_there_with_its_default() -> None:
    theirs = inspect.signature(psycopg_pool.AsyncConnectionPool).parameters
    ours = inspect.signature(PoolManager).parameters
    assert [name for name in theirs if name not in ours] == []
    other = {name for name in theirs if theirs[name].default != ours[name].default}
    # None stands for AsyncConnection, so that the default does not decide the type of the rows.
    assert other == {"connection_class"}
    assert PoolManager().pool.connection_class is theirs["connection_class"].default
    assert {name for name in theirs if theirs[name].kind != ours[name].kind} == set()


def test_parameters_reach_the_pool() -> None:
    manager = PoolManager(
        "postgresql+psycopg://h/db",
        kwargs={"autocommit": True},
        connection_class=MyConn,
        min_size=1,
        max_size=3,
        name="orders",
        close_returns=True,
        timeout=1.5,
        max_waiting=7,
        max_lifetime=60,
        max_idle=30,
        reconnect_timeout=20,
        num_workers=2,
    )
    pool = manager.pool
    assert manager.name == pool.name == "orders"
    assert isinstance(pool, psycopg_pool.AsyncConnectionPool)
    assert (pool.conninfo, pool.kwargs) == ("postgresql://h/db", {"autocommit": True})
    assert (pool.min_size, pool.max_size, pool.num_workers) == (1, 3, 2)
    assert (pool.timeout, pool.max_waiting, pool.close_returns) == (1.5, 7, True)
    assert (pool.max_lifetime, pool.max_idle, pool.reconnect_timeout) == (60, 30, 20)


def test_max_size_is_min_size_by_default() -> None:
    assert PoolManager(min_size=7).pool.max_size == 7
    assert PoolManager().pool.max_size == 4


def test_the_kwargs_of_the_caller_are_not_shared() -> None:
    kwargs = {"autocommit": True}
    manager = PoolManager(kwargs=kwargs)
    kwargs["autocommit"] = False
    assert manager.pool.kwargs == {"autocommit": True}


def test_managers_without_a_name_get_different_ones() -> None:
    assert PoolManager().name != PoolManager().name


def test_a_manager_reads_well() -> None:
    manager = PoolManager("postgresql://u:sEcr3t@h/db", name="orders", max_size=9)
    numbers = "total=0 in_use=0 idle=0 max=9 waiting=0"
    assert repr(manager) == f'<PoolManager "orders" new {numbers}>'
    assert repr(manager.pool) == f'<poolkeeper.BoundPool "orders" new {numbers}>'


def test_making_a_manager_touches_no_loop_no_socket_and_no_thread(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(RuntimeError):
        asyncio.get_running_loop()

    def forbidden(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("touched")

    def descriptors() -> set[str]:
        directory = Path("/dev/fd")
        return {path.name for path in directory.iterdir()} if directory.is_dir() else set()

    before = descriptors()
    threads = threading.active_count()
    with monkeypatch.context() as patch:
        for name in ("get_event_loop", "new_event_loop", "ensure_future", "create_task"):
            patch.setattr(asyncio, name, forbidden)
        patch.setattr(asyncio.Queue, "__init__", forbidden)
        patch.setattr(asyncio.Lock, "__init__", forbidden)
        patch.setattr(socket, "socket", forbidden)
        patch.setattr(socket, "getaddrinfo", forbidden)
        patch.setattr(threading.Thread, "start", forbidden)
        patch.setattr(psycopg.AsyncConnection, "connect", classmethod(forbidden))
        manager = PoolManager("postgresql://127.0.0.1/x", configure=callback, reset="discard")
        assert manager.state == "new"
        assert manager.pool.get_stats()["pool_available"] == 0
        assert manager.connection() is not None
        del manager
    assert threading.active_count() == threads
    assert descriptors() == before


def test_a_manager_that_was_never_opened_is_dropped_without_a_word(
    recwarn: pytest.WarningsRecorder,
) -> None:
    PoolManager()
    assert not recwarn.list


def test_a_manager_whose_construction_failed_is_dropped_without_a_word(
    recwarn: pytest.WarningsRecorder,
) -> None:
    with pytest.raises(ConfigError):
        PoolManager(min_size=-1)
    assert not recwarn.list


@pytest.mark.parametrize("isolation", ["paranoid", "", 99, "read-committed"])
def test_an_isolation_level_that_is_none_is_refused_before_a_connection_is_taken(
    isolation: Any,
) -> None:
    with pytest.raises(ConfigError) as caught:
        PoolManager().transaction(isolation=isolation)
    assert caught.value.parameter == "isolation"
    assert str(caught.value) == (
        f"isolation cannot be {isolation!r}\n"
        'DETAIL:  It takes one of "read uncommitted", "read committed", "repeatable read",'
        ' "serializable", or an IsolationLevel.\n'
        f"HINT:  {see('config')}"
    )


@pytest.mark.parametrize(
    "isolation",
    [None, "serializable", " Read Committed ", IsolationLevel.SERIALIZABLE, 4],
)
def test_an_isolation_level_is_taken_by_name_or_value(isolation: Any) -> None:
    PoolManager().transaction(isolation=isolation)
