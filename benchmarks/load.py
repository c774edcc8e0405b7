"""
Ask a web server as fast as it answers: with wrk where that is installed, else with what is here.

Run as ``python -m benchmarks.load``, in a process beside the server's.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import shutil
import sys
from time import perf_counter
from typing import Any

from .contests import is_installed
from .timing import runner

CLIENTS = 32


def generator(seconds: float) -> str:
    """Return what makes the load; wrk counts in whole seconds."""
    return "wrk" if shutil.which("wrk") and seconds >= 1 else "benchmarks.load"


async def load(port: int, path: str, seconds: float, clients: int = CLIENTS) -> tuple[int, float]:
    """
    Return how many requests were answered, and in how many seconds.

    Raises:
        RuntimeError: If one failed.
    """
    wrk = generator(seconds) == "wrk"
    command = (
        ["wrk", "-t1", f"-c{clients}", f"-d{round(seconds)}s", f"http://127.0.0.1:{port}{path}"]
        if wrk
        else [
            *(sys.executable, "-m", "benchmarks.load", f"--port={port}", f"--path={path}"),
            *(f"--seconds={seconds}", f"--clients={clients}"),
        ]
    )
    process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
    said = (await process.communicate())[0].decode()
    if process.returncode:
        raise RuntimeError(f"{command[0]} failed: {said}")
    if not wrk:
        requests, seconds = json.loads(said)
        return requests, seconds
    if "Non-2xx" in said or "Socket errors" in said:
        raise RuntimeError(f"requests failed: {said}")
    requests = int(_found(r"(\d+) requests in", said))
    return requests, requests / float(_found(r"Requests/sec:\s+([\d.]+)", said))


def _found(pattern: str, said: str) -> str:
    match = re.search(pattern, said)
    if match is None:
        raise RuntimeError(f"wrk said: {said}")
    return match[1]


class Client(asyncio.Protocol):
    """Keeps its connection, and asks again when it was answered."""

    def __init__(self, path: str) -> None:
        self.request = f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n".encode()
        self.answered = 0
        self.until = float("inf")
        self.received = b""
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def start(self, until: float) -> None:
        self.until = until
        self.transport.write(self.request)

    def data_received(self, data: bytes) -> None:
        self.received += data
        head, between, body = self.received.partition(b"\r\n\r\n")
        if not between:
            return
        length = re.search(rb"\r\ncontent-length: *(\d+)", head, re.IGNORECASE)
        if length is None or not re.match(rb"HTTP/1.1 2\d\d", head):
            self._fail(f"a request failed: {head!r}")
        elif len(body) >= int(length[1]):
            self.received = b""
            self.answered += 1
            if perf_counter() < self.until:
                self.transport.write(self.request)
            elif not self.done.done():
                self.done.set_result(None)

    def connection_lost(self, exc: Exception | None) -> None:
        self._fail(f"the server hung up: {exc!r}")

    def _fail(self, reason: str) -> None:
        if not self.done.done():
            self.done.set_exception(RuntimeError(reason))


async def ask(port: int, path: str, seconds: float, clients: int) -> tuple[int, float]:
    """Do what wrk does."""
    loop = asyncio.get_running_loop()
    asking = [
        (await loop.create_connection(lambda: Client(path), "127.0.0.1", port))[1]
        for _ in range(clients)
    ]
    begin = perf_counter()
    for client in asking:
        client.start(begin + seconds)
    await asyncio.gather(*(client.done for client in asking))
    took = perf_counter() - begin
    for client in asking:
        client.transport.close()
    return sum(client.answered for client in asking), took


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.load")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--path", required=True)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--clients", type=int, default=CLIENTS)
    options = parser.parse_args()
    with runner("uvloop" if is_installed("uvloop") else "asyncio") as run:
        found = run.run(ask(options.port, options.path, options.seconds, options.clients))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
