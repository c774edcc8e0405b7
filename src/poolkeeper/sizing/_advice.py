"""What to make of the estimates: a table of sizes, and the smallest one that will do."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from typing_extensions import override

from ._replay import Waits, estimate
from ._workload import Workload, require

TARGET = 0.010
"""Seconds that one acquire in a hundred may wait, unless somebody says otherwise."""

ROWS = 10
"""Sizes that are looked at, unless somebody says which."""


@dataclass(frozen=True, slots=True)
class SizeRow:
    """One size."""

    size: int
    """`max_size` of the pool."""

    in_use: float
    """Share of its connections that is in use, on average: 1 or more is too much for it."""

    waits: Waits | None
    """None where acquires wait longer and longer, without end."""


@dataclass(frozen=True, slots=True)
class Advice:
    """
    For each size, how long acquires would wait. ``str()`` is a table, `plot()` a picture.

    It holds for the work that it was made from, and as long as a connection is held no longer
    for there being more of them: a server that has enough to do already works slower then.

    .. versionadded:: 0.1.0
    """

    name: str
    """Of the pool; empty if the workload was made up."""

    workload: Workload
    rows: tuple[SizeRow, ...]
    current: int | None
    """`max_size` as it is."""

    target: float
    """Seconds that one acquire in a hundred may wait."""

    gave_up: int = 0
    """Acquires that ended without a connection; how long they would have held one is guessed."""

    @property
    def size(self) -> int | None:
        """The smallest of the sizes whose p99 is within *target*; None if none is."""
        return next(
            (row.size for row in self.rows if row.waits and row.waits.p99 <= self.target), None
        )

    @override
    def __str__(self) -> str:
        return "\n".join([*self._head(), "", *self._table(), "", *self._words()])

    def _head(self) -> Iterable[str]:
        work = self.workload
        of = f'pool "{self.name}": ' if self.name else ""
        yield (
            f"{of}{work.rate:.4g} acquires per second, held for {duration(work.hold)} on average"
            f" (variation {work.variation:.2g}): {work.load:.3g} connections in use"
        )
        if self.name:
            given_up = f"; {self.gave_up:,} gave up" if self.gave_up else ""
            yield f"recorded: {len(work.uses):,} acquires in {work.seconds:.0f} s{given_up}"

    def _table(self) -> Iterable[str]:
        yield "max_size  in use   wait  wait p50  wait p99"
        for row in self.rows:
            marks = ["now"] * (row.size == self.current) + ["advised"] * (row.size == self.size)
            use = f"{row.size:>8}  {row.in_use:>6.0%}"
            if row.waits is None:
                waits = "   all     longer and longer"
            else:
                w = row.waits
                waits = f" {w.waiting:>6.1%}  {duration(w.p50):>8}  {duration(w.p99):>8}"
            yield f"{use}{waits}  {', '.join(marks)}".rstrip()

    def _words(self) -> Iterable[str]:
        who = "None of these keeps" if self.size is None else f"{self.size} is the least that keeps"
        yield f"{who} the wait within {duration(self.target)} at p99."
        yield "This holds for the same work, on a server that is not slower for more of it at once."

    def as_dict(self) -> dict[str, Any]:
        """Return all of it as what JSON can hold, but for the uses themselves."""
        work = self.workload
        return {
            "pool": self.name,
            "current": self.current,
            "advised": self.size,
            "target_seconds": self.target,
            "acquires": len(work.uses),
            "gave_up": self.gave_up,
            "seconds": work.seconds,
            "rate": work.rate,
            "hold_seconds": work.hold,
            "variation": work.variation,
            "rows": [asdict(row) for row in self.rows],
        }


def advise(
    workload: Workload,
    *,
    sizes: Sequence[int] | None = None,
    target: float = TARGET,
    current: int | None = None,
    name: str = "",
    gave_up: int = 0,
) -> Advice:
    """
    Estimate how long acquires would wait, for each size of the pool.

    Takes up to half a second of a processor for each size near its limit.

    Args:
        workload: What the pool has to do.
        sizes: To look at; by default those from the first that can do the work at all to the
            first where hardly anybody waits, *current* among them.
        target: Seconds that one acquire in a hundred may wait.
        current: `max_size` as it is.
        name: Of the pool.
        gave_up: How many acquires ended without a connection.

    Raises:
        ConfigError: If a number cannot be.
    """
    require(target >= 0, "target", target, "seconds, 0 or more")
    for size in sizes or ():
        require(size >= 1, "sizes", size, "whole numbers, 1 or more")
    require(current is None or current >= 1, "current", current, "a whole number, 1 or more")
    rows: dict[int, SizeRow] = {}

    def look_at(size: int) -> SizeRow:
        if size not in rows:
            in_use = workload.load / size
            rows[size] = SizeRow(size, in_use, estimate(workload, size) if in_use < 1 else None)
        return rows[size]

    if sizes is not None:
        for size in sizes:
            look_at(size)
    else:
        _look_around(look_at, workload.load, target)
        if current is not None:
            look_at(current)
    return Advice(name, workload, tuple(rows[s] for s in sorted(rows)), current, target, gave_up)


def _look_around(look_at: Any, load: float, target: float) -> None:
    """From the size below the first that can do it, until one in a hundred waits for nothing."""
    size = math.floor(load) + 1
    step = max(1, round(load / 20))
    if size > 1:
        look_at(size - 1)
    for _ in range(ROWS):
        row = look_at(size)
        if row.waits is not None and row.waits.p99 <= min(target, 0.0005):
            return
        size += step


def duration(seconds: float) -> str:
    """Put seconds into few characters: ``0``, ``0.4 ms``, ``12 ms``, ``3.1 s``."""
    if seconds < 0.00005:
        return "0"
    if seconds < 1:
        milliseconds = seconds * 1e3
        return f"{milliseconds:.1f} ms" if milliseconds < 10 else f"{milliseconds:.0f} ms"
    return f"{seconds:.1f} s" if seconds < 100 else f"{seconds:.0f} s"
