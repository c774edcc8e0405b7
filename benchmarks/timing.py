"""Timing: one turn of a contestant in a process of its own, or several in turns in one process."""

from __future__ import annotations

import asyncio
import gc
import statistics
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from time import perf_counter, process_time
from typing import Any

Work = Callable[[int, Callable[[], None]], Awaitable[int]]
"""
Does about as many operations as it is told, and returns how many it did.

It calls its second argument when all is prepared and the clock shall start.
"""

Samples = dict[str, list[float]]
"""Seconds per operation, one number for each round."""


@dataclass(frozen=True)
class Turn:
    """How many operations, and the seconds that they took."""

    done: int
    wall: float
    cpu: float
    """Of the whole process."""


Turns = dict[str, Callable[[float], Awaitable[Turn]]]
"""What takes a turn of so many seconds, about, by contest."""


def runner(loop: str) -> asyncio.Runner:
    """Return what runs on *loop*."""
    if loop == "asyncio":
        return asyncio.Runner()
    import uvloop

    return asyncio.Runner(loop_factory=uvloop.new_event_loop)


async def timed(work: Work, size: int) -> Turn:
    """Let *work* do *size* operations, or about as many."""
    wall = cpu = 0.0

    def start() -> None:
        nonlocal wall, cpu
        wall, cpu = perf_counter(), process_time()

    gc.collect()
    done = await work(size, start)
    return Turn(done, perf_counter() - wall, process_time() - cpu)


def paced(work: Work) -> Callable[[float], Awaitable[Turn]]:
    """Return what takes a turn of so many seconds, about; the first one warms up before."""
    size = 0

    async def turn(seconds: float) -> Turn:
        nonlocal size
        size = size or await _warm_up(work, seconds)
        return await timed(work, size)

    return turn


async def interleave(works: Mapping[str, Work], rounds: int, seconds: float) -> Samples:
    """
    Time each of *works* once per round, in an order that rotates, without the garbage collector.

    Args:
        works: By name.
        rounds: How many samples of each; what comes before the first is warm-up.
        seconds: How long one sample takes, about.
    """
    gc.disable()
    try:
        sizes = {name: await _warm_up(work, seconds) for name, work in works.items()}
        samples: Samples = {name: [] for name in works}
        gc.collect()
        gc.freeze()  # so that to collect before each sample takes no time
        for number in range(rounds):
            for name in rotated(works, number):
                turn = await timed(works[name], sizes[name])
                samples[name].append(turn.wall / turn.done)
        return samples
    finally:
        gc.unfreeze()
        gc.enable()


def rotated(names: Any, number: int) -> list[str]:
    """Return *names* with another one first in each round."""
    names = list(names)
    first = number % len(names)
    return names[first:] + names[:first]


async def _warm_up(work: Work, seconds: float) -> int:
    """Run until it is warm, and return how many operations take *seconds*."""
    size = 1
    while True:
        turn = await timed(work, size)
        if turn.wall >= seconds / 4:
            return max(1, round(turn.done * seconds / turn.wall))
        size = turn.done * 4


def ratios(samples: Mapping[str, Sequence[float]], name: str, against: str) -> list[float]:
    """Return the ratio of two contestants, round by round."""
    return [a / b for a, b in zip(samples[name], samples[against], strict=True)]


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Return the quartiles; the one in the middle is the median."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high
