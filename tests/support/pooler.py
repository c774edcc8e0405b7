"""Poolers between a pool and its server: a real one, and what clients see of any."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from functools import cache
from pathlib import Path

import psycopg
from psycopg.conninfo import conninfo_to_dict, make_conninfo
from typing_extensions import override

from poolkeeper._embedded import free_port
from tests.support.proxy import ReadingProxy
from tests.support.server import admin
from tests.support.waiting import eventually


class OwningPooler(ReadingProxy):
    """
    Reports values of its own with each answer of the server, whatever the client has set.

    Args:
        dsn: The server behind it.
        reports: Called before each answer to a query; what is reported with it, by name.
    """

    def __init__(self, dsn: str, reports: Callable[[], dict[str, str]]) -> None:
        super().__init__(dsn)
        self._reports = reports

    @override
    async def _answer(
        self, messages: AsyncIterator[tuple[bytes, bytes]], writer: asyncio.StreamWriter
    ) -> None:
        ready = 0
        async for head, body in messages:
            if head[:1] == b"Z":
                if ready:  # the first one ends the login
                    for name, value in self._reports().items():
                        status = f"{name}\0{value}\0".encode()
                        writer.write(b"S" + (len(status) + 4).to_bytes(4, "big") + status)
                ready += 1
            writer.write(head + self._as_told(head[:1], body))
            await writer.drain()

    def _as_told(self, kind: bytes, body: bytes) -> bytes:
        """Return what is passed on of an answer; as long as that."""
        return body


class TranslatingPooler(OwningPooler):
    """
    Gives each client a process number of its own, and prepared statements other names.

    As PgBouncer does since 1.21, if ``max_prepared_statements`` is not 0.
    """

    def __init__(self, dsn: str) -> None:
        super().__init__(dsn, dict)

    @override
    async def _pass_on(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, answers: bool = False
    ) -> None:
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            head = await reader.readexactly(4)  # of the login, which has no type
            writer.write(head + await reader.readexactly(int.from_bytes(head, "big") - 4))
            while True:
                head = await reader.readexactly(5)
                body = await reader.readexactly(int.from_bytes(head[1:], "big") - 4)
                body = self._translated(head[:1], body)
                writer.write(head[:1] + (len(body) + 4).to_bytes(4, "big") + body)
                await writer.drain()
        writer.close()

    @staticmethod
    def _translated(kind: bytes, body: bytes) -> bytes:
        at = {b"P": 0, b"B": body.find(b"\0") + 1, b"D": 1, b"C": 1}.get(kind)
        if at is None or (kind in b"DC" and body[:1] != b"S") or body[at : at + 1] == b"\0":
            return body
        return body[:at] + b"POOLER_" + body[at:]

    @override
    def _as_told(self, kind: bytes, body: bytes) -> bytes:
        return b"\x7f" + body[1:] if kind == b"K" else body


PGBOUNCER = (
    os.environ.get("POOLKEEPER_TEST_PGBOUNCER")
    or shutil.which("pgbouncer")
    or shutil.which("pgbouncer", path="/usr/sbin")
)
"""Where PgBouncer is, if it is on this machine: there is none in a wheel."""


@cache
def pgbouncer_version() -> tuple[int, ...]:
    """Return the version of `PGBOUNCER`."""
    assert PGBOUNCER is not None
    said = subprocess.run([PGBOUNCER, "--version"], capture_output=True, text=True, check=True)
    return tuple(map(int, re.findall(r"\d+", said.stdout.splitlines()[0])))


MODES = ("session", "transaction", "statement")


@contextlib.contextmanager
def pgbouncer(dsn: str, mode: str = "transaction", **settings: object) -> Iterator[str]:
    """
    Run a PgBouncer in front of the server at *dsn*, for all of its databases; give its own DSN.

    Everybody is let in, as the user of *dsn*. It has three connections to each database, unless
    *settings* say otherwise.
    """
    assert PGBOUNCER is not None
    port = free_port()
    server = conninfo_to_dict(dsn)
    user = server.get("user") or "postgres"
    lines = {
        "listen_addr": "127.0.0.1",
        "listen_port": port,
        "unix_socket_dir": "",
        "auth_type": "any",
        "pool_mode": mode,
        "default_pool_size": 3,
        "max_client_conn": 500,
        **settings,
    }
    with tempfile.TemporaryDirectory(prefix="poolkeeper-", ignore_cleanup_errors=True) as directory:
        config = Path(directory) / "pgbouncer.ini"
        config.write_text(
            f"[databases]\n* = host={server['host']} port={server['port']} user={user}\n"
            "[pgbouncer]\n" + "\n".join(f"{name} = {value}" for name, value in lines.items())
        )
        as_user = None
        if os.geteuid() == 0:  # it refuses to run as root, as the server does
            as_user = "nobody"
            shutil.chown(directory, as_user)
            config.chmod(0o644)
        process = subprocess.Popen(
            [PGBOUNCER, "-q", config],
            user=as_user,
            cwd=directory,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            through = make_conninfo(dsn, host="127.0.0.1", port=port)
            assert eventually(lambda: _answers(through))
            yield through
        finally:
            process.kill()
            process.wait()


def _answers(dsn: str) -> bool:
    try:
        return bool(admin(dsn, "select 1"))
    except psycopg.OperationalError:
        return False
