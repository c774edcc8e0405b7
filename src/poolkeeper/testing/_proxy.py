"""
A TCP proxy that fails on purpose.

It runs in a thread with an event loop of its own, so that it goes on when the loop under test
is blocked or closed.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
import threading
from collections.abc import Generator
from types import TracebackType
from typing import Self
from urllib.parse import urlsplit, urlunsplit

from psycopg.conninfo import conninfo_to_dict, make_conninfo


class FaultProxy:
    """
    Stands between a client and the server at *dsn*, and fails when it is told to.

    A context manager, async or not; and so are the faults that last. Works from any thread.

    Args:
        dsn: The server's.

    Attributes:
        refuse: Close new connections at once.
        silent: Accept new connections and say nothing.
        tear: Pass half of the next answer on, and then close its connection; once.
        accepted: How many connections were accepted so far.

    .. versionadded:: 0.1.0
    """

    def __init__(self, dsn: str) -> None:
        self._target = dsn
        self.lead_to(dsn)
        self.refuse: bool = False
        self.silent: bool = False
        self.tear: bool = False
        self.accepted: int = 0
        self._latency = 0.0
        self._writers: set[asyncio.StreamWriter] = set()
        self._flow: asyncio.Event | None = None
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="proxy", daemon=True)
        self.port: int = 0

    def lead_to(self, dsn: str) -> None:
        """Let new connections go to the server at *dsn*; those that there are stay."""
        parameters = conninfo_to_dict(dsn)
        self._host = str(parameters.get("host") or "127.0.0.1")
        self._port = int(parameters.get("port") or 5432)

    @property
    def dsn(self) -> str:
        """The DSN of the server through this proxy."""
        if "://" in self._target:
            parts = urlsplit(self._target)
            user = parts.netloc.rpartition("@")[0]
            netloc = f"{user}@127.0.0.1:{self.port}" if user else f"127.0.0.1:{self.port}"
            return urlunsplit(parts._replace(netloc=netloc))
        return make_conninfo(self._target, host="127.0.0.1", port=self.port)

    def start(self) -> None:
        """Listen on a free port."""
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self._listen(), self._loop).result(10)

    def stop(self) -> None:
        """Cut everything and stop listening."""
        asyncio.run_coroutine_threadsafe(self._shut(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    def cut(self, *, reset: bool = False) -> None:
        """Break every connection; with *reset* by a TCP reset, as a router that forgets does."""
        asyncio.run_coroutine_threadsafe(self._cut(reset), self._loop).result(10)

    def stall(self) -> None:
        """Pass nothing on any more, in either direction, and keep the connections."""
        assert self._flow is not None
        self._loop.call_soon_threadsafe(self._flow.clear)

    def resume(self) -> None:
        """Pass everything on again."""
        assert self._flow is not None
        self._loop.call_soon_threadsafe(self._flow.set)

    @contextlib.contextmanager
    def stalled(self) -> Generator[None]:
        """Pass nothing on in the block, as a network that drops every packet."""
        self.stall()
        try:
            yield
        finally:
            self.resume()

    @contextlib.contextmanager
    def refusing(self) -> Generator[None]:
        """Close new connections at once in the block, as a server that is not there."""
        self.refuse = True
        try:
            yield
        finally:
            self.refuse = False

    @contextlib.contextmanager
    def slow(self, seconds: float) -> Generator[None]:
        """Take so many seconds more for what is passed on in the block, in each direction."""
        before, self._latency = self._latency, seconds
        try:
            yield
        finally:
            self._latency = before

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    async def __aenter__(self) -> Self:
        return self.__enter__()

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    async def _listen(self) -> None:
        self._flow = asyncio.Event()
        self._flow.set()
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]

    async def _shut(self) -> None:
        for listening in self._server.sockets:
            self._loop.remove_reader(listening.fileno())
        for _ in range(5):  # asyncio leaks what it is accepting when the server is closed
            await asyncio.sleep(0)
        self._server.close()
        await self._cut()
        current = asyncio.current_task()
        rest = [task for task in asyncio.all_tasks() if task is not current]
        for task in rest:
            task.cancel()
        await asyncio.gather(*rest, return_exceptions=True)

    async def _cut(self, reset: bool = False) -> None:
        cut = list(self._writers)
        for writer in cut:
            if reset and (link := writer.get_extra_info("socket")) is not None:
                with contextlib.suppress(OSError):  # closed already
                    link.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            writer.transport.abort()
        self._writers.clear()
        # asyncio closes a socket in its next turn: who has cut is to find them closed.
        await asyncio.gather(*(writer.wait_closed() for writer in cut), return_exceptions=True)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.accepted += 1
        if self.refuse:
            writer.transport.abort()
            return
        self._writers.add(writer)
        try:
            if self.silent:
                await reader.read()
                return
            there_reader, there_writer = await asyncio.open_connection(self._host, self._port)
            self._writers.add(there_writer)
            try:
                await asyncio.gather(
                    self._pass_on(reader, there_writer), self._pass_back(there_reader, writer)
                )
            finally:
                there_writer.close()
                self._writers.discard(there_writer)
        except (OSError, asyncio.CancelledError):
            pass
        finally:
            writer.close()
            self._writers.discard(writer)

    async def _pass_back(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await self._pass_on(reader, writer, answers=True)

    async def _pass_on(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, answers: bool = False
    ) -> None:
        assert self._flow is not None
        with contextlib.suppress(OSError):
            while data := await reader.read(65536):
                await self._flow.wait()
                if self._latency:
                    await asyncio.sleep(self._latency)
                if answers and self.tear:
                    self.tear = False
                    writer.write(data[: len(data) // 2])
                    break
                writer.write(data)
                await writer.drain()
        writer.close()
