"""Who holds a connection is the line that asked for it, also when a task of its own acquires."""

from __future__ import annotations

import ast
import asyncio
import inspect
import sys
from collections.abc import Callable, Coroutine
from pathlib import Path
from types import FunctionType
from typing import Any
from unittest.mock import AsyncMock, create_autospec

import pytest
from psycopg_pool import AsyncConnectionPool

from poolkeeper import AcquireTimeout, BoundPool, PoolManager
from tests.support.waiting import until

HERE = "tests/integration/test_call_sites.py"

Call = Callable[[PoolManager[Any]], Coroutine[Any, Any, Any]]

CALLS: dict[str, Call] = {
    "execute": lambda db: db.execute("select pg_sleep(0.5)"),
    "fetchone": lambda db: db.fetchone("select pg_sleep(0.5)"),
    "fetchall": lambda db: db.fetchall("select pg_sleep(0.5)"),
    "fetchval": lambda db: db.fetchval("select pg_sleep(0.5)"),
    "getconn": lambda db: db.pool.getconn(),
}


def line_of(call: Call) -> str:
    return f"{HERE}:{call.__code__.co_firstlineno}"


async def holder(db: PoolManager[Any]) -> str:
    """Return where the connection in use was acquired, once there is one."""
    async with asyncio.timeout(10):
        while not db.snapshot().checkouts:
            await asyncio.sleep(0.001)
    (row,) = db.snapshot().checkouts
    return row.site


async def give_back(db: PoolManager[Any], result: Any) -> None:
    if db.snapshot().checkouts:
        await db.pool.putconn(result)


@pytest.mark.parametrize("name", CALLS)
async def test_the_holder_is_the_line_that_awaits(db: PoolManager[Any], name: str) -> None:
    call = CALLS[name]

    async def work() -> Any:
        return await call(db)

    task = asyncio.create_task(work())
    assert await holder(db) == line_of(call)
    await give_back(db, await task)


@pytest.mark.parametrize("name", CALLS)
async def test_the_holder_is_the_line_that_makes_a_task_of_it(
    db: PoolManager[Any], name: str
) -> None:
    call = CALLS[name]
    task = asyncio.create_task(call(db))
    assert await holder(db) == line_of(call)
    await give_back(db, await task)


@pytest.mark.parametrize("name", CALLS)
async def test_the_holder_is_the_line_that_gathers(db: PoolManager[Any], name: str) -> None:
    call = CALLS[name]
    together = asyncio.gather(call(db))
    assert await holder(db) == line_of(call)
    await give_back(db, *await together)


async def test_the_line_is_that_of_the_call_and_not_where_its_code_is_by_now(
    db: PoolManager[Any],
) -> None:
    coroutine = db.pool.getconn()
    line = inspect.currentframe().f_lineno - 1  # type: ignore[union-attr]
    task = asyncio.create_task(coroutine)
    conn = await task
    assert await holder(db) == f"{HERE}:{line}"
    await db.pool.putconn(conn)


async def test_one_who_waits_is_the_line_that_asked_too(db: PoolManager[Any]) -> None:
    conns = [await db.pool.getconn() for _ in range(4)]
    call = CALLS["fetchval"]
    task = asyncio.create_task(call(db))
    await asyncio.sleep(0)
    (row,) = db.snapshot().waiters
    assert row.site == line_of(call)
    for conn in conns:
        await db.pool.putconn(conn)
    await task


async def test_a_call_that_nobody_awaits_is_told_at_once(db: PoolManager[Any]) -> None:
    for name, call in CALLS.items():
        with pytest.warns(RuntimeWarning, match=f"{name}.* was never awaited"):
            call(db)
    assert db.snapshot().in_use == 0


# --- what asks whether to await -------------------------------------------------------------------


@pytest.mark.parametrize(
    "function",
    [
        *(getattr(PoolManager, name) for name in ("execute", "fetchone", "fetchall", "fetchval")),
        BoundPool.getconn,
    ],
)
def test_what_returns_a_coroutine_is_a_coroutine_function(function: Any) -> None:
    """So that frameworks await it, and mocks of it can be awaited."""
    assert inspect.iscoroutinefunction(function)


async def test_every_public_method_that_is_async_in_psycopg_pool_is_so_here(
    db: PoolManager[Any],
) -> None:
    for name, method in inspect.getmembers(AsyncConnectionPool, inspect.iscoroutinefunction):
        assert inspect.iscoroutinefunction(getattr(db.pool, name)), name
        assert inspect.iscoroutinefunction(method)


async def test_mocks_can_be_awaited() -> None:
    pool = create_autospec(BoundPool, instance=True)
    await pool.getconn()
    manager = AsyncMock(spec=PoolManager)
    manager.fetchval.return_value = 42
    assert await manager.fetchval("select 1") == 42


async def test_a_method_that_is_traced_still_runs_when_it_is_called(db: PoolManager[Any]) -> None:
    """Debuggers, profilers and coverage look at the code of what is called."""
    calls: list[str] = []
    tracing = sys.gettrace()

    def trace(frame: Any, event: str, _argument: Any) -> Any:
        if event == "call":
            calls.append(frame.f_code.co_name)
        return trace

    sys.settrace(trace)
    try:
        coroutine = db.fetchval("select 42")
    finally:
        sys.settrace(tracing)
    assert "fetchval" in calls
    assert await coroutine == 42


# --- decorators -----------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["pool", "manager"])
async def test_connection_decorates_a_function_which_has_a_block_around_each_call(
    db: PoolManager[Any], how: str
) -> None:
    go_on = asyncio.Event()

    @(db.pool if how == "pool" else db).connection()
    async def work(number: int) -> int:
        await go_on.wait()
        return number + 1

    assert inspect.iscoroutinefunction(work)
    assert work.__name__ == "work"
    tasks = [asyncio.create_task(work(number)) for number in range(3)]
    async with asyncio.timeout(10):
        while db.snapshot().in_use < 3:
            await asyncio.sleep(0.001)
    sites = {row.site for row in db.snapshot().checkouts}
    assert sites == {f"{HERE}:{inspect.unwrap(work).__code__.co_firstlineno + 1}"}
    go_on.set()
    assert await asyncio.gather(*tasks) == [1, 2, 3]
    assert await work(6) == 7
    assert db.snapshot().in_use == 0


@pytest.mark.parametrize("how", ["transaction", "cursor"])
async def test_blocks_of_other_kinds_decorate_too(db: PoolManager[Any], how: str) -> None:
    """As everything does that contextlib makes; two calls at once, and one after another."""
    go_on = asyncio.Event()

    @getattr(db, how)()
    async def work(number: int) -> int:
        await go_on.wait()
        return number + 1

    tasks = [asyncio.create_task(work(number)) for number in range(2)]
    async with asyncio.timeout(10):
        while db.snapshot().in_use < 2:
            await asyncio.sleep(0.001)
    line = inspect.unwrap(work).__code__.co_firstlineno + 1
    assert {row.asker for row in db.snapshot().checkouts} == {f"{HERE}:{line} in work"}
    go_on.set()
    assert await asyncio.gather(*tasks) == [1, 2]
    assert await work(6) == 7
    assert db.snapshot().in_use == 0


async def test_a_decorated_function_that_raises_rolls_back(db: PoolManager[Any]) -> None:
    @db.connection()
    async def work() -> None:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        await work()
    assert db.snapshot().in_use == 0


# --- who that is, and what it awaits now ----------------------------------------------------------


class Orders:
    """A program with methods and helpers."""

    def __init__(self, db: PoolManager[Any]) -> None:
        self.db = db
        self.go_on = asyncio.Event()

    async def report(self) -> None:
        async with self.db.connection():
            await self.fetch_rates()

    async def fetch_rates(self) -> None:
        await asyncio.gather(self.go_on.wait())

    async def nested(self) -> None:
        async with self.db.connection():
            await self.db.fetchval("select 1")


def lines_of(function: Any) -> range:
    lines, first = inspect.getsourcelines(function)
    return range(first, first + len(lines))


async def test_a_holder_has_the_name_of_its_function_and_the_line_that_it_awaits(
    db: PoolManager[Any],
) -> None:
    """The innermost line of the program's own: neither asyncio's, nor psycopg's, nor ours."""
    orders = Orders(db)
    task = asyncio.create_task(orders.report())
    await until(lambda: orders.go_on._waiters)
    (row,) = db.snapshot().checkouts
    assert row.asker == f"{row.site} in Orders.report"
    assert row.awaits == f"{HERE}:{lines_of(Orders.fetch_rates)[-1]} in Orders.fetch_rates"
    orders.go_on.set()
    await task


async def test_what_a_holder_awaits_may_be_a_query_or_one_more_connection(
    make_manager: Callable[..., PoolManager[Any]],
) -> None:
    db = make_manager(min_size=1, name="orders")
    await db.open()
    query = asyncio.create_task(db.fetchval("select pg_sleep(0.5)"))
    await until(lambda: db.snapshot().checkouts)
    assert db.snapshot().checkouts[0].awaits == ""  # nobody's line: the task is the query's own
    await query
    (error,) = await asyncio.gather(Orders(db).nested(), return_exceptions=True)
    assert isinstance(error, AcquireTimeout)
    last = lines_of(Orders.nested)[-1]
    assert f" at {HERE}:{last - 1} in Orders.nested, held" in str(error)
    assert f"idle, now at {HERE}:{last} in Orders.nested (server" in str(error)


async def test_one_who_waits_has_the_name_of_its_function_too(db: PoolManager[Any]) -> None:
    conns = [await db.pool.getconn() for _ in range(4)]
    orders = Orders(db)
    task = asyncio.create_task(orders.report())
    await asyncio.sleep(0)
    (row,) = db.snapshot().waiters
    assert row.asker == f"{HERE}:{lines_of(Orders.report)[1]} in Orders.report"
    for conn in conns:
        await db.pool.putconn(conn)
    orders.go_on.set()
    await task


async def test_who_takes_its_own_snapshot_runs_and_awaits_nothing(db: PoolManager[Any]) -> None:
    async with db.connection():
        assert [row.awaits for row in db.snapshot().checkouts] == [""]


async def test_a_block_of_a_module_is_in_no_function(db: PoolManager[Any]) -> None:
    source = "async with db.connection():\n    (row,) = db.snapshot().checkouts\n"
    code = compile(source, "console", "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
    scope: dict[str, Any] = {"db": db}
    await eval(code, scope)
    assert scope["row"].asker == "console:1"


def installed(function: Any) -> Any:
    """Return *function* as if it were a library's."""
    path = str(Path(asyncio.__file__).parents[1] / "site-packages" / "orm.py")
    code = function.__code__.replace(co_filename=path)
    return FunctionType(code, {**function.__globals__, "__name__": "orm"})


async def library_query(db: PoolManager[Any], go_on: asyncio.Event) -> None:
    async with db.connection():
        await go_on.wait()


async def library_acquire(db: PoolManager[Any]) -> Any:
    return await db.pool.getconn()


async def test_a_library_that_acquires_is_named_by_the_line_of_the_program_that_called_it(
    make_manager: Callable[..., PoolManager[Any]],
) -> None:
    db = make_manager(min_size=1, name="orders")
    await db.open()
    go_on = asyncio.Event()

    async def work() -> None:
        await installed(library_query)(db, go_on)

    tasks = [asyncio.create_task(work()) for _ in range(2)]
    await until(lambda: db.snapshot().waiting)
    asker = f"{HERE}:{lines_of(work)[-1]} in work"
    snapshot = db.snapshot()
    assert [row.asker for row in snapshot.checkouts] == [asker]
    assert [row.asker for row in snapshot.waiters] == [asker]
    go_on.set()
    await asyncio.gather(*tasks)


async def test_so_is_one_that_has_acquired_and_returned(db: PoolManager[Any]) -> None:
    go_on = asyncio.Event()

    async def work() -> Any:
        conn = await installed(library_acquire)(db)
        await go_on.wait()
        await db.pool.putconn(conn)

    task = asyncio.create_task(work())
    await until(lambda: db.snapshot().in_use)
    (row,) = db.snapshot().checkouts
    assert row.asker == f"{HERE}:{lines_of(work)[-2]} in work"
    go_on.set()
    await task
