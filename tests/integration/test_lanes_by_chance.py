"""Programs of one-shots by chance, many at once, held to what each client may know."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import count
from typing import Any, NamedTuple

import psycopg
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from psycopg.rows import dict_row

from poolkeeper import PoolManager, QueryTimeout, _lane, _oneshots
from poolkeeper.events import Acquired, Event, GaveUp, Queued, Released, TimedOut
from tests.support.lanes import PLAIN, know
from tests.support.server import admin, kill_sessions

EXAMPLES = 12

COUNT = "select count(*) from generate_series(1, %s::int)"
ECHO = "select %s::text"
DIVIDE = "select 1 / %s::int"
OWN = "select n from w where client = %s"
WRITE = "insert into w values (%s, %s) returning n"


class Step(NamedTuple):
    """What a client does, and after how many turns of the loop it is cancelled, if it is."""

    kind: str
    cancelled: int | None


class Program(NamedTuple):
    """What is done: each client one step after the other, all of them at once."""

    connections: int
    long: float
    slow: float
    clients: list[list[Step]]
    kills: list[int]
    """After how many milliseconds all sessions are."""


KINDS = (
    "read", "read", "read", "row", "error", "count", "slow", "large", "write", "twice", "own",
    "timeout", "block",
)  # fmt: skip

STEPS = st.builds(Step, st.sampled_from(KINDS), st.one_of(st.none(), st.none(), st.integers(0, 12)))

PROGRAMS = st.builds(
    Program,
    st.integers(1, 3),
    st.sampled_from([0.0, 0.002, 60.0]),
    st.sampled_from([0.001, 0.01, 60.0]),
    st.lists(st.lists(STEPS, min_size=1, max_size=6), min_size=1, max_size=24),
    st.lists(st.integers(0, 40), max_size=2),
)


@dataclass
class Client:
    """
    One client: what it asks, and what it must be answered.

    What it wrote and was told of is there, once; what it was not told of may be.
    """

    db: PoolManager[Any]
    number: int
    numbers: Iterator[int]
    told: set[int] = field(default_factory=set[int])
    perhaps: set[int] = field(default_factory=set[int])
    wrong: list[object] = field(default_factory=list[object])

    async def do(self, step: Step, may_be_lost: bool) -> None:
        task = asyncio.create_task(getattr(self, step.kind)(), name=f"client-{self.number}")
        if step.cancelled is not None:
            for _ in range(step.cancelled):
                await asyncio.sleep(0)
            task.cancel()
        try:
            await task
        except asyncio.CancelledError:
            if step.cancelled is None:
                self.wrong.append((step, "cancelled"))
        except psycopg.OperationalError as ex:
            # Nobody but who has asked for it has his statement stopped.
            if not may_be_lost or isinstance(ex, psycopg.errors.QueryCanceled):
                self.wrong.append((step, ex))
        except Exception as ex:
            self.wrong.append((step, ex))

    def expect(self, found: object, expected: object) -> None:
        if found != expected:
            self.wrong.append((found, expected))

    async def read(self) -> None:
        n = next(self.numbers)
        self.expect(await self.db.fetchval(PLAIN, (n,)), n)

    async def row(self) -> None:
        n = next(self.numbers)
        self.expect(await self.db.fetchone(PLAIN, (n,), row_factory=dict_row), {"int4": n})

    async def error(self) -> None:
        try:
            await self.db.fetchval(DIVIDE, (0,))
        except psycopg.errors.DivisionByZero:
            return
        self.wrong.append("no error")

    async def count(self) -> None:
        self.expect(await self.db.fetchall(COUNT, (self.number,)), [(self.number,)])

    async def slow(self) -> None:
        self.expect(await self.db.fetchval(COUNT, (100_000 + self.number,)), 100_000 + self.number)

    async def large(self) -> None:
        text = f"{self.number}" * 20_000
        self.expect(await self.db.fetchval(ECHO, (text,)), text)

    async def write(self) -> None:
        n = next(self.numbers)
        self.perhaps.add(n)
        self.expect(await self.db.fetchval(WRITE, (self.number, n)), n)
        self.perhaps.discard(n)
        self.told.add(n)

    async def twice(self) -> None:
        if not self.told:
            return
        try:
            await self.db.execute(WRITE, (self.number, max(self.told)))
        except psycopg.errors.UniqueViolation:
            return
        self.wrong.append("written twice")

    async def own(self) -> None:
        self.look(await self.db.fetchall(OWN, (self.number,)))

    def look(self, rows: list[tuple[int]]) -> None:
        found = {n for (n,) in rows}
        if not self.told <= found <= self.told | self.perhaps or len(rows) != len(found):
            self.wrong.append((rows, self.told, self.perhaps))

    async def timeout(self) -> None:
        try:
            found = await self.db.fetchval(COUNT, (200_000,), query_timeout=0.005)
        except QueryTimeout:
            return
        self.expect(found, 200_000)

    async def block(self) -> None:
        n = next(self.numbers)
        async with self.db.connection() as conn:
            self.expect(await (await conn.execute(PLAIN, (n,))).fetchone(), (n,))


NEXT = {
    "": "queued acquired gave_up",
    "queued": "acquired gave_up",
    "acquired": "released",
    "released": "queued acquired gave_up",
    "gave_up": "queued acquired gave_up",
}
"""What may be told of a task after what."""


class Told:
    """A subscriber that looks whether what it is told of each task fits together."""

    def __init__(self) -> None:
        self.last: dict[str, str] = {}
        self.wrong: list[object] = []

    def __call__(self, event: Event) -> None:
        task = getattr(event, "task", "")
        if event.event_name not in NEXT[self.last.get(task, "")].split():
            self.wrong.append((self.last.get(task), event))
        self.last[task] = event.event_name


async def run(dsn: str, program: Program) -> None:
    """Do it, and look at what came of it."""
    told, numbers = Told(), count()
    size = program.connections
    async with PoolManager(dsn, min_size=size, max_size=size, name="chance", timeout=60) as db:
        clients = [Client(db, n, numbers) for n in range(len(program.clients))]
        await know(db, PLAIN, COUNT, ECHO, DIVIDE, OWN)
        db.subscribe(told, Queued, Acquired, Released, GaveUp, TimedOut)

        async def act(client: Client, steps: list[Step]) -> None:
            for step in steps:
                await client.do(step, bool(program.kills))

        async def kill() -> None:
            for milliseconds in program.kills:
                await asyncio.sleep(milliseconds / 1000)
                await asyncio.to_thread(kill_sessions, dsn, "poolkeeper:chance")

        async with asyncio.timeout(120):
            await asyncio.gather(kill(), *map(act, clients, program.clients))
            while (counts := db.pool.counts())["idle"] < size or counts["in_use"]:
                await asyncio.sleep(0.005)
    # Not by the pool: what was killed may have its end still before it.
    for client in clients:
        client.look(admin(dsn, OWN, (client.number,)))
    assert not [wrong for client in clients for wrong in client.wrong]
    assert not told.wrong
    assert set(told.last.values()) <= {"released", "gave_up"}


@given(PROGRAMS)
@settings(
    max_examples=EXAMPLES,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
async def test_every_client_is_answered_what_it_may_expect_whatever_the_others_do(
    database: str, monkeypatch: pytest.MonkeyPatch, program: Program
) -> None:
    admin(database, "create table if not exists w (client int, n int, unique (client, n))")
    admin(database, "truncate w")
    monkeypatch.setattr(_lane, "LONG", program.long)
    monkeypatch.setattr(_oneshots, "SLOW", program.slow)
    await run(database, program)
