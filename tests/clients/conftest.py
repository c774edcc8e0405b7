"""Each test here runs twice: on psycopg_pool's own pool, and on ours, with the same outcome."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from psycopg_pool import AsyncConnectionPool

from poolkeeper import PoolManager

Pool = AsyncConnectionPool[Any]


@pytest.fixture(params=["bare", "ours"])
def kind(request: pytest.FixtureRequest) -> str:
    """Whose pool it is."""
    return str(request.param)


@pytest.fixture
def make_pool(kind: str, database: str) -> Callable[..., Pool]:
    """A function that makes a pool on a database of the test's own; to be entered."""

    def make(**settings: Any) -> Pool:
        defaults = {"conninfo": database, "min_size": 1, "max_size": 2, "timeout": 10}
        settings = {**defaults, **settings}
        if kind == "bare":
            return AsyncConnectionPool(open=False, **settings)
        return PoolManager(**settings).pool

    return make
