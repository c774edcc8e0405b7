"""
A small app that uses poolkeeper as it is meant: money moves between accounts.

Writers transfer, in transactions; readers look at the same time and must never see money appear
or vanish; at the end the books are balanced.
"""

from __future__ import annotations

import asyncio
import random
from dataclasses import dataclass
from time import monotonic
from typing import Any

from psycopg import AsyncConnection

from poolkeeper import PoolManager

ACCOUNTS = 20
OPENING_BALANCE = 100
WRITERS = 8
READERS = 4
TRANSFERS_PER_WRITER = 50
CONNECTIONS = 4


class Overdrawn(Exception):
    """There is not enough money; the transaction is rolled back."""


@dataclass
class Books:
    """What the app did, and whether the sums are right."""

    transfers: int = 0
    refused: int = 0
    looks: int = 0
    wrong_looks: int = 0
    total: int = 0
    entries: int = 0
    accounts_off: int = 0
    seconds: float = 0.0

    @property
    def right(self) -> bool:
        """True if no money appeared or vanished, at any time."""
        return (
            self.wrong_looks == 0
            and self.accounts_off == 0
            and self.total == ACCOUNTS * OPENING_BALANCE
            and self.entries == self.transfers
            and self.transfers + self.refused == WRITERS * TRANSFERS_PER_WRITER
        )


async def run(dsn: str, schema: str) -> Books:
    """Run the app in *schema*, which exists, and return its books."""

    async def configure(conn: AsyncConnection[Any]) -> None:
        await conn.execute("select set_config('search_path', %s, false)", (schema,))
        await conn.commit()

    db = PoolManager(dsn, name="bank", min_size=CONNECTIONS, configure=configure, open_timeout=5)
    books = Books()
    begin = monotonic()
    async with db:
        await _set_up(db)
        done = asyncio.Event()
        async with asyncio.TaskGroup() as group:
            for _ in range(READERS):
                group.create_task(_look(db, books, done))
            async with asyncio.TaskGroup() as writers:
                for seed in range(WRITERS):
                    writers.create_task(_move_money(db, books, seed))
            done.set()
        await _balance(db, books)
    books.seconds = monotonic() - begin
    return books


async def _set_up(db: PoolManager) -> None:
    async with db.connection() as conn:
        await conn.execute(
            "create table accounts (id int primary key, balance int not null check (balance >= 0))"
        )
        await conn.execute("create table entries (payer int, payee int, amount int)")
        await conn.execute(
            "insert into accounts select id, %s from generate_series(1, %s) as id",
            (OPENING_BALANCE, ACCOUNTS),
        )


async def _move_money(db: PoolManager, books: Books, seed: int) -> None:
    chance = random.Random(seed)
    for _ in range(TRANSFERS_PER_WRITER):
        payer, payee = chance.sample(range(1, ACCOUNTS + 1), 2)
        try:
            await _transfer(db, payer, payee, chance.randint(1, 80))
            books.transfers += 1
        except Overdrawn:
            books.refused += 1


async def _transfer(db: PoolManager, payer: int, payee: int, amount: int) -> None:
    async with db.transaction() as conn:
        await conn.execute(
            "select from accounts where id in (%s, %s) order by id for update", (payer, payee)
        )
        await conn.execute("insert into entries values (%s, %s, %s)", (payer, payee, amount))
        cursor = await conn.execute(
            "update accounts set balance = balance - %s where id = %s and balance >= %s",
            (amount, payer, amount),
        )
        if cursor.rowcount == 0:
            raise Overdrawn
        await conn.execute(
            "update accounts set balance = balance + %s where id = %s", (amount, payee)
        )


async def _look(db: PoolManager, books: Books, done: asyncio.Event) -> None:
    while not done.is_set():
        total = await db.fetchval("select sum(balance) from accounts")
        books.looks += 1
        books.wrong_looks += total != ACCOUNTS * OPENING_BALANCE


async def _balance(db: PoolManager, books: Books) -> None:
    async with db.transaction(isolation="repeatable read", read_only=True) as conn:
        cursor = await conn.execute(
            "select coalesce(sum(balance), 0), (select count(*) from entries) from accounts"
        )
        books.total, books.entries = await cursor.fetchone() or (0, 0)
        cursor = await conn.execute(
            """
            select count(*) from accounts
            where balance <> %s
                + (select coalesce(sum(amount), 0) from entries where payee = id)
                - (select coalesce(sum(amount), 0) from entries where payer = id)
            """,
            (OPENING_BALANCE,),
        )
        (books.accounts_off,) = await cursor.fetchone() or (ACCOUNTS,)
