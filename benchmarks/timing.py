"""Interleaved timing: what disturbs one contestant disturbs the others too."""

from __future__ import annotations

import gc
import statistics
from collections.abc import Awaitable, Callable, Mapping, Sequence
from time import perf_counter

Work = Callable[[int, Callable[[], None]], Awaitable[int]]
"""
Does about as many operations as it is told, and returns how many it did.

It calls its second argument when all is prepared and the clock shall start.
"""

Samples = dict[str, list[float]]
"""Seconds per operation, one number for each round."""


async def interleave(works: Mapping[str, Work], rounds: int, seconds: float) -> Samples:
    """
    Time each of *works* once per round, in an order that rotates.

    Args:
        works: By name.
        rounds: How many samples of each; what comes before the first is warm-up.
        seconds: How long one sample takes, about.
    """
    sizes = {name: await _warm_up(work, seconds) for name, work in works.items()}
    samples: Samples = {name: [] for name in works}
    names = list(works)
    gc.collect()
    gc.freeze()  # so that to collect before each sample takes no time
    for number in range(rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            elapsed, done = await _timed(works[name], sizes[name])
            samples[name].append(elapsed / done)
    gc.unfreeze()
    return samples


async def _warm_up(work: Work, seconds: float) -> int:
    """Run until it is warm, and return how many operations take *seconds*."""
    size = 1
    while True:
        elapsed, done = await _timed(work, size)
        if elapsed >= seconds / 4:
            return max(1, round(done * seconds / elapsed))
        size = done * 4


async def _timed(work: Work, size: int) -> tuple[float, int]:
    begin = 0.0

    def start() -> None:
        nonlocal begin
        begin = perf_counter()

    gc.collect()
    gc.disable()
    try:
        done = await work(size, start)
        return perf_counter() - begin, done
    finally:
        gc.enable()


def ratios(samples: Mapping[str, Sequence[float]], name: str, against: str) -> list[float]:
    """Return the ratio of two contestants, round by round."""
    return [a / b for a, b in zip(samples[name], samples[against], strict=True)]


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Return the quartiles; the one in the middle is the median."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high
