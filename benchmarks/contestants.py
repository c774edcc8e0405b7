"""The pools that are measured, each used the way its own documentation shows."""

from __future__ import annotations

from contextlib import AbstractAsyncContextManager
from importlib.util import find_spec
from typing import Any, ClassVar, Self

from psycopg import AsyncConnection
from psycopg.conninfo import conninfo_to_dict
from psycopg_pool import AsyncConnectionPool

from poolkeeper import PoolManager

from .contests import ALONE, ASYNCPG, AUTOCOMMIT, BARE, OURS, SQLALCHEMY

QUERY, PARAMETERS = "select %s::int4 as id, 'x' as name", (7,)


class Contestant:
    """
    One pool of *size* connections.

    `connection()` acquires one; `block()` fetches a row in a transaction, `query()` the shortest
    way that the library's documentation shows.

    Args:
        dsn: The server.
        size: How many connections, from the start and at most.
        timeout: Seconds that a task waits for one; None for the pool's own default.
    """

    name: ClassVar[str]
    needs: ClassVar[str]

    def __init__(self, dsn: str, size: int, timeout: float | None = None) -> None:
        self.dsn = dsn
        self.size = size
        self.timeout = timeout

    async def open(self) -> None:
        raise NotImplementedError

    async def close(self) -> None:
        raise NotImplementedError

    def connection(self) -> AbstractAsyncContextManager[Any]:
        raise NotImplementedError

    async def block(self) -> Any:
        raise NotImplementedError

    async def query(self) -> Any:
        raise NotImplementedError

    async def backend_pid(self, conn: Any) -> int:
        return int(conn.info.backend_pid)

    async def __aenter__(self) -> Self:
        await self.open()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()


class Bare(Contestant):
    name = BARE
    needs = "psycopg_pool"
    kwargs: ClassVar[dict[str, Any]] = {}

    async def open(self) -> None:
        patience = {} if self.timeout is None else {"timeout": self.timeout}
        self.pool = AsyncConnectionPool(
            self.dsn,
            kwargs=self.kwargs,
            min_size=self.size,
            max_size=self.size,
            open=False,
            **patience,
        )
        self.connection = self.pool.connection  # type: ignore[method-assign]
        await self.pool.open(wait=True, timeout=self.timeout or 30.0)

    async def close(self) -> None:
        await self.pool.close()

    async def block(self) -> Any:
        async with self.pool.connection() as conn:
            cursor = await conn.execute(QUERY, PARAMETERS)
            return await cursor.fetchone()

    query = block


class Autocommit(Bare):
    """The least that a query can cost with psycopg_pool: no transaction, for all who use it."""

    name = AUTOCOMMIT
    kwargs: ClassVar[dict[str, Any]] = {"autocommit": True}


class Held:
    """No pool: one of psycopg's connections, which is held all the time."""

    def __init__(self, dsn: str) -> None:
        self.dsn = dsn

    async def __aenter__(self) -> Self:
        self.conn = await AsyncConnection.connect(self.dsn, autocommit=True)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.conn.close()

    async def query(self) -> Any:
        cursor = await self.conn.execute(QUERY, PARAMETERS)
        return await cursor.fetchone()


class Poolkeeper(Contestant):
    name = OURS
    needs = "poolkeeper"
    kwargs: ClassVar[dict[str, Any]] = {}

    async def open(self) -> None:
        patience = {} if self.timeout is None else {"timeout": self.timeout}
        self.pool = PoolManager(
            self.dsn, min_size=self.size, max_size=self.size, **patience, **self.kwargs
        )
        self.connection = self.pool.connection  # type: ignore[method-assign]
        await self.pool.open()

    async def close(self) -> None:
        await self.pool.close()

    async def block(self) -> Any:
        async with self.pool.connection() as conn:
            cursor = await conn.execute(QUERY, PARAMETERS)
            return await cursor.fetchone()

    async def query(self) -> Any:
        return await self.pool.fetchone(QUERY, PARAMETERS)


class Alone(Poolkeeper):
    """Each statement has a connection to itself."""

    name = ALONE
    kwargs: ClassVar[dict[str, Any]] = {"pipeline": False}


class Asyncpg(Contestant):
    name = ASYNCPG
    needs = "asyncpg"
    _statement = QUERY.replace("%s", "$1")

    async def open(self) -> None:
        import asyncpg

        server = conninfo_to_dict(self.dsn)
        self.pool = await asyncpg.create_pool(
            host=server.get("host"),
            port=server.get("port"),
            user=server.get("user"),
            password=server.get("password"),
            database=server.get("dbname"),
            min_size=self.size,
            max_size=self.size,
        )
        self.connection = self.pool.acquire  # type: ignore[method-assign]

    async def close(self) -> None:
        await self.pool.close()

    async def block(self) -> Any:
        async with self.pool.acquire() as conn, conn.transaction():
            return await conn.fetchrow(self._statement, *PARAMETERS)

    async def query(self) -> Any:
        return await self.pool.fetchrow(self._statement, *PARAMETERS)

    async def backend_pid(self, conn: Any) -> int:
        return int(conn.get_server_pid())


class SQLAlchemy(Contestant):
    name = SQLALCHEMY
    needs = "sqlalchemy"

    async def open(self) -> None:
        from sqlalchemy import URL, text
        from sqlalchemy.ext.asyncio import create_async_engine

        server = conninfo_to_dict(self.dsn)
        url = URL.create(
            "postgresql+psycopg",
            host=str(server.get("host")),
            port=int(server.get("port") or 5432),
            username=str(server.get("user")),
            password=server.get("password"),  # type: ignore[arg-type]
            database=str(server.get("dbname")),
        )
        patience = {} if self.timeout is None else {"pool_timeout": self.timeout}
        self.pool = create_async_engine(url, pool_size=self.size, max_overflow=0, **patience)
        self.connection = self.pool.connect  # type: ignore[method-assign]
        self._statement = text("select cast(:id as int4) as id, 'x' as name")
        self._parameters = {"id": PARAMETERS[0]}
        async with self.pool.connect():
            pass

    async def close(self) -> None:
        await self.pool.dispose()

    async def block(self) -> Any:
        async with self.pool.begin() as conn:
            return (await conn.execute(self._statement, self._parameters)).one()

    async def query(self) -> Any:
        async with self.pool.connect() as conn:
            return (await conn.execute(self._statement, self._parameters)).one()

    async def backend_pid(self, conn: Any) -> int:
        raw = await conn.get_raw_connection()
        return int(raw.driver_connection.info.backend_pid)


EVERY: tuple[type[Contestant], ...] = (Bare, Poolkeeper, Asyncpg, SQLAlchemy)


def installed() -> list[type[Contestant]]:
    """Return those that can run here."""
    return [contestant for contestant in EVERY if find_spec(contestant.needs)]
