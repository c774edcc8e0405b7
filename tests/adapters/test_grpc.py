"""The gRPC example, which has the pool by the generic lifespan."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import httpx
import psycopg
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from examples import ledger
from examples.grpc import app
from examples.grpc.app import protos, services
from poolkeeper import LoopMismatchError, OpenError
from tests.support.waiting import until

from .servers import SESSIONS, Load, Served

STATUS = {
    grpc.StatusCode.NOT_FOUND: 404,
    grpc.StatusCode.FAILED_PRECONDITION: 409,
}


class GrpcLoad(Load):
    """Clients that call instead of posting; what they are told is counted as HTTP says it."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self._channel = grpc.aio.insecure_channel(url.rpartition("//")[2])
        self._stub = services.LedgerStub(self._channel)

    async def ready(self) -> bool:
        health = health_pb2_grpc.HealthStub(self._channel)
        try:
            answer = await health.Check(health_pb2.HealthCheckRequest())
        except grpc.aio.AioRpcError:
            return False
        return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)

    async def get(self, path: str) -> object:
        number = int(path.rpartition("/")[2])
        account = await self._stub.GetAccount(protos.AccountRequest(id=number))
        return {"id": account.id, "balance": account.balance}

    async def transfer(self, source: int, target: int, amount: int) -> int:
        wanted = protos.Transfer(source=source, target=target, amount=amount)
        try:
            await self._stub.MakeTransfer(wanted)
        except grpc.aio.AioRpcError as ex:
            # A call that arrives while the server ends is cancelled before it has begun; so it is
            # without a pool (grpcio 1.85).
            if ex.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED):
                raise httpx.TransportError(str(ex)) from ex
            status = STATUS.get(ex.code(), 500)
        else:
            status = 201
        self.answers[status] += 1
        return status


class TestGrpcServed(Served):
    example = "grpc"
    servers = {  # noqa: RUF012
        "python": lambda _, port: ["-m", "examples.grpc.app", f"127.0.0.1:{port}"],
    }

    def load(self, url: str) -> Load:
        return GrpcLoad(url)


@pytest.fixture(autouse=True)
def database_url(database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATABASE_URL", database)


def connected(port: int) -> grpc.aio.Channel:
    # Keeps the windows small, so that a stream waits for its reader early.
    options = [("grpc.http2.bdp_probe", 0)]
    return grpc.aio.insecure_channel(f"127.0.0.1:{port}", options)


async def test_the_pool_is_open_while_it_serves_and_several_times_in_a_row() -> None:
    for _ in range(3):
        async with app.serve("127.0.0.1:0") as port, connected(port) as channel:
            assert app.db.state == "open"
            account = await services.LedgerStub(channel).GetAccount(protos.AccountRequest(id=1))
            assert account.balance == ledger.BALANCE
        assert app.db.state == "closed"


async def test_a_call_that_runs_when_the_server_ends_is_answered_before_the_pool_closes(
    database: str,
) -> None:
    serving = app.serve("127.0.0.1:0")
    async with connected(await serving.__aenter__()) as channel:
        stub = services.LedgerStub(channel)
        async with await psycopg.AsyncConnection.connect(database) as blocker:
            await blocker.execute("select from accounts where id = 1 for update")
            call = stub.MakeTransfer(protos.Transfer(source=1, target=2, amount=1))
            await until(lambda: app.db.snapshot().in_use == 1)
            ending = asyncio.create_task(serving.__aexit__(None, None, None))
            with pytest.raises(grpc.aio.AioRpcError):  # no more are accepted
                await stub.GetAccount(protos.AccountRequest(id=1))
            assert app.db.state == "open"
        assert (await call).id == 1
        await ending
    assert app.db.state == "closed"


async def test_a_call_whose_client_gives_up_while_it_waits_costs_nothing() -> None:
    async with app.serve("127.0.0.1:0") as port, connected(port) as channel:
        stub = services.LedgerStub(channel)
        held = [app.db.connection() for _ in range(4)]
        for one in held:
            await one.__aenter__()
        with pytest.raises(grpc.aio.AioRpcError) as late:
            await stub.GetAccount(protos.AccountRequest(id=1), timeout=0.3)
        assert late.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        await until(lambda: app.db.snapshot().waiting == 0)
        health = health_pb2_grpc.HealthStub(channel)  # answers while all are in use
        ready = await health.Check(health_pb2.HealthCheckRequest())
        assert ready.status == health_pb2.HealthCheckResponse.SERVING
        for one in held:
            await one.__aexit__(None, None, None)
        assert (await stub.GetAccount(protos.AccountRequest(id=1))).balance == ledger.BALANCE


async def test_a_call_whose_client_gives_up_while_it_works_is_rolled_back(database: str) -> None:
    async with app.serve("127.0.0.1:0") as port, connected(port) as channel:
        stub = services.LedgerStub(channel)
        async with await psycopg.AsyncConnection.connect(database) as blocker:
            # It has taken from 1 when it waits to write down that it did.
            await blocker.execute("lock table transfers in exclusive mode")
            with pytest.raises(grpc.aio.AioRpcError) as late:
                await stub.MakeTransfer(protos.Transfer(source=1, target=2, amount=1), timeout=0.5)
            assert late.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
            await until(lambda: app.db.snapshot().in_use == 0)
        assert (await stub.GetAccount(protos.AccountRequest(id=1))).balance == ledger.BALANCE


async def test_a_method_that_is_not_async_is_told_why_it_has_no_pool(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Such a method runs in a thread."""
    refused: list[str] = []

    def get_account(self: Any, request: Any, context: Any) -> Any:
        try:
            asyncio.run(ask())
        except LoopMismatchError as ex:
            refused.append(str(ex))
        return protos.Account()

    async def ask() -> None:
        await app.db.fetchval("select 1")

    monkeypatch.setattr(app.Ledger, "GetAccount", get_account)
    async with app.serve("127.0.0.1:0") as port, connected(port) as channel:
        await services.LedgerStub(channel).GetAccount(protos.AccountRequest(id=1))
    assert 'pool "ledger" is bound to a different event loop' in refused[0]


def last_query(dsn: str) -> float | None:
    """Seconds since the service has asked for a page, None if it has not yet."""
    with psycopg.connect(dsn) as conn:
        row = conn.execute(
            "select extract(epoch from clock_timestamp() - max(query_start)) from pg_stat_activity"
            " where starts_with(application_name, %s) and query like '%%from transfers%%'"
            " and datname = current_database()",
            (SESSIONS,),
        ).fetchone()
    assert row is not None
    return row[0]


async def test_a_stream_holds_no_connection_while_its_client_reads(database: str) -> None:
    async with app.serve("127.0.0.1:0") as port, connected(port) as channel:
        with psycopg.connect(database) as conn:
            conn.execute(
                "insert into transfers (source, target, amount)"
                " select 1, 2, 1 from generate_series(1, 20000)"
            )
        lines = aiter(services.LedgerStub(channel).ListTransfers(protos.ListRequest()))
        assert (await anext(lines)).text == "1: 1 to 2, 1\n"
        while (asked := last_query(database)) is None or asked < 0.5:
            await asyncio.sleep(0.1)  # the windows fill up; then the rest waits for the client
        assert app.db.snapshot().in_use == 0
        with psycopg.connect(database) as conn:
            conn.execute("insert into transfers (source, target, amount) values (1, 2, 3)")
        *_, last = [line.text async for line in lines]
        assert last == "20001: 1 to 2, 3\n"  # so it had not come to the end yet


async def test_with_a_wrong_role_it_says_why(
    database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = psycopg.conninfo.make_conninfo(database, user="nobody_there")
    monkeypatch.setenv("DATABASE_URL", wrong)
    with pytest.raises(OpenError, match='role "nobody_there" does not exist'):
        async with app.serve("127.0.0.1:0"):
            pass
    assert app.db.state == "closed"


async def test_a_port_that_is_taken_does_not_leave_the_pool_open() -> None:
    async with app.serve("127.0.0.1:0") as port:
        address = f"127.0.0.1:{port}"
    listener = await asyncio.start_server(lambda *_: None, "127.0.0.1", port)
    async with listener:
        with pytest.raises(RuntimeError, match=address):
            async with app.serve(address):
                pass
    assert app.db.state == "closed"


def test_served_on_another_loop_it_says_so() -> None:
    async def serve() -> None:
        async with app.serve("127.0.0.1:0"):
            pass

    async def main() -> None:
        async with app.db:
            with pytest.raises(LoopMismatchError):
                await asyncio.to_thread(asyncio.run, serve())
            assert app.db.state == "open"

    asyncio.run(main())
