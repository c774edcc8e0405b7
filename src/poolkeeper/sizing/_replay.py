"""
How long a workload waits for a pool of one size: a queue, first come first served.

Each acquire takes the connection that is free first. That is all there is to a pool in front of
which tasks wait in line; so what is replayed is exact for these acquires, and an estimate for
the next ones only as far as those are like them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from heapq import heapreplace
from itertools import islice

from ._workload import Use, Workload

MOST_DRAWS = 500_000
"""Acquires that are replayed for one size: the closer to its limit, the more it takes."""

FEWEST_DRAWS = 100_000

WARM_UP = 0.05
"""Share of them that is left out: the queue begins empty."""


@dataclass(frozen=True, slots=True)
class Waits:
    """How long acquires wait, in seconds."""

    mean: float
    p50: float
    p99: float
    waiting: float
    """Share of the acquires that wait at all, 0 to 1."""

    @classmethod
    def of(cls, waits: list[float]) -> Waits:
        """Sum up; *waits* is sorted by it."""
        waits.sort()
        number = len(waits)
        return cls(
            mean=sum(waits) / number,
            p50=waits[number // 2],
            p99=waits[min(number - 1, number * 99 // 100)],
            waiting=sum(wait > 0 for wait in waits) / number,
        )


def replay(uses: Iterable[Use], size: int) -> list[float]:
    """Return the seconds that each of *uses* would have waited in a pool of *size*."""
    free = [0.0] * size
    now = 0.0
    waits: list[float] = []
    for gap, hold, _ in uses:
        now += gap
        begin = max(now, free[0])
        waits.append(begin - now)
        heapreplace(free, begin + hold)
    return waits


def estimate(workload: Workload, size: int, *, seed: int = 1) -> Waits:
    """
    Return how long acquires would wait in a pool of *size*, which must not be overloaded.

    Takes up to half a second of a processor.
    """
    spare = 1 - workload.load / size
    draws = int(min(MOST_DRAWS, max(FEWEST_DRAWS, 25_000 / spare**2)))
    waits = replay(islice(workload.draw(seed), draws), size)
    return Waits.of(waits[int(draws * WARM_UP) :])
