"""
What lies outside of the program under test: a server, and the network in front of it.

It has a process of its own, so that the memory and the descriptors that are counted are those of
the pools alone. `Outside` talks to it in lines of JSON, one for each request; when its input
ends, it takes the server down and ends.
"""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Any, Self

from poolkeeper._embedded import EmbeddedServer
from tests.support.proxy import FaultProxy
from tests.support.server import admin

SETTINGS = {
    "max_connections": 60,
    # A crash of the server shall lose nothing that it said is committed.
    "synchronous_commit": "on",
    "deadlock_timeout": "100ms",
    "timezone": "UTC",
    # Whoever was cut off in a transaction holds no lock for long.
    "tcp_keepalives_idle": 5,
    "idle_in_transaction_session_timeout": "20s",
}


class Outside:
    """The server and the network, as the program under test sees them."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        # One thread for good: more of them would be memory that comes and goes.
        self._thread = ThreadPoolExecutor(1, "outside")
        self.dsn, self.proxy_port, self.server_version = self._thread.submit(self._answer).result()

    async def ask(self, what: str, *arguments: Any) -> Any:
        """Have something done out there, and return when it is."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._thread, self._ask, what, *arguments)

    def _ask(self, *request: Any) -> Any:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError("the process of the server and the network is gone")
        failed, answer = json.loads(line)
        if failed:
            raise RuntimeError(answer)
        return answer

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._process.communicate(timeout=60)
        self._thread.shutdown()


class _Works:
    """What can be asked for, by name."""

    def __init__(self, server: EmbeddedServer, proxy: FaultProxy) -> None:
        self._server = server
        self._proxy = proxy

    def kill(self, most: int) -> int:
        """End some sessions of the pools, chosen by the server."""
        query = """
            select pg_terminate_backend(pid) from (
                select pid from pg_stat_activity where usename <> 'postgres'
                and backend_type = 'client backend' order by random() limit %s
            ) as victims
        """
        return len(admin(self._server.dsn(), query, (most,)))

    def restart(self, mode: str) -> None:
        self._server.restart(mode)

    def cut(self) -> None:
        self._proxy.cut()

    def reset(self) -> None:
        self._proxy.cut(reset=True)

    def tear(self) -> None:
        self._proxy.tear = True

    def stall(self) -> None:
        self._proxy.stall()

    def refuse(self) -> None:
        self._proxy.refuse = True

    def silence(self) -> None:
        self._proxy.silent = True

    def heal(self) -> None:
        """Let the network be as it should; who was left without an answer is cut off."""
        proxy = self._proxy
        if proxy.silent:
            proxy.silent = False
            proxy.cut()
        proxy.refuse = proxy.tear = False
        proxy.resume()


def _serve() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the other process ends us
    with EmbeddedServer(SETTINGS) as server:
        proxy = FaultProxy(server.dsn())
        proxy.start()
        works = _Works(server, proxy)
        ((version,),) = admin(server.dsn(), "show server_version")
        _say(False, [server.dsn(), proxy.port, version])
        for line in sys.stdin:
            what, *arguments = json.loads(line)
            try:
                _say(False, getattr(works, what)(*arguments))
            except Exception as ex:
                _say(True, f"{what}: {ex}")
        proxy.stop()


def _say(failed: bool, answer: object) -> None:
    print(json.dumps([failed, answer]), flush=True)


if __name__ == "__main__":
    _serve()
