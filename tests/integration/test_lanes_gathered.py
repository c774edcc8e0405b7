"""What one-shots send behind each other in one turn of the loop, and how the network sees it."""

from __future__ import annotations

import asyncio
import os
import socket
import struct
import time
from typing import Any

import psycopg
import pytest

from poolkeeper import PoolManager
from tests.support.lanes import PLAIN, know, trust

on_linux = pytest.mark.skipif(not hasattr(socket, "TCP_CORK"), reason="only Linux holds back")


@pytest.fixture(autouse=True)
def trusting(monkeypatch: pytest.MonkeyPatch) -> None:
    """No statement is slow."""
    trust(monkeypatch)


class Segments:
    """How many packets with data the connection of a pool that has one has sent."""

    def __init__(self, fileno: int) -> None:
        self._socket = socket.socket(fileno=os.dup(fileno))
        self._began = self._sent()

    @classmethod
    async def of(cls, db: PoolManager[Any]) -> Segments:
        async with db.connection() as conn:
            return cls(conn.fileno())

    def _sent(self) -> int:
        info = self._socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
        return int(struct.unpack_from("I", info, 156)[0])  # tcpi_data_segs_out

    def since(self) -> int:
        """How many since it was asked last."""
        began, self._began = self._began, self._sent()
        return self._began - began

    def __enter__(self) -> Segments:
        self.since()
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()


@on_linux
async def test_what_is_sent_behind_others_in_one_turn_travels_together(dsn: str) -> None:
    async with PoolManager(dsn, min_size=1, max_size=1, timeout=20) as db:
        await know(db, PLAIN)
        fewest = 99
        with await Segments.of(db) as segments:
            for _ in range(20):  # this process may stand still between two of them
                asked = (db.fetchval(PLAIN, (n,)) for n in range(16))
                assert await asyncio.gather(*asked) == list(range(16))
                fewest = min(fewest, segments.since())
        assert fewest <= 3


@on_linux
async def test_nothing_is_held_back_while_somebody_sends_in_a_long_turn(dsn: str) -> None:
    async with PoolManager(dsn, min_size=1, max_size=1, timeout=20) as db:
        await know(db, PLAIN)
        with await Segments.of(db) as segments:
            sent: list[int] = []

            async def at_work(seconds: float) -> None:
                sent.append(segments.since())
                time.sleep(seconds)

            answers = await asyncio.gather(
                db.fetchval(PLAIN, (1,)),
                at_work(0),
                db.fetchval(PLAIN, (2,)),
                at_work(0.01),
                db.fetchval(PLAIN, (3,)),
                at_work(0),
            )
        assert [answer for answer in answers if answer] == [1, 2, 3]
        # The head, nothing, and the second one.
        assert sent == [1, 0, 1]


async def test_a_unix_socket_holds_nothing_back(dsn: str) -> None:
    with psycopg.connect(dsn) as conn:
        (directory,) = conn.execute("show unix_socket_directories").fetchone() or ("",)
    local = psycopg.conninfo.make_conninfo(dsn, host=directory)
    async with PoolManager(local, min_size=1, max_size=1, timeout=20) as db:
        await know(db, PLAIN)
        for _ in range(3):
            asked = (db.fetchval(PLAIN, (n,)) for n in range(40))
            assert await asyncio.gather(*asked) == list(range(40))


@on_linux
async def test_a_session_that_is_lost_while_something_is_held_back_is_replaced(dsn: str) -> None:
    async with PoolManager(dsn, min_size=1, max_size=1, timeout=20) as db:
        await know(db, PLAIN)
        async with db.connection() as conn:
            mine = socket.socket(fileno=os.dup(conn.fileno()))

        async def cut() -> None:
            mine.shutdown(socket.SHUT_RDWR)
            mine.close()

        asked = [db.fetchval(PLAIN, (n,)) for n in range(5)]
        *answers, _ = await asyncio.gather(*asked, cut(), return_exceptions=True)
        # It may have answered the first before.
        lost = [n for n in range(5) if isinstance(answers[n], psycopg.OperationalError)]
        assert len(lost) <= 1
        assert all(answers[n] == n for n in range(5) if n not in lost)
        assert await db.fetchval(PLAIN, (9,)) == 9
