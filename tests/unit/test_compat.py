"""
What poolkeeper stands on of psycopg_pool and psycopg, looked at on their own objects.

A test here fails when a release of psycopg or psycopg_pool takes something of it away, or gives
it another meaning; `_pool`, `_compat` and `_connection` then have to follow.
"""

from __future__ import annotations

import ast
import asyncio
import inspect
from collections import deque
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psycopg
import psycopg_pool
import pytest
from psycopg import AsyncConnection
from psycopg._connection_base import BaseConnection
from psycopg._preparing import Prepare, PrepareManager
from psycopg._queries import PostgresQuery
from psycopg.adapt import Transformer
from psycopg.rows import dict_row, scalar_row, tuple_row
from psycopg_pool import AsyncConnectionPool

import poolkeeper
from poolkeeper import BoundPool, _compat
from poolkeeper._counters import Counters
from poolkeeper._reporting import measures

# --- the one internal ------------------------------------------------------------------------


async def test_a_connection_knows_the_pool_that_it_is_checked_out_of(dsn: str) -> None:
    async with AsyncConnectionPool(dsn, min_size=1, open=False) as pool:
        conn = await pool.getconn()
        assert _compat.owner(conn) is pool
        await pool.putconn(conn)
        assert _compat.owner(conn) is None
        conn = await pool.getconn()
        _compat.set_owner(conn, None)
        with pytest.raises(ValueError, match="doesn't come from any pool"):
            await pool.putconn(conn)
        _compat.set_owner(conn, pool)
        await pool.putconn(conn)


async def test_a_connection_that_is_checked_out_goes_back_by_its_close(dsn: str) -> None:
    """Psycopg looks at the same attribute."""
    async with AsyncConnectionPool(dsn, min_size=1, close_returns=True, open=False) as pool:
        conn = await pool.getconn()
        await conn.close()
        assert not conn.closed
        conn = await pool.getconn()
        _compat.set_owner(conn, None)
        await conn.close()
        assert conn.closed
        _compat.set_owner(conn, pool)
        await pool.putconn(conn)


def test_no_other_module_touches_what_is_psycopg_pools_own() -> None:
    """But for the hot path, which marks a connection as checked out without a call."""
    ours = {name for name in vars(BoundPool) if name.startswith("_")}
    pool = AsyncConnectionPool(open=False)
    names = {*dir(AsyncConnectionPool), *vars(pool)} - ours - {"_pool", "_check", "_lock"}
    internal = {name for name in names if name.startswith("_") and not name.startswith("__")}
    package = Path(poolkeeper.__file__).parent
    for path in package.glob("_*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and node.attr in internal:
                assert isinstance(node.value, ast.Name), (path.name, node.attr)
                assert node.value.id in ("self", "cls"), (path.name, node.attr)


async def test_a_bound_pool_starts_none_of_psycopg_pools_workers(dsn: str) -> None:
    before = asyncio.all_tasks()
    async with poolkeeper.PoolManager(dsn, min_size=2, name="alone") as db:
        names = {task.get_name() for task in asyncio.all_tasks() - before}
        assert names == {"alone-keeper"}
        assert not {"_tasks", "_sched", "_lock"} & vars(db.pool).keys()


def test_the_statistics_have_the_keys_of_psycopg_pool() -> None:
    pool = AsyncConnectionPool(open=False)
    keys = {value for name, value in inspect.getmembers(type(pool)) if name.isupper()}
    told = measures(BoundPool("", open=False)._life).keys()
    assert told == pool.get_stats().keys()
    counters = Counters()
    counters.requests = counters.queued = 1
    counters.wait_seconds = counters.usage_seconds = 1.0
    assert counters.read().keys() <= keys
    source = "".join(path.read_text() for path in Path(poolkeeper.__file__).parent.glob("_*.py"))
    for node in ast.walk(ast.parse(source.replace("from __future__ import annotations", ""))):
        if (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute)
            and node.func.attr == "count"
            and isinstance(node.func.value, ast.Attribute)
            and node.func.value.attr == "counters"
        ):
            assert {
                leaf.value for leaf in ast.walk(node.args[0]) if isinstance(leaf, ast.Constant)
            } <= keys


# --- the classes that ours override ------------------------------------------------------------


def test_the_methods_that_we_override_have_the_signatures_we_know() -> None:
    def parameters(function: Any) -> list[str]:
        return list(inspect.signature(function).parameters)

    assert parameters(AsyncConnectionPool.open) == ["self", "wait", "timeout"]
    assert parameters(AsyncConnectionPool.wait) == ["self", "timeout"]
    assert parameters(AsyncConnectionPool.close) == ["self", "timeout"]
    assert parameters(AsyncConnectionPool.connection) == ["self", "timeout"]
    assert parameters(AsyncConnectionPool.getconn) == ["self", "timeout"]
    assert parameters(AsyncConnectionPool.putconn) == ["self", "conn"]
    assert parameters(AsyncConnectionPool.resize) == ["self", "min_size", "max_size"]
    assert parameters(AsyncConnection.wait)[:2] == ["self", "gen"]  # the rest is passed on
    assert parameters(AsyncConnection.cancel_safe) == ["self", "timeout"]
    assert parameters(BaseConnection._notice_handler)[0] == "wself"
    assert parameters(BaseConnection._notify_handler)[0] == "wself"


def test_there_is_no_public_method_of_a_pool_that_we_have_not_looked_at() -> None:
    public = {name for name in vars(psycopg_pool.AsyncConnectionPool) if not name.startswith("_")}
    assert public == {
        "check", "check_connection", "close", "connection", "drain", "getconn", "open", "putconn",
        "reconnect_failed", "resize", "run_task", "schedule_task", "wait", "worker",
    }  # fmt: skip


async def test_a_connection_has_the_attributes_that_a_handle_is_made_of(dsn: str) -> None:
    """
    A handle is made from all the attributes of a connection, but for those of one checkout.

    So each one that is new has to be looked at: does it belong to the session or the checkout?
    """
    settings = {
        "_autocommit", "_deferrable", "_isolation_level", "_read_only", "_begin_statement",
        "row_factory", "cursor_factory", "server_cursor_factory", "_adapters",
    }  # fmt: skip
    of_the_session = {"pgconn", "_prepared", "_closed"}
    of_the_checkout = {
        "lock", "_notice_handlers", "_notify_handlers", "_notifies_backlog", "_num_transactions",
        "_tpc", "_pipeline",
    }  # fmt: skip
    async with await AsyncConnection.connect(dsn) as conn:
        assert set(vars(conn)) == settings | of_the_session | of_the_checkout
        # Those that need no clearing for the next checkout.
        assert (conn._num_transactions, conn._tpc, conn._pipeline) == (0, None, None)
        assert conn._prepared.prepare_threshold == 5
        assert conn._prepared.prepared_max == 100
        assert isinstance(conn._notifies_backlog, deque)
        assert type(conn.lock) is asyncio.Lock


def test_a_handle_can_be_turned_into_one_that_refuses() -> None:
    """By assignment to ``__class__``, which ``__slots__`` would forbid."""
    assert not any("__slots__" in vars(cls) for cls in (BaseConnection, AsyncConnection))


# --- what one-shots use of psycopg's cursors -----------------------------------------------------


def test_a_query_is_converted_and_prepared_by_what_we_know() -> None:
    def parameters(function: Any) -> list[str]:
        return list(inspect.signature(function).parameters)

    assert parameters(PostgresQuery) == ["transformer"]
    assert parameters(PostgresQuery.convert) == ["self", "query", "vars"]
    assert {"query", "params", "types", "formats"} <= set(PostgresQuery.__slots__)
    assert parameters(PrepareManager.key) == ["query"]
    assert parameters(PrepareManager.get) == ["self", "query", "prepare"]
    assert parameters(PrepareManager.maybe_add_to_cache) == ["self", "query", "prep", "name"]
    assert parameters(PrepareManager.validate) == ["self", "key", "prep", "name", "results"]
    manager = PrepareManager()
    assert isinstance(manager._to_flush, deque)
    assert (manager._names, manager._to_flush) == ({}, deque())
    assert [one.name for one in Prepare] == ["NO", "YES", "SHOULD"]


async def test_an_answer_becomes_rows_by_what_we_know(dsn: str) -> None:
    """As a cursor does it: the same attributes, set in the same places."""
    async with await AsyncConnection.connect(dsn, autocommit=True) as conn:
        cursor: Any = await conn.execute("select 1, 'x'")
        assert isinstance(cursor._query, PostgresQuery)
        assert cursor._last_query == "select 1, 'x'"
        context: Any = SimpleNamespace(adapters=conn._adapters, connection=conn)
        transformer = Transformer(context)
        transformer.set_pgresult(cursor.pgresult)
        assert transformer.load_row(0, tuple) == (1, "x")
        assert transformer.load_rows(0, 1, tuple) == [(1, "x")]
        other: Any = conn.cursor(row_factory=dict_row)
        other._tx = transformer
        other._check_results([cursor.pgresult])
        other._set_results([cursor.pgresult])
        assert other._tx.load_row(0, other._make_row) == {"?column?": "x"}
        assert scalar_row(cursor)([7, 8]) == 7
        assert tuple_row(cursor) is tuple
        assert psycopg.capabilities.has_pipeline()
        assert isinstance(psycopg.capabilities.has_send_close_prepared(), bool)


def test_these_are_the_versions_that_we_support() -> None:
    def numbers(version: str) -> tuple[int, ...]:
        return tuple(int(number) for number in version.split(".")[:2])

    assert numbers(psycopg.__version__) >= (3, 3)
    assert numbers(psycopg_pool.__version__) >= (3, 3)
