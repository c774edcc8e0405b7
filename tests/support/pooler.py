"""A pooler that thinks that some settings are its own: what clients see of one, without one."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable

from psycopg.conninfo import make_conninfo
from typing_extensions import override

from tests.support.proxy import FaultProxy


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
