"""The adapter for FastAPI."""

# Annotations are not postponed: FastAPI could not look up those that are made in a test.

import asyncio
import importlib.util
import inspect
import threading
import traceback
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Annotated, Any

import anyio.from_thread
import fastapi.dependencies.utils
import httpx
import psycopg
import pytest
from asgi_lifespan import LifespanManager
from fastapi import APIRouter, BackgroundTasks, Depends, FastAPI, HTTPException, Request, WebSocket
from fastapi.exceptions import FastAPIError
from fastapi.requests import HTTPConnection
from fastapi.responses import PlainTextResponse, StreamingResponse
from fastapi.testclient import TestClient
from psycopg import AsyncConnection
from pydantic import BaseModel

from poolkeeper import (
    AcquireTimeout,
    LoopMismatchError,
    NoConnectionError,
    NotOpenError,
    PoolManager,
    ReleasedConnectionError,
)
from poolkeeper.adapters import fastapi as adapter
from poolkeeper.adapters.fastapi import (
    DepConnection,
    DepPool,
    connection,
    connection_from,
    exhausted,
    lifespan,
    livez,
    pool,
    readyz,
)
from tests.support.waiting import until

from .conformance import Conformance, Framework, Probe, client
from .servers import Served
from .test_starlette import NO_POOL


async def helper(conn: DepConnection) -> AsyncConnection[Any]:
    """A dependency of the endpoint's that asks for the connection as well."""
    return conn


class OnFastAPI(Framework):
    name = extra = package = "fastapi"

    def build(self, probe: Probe) -> Any:
        @asynccontextmanager
        async def own(app: FastAPI) -> AsyncIterator[None]:
            await probe.startup()
            yield
            await probe.shutdown()

        app = FastAPI(lifespan=lifespan(probe.db, own), default_response_class=PlainTextResponse)
        app.add_route("/livez", livez)
        app.add_route("/readyz", readyz)
        app.add_exception_handler(NoConnectionError, exhausted)

        @app.get("/value")
        async def value(conn: DepConnection) -> str:
            return await probe.value(conn)

        @app.get("/orders/{number}")
        async def order(number: int, conn: DepConnection) -> str:
            return await probe.order(conn)

        @app.get("/helped/{number}")
        async def helped(number: int) -> str:
            return await probe.helped()

        @app.get("/unasked")
        async def unasked(pool: DepPool) -> str:
            return probe.unasked()

        @app.get("/same")
        async def same(
            first: DepConnection, second: Annotated[AsyncConnection[Any], Depends(helper)]
        ) -> str:
            return probe.same(first, second)

        @app.get("/stream")
        async def stream(pool: DepPool) -> StreamingResponse:
            return StreamingResponse(probe.stream(pool))

        @app.get("/kept")
        async def kept(conn: DepConnection) -> StreamingResponse:
            return StreamingResponse(probe.kept(conn))

        @app.post("/items")
        async def items(text: str, conn: DepConnection) -> str:
            await probe.add(conn, text)
            return "ok"

        @app.post("/raise")
        async def fail(text: str, conn: DepConnection) -> str:
            await probe.add_and_raise(conn, text)
            return "ok"

        @app.post("/reject")
        async def reject(text: str, conn: DepConnection) -> str:
            await probe.add(conn, text)
            raise HTTPException(409)

        @app.post("/fail-at-commit")
        async def fail_at_commit(text: str, conn: DepConnection) -> str:
            await probe.add_twice(conn, text)
            return "ok"

        return app


class TestFastAPI(Conformance):
    framework = OnFastAPI()


class TestFastAPIServed(Served):
    example = "fastapi"


HERE = "tests/adapters/test_fastapi.py"


@pytest.fixture
def store(database: str) -> str:
    """A database with a table that refuses at the end of a transaction."""
    with psycopg.connect(database) as conn:
        conn.execute("create table items (text text unique deferrable initially deferred)")
    return database


@pytest.fixture
def items(store: str) -> Callable[[], list[str]]:
    def read() -> list[str]:
        with psycopg.connect(store) as conn:
            return [row[0] for row in conn.execute("select text from items order by text")]

    return read


@pytest.fixture
def db(store: str) -> PoolManager[Any]:
    """A manager as at module level: nothing has opened it."""
    return PoolManager(store, min_size=1, max_size=1, name="orders", timeout=5)


@pytest.fixture
def app(db: PoolManager[Any]) -> FastAPI:
    app = FastAPI(lifespan=lifespan(db))

    @app.get("/value")
    async def value(conn: DepConnection) -> int:
        return await one(conn)

    return app


async def one(conn: AsyncConnection[Any]) -> int:
    row = await (await conn.execute("select 1")).fetchone()
    assert row is not None
    return int(row[0])


async def insert(conn: AsyncConnection[Any], text: str) -> None:
    await conn.execute("insert into items values (%s)", (text,))


def line_of(function: Any) -> str:
    """Where the diagnosis says that a connection was acquired for *function*."""
    return f"{HERE}:{function.__code__.co_firstlineno + 1}"  # not that of its decorator


async def test_a_dependency_that_asks_the_manager_is_named_by_the_route_that_it_is_for(
    db: PoolManager[Any],
) -> None:
    """While it waits, too, when the endpoint was not called yet."""
    goes_on = asyncio.Event()

    async def lent() -> AsyncIterator[AsyncConnection[Any]]:
        async with db.connection() as conn:
            yield conn

    app = FastAPI(lifespan=lifespan(db))

    @app.get("/orders/{number}")
    async def order(number: int, conn: Annotated[AsyncConnection[Any], Depends(lent)]) -> int:
        await goes_on.wait()
        return await one(conn)

    async with LifespanManager(app) as served, client(served.app) as http:
        requests = [asyncio.create_task(http.get(f"/orders/{n}")) for n in range(2)]
        await until(lambda: db.snapshot().in_use == 1 and db.snapshot().waiting == 1)
        snapshot = db.snapshot()
        goes_on.set()
        assert [(await request).status_code for request in requests] == [200, 200]
    asker = f"GET /orders/{{number}}, {line_of(lent)} in lent"
    assert [row.asker for row in (*snapshot.checkouts, *snapshot.waiters)] == [asker, asker]


async def test_a_request_that_is_refused_what_it_holds_itself_is_named_by_its_route(
    db: PoolManager[Any],
) -> None:
    """It runs in that moment, and stands nowhere."""
    app = FastAPI(lifespan=lifespan(db))

    @app.get("/orders/{number}")
    async def order(number: int) -> str:
        async with db.connection():
            with pytest.raises(AcquireTimeout) as caught:
                await db.fetchval("select 1", timeout=0.1)
        return str(caught.value)

    async with LifespanManager(app) as served, client(served.app) as http:
        said = (await http.get("/orders/1")).json()
    asker = f"GET /orders/{{number}}, {HERE}:{order.__code__.co_firstlineno + 2} in order"
    assert f" at {asker}" in said


async def test_a_refusal_before_the_endpoint_is_called_says_at_its_end_who_asked(
    db: PoolManager[Any],
) -> None:
    """The traceback has no line of the program's."""
    app = FastAPI(lifespan=lifespan(db))

    @app.get("/orders/{number}")
    async def order(number: int, conn: DepConnection) -> int:
        return await one(conn)

    async with LifespanManager(app) as served, db.connection():
        transport = httpx.ASGITransport(served.app)
        async with httpx.AsyncClient(transport=transport, base_url="http://probe") as http:
            with pytest.raises(AcquireTimeout) as caught:
                await http.get("/orders/1")
    last = traceback.format_exception(caught.value)[-1]
    assert last == f"CONTEXT:  Asked for by GET /orders/{{number}}, {line_of(order)} in order.\n"


# --- the test client ----------------------------------------------------------------------------


def test_clients_in_a_row_with_one_application_and_one_manager(
    app: FastAPI, db: PoolManager[Any]
) -> None:
    for _ in range(3):
        with TestClient(app) as http:
            assert http.get("/value").json() == 1
        assert db.state == "closed"


def test_a_client_that_is_not_entered_is_told_why_there_is_no_pool(app: FastAPI) -> None:
    with pytest.raises(NotOpenError) as caught:
        TestClient(app).get("/value")
    assert str(caught.value) == NO_POOL


@pytest.mark.parametrize("dependency", [DepConnection, DepPool])
def test_so_is_one_whose_websocket_asks(app: FastAPI, dependency: Any) -> None:
    @app.websocket("/live")
    async def live(websocket: WebSocket, asked: dependency) -> None: ...

    with pytest.raises(NotOpenError) as caught, TestClient(app).websocket_connect("/live"):
        pass
    assert str(caught.value) == NO_POOL


async def test_an_entered_client_in_an_async_test(app: FastAPI) -> None:
    with TestClient(app) as http:
        assert http.get("/value").json() == 1


async def test_the_transport_with_a_lifespan_manager_serves_on_the_loop_of_the_test(
    app: FastAPI, db: PoolManager[Any]
) -> None:
    for _ in range(2):
        async with LifespanManager(app) as running, client(running.app) as http:
            assert (await http.get("/value")).json() == 1
            assert await db.fetchval("select 1") == 1


async def test_the_transport_alone_says_why_there_is_no_pool(app: FastAPI) -> None:
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://probe") as http:
        with pytest.raises(NotOpenError) as caught:
            await http.get("/value")
    assert str(caught.value) == NO_POOL


# --- a connection that is rolled back, instead of the pool ----------------------------------------


async def test_a_test_can_give_a_connection_that_is_rolled_back(
    app: FastAPI, db: PoolManager[Any], items: Callable[[], list[str]]
) -> None:
    """Each request a savepoint of one transaction, which ends with the test."""

    @app.post("/items")
    async def add(text: str, conn: DepConnection) -> str:
        await insert(conn, text)
        if text == "bad":
            raise HTTPException(409)
        return text

    async with db, db.connection() as conn, conn.transaction(force_rollback=True):

        async def overridden() -> AsyncIterator[AsyncConnection[Any]]:
            async with conn.transaction():
                yield conn

        app.dependency_overrides[connection] = overridden
        async with client(app) as http:  # needs no start-up
            assert (await http.post("/items?text=a")).status_code == 200
            assert (await http.post("/items?text=bad")).status_code == 409
            assert (await http.post("/items?text=b")).status_code == 200
        rows = await (await conn.execute("select text from items")).fetchall()
        assert rows == [("a",), ("b",)]
    assert items() == []


async def test_a_test_client_serves_on_another_loop_than_such_a_connection(
    app: FastAPI, db: PoolManager[Any]
) -> None:
    async with db, db.connection() as conn:
        app.dependency_overrides[connection] = lambda: conn
        with pytest.raises(LoopMismatchError, match='pool "orders" is bound to a different'):
            TestClient(app).get("/value")


# --- the scope of the dependency ------------------------------------------------------------------

Unscoped = Annotated[AsyncConnection[Any], Depends(connection)]
"""With FastAPI's default scope, which ends after the response was sent."""


def endpoints(app: FastAPI, alias: Any, read: threading.Event | None = None) -> None:
    """Add an endpoint that fails at commit, and one that streams."""

    @app.post("/twice")
    async def twice(text: str, conn: alias) -> str:
        await insert(conn, text)
        await insert(conn, text)
        return "ok"

    async def body() -> AsyncIterator[str]:
        yield "begin "
        while read is not None and not read.is_set():
            await asyncio.sleep(0.01)
        yield "end"

    @app.get("/stream")
    async def stream(conn: alias) -> StreamingResponse:
        await conn.execute("select 1")
        return StreamingResponse(body())


@pytest.mark.parametrize("alias", [DepConnection, Unscoped])
def test_a_failed_commit_is_not_answered_with_success_whatever_the_scope(
    app: FastAPI, items: Callable[[], list[str]], alias: Any
) -> None:
    endpoints(app, alias)
    with TestClient(app, raise_server_exceptions=False) as http:
        assert http.post("/twice?text=a").status_code == 500
    assert items() == []


def test_what_outlives_the_connection_cannot_depend_on_it(app: FastAPI) -> None:
    """FastAPI says so when the endpoint is added."""

    async def audit(conn: DepConnection) -> AsyncIterator[None]:
        yield

    with pytest.raises(FastAPIError, match='dependency "audit" has a scope of "request"'):

        @app.get("/audited", dependencies=[Depends(audit)])
        async def audited() -> None: ...


@pytest.mark.parametrize("alias", [DepConnection, Unscoped])
async def test_a_stream_holds_no_connection_whatever_the_scope(
    app: FastAPI, db: PoolManager[Any], alias: Any
) -> None:
    read = threading.Event()
    endpoints(app, alias, read)
    async with LifespanManager(app) as running, client(running.app) as http:
        reading = asyncio.create_task(http.get("/stream"))
        await until(lambda: db.snapshot().load.released > 0)
        for _ in range(3):  # there is one connection, and it is free
            assert (await http.get("/value")).json() == 1
        assert not reading.done()
        read.set()
        assert (await reading).text == "begin end"


@pytest.fixture
def without_stack(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The adapter beside a FastAPI that does not lend its exit stack, as far as can be seen."""
    solve = fastapi.dependencies.utils.solve_dependencies

    async def other(**arguments: Any) -> Any:
        return await solve(**arguments)

    monkeypatch.setattr(fastapi.dependencies.utils, "solve_dependencies", other)
    assert adapter.__file__ is not None
    spec = importlib.util.spec_from_file_location("poolkeeper.adapters.another", adapter.__file__)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_where_fastapi_lends_no_stack_it_is_a_dependency_with_yield(
    app: FastAPI, items: Callable[[], list[str]], without_stack: Any
) -> None:
    assert inspect.isasyncgenfunction(without_stack.connection)
    assert inspect.iscoroutinefunction(connection)
    endpoints(app, without_stack.DepConnection)

    @app.post("/once")
    async def once(text: str, conn: without_stack.DepConnection, pool: DepPool) -> int:
        await insert(conn, text)
        return pool.snapshot().in_use

    with TestClient(app, raise_server_exceptions=False) as http:
        assert http.post("/twice?text=a").status_code == 500
        assert http.post("/once?text=b").json() == 1
    assert items() == ["b"]


# --- WebSockets -----------------------------------------------------------------------------------


def test_a_websocket_with_the_pool_holds_no_connection_while_it_is_idle(
    app: FastAPI, db: PoolManager[Any]
) -> None:
    @app.websocket("/live")
    async def live(websocket: WebSocket, pool: DepPool) -> None:
        await websocket.accept()
        async for text in websocket.iter_text():
            async with pool.connection() as conn:
                await insert(conn, text)
            await websocket.send_text("added")

    with (
        TestClient(app) as http,
        http.websocket_connect("/live") as one,
        http.websocket_connect("/live") as two,
    ):
        for socket, text in ((one, "a"), (two, "b")):  # both with the only connection
            socket.send_text(text)
            assert socket.receive_text() == "added"
        assert db.snapshot().in_use == 0
        assert http.get("/value").json() == 1


def test_a_websocket_with_a_connection_holds_it_and_is_named_by_the_diagnosis(
    app: FastAPI, db: PoolManager[Any], items: Callable[[], list[str]]
) -> None:
    @app.websocket("/live")
    async def live(websocket: WebSocket, conn: DepConnection) -> None:
        await websocket.accept()
        async for text in websocket.iter_text():
            await insert(conn, text)
            await websocket.send_text("added")

    with TestClient(app) as http:
        with http.websocket_connect("/live") as socket:
            socket.send_text("a")
            assert socket.receive_text() == "added"
            wait_for(lambda: db.diagnose().cause == "held-but-hardly-used")
            asker = f"WEBSOCKET /live, {line_of(live)} in live"
            assert f"acquired at {asker}." in db.diagnose().detail
            assert items() == []
        wait_for(lambda: db.snapshot().in_use == 0)
    assert items() == ["a"]


def wait_for(condition: Callable[[], bool]) -> None:
    """Wait for *condition* while the application runs in another thread."""
    anyio.run(until, condition)


# --- endpoints that are not async -----------------------------------------------------------------


def test_an_endpoint_in_a_thread_that_runs_a_loop_of_its_own_is_refused(
    app: FastAPI, db: PoolManager[Any]
) -> None:
    @app.get("/connection")
    def with_connection(conn: DepConnection) -> int:
        return asyncio.run(one(conn))

    @app.get("/pool")
    def with_pool(pool: DepPool) -> Any:
        async def ask() -> Any:
            return await pool.fetchval("select 1")

        return asyncio.run(ask())

    with TestClient(app) as http:
        for path in ("/connection", "/pool"):
            with pytest.raises(LoopMismatchError) as caught:
                http.get(path)
            assert 'pool "orders" is bound to a different event loop' in str(caught.value)
            assert "AnyIO worker thread" in str(caught.value)
            assert 'write "async def", or in the function anyio.from_' in str(caught.value)
            assert db.snapshot().in_use == 0
        assert http.get("/value").json() == 1


def test_an_endpoint_in_a_thread_asks_the_loop_of_the_application(
    app: FastAPI, items: Callable[[], list[str]]
) -> None:
    @app.post("/connection")
    def with_connection(text: str, conn: DepConnection) -> None:
        anyio.from_thread.run(insert, conn, text)

    @app.get("/pool")
    def with_pool(pool: DepPool) -> Any:
        return anyio.from_thread.run(pool.fetchval, "select count(*) from items")

    with TestClient(app) as http:
        assert http.post("/connection?text=a").status_code == 200
        assert http.get("/pool").json() == 1
    assert items() == ["a"]


# --- routers and applications in applications -----------------------------------------------------


@pytest.mark.filterwarnings("ignore::poolkeeper.errors.DuplicatePoolWarning")
def test_a_router_that_is_included_brings_a_pool_of_its_own(
    app: FastAPI, db: PoolManager[Any], database: str
) -> None:
    reports = PoolManager(database, min_size=1, name="reports")
    seen: list[str] = []

    @asynccontextmanager
    async def own(app: FastAPI) -> AsyncIterator[None]:
        seen.append(f"{db.state} {reports.state}")
        yield
        seen.append(f"{db.state} {reports.state}")

    async def reports_connection(request: HTTPConnection) -> AsyncIterator[AsyncConnection[Any]]:
        async with connection_from(request, "reports") as conn:
            yield conn

    router = APIRouter(prefix="/reports", lifespan=lifespan(reports, own, key="reports"))

    @router.get("/names")
    async def names(
        conn: DepConnection,
        other: Annotated[AsyncConnection[Any], Depends(reports_connection, scope="function")],
    ) -> list[str]:
        rows = [await (await c.execute("show application_name")).fetchone() for c in (conn, other)]
        return [row[0] for row in rows if row is not None]

    app.include_router(router)
    with TestClient(app) as http:
        assert http.get("/reports/names").json() == ["poolkeeper:orders", "poolkeeper:reports"]
    assert seen == ["open open", "open open"]
    assert (db.state, reports.state) == ("closed", "closed")


def test_a_router_whose_lifespan_fails_closes_the_pool(app: FastAPI, db: PoolManager[Any]) -> None:
    @asynccontextmanager
    async def own(app: FastAPI) -> AsyncIterator[None]:
        raise LookupError("no migrations")
        yield

    app.include_router(APIRouter(lifespan=own))
    with pytest.raises(LookupError, match="no migrations"), TestClient(app):
        pass
    assert db.state == "closed"


def test_a_router_without_one_has_the_pool_of_the_application(app: FastAPI) -> None:
    router = APIRouter(prefix="/more", dependencies=[Depends(connection, scope="function")])

    @router.get("/same")
    async def same(conn: DepConnection, pool: DepPool) -> int:
        return pool.snapshot().in_use

    app.include_router(router)
    with TestClient(app) as http:
        assert http.get("/more/same").json() == 1


def test_a_mounted_application_has_the_pool_of_the_outer_one(
    app: FastAPI, db: PoolManager[Any]
) -> None:
    inner = FastAPI()

    @inner.get("/value")
    async def value(conn: DepConnection) -> str:
        (row,) = db.snapshot().checkouts
        return row.site

    app.mount("/inner", inner)
    with TestClient(app) as http:
        assert http.get("/inner/value").json() == line_of(value)


def test_the_lifespan_of_a_mounted_application_does_not_run(
    app: FastAPI, db: PoolManager[Any]
) -> None:
    outer = FastAPI()
    outer.mount("/inner", app)
    with TestClient(outer) as http, pytest.raises(NotOpenError) as caught:
        http.get("/inner/value")
    assert str(caught.value) == NO_POOL
    assert db.state == "new"


# --- requests that fail -------------------------------------------------------------------------


class Item(BaseModel):
    text: str


@pytest.fixture
def adding(app: FastAPI) -> FastAPI:
    @app.post("/items")
    async def add(item: Item, conn: DepConnection) -> Item:
        await insert(conn, item.text)
        if item.text == "taken":
            raise HTTPException(409)
        return item if item.text != "wrong" else Item.model_construct(text=7)

    return app


def test_what_is_raised_by_the_endpoint_or_after_it_is_rolled_back(
    adding: FastAPI, db: PoolManager[Any], items: Callable[[], list[str]]
) -> None:
    with TestClient(adding, raise_server_exceptions=False) as http:
        assert http.post("/items", json={"text": "taken"}).status_code == 409
        assert http.post("/items", json={"text": "wrong"}).status_code == 500  # no valid answer
        assert http.post("/items", json={}).status_code == 422
        assert db.snapshot().in_use == 0
        assert http.post("/items", json={"text": "a"}).status_code == 200
    assert items() == ["a"]


def test_a_dependency_that_raises_after_the_endpoint_rolls_back(
    app: FastAPI, items: Callable[[], list[str]]
) -> None:
    async def audit(conn: DepConnection) -> AsyncIterator[None]:
        yield
        raise HTTPException(403)

    @app.post("/audited", dependencies=[Depends(audit, scope="function")])
    async def add(text: str, conn: DepConnection) -> None:
        await insert(conn, text)

    with TestClient(app) as http:
        assert http.post("/audited?text=a").status_code == 403
    assert items() == []


async def test_a_body_that_comes_slowly_holds_no_connection(
    adding: FastAPI, db: PoolManager[Any], items: Callable[[], list[str]]
) -> None:
    go_on = asyncio.Event()
    asked = asyncio.Event()

    async def body() -> AsyncIterator[bytes]:
        yield b'{"text": '
        asked.set()
        await go_on.wait()
        yield b'"slow"}'

    async with LifespanManager(adding) as running, client(running.app) as http:
        headers = {"content-type": "application/json"}
        sending = asyncio.create_task(http.post("/items", content=body(), headers=headers))
        await asked.wait()
        assert db.snapshot().in_use == 0
        assert (await http.get("/value")).json() == 1
        go_on.set()
        assert (await sending).status_code == 200
    assert items() == ["slow"]


# --- what else asks for the connection of the request ---------------------------------------------


def test_a_background_task_cannot_use_the_connection_of_the_request(
    app: FastAPI, items: Callable[[], list[str]]
) -> None:
    @app.post("/items")
    async def add(text: str, conn: DepConnection, tasks: BackgroundTasks) -> None:
        await insert(conn, text)
        tasks.add_task(insert, conn, "later")

    with TestClient(app) as http, pytest.raises(ReleasedConnectionError) as caught:
        http.post("/items?text=a")
    assert "was given back" in str(caught.value)
    assert "give what runs later, such as a background task" in str(caught.value)
    assert items() == ["a"]


def test_a_background_task_that_is_not_async_is_told_what_to_write(app: FastAPI) -> None:
    def later(pool: PoolManager[Any]) -> None:
        async def ask() -> None:
            await pool.fetchval("select 1")

        asyncio.run(ask())

    @app.post("/items")
    async def add(pool: DepPool, tasks: BackgroundTasks) -> None:
        tasks.add_task(later, pool)

    with TestClient(app) as http, pytest.raises(LoopMismatchError) as caught:
        http.post("/items")
    assert 'write "async def", or in the function anyio.from_thread.run(' in str(caught.value)


def test_a_background_task_takes_one_from_the_pool(
    app: FastAPI, items: Callable[[], list[str]]
) -> None:
    async def later(pool: PoolManager[Any]) -> None:
        async with pool.connection() as conn:
            await insert(conn, "later")

    @app.post("/items")
    async def add(text: str, conn: DepConnection, pool: DepPool, tasks: BackgroundTasks) -> None:
        await insert(conn, text)
        tasks.add_task(later, pool)

    with TestClient(app) as http:
        assert http.post("/items?text=a").status_code == 200
    assert items() == ["a", "later"]


def test_all_ways_to_ask_give_one_connection(app: FastAPI, db: PoolManager[Any]) -> None:
    Uncached = Annotated[  # noqa: N806
        AsyncConnection[Any], Depends(connection, scope="function", use_cache=False)
    ]

    async def repository(conn: DepConnection) -> AsyncIterator[AsyncConnection[Any]]:
        yield conn

    @app.get("/all")
    async def ask(
        request: Request,
        conn: DepConnection,
        uncached: Uncached,
        late: Unscoped,
        repository: Annotated[AsyncConnection[Any], Depends(repository, scope="function")],
    ) -> list[bool]:
        async with connection_from(request) as asked:
            return [each is conn for each in (uncached, late, repository, asked)]

    with TestClient(app) as http:  # of one connection, at most
        assert http.get("/all").json() == [True] * 4
        assert db.snapshot().in_use == 0


def test_the_health_endpoints_are_not_in_the_schema(app: FastAPI) -> None:
    app.add_route("/livez", livez)
    assert app.openapi()["paths"].keys() == {"/value"}
    assert TestClient(app).get("/livez").json() == {"status": "alive"}


def test_the_pool_is_no_parameter_of_the_url(app: FastAPI) -> None:
    @app.get("/pool")
    async def named(pool: DepPool) -> str:
        return pool.name

    assert "parameters" not in app.openapi()["paths"]["/pool"]["get"]
    with TestClient(app) as http:
        assert http.get("/pool?key=other").json() == "orders"


def test_the_pool_can_be_overridden_and_takes_no_thread(app: FastAPI, db: PoolManager[Any]) -> None:
    @app.get("/pool")
    async def named(pool: DepPool) -> str:
        return pool.name

    async def other() -> PoolManager[Any]:
        return PoolManager("", name="other")

    app.dependency_overrides[pool] = other
    with TestClient(app) as http:
        assert http.get("/pool").json() == "other"
    assert inspect.iscoroutinefunction(pool)  # FastAPI calls others in a thread
