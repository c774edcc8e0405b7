"""`Portal` and `PoolPerLoop` have the types of the manager, and of the functions called."""

from __future__ import annotations

import asyncio
from concurrent.futures import Future
from typing import Any, assert_type

from psycopg import AsyncConnection
from psycopg.rows import DictRow, TupleRow, dict_row

from poolkeeper import PoolManager, PoolPerLoop, Portal


async def add(number: int, text: str = "") -> list[int]:
    return [number]


def called() -> None:
    portal = Portal(PoolManager(""), loop_factory=asyncio.new_event_loop)
    assert_type(portal, Portal[AsyncConnection[TupleRow]])
    assert_type(portal.manager, PoolManager[AsyncConnection[TupleRow]])
    assert_type(portal.run(add, 1), list[int])
    assert_type(portal.run(add, 1, "a", timeout=2.0), list[int])
    assert_type(portal.submit(add, 1), Future[list[int]])
    assert_type(portal.execute("select 1"), int)
    assert_type(portal.fetchone("select 1"), TupleRow | None)
    assert_type(portal.fetchone("select 1", row_factory=dict_row), DictRow | None)
    assert_type(portal.fetchall("select 1"), list[TupleRow])
    assert_type(portal.fetchall("select 1", row_factory=dict_row), list[DictRow])
    assert_type(portal.fetchval("select 1"), Any)
    with portal as entered:
        assert_type(entered, Portal[AsyncConnection[TupleRow]])


def refused(portal: Portal) -> None:
    portal.run(add)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    portal.run(add, "a")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    portal.run(add(1))  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    portal.run(len, "a")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]


async def of_many_loops() -> None:
    pools = PoolPerLoop(
        lambda: PoolManager("", connection_class=AsyncConnection[DictRow]), budget=4
    )
    assert_type(await pools.current(), PoolManager[AsyncConnection[DictRow]])
    assert_type(pools.budget, int)
