"""
What a pool had to do, as its events tell: when connections were wanted, how long they were held.

The last acquires are kept, in a bounded number, so a recording may run for as long as the program.
"""

from __future__ import annotations

import asyncio
import json
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from time import monotonic
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeAlias, cast

from poolkeeper import BoundPool, PoolManager
from poolkeeper.errors import ConfigError

from ._advice import TARGET, Advice, advise
from ._workload import Use, Workload, require

if TYPE_CHECKING:
    from poolkeeper.events import Acquired, Event, GaveUp, Released, TimedOut

MOST = 20_000
"""Acquires that are kept."""

KIND = "poolkeeper recording"
"""What the first line of a file says that it is."""

_recordings: weakref.WeakKeyDictionary[BoundPool[Any], Recording] = weakref.WeakKeyDictionary()
"""The last one of each pool."""

Came: TypeAlias = float
"""When a connection was wanted, by the monotonic clock."""


class Recording:
    """
    What one pool had to do. `record()` makes one that goes on; `load()` one that is over.

    As a context manager it stops at the end of the block. It may be asked while it goes on.

    Args:
        name: Of the pool.
        size: Its `max_size`.
        most: How many acquires are kept, the last ones.

    .. versionadded:: 0.1.0
    """

    def __init__(self, name: str = "", size: int | None = None, *, most: int = MOST) -> None:
        require(most >= 2, "most", most, "a whole number, 2 or more")
        self.name = name
        self.size = size
        self._done: deque[tuple[Came, float, float]] = deque(maxlen=most)
        self._in_vain: deque[Came] = deque(maxlen=most)
        self._held: dict[str, list[Came]] = {}
        self._unsubscribe: Callable[[], None] | None = None

    def __len__(self) -> int:
        """Return how many acquires are kept."""
        return len(self._done)

    @property
    def gave_up(self) -> int:
        """How many acquires ended without a connection, of those that are kept."""
        return len(self._in_vain)

    def stop(self) -> None:
        """Record no more. Does nothing if it has stopped."""
        if self._unsubscribe is not None:
            self._unsubscribe()
            self._unsubscribe = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    # --- what events tell ---------------------------------------------------------------------

    def follow(self, pool: PoolManager[Any] | BoundPool[Any]) -> Self:
        """Record what *pool* does from now on."""
        from poolkeeper import events

        def hear(event: Event) -> None:
            if isinstance(event, events.Acquired):
                self._acquired(event)
            elif isinstance(event, events.Released):
                self._released(event)
            else:
                assert isinstance(event, events.TimedOut | events.GaveUp)
                self._gave_up(event)

        self.stop()
        kinds = events.Acquired, events.Released, events.TimedOut, events.GaveUp
        self._unsubscribe = pool.subscribe(hear, *kinds)
        return self

    def _acquired(self, event: Acquired) -> None:
        self._held.setdefault(event.task, []).append(monotonic() - event.waited_seconds)

    def _released(self, event: Released) -> None:
        now = monotonic()
        came = self._held.get(event.task)
        # Of two that one task holds, the inner one comes back first.
        since = came.pop() if came else now - event.held_seconds
        if not came:
            self._held.pop(event.task, None)
        self._done.append((since, event.used_seconds, event.query_seconds))

    def _gave_up(self, event: TimedOut | GaveUp) -> None:
        self._in_vain.append(monotonic() - event.waited_seconds)

    # --- what is made of it -------------------------------------------------------------------

    def workload(self) -> Workload:
        """
        Return it as what estimates are made from.

        An acquire that was in vain counts as one; how long it would have held a connection is
        taken from the others, in turn.

        Raises:
            ConfigError: If nothing was recorded yet, or all of it in one moment.
        """
        done = list(self._done)
        vain = list(self._in_vain)
        if done and vain:
            # What is kept of one may go back further than what is kept of the other.
            oldest = min(came for came, _, _ in done)
            spread = (done[i * len(done) // len(vain)][1:] for i in range(len(vain)))
            done += [(c, *u) for c, u in zip(vain, spread, strict=True) if c >= oldest]
        done.sort()
        if len(done) < 2:
            return Workload(())
        seconds = done[-1][0] - done[0][0]
        before = done[0][0] - seconds / (len(done) - 1)  # as long as one of the others, on average
        uses: list[Use] = []
        for came, hold, query in done:
            uses.append(Use(came - before, hold, query))
            before = came
        return Workload(tuple(uses))

    def save(self, path: Path | str) -> None:
        """
        Write it to a file, which ``poolkeeper advise FILE`` reads: a JSON array in each line.

        Times and numbers only.
        """
        head = {"kind": KIND, "version": 1, "pool": self.name, "max_size": self.size}
        rows: list[list[Any]] = [[*row] for row in self._done]
        rows += [[came] for came in self._in_vain]
        with Path(path).open("w", encoding="utf-8") as file:
            for line in [head, *sorted(rows)]:
                file.write(json.dumps(line) + "\n")

    @classmethod
    def load(cls, path: Path | str) -> Self:
        """
        Read what `save()` has written.

        Raises:
            ConfigError: If there is no such file, or it holds something else.
        """
        try:
            with Path(path).open(encoding="utf-8") as file:
                head, *rows = (json.loads(line) for line in file)
            if head["kind"] != KIND or head["version"] != 1:
                raise KeyError("kind")
            loaded = cls(head["pool"], head["max_size"], most=max(2, len(rows)))
            for row in rows:
                if len(row) == 1:
                    loaded._in_vain.append(float(row[0]))
                else:
                    came, hold, query = map(float, row)
                    loaded._done.append((came, hold, query))
        except OSError as error:
            raise ConfigError(f"cannot read {str(path)!r}", detail=str(error.strerror)) from error
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f"{str(path)!r} is no recording",
                detail="It is not what Recording.save() writes.",
                hint="See poolkeeper.sizing.record()",
            ) from error
        return loaded


def record(pool: PoolManager[Any] | BoundPool[Any], *, most: int = MOST) -> Recording:
    """
    Record what *pool* has to do, from now until `stop()`.

    Before it is opened, or while it is; across `close()` and `open()`, too. Costs what a
    subscriber to the events of each checkout costs: a few microseconds for each.

    Args:
        pool: The manager, or its pool.
        most: How many acquires are kept, the last ones: some 100 bytes each.

    Raises:
        ConfigError: If *pool* is none, or *most* less than 2.

    .. versionadded:: 0.1.0
    """
    # Not by its class: PoolManager.advise() imports this.
    of: BoundPool[Any] = getattr(pool, "pool", cast(Any, pool))
    if not hasattr(of, "subscribe"):
        raise ConfigError(
            f"cannot record a {type(pool).__name__}: it is neither a PoolManager nor a BoundPool",
            parameter="pool",
        )
    recording = Recording(of.name, of.max_size, most=most).follow(of)
    _recordings[of] = recording
    return recording


async def advise_on(
    pool: BoundPool[Any], sizes: Sequence[int] | None = None, target: float = TARGET
) -> Advice:
    """
    Do what `PoolManager.advise()` promises.

    In a thread, for it takes a processor for a second or two, and the loop has to go on.
    """
    recording = _recordings.get(pool)
    if recording is None:
        raise ConfigError(
            f'nothing is recorded of pool "{pool.name}"',
            detail="Advice on its size is made from what it had to do.",
            hint="Call poolkeeper.sizing.record(manager) where the program starts",
        )
    return await asyncio.to_thread(
        advise,
        recording.workload(),
        sizes=sizes,
        target=target,
        current=pool.max_size,
        name=pool.name,
        gave_up=recording.gave_up,
    )
