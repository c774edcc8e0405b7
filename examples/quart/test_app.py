from collections.abc import AsyncIterator

import pytest
from quart.typing import TestClientProtocol as Client

from examples.quart.app import app


@pytest.fixture
async def client() -> AsyncIterator[Client]:
    async with app.test_app() as started:  # the pool is open inside, and closed after
        yield started.test_client()


async def test_a_transfer_moves_money(client: Client) -> None:
    answer = await client.post("/transfers", json={"source": 1, "target": 2, "amount": 10})
    assert (answer.status_code, await answer.get_json()) == (201, {"id": 1})
    assert await (await client.get("/accounts/1")).get_json() == {"id": 1, "balance": 990}
    assert await (await client.get("/accounts/2")).get_json() == {"id": 2, "balance": 1010}
    assert await (await client.get("/transfers")).get_data(as_text=True) == "1: 1 to 2, 10\n"


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
    assert (await client.post("/transfers", json=body)).status_code == status
    assert await (await client.get("/accounts/1")).get_json() == {"id": 1, "balance": 1000}
    assert await (await client.get("/transfers")).get_data(as_text=True) == ""


async def test_it_is_alive_and_ready(client: Client) -> None:
    assert (await client.get("/livez")).status_code == 200
    assert (await (await client.get("/readyz")).get_json())["status"] == "ready"
