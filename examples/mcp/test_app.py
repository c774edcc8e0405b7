from typing import Any

import pytest
from mcp import Client

from examples.mcp.app import server


async def call(client: Client, tool: str, **arguments: int) -> Any:
    answer = await client.call_tool(tool, arguments)
    assert not answer.is_error, answer.content
    assert answer.structured_content is not None
    return answer.structured_content["result"]


async def test_a_transfer_moves_money() -> None:
    # In memory: the pool is open inside, and closed after. Enter it in the test itself, for a
    # fixture of pytest-asyncio would leave it in another task, which MCP's client refuses.
    async with Client(server) as client:
        assert await call(client, "transfer", source=1, target=2, amount=10) == 1
        assert await call(client, "balance", account=1) == 990
        assert await call(client, "balance", account=2) == 1010
        assert await call(client, "statement") == "1: 1 to 2, 10\n"


@pytest.mark.parametrize(
    ("wanted", "said"),
    [
        # 10 have been taken from 1 by then
        ({"source": 1, "target": 99, "amount": 10}, "there is no account 99"),
        ({"source": 1, "target": 2, "amount": 5000}, "account 1 has 1000, not 5000"),
        ({"source": 1, "target": 2, "amount": -1}, "amount is positive"),
    ],
)
async def test_a_transfer_that_cannot_be_made_changes_nothing(
    wanted: dict[str, int], said: str
) -> None:
    async with Client(server) as client:
        answer = await client.call_tool("transfer", wanted)
        assert answer.is_error
        assert said in str(answer.content)
        assert await call(client, "balance", account=1) == 1000
        assert await call(client, "statement") == ""
