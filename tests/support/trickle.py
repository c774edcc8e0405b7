"""A proxy on which the server's answer comes in pieces, as it may on any network."""

from __future__ import annotations

import asyncio
import contextlib

from psycopg.conninfo import make_conninfo
from typing_extensions import override

from poolkeeper.testing import FaultProxy


class Trickle(FaultProxy):
    """
    Passes each message of the server on by itself, a moment after the one before it.

    Loopback nearly always brings the whole answer at once, so that what reads half of it, and
    decides by that, is right by luck.

    Attributes:
        pause: Seconds between two messages.
        cut_after: Bytes of the answers to come after which their connection is closed, once;
            None for never.
    """

    def __init__(self, dsn: str, pause: float = 0.002) -> None:
        super().__init__(dsn)
        self.pause = pause
        self.cut_after: int | None = None

    @property
    @override
    def dsn(self) -> str:
        """The way in, on which all messages have the same form from the first one on."""
        return make_conninfo(super().dsn, sslmode="disable", gssencmode="disable")

    @override
    async def _pass_back(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            while True:
                head = await reader.readexactly(5)
                data = head + await reader.readexactly(int.from_bytes(head[1:], "big") - 4)
                if self.cut_after is not None:
                    if (rest := self.cut_after - len(data)) < 0:
                        writer.write(data[: self.cut_after])
                        self.cut_after = None
                        break
                    self.cut_after = rest
                writer.write(data)
                await writer.drain()
                await asyncio.sleep(self.pause)
        writer.close()
