"""The adapter for aiohttp."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from typing import Any, ClassVar

import httpx
import pytest
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer, make_mocked_request

from poolkeeper import NotOpenError, PoolManager
from poolkeeper.adapters.aiohttp import (
    KEY,
    connection_from,
    exhausted,
    livez,
    pool_from,
    readyz,
    setup,
)
from tests.support.waiting import until

from .conformance import Conformance, Framework, Probe
from .servers import Command, Served

HERE = "tests/adapters/test_aiohttp.py"
MAKE_APP = "examples.aiohttp.app:make_app"


async def encoded(body: AsyncIterator[str]) -> AsyncIterator[bytes]:
    async for piece in body:
        yield piece.encode()


def routes(probe: Probe) -> list[web.RouteDef]:
    async def value(request: web.Request) -> web.Response:
        async with connection_from(request) as conn:
            return web.Response(text=await probe.value(conn))

    async def order(request: web.Request) -> web.Response:
        async with connection_from(request) as conn:
            return web.Response(text=await probe.order(conn))

    async def helped(request: web.Request) -> web.Response:
        return web.Response(text=await probe.helped())

    async def unasked(request: web.Request) -> web.Response:
        return web.Response(text=probe.unasked())

    async def same(request: web.Request) -> web.Response:
        async with connection_from(request) as first, connection_from(request) as second:
            return web.Response(text=probe.same(first, second))

    async def stream(request: web.Request) -> web.Response:
        return web.Response(body=encoded(probe.stream(pool_from(request))))

    async def kept(request: web.Request) -> web.Response:
        async with connection_from(request) as conn:
            return web.Response(body=encoded(probe.kept(conn)))

    async def items(request: web.Request) -> web.Response:
        async with connection_from(request) as conn:
            await probe.add(conn, request.query["text"])
        return web.Response(text="ok")

    async def fail(request: web.Request) -> web.Response:
        async with connection_from(request) as conn:
            await probe.add_and_raise(conn, request.query["text"])
        return web.Response(text="ok")

    async def reject(request: web.Request) -> web.Response:
        async with connection_from(request) as conn:
            await probe.add(conn, request.query["text"])
            raise web.HTTPConflict

    async def fail_at_commit(request: web.Request) -> web.Response:
        async with connection_from(request) as conn:
            await probe.add_twice(conn, request.query["text"])
        return web.Response(text="ok")

    return [
        web.get("/value", value),
        web.get("/orders/{number}", order),
        web.get("/helped/{number}", helped),
        web.get("/unasked", unasked),
        web.get("/same", same),
        web.get("/stream", stream),
        web.get("/kept", kept),
        web.post("/items", items),
        web.post("/raise", fail),
        web.post("/reject", reject),
        web.post("/fail-at-commit", fail_at_commit),
        web.get("/livez", livez),
        web.get("/readyz", readyz),
    ]


class OnAiohttp(Framework):
    name = extra = package = "aiohttp"

    def build(self, probe: Probe) -> Any:
        async def own(app: web.Application) -> AsyncIterator[None]:
            await probe.startup()
            yield
            await probe.shutdown()

        app = web.Application(middlewares=[exhausted])
        app.add_routes(routes(probe))
        setup(app, probe.db)
        app.cleanup_ctx.append(own)
        return app

    @asynccontextmanager
    async def served(self, app: web.Application) -> AsyncIterator[httpx.AsyncClient]:
        async with (
            TestServer(app) as server,
            httpx.AsyncClient(base_url=str(server.make_url("/")), timeout=20) as http,
        ):
            yield http

    @asynccontextmanager
    async def served_without_startup(
        self, app: web.Application
    ) -> AsyncIterator[httpx.AsyncClient]:
        """Aiohttp serves none without start-up; the same routes where nobody called `setup()`."""
        bare = web.Application()
        for route in app.router.routes():
            assert route.resource is not None
            bare.router.add_route(route.method, route.resource.canonical, route.handler)
        async with self.served(bare) as http:
            yield http


class TestAiohttp(Conformance):
    framework = OnAiohttp()


class TestAiohttpServed(Served):
    example = "aiohttp"
    servers: ClassVar[dict[str, Command]] = {
        # web.run_app(), as in a script.
        "aiohttp": lambda _, port: ["-m", "aiohttp.web", f"--port={port}", MAKE_APP],
        "gunicorn-preload": lambda _, port: [
            "-m", "gunicorn", f"{MAKE_APP}()", "--preload", "--workers=2", "--graceful-timeout=10",
            "--worker-class=aiohttp.GunicornWebWorker", f"--bind=127.0.0.1:{port}",
        ],
    }  # fmt: skip


class TestHooks:
    """Whoever hangs on to start-up or cleanup has the pool, and none who fails keeps it open."""

    @pytest.fixture
    def db(self, dsn: str) -> PoolManager[Any]:
        return PoolManager(dsn, min_size=1, max_size=2, name="orders", timeout=5)

    @pytest.fixture
    def said(self) -> list[str]:
        return []

    @pytest.fixture
    def hooks(self, db: PoolManager[Any], said: list[str]) -> Callable[..., None]:
        """A function that registers all the hooks there are, some of which fail."""

        def add(app: web.Application, failing: Iterable[str] = (), where: str = "") -> None:
            async def tell(name: str) -> None:
                said.append(f"{where}{name}: {await db.fetchval('select 1')}")
                if name in failing:
                    raise RuntimeError(f"{name} failed")

            async def context(app: web.Application) -> AsyncIterator[None]:
                await tell("enter")
                yield
                await tell("exit")

            async def startup(app: web.Application) -> None:
                await tell("startup")

            async def shutdown(app: web.Application) -> None:
                await tell("shutdown")

            async def cleanup(app: web.Application) -> None:
                await tell("cleanup")

            app.cleanup_ctx.append(context)
            app.on_startup.append(startup)
            app.on_shutdown.append(shutdown)
            app.on_cleanup.append(cleanup)

        return add

    ALL = ("enter: 1", "startup: 1", "shutdown: 1", "exit: 1", "cleanup: 1")

    @pytest.mark.parametrize("first", [True, False])
    async def test_every_hook_has_the_pool_wherever_setup_is_called(
        self, db: PoolManager[Any], said: list[str], hooks: Any, first: bool
    ) -> None:
        app = web.Application()
        if first:
            setup(app, db)
        hooks(app)
        if not first:
            setup(app, db)
        async with TestServer(app):
            pass
        assert said == [*self.ALL]
        assert db.state == "closed"

    async def test_the_hooks_of_a_sub_application_have_the_pool_of_the_outermost(
        self, db: PoolManager[Any], said: list[str], hooks: Any
    ) -> None:
        app, sub = web.Application(), web.Application()
        hooks(sub)
        app.add_subapp("/sub", sub)
        setup(app, db)
        async with TestServer(app):
            pass
        assert said == [*self.ALL]
        assert db.state == "closed"

    async def test_a_sub_application_may_have_a_pool_of_its_own(
        self, db: PoolManager[Any], said: list[str], hooks: Any
    ) -> None:
        async def name(request: web.Request) -> web.Response:
            return web.Response(text=pool_from(request).name)

        app, sub = web.Application(), web.Application()
        hooks(sub)
        setup(sub, db)
        sub.add_routes([web.get("/name", name)])
        app.add_routes([web.get("/readyz", readyz)])
        app.add_subapp("/sub", sub)
        async with TestClient(TestServer(app)) as client:
            assert await (await client.get("/sub/name")).text() == "orders"
            assert (await client.get("/readyz")).status == 503  # it is not the parent's
        assert said == [*self.ALL]
        assert db.state == "closed"

    async def test_a_sub_application_finds_the_nearest_pool(
        self, db: PoolManager[Any], database: str
    ) -> None:
        async def name(request: web.Request) -> web.Response:
            return web.Response(text=pool_from(request).name)

        near = PoolManager(database, min_size=1, name="near")
        app, with_pool, without = web.Application(), web.Application(), web.Application()
        setup(app, db)
        setup(with_pool, near)
        for sub, prefix in ((with_pool, "/with"), (without, "/without")):
            sub.add_routes([web.get("/name", name)])
            app.add_subapp(prefix, sub)
        async with TestClient(TestServer(app)) as client:
            assert await (await client.get("/with/name")).text() == "near"
            assert await (await client.get("/without/name")).text() == "orders"
        assert (near.state, db.state) == ("closed", "closed")

    @pytest.mark.parametrize("failing", ["enter", "startup"])
    @pytest.mark.parametrize("deep", [False, True])
    async def test_a_start_that_fails_closes_the_pool(
        self, db: PoolManager[Any], hooks: Any, failing: str, deep: bool
    ) -> None:
        app, sub = web.Application(), web.Application()
        setup(app, db)
        hooks(sub if deep else app, [failing])
        app.add_subapp("/sub", sub)
        with pytest.raises(RuntimeError, match=f"{failing} failed"):
            await TestServer(app).start_server()
        assert db.state == "closed"

    async def test_a_start_that_is_cancelled_closes_the_pool(self, db: PoolManager[Any]) -> None:
        async def never(app: web.Application) -> None:
            await asyncio.sleep(3600)

        app = web.Application()
        setup(app, db)
        app.on_startup.append(never)
        starting = asyncio.create_task(TestServer(app).start_server())
        await until(lambda: db.state == "open")
        starting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await starting
        assert db.state == "closed"

    @pytest.mark.parametrize("failing", ["exit", "cleanup"])
    async def test_a_cleanup_that_fails_closes_the_pool(
        self, db: PoolManager[Any], hooks: Any, failing: str
    ) -> None:
        app = web.Application()
        setup(app, db)
        hooks(app, [failing])
        server = TestServer(app)
        await server.start_server()
        with pytest.raises(RuntimeError, match=f"{failing} failed"):
            await server.close()
        assert db.state == "closed"

    async def test_two_managers_live_in_one_application(
        self, db: PoolManager[Any], database: str
    ) -> None:
        reports = PoolManager(database, min_size=1, name="reports")
        key: web.AppKey[PoolManager[Any]] = web.AppKey("reports", PoolManager)

        async def names(request: web.Request) -> web.Response:
            async with connection_from(request) as one, connection_from(request, key) as other:
                assert one is not other
            return web.Response(text=f"{pool_from(request).name}, {pool_from(request, key).name}")

        app = web.Application()
        setup(app, db)
        setup(app, reports, key=key)
        app.add_routes([web.get("/", names)])
        async with TestClient(TestServer(app)) as client:
            assert await (await client.get("/")).text() == "orders, reports"
        assert (db.state, reports.state) == ("closed", "closed")

    async def test_an_application_may_start_again_on_its_loop(self, db: PoolManager[Any]) -> None:
        app = web.Application()
        setup(app, db)
        for _ in range(2):
            runner = web.AppRunner(app)
            if db.state == "new":
                await runner.setup()
            else:
                with pytest.warns(DeprecationWarning, match="Changing state of started"):
                    await runner.setup()
            assert db.state == "open"
            await runner.cleanup()
            assert db.state == "closed"


class TestClients:
    """The ways to test an application."""

    @pytest.fixture
    def db(self, dsn: str) -> PoolManager[Any]:
        return PoolManager(dsn, min_size=1, max_size=2, name="orders", timeout=5)

    async def test_a_handler_with_a_mocked_request_is_told_why_there_is_no_pool(
        self, db: PoolManager[Any]
    ) -> None:
        app = web.Application()
        setup(app, db)
        with pytest.raises(NotOpenError) as missing:
            pool_from(make_mocked_request("GET", "/", app=app))
        assert str(missing.value).splitlines()[0] == (
            "there is no pool in this application: its start-up has not run"
        )
        assert "Call setup(app, manager) where the application is made." in str(missing.value)
        assert "make_mocked_request() has no pool" in str(missing.value)

    async def test_a_mocked_request_finds_the_pool_that_its_application_was_given(
        self, db: PoolManager[Any]
    ) -> None:
        async with db:
            app = web.Application()
            app[KEY] = db
            request = make_mocked_request("GET", "/", app=app)
            async with connection_from(request) as conn:
                assert await (await conn.execute("select 1")).fetchone() == (1,)

    def test_one_manager_serves_applications_on_one_loop_after_the_other(
        self, db: PoolManager[Any]
    ) -> None:
        async def ask() -> int:
            app = web.Application()
            app.add_routes([web.get("/readyz", readyz)])
            setup(app, db)
            async with TestClient(TestServer(app)) as client:
                return (await client.get("/readyz")).status

        assert [asyncio.run(ask()) for _ in range(3)] == [200, 200, 200]
        assert db.state == "closed"


class TestLongLived:
    """WebSockets and streams."""

    @pytest.fixture
    def db(self, dsn: str) -> PoolManager[Any]:
        return PoolManager(dsn, min_size=1, max_size=1, name="orders", timeout=5)

    async def test_an_idle_websocket_holds_no_connection(self, db: PoolManager[Any]) -> None:
        async def echo(request: web.Request) -> web.WebSocketResponse:
            ws = web.WebSocketResponse()
            await ws.prepare(request)
            async for message in ws:
                async with connection_from(request) as conn:
                    row = await (await conn.execute("select %s", (message.data,))).fetchone()
                await ws.send_str(str(row))
            return ws

        app = web.Application()
        app.add_routes([web.get("/ws", echo)])
        setup(app, db)
        async with TestClient(TestServer(app)) as client, client.ws_connect("/ws") as ws:
            for word in ("one", "two"):
                await ws.send_str(word)
                assert await ws.receive_str() == f"('{word}',)"
                assert db.snapshot().in_use == 0

    async def test_a_websocket_that_keeps_its_connection_is_named(
        self, db: PoolManager[Any]
    ) -> None:
        async def keep(request: web.Request) -> web.WebSocketResponse:
            ws = web.WebSocketResponse()
            await ws.prepare(request)
            async with connection_from(request) as conn:
                async for message in ws:
                    await conn.execute("select %s", (message.data,))
            return ws

        app = web.Application()
        app.add_routes([web.get("/ws", keep)])
        setup(app, db)
        async with TestClient(TestServer(app)) as client, client.ws_connect("/ws") as ws:
            await ws.send_str("one")
            await until(lambda: db.diagnose().cause == "held-but-hardly-used")
            assert f"{HERE}:{keep.__code__.co_firstlineno + 3}" in str(db.diagnose())

    async def test_a_stream_that_keeps_its_connection_is_named(self, db: PoolManager[Any]) -> None:
        end = asyncio.Event()

        async def keep(request: web.Request) -> web.StreamResponse:
            response = web.StreamResponse()
            async with connection_from(request) as conn:
                await conn.execute("select 1")
                await response.prepare(request)  # and not committed by now
                await end.wait()  # a client that reads slowly
            return response

        app = web.Application()
        app.add_routes([web.get("/", keep)])
        setup(app, db)
        async with TestClient(TestServer(app)) as client, client.get("/"):
            await until(lambda: db.diagnose().cause == "held-but-hardly-used")
            assert f"{HERE}:{keep.__code__.co_firstlineno + 2}" in str(db.diagnose())
            end.set()
