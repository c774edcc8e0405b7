"""The adapter for Sanic."""

from __future__ import annotations

import asyncio
import itertools
import socket
import traceback
import warnings
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any, ClassVar

import httpx
import pytest
from asgi_lifespan import LifespanManager
from sanic import Blueprint, Request, Sanic, json, text
from sanic.exceptions import SanicException
from sanic.response import ResponseStream
from websockets.asyncio.client import connect

from poolkeeper import NoConnectionError, NotOpenError, PoolManager
from poolkeeper.adapters.sanic import connection_from, exhausted, livez, pool_from, readyz, setup
from poolkeeper.errors import see
from tests.support.waiting import until

from .conformance import Conformance, Framework, Probe, client
from .servers import SERVERS, Command, Served

with warnings.catch_warnings():
    warnings.filterwarnings("ignore", "websockets.legacy is deprecated", DeprecationWarning)
    from sanic_testing.reusable import ReusableClient

HERE = "tests/adapters/test_sanic.py"
CALL = Sanic.__call__

_numbers = itertools.count()


@pytest.fixture(autouse=True)
def unchanged(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take back what ``asgi_client`` does to the class, whoever has used it: no more lifespan."""
    monkeypatch.setattr(Sanic, "__call__", CALL)


def new_app() -> Sanic[Any, Any]:
    """An application with a name of its own: Sanic keeps them all."""
    app = Sanic(f"probe-{next(_numbers)}", configure_logging=False)
    # It rewrites methods of the class for one application, which it can do once in a process.
    app.config.TOUCHUP = False
    app.config.MOTD = False
    return app


class OnSanic(Framework):
    """Sanic's own server, on the loop of the test."""

    name = extra = package = "sanic"
    order = "GET /orders/<number:int>"

    def build(self, probe: Probe) -> Any:
        app = new_app()

        @app.get("/value")
        async def value(request: Request) -> Any:
            async with connection_from(request) as conn:
                return text(await probe.value(conn))

        @app.get("/orders/<number:int>")
        async def order(request: Request, number: int) -> Any:
            async with connection_from(request) as conn:
                return text(await probe.order(conn))

        @app.get("/helped/<number:int>")
        async def helped(request: Request, number: int) -> Any:
            return text(await probe.helped())

        @app.get("/unasked")
        async def unasked(request: Request) -> Any:
            return text(probe.unasked())

        @app.get("/same")
        async def same(request: Request) -> Any:
            async with connection_from(request) as first, connection_from(request) as second:
                return text(probe.same(first, second))

        @app.get("/stream")
        async def stream(request: Request) -> Any:
            response = await request.respond(content_type="text/plain")
            async for line in probe.stream(pool_from(request)):
                await response.send(line)

        @app.get("/kept")
        async def kept(request: Request) -> Any:
            async with connection_from(request) as conn:
                lines = probe.kept(conn)

            async def write(response: Any) -> None:
                async for line in lines:
                    await response.write(line)

            return ResponseStream(write)

        @app.post("/items")
        async def items(request: Request) -> Any:
            async with connection_from(request) as conn:
                await probe.add(conn, request.args["text"][0])
            return text("ok")

        @app.post("/raise")
        async def fail(request: Request) -> Any:
            async with connection_from(request) as conn:
                await probe.add_and_raise(conn, request.args["text"][0])
            return text("ok")

        @app.post("/reject")
        async def reject(request: Request) -> Any:
            async with connection_from(request) as conn:
                await probe.add(conn, request.args["text"][0])
                raise SanicException(status_code=409)

        @app.post("/fail-at-commit")
        async def fail_at_commit(request: Request) -> Any:
            async with connection_from(request) as conn:
                await probe.add_twice(conn, request.args["text"][0])
            return text("ok")

        # Before setup(): the order in the program does not matter.
        @app.before_server_start
        async def up(app: Any) -> None:
            await probe.startup()

        @app.after_server_stop
        async def down(app: Any) -> None:
            await probe.shutdown()

        setup(app, probe.db)
        app.error_handler.add(NoConnectionError, exhausted)
        app.add_route(livez, "/livez")
        app.add_route(readyz, "/readyz")
        return app

    @asynccontextmanager
    async def served(self, app: Any) -> AsyncIterator[httpx.AsyncClient]:
        async with listening(app) as (server, url):
            await server.before_start()
            await server.after_start()
            async with httpx.AsyncClient(base_url=url, timeout=20) as http:
                yield http
            await server.before_stop()
            await server.close()
            await server.after_stop()

    @asynccontextmanager
    async def served_without_startup(self, app: Any) -> AsyncIterator[httpx.AsyncClient]:
        async with (
            listening(app) as (_, url),
            httpx.AsyncClient(base_url=url, timeout=20) as http,
        ):
            yield http


@asynccontextmanager
async def listening(app: Any) -> AsyncIterator[tuple[Any, str]]:
    """Serve *app* on the running loop; its listeners are the caller's to run."""
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    server = await app.create_server(sock=listener, return_asyncio_server=True, access_log=False)
    try:
        await server.startup()
        yield server, f"http://127.0.0.1:{port}"
    finally:
        await server.close()


class OnSanicASGI(OnSanic):
    """Sanic under an ASGI server."""

    @asynccontextmanager
    async def served(self, app: Any) -> AsyncIterator[httpx.AsyncClient]:
        async with asgi_lifespan(app), client(app) as http:
            yield http

    @asynccontextmanager
    async def served_without_startup(self, app: Any) -> AsyncIterator[httpx.AsyncClient]:
        app.asgi = True  # as app.asgi_client does
        await app._startup()
        async with client(app) as http:
            yield http


@asynccontextmanager
async def asgi_lifespan(app: Any) -> AsyncIterator[None]:
    """Run the lifespan as servers do; asgi_lifespan takes no notice when a start-up failed."""
    events: asyncio.Queue[Any] = asyncio.Queue()
    answers: asyncio.Queue[Any] = asyncio.Queue()
    scope = {"type": "lifespan", "asgi": {"version": "3.0"}, "state": {}}
    task = asyncio.create_task(app(scope, events.get, answers.put))
    try:
        events.put_nowait({"type": "lifespan.startup"})
        answer = await answers.get()
        if answer["type"] != "lifespan.startup.complete":
            raise RuntimeError(answer["message"])
        yield
        events.put_nowait({"type": "lifespan.shutdown"})
        answer = await answers.get()
        if answer["type"] != "lifespan.shutdown.complete":
            raise RuntimeError(answer["message"])
    finally:
        task.cancel()
        await asyncio.wait({task})


class TestSanic(Conformance):
    framework = OnSanic()


class TestSanicASGI(Conformance):
    framework = OnSanicASGI()
    wraps_start_up_errors = True  # ASGI knows messages only


@pytest.fixture
def db(dsn: str) -> PoolManager[Any]:
    return PoolManager(dsn, min_size=1, max_size=1, name="orders", timeout=5, open_timeout=5)


EVENTS = (
    "before_server_start",
    "after_server_start",
    "before_server_stop",
    "after_server_stop",
)


class TestListeners:
    """Every listener has the pool, and none that fails keeps it open."""

    @pytest.fixture
    def said(self) -> list[str]:
        return []

    @pytest.fixture
    def listen(self, db: PoolManager[Any], said: list[str]) -> Callable[..., None]:
        """A function that registers a listener for every event, some of which fail."""

        def add(app: Any, name: str, failing: str = "", priority: int = 0) -> None:
            def one(event: str) -> None:
                async def listener(app: Any) -> None:
                    said.append(f"{event} {name}: {await db.fetchval('select 1')}")
                    if event == failing:
                        raise ZeroDivisionError(f"{event} failed")

                app.listener(listener, event, priority=priority)

            for event in EVENTS:
                one(event)

        return add

    async def test_all_have_the_pool_wherever_they_are_registered(
        self, db: PoolManager[Any], listen: Callable[..., None], said: list[str]
    ) -> None:
        app = new_app()
        app.add_route(livez, "/livez")
        listen(app, "early")
        listen(app, "early and first", priority=1000)
        setup(app, db)
        listen(app, "late and last", priority=-1000)
        blueprint = Blueprint("shop")
        listen(blueprint, "blueprint")
        app.blueprint(blueprint)
        async with OnSanic().served(app):
            assert db.state == "open"
        assert db.state == "closed"
        names = ["early and first", "early", "blueprint", "late and last"]
        assert said == [
            *(f"before_server_start {name}: 1" for name in names),
            *(f"after_server_start {name}: 1" for name in names),
            *(f"before_server_stop {name}: 1" for name in reversed(names)),
            *(f"after_server_stop {name}: 1" for name in reversed(names)),
        ]

    @pytest.mark.parametrize("failing", EVENTS)
    @pytest.mark.parametrize("framework", [OnSanic(), OnSanicASGI()], ids=["own", "asgi"])
    async def test_one_that_fails_does_not_leave_the_pool_open(
        self,
        framework: OnSanic,
        db: PoolManager[Any],
        listen: Callable[..., None],
        said: list[str],
        failing: str,
    ) -> None:
        app = new_app()
        app.add_route(livez, "/livez")
        setup(app, db)
        listen(app, "one", failing)
        with pytest.raises((ZeroDivisionError, RuntimeError), match=f"{failing} failed"):
            async with framework.served(app):
                pass
        assert db.state == "closed"
        assert said[-1] == f"{failing} one: 1"
        assert len(said) == len(set(said))

    async def test_who_waits_for_the_event_is_told_once(self, db: PoolManager[Any]) -> None:
        app = new_app()
        app.add_route(livez, "/livez")
        setup(app, db)
        told: list[dict[str, Any]] = []
        waiting: list[asyncio.Task[None]] = []

        async def wait() -> None:
            told.append(await app.event("server.init.after"))

        @app.before_server_start
        async def begin(app: Any) -> None:
            waiting.append(asyncio.create_task(wait()))
            await asyncio.sleep(0)  # it waits from now on

        async with OnSanic().served(app):
            await asyncio.wait_for(waiting[0], 10)
        assert [context["app"] for context in told] == [app]

    async def test_a_task_of_the_application_has_the_pool(self, db: PoolManager[Any]) -> None:
        app = new_app()
        app.add_route(livez, "/livez")
        seen: list[Any] = []

        async def work(app: Any) -> None:
            seen.append(await db.fetchval("select 1"))

        app.add_task(work)
        setup(app, db)
        async with OnSanic().served(app):
            await until(lambda: seen == [1])

    async def test_two_pools_live_side_by_side(self, db: PoolManager[Any], database: str) -> None:
        other = PoolManager(database, min_size=1, max_size=1, name="reports")
        app = new_app()

        @app.get("/")
        async def root(request: Request) -> Any:
            async with connection_from(request), connection_from(request, "reports"):
                return json([pool_from(request).name, pool_from(request, "reports").name])

        @app.before_server_start
        async def up(app: Any) -> None:
            said.append(f"up: {db.state} {other.state}")

        @app.after_server_stop
        async def down(app: Any) -> None:
            said.append(f"down: {db.state} {other.state}")

        said: list[str] = []
        setup(app, db)
        setup(app, other, key="reports")
        async with OnSanic().served(app) as http:
            assert (await http.get("/")).json() == ["orders", "reports"]
        assert (db.state, other.state) == ("closed", "closed")
        assert said == ["up: open open", "down: open open"]


class TestClients:
    """The clients of sanic-testing."""

    @pytest.fixture
    def app(self, db: PoolManager[Any]) -> Any:
        app = new_app()
        # SanicTestClient has a listener that takes the loop. Sanic sets this filter itself.
        app.config.DEPRECATION_FILTER = "ignore"
        setup(app, db)

        @app.get("/")
        async def root(request: Request) -> Any:
            async with connection_from(request) as conn:
                return text(str(await (await conn.execute("select 1")).fetchone()))

        return app

    def test_each_request_of_the_test_client_opens_and_closes_the_pool(
        self, app: Any, db: PoolManager[Any]
    ) -> None:
        for _ in range(3):
            _, answer = app.test_client.get("/")
            assert answer.text == "(1,)"
            assert db.state == "closed"

    def test_a_start_that_failed_in_the_test_client_is_no_hindrance_for_the_next(
        self, app: Any, db: PoolManager[Any]
    ) -> None:
        """Its loop is left as it was, neither running nor closed."""
        failing = [True]

        @app.before_server_start
        async def fail(app: Any) -> None:
            if failing.pop():
                raise ZeroDivisionError("a listener failed")

        with pytest.raises(ZeroDivisionError) as failed:
            app.test_client.get("/")
        # Sanic never awaits what would have made the server: a warning, in whatever test it goes.
        (unawaited,) = [
            frame.f_locals["server_coroutine"]
            for frame, _ in traceback.walk_tb(failed.tb)
            if "server_coroutine" in frame.f_locals
        ]
        unawaited.close()
        assert db.state == "closed"
        failing.append(False)
        _, answer = app.test_client.get("/")
        assert answer.text == "(1,)"

    def test_the_reusable_client_opens_the_pool_once(self, app: Any, db: PoolManager[Any]) -> None:
        for _ in range(2):
            with asyncio.Runner() as runner, socket.create_server(("127.0.0.1", 0)) as listener:
                port = listener.getsockname()[1]
                listener.close()
                with ReusableClient(app, loop=runner.get_loop(), port=port) as reusable:
                    for _ in range(2):
                        _, answer = reusable.get("/")
                        assert answer.text == "(1,)"
                        assert db.state == "open"
            assert db.state == "closed"

    async def test_each_request_of_the_asgi_client_opens_and_closes_the_pool(
        self, app: Any, db: PoolManager[Any]
    ) -> None:
        for _ in range(3):
            _, answer = await app.asgi_client.get("/")
            assert answer.text == "(1,)"
            assert db.state == "closed"

    async def test_a_pool_that_the_test_has_opened_stays_open(
        self, app: Any, db: PoolManager[Any]
    ) -> None:
        async with db:
            for _ in range(2):
                _, answer = await app.asgi_client.get("/")
                assert answer.text == "(1,)"
                assert db.state == "open"

    async def test_without_listeners_the_error_says_what_to_do(
        self, app: Any, db: PoolManager[Any]
    ) -> None:
        """The WebSocket of the ASGI client runs none."""
        seen: list[BaseException] = []

        @app.websocket("/ws")
        async def ws(request: Request, ws: Any) -> None:
            with pytest.raises(NotOpenError) as info:
                connection_from(request)
            seen.append(info.value)

        await app.asgi_client.websocket("/ws")
        assert str(seen[0]) == (
            "there is no pool in this application: its start-up has not run\n"
            "DETAIL:  The pool is opened by the application's start-up, which keeps it under"
            ' "poolkeeper"; nothing is there.\n'
            "HINT:  Give the application a pool with setup(app, manager), and let its listeners"
            " run: Sanic's own server does, so do app.test_client, ReusableClient and"
            " app.asgi_client's requests. asgi_client.websocket() and httpx.ASGITransport run"
            " none, so wrap the application in asgi_lifespan.LifespanManager. Some ASGI servers"
            f" (daphne) know no lifespan. {see('no-startup')}"
        )

    async def test_the_lifespan_manager_opens_the_pool(
        self, app: Any, db: PoolManager[Any]
    ) -> None:
        async with LifespanManager(app, 20, 20), client(app) as http:
            assert (await http.get("/")).text == "(1,)"
        assert db.state == "closed"


class TestConnections:
    """WebSockets and streams."""

    async def test_an_idle_websocket_holds_no_connection(self, db: PoolManager[Any]) -> None:
        app = new_app()
        setup(app, db)

        @app.websocket("/ws")
        async def echo(request: Request, ws: Any) -> None:
            async for message in ws:
                async with connection_from(request) as conn:
                    cursor = await conn.execute("select %s::int", (int(message),))
                    row = await cursor.fetchone()
                await ws.send(str(row))

        async with OnSanic().served(app) as http, connect(to_ws(http)) as ws:
            for number in range(3):
                await ws.send(str(number))
                assert await ws.recv() == f"({number},)"
                assert db.snapshot().in_use == 0

    async def test_a_websocket_that_keeps_its_connection_is_named(
        self, db: PoolManager[Any]
    ) -> None:
        app = new_app()
        setup(app, db)

        @app.websocket("/ws")
        async def keep(request: Request, ws: Any) -> None:
            async with connection_from(request) as conn:
                async for message in ws:
                    await conn.execute("select %s", (message,))

        async with OnSanic().served(app) as http, connect(to_ws(http)) as ws:
            await ws.send("one")
            await until(lambda: db.diagnose().cause == "held-but-hardly-used")
            assert f"{HERE}:{keep.__code__.co_firstlineno + 2}" in str(db.diagnose())

    async def test_a_stream_that_keeps_its_connection_is_named(self, db: PoolManager[Any]) -> None:
        app = new_app()
        setup(app, db)
        end = asyncio.Event()

        @app.get("/")
        async def keep(request: Request) -> None:
            async with connection_from(request) as conn:
                row = await (await conn.execute("select 1")).fetchone()
                response = await request.respond(content_type="text/plain")
                await response.send(str(row))  # and not committed by now
                await end.wait()  # a client that reads slowly

        async with OnSanic().served(app) as http, http.stream("GET", "/") as answer:
            await until(lambda: db.diagnose().cause == "held-but-hardly-used")
            assert f"{HERE}:{keep.__code__.co_firstlineno + 2}" in str(db.diagnose())
            end.set()
            assert await answer.aread() == b"(1,)"

    async def test_another_task_of_a_request_gets_a_connection_of_its_own(self, dsn: str) -> None:
        db = PoolManager(dsn, min_size=1, max_size=2, name="orders")
        app = new_app()
        setup(app, db)

        @app.get("/")
        async def root(request: Request) -> Any:
            async def other() -> Any:
                async with connection_from(request) as conn:
                    return conn

            async with connection_from(request) as mine:
                return json(await asyncio.create_task(other()) is not mine)

        async with OnSanic().served(app) as http:
            assert (await http.get("/")).json() is True


def to_ws(http: httpx.AsyncClient) -> str:
    return str(http.base_url.copy_with(scheme="ws", path="/ws"))


class TestSanicServed(Served):
    example = "sanic"
    servers: ClassVar[dict[str, Command]] = {
        "sanic": lambda app, port: [
            "-m", "sanic", app, f"--port={port}", "--single-process", "--no-motd",
        ],
        "sanic-2-workers": lambda app, port: [
            "-m", "sanic", app, f"--port={port}", "--workers=2", "--no-motd",
        ],
        **SERVERS,
    }  # fmt: skip
