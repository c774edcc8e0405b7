"""What a wrong loop is told depends on what the program runs in."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from asgiref.sync import async_to_sync

from poolkeeper import LoopMismatchError, PoolManager
from tests.support.programs import run_program

SETTINGS = ("asyncio_default_fixture_loop_scope", "asyncio_default_test_loop_scope")

SECOND_RUN = """
from poolkeeper import PoolManager

db = PoolManager(sys.argv[1], name="orders", min_size=1)
run(db.open())

async def use():
    try:
        await db.fetchval("select 1")
    except RuntimeError as error:
        print(error.hint)

run(use())
"""
"""A program that opens in one run and asks in another, and prints the hint."""


@contextmanager
def left_open(dsn: str) -> Iterator[PoolManager[Any]]:
    """A manager that a loop has opened that does not run any more."""
    db = PoolManager(dsn, name="orders", min_size=1)
    loop = asyncio.new_event_loop()
    loop.run_until_complete(db.open())
    yield db
    loop.run_until_complete(db.close())
    loop.close()


def hint_of(use: Callable[[], object]) -> str:
    with pytest.raises(LoopMismatchError) as caught:
        use()
    return str(caught.value.hint)


async def ask(db: PoolManager[Any]) -> Any:
    return await db.fetchval("select 1")


def test_under_pytest_both_settings_are_named(dsn: str) -> None:
    """Two loops that live in one thread: the owner is not running, or is closed."""
    with left_open(dsn) as db:
        hint = hint_of(lambda: asyncio.run(ask(db)))
        assert "the one that opened it does not run" in hint
    for setting in SETTINGS:
        assert setting in hint


def test_elsewhere_they_are_not(dsn: str) -> None:
    ended = run_program(SECOND_RUN, dsn)
    assert (ended.code, ended.err) == (0, "")
    assert ended.out.startswith("Every asyncio.run() makes a new loop")
    assert "pytest" not in ended.out


def test_under_wsgi_it_is_to_be_served_by_asgi(dsn: str) -> None:
    with left_open(dsn) as db:
        hint = hint_of(lambda: async_to_sync(ask)(db))
    assert "async_to_sync() runs this on a loop of its own" in hint
    assert "by ASGI" in hint
    assert SETTINGS[0] not in hint


CELERY = """
import celery
from poolkeeper import PoolManager

db = PoolManager(sys.argv[1], name="orders", min_size=1)
app = celery.Celery("shop", set_as_current=False)

async def use():
    async with db.connection():
        return 1

@app.task
def report():
    return run(use())

run(db.open())
ended = report.apply()  # as a worker runs it
print(type(ended.result).__name__, ended.result.hint)
try:
    run(use())
except RuntimeError as error:
    print("elsewhere:", error.hint)
"""


def test_in_a_celery_task_each_run_has_a_loop_of_its_own(dsn: str) -> None:
    """It is what calls that counts, not that it is loaded."""
    ended = run_program(CELERY, dsn)
    assert (ended.code, ended.err) == (0, "")
    inside, outside = ended.out.split("elsewhere:")
    assert inside.startswith("LoopMismatchError ")
    assert "In a Celery task each asyncio.run() makes a new loop" in inside
    assert "Celery" not in outside


def test_in_a_notebook_it_is_top_level_await(dsn: str) -> None:
    notebook = "import types\nsys.modules['ipykernel'] = types.ModuleType('ipykernel')\n"
    ended = run_program(notebook + SECOND_RUN, dsn)
    assert (ended.code, ended.err) == (0, "")
    assert "In a notebook a loop runs already: await at the top level of a cell" in ended.out


async def test_where_the_owner_runs_pytests_settings_are_of_no_use(db: PoolManager[Any]) -> None:
    hint = await asyncio.to_thread(lambda: hint_of(lambda: asyncio.run(ask(db))))
    assert SETTINGS[0] not in hint
    assert "asyncio.run_coroutine_threadsafe()" in hint
