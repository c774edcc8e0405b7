"""The MCP example, which has the pool by the generic lifespan."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import sys
from pathlib import Path
from typing import Any, ClassVar

import httpx
import psycopg
import pytest
from asgi_lifespan import LifespanManager
from mcp import Client, StdioServerParameters
from mcp.server.mcpserver import Context, MCPServer
from mcp_types import ElicitResult
from pydantic import BaseModel
from starlette.applications import Starlette
from starlette.routing import Mount, Route

from examples import ledger
from examples.mcp import app
from poolkeeper import PoolManager
from poolkeeper.adapters.generic import KEY, lifespan
from poolkeeper.adapters.starlette import readyz
from tests.support.waiting import until

from .conformance import all_text
from .servers import ROOT, SERVERS, SESSIONS, Command, Load, Served

HEADERS = {"accept": "application/json, text/event-stream"}


class McpLoad(Load):
    """Clients that call tools; what they are told is counted as HTTP says it."""

    async def call(self, tool: str, **arguments: int) -> tuple[int, Any]:
        call = {
            "jsonrpc": "2.0",
            "id": 1,
            "method": "tools/call",
            "params": {"name": tool, "arguments": arguments},
        }
        answer = await self._http.post("/mcp", json=call, headers=HEADERS)
        status, result = answer.status_code, None
        if status == 200:
            result = answer.json()["result"]
            if result["isError"]:
                (content,) = result["content"]
                status = 404 if "there is no account" in content["text"] else 409
                assert status == 404 or " has " in content["text"], content
            elif tool == "transfer":
                status = 201
        self.answers[status] += 1
        return status, result

    async def get(self, path: str) -> object:
        account = int(path.rpartition("/")[2])
        _, result = await self.call("balance", account=account)
        return {"id": account, "balance": result["structuredContent"]["result"]}

    async def transfer(self, source: int, target: int, amount: int) -> int:
        status, _ = await self.call("transfer", source=source, target=target, amount=amount)
        return status


class TestMcpServed(Served):
    example = "mcp"
    # It is an application of Starlette's, which is served by all of them; one loads it before it
    # forks. To import it takes each of them a second or two.
    servers: ClassVar[dict[str, Command]] = {
        name: SERVERS[name] for name in ("uvicorn", "gunicorn-preload")
    }

    def load(self, url: str) -> Load:
        return McpLoad(url)

    async def test_a_client_of_either_protocol_calls_the_tools(
        self, database: str, tmp_path: Path
    ) -> None:
        modes: list[Any] = ["auto", "legacy", "auto", "legacy"]
        async with self.running("uvicorn", database, tmp_path / "log") as server:
            await server.ready()
            for done, mode in enumerate(modes, start=1):
                async with Client(f"{server.url}/mcp", mode=mode) as client:
                    await client.call_tool("transfer", {"source": 1, "target": 2, "amount": 10})
                    answer = await client.call_tool("balance", {"account": 1})
                assert answer.structured_content == {"result": ledger.BALANCE - 10 * done}
            server.process.terminate()
            await server.ended()


@pytest.fixture(autouse=True)
def database_url(database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATABASE_URL", database)


async def test_over_standard_input_the_pool_lives_as_long_as_the_client(database: str) -> None:
    command = StdioServerParameters(
        command=sys.executable,
        args=["-m", "examples.mcp.app"],
        cwd=ROOT,
        env={**os.environ, "DATABASE_URL": database},
    )
    async with Client(command) as client:
        answer = await client.call_tool("balance", {"account": 1})
        assert answer.structured_content == {"result": ledger.BALANCE}
        assert sessions(database) == 1
    await until(lambda: sessions(database) == 0)


async def test_over_standard_input_a_wrong_role_ends_it_with_the_reason(database: str) -> None:
    wrong = psycopg.conninfo.make_conninfo(database, user="nobody_there")
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "examples.mcp.app",
        cwd=ROOT, env={**os.environ, "DATABASE_URL": wrong},
        stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    assert process.stdin is not None
    process.stdin.write(json.dumps({"jsonrpc": "2.0", "id": 1, "method": "ping"}).encode() + b"\n")
    process.stdin.close()
    _, said = await asyncio.wait_for(process.communicate(), 60)
    assert process.returncode
    assert 'role "nobody_there" does not exist' in said.decode()


def sessions(dsn: str) -> int:
    with psycopg.connect(dsn) as conn:
        (row,) = conn.execute(
            "select count(*)::int from pg_stat_activity"
            " where datname = current_database() and starts_with(application_name, %s)",
            (SESSIONS,),
        )
    return int(row[0])


async def test_clients_that_overlap_share_the_pool_and_the_last_one_closes_it() -> None:
    """In memory and over SSE, each session of a client runs the server's lifespan."""
    first_is_here, second_is_here, first_is_gone = (asyncio.Event() for _ in range(3))

    async def first() -> None:
        async with Client(app.server) as client:
            await client.call_tool("balance", {"account": 1})
            first_is_here.set()
            await second_is_here.wait()
        first_is_gone.set()

    async def second() -> None:
        await first_is_here.wait()
        async with Client(app.server) as client:
            await client.call_tool("balance", {"account": 1})
            second_is_here.set()
            await first_is_gone.wait()
            answer = await client.call_tool("balance", {"account": 1})
            assert answer.structured_content == {"result": ledger.BALANCE}

    await asyncio.gather(first(), second())
    assert app.db.state == "closed"


async def test_a_wrong_role_fails_the_client_in_memory(
    database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = psycopg.conninfo.make_conninfo(database, user="nobody_there")
    monkeypatch.setenv("DATABASE_URL", wrong)
    with pytest.raises(BaseException) as failed:
        async with Client(app.server):
            pass
    assert 'role "nobody_there" does not exist' in all_text(failed.value)
    assert app.db.state == "closed"


async def test_a_tool_that_is_not_async_is_told_why_it_has_no_pool(
    database: str, caplog: pytest.LogCaptureFixture
) -> None:
    """MCP runs it in a thread; its client is not told the reason, the log is."""
    db = PoolManager(database, min_size=1, name="orders")
    server = MCPServer("orders", lifespan=lifespan(db))

    @server.tool()
    def count(context: Context) -> int:
        pool: PoolManager = context.request_context.lifespan_context[KEY]
        running = pool.fetchval("select 1")
        running.send(None)
        return 1

    with caplog.at_level(logging.ERROR):
        async with Client(server) as client:
            answer = await client.call_tool("count", {})
    assert answer.is_error
    reason = all_text(caplog.records[-1].exc_info[1])  # type: ignore[index, arg-type]
    assert 'pool "orders" was used outside of its event loop' in reason
    assert 'write "async def", or in the function anyio.from_thread.run(' in reason


async def test_a_tool_that_asks_the_user_inside_of_the_block_is_named_by_the_diagnosis(
    database: str,
) -> None:
    db = PoolManager(database, min_size=1, max_size=1, name="orders")
    server = MCPServer("orders", lifespan=lifespan(db))

    @server.tool()
    async def order(context: Context) -> str:
        async with db.connection() as conn:
            await conn.execute("select 1")
            answer = await context.elicit("Are you sure?", Sure)  # wrong: a person takes long
        return answer.action

    line = order.__code__.co_firstlineno + 2
    asked = asyncio.Event()
    answered = asyncio.Event()

    async def person(context: Any, params: Any) -> ElicitResult:
        asked.set()
        await answered.wait()
        return ElicitResult(action="decline")

    async with Client(server, mode="legacy", elicitation_callback=person) as client:
        calling = asyncio.create_task(client.call_tool("order", {}))
        await asked.wait()
        await until(lambda: db.diagnose().cause == "held-but-hardly-used")
        assert f"acquired at tests/adapters/test_mcp.py:{line} in order." in db.diagnose().detail
        answered.set()
        assert (await calling).structured_content == {"result": "decline"}


class Sure(BaseModel):
    sure: bool


async def test_mounted_in_another_application_it_has_the_pool_of_that_one(database: str) -> None:
    """The outer application has to run the session manager, as its own lifespan is not run."""
    db = PoolManager(database, min_size=1, name="orders")
    server = MCPServer("orders", lifespan=lifespan(db))

    @server.tool()
    async def state(context: Context) -> str:
        pool: PoolManager = context.request_context.lifespan_context[KEY]
        return f"{pool.state}, {await pool.fetchval('select 1')}"

    inner = server.streamable_http_app(json_response=True, stateless_http=True)
    outer = Starlette(
        routes=[Route("/readyz", readyz), Mount("/", inner)],
        lifespan=lifespan(db, lambda _: server.session_manager.run()),
    )
    call = {"jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": {"name": "state"}}
    async with LifespanManager(outer) as running:
        transport = httpx.ASGITransport(running.app)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost:8000") as http:
            assert (await http.get("/readyz")).status_code == 200
            answer = await http.post("/mcp", json=call, headers=HEADERS)
        assert answer.json()["result"]["structuredContent"] == {"result": "open, 1"}, answer.text
    assert db.state == "closed"
