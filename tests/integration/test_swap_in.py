"""`from poolkeeper import BoundPool as AsyncConnectionPool`: the same from outside, in one line."""

from __future__ import annotations

import asyncio
import inspect
import warnings
from typing import Any

import pytest
from psycopg import AsyncConnection
from psycopg.rows import dict_row
from psycopg_pool import AsyncConnectionPool, AsyncNullConnectionPool, PoolTimeout

from poolkeeper import (
    AcquireTimeout,
    BoundNullPool,
    BoundPool,
    ConfigError,
    LoopMismatchError,
    OpenError,
)
from poolkeeper._embedded import free_port
from tests.support.proxy import FaultProxy
from tests.support.waiting import eventually

POOLS = [AsyncConnectionPool, BoundPool]
NULL_POOLS = [AsyncNullConnectionPool, BoundNullPool]
OURS = {"application_name", "leak_threshold", "expected_processes"}


async def uses(pool: Any) -> None:
    async with pool.connection() as conn:
        assert await (await conn.execute("select 42")).fetchone() == (42,)


def warned(caught: list[warnings.WarningMessage]) -> list[type[Warning]]:
    assert all("in the constructor is deprecated" in str(one.message) for one in caught)
    return [one.category for one in caught]


@pytest.mark.parametrize(("bare", "bound"), [POOLS, NULL_POOLS])
def test_the_constructor_takes_the_same_with_the_same_defaults(bare: Any, bound: Any) -> None:
    theirs = inspect.signature(bare).parameters
    ours = inspect.signature(bound).parameters
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


# --- a pool that keeps none -----------------------------------------------------------------------

NAME = "poolkeeper-null"
SESSIONS = {"kwargs": {"application_name": NAME}}


async def pid_of(pool: Any, seconds: float = 0.0) -> int:
    async with pool.connection() as conn:
        await asyncio.sleep(seconds)
        return int(conn.info.backend_pid)


@pytest.mark.parametrize("kind", NULL_POOLS)
async def test_a_null_pool_closes_what_nobody_waits_for(
    kind: Any, dsn: str, server_sessions: Any
) -> None:
    async with kind(dsn, **SESSIONS) as pool:
        await pool.wait()
        assert await asyncio.to_thread(eventually, lambda: server_sessions(NAME) == 0)
        first, second = await pid_of(pool), await pid_of(pool)
        assert first != second
        assert await asyncio.to_thread(eventually, lambda: server_sessions(NAME) == 0)
        stats = pool.get_stats()
        assert (stats["pool_max"], stats["pool_available"]) == (0, 0)
        assert (pool.min_size, pool.max_size) == (0, 0)


@pytest.mark.parametrize("kind", NULL_POOLS)
async def test_a_null_pool_hands_a_connection_to_who_waits(kind: Any, dsn: str) -> None:
    async with kind(dsn, max_size=1, timeout=20) as pool:
        assert len(set(await asyncio.gather(*(pid_of(pool, 0.1) for _ in range(4))))) == 1


@pytest.mark.parametrize("kind", NULL_POOLS)
async def test_a_null_pool_without_a_maximum_makes_one_for_each(kind: Any, dsn: str) -> None:
    async with kind(dsn, timeout=20) as pool:
        everybody = asyncio.Barrier(12)

        async def holds() -> None:
            async with pool.connection():
                await everybody.wait()

        async with asyncio.timeout(20):
            await asyncio.gather(*(holds() for _ in range(12)))


@pytest.mark.parametrize("kind", NULL_POOLS)
async def test_a_null_pool_gives_a_changed_connection_on_as_it_was(kind: Any, dsn: str) -> None:
    async with kind(dsn, max_size=1, timeout=20) as pool:
        async with pool.connection() as conn:
            waiting = asyncio.create_task(pid_of(pool))
            await asyncio.sleep(0.05)
            await conn.execute("select 1")
            pid = conn.info.backend_pid
        assert await waiting == pid


@pytest.mark.parametrize("kind", NULL_POOLS)
async def test_a_null_pool_that_cannot_connect_says_so_when_it_is_waited_for(kind: Any) -> None:
    pool = kind(f"host=127.0.0.1 port={free_port()} user=nobody", open=False)
    await pool.open()
    with pytest.raises(PoolTimeout):
        await pool.wait(timeout=0.5)
    await pool.close()


async def test_a_null_pool_raises_the_reason_that_stays_at_once(dsn: str) -> None:
    async with asyncio.timeout(20):
        with pytest.raises(OpenError, match="does not exist"):
            await BoundNullPool(dsn, kwargs={"user": "no_such_role"}, open=False).open(wait=True)


async def test_a_null_pool_is_back_after_an_outage(dsn: str) -> None:
    proxy = FaultProxy(dsn)
    proxy.start()
    try:
        async with BoundNullPool(proxy.dsn, max_size=4, timeout=30, open=False) as pool:
            await uses(pool)
            proxy.refuse = True
            with pytest.raises(AcquireTimeout):
                await pool.getconn(timeout=0.5)
            waiting = [asyncio.create_task(uses(pool)) for _ in range(8)]
            await asyncio.sleep(0.3)
            proxy.refuse = False
            async with asyncio.timeout(20):
                await asyncio.gather(*waiting)
            async with asyncio.timeout(20):
                while pool.get_stats()["pool_size"]:
                    await asyncio.sleep(0.01)
    finally:
        proxy.stop()


@pytest.mark.parametrize("kind", NULL_POOLS)
async def test_a_null_pool_takes_two_arguments_for_which_it_has_no_use(kind: Any) -> None:
    """It loses no connection that is to be made again, and none can be kept by closing it."""
    told: list[Any] = []
    pool = kind("", open=False, reconnect_failed=told.append, close_returns=True)
    await pool.reconnect_failed()
    assert told == []
    assert not pool.close_returns


@pytest.mark.parametrize("arguments", [{"min_size": 1}, {"max_size": -1}])
@pytest.mark.parametrize("kind", NULL_POOLS)
def test_a_null_pool_keeps_none(kind: Any, arguments: Any) -> None:
    with pytest.raises(ValueError):
        kind("", open=False, **arguments)


async def test_a_null_pool_changes_only_its_maximum(dsn: str) -> None:
    async with BoundNullPool(dsn) as pool:
        await pool.resize(0, 3)
        assert (pool.min_size, pool.max_size) == (0, 3)
        with pytest.raises(ConfigError, match="min_size"):
            await pool.resize(1, 3)
        await pool.resize(0)
        assert pool.max_size == 0
        await pool.check()
        await pool.drain()
        await uses(pool)
