"""What tests do to a server, from outside of the pool under test."""

from __future__ import annotations

import random
from collections.abc import Iterator
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


EMPTY = """
do $$ declare name text; begin
    for name in select nspname from pg_namespace
        where not starts_with(nspname, 'pg_') and nspname <> 'information_schema'
    loop
        execute format('drop schema %I cascade', name);
    end loop;
    create schema public authorization pg_database_owner;
    grant usage on schema public to public;
end $$
"""


def empty(dsn: str) -> None:
    """Make a database as it was when it was made, with nobody in it."""
    with psycopg.connect(dsn, autocommit=True) as conn:
        conn.execute(
            "select pg_terminate_backend(pid, 5000) from pg_stat_activity"
            " where datname = current_database() and pid <> pg_backend_pid()"
        )
        conn.execute(EMPTY)


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
