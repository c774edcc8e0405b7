"""The proxy that fails on purpose, of the kit that everybody may use; and one that can read."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

from psycopg.conninfo import make_conninfo
from typing_extensions import override

from poolkeeper.testing import FaultProxy as FaultProxy


class ReadingProxy(FaultProxy):
    """Knows one message of the server from the next, and what is done with each."""

    @property
    @override
    def dsn(self) -> str:
        """The way in, in clear: all messages have the same form from the first one on."""
        return make_conninfo(super().dsn, sslmode="disable", gssencmode="disable")

    @override
    async def _pass_back(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            await self._answer(_messages(reader), writer)
        writer.close()

    async def _answer(
        self, messages: AsyncIterator[tuple[bytes, bytes]], writer: asyncio.StreamWriter
    ) -> None:
        """Pass the *messages* of one connection on, each with its head and its body."""
        raise NotImplementedError


async def _messages(reader: asyncio.StreamReader) -> AsyncIterator[tuple[bytes, bytes]]:
    while True:
        head = await reader.readexactly(5)
        yield head, await reader.readexactly(int.from_bytes(head[1:], "big") - 4)
