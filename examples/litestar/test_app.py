from collections.abc import Iterator
from typing import Any

import pytest
from litestar.testing import TestClient

from examples.litestar.app import app


@pytest.fixture
def client() -> Iterator[TestClient[Any]]:
    with TestClient(app) as client:  # entered: the pool is open inside, and closed after
        yield client


def test_a_transfer_moves_money(client: TestClient[Any]) -> None:
    answer = client.post("/transfers", json={"source": 1, "target": 2, "amount": 10})
    assert (answer.status_code, answer.json()) == (201, {"id": 1})
    assert client.get("/accounts/1").json() == {"id": 1, "balance": 990}
    assert client.get("/accounts/2").json() == {"id": 2, "balance": 1010}
    assert client.get("/transfers").text == "1: 1 to 2, 10\n"


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ({"source": 1, "target": 99, "amount": 10}, 404),  # 10 have been taken from 1 by then
        ({"source": 1, "target": 2, "amount": 5000}, 409),
        ({"source": 1, "target": 2, "amount": -1}, 400),
        ({"source": 1}, 400),
    ],
)
def test_a_transfer_that_cannot_be_made_changes_nothing(
    client: TestClient[Any], body: dict[str, int], status: int
) -> None:
    assert client.post("/transfers", json=body).status_code == status
    assert client.get("/accounts/1").json() == {"id": 1, "balance": 1000}
    assert client.get("/transfers").text == ""


def test_it_is_alive_and_ready(client: TestClient[Any]) -> None:
    assert client.get("/livez").status_code == 200
    assert client.get("/readyz").json()["status"] == "ready"
