"""
One attempt to make a connection: what it waits for, and what it means that it failed.

psycopg's connect errors carry no SQLSTATE (psycopg 3.3: ``sqlstate`` is None for all of them),
so their meaning comes from the text after ``FATAL:``, which the server's ``lc_messages`` may
translate. What is not recognised is taken as passing: the price of that mistake is a retry, the
price of the other one would be a service that gives up on a server that is only starting.

Only what psycopg itself raises while it connects is read so. What a function of the user's
raises is his: a RuntimeError that says "timed out" is no word of the server's.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import suppress
from contextvars import ContextVar
from time import monotonic
from typing import Any

import psycopg

from . import _conninfo
from ._between import Step
from ._where import code_behind, site
from ._words import at_login, class_name, each_host, in_words, quotes_unknown, raised_by
from .errors import ConfigError, PoolkeeperError

SERVER = "waiting for the server"


class Attempt(Step):
    """
    One attempt to make a connection; the task that makes it has it as `attempt_here()`.

    It is at `SERVER`, or "in the conninfo function" and the like, which is the user's.

    Attributes:
        began: When it began.
        params: What libpq is given.
        was_answered: True once it has a connection.
    """

    __slots__ = ("began", "params", "was_answered")

    def __init__(self) -> None:
        super().__init__("making", SERVER)
        self.began = self.since
        self.params: Mapping[str, Any] = {}
        self.was_answered = False

    @property
    def asks_server(self) -> bool:
        """True while it waits for the server to take it."""
        return not self.was_answered and self.function is None

    @property
    def whose(self) -> str:
        """The function that it is in: "the conninfo function"."""
        return self.doing.removeprefix("in ")

    def failure(self, error: Exception) -> Failure:
        """Return what it means that it ended with *error*."""
        if self.function is not None and not isinstance(error, ConfigError):
            return _of_the_user(error, self.whose)
        if isinstance(error, psycopg.Error) and not isinstance(error, PoolkeeperError):
            if not _is_drivers_own(error):  # but of a connect() of the user's
                return _of_the_user(error, "the connect() of the connection class")
            names = _conninfo.names({**_known_to(error.pgconn), **self.params})
            return of_login(error, names, _conninfo.servers(self.params))
        if isinstance(error, (PoolkeeperError, *PROGRAM)):
            return Failure(error, in_words(error), AT_FAULT, PROGRAM_ADVICE, True)
        return Failure(error, in_words(error), NO_CONNECTION, NO_ADVICE, False)

    def silence(self, seconds: float) -> Failure:
        """Return what it means that there was no answer for so many *seconds*."""
        if self.function is None:
            lasts = f"no answer from the server for {seconds:.1f} s"
            return of_login(psycopg.errors.ConnectionTimeout(lasts), frozenset())
        code = code_behind(self.function)
        place = f" ({site(code, code.co_firstlineno)} in {code.co_name})" if code else ""
        words = f"{self.whose}{place} has not returned for {monotonic() - self.since:.1f} s"
        return Failure(
            psycopg.errors.ConnectionTimeout(words),
            words,
            f"{self.whose} does not return",
            f"Give {self.whose} a timeout of its own, and find out what it waits for.",
            False,
        )


_here: ContextVar[Attempt | None] = ContextVar("poolkeeper_attempt", default=None)


def enter(attempt: Attempt) -> None:
    """Let *attempt* be the one that this task makes."""
    _here.set(attempt)


def attempt_here() -> Attempt:
    """Return the attempt that this task makes."""
    attempt = _here.get()
    if attempt is None:
        attempt = Attempt()
        _here.set(attempt)
    return attempt


class Failure:
    """
    Why an attempt failed.

    Attributes:
        error: What was raised, without its traceback, whose frames would keep the socket open.
        words: Why, in one line without secrets, with the server's words where they are known.
        kind: The same for strangers: no host, port, user or database.
        advice: What to do about it.
        is_permanent: True if another attempt would fail too.
        has_no_slot: True if the server is there, and has no room for one more connection.
    """

    __slots__ = ("advice", "error", "has_no_slot", "is_permanent", "kind", "words")

    def __init__(
        self, error: Exception, words: str, kind: str, advice: str, is_permanent: bool
    ) -> None:
        self.words: str = words
        self.error: Exception = error.with_traceback(None)
        self.kind: str = kind
        self.advice: str = advice
        self.is_permanent: bool = is_permanent
        self.has_no_slot: bool = kind == FULL


# --- of the user's own ------------------------------------------------------------------------

# What stays so until somebody corrects the program. Anything else may pass: a vault that is
# sealed, an identity provider that is slow, a lock that a migration holds.
PROGRAM = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    NameError,
    NotImplementedError,
    SyntaxError,
    TypeError,
    psycopg.DataError,
    psycopg.InterfaceError,
    psycopg.NotSupportedError,
    psycopg.ProgrammingError,
)
AT_FAULT = "the program is at fault"
PROGRAM_ADVICE = "Correct the program: it cannot pass."


def _of_the_user(error: Exception, whose: str) -> Failure:
    permanent = isinstance(error, PROGRAM)
    advice = (
        f"Correct {whose}: {class_name(error)} does not pass. Its own error is the cause."
        if permanent
        else f"The error is that of {whose}, which is asked again; it is the cause."
    )
    return Failure(error, raised_by(whose, error), f"{whose} failed", advice, permanent)


def _is_drivers_own(error: BaseException) -> bool:
    module = "psycopg"
    entry = error.__traceback__
    while entry is not None:
        module = str(entry.tb_frame.f_globals.get("__name__", ""))
        entry = entry.tb_next
    return module.partition(".")[0] in ("psycopg", "psycopg_c", "psycopg_binary")


def _known_to(pgconn: Any) -> dict[str, Any]:
    """Return the parameters that libpq used: defaults, services and the environment included."""
    params: dict[str, Any] = {}
    for name in ("host", "hostaddr", "port", "user", "db"):
        with suppress(psycopg.Error):
            value = getattr(pgconn, name, None)
            if isinstance(value, bytes):
                params["dbname" if name == "db" else name] = value.decode(errors="replace")
    return params


# --- of the server or of libpq ----------------------------------------------------------------

NO_CONNECTION = "no connection can be made"
NO_ADVICE = "The cause above is the server's or the driver's own."
REFUSES_LOGIN = "the server refuses the login"
NO_DATABASE = "the server refuses the database"
UNRESOLVED = "no connection can be made: the host name cannot be resolved"
NO_TLS = "no connection can be made: the two sides do not agree on TLS"
STRANGE = "no connection can be made: what answers is no PostgreSQL server"
SETTINGS = "the server refuses the settings"
FULL = "the server has no connection left"
NOT_READY = "the server is not ready"
UNREACHED = "no connection can be made: nobody answers at this host and port"
SILENT = "the server does not answer"

# What is said, what kind of reason that is, whether it stays so, and what to do. Read with
# everything hidden that is quoted: a database may be called "SSL". The first that matches.
_REASONS: tuple[tuple[str, str, bool, str], ...] = (
    (
        "expected authentication request from server|received invalid response to",
        STRANGE,
        True,
        "Check host and port: what answers there is no PostgreSQL server.",
    ),
    (
        # SASL: PgBouncer; authentication failed for user: ident, peer, ldap, gss ...
        "(password|SASL) authentication failed|authentication failed for user"
        "|is not permitted to log in|no password supplied",
        REFUSES_LOGIN,
        True,
        "Check user and password in conninfo, PGPASSWORD and ~/.pgpass.",
    ),
    (
        'role ".*" does not exist|no such user',
        REFUSES_LOGIN,
        True,
        "Check the user in conninfo, or create it.",
    ),
    (
        # the last: datallowconn = false
        'database ".*" does not exist|no such database|permission denied for database'
        '|database ".*" is not currently accepting connections',
        NO_DATABASE,
        True,
        "Check the database in conninfo, and that the user may connect to it.",
    ),
    (
        r"no pg_hba\.conf entry|pg_hba\.conf rejects connection",
        REFUSES_LOGIN,
        True,
        "Let the server's pg_hba.conf accept this user, database and address.",
    ),
    (
        # getaddrinfo: the name does not exist, as against EAI_AGAIN ("temporary failure").
        "name or service not known|nodename nor servname provided|no address associated"
        "|getaddrinfo failed|name does not resolve",
        UNRESOLVED,
        True,
        "Check the host in conninfo, and that this machine can resolve it.",
    ),
    (
        "failed to resolve|translate host name|name resolution",
        UNRESOLVED,
        False,
        "Check the host in conninfo, and that this machine can resolve it.",
    ),
    (
        "server does not support SSL|certificate verify failed|requires a valid client certificate"
        "|server certificate for|does not match host name|root certificate file|private key file"
        "|host name must be specified",
        NO_TLS,
        True,
        "Check sslmode and the certificates on both sides.",
    ),
    (
        "unrecognized configuration parameter|invalid value for parameter"
        "|invalid command-line argument",
        SETTINGS,
        True,
        "Check options and settings in conninfo, kwargs and PGOPTIONS.",
    ),
    (
        # what libpq does not even begin with
        r"definition of service .* not found|invalid \w+ value|weak sslmode",
        NO_CONNECTION,
        True,
        "Check conninfo, and what PGSERVICE and the like say.",
    ),
    ("unsupported frontend protocol", NO_CONNECTION, True, NO_ADVICE),
    (
        "invalid connection option|invalid URI query parameter",
        AT_FAULT,
        True,
        PROGRAM_ADVICE,
    ),
    (
        "too many (clients|connections)|connection slots|no more connections",
        FULL,
        False,
        "The server has no connection left for us: lower max_size times the number of"
        " processes, or raise its max_connections.",
    ),
    (
        "starting up|shutting down|recovery|not (yet )?accepting",
        NOT_READY,
        False,
        "The server is not ready; give open() more time.",
    ),
    (
        "refused|no such file|connection reset|server closed",
        UNREACHED,
        False,
        "Check that the server runs and listens at this host and port.",
    ),
    ("SSL|certificate", NO_TLS, False, "Check sslmode and the certificates on both sides."),
    (
        "timeout expired|timed out|no answer",
        SILENT,
        False,
        "Check host and port, and what stands between.",
    ),
)

_UNKNOWN = ("", NO_CONNECTION, False, NO_ADVICE)


def of_login(error: psycopg.Error, names: frozenset[str], servers: int = 1) -> Failure:
    """Return what psycopg's own error of a login to one of so many *servers* means."""
    said = each_host(str(error))
    meanings = [_meaning(error, text, len(said)) for text in said]
    # One that may pass is enough. Of a host that could not be resolved psycopg tells nothing
    # where another one could: it may be back as well.
    permanent = all(stays for _, stays, _ in meanings) and len(said) >= servers
    kind, _, advice = next((m for m in meanings if not m[1]), meanings[-1])
    words = at_login(error, names)
    if quotes_unknown(error, names):
        # It goes along as a cause, and a traceback prints that.
        error = type(error)(words, pgconn=error.pgconn)
    return Failure(error, words, kind, advice, permanent)


def _meaning(error: psycopg.Error, said: str, of: int) -> tuple[str, bool, str]:
    """Return the kind, whether it stays so, and what to do."""
    words = at_login(said, ())
    _, kind, permanent, advice = next(
        (row for row in _REASONS if re.search(row[0], words, re.IGNORECASE)), _UNKNOWN
    )
    if isinstance(error, psycopg.ProgrammingError):  # what libpq was given
        return kind, True, PROGRAM_ADVICE
    if isinstance(error, psycopg.InterfaceError):  # a loop that psycopg cannot use
        return kind, True, advice
    if of == 1 and getattr(error.pgconn, "needs_password", False):  # in whatever language
        return REFUSES_LOGIN, True, _REASONS[1][3]
    return kind, permanent, advice
