"""What tests look at inside of a pool: the one place that knows where it is."""

from __future__ import annotations

import weakref
from typing import Any

from poolkeeper import BoundPool
from poolkeeper._life import Life
from poolkeeper._stock import shrink as _shrink


def life(pool: Any) -> Life:
    """The life of *pool*, which is open."""
    found = pool._life
    assert isinstance(found, Life)
    return found


def idle_of(pool: Any) -> Any:
    """The idle connections of *pool*, which may be one of psycopg_pool's own."""
    return life(pool).idle if isinstance(pool, BoundPool) else pool._pool


def shrink(pool: Any) -> None:
    """Let *pool* look now whether it has a connection that nobody needs."""
    _shrink(weakref.ref(life(pool)))
