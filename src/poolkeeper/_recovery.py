"""
Tell what a failed connection attempt means: whether another one can work.

psycopg's connect errors carry no SQLSTATE (psycopg 3.3: ``sqlstate`` is None for all of them),
so the answer comes from the class of the error and the text after ``FATAL:``, which the
server's ``lc_messages`` may translate. What is not recognised is taken as passing: the price of
that mistake is a retry, the price of the other one would be a service that gives up on a
server that is only starting.
"""

from __future__ import annotations

import asyncio
import logging
import re
from contextvars import copy_context
from time import monotonic
from typing import Protocol, cast

import psycopg

from ._binding import weakly
from ._connection import run_own
from .errors import PoolkeeperError

logger = logging.getLogger("poolkeeper")

# Compiled when an attempt has failed, by re, which keeps them: importing costs less so.
_PERMANENT = r"""
    (?:password|SASL)\ authentication\ failed    # SASL: pgbouncer
    | authentication\ failed\ for\ user            # ident, peer, ldap, gss ...
    | role\ ".*"\ does\ not\ exist
    | database\ ".*"\ does\ not\ exist
    | is\ not\ permitted\ to\ log\ in
    | no\ pg_hba\.conf\ entry
    | pg_hba\.conf\ rejects\ connection
    | permission\ denied\ for\ database
    | is\ not\ currently\ accepting\ connections   # datallowconn = false
    | no\ password\ supplied
    | no\ such\ user                               # pgbouncer
    | no\ such\ database                           # pgbouncer
    | unsupported\ frontend\ protocol
    | unrecognized\ configuration\ parameter
    | invalid\ value\ for\ parameter
    | server\ does\ not\ support\ SSL
    | certificate\ verify\ failed
    | requires\ a\ valid\ client\ certificate
    | does\ not\ match\ host\ name                 # server certificate
    """

# getaddrinfo: the name does not exist, as against EAI_AGAIN ("temporary failure").
_UNKNOWN_HOST = (
    r"name or service not known|nodename nor servname provided|no address associated"
    r"|getaddrinfo failed|name does not resolve"
)


def is_permanent(error: BaseException) -> bool:
    """
    Tell whether a connection attempt that failed with *error* would fail again.

    Source:
        psycopg 3.3, ``AsyncConnection.connect``; libpq and server messages of PostgreSQL 13-18;
        PgBouncer 1.18.
    """
    if isinstance(error, psycopg.OperationalError):
        text = str(error)
        if getattr(error.pgconn, "needs_password", False):
            return True
        return bool(
            re.search(_PERMANENT, text, re.VERBOSE | re.IGNORECASE)
            or re.search(_UNKNOWN_HOST, text, re.IGNORECASE)
        )
    # Bad conninfo (ProgrammingError), an unusable loop (InterfaceError), a fault in the
    # configure callback: the program is at fault, and stays so. OSError may pass.
    return not isinstance(error, OSError)


def reason(error: BaseException) -> str:
    """Return the server's own words from a connect error, on one line."""
    said = str(error.args[0]) if isinstance(error, PoolkeeperError) else str(error)
    text = " ".join(said.split()) or type(error).__name__
    _, fatal, after = text.rpartition("FATAL: ")
    return after.strip() if fatal else text


_NO_SLOT = "too many (clients|connections)|connection slots|no more connections"


def has_no_slot(error: BaseException) -> bool:
    """Tell whether the server is there, and has no room for one more connection."""
    return isinstance(error, psycopg.OperationalError) and bool(
        re.search(_NO_SLOT, str(error), re.IGNORECASE)
    )


_ADVICE: tuple[tuple[str, str], ...] = (
    (
        "password|authentication failed|is not permitted to log in",
        "Check user and password in conninfo, PGPASSWORD and ~/.pgpass.",
    ),
    (r'role ".*" does not exist|no such user', "Check the user in conninfo, or create it."),
    (
        r'database ".*" does not exist|no such database|permission denied for database'
        "|is not currently accepting connections",
        "Check the database in conninfo, and that the user may connect to it.",
    ),
    ("pg_hba", "Let the server's pg_hba.conf accept this user, database and address."),
    (
        "failed to resolve|translate host name|name or service|name resolution",
        "Check the host in conninfo, and that this machine can resolve it.",
    ),
    ("SSL|certificate", "Check sslmode and the certificates on both sides."),
    (
        _NO_SLOT,
        "The server has no connection left for us: lower max_size times the number of"
        " processes, or raise its max_connections.",
    ),
    (
        "starting up|shutting down|recovery|not (yet )?accepting",
        "The server is not ready; give open() more time.",
    ),
    (
        "refused|no such file|connection reset|server closed",
        "Check that the server runs and listens at this host and port.",
    ),
    ("timeout expired|timed out", "Check host and port, and what stands between."),
    (
        "invalid connection option|configure callback|^(conninfo|kwargs) ",
        "Correct the program: it cannot pass.",
    ),
)


def advice(error: BaseException) -> str:
    """Return what to do about a failed connection attempt."""
    text = str(error)
    for pattern, words in _ADVICE:
        if re.search(pattern, text, re.IGNORECASE):
            return words
    return "The cause above is the server's or the driver's own."


class Pool(Protocol):
    """What the connector asks of the pool that it makes connections for."""

    name: str
    num_workers: int

    async def make_connection(self) -> None:
        """Make one connection, configure it and add it to the pool."""
        ...

    def may_start_tasks(self) -> bool:
        """Tell whether a task that is started now is not one that asyncio.run() will miss."""
        ...

    def spare_attempts(self, wanted: int) -> int:
        """Give up as many of *wanted* attempts as nobody needs any more, and return how many."""
        ...

    def connect_failed(self, error: Exception) -> None:
        """Note that an attempt has failed."""
        ...


class Connector:
    """
    Makes the connections of one life of a pool.

    While the server answers, as many at once as the pool has workers. Once an attempt fails, one
    probe every `PROBE_EVERY` seconds, until one succeeds; then all that are missing, at once.
    psycopg_pool's own way is to retry each lost connection on a schedule of its own that doubles
    without a bound: the longer the outage, the later it notices that it is over.

    An attempt without an answer (a server that went silent, packets that are dropped) does not
    stop the probing: another is started beside it, and when there are too many the youngest is
    given up for a new one. So a server that answers new connections only is noticed as soon, and
    the older ones have the time that a slow login needs. The oldest is given up in the end, with
    growing patience, and counts as failed.
    """

    PROBE_EVERY = 0.25
    PROBE_EVERY_IF_PERMANENT = 2.0
    BESIDE_AFTER = 0.5
    LOGINS = 3.0
    """How much longer than the last login an attempt may take until another is started."""
    PATIENCE = 4.0
    MOST_PATIENCE = 60.0

    def __init__(self, pool: Pool, loop: asyncio.AbstractEventLoop) -> None:
        self._pool = pool
        self._loop = loop
        self._context = copy_context()  # of open(): see BoundPool.start_own_task()
        self._wanted = 0
        """Connections to make; there may be more attempts than that, some beside others."""
        self._attempts: dict[asyncio.Task[None], float] = {}
        self._answered: set[asyncio.Task[None]] = set()
        """Attempts that have a connection, and are configuring it."""
        self._given_up: set[asyncio.Task[None]] = set()
        self._login_seconds = 0.0
        """How long the last attempt that was answered had to wait for it."""
        self._timer: asyncio.TimerHandle | None = None
        self._patience = self.PATIENCE
        self._stopped = False
        self.last_error: Exception | None = None
        """Why the last attempt failed; None if it succeeded."""
        self.last_failed = 0.0
        self.failing_since = 0.0
        self.failures = 0
        """Attempts that failed since the last success."""

    @property
    def pending(self) -> int:
        """How many attempts have no answer yet."""
        return len(self._attempts)

    @property
    def wanted(self) -> int:
        """How many connections are to be made, those under way included."""
        return self._wanted

    @property
    def next_attempt_seconds(self) -> float | None:
        """Seconds until the next probe; None if none is due."""
        if self._timer is None or self.last_error is None:
            return None
        return max(0.0, self._timer.when() - self._loop.time())

    def add(self) -> None:
        """Make one more connection."""
        self._wanted += 1
        self.go_on()

    def go_on(self) -> None:
        """Start what may be started now. Harmless at any time; mends what was cancelled."""
        if self._stopped or not self._pool.may_start_tasks():
            return
        if self.last_error is None:
            while len(self._attempts) < min(self._wanted, self._pool.num_workers):
                self._start()
        self._arm()

    def answered(self) -> None:
        """Note that the server has answered the attempt that runs now."""
        task = cast("asyncio.Task[None]", asyncio.current_task())
        self._login_seconds = monotonic() - self._attempts.get(task, monotonic())
        self._answered.add(task)

    def claim(self) -> bool:
        """Tell whether a connection that was made is still wanted; it is not, from here on."""
        if self._wanted <= 0:
            return False
        self._wanted -= 1
        return True

    def unclaim(self) -> None:
        """Want a connection that was claimed, and lost."""
        self._wanted += 1

    def stop(self) -> list[asyncio.Task[None]]:
        """Give every attempt up; return their tasks, which end on the next turns of the loop."""
        self._stopped = True
        self._disarm()
        tasks = list(self._attempts)
        for task in tasks:
            task.cancel()
        return tasks

    def abandon(self) -> list[asyncio.Task[None]]:
        """Return the tasks of the attempts; their loop will never run again."""
        self._stopped = True
        return list(self._attempts)

    def _start(self) -> None:
        task = self._context.copy().run(
            self._loop.create_task, run_own(self._attempt), name=f"{self._pool.name}-connect"
        )
        self._attempts[task] = monotonic()
        task.add_done_callback(self._attempted)

    async def _attempt(self) -> None:
        try:
            await self._pool.make_connection()
        except Exception as ex:
            self._ended(asyncio.current_task())
            self._failed(ex)
        else:
            self._ended(asyncio.current_task())
            self._succeeded()

    def _ended(self, task: asyncio.Task[None] | None) -> None:
        self._attempts.pop(cast("asyncio.Task[None]", task), None)
        self._answered.discard(cast("asyncio.Task[None]", task))

    def _attempted(self, task: asyncio.Task[None]) -> None:
        self._ended(task)
        if not task.cancelled() or task in self._given_up:
            self._given_up.discard(task)
            self.go_on()
        else:
            # From outside: asyncio.run() is ending, or somebody cancelled every task. It is
            # still wanted; the next waiter lets it go on.
            self._disarm()

    def _failed(self, error: Exception) -> None:
        now = monotonic()
        if self.last_error is None:
            self.failing_since = now
            self._disarm()  # the interval may be another one
        # Without its traceback, whose frames would keep the socket open.
        self.last_error = error.with_traceback(None)
        self.last_failed = now
        self.failures += 1
        self._pool.connect_failed(error)

    def _succeeded(self) -> None:
        if self.last_error is not None:
            logger.info(
                'pool "%s": connections can be made again, after %.1f s and %d attempts',
                self._pool.name,
                monotonic() - self.failing_since,
                self.failures,
            )
        self.last_error = None
        self.failures = 0
        self._patience = self.PATIENCE
        self._disarm()
        silent = [task for task in self._attempts if task not in self._answered]
        for task in silent[max(0, self._wanted - len(self._answered)) :]:
            self._give_up(task)

    def _give_up(self, task: asyncio.Task[None]) -> None:
        self._given_up.add(task)
        task.cancel()

    def _disarm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _arm(self) -> None:
        if self._timer is not None or self._stopped or not self._wanted:
            return
        delay = self.PROBE_EVERY
        if self.last_error is not None and is_permanent(self.last_error):
            delay = self.PROBE_EVERY_IF_PERMANENT
        self._timer = self._loop.call_later(delay, weakly(self._probe), context=self._context)

    def _probe(self) -> None:
        self._timer = None
        if not self._pool.may_start_tasks():
            return
        if self.last_error is not None:
            self._wanted -= self._pool.spare_attempts(self._wanted - len(self._attempts))
        if self._wanted and self._may_start_beside():
            self._start()
        self.go_on()

    def _may_start_beside(self) -> bool:
        """Tell whether a probe may start although others have had no answer yet."""
        silent = [task for task in self._attempts if task not in self._answered]
        if not silent:
            return not self._attempts
        now = monotonic()
        patience = max(self.BESIDE_AFTER, self.LOGINS * self._login_seconds)
        if now - self._attempts[silent[-1]] < patience:
            return False
        if len(self._attempts) < max(2, self._pool.num_workers):
            return True
        if now - self._attempts[silent[0]] >= self._patience:
            seconds = now - self._attempts[silent[0]]
            self._patience = min(self._patience * 2, self.MOST_PATIENCE)
            self._give_up(silent[0])
            self._failed(
                psycopg.errors.ConnectionTimeout(
                    f"no answer from the server for {seconds:.1f} s: timed out"
                )
            )
        else:
            self._give_up(silent[-1])
        return False
