"""The lifespan for whatever takes one, and how it goes together with others."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import psycopg
import pytest

from poolkeeper import ClosedError, LoopMismatchError, OpenError, PoolManager
from poolkeeper.adapters.generic import KEY, lifespan

from .conformance import ADAPTERS

APP = object()
"""Whatever the framework calls a lifespan with."""


@pytest.fixture
def db(make_manager: Callable[..., PoolManager[Any]]) -> PoolManager[Any]:
    return make_manager(min_size=1, max_size=2, name="orders")


# --- one manager ------------------------------------------------------------------------------


async def test_the_pool_is_open_inside_and_closed_afterwards(db: PoolManager[Any]) -> None:
    async with lifespan(db)(APP) as state:
        assert state == {KEY: db}
        assert await db.fetchval("select 1") == 1
    assert db.state == "closed"


async def test_making_one_touches_nothing(db: PoolManager[Any]) -> None:
    lifespan(db)(APP)
    assert db.state == "new"


async def test_several_times_in_a_row_with_one_manager(db: PoolManager[Any]) -> None:
    span = lifespan(db)
    for _ in range(3):
        async with span(APP):
            assert await db.fetchval("select 1") == 1
        assert db.state == "closed"


def test_several_times_in_a_row_on_loops_of_their_own(database: str) -> None:
    db = PoolManager(database, min_size=1, name="orders")
    span = lifespan(db)

    async def main() -> None:
        async with span(APP):
            assert await db.fetchval("select 1") == 1

    for _ in range(3):
        asyncio.run(main())
        assert db.state == "closed"


def test_after_a_loop_that_was_closed_with_the_pool_open(database: str) -> None:
    """The next one opens it anew, and closes what it has opened."""
    db = PoolManager(database, min_size=1, name="orders")
    span = lifespan(db)
    loop = asyncio.new_event_loop()
    abandoned = span(APP)
    loop.run_until_complete(abandoned.__aenter__())
    loop.close()
    assert db.state == "closed"

    async def main() -> None:
        async with span(APP):
            assert await db.fetchval("select 1") == 1
        assert db.state == "closed"
        async with db:  # by hand, while the abandoned one is still about
            async with span(APP):
                pass
            assert db.state == "open"

    asyncio.run(main())
    assert db.state == "closed"


async def test_an_error_inside_closes_the_pool_and_is_passed_on(db: PoolManager[Any]) -> None:
    with pytest.raises(LookupError):
        async with lifespan(db)(APP):
            raise LookupError
    assert db.state == "closed"


async def test_cancelled_inside_it_closes_the_pool(db: PoolManager[Any]) -> None:
    inside = asyncio.Event()

    async def serve() -> None:
        async with lifespan(db)(APP):
            inside.set()
            await asyncio.sleep(60)

    serving = asyncio.create_task(serve())
    await inside.wait()
    serving.cancel()
    await asyncio.wait([serving])
    assert serving.cancelled()
    assert db.state == "closed"


async def test_a_pool_that_cannot_be_opened_says_why(database: str) -> None:
    conninfo = psycopg.conninfo.make_conninfo(database, user="nobody_there")
    db = PoolManager(conninfo, min_size=1, name="orders")

    @asynccontextmanager
    async def never(app: object) -> AsyncIterator[None]:
        raise AssertionError("the pool is not open")
        yield

    with pytest.raises(OpenError, match='role "nobody_there" does not exist'):
        async with lifespan(db, never)(APP):
            pass
    assert db.state == "closed"
    # What failed counts for nothing: who opens it now closes it.
    with pytest.raises(OpenError):
        await db.open()


async def test_after_one_that_failed_a_pool_opened_by_hand_is_left_open(
    dsn: str, database: str
) -> None:
    role = "nobody_there"
    db = PoolManager(
        lambda: psycopg.conninfo.make_conninfo(database, user=role), min_size=1, name="orders"
    )
    with pytest.raises(OpenError):
        async with lifespan(db)(APP):
            pass
    role = psycopg.conninfo.conninfo_to_dict(dsn)["user"]  # type: ignore[assignment]
    async with db:
        async with lifespan(db)(APP):
            pass
        assert db.state == "open"


# --- a lifespan of the user's own ---------------------------------------------------------------


async def test_the_inner_lifespan_has_the_pool_at_both_ends_and_its_state_is_kept(
    db: PoolManager[Any],
) -> None:
    seen: list[object] = []

    @asynccontextmanager
    async def own(app: object) -> AsyncIterator[dict[str, int]]:
        seen.append(app)
        seen.append(await db.fetchval("select 'up'"))
        yield {"mine": 1}
        seen.append(await db.fetchval("select 'down'"))

    async with lifespan(db, own)(APP) as state:
        assert state == {"mine": 1, KEY: db}
        seen.append("serving")
    assert seen == [APP, "up", "serving", "down"]
    assert db.state == "closed"


async def test_an_inner_lifespan_that_fails_on_the_way_up_closes_the_pool(
    db: PoolManager[Any],
) -> None:
    @asynccontextmanager
    async def own(app: object) -> AsyncIterator[None]:
        raise LookupError("no migrations")
        yield

    with pytest.raises(LookupError, match="no migrations"):
        async with lifespan(db, own)(APP):
            pass
    assert db.state == "closed"


async def test_an_inner_lifespan_that_fails_on_the_way_down_closes_the_pool(
    db: PoolManager[Any],
) -> None:
    @asynccontextmanager
    async def own(app: object) -> AsyncIterator[None]:
        yield
        raise LookupError("no farewell")

    with pytest.raises(LookupError, match="no farewell"):
        async with lifespan(db, own)(APP):
            pass
    assert db.state == "closed"


async def test_the_inner_lifespan_is_told_of_an_error_inside(db: PoolManager[Any]) -> None:
    told: list[BaseException] = []

    @asynccontextmanager
    async def own(app: object) -> AsyncIterator[None]:
        try:
            yield
        except LookupError as ex:
            told.append(ex)
            raise

    with pytest.raises(LookupError):
        async with lifespan(db, own)(APP):
            raise LookupError
    assert len(told) == 1


# --- several managers ---------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::poolkeeper.errors.DuplicatePoolWarning")
async def test_several_managers_open_in_order_and_close_in_the_other(
    db: PoolManager[Any], make_manager: Callable[..., PoolManager[Any]]
) -> None:
    reports = make_manager(min_size=1, name="reports")
    seen: list[str] = []

    @asynccontextmanager
    async def between(app: object) -> AsyncIterator[None]:
        seen.append(f"{db.state} {reports.state}")
        yield
        seen.append(f"{db.state} {reports.state}")

    both = lifespan(db, lifespan(reports, between, key="reports"))
    async with both(APP) as state:
        assert state == {KEY: db, "reports": reports}
    assert seen == ["open open", "open open"]
    assert (db.state, reports.state) == ("closed", "closed")


async def test_a_second_manager_that_cannot_be_opened_closes_the_first(
    db: PoolManager[Any], database: str
) -> None:
    conninfo = psycopg.conninfo.make_conninfo(database, user="nobody_there")
    reports = PoolManager(conninfo, min_size=1, name="reports")
    with pytest.raises(OpenError, match="reports"):
        async with lifespan(db, lifespan(reports, key="reports"))(APP):
            pass
    assert (db.state, reports.state) == ("closed", "closed")


# --- a manager that somebody else has opened, or will ---------------------------------------------


async def test_a_manager_that_is_open_already_is_left_open(db: PoolManager[Any]) -> None:
    async with db:
        async with lifespan(db)(APP) as state:
            assert state == {KEY: db}
        assert await db.fetchval("select 1") == 1
    assert db.state == "closed"


async def test_of_several_that_share_it_the_last_one_closes_it(db: PoolManager[Any]) -> None:
    """Whoever comes first; sessions of an MCP server, or two applications on one loop."""
    span = lifespan(db)
    first, second, third = span(APP), span(APP), span(APP)
    await first.__aenter__()
    await second.__aenter__()
    await first.__aexit__(None, None, None)
    await third.__aenter__()
    await second.__aexit__(None, None, None)
    assert await db.fetchval("select 1") == 1
    await third.__aexit__(None, None, None)
    assert db.state == "closed"


async def test_several_that_start_at_once_share_it(db: PoolManager[Any]) -> None:
    left = asyncio.Event()

    async def serve(number: int) -> None:
        async with lifespan(db)(APP):
            if number:
                await left.wait()
            assert await db.fetchval("select 1") == 1
        left.set()

    await asyncio.gather(*(serve(number) for number in range(3)))
    assert db.state == "closed"


async def test_one_that_is_cancelled_while_it_starts_leaves_it_to_the_others(
    proxy: Any,
) -> None:
    db = PoolManager(proxy.dsn, min_size=1, name="orders", open_timeout=20)
    proxy.refuse = True

    async def serve() -> None:
        async with lifespan(db)(APP):
            assert await db.fetchval("select 1") == 1

    first, second = (asyncio.create_task(serve()) for _ in range(2))
    while db.state != "opening":
        await asyncio.sleep(0.01)
    second.cancel()
    await asyncio.wait([second])
    proxy.refuse = False
    await first
    assert db.state == "closed"


async def test_closed_by_hand_meanwhile_it_ends_in_peace(db: PoolManager[Any]) -> None:
    async with lifespan(db)(APP):
        await db.close()
        with pytest.raises(ClosedError):
            await db.fetchval("select 1")
    assert db.state == "closed"


async def test_a_manager_of_another_loop_is_refused_and_left_alone(db: PoolManager[Any]) -> None:
    other = PoolManager(db.pool.conninfo, min_size=1, name="orders")  # type: ignore[arg-type]
    elsewhere = asyncio.new_event_loop()
    thread = threading.Thread(target=elsewhere.run_forever)
    thread.start()
    span = lifespan(other)
    theirs = span(APP)
    try:
        asyncio.run_coroutine_threadsafe(theirs.__aenter__(), elsewhere).result(20)
        with pytest.raises(LoopMismatchError, match='pool "orders" is bound to a different'):
            async with span(APP):
                pass
        assert other.state == "open"
        asyncio.run_coroutine_threadsafe(theirs.__aexit__(None, None, None), elsewhere).result(20)
        assert other.state == "closed"
    finally:
        elsewhere.call_soon_threadsafe(elsewhere.stop)
        thread.join(20)
        elsewhere.close()


# --- the module -----------------------------------------------------------------------------------


def test_it_loads_no_framework() -> None:
    frameworks = {*ADAPTERS, "django", "grpc", "mcp"}
    program = f"import sys, poolkeeper.adapters.generic; print({frameworks} & {{*sys.modules}})"
    ended = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True
    )
    assert ended.stdout == "set()\n"
