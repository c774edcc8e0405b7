"""
Tell what a failed connection attempt means: whether another one can work.

psycopg's connect errors carry no SQLSTATE (psycopg 3.3: ``sqlstate`` is None for all of them),
so the answer comes from the class of the error and the text after ``FATAL:``, which the
server's ``lc_messages`` may translate. What is not recognised is taken as passing: the price of
that mistake is a retry, the price of the other one would be a service that gives up on a
server that is only starting.
"""

from __future__ import annotations

import re

import psycopg

from .errors import PoolkeeperError

_PERMANENT = re.compile(
    r"""
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
    """,
    re.VERBOSE | re.IGNORECASE,
)

# getaddrinfo: the name does not exist, as against EAI_AGAIN ("temporary failure").
_UNKNOWN_HOST = re.compile(
    r"name or service not known|nodename nor servname provided|no address associated"
    r"|getaddrinfo failed|name does not resolve",
    re.IGNORECASE,
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
        return bool(_PERMANENT.search(text) or _UNKNOWN_HOST.search(text))
    # Bad conninfo (ProgrammingError), an unusable loop (InterfaceError), a fault in the
    # configure callback: the program is at fault, and stays so. OSError may pass.
    return not isinstance(error, OSError)


def reason(error: BaseException) -> str:
    """Return the server's own words from a connect error, on one line."""
    said = str(error.args[0]) if isinstance(error, PoolkeeperError) else str(error)
    text = " ".join(said.split()) or type(error).__name__
    _, fatal, after = text.rpartition("FATAL: ")
    return after.strip() if fatal else text


_ADVICE: tuple[tuple[re.Pattern[str], str], ...] = tuple(
    (re.compile(pattern, re.IGNORECASE), advice)
    for pattern, advice in (
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
            "too many (clients|connections)|connection slots|no more connections",
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
)


def advice(error: BaseException) -> str:
    """Return what to do about a failed connection attempt."""
    text = str(error)
    for pattern, words in _ADVICE:
        if pattern.search(text):
            return words
    return "The cause above is the server's or the driver's own."
