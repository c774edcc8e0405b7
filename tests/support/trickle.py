"""A proxy on which the server's answer comes in pieces, as it may on any network."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from typing_extensions import override

from tests.support.proxy import ReadingProxy


class Trickle(ReadingProxy):
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

    @override
    async def _answer(
        self, messages: AsyncIterator[tuple[bytes, bytes]], writer: asyncio.StreamWriter
    ) -> None:
        async for head, body in messages:
            data = head + body
            if self.cut_after is not None:
                if (rest := self.cut_after - len(data)) < 0:
                    writer.write(data[: self.cut_after])
                    self.cut_after = None
                    return
                self.cut_after = rest
            writer.write(data)
            await writer.drain()
            await asyncio.sleep(self.pause)
