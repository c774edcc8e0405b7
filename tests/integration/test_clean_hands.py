"""What one borrower changed, the next one does not find."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import psycopg
import pytest
from psycopg import IsolationLevel
from psycopg.adapt import Loader
from psycopg.rows import dict_row, namedtuple_row, tuple_row
from psycopg.types import TypeInfo
from psycopg.types.string import StrDumper

from poolkeeper import PoolManager
from tests.support.server import admin
from tests.support.wire import wire_of

MakeManager = Callable[..., PoolManager[Any]]
Step = Callable[[Any], Awaitable[None]]


async def opened(make_manager: MakeManager, **arguments: Any) -> PoolManager[Any]:
    """Open a manager with a single connection, so that the next borrower gets the same session."""
    db = make_manager(**{"min_size": 1, "max_size": 1, "name": "orders", "timeout": 5} | arguments)
    await db.open()
    return db


@contextlib.asynccontextmanager
async def borrower(db: PoolManager[Any], pids: set[int]) -> Any:
    """A checkout, until it is put in order; *pids* collects which session it was."""
    async with db.connection() as conn:
        pids.add(conn.info.backend_pid)
        yield conn
    await put_in_order(db)


async def put_in_order(db: PoolManager[Any]) -> None:
    """Wait until the pool has done what the borrower does not wait for."""
    async with asyncio.timeout(10):
        while db.snapshot().returning or db.snapshot().making:
            await asyncio.sleep(0.005)


# --- attributes of the connection ---------------------------------------------------------------


class RawCursor(psycopg.AsyncRawCursor[Any]):
    pass


class FarCursor(psycopg.AsyncServerCursor[Any]):
    pass


class ShoutingDumper(StrDumper):
    def dump(self, obj: str) -> Any:
        return super().dump(obj.upper())


class WhisperingDumper(StrDumper):
    def dump(self, obj: str) -> Any:
        return super().dump(obj.lower())


class NumberLoader(Loader):
    def load(self, data: Any) -> str:
        return f"number {bytes(data).decode()}"


class CountLoader(Loader):
    def load(self, data: Any) -> str:
        return f"count {bytes(data).decode()}"


def on_notice(diagnostic: psycopg.errors.Diagnostic) -> None:
    pass


def other_on_notice(diagnostic: psycopg.errors.Diagnostic) -> None:
    pass


def on_notify(notify: psycopg.Notify) -> None:
    pass


def other_on_notify(notify: psycopg.Notify) -> None:
    pass


@dataclass(frozen=True)
class Case:
    """One attribute: what configure may set, what a borrower changes, and how it is read."""

    name: str
    configure: Step
    change: Step
    read: Callable[[Any], Any]

    def __str__(self) -> str:
        return self.name


def case(
    name: str,
    configure: Callable[[Any], Any],
    change: Callable[[Any], Any],
    read: Callable[[Any], Any],
) -> Case:
    def awaited(step: Callable[[Any], Any]) -> Step:
        async def run(conn: Any) -> None:
            result = step(conn)
            if asyncio.iscoroutine(result):
                await result

        return run

    return Case(name, awaited(configure), awaited(change), read)


def assign(name: str, value: Any) -> Callable[[Any], None]:
    return lambda conn: setattr(conn, name, value)


async def dumped(conn: Any) -> Any:
    return (await (await conn.execute("select %s", ("Ab",))).fetchone())[0]


async def loaded(conn: Any) -> Any:
    return (await (await conn.execute("select 5::int4")).fetchone())[0]


CASES = [
    case(
        "autocommit",
        lambda conn: conn.set_autocommit(True),
        lambda conn: conn.set_autocommit(not conn.autocommit),
        lambda conn: conn.autocommit,
    ),
    case(
        "isolation_level",
        lambda conn: conn.set_isolation_level(IsolationLevel.SERIALIZABLE),
        lambda conn: conn.set_isolation_level(IsolationLevel.REPEATABLE_READ),
        lambda conn: conn.isolation_level,
    ),
    case(
        "read_only",
        lambda conn: conn.set_read_only(False),
        lambda conn: conn.set_read_only(True),
        lambda conn: conn.read_only,
    ),
    case(
        "deferrable",
        lambda conn: conn.set_deferrable(False),
        lambda conn: conn.set_deferrable(True),
        lambda conn: conn.deferrable,
    ),
    case(
        "row_factory",
        assign("row_factory", namedtuple_row),
        assign("row_factory", dict_row),
        lambda conn: conn.row_factory,
    ),
    case(
        "cursor_factory",
        assign("cursor_factory", psycopg.AsyncClientCursor),
        assign("cursor_factory", RawCursor),
        lambda conn: conn.cursor_factory,
    ),
    case(
        "server_cursor_factory",
        assign("server_cursor_factory", type("Configured", (FarCursor,), {})),
        assign("server_cursor_factory", FarCursor),
        lambda conn: conn.server_cursor_factory,
    ),
    case(
        "prepare_threshold",
        assign("prepare_threshold", None),
        assign("prepare_threshold", 1),
        lambda conn: conn.prepare_threshold,
    ),
    case(
        "prepared_max",
        assign("prepared_max", 7),
        assign("prepared_max", 3),
        lambda conn: conn.prepared_max,
    ),
    case(
        "dumpers",
        lambda conn: conn.adapters.register_dumper(str, WhisperingDumper),
        lambda conn: conn.adapters.register_dumper(str, ShoutingDumper),
        dumped,
    ),
    case(
        "loaders",
        lambda conn: conn.adapters.register_loader("int4", CountLoader),
        lambda conn: conn.adapters.register_loader("int4", NumberLoader),
        loaded,
    ),
    case(
        "types",
        lambda conn: TypeInfo("configured", 900001, 900002).register(conn),
        lambda conn: TypeInfo("changed", 900003, 900004).register(conn),
        lambda conn: [conn.adapters.types.get(name) for name in ("changed", "configured")],
    ),
    case(
        "types, added by hand",
        lambda conn: conn.adapters.types.add(TypeInfo("configured", 900001, 900002)),
        lambda conn: conn.adapters.types.add(TypeInfo("changed", 900003, 900004)),
        lambda conn: [conn.adapters.types.get(name) for name in ("changed", "configured")],
    ),
    case(
        "notice handlers added",
        lambda conn: conn.add_notice_handler(on_notice),
        lambda conn: conn.add_notice_handler(other_on_notice),
        lambda conn: list(conn._notice_handlers),
    ),
    case(
        "notify handlers added",
        lambda conn: conn.add_notify_handler(on_notify),
        lambda conn: conn.add_notify_handler(other_on_notify),
        lambda conn: list(conn._notify_handlers),
    ),
    case(
        "an attribute of the user's own",
        assign("tenant", "nobody"),
        assign("tenant", "acme"),
        lambda conn: getattr(conn, "tenant", None),
    ),
]


async def value(read: Callable[[Any], Any], conn: Any) -> Any:
    found = read(conn)
    return await found if asyncio.iscoroutine(found) else found


@pytest.mark.parametrize("by_configure", [False, True], ids=["default", "configured"])
@pytest.mark.parametrize("case", CASES, ids=str)
async def test_the_next_borrower_finds_what_configure_left(
    make_manager: MakeManager, case: Case, by_configure: bool
) -> None:
    async def configure(conn: Any) -> None:
        if by_configure:
            await case.configure(conn)

    db = await opened(make_manager, configure=configure)
    pids: set[int] = set()
    async with borrower(db, pids) as conn:
        before = await value(case.read, conn)
        await conn.rollback()
        await case.change(conn)
        assert await value(case.read, conn) != before
    for _ in range(3):
        async with borrower(db, pids) as conn:
            assert await value(case.read, conn) == before
    async with borrower(db, pids) as conn:
        await conn.rollback()
        await case.change(conn)
        raised = await value(case.read, conn)
        assert raised != before
    async with borrower(db, pids) as conn:
        assert await value(case.read, conn) == before
    assert len(pids) == 1


@pytest.mark.parametrize(
    ("add", "remove", "attribute", "handler"),
    [
        ("add_notice_handler", "remove_notice_handler", "_notice_handlers", on_notice),
        ("add_notify_handler", "remove_notify_handler", "_notify_handlers", on_notify),
    ],
)
async def test_a_handler_that_a_borrower_removed_is_back(
    make_manager: MakeManager, add: str, remove: str, attribute: str, handler: Any
) -> None:
    async def configure(conn: Any) -> None:
        getattr(conn, add)(handler)

    db = await opened(make_manager, configure=configure)
    async with db.connection() as conn:
        getattr(conn, remove)(handler)
    async with db.connection() as conn:
        assert getattr(conn, attribute) == [handler]


async def test_an_attribute_that_a_borrower_deleted_is_back(make_manager: MakeManager) -> None:
    async def configure(conn: Any) -> None:
        conn.tenant = "nobody"

    db = await opened(make_manager, configure=configure)
    async with db.connection() as conn:
        del conn.tenant
    async with db.connection() as conn:
        assert conn.tenant == "nobody"


async def test_handlers_of_configure_are_called_for_every_borrower(
    make_manager: MakeManager,
) -> None:
    notices: list[str | None] = []
    notifies: list[str] = []

    async def configure(conn: Any) -> None:
        conn.add_notice_handler(lambda diagnostic: notices.append(diagnostic.message_primary))
        conn.add_notify_handler(lambda notify: notifies.append(notify.payload))
        await conn.execute("listen calls")
        await conn.commit()

    db = await opened(make_manager, configure=configure)
    pids: set[int] = set()
    for n in range(1, 4):
        async with borrower(db, pids) as conn:
            own: list[Any] = []
            conn.add_notice_handler(own.append)
            await conn.execute(f"do $$ begin raise notice 'call {n}'; end $$")
            await conn.execute(f"notify calls, 'call {n}'")
            await conn.commit()
            await conn.execute("select 1")
            assert len(own) == 1
        assert notices == [f"call {i}" for i in range(1, n + 1)]
        assert notifies == [f"call {i}" for i in range(1, n + 1)]
    assert len(pids) == 1


async def test_a_notification_meant_for_one_borrower_does_not_reach_the_next(
    make_manager: MakeManager,
) -> None:
    db = await opened(make_manager, kwargs={"autocommit": True})
    async with db.connection() as conn:
        await conn.execute("listen orders")
        await conn.execute("notify orders, 'mine'")
        await conn.execute("select 1")  # it has arrived, and waits for notifies()
        await conn.execute("unlisten *")
    async with db.connection() as conn:
        assert [notify.payload async for notify in conn.notifies(timeout=0)] == []


async def test_what_connect_was_given_is_kept(make_manager: MakeManager) -> None:
    db = await opened(
        make_manager,
        kwargs={
            "autocommit": True,
            "row_factory": dict_row,
            "prepare_threshold": 2,
            "cursor_factory": psycopg.AsyncClientCursor,
        },
    )
    async with db.connection() as conn:
        await conn.set_autocommit(False)
        conn.row_factory = tuple_row
        conn.prepare_threshold = None
        conn.cursor_factory = psycopg.AsyncCursor
    async with db.connection() as conn:
        assert conn.autocommit
        assert conn.row_factory is dict_row
        assert conn.prepare_threshold == 2
        assert conn.cursor_factory is psycopg.AsyncClientCursor
        assert await (await conn.execute("select 1 as n")).fetchone() == {"n": 1}


async def test_a_pipeline_left_open_ends_its_connection(
    make_manager: MakeManager, caplog: pytest.LogCaptureFixture
) -> None:
    """What it would still answer is unknown; the next borrower gets a new one."""
    db = await opened(make_manager)
    conn = await db.pool.getconn()
    pid = conn.info.backend_pid
    pipeline = conn.pipeline()
    await pipeline.__aenter__()
    await conn.execute("select 1")
    await db.pool.putconn(conn)
    assert 'a connection of pool "orders" came back in pipeline mode: closed' in caplog.text
    async with db.connection() as other:
        assert other.pgconn.pipeline_status == psycopg.pq.PipelineStatus.OFF
        assert other.info.backend_pid != pid
        assert await (await other.execute("select 1")).fetchone() == (1,)
    with pytest.raises(psycopg.InterfaceError):
        await pipeline.__aexit__(None, None, None)


async def test_a_transaction_block_left_open_is_rolled_back(make_manager: MakeManager) -> None:
    db = await opened(make_manager)
    pids: set[int] = set()
    conn = await db.pool.getconn()
    pids.add(conn.info.backend_pid)
    outer, inner = conn.transaction(), conn.transaction()
    await outer.__aenter__()
    await inner.__aenter__()
    await conn.execute("create table left_open (n int)")
    await db.pool.putconn(conn)
    async with borrower(db, pids) as other:
        assert other._num_transactions == 0
        async with other.transaction():
            await other.execute("create table left_open (n int)")
            raise psycopg.Rollback
    assert len(pids) == 1
    assert await db.fetchval("select to_regclass('left_open')") is None


# --- parameters that the server reports ---------------------------------------------------------


@pytest.fixture
def roles(dsn: str) -> Any:
    """A role that is no superuser, and one that is."""
    admin(dsn, "create role hands_plain")
    admin(dsn, "create role hands_super superuser")
    yield
    admin(dsn, "drop role hands_plain")
    admin(dsn, "drop role hands_super")


PARAMETERS = [
    ("client_encoding", "set client_encoding = 'LATIN1'"),
    ("DateStyle", "set DateStyle = 'German, DMY'"),
    ("IntervalStyle", "set IntervalStyle = 'iso_8601'"),
    ("TimeZone", "set TimeZone = 'Asia/Tokyo'"),
    ("application_name", "set application_name = 'O''Brien \"x\"'"),
    ("default_transaction_read_only", "set default_transaction_read_only = on"),
    ("standard_conforming_strings", "set standard_conforming_strings = off"),
    ("search_path", 'set search_path = pg_catalog, "Weird, one"'),
    ("session_authorization", "set session authorization hands_plain"),
    ("session_authorization", "set session authorization hands_super"),
    ("is_superuser", "set role hands_plain"),
]


@pytest.mark.parametrize("committed", [True, False], ids=["committed", "autocommit"])
@pytest.mark.parametrize(("parameter", "statement"), PARAMETERS, ids=lambda text: text)
async def test_a_reported_parameter_is_put_back(
    make_manager: MakeManager,
    roles: None,
    caplog: pytest.LogCaptureFixture,
    parameter: str,
    statement: str,
    committed: bool,
) -> None:
    db = await opened(make_manager)
    pids: set[int] = set()
    async with borrower(db, pids) as conn:
        if conn.info.parameter_status(parameter) is None:
            assert conn.info.server_version < 180000
            assert parameter == "search_path"
            return  # this server does not report it
        before = await settings(conn)
        await conn.rollback()
        await conn.set_autocommit(not committed)
        await conn.execute(statement)
        assert await settings(conn) != before
        caplog.set_level(logging.INFO, "poolkeeper")
    assert "came back with other settings, which are put back: " in caplog.text
    assert parameter in caplog.text
    async with borrower(db, pids) as conn:
        assert not conn.autocommit
        assert await settings(conn) == before
    assert len(pids) == 1


async def settings(conn: Any) -> Any:
    names = sorted({name for name, _ in PARAMETERS} - {"session_authorization"})
    selected = ", ".join(f"current_setting('{name}')" for name in names)
    query = f"select session_user::text, current_user::text, {selected}"
    return await (await conn.execute(query)).fetchone()


async def test_several_parameters_are_put_back_in_one_go(make_manager: MakeManager) -> None:
    db = await opened(make_manager)
    async with db.connection() as conn:
        before = await settings(conn)
        for _, statement in PARAMETERS[:7]:
            await conn.execute(statement)
    await put_in_order(db)
    with wire_of(db) as wire:
        async with db.connection() as conn:
            assert await settings(conn) == before
            await conn.rollback()
            for _, statement in PARAMETERS[:7]:
                await conn.execute(statement)
            await conn.commit()
            wire.clear()
        await put_in_order(db)
        assert wire.round_trips() == 1


async def test_what_configure_set_on_the_server_is_what_is_put_back(
    make_manager: MakeManager, roles: None
) -> None:
    async def configure(conn: Any) -> None:
        await conn.set_autocommit(True)
        await conn.execute("set TimeZone = 'Europe/Paris'")
        await conn.execute("set statement_timeout = '41s'")
        await conn.set_autocommit(False)

    db = await opened(make_manager, configure=configure)
    pids: set[int] = set()
    for change in ("set TimeZone = 'Asia/Tokyo'", "set role hands_plain", "reset TimeZone"):
        async with borrower(db, pids) as conn:
            await conn.execute(change)
        async with borrower(db, pids) as conn:
            query = "select current_setting('TimeZone'), current_setting('statement_timeout')"
            assert await (await conn.execute(query)).fetchone() == ("Europe/Paris", "41s")
    assert len(pids) == 1


@pytest.mark.parametrize("role", ["hands_plain", "hands_super"])
@pytest.mark.parametrize("change", ["reset role", "set role {other}", "set role none"])
async def test_a_role_of_configure_is_put_back_by_configure(
    make_manager: MakeManager, roles: None, role: str, change: str
) -> None:
    """The server does not tell which role it was: configure knows."""
    other = {"hands_plain": "hands_super", "hands_super": "hands_plain"}[role]

    async def configure(conn: Any) -> None:
        await conn.execute(f"set role {role}")
        await conn.commit()

    db = await opened(make_manager, configure=configure)
    pids: set[int] = set()
    for _ in range(3):
        async with borrower(db, pids) as conn:
            assert await (await conn.execute("select current_user::text")).fetchone() == (role,)
            await conn.execute(change.format(other=other))
            if role == "hands_super" and other not in change:
                await conn.execute("set role hands_plain")  # superusers look alike
    assert len(pids) == 1


async def test_a_role_that_cannot_be_put_back_costs_the_connection(
    make_manager: MakeManager, roles: None
) -> None:
    """Nobody gets a session that is another user's than configure made it."""
    once = ["set role hands_plain"]

    async def configure(conn: Any) -> None:
        if once:
            await conn.execute(once.pop())
            await conn.commit()

    db = await opened(make_manager, configure=configure)
    async with db.connection() as conn:
        pid = conn.info.backend_pid
        await conn.execute("reset role")
    async with db.connection() as conn:
        assert conn.info.backend_pid != pid


async def test_settings_that_are_put_back_are_told_once_with_the_line(
    make_manager: MakeManager, caplog: pytest.LogCaptureFixture
) -> None:
    db = await opened(make_manager)
    caplog.set_level(logging.DEBUG, "poolkeeper")
    for _ in range(5):
        async with db.connection() as conn:
            await conn.execute("set TimeZone = 'Asia/Tokyo'")
    async with db.connection():
        pass  # the last one is put right by now
    told = [r for r in caplog.records if "other settings" in r.getMessage()]
    assert [r.levelname for r in told] == ["INFO", *["DEBUG"] * 4]
    assert "test_clean_hands.py:" in told[0].getMessage()


async def test_a_set_that_was_rolled_back_costs_nothing_extra(make_manager: MakeManager) -> None:
    db = await opened(make_manager)
    with wire_of(db) as wire:

        async def cost(statement: str) -> list[str]:
            wire.clear()
            with contextlib.suppress(KeyError):
                async with db.connection() as conn:
                    await conn.execute(statement)
                    raise KeyError
            return wire.sent()

        plain = await cost("select 1")
        assert plain.count("Query") + plain.count("Sync") == 3  # begin, select, rollback
        assert len(await cost("set TimeZone = 'Asia/Tokyo'")) == len(plain)

        # Given back with the transaction open: rolled back by the pool.
        wire.clear()
        conn = await db.pool.getconn()
        await conn.execute("set TimeZone = 'Asia/Tokyo'")
        await db.pool.putconn(conn)
        assert wire.round_trips() == 3
    assert await db.fetchval("show TimeZone") != "Asia/Tokyo"


async def test_a_clean_release_sends_nothing(make_manager: MakeManager) -> None:
    db = await opened(make_manager)
    async with db.connection() as conn:
        await conn.execute("select 1")
    with wire_of(db) as wire:
        async with db.connection() as conn:
            conn.row_factory = dict_row
            conn.add_notice_handler(on_notice)
            conn.adapters.register_dumper(str, ShoutingDumper)
            conn.prepare_threshold = 1
            await conn.set_autocommit(True)
            await conn.set_isolation_level(IsolationLevel.SERIALIZABLE)
        assert wire.sent() == []


async def test_set_local_needs_no_cleaning(make_manager: MakeManager) -> None:
    db = await opened(make_manager)
    with wire_of(db) as wire:
        async with db.connection() as conn:
            await conn.execute("set local TimeZone = 'Asia/Tokyo'")
        assert wire.round_trips() == 3  # begin, set local, commit


class HostileCursor(psycopg.AsyncCursor[Any]):
    """A cursor for special queries: it refuses all that are not its user's."""

    async def execute(self, query: Any, *args: Any, **kwargs: Any) -> Any:
        if not str(query).startswith(("select ", "set ")):
            raise ValueError(f"not a query for this cursor: {query}")
        return await super().execute(query, *args, **kwargs)


def hostile_row(cursor: Any) -> Any:
    """A row factory that takes one kind of rows only."""
    if cursor.description and [column.name for column in cursor.description] != ["mine"]:
        raise ValueError("not a row for this factory")
    return tuple_row(cursor)


@pytest.mark.parametrize("reset", [None, "discard"])
@pytest.mark.parametrize(
    "factories",
    [
        {"row_factory": namedtuple_row},
        {"row_factory": hostile_row},
        {"cursor_factory": HostileCursor},
        {"cursor_factory": psycopg.AsyncRawCursor},
    ],
    ids=lambda factories: next(iter(factories.values())).__name__,
)
async def test_what_the_pool_runs_does_not_meet_the_factories_of_the_user(
    make_manager: MakeManager,
    factories: dict[str, Any],
    reset: Any,
    caplog: pytest.LogCaptureFixture,
) -> None:
    db = await opened(make_manager, kwargs=factories, reset=reset)
    pids: set[int] = set()
    for _ in range(3):
        async with borrower(db, pids) as conn:
            await conn.execute("set time zone 'Asia/Tokyo'")
            await conn.execute("set datestyle to german")
        assert await db.check()
        await db.pool.check()
    async with borrower(db, pids) as conn:
        cursor = await conn.execute("select current_setting('TimeZone') as mine")
        assert (await cursor.fetchone())[0] != "Asia/Tokyo"
    async with db.connection():
        assert await db.check()  # on a connection beside the pool
    assert len(pids) == 1
    ours = [r for r in caplog.records if r.name != "asyncio"]  # its debug mode tells of slow tasks
    assert [r for r in ours if r.levelno >= logging.WARNING] == []


# --- reset= ---------------------------------------------------------------------------------------


async def test_discard_clears_what_is_not_reported(make_manager: MakeManager) -> None:
    configured = []

    async def configure(conn: Any) -> None:
        configured.append(conn.info.backend_pid)
        await conn.execute("set statement_timeout = '41s'")
        await conn.execute("set TimeZone = 'Europe/Paris'")
        await conn.commit()

    db = await opened(make_manager, configure=configure, reset="discard")
    pids: set[int] = set()
    async with borrower(db, pids) as conn:
        await conn.set_autocommit(True)
        await conn.execute("set statement_timeout = '1s'")
        await conn.execute("set work_mem = '1MB'")
        await conn.execute("set app.tenant = 'acme'")
        await conn.execute("set TimeZone = 'Asia/Tokyo'")
        await conn.execute("create temp table mine (n int)")
        await conn.execute("select pg_advisory_lock(4711)")
        await conn.execute("listen orders")
        await conn.execute("select %s::int", (1,), prepare=True)
        await conn.execute("declare far cursor with hold for select 1")
    async with borrower(db, pids) as conn:
        row = await (
            await conn.execute(
                """
                select current_setting('statement_timeout'),
                       current_setting('TimeZone'),
                       current_setting('work_mem') <> '1MB',
                       coalesce(current_setting('app.tenant', true), '') = '',
                       to_regclass('pg_temp.mine'),
                       (select count(*) from pg_locks where locktype = 'advisory'
                           and pid = pg_backend_pid()),
                       (select count(*) from pg_listening_channels()),
                       (select count(*) from pg_prepared_statements),
                       (select count(*) from pg_cursors where name = 'far')
                """
            )
        ).fetchone()
    assert row == ("41s", "Europe/Paris", True, True, None, 0, 0, 0, 0)
    assert len(pids) == 1
    assert len(configured) == 3  # once for the connection, once after each release


async def test_discard_brings_back_the_role_that_configure_has_set(
    make_manager: MakeManager, roles: None
) -> None:
    """Also where nothing is reported: from one superuser to another."""

    async def configure(conn: Any) -> None:
        await conn.execute("set role hands_super")
        await conn.commit()

    db = await opened(make_manager, configure=configure, reset="discard")
    pids: set[int] = set()
    for change in ("set role postgres", "reset role", "set session authorization postgres"):
        async with borrower(db, pids) as conn:
            await conn.execute(change)
        async with borrower(db, pids) as conn:
            query = "select current_user::text"
            assert await (await conn.execute(query)).fetchone() == ("hands_super",)
    assert len(pids) == 1


async def test_configure_run_again_adds_its_handlers_once(make_manager: MakeManager) -> None:
    notices: list[str | None] = []
    notifies: list[str] = []

    async def configure(conn: Any) -> None:
        conn.add_notice_handler(lambda diagnostic: notices.append(diagnostic.message_primary))
        conn.add_notify_handler(lambda notify: notifies.append(notify.payload))
        await conn.execute("listen calls")
        await conn.commit()

    db = await opened(make_manager, configure=configure, reset="discard")
    for n in range(3):
        notices.clear()
        notifies.clear()
        async with db.connection() as conn:
            await conn.execute(f"do $$ begin raise notice 'call {n}'; end $$")
            await conn.execute(f"notify calls, 'call {n}'")
            await conn.commit()
            await conn.execute("select 1")
        assert notices == [f"call {n}"]
        assert notifies == [f"call {n}"]


@pytest.mark.parametrize("threshold", [0, 1, 5, None])
async def test_discard_and_prepared_statements_agree(
    make_manager: MakeManager, threshold: int | None
) -> None:
    db = await opened(make_manager, reset="discard", kwargs={"prepare_threshold": threshold})
    pids: set[int] = set()
    for n in range(8):
        async with borrower(db, pids) as conn:
            for _ in range(3):
                row = await (await conn.execute("select %s::int + 1", (n,))).fetchone()
                assert row == (n + 1,)
    assert len(pids) == 1
    assert db.pool.get_stats().get("returns_bad", 0) == 0


async def test_prepared_statements_survive_a_plain_release(make_manager: MakeManager) -> None:
    db = await opened(make_manager, kwargs={"prepare_threshold": 0})
    with wire_of(db) as wire:
        async with db.connection() as conn:
            await conn.execute("select %s::int", (1,))
        assert "Parse" in wire.sent()
        for n in range(3):
            wire.clear()
            async with db.connection() as conn:
                assert await (await conn.execute("select %s::int", (n,))).fetchone() == (n,)
                sent = wire.sent()
            assert sent.count("Parse") == 1  # of BEGIN
            assert sent.count("Bind") == 2


async def test_the_count_towards_preparing_goes_on_over_releases(make_manager: MakeManager) -> None:
    db = await opened(make_manager, kwargs={"prepare_threshold": 3})
    for _ in range(6):
        await db.fetchval("select %s::int", (1,))
    count = "select count(*) from pg_prepared_statements where statement like 'select $1::int%%'"
    assert await db.fetchval(count) == 1


async def test_a_reset_of_the_users_own_gets_a_working_connection(
    make_manager: MakeManager,
) -> None:
    seen: list[Any] = []

    async def reset(conn: Any) -> None:
        seen.append((conn.info.transaction_status.name, conn.autocommit, conn.row_factory))
        await conn.execute("set statement_timeout = '42s'")
        await conn.commit()

    db = await opened(make_manager, reset=reset)
    pids: set[int] = set()
    async with borrower(db, pids) as conn:
        await conn.set_autocommit(True)
        conn.row_factory = dict_row
        await conn.execute("set statement_timeout = '1s'")
        await conn.execute("set TimeZone = 'Asia/Tokyo'")
    assert seen == [("IDLE", False, tuple_row)]
    async with borrower(db, pids) as conn:
        assert await (await conn.execute("show statement_timeout")).fetchone() == ("42s",)
        assert await (await conn.execute("show TimeZone")).fetchone() != ("Asia/Tokyo",)
    conn = await db.pool.getconn()
    await conn.execute("select 1")
    await db.pool.putconn(conn)  # in a transaction: rolled back before
    await put_in_order(db)
    assert [status for status, *_ in seen] == ["IDLE"] * 3
    assert len(pids) == 1


@pytest.mark.parametrize("fault", ["raises", "closes", "leaves a transaction"])
async def test_a_reset_that_fails_costs_the_connection(
    make_manager: MakeManager, fault: str, caplog: pytest.LogCaptureFixture
) -> None:
    faults = [fault]

    async def reset(conn: Any) -> None:
        now = faults.pop() if faults else ""
        if now == "raises":
            raise ValueError("no reset today")
        if now == "closes":
            await conn.close()
        if now == "leaves a transaction":
            await conn.execute("select 1")

    db = await opened(make_manager, reset=reset)
    pids: set[int] = set()
    for _ in range(3):
        async with borrower(db, pids) as conn:
            await conn.execute("select 1")
    assert len(pids) == 2
    assert db.pool.counts() == {"total": 1, "in_use": 0, "idle": 1, "max": 1, "waiting": 0}


async def test_a_connection_that_cannot_be_cleaned_is_replaced(make_manager: MakeManager) -> None:
    """A configure that fails after DISCARD ALL leaves nobody with half of its settings."""
    fail = []

    async def configure(conn: Any) -> None:
        await conn.execute("set statement_timeout = '41s'")
        await conn.commit()
        if fail:
            fail.clear()
            raise ValueError("not this time")

    db = await opened(make_manager, configure=configure, reset="discard")
    pids: set[int] = set()
    async with borrower(db, pids):
        fail.append(True)
    async with borrower(db, pids) as conn:
        assert await (await conn.execute("show statement_timeout")).fetchone() == ("41s",)
    assert len(pids) == 2


async def test_discard_on_a_pool_in_autocommit(make_manager: MakeManager) -> None:
    """DISCARD ALL needs no change of autocommit there, and leaves it on."""
    db = make_manager(min_size=1, max_size=1, kwargs={"autocommit": True}, reset="discard")
    await db.open()
    async with db.connection() as conn:
        await conn.execute("set statement_timeout = '7s'")
    async with db.connection() as conn:
        assert conn.autocommit
        cursor = await conn.execute("show statement_timeout")
        assert await cursor.fetchone() == ("0",)


@pytest.mark.parametrize(
    "query",
    [
        "select n from generate_series(1, 3) as n",
        "with one as (select pg_advisory_xact_lock_shared(7)) select n"
        " from one, generate_series(1, 3) as n",
    ],
    ids=["that may share", "that has a connection of its own"],
)
async def test_a_stream_leaves_nothing_to_the_one_shots_that_come_after_it(
    make_manager: MakeManager, query: str
) -> None:
    """To libpq rows come one by one until a command is sent by itself: in a pipeline as well."""
    db = await opened(make_manager)
    for _ in range(2):
        async with db.connection() as conn:
            await conn.set_autocommit(True)  # a COMMIT would be such a command
            assert [row async for row in conn.cursor().stream("select 7")] == [(7,)]
        answers = await asyncio.gather(*(db.fetchall(query) for _ in range(3)))
        assert answers == [[(1,), (2,), (3,)]] * 3


# --- what a check callback left -------------------------------------------------------------------


@pytest.mark.parametrize("how", ["cancelled", "failed"])
async def test_what_a_check_that_did_not_pass_has_changed_is_undone(
    make_manager: MakeManager, how: str
) -> None:
    """psycopg_pool's `check_connection()`, cancelled twice, leaves it in autocommit."""
    at_work = asyncio.Event()

    async def check(conn: Any) -> None:
        if at_work.is_set():
            return
        await conn.set_autocommit(True)
        conn.row_factory = dict_row
        at_work.set()
        if how == "failed":
            raise RuntimeError
        await asyncio.sleep(60)

    db = await opened(make_manager, check=check)
    acquiring = asyncio.create_task(db.fetchone("select 1 as n"))
    await at_work.wait()
    if how == "cancelled":
        acquiring.cancel()
        with pytest.raises(asyncio.CancelledError):
            await acquiring
    else:
        assert await acquiring == (1,)
    async with db.connection() as conn:
        assert (conn.autocommit, conn.row_factory) == (False, tuple_row)
