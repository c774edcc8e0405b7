"""What tests do to a server, from outside of the pool under test."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import psycopg

from poolkeeper.testing import EmbeddedServer
from poolkeeper.testing import kill_sessions as kill_sessions

PASSWORD = "s3cret-pw"


def admin(dsn: str, query: str, params: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Run one statement on a connection of its own, in autocommit."""
    with psycopg.connect(dsn, autocommit=True) as conn:
        cursor = conn.execute(query, params)
        return cursor.fetchall() if cursor.description else []


def make_roles(server: EmbeddedServer) -> None:
    """Make the roles that tests log in as."""
    for statement in (
        f"create role app login password '{PASSWORD}'",
        "create role nologin_app nologin password 'x'",
        "create database closed_db allow_connections false",
    ):
        admin(server.dsn(), statement)


def is_at_work(dsn: str, pid: int) -> bool:
    """
    Tell whether the server process *pid* stands in the middle of a query: asleep, or at a lock.

    For a client the query runs as soon as it is sent; but the server forgets a request to cancel
    that reaches it before the query does.
    """
    query = "select wait_event_type from pg_stat_activity where state = 'active' and pid = %s"
    return admin(dsn, query, (pid,)) in ([("Lock",)], [("Timeout",)])


@contextmanager
def endless(dsn: str) -> Iterator[str]:
    """Give an expression for a query that does not end before the block is left."""
    key = random.getrandbits(31)
    with psycopg.connect(dsn, autocommit=True) as conn:
        conn.execute("select pg_advisory_lock(%s)", (key,))
        yield f"pg_advisory_xact_lock({key})"


def eventually(holds: Callable[[], bool], within: float = 10.0) -> bool:
    """Wait until *holds* does; for what a server does in its own time."""
    until = time.monotonic() + within
    while not holds():
        if time.monotonic() > until:
            return False
        time.sleep(0.02)
    return True
