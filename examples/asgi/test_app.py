from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from asgi_lifespan import LifespanManager

from examples.asgi.app import app


@pytest.fixture
async def client() -> AsyncIterator[httpx.AsyncClient]:
    # The transport runs no lifespan: the pool is open inside of the manager, and closed after.
    async with LifespanManager(app) as running:
        transport = httpx.ASGITransport(running.app)
        async with httpx.AsyncClient(transport=transport, base_url="http://ledger") as client:
            yield client


async def test_a_transfer_moves_money(client: httpx.AsyncClient) -> None:
    answer = await client.post("/transfers", json={"source": 1, "target": 2, "amount": 10})
    assert (answer.status_code, answer.json()) == (201, {"id": 1})
    assert (await client.get("/accounts/1")).json() == {"id": 1, "balance": 990}
    assert (await client.get("/accounts/2")).json() == {"id": 2, "balance": 1010}
    assert (await client.get("/transfers")).text == "1: 1 to 2, 10\n"


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ({"source": 1, "target": 99, "amount": 10}, 404),  # 10 have been taken from 1 by then
        ({"source": 1, "target": 2, "amount": 5000}, 409),
        ({"source": 1, "target": 2, "amount": -1}, 422),
        ({"source": 1}, 422),
        ("no transfer", 422),
    ],
)
async def test_a_transfer_that_cannot_be_made_changes_nothing(
    client: httpx.AsyncClient, body: Any, status: int
) -> None:
    assert (await client.post("/transfers", json=body)).status_code == status
    assert (await client.get("/accounts/1")).json() == {"id": 1, "balance": 1000}
    assert (await client.get("/transfers")).text == ""


async def test_what_is_no_json_is_refused(client: httpx.AsyncClient) -> None:
    assert (await client.post("/transfers", content="{")).status_code == 422


async def test_there_is_nothing_elsewhere(client: httpx.AsyncClient) -> None:
    assert (await client.get("/accounts/first")).status_code == 404


async def test_it_is_alive_and_ready(client: httpx.AsyncClient) -> None:
    assert (await client.get("/livez")).status_code == 200
    assert (await client.get("/readyz")).json()["status"] == "ready"
