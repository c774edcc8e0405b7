"""
The steps of ``poolkeeper doctor``: from the connection string to a query, and what may go wrong.

Each says what it has found, and what to do. What cannot be reached is not looked at; nothing is
changed on the server.
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
import socket
import statistics
import sys
import time
import warnings
from collections.abc import AsyncGenerator, AsyncIterator, Generator
from contextlib import asynccontextmanager, contextmanager
from datetime import date, timedelta
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import psycopg
from psycopg import pq
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from poolkeeper import ConfigError, ConnectionBudgetWarning, OpenError, PoolManager, events

from ._way import is_here, servers, since, way_to
from .doctor import Step

MOST_SKEW = 1.0
"""Seconds by which two clocks may differ."""
ROUND_TRIPS = 20
SOON = 180
"""Days before the last release of a version from which that is said."""
LONG_IDLE = 300
"""Seconds without a word after which firewalls forget a connection, or sooner."""


class Found(NamedTuple):
    """What a look at a connection has found: a `Step` without its name."""

    ok: bool
    said: str
    advice: str = ""
    seconds: float | None = None


async def examine(
    dsn: str, timeout: float, max_size: int, processes: int | None
) -> AsyncIterator[Step]:
    """
    Look at everything, and tell each step when it is done.

    Args:
        dsn: Connection string; "" for what the environment says.
        timeout: Seconds for each step.
        max_size: Of the pool that is to be opened.
        processes: How many open one; None for what can be found out.
    """
    yield _loop()
    try:
        db = PoolManager(
            dsn,
            min_size=1,
            max_size=max_size,
            name="doctor",
            timeout=timeout,
            open_timeout=timeout,
            close_timeout=1,
            expected_processes=processes,
        )
    except ConfigError as error:
        yield Step("connection string", False, _first(error), error.hint or "")
        return
    conninfo = db.pool.conninfo if isinstance(db.pool.conninfo, str) else ""
    if refusal := _refusal(conninfo):
        advice = "Check the connection string, and what PGSERVICE and the like say."
        yield Step("connection string", False, refusal, advice)
        return
    params = _resolved(conninfo)
    yield Step("connection string", True, _shown(params))
    reached = False
    for server in servers(params):
        async for step, reaches in way_to(server, params, timeout):
            reached = reached or reaches
            yield step
    if not reached:
        yield Step("login", None, "no server was reached")
        return
    async for step in _inside(db, params, timeout):
        yield step


def _first(error: Exception) -> str:
    return str(error.args[0]) if error.args else str(error)


def _loop() -> Step:
    """What asyncio.run() makes here, and whether psycopg can use that."""
    loop = asyncio.new_event_loop()
    loop.close()
    kind = f"{type(loop).__module__.partition('.')[0]}, {type(loop).__name__}"
    python = f"Python {sys.version_info.major}.{sys.version_info.minor}"
    psycopgs = f"psycopg {psycopg.__version__} ({pq.__impl__}, libpq {pq.version() // 10000})"
    fast = "; uvloop is installed" if find_spec("uvloop") else ""
    said = f"{kind}; {python}, {psycopgs}{fast}"
    if "Proactor" in kind:  # of Windows; the program may know, and make another one
        return Step(
            "event loop", None, said,
            "psycopg cannot use it: asyncio.run(main(), loop_factory=asyncio.SelectorEventLoop).",
        )  # fmt: skip
    return Step("event loop", True, said)


# --- the connection string ------------------------------------------------------------------------


_NOWHERE = "/nowhere"


def _refusal(conninfo: str) -> str:
    """Return what libpq has against it before it goes anywhere: a service, a value; or ""."""
    conn = pq.PGconn.connect_start(
        make_conninfo(conninfo, host=_NOWHERE, hostaddr="", port="").encode()
    )
    said = conn.get_error_message().strip()
    conn.finish()
    return "" if _NOWHERE in said else re.sub(r'"[^"]*"', '"***"', said)


def _resolved(conninfo: str) -> dict[str, str]:
    """Return what libpq makes of it: with services, the environment, libpq's own defaults."""
    given = {name: str(value) for name, value in conninfo_to_dict(conninfo).items()}
    params = _defaults(given.get("service")) | given
    if params.get("sslrootcert") == "system" and "sslmode" not in given:
        params["sslmode"] = os.environ.get("PGSSLMODE", "verify-full")
    return params


def _defaults(service: str | None) -> dict[str, str]:
    before = os.environ.get("PGSERVICE")
    if service is not None:
        os.environ["PGSERVICE"] = service  # libpq looks for a service here, or where it connects
    try:
        defaults = pq.Conninfo.get_defaults()
    finally:
        if service is not None:
            del os.environ["PGSERVICE"]
        if before is not None:
            os.environ["PGSERVICE"] = before
    return {
        option.keyword.decode(): option.val.decode(errors="replace")
        for option in defaults
        if option.val
    }


def _shown(params: dict[str, str]) -> str:
    names = ("service", "host", "hostaddr", "port", "dbname", "user", "sslmode", "sslrootcert",
             "options", "connect_timeout", "target_session_attrs", "application_name")  # fmt: skip
    if "options" in params:
        params = params | {"options": "***"}  # whatever was set there
    parts = [f"{name}={params[name]}" for name in names if params.get(name, "any") != "any"]
    if not params.get("host") and not params.get("hostaddr"):
        parts.insert(0, "host=(a Unix socket)")
    return f"{' '.join(parts)}; password: {_password(params)}"


def _password(params: dict[str, str]) -> str:
    """Return where it comes from, as far as that is known before the login."""
    if params.get("password"):
        return "from PGPASSWORD" if params["password"] == os.environ.get("PGPASSWORD") else "given"
    file = Path(params.get("passfile") or Path.home() / ".pgpass")
    return f"that of {file}, if it has one" if file.exists() else "none"


# --- what is found inside -------------------------------------------------------------------------


async def _inside(
    db: PoolManager[Any], params: dict[str, str], timeout: float
) -> AsyncIterator[Step]:
    """Log in, and look at what is there."""
    began = time.perf_counter()
    made: list[float] = []
    db.subscribe(lambda event: made.append(event.seconds), events.Connected)
    with _quiet() as warned:
        try:
            await db.open()
        except OpenError as error:
            _, _, said = _first(error).partition(": ")  # before it: which pool, within how long
            yield Step("login", False, said, error.hint or "", since(began))
            return
        async with db:
            yield Step("login", True, await _logged_in(db), "", made[0])
            for name, look in LOOKS.items():
                yield await _looked(name, look, db, params, timeout)
                if look is _pooler:
                    yield _budget(db, warned)


async def _logged_in(db: PoolManager[Any]) -> str:
    async with db.connection() as conn:
        info = conn.info
        where = info.host if info.host.startswith(("/", "@")) else f"{info.host}:{info.port}"
        return f"user {info.user} has a session in database {info.dbname}, {where}"


@contextmanager
def _quiet() -> Generator[list[warnings.WarningMessage], None, None]:
    """Let the pool log nothing: the steps tell. Of its warnings, that of the budget is kept."""
    logger = logging.getLogger("poolkeeper")
    before = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("ignore")
            warnings.simplefilter("always", ConnectionBudgetWarning)
            yield caught
    finally:
        logger.setLevel(before)


async def _looked(
    name: str, look: Any, db: PoolManager[Any], params: dict[str, str], timeout: float
) -> Step:
    try:
        async with asyncio.timeout(timeout), _session(db) as conn:
            began = time.perf_counter()
            found: Found = await look(conn, db, params)
            seconds = since(began)
    except TimeoutError:
        return Step(name, False, f"no answer within {timeout:g} s", "The server is stuck, or slow.")
    except psycopg.Error as error:
        state = f" (SQLSTATE {error.sqlstate})" if error.sqlstate else ""
        return Step(name, False, f"the server refuses to say: {type(error).__name__}{state}")
    if found.seconds is not None:
        seconds = found.seconds
    return Step(name, found.ok, found.said, found.advice, seconds)


@asynccontextmanager
async def _session(db: PoolManager[Any]) -> AsyncGenerator[Any, None]:
    """A connection in autocommit: a pooler may take no other."""
    async with db.connection() as conn:
        await conn.set_autocommit(True)
        yield conn


async def _value(conn: Any, query: str) -> Any:
    row = await (await conn.execute(query)).fetchone()
    return row[0] if row else None


async def _version(conn: Any, _db: Any, _params: Any) -> Found:
    number = conn.info.server_version
    said = f"PostgreSQL {number // 10000}.{number % 10000}"
    encrypted = ", by TLS" if conn.pgconn.ssl_in_use else ""
    ends = maintained_until(number // 10000)
    if ends < date.today():
        return Found(False, said + encrypted, f"Not maintained since {ends:%B %Y}: upgrade.")
    if ends < date.today() + timedelta(days=SOON):
        return Found(True, said + encrypted, f"Maintained until {ends:%B %Y}: upgrade in time.")
    return Found(True, said + encrypted)


def maintained_until(version: int) -> date:
    """Return when a version of PostgreSQL has its last release: five years after its first."""
    return date(2012 + version, 11, 15)


async def _role(conn: Any, _db: Any, params: dict[str, str]) -> Found:
    standby = await _value(conn, "select pg_is_in_recovery()")
    frozen = await _value(conn, "select current_setting('default_transaction_read_only')::bool")
    wants = params.get("target_session_attrs", "any")
    if standby:
        advice = "It takes no writes: for these, name the primary, or target_session_attrs=primary."
        return Found(True, "a standby", "" if wants != "any" else advice)
    if frozen:
        advice = "Somebody has set default_transaction_read_only; look into pg_settings."
        return Found(True, "a primary that takes no writes", advice)
    return Found(True, "a primary, which takes writes")


async def _pooler(_conn: Any, db: PoolManager[Any], _params: Any) -> Found:
    facts = db.server
    if facts is None or not facts.pooled:
        return Found(True, "none: the server answers itself")
    if db.pool.max_size > 1:
        async with db.connection():  # two at once may be answered by one session
            facts = db.server or facts
    prepared = "it keeps track of prepared statements" if facts.tracks_prepared else (
        "prepared statements are off"
    )  # fmt: skip
    if not facts.shares_sessions:
        return Found(True, f"there is one, of a mode that is not known; {prepared}",
            'If it is in session mode, kwargs={"prepare_threshold": 5} turns them on.',
        )  # fmt: skip
    mode = "transaction mode"
    if db.pool.max_size == 1:
        mode = "transaction or statement mode"
    else:
        try:
            async with db.transaction() as other:
                await other.execute("select 1")
        except psycopg.errors.ProtocolViolation:
            mode = "statement mode: transactions are refused, set kwargs={'autocommit': True}"
    advice = "LISTEN, session-level advisory locks and SET need a connection past it."
    return Found(True, f"there is one, in {mode}; {prepared}", advice)


def _budget(db: PoolManager[Any], warned: list[warnings.WarningMessage]) -> Step:
    facts = db.server
    if facts is None or facts.max_connections is None:
        return Step("budget", None, "the server does not tell its limits")
    if facts.pooled:
        return Step(
            "budget", None, "the pooler's limits are what counts, and it does not tell them"
        )
    if warned:
        first, detail, hint = str(warned[0].message).splitlines()
        said = first.removeprefix('pool "doctor" ') + ": " + detail.removeprefix("DETAIL:  ")
        return Step("budget", False, said, hint.removeprefix("HINT:  "))
    kept = f", {facts.reserved} of them reserved" if facts.reserved else ""
    said = f"{facts.allowed} may be had (max_connections={facts.max_connections}{kept})"
    return Step("budget", True, f"{said}; max_size={db.pool.max_size} fits")


async def _round_trip(conn: Any, _db: Any, _params: Any) -> Found:
    times: list[float] = []
    for _ in range(ROUND_TRIPS):
        began = time.perf_counter()
        await conn.execute("select 1")
        times.append(since(began))
    said = f"{min(times) * 1000:.2f} ms at least, of {ROUND_TRIPS} queries"
    median = statistics.median(times)
    advice = "Far away: each query of a request costs as much." if median > 0.02 else ""
    return Found(True, said, advice, median)


async def _prepared(conn: Any, _db: Any, _params: Any) -> Found:
    if conn.prepare_threshold is None:
        return Found(True, "off, for the pooler would lose them")
    for number in range(3):
        cursor = await conn.execute("select %s::int", (number,), prepare=True)
        if await cursor.fetchone() != (number,):
            return Found(False, "they answer something else")
    return Found(True, f"they work, after {conn.prepare_threshold} times")


async def _clock(conn: Any, _db: Any, _params: Any) -> Found:
    query = "select extract(epoch from clock_timestamp())::float8"
    before, theirs, after = time.time(), await _value(conn, query), time.time()
    skew, doubt = theirs - (before + after) / 2, (after - before) / 2
    said = f"the server's is {_brief(abs(skew))} {'ahead' if skew > 0 else 'behind'}"
    if abs(skew) > MOST_SKEW + doubt:
        return Found(False, said,
            "Let both follow NTP: timestamps, tokens and leases of the two do not agree.",
        )  # fmt: skip
    return Found(True, f"{said}, give or take {_brief(doubt)}")


def _brief(seconds: float) -> str:
    return f"{seconds * 1000:.1f} ms" if seconds < 1 else f"{seconds:.1f} s"


async def _keepalives(conn: Any, _db: Any, _params: Any) -> Found:
    if is_here(conn.info.host):
        return Found(True, "not needed on this machine")
    with _socket_of(conn) as sock:
        if not sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE):
            return Found(False, "off", "Take keepalives=0 out of the connection string.")
        # macOS calls it otherwise, and elsewhere it may not be told.
        option = getattr(socket, "TCP_KEEPIDLE", getattr(socket, "TCP_KEEPALIVE", None))
        if option is None:
            return Found(True, "on")
        idle = sock.getsockopt(socket.IPPROTO_TCP, option)
    said = f"after {idle} s without a word"
    if idle > LONG_IDLE:
        advice = (
            "A firewall may have forgotten it by then: keepalives_idle=30 keepalives_interval=10."
        )
        return Found(True, said, advice)
    return Found(True, said)


@contextmanager
def _socket_of(conn: Any) -> Generator[socket.socket, None, None]:
    """Look at the socket of a connection, which stays libpq's."""
    sock = socket.socket(fileno=conn.pgconn.socket)
    try:
        yield sock
    finally:
        sock.detach()


LOOKS = {
    "version": _version,
    "primary or standby": _role,
    "pooler": _pooler,
    "round trip": _round_trip,
    "prepared statements": _prepared,
    "clock": _clock,
    "keepalives": _keepalives,
}
"""What is looked at on a connection, in this order; the budget after the pooler."""
