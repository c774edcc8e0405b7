"""What tests of one-shots that share connections have in common."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psycopg
import pytest

from poolkeeper import PoolManager, _lane, _oneshots
from tests.support.inside import life

PLAIN = "select %s::int"
READ = "select n from t"


def lanes(db: PoolManager[Any]) -> Any:
    """What shares the connections of *db*, which has run something."""
    return life(db.pool).lanes


async def know(db: PoolManager[Any], *queries: str) -> None:
    """Let *queries* be known as quick."""
    await db.execute("select 1")
    for query in queries:
        known = lanes(db).texts.known(query)
        while not known.shares:
            known.was_quick()


def trust(monkeypatch: pytest.MonkeyPatch) -> None:
    """
    Let no statement be slow, so that all of them are under way for as long as a test wants.

    And no turn be over, however long the test is kept from the processor.
    """
    monkeypatch.setattr(_lane, "LONG", 60.0)
    monkeypatch.setattr(_lane, "TURN", 60.0)
    monkeypatch.setattr(_oneshots, "SLOW", 60.0)


@contextmanager
def locked(dsn: str) -> Iterator[None]:
    """Let whoever reads t wait as long as the block lasts."""
    with psycopg.connect(dsn) as blocker:
        blocker.execute("lock table t")
        yield
