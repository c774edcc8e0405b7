"""The adapter for Quart."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest
from quart import Blueprint, Quart, abort, current_app, request, websocket
from quart.testing.app import LifespanError

from poolkeeper import NoConnectionError, NotOpenError, PoolManager
from poolkeeper.adapters.quart import connection_from, exhausted, init_app, livez, pool_from, readyz
from tests.support.waiting import until

from .conformance import Conformance, Framework, Probe, client
from .servers import SERVERS, Served

HERE = "tests/adapters/test_quart.py"
NO_POOL = "there is no pool in this application: its start-up has not run"


class OnQuart(Framework):
    name = extra = package = "quart"
    order = "GET /orders/<int:number>"

    def build(self, probe: Probe) -> Any:
        app = Quart(__name__)
        init_app(app, probe.db)
        app.register_error_handler(NoConnectionError, exhausted)
        app.before_serving(probe.startup)
        app.after_serving(probe.shutdown)
        app.add_url_rule("/livez", view_func=livez)
        app.add_url_rule("/readyz", view_func=readyz)

        @app.get("/value")
        async def value() -> str:
            async with connection_from() as conn:
                return await probe.value(conn)

        @app.get("/orders/<int:number>")
        async def order(number: int) -> str:
            async with connection_from() as conn:
                return await probe.order(conn)

        @app.get("/helped/<int:number>")
        async def helped(number: int) -> str:
            return await probe.helped()

        @app.get("/unasked")
        async def unasked() -> str:
            return probe.unasked()

        @app.get("/same")
        async def same() -> str:
            async with connection_from() as first, connection_from() as second:
                return probe.same(first, second)

        @app.get("/stream")
        async def stream() -> AsyncIterator[str]:
            return probe.stream(pool_from())

        @app.get("/kept")
        async def kept() -> AsyncIterator[str]:
            async with connection_from() as conn:
                return probe.kept(conn)

        @app.post("/items")
        async def items() -> str:
            async with connection_from() as conn:
                await probe.add(conn, request.args["text"])
            return "ok"

        @app.post("/raise")
        async def fail() -> str:
            async with connection_from() as conn:
                await probe.add_and_raise(conn, request.args["text"])
            return "ok"

        @app.post("/reject")
        async def reject() -> str:
            async with connection_from() as conn:
                await probe.add(conn, request.args["text"])
                abort(409)

        @app.post("/fail-at-commit")
        async def fail_at_commit() -> str:
            async with connection_from() as conn:
                await probe.add_twice(conn, request.args["text"])
            return "ok"

        return app

    @asynccontextmanager
    async def served(self, app: Quart) -> AsyncIterator[httpx.AsyncClient]:
        async with app.test_app(), client(app) as http:
            yield http


class TestQuart(Conformance):
    framework = OnQuart()
    wraps_start_up_errors = True  # quart.testing's LifespanError


class TestQuartServed(Served):
    example = "quart"
    servers = SERVERS | {
        "quart-run": lambda app, port: ["-m", "quart", f"--app={app}", "run", f"--port={port}"],
    }


@pytest.fixture
def db(dsn: str) -> PoolManager[Any]:
    return PoolManager(dsn, min_size=1, max_size=1, name="orders", timeout=5)


class TestHooks:
    """Whoever hangs on to start-up or shutdown has the pool, and none who fails keeps it open."""

    @pytest.fixture
    def said(self) -> list[str]:
        return []

    @pytest.fixture
    def hooks(self, db: PoolManager[Any], said: list[str]) -> Callable[..., None]:
        """A function that registers all the hooks there are, some of which fail."""

        def add(app: Quart, failing: Iterable[str] = ()) -> None:
            async def tell(name: str) -> None:
                said.append(f"{name}: {await pool_from().fetchval('select 1')}")
                if name in failing:
                    raise RuntimeError(f"{name} failed")

            @app.before_serving
            async def before() -> None:
                await tell("before")

            @app.while_serving
            async def during() -> AsyncIterator[None]:
                await tell("enter")
                yield
                await tell("exit")

            @app.after_serving
            async def after() -> None:
                await tell("after")

            blueprint = Blueprint("other", __name__)

            @blueprint.after_app_serving
            async def last() -> None:
                await tell("after in a blueprint")

            app.register_blueprint(blueprint)

        return add

    ALL = ("before: 1", "enter: 1", "exit: 1", "after: 1", "after in a blueprint: 1")

    @pytest.mark.parametrize("first", [True, False])
    async def test_every_hook_has_the_pool_wherever_init_app_is_called(
        self, db: PoolManager[Any], said: list[str], hooks: Any, first: bool
    ) -> None:
        app = Quart(__name__)
        if first:
            init_app(app, db)
        hooks(app)
        if not first:
            init_app(app, db)
        async with app.test_app():
            pass
        assert sorted(said) == sorted(self.ALL)  # whose turn it is differs from 0.20 to 0.22
        assert db.state == "closed"

    @pytest.mark.parametrize("failing", ["before", "enter"])
    async def test_a_start_that_fails_closes_the_pool(
        self, db: PoolManager[Any], hooks: Any, failing: str
    ) -> None:
        app = Quart(__name__)
        init_app(app, db)
        hooks(app, [failing])
        with pytest.raises(LifespanError, match=f"{failing} failed"):
            await app.test_app().startup()
        assert db.state == "closed"

    @pytest.mark.parametrize("failing", ["exit", "after"])
    async def test_a_shutdown_that_fails_closes_the_pool(
        self, db: PoolManager[Any], hooks: Any, failing: str
    ) -> None:
        app = Quart(__name__)
        init_app(app, db)
        hooks(app, [failing])
        started = app.test_app()
        await started.startup()
        with pytest.raises(LifespanError, match=f"{failing} failed"):
            await started.shutdown()
        assert db.state == "closed"

    async def test_a_start_that_is_cancelled_closes_the_pool(self, db: PoolManager[Any]) -> None:
        app = Quart(__name__)
        init_app(app, db)

        @app.before_serving
        async def never() -> None:
            await asyncio.sleep(3600)

        starting = asyncio.create_task(app.startup())
        await until(lambda: db.state == "open")
        starting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await starting
        assert db.state == "closed"

    async def test_another_application_that_fails_is_no_matter(
        self, db: PoolManager[Any], hooks: Any
    ) -> None:
        app, other = Quart(__name__), Quart(__name__)
        init_app(app, db)
        hooks(other, ["before"])
        async with app.test_app():
            with pytest.raises(LifespanError, match=NO_POOL):
                await other.test_app().startup()
            assert db.state == "open"

    async def test_a_background_task_has_the_pool_until_it_ends(self, db: PoolManager[Any]) -> None:
        app = Quart(__name__)
        init_app(app, db)
        said: list[Any] = []

        async def work() -> None:
            await current_app.shutdown_event.wait()  # type: ignore[attr-defined]
            async with connection_from() as conn:
                said.append(await (await conn.execute("select 1")).fetchone())

        @app.post("/")
        async def begin() -> str:
            app.add_background_task(work)
            return "begun"

        async with app.test_app() as started:
            await started.test_client().post("/")
        assert said == [(1,)]
        assert db.state == "closed"

    async def test_two_managers_live_in_one_application(
        self, db: PoolManager[Any], database: str
    ) -> None:
        reports = PoolManager(database, min_size=1, name="reports")
        app = Quart(__name__)
        init_app(app, db)
        init_app(app, reports, key="reports")

        @app.get("/")
        async def names() -> str:
            async with connection_from() as one, connection_from("reports") as other:
                assert one is not other
            return f"{pool_from().name}, {pool_from('reports').name}"

        async with app.test_app() as started:
            answer = await started.test_client().get("/")
            assert await answer.get_data(as_text=True) == "orders, reports"
        assert (db.state, reports.state) == ("closed", "closed")


class TestClients:
    """The ways to test an application."""

    @pytest.fixture
    def app(self, db: PoolManager[Any]) -> Quart:
        app = Quart(__name__)
        init_app(app, db)

        @app.get("/")
        async def value() -> str:
            async with connection_from() as conn:
                return str(await (await conn.execute("select 1")).fetchone())

        return app

    async def test_a_client_of_an_application_that_was_not_entered_is_told_why(
        self, app: Quart, caplog: pytest.LogCaptureFixture
    ) -> None:
        for _ in range(2):
            caplog.clear()
            assert (await app.test_client().get("/")).status_code == 500
            (record,) = (record for record in caplog.records if record.exc_info)
            assert record.exc_info is not None
            missing = record.exc_info[1]
            assert isinstance(missing, NotOpenError)
            assert str(missing).splitlines()[0] == NO_POOL
            assert '"async with app.test_app() as started"' in str(missing)
            async with app.test_app() as started:  # when that has ended it is the same again
                assert (await started.test_client().get("/")).status_code == 200

    async def test_in_testing_mode_the_test_sees_why(self, app: Quart) -> None:
        app.testing = True
        try:
            answer = await app.test_client().get("/")
            seen = await answer.get_data(as_text=True)
        except NotOpenError as ex:  # in Quart 0.20
            seen = str(ex)
        assert NO_POOL in seen

    def test_one_application_serves_on_one_loop_after_the_other(
        self, app: Quart, db: PoolManager[Any]
    ) -> None:
        async def ask() -> str:
            async with app.test_app() as started:
                answer = await started.test_client().get("/")
                return str(await answer.get_data(as_text=True))

        assert [asyncio.run(ask()) for _ in range(3)] == ["(1,)"] * 3
        assert db.state == "closed"

    async def test_a_shell_or_a_command_has_the_pool_in_the_context_of_a_started_application(
        self, app: Quart
    ) -> None:
        await app.startup()
        async with app.app_context(), connection_from() as conn:
            assert await (await conn.execute("select 1")).fetchone() == (1,)
        await app.shutdown()

    async def test_requests_within_one_application_context_get_a_connection_each(
        self, app: Quart, db: PoolManager[Any]
    ) -> None:
        """A request joins a context that is there, so the store is one for all of them."""
        async with app.test_app() as started, app.app_context():
            answers = await asyncio.gather(*(started.test_client().get("/") for _ in range(5)))
            assert {answer.status_code for answer in answers} == {200}
        assert db.state == "closed"

    async def test_an_application_that_is_gone_is_not_kept_by_the_adapter(
        self, db: PoolManager[Any]
    ) -> None:
        import gc
        import weakref

        app = Quart(__name__)
        init_app(app, db)
        gone = weakref.ref(app)
        del app
        gc.collect()
        assert gone() is None


class TestLongLived:
    """WebSockets and streams."""

    async def test_an_idle_websocket_holds_no_connection(self, db: PoolManager[Any]) -> None:
        app = Quart(__name__)
        init_app(app, db)

        @app.websocket("/ws")
        async def echo() -> None:
            while True:
                word = await websocket.receive()
                async with connection_from() as conn:
                    row = await (await conn.execute("select %s", (word,))).fetchone()
                await websocket.send(str(row))

        async with app.test_app() as started, started.test_client().websocket("/ws") as ws:
            for word in ("one", "two"):
                await ws.send(word)
                assert await ws.receive() == f"('{word}',)"
                assert db.snapshot().in_use == 0

    async def test_a_websocket_that_keeps_its_connection_is_named(
        self, db: PoolManager[Any]
    ) -> None:
        app = Quart(__name__)
        init_app(app, db)

        @app.websocket("/ws")
        async def keep() -> None:
            async with connection_from() as conn:
                while True:
                    await conn.execute("select %s", (await websocket.receive(),))

        async with app.test_app() as started, started.test_client().websocket("/ws") as ws:
            await ws.send("one")
            await until(lambda: db.diagnose().cause == "held-but-hardly-used")
            assert f"{HERE}:{keep.__code__.co_firstlineno + 2}" in str(db.diagnose())

    async def test_a_stream_that_keeps_its_connection_is_named(self, db: PoolManager[Any]) -> None:
        app = Quart(__name__)
        init_app(app, db)
        end = asyncio.Event()

        @app.get("/")
        async def keep() -> AsyncIterator[str]:
            pool = pool_from()

            async def body() -> AsyncIterator[str]:
                async with pool.connection() as conn:
                    yield str(await (await conn.execute("select 1")).fetchone())
                    await end.wait()  # a client that reads slowly

            body_line.append(body.__code__.co_firstlineno + 1)
            return body()

        body_line: list[int] = []
        async with app.test_app() as started:
            reading = asyncio.create_task(started.test_client().get("/"))
            await until(lambda: db.diagnose().cause == "held-but-hardly-used")
            assert f"{HERE}:{body_line[0]}" in str(db.diagnose())
            end.set()
            assert await (await reading).get_data(as_text=True) == "(1,)"
