"""
What is measured, who competes, and what is to be reached: data, which imports nothing heavy.

A contest belongs to a stage, whose contestants are prepared together: each in a process of its
own, on each of the stage's loops. They take turns, so that what disturbs one disturbs all.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from typing import Literal

LOOPS = ("asyncio", "uvloop")
BARE, OURS = "psycopg_pool", "poolkeeper"
ALONE = "poolkeeper, `pipeline=False`"
AUTOCOMMIT, HELD = "psycopg_pool, autocommit", "psycopg, held"
ASYNCPG, SQLALCHEMY = "asyncpg", "SQLAlchemy"

Figure = Literal["cpu", "wall", "rate"]
"""
What is compared. CPU is that of the process for one task's operations, whose wall time jumps
with the machine's wake-ups; wall is for what keeps the loop busy; a rate is wall turned over.
"""


@dataclass(frozen=True)
class Target:
    """What one contestant is to reach beside another, on each of `LOOPS`."""

    what: str
    figure: Figure
    against: str
    limits: tuple[float, float]
    ours: str = OURS

    @property
    def limit(self) -> str:
        """The limits, as they are written."""
        sign = "≥" if self.figure == "rate" else "≤"
        return f"{sign} {' / '.join(f'{limit:.2f}' for limit in dict.fromkeys(self.limits))} ×"

    def reached(self, ratio: float, loop: str) -> bool:
        """Tell whether *ratio* will do on *loop*."""
        limit = self.limits[LOOPS.index(loop)]
        return ratio >= limit if self.figure == "rate" else ratio <= limit


@dataclass(frozen=True)
class Contest:
    """One thing that the contestants of a stage do; those who cannot leave it out."""

    title: str
    targets: tuple[Target, ...]


@dataclass(frozen=True)
class Stage:
    """
    Contests of the same contestants.

    Args:
        module: Where ``enter(stage, contestant, dsn)`` prepares one.
        contestants: By name, with the packages that they need.
        contests: By name.
        seconds: How long one turn takes, about.
        loops: Where it says something.
    """

    module: str
    contestants: Mapping[str, tuple[str, ...]]
    contests: Mapping[str, Contest]
    seconds: float = 0.7
    loops: tuple[str, ...] = LOOPS

    def installed(self) -> list[str]:
        """Return the contestants that can run here."""
        return [name for name in self.contestants if not self.missing(name)]

    def missing(self, contestant: str) -> str | None:
        """Return a package that *contestant* needs and that is not installed."""
        return next((name for name in self.contestants[contestant] if not is_installed(name)), None)


def is_installed(package: str) -> bool:
    """Tell whether *package*, named as in a package index, is here."""
    try:
        distribution(package)
    except PackageNotFoundError:
        return False
    return True


def _client(name: str, title: str, *needs: str) -> Stage:
    target = Target(f"CPU of a {title}", "cpu", BARE, (0.95, 0.95))
    return Stage("clients", {BARE: needs, OURS: needs}, {name: Contest(title, (target,))})


_BLOCK = "block with one query"
_ONE_SHOT = "one-shot `fetchone()`"
_CROWD = "64 tasks on 4 connections"

POOLS = Stage(
    "pools",
    {
        BARE: (),
        AUTOCOMMIT: (),
        OURS: (),
        ALONE: (),
        HELD: (),
        ASYNCPG: ("asyncpg",),
        SQLALCHEMY: ("sqlalchemy",),
    },
    {
        "block": Contest(
            _BLOCK,
            (Target(f"CPU of a {_BLOCK}, beside the bare block", "cpu", BARE, (0.85, 0.85)),),
        ),
        "block-64": Contest(
            f"{_BLOCK}, {_CROWD}",
            (Target(f"{_CROWD}, the same block, wall", "wall", BARE, (0.85, 0.85)),),
        ),
        "one-shot": Contest(
            "one-shot",
            (
                Target(
                    f"CPU of a {_ONE_SHOT}, beside a held psycopg connection in autocommit",
                    "cpu",
                    HELD,
                    (1.00, 1.00),
                ),
                Target(
                    f"CPU of a {_ONE_SHOT}, beside asyncpg's `pool.fetchrow()`",
                    "cpu",
                    ASYNCPG,
                    (0.55, 0.75),
                ),
            ),
        ),
        "one-shot-64": Contest(
            f"one-shot, {_CROWD}",
            (
                Target(f"{_CROWD}, beside asyncpg, wall", "wall", ASYNCPG, (0.40, 0.40)),
                Target(
                    f"{_CROWD}, beside a connection for each, wall",
                    "wall",
                    ALONE,
                    (0.32, 0.32),
                ),
            ),
        ),
        "one-shot-64-p99": Contest(
            f"one-shot, {_CROWD}, 99th percentile of the wait",
            (
                Target(
                    f"{_CROWD}, p99, beside a connection for each",
                    "wall",
                    ALONE,
                    (1.00, 1.00),
                ),
            ),
        ),
        "acquire": Contest(
            "acquire + release",
            (Target("CPU of acquire + release, nobody waiting", "cpu", BARE, (0.65, 0.65)),),
        ),
        "acquire-64": Contest(
            f"acquire + release, {_CROWD}",
            (Target(f"acquire + release, {_CROWD}, wall", "wall", BARE, (0.36, 0.40)),),
        ),
    },
)

BY_HAND, BY_YIELD = "psycopg_pool, by hand", "psycopg_pool, `Depends` with `yield`"
DEPENDENCY = "poolkeeper, `DepConnection`"
FROM_REQUEST = "poolkeeper, `connection_from()`"
CONNECTION = "poolkeeper, `db.connection()`"
FETCHONE = "poolkeeper, `db.fetchone()`"

FASTAPI = Stage(
    "endpoints",
    {
        BY_HAND: ("fastapi", "uvicorn"),
        BY_YIELD: ("fastapi", "uvicorn"),
        DEPENDENCY: ("fastapi", "uvicorn"),
        FROM_REQUEST: ("fastapi", "uvicorn"),
        CONNECTION: ("fastapi", "uvicorn"),
        FETCHONE: ("fastapi", "uvicorn"),
        ASYNCPG: ("fastapi", "uvicorn", "asyncpg"),
        SQLALCHEMY: ("fastapi", "uvicorn", "sqlalchemy"),
    },
    {
        "fastapi": Contest(
            "FastAPI",
            tuple(
                Target(f"FastAPI, requests/s: {what}", "rate", against, (limit, limit), ours)
                for what, ours, against, limit in (
                    ("`DepConnection` beside the bare pool by hand", DEPENDENCY, BY_HAND, 1.05),
                    ("`connection_from()`, the same", FROM_REQUEST, BY_HAND, 1.10),
                    ("`db.connection()`, the same", CONNECTION, BY_HAND, 1.10),
                    ("`db.fetchone()` beside asyncpg's pool", FETCHONE, ASYNCPG, 1.3),
                )
            ),
        )
    },
    seconds=2.0,
    loops=("uvloop",),
)

THREADS = Stage(
    "threads",
    {BARE: (), OURS: ()},
    {
        "thread": Contest(
            "query of a thread",
            (Target("query of a thread, beside its sync pool, wall", "wall", BARE, (1.5, 1.5)),),
        ),
        "thread-block": Contest("block of a thread", ()),
    },
    loops=("asyncio",),
)

STAGES: Mapping[str, Stage] = {
    "pools": POOLS,
    "procrastinate": _client("procrastinate", "procrastinate job", "procrastinate"),
    "langgraph": _client("langgraph", "LangGraph write", "langgraph-checkpoint-postgres"),
    "psycopg-toolkit": _client("psycopg-toolkit", "psycopg-toolkit transaction", "psycopg-toolkit"),
    "fastapi": FASTAPI,
    "threads": THREADS,
}
