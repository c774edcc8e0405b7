"""Poolers between a pool and its server: a real one, and what clients see of any."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator

import psycopg
from psycopg.conninfo import make_conninfo
from typing_extensions import override

from poolkeeper._embedded import EmbeddedServer, free_port
from tests.support.proxy import FaultProxy
from tests.support.server import admin, eventually


class OwningPooler(FaultProxy):
    """
    Reports values of its own with each answer of the server, whatever the client has set.

    Args:
        dsn: The server behind it.
        reports: Called before each answer to a query; what is reported with it, by name.
    """

    def __init__(self, dsn: str, reports: Callable[[], dict[str, str]]) -> None:
        super().__init__(dsn)
        self._reports = reports

    @property
    @override
    def dsn(self) -> str:
        # In clear: it reads what the server says.
        return make_conninfo(super().dsn, sslmode="disable", gssencmode="disable")

    @override
    async def _pass_back(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        ready = 0
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            while True:
                head = await reader.readexactly(5)
                body = await reader.readexactly(int.from_bytes(head[1:], "big") - 4)
                if head[:1] == b"Z":
                    if ready:  # the first one ends the login
                        for name, value in self._reports().items():
                            status = f"{name}\0{value}\0".encode()
                            writer.write(b"S" + (len(status) + 4).to_bytes(4, "big") + status)
                    ready += 1
                writer.write(head + body)
                await writer.drain()
        writer.close()


PGBOUNCER = shutil.which("pgbouncer") or shutil.which("pgbouncer", path="/usr/sbin")
"""Where PgBouncer is, if it is on this machine: there is none in a wheel."""


@contextlib.contextmanager
def pgbouncer(server: EmbeddedServer) -> Iterator[str]:
    """Run a PgBouncer in transaction mode, with three connections to *server*; give its DSN."""
    assert PGBOUNCER is not None
    port = free_port()
    config = server.directory / "pgbouncer.ini"
    config.write_text(
        f"""
        [databases]
        postgres = host=127.0.0.1 port={server.port} user=postgres pool_size=3
        [pgbouncer]
        listen_addr = 127.0.0.1
        listen_port = {port}
        unix_socket_dir =
        auth_type = any
        pool_mode = transaction
        """
    )
    config.chmod(0o644)
    # It refuses to run as root, as the server does.
    user = server.directory.stat().st_uid if os.geteuid() == 0 else None
    process = subprocess.Popen(
        [PGBOUNCER, "-q", config],
        user=user,
        cwd=server.directory,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        dsn = f"postgresql://postgres@127.0.0.1:{port}/postgres"
        assert eventually(lambda: _answers(dsn))
        yield dsn
    finally:
        process.kill()
        process.wait()


def _answers(dsn: str) -> bool:
    try:
        return bool(admin(dsn, "select 1"))
    except psycopg.OperationalError:
        return False
