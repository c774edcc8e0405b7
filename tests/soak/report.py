"""How a soak went, in words and in figures."""

from __future__ import annotations

import platform
from collections import Counter
from importlib.metadata import version
from typing import Any

from psycopg import pq

from .leftovers import Sample, slope
from .run import Soak

OUTCOMES = {
    "done": "done",
    "cancelled": "cancelled",
    "gave up": "own time-out",
    "no connection": "AcquireTimeout",
    "self-deadlock": "SelfDeadlockError",
    "closed": "ClosedError",
    "stopped": "stopped by close()",
    "lost": "connection lost",
    "deadlock": "deadlock in the server",
    "violation": "VIOLATION",
}


def verdict(soak: Soak) -> str:
    """Return in a line whether all that must hold does."""
    if not soak.book.violations:
        return "passed: the sums balance, nobody saw a stranger's row, and nothing is left over"
    return f"FAILED: {len(soak.book.violations)} violation(s)"


def memory(samples: list[Sample], seconds: float) -> list[tuple[str, str]]:
    """Return what the memory did, in rows."""
    if not samples:
        return []
    after = next((s for s in samples if s.seconds >= 120), None)
    half = [s for s in samples if s.seconds >= seconds / 2]
    rows = [("first quiet moment", f"{samples[0].rss:.1f} MiB, {samples[0].objects:,} objects")]
    if after is not None:
        rows.append(("after two minutes", f"{after.rss:.1f} MiB, {after.objects:,} objects"))
    rows.append(("at the end", f"{samples[-1].rss:.1f} MiB, {samples[-1].objects:,} objects"))
    rows.append(
        (
            "growth per minute in the second half",
            f"{slope(half, 'rss'):+.3f} MiB, {slope(half, 'objects'):+.0f} objects",
        )
    )
    return rows


def facts(soak: Soak, loop: str) -> list[tuple[str, str]]:
    """Return what was run, and the figures that can be told in a line each."""
    book, money = soak.book, soak.book.money.totals
    seconds = soak.samples[-1].seconds if soak.samples else 0.0
    return [
        ("run", f"{seconds:.0f} s, seed {soak.seed}, {loop}"),
        (
            "with",
            f"{platform.python_implementation()} {platform.python_version()}, psycopg"
            f" {version('psycopg')} ({pq.__impl__}), psycopg_pool {version('psycopg-pool')},"
            f" PostgreSQL {soak.outside.server_version}",
        ),
        (
            "operations",
            f"{book.operations:,}, {book.operations / max(1.0, seconds):,.0f} a second",
        ),
        *((words, f"{number:,}") for words, number in _by_outcome(book.outcomes)),
        ("transfers committed", f"{money['committed']:,}"),
        ("transfers rolled back", f"{money['rolled back']:,}"),
        (
            "transfers of which nothing was heard",
            f"{money['unknown']:,}, {money['unknown, but committed']:,} of them committed",
        ),
        ("lives of the pools, event loops", f"{soak.lives:,}, {soak.eras:,}"),
        *((f"memory: {name}", value) for name, value in memory(soak.samples, soak.seconds)),
    ]


def _by_outcome(outcomes: Counter[tuple[str, str]]) -> list[tuple[str, int]]:
    totals: Counter[str] = Counter()
    for (_, outcome), number in outcomes.items():
        totals[outcome] += number
    return [(f"  {words}", totals[name]) for name, words in OUTCOMES.items() if totals[name]]


def text(soak: Soak, loop: str) -> str:
    """Return the whole report."""
    book = soak.book
    lines = [f"{name:<38} {value}" for name, value in facts(soak, loop)]
    lines += ["", "mischief", *_columns(book.mischief)]
    kinds: dict[str, Counter[str]] = {}
    for (kind, outcome), number in book.outcomes.items():
        kinds.setdefault(kind, Counter())[outcome] += number
    lines += ["", "work"]
    for kind, outcomes in sorted(kinds.items()):
        words = ", ".join(f"{name} {number:,}" for name, number in outcomes.most_common())
        lines.append(f"  {kind:<26} {words}")
    lines += ["", "logged as warnings", *_columns(book.logged)]
    for number, violation in enumerate(book.violations, 1):
        lines += ["", f"VIOLATION {number}: {violation.what}", violation.details]
        if number == 1:
            lines += ["what happened before:", *(f"  {event}" for event in violation.events)]
    lines += ["", verdict(soak)]
    return "\n".join(lines)


def _columns(counter: Counter[str]) -> list[str]:
    return [f"  {number:>8,}  {name}" for name, number in counter.most_common()]


def table(rows: list[tuple[str, Any]]) -> str:
    """Return *rows* as a table in Markdown."""
    cells = [f"| {name.strip()} | {value} |" for name, value in rows]
    return "\n".join(["| | |", "| --- | --- |", *cells])
