"""The adapter for BlackSheep."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest
from blacksheep import (
    Application,
    FromBytes,
    FromFiles,
    FromForm,
    FromJSON,
    FromQuery,
    Request,
    Response,
    Router,
    StreamedContent,
    WebSocket,
)
from blacksheep.exceptions import Conflict
from blacksheep.server.controllers import Controller, RoutesRegistry
from blacksheep.server.responses import text as answer
from blacksheep.testing import JSONContent, TestClient

from poolkeeper import NoConnectionError, PoolManager
from poolkeeper.adapters.blacksheep import (
    DepConnection,
    connection_from,
    exhausted,
    livez,
    pool_from,
    readyz,
    use_pool,
)
from tests.support.waiting import until

from .conformance import Conformance, Framework, Probe, client
from .servers import Served

HERE = "tests/adapters/test_blacksheep.py"


def application() -> Application:
    return Application(router=Router())  # the default one is shared by all applications


def streamed(lines: AsyncIterator[str]) -> Response:
    async def body() -> AsyncIterator[bytes]:
        async for line in lines:
            yield line.encode()

    return Response(200, content=StreamedContent(b"text/plain", body))


class OnBlackSheep(Framework):
    name = extra = package = "blacksheep"

    def build(self, probe: Probe) -> Any:
        app = application()
        app.on_start += probe.startup
        use_pool(app, probe.db)
        app.exceptions_handlers[NoConnectionError] = exhausted
        app.on_stop += probe.shutdown
        app.router.add_get("/livez", livez)
        app.router.add_get("/readyz", readyz)

        @app.router.get("/value")
        async def value(conn: DepConnection) -> str:
            return await probe.value(conn)

        @app.router.get("/orders/{number}")
        async def order(number: int, conn: DepConnection) -> str:
            return await probe.order(conn)

        @app.router.get("/helped/{number}")
        async def helped(number: int) -> str:
            return await probe.helped()

        @app.router.get("/unasked")
        async def unasked(db: PoolManager) -> str:
            return probe.unasked()

        @app.router.get("/same")
        async def same(first: DepConnection, second: DepConnection) -> str:
            return probe.same(first, second)

        @app.router.get("/stream")
        async def stream(db: PoolManager) -> Response:
            return streamed(probe.stream(db))

        @app.router.get("/kept")
        async def kept(conn: DepConnection) -> Response:
            return streamed(probe.kept(conn))

        @app.router.post("/items")
        async def items(text: str, conn: DepConnection) -> str:
            await probe.add(conn, text)
            return "ok"

        @app.router.post("/raise")
        async def fail(text: str, conn: DepConnection) -> str:
            await probe.add_and_raise(conn, text)
            return "ok"

        @app.router.post("/reject")
        async def reject(text: str, conn: DepConnection) -> str:
            await probe.add(conn, text)
            raise Conflict

        @app.router.post("/fail-at-commit")
        async def fail_at_commit(text: str, conn: DepConnection) -> str:
            await probe.add_twice(conn, text)
            return "ok"

        return app

    @asynccontextmanager
    async def served(self, app: Application) -> AsyncIterator[httpx.AsyncClient]:
        await app.start()
        try:
            async with client(app) as http:
                yield http
        finally:
            await app.stop()


class TestBlackSheep(Conformance):
    framework = OnBlackSheep()

    async def test_without_start_up_a_request_is_told_why_there_is_no_pool(
        self, probe: Probe, caplog: pytest.LogCaptureFixture
    ) -> None:
        """BlackSheep starts an application with its first request; so it was stopped here."""
        app = self.framework.build(probe)
        await app.start()
        http = TestClient(app)
        await app.stop()
        assert (await http.get("/value")).status == 500
        assert "its start-up has not run" in caplog.text
        assert "HINT:  Call use_pool(app, manager), and in tests await app.start()" in caplog.text
        assert (await http.get("/livez")).status == 200
        response = await http.get("/readyz")
        assert response.status == 503
        assert (await response.json())["reason"] == (
            "there is no pool in this application: its start-up has not run"
        )


class TestBlackSheepServed(Served):
    example = "blacksheep"


@pytest.fixture
def db(dsn: str) -> PoolManager[Any]:
    return PoolManager(dsn, min_size=1, max_size=1, name="orders", timeout=5)


def serving(app: Application) -> Any:
    return OnBlackSheep().served(app)


class TestHooks:
    """Whoever hangs on to start-up or shutdown has the pool, and none who fails keeps it open."""

    @pytest.fixture
    def said(self) -> list[str]:
        return []

    @pytest.fixture
    def build(self, db: PoolManager[Any], said: list[str]) -> Callable[..., Application]:
        """A function that builds an application with hooks before and after use_pool()."""

        def build(failing: str = "") -> Application:
            def hook(name: str) -> Callable[[], Any]:
                async def tell() -> None:
                    said.append(f"{name}: {await db.fetchval('select 1')}")
                    if name == failing:
                        raise RuntimeError(f"{name} failed")

                return tell

            def add(app: Application, when: str) -> None:
                app.on_start += hook(f"{when} start")
                app.after_start += hook(f"{when} after start")
                app.on_stop += hook(f"{when} stop")

                async def span() -> AsyncIterator[None]:
                    await hook(f"{when} enter")()
                    yield
                    await hook(f"{when} exit")()

                app.lifespan(span)

            app = application()
            add(app, "early")
            use_pool(app, db)
            add(app, "late")
            return app

        return build

    STARTING = ("start", "enter", "after start")
    STOPPING = ("stop", "exit")

    async def test_all_have_the_pool(
        self, build: Callable[..., Application], db: PoolManager[Any], said: list[str]
    ) -> None:
        app = build()
        for _ in range(2):  # an application can be started again
            async with serving(app):
                assert sorted(said) == sorted(
                    f"{when} {name}: 1" for when in ("early", "late") for name in self.STARTING
                )
                said.clear()
            assert sorted(said) == sorted(
                f"{when} {name}: 1" for when in ("early", "late") for name in self.STOPPING
            )
            said.clear()
            assert db.state == "closed"

    @pytest.mark.parametrize("when", ["early", "late"])
    @pytest.mark.parametrize("name", [*STARTING, *STOPPING])
    async def test_one_that_fails_does_not_leave_the_pool_open(
        self, build: Callable[..., Application], db: PoolManager[Any], when: str, name: str
    ) -> None:
        app = build(f"{when} {name}")
        if name in self.STARTING:
            with pytest.raises(RuntimeError, match=f"{when} {name} failed"):
                await app.start()
        else:
            await app.start()
            with pytest.raises(RuntimeError, match=f"{when} {name} failed"):
                await app.stop()
        assert db.state == "closed"

    async def test_a_server_without_lifespan_starts_it_with_the_first_requests(
        self, db: PoolManager[Any]
    ) -> None:
        """If BlackSheep does: 2.5 does not."""
        app, bare = application(), application()
        use_pool(app, db)

        @app.router.get("/")
        async def value(db: PoolManager) -> str:
            return str(await db.fetchval("select 1"))

        async with client(bare) as http:
            await http.get("/")
        async with client(app) as http:
            answers = await asyncio.gather(*(http.get("/") for _ in range(5)))
        assert app.started == bare.started
        assert ({answer.text for answer in answers} == {"1"}) == bare.started
        assert db.state == ("open" if bare.started else "new")
        await app.stop()
        assert db.state == ("closed" if bare.started else "new")

    async def test_a_mounted_application_shares_the_pool(self, db: PoolManager[Any]) -> None:
        parent, child = application(), application()
        use_pool(parent, db)
        use_pool(child, db)
        parent.mount("/child", child)

        @child.router.get("/")
        async def value(conn: DepConnection) -> str:
            return str(await (await conn.execute("select 1")).fetchone())

        async with serving(parent) as http:
            assert (await http.get("/child/")).text == "(1,)"
        assert db.state == "closed"

    async def test_two_managers_have_names_of_their_own(
        self, db: PoolManager[Any], database: str
    ) -> None:
        reports = PoolManager(database, min_size=1, name="reports")
        app = application()
        use_pool(app, db)
        use_pool(app, reports, key="reports")

        @app.router.get("/")
        async def names(request: Request, db: PoolManager, conn: DepConnection) -> str:
            async with connection_from(request, "reports") as other:
                return f"{db.name} {pool_from(request, 'reports').name} {other is conn}"

        async with serving(app) as http:
            assert (await http.get("/")).text == "orders reports False"
        assert (db.state, reports.state) == ("closed", "closed")


class TestInjection:
    @pytest.fixture
    def app(self, db: PoolManager[Any]) -> Application:
        app = application()
        use_pool(app, db)
        return app

    async def test_the_connection_is_the_same_for_code_that_has_the_request(
        self, app: Application
    ) -> None:
        @app.router.get("/")
        async def same(request: Request, conn: DepConnection) -> str:
            async with connection_from(request) as other:
                return str(other is conn)

        async with serving(app) as http:
            assert (await http.get("/")).text == "True"

    async def test_what_is_wrong_with_another_parameter_rolls_back(
        self, app: Application, db: PoolManager[Any]
    ) -> None:
        @app.router.get("/")
        async def number(conn: DepConnection, n: FromQuery[int]) -> str:
            return ""

        async with serving(app) as http:
            assert (await http.get("/?n=x")).status_code == 400
            assert db.snapshot().in_use == 0

    @pytest.mark.parametrize("kind", ["json", "form", "bytes", "files", "after"])
    async def test_the_body_is_read_before_a_connection_is_taken(
        self, app: Application, db: PoolManager[Any], kind: str
    ) -> None:
        @app.router.post("/json")
        async def from_json(conn: DepConnection, data: FromJSON[list[int]]) -> str:
            return f"{data.value}"

        @app.router.post("/form")
        async def from_form(conn: DepConnection, data: FromForm[dict[str, Any]]) -> str:
            return f"{data.value}"

        @app.router.post("/bytes")
        async def from_bytes(conn: DepConnection, data: FromBytes) -> str:
            return f"{data.value!r}"

        @app.router.post("/files")
        async def from_files(conn: DepConnection, files: FromFiles) -> str:
            return f"{[file.file_name for file in files.value]}"

        @app.router.post("/after")
        async def after(data: FromJSON[list[int]], conn: DepConnection) -> str:
            return f"{data.value}"

        json, form = "application/json", "application/x-www-form-urlencoded"
        multipart = "multipart/form-data; boundary=x"
        part = b'--x\r\nContent-Disposition: form-data; name="f"; filename="a.txt"\r\n\r\nhello\r\n'
        content, first, last, expected = {
            "json": (json, b"[1, ", b"2]", "[1, 2]"),
            "form": (form, b"a=", b"b", "{'a': 'b'}"),
            "bytes": ("application/octet-stream", b"1", b"2", "b'12'"),
            "files": (multipart, part, b"--x--\r\n", "[b'a.txt']"),
            "after": (json, b"[1, ", b"2]", "[1, 2]"),
        }[kind]
        asked, sent = asyncio.Event(), asyncio.Event()

        async def slowly() -> AsyncIterator[bytes]:
            yield first
            asked.set()
            await sent.wait()
            yield last

        async with serving(app) as http:
            request = asyncio.create_task(
                http.post(f"/{kind}", content=slowly(), headers={"content-type": content})
            )
            await asked.wait()
            await asyncio.sleep(0.05)
            assert db.snapshot().in_use == 0
            sent.set()
            response = await request
            assert (response.status_code, response.text) == (200, expected)

    async def test_a_handler_without_body_parameters_gets_the_connection_at_once(
        self, app: Application, db: PoolManager[Any]
    ) -> None:
        """It may want to write the body to the server as it comes."""

        @app.router.post("/")
        async def pieces(request: Request, conn: DepConnection) -> str:
            return str(b"".join([piece async for piece in request.stream()]))

        async with serving(app) as http:
            response = await http.post("/", content=b"abc")
            assert response.text == "b'abc'"

    async def test_controllers_ask_for_it_as_well(self, app: Application) -> None:
        routes = RoutesRegistry()
        app.controllers_router = routes

        class Values(Controller):
            @routes.get("/controlled")
            async def value(self, conn: DepConnection) -> str:
                return str(await (await conn.execute("select 1")).fetchone())

        async with serving(app) as http:
            assert (await http.get("/controlled")).text == "(1,)"

    async def test_the_handler_commits_inside_of_middlewares(
        self, app: Application, db: PoolManager[Any], database: str
    ) -> None:
        """One that turns an error into an answer does not turn a rollback into a commit."""
        seen: list[int] = []

        async def mend(request: Request, handler: Callable[[Request], Any]) -> Response:
            try:
                return await handler(request)  # type: ignore[no-any-return]
            except RuntimeError:
                seen.append(db.snapshot().in_use)
                return answer("mended")

        app.middlewares.append(mend)

        @app.router.get("/")
        async def fail(conn: DepConnection) -> str:
            await conn.execute("create table never (id int)")
            raise RuntimeError("the handler failed")

        async with serving(app) as http:
            assert (await http.get("/")).text == "mended"
            assert seen == [0]
            assert await db.fetchval("select to_regclass('never')") is None

    async def test_a_middleware_that_asks_for_it_is_told_what_to_do(
        self, app: Application, caplog: pytest.LogCaptureFixture
    ) -> None:
        async def wrong(request: Request, conn: DepConnection) -> None:
            pass

        async def right(request: Request, handler: Callable[[Request], Any]) -> Response:
            async with connection_from(request) as conn:
                await conn.execute("select 1")
            return await handler(request)  # type: ignore[no-any-return]

        app.middlewares.append(right)
        app.middlewares.append(wrong)

        @app.router.get("/")
        async def home() -> str:
            return ""

        async with serving(app) as http:
            assert (await http.get("/")).status_code == 500
        assert "cannot inject a connection here" in caplog.text
        assert "async with connection_from(request) as conn" in caplog.text

    async def test_a_connection_held_across_a_call_is_named_by_the_handlers_line(
        self, app: Application, db: PoolManager[Any]
    ) -> None:
        called = asyncio.Event()

        async def hold(n: int, conn: DepConnection) -> str:
            await called.wait()  # say an HTTP call
            return "ok"

        app.router.add_get("/{n}", hold)
        async with serving(app) as http:
            request = asyncio.create_task(http.get("/1"))
            await until(lambda: db.snapshot().in_use == 1)
            await asyncio.sleep(1.1)
            diagnosis = db.diagnose()
            called.set()
            assert (await request).text == "ok"
        assert diagnosis.cause == "held-but-hardly-used"
        assert f"{HERE}:{hold.__code__.co_firstlineno}" in str(diagnosis)


def said(text: str) -> dict[str, Any]:
    """What a client said; send_text() of the test client sends what a server would."""
    return {"type": "websocket.receive", "text": text}


class TestWebSockets:
    async def test_a_socket_takes_connections_from_the_pool_and_holds_none_while_idle(
        self, db: PoolManager[Any]
    ) -> None:
        seen: list[int] = []
        app = application()
        use_pool(app, db)

        @app.router.ws("/")
        async def chat(websocket: WebSocket, db: PoolManager) -> None:
            await websocket.accept()
            for _ in range(2):
                text = await websocket.receive_text()
                seen.append(db.snapshot().in_use)
                async with connection_from(websocket) as conn:
                    row = await (await conn.execute("select 1")).fetchone()
                await websocket.send_text(f"{text} {row} {db.snapshot().in_use}")

        async with serving(app):
            http = TestClient(app)
            async with http.websocket_connect("/") as socket:
                for text in ("a", "b"):
                    await socket.send(said(text))
                    assert await socket.receive_text() == f"{text} (1,) 0"
            await http.websocket_all_closed()
        assert seen == [0, 0]

    async def test_a_connection_that_a_socket_holds_is_named_by_its_line(
        self, db: PoolManager[Any]
    ) -> None:
        app = application()
        use_pool(app, db)

        async def chat(websocket: WebSocket, conn: DepConnection) -> None:
            await websocket.accept()
            await websocket.receive_text()

        app.router.add_ws("/", chat)
        async with serving(app):
            http = TestClient(app)
            async with http.websocket_connect("/") as socket:
                await asyncio.sleep(1.1)
                diagnosis = db.diagnose()
                await socket.send(said("bye"))
            await http.websocket_all_closed()
        assert diagnosis.cause == "held-but-hardly-used"
        assert f"{HERE}:{chat.__code__.co_firstlineno}" in str(diagnosis)
        assert db.state == "closed"


class TestTestClient:
    """The client of blacksheep.testing; it runs on the loop of the test."""

    @pytest.fixture
    def app(self, db: PoolManager[Any]) -> Application:
        app = application()
        use_pool(app, db)

        @app.router.post("/")
        async def number(data: FromJSON[list[int]], conn: DepConnection) -> str:
            row = await (await conn.execute("select %s::int", data.value)).fetchone()
            return str(row)

        return app

    async def test_several_times_in_a_row(self, app: Application, db: PoolManager[Any]) -> None:
        for n in range(3):
            await app.start()
            response = await TestClient(app).post("/", content=JSONContent([n]))
            assert await response.text() == f"({n},)"
            await app.stop()
            assert db.state == "closed"

    def test_on_a_loop_of_its_own_each_time(self, app: Application, db: PoolManager[Any]) -> None:
        async def once(n: int) -> str | None:
            async with serving(app):
                return await (await TestClient(app).post("/", content=JSONContent([n]))).text()

        for n in range(2):
            assert asyncio.run(once(n)) == f"({n},)"
            assert db.state == "closed"

    async def test_with_a_manager_that_the_test_has_opened(
        self, app: Application, db: PoolManager[Any]
    ) -> None:
        async with db, serving(app):
            response = await TestClient(app).post("/", content=JSONContent([1]))
            assert await response.text() == "(1,)"
