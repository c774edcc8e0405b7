"""Who acquires on somebody's behalf says whose line the ledger and the diagnosis name."""

from __future__ import annotations

import asyncio
import functools
import inspect
import sys
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from types import FrameType
from typing import Any
from unittest.mock import AsyncMock, Mock

import pytest

from poolkeeper import AcquireTimeout, ClosedError, ConfigError, PoolManager

HERE = "tests/integration/test_caller.py"


def here() -> str:
    """Return the line that calls this."""
    return f"{HERE}:{sys._getframe(1).f_lineno}"


# --- what a connection can be acquired for ------------------------------------------------------


async def endpoint() -> None: ...


def decorated(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def wrapper(*args: Any) -> Any: ...

    return wrapper


class Orders:
    async def show(self) -> None: ...

    @staticmethod
    async def count() -> None: ...

    @classmethod
    async def every(cls) -> None: ...

    async def __call__(self) -> None: ...


class View:
    """An endpoint that is a class."""

    name = "view"
    decoy = decorated
    itself: type[View]
    around_itself: Callable[..., Any]

    @decorated
    async def get(self) -> None: ...

    async def post(self) -> None: ...


View.itself = View
View.around_itself = decorated(View)


def _line(method: Any) -> int:
    """The line of its ``def``: who thinks of a function does not think of its decorators."""
    lines, first = inspect.getsourcelines(method)
    return first + next(n for n, line in enumerate(lines) if "def " in line)


FUNCTIONS: dict[str, tuple[Callable[..., Any], int]] = {
    "function": (endpoint, _line(endpoint)),
    "wrapped function": (decorated(endpoint), _line(endpoint)),
    "function wrapped twice": (decorated(decorated(endpoint)), _line(endpoint)),
    "function with a cache": (functools.lru_cache(endpoint), _line(endpoint)),
    "partial": (functools.partial(endpoint), _line(endpoint)),
    "partial of a wrapped function": (functools.partial(decorated(endpoint), 1), _line(endpoint)),
    "method": (Orders().show, _line(Orders.show)),
    "partial of a method": (functools.partial(Orders().show), _line(Orders.show)),
    "static method": (Orders.count, _line(Orders.count)),
    "class method": (Orders.every, _line(Orders.every)),
    "object that can be called": (Orders(), _line(Orders.__call__)),
    "class": (View, _line(inspect.unwrap(View.get))),
}


class Empty:
    """A class without a body to point at."""


class Round:
    """Wraps itself."""

    def __init__(self) -> None:
        self.__wrapped__ = self

    def __call__(self) -> None: ...


NO_PYTHON: dict[str, Callable[..., Any]] = {
    "builtin": len,
    "class in C": dict,
    "method in C": [].append,
    "class without a function": Empty,
    "wrapper of itself": Round(),
}


def acquired(db: PoolManager[Any]) -> str:
    """Return the line of the one connection in use."""
    (row,) = db.snapshot().checkouts
    return row.site


@pytest.mark.parametrize("kind", FUNCTIONS)
async def test_the_holder_is_the_function_that_the_connection_is_for(
    db: PoolManager[Any], kind: str
) -> None:
    function, line = FUNCTIONS[kind]
    async with db.connection(caller=function):
        assert acquired(db) == f"{HERE}:{line}"


@pytest.mark.parametrize("kind", NO_PYTHON)
async def test_for_what_is_not_written_in_python_it_is_the_line_that_calls(
    db: PoolManager[Any], kind: str
) -> None:
    async with db.connection(caller=NO_PYTHON[kind]):
        assert acquired(db) == f"{HERE}:{sys._getframe().f_lineno - 1}"


@pytest.mark.parametrize("mock", [Mock(), AsyncMock()])
async def test_a_mock_of_a_function_does_no_harm(db: PoolManager[Any], mock: Mock) -> None:
    async with db.connection(caller=mock):
        assert "mock" in acquired(db)


@asynccontextmanager
async def on_behalf(db: PoolManager[Any], caller: FrameType | None) -> AsyncGenerator[Any]:
    async with db.connection(caller=caller) as conn:
        yield conn


async def test_the_holder_is_the_line_of_the_frame(db: PoolManager[Any]) -> None:
    frame = inspect.currentframe()
    async with on_behalf(db, frame):
        assert acquired(db) == f"{HERE}:{sys._getframe().f_lineno - 1}"


async def test_the_line_of_a_frame_is_the_one_it_was_at_when_asked(db: PoolManager[Any]) -> None:
    block, line = db.connection(caller=sys._getframe()), here()
    async with block:
        assert acquired(db) == line


async def test_without_a_caller_it_is_the_line_that_calls(db: PoolManager[Any]) -> None:
    async with db.connection(caller=None):
        assert acquired(db) == f"{HERE}:{sys._getframe().f_lineno - 1}"


async def test_a_failed_acquire_names_holders_and_waiters_by_their_callers(
    db: PoolManager[Any],
) -> None:
    async def hold() -> None:
        async with db.connection(caller=endpoint):
            await asyncio.sleep(60)

    async def wait() -> None:
        async with db.connection(caller=Orders().show):
            pass

    tasks = [asyncio.create_task(hold()) for _ in range(4)]
    async with asyncio.timeout(10):
        while db.snapshot().in_use < 4:
            await asyncio.sleep(0.005)
    tasks.append(asyncio.create_task(wait()))
    await asyncio.sleep(0)
    assert [row.site for row in db.snapshot().waiters] == [f"{HERE}:{_line(Orders.show)}"]
    with pytest.raises(AcquireTimeout) as info:
        async with db.connection(0.05):
            pass
    assert f" at {HERE}:{_line(endpoint)} in endpoint, held " in str(info.value)
    assert {row.site for row in info.value.diagnosis.snapshot.checkouts} == {  # type: ignore[union-attr]
        f"{HERE}:{_line(endpoint)}"
    }
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)


def helper(db: PoolManager[Any]) -> Any:
    return db.connection(caller=sys._getframe(1))


async def test_the_stack_of_a_suspected_leak_begins_at_the_frame(make_manager: Any) -> None:
    db = make_manager(min_size=1, leak_threshold=30)
    await db.open()
    async with helper(db):
        (row,) = db.snapshot().checkouts
    assert row.site == f"{HERE}:{sys._getframe().f_lineno - 2}"
    assert "in helper" not in row.stack
    assert "async with helper(db):" in row.stack.splitlines()[-1]


async def test_the_stack_of_one_acquired_for_a_function_is_of_the_call(make_manager: Any) -> None:
    db = make_manager(min_size=1, leak_threshold=30)
    await db.open()
    async with db.connection(caller=endpoint):
        (row,) = db.snapshot().checkouts
    assert row.site == f"{HERE}:{_line(endpoint)}"
    assert "async with db.connection(caller=endpoint):" in row.stack.splitlines()[-1]


async def test_a_task_that_holds_and_waits_for_others_still_ends_in_a_self_deadlock(
    make_manager: Any,
) -> None:
    """The caller says where; who holds is still the task."""
    db = make_manager(min_size=1, timeout=5)
    await db.open()
    async with on_behalf(db, sys._getframe()):
        with pytest.raises(AcquireTimeout, match="every task that holds a connection waits"):
            await db.fetchval("select 1", timeout=0.2)


@pytest.mark.parametrize("caller", ["orders.py:7", 7, object()])
async def test_a_caller_that_is_none_is_refused(db: PoolManager[Any], caller: Any) -> None:
    with pytest.raises(ConfigError, match=r"^caller cannot be ") as info:
        db.connection(caller=caller)
    assert info.value.parameter == "caller"
    assert info.value.detail == "It takes a frame, a function or None."


# --- open() ---------------------------------------------------------------------------------------


async def test_who_opens_on_somebodys_behalf_says_whose_line_is_named(
    make_manager: Any,
) -> None:
    db = make_manager(min_size=1)
    await db.open(caller="app/main.py:31")
    assert str(db.pool.opened).startswith("at app/main.py:31 in task ")
    await db.close()
    with pytest.raises(ClosedError, match=r"Opened at app/main\.py:31 in task "):
        await db.fetchval("select 1")
    await db.open()
    assert str(db.pool.opened).startswith("at tests/integration/test_caller.py:")
