from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from examples.grpc.app import protos, serve, services


@pytest.fixture
async def channel() -> AsyncIterator[grpc.aio.Channel]:
    # In the loop of the test: the pool is open inside, and closed after.
    async with (
        serve("127.0.0.1:0") as port,
        grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel,
    ):
        yield channel


@pytest.fixture
def client(channel: grpc.aio.Channel) -> Any:
    return services.LedgerStub(channel)


async def balance(client: Any, account: int) -> int:
    answer = await client.GetAccount(protos.AccountRequest(id=account))
    return int(answer.balance)


async def statement(client: Any) -> list[str]:
    return [line.text async for line in client.ListTransfers(protos.ListRequest())]


async def test_a_transfer_moves_money(client: Any) -> None:
    receipt = await client.MakeTransfer(protos.Transfer(source=1, target=2, amount=10))
    assert receipt.id == 1
    assert (await balance(client, 1), await balance(client, 2)) == (990, 1010)
    assert await statement(client) == ["1: 1 to 2, 10\n"]


@pytest.mark.parametrize(
    ("wanted", "status"),
    [
        # 10 have been taken from 1 by then
        (protos.Transfer(source=1, target=99, amount=10), grpc.StatusCode.NOT_FOUND),
        (protos.Transfer(source=1, target=2, amount=5000), grpc.StatusCode.FAILED_PRECONDITION),
        (protos.Transfer(source=1, target=2, amount=-1), grpc.StatusCode.INVALID_ARGUMENT),
    ],
)
async def test_a_transfer_that_cannot_be_made_changes_nothing(
    client: Any, wanted: Any, status: grpc.StatusCode
) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await client.MakeTransfer(wanted)
    assert refused.value.code() is status
    assert await balance(client, 1) == 1000
    assert await statement(client) == []


async def test_it_is_ready(channel: grpc.aio.Channel) -> None:
    answer = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
    assert answer.status == health_pb2.HealthCheckResponse.SERVING
