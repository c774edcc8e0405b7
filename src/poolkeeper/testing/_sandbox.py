"""
`sandbox()`: a test whose work is rolled back, commits and all.

The words, and most of the rules, are those of Ecto's SQL sandbox: a test *owns* a connection, and
what it starts belongs to it; whoever has no owner is *allowed*, or told.
"""

from __future__ import annotations

import asyncio
import contextvars
import inspect
import weakref
from collections.abc import Callable, Generator
from contextlib import contextmanager
from functools import wraps
from types import TracebackType
from typing import Any, Self, TypeVar, overload

from psycopg import IsolationLevel

from poolkeeper import BoundPool, PoolManager
from poolkeeper.errors import briefly, see

from ._errors import LeftBehindError, OwnershipError, SandboxError
from ._seam import Base, StandIn, life_of, require_manager
from ._turns import Hold, Turns

Function = TypeVar("Function", bound=Callable[..., Any])

_owners: contextvars.ContextVar[tuple[Sandbox, ...]] = contextvars.ContextVar(
    "poolkeeper_sandboxes", default=()
)
"""The sandboxes that the context belongs to, the innermost last."""

_outside: contextvars.ContextVar[bool] = contextvars.ContextVar("poolkeeper_outside", default=False)


@contextmanager
def outside() -> Generator[None]:
    """
    Let what is acquired in the block be the pool's own, outside of any sandbox: it commits.

    For what has to be there for others too; whoever writes it takes it away. Ecto's
    ``unboxed_run``.

    .. versionadded:: 0.1.0
    """
    before = _outside.get()
    _outside.set(True)
    try:
        yield
    finally:
        _outside.set(before)


class Boxes(StandIn):
    """Serves the acquires of a pool on which there are sandboxes."""

    def __init__(self, life: Any) -> None:
        self.pool = life.pool
        self._life = life
        self._boxes: list[Sandbox] = []
        self._allowed: weakref.WeakKeyDictionary[asyncio.Task[Any], Sandbox] = (
            weakref.WeakKeyDictionary()
        )

    def add(self, box: Sandbox) -> None:
        """Let *box* serve its own."""
        if box.shared and self._boxes:
            raise SandboxError(
                f'pool "{self._life.name}" cannot have a shared sandbox beside another one',
                detail=f"Opened {self._boxes[0].opened}. A shared one serves whoever asks.",
                hint=f"Let one end before the other begins. {see('sandbox')}",
            )
        self._boxes.append(box)
        self._life.let_serve(self)

    def remove(self, box: Sandbox) -> None:
        """Let *box* serve nobody any more."""
        self._boxes.remove(box)
        if not self._boxes and self._life.stand_in is self:
            self._life.let_serve(None)

    def allow(self, task: asyncio.Task[Any], box: Sandbox) -> None:
        """Let *task*, which has no owner, belong to *box*."""
        self._allowed[task] = box

    async def acquire(self, timeout: float | None, frame: Any, lineno: int) -> Any:
        """Return a connection of the sandbox that the caller belongs to."""
        if _outside.get():
            return None
        return await self._of_caller().acquire(timeout, frame, lineno)

    def release(self, conn: Any, roll_back: bool, tells: bool) -> asyncio.Future[None] | None:
        """Take a connection of one of the sandboxes back."""
        hold: Hold = conn._hold
        return hold.turns.release(conn, roll_back, tells)

    def _of_caller(self) -> Turns:
        mine = [box for box in _owners.get() if box.is_of(self._life)]
        task: Any = asyncio.current_task()
        if not mine and (allowed := self._allowed.get(task)) is not None:
            mine = [allowed]
        if not mine:
            mine = [box for box in self._boxes if box.shared]
        if not mine:
            raise OwnershipError(
                f'a connection of pool "{self._life.name}" was asked for by a task that belongs to'
                " no test",
                detail=f'Task "{task.get_name()}" was not started by a test that has a sandbox,'
                " or by a thread that has not its context. What it writes would stay.",
                hint="Allow it: box.allow(task), or box.allow(function) for what a thread calls;"
                " sandbox(manager, shared=True) serves whoever asks, for one test at a time."
                f" {see('ownership')}",
            )
        return mine[-1]._turns


class Sandbox:
    """
    One test's connection of a pool; made by `sandbox()`.

    .. versionadded:: 0.1.0
    """

    _turns: Turns

    def __init__(
        self,
        manager: PoolManager[Any] | BoundPool[Any],
        shared: bool,
        timeout: float | None,
        isolation: IsolationLevel | None,
    ) -> None:
        self.shared: bool = shared
        self._manager = manager
        self._pool: BoundPool[Any] = manager.pool if isinstance(manager, PoolManager) else manager
        self._timeout = timeout
        self._isolation = isolation
        self._entered = False
        self._ended = False

    @property
    def opened(self) -> str:
        """Where it was entered."""
        return str(self._base.conn._checkout)

    def is_of(self, life: object) -> bool:
        """Tell whether it is one of that life of a pool."""
        return self._life is life

    def __repr__(self) -> str:
        state = "ended" if self._ended else "open" if self._entered else "new"
        return f'<Sandbox of pool "{self._pool.name}" {state}>'

    @briefly
    async def __aenter__(self) -> Self:
        if self._entered:
            raise SandboxError("a sandbox can be entered once: make another one")
        self._entered = True
        self._opens = self._pool.state.value not in ("opening", "open")
        if self._opens:
            await self._manager.open()
        try:
            await self._begin()
        except BaseException:
            if self._opens:
                await self._manager.close()
            raise
        return self

    async def _begin(self) -> None:
        self._life = life = life_of(self._pool)
        if any(box.is_of(life) and not box._ended for box in _owners.get()):
            raise SandboxError(
                f'there is a sandbox of pool "{self._pool.name}" around this one',
                detail="A test has one connection of a pool.",
                hint=f"Use the one that there is. {see('sandbox')}",
            )
        self._boxes = life.stand_in if isinstance(life.stand_in, Boxes) else Boxes(life)
        with outside():
            self._base = await Base.acquire(life, self._boxes, self._timeout)
        try:
            await self._base.begin(self._isolation)
            timeout = self._pool.timeout if self._timeout is None else self._timeout
            self._turns = Turns(self._base, self._pool.name, timeout)
            self._base.let_talk(self._turns.exchange)
            self._boxes.add(self)
        except BaseException:
            await self._base.put_back()
            raise
        self._before = _owners.get()
        _owners.set((*self._before, self))

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._ended = True
        _owners.set(tuple(box for box in _owners.get() if box is not self))
        try:
            left = await self._turns.end()
        finally:
            self._boxes.remove(self)
            try:
                await self._base.put_back()
            finally:
                if self._opens:
                    await self._manager.close()
        if left and exc is None:
            raise LeftBehindError(
                f'a test has left {len(left)} connection(s) of pool "{self._pool.name}" behind',
                detail=" ".join(f"Acquired {hold.where}." for hold in left),
                hint="Acquire by a block, which gives back: async with manager.connection() as"
                f" conn. {see('left-behind')}",
            )

    @overload
    def allow(self, whom: asyncio.Task[Any]) -> None: ...

    @overload
    def allow(self, whom: Function) -> Function: ...

    def allow(self, whom: Any) -> Any:
        """
        Let somebody who belongs to no test belong to this one, as long as it lasts.

        Args:
            whom: A task that runs already; or a function, async or not, for whoever calls it:
                a thread, or a task that was started before the test.

        Returns:
            For a function, one that does the same, and belongs to this test while it runs.

        Raises:
            SandboxError: If the sandbox is not open.
        """
        if not self._entered or self._ended:
            raise SandboxError(f"{self!r} is not open: nobody can be allowed")
        if isinstance(whom, asyncio.Task):
            self._boxes.allow(whom, self)  # pyright: ignore[reportUnknownArgumentType]
            return None

        @contextmanager
        def owned() -> Generator[None]:
            before = _owners.get()
            _owners.set((*before, self))
            try:
                yield
            finally:
                _owners.set(before)

        if inspect.iscoroutinefunction(whom):

            @wraps(whom)
            async def call_async(*args: Any, **kwargs: Any) -> Any:
                with owned():
                    return await whom(*args, **kwargs)

            return call_async

        @wraps(whom)
        def call(*args: Any, **kwargs: Any) -> Any:
            with owned():
                return whom(*args, **kwargs)

        return call


def sandbox(
    manager: PoolManager[Any] | BoundPool[Any],
    *,
    shared: bool = False,
    timeout: float | None = None,
    isolation: IsolationLevel | None = None,
) -> Sandbox:
    """
    Return a context manager for a test: all that it does with the pool is rolled back at its end.

    Every acquire of the test, and of the tasks that it starts, gets the one connection of the
    test, inside of a transaction that is rolled back. Commits become savepoints. Another task
    waits its turn; the same task, inside of a block of its own, gets a savepoint within. What could
    only wait for itself is told at once. Tests that run side by side do not see each other.

    Opens the manager if it is not open, and closes it then. Can be entered once.

    Args:
        manager: Whose connections are meant; a pool alone, too.
        shared: Serve whoever has no owner as well, such as an application on another thread's
            loop; for one test at a time.
        timeout: Seconds to wait for a connection of the pool, and then for a turn; the pool's
            own `timeout` if None.
        isolation: Level of the transaction of the test; None for that of the pool's connections, as
            its `configure` or the server has it. What a borrower sets has no effect on it.

    Raises:
        ConfigError: If *manager* is none.
        OpenError, AcquireTimeout: On entering, as `PoolManager.open()` and `connection()`.
        SandboxError: On entering, if there is one around it, or a shared one beside it.
        LeftBehindError: On leaving without an error, if a connection was not given back.

    .. versionadded:: 0.1.0
    """
    if not isinstance(manager, BoundPool):
        require_manager(manager)
    return Sandbox(manager, shared, timeout, isolation)


__all__ = ["Sandbox", "outside", "sandbox"]
