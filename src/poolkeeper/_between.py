"""
Connections that are neither idle nor in use: being made, given back or checked.

The idle ones are in a deque of their own, those in use in the `Ledger`; each of the others has a
*step*, which says what is done with it, since when, and in whose function. What moves a
connection from one of the three places to another does so without an await in between, so it
is always in exactly one of them, and the numbers are counted, not kept.
"""

from __future__ import annotations

from collections.abc import Iterable
from time import monotonic
from typing import Any, Literal, TypeAlias

from ._snapshot import StepRow
from ._where import code_behind, site

Number: TypeAlias = Literal["making", "returning", "checking"]


class Step:
    """What is done with one connection."""

    __slots__ = ("doing", "function", "number", "since")

    def __init__(self, number: Number, doing: str, function: object = None) -> None:
        self.number: Number = number
        self.doing = doing
        self.function = function
        self.since = monotonic()

    def now(self, doing: str, function: object = None) -> None:
        """Note what is done from here on: "in the reset callback", the user's *function*."""
        self.doing = doing
        self.function = function
        self.since = monotonic()

    def row(self, now: float) -> StepRow:
        """Return the step in words."""
        code = code_behind(self.function) if self.function is not None else None
        return StepRow(
            self.number,
            self.doing,
            site(code, code.co_firstlineno) if code is not None else "",
            max(0.0, now - self.since),
        )


class Between:
    """
    The steps of those that are given back or checked, in one life of a pool; by their `Session`.

    One that is being made is known by its `Attempt`.
    """

    def __init__(self) -> None:
        self._steps: dict[Any, Step] = {}

    def begin(self, who: object, number: Number, doing: str, function: object = None) -> Step:
        """Count *who* as one of *number*, whatever it was before."""
        step = self._steps[who] = Step(number, doing, function)
        return step

    def now(self, who: object, doing: str, function: object = None) -> None:
        """Note what is done with *who* from here on, if it is in here."""
        if (step := self._steps.get(who)) is not None:
            step.now(doing, function)

    def end(self, who: object) -> None:
        """Count *who* no more: it is idle, in use, or gone."""
        self._steps.pop(who, None)

    def clear(self) -> None:
        """Count nobody any more: all are gone."""
        self._steps.clear()

    def __contains__(self, who: object) -> bool:
        return who in self._steps

    def count(self, number: Number) -> int:
        """Return how many there are of *number*."""
        return sum(step.number == number for step in list(self._steps.values()))

    def rows(self, others: Iterable[Step]) -> tuple[StepRow, ...]:
        """Return all steps, and *others*, those that take longest first."""
        now = monotonic()
        steps = sorted([*self._steps.values(), *others], key=lambda step: step.since)
        return tuple(step.row(now) for step in steps)
