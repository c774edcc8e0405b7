"""
SQLAlchemy's async engine, over a manager.

Tried with SQLAlchemy 2.0.40 and 2.1.9.
"""

from __future__ import annotations

import asyncio
import gc
import inspect
import json
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from decimal import Decimal
from ipaddress import IPv4Address
from typing import Any

import psycopg
import pytest
from psycopg.rows import dict_row
from sqlalchemy import JSON, ForeignKey, bindparam, select, text
from sqlalchemy.dialects.postgresql import HSTORE, INET
from sqlalchemy.exc import DBAPIError, IntegrityError, OperationalError, SAWarning
from sqlalchemy.ext.asyncio import AsyncAttrs, AsyncSession, async_sessionmaker
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, relationship

from poolkeeper import (
    AcquireTimeout,
    ClosedError,
    ConfigError,
    LoopMismatchError,
    NotOpenError,
    PoolManager,
)
from poolkeeper.adapters.sqlalchemy import create_async_engine
from tests.support.proxy import FaultProxy

Make = Callable[..., PoolManager[Any]]


class Base(AsyncAttrs, DeclarativeBase):
    pass


class Owner(Base):
    __tablename__ = "owners"
    id: Mapped[int] = mapped_column(primary_key=True)
    accounts: Mapped[list[Account]] = relationship()


class Account(Base):
    __tablename__ = "accounts"
    id: Mapped[int] = mapped_column(primary_key=True)
    owner: Mapped[int] = mapped_column(ForeignKey("owners.id"))
    balance: Mapped[Decimal]


@pytest.fixture
async def db(database: str) -> AsyncIterator[PoolManager[Any]]:
    """A manager on a database of the test's own, open, with the tables above."""
    db = PoolManager(database, min_size=1, max_size=2, timeout=10, name="shop")
    async with db:
        async with create_async_engine(db).begin() as conn:
            await conn.run_sync(Base.metadata.create_all)
        yield db
        await all_back(db)


async def all_back(db: PoolManager[Any]) -> None:
    """Wait until nobody has a connection."""
    async with asyncio.timeout(20):
        while (snapshot := db.snapshot()).in_use or snapshot.idle != snapshot.total:
            await asyncio.sleep(0.01)


def line_of(function: Callable[..., Any], code: str) -> str:
    """Where *code* stands in *function*, as messages name it."""
    lines, first = inspect.getsourcelines(function)
    (number,) = (first + n for n, line in enumerate(lines) if code in line)
    return f"tests/clients/test_sqlalchemy.py:{number}"


async def balance(db: PoolManager[Any], account: int) -> Any:
    return await db.fetchval("select balance from accounts where id = %s", (account,))


# --- sessions -------------------------------------------------------------------------------------


async def test_a_session_commits_and_its_connection_goes_back(db: PoolManager[Any]) -> None:
    sessions = async_sessionmaker(create_async_engine(db), expire_on_commit=False)
    async with sessions() as session, session.begin():
        session.add(Owner(id=1, accounts=[Account(id=1, balance=Decimal("9.5"))]))
    await all_back(db)
    assert await balance(db, 1) == Decimal("9.5")
    async with sessions() as session:
        owner = await session.get_one(Owner, 1)
        assert db.snapshot().in_use == 1
        assert [account.id for account in await owner.awaitable_attrs.accounts] == [1]
        await session.commit()
        assert db.snapshot().in_use == 0  # between two transactions it holds none
        assert (await session.scalars(select(Account.balance))).all() == [Decimal("9.5")]


async def test_a_session_that_fails_is_rolled_back(db: PoolManager[Any]) -> None:
    sessions = async_sessionmaker(create_async_engine(db))
    async with sessions.begin() as session:
        session.add(Owner(id=1, accounts=[Account(id=1, balance=Decimal(1))]))
    with pytest.raises(IntegrityError):
        async with sessions.begin() as session:
            (await session.get_one(Account, 1)).balance = Decimal(7)
            await session.flush()
            session.add(Account(id=2, owner=99, balance=Decimal(0)))
    with pytest.raises(KeyError):
        async with sessions.begin() as session:
            (await session.get_one(Account, 1)).balance = Decimal(8)
            await session.flush()
            raise KeyError
    async with sessions() as session:  # closed without a commit
        (await session.get_one(Account, 1)).balance = Decimal(9)
        await session.flush()
    await all_back(db)
    assert await balance(db, 1) == 1


async def test_many_sessions_share_few_connections(db: PoolManager[Any]) -> None:
    sessions = async_sessionmaker(create_async_engine(db))
    async with sessions.begin() as session:
        session.add(Owner(id=1, accounts=[Account(id=1, balance=Decimal(0))]))

    async def pay() -> None:
        async with sessions.begin() as session:
            account = await session.get_one(Account, 1, with_for_update=True)
            account.balance += 1

    await asyncio.gather(*(pay() for _ in range(40)))
    assert await balance(db, 1) == 40
    assert db.snapshot().total <= 2


async def test_a_result_is_streamed(db: PoolManager[Any]) -> None:
    async with create_async_engine(db).connect() as conn:
        result = await conn.stream(text("select generate_series(1, 1000)"))
        assert [row[0] async for row in result] == list(range(1, 1001))


async def test_a_cancelled_session_costs_no_connection(db: PoolManager[Any]) -> None:
    sessions = async_sessionmaker(create_async_engine(db))

    async def long() -> None:
        async with sessions.begin() as session:
            await session.execute(text("insert into owners values (7)"))
            await session.execute(text("select pg_sleep(60)"))

    for again in range(6):
        task = asyncio.create_task(long())
        async with asyncio.timeout(20):
            while not await db.fetchval(
                "select count(*) from pg_stat_activity where query like 'select pg_sleep(60)%%'"
                " and state = 'active' and datname = current_database()"
            ):
                await asyncio.sleep(0.01)
        task.cancel()
        if again % 2:
            await asyncio.sleep(0)
            task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    await all_back(db)
    assert await db.fetchval("select count(*) from owners") == 0
    assert db.snapshot().total <= 2
    async with db.connection(), db.connection():
        pass  # neither is missing


# --- whose line it is -----------------------------------------------------------------------------


async def hold(engine: Any, enough: asyncio.Event, held: asyncio.Event) -> None:
    async with AsyncSession(engine) as session:
        await session.execute(text("select 1"))
        held.set()
        await enough.wait()


async def test_an_exhausted_pool_names_the_lines_of_the_program(db: PoolManager[Any]) -> None:
    engine = create_async_engine(db)
    enough = asyncio.Event()
    events = [asyncio.Event(), asyncio.Event()]
    tasks = [asyncio.create_task(hold(engine, enough, held)) for held in events]
    for held in events:
        await held.wait()
    assert {row.site for row in db.snapshot().checkouts} == {
        line_of(hold, 'session.execute(text("select 1"))')
    }

    async def wait() -> None:
        async with engine.connect():
            pass

    waiting = asyncio.create_task(wait())
    async with asyncio.timeout(20):
        while not (waiters := db.snapshot().waiters):
            await asyncio.sleep(0.01)
    assert waiters[0].site == line_of(wait, "async with engine.connect()")
    waiting.cancel()
    await asyncio.wait([waiting])

    enough.set()
    await asyncio.gather(*tasks)


async def test_who_gets_no_connection_is_told_why(database: str) -> None:
    async with PoolManager(database, min_size=1, max_size=1, timeout=0.3) as db:
        engine = create_async_engine(db)
        enough, held = asyncio.Event(), asyncio.Event()
        holder = asyncio.create_task(hold(engine, enough, held))
        await held.wait()
        with pytest.raises(OperationalError, match="could not acquire") as caught:
            await AsyncSession(engine).execute(text("select 1"))
        assert isinstance(caught.value.orig, AcquireTimeout)
        assert line_of(hold, 'session.execute(text("select 1"))') in str(caught.value)
        assert "site-packages" not in str(caught.value)
        enough.set()
        await holder


async def test_a_session_that_is_forgotten_gives_its_connection_back_and_is_named(
    db: PoolManager[Any], caplog: pytest.LogCaptureFixture
) -> None:
    engine = create_async_engine(db)

    async def forget() -> None:
        conn = await engine.connect()
        await conn.execute(text("insert into owners values (1)"))

    async def forget_for_good() -> None:
        await forget()
        gc.collect()

    with pytest.warns(SAWarning, match="garbage collector"):
        await forget_for_good()
    await all_back(db)
    assert "was dropped without being given back" in caplog.text
    assert line_of(forget, "await engine.connect()") in caplog.text
    assert await db.fetchval("select count(*) from owners") == 0


# --- when the pool is not there -------------------------------------------------------------------


async def test_an_engine_over_a_closed_pool_says_so(database: str) -> None:
    db = PoolManager(database, min_size=1, name="shop")
    engine = create_async_engine(db)

    async def too_soon() -> None:
        await AsyncSession(engine).execute(text("select 1"))

    with pytest.raises(OperationalError, match='pool "shop" is not open') as caught:
        await too_soon()
    assert isinstance(caught.value.orig, NotOpenError)
    assert f"Used at {line_of(too_soon, 'execute')} " in str(caught.value)
    async with db, AsyncSession(engine) as session:
        assert await session.scalar(text("select 1")) == 1
    with pytest.raises(OperationalError, match='pool "shop" is closed') as caught:
        await AsyncSession(engine).execute(text("select 1"))
    assert isinstance(caught.value.orig, ClosedError)


async def test_a_session_that_is_open_when_the_pool_closes_ends_with_its_error(
    database: str,
) -> None:
    db = PoolManager(database, min_size=1, close_timeout=0.1)
    session = AsyncSession(create_async_engine(db))
    async with db:
        await session.execute(text("create table notes (id int)"))

        async def closes() -> None:
            await db.close()

        await asyncio.create_task(closes())
        with pytest.raises(DBAPIError):
            await session.commit()
        await session.close()
    async with db:
        assert not await db.fetchval("select count(*) from pg_class where relname = 'notes'")


def test_one_engine_serves_the_loops_of_its_manager_one_after_the_other(database: str) -> None:
    db = PoolManager(database, min_size=1, max_size=2)
    engine = create_async_engine(db)

    async def main(opens: bool) -> int:
        if opens:
            await db.open()
        try:
            async with AsyncSession(engine) as session:
                return int(await session.scalar(text("select 1")) or 0)
        finally:
            if opens:
                await db.close()

    assert asyncio.run(main(True)) == 1
    assert asyncio.run(main(True)) == 1

    async def from_another_loop() -> None:
        async with db:
            with pytest.raises(LoopMismatchError, match="different event loop"):
                await asyncio.to_thread(asyncio.run, main(False))

    asyncio.run(from_another_loop())


async def test_after_an_outage_no_connection_is_missing(
    proxy: FaultProxy, caplog: pytest.LogCaptureFixture
) -> None:
    """A close() of psycopg's gives back no connection that is broken, close_returns or not."""
    db = PoolManager(proxy.dsn, min_size=2, max_size=2, timeout=20, close_returns=True)
    async with db:
        engine = create_async_engine(db)
        conns = [await engine.connect() for _ in range(2)]
        for conn in conns:
            await conn.execute(text("select 1"))
        proxy.cut()
        for conn in conns:
            with pytest.raises(DBAPIError):
                await conn.execute(text("select 1"))
            await conn.close()

        async def one(number: int) -> Any:
            async with engine.connect() as conn:
                return await conn.scalar(text("select :n"), {"n": number})

        assert await asyncio.gather(*map(one, range(8))) == list(range(8))
        await all_back(db)
        assert db.snapshot().total == 2
    assert "dropped" not in caplog.text


# --- how the connections are ----------------------------------------------------------------------


async def test_what_others_have_of_the_manager_does_not_reach_sqlalchemy(database: str) -> None:
    """Rows are tuples and transactions are begun, for SQLAlchemy; for others as before."""
    kwargs = {"autocommit": True, "row_factory": dict_row}
    db: PoolManager[Any] = PoolManager(database, kwargs=kwargs, min_size=1, max_size=1)
    async with db:
        engine = create_async_engine(db)
        async with engine.begin() as conn:
            await conn.execute(text("create table notes (id int)"))
        async with engine.connect() as conn:
            await conn.execute(text("insert into notes values (1)"))
            assert (await conn.execute(text("select id from notes"))).all() == [(1,)]
        assert await db.fetchall("select id from notes") == []
        async with engine.connect() as conn:
            await conn.execution_options(isolation_level="AUTOCOMMIT")
            await conn.execute(text("insert into notes values (2)"))
        assert await db.fetchall("select id from notes") == [{"id": 2}]
        async with db.connection() as raw:
            assert raw.autocommit


async def test_an_isolation_level_holds_for_the_engine_alone(db: PoolManager[Any]) -> None:
    engine = create_async_engine(db, isolation_level="SERIALIZABLE")
    for _ in range(2):
        async with engine.connect() as conn:
            assert await conn.scalar(text("show transaction_isolation")) == "serializable"
    async with db.connection() as raw:
        assert raw.isolation_level is None


async def test_what_sqlalchemy_registers_with_its_own_connections_holds_here(
    db: PoolManager[Any],
) -> None:
    engine = create_async_engine(
        db,
        json_serializer=lambda value: json.dumps({"wrapped": value}),
        json_deserializer=lambda value: ("read", json.loads(value)),
        native_inet_types=False,
    )
    query = text("select cast(:j as json) as j, '10.0.0.1'::inet as i")
    table = query.bindparams(bindparam("j", type_=JSON)).columns(j=JSON, i=INET)
    for _ in range(3):
        async with engine.connect() as conn:
            row = (await conn.execute(table, {"j": [1]})).one()
            assert row.j == ("read", {"wrapped": [1]})
            assert row.i == "10.0.0.1"
    assert await db.fetchval("select '10.0.0.1'::inet") == IPv4Address("10.0.0.1")
    assert await db.fetchval("select '[1]'::json") == [1]


async def test_hstore_is_read_on_every_connection(db: PoolManager[Any]) -> None:
    try:
        await db.execute("create extension hstore")
    except psycopg.errors.FeatureNotSupported:
        pytest.skip("this server has no hstore")
    engine = create_async_engine(db)
    for _ in range(3):
        async with engine.connect() as conn:
            query = text("select 'a=>1'::hstore as h").columns(h=HSTORE)
            assert await conn.scalar(query) == {"a": "1"}


# --- what cannot be -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("option", "instead"),
    [
        ("pool_size", "min_size and max_size"),
        ("max_overflow", "max_size"),
        ("pool_recycle", "max_lifetime"),
        ("poolclass", "db.pool"),
        ("connect_args", "kwargs"),
        ("url", "conninfo"),
    ],
)
def test_what_is_for_a_pool_of_sqlalchemys_is_refused(option: str, instead: str) -> None:
    db = PoolManager()
    with pytest.raises(ConfigError, match=f"^{option} cannot be given") as caught:
        create_async_engine(db, **{option: 1})
    assert caught.value.parameter == option
    assert caught.value.detail is not None
    assert instead in caught.value.detail


def test_without_sqlalchemy_the_extra_is_named() -> None:
    source = "import sys\nsys.modules['sqlalchemy'] = None\nimport poolkeeper.adapters.sqlalchemy\n"
    ended = subprocess.run(
        [sys.executable, "-c", source], capture_output=True, text=True, check=False
    )
    assert "sqlalchemy is not installed" in ended.stderr
    assert 'pip install "poolkeeper[sqlalchemy]"' in ended.stderr
