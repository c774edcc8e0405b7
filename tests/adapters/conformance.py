"""
What every adapter keeps, whatever the framework.

An adapter takes part with a module ``test_<name>.py`` that says how its framework builds and
serves the probe application (`Framework`), and with its name in `ADAPTERS`.
"""

from __future__ import annotations

import asyncio
import re
import subprocess
import sys
import threading
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import psycopg
import pytest
from asgi_lifespan import LifespanManager
from psycopg import AsyncConnection

from poolkeeper import (
    AcquireTimeout,
    LoopMismatchError,
    OpenError,
    PoolManager,
    ReleasedConnectionError,
)
from tests.support.waiting import until

ADAPTERS = (
    "aiohttp",
    "asgi",
    "blacksheep",
    "falcon",
    "fastapi",
    "litestar",
    "quart",
    "sanic",
    "starlette",
)
"""Every framework with a module in ``poolkeeper.adapters``."""


class Probe:
    """What the routes of the probe application do, and a record of what they saw."""

    def __init__(self, db: PoolManager[Any]) -> None:
        self.db = db
        self.events: list[str] = []
        """What the application's own start-up and shutdown code saw of the pool."""
        self.refused: list[Exception] = []
        self.fail_in_startup = False
        self.loop: asyncio.AbstractEventLoop | None = None
        self.go_on = asyncio.Event()
        self.asked = 0
        """How many have asked for help: the second and the third in a task of the handler's."""

    # --- the user's own hooks -----------------------------------------------------------------

    async def startup(self) -> None:
        """To be run by the application's own start-up hook, after the adapter's."""
        self.loop = asyncio.get_running_loop()
        self.events.append(f"startup: {await self.db.fetchval('select 1')}")
        if self.fail_in_startup:
            raise RuntimeError("a hook of the application failed")

    async def shutdown(self) -> None:
        """To be run by the application's own shutdown hook."""
        self.events.append(f"shutdown: {await self.db.fetchval('select 1')}")

    # --- GET /value, /orders/{number}, /helped/{number}, /unasked, /same, /stream, /kept ----------

    async def value(self, conn: AsyncConnection[Any]) -> str:
        """GET /value: what a query says."""
        row = await (await conn.execute("select 1")).fetchone()
        return str(row)

    async def order(self, conn: AsyncConnection[Any]) -> str:
        """GET /orders/{number}: a handler named ``order``, which works until it may go on."""
        await self.go_on.wait()
        return await self.value(conn)

    async def helped(self) -> str:
        """GET /helped/{number}: a handler that asks for no connection, and calls what does."""
        self.asked += 1
        if self.asked == 1:
            return await self.help()
        if self.asked == 2:
            return (await asyncio.gather(self.help()))[0]
        async with asyncio.TaskGroup() as group:
            child = group.create_task(self.help())
        return child.result()

    async def help(self) -> str:
        """Ask the manager for a connection, whoever is helped with it."""
        async with self.db.connection() as conn:
            return await self.order(conn)

    def unasked(self) -> str:
        """GET /unasked: a handler that asks for no connection; how many are in use."""
        return str(self.db.snapshot().in_use)

    def same(self, first: AsyncConnection[Any], second: AsyncConnection[Any]) -> str:
        """GET /same: a handler and what it calls ask for the connection of the same request."""
        return f"{first is second}, {self.db.snapshot().in_use} in use"

    async def stream(self, pool: PoolManager[Any]) -> AsyncIterator[str]:
        """GET /stream: a body that takes a connection for each piece, from the manager."""
        for n in range(3):
            assert self.db.snapshot().in_use == 0
            yield f"{await pool.fetchval('select %s::int', (n,))}\n"

    async def kept(self, conn: AsyncConnection[Any]) -> AsyncIterator[str]:
        """GET /kept: a body that goes on with the connection of the request."""
        yield f"{self.db.snapshot().in_use} in use\n"
        try:
            await conn.execute("select 1")
        except ReleasedConnectionError as ex:
            self.refused.append(ex)
        yield "end\n"

    # --- POST /items, /raise, /reject, /fail-at-commit: each with ?text= -----------------------

    async def add(self, conn: AsyncConnection[Any], text: str) -> None:
        """Insert *text*. POST /items then answers 200."""
        await conn.execute("insert into items values (%s)", (text,))

    async def add_and_raise(self, conn: AsyncConnection[Any], text: str) -> None:
        """POST /raise: the handler fails after the insert; the framework answers 500."""
        await self.add(conn, text)
        raise RuntimeError("the handler failed")

    async def add_twice(self, conn: AsyncConnection[Any], text: str) -> None:
        """POST /fail-at-commit: the server refuses at the end of the transaction."""
        await self.add(conn, text)
        await self.add(conn, text)

    # POST /reject: add(), then the framework's own way to answer 409 by raising.


class Framework(ABC):
    """How one framework builds, serves and asks for the probe application."""

    name: str
    """Name of the adapter's module."""

    extra: str | None = None
    """What ``pip install "poolkeeper[...]"`` is called; None if the adapter needs nothing."""

    package: str | None = None
    """What is imported of the framework."""

    order: str = "GET /orders/{number}"
    """How the route is written that asks for a connection with ``number``; "" if nobody knows."""

    @abstractmethod
    def build(self, probe: Probe) -> Any:
        """
        Return an application with the routes of the probe, and with its hooks.

        The pool comes from the adapter; ``probe.startup`` and ``probe.shutdown`` are the user's
        own hooks, registered the way that the how-to shows. ``GET /livez`` and ``GET /readyz``
        are the adapter's.
        """

    @asynccontextmanager
    async def served(self, app: Any) -> AsyncIterator[httpx.AsyncClient]:
        """Serve *app* on the running loop, its start-up and shutdown included."""
        async with (
            LifespanManager(app, startup_timeout=20, shutdown_timeout=20) as manager,
            client(manager.app) as http,
        ):
            yield http

    @asynccontextmanager
    async def served_without_startup(self, app: Any) -> AsyncIterator[httpx.AsyncClient]:
        """Serve *app* without its start-up, as test clients do that are not entered."""
        async with client(app) as http:
            yield http


def client(app: Any) -> httpx.AsyncClient:
    """A client of an ASGI application; a request that the application fails is answered 500."""
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    return httpx.AsyncClient(transport=transport, base_url="http://probe", timeout=20)


def all_text(error: BaseException) -> str:
    """What a traceback of *error* says, groups and causes included."""
    parts = [str(error)]
    if isinstance(error, BaseExceptionGroup):
        parts += [all_text(one) for one in error.exceptions]
    for inner in (error.__cause__, error.__context__):
        if inner is not None:
            parts.append(all_text(inner))
    return "\n".join(parts)


class Conformance:
    """The suite. A subclass named ``Test...`` says which *framework* it is for."""

    framework: Framework

    @pytest.fixture
    def store(self, database: str) -> str:
        """A database with the table that the probe writes to."""
        with psycopg.connect(database) as conn:
            conn.execute("create table items (text text unique deferrable initially deferred)")
        return database

    @pytest.fixture
    def db(self, store: str) -> PoolManager[Any]:
        return PoolManager(store, min_size=1, max_size=2, name="orders", timeout=5, open_timeout=5)

    @pytest.fixture
    def probe(self, db: PoolManager[Any]) -> Probe:
        return Probe(db)

    @pytest.fixture
    def serve(self, probe: Probe) -> Callable[[], AbstractAsyncContextManager[httpx.AsyncClient]]:
        app = self.framework.build(probe)
        return lambda: self.framework.served(app)

    @pytest.fixture
    async def http(self, serve: Any) -> AsyncIterator[httpx.AsyncClient]:
        async with serve() as http:
            yield http

    @pytest.fixture
    def items(self, store: str) -> Callable[[], list[str]]:
        def read() -> list[str]:
            with psycopg.connect(store) as conn:
                return [row[0] for row in conn.execute("select text from items order by text")]

        return read

    # --- open and close ---------------------------------------------------------------------

    async def test_the_pool_is_open_while_the_application_serves(
        self, serve: Any, db: PoolManager[Any], probe: Probe
    ) -> None:
        assert db.state == "new"
        async with serve() as http:
            assert db.state == "open"
            assert str(db.pool.opened).startswith(
                f"at tests/adapters/test_{self.framework.name}.py"
            )
            assert probe.loop is asyncio.get_running_loop()
            assert (await http.get("/value")).text == "(1,)"
        assert db.state == "closed"

    async def test_start_up_and_shutdown_code_of_the_user_have_the_pool(
        self, serve: Any, probe: Probe
    ) -> None:
        async with serve():
            assert probe.events == ["startup: 1"]
        assert probe.events == ["startup: 1", "shutdown: 1"]

    async def test_a_hook_that_fails_later_does_not_leave_the_pool_open(
        self, serve: Any, probe: Probe, db: PoolManager[Any]
    ) -> None:
        probe.fail_in_startup = True
        with pytest.raises(BaseException) as failed:
            async with serve():
                pass
        assert "a hook of the application failed" in all_text(failed.value)
        assert probe.events == ["startup: 1"]
        await until(lambda: db.state == "closed")  # by a task, where no hook is told

    @pytest.mark.direct
    async def test_a_pool_that_cannot_be_opened_fails_the_start_with_the_reason(
        self, dsn: str
    ) -> None:
        conninfo = psycopg.conninfo.make_conninfo(dsn, user="nobody_there")
        db = PoolManager(conninfo, min_size=1, name="orders")
        app = self.framework.build(probe := Probe(db))
        with pytest.raises(BaseException) as failed:
            async with self.framework.served(app):
                pass
        assert 'role "nobody_there" does not exist' in all_text(failed.value)
        assert isinstance(failed.value, OpenError) or self.wraps_start_up_errors
        assert probe.events == []
        assert db.state == "closed"

    wraps_start_up_errors = False
    """True where the framework raises an error of its own that quotes ours."""

    async def test_one_manager_serves_several_times_in_a_row(
        self, probe: Probe, db: PoolManager[Any]
    ) -> None:
        for _ in range(3):
            app = self.framework.build(probe)
            async with self.framework.served(app) as http:
                assert (await http.get("/value")).text == "(1,)"
            assert db.state == "closed"

    async def test_a_manager_that_is_open_already_is_left_open(
        self, serve: Any, db: PoolManager[Any]
    ) -> None:
        async with db:
            async with serve() as http:
                assert (await http.get("/value")).text == "(1,)"
            assert db.state == "open"
            assert await db.fetchval("select 1") == 1

    async def test_a_manager_of_another_loop_fails_the_start(self, store: str) -> None:
        db = PoolManager(store, min_size=1, name="orders")
        elsewhere = asyncio.new_event_loop()
        thread = threading.Thread(target=elsewhere.run_forever)
        thread.start()
        try:
            asyncio.run_coroutine_threadsafe(db.open(), elsewhere).result(20)
            app = self.framework.build(Probe(db))
            with pytest.raises(BaseException) as failed:
                async with self.framework.served(app):
                    pass
            assert 'pool "orders" is bound to a different event loop' in all_text(failed.value)
            assert isinstance(failed.value, LoopMismatchError) or self.wraps_start_up_errors
            assert db.state == "open"
        finally:
            asyncio.run_coroutine_threadsafe(db.close(), elsewhere).result(20)
            elsewhere.call_soon_threadsafe(elsewhere.stop)
            thread.join(20)
            elsewhere.close()

    async def test_without_start_up_a_request_is_told_why_there_is_no_pool(
        self, probe: Probe, caplog: pytest.LogCaptureFixture
    ) -> None:
        """The readiness endpoint is where the reason can be read without a traceback."""
        app = self.framework.build(probe)
        async with self.framework.served_without_startup(app) as http:
            assert (await http.get("/value")).status_code == 500
            assert (await http.get("/livez")).status_code == 200
            answer = await http.get("/readyz")
        assert answer.status_code == 503
        assert answer.json()["reason"] == (
            "there is no pool in this application: its start-up has not run"
        )

    # --- the connection of a request ----------------------------------------------------------

    async def test_what_a_request_wrote_is_committed(self, http: Any, items: Any) -> None:
        assert (await http.post("/items?text=a")).status_code == 200
        assert items() == ["a"]

    async def test_a_handler_that_raises_is_rolled_back(
        self, http: Any, items: Any, db: PoolManager[Any]
    ) -> None:
        assert (await http.post("/raise?text=a")).status_code == 500
        assert items() == []
        assert db.snapshot().in_use == 0

    async def test_an_error_answer_that_is_raised_is_rolled_back(
        self, http: Any, items: Any
    ) -> None:
        assert (await http.post("/reject?text=a")).status_code == 409
        assert items() == []

    async def test_a_commit_that_fails_is_not_answered_with_success(
        self, http: Any, items: Any, db: PoolManager[Any]
    ) -> None:
        """So the commit comes before the response."""
        assert (await http.post("/fail-at-commit?text=a")).status_code == 500
        assert items() == []
        assert db.snapshot().in_use == 0

    async def test_no_connection_is_taken_before_it_is_asked_for(
        self, http: Any, db: PoolManager[Any]
    ) -> None:
        assert (await http.get("/unasked")).text == "0"

    async def test_all_who_ask_in_one_request_get_one_connection(self, http: Any) -> None:
        assert (await http.get("/same")).text == "True, 1 in use"

    async def test_requests_at_once_get_a_connection_each(self, http: Any) -> None:
        answers = await asyncio.gather(*(http.post(f"/items?text={n}") for n in range(20)))
        assert {answer.status_code for answer in answers} == {200}

    async def test_a_client_that_goes_away_while_its_request_waits_costs_nothing(
        self, http: Any, db: PoolManager[Any]
    ) -> None:
        async with db.connection(), db.connection():
            waiting = [asyncio.create_task(http.get("/value")) for _ in range(5)]
            await until(lambda: db.snapshot().waiting == 5)
            for task in waiting:
                task.cancel()
            await asyncio.wait(waiting)
            await until(lambda: db.snapshot().waiting == 0 or not self.sees_disconnects)
        assert (await http.get("/value")).text == "(1,)"
        await until(lambda: db.snapshot().in_use == 0)
        assert db.snapshot().total == 2

    sees_disconnects = True
    """False where a handler goes on when its client has gone."""

    async def test_who_holds_and_who_waits_are_named_as_people_think_of_them(
        self, http: Any, db: PoolManager[Any], probe: Probe
    ) -> None:
        """By method, route and function; nothing of what this client has asked for."""
        requests = [asyncio.create_task(http.get(f"/orders/47{n}?for=me")) for n in range(3)]
        await until(lambda: db.snapshot().in_use == 2 and db.snapshot().waiting == 1)
        with pytest.raises(AcquireTimeout) as caught:
            async with db.connection(timeout=0.1):
                pass
        probe.go_on.set()
        assert [(await request).text for request in requests] == ["(1,)"] * 3
        assert caught.value.diagnosis is not None
        snapshot = caught.value.diagnosis.snapshot
        file = f"tests/adapters/test_{self.framework.name}.py"
        askers = {row.asker for row in (*snapshot.checkouts, *snapshot.waiters)}
        assert len(snapshot.waiters) == 1
        (asker,) = askers
        found = re.fullmatch(rf"(?:(.+), )?{re.escape(file)}:(\d+) in (?:Order\.)?(\w+)", asker)
        assert found is not None, asker
        assert (found[1] or "") == self.framework.order
        assert found[3] in ("order", "on_get", "serve")
        line = Path(file).read_text().splitlines()[int(found[2]) - 1].strip()
        assert line.startswith(("async def order(", "async with connection_from("))
        assert f" at {asker}, held " in str(caught.value)

    async def test_what_a_handler_calls_that_asks_the_manager_is_named_by_its_route_too(
        self, http: Any, db: PoolManager[Any], probe: Probe
    ) -> None:
        """Whether it holds or waits; in a task that the handler makes as well."""
        requests = [asyncio.create_task(http.get(f"/helped/47{n}?for=me")) for n in range(3)]
        await until(lambda: db.snapshot().in_use == 2 and db.snapshot().waiting == 1)
        snapshot = db.diagnose().snapshot
        probe.go_on.set()
        assert [(await request).text for request in requests] == ["(1,)"] * 3
        line = Probe.help.__code__.co_firstlineno + 2
        place = f"tests/adapters/conformance.py:{line} in Probe.help"
        route = self.framework.order.replace("orders", "helped")
        rows = (*snapshot.checkouts, *snapshot.waiters)
        assert [row.asker for row in rows] == [f"{route}, {place}" if route else place] * 3

    async def test_where_no_connection_can_be_had_the_answer_is_503_and_when_to_come_again(
        self, store: str
    ) -> None:
        """In time as well as when the line is full, and without a word of why."""
        db = PoolManager(store, min_size=1, max_size=1, name="orders", timeout=0.5, max_waiting=1)
        async with self.framework.served(self.framework.build(Probe(db))) as http:
            async with db.connection():
                answers = await asyncio.gather(*(http.get("/value") for _ in range(3)))
            assert db.snapshot().load.gave_up == 1  # the others were not let into the line
            assert (await http.get("/value")).text == "(1,)"
        for answer in answers:
            assert answer.status_code == 503
            assert answer.headers["retry-after"] == "5"
            assert answer.headers["cache-control"] == "no-store"
            assert answer.headers["content-type"].startswith("application/json")
            assert answer.json() == {"detail": "Service Unavailable"}

    # --- streams --------------------------------------------------------------------------------

    async def test_a_stream_takes_a_connection_for_each_piece_of_work(self, http: Any) -> None:
        assert (await http.get("/stream")).text == "0\n1\n2\n"

    async def test_the_connection_of_the_request_cannot_be_kept_by_a_stream(
        self, http: Any, probe: Probe
    ) -> None:
        assert (await http.get("/kept")).text == "0 in use\nend\n"
        assert "was given back" in str(probe.refused[0])

    # --- health ---------------------------------------------------------------------------------

    async def test_a_pool_that_works_is_ready(self, http: Any) -> None:
        assert (await http.get("/livez")).json() == {"status": "alive"}
        answer = await http.get("/readyz")
        assert answer.status_code == 200
        assert answer.headers["content-type"].startswith("application/json")
        assert answer.headers["cache-control"] == "no-store"
        assert answer.json()["status"] == "ready"
        assert answer.json()["pool"]["name"] == "orders"

    async def test_health_answers_at_once_while_the_pool_is_exhausted(
        self, http: Any, db: PoolManager[Any]
    ) -> None:
        async with db.connection(), db.connection():
            waiting = asyncio.create_task(http.get("/value"))
            await until(lambda: db.snapshot().waiting == 1)
            begin = asyncio.get_running_loop().time()
            assert (await http.get("/livez")).status_code == 200
            answer = await http.get("/readyz")
            assert asyncio.get_running_loop().time() - begin < 4.5  # a request waits for 5 s
            assert answer.status_code == 200
            assert answer.json()["pool"] | {"cause": ""} == {
                "name": "orders", "total": 2, "in_use": 2, "idle": 0, "max": 2, "waiting": 1,
                "cause": "",
            }  # fmt: skip
        assert (await waiting).text == "(1,)"

    async def test_a_server_that_is_away_is_not_ready_but_the_process_is_alive(
        self, proxy: Any
    ) -> None:
        db = PoolManager(proxy.dsn, min_size=1, max_size=1, name="orders")
        app = self.framework.build(Probe(db))
        async with self.framework.served(app) as http:
            proxy.refuse = True
            proxy.cut()
            answer = await http.get("/readyz")
            assert answer.status_code == 503
            assert answer.json()["status"] == "not ready"
            # In kinds: anybody may ask.
            assert answer.json()["reason"] == (
                "no connection can be made: nobody answers at this host and port"
            )
            assert (await http.get("/livez")).status_code == 200
            proxy.refuse = False
            await until(lambda: db.snapshot().idle == 1)
            assert (await http.get("/readyz")).status_code == 200

    # --- the module -------------------------------------------------------------------------------

    def test_without_the_framework_the_extra_is_named(self) -> None:
        if self.framework.package is None:
            pytest.fail("needs no framework: override this test")
        program = f"""
import sys
sys.modules[{self.framework.package!r}] = None  # as if it were not there
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == {self.framework.package!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Finder())
del sys.modules[{self.framework.package!r}]
try:
    import poolkeeper.adapters.{self.framework.name}
except ImportError as ex:
    print(type(ex).__name__)
    print(ex)
"""
        ended = subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, timeout=60
        )
        assert ended.stdout.splitlines() == [
            "MissingDependencyError",
            f"cannot import poolkeeper.adapters.{self.framework.name}:"
            f" {self.framework.package} is not installed",
            f'HINT:  Install it with: pip install "poolkeeper[{self.framework.extra}]"',
        ], ended.stderr
