"""The page: what it answers, alone and mounted, and that it ends when nobody reads any more."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Callable, MutableMapping
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette
from starlette.routing import Mount

from poolkeeper import PoolManager, events
from poolkeeper.live import _observer, _page, page

MakeManager = Callable[..., PoolManager[Any]]

Message = MutableMapping[str, Any]


def client(app: Any) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test")


@pytest.mark.parametrize("mounted", [False, True], ids=["alone", "mounted"])
async def test_it_answers_where_it_is(make_manager: MakeManager, mounted: bool) -> None:
    db = make_manager(min_size=1, max_size=3, name="orders")
    app: Any = page(db)
    at = "/pool" if mounted else ""
    app = Starlette(routes=[Mount("/pool", app)]) if mounted else app
    async with db, client(app) as http:
        html = await http.get(f"{at}/")
        assert html.status_code == 200
        assert html.headers["content-type"] == "text/html; charset=utf-8"
        assert "default-src 'none'" in html.headers["content-security-policy"]
        async with db.connection():
            (state,) = (await http.get(f"{at}/state")).json()
        assert state["name"] == "orders"
        assert state["in_use"] == 1
        assert [row["asker"].rpartition(" in ")[2] for row in state["checkouts"]] == [
            "test_it_answers_where_it_is"
        ]
        assert (await http.get(f"{at}/nowhere")).status_code == 404
        refused = await http.post(f"{at}/state")
        assert (refused.status_code, refused.headers["allow"]) == (405, "GET, HEAD")


async def test_without_the_slash_it_sends_there() -> None:
    """Relative addresses in it need the slash."""
    app = page(PoolManager("host=nowhere"))
    for scope, location in (
        ({"path": "/pool", "root_path": "/pool"}, b"pool/"),
        ({"path": "/a/pool", "root_path": "/a/pool"}, b"pool/"),
        ({"path": "", "root_path": "/pool"}, b"/"),
    ):
        sent = await asked(app, {"type": "http", "method": "GET", **scope})
        assert sent[0]["status"] == 307
        assert (b"location", location) in sent[0]["headers"]


def test_it_refers_to_nothing_elsewhere() -> None:
    html = (_page.files("poolkeeper.live") / "page.html").read_text()
    addresses = set(re.findall(r"https?://[^\s\"']+", html))
    assert addresses == {"http://www.w3.org/2000/svg"}
    assert "innerHTML" not in html


async def asked(app: Any, scope: Message, *heard: Message) -> list[Message]:
    """Return what it sends to one who says *heard* and then nothing more."""
    sent: list[Message] = []
    says = list(heard)

    async def receive() -> Message:
        if says:
            return says.pop(0)
        await asyncio.Event().wait()
        raise AssertionError

    async def send(message: Message) -> None:
        sent.append(message)

    await app(scope, receive, send)
    return sent


async def test_it_is_live(make_manager: MakeManager, monkeypatch: pytest.MonkeyPatch) -> None:
    """One state after the other, and an end, for a server that shuts down waits for it."""
    monkeypatch.setattr(_page, "EVERY", 0.01)
    async with make_manager(min_size=1, name="orders") as db:
        app = page(db)
        await db.fetchval("select 1")
        scope = {"type": "http", "method": "GET", "path": "/events"}
        start, *bodies, end = await asked(app, scope, {"type": "http.request"})
    assert (b"content-type", b"text/event-stream") in start["headers"]
    assert len(bodies) == _page.LONGEST
    for body in bodies:
        retry, data = body["body"].decode().strip().split("\n")
        assert retry == "retry: 500"
        (state,) = json.loads(data.removeprefix("data: "))
        assert state["sites"][0]["number"] == 1
        assert state["history"][-1][3] == 1
    assert end == {"type": "http.response.body", "body": b""}


async def test_a_stream_ends_when_its_reader_has_gone(make_manager: MakeManager) -> None:
    app = page(make_manager())
    scope = {"type": "http", "method": "GET", "path": "/events"}
    async with asyncio.timeout(_page.EVERY * _page.LONGEST):
        sent = await asked(app, scope, {"type": "http.disconnect"})
    assert len(sent) == 3  # the start, one state, the end


async def test_it_can_be_served_by_itself() -> None:
    app = page(PoolManager("host=nowhere"))
    steps = [{"type": "lifespan.startup"}, {"type": "lifespan.shutdown"}]
    sent = await asked(app, {"type": "lifespan"}, *steps)
    assert [m["type"] for m in sent] == ["lifespan.startup.complete", "lifespan.shutdown.complete"]
    with pytest.raises(ValueError, match="websocket"):
        await asked(app, {"type": "websocket"})


async def test_nothing_secret_is_told(make_manager: MakeManager) -> None:
    async with make_manager(min_size=1, max_size=1, timeout=0.1) as db:
        app = page(db)
        async with db.connection() as conn:
            await conn.execute("select %s as marker_query", ["marker_parameter"])
            (state,) = json.loads(app._told())
        assert "marker" not in json.dumps(state)


async def test_call_sites_are_bounded(
    make_manager: MakeManager, monkeypatch: pytest.MonkeyPatch
) -> None:

    monkeypatch.setattr(_observer, "MOST_SITES", 2)
    async with make_manager(min_size=1) as db:
        watched = _observer.Observer(db)
        for name in "abcd":
            namespace: dict[str, Any] = {}
            exec(f"async def {name}(db):\n async with db.connection(): pass", namespace)
            await namespace[name](db)
        sites = {site["who"]: site["number"] for site in watched.state()["sites"]}
        watched.stop()
        await db.fetchval("select 1")
        assert watched.state()["sites"][0]["number"] <= 2
    assert len(sites) == 3
    assert sites[_observer.OTHER] == 2


async def test_what_differs_in_its_seconds_only_is_one_error(make_manager: MakeManager) -> None:
    async with make_manager(min_size=1, name="orders") as db:
        watched = _observer.Observer(db)
        for seconds in (0.1, 0.3):
            watched._hear(events.Stalled(pool="orders", seconds=seconds, stalled_by=""))
        for reason in ("no\nDETAIL: x", "never"):
            watched._hear(
                events.ConnectFailed(
                    pool="orders", seconds=1, reason=reason, kind="", permanent=False,
                    attempts_failed=1,
                )
            )  # fmt: skip
        told = [[*error[1:]] for error in watched.state()["errors"]]
        watched.stop()
    assert told == [
        [2, "the event loop stood still", "for 0.3 s"],
        [1, "could not connect", "no"],
        [1, "could not connect", "never"],
    ]
