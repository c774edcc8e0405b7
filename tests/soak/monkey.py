"""
The monkey: one function for each kind of mischief.

It has three hands that work at the same time: one cancels requests, one troubles the server and
the network, one operates the pools. A round lets it do some of it, and tells how; where it may not
cost anybody a connection, a connection that is lost is a violation.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Collection
from contextlib import suppress
from typing import Any, ClassVar, Protocol

from poolkeeper import OpenError, PoolManager

from .book import AWAY, Book
from .outside import Outside


class Request(Protocol):
    """What the monkey sees of a request."""

    task: asyncio.Task[None]
    cancelled: bool


class Monkey:
    """
    Does what it may until it is told to stop.

    Args:
        requests: Those that run; it cancels some.
        pools: What it operates, each with the sizes that it should have.
    """

    def __init__(
        self,
        book: Book,
        outside: Outside,
        requests: Collection[Request],
        pools: dict[PoolManager[Any], tuple[int, int]],
    ) -> None:
        self._book = book
        self._outside = outside
        self._requests = requests
        self._pools = pools
        self._over = asyncio.Event()

    # --- what requests meet -----------------------------------------------------------------

    async def cancel(self) -> None:
        """Cancel a request, wherever it is."""
        await self._cancel(1)

    async def cancel_twice(self) -> None:
        """Cancel a request, and again while it ends."""
        await self._cancel(self.random.choice([2, 2, 3]))

    async def _cancel(self, times: int) -> None:
        if not self._requests:
            return
        victim = self.random.choice(list(self._requests))
        for _ in range(times):
            victim.cancelled = True
            victim.task.cancel()
            await asyncio.sleep(self.random.choice([0, 0, 0.001, 0.005]))

    # --- the server and the network -----------------------------------------------------------

    async def kill(self) -> None:
        """End a session, or a few, or all."""
        with self._book.troubles.during("kill"):
            await self._outside.ask("kill", self.random.choice([1, 1, 1, 3, 99]))

    async def restart(self) -> None:
        """Restart the server, in an orderly way or as if it had crashed."""
        with self._book.troubles.during("server"):
            await self._outside.ask("restart", self.random.choice(["fast", "immediate"]))

    async def cut(self) -> None:
        """Break every connection."""
        await self._network("cut", 0)

    async def reset(self) -> None:
        """Break every connection by a TCP reset."""
        await self._network("reset", 0)

    async def tear(self) -> None:
        """Break a connection in the middle of an answer."""
        await self._network("tear", 0.2)

    async def stall(self) -> None:
        """Let nothing through for a while; some of the time all is broken after that."""
        await self._network("stall", self.random.choice([0.1, 0.5, 1.5]))

    async def refuse(self) -> None:
        """Refuse new connections for a while, and break the old ones."""
        await self._network("refuse", 0.7)

    async def silence(self) -> None:
        """Say nothing on new connections for a while, and break the old ones."""
        await self._network("silence", 1.0)

    async def _network(self, what: str, seconds: float) -> None:
        with self._book.troubles.during("network"):
            await self._outside.ask(what)
            if what in ("refuse", "silence"):
                await self._outside.ask("cut")
            if seconds:
                await self._pause(seconds)
                if what == "stall" and self.random.random() < 0.3:
                    await self._outside.ask("cut")
                await self._outside.ask("heal")

    # --- operations -----------------------------------------------------------------------------

    async def resize(self) -> None:
        """Change the size of a pool."""
        db = self._any_pool()
        most = self.random.randint(1, self._pools[db][1])
        await db.pool.resize(self.random.randint(0, most), most)

    async def resize_back(self) -> None:
        """Give a pool the size that it should have."""
        db = self._any_pool()
        await db.pool.resize(*self._pools[db])

    async def drain(self) -> None:
        """Have all connections of a pool replaced."""
        await self._any_pool().pool.drain()

    async def look(self) -> None:
        """Have the idle connections of a pool looked at."""
        await self._any_pool().pool.check()

    async def close(self) -> None:
        """Close a pool under everybody's hands, maybe losing patience, and open it again."""
        db = self._any_pool()
        with self._book.troubles.during("close"):
            closing = asyncio.create_task(db.close(self.random.choice([0, 0.2, 3])))
            if self.random.random() < 0.2:
                await asyncio.sleep(self.random.random() * 0.1)
                closing.cancel()
            await asyncio.wait({closing})
            if not closing.cancelled():
                closing.result()
            await self._pause(self.random.choice([0, 0.05, 0.5]))
            await self._reopen(db)

    async def _reopen(self, db: PoolManager[Any]) -> None:
        """Open a pool, which may be cancelled or fail as long as the server is away."""
        if self.random.random() < 0.2:
            opening = asyncio.create_task(db.open())
            await asyncio.sleep(self.random.random() * 0.05)
            opening.cancel()
            with suppress(asyncio.CancelledError, OpenError):
                await opening
        while db.state != "open":
            began = asyncio.get_running_loop().time()
            try:
                await asyncio.gather(db.open(timeout=5), db.open(timeout=5))
            except OpenError as ex:
                if not self._book.troubles.any_of(AWAY - {"close"}, began):
                    self._book.violation("a pool could not be opened, and nothing was wrong", ex)
                    return
                await asyncio.sleep(0.1)

    def _any_pool(self) -> PoolManager[Any]:
        return self.random.choice(list(self._pools))

    # --- its hands ------------------------------------------------------------------------------

    CANCELS = (cancel, cancel_twice)
    NETWORK = (cut, reset, tear, stall, refuse, silence)
    SERVER = (kill, kill, kill, restart)
    OPERATES = (resize, resize_back, drain, look)

    ROUNDS: ClassVar[dict[str, tuple[tuple[Any, ...], ...]]] = {
        "quiet": (),
        # Nothing here costs anybody a connection.
        "calm": (CANCELS, OPERATES),
        "the server": (CANCELS, SERVER),
        "the network": (CANCELS, NETWORK),
        "closing": (CANCELS, (*OPERATES, close, close)),
        "everything": (CANCELS, SERVER + NETWORK, (*OPERATES, close)),
    }
    """What it may do in a round of each kind: a tuple for each hand."""

    async def trouble(self, kind: str, random: random.Random) -> None:
        """Be at it, as in a round of this *kind*, until `stop()`."""
        self.random = random
        self._over = asyncio.Event()  # of this loop
        async with asyncio.TaskGroup() as hands:
            hands.create_task(self._over.wait())
            for deeds in self.ROUNDS[kind]:
                hands.create_task(self._hand(deeds), name="monkey")

    def stop(self) -> None:
        """Let every hand finish what it does, and stop."""
        self._over.set()

    async def _hand(self, deeds: tuple[Callable[[Monkey], Awaitable[None]], ...]) -> None:
        often = deeds is self.CANCELS
        while not self._over.is_set():
            await self._pause(self.random.random() * (0.02 if often else 1.0))
            deed = self.random.choice(deeds)
            self._book.did(deed.__name__.replace("_", " "))
            await deed(self)

    async def _pause(self, seconds: float) -> None:
        """Wait, unless it is over."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._over.wait()
