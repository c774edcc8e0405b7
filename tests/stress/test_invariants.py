"""
What must hold after every step, whatever happens in which order.

A seeded simulator drives a real pool of at most a few connections: tasks acquire with all kinds of
time-outs, release, fail, are cancelled once or many times, sessions are killed, callbacks raise,
hang, close what they are called with and swallow their cancellation, sizes change, the stock is
drained, the pool is closed and opened again; and after each step and turn of the loop each
connection must be in exactly one of the numbers. A failure prints its seed; to run one again:
``POOLKEEPER_SEED=123 pytest tests/stress/test_invariants.py``.
"""

from __future__ import annotations

import asyncio
import os
import random
import time
from collections.abc import Callable, Coroutine
from contextlib import suppress
from typing import Any

import psycopg
import pytest

from poolkeeper import AcquireTimeout, PoolManager
from poolkeeper._connection import RetiredConnection
from poolkeeper._life import State
from poolkeeper._session import Session
from tests.support.inside import life

MakeManager = Callable[..., PoolManager[Any]]

OK = psycopg.pq.ConnStatus.OK
NAME = "invariants"
SEEDS = (
    [int(os.environ["POOLKEEPER_SEED"])]
    if "POOLKEEPER_SEED" in os.environ
    else list(range(int(os.environ.get("POOLKEEPER_SEEDS", "24"))))
)
STEPS = 400
CALLBACKS = ("check", "reset", "configure")


class Simulator:
    """Does one random thing after the other to a pool, and looks at its books in between."""

    def __init__(self, db: PoolManager[Any], dsn: str, seed: int) -> None:
        self.db = db
        self.pool = db.pool
        self.dsn = dsn
        self.random = random.Random(seed)
        self.history: list[str] = []
        self.tasks: set[asyncio.Task[None]] = set()
        self.holding: dict[asyncio.Task[None], asyncio.Event] = {}
        self.lent: list[Any] = []
        self.most = self.pool.max_size
        self.arrived: list[Any] = []  # waiters, in the order in which they joined the line
        self.moods = [""]
        self.gate = asyncio.Event()
        self.admin = psycopg.connect(dsn, autocommit=True)

    # --- what can happen --------------------------------------------------------------------

    def acquire(self) -> None:
        """A task acquires, works a little, and keeps the connection until it is told."""
        timeout = self.random.choice([0, 0.001, 0.02, 5, 5, 5])
        ending = self.random.choice(["commit", "commit", "commit", "error", "close", "autocommit"])
        queries = self.random.randrange(3)
        self._start(self._hold(timeout, ending, queries))

    def lend(self) -> None:
        """A task takes a connection with getconn(), which any other may give back."""
        self._start(self._lend(self.random.choice([0, 0.01, 5])))

    def give_back(self) -> None:
        if self.lent:
            self._start(self._put())

    def release(self) -> None:
        if self.holding:
            self.holding[self.random.choice(list(self.holding))].set()

    def cancel(self) -> None:
        """Cancel a task wherever it is: waiting, holding, in a query, releasing."""
        if self.tasks:
            self.random.choice(sorted(self.tasks, key=lambda task: task.get_name())).cancel()

    def cancel_everybody(self) -> None:
        for task in self.tasks:
            task.cancel()

    async def kill(self) -> None:
        rows = await asyncio.to_thread(self._sessions)
        if rows:
            pid = self.random.choice(rows)
            await asyncio.to_thread(self._admin, "select pg_terminate_backend(%s)", pid)

    async def resize(self) -> None:
        most = self.random.randint(1, 4)
        self.most = max(self.most, most)
        await self.pool.resize(self.random.randint(0, most), most)

    async def drain(self) -> None:
        await self.pool.drain()

    async def check(self) -> None:
        self._start(self._check())

    async def ask(self) -> None:
        """As a readiness probe does."""
        self._start(self._ask())

    def change_mood(self) -> None:
        """Let the callbacks do something else, one call in four."""
        self.moods = ["", "", "", self.random.choice(["", "raise", "hang", "close", "swallow"])]

    def let_go(self) -> None:
        """Let the callbacks that hang go on."""
        self.gate.set()
        self.gate = asyncio.Event()

    async def reopen(self) -> None:
        self.let_go()
        await self.db.close(timeout=0.05)
        self.lent.clear()
        await self._until(self._all_ended)
        self.moods = [""]
        await self.db.open()
        self._watch_line()

    async def turn(self) -> None:
        for _ in range(self.random.randrange(1, 4)):
            await asyncio.sleep(0)
            self.books()

    async def wait(self) -> None:
        await asyncio.sleep(self.random.choice([0.001, 0.005, 0.02]))

    # --- the callbacks ------------------------------------------------------------------------

    async def callback(self, conn: Any) -> None:
        mood = self.random.choice(self.moods)
        if mood == "raise":
            raise OSError("not now")
        if mood == "close":
            await conn.close()
        elif mood == "hang":
            await self.gate.wait()
        elif mood == "swallow":
            gate = self.gate
            while not gate.is_set():
                with suppress(asyncio.CancelledError):
                    await gate.wait()

    # --- how it happens -----------------------------------------------------------------------

    async def _hold(self, timeout: float, ending: str, queries: int) -> None:
        task = asyncio.current_task()
        assert task is not None
        with suppress(AcquireTimeout, psycopg.Error, ZeroDivisionError):
            async with self.db.connection(timeout) as conn:
                if ending == "autocommit":
                    await conn.set_autocommit(True)
                for _ in range(queries):
                    await conn.execute("select 1")
                self.holding[task] = asyncio.Event()
                try:
                    await self.holding[task].wait()
                finally:
                    del self.holding[task]
                if ending == "error":
                    _ = 1 / 0
                if ending == "close":
                    await conn.close()

    async def _lend(self, timeout: float) -> None:
        with suppress(AcquireTimeout, psycopg.Error):
            self.lent.append(await self.pool.getconn(timeout))

    async def _check(self) -> None:
        with suppress(psycopg.Error):
            await self.pool.check()

    async def _ask(self) -> None:
        with suppress(psycopg.Error):
            await self.db.check(0.5)

    def _all_ended(self) -> bool:
        for event in self.holding.values():
            event.set()
        return not self.tasks

    async def _put(self) -> None:
        if not self.lent:
            return
        conn = self.lent.pop(self.random.randrange(len(self.lent)))
        try:
            await conn.execute("select 1")
        except psycopg.Error:
            pass
        finally:
            await self.pool.putconn(conn)

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work, name=f"task-{len(self.history):04}")
        self.tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self.tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            raise error  # shown by the loop, as an error of the test

    def _admin(self, query: str, *params: Any) -> list[tuple[Any, ...]]:
        return self.admin.execute(query, params).fetchall()

    def _sessions(self) -> list[int]:
        query = "select pid from pg_stat_activity where application_name = %s order by pid"
        return [row[0] for row in self._admin(query, NAME)]

    # --- what must hold -----------------------------------------------------------------------

    def _watch_line(self) -> None:
        """See to it that nobody is served while somebody who came before still waits."""
        line = life(self.pool).line
        append, offer = line.append, type(line).offer

        class Watched(type(line)):  # type: ignore[misc]
            __slots__ = ()

            def append(self, waiter: Any) -> None:
                append(waiter)

            def offer(self, conn: Any) -> bool:
                waiting = [w for w in self if not w.future.done()]
                served = offer(self, conn)
                assert served == bool(waiting)
                assert not served or waiting[0].was_served()
                return bool(served)

        line.__class__ = Watched

    def books(self) -> None:
        """Raise unless the books balance; called between any two steps."""
        pool = self.pool
        if pool.state is not State.OPEN:
            return  # what is left of a life is about to go
        idle = [conn._session for conn in life(pool).idle]
        held = [checkout.session for checkout in life(pool).ledger.held]
        between = [who for who in life(pool).between._steps if isinstance(who, Session)]
        handed = [
            waiter.future.result()._session
            for waiter in life(pool).line._called
            if waiter.was_served()
        ]
        there = [*idle, *held, *between, *handed]
        assert len(set(there)) == len(there), "a connection is in two places"
        now = pool.snapshot()
        making = life(pool).connector.pending
        assert now.total == now.in_use + now.idle + now.returning + now.checking == len(there)
        assert (now.in_use, now.idle, now.making) == (len(held), len(idle), making)
        assert now.returning + now.checking == len(between) + len(handed)
        counts = pool.counts()
        for name in ("total", "in_use", "idle", "waiting", "making", "returning", "checking"):
            assert counts.get(name, 0) == getattr(now, name)
        # Whatever session is alive, and nobody has been parted from, is in one of the places, or
        # an attempt is about to put it there.
        nowhere = {
            session
            for session in life(pool).sessions
            if session.in_pool
            and session.pgconn.status == OK
            and session.handle is not None
            and not isinstance(session.handle, RetiredConnection)
        } - set(there)
        assert len(nowhere) <= making, "a connection is in no place"
        assert now.total + making <= self.most
        assert life(pool).made == now.total
        assert all(session.checkout is None for session in idle)
        assert all(c.session.checkout is c for c in life(pool).ledger.held)
        if life(pool).line:
            assert not idle, "somebody waits while a connection is idle"

    async def run(self, steps: int) -> None:
        chances: dict[Callable[[], Any], float] = {
            self.acquire: 24, self.lend: 6, self.give_back: 8, self.release: 24, self.cancel: 12,
            self.cancel_everybody: 1, self.kill: 3, self.resize: 3, self.drain: 2, self.check: 2,
            self.ask: 2, self.change_mood: 3, self.let_go: 8, self.reopen: 0.5,
            self.turn: 24, self.wait: 12,
        }  # fmt: skip
        for _ in range(steps):
            (step,) = self.random.choices(list(chances), list(chances.values()))
            self.history.append(step.__name__)
            if (work := step()) is not None:
                await work
            self.books()

    async def settle(self) -> None:
        """Let everything end, and look at what is left."""
        self.moods = [""]
        self.let_go()
        while self.tasks or self.lent:
            for event in self.holding.values():
                event.set()
            self.give_back()
            await asyncio.sleep(0.001)
            self.books()
        await self._until(
            lambda: not life(self.pool).tasks.running and not life(self.pool).connector.wanted
        )
        self.books()
        counts = self.pool.counts()
        assert counts["in_use"] == counts["waiting"] == 0
        assert counts["idle"] == life(self.pool).total >= self.pool.min_size
        # Every one of them can be had, and works; so can as many more as there may be.
        await self.pool.check()  # a session that was killed may not have heard of it yet
        conns = [await self.pool.getconn(10) for _ in range(self.pool.max_size)]
        for conn in conns:
            await conn.execute("select 1")
        with pytest.raises(AcquireTimeout):
            await self.pool.getconn(0)
        for conn in conns:
            await self.pool.putconn(conn)
        self.books()

    async def _until(self, holds: Callable[[], bool]) -> None:
        async with asyncio.timeout(10):
            while not holds():
                await asyncio.sleep(0.002)

    async def close(self) -> None:
        over = life(self.pool)
        await self.db.close(timeout=5)
        assert not over.ledger.held
        assert not over.line
        assert not over.idle
        assert not over.tasks.running
        await self._until(lambda: not self._sessions())
        self.admin.close()


@pytest.mark.parametrize("seed", SEEDS)
async def test_the_books_balance_after_every_step(
    seed: int, dsn: str, make_manager: MakeManager
) -> None:
    errors: list[Any] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: errors.append(context))
    simulator: Simulator

    async def callback(conn: Any) -> None:
        await simulator.callback(conn)

    # Not all of them always: where there is none, other ways are gone.
    calls = {name: callback for bit, name in enumerate(CALLBACKS) if seed >> bit & 1}
    db = make_manager(
        application_name=NAME, min_size=1, max_size=3, timeout=5, max_waiting=0, **calls
    )
    simulator = Simulator(db, dsn, seed)
    await db.open()
    simulator._watch_line()
    begin = time.monotonic()
    try:
        await simulator.run(STEPS)
        await simulator.settle()
        await simulator.close()
        assert not errors
    except BaseException as ex:
        ex.add_note(f"POOLKEEPER_SEED={seed}, after {time.monotonic() - begin:.1f} s")
        ex.add_note(f"steps: {' '.join(simulator.history)}")
        ex.add_note(f"{db!r}, errors: {errors}")
        raise
    finally:
        simulator.moods = [""]
        simulator.let_go()
        simulator.admin.close()
