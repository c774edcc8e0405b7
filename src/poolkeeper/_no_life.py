"""
`NoLife`: stands for the life of a pool that has none, and refuses everything with the right words.

What a pool is made with, and is before it is opened, needs no more than this: its rooms are
loaded when it is opened.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias

from . import _facts
from ._counters import Counters
from ._where import Place, warn_user
from .errors import ClosedError, NotOpenError, see

if TYPE_CHECKING:
    from ._binding import LoopBinding

ConnectionCallback: TypeAlias = Callable[[Any], Awaitable[None]]


class State(StrEnum):
    """Where a pool is in its life."""

    NEW = "new"
    OPENING = "opening"
    OPEN = "open"
    CLOSING = "closing"
    CLOSED = "closed"


class Options(NamedTuple):
    """What a pool was made with, beside what psycopg_pool keeps of it."""

    keeps: bool
    """False for a null pool, which closes each connection that nobody waits for."""
    min_size: int
    max_size: int
    configure: ConnectionCallback | None
    check: ConnectionCallback | None
    reset: ConnectionCallback | Literal["discard"] | None
    application_name: str | None
    leak_threshold: float | None
    expected_processes: int | None


class NoLife:
    """
    Stands for the life of a pool that has none: it refuses everything with the right words.

    Args:
        name: Of the pool.
        options: Of the pool.
        last: The binding of its last life; None if it was never opened.
        counters: Of its last life.
    """

    ending = True
    gone = False
    held = ()

    def __init__(
        self,
        name: str,
        options: Options,
        last: LoopBinding | None = None,
        counters: Counters | None = None,
    ) -> None:
        self.name = name
        self.state = State.NEW if last is None else State.CLOSED
        self.binding = _NOBODY
        self.min_size, self.max_size = options.min_size, options.max_size
        self.last = last
        self.counters = counters or Counters()
        self.closed = ""
        """At which line of the program its last life was ended; "" if that was a library's."""
        self.facts: Callable[[], _facts.PoolSnapshot] | None = None
        """Tells what was at the end of its last life, if that was closed."""

    @property
    def forked(self) -> bool:
        """True if a parent process opened the pool last."""
        return self.last is not None and self.last.forked

    @property
    def opened(self) -> Place | None:
        """Where the pool was opened last."""
        return self.last.opened if self.last is not None else None

    def check_usable(self, purpose: str) -> None:
        """
        Refuse it.

        Raises:
            NotOpenError, ClosedError: Always.
        """
        if self.state is State.CLOSED:
            raise closed_error(self.name, self.state, self.opened, purpose, self.closed)
        raise NotOpenError(
            f'pool "{self.name}" is not open',
            detail=f"Used {Place.here()} to {purpose}, before any open().",
            hint='Open it first: "async with manager:" or "await manager.open()", in the'
            " start-up hook of the framework. Test clients that skip the lifespan skip"
            f" that too. {see('not-open')}",
        )

    def out_of_service(self, _purpose: str) -> str:
        """Return in words that it is not open."""
        return "the pool is closed" if self.state is State.CLOSED else "the pool is not open"


class _Nobody:
    """Stands for the binding of a pool that has no life."""

    __slots__ = ()

    @staticmethod
    def admits() -> object:
        return _NOBODY

    @staticmethod
    def is_here() -> bool:
        return False


_NOBODY = _Nobody()


def warn_of_constructor(name: str) -> None:
    """Warn as psycopg_pool does: one day its constructor will open no pool."""
    warn_user(
        f"opening the async pool {name} in the constructor is deprecated: use await pool.open(), or"
        f" async with {name}(...) as pool",
        RuntimeWarning,
    )


def closed_error(
    name: str, state: State, opened: Place | None, purpose: str = "", closed: str = ""
) -> ClosedError:
    """Return the error that says that the pool is closed, or about to be."""
    facts = [
        f"Opened {opened}." if opened else "",
        f"Closed at {closed}." if closed else "",
        f"Used {Place.here()} to {purpose}." if purpose else "",
    ]
    return ClosedError(
        f'pool "{name}" is {state.value}',
        detail=" ".join(filter(None, facts)),
        hint=f"open() opens it again. {see('closed')}",
    )
