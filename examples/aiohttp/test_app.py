from collections.abc import AsyncIterator
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer

from examples.aiohttp.app import make_app

Client = TestClient[web.Request, web.Application]


@pytest.fixture
async def client() -> AsyncIterator[Client]:
    # An application serves on one loop only, so each test makes its own.
    async with TestClient(TestServer(make_app())) as client:
        yield client


async def get(client: Client, path: str) -> Any:
    async with client.get(path) as answer:
        return await answer.json()


async def statement(client: Client) -> str:
    async with client.get("/transfers") as answer:
        return await answer.text()


async def test_a_transfer_moves_money(client: Client) -> None:
    body = {"source": 1, "target": 2, "amount": 10}
    async with client.post("/transfers", json=body) as answer:
        assert (answer.status, await answer.json()) == (201, {"id": 1})
    assert await get(client, "/accounts/1") == {"id": 1, "balance": 990}
    assert await get(client, "/accounts/2") == {"id": 2, "balance": 1010}
    assert await statement(client) == "1: 1 to 2, 10\n"


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ({"source": 1, "target": 99, "amount": 10}, 404),  # 10 have been taken from 1 by then
        ({"source": 1, "target": 2, "amount": 5000}, 409),
        ({"source": 1, "target": 2, "amount": -1}, 422),
        ({"source": 1}, 422),
    ],
)
async def test_a_transfer_that_cannot_be_made_changes_nothing(
    client: Client, body: dict[str, int], status: int
) -> None:
    async with client.post("/transfers", json=body) as answer:
        assert answer.status == status
    assert await get(client, "/accounts/1") == {"id": 1, "balance": 1000}
    assert await statement(client) == ""


async def test_it_is_alive_and_ready(client: Client) -> None:
    assert await get(client, "/livez") == {"status": "alive"}
    assert (await get(client, "/readyz"))["status"] == "ready"
