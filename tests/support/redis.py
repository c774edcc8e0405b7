"""A Redis for the tests of workers, out of the machine's own package."""

from __future__ import annotations

import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from poolkeeper._embedded import free_port

REDIS = shutil.which("redis-server")
"""Where Redis is, if it is on this machine: there is none in a wheel."""


@contextmanager
def redis_server() -> Iterator[str]:
    """Run one, and give its URL."""
    assert REDIS is not None
    port = free_port()
    options = ["--port", str(port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"]
    process = subprocess.Popen([REDIS, *options], stdout=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 30
        while not _answers(port):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        yield f"redis://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait()


def command(url: str, words: str) -> bytes:
    """Return the first line of what the Redis at *url* answers."""
    host, _, port = url.rpartition("//")[2].partition(":")
    with socket.create_connection((host, int(port)), timeout=5) as redis:
        redis.sendall(f"{words}\r\n".encode())
        return redis.recv(1000).strip()


def _answers(port: int) -> bool:
    with suppress(OSError):
        return command(f"redis://127.0.0.1:{port}", "PING") == b"+PONG"
    return False
