from collections.abc import AsyncIterator

import pytest
from blacksheep import JSONContent
from blacksheep.testing import TestClient

from examples.blacksheep.app import app


@pytest.fixture
async def client() -> AsyncIterator[TestClient]:
    await app.start()  # the pool is open from here on
    yield TestClient(app)
    await app.stop()


async def test_a_transfer_moves_money(client: TestClient) -> None:
    content = JSONContent({"source": 1, "target": 2, "amount": 10})
    answer = await client.post("/transfers", content=content)
    assert (answer.status, await answer.json()) == (201, {"id": 1})
    assert await (await client.get("/accounts/1")).json() == {"id": 1, "balance": 990}
    assert await (await client.get("/accounts/2")).json() == {"id": 2, "balance": 1010}
    assert await (await client.get("/transfers")).text() == "1: 1 to 2, 10\n"


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ({"source": 1, "target": 99, "amount": 10}, 404),  # 10 have been taken from 1 by then
        ({"source": 1, "target": 2, "amount": 5000}, 409),
        ({"source": 1, "target": 2, "amount": -1}, 422),
        ({"source": 1}, 400),
    ],
)
async def test_a_transfer_that_cannot_be_made_changes_nothing(
    client: TestClient, body: dict[str, int], status: int
) -> None:
    assert (await client.post("/transfers", content=JSONContent(body))).status == status
    assert await (await client.get("/accounts/1")).json() == {"id": 1, "balance": 1000}
    assert await (await client.get("/transfers")).text() == ""


async def test_it_is_alive_and_ready(client: TestClient) -> None:
    assert (await client.get("/livez")).status == 200
    assert (await (await client.get("/readyz")).json())["status"] == "ready"
