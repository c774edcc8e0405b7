"""
SQLAlchemy: an async engine whose connections are the manager's.

```python
db = PoolManager("postgresql://localhost/shop", max_size=10)
engine = create_async_engine(db)

async with db, AsyncSession(engine) as session:
    ...
```
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import AsyncExitStack
from functools import partial
from typing import Any

from psycopg import AsyncConnection
from psycopg.rows import tuple_row
from psycopg.types.json import set_json_dumps, set_json_loads
from psycopg.types.string import TextLoader

from poolkeeper import ConfigError, PoolManager
from poolkeeper.errors import see

from ._shared import program_frame, requires

with requires("sqlalchemy"):
    from sqlalchemy import AdaptedConnection, NullPool
    from sqlalchemy.ext.asyncio import AsyncEngine
    from sqlalchemy.ext.asyncio import create_async_engine as _create_async_engine

__all__ = ["create_async_engine"]

_OF_THE_MANAGER = {
    "async_creator": "conninfo and kwargs",
    "connect_args": "kwargs",
    "creator": "conninfo and kwargs",
    "max_overflow": "max_size, which is pool_size and max_overflow together",
    "pool": "db.pool",
    "pool_pre_ping": "nothing: a connection that is dead is not handed out",
    "pool_recycle": "max_lifetime",
    "pool_size": "min_size and max_size",
    "pool_timeout": "timeout",
    "pool_use_lifo": "max_idle",
    "poolclass": "db.pool",
    "url": "conninfo",
}
"""What says of SQLAlchemy's own pool how it is to be, and what does of the manager."""


def create_async_engine(manager: PoolManager[Any], **options: Any) -> AsyncEngine:
    """
    Return SQLAlchemy's async engine over *manager*: it keeps no connections of its own.

    Can be made at import time, and works whenever the manager is open; nothing has to be
    disposed of. One engine serves every loop that the manager is opened on, one after the other.
    A connection is acquired when SQLAlchemy needs one, which is at the first statement of a
    session, and given back when the session commits, rolls back or is closed. For whose line it
    is held, the diagnosis names the program's own, not SQLAlchemy's.

    The connections are as SQLAlchemy wants them, rows are tuples and transactions are begun,
    whatever *row_factory* or *autocommit* the manager gives to others. The manager needs no
    ``close_returns``.

    Args:
        manager: Where the connections come from; it is opened and closed by you.
        options: Of SQLAlchemy's ``create_async_engine()``: ``echo``, ``isolation_level``,
            ``json_serializer``, ``execution_options`` and the like. HSTORE is read by SQLAlchemy
            itself, unless *use_native_hstore* is true and the manager's *configure* registers it.

    Raises:
        ConfigError: If *options* has one that is for a pool of SQLAlchemy's; says what is the
            manager's.
        MissingDependencyError: When this module is imported, if SQLAlchemy is not installed.

    Errors of ours that are psycopg's too, such as `AcquireTimeout`, reach you as SQLAlchemy wraps
    psycopg's: as ``sqlalchemy.exc.OperationalError``, with ours in ``orig``.

    Source:
        SQLAlchemy 2.0 and 2.1, "Using psycopg Connection Pools": ``NullPool`` and
        ``async_creator``. ``Dialect.do_close()`` is what its pools close a connection with.

    .. versionadded:: 0.1.0
    """
    for name in options:
        if name in _OF_THE_MANAGER:
            raise ConfigError(
                f"{name} cannot be given to an engine over a PoolManager",
                parameter=name,
                detail="SQLAlchemy has no pool of its own here. What the manager has for it:"
                f" {_OF_THE_MANAGER[name]}.",
                hint=see("config"),
            )
    options.setdefault("use_native_hstore", False)
    registered = _registered(**options)
    pool = manager.pool

    async def acquire() -> AsyncConnection[Any]:
        frame = program_frame(sys._getframe(), "sqlalchemy")
        # Entered by a stack, which says that another task may give it back: a session is free to.
        acquired = manager.connection(caller=frame)
        conn: AsyncConnection[Any] = await AsyncExitStack().enter_async_context(acquired)
        conn.row_factory = tuple_row
        if conn.autocommit:
            await conn.set_autocommit(False)
        for register in registered:
            register(conn)
        return conn

    def give_back(adapted: AdaptedConnection) -> None:
        adapted.run_async(pool.putconn)

    engine = _create_async_engine(
        "postgresql+psycopg://", poolclass=NullPool, async_creator=acquire, **options
    )
    # Not conn.close(), even with close_returns: psycopg's returns none that is broken.
    dialect: Any = engine.dialect
    dialect.do_close = dialect.do_terminate = give_back
    return engine


def _registered(
    json_serializer: Callable[[Any], str | bytes] | None = None,
    json_deserializer: Callable[[str | bytes], Any] | None = None,
    native_inet_types: bool | None = None,
    **_options: Any,
) -> list[Callable[[AsyncConnection[Any]], None]]:
    """Return what registers with a connection what SQLAlchemy does with those it makes itself."""
    registered: list[Callable[[AsyncConnection[Any]], None]] = []
    if json_serializer is not None:
        registered.append(partial(set_json_dumps, json_serializer))
    if json_deserializer is not None:
        registered.append(partial(set_json_loads, json_deserializer))
    if native_inet_types is False:
        registered.append(_read_addresses_as_text)
    return registered


def _read_addresses_as_text(conn: AsyncConnection[Any]) -> None:
    for name in ("inet", "cidr"):
        conn.adapters.register_loader(name, TextLoader)
