import pytest

from examples.sanic.app import app

# Of sanic-testing itself.
pytestmark = pytest.mark.filterwarnings("ignore:websockets.legacy is deprecated:DeprecationWarning")


async def test_a_transfer_moves_money() -> None:
    client = app.asgi_client  # each request opens the pool, and closes it after
    _, answer = await client.post("/transfers", json={"source": 1, "target": 2, "amount": 10})
    assert (answer.status, answer.json) == (201, {"id": 1})
    _, payer = await client.get("/accounts/1")
    assert payer.json == {"id": 1, "balance": 990}
    _, payee = await client.get("/accounts/2")
    assert payee.json == {"id": 2, "balance": 1010}
    _, statement = await client.get("/transfers")
    assert statement.text == "1: 1 to 2, 10\n"


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
    body: dict[str, int], status: int
) -> None:
    _, answer = await app.asgi_client.post("/transfers", json=body)
    assert answer.status == status
    _, payer = await app.asgi_client.get("/accounts/1")
    assert payer.json == {"id": 1, "balance": 1000}
    _, statement = await app.asgi_client.get("/transfers")
    assert statement.text == ""


async def test_it_is_alive_and_ready() -> None:
    _, answer = await app.asgi_client.get("/livez")
    assert answer.status == 200
    _, answer = await app.asgi_client.get("/readyz")
    assert answer.json["status"] == "ready"
