"""The adapter for Starlette."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, TypeAlias

import anyio
import anyio.from_thread
import httpx
import psycopg
import pytest
from asgi_lifespan import LifespanManager
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.endpoints import HTTPEndpoint
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.routing import Mount, Route, WebSocketRoute
from starlette.testclient import TestClient
from starlette.types import ASGIApp, Receive, Scope, Send
from starlette.websockets import WebSocket

from poolkeeper import (
    AcquireTimeout,
    ClosedError,
    LoopMismatchError,
    NoConnectionError,
    NotOpenError,
    OpenError,
    PoolManager,
)
from poolkeeper.adapters.starlette import (
    connection_from,
    exhausted,
    lifespan,
    livez,
    pool_from,
    readyz,
)
from poolkeeper.errors import see
from tests.support.waiting import until

from .conformance import Conformance, Framework, Probe, client
from .servers import Served

Work: TypeAlias = Callable[[], Awaitable[None]]


class OnStarlette(Framework):
    name = extra = package = "starlette"
    order = "GET /orders/{number:int}"

    def build(self, probe: Probe) -> Any:
        async def value(request: Request) -> Response:
            async with connection_from(request) as conn:
                return PlainTextResponse(await probe.value(conn))

        async def order(request: Request) -> Response:
            async with connection_from(request) as conn:
                return PlainTextResponse(await probe.order(conn))

        async def helped(request: Request) -> Response:
            return PlainTextResponse(await probe.helped())

        async def unasked(request: Request) -> Response:
            return PlainTextResponse(probe.unasked())

        async def same(request: Request) -> Response:
            async with connection_from(request) as first, connection_from(request) as second:
                return PlainTextResponse(probe.same(first, second))

        async def stream(request: Request) -> Response:
            return StreamingResponse(probe.stream(pool_from(request)))

        async def kept(request: Request) -> Response:
            async with connection_from(request) as conn:
                return StreamingResponse(probe.kept(conn))

        async def items(request: Request) -> Response:
            async with connection_from(request) as conn:
                await probe.add(conn, request.query_params["text"])
            return PlainTextResponse("ok")

        async def fail(request: Request) -> Response:
            async with connection_from(request) as conn:
                await probe.add_and_raise(conn, request.query_params["text"])
            return PlainTextResponse("ok")

        async def reject(request: Request) -> Response:
            async with connection_from(request) as conn:
                await probe.add(conn, request.query_params["text"])
                raise HTTPException(409)

        async def fail_at_commit(request: Request) -> Response:
            async with connection_from(request) as conn:
                await probe.add_twice(conn, request.query_params["text"])
            return PlainTextResponse("ok")

        @asynccontextmanager
        async def own(app: Starlette) -> AsyncIterator[None]:
            await probe.startup()
            yield
            await probe.shutdown()

        return Starlette(
            routes=[
                Route("/value", value),
                Route("/orders/{number:int}", order),
                Route("/helped/{number:int}", helped),
                Route("/unasked", unasked),
                Route("/same", same),
                Route("/stream", stream),
                Route("/kept", kept),
                Route("/items", items, methods=["POST"]),
                Route("/raise", fail, methods=["POST"]),
                Route("/reject", reject, methods=["POST"]),
                Route("/fail-at-commit", fail_at_commit, methods=["POST"]),
                Route("/livez", livez),
                Route("/readyz", readyz),
            ],
            lifespan=lifespan(probe.db, own),
            exception_handlers={NoConnectionError: exhausted},
        )


class TestStarlette(Conformance):
    framework = OnStarlette()


class TestStarletteServed(Served):
    example = "starlette"


HERE = "tests/adapters/test_starlette.py"

NO_POOL = """\
there is no pool in this application: its start-up has not run
DETAIL:  The pool is opened by the application's start-up, which keeps it under "poolkeeper"; \
nothing is there.
HINT:  Give the application lifespan=lifespan(manager). In tests enter the client: \
"with TestClient(app) as client"; httpx.ASGITransport runs no lifespan, so wrap the application \
in asgi_lifespan.LifespanManager. A mounted application's lifespan never runs, and some servers \
(daphne) know none. """ + see("no-startup")


@pytest.fixture
def db(database: str) -> PoolManager[Any]:
    """A manager as at module level: nothing has opened it."""
    return PoolManager(database, min_size=1, max_size=1, name="orders", timeout=5)


async def value(request: Request) -> Response:
    async with connection_from(request) as conn:
        row = await (await conn.execute("select 1")).fetchone()
    return PlainTextResponse(str(row))


def application(db: PoolManager[Any], *routes: Any, **options: Any) -> Starlette:
    return Starlette(routes=[Route("/value", value), *routes], lifespan=lifespan(db), **options)


# --- the test client ----------------------------------------------------------------------------


def test_an_entered_client_has_the_pool(db: PoolManager[Any]) -> None:
    with TestClient(application(db)) as http:
        assert db.state == "open"
        assert http.get("/value").text == "(1,)"
    assert db.state == "closed"


def test_clients_in_a_row_with_one_application_and_one_manager(db: PoolManager[Any]) -> None:
    """Each runs a loop of its own in a thread of its own."""
    app = application(db)
    for _ in range(3):
        with TestClient(app) as http:
            assert http.get("/value").text == "(1,)"
        assert db.state == "closed"


def test_a_client_that_is_not_entered_is_told_why_there_is_no_pool(db: PoolManager[Any]) -> None:
    with pytest.raises(NotOpenError) as caught:
        TestClient(application(db)).get("/value")
    assert str(caught.value) == NO_POOL


def test_so_is_one_whose_websocket_asks(db: PoolManager[Any]) -> None:
    async def live(websocket: WebSocket) -> None:
        pool_from(websocket)

    http = TestClient(application(db, WebSocketRoute("/live", live)))
    with pytest.raises(NotOpenError) as caught, http.websocket_connect("/live"):
        pass
    assert str(caught.value) == NO_POOL


def test_a_client_that_was_left_is_told_that_the_pool_is_closed(db: PoolManager[Any]) -> None:
    with TestClient(application(db)) as http:
        assert http.get("/value").text == "(1,)"
    with pytest.raises(ClosedError, match='pool "orders" is closed'):
        http.get("/value")


async def test_an_entered_client_in_an_async_test(db: PoolManager[Any]) -> None:
    """It serves on a loop of its own, and waits meanwhile: the test's own stands still."""
    with TestClient(application(db)) as http:
        assert http.get("/value").text == "(1,)"
    assert db.state == "closed"


async def test_it_cannot_serve_with_a_pool_that_the_test_has_opened(db: PoolManager[Any]) -> None:
    async with db:
        with (
            pytest.raises(LoopMismatchError, match='"orders" is bound to a different event loop'),
            TestClient(application(db)),
        ):
            pass
        assert await db.fetchval("select 1") == 1


async def test_the_transport_with_a_lifespan_manager_serves_on_the_loop_of_the_test(
    db: PoolManager[Any],
) -> None:
    app = application(db)
    for _ in range(2):
        async with LifespanManager(app) as running, client(running.app) as http:
            assert (await http.get("/value")).text == "(1,)"
            assert await db.fetchval("select 1") == 1  # the test may use it as well
        assert db.state == "closed"


@pytest.mark.parametrize("opened", [False, True])
async def test_the_transport_alone_says_why_there_is_no_pool(
    opened: bool, db: PoolManager[Any]
) -> None:
    app = application(db)
    if opened:
        await db.open()
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://probe") as http:
        with pytest.raises(NotOpenError) as caught:
            await http.get("/value")
    assert str(caught.value) == NO_POOL
    await db.close()


@pytest.mark.direct
def test_a_wrong_role_fails_the_client_when_it_is_entered(database: str) -> None:
    conninfo = psycopg.conninfo.make_conninfo(database, user="nobody_there")
    db = PoolManager(conninfo, min_size=1, name="orders")
    with pytest.raises(OpenError) as caught, TestClient(application(db)):
        pass
    said = str(caught.value).splitlines()[0]
    assert said == 'cannot open pool "orders": role "nobody_there" does not exist'
    assert db.state == "closed"


# --- applications in applications ---------------------------------------------------------------


def test_a_mounted_application_has_the_pool_of_the_outer_one(db: PoolManager[Any]) -> None:
    inner = Starlette(routes=[Route("/value", value), Route("/readyz", readyz)])
    with TestClient(application(db, Mount("/inner", inner))) as http:
        assert http.get("/inner/value").text == "(1,)"
        assert http.get("/inner/readyz").status_code == 200


def test_the_lifespan_of_a_mounted_application_does_not_run(db: PoolManager[Any]) -> None:
    with TestClient(Starlette(routes=[Mount("/inner", application(db))])) as http:
        with pytest.raises(NotOpenError) as caught:
            http.get("/inner/value")
        assert str(caught.value) == NO_POOL
    assert db.state == "new"


def test_unless_the_outer_one_runs_it(db: PoolManager[Any]) -> None:
    inner = application(db)
    outer = Starlette(routes=[Mount("/inner", inner)], lifespan=inner.router.lifespan_context)
    with TestClient(outer) as http:
        assert http.get("/inner/value").text == "(1,)"
    assert db.state == "closed"


@pytest.mark.filterwarnings("ignore::poolkeeper.errors.DuplicatePoolWarning")
def test_several_managers_each_under_a_key(db: PoolManager[Any], database: str) -> None:
    reports = PoolManager(database, min_size=1, name="reports")

    async def names(request: Request) -> Response:
        async with connection_from(request) as one, connection_from(request, "reports") as two:
            assert one is not two
        return PlainTextResponse(f"{pool_from(request).name}, {pool_from(request, 'reports').name}")

    app = Starlette(
        routes=[Route("/names", names)], lifespan=lifespan(db, lifespan(reports, key="reports"))
    )
    with TestClient(app) as http:
        assert http.get("/names").text == "orders, reports"


# --- the connection of the request ----------------------------------------------------------------


class AlsoAsks:
    """A middleware in pure ASGI runs what it wraps in its own task."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        async with connection_from(Request(scope)) as conn:
            scope["state"]["outer"] = conn
            await self._app(scope, receive, send)


def test_what_a_middleware_holds_its_endpoint_gets(db: PoolManager[Any]) -> None:
    async def same(request: Request) -> Response:
        async with connection_from(request) as conn:
            return PlainTextResponse(str(conn is request.state.outer))

    app = application(db, Route("/same", same), middleware=[Middleware(AlsoAsks)])
    with TestClient(app) as http:  # of one connection, at most
        assert http.get("/same").text == "True"


def test_a_base_http_middleware_gives_its_connection_back_before_it_calls_on(
    db: PoolManager[Any],
) -> None:
    async def ask(request: Request, call_next: Any) -> Response:
        async with connection_from(request) as conn:
            await conn.execute("select 1")
        response: Response = await call_next(request)
        return response

    app = application(db, middleware=[Middleware(BaseHTTPMiddleware, dispatch=ask)])
    with TestClient(app) as http:
        assert http.get("/value").text == "(1,)"


def test_one_that_does_not_is_named_by_the_diagnosis(database: str) -> None:
    """It runs the endpoint in another task, which needs a second connection."""
    db = PoolManager(database, min_size=1, max_size=1, name="orders", timeout=1.5)

    async def ask(request: Request, call_next: Any) -> Any:
        async with connection_from(request):
            return await call_next(request)

    line = ask.__code__.co_firstlineno + 1
    app = application(db, middleware=[Middleware(BaseHTTPMiddleware, dispatch=ask)])
    with TestClient(app) as http, pytest.raises(AcquireTimeout) as caught:
        http.get("/value")
    assert caught.value.diagnosis.cause == "held-but-hardly-used"
    assert f"acquired at GET /value, {HERE}:{line} in ask." in str(caught.value)


def test_an_endpoint_that_is_a_class(db: PoolManager[Any]) -> None:
    class Value(HTTPEndpoint):
        async def get(self, request: Request) -> Response:
            return await value(request)

    with TestClient(application(db, Route("/class", Value))) as http:
        assert http.get("/class").text == "(1,)"


def test_an_endpoint_in_a_thread_asks_the_loop_of_the_application(db: PoolManager[Any]) -> None:
    def thread(request: Request) -> Response:
        with pytest.raises(LoopMismatchError, match="AnyIO worker thread"):
            asyncio.run(again(request))
        return PlainTextResponse(
            str(anyio.from_thread.run(pool_from(request).fetchval, "select 1"))
        )

    async def again(request: Request) -> None:
        async with connection_from(request):
            pass

    with TestClient(application(db, Route("/thread", thread))) as http:
        assert http.get("/thread").text == "1"


def test_what_runs_after_the_response_takes_a_connection_of_its_own(db: PoolManager[Any]) -> None:
    seen: list[object] = []

    async def later(request: Request) -> None:
        seen.append(db.snapshot().in_use)
        seen.append(await pool_from(request).fetchval("select 1"))

    async def begin(request: Request) -> Response:
        async with connection_from(request) as conn:
            await conn.execute("select 1")
        return PlainTextResponse("begun", background=BackgroundTask(later, request))

    with TestClient(application(db, Route("/begin", begin))) as http:
        assert http.get("/begin").text == "begun"
    assert seen == [0, 1]


# --- tasks that a handler makes -------------------------------------------------------------------


async def _gather(work: Work) -> None:
    await asyncio.gather(work(), work())


async def _gather_twice(work: Work) -> None:
    await asyncio.gather(_gather(work))


async def _task_group(work: Work) -> None:
    async with asyncio.TaskGroup() as group:
        group.create_task(work())
        await asyncio.Event().wait()


async def _task_group_of_anyio(work: Work) -> None:
    async with anyio.create_task_group() as group:
        group.start_soon(work)


async def _await(work: Work) -> None:
    await asyncio.create_task(work())


async def _wait(work: Work) -> None:
    await asyncio.wait([asyncio.create_task(work())])


async def _wait_for(work: Work) -> None:
    await asyncio.wait_for(work(), 60)


async def _shield(work: Work) -> None:
    await asyncio.shield(work())


WAYS = (
    _gather,
    _gather_twice,
    _task_group,
    _task_group_of_anyio,
    _await,
    _wait,
    _wait_for,
    _shield,
)


async def test_who_asks_in_a_task_that_a_handler_made_is_named_by_the_handlers_route(
    db: PoolManager[Any],
) -> None:
    """Whichever way the handler waits for it; a task that nobody waits for, by its line alone."""

    async def work() -> None:
        async with db.connection():
            pass

    async def order(request: Request) -> Response:
        await WAYS[request.path_params["way"]](work)
        return PlainTextResponse("")

    async def alone() -> None:
        async with db.connection():
            pass

    app = application(db, Route("/orders/{way:int}", order))
    async with LifespanManager(app) as running, client(running.app) as http, db.connection():
        requests = [asyncio.create_task(http.get(f"/orders/{way}")) for way in range(len(WAYS))]
        other = asyncio.create_task(alone())
        await until(lambda: db.snapshot().waiting == len(WAYS) + 3)
        rows = db.snapshot().waiters
        for task in (*requests, other):
            task.cancel()
        await asyncio.wait([*requests, other])
    place = f"{HERE}:{work.__code__.co_firstlineno + 1} in work"
    mine = f"{HERE}:{alone.__code__.co_firstlineno + 1} in alone"
    assert {row.asker for row in rows} == {f"GET /orders/{{way:int}}, {place}", mine}


# --- streams and WebSockets -----------------------------------------------------------------------


def test_a_websocket_holds_no_connection_while_it_is_idle(db: PoolManager[Any]) -> None:
    async def live(websocket: WebSocket) -> None:
        await websocket.accept()
        pool = pool_from(websocket)
        async for text in websocket.iter_text():
            await websocket.send_text(str(await pool.fetchval("select %s || '!'", (text,))))

    with (
        TestClient(application(db, WebSocketRoute("/live", live))) as http,
        http.websocket_connect("/live") as one,
        http.websocket_connect("/live") as two,
    ):
        for socket in (one, two):  # both with the only connection
            socket.send_text("hello")
            assert socket.receive_text() == "hello!"
        assert db.snapshot().in_use == 0
        assert http.get("/value").text == "(1,)"


async def test_a_stream_inside_of_the_block_is_named_by_the_diagnosis(
    db: PoolManager[Any],
) -> None:
    read = asyncio.Event()

    async def rows(request: Request) -> AsyncIterator[str]:
        async with connection_from(request) as conn:  # wrong: until the client has read it
            await conn.execute("select 1")
            yield "1"
            await read.wait()

    line = rows.__code__.co_firstlineno + 1

    async def stream(request: Request) -> Response:
        return StreamingResponse(rows(request))

    app = application(db, Route("/stream", stream))
    async with LifespanManager(app) as running, client(running.app) as http:
        reading = asyncio.create_task(http.get("/stream"))
        await until(lambda: db.diagnose().cause == "held-but-hardly-used")
        assert f"acquired at GET /stream, {HERE}:{line} in rows." in db.diagnose().detail
        read.set()
        assert (await reading).text == "1"
