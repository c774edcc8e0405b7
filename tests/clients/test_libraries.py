"""
Libraries that are given a pool.

Tried with SQLAlchemy 2.1.9, langgraph-checkpoint-postgres 3.2.0, procrastinate 3.10.0, sqlspec
0.69.0, litestar-psycopg 0.1.1 and psycopg-toolkit 0.3.1.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Annotated, Any

import httpx
import procrastinate
import pytest
from asgi_lifespan import LifespanManager
from langgraph.checkpoint.base import empty_checkpoint
from langgraph.checkpoint.postgres.aio import AsyncPostgresSaver
from langgraph.store.postgres.aio import AsyncPostgresStore
from litestar import Litestar, get
from litestar.di import NamedDependency
from litestar_psycopg import PsycopgConfig, PsycopgPlugin
from psycopg import AsyncConnection
from psycopg.rows import dict_row
from psycopg_pool import AsyncConnectionPool
from psycopg_toolkit import BaseRepository
from psycopg_toolkit.core.transaction import TransactionManager
from pydantic import BaseModel
from sqlalchemy import NullPool, text
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import create_async_engine
from sqlspec import SQLSpec
from sqlspec.adapters.psycopg import PsycopgAsyncConfig

Pool = AsyncConnectionPool[Any]
MakePool = Callable[..., Pool]


async def sessions(pool: Pool) -> int:
    """How many connections the pool has, once all of them are back."""
    async with asyncio.timeout(20):
        while (stats := pool.get_stats())["pool_available"] != stats["pool_size"]:
            await asyncio.sleep(0.01)
    return stats["pool_size"]


async def rows(pool: Pool, query: str) -> list[Any]:
    async with pool.connection() as conn:
        return await (await conn.execute(query)).fetchall()


async def test_sqlalchemy_takes_its_connections_from_the_pool(make_pool: MakePool) -> None:
    """As psycopg's documentation has it: NullPool, async_creator, close_returns."""
    async with make_pool(close_returns=True) as pool:
        engine = create_async_engine(
            "postgresql+psycopg://", poolclass=NullPool, async_creator=pool.getconn
        )
        async with engine.begin() as conn:
            await conn.execute(text("create table notes (id int primary key)"))
            await conn.execute(text("insert into notes values (1)"))
        with pytest.raises(IntegrityError):
            async with engine.begin() as conn:
                await conn.execute(text("insert into notes values (2)"))
                await conn.execute(text("insert into notes values (1)"))
        async with engine.connect() as conn:
            result = await conn.stream(text("select id from notes"))
            assert [row.id async for row in result] == [1]

        async def count(number: int) -> Any:
            async with engine.connect() as conn:
                await conn.execute(text("select pg_sleep(0.01)"))
                return await conn.scalar(text("select count(*) + :n from notes"), {"n": number})

        assert await asyncio.gather(*map(count, range(8))) == [n + 1 for n in range(8)]
        await engine.dispose()
        assert await sessions(pool) <= 2
        assert await rows(pool, "select id from notes") == [(1,)]


async def test_langgraph_saves_its_checkpoints(make_pool: MakePool) -> None:
    kwargs = {"autocommit": True, "prepare_threshold": 0, "row_factory": dict_row}
    async with make_pool(kwargs=kwargs) as pool:
        saver = AsyncPostgresSaver(pool)
        await saver.setup()
        config: Any = {"configurable": {"thread_id": "1", "checkpoint_ns": ""}}
        for step in range(3):
            checkpoint = empty_checkpoint()
            checkpoint["channel_values"] = {"step": step}
            metadata: Any = {"source": "loop", "step": step}
            config = await saver.aput(config, checkpoint, metadata, {})
            await saver.aput_writes(config, [("channel", step)], task_id="task")
        saved = await saver.aget_tuple({"configurable": {"thread_id": "1"}})
        assert saved is not None
        assert saved.metadata["step"] == 2
        assert saved.pending_writes == [("task", "channel", 2)]
        assert len([c async for c in saver.alist({"configurable": {"thread_id": "1"}})]) == 3
        await sessions(pool)


async def test_langgraph_stores_its_memories(make_pool: MakePool) -> None:
    kwargs = {"autocommit": True, "prepare_threshold": 0, "row_factory": dict_row}
    async with make_pool(kwargs=kwargs) as pool:
        store = AsyncPostgresStore(pool)
        await store.setup()
        await asyncio.gather(
            *(store.aput(("users", "1"), f"key {n}", {"likes": n}) for n in range(10))
        )
        item = await store.aget(("users", "1"), "key 7")
        assert item is not None
        assert item.value == {"likes": 7}
        assert len(await store.asearch(("users",))) == 10
        await store.adelete(("users", "1"), "key 7")
        assert await store.aget(("users", "1"), "key 7") is None
        task = store._task
        del store
        task.cancel()
        await asyncio.wait([task])
        await sessions(pool)


async def test_procrastinate_runs_a_job_that_was_deferred_while_it_listens(
    make_pool: MakePool, database: str
) -> None:
    """It listens on a connection that it makes with the pool's class, for itself."""

    async def conninfo() -> str:
        return database

    app = procrastinate.App(connector=procrastinate.PsycopgConnector())
    done: asyncio.Queue[int] = asyncio.Queue()

    @app.task(name="add")
    async def add(a: int, b: int) -> None:
        await done.put(a + b)

    async with make_pool(conninfo=conninfo, max_size=4) as pool, app.open_async(pool):
        await app.schema_manager.apply_schema_async()
        # Whichever comes first wakes it, a notification or its own look once a second.
        worker = asyncio.create_task(
            app.run_worker_async(
                wait=True, listen_notify=True, fetch_job_polling_interval=1,
                install_signal_handlers=False,
            )
        )  # fmt: skip
        listens = "select 1 from pg_stat_activity where query like 'LISTEN%'"
        async with asyncio.timeout(60):
            while not await rows(pool, listens):
                await asyncio.sleep(0.05)
            for number in range(3):
                await add.defer_async(a=number, b=1)
                assert await done.get() == number + 1
            done_jobs = "select 1 from procrastinate_jobs where status = 'succeeded'"
            while len(await rows(pool, done_jobs)) < 3:
                await asyncio.sleep(0.05)
            worker.cancel()
            await asyncio.wait([worker])


async def test_sqlspec_runs_its_sessions_on_the_pool(make_pool: MakePool) -> None:
    async with make_pool() as pool:
        spec = SQLSpec()
        config = spec.add_config(PsycopgAsyncConfig(connection_instance=pool))
        async with spec.provide_session(config) as session:
            await session.execute("create table notes (id int primary key, text text)")
            await session.commit()
        async with spec.provide_session(config) as session:
            await session.begin()
            await session.execute("insert into notes values (%s, %s)", (1, "lost"))
            await session.rollback()
            await session.execute("insert into notes values (%s, %s)", (2, "kept"))
            await session.commit()
        async with spec.provide_session(config) as session:
            assert await session.select_value("select text from notes") == "kept"
        assert await rows(pool, "select id from notes") == [(2,)]
        await sessions(pool)


@get("/hello")
async def hello(db_connection: NamedDependency[AsyncConnection[Any]]) -> dict[str, Any]:
    await db_connection.execute("insert into visits default values")
    cursor = await db_connection.execute("select count(*) from visits")
    row = await cursor.fetchone()
    return {"visits": row[0] if row else None}


async def test_litestar_psycopg_gives_requests_their_connections(make_pool: MakePool) -> None:
    async with make_pool() as pool:
        await rows_of_nothing(pool, "create table visits (id int generated always as identity)")
        app = Litestar([hello], plugins=[PsycopgPlugin(PsycopgConfig(pool_instance=pool))])
        async with LifespanManager(app) as manager:
            transport = httpx.ASGITransport(manager.app)
            async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
                for number in range(1, 4):
                    response = await client.get("/hello")
                    assert response.json() == {"visits": number}
            await sessions(pool)
        assert pool.closed


async def rows_of_nothing(pool: Pool, query: str) -> None:
    async with pool.connection() as conn:
        await conn.execute(query)


class Note(BaseModel):
    id: int
    tags: Annotated[dict[str, int], "JSONB"]


class Notes(BaseRepository[Note, int]):
    def __init__(self, conn: AsyncConnection[Any]) -> None:
        super().__init__(conn, "notes", Note, "id")


async def test_psycopg_toolkit_runs_its_transactions_on_the_pool(make_pool: MakePool) -> None:
    async with make_pool() as pool:
        await rows_of_nothing(pool, "create table notes (id int primary key, tags jsonb)")
        transactions = TransactionManager(pool)
        async with transactions.transaction() as conn:
            await Notes(conn).create(Note(id=1, tags={"a": 1}))
        with pytest.raises(Exception, match="Transaction failed"):
            async with transactions.transaction() as conn:
                await Notes(conn).create(Note(id=2, tags={}))
                raise KeyError
        async with transactions.transaction(savepoint="point") as conn:
            assert await Notes(conn).get_all() == [Note(id=1, tags={"a": 1})]
        await sessions(pool)
