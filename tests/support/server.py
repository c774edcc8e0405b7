"""What tests do to a server, from outside of the pool under test."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import psycopg

from poolkeeper._embedded import EmbeddedServer

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


def kill_sessions(dsn: str, application_name: str) -> int:
    """End the sessions of one application name, as a server that restarts would."""
    rows = admin(
        dsn,
        "select pg_terminate_backend(pid, 5000) from pg_stat_activity where application_name = %s",
        (application_name,),
    )
    return len(rows)


def eventually(holds: Callable[[], bool], within: float = 10.0) -> bool:
    """Wait until *holds* does; for what a server does in its own time."""
    until = time.monotonic() + within
    while not holds():
        if time.monotonic() > until:
            return False
        time.sleep(0.02)
    return True
