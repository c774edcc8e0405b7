"""The adapter for plain ASGI, without a framework."""

from __future__ import annotations

import asyncio
import contextvars
import json
import logging
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping
from contextlib import asynccontextmanager
from typing import Any

import psycopg
import pytest
from asgi_lifespan import LifespanManager
from fastapi import FastAPI
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Mount, Route
from starlette.testclient import TestClient
from typing_extensions import override

from poolkeeper import NoConnectionError, NotOpenError, OpenError, PoolManager
from poolkeeper.adapters import fastapi, starlette
from poolkeeper.adapters.asgi import KEY, LifespanMiddleware, connection_from, exhausted, pool_from
from poolkeeper.errors import see
from tests.support.waiting import until

from .conformance import ADAPTERS, Conformance, Framework, Probe, client
from .servers import Served

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]


async def answer(send: Send, text: str, status: int = 200) -> None:
    await send({"type": "http.response.start", "status": status, "headers": []})
    await send({"type": "http.response.body", "body": text.encode()})


async def answer_in_pieces(send: Send, pieces: AsyncIterator[str]) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})
    async for piece in pieces:
        await send({"type": "http.response.body", "body": piece.encode(), "more_body": True})
    await send({"type": "http.response.body"})


class Conflict(Exception):
    """What the probe application answers with 409."""


class OnASGI(Framework):
    name = "asgi"
    order = "GET /orders/{number}"

    def build(self, probe: Probe) -> Any:
        async def live(receive: Receive, send: Send) -> None:
            await receive()
            try:
                await probe.startup()
            except Exception as ex:
                await send({"type": "lifespan.startup.failed", "message": str(ex)})
                raise
            await send({"type": "lifespan.startup.complete"})
            await receive()
            await probe.shutdown()
            await send({"type": "lifespan.shutdown.complete"})

        async def serve(scope: Scope, send: Send) -> None:
            text = scope["query_string"].decode().removeprefix("text=")
            match scope["path"]:
                case "/value":
                    async with connection_from(scope) as conn:
                        value = await probe.value(conn)
                    await answer(send, value)
                case path if path.startswith("/orders/"):
                    scope["route"] = "/orders/{number}"
                    async with connection_from(scope) as conn:
                        value = await probe.order(conn)
                    await answer(send, value)
                case path if path.startswith("/helped/"):
                    scope["route"] = "/helped/{number}"
                    await answer(send, await probe.helped())
                case "/unasked":
                    await answer(send, probe.unasked())
                case "/same":
                    async with connection_from(scope) as first, connection_from(scope) as second:
                        said = probe.same(first, second)
                    await answer(send, said)
                case "/stream":
                    await answer_in_pieces(send, probe.stream(pool_from(scope)))
                case "/kept":
                    async with connection_from(scope) as conn:
                        pieces = probe.kept(conn)
                    await answer_in_pieces(send, pieces)
                case "/items":
                    async with connection_from(scope) as conn:
                        await probe.add(conn, text)
                    await answer(send, "ok")
                case "/raise":
                    async with connection_from(scope) as conn:
                        await probe.add_and_raise(conn, text)
                case "/reject":
                    async with connection_from(scope) as conn:
                        await probe.add(conn, text)
                        raise Conflict
                case "/fail-at-commit":
                    async with connection_from(scope) as conn:
                        await probe.add_twice(conn, text)
                    await answer(send, "ok")

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            if scope["type"] == "lifespan":
                await live(receive, send)
                return
            try:
                await serve(scope, send)
            except Conflict:
                await answer(send, "no", 409)

        return LifespanMiddleware(exhausted(app), probe.db, livez="/livez", readyz="/readyz")


class TestASGI(Conformance):
    framework = OnASGI()

    @override
    def test_without_the_framework_the_extra_is_named(self) -> None:
        """There is none to miss: none is imported."""
        program = "import sys, poolkeeper.adapters.asgi; print(*sys.modules)"
        ended = subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, timeout=60
        )
        loaded = {name.partition(".")[0] for name in ended.stdout.split()}
        assert "poolkeeper" in loaded, ended.stderr
        assert not loaded & {"asgiref", "django", "httpx", "uvicorn", *ADAPTERS}


class TestASGIServed(Served):
    example = "asgi"
    tells_for_all = True


# --- the lifespan of the application inside ---------------------------------------------------


class App:
    """An application of which only the lifespan matters; each case is another one."""

    def __init__(self, db: PoolManager[Any], case: Callable[..., Awaitable[None]]) -> None:
        self._db = db
        self._case = case
        self.states: list[str] = []
        """Of the pool, when the lifespan began and when it had ended."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        assert scope["type"] == "lifespan"
        self.states.append(self._db.state)
        try:
            await self._case(receive, send)
        finally:
            await asyncio.sleep(0)
            self.states.append(self._db.state)


class Server:
    """The lifespan of an application as a server runs it, and what the server is told."""

    def __init__(self, app: Any, db: PoolManager[Any], *, state: dict[str, Any] | None) -> None:
        self._db = db
        self._events: asyncio.Queue[Any] = asyncio.Queue()
        self.told: list[tuple[str, str]] = []
        """Each message, and the state of the pool when it came."""
        self.messages: list[str] = []
        scope = {"type": "lifespan", "asgi": {"version": "3.0"}}
        if state is not None:
            scope["state"] = state
        self.task = asyncio.create_task(app(scope, self._events.get, self._send))

    async def _send(self, message: Any) -> None:
        assert message["type"].startswith("lifespan."), message  # as uvicorn does
        self.told.append((message["type"].removeprefix("lifespan."), self._db.state))
        self.messages.append(message.get("message", ""))

    async def start(self) -> None:
        self._events.put_nowait({"type": "lifespan.startup"})
        await until(lambda: bool(self.told) or self.task.done())

    async def stop(self) -> None:
        self._events.put_nowait({"type": "lifespan.shutdown"})
        await until(self.task.done)


async def start(receive: Receive, send: Send) -> None:
    assert (await receive())["type"] == "lifespan.startup"
    await send({"type": "lifespan.startup.complete"})


async def completes(receive: Receive, send: Send) -> None:
    await start(receive, send)
    assert (await receive())["type"] == "lifespan.shutdown"
    await send({"type": "lifespan.shutdown.complete"})


async def completes_and_asks_for_more(receive: Receive, send: Send) -> None:
    await completes(receive, send)
    await receive()
    raise AssertionError("there was more")


async def completes_and_raises(receive: Receive, send: Send) -> None:
    await completes(receive, send)
    raise RuntimeError("the application failed")


async def returns_at_shutdown(receive: Receive, send: Send) -> None:
    await start(receive, send)
    await receive()


async def raises_at_shutdown(receive: Receive, send: Send) -> None:
    await start(receive, send)
    await receive()
    raise RuntimeError("the application failed\nat length")


async def says_that_shutdown_failed(receive: Receive, send: Send) -> None:
    await start(receive, send)
    await receive()
    await send({"type": "lifespan.shutdown.failed", "message": "its own words"})


async def says_that_shutdown_failed_and_raises(receive: Receive, send: Send) -> None:
    await says_that_shutdown_failed(receive, send)
    raise RuntimeError("the application failed")


async def says_that_startup_failed(receive: Receive, send: Send) -> None:
    await receive()
    await send({"type": "lifespan.startup.failed", "message": "its own words"})


async def says_that_startup_failed_and_raises(receive: Receive, send: Send) -> None:
    await says_that_startup_failed(receive, send)
    raise RuntimeError("the application failed")


async def says_that_startup_failed_and_asks_for_more(receive: Receive, send: Send) -> None:
    await says_that_startup_failed(receive, send)
    await receive()
    raise AssertionError("there was more")


async def refuses(receive: Receive, send: Send) -> None:
    raise ValueError("this application can only handle http")


async def refuses_by_returning(receive: Receive, send: Send) -> None:
    pass


async def takes_it_for_a_request(receive: Receive, send: Send) -> None:
    await answer(send, "hello")


async def reads_and_raises(receive: Receive, send: Send) -> None:
    await receive()
    raise RuntimeError("the application failed")


async def starts_and_returns(receive: Receive, send: Send) -> None:
    await start(receive, send)


async def starts_and_raises(receive: Receive, send: Send) -> None:
    await start(receive, send)
    raise RuntimeError("the application failed")


async def never_answers(receive: Receive, send: Send) -> None:
    await receive()
    await asyncio.get_running_loop().create_future()


STARTED = ("startup.complete", "open")
NOT_STARTED = ("startup.failed", "open")
STOPPED = ("shutdown.complete", "closed")
NOT_STOPPED = ("shutdown.failed", "closed")

CASES: list[tuple[Any, list[tuple[str, str]], str, str]] = [
    # the application, what the server is told, the last message, what is raised
    (completes, [STARTED, STOPPED], "", ""),
    (completes_and_asks_for_more, [STARTED, STOPPED], "", ""),
    (
        completes_and_raises,
        [STARTED, NOT_STOPPED],
        "RuntimeError: the application failed",
        "the application failed",
    ),
    (returns_at_shutdown, [STARTED, STOPPED], "", ""),
    (
        raises_at_shutdown,
        [STARTED, NOT_STOPPED],
        "RuntimeError: the application failed",
        "the application failed\nat length",
    ),
    (says_that_shutdown_failed, [STARTED, NOT_STOPPED], "its own words", ""),
    (
        says_that_shutdown_failed_and_raises,
        [STARTED, NOT_STOPPED],
        "its own words",
        "the application failed",
    ),
    (says_that_startup_failed, [NOT_STARTED], "its own words", ""),
    (says_that_startup_failed_and_asks_for_more, [NOT_STARTED], "its own words", ""),
    (
        says_that_startup_failed_and_raises,
        [NOT_STARTED],
        "its own words",
        "the application failed",
    ),
    (refuses, [STARTED, STOPPED], "", ""),
    (refuses_by_returning, [STARTED, STOPPED], "", ""),
    (takes_it_for_a_request, [STARTED, STOPPED], "", ""),
    (reads_and_raises, [STARTED, STOPPED], "", ""),
    (starts_and_returns, [STARTED, STOPPED], "", ""),
    (
        starts_and_raises,
        [STARTED, NOT_STOPPED],
        "RuntimeError: the application failed",
        "the application failed",
    ),
]


@pytest.fixture
def manager(database: str) -> PoolManager[Any]:
    return PoolManager(database, min_size=1, max_size=2, name="orders", open_timeout=10)


@pytest.fixture(params=["state", "no state"])
def state(request: pytest.FixtureRequest) -> dict[str, Any] | None:
    """What the server gives the lifespan to keep things in, if anything."""
    return {} if request.param == "state" else None


@pytest.mark.parametrize(
    ("case", "told", "message", "raised"), CASES, ids=[case[0].__name__ for case in CASES]
)
async def test_the_server_is_told_how_the_lifespan_of_the_application_goes(
    manager: PoolManager[Any],
    state: dict[str, Any] | None,
    case: Any,
    told: list[tuple[str, str]],
    message: str,
    raised: str,
) -> None:
    """And the pool is open until the application has ended, and closed when the server is told."""
    app = App(manager, case)
    server = Server(LifespanMiddleware(app, manager), manager, state=state)
    await server.start()
    if told[0] == STARTED:
        await asyncio.sleep(0.05)
        assert server.told == [STARTED]
        assert manager.state == "open"
        assert state is None or state[KEY] is manager
    await server.stop()
    assert server.told == told
    assert server.messages[-1] == message
    assert manager.state == "closed"
    assert app.states == ["open", "open"]
    error = server.task.exception()
    assert str(error or "") == raised


@pytest.mark.parametrize("case", [never_answers, completes, starts_and_raises, refuses])
async def test_a_server_that_cancels_leaves_no_pool_and_no_task(
    manager: PoolManager[Any], state: dict[str, Any] | None, case: Any
) -> None:
    before = asyncio.all_tasks()
    app = App(manager, case)
    server = Server(LifespanMiddleware(app, manager), manager, state=state)
    starting = asyncio.create_task(server.start())
    await until(lambda: len(app.states) == (1 if case in (never_answers, completes) else 2))
    server.task.cancel()
    await asyncio.wait({server.task})
    starting.cancel()
    assert server.task.cancelled()
    assert manager.state == "closed"
    assert app.states == ["open", "open"]
    await until(lambda: asyncio.all_tasks() <= before)


async def test_a_server_that_cancels_an_application_that_is_late_is_not_ignored(
    manager: PoolManager[Any],
) -> None:
    """One that has said its last word, and was cancelled for it, takes its time."""
    late = asyncio.Event()

    async def case(receive: Receive, send: Send) -> None:
        try:
            await completes_and_asks_for_more(receive, send)
        finally:
            late.set()
            await asyncio.get_running_loop().create_future()

    server = Server(LifespanMiddleware(App(manager, case), manager), manager, state={})
    await server.start()
    stopping = asyncio.create_task(server.stop())
    await late.wait()
    server.task.cancel()
    await stopping
    assert server.task.cancelled()
    assert server.told == [STARTED]
    assert manager.state == "closed"


async def test_a_pool_that_cannot_be_opened_is_told_in_one_line_and_raised(
    database: str, state: dict[str, Any] | None
) -> None:
    dsn = psycopg.conninfo.make_conninfo(database, user="nobody_there")
    manager = PoolManager(dsn, min_size=1, name="orders")
    app = App(manager, completes)
    server = Server(LifespanMiddleware(app, manager), manager, state=state)
    await server.start()
    await until(server.task.done)
    assert server.told == [("startup.failed", "closed")]
    assert server.messages == [
        'OpenError: cannot open pool "orders": role "nobody_there" does not exist'
    ]
    assert isinstance(server.task.exception(), OpenError)
    assert app.states == []


@pytest.mark.parametrize("when", ["start-up", "shutdown"])
async def test_a_lifespan_of_the_users_that_fails_is_told_and_raised(
    manager: PoolManager[Any], when: str
) -> None:
    @asynccontextmanager
    async def own(app: object) -> AsyncIterator[None]:
        if when == "start-up":
            raise RuntimeError("no luck")
        yield
        assert manager.state == "open"
        raise RuntimeError("no luck")

    app = App(manager, completes)
    server = Server(LifespanMiddleware(app, manager, own), manager, state={})
    await server.start()
    await server.stop()
    if when == "start-up":
        assert server.told == [("startup.failed", "closed")]
    else:
        assert server.told == [STARTED, NOT_STOPPED]
    assert server.messages[-1] == "RuntimeError: no luck"
    assert str(server.task.exception()) == "no luck"
    assert app.states == ([] if when == "start-up" else ["open", "open"])


@pytest.mark.parametrize(
    ("case", "level", "said"),
    [
        (
            refuses,
            "INFO",
            "the application takes no part in the ASGI lifespan:"
            " ValueError: this application can only handle http",
        ),
        (
            refuses_by_returning,
            "INFO",
            "the application takes no part in the ASGI lifespan: it returned",
        ),
        (reads_and_raises, "WARNING", "the application failed before it answered start-up"),
        (starts_and_raises, "ERROR", "the application's lifespan failed while it serves"),
    ],
)
async def test_why_a_lifespan_ended_too_early_is_logged_at_once(
    manager: PoolManager[Any],
    caplog: pytest.LogCaptureFixture,
    case: Any,
    level: str,
    said: str,
) -> None:
    caplog.set_level(logging.INFO, "poolkeeper")
    server = Server(LifespanMiddleware(App(manager, case), manager), manager, state={})
    await server.start()
    await until(lambda: (level, said) in [(r.levelname, r.getMessage()) for r in caplog.records])
    await server.stop()


async def test_the_lifespan_of_the_application_runs_in_the_task_of_the_server(
    manager: PoolManager[Any],
) -> None:
    """So what it sets in its context, and a cancel scope that it enters, are right."""
    tasks = []

    async def case(receive: Receive, send: Send) -> None:
        tasks.append(asyncio.current_task())
        await completes(receive, send)

    server = Server(LifespanMiddleware(App(manager, case), manager), manager, state={})
    await server.start()
    await server.stop()
    assert tasks == [server.task]


# --- requests ------------------------------------------------------------------------------------


async def ask(app: Any, path: str = "/", method: str = "GET", **scope: Any) -> tuple[int, str]:
    """Answer of *app* to one request; unlike clients, with a scope that the test may form."""
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> Any:
        return {"type": "http.request"}

    whole = {"type": "http", "method": method, "path": path, "query_string": b"", "headers": []}
    await app({**whole, **scope}, receive, send)
    return sent[0]["status"], b"".join(message.get("body", b"") for message in sent[1:]).decode()


async def value(scope: Scope, receive: Receive, send: Send) -> None:
    """An application that knows no lifespan."""
    if scope["type"] != "http":
        raise ValueError("http only")
    async with connection_from(scope) as conn:
        row = await (await conn.execute("select 1")).fetchone()
    await answer(send, str(row))


async def test_a_request_has_the_pool_whether_or_not_the_server_hands_the_state_on(
    manager: PoolManager[Any],
) -> None:
    seen: list[Scope] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        seen.append(scope)
        await value(scope, receive, send)

    whole = LifespanMiddleware(app, manager)
    server = Server(whole, manager, state=None)
    await server.start()
    assert await ask(whole) == (200, "(1,)")
    state = {"mine": 1}
    assert await ask(whole, state=state) == (200, "(1,)")
    assert seen[-1]["state"] == {"mine": 1, KEY: manager}
    assert state == {"mine": 1}, "changed what is the server's"
    state[KEY] = manager  # type: ignore[assignment]
    assert await ask(whole, state=state) == (200, "(1,)")
    assert seen[-1]["state"] is state
    await server.stop()


async def test_what_the_users_lifespan_yields_reaches_requests(manager: PoolManager[Any]) -> None:
    @asynccontextmanager
    async def own(app: object) -> AsyncIterator[dict[str, int]]:
        yield {"limit": await manager.fetchval("select 7")}

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        assert scope["type"] == "http"
        await answer(send, str(scope["state"]["limit"]))

    whole = LifespanMiddleware(app, manager, own)
    async with LifespanManager(whole) as running, client(running.app) as http:
        assert (await http.get("/")).text == "7"
        assert await ask(whole) == (200, "7")


async def test_two_managers_have_a_key_each(database: str, manager: PoolManager[Any]) -> None:
    reports = PoolManager(f"{database} application_name=r", min_size=1, name="reports")
    closed = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await completes(receive, send)
            closed.append((manager.state, reports.state))
        else:
            names = pool_from(scope).name, pool_from(scope, "reports").name
            await answer(send, " ".join(names))

    whole = LifespanMiddleware(LifespanMiddleware(app, manager), reports, key="reports")
    with pytest.warns(UserWarning, match="second one open"):
        async with LifespanManager(whole) as running, client(running.app) as http:
            assert (await http.get("/")).text == "orders reports"
    assert closed == [("open", "open")]
    assert (manager.state, reports.state) == ("closed", "closed")


async def test_a_websocket_takes_the_pool_and_holds_no_connection_while_idle(
    manager: PoolManager[Any],
) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "websocket":
            raise ValueError("websocket only")
        await receive()
        await send({"type": "websocket.accept"})
        db = pool_from(scope)
        while (await receive())["type"] == "websocket.receive":
            async with connection_from(scope) as conn:
                row = await (await conn.execute("select 1")).fetchone()
            await send({"type": "websocket.send", "text": f"{row}, {db.snapshot().in_use} in use"})

    def talk() -> list[str]:
        with (
            TestClient(LifespanMiddleware(app, manager)) as http,
            http.websocket_connect("/") as socket,
        ):
            texts = []
            for _ in range(2):
                socket.send_text("now")
                texts.append(socket.receive_text())
            return texts

    assert await asyncio.to_thread(talk) == ["(1,), 0 in use"] * 2
    assert manager.state == "closed"


async def test_a_connection_that_is_held_while_a_body_is_sent_is_named_with_its_line(
    manager: PoolManager[Any],
) -> None:
    read = asyncio.Event()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        async with connection_from(scope) as conn:  # the wrong way
            await conn.execute("select 1")
            await read.wait()  # a client that reads slowly
        await answer(send, "end")

    line = app.__code__.co_firstlineno + 1
    async with manager:
        requests = [asyncio.create_task(ask(app, state={KEY: manager})) for _ in range(2)]
        await until(lambda: manager.diagnose().cause == "held-but-hardly-used")
        diagnosis = str(manager.diagnose())
        read.set()
        await asyncio.gather(*requests)
    assert f"tests/adapters/test_asgi.py:{line}" in diagnosis


# --- no lifespan ---------------------------------------------------------------------------------


async def test_a_response_that_has_begun_is_not_begun_again_with_a_503() -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        raise NoConnectionError("no connection")

    sent: list[Any] = []

    async def send(message: MutableMapping[str, Any]) -> None:
        sent.append(message["type"])

    async def receive() -> MutableMapping[str, Any]:
        return {"type": "http.request"}

    with pytest.raises(NoConnectionError):
        await exhausted(app)({"type": "http"}, receive, send)
    assert sent == ["http.response.start"]


async def test_without_a_lifespan_the_error_says_what_to_do(manager: PoolManager[Any]) -> None:
    with pytest.raises(NotOpenError) as error:
        await ask(LifespanMiddleware(value, manager))
    assert str(error.value) == (
        "there is no pool in this application: its start-up has not run\n"
        "DETAIL:  The pool is opened by the application's start-up, which keeps it under"
        ' "poolkeeper"; nothing is there.\n'
        "HINT:  Wrap the application in LifespanMiddleware, outside of all others. A server that"
        " knows no lifespan, such as daphne, and an application that this one is mounted in, need"
        " open_on_first_request=True. In tests wrap it in asgi_lifespan.LifespanManager:"
        " httpx.ASGITransport runs no lifespan. Django's AsyncClient goes past the middleware:"
        " open the manager in the test, and use it in the view without asking the request."
        f" {see('no-startup')}"
    )


@pytest.mark.parametrize("request_", [None, object()])
def test_what_is_no_request_of_asgi_is_told_so(request_: object) -> None:
    for ask_for in (pool_from, connection_from):
        with pytest.raises(NotOpenError, match="did not come through ASGI"):
            ask_for(request_)


# --- open_on_first_request -----------------------------------------------------------------------


@pytest.fixture
async def lazily(manager: PoolManager[Any]) -> AsyncIterator[LifespanMiddleware]:
    app = LifespanMiddleware(
        value, manager, livez="/livez", readyz="/readyz", open_on_first_request=True
    )
    yield app
    await end_stand_in()
    assert manager.state == "closed"


async def end_stand_in() -> None:
    """As ``asyncio.run()`` does in the end."""
    tasks = [task for task in asyncio.all_tasks() if task.get_name() == "poolkeeper-lifespan"]
    for task in tasks:
        task.cancel()
    if tasks:
        await asyncio.wait(tasks)


async def test_the_first_requests_open_the_pool_together(
    lazily: LifespanMiddleware, manager: PoolManager[Any]
) -> None:
    assert await ask(lazily, "/livez") == (200, '{"status": "alive"}')
    assert manager.state == "new"
    assert await asyncio.gather(*(ask(lazily) for _ in range(5))) == [(200, "(1,)")] * 5
    assert manager.state == "open"


async def test_a_client_that_goes_away_does_not_end_the_start_for_the_others(
    proxy: Any,
) -> None:
    proxy.stall()
    manager = PoolManager(proxy.dsn, min_size=1, name="orders")
    app = LifespanMiddleware(value, manager, open_on_first_request=True)
    first, second = (asyncio.create_task(ask(app)) for _ in range(2))
    await until(lambda: manager.state == "opening")
    first.cancel()
    await asyncio.wait({first})
    proxy.resume()
    assert await second == (200, "(1,)")
    await end_stand_in()


async def test_readiness_opens_the_pool_for_a_balancer_sends_nothing_before(
    lazily: LifespanMiddleware, manager: PoolManager[Any]
) -> None:
    status, body = await ask(lazily, "/readyz")
    assert (status, json.loads(body)["status"]) == (200, "ready")
    assert manager.state == "open"


async def test_readiness_answers_while_the_pool_is_still_opening_and_lets_it(proxy: Any) -> None:
    proxy.stall()
    manager = PoolManager(proxy.dsn, min_size=1, name="orders")
    app = LifespanMiddleware(value, manager, readyz="/readyz", open_on_first_request=True)
    status, body = await ask(app, "/readyz")
    assert (status, json.loads(body)["reason"]) == (503, "no answer within 2.00 s")
    assert manager.state == "opening"
    proxy.resume()
    await until(lambda: manager.state == "open")
    assert (await ask(app, "/readyz"))[0] == 200
    await end_stand_in()


async def test_a_pool_that_cannot_be_opened_fails_each_request_with_the_reason(
    database: str,
) -> None:
    user = "nobody_there"
    manager = PoolManager(
        lambda: psycopg.conninfo.make_conninfo(database, **({"user": user} if user else {})),
        min_size=1,
        name="orders",
    )
    app = LifespanMiddleware(
        value, manager, readyz="/readyz", readyz_details="/details", open_on_first_request=True
    )
    failed = await asyncio.gather(*(ask(app) for _ in range(3)), return_exceptions=True)
    for error in (*failed, *await asyncio.gather(ask(app), return_exceptions=True)):
        assert isinstance(error, OpenError)
        assert 'role "nobody_there" does not exist' in str(error)
    status, body = await ask(app, "/readyz")
    assert (status, json.loads(body)["reason"]) == (
        503,
        "the pool cannot be opened: the server refuses the login",
    )
    status, body = await ask(app, "/details")
    assert (status, json.loads(body)["reason"]) == (
        503,
        'cannot open pool "orders": role "nobody_there" does not exist',
    )
    user = ""
    assert await ask(app) == (200, "(1,)"), "it does not try again"
    await end_stand_in()


async def test_the_application_inside_has_its_lifespan_then_too(
    manager: PoolManager[Any], caplog: pytest.LogCaptureFixture
) -> None:
    """Start-up before the first request, shutdown when the loop cancels its tasks."""
    app = App(manager, completes)
    seen = []

    async def whole(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await app(scope, receive, send)
            task = asyncio.current_task()
            assert task is not None
            seen.append(f"ended in order, {task.cancelling()} cancellations pending")
        else:
            assert app.states == ["open"]
            await value(scope, receive, send)

    middleware = LifespanMiddleware(whole, manager, open_on_first_request=True)
    assert await ask(middleware) == (200, "(1,)")
    await end_stand_in()
    assert app.states == ["open", "open"]
    assert seen == ["ended in order, 0 cancellations pending"]
    assert manager.state == "closed"
    assert not caplog.records


async def test_a_shutdown_that_fails_then_is_logged(
    manager: PoolManager[Any], caplog: pytest.LogCaptureFixture
) -> None:
    app = App(manager, raises_at_shutdown)

    async def whole(scope: Scope, receive: Receive, send: Send) -> None:
        await (app if scope["type"] == "lifespan" else value)(scope, receive, send)

    assert await ask(LifespanMiddleware(whole, manager, open_on_first_request=True)) == (
        200,
        "(1,)",
    )
    await end_stand_in()
    assert [record.getMessage() for record in caplog.records] == [
        "the application's shutdown failed"
    ]
    assert manager.state == "closed"


async def test_a_start_up_that_the_application_says_has_failed_leaves_no_pool(
    manager: PoolManager[Any],
) -> None:
    app = App(manager, says_that_startup_failed)

    async def whole(scope: Scope, receive: Receive, send: Send) -> None:
        await (app if scope["type"] == "lifespan" else value)(scope, receive, send)

    middleware = LifespanMiddleware(whole, manager, open_on_first_request=True)
    for _ in range(2):
        with pytest.raises(NotOpenError):
            await ask(middleware)
    assert manager.state == "closed"


def test_the_pool_is_closed_when_asyncio_run_ends(
    manager: PoolManager[Any], server_sessions: Callable[[str], int]
) -> None:
    """Also on one loop after the other."""
    app = LifespanMiddleware(value, manager, open_on_first_request=True)
    for _ in range(3):
        assert asyncio.run(ask(app)) == (200, "(1,)")
        assert manager.state == "closed"


async def test_a_server_that_runs_the_lifespan_is_not_stood_in_for(
    lazily: LifespanMiddleware,
) -> None:
    async with LifespanManager(lazily) as running, client(running.app) as http:
        assert (await http.get("/")).text == "(1,)"
        names = {task.get_name() for task in asyncio.all_tasks()}
        assert "poolkeeper-lifespan" not in names


async def test_what_the_first_request_has_in_its_context_does_not_stay(
    manager: PoolManager[Any],
) -> None:
    user = contextvars.ContextVar("user", default="nobody")
    seen = []

    @asynccontextmanager
    async def own(app: object) -> AsyncIterator[None]:
        seen.append(user.get())
        yield

    user.set("alice")
    await ask(LifespanMiddleware(value, manager, own, open_on_first_request=True))
    assert seen == ["nobody"]
    await end_stand_in()


# --- among others --------------------------------------------------------------------------------


async def endpoint(request: Request) -> PlainTextResponse:
    async with starlette.connection_from(request) as conn:
        row = await (await conn.execute("select 1")).fetchone()
    mine = getattr(request.state, "mine", None)
    return PlainTextResponse(f"{row} {mine}")


def on_starlette(**arguments: Any) -> Any:
    return Starlette(routes=[Route("/", endpoint)], **arguments)


def on_fastapi(**arguments: Any) -> Any:
    app = FastAPI(**arguments)

    @app.get("/", response_class=PlainTextResponse)
    async def read(request: Request, conn: fastapi.DepConnection) -> str:
        row = await (await conn.execute("select 1")).fetchone()
        return f"{row} {getattr(request.state, 'mine', None)}"

    return app


@pytest.mark.parametrize("build", [on_starlette, on_fastapi])
async def test_a_framework_inside_finds_the_pool_and_keeps_its_lifespan(
    manager: PoolManager[Any], build: Any
) -> None:
    states = []

    @asynccontextmanager
    async def own(app: Any) -> AsyncIterator[dict[str, int]]:
        yield {"mine": await manager.fetchval("select 7")}
        states.append(manager.state)

    app = LifespanMiddleware(build(lifespan=own), manager)
    for _ in range(2):
        async with LifespanManager(app) as running, client(running.app) as http:
            assert (await http.get("/")).text == "(1,) 7"
    assert states == ["open", "open"]
    assert manager.state == "closed"


async def test_mounted_in_another_application_it_has_the_pool_of_that_one(
    manager: PoolManager[Any],
) -> None:
    outer = Starlette(routes=[Mount("/inside", value)], lifespan=starlette.lifespan(manager))
    async with LifespanManager(outer) as running, client(running.app) as http:
        assert (await http.get("/inside/")).text == "(1,)"


@pytest.mark.parametrize("by_itself", [False, True])
async def test_mounted_with_a_pool_of_its_own_it_has_to_start_by_itself(
    manager: PoolManager[Any], by_itself: bool
) -> None:
    """An application does not run the lifespan of one that is mounted in it."""
    inside = LifespanMiddleware(
        on_starlette(),
        manager,
        livez="/livez",
        readyz="/readyz",
        open_on_first_request=by_itself,
    )
    outer = Starlette(routes=[Mount("/inside", inside)])
    async with LifespanManager(outer) as running, client(running.app) as http:
        assert (await http.get("/inside/livez")).status_code == 200
        ready = await http.get("/inside/readyz")
        assert (await http.get("/inside/")).status_code == (200 if by_itself else 500)
    assert ready.status_code == (200 if by_itself else 503)
    if not by_itself:
        assert "start-up has not run" in ready.json()["reason"]
    await end_stand_in()


@pytest.mark.parametrize(
    ("path", "root_path", "answered"),
    [
        ("/livez", "", True),
        ("/livez", "/api", True),  # a server that leaves the prefix away
        ("/api/livez", "/api", True),
        ("/api/livez", "/api/", True),
        ("/api/livez", "", False),
        ("/livez/", "", False),
        ("/apilivez", "/api", False),
        ("/", "", False),
    ],
)
async def test_health_is_found_wherever_the_application_is_mounted(
    manager: PoolManager[Any], path: str, root_path: str, answered: bool
) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await answer(send, "the application")

    whole = LifespanMiddleware(app, manager, livez="/livez")
    status, body = await ask(whole, path, root_path=root_path)
    assert status == 200
    assert (body == '{"status": "alive"}') is answered


async def test_health_is_for_reading_alone(manager: PoolManager[Any]) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await answer(send, "the application", 405)

    whole = LifespanMiddleware(app, manager, livez="/livez")
    assert await ask(whole, "/livez", "HEAD") == (200, "")
    assert await ask(whole, "/livez", "POST") == (405, "the application")
    async with client(whole) as http:
        assert (await http.head("/livez")).headers["content-length"] == "19"
    assert await ask(LifespanMiddleware(app, manager), "/livez") == (405, "the application")
