"""The adapter for Litestar."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import httpx
import psycopg
import pytest
from asgi_lifespan import LifespanManager
from litestar import (
    Litestar,
    MediaType,
    Request,
    Router,
    WebSocket,
    get,
    post,
    websocket,
    websocket_listener,
    websocket_stream,
)
from litestar.config.app import AppConfig
from litestar.di import NamedDependency, Provide
from litestar.events import listener
from litestar.exceptions import HTTPException, NotAuthorizedException
from litestar.params import FromPath, FromQuery, JSONBody
from litestar.plugins import InitPlugin
from litestar.response import Stream
from litestar.testing import AsyncTestClient, TestClient
from psycopg import AsyncConnection

from poolkeeper import NoConnectionError, PoolManager
from poolkeeper.adapters.litestar import (
    DepConnection,
    DepPool,
    PoolPlugin,
    connection_from,
    exhausted,
    livez,
    pool_from,
    readyz,
)
from tests.support.waiting import until

from .conformance import Conformance, Framework, Probe, all_text, client
from .servers import SERVERS, Served

HERE = "tests/adapters/test_litestar.py"
AnyRequest = Request[Any, Any, Any]
AnySocket = WebSocket[Any, Any, Any]


async def helper(db_connection: DepConnection) -> AsyncConnection[Any]:
    """A dependency of the handler's that asks for the connection as well."""
    return db_connection


class OnLitestar(Framework):
    name = extra = package = "litestar"

    def build(self, probe: Probe) -> Any:
        @asynccontextmanager
        async def own(app: Litestar) -> AsyncIterator[None]:
            await probe.startup()
            yield
            await probe.shutdown()

        @get("/value", media_type=MediaType.TEXT)
        async def value(db_connection: DepConnection) -> str:
            return await probe.value(db_connection)

        @get("/orders/{number:int}", media_type=MediaType.TEXT)
        async def order(number: FromPath[int], db_connection: DepConnection) -> str:
            return await probe.order(db_connection)

        @get("/helped/{number:int}", media_type=MediaType.TEXT)
        async def helped(number: FromPath[int]) -> str:
            return await probe.helped()

        @get("/unasked")
        async def unasked(db_pool: DepPool) -> str:
            return probe.unasked()

        @get("/same", dependencies={"second": Provide(helper)})
        async def same(
            db_connection: DepConnection, second: NamedDependency[AsyncConnection[Any]]
        ) -> str:
            return probe.same(db_connection, second)

        @get("/stream")
        async def stream(db_pool: DepPool) -> Stream:
            return Stream(probe.stream(db_pool))

        @get("/kept")
        async def kept(db_connection: DepConnection) -> Stream:
            return Stream(probe.kept(db_connection))

        @post("/items", status_code=200)
        async def items(text: FromQuery[str], db_connection: DepConnection) -> str:
            await probe.add(db_connection, text)
            return "ok"

        @post("/raise")
        async def fail(text: FromQuery[str], db_connection: DepConnection) -> str:
            await probe.add_and_raise(db_connection, text)
            return "ok"

        @post("/reject")
        async def reject(text: FromQuery[str], db_connection: DepConnection) -> str:
            await probe.add(db_connection, text)
            raise HTTPException(status_code=409)

        @post("/fail-at-commit")
        async def fail_at_commit(text: FromQuery[str], db_connection: DepConnection) -> str:
            await probe.add_twice(db_connection, text)
            return "ok"

        return Litestar(
            [
                value, order, helped, unasked, same, stream, kept, items, fail, reject,
                fail_at_commit, livez, readyz,
            ],
            plugins=[PoolPlugin(probe.db)],
            lifespan=[own],
            exception_handlers={NoConnectionError: exhausted},
        )  # fmt: skip

    @asynccontextmanager
    async def served(self, app: Litestar) -> AsyncIterator[httpx.AsyncClient]:
        # Not manager.app: it gives all requests one state, where Litestar keeps their bodies.
        async with LifespanManager(app, 20, 20), client(app) as http:
            yield http


class TestLitestar(Conformance):
    framework = OnLitestar()
    wraps_start_up_errors = True  # an ExceptionGroup, of the task group of its event emitter


class TestLitestarServed(Served):
    example = "litestar"
    servers = SERVERS | {
        "litestar-run": lambda app, port: [
            "-m", "litestar", f"--app={app}", "run", f"--port={port}",
        ],
    }  # fmt: skip


@pytest.fixture
def db(dsn: str) -> PoolManager[Any]:
    return PoolManager(dsn, min_size=1, max_size=1, name="orders", timeout=5)


def serving(app: Litestar) -> Any:
    return OnLitestar().served(app)


class TestHooks:
    """Whoever hangs on to start-up or shutdown has the pool, and none who fails keeps it open."""

    @pytest.fixture
    def said(self) -> list[str]:
        return []

    @pytest.fixture
    def build(self, db: PoolManager[Any], said: list[str]) -> Callable[..., Litestar]:
        """A function that builds an application with all the hooks there are; one fails."""

        def build(failing: str = "") -> Litestar:
            def hook(name: str) -> Callable[[], Any]:
                async def tell() -> None:
                    said.append(f"{name}: {await db.fetchval('select 1')}")
                    if name == failing:
                        raise RuntimeError(f"{name} failed")

                return tell

            def span(name: str) -> Callable[[Litestar], Any]:
                @asynccontextmanager
                async def lifespan(app: Litestar) -> AsyncIterator[None]:
                    await hook(f"enter {name}")()
                    yield
                    await hook(f"exit {name}")()

                return lifespan

            class Other(InitPlugin):
                def on_app_init(self, app_config: AppConfig) -> AppConfig:
                    app_config.lifespan.insert(0, span("plugin"))
                    app_config.on_shutdown.append(hook("stop plugin"))
                    return app_config

            @listener("said")
            async def heard() -> None:
                await asyncio.sleep(0)
                await hook("event")()

            @asynccontextmanager
            async def emitting(app: Litestar) -> AsyncIterator[None]:
                yield
                app.emit("said")

            return Litestar(
                plugins=[Other(), PoolPlugin(db), Other()],
                lifespan=[span("own"), emitting],
                on_startup=[hook("start")],
                on_shutdown=[hook("stop")],
                listeners=[heard],
            )

        return build

    async def test_all_have_the_pool(
        self, build: Callable[..., Litestar], db: PoolManager[Any], said: list[str]
    ) -> None:
        async with serving(build()):
            assert said == ["enter plugin: 1"] * 2 + ["enter own: 1", "start: 1"]
            said.clear()
        assert sorted(said) == [
            "event: 1", "exit own: 1", "exit plugin: 1", "exit plugin: 1", "stop plugin: 1",
            "stop plugin: 1", "stop: 1",
        ]  # fmt: skip
        assert db.state == "closed"

    @pytest.mark.parametrize(
        "failing",
        ["enter plugin", "enter own", "start", "exit plugin", "exit own", "stop", "stop plugin"],
    )
    async def test_one_that_fails_does_not_leave_the_pool_open(
        self, build: Callable[..., Litestar], db: PoolManager[Any], failing: str
    ) -> None:
        app = build(failing)
        with pytest.raises(BaseException) as failed:
            async with serving(app):
                assert failing.startswith(("exit", "stop"))
        assert f"{failing} failed" in all_text(failed.value)
        assert db.state == "closed"

    async def test_two_managers_have_names_of_their_own(
        self, db: PoolManager[Any], database: str
    ) -> None:
        reports = PoolManager(database, min_size=1, name="reports")

        @get("/")
        async def names(db_pool: DepPool, reports_pool: DepPool, request: AnyRequest) -> str:
            return f"{db_pool.name} {reports_pool.name} {pool_from(request, 'reports').name}"

        second = PoolPlugin(
            reports,
            key="reports",
            pool_dependency_key="reports_pool",
            connection_dependency_key="reports_connection",
        )
        app = Litestar([names], plugins=[PoolPlugin(db), second])
        async with serving(app) as http:
            assert (await http.get("/")).text == "orders reports reports"
        assert (db.state, reports.state) == ("closed", "closed")

    async def test_one_plugin_serves_several_applications(self, db: PoolManager[Any]) -> None:
        plugin = PoolPlugin(db)
        first, second = Litestar([readyz], plugins=[plugin]), Litestar([readyz], plugins=[plugin])
        async with serving(first) as http:
            async with serving(second):
                pass
            assert (await http.get("/readyz")).status_code == 200
        assert db.state == "closed"

    async def test_a_dependency_of_the_users_own_keeps_its_name(self, db: PoolManager[Any]) -> None:
        async def fake() -> str:
            return "theirs"

        @get("/")
        async def theirs(db_connection: NamedDependency[str]) -> str:
            return db_connection

        app = Litestar(
            [theirs], plugins=[PoolPlugin(db)], dependencies={"db_connection": Provide(fake)}
        )
        async with serving(app) as http:
            assert (await http.get("/")).text == "theirs"


class TestDependencies:
    @pytest.fixture
    def db(self, database: str) -> PoolManager[Any]:
        with psycopg.connect(database) as conn:
            conn.execute("create table items (text text)")
        return PoolManager(database, min_size=1, max_size=1, name="orders", timeout=5)

    @pytest.fixture
    def app(self, db: PoolManager[Any]) -> Litestar:
        async def number() -> int:
            return 7

        async def user(db_connection: DepConnection) -> str:
            await db_connection.execute("insert into items values ('a')")
            raise NotAuthorizedException

        @get("/alone")
        async def alone(db_connection: DepConnection, request: AnyRequest) -> str:
            async with connection_from(request) as conn:
                return str(conn is db_connection)

        @get("/several")
        async def several(
            db_connection: DepConnection,
            db_pool: DepPool,
            number: NamedDependency[int],
            request: AnyRequest,
        ) -> str:
            async with connection_from(request) as conn:
                return str(conn is db_connection)

        @get("/refused")
        async def refused(user: NamedDependency[str]) -> str:
            return user

        @get("/hold")
        async def hold(
            db_connection: DepConnection, number: NamedDependency[int], request: AnyRequest
        ) -> str:
            await request.app.state["answer"]  # say an HTTP call
            return "ok"

        @post("/body", status_code=200)
        async def body(data: JSONBody[list[int]], db_connection: DepConnection) -> str:
            return f"{data}, {db.snapshot().in_use} in use"

        @websocket("/refused-socket")
        async def refused_socket(socket: AnySocket, user: NamedDependency[str]) -> None:
            await socket.accept()

        return Litestar(
            [alone, several, refused, hold, body, refused_socket],
            plugins=[PoolPlugin(db)],
            dependencies={"number": Provide(number), "user": Provide(user)},
        )

    @pytest.mark.parametrize("path", ["/alone", "/several"])
    async def test_the_connection_is_the_same_for_code_that_has_the_request(
        self, app: Litestar, path: str
    ) -> None:
        """Where there are several dependencies, Litestar resolves each in a task of its own."""
        async with serving(app) as http:
            assert (await http.get(path)).text == "True"

    async def test_a_dependency_that_raises_rolls_back_before_the_answer(
        self, app: Litestar, db: PoolManager[Any]
    ) -> None:
        """Litestar leaves what was injected by then to the garbage collector."""
        in_use: list[int] = []

        async def look(message: Any, scope: Any) -> None:
            in_use.append(db.snapshot().in_use)

        app.before_send.append(look)
        async with serving(app) as http:
            kept = []  # whoever keeps the exception keeps the generator
            app.after_exception.append(_keep(kept))
            assert (await http.get("/refused")).status_code == 401
            assert in_use[0] == 0
            assert await db.fetchval("select count(*) from items") == 0
            kept.clear()
        assert db.state == "closed"

    def test_a_socket_whose_dependency_raises_holds_nothing(
        self, app: Litestar, db: PoolManager[Any]
    ) -> None:
        kept: list[Any] = []
        app.after_exception.append(_keep(kept))
        with TestClient(app) as http:
            with (
                pytest.raises(Exception, match="Unauthorized"),
                http.websocket_connect("/refused-socket"),
            ):
                pass
            assert db.snapshot().in_use == 0
            kept.clear()

    async def test_the_body_is_read_before_a_connection_is_taken(
        self, app: Litestar, db: PoolManager[Any]
    ) -> None:
        sent = asyncio.Event()
        asked = asyncio.Event()

        async def slowly() -> AsyncIterator[bytes]:
            yield b"[1, "
            asked.set()
            await sent.wait()
            yield b"2]"

        async with serving(app) as http:
            answer = asyncio.create_task(http.post("/body", content=slowly()))
            await asked.wait()
            await asyncio.sleep(0.05)
            assert db.snapshot().in_use == 0
            sent.set()
            assert (await answer).text == "[1, 2], 1 in use"
            assert (await http.post("/body", json=["x"])).status_code == 400
            assert db.snapshot().in_use == 0

    async def test_a_connection_held_across_a_call_is_named_by_the_handlers_line(
        self, app: Litestar, db: PoolManager[Any]
    ) -> None:
        """Also if Litestar acquired it in a task that has ended since."""
        handler = next(route for route in app.routes if route.path == "/hold")
        fn: Any = handler.route_handlers[0].fn  # type: ignore[union-attr]
        async with serving(app) as http:
            app.state["answer"] = asyncio.get_running_loop().create_future()
            request = asyncio.create_task(http.get("/hold"))
            await until(lambda: db.snapshot().in_use == 1)
            await asyncio.sleep(1.1)
            diagnosis = db.diagnose()
            assert diagnosis.cause == "held-but-hardly-used"
            assert f"GET /hold, {HERE}:{fn.__code__.co_firstlineno + 1} in hold" in str(diagnosis)
            app.state["answer"].set_result(None)
            assert (await request).status_code == 200


def _keep(kept: list[Any]) -> Callable[[Exception, Any], Any]:
    async def keep(exc: Exception, scope: Any) -> None:
        kept.append(exc)

    return keep


class TestWebSockets:
    async def test_a_socket_takes_connections_from_the_pool_and_holds_none_while_idle(
        self, db: PoolManager[Any]
    ) -> None:
        seen: list[int] = []

        @websocket("/")
        async def chat(socket: AnySocket, db_pool: DepPool) -> None:
            await socket.accept()
            async for text in socket.iter_data():
                seen.append(db.snapshot().in_use)
                await socket.send_text(f"{text} {await db_pool.fetchval('select 1')}")

        with TestClient(Litestar([chat], plugins=[PoolPlugin(db)])) as http:
            with http.websocket_connect("/") as socket:
                for text in ("a", "b"):
                    socket.send_text(text)
                    assert socket.receive_text() == f"{text} 1"
            assert seen == [0, 0]

    @pytest.mark.parametrize("kind", ["handler", "listener", "stream"])
    def test_a_connection_that_a_socket_holds_is_named_by_its_line(
        self, db: PoolManager[Any], kind: str
    ) -> None:
        async def chat(socket: AnySocket, db_connection: DepConnection) -> None:
            await socket.accept()
            await socket.receive_text()

        async def listen(data: str, db_connection: DepConnection) -> None:
            pass

        async def stream(db_connection: DepConnection) -> AsyncGenerator[str]:
            yield "a"
            await asyncio.sleep(5)

        wrong, route = {
            "handler": (chat, websocket),
            "listener": (listen, websocket_listener),
            "stream": (stream, websocket_stream),
        }[kind]
        app = Litestar([route("/")(wrong)], plugins=[PoolPlugin(db)])
        with TestClient(app) as http, http.websocket_connect("/") as socket:
            time.sleep(1.1)
            diagnosis = db.diagnose()
            socket.send_text("bye")
        assert diagnosis.cause == "held-but-hardly-used"
        assert f"{HERE}:{wrong.__code__.co_firstlineno}" in str(diagnosis)

    async def test_one_transaction_of_a_socket(self, db: PoolManager[Any]) -> None:
        @websocket("/")
        async def chat(socket: AnySocket) -> None:
            await socket.accept()
            async with connection_from(socket) as conn:
                row = await (await conn.execute("select 1")).fetchone()
            await socket.send_text(f"{row} {db.snapshot().in_use}")

        app = Litestar([chat], plugins=[PoolPlugin(db)])
        with TestClient(app) as http, http.websocket_connect("/") as socket:
            assert socket.receive_text() == "(1,) 0"


class TestTestClients:
    """The clients of litestar.testing."""

    @pytest.fixture
    def app(self, db: PoolManager[Any]) -> Litestar:
        @get("/")
        async def value(db_connection: DepConnection) -> str:
            return str(await (await db_connection.execute("select 1")).fetchone())

        health = Router("/health", route_handlers=[livez, readyz])
        return Litestar([value, health], plugins=[PoolPlugin(db)])

    def test_entered_several_times_in_a_row(self, app: Litestar, db: PoolManager[Any]) -> None:
        for _ in range(3):
            with TestClient(app) as http:
                assert http.get("/").text == "(1,)"
                assert http.get("/health/readyz").json()["status"] == "ready"
            assert db.state == "closed"

    async def test_entered_in_an_async_test(self, app: Litestar, db: PoolManager[Any]) -> None:
        for _ in range(3):
            async with AsyncTestClient(app) as http:
                assert (await http.get("/")).text == "(1,)"
            assert db.state == "closed"

    def test_not_entered(self, app: Litestar) -> None:
        app.debug = True  # Litestar shows and logs errors of the application only then
        answer = TestClient(app).get("/", headers={"accept": "text/plain"})
        assert answer.status_code == 500
        assert "NotOpenError: there is no pool in this application" in answer.text
        assert "HINT:  Give the application plugins=[PoolPlugin(manager)]" in answer.text
        assert '"with TestClient(app) as client"' in answer.text

    async def test_not_entered_in_an_async_test(self, app: Litestar) -> None:
        answer = await AsyncTestClient(app).get("/health/readyz")
        assert answer.status_code == 503
        assert answer.json()["reason"].startswith("there is no pool in this application")

    async def test_a_manager_that_the_test_has_opened_is_on_another_loop(
        self, app: Litestar, db: PoolManager[Any]
    ) -> None:
        """Both clients run the application on a loop of their own."""
        async with db:
            with pytest.raises(BaseException) as failed:
                async with AsyncTestClient(app):
                    pass
            assert db.state == "open"
        assert 'pool "orders" is bound to a different event loop' in all_text(failed.value)
