"""What a failed connection attempt means, by what servers, poolers and libpq really say."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import psycopg
import pytest

from poolkeeper import ConfigError
from poolkeeper._recovery import advice, is_permanent, reason

AT = 'connection failed: connection to server at "10.0.0.9", port 5432 failed: '

CREDENTIALS = "Check user and password in conninfo, PGPASSWORD and ~/.pgpass."
ROLE = "Check the user in conninfo, or create it."
DATABASE = "Check the database in conninfo, and that the user may connect to it."
HBA = "Let the server's pg_hba.conf accept this user, database and address."
HOST = "Check the host in conninfo, and that this machine can resolve it."
TLS = "Check sslmode and the certificates on both sides."
FULL = (
    "The server has no connection left for us: lower max_size times the number of"
    " processes, or raise its max_connections."
)
NOT_READY = "The server is not ready; give open() more time."
LISTENS = "Check that the server runs and listens at this host and port."
SILENT = "Check host and port, and what stands between."
PROGRAM = "Correct the program: it cannot pass."
NONE = "The cause above is the server's or the driver's own."

FOR_EVER = [
    # PostgreSQL 13-18
    ('FATAL:  password authentication failed for user "app"', CREDENTIALS),
    ('FATAL:  Peer authentication failed for user "app"', CREDENTIALS),
    ('FATAL:  Ident authentication failed for user "app"', CREDENTIALS),
    ('FATAL:  LDAP authentication failed for user "app"', CREDENTIALS),
    ('FATAL:  GSSAPI authentication failed for user "app"', CREDENTIALS),
    ('FATAL:  PAM authentication failed for user "app"', CREDENTIALS),
    ('FATAL:  certificate authentication failed for user "app"', CREDENTIALS),
    ('FATAL:  role "app" is not permitted to log in', CREDENTIALS),
    ('FATAL:  role "app" does not exist', ROLE),
    ('FATAL:  database "shop" does not exist', DATABASE),
    (
        'FATAL:  database "shop" does not exist\n'
        "DETAIL:  It seems to have just been dropped or renamed.",
        DATABASE,
    ),
    (
        'FATAL:  permission denied for database "shop"\n'
        "DETAIL:  User does not have CONNECT privilege.",
        DATABASE,
    ),
    ('FATAL:  database "shop" is not currently accepting connections', DATABASE),
    ('FATAL:  no pg_hba.conf entry for host "10.0.0.1", user "app", database "shop", SSL off', HBA),
    (
        'FATAL:  no pg_hba.conf entry for host "10.0.0.1", user "app", database "shop",'
        " no encryption",
        HBA,
    ),
    (
        'FATAL:  pg_hba.conf rejects connection for host "10.0.0.1", user "app",'
        ' database "shop", no encryption',
        HBA,
    ),
    ('FATAL:  unrecognized configuration parameter "colour"', NONE),
    ('FATAL:  invalid value for parameter "TimeZone": "Mars"', NONE),
    (
        "FATAL:  unsupported frontend protocol 3.2: server supports 3.0 to 3.0",
        NONE,
    ),
    ("FATAL:  connection requires a valid client certificate", TLS),
    # libpq
    ("fe_sendauth: no password supplied", CREDENTIALS),
    ("server does not support SSL, but SSL was required", TLS),
    ("SSL error: certificate verify failed", TLS),
    ('server certificate for "db" does not match host name "db.example"', TLS),
    # PgBouncer, which puts the server's own words after its own
    ("FATAL:  no such user", ROLE),
    ("FATAL:  no such user: app", ROLE),
    ("FATAL:  no such database: shop", DATABASE),
    ("FATAL:  password authentication failed", CREDENTIALS),
    ("FATAL:  SASL authentication failed", CREDENTIALS),
    ('FATAL:  server login failed: FATAL role "app" does not exist', ROLE),
]

UNKNOWN_HOST = [
    "failed to resolve host 'db.invalid': [Errno -2] Name or service not known",
    "failed to resolve host 'db.invalid': [Errno -5] No address associated with hostname",
    "failed to resolve host 'db.invalid': [Errno 8] nodename nor servname provided, or not known",
    "failed to resolve host 'db.invalid': [Errno 11001] getaddrinfo failed",
    "failed to resolve host 'db.invalid': [Errno -2] Name does not resolve",
    'could not translate host name "db.invalid" to address: Name or service not known',
]

PASSING = [
    ("FATAL:  the database system is starting up", NOT_READY),
    ("FATAL:  the database system is shutting down", NOT_READY),
    ("FATAL:  the database system is in recovery mode", NOT_READY),
    (
        "FATAL:  the database system is not yet accepting connections\n"
        "DETAIL:  Consistent recovery state has not been yet reached.",
        NOT_READY,
    ),
    (
        "FATAL:  the database system is not accepting connections\n"
        "DETAIL:  Hot standby mode is disabled.",
        NOT_READY,
    ),
    ("FATAL:  sorry, too many clients already", FULL),
    ('FATAL:  too many connections for role "app"', FULL),
    ('FATAL:  too many connections for database "shop"', FULL),
    (
        "FATAL:  remaining connection slots are reserved for non-replication superuser connections",
        FULL,
    ),
    (
        "FATAL:  remaining connection slots are reserved for roles with the SUPERUSER attribute",
        FULL,
    ),
    (
        "FATAL:  remaining connection slots are reserved for roles with privileges of the"
        ' "pg_use_reserved_connections" role',
        FULL,
    ),
    ("FATAL:  canceling authentication due to timeout", NONE),
    ("FATAL:  terminating connection due to administrator command", NONE),
    (
        "Connection refused\n\tIs the server running on that host and accepting TCP/IP"
        " connections?",
        LISTENS,
    ),
    (
        'connection to server on socket "/run/postgresql/.s.PGSQL.5432" failed: No such file or'
        " directory\n\tIs the server running locally and accepting connections on that socket?",
        LISTENS,
    ),
    (
        "server closed the connection unexpectedly\n\tThis probably means the server terminated"
        " abnormally\n\tbefore or while processing the request.",
        LISTENS,
    ),
    ("could not receive data from server: Connection reset by peer", LISTENS),
    ("connection timeout expired", SILENT),
    ("timeout expired", SILENT),
    ("could not receive data from server: Connection timed out", SILENT),
    ("Network is unreachable", NONE),
    ("failed to resolve host 'db': [Errno -3] Temporary failure in name resolution", HOST),
    # PgBouncer
    ("FATAL:  no more connections allowed (max_client_conn)", FULL),
    ("FATAL:  query_wait_timeout", NONE),
    ("FATAL:  pgbouncer cannot connect to server", NONE),
    ("FATAL:  server login failed: FATAL the database system is starting up", NOT_READY),
    # a server that speaks another language: what cannot be read is taken as passing
    ("FATAL:  le rôle « app » n'existe pas", NONE),
    ("FATAL:  Datenbank »shop« existiert nicht", NONE),
    ("FATAL:  パスワード認証に失敗しました", NONE),
]


@pytest.mark.parametrize(("text", "what_to_do"), FOR_EVER)
@pytest.mark.parametrize("before", ["", AT])
def test_a_reason_that_stays_is_permanent(before: str, text: str, what_to_do: str) -> None:
    error = psycopg.OperationalError(before + text)
    assert is_permanent(error)
    assert advice(error) == what_to_do


@pytest.mark.parametrize("text", UNKNOWN_HOST)
def test_a_host_that_does_not_exist_is_permanent(text: str) -> None:
    error = psycopg.OperationalError(text)
    assert is_permanent(error)
    assert advice(error) == HOST


@pytest.mark.parametrize(("text", "what_to_do"), PASSING)
@pytest.mark.parametrize("before", ["", AT])
def test_a_reason_that_may_pass_is_not_permanent(before: str, text: str, what_to_do: str) -> None:
    error = psycopg.OperationalError(before + text)
    assert not is_permanent(error)
    assert advice(error) == what_to_do


@pytest.mark.parametrize("needed", [True, False])
def test_a_password_that_was_asked_for_and_not_given_is_known_without_words(needed: bool) -> None:
    """Whatever language the server speaks."""
    pgconn: Any = SimpleNamespace(needs_password=needed)
    error = psycopg.OperationalError("FATAL:  Passwort fehlt", pgconn=pgconn)
    assert is_permanent(error) is needed


@pytest.mark.parametrize(
    ("error", "permanent"),
    [
        (psycopg.ProgrammingError('invalid connection option "colour"'), True),
        (psycopg.InterfaceError("Psycopg cannot use the 'ProactorEventLoop'"), True),
        (ConfigError("conninfo cannot work: …", parameter="conninfo"), True),
        (ZeroDivisionError("in the configure callback"), True),
        (TypeError("connect() got an unexpected keyword argument"), True),
        (ConnectionRefusedError("refused"), False),
        (TimeoutError(), False),
        (OSError("no route to host"), False),
    ],
    ids=repr,
)
def test_a_fault_of_the_program_is_permanent_one_of_the_system_is_not(
    error: Exception, permanent: bool
) -> None:
    assert is_permanent(error) is permanent


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (
            psycopg.OperationalError(f'{AT}FATAL:  role "app" does not exist\n'),
            'role "app" does not exist',
        ),
        (
            psycopg.OperationalError(
                f"{AT}FATAL:  the database system is not yet accepting connections\n"
                "DETAIL:  Consistent recovery state has not been yet reached.\n"
            ),
            "the database system is not yet accepting connections"
            " DETAIL: Consistent recovery state has not been yet reached.",
        ),
        (
            psycopg.OperationalError(f"{AT}Connection refused\n\tIs the server running?"),
            f"{AT}Connection refused Is the server running?",
        ),
        (
            psycopg.OperationalError(
                f"{AT}Connection refused\nMultiple connection attempts failed. All failures were:\n"
                f"- host: 'localhost', port: None, hostaddr: '::1': {AT}Connection refused\n"
                "- host: 'localhost', port: None, hostaddr: '127.0.0.1': "
                f'{AT}FATAL:  role "app" does not exist'
            ),
            'role "app" does not exist',
        ),
        (TimeoutError(), "TimeoutError"),
        (psycopg.OperationalError(" \n"), "OperationalError"),
        (
            ConfigError("conninfo cannot work: …", detail="Facts.", hint="Advice."),
            "conninfo cannot work: …",
        ),
    ],
)
def test_the_reason_is_the_servers_own_words_on_one_line(error: Exception, words: str) -> None:
    assert reason(error) == words


@pytest.mark.parametrize(
    ("error", "what_to_do"),
    [
        (psycopg.ProgrammingError('invalid connection option "colour"'), PROGRAM),
        (psycopg.ProgrammingError("the configure callback left the connection in …"), PROGRAM),
        (ConfigError("conninfo cannot work: a port is not …", hint="Give a URL."), PROGRAM),
        (ConfigError("kwargs cannot work: a port is not …"), PROGRAM),
        (ZeroDivisionError(), NONE),
    ],
)
def test_a_fault_of_the_program_is_the_programs_to_correct(
    error: Exception, what_to_do: str
) -> None:
    assert advice(error) == what_to_do
