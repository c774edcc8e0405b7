from collections.abc import Iterator

import pytest
from flask.testing import FlaskClient

from examples.flask.app import create_app, portal


@pytest.fixture
def client() -> Iterator[FlaskClient]:
    with portal:  # each test has a database of its own, so a pool of its own
        yield create_app().test_client()


def test_a_transfer_moves_money(client: FlaskClient) -> None:
    answer = client.post("/transfers", json={"source": 1, "target": 2, "amount": 10})
    assert (answer.status_code, answer.get_json()) == (201, {"id": 1})
    assert client.get("/accounts/1").get_json() == {"id": 1, "balance": 990}
    assert client.get("/accounts/2").get_json() == {"id": 2, "balance": 1010}
    assert client.get("/readyz").status_code == 200


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ({"source": 1, "target": 99, "amount": 10}, 404),  # 10 have been taken from 1 by then
        ({"source": 1, "target": 2, "amount": 5000}, 409),
        ({"source": 1}, 422),
    ],
)
def test_a_transfer_that_cannot_be_made_changes_nothing(
    client: FlaskClient, body: dict[str, int], status: int
) -> None:
    assert client.post("/transfers", json=body).status_code == status
    assert client.get("/accounts/1").get_json() == {"id": 1, "balance": 1000}
