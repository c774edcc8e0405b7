"""
Faults, from outside of the pool: what a server, a network and other users can do to it.

What lasts is a context manager; what does not is a function.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Generator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from typing import Any

import psycopg
from psycopg import sql
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from poolkeeper import BoundPool, PoolManager

from ._seam import idle_pids
from ._servers import EmbeddedServer


def _pool_of(manager: PoolManager[Any] | BoundPool[Any]) -> BoundPool[Any]:
    return manager.pool if isinstance(manager, PoolManager) else manager


def kill_sessions(dsn: str, application_name: str) -> int:
    """
    End the sessions of one application name on the server, as one that restarts would.

    Args:
        dsn: Of somebody who may.
        application_name: That of a manager's sessions is ``poolkeeper:<name>``.

    Returns:
        How many there were; each is gone.

    .. versionadded:: 0.1.0
    """
    with psycopg.connect(dsn, autocommit=True) as conn:
        ended = conn.execute(
            "select pg_terminate_backend(pid, 5000) from pg_stat_activity"
            " where application_name = %s and pid <> pg_backend_pid()",
            (application_name,),
        )
        return len(ended.fetchall())


def kill_idle(manager: PoolManager[Any] | BoundPool[Any], dsn: str) -> int:
    """
    End the connections of an open pool that nobody holds, on the server.

    Args:
        manager: Whose; call it on its loop.
        dsn: Of somebody who may.

    Returns:
        How many there were; each is gone.

    .. versionadded:: 0.1.0
    """
    pids = idle_pids(_pool_of(manager))
    with psycopg.connect(dsn, autocommit=True) as conn:
        ended = conn.execute(
            "select pg_terminate_backend(pid, 5000) from pg_stat_activity where pid = any(%s)",
            (pids,),
        )
        return len(ended.fetchall())


@asynccontextmanager
async def exhausted(manager: PoolManager[Any] | BoundPool[Any]) -> AsyncGenerator[None]:
    """
    Hold all connections that a pool may have, in the block; the others are the test's own.

    Raises:
        AcquireTimeout: If they cannot be had within the pool's ``timeout``.

    .. versionadded:: 0.1.0
    """
    pool = _pool_of(manager)
    async with AsyncExitStack() as held:
        for _ in range(pool.max_size):
            await held.enter_async_context(pool.connection())
        yield


@contextmanager
def logins_refused(dsn: str) -> Generator[None]:
    """
    Let nobody log in to the database of *dsn*, in the block; whoever is connected stays.

    Args:
        dsn: Of its owner, who may log in to the database ``postgres`` too.

    .. versionadded:: 0.1.0
    """
    name = str(conninfo_to_dict(dsn)["dbname"])
    statement = sql.SQL("alter database {} allow_connections {}")
    with psycopg.connect(make_conninfo(dsn, dbname="postgres"), autocommit=True) as conn:
        conn.execute(statement.format(sql.Identifier(name), sql.SQL("false")))
        try:
            yield
        finally:
            conn.execute(statement.format(sql.Identifier(name), sql.SQL("true")))


@contextmanager
def stopped(server: EmbeddedServer, mode: str = "fast") -> Generator[None]:
    """
    Stop a server of the test's own for the block, and start it again: a restart.

    Args:
        server: The server.
        mode: ``"smart"``, ``"fast"`` or, as in a crash, ``"immediate"``.

    .. versionadded:: 0.1.0
    """
    server.stop(mode)
    try:
        yield
    finally:
        server.start()
