"""
The ledger as an MCP server.

``app`` is for an ASGI server; ``python -m examples.mcp.app`` speaks over standard input and output.
"""

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated, TypeAlias

from mcp.server.mcpserver import Context, MCPServer
from mcp.server.mcpserver.exceptions import ToolError
from mcp.server.mcpserver.resolve import Resolve

from examples import ledger
from poolkeeper import PoolManager
from poolkeeper.adapters.asgi import LifespanMiddleware
from poolkeeper.adapters.generic import KEY, lifespan

db = PoolManager(lambda: os.environ["DATABASE_URL"], min_size=1, max_size=4, name="ledger")


@asynccontextmanager
async def prepare(server: MCPServer) -> AsyncIterator[None]:
    await ledger.prepare(db)  # the pool is open before this, and until after the end
    yield


server = MCPServer("ledger", lifespan=lifespan(db, prepare))


async def pool_from(context: Context) -> PoolManager:
    manager: PoolManager = context.request_context.lifespan_context[KEY]
    return manager


Pool: TypeAlias = Annotated[PoolManager, Resolve(pool_from)]


@server.tool()
async def balance(account: int, pool: Pool) -> int:
    """Tell what an account holds."""
    async with refusals(), pool.connection() as conn:
        return await ledger.balance(conn, account)


@server.tool()
async def transfer(source: int, target: int, amount: int, pool: Pool) -> int:
    """Move money from one account to another; tells the number of the transfer."""
    async with refusals():
        wanted = ledger.Transfer.of({"source": source, "target": target, "amount": amount})
        # Committed before this returns, rolled back if it raises.
        async with pool.connection() as conn:
            return await ledger.transfer(conn, wanted)


@server.tool()
async def statement(pool: Pool) -> str:
    """List all transfers."""
    return "".join([line async for line in ledger.statement(pool)])


@asynccontextmanager
async def refusals() -> AsyncIterator[None]:
    try:
        yield
    except ledger.Refused as ex:
        raise ToolError(str(ex)) from ex  # what any other error says, the model is not told


# As JSON, calls that run when the server is told to end are answered; without sessions, several
# processes can serve.
app = LifespanMiddleware(
    server.streamable_http_app(json_response=True, stateless_http=True),
    db,
    livez="/livez",
    readyz="/readyz",
)

if __name__ == "__main__":
    server.run()  # over standard input and output
