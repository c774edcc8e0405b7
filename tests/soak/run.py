"""
One soak: rounds of work and mischief, and a quiet moment after each.

Some rounds make an *era*, which has an event loop of its own: at its end the pools are closed, or
their loop dies with them. In a quiet moment nobody works and the network is as it should be, so
what must hold can be looked at: the money, the connections, and every other time what is left when
the pools are closed.
"""

from __future__ import annotations

import asyncio
import gc
import itertools
import random
import time
import traceback
from collections import Counter
from collections.abc import Callable
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass, field
from typing import Any

import psycopg
from psycopg import AsyncConnection
from psycopg_pool import AsyncConnectionPool

from poolkeeper import AcquireTimeout, PoolManager
from poolkeeper._checkouts import Checkout
from poolkeeper._connection import BoundConnection, ShownConnection
from poolkeeper._line import Waiter
from poolkeeper._session import Session

from . import messes  # noqa: F401 - registers its kinds of work
from .book import Book, Money, Wrong, require
from .clients import WORKS, Visit, configure, find_it_clean
from .leftovers import Objects, Sample, descriptors, grows, growth, rss, tasks, whose
from .monkey import Monkey
from .outside import Outside

ROUND = 8.0
"""Seconds of work between two quiet moments, at most."""

ROUNDS_IN_ERA = (1, 2, 2, 3, 12)
"""How many rounds one event loop sees; it is chosen anew for each."""

SIZES = {"plain": (2, 8), "tidy": (1, 3)}
"""The pools, with their least and most connections."""


@dataclass(eq=False)
class Request:
    """One request under way."""

    task: asyncio.Task[None]
    kind: str
    since: float
    cancelled: bool = False
    """True once the monkey has cancelled it."""


@dataclass
class Soak:
    """
    One run.

    Args:
        seconds: How long to go on.
        seed: Of every choice that is made, by clients and monkey.
        loop_factory: Makes the event loops.
        works: The kinds of work, with how often each is chosen.
        rounds: What the monkey may do in one after the other.
        regulars: How many make one request after the other.
        patience: Seconds after which a request that has not ended hangs, and a pool does not come
            to rest: each has time-outs of a few.
        say: Called with a line for each quiet moment.
    """

    outside: Outside
    seconds: float
    seed: int
    loop_factory: Callable[[], asyncio.AbstractEventLoop] | None = None
    works: dict[str, tuple[float, Any]] = field(default_factory=lambda: WORKS)
    rounds: tuple[str, ...] = ("calm", "the server", "the network", "closing", "everything")
    regulars: int = 24
    patience: float = 30.0
    say: Callable[[str], None] = lambda line: None
    book: Book = field(default_factory=Book)
    samples: list[Sample] = field(default_factory=list)
    lives: int = 0
    eras: int = 0

    def __post_init__(self) -> None:
        self.book.dsn = self.outside.dsn
        self._random = random.Random(f"{self.seed}")
        self._regulars = [random.Random(f"{self.seed}/{n}") for n in range(self.regulars)]
        self._kinds = list(self.works)
        self._weights = [weight for weight, _ in self.works.values()]
        self._numbers = itertools.count(1)
        self._requests: set[Request] = set()
        self._over = False
        self._round = 0
        self._at_first: Counter[str] | None = None  # descriptors
        self._began = time.monotonic()
        self._pools = {
            self._make_pool(name, least, most): (least, most)
            for name, (least, most) in SIZES.items()
        }
        self._monkey = Monkey(self.book, self.outside, self._requests, self._pools)

    def _make_pool(self, name: str, least: int, most: int) -> PoolManager[Any]:
        # A user of its own: two pools for one user are one too many, and the server can count.
        tidy = name == "tidy"
        return PoolManager(
            f"postgresql://{name}@127.0.0.1:{self.outside.proxy_port}/postgres",
            name=name,
            application_name=f"soak-{name}",
            min_size=least,
            max_size=most,
            timeout=4,
            max_idle=3,
            max_lifetime=20,
            open_timeout=20,
            configure=configure,
            reset="discard" if tidy else None,
            check=AsyncConnectionPool.check_connection if tidy else None,
            leak_threshold=15 if tidy else None,
        )

    # --- the order of events ------------------------------------------------------------------

    def run(self) -> None:
        """Run to the end, or until the quiet moment after a violation."""
        self._set_up()
        self.book.listen()
        try:
            while not self._time_is_up():
                with asyncio.Runner(loop_factory=self.loop_factory) as runner:
                    runner.run(self._era())
        except Exception as ex:
            self.book.violation(f"the soak itself ended with {type(ex).__name__}: {ex}", ex)
        finally:
            self.book.stop_listening()
        if (what := grows(self.samples, self.seconds)) is not None:
            self.book.violation(what)

    def _time_is_up(self) -> bool:
        return time.monotonic() - self._began > self.seconds or bool(self.book.violations)

    def _admin(self) -> psycopg.Connection[Any]:
        return psycopg.connect(self.outside.dsn, autocommit=True)

    def _set_up(self) -> None:
        with self._admin() as admin:
            admin.execute("drop table if exists accounts, transfers, copied")
            Money.set_up(admin)
            admin.execute("create table copied (token text, i int)")
            for name in ("stranger", *SIZES):
                if not admin.execute("select from pg_roles where rolname = %s", (name,)).rowcount:
                    admin.execute(f"create role {name} login")
                admin.execute(f"grant all on all tables in schema public to {name}")
                if name in SIZES:
                    admin.execute(f"grant stranger to {name}")

    async def _era(self) -> None:
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(self.book.loop_complains)
        if self._at_first is None:
            await self._warm_up()
            self._at_first = descriptors()
        self.eras += 1
        await self._open()
        for left in reversed(range(self._random.choice(ROUNDS_IN_ERA))):
            await self._work()
            await self._quiet()
            last = self._time_is_up()
            dies_open = not left and not last and self._random.random() < 0.5
            if last or (not dies_open and (not left or self._random.random() < 0.3)):
                await self._close()
                if left and not last:
                    await self._open()
            if last:
                return

    async def _warm_up(self) -> None:
        """Let loop and thread have what they make when they are used first."""
        await self.outside.ask("heal")
        await self._open()
        await self._look_at_connections()
        for db in self._pools:
            await db.close()

    async def _open(self) -> None:
        self.lives += 1
        for db in self._pools:
            await db.open()

    async def _work(self) -> None:
        """Let everybody work for a round, and the monkey do what it may in it."""
        kind = self.rounds[self._round % len(self.rounds)]
        self._round += 1
        self.book.note(f"round {self._round}: {kind}")
        self._over = False
        left = self.seconds - (time.monotonic() - self._began)
        most = min(ROUND, self.seconds / len(self.rounds))  # so that there is one of each kind
        regulars = [
            asyncio.create_task(self._regular(random), name=f"regular-{n}")
            for n, random in enumerate(self._regulars)
        ]
        trouble = asyncio.create_task(
            self._monkey.trouble(kind, random.Random(f"{self.seed}/{self._round}")), name="monkey"
        )
        await asyncio.wait({trouble}, timeout=max(0.3, min(most, left)))
        self._monkey.stop()
        await trouble
        self._over = True
        await self.outside.ask("heal")
        _, hung = await asyncio.wait(regulars, timeout=self.patience)
        if hung:
            self._tell_hung()
            for task in (*hung, *(request.task for request in self._requests)):
                task.cancel()
            await asyncio.wait(hung, timeout=self.patience)

    def _tell_hung(self) -> None:
        for request in list(self._requests):
            stack = request.task.get_coro()
            lines = []
            while stack is not None:
                frame = getattr(stack, "cr_frame", None) or getattr(stack, "ag_frame", None)
                if frame is not None:
                    lines += traceback.format_stack(frame, 1)
                stack = getattr(stack, "cr_await", None) or getattr(stack, "ag_await", None)
            pools = "\n".join(str(db.diagnose()) for db in self._pools)
            seconds = time.monotonic() - request.since
            self.book.violation(
                f"{request.kind} hangs, for {seconds:.0f} s", details=f"{''.join(lines)}{pools}"
            )

    # --- requests -------------------------------------------------------------------------------

    async def _regular(self, random: random.Random) -> None:
        """Make one request after the other, each in a task that can be cancelled."""
        plain, tidy = self._pools
        while not self._over:
            (kind,) = random.choices(self._kinds, self._weights)
            discards = random.random() < 0.2
            now = time.monotonic()
            visit = Visit(
                f"{kind} {next(self._numbers)}", tidy if discards else plain, discards, random,
                self.book, now,
            )  # fmt: skip
            task = asyncio.create_task(self.works[kind][1](visit), name=visit.token)
            request = Request(task, kind, now)
            self._requests.add(request)
            await asyncio.wait({task})
            self._requests.discard(request)
            self.book.ended(kind, task, now, request.cancelled)
            done = not task.cancelled() and task.exception() is None
            del task, request, visit
            await asyncio.sleep(random.random() * (0.005 if done else 0.05))

    # --- quiet moments --------------------------------------------------------------------------

    async def _quiet(self) -> None:
        """Look at what must hold while nobody works, and the pools are open."""
        gc.collect()
        for db, sizes in self._pools.items():
            if db.state != "open":
                self.book.violation(f"{db!r} is not open")
                return
            await db.pool.resize(*sizes)
        try:
            await self._look_at_connections()
        except Exception as ex:
            self.book.violation(f"in a quiet moment: {type(ex).__name__}: {ex}", ex)
        with self._admin() as admin:
            for what in self.book.money.check(admin):
                self.book.violation(what)
        objects = await self._count_objects()
        sample = Sample(time.monotonic() - self._began, self.book.operations, rss(), objects.total)
        self.samples.append(sample)
        self.say(
            f"{sample.seconds:6.0f} s  {sample.operations:8,} operations  {sample.rss:6.1f} MiB"
            f"  {sample.objects:,} objects"
        )

    async def _count_objects(self) -> Objects:
        """
        Count what there is.

        That is one session for each connection, its handle, and the copy that one-shots show.
        """
        until = time.monotonic() + min(10, self.patience)
        while True:
            objects = Objects.count()
            most = sum(db.snapshot().total for db in self._pools)
            kinds = (BoundConnection, ShownConnection, Session)
            many = [kind for kind in kinds if objects.ours[kind.__name__] > most]
            if not many:
                return objects
            if time.monotonic() > until:
                for kind in many:
                    what = f"{objects.ours[kind.__name__]} {kind.__name__} for {most} connections"
                    self.book.violation(what, details=whose(kind))
                return objects
            await asyncio.sleep(0.5)  # one that was given back at work is ended within a second

    async def _look_at_connections(self) -> None:
        """Raise unless every connection comes home by itself, can be had, and works."""
        until = time.monotonic() + self.patience
        for db in self._pools:
            while not _is_at_rest(db):
                if time.monotonic() > until:
                    rows = "".join(f"\n{row}" for row in db.snapshot().checkouts)
                    raise Wrong(f"a pool has no rest: {db.diagnose()}{rows}\n{whose(Checkout)}")
                await _ask_for_all(db)
                with suppress(TimeoutError):
                    async with asyncio.timeout(1):  # a release goes on by itself
                        while not _is_at_rest(db):
                            await asyncio.sleep(0.02)
        for db in self._pools:
            visit = Visit("look", db, db.name == "tidy", self._random, self.book, time.monotonic())
            conns: list[AsyncConnection[Any]] = []
            try:
                for _ in range(db.pool.max_size):
                    conns.append(await db.pool.getconn(10))
                pids = {conn.info.backend_pid for conn in conns}
                require(len(pids) == len(conns), f"{len(conns)} connections to {pids}")
                for conn in conns:
                    await find_it_clean(visit, conn)
            finally:
                for conn in conns:
                    await db.pool.putconn(conn)

    async def _close(self) -> None:
        """Close the pools, and look at what is left."""
        for db in self._pools:
            began = time.monotonic()
            await db.close()
            if (seconds := time.monotonic() - began) > 10:
                self.book.violation(f"nobody worked, and close() took {seconds:.0f} s")
        for _ in range(10):  # generators that are collected end in tasks
            await asyncio.sleep(0)
        for what in await self._left_over():
            holders = whose(Waiter) + whose(BoundConnection) if "not 0" in what else ""
            self.book.violation(f"left over when the pools are closed: {what}", details=holders)

    async def _left_over(self) -> list[str]:
        found = [f"{task!r}" for task in tasks()]
        objects = Objects.count()
        # A pool keeps what its last life was made of until it is opened again.
        pools = len(self._pools)
        kept = Counter({"Connector": pools, "LoopBinding": pools})
        found += growth(kept, objects.ours)
        if objects.classes > 3 * pools:
            found.append(f"{objects.classes} connection classes")
        assert self._at_first is not None
        found += growth(self._at_first, descriptors())
        until = time.monotonic() + min(10, self.patience)
        while sessions := self._sessions():
            if time.monotonic() > until:
                found.append(f"sessions on the server: {sessions}")
                break
            await asyncio.sleep(0.05)
        return found

    def _sessions(self) -> list[tuple[Any, ...]]:
        query = "select pid, usename, state, query from pg_stat_activity where usename = any(%s)"
        with self._admin() as admin:
            return admin.execute(query, (list(SIZES),)).fetchall()


async def _ask_for_all(db: PoolManager[Any]) -> None:
    """Let the pool look for what was dropped, which it does while somebody waits."""
    gc.collect()
    with suppress(AcquireTimeout):
        async with AsyncExitStack() as stack:
            for _ in range(db.pool.max_size):
                await stack.enter_async_context(db.connection(timeout=0.6))


def _is_at_rest(db: PoolManager[Any]) -> bool:
    snapshot = db.snapshot()
    return (
        snapshot.in_use == snapshot.waiting == 0
        and snapshot.min <= snapshot.total == snapshot.idle <= snapshot.max
    )
