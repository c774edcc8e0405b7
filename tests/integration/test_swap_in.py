"""`from poolkeeper import BoundPool as AsyncConnectionPool`: the same from outside, in one line."""

from __future__ import annotations

import asyncio
import inspect
import warnings
from typing import Any

import pytest
from psycopg import AsyncConnection
from psycopg.rows import dict_row
from psycopg_pool import AsyncConnectionPool

from poolkeeper import AcquireTimeout, BoundPool, ConfigError, LoopMismatchError

POOLS = [AsyncConnectionPool, BoundPool]
OURS = {"application_name", "leak_threshold"}


async def uses(pool: Any) -> None:
    async with pool.connection() as conn:
        assert await (await conn.execute("select 42")).fetchone() == (42,)


def warned(caught: list[warnings.WarningMessage]) -> list[type[Warning]]:
    assert all("in the constructor is deprecated" in str(one.message) for one in caught)
    return [one.category for one in caught]


def test_the_constructor_takes_the_same_with_the_same_defaults() -> None:
    theirs = inspect.signature(AsyncConnectionPool).parameters
    ours = inspect.signature(BoundPool).parameters
    assert [name for name in ours if name not in OURS] == list(theirs)
    for name, parameter in theirs.items():
        assert (ours[name].default, ours[name].kind) == (parameter.default, parameter.kind), name
    assert all(ours[name].kind is inspect.Parameter.KEYWORD_ONLY for name in OURS)


def test_it_is_one_and_typed_as_one() -> None:
    pool = BoundPool("", min_size=1, max_size=3, name="orders", open=False)
    assert isinstance(pool, AsyncConnectionPool)
    assert (pool.name, pool.min_size, pool.max_size, pool.timeout) == ("orders", 1, 3, 30.0)
    assert pool.closed
    assert BoundPool[AsyncConnection[Any]]("", open=False).connection_class is AsyncConnection


@pytest.mark.parametrize("kind", POOLS)
async def test_a_block_opens_and_closes_it_without_a_warning(kind: Any, dsn: str) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        async with kind(dsn, min_size=1) as pool:
            await uses(pool)
            assert not pool.closed
        assert pool.closed
    assert not caught


@pytest.mark.parametrize("kind", POOLS)
async def test_where_open_is_not_given_it_is_open_and_its_first_use_warns(
    kind: Any, dsn: str
) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        pool = kind(dsn, min_size=1)
        assert not pool.closed
        assert not caught
        await uses(pool)
        assert warned(caught) == [RuntimeWarning]
        await uses(pool)
        await pool.wait()
        await pool.close()
    assert len(caught) == 1


async def test_the_warning_is_at_the_line_of_the_program(dsn: str) -> None:
    pool = BoundPool(dsn, min_size=1)
    with pytest.warns(RuntimeWarning, match="await pool.open") as caught:
        await uses(pool)
    await pool.close()
    assert caught[0].filename == __file__


@pytest.mark.parametrize("kind", POOLS)
async def test_open_true_warns_in_the_constructor(kind: Any, dsn: str) -> None:
    with pytest.warns(RuntimeWarning, match="in the constructor is deprecated"):
        pool = kind(dsn, min_size=1, open=True)
    await pool.wait()
    await uses(pool)
    await pool.close()


@pytest.mark.parametrize("kind", POOLS)
async def test_open_false_waits_for_open(kind: Any, dsn: str) -> None:
    pool = kind(dsn, min_size=1, open=False)
    with pytest.raises(Exception, match="not open"):
        await pool.getconn()
    await pool.open(wait=True)
    await uses(pool)
    await pool.close()


@pytest.mark.parametrize("kind", POOLS)
def test_without_a_loop_it_opens_only_later(kind: Any, dsn: str) -> None:
    with pytest.raises(RuntimeError, match="loop"):
        kind(dsn)
    pool = kind(dsn, min_size=1, open=False)

    async def main() -> None:
        async with pool:
            await uses(pool)

    asyncio.run(main())


async def test_every_guard_is_there(dsn: str) -> None:
    async with BoundPool(
        dsn, min_size=1, max_size=1, kwargs={"row_factory": dict_row}, name="guarded"
    ) as pool:
        await pool.wait()
        async with pool.connection() as conn:
            assert await (await conn.execute("select 1 as one")).fetchone() == {"one": 1}
            with pytest.raises(AcquireTimeout, match="all connections are in use"):
                await asyncio.create_task(pool.getconn(timeout=0.05))
        with pytest.raises(LoopMismatchError):
            await asyncio.to_thread(lambda: asyncio.run(uses(pool)))
        with pytest.raises(Exception, match="given back"):
            await conn.execute("select 1")


@pytest.mark.parametrize(
    "arguments", [{"min_size": 3, "max_size": 2}, {"min_size": -1}, {"num_workers": 0}]
)
@pytest.mark.parametrize("kind", POOLS)
def test_what_cannot_be_is_a_value_error(kind: Any, arguments: Any) -> None:
    with pytest.raises(ValueError) as caught:
        kind("", open=False, **arguments)
    assert kind is not BoundPool or isinstance(caught.value, ConfigError)
