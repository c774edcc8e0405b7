"""
The ledger as a gRPC service.

``python -m examples.grpc.app 127.0.0.1:50051`` serves until it is told to end.
"""

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from examples import ledger
from poolkeeper import PoolManager
from poolkeeper.adapters.generic import lifespan

# Made from the .proto when this is imported, which needs grpcio-tools. Import your own stubs here.
protos, services = grpc.protos_and_services("examples/grpc/ledger.proto")

db = PoolManager(lambda: os.environ["DATABASE_URL"], min_size=1, max_size=4, name="ledger")
GRACE = 10.0  # seconds that calls may go on when the server ends


class Ledger(services.LedgerServicer):
    async def GetAccount(self, request: Any, context: grpc.aio.ServicerContext) -> Any:
        async with refusals(context), db.connection() as conn:
            return protos.Account(id=request.id, balance=await ledger.balance(conn, request.id))

    async def MakeTransfer(self, request: Any, context: grpc.aio.ServicerContext) -> Any:
        async with refusals(context):
            wanted = ledger.Transfer.of(
                {"source": request.source, "target": request.target, "amount": request.amount}
            )
            async with db.connection() as conn:  # rolled back if this raises
                number = await ledger.transfer(conn, wanted)
            return protos.Receipt(id=number)  # committed by now

    async def ListTransfers(
        self, request: Any, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[Any]:
        # The pool, not a connection: a client may read slowly.
        async for line in ledger.statement(db):
            yield protos.Line(text=line)


class Health(health_pb2_grpc.HealthServicer):
    async def Check(self, request: Any, context: grpc.aio.ServicerContext) -> Any:
        health = await db.check()
        serving = health_pb2.HealthCheckResponse
        return serving(status=serving.SERVING if health else serving.NOT_SERVING)


STATUS = {
    ledger.UnknownAccount: grpc.StatusCode.NOT_FOUND,
    ledger.InsufficientFunds: grpc.StatusCode.FAILED_PRECONDITION,
    ledger.Invalid: grpc.StatusCode.INVALID_ARGUMENT,
}


@asynccontextmanager
async def refusals(context: grpc.aio.ServicerContext) -> AsyncIterator[None]:
    try:
        yield
    except ledger.Refused as ex:
        await context.abort(STATUS[type(ex)], str(ex))


@asynccontextmanager
async def prepare(server: grpc.aio.Server) -> AsyncIterator[None]:
    await ledger.prepare(db)  # the pool is open before this, and until after the end
    yield


@asynccontextmanager
async def serve(address: str) -> AsyncIterator[int]:
    server = grpc.aio.server()
    async with lifespan(db, prepare)(server):
        services.add_LedgerServicer_to_server(Ledger(), server)
        health_pb2_grpc.add_HealthServicer_to_server(Health(), server)
        port = server.add_insecure_port(address)
        await server.start()
        try:
            yield port
        finally:
            await server.stop(GRACE)  # what was accepted is answered; then the pool closes


async def main(address: str = "127.0.0.1:50051") -> None:
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    async with serve(address):
        await stop.wait()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
