"""
The bond between a pool and the event loop and process that opened it.

`LoopBinding.is_here()` is asked on every acquire, release and I/O, so it is one identity
comparison. Everything that costs more happens only when the answer is no.
"""

from __future__ import annotations

import asyncio
import os
import sys
import threading
import weakref
from asyncio import _get_running_loop
from collections.abc import Callable

from ._advice import advice, advice_after_fork
from ._events import Listeners
from ._where import NO_LOOP, Place, running_loop
from .errors import LoopMismatchError, see

_bindings: weakref.WeakSet[LoopBinding] = weakref.WeakSet()

_OUTSIDE = (
    "Await it from a coroutine on the loop that opened the pool; in a thread without a loop, hand"
    " that one the work with asyncio.run_coroutine_threadsafe()."
)
_ELSEWHERE = (
    "Open one PoolManager per event loop, or hand the work to the owner loop with"
    " asyncio.run_coroutine_threadsafe()."
)
_IN_EACH_RUN = (
    "Every asyncio.run() makes a new loop: open the pool in the one that uses it, with"
    ' "async with manager:".'
)
_ON_ITS_LOOP = (
    "Open the pool on the loop that uses it: the one that opened it does not run, so no work can"
    " be handed to it."
)
_WORKER = "AnyIO worker thread"
_IN_WORKER = (
    'The framework calls what is not async in a thread of its own: write "async def", or in the'
    ' function anyio.from_thread.run(manager.fetchval, "select 1"), which asks on the loop of the'
    " application."
)

_beginning = threading.Lock()

inherited: list[object] = []
"""What this process, forked, got from its parent and must neither use nor finalise."""


def in_forked_child(function: Callable[[], object]) -> None:
    """Let *function* be called in each process that is forked from now on; Windows has none."""
    if hasattr(os, "register_at_fork"):
        # Cheaper than asking os.getpid() on every use, and seen by forks made in C too
        # (they call PyOS_AfterFork_Child).
        os.register_at_fork(after_in_child=function)


def weakly(method: Callable[[], object]) -> Callable[[], object]:
    """Return a function that calls *method*: a timer of it does not keep its object alive."""
    reference = weakref.WeakMethod(method)

    def call() -> None:
        alive = reference()
        if alive is not None:
            alive()

    return call


def beginning() -> threading.Lock:
    """
    Return the lock under which a life begins, and one whose loop is gone is let go of.

    Threads that open one pool at the same time shall find one owner. Held for a few synchronous
    steps, never across an await.
    """
    return _beginning


class LoopBinding:
    """
    Owner loop and process of one life of a pool.

    The loop is held weakly: a pool must not keep a dead loop alive, and the number of a dead
    loop (its `id()`) may be given to the next one.
    """

    __slots__ = (
        "__weakref__", "_forked", "admits", "listeners", "name", "opened", "owner_loop", "pool",
    )  # fmt: skip

    pool: weakref.ref[object] | None
    """The pool, which a forked child must not finalise."""

    def __init__(self, name: str, site: str | None = None) -> None:
        """
        Bind to the running loop and to this process.

        Args:
            name: Name of the pool, for messages.
            site: ``file:line`` to name as the place of it; that of the caller if None.

        Raises:
            LoopMismatchError: If no loop is running, or one that psycopg cannot use.
        """
        self.name = name
        self.opened = Place.here(site)
        self._forked = False
        self.pool = None
        self.listeners: Listeners | None = None
        loop = running_loop()
        if loop is None:
            raise LoopMismatchError(
                f'pool "{name}" cannot be opened outside of an event loop',
                detail=f"open() was called {self.opened}.",
                hint="Call it from a coroutine, under asyncio.run(). Trio and curio are not"
                f" supported by psycopg. {see('loop-mismatch')}",
            )
        # Where its module was not loaded there is no such loop; loading it takes time.
        proactor = sys.modules.get("asyncio.proactor_events")
        if proactor is not None and isinstance(loop, proactor.BaseProactorEventLoop):
            raise LoopMismatchError(
                f'pool "{name}" cannot be opened on a ProactorEventLoop',
                detail=f"psycopg cannot wait for sockets on it. open() was called {self.opened}.",
                hint="Run the program on a selector loop:"
                " asyncio.run(main(), loop_factory=asyncio.SelectorEventLoop); with uvicorn,"
                " --loop asyncio:SelectorEventLoop. Setting a loop policy after the loop was"
                " made has no effect. Where the program needs the Proactor loop (subprocesses,"
                " Playwright), run the pool in a thread of its own with a selector loop."
                f" {see('loop-mismatch')}",
            )
        self.owner_loop: Callable[[], asyncio.AbstractEventLoop | _Never | None] = weakref.ref(loop)
        self.admits: Callable[[], object] = self.owner_loop
        """The loop on which a connection can be acquired: the owner's, until the pool closes."""
        _bindings.add(self)

    def admit_nobody(self) -> None:
        """Let no connection be acquired without a further question."""
        self.admits = _never

    def admit(self) -> None:
        """Let connections be acquired again."""
        self.admits = self.owner_loop

    def is_here(self) -> bool:
        """Tell whether the caller runs on the owner loop, in the owner process."""
        running = _get_running_loop()
        return running is not None and running is self.owner_loop()

    @property
    def loop(self) -> asyncio.AbstractEventLoop | None:
        """The owner loop; None when it is gone or belongs to another process."""
        loop = self.owner_loop()
        return None if isinstance(loop, _Never) else loop

    @property
    def forked(self) -> bool:
        """True in a process forked from the one that opened the pool."""
        return self._forked

    @property
    def dead(self) -> bool:
        """True when nobody can run on the owner loop any more, from this process."""
        loop = self.loop
        return loop is None or loop.is_closed()

    def check(self, purpose: str) -> None:
        """
        Return if the caller is where the pool belongs, raise otherwise.

        Args:
            purpose: What the pool was used for: ``"acquire a connection"``.

        Raises:
            LoopMismatchError: With both places.
        """
        if not self.is_here():
            raise self.mismatch(purpose)

    def mismatch(self, purpose: str) -> LoopMismatchError:
        """Return the error that says where the pool belongs, where it was used, and what for."""
        used = Place.here()
        if self.listeners is not None:
            words = {"opened": str(self.opened), "used": str(used)}
            self.listeners.tell("loop_mismatch", words, purpose=purpose)
        loop = self.loop
        if self._forked:
            return LoopMismatchError(
                f'pool "{self.name}" was opened in another process',
                detail=f"Opened {self.opened.describe()} in process {self.opened.pid}."
                f" Used {used} in process {os.getpid()}, forked from it, to {purpose}.",
                hint="Open the pool in each process, after the fork: await manager.open()."
                " The parent's connections stay the parent's. With gunicorn, open it in the"
                " application's lifespan, not at import under --preload."
                f" {advice_after_fork()}{see('fork')}",
            )
        what, owner, hand_over = "is bound to a different event loop", "", False
        if used.loop == NO_LOOP:
            what, hint, hand_over = "was used outside of its event loop", _OUTSIDE, True
        elif loop is None or loop.is_closed():
            what, hint = "is bound to an event loop that is closed", _IN_EACH_RUN
        elif not loop.is_running():
            # The thread that would run it may be this one: who waits for it waits for ever.
            owner, hint = "not running", _ON_ITS_LOOP
        else:
            hint, hand_over = _ELSEWHERE, True
        if hand_over and used.thread == _WORKER:
            hint = _IN_WORKER
        return LoopMismatchError(
            f'pool "{self.name}" {what}',
            detail=f"Opened {self._owner_in_words(owner)}. Used {used} to {purpose}.",
            hint=f"{hint} {advice(hand_over)}{see('loop-mismatch')}",
        )

    def _owner_in_words(self, loop_state: str = "") -> str:
        loop = self.loop
        closed = loop is None or loop.is_closed()
        return self.opened.describe("closed" if closed else loop_state)

    def _after_fork_in_child(self) -> None:
        self._forked = True
        self.owner_loop = self.admits = _never
        if self.pool is not None:
            inherited.append(self.pool())


class _Never:
    """Stands where no running loop is ever found."""


_NEVER = _Never()


def _never() -> _Never:
    return _NEVER


def _after_fork_in_child() -> None:
    global _beginning
    _beginning = threading.Lock()  # another thread of the parent may have held it
    for binding in list(_bindings):
        binding._after_fork_in_child()


in_forked_child(_after_fork_in_child)
