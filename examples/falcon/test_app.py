from collections.abc import AsyncIterator

import pytest
from falcon.testing import ASGIConductor

from examples.falcon.app import app


@pytest.fixture
async def client() -> AsyncIterator[ASGIConductor]:
    async with ASGIConductor(app) as client:  # entered: the pool is open inside, closed after
        yield client


async def test_a_transfer_moves_money(client: ASGIConductor) -> None:
    answer = await client.post("/transfers", json={"source": 1, "target": 2, "amount": 10})
    assert (answer.status_code, answer.json) == (201, {"id": 1})
    assert (await client.get("/accounts/1")).json == {"id": 1, "balance": 990}
    assert (await client.get("/accounts/2")).json == {"id": 2, "balance": 1010}
    assert (await client.get("/transfers")).text == "1: 1 to 2, 10\n"


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
    client: ASGIConductor, body: dict[str, int], status: int
) -> None:
    assert (await client.post("/transfers", json=body)).status_code == status
    assert (await client.get("/accounts/1")).json == {"id": 1, "balance": 1000}
    assert (await client.get("/transfers")).text == ""


async def test_it_is_alive_and_ready(client: ASGIConductor) -> None:
    assert (await client.get("/livez")).status_code == 200
    assert (await client.get("/readyz")).json["status"] == "ready"
