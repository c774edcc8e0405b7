"""What a program has that it may have no more: tasks, descriptors, sessions, objects, memory."""

from __future__ import annotations

import asyncio
import gc
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from poolkeeper._binding import LoopBinding
from poolkeeper._checkouts import Checkout
from poolkeeper._connection import BoundConnection, ShownConnection
from poolkeeper._line import Waiter
from poolkeeper._recovery import Connector
from poolkeeper._session import Session

PAGE = os.sysconf("SC_PAGE_SIZE")

OURS = (ShownConnection, BoundConnection, Session, Checkout, Waiter, Connector, LoopBinding)
"""What a pool makes of its own."""


def rss() -> float:
    """Return how many MiB of memory this process has; nan where that cannot be read."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE / 2**20
    except OSError:
        return float("nan")


def descriptors() -> Counter[str]:
    """Return what this process has open, by kind; empty where that cannot be read."""
    found: Counter[str] = Counter()
    folder = Path("/proc/self/fd")
    for link in list(folder.iterdir()) if folder.exists() else ():
        try:
            found[str(link.readlink()).partition(":")[0]] += 1
        except OSError:
            continue  # the one that reads the directory
    return found


def tasks() -> list[asyncio.Task[Any]]:
    """Return the tasks of this loop but the one that asks."""
    return [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]


@dataclass(frozen=True)
class Objects:
    """How many objects there are, by kind."""

    ours: Counter[str]
    """Those that the pools make."""
    asyncio: Counter[str]
    """Tasks and futures."""
    classes: int
    """Connection classes of pools: a few for each life."""
    total: int
    """All that the garbage collector knows."""

    @classmethod
    def count(cls) -> Objects:
        """Count them, after the garbage is collected."""
        for _ in range(3):
            gc.collect()
        ours: Counter[str] = Counter()
        loops: Counter[str] = Counter()
        classes = total = 0
        for found in gc.get_objects():
            total += 1
            kind = type(found)  # not isinstance(), which asks proxies and mocks
            if issubclass(kind, OURS):
                ours[next(c.__name__ for c in OURS if issubclass(kind, c))] += 1
            elif issubclass(kind, asyncio.Future):
                loops[kind.__name__] += 1
            elif kind is type and found.__module__ == "poolkeeper":
                classes += issubclass(found, BoundConnection)
        return cls(ours, loops, classes, total)


def whose(kind: type, most: int = 4) -> str:
    """Return what holds the objects of a *kind*, and what holds that: to find a leak by."""
    lines: list[str] = []
    found = [o for o in gc.get_objects() if issubclass(type(o), kind)]
    seen = {id(found), id(lines)}
    for one in found[:12]:
        _climb(one, lines, seen, 0, most)
    return "\n".join(lines)


def _climb(thing: object, lines: list[str], seen: set[int], depth: int, most: int) -> None:
    seen.add(id(thing))
    words = " ".join(repr(thing).split())[:200] if depth < 7 else "..."
    lines.append(f"{'  ' * depth}{type(thing).__name__} {words}")
    holders = gc.get_referrers(thing)
    seen.add(id(holders))
    held_by = [h for h in holders if id(h) not in seen and not _is_dull(h)]
    seen.add(id(held_by))
    for holder in held_by[:most] if depth < 7 else ():
        _climb(holder, lines, seen, depth + 1, most)
    if not held_by and not depth:
        lines.append("  nothing that the collector knows")


def _is_dull(thing: object) -> bool:
    code = getattr(thing, "f_code", None)
    return isinstance(thing, type(gc)) or (code is not None and code.co_filename == __file__)


@dataclass(frozen=True)
class Sample:
    """What the program had in a quiet moment."""

    seconds: float
    operations: int
    rss: float
    objects: int


def slope(samples: list[Sample], of: str) -> float:
    """Return by how much something grows in a minute, as the best straight line has it."""
    if len(samples) < 2:
        return 0.0
    xs = [sample.seconds / 60 for sample in samples]
    ys = [float(getattr(sample, of)) for sample in samples]
    x, y = sum(xs) / len(xs), sum(ys) / len(ys)
    return sum((a - x) * (b - y) for a, b in zip(xs, ys, strict=True)) / sum(
        (a - x) ** 2 for a in xs
    )


SETTLED = 300.0
"""Seconds of a run from which its second half shows whether memory is flat."""

NOISE = 2.0
"""
MiB that memory may grow by in the second half, however long that is.

The allocator never gives back all that was in use at once in the worst moment so far, so memory
goes up by a few steps of some 0.1 MiB, ever more rarely; a leak goes on.
"""


def grows(samples: list[Sample], seconds: float) -> str | None:
    """Say so if memory grew in the second half of a run that was long enough to tell."""
    half = [sample for sample in samples if sample.seconds >= seconds / 2]
    if seconds < SETTLED or len(half) < 10:
        return None
    # By the best line through all samples: one of them alone says little.
    grown = slope(half, "rss") * (half[-1].seconds - half[0].seconds) / 60
    if not grown > NOISE:
        return None
    return (
        f"memory grew by {grown:.1f} MiB in the second half, from {half[0].rss:.1f} to"
        f" {half[-1].rss:.1f} MiB; objects from {half[0].objects:,} to {half[-1].objects:,}"
    )


def growth(before: Counter[str], now: Counter[str]) -> Iterator[str]:
    """Say of what there is more than before."""
    for name, number in now.items():
        if number > before[name]:
            yield f"{number} {name}, not {before[name]}"
