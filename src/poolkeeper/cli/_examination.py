"""
The steps of ``poolkeeper doctor``: from the connection string to a query, and what may go wrong.

Each says what it has found, and what to do. What cannot be reached is not looked at; nothing is
changed on the server.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import ssl
import statistics
import sys
import time
import warnings
from collections.abc import AsyncGenerator, AsyncIterator, Generator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import psycopg
from psycopg import pq
from psycopg.conninfo import conninfo_to_dict

from poolkeeper import ConfigError, ConnectionBudgetWarning, OpenError, PoolManager

from .doctor import Step

LOCAL = ("localhost", "127.0.0.1", "::1")
OLDEST = 13
"""The oldest PostgreSQL that psycopg 3.3 is made for, and that is not out of service for long."""
MOST_SKEW = 1.0
"""Seconds by which two clocks may differ."""
ROUND_TRIPS = 20
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
    params = _resolved(db.pool.conninfo if isinstance(db.pool.conninfo, str) else "")
    yield Step("connection string", True, _shown(params))
    reached = False
    for host, port in _servers(params):
        async for step, reaches in _way_to(host, port, params, timeout):
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
    """The loop policy, and whether psycopg can use what it makes."""
    loop = asyncio.get_running_loop()
    kind = f"{type(loop).__module__.partition('.')[0]}, {type(loop).__name__}"
    python = f"Python {sys.version_info.major}.{sys.version_info.minor}"
    psycopgs = f"psycopg {psycopg.__version__} ({pq.__impl__}, libpq {pq.version() // 10000})"
    fast = "; uvloop is installed" if find_spec("uvloop") else ""
    said = f"{kind}; {python}, {psycopgs}{fast}"
    if "Proactor" in kind:
        return Step(
            "event loop", False, said,
            "psycopg cannot use it: asyncio.run(main(), loop_factory=asyncio.SelectorEventLoop).",
        )  # fmt: skip
    return Step("event loop", True, said)


# --- the connection string ------------------------------------------------------------------------


def _resolved(conninfo: str) -> dict[str, str]:
    """Return what libpq makes of it: with the environment and libpq's own defaults."""
    params: dict[str, str] = {}
    for option in pq.Conninfo.get_defaults():
        if option.val:
            params[option.keyword.decode()] = option.val.decode(errors="replace")
    given = {name: str(value) for name, value in conninfo_to_dict(conninfo).items()}
    return params | given


def _shown(params: dict[str, str]) -> str:
    names = ("service", "host", "hostaddr", "port", "dbname", "user", "sslmode", "options",
             "connect_timeout", "target_session_attrs", "application_name")  # fmt: skip
    if "options" in params:
        params = params | {"options": "***"}  # whatever was set there
    parts = [f"{name}={params[name]}" for name in names if params.get(name, "any") != "any"]
    if not params.get("host") and not params.get("hostaddr"):
        parts.insert(0, "host=(a Unix socket)")
    if params.get("password"):
        said = "from PGPASSWORD" if params["password"] == os.environ.get("PGPASSWORD") else "given"
    else:
        said = f"none but those of {params.get('passfile') or '~/.pgpass'}"
    return f"{' '.join(parts)}; password: {said}"


def _servers(params: dict[str, str]) -> Iterator[tuple[str, str]]:
    hosts = (params.get("hostaddr") or params.get("host") or "").split(",")
    ports = (params.get("port") or "5432").split(",")
    for number, host in enumerate(hosts):
        yield host.strip(), (ports[number] if len(ports) > number else ports[0]) or "5432"


# --- the way to a server --------------------------------------------------------------------------


async def _way_to(
    host: str, port: str, params: dict[str, str], timeout: float
) -> AsyncIterator[tuple[Step, bool]]:
    """Go to one server, as far as it goes; with each step, whether it can be talked to."""
    if not host or host.startswith(("/", "@")):
        path = Path(host or "/var/run/postgresql") / f".s.PGSQL.{port}"
        yield Step("socket", True, f"a Unix socket, {path}: no DNS, no TCP and no TLS"), True
        return
    where = f"{host}:{port}"
    began = time.perf_counter()
    try:
        async with asyncio.timeout(timeout):
            found = await asyncio.get_running_loop().getaddrinfo(
                host, int(port), type=socket.SOCK_STREAM
            )
    except (OSError, UnicodeError, TimeoutError) as error:
        said = f"{host} cannot be resolved: {_why(error, timeout)}"
        advice = "Check the host in the connection string, and that this machine can resolve it."
        yield Step("DNS", False, said, advice, time.perf_counter() - began), False
        return
    addresses = list(dict.fromkeys(str(address[4][0]) for address in found))
    yield Step("DNS", True, f"{host} is {', '.join(addresses)}", "", _since(began)), False
    for address in addresses:
        began = time.perf_counter()
        try:
            async with asyncio.timeout(timeout):
                streams = await asyncio.open_connection(address, int(port))
        except (OSError, TimeoutError) as error:
            step = Step(
                "TCP", False, f"{address}, port {port}: {_why(error, timeout)}",
                _advice_for_tcp(error), _since(began),
            )  # fmt: skip
            yield step, False
            continue
        yield Step("TCP", True, f"{address}, port {port} is open", "", _since(began)), False
        try:
            step = await _tls(where, streams, params, timeout)
        finally:
            streams[1].close()
            with suppress(OSError, ssl.SSLError):
                await streams[1].wait_closed()
        yield step, step.seconds is not None


def _why(error: BaseException, timeout: float) -> str:
    if isinstance(error, TimeoutError):
        return f"no answer within {timeout:g} s"
    code = getattr(error, "errno", None)
    # Not its strerror: of asyncio's own that has the address once more.
    known = os.strerror(code) if isinstance(code, int) and code > 0 else ""
    return (known or getattr(error, "strerror", None) or str(error)).lower()


def _advice_for_tcp(error: BaseException) -> str:
    if isinstance(error, ConnectionRefusedError):
        return "Nobody listens there: check the port, that the server runs, and listen_addresses."
    if isinstance(error, TimeoutError):
        return "Packets are dropped on the way: look for a firewall, a security group, a VPN."
    return "Check host and port, and what stands between."


_SSL_REQUEST = b"\0\0\0\x08\x04\xd2\x16\x2f"


async def _tls(where: str, streams: Any, params: dict[str, str], timeout: float) -> Step:
    """Ask whether the server takes TLS, as libpq does; it answers with one letter."""
    reader, writer = streams
    began = time.perf_counter()
    try:
        async with asyncio.timeout(timeout):
            writer.write(_SSL_REQUEST)
            answer = await reader.read(1)
    except (OSError, TimeoutError) as error:
        said = f"{where} takes connections and says nothing: {_why(error, timeout)}"
        return Step("TLS", False, said, "Check that it is a PostgreSQL, and not stuck.")
    mode, seconds = params.get("sslmode", "prefer"), _since(began)
    if answer not in (b"S", b"N"):
        said = f"{where} does not answer as PostgreSQL does"
        return Step("TLS", False, said, "Check host and port: it is something else, or full.")
    offers = "offers TLS" if answer == b"S" else "offers no TLS"
    required = mode in ("require", "verify-ca", "verify-full")
    said = f"{where} {offers}, sslmode={mode}"
    if answer == b"N" and required:
        return Step("TLS", False, said, "Turn ssl on at the server, or lower sslmode.", seconds)
    far = not where.rpartition(":")[0].startswith(LOCAL)
    advice = ""
    if far and mode != "verify-full":
        advice = "Only sslmode=verify-full, with sslrootcert, makes sure whom you talk to."
    return Step("TLS", True, said, advice, seconds)


def _since(began: float) -> float:
    return time.perf_counter() - began


# --- what is found inside -------------------------------------------------------------------------


async def _inside(
    db: PoolManager[Any], params: dict[str, str], timeout: float
) -> AsyncIterator[Step]:
    """Log in, and look at what is there."""
    began = time.perf_counter()
    with _quiet() as warned:
        try:
            await db.open()
        except OpenError as error:
            said = _first(error).removeprefix('cannot open pool "doctor": ')
            said = said.removeprefix('could not open pool "doctor" within ')
            yield Step("login", False, said, error.hint or "", _since(began))
            return
        seconds = db.pool.get_stats()["connections_ms"] / 1000
        yield Step("login", True, "a session was opened", "", seconds)
        async with db:
            for name, look in LOOKS.items():
                yield await _looked(name, look, db, params, timeout)
                if look is _pooler:
                    yield _budget(db, warned)


@contextmanager
def _quiet() -> Generator[list[warnings.WarningMessage], None, None]:
    """Let the pool tell nothing but what is asked: the steps do."""
    logger = logging.getLogger("poolkeeper")
    before = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
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
            seconds = _since(began)
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
    if number // 10000 < OLDEST:
        return Found(False, said, "No longer maintained: upgrade.")
    return Found(True, said + encrypted)


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
    for one in warned:
        if issubclass(one.category, ConnectionBudgetWarning):
            first, detail, hint = str(one.message).splitlines()
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
        times.append(_since(began))
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
    before, theirs, after = _now(), await _value(conn, query), _now()
    skew = theirs - (before + after) / 2
    said = f"the server's is {abs(skew):.3f} s {'ahead' if skew > 0 else 'behind'}"
    if abs(skew) > MOST_SKEW + (after - before):
        return Found(False, said,
            "Let both follow NTP: timestamps, tokens and leases of the two do not agree.",
        )  # fmt: skip
    return Found(True, f"{said}, as far as a round trip of {after - before:.3f} s tells")


def _now() -> float:
    return time.time()


async def _keepalives(conn: Any, _db: Any, params: dict[str, str]) -> Found:
    host = conn.info.host
    if host.startswith(("/", "@")) or host in LOCAL:
        return Found(True, "not needed on this machine")
    if params.get("keepalives") == "0":
        return Found(False, "off", "Take keepalives=0 out of the connection string.")
    idle = params.get("keepalives_idle") or "0"
    seconds = int(idle) if idle.isdecimal() and int(idle) else _of_system()
    said = f"after {seconds} s without a word"
    if seconds > LONG_IDLE:
        advice = (
            "A firewall may have forgotten it by then: keepalives_idle=30 keepalives_interval=10."
        )
        return Found(True, said, advice)
    return Found(True, said)


def _of_system() -> int:
    with suppress(OSError, ValueError):
        return int(Path("/proc/sys/net/ipv4/tcp_keepalive_time").read_text())
    return 7200


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
