"""The pools that are measured, each used the way its own documentation shows."""

from __future__ import annotations

from contextlib import AbstractAsyncContextManager
from importlib.util import find_spec
from typing import Any, ClassVar, Self

from psycopg.conninfo import conninfo_to_dict
from psycopg_pool import AsyncConnectionPool

from poolkeeper import PoolManager


class Contestant:
    """
    One pool of *size* connections. `connection()` acquires one, `query()` fetches one row.

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
    name = "psycopg_pool"
    needs = "psycopg_pool"

    async def open(self) -> None:
        patience = {} if self.timeout is None else {"timeout": self.timeout}
        self.pool = AsyncConnectionPool(
            self.dsn, min_size=self.size, max_size=self.size, open=False, **patience
        )
        self.connection = self.pool.connection  # type: ignore[method-assign]
        await self.pool.open(wait=True, timeout=self.timeout or 30.0)

    async def close(self) -> None:
        await self.pool.close()

    async def query(self) -> Any:
        async with self.pool.connection() as conn:
            cursor = await conn.execute("select %s::int4 as id, 'x' as name", (7,))
            return await cursor.fetchone()


class Poolkeeper(Contestant):
    name = "poolkeeper"
    needs = "poolkeeper"

    async def open(self) -> None:
        patience = {} if self.timeout is None else {"timeout": self.timeout}
        self.pool = PoolManager(self.dsn, min_size=self.size, max_size=self.size, **patience)
        self.connection = self.pool.connection  # type: ignore[method-assign]
        await self.pool.open()

    async def close(self) -> None:
        await self.pool.close()

    async def query(self) -> Any:
        return await self.pool.fetchone("select %s::int4 as id, 'x' as name", (7,))

    async def query_in_block(self) -> Any:
        """Fetch one row as with psycopg_pool, in a transaction."""
        async with self.pool.connection() as conn:
            cursor = await conn.execute("select %s::int4 as id, 'x' as name", (7,))
            return await cursor.fetchone()


class Asyncpg(Contestant):
    name = "asyncpg"
    needs = "asyncpg"

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

    async def query(self) -> Any:
        return await self.pool.fetchrow("select $1::int4 as id, 'x' as name", 7)

    async def backend_pid(self, conn: Any) -> int:
        return int(conn.get_server_pid())


class SQLAlchemy(Contestant):
    name = "SQLAlchemy"
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
        async with self.pool.connect():
            pass

    async def close(self) -> None:
        await self.pool.dispose()

    async def query(self) -> Any:
        async with self.pool.connect() as conn:
            return (await conn.execute(self._statement, {"id": 7})).one()

    async def backend_pid(self, conn: Any) -> int:
        raw = await conn.get_raw_connection()
        return int(raw.driver_connection.info.backend_pid)


EVERY: tuple[type[Contestant], ...] = (Bare, Poolkeeper, Asyncpg, SQLAlchemy)


def installed() -> list[type[Contestant]]:
    """Return those that can run here."""
    return [contestant for contestant in EVERY if find_spec(contestant.needs)]
