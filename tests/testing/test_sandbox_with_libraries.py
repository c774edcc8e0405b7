"""Libraries that are given a pool, and applications that have one, take part in a sandbox."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import httpx
import procrastinate
import psycopg
import pytest
from asgi_lifespan import LifespanManager
from fastapi import BackgroundTasks, Depends, FastAPI, HTTPException
from fastapi.testclient import TestClient
from langgraph.checkpoint.base import empty_checkpoint
from langgraph.checkpoint.postgres.aio import AsyncPostgresSaver
from psycopg.rows import dict_row
from sqlalchemy import NullPool, text
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.ext.asyncio import create_async_engine as sqlalchemys_engine
from starlette.middleware.base import BaseHTTPMiddleware

from poolkeeper import PoolManager
from poolkeeper.adapters.fastapi import DepConnection, DepPool, lifespan
from poolkeeper.adapters.sqlalchemy import create_async_engine
from poolkeeper.testing import outside, sandbox

MakeManager = Callable[..., PoolManager]


async def count(db: PoolManager, table: str) -> int:
    return int(await db.fetchval(f"select count(*) from {table}"))


@pytest.fixture
async def notes(database: str) -> AsyncIterator[str]:
    """A database with an empty table, which is empty afterwards."""
    with psycopg.connect(database) as conn:
        conn.execute("create table notes (id int primary key)")
    yield database
    with psycopg.connect(database) as conn:
        assert conn.execute("select count(*) from notes").fetchone() == (0,)


async def test_sqlalchemy_s_sessions_and_engines(notes: str, make_manager: MakeManager) -> None:
    db = make_manager(notes, min_size=1, close_returns=True)
    engine = create_async_engine(db)
    creators = sqlalchemys_engine(
        "postgresql+psycopg://", poolclass=NullPool, async_creator=db.pool.getconn
    )
    async with sandbox(db):
        async with AsyncSession(engine) as session:
            await session.execute(text("insert into notes values (1)"))
            await session.commit()
            async with session.begin_nested():
                await session.execute(text("insert into notes values (2)"))
            await session.rollback()
        with pytest.raises(IntegrityError):
            async with creators.begin() as conn:
                await conn.execute(text("insert into notes values (3)"))
                await conn.execute(text("insert into notes values (1)"))
        async with engine.connect() as conn:
            await conn.execution_options(isolation_level="AUTOCOMMIT")
            await conn.execute(text("insert into notes values (4)"))
        async with creators.connect() as conn:
            result = await conn.stream(text("select id from notes order by id"))
            assert [row.id async for row in result] == [1, 4]


async def test_langgraph_s_checkpoints(database: str, make_manager: MakeManager) -> None:
    kwargs = {"autocommit": True, "prepare_threshold": 0, "row_factory": dict_row}
    db: PoolManager[Any] = make_manager(database, min_size=1, kwargs=kwargs)
    saver = AsyncPostgresSaver(db.pool)
    async with db:
        await saver.setup()  # it creates an index concurrently
        async with sandbox(db):
            config: Any = {"configurable": {"thread_id": "1", "checkpoint_ns": ""}}
            for step in range(3):
                metadata: Any = {"source": "loop", "step": step}
                config = await saver.aput(config, empty_checkpoint(), metadata, {})
                await saver.aput_writes(config, [("channel", step)], task_id="task")
            saved = await saver.aget_tuple({"configurable": {"thread_id": "1"}})
            assert saved is not None
            assert saved.pending_writes == [("task", "channel", 2)]
        assert await saver.aget_tuple({"configurable": {"thread_id": "1"}}) is None


async def test_procrastinate_s_jobs(database: str, make_manager: MakeManager) -> None:
    db = make_manager(database, min_size=1)
    jobs = procrastinate.App(connector=procrastinate.PsycopgConnector())
    done: list[int] = []

    @jobs.task(name="add")
    async def add(a: int, b: int) -> None:
        done.append(a + b)
        await db.execute("create table if not exists sums (n int)")

    async with db, jobs.open_async(db.pool):
        await jobs.schema_manager.apply_schema_async()
        async with sandbox(db):
            await add.defer_async(a=1, b=2)
            await jobs.run_worker_async(
                wait=False, listen_notify=False, install_signal_handlers=False
            )
            assert done == [3]
            assert await count(db, "procrastinate_jobs where status = 'succeeded'") == 1
        assert await count(db, "procrastinate_jobs") == 0


def application(db: PoolManager) -> FastAPI:
    """An application that has all that asks for a connection."""
    app = FastAPI(lifespan=lifespan(db))

    async def passed_on(request: Any, call_next: Callable[[Any], Awaitable[Any]]) -> Any:
        return await call_next(request)  # the endpoint runs in another task

    app.add_middleware(BaseHTTPMiddleware, dispatch=passed_on)

    async def checked(conn: DepConnection) -> int:
        cursor = await conn.execute("select count(*) from notes")
        (number,) = await cursor.fetchone() or (0,)
        return int(number)

    @app.put("/notes/{number}")
    async def put(
        number: int, conn: DepConnection, before: int = Depends(checked)
    ) -> dict[str, int]:
        await conn.execute("insert into notes values (%s)", (number,))
        if number > 9:
            raise HTTPException(409)
        return {"before": before}

    async def add_later(db: DepPool, number: int) -> None:
        await db.execute("insert into notes values (%s)", (number,))

    @app.post("/later/{number}")
    async def later(number: int, tasks: BackgroundTasks, db: DepPool) -> None:
        tasks.add_task(add_later, db, number)

    return app


async def test_an_application_s_requests_on_the_loop_of_the_test(
    notes: str, make_manager: MakeManager
) -> None:
    db = make_manager(notes, min_size=1, max_size=2, timeout=10)
    app = application(db)
    async with sandbox(db), LifespanManager(app) as running:
        transport = httpx.ASGITransport(running.app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            answers = await asyncio.gather(*(client.put(f"/notes/{n}") for n in range(4)))
            assert sorted(answer.json()["before"] for answer in answers) == [0, 1, 2, 3]
            assert (await client.put("/notes/10")).status_code == 409
            await client.post("/later/5")
            assert await count(db, "notes") == 5
            with outside():
                assert await count(db, "notes") == 0


def test_an_application_s_requests_on_the_loop_of_a_test_client(
    notes: str, make_manager: MakeManager
) -> None:
    db = make_manager(notes, min_size=1, timeout=10)
    with TestClient(application(db)) as client:
        assert client.portal is not None
        with client.portal.wrap_async_context_manager(sandbox(db, shared=True)):
            assert client.put("/notes/1").json() == {"before": 0}
            assert client.put("/notes/10").status_code == 409
            client.post("/later/5")
            assert client.portal.call(count, db, "notes") == 2
