import asyncio
from collections.abc import AsyncIterator, Iterator
from typing import Any

import httpx
import pytest
from asgi_lifespan import LifespanManager
from django.test import AsyncClient, Client
from django.test.utils import setup_test_environment, teardown_test_environment

from examples import ledger
from examples.django.app import app
from examples.django.db import db
from poolkeeper import LoopMismatchError


@pytest.fixture(autouse=True, scope="module")
def environment() -> Iterator[None]:
    setup_test_environment()  # as "manage.py test" and pytest-django do
    yield
    teardown_test_environment()


@pytest.fixture
async def client() -> AsyncIterator[AsyncClient]:
    # Django's client goes past the application in app.py, so the test opens the pool.
    async with db:
        await ledger.prepare(db)
        yield AsyncClient()


async def text(response: Any) -> str:
    return b"".join([part async for part in response.streaming_content]).decode()


async def post(client: AsyncClient, body: Any) -> Any:
    return await client.post("/transfers", body, content_type="application/json")


async def test_a_transfer_moves_money(client: AsyncClient) -> None:
    answer = await post(client, {"source": 1, "target": 2, "amount": 10})
    assert (answer.status_code, answer.json()) == (201, {"id": 1})
    assert (await client.get("/accounts/1")).json() == {"id": 1, "balance": 990}
    assert (await client.get("/accounts/2")).json() == {"id": 2, "balance": 1010}
    assert await text(await client.get("/transfers")) == "1: 1 to 2, 10\n"


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ({"source": 1, "target": 99, "amount": 10}, 404),  # 10 have been taken from 1 by then
        ({"source": 1, "target": 2, "amount": 5000}, 409),
        ({"source": 1, "target": 2, "amount": -1}, 422),
        ({"source": 1}, 422),
        ("{", 422),
    ],
)
async def test_a_transfer_that_cannot_be_made_changes_nothing(
    client: AsyncClient, body: Any, status: int
) -> None:
    assert (await post(client, body)).status_code == status
    assert (await client.get("/accounts/1")).json() == {"id": 1, "balance": 1000}
    assert await text(await client.get("/transfers")) == ""


async def test_the_application_as_it_is_served_opens_the_pool_and_is_ready() -> None:
    async with LifespanManager(app) as running:
        transport = httpx.ASGITransport(running.app)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            assert (await client.get("/livez")).status_code == 200
            assert (await client.get("/readyz")).json()["status"] == "ready"
            assert (await client.get("/accounts/1")).json() == {"id": 1, "balance": 1000}
    assert db.state == "closed"


async def test_the_synchronous_client_runs_views_on_a_loop_of_its_own(client: AsyncClient) -> None:
    with pytest.raises(LoopMismatchError, match='pool "ledger" is bound to a different event loop'):
        await asyncio.to_thread(Client().get, "/accounts/1")
