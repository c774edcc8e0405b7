"""The ledger itself: accounts, and transfers that happen as a whole or not at all."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any, NamedTuple

from psycopg import AsyncConnection

from poolkeeper import PoolManager

ACCOUNTS = 20
BALANCE = 1_000
PAGE = 100

SCHEMA = """
    create table if not exists accounts (
        id int primary key,
        balance int not null check (balance >= 0)
    );
    create table if not exists transfers (
        id int primary key generated always as identity,
        source int not null references accounts,
        target int not null references accounts,
        amount int not null check (amount > 0)
    );
"""


class Refused(Exception):
    """A request that cannot be met; *status* is the HTTP status to say so with."""

    status = 400


class UnknownAccount(Refused):
    """There is no such account."""

    status = 404


class InsufficientFunds(Refused):
    """The account that pays has not got as much."""

    status = 409


class Invalid(Refused):
    """What was sent is no transfer."""

    status = 422


class Transfer(NamedTuple):
    """What a client asks for."""

    source: int
    target: int
    amount: int

    @classmethod
    def of(cls, body: Any) -> Transfer:
        """Read the body of a request; frameworks that do this themselves need it not."""
        try:
            wanted = cls(body["source"], body["target"], body["amount"])
        except (KeyError, TypeError) as ex:
            raise Invalid("source, target and amount are needed") from ex
        if not all(type(number) is int for number in wanted) or wanted.amount <= 0:
            raise Invalid("source, target and amount are whole numbers, amount is positive")
        return wanted


async def prepare(db: PoolManager) -> None:
    """Create what is missing. Several processes may start at once: one at a time does it."""
    async with db.connection() as conn:
        await conn.execute("select pg_advisory_xact_lock(20261122)")
        await conn.execute(SCHEMA)
        await conn.execute(
            "insert into accounts select id, %s from generate_series(1, %s) id"
            " on conflict do nothing",
            (BALANCE, ACCOUNTS),
        )


async def balance(conn: AsyncConnection[Any], account: int) -> int:
    """Return what an account holds."""
    cursor = await conn.execute("select balance from accounts where id = %s", (account,))
    row = await cursor.fetchone()
    if row is None:
        raise UnknownAccount(f"there is no account {account}")
    return int(row[0])


async def transfer(conn: AsyncConnection[Any], wanted: Transfer) -> int:
    """
    Move money from one account to another, and return the number of the transfer.

    Takes first and gives afterwards: if there is nobody to give to, the caller's transaction has
    to take the first step back.
    """
    source, target, amount = wanted
    # In one order, whoever pays whom: two that cross would wait for each other.
    await conn.execute(
        "select from accounts where id in (%s, %s) order by id for update", (source, target)
    )
    taken = await conn.execute(
        "update accounts set balance = balance - %s where id = %s and balance >= %s",
        (amount, source, amount),
    )
    if not taken.rowcount:
        held = await balance(conn, source)
        raise InsufficientFunds(f"account {source} has {held}, not {amount}")
    given = await conn.execute(
        "update accounts set balance = balance + %s where id = %s", (amount, target)
    )
    if not given.rowcount:
        raise UnknownAccount(f"there is no account {target}")
    cursor = await conn.execute(
        "insert into transfers (source, target, amount) values (%s, %s, %s) returning id",
        (source, target, amount),
    )
    row = await cursor.fetchone()
    assert row is not None
    return int(row[0])


async def statement(db: PoolManager) -> AsyncIterator[str]:
    """
    Yield all transfers, a line of text for each.

    Holds a connection for the time of a page, and none while the client reads it.
    """
    last = 0
    while rows := await db.fetchall(
        "select id, source, target, amount from transfers where id > %s order by id limit %s",
        (last, PAGE),
    ):
        for last, source, target, amount in rows:
            yield f"{last}: {source} to {target}, {amount}\n"
