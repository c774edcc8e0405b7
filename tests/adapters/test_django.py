"""Django under ASGI, with the adapter for plain ASGI around it."""

from __future__ import annotations

import asyncio
import logging
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, ClassVar

import django
import httpx
import psycopg
import pytest
from asgi_lifespan import LifespanManager
from asgiref.sync import async_to_sync, iscoroutinefunction, markcoroutinefunction
from django.core.asgi import get_asgi_application
from django.core.wsgi import get_wsgi_application
from django.http import HttpRequest, HttpResponse, StreamingHttpResponse
from django.test import AsyncClient, Client
from django.test.utils import override_settings, setup_test_environment, teardown_test_environment
from django.urls import path
from typing_extensions import override

from poolkeeper import LoopMismatchError, NotOpenError, PoolManager
from poolkeeper.adapters.asgi import LifespanMiddleware, connection_from, pool_from
from tests.support.waiting import until

from .conformance import Conformance, Framework, Probe, client
from .servers import SERVERS, Command, Served, _free_port

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "examples.django.settings")
django.setup()


class Site:
    """What the views below work with: Django finds them by the name of this module."""

    probe: Probe


@pytest.fixture(autouse=True)
def environment() -> Iterator[None]:
    """As "manage.py test" and pytest-django make it, with the URLs of this module."""
    setup_test_environment()
    with override_settings(
        ROOT_URLCONF=__name__,
        ALLOWED_HOSTS=["probe", "testserver"],
        MIDDLEWARE=[
            "django.middleware.common.CommonMiddleware",
            f"{__name__}.ConflictMiddleware",
            "examples.django.middleware.Exhausted",
        ],
    ):
        yield
    teardown_test_environment()


async def value(request: HttpRequest) -> HttpResponse:
    async with connection_from(request) as conn:
        return HttpResponse(await Site.probe.value(conn))


async def order(request: HttpRequest, number: int) -> HttpResponse:
    async with connection_from(request) as conn:
        return HttpResponse(await Site.probe.order(conn))


async def helped(request: HttpRequest, number: int) -> HttpResponse:
    return HttpResponse(await Site.probe.helped())


async def unasked(request: HttpRequest) -> HttpResponse:
    return HttpResponse(Site.probe.unasked())


async def same(request: HttpRequest) -> HttpResponse:
    async with connection_from(request) as first, connection_from(request) as second:
        return HttpResponse(Site.probe.same(first, second))


async def stream(request: HttpRequest) -> StreamingHttpResponse:
    return StreamingHttpResponse(Site.probe.stream(pool_from(request)))


async def kept(request: HttpRequest) -> StreamingHttpResponse:
    async with connection_from(request) as conn:
        return StreamingHttpResponse(Site.probe.kept(conn))


async def items(request: HttpRequest) -> HttpResponse:
    async with connection_from(request) as conn:
        await Site.probe.add(conn, request.GET["text"])
    return HttpResponse("ok")


async def fail(request: HttpRequest) -> HttpResponse:
    async with connection_from(request) as conn:
        await Site.probe.add_and_raise(conn, request.GET["text"])
    return HttpResponse("ok")


async def reject(request: HttpRequest) -> HttpResponse:
    async with connection_from(request) as conn:
        await Site.probe.add(conn, request.GET["text"])
        raise Conflict


async def fail_at_commit(request: HttpRequest) -> HttpResponse:
    async with connection_from(request) as conn:
        await Site.probe.add_twice(conn, request.GET["text"])
    return HttpResponse("ok")


async def by_manager(request: HttpRequest) -> HttpResponse:
    """A view that does not ask the request: the manager is a global of its module."""
    return HttpResponse(str(await Site.probe.db.fetchval("select 1")))


def hopping(request: HttpRequest) -> HttpResponse:
    """A synchronous view that hands its query to the loop that serves."""
    return async_to_sync(value)(request)


def staying(request: HttpRequest) -> HttpResponse:
    """A synchronous view that makes an event loop of its own for a query."""
    return asyncio.run(value(request))


urlpatterns = [
    path("value", value),
    path("orders/<int:number>", order),
    path("helped/<int:number>", helped),
    path("unasked", unasked),
    path("same", same),
    path("stream", stream),
    path("kept", kept),
    path("items", items),
    path("raise", fail),
    path("reject", reject),
    path("fail-at-commit", fail_at_commit),
    path("by-manager", by_manager),
    path("hopping", hopping),
    path("staying", staying),
]


class Conflict(Exception):
    """What the probe application answers with 409; Django has no exception for that."""


class ConflictMiddleware:
    """Django's way to answer an exception of one's own."""

    async_capable = True

    def __init__(self, get_response: Any) -> None:
        self.get_response = get_response
        if iscoroutinefunction(get_response):
            markcoroutinefunction(self)

    def __call__(self, request: HttpRequest) -> Any:
        return self.get_response(request)

    def process_exception(self, request: HttpRequest, ex: Exception) -> HttpResponse | None:
        return HttpResponse("no", status=409) if isinstance(ex, Conflict) else None


class OnDjango(Framework):
    name = "django"
    order = "GET /orders/<int:number>"

    def build(self, probe: Probe) -> Any:
        @asynccontextmanager
        async def own(app: object) -> AsyncIterator[None]:
            await probe.startup()
            yield
            await probe.shutdown()

        Site.probe = probe
        application = get_asgi_application()
        return LifespanMiddleware(application, probe.db, own, livez="/livez", readyz="/readyz")

    @asynccontextmanager
    async def served(self, app: Any) -> AsyncIterator[httpx.AsyncClient]:
        async with super().served(Disconnects(app)) as http:
            yield http


class Disconnects:
    """
    Tells the application when a client goes away, as servers do.

    The client of the suite cancels the application instead. Django 5.2 does not expect that: the
    view goes on by itself.
    """

    def __init__(self, app: Any) -> None:
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        gone = asyncio.Event()

        async def receive_or_end() -> Any:
            waiting = [asyncio.ensure_future(receive()), asyncio.ensure_future(gone.wait())]
            try:
                await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
                return {"type": "http.disconnect"} if gone.is_set() else waiting[0].result()
            finally:
                for one in waiting:
                    one.cancel()

        serving = asyncio.ensure_future(self._app(scope, receive_or_end, send))
        try:
            await asyncio.shield(serving)
        except asyncio.CancelledError:
            gone.set()
            await serving
            raise


class TestDjango(Conformance):
    framework = OnDjango()

    @override
    def test_without_the_framework_the_extra_is_named(self) -> None:
        """The adapter does not import Django: Django imports the application around it."""


def daphne(app: str, port: int) -> list[str]:
    return ["-m", "daphne", "--bind=127.0.0.1", f"--port={port}", app]


class TestDjangoServed(Served):
    example = "django"
    servers: ClassVar[dict[str, Command]] = {**SERVERS, "daphne": daphne}
    starts_without_pool = frozenset({"daphne"})
    known_to_drop = frozenset({"daphne"})


DROPPED = """
import asyncio

async def app(scope, receive, send):
    try:
        if scope["path"] == "/slow":
            print("accepted", flush=True)
            await asyncio.sleep(5)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"ok"})
    except asyncio.CancelledError:
        print("cancelled", flush=True)
        raise
"""


async def test_daphne_drops_what_it_has_accepted_whatever_the_application(tmp_path: Path) -> None:
    """Without which it would not be excused above: this application has no pool, and no Django."""
    (tmp_path / "bare.py").write_text(DROPPED)
    port = _free_port()
    process = subprocess.Popen(
        [sys.executable, *daphne("bare:app", port)],
        cwd=tmp_path,
        stdout=(log := (tmp_path / "log").open("w+")),
        stderr=subprocess.STDOUT,
    )
    try:
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=30) as http:
            await until(lambda: "Listening on" in (tmp_path / "log").read_text(), 60)
            slow = asyncio.create_task(http.get("/slow"))
            await until(lambda: "accepted" in (tmp_path / "log").read_text())
            process.terminate()
            with pytest.raises(httpx.RemoteProtocolError):
                await slow
        await until(lambda: process.poll() is not None)
        assert "cancelled" in (tmp_path / "log").read_text()
    finally:
        process.kill()
        process.wait()
        log.close()


# --- test clients, and views that are no coroutines ----------------------------------------------


@pytest.fixture
async def db(database: str) -> AsyncIterator[PoolManager[Any]]:
    manager = PoolManager(database, min_size=1, max_size=2, name="orders", timeout=5)
    Site.probe = Probe(manager)
    yield manager
    await manager.close()


def application(db: PoolManager[Any], **arguments: Any) -> Any:
    return LifespanMiddleware(get_asgi_application(), db, **arguments)


async def test_the_async_client_needs_the_pool_open_and_a_view_that_asks_the_manager(
    db: PoolManager[Any],
) -> None:
    async with db:
        assert (await AsyncClient().get("/by-manager")).content == b"1"
        with pytest.raises(NotOpenError, match="AsyncClient goes past the middleware"):
            await AsyncClient().get("/value")
    with pytest.raises(psycopg.OperationalError, match='pool "orders" is closed'):
        await AsyncClient().get("/by-manager")


async def test_the_async_client_can_hand_the_state_to_views_that_ask_the_request(
    db: PoolManager[Any],
) -> None:
    class PoolClient(AsyncClient):
        async def request(self, **request: Any) -> Any:
            return await super().request(**request, state={"poolkeeper": db})

    async with db:
        assert (await PoolClient().get("/value")).content == b"(1,)"


def test_the_sync_client_is_told_that_its_loop_does_not_last(db: PoolManager[Any]) -> None:
    with pytest.raises(NotOpenError, match=r"did not come through ASGI.*AsyncClient"):
        Client().get("/value")
    with pytest.raises(NotOpenError, match='pool "orders" is not open'):
        Client().get("/by-manager")


async def test_the_sync_client_is_told_that_the_pool_belongs_to_the_loop_of_the_test(
    db: PoolManager[Any],
) -> None:
    async with db:
        with pytest.raises(LoopMismatchError, match="bound to a different event loop"):
            await asyncio.to_thread(Client().get, "/by-manager")


def test_wsgi_is_told_that_its_loop_does_not_last(
    db: PoolManager[Any], caplog: pytest.LogCaptureFixture
) -> None:
    transport = httpx.WSGITransport(get_wsgi_application(), raise_app_exceptions=False)
    with httpx.Client(transport=transport, base_url="http://probe") as http:
        assert http.get("/value").status_code == 500
    (error,) = (record.exc_info[1] for record in caplog.records if record.exc_info)
    assert isinstance(error, NotOpenError)
    assert "did not come through ASGI" in str(error)


async def test_a_synchronous_view_may_hand_its_query_to_the_loop_that_serves(
    db: PoolManager[Any],
) -> None:
    app = application(db)
    async with LifespanManager(app) as running, client(running.app) as http:
        assert (await http.get("/hopping")).text == "(1,)"


async def test_a_synchronous_view_with_a_loop_of_its_own_is_told_that_it_is_another(
    db: PoolManager[Any], caplog: pytest.LogCaptureFixture
) -> None:
    app = application(db)
    async with LifespanManager(app) as running, client(running.app) as http:
        assert (await http.get("/staying")).status_code == 500
    (error,) = (record.exc_info[1] for record in caplog.records if record.exc_info)
    assert isinstance(error, LoopMismatchError)


# --- around Django -------------------------------------------------------------------------------


async def test_health_is_answered_before_django_looks_at_the_host(db: PoolManager[Any]) -> None:
    """Probes come by the address of a container, which is not in ALLOWED_HOSTS."""
    app = application(db, livez="/livez", readyz="/readyz")
    async with LifespanManager(app) as running, client(running.app) as http:
        host = {"host": "10.0.0.7"}
        assert (await http.get("/value", headers=host)).status_code == 400
        assert (await http.get("/livez", headers=host)).status_code == 200
        assert (await http.get("/readyz", headers=host)).status_code == 200


async def test_that_django_knows_no_lifespan_is_no_warning(
    db: PoolManager[Any], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "poolkeeper")
    async with LifespanManager(application(db)):
        pass
    assert [(record.levelname, record.getMessage()) for record in caplog.records] == [
        (
            "INFO",
            "the application takes no part in the ASGI lifespan: ValueError: Django can only"
            " handle ASGI/HTTP connections, not lifespan.",
        )
    ]


async def test_below_a_path_django_and_health_are_both_found(db: PoolManager[Any]) -> None:
    app = application(db, livez="/livez")

    async def below(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            scope = {**scope, "root_path": "/shop"}
        await app(scope, receive, send)

    async with LifespanManager(below) as running, client(running.app) as http:
        assert (await http.get("/shop/value")).text == "(1,)"
        assert (await http.get("/shop/livez")).status_code == 200
        assert (await http.get("/livez")).status_code == 200
