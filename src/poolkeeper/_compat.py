"""
The one place that touches the internals of psycopg_pool.

A `BoundPool` is a subclass of psycopg_pool's class, that keeps its settings and its public names,
and does all the rest by itself. So there is one internal left: whose a connection is, which
psycopg itself reads. ``tests/unit/test_compat.py`` fails when it goes away or changes its
meaning, or when psycopg_pool gets a public method that is not overridden. In the hands of users
the import fails then, and says so: nothing shall fail later.
"""
# The point of this module.
# pyright: reportPrivateUsage=false

from __future__ import annotations

from typing import Any

from psycopg_pool import AsyncConnectionPool

from .errors import MissingDependencyError, see_site

CHECK_CONNECTION = AsyncConnectionPool.check_connection

NEEDED = (
    "check", "check_connection", "close", "close_returns", "closed", "connection",
    "connection_class", "conninfo", "drain", "get_stats", "getconn", "kwargs", "max_idle",
    "max_lifetime", "max_size", "max_waiting", "min_size", "name", "num_workers", "open",
    "pop_stats", "putconn", "reconnect_failed", "reconnect_timeout", "resize", "timeout", "wait",
)  # fmt: skip
"""What poolkeeper needs of a pool that is not open; all public."""


def _cannot_work(lacks: str) -> MissingDependencyError:
    from importlib.metadata import PackageNotFoundError, version  # only now: it takes time

    def of(package: str) -> str:
        try:
            return version(package)
        except PackageNotFoundError:
            return "(not installed as a package)"

    return MissingDependencyError(
        f"poolkeeper {of('poolkeeper')} does not work with psycopg_pool {of('psycopg-pool')}",
        detail=f"It needs what that version does not have: {lacks}.",
        hint="Install a newer poolkeeper, or a psycopg_pool that this one was tried with:"
        f' pip install "psycopg-pool>=3.3.2,<3.4". {see_site("missing-dependency")}',
    )


def require() -> None:
    """
    Raise if psycopg_pool lacks anything that poolkeeper needs.

    Raises:
        MissingDependencyError: With both versions, and what to install.
    """
    try:
        specimen = AsyncConnectionPool(open=False, name="poolkeeper")
    except Exception as ex:
        raise _cannot_work(f"a constructor that takes what it did ({ex})") from ex
    lacks = [name for name in NEEDED if not hasattr(specimen, name)]
    if lacks:
        raise _cannot_work(", ".join(lacks))


def set_owner(conn: Any, pool: Any) -> None:
    """Mark *conn* as checked out of *pool*, or, with None, as nobody's."""
    conn._pool = pool


def owner(conn: Any) -> Any:
    """Return the pool that *conn* is checked out of, None where it is not."""
    return getattr(conn, "_pool", None)
