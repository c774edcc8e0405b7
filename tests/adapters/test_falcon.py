"""The adapter for Falcon."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import falcon
import falcon.asgi
import httpx
import pytest
from falcon.asgi import Request, Response, WebSocket
from falcon.testing import ASGIConductor, TestClient, create_asgi_req

from poolkeeper import NoConnectionError, NotOpenError, PoolManager
from poolkeeper.adapters.falcon import (
    PoolMiddleware,
    connection_from,
    exhausted,
    livez,
    pool_from,
    readyz,
)
from poolkeeper.errors import see
from tests.support.waiting import until

from .conformance import Conformance, Framework, Probe, client
from .servers import Served

HERE = "tests/adapters/test_falcon.py"


class Value:
    def __init__(self, probe: Probe) -> None:
        self.probe = probe

    async def on_get(self, req: Request, resp: Response) -> None:
        async with connection_from(req) as conn:
            resp.text = await self.probe.value(conn)


class Order(Value):
    async def on_get(self, req: Request, resp: Response, *, number: str) -> None:
        async with connection_from(req) as conn:
            resp.text = await self.probe.order(conn)


class Helped(Value):
    async def on_get(self, req: Request, resp: Response, *, number: str) -> None:
        resp.text = await self.probe.helped()


class Unasked(Value):
    async def on_get(self, req: Request, resp: Response) -> None:
        resp.text = self.probe.unasked()


class Same(Value):
    async def on_get(self, req: Request, resp: Response) -> None:
        async with connection_from(req) as first, connection_from(req) as second:
            resp.text = self.probe.same(first, second)


async def encoded(lines: AsyncIterator[str]) -> AsyncIterator[bytes]:
    async for line in lines:
        yield line.encode()


class Stream(Value):
    async def on_get(self, req: Request, resp: Response) -> None:
        resp.stream = encoded(self.probe.stream(pool_from(req)))


class Kept(Value):
    async def on_get(self, req: Request, resp: Response) -> None:
        async with connection_from(req) as conn:
            resp.stream = encoded(self.probe.kept(conn))


class Items(Value):
    async def on_post(self, req: Request, resp: Response) -> None:
        async with connection_from(req) as conn:
            await self.probe.add(conn, req.get_param("text", required=True))


class Fail(Value):
    async def on_post(self, req: Request, resp: Response) -> None:
        async with connection_from(req) as conn:
            await self.probe.add_and_raise(conn, req.get_param("text", required=True))


class Reject(Value):
    async def on_post(self, req: Request, resp: Response) -> None:
        async with connection_from(req) as conn:
            await self.probe.add(conn, req.get_param("text", required=True))
            raise falcon.HTTPConflict


class FailAtCommit(Value):
    async def on_post(self, req: Request, resp: Response) -> None:
        async with connection_from(req) as conn:
            await self.probe.add_twice(conn, req.get_param("text", required=True))


class Own:
    """A component of the user's own."""

    def __init__(self, probe: Probe) -> None:
        self.probe = probe

    async def process_startup(self, scope: Any, event: Any) -> None:
        await self.probe.startup()

    async def process_shutdown(self, scope: Any, event: Any) -> None:
        await self.probe.shutdown()


class OnFalcon(Framework):
    name = extra = package = "falcon"

    def build(self, probe: Probe) -> Any:
        app = falcon.asgi.App(middleware=[PoolMiddleware(probe.db), Own(probe)])
        app.add_error_handler(NoConnectionError, exhausted)
        app.add_route("/value", Value(probe))
        app.add_route("/orders/{number}", Order(probe))
        app.add_route("/helped/{number}", Helped(probe))
        app.add_route("/unasked", Unasked(probe))
        app.add_route("/same", Same(probe))
        app.add_route("/stream", Stream(probe))
        app.add_route("/kept", Kept(probe))
        app.add_route("/items", Items(probe))
        app.add_route("/raise", Fail(probe))
        app.add_route("/reject", Reject(probe))
        app.add_route("/fail-at-commit", FailAtCommit(probe))
        app.add_route("/livez", livez)
        app.add_route("/readyz", readyz)
        return app

    @asynccontextmanager
    async def served(self, app: Any) -> AsyncIterator[httpx.AsyncClient]:
        # Not LifespanManager: its scope says no ASGI version, which Falcon refuses.
        async with ASGIConductor(app), client(app) as http:
            yield http


class TestFalcon(Conformance):
    framework = OnFalcon()
    wraps_start_up_errors = True

    def test_each_call_of_the_test_client_opens_and_closes_the_pool(
        self, probe: Probe, db: PoolManager[Any]
    ) -> None:
        client = TestClient(self.framework.build(probe))
        for _ in range(3):
            assert client.simulate_get("/value").text == "(1,)"
            assert db.state == "closed"
        assert probe.events == ["startup: 1", "shutdown: 1"] * 3

    def test_a_start_that_failed_in_the_test_client_is_no_hindrance_for_the_next(
        self, probe: Probe, db: PoolManager[Any]
    ) -> None:
        client = TestClient(self.framework.build(probe))
        probe.fail_in_startup = True
        with pytest.raises(RuntimeError, match="a hook of the application failed"):
            client.simulate_get("/value")
        probe.fail_in_startup = False
        assert client.simulate_get("/value").text == "(1,)"
        assert db.state == "closed"

    async def test_a_lifespan_that_is_cancelled_does_not_leave_the_pool_open(
        self, probe: Probe, db: PoolManager[Any]
    ) -> None:
        """ASGIConductor does that since Falcon 4.4, when the test inside of it has failed."""
        app = self.framework.build(probe)
        scope = {"type": "lifespan", "asgi": {"version": "3.0"}}
        events: asyncio.Queue[Any] = asyncio.Queue()
        answers: asyncio.Queue[Any] = asyncio.Queue()
        events.put_nowait({"type": "lifespan.startup"})
        lifespan = asyncio.create_task(app(scope, events.get, answers.put))
        assert (await answers.get())["type"] == "lifespan.startup.complete"
        assert db.state == "open"
        lifespan.cancel()
        await until(lambda: db.state == "closed")
        assert probe.events == ["startup: 1"]

    async def test_a_component_that_fails_to_stop_does_not_leave_the_pool_open(
        self, db: PoolManager[Any]
    ) -> None:
        class Bad:
            async def process_shutdown(self, scope: Any, event: Any) -> None:
                raise ZeroDivisionError("a component failed to stop")

        app = falcon.asgi.App(middleware=[PoolMiddleware(db), Bad()])
        with pytest.raises(RuntimeError, match="a component failed to stop"):
            async with ASGIConductor(app):
                assert db.state == "open"
        await until(lambda: db.state == "closed")

    async def test_without_start_up_the_error_says_what_to_do(self, db: PoolManager[Any]) -> None:
        seen: list[BaseException] = []

        class Root:
            async def on_get(self, req: Request, resp: Response) -> None:
                with pytest.raises(NotOpenError) as info:
                    connection_from(req)
                seen.append(info.value)

        app = falcon.asgi.App(middleware=[PoolMiddleware(db)])
        app.add_route("/", Root())
        async with client(app) as http:
            assert (await http.get("/")).status_code == 200
        assert str(seen[0]) == (
            "there is no pool in this application: its start-up has not run\n"
            "DETAIL:  The pool is opened by the application's start-up, which keeps it under"
            ' "poolkeeper"; nothing is there.\n'
            "HINT:  Give the application middleware=[PoolMiddleware(manager)], before all others."
            ' In tests use falcon.testing, as TestClient(app) or "async with ASGIConductor(app) as'
            ' conductor"; httpx.ASGITransport runs no lifespan, so enter an ASGIConductor around'
            " it. Some servers (daphne) know none."
            f" {see('no-startup')}"
        )

    async def test_without_the_middleware_the_error_is_the_same(self) -> None:
        with pytest.raises(NotOpenError, match="Give the application middleware="):
            pool_from(create_asgi_req())

    async def test_an_end_without_a_start_leaves_the_pool_to_whoever_opened_it(
        self, db: PoolManager[Any]
    ) -> None:
        async with db:
            await PoolMiddleware(db).process_shutdown({}, {})
            assert db.state == "open"

    async def test_two_pools_live_side_by_side(self, dsn: str, db: PoolManager[Any]) -> None:
        other = PoolManager(dsn, min_size=1, max_size=1, name="reports")

        class Root:
            async def on_get(self, req: Request, resp: Response) -> None:
                async with connection_from(req), connection_from(req, "reports"):
                    resp.media = [pool_from(req).name, pool_from(req, "reports").name]

        components = [PoolMiddleware(db), PoolMiddleware(other, key="reports")]
        app = falcon.asgi.App(middleware=components)
        app.add_route("/", Root())
        async with ASGIConductor(app) as conductor:
            assert (await conductor.simulate_get("/")).json == ["orders", "reports"]
        assert (db.state, other.state) == ("closed", "closed")

    async def test_a_websocket_holds_no_connection_while_it_is_idle(
        self, db: PoolManager[Any]
    ) -> None:
        class Echo:
            async def on_websocket(self, req: Request, ws: WebSocket) -> None:
                await ws.accept()
                while True:
                    try:
                        number = int(await ws.receive_text())
                    except falcon.WebSocketDisconnected:
                        return
                    async with connection_from(req) as conn:
                        row = await (await conn.execute("select %s::int", (number,))).fetchone()
                    await ws.send_text(str(row))

        app = falcon.asgi.App(middleware=[PoolMiddleware(db)])
        app.add_route("/ws", Echo())
        async with ASGIConductor(app) as conductor, conductor.simulate_ws("/ws") as ws:
            for number in range(3):
                await ws.send_text(str(number))
                assert await ws.receive_text() == f"({number},)"
                assert db.snapshot().in_use == 0

    @pytest.fixture
    def single(self, store: str) -> PoolManager[Any]:
        return PoolManager(store, min_size=1, max_size=1, name="orders")

    async def test_a_websocket_that_keeps_its_connection_is_named(
        self, single: PoolManager[Any]
    ) -> None:
        class Keep:
            async def on_websocket(self, req: Request, ws: WebSocket) -> None:
                await ws.accept()
                async with connection_from(req) as conn:
                    while True:
                        await conn.execute("select %s", (await ws.receive_text(),))

        app = falcon.asgi.App(middleware=[PoolMiddleware(single)])
        app.add_route("/ws", Keep())
        line = Keep.on_websocket.__code__.co_firstlineno + 2
        async with ASGIConductor(app) as conductor, conductor.simulate_ws("/ws") as ws:
            await ws.send_text("one")
            await until(lambda: single.diagnose().cause == "held-but-hardly-used")
            assert f"{HERE}:{line}" in str(single.diagnose())

    async def test_a_stream_that_keeps_its_connection_is_named(
        self, single: PoolManager[Any]
    ) -> None:
        end = asyncio.Event()

        async def body(pool: PoolManager[Any]) -> AsyncIterator[bytes]:
            async with pool.connection() as conn:
                yield str(await (await conn.execute("select 1")).fetchone()).encode()
                await end.wait()  # a client that reads slowly

        class Root:
            async def on_get(self, req: Request, resp: Response) -> None:
                resp.stream = body(pool_from(req))

        app = falcon.asgi.App(middleware=[PoolMiddleware(single)])
        app.add_route("/", Root())
        async with ASGIConductor(app) as conductor:
            reading = asyncio.create_task(conductor.simulate_get("/"))
            await until(lambda: single.diagnose().cause == "held-but-hardly-used")
            assert f"{HERE}:{body.__code__.co_firstlineno + 1}" in str(single.diagnose())
            end.set()
            assert (await reading).text == "(1,)"

    async def test_another_task_of_a_request_gets_a_connection_of_its_own(
        self, db: PoolManager[Any]
    ) -> None:
        class Root:
            async def on_get(self, req: Request, resp: Response) -> None:
                async def other() -> Any:
                    async with connection_from(req) as conn:
                        return conn

                async with connection_from(req) as mine:
                    resp.media = await asyncio.create_task(other()) is not mine

        app = falcon.asgi.App(middleware=[PoolMiddleware(db)])
        app.add_route("/", Root())
        async with ASGIConductor(app) as conductor:
            assert (await conductor.simulate_get("/")).json is True


class TestFalconServed(Served):
    example = "falcon"
