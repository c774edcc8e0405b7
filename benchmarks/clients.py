"""Libraries that are given a pool: the bare one, or ours."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any
from uuid import uuid4

from psycopg import AsyncConnection
from psycopg.conninfo import make_conninfo
from psycopg.rows import dict_row
from psycopg_pool import AsyncConnectionPool

from poolkeeper import PoolManager

from .contests import OURS
from .timing import Turns, Work, paced
from .works import by_one, repeated

Pool = AsyncConnectionPool[Any]
CONNECTIONS = 4
JOBS = 20
"""How many there are for each start of a worker, which is counted with them."""


@asynccontextmanager
async def own_database(dsn: str) -> AsyncIterator[str]:
    """Give the DSN of a new database."""
    name = f"poolkeeper_{uuid4().hex}"
    async with await AsyncConnection.connect(dsn, autocommit=True) as conn:
        await conn.execute(f"create database {name}")
        try:
            yield make_conninfo(dsn, dbname=name)
        finally:
            await conn.execute(f"drop database {name} (force)")


@asynccontextmanager
async def opened(contestant: str, dsn: str, **kwargs: Any) -> AsyncIterator[Pool]:
    """Give a pool that is full; *kwargs* are for its connections."""
    size = {"min_size": CONNECTIONS, "max_size": CONNECTIONS}
    if contestant == OURS:
        async with PoolManager(dsn, kwargs=kwargs, **size) as manager:
            yield manager.pool
    else:
        async with AsyncConnectionPool(dsn, kwargs=kwargs, open=False, **size) as pool:
            await pool.wait()
            yield pool


@asynccontextmanager
async def procrastinate(contestant: str, dsn: str) -> AsyncIterator[Work]:
    """Defer jobs that do nothing, and let a worker run them until none is left."""
    import procrastinate

    app = procrastinate.App(connector=procrastinate.PsycopgConnector())

    @app.task(name="nothing")
    async def nothing() -> None:
        pass

    async def work(size: int, start: Callable[[], None]) -> int:
        workers = -(-size // JOBS)
        start()
        for _ in range(workers):
            for _ in range(JOBS):
                await nothing.defer_async()
            await app.run_worker_async(
                wait=False, listen_notify=False, delete_jobs="always", install_signal_handlers=False
            )
        return workers * JOBS

    async with opened(contestant, dsn) as pool, app.open_async(pool):
        await app.schema_manager.apply_schema_async()
        yield work


@asynccontextmanager
async def langgraph(contestant: str, dsn: str) -> AsyncIterator[Work]:
    """Save a checkpoint, and what a task wrote."""
    from langgraph.checkpoint.base import empty_checkpoint
    from langgraph.checkpoint.postgres.aio import AsyncPostgresSaver

    config: Any = {"configurable": {"thread_id": "1", "checkpoint_ns": ""}}
    metadata: Any = {"source": "loop", "step": 1}
    checkpoint = {**empty_checkpoint(), "channel_values": {"step": 1}}
    kwargs = {"autocommit": True, "prepare_threshold": 0, "row_factory": dict_row}
    async with opened(contestant, dsn, **kwargs) as pool:
        saver = AsyncPostgresSaver(pool)
        await saver.setup()

        async def write() -> None:
            saved = await saver.aput(config, checkpoint, metadata, {})
            await saver.aput_writes(saved, [("channel", 1)], task_id="task")

        yield by_one(repeated(write))


@asynccontextmanager
async def psycopg_toolkit(contestant: str, dsn: str) -> AsyncIterator[Work]:
    """Read a row by its key, in a transaction."""
    from psycopg_toolkit import BaseRepository
    from psycopg_toolkit.core.transaction import TransactionManager
    from pydantic import BaseModel

    class Note(BaseModel):
        id: int
        text: str

    async with opened(contestant, dsn) as pool:
        async with pool.connection() as conn:
            await conn.execute("create table notes (id int primary key, text text)")
            await conn.execute("insert into notes values (7, 'x')")
        transactions = TransactionManager(pool)

        async def transaction() -> None:
            async with transactions.transaction() as conn:
                await BaseRepository(conn, "notes", Note, "id").get_by_id(7)

        yield by_one(repeated(transaction))


Client = Callable[[str, str], AbstractAsyncContextManager[Work]]

CLIENTS: dict[str, Client] = {
    "procrastinate": procrastinate,
    "langgraph": langgraph,
    "psycopg-toolkit": psycopg_toolkit,
}


@asynccontextmanager
async def enter(stage: str, contestant: str, dsn: str) -> AsyncIterator[Turns]:
    """Prepare one of `CLIENTS` on a pool, in a database of its own."""
    async with own_database(dsn) as database, CLIENTS[stage](contestant, database) as work:
        yield {stage: paced(work)}
