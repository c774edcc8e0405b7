"""Connection classes of the user's own, and what others make of ``connect()``."""

from __future__ import annotations

import asyncio
import gc
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import psycopg
import pytest
import wrapt
from psycopg import AsyncConnection

from poolkeeper import ConfigError, OpenError, PoolManager, ReleasedConnectionError
from tests.support.waiting import until

MakeManager = Callable[..., PoolManager[Any]]
Plain = AsyncConnection[Any]


async def opened(make_manager: MakeManager, kind: Any = None, **settings: Any) -> PoolManager[Any]:
    settings = {"min_size": 1, "max_size": 1, "name": "orders", "timeout": 5, **settings}
    db = make_manager(connection_class=kind, **settings)
    await db.open()
    return db


# --- what connect() returns ------------------------------------------------------------------


async def test_connect_may_be_replaced_by_a_plain_function(
    make_manager: MakeManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As tests that inject faults do it."""
    original = AsyncConnection.connect
    calls = []

    async def connect(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        return await original(*args, **kwargs)

    monkeypatch.setattr(AsyncConnection, "connect", connect)
    db = await opened(make_manager)
    assert await db.fetchval("select 1") == 1
    assert len(calls) == 1
    async with db.connection() as conn:
        pass
    with pytest.raises(ReleasedConnectionError):
        await conn.execute("select 1")


class Token(AsyncConnection[Any]):
    """Logs in with what somebody else gives it; its connections are not of its own class."""

    @classmethod
    async def connect(cls, dsn: str = "", **kwargs: Any) -> Any:
        return await AsyncConnection.connect(dsn, **{**kwargs, "password": "token"})


async def test_connect_may_return_a_connection_of_another_class(make_manager: MakeManager) -> None:
    db = await opened(make_manager, Token)
    for _ in range(3):
        async with db.connection() as conn:
            assert not isinstance(conn, Token)
            assert isinstance(conn, AsyncConnection)
            await conn.execute("set time zone 'Asia/Tokyo'")
        with pytest.raises(ReleasedConnectionError):
            await conn.commit()
    assert await db.fetchval("show timezone") != "Asia/Tokyo"
    await db.close()
    await db.close()


class NoConnection(AsyncConnection[Any]):
    @classmethod
    async def connect(cls, conninfo: str = "", **kwargs: Any) -> Any:
        return psycopg.connect(conninfo, **kwargs)


class OfAnother(AsyncConnection[Any]):
    lender: PoolManager[Any]

    @classmethod
    async def connect(cls, conninfo: str = "", **kwargs: Any) -> Any:
        return await cls.lender.pool.getconn()


class HasASession(AsyncConnection[Any]):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._session = "of the user's own"


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (NoConnection, "psycopg.Connection, which cannot be kept in a pool: that is no psycopg."),
        (OfAnother, "cannot be kept in a pool: it is a pool's already"),
        (HasASession, "in a pool: it has _session, which poolkeeper needs for itself"),
    ],
)
async def test_what_cannot_be_kept_in_a_pool_is_said_when_it_opens(
    make_manager: MakeManager, server_sessions: Callable[[str], int], kind: Any, words: str
) -> None:
    OfAnother.lender = await opened(make_manager, name="lender")
    db = make_manager(
        connection_class=kind, min_size=2, max_size=4, name="b", application_name="refused"
    )
    async with asyncio.timeout(20):
        with pytest.raises(OpenError) as raised:
            await db.open()
        assert words in str(raised.value)
        assert isinstance(raised.value.__cause__, ConfigError)
        assert db.state == "closed"
        await db.close()
        del raised
        gc.collect()
        await until(lambda: not server_sessions("refused"))
        # What it had of the other pool was dropped with it, and is taken back.
        await until(lambda: not OfAnother.lender.snapshot().in_use)
    assert await OfAnother.lender.fetchval("select 1") == 1


# --- connections that are not the pool's ------------------------------------------------------


async def test_what_somebody_makes_with_the_class_of_a_pool_is_his_own(
    make_manager: MakeManager, dsn: str
) -> None:
    db = await opened(make_manager)
    assert db.pool.connection_class is AsyncConnection
    own = await db.pool.connection_class.connect(dsn, autocommit=True)
    async with db.connection() as conn:
        another = await type(conn).connect(dsn, autocommit=True)
        assert type(another) is AsyncConnection
    await db.close()
    late = await db.pool.connection_class.connect(dsn, autocommit=True)
    for outlives in (own, another, late):
        await outlives.execute("select 1")

        def elsewhere(conn: Plain = outlives) -> None:
            asyncio.run(use(conn))

        await asyncio.to_thread(elsewhere)
        await outlives.close()


async def use(conn: Plain) -> None:
    conn.lock = asyncio.Lock()
    await conn.execute("select 1")


# --- classes of the user's ---------------------------------------------------------------------


class Slots(AsyncConnection[Any]):
    __slots__ = ("__secret", "never", "tenant")

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.tenant = "nobody"
        self.__secret = 41

    def secret(self) -> int:
        return self.__secret


async def test_what_is_in_slots_is_as_before_for_the_next_borrower(
    make_manager: MakeManager,
) -> None:
    async def configure(conn: Any) -> None:
        conn.tenant = "everybody"

    db = await opened(make_manager, Slots, configure=configure)
    for _ in range(3):
        async with db.connection() as conn:
            assert (conn.tenant, conn.secret()) == ("everybody", 41)
            assert not hasattr(conn, "never")
            conn.tenant = "acme"
            conn.never = "set"


async def test_what_is_in_slots_is_there_still_where_a_stream_was_left_half_way(
    make_manager: MakeManager,
) -> None:
    """What was done before the stream is committed by an object that stands for the handle."""

    class Says(Slots):
        __slots__ = ()
        said: list[Any] = []  # noqa: RUF012

        async def commit(self) -> None:
            self.said.append((self.tenant, self.secret(), hasattr(self, "never")))
            await super().commit()

    db = await opened(make_manager, Says)
    async with db.connection() as conn:
        conn.tenant = "acme"
        rows = conn.cursor().stream("select generate_series(1, 100000)")
        await anext(rows)
    assert ("acme", 41, False) in Says.said
    await rows.aclose()
    assert await db.fetchval("select 1") == 1


class OwnNew(AsyncConnection[Any]):
    def __new__(cls, pgconn: Any, *args: Any, **kwargs: Any) -> Any:
        return super().__new__(cls)


class Registry(AsyncConnection[Any]):
    subclasses: list[str] = []  # noqa: RUF012

    def __init_subclass__(cls, *, table: str, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        Registry.subclasses.append(cls.__name__)


class Registered(Registry, table="orders"):
    pass


@pytest.mark.parametrize("kind", [OwnNew, Registry, Registered])
async def test_a_class_that_wants_arguments_is_asked_for_none(
    make_manager: MakeManager, kind: Any
) -> None:
    db = await opened(make_manager, kind)
    for _ in range(3):
        async with db.connection() as conn:
            assert isinstance(conn, kind)
            await conn.execute("select 1")
    assert Registry.subclasses == ["Registered"]


class NoSubclasses(type):
    def __new__(mcs, name: str, bases: Any, namespace: Any) -> Any:
        if any(isinstance(base, NoSubclasses) for base in bases):
            raise TypeError("final")
        return super().__new__(mcs, name, bases, namespace)


class Final(AsyncConnection[Any], metaclass=NoSubclasses):
    pass


class Taken(AsyncConnection[Any]):
    def at_work(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (Final, "no subclass of it can be made and used: TypeError"),
        (Taken, "it has at_work, which poolkeeper needs for itself"),
    ],
)
def test_a_class_that_cannot_work_is_refused_by_the_constructor(kind: Any, words: str) -> None:
    with pytest.raises(ConfigError) as raised:
        PoolManager(connection_class=kind)
    assert raised.value.parameter == "connection_class"
    assert words in str(raised.value)


# --- a close() of the user's own ---------------------------------------------------------------


class Hook(AsyncConnection[Any]):
    """Says goodbye to the server, and counts."""

    ended: list[int] = []  # noqa: RUF012
    fails = False
    hangs = False

    async def close(self) -> None:
        if not self.closed:
            self.ended.append(self.info.backend_pid)
            if self.fails:
                raise KeyError("tenant")
            if self.hangs:
                await asyncio.sleep(3600)
            await self.execute("select 1")
        await super().close()


@pytest.fixture
def hook() -> Iterator[type[Hook]]:
    Hook.ended.clear()
    yield Hook
    Hook.fails = Hook.hangs = False


async def resize(db: PoolManager[Any]) -> None:
    await db.pool.resize(1, 1)


async def drain(db: PoolManager[Any]) -> None:
    await db.pool.drain()


async def give_back_too_many(db: PoolManager[Any]) -> None:
    async with db.connection(), db.connection():
        await db.pool.resize(1, 1)


async def give_back_after_drain(db: PoolManager[Any]) -> None:
    async with db.connection():
        await db.pool.drain()


async def close(db: PoolManager[Any]) -> None:
    await db.close()


async def close_at_once(db: PoolManager[Any]) -> None:
    await db.close(timeout=0)


async def give_back_while_it_closes(db: PoolManager[Any]) -> None:
    async with db.connection(), db.connection():
        closing = asyncio.create_task(db.close())
        await until(lambda: db.state == "closing")
    await closing


@pytest.mark.parametrize("close_returns", [False, True])
@pytest.mark.parametrize(
    ("way", "number"),
    [
        (resize, 1), (drain, 2), (give_back_too_many, 1), (give_back_after_drain, 2),
        (close, 2), (close_at_once, 2), (give_back_while_it_closes, 2),
    ],
)  # fmt: skip
async def test_a_close_of_the_users_own_is_called_where_the_pool_ends_a_session(
    make_manager: MakeManager, hook: type[Hook], way: Any, number: int, close_returns: bool
) -> None:
    db = await opened(
        make_manager, hook, min_size=2, max_size=2, close_returns=close_returns, timeout=20
    )
    async with db.connection() as one, db.connection() as two:
        pids = {one.info.backend_pid, two.info.backend_pid}
    await way(db)
    await until(lambda: len(hook.ended) >= number)
    assert len(hook.ended) == len(set(hook.ended)) == number
    assert pids.issuperset(hook.ended)


@pytest.mark.parametrize("what", ["fails", "hangs"])
async def test_close_ends_whatever_a_close_of_the_users_own_does(
    make_manager: MakeManager, hook: type[Hook], server_sessions: Callable[[str], int],
    caplog: pytest.LogCaptureFixture, what: str,
) -> None:  # fmt: skip
    db = await opened(make_manager, hook, min_size=2, max_size=2, application_name="hooked")
    setattr(hook, what, True)
    async with asyncio.timeout(20):
        await db.close(timeout=0.1)
        assert len(hook.ended) == 2
        assert db.state == "closed"
        await db.close()
        await until(lambda: not server_sessions("hooked"))
    if what == "fails":
        assert "error ignored in close() of a connection: KeyError, raised at" in caplog.text
        assert "tenant" not in caplog.text
    hook.fails = hook.hangs = False
    await db.open()
    assert await db.fetchval("select 1") == 1


@pytest.mark.parametrize("what", ["fails", "hangs"])
async def test_a_drain_goes_on_whatever_a_close_of_the_users_own_does(
    make_manager: MakeManager, hook: type[Hook], what: str
) -> None:
    """It raises nothing, waits for none, and every connection is replaced."""
    db = await opened(make_manager, hook, min_size=3, max_size=3, timeout=20)
    async with db.connection() as one, db.connection() as two, db.connection() as three:
        before = {conn.info.backend_pid for conn in (one, two, three)}
    setattr(hook, what, True)
    async with asyncio.timeout(20):
        await db.pool.drain()
        await until(lambda: db.snapshot().idle == 3)
    async with db.connection() as one, db.connection() as two, db.connection() as three:
        assert before.isdisjoint(conn.info.backend_pid for conn in (one, two, three))
    await db.close(timeout=0.1)


async def test_a_pool_shrinks_although_a_close_of_the_users_own_fails(
    make_manager: MakeManager, hook: type[Hook], server_sessions: Callable[[str], int]
) -> None:
    """It has as many connections as it counts."""
    db = await opened(
        make_manager, hook, min_size=1, max_size=3, max_idle=0.2, application_name="shrinks"
    )
    async with db.connection(), db.connection(), db.connection():
        hook.fails = True
    await until(lambda: len(hook.ended) == 2)
    await until(lambda: server_sessions("shrinks") == 1)
    assert db.snapshot().total == 1


class Guarded(AsyncConnection[Any]):
    """Lets nothing be set any more, from a moment on."""

    guarded = False

    def __setattr__(self, name: str, value: Any) -> None:
        if self.guarded:
            raise AttributeError(f"{name} is guarded")
        super().__setattr__(name, value)


async def test_close_ends_whatever_a_connection_class_raises(
    make_manager: MakeManager, server_sessions: Callable[[str], int],
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    db = await opened(make_manager, Guarded, min_size=3, max_size=3, application_name="guarded")
    held = [await db.pool.getconn() for _ in range(2)]
    monkeypatch.setattr(Guarded, "guarded", True)
    async with asyncio.timeout(20):
        await db.close(timeout=0.1)
        assert db.state == "closed"
        await db.close()
        await until(lambda: not server_sessions("guarded"))
    assert "error ignored in close(): AttributeError" in caplog.text
    assert all(conn.pgconn.status == psycopg.pq.ConnStatus.BAD for conn in held)
    monkeypatch.undo()
    await db.open()
    assert await db.fetchval("select 1") == 1


class Deaf(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        raise RuntimeError("no log today")


async def test_close_ends_even_if_the_log_raises(
    make_manager: MakeManager, server_sessions: Callable[[str], int]
) -> None:
    db = await opened(make_manager, min_size=2, max_size=2, application_name="deaf")
    await db.pool.getconn()
    logger, deaf = logging.getLogger("poolkeeper"), Deaf()
    logger.addFilter(deaf)
    try:
        async with asyncio.timeout(20):
            with pytest.raises(RuntimeError, match="no log today"):
                await db.close(timeout=0.1)
            assert db.state == "closed"
            await db.close()
            await until(lambda: not server_sessions("deaf"))
    finally:
        logger.removeFilter(deaf)
    await db.open()
    assert await db.fetchval("select 1") == 1


# --- proxies -----------------------------------------------------------------------------------


class Proxy(wrapt.ObjectProxy):  # type: ignore[misc]
    """As the agents of Datadog, New Relic and Elastic put one around each connection."""

    def __init__(self, conn: Any, tags: dict[str, str]) -> None:
        super().__init__(conn)
        self._self_tags = tags

    def cursor(self, *args: Any, **kwargs: Any) -> Any:
        seen.append(self._self_tags["server"])
        return self.__wrapped__.cursor(*args, **kwargs)


class Outer(Proxy):
    pass


class NotLikeThat:
    """A proxy that knows one connection only."""

    def __init__(self, conn: Any) -> None:
        self.__wrapped__ = conn

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__wrapped__, name)


seen: list[str] = []


@contextmanager
def patched(*around: Callable[[Any], Any]) -> Iterator[None]:
    """Let ``AsyncConnection.connect()`` return a connection in proxies, as an agent does."""

    async def connect(wrapped: Any, _: Any, args: Any, kwargs: Any) -> Any:
        conn = await wrapped(*args, **kwargs)
        for put in around:
            conn = put(conn)
        return conn

    original = vars(AsyncConnection)["connect"]
    wrapt.wrap_function_wrapper(AsyncConnection, "connect", connect)
    try:
        yield
    finally:
        AsyncConnection.connect = original
        seen.clear()


def proxied(conn: Any) -> Proxy:
    return Proxy(conn, {"server": "inner"})


def outer(conn: Any) -> Outer:
    return Outer(conn, {"server": "outer"})


async def test_every_checkout_has_a_proxy_of_its_own(make_manager: MakeManager) -> None:
    with patched(proxied):
        db = await opened(make_manager)
        held = []
        for number in range(4):
            async with db.connection() as conn:
                assert type(conn).__name__ == "Proxy"
                assert isinstance(conn, Proxy)
                assert isinstance(conn, AsyncConnection)
                await conn.set_autocommit(True)
                await conn.cursor().execute("select 1")
                assert len(seen) == number + 1
                held.append(conn)
        assert len(set(map(id, held))) == 4
        for conn in held:
            with pytest.raises(ReleasedConnectionError):
                await conn.execute("select 1")
            with pytest.raises(ReleasedConnectionError):
                conn.cursor()
            with pytest.raises(ReleasedConnectionError):
                await db.pool.putconn(conn)
        async with db.connection() as conn:
            assert not conn.autocommit


async def test_proxies_around_proxies_come_again(make_manager: MakeManager) -> None:
    with patched(proxied, outer):
        db = await opened(make_manager)
        for _ in range(3):
            seen.clear()
            async with db.connection() as conn:
                assert isinstance(conn, Outer)
                assert type(conn.__wrapped__).__name__ == "Proxy"
                await conn.cursor().execute("select 1")
            assert seen == ["outer", "inner"]


async def test_the_callbacks_are_called_with_the_proxy(make_manager: MakeManager) -> None:
    given: list[Any] = []

    async def note(conn: Any) -> None:
        given.append(type(conn).__name__)

    with patched(proxied):
        db = await opened(make_manager, configure=note, check=note, reset=note)
        for _ in range(2):
            async with db.connection() as conn:
                await conn.cursor().execute("select 1")
        await until(lambda: db.snapshot().idle == 1)
        assert given == ["Proxy"] * 5


async def test_a_connection_in_a_proxy_is_given_back_in_every_way(
    make_manager: MakeManager, caplog: pytest.LogCaptureFixture
) -> None:
    with patched(proxied):
        db = await opened(make_manager, close_returns=True)
        pid = await db.fetchval("select pg_backend_pid()")
        conn = await db.pool.getconn()
        await conn.close()
        conn = await db.pool.getconn()
        await db.pool.putconn(conn.__wrapped__)
        conn = await db.pool.getconn()
        await conn.execute("select 1")
        await conn.commit()
        await db.pool.putconn(conn)
        del conn
        for _ in range(2):
            dropped = await db.pool.getconn()
            del dropped
            gc.collect()
            await until(lambda: db.snapshot().idle == 1)
            assert "dropped without being given back" in caplog.text
            caplog.clear()
        async with db.connection() as conn:
            assert isinstance(conn, Proxy)
            assert conn.info.backend_pid == pid


async def test_the_first_borrower_too_may_drop_a_connection_in_a_proxy(
    make_manager: MakeManager, caplog: pytest.LogCaptureFixture
) -> None:
    with patched(proxied):
        db = await opened(make_manager)
        dropped = await db.pool.getconn()
        del dropped
        gc.collect()
        await until(lambda: db.snapshot().idle == 1)
        assert "dropped without being given back" in caplog.text


async def test_a_connection_in_a_proxy_that_is_late_is_taken_away_at_close(
    make_manager: MakeManager,
) -> None:
    with patched(proxied):
        db = await opened(make_manager)
        conn = await db.pool.getconn()
        await conn.execute("select 1")
        task = asyncio.create_task(conn.cursor().execute("select pg_sleep(30)"))
        await asyncio.sleep(0.1)
        await db.close(timeout=0.1)
        with pytest.raises(psycopg.Error):
            await task
        assert conn.closed


async def test_a_proxy_that_cannot_be_made_anew_is_left_out_and_said_once(
    make_manager: MakeManager, caplog: pytest.LogCaptureFixture
) -> None:
    with patched(NotLikeThat):
        db = await opened(make_manager, min_size=2, max_size=2)
        for _ in range(3):
            async with db.connection() as conn:
                assert type(conn) is not NotLikeThat
                await conn.execute("select 1")
    said = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert len(said) == 1
    assert "NotLikeThat) that cannot be made anew for each checkout" in said[0]
