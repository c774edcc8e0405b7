"""What a program does and sees in a sandbox is what it does and sees on a database of its own."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from typing import Any

import psycopg
import pytest

from poolkeeper import PoolManager
from poolkeeper.testing import outside, sandbox

Op = tuple[Any, ...]

KINDS = (
    *("insert", "insert", "commit", "rollback", "switch", "block", "block"),
    *("pipeline", "stream", "copy"),
)


def some_ops(chance: random.Random, depth: int = 0) -> list[Op]:
    ops: list[Op] = []
    for _ in range(chance.randint(1, 5)):
        kind = chance.choice(KINDS)
        if kind == "insert":
            ops.append(("insert", chance.randint(1, 5), chance.choice([None, None, 1, 9])))
        elif kind == "pipeline":
            # A deferred constraint that fails at a sync is too much for psycopg 3.3.
            numbers = [
                [chance.randint(1, 5) for _ in range(chance.randint(1, 3))] for _ in range(3)
            ]
            ops.append(("pipeline", [[("insert", n, None) for n in some] for some in numbers]))
        elif kind == "block" and depth < 3:
            how = chance.choice(["well", "well", "force_rollback", "raise", "Rollback"])
            ops.append(("block", how, some_ops(chance, depth + 1)))
        elif kind != "block":
            ops.append((kind,))
    return ops


async def do(conn: Any, ops: list[Op], seen: list[Any]) -> None:
    for kind, *rest in ops:
        try:
            if kind == "insert":
                await conn.execute("insert into things values (%s, %s)", rest)
            elif kind == "commit":
                await conn.commit()
            elif kind == "rollback":
                await conn.rollback()
            elif kind == "switch":
                await conn.set_autocommit(not conn.autocommit)
            elif kind == "pipeline":
                await pipeline(conn, *rest, seen)
            elif kind == "stream":
                stream = conn.cursor().stream("select n from things order by n")
                seen.append(await anext(stream, None))
                await stream.aclose()  # half-way
            elif kind == "copy":
                await copy(conn, seen)
            else:
                await block(conn, *rest, seen)
        except (psycopg.Error, ZeroDivisionError) as ex:
            seen.append(type(ex).__name__)
        seen.append((kind, conn.info.transaction_status.name))


async def pipeline(conn: Any, groups: list[list[Op]], seen: list[Any]) -> None:
    """Ask in groups, each of them one transaction in autocommit; some with a pause for errors."""
    async with conn.pipeline() as pipe:
        for number, group in enumerate(groups):
            errors = set()
            # It is chance which call raises. The second sync() reads what the first has left.
            steps = [(conn.execute, "insert into things values (%s, %s)", op[1:]) for op in group]
            for step, *args in (*steps, (pause, number), (pipe.sync,), (pipe.sync,)):
                try:
                    await step(*args)
                except psycopg.Error as ex:
                    errors.add(type(ex).__name__)
            seen.append(sorted(errors - {"PipelineAborted"}))


async def copy(conn: Any, seen: list[Any]) -> None:
    """Copy the rows out, and one in that may be there."""
    async with conn.cursor() as cursor:
        async with cursor.copy("copy (select n from things order by n) to stdout") as out:
            seen.append([bytes(row) async for row in out])
        async with cursor.copy("copy things (n) from stdin") as into:
            await into.write_row([len(seen) % 5 + 1])


async def pause(number: int) -> None:
    await asyncio.sleep(0.005 if number == 1 else 0)


async def block(conn: Any, how: str, ops: list[Op], seen: list[Any]) -> None:
    async with conn.transaction(force_rollback=how == "force_rollback"):
        await do(conn, ops, seen)
        if how == "raise":
            raise ZeroDivisionError
        if how == "Rollback":
            raise psycopg.Rollback


async def run(db: PoolManager, seed: int) -> list[Any]:
    """Run a program that *seed* chooses; return what it has seen."""
    chance = random.Random(seed)
    seen: list[Any] = []
    for _ in range(4):
        ops, fails = some_ops(chance), chance.random() < 0.3
        try:
            async with db.connection() as conn:
                await do(conn, ops, seen)
                if fails:
                    raise ZeroDivisionError
        except (psycopg.Error, ZeroDivisionError) as ex:
            seen.append(type(ex).__name__)
        try:
            await db.execute("insert into things values (%s, %s)", (chance.randint(1, 5), None))
        except psycopg.Error as ex:
            seen.append(type(ex).__name__)
        seen.append(await db.fetchall("select n, like_n from things order by n"))
    return seen


async def test_a_program_sees_in_a_sandbox_what_it_sees_without(
    database: str, make_manager: Callable[..., PoolManager], caplog: pytest.LogCaptureFixture
) -> None:
    # psycopg 3.3 takes for prepared what an aborted pipeline has not run.
    db = make_manager(database, min_size=1, max_size=2, kwargs={"prepare_threshold": None})
    async with db:
        await db.execute(
            "create table things (n int primary key,"
            " like_n int references things deferrable initially deferred)"
        )
        for seed in random.sample(range(1_000_000), 25):
            real = await run(db, seed)
            await db.execute("delete from things")
            async with sandbox(db):
                assert await run(db, seed) == real, f"seed {seed}"
                with outside():
                    assert await db.fetchval("select count(*) from things") == 0
