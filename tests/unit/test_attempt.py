"""What a failed connection attempt means, by what servers, poolers and libpq really say."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import psycopg
import pytest

from poolkeeper import ConfigError, _attempt
from poolkeeper._attempt import Attempt, Failure, of_login

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
SETTINGS = "Check options and settings in conninfo, kwargs and PGOPTIONS."
GIVEN = "Check conninfo, and what PGSERVICE and the like say."
NONE = "The cause above is the server's or the driver's own."

STRANGERS = [
    "expected authentication request from server, but received H",
    "received invalid response to SSL negotiation: H",
    "received invalid response to GSSAPI negotiation: H",
]

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
    ('FATAL:  unrecognized configuration parameter "colour"', SETTINGS),
    ('FATAL:  invalid value for parameter "TimeZone": "Mars"', SETTINGS),
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
    (
        'root certificate file "/root/.postgresql/root.crt" does not exist\n'
        "Either provide the file, use the system's trusted roots with sslrootcert=system, or change"
        " sslmode to disable server certificate verification.",
        TLS,
    ),
    ('private key file "app.key" has group or world access', TLS),
    ("host name must be specified for a verified SSL connection", TLS),
    ('definition of service "shop" not found', GIVEN),
    ('invalid sslmode value: "on"', GIVEN),
    ('weak sslmode "prefer" may not be used with sslrootcert=system (use "verify-full")', GIVEN),
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
    failure = of_login(psycopg.OperationalError(before + text), frozenset())
    assert failure.is_permanent
    assert failure.advice == what_to_do


@pytest.mark.parametrize("text", UNKNOWN_HOST)
def test_a_host_that_does_not_exist_is_permanent(text: str) -> None:
    failure = of_login(psycopg.OperationalError(text), frozenset())
    assert failure.is_permanent
    assert failure.advice == HOST
    assert failure.kind == _attempt.UNRESOLVED


@pytest.mark.parametrize(("text", "what_to_do"), PASSING)
@pytest.mark.parametrize("before", ["", AT])
def test_a_reason_that_may_pass_is_not_permanent(before: str, text: str, what_to_do: str) -> None:
    failure = of_login(psycopg.OperationalError(before + text), frozenset())
    assert not failure.is_permanent
    assert failure.advice == what_to_do


@pytest.mark.parametrize("needed", [True, False])
def test_a_password_that_was_asked_for_and_not_given_is_known_without_words(needed: bool) -> None:
    """Whatever language the server speaks."""
    pgconn: Any = SimpleNamespace(needs_password=needed)
    error = psycopg.OperationalError("FATAL:  Passwort fehlt", pgconn=pgconn)
    assert of_login(error, frozenset()).is_permanent is needed


@pytest.mark.parametrize("text", STRANGERS)
def test_what_can_be_no_postgresql_is_permanent(text: str) -> None:
    failure = of_login(psycopg.OperationalError(AT + text), frozenset())
    assert failure.is_permanent
    assert failure.kind == _attempt.STRANGE


def test_names_are_not_read() -> None:
    """A database may be called as a reason is."""
    text = 'FATAL:  the database "no pg_hba.conf entry" is tired'
    assert not of_login(psycopg.OperationalError(AT + text), frozenset()).is_permanent


ALL = "\nMultiple connection attempts failed. All failures were:\n"
REFUSED = "- host: 'a', port: '1', hostaddr: None: Connection refused\n\tIs the server running?"
NO_ROLE = "- host: 'b', port: '2', hostaddr: '::1': FATAL:  role \"app\" does not exist"


@pytest.mark.parametrize(
    ("texts", "servers", "permanent", "kind"),
    [
        ([REFUSED, NO_ROLE], 2, False, _attempt.UNREACHED),
        ([NO_ROLE, REFUSED], 2, False, _attempt.UNREACHED),
        ([NO_ROLE, NO_ROLE], 2, True, _attempt.REFUSES_LOGIN),
        ([NO_ROLE, NO_ROLE], 1, True, _attempt.REFUSES_LOGIN),
        ([NO_ROLE, NO_ROLE], 3, False, _attempt.REFUSES_LOGIN),
    ],
)
def test_of_several_servers_a_reason_stays_if_it_does_for_each(
    texts: list[str], servers: int, permanent: bool, kind: str
) -> None:
    """Of a name that cannot be resolved, where another one can, psycopg says nothing."""
    error = psycopg.OperationalError("the last" + ALL + "\n".join(texts))
    failure = of_login(error, frozenset(), servers)
    assert (failure.is_permanent, failure.kind) == (permanent, kind)


def raised(error: Exception, of: Attempt | None = None) -> Failure:
    """Return what it means that the program raises *error* in an attempt."""
    try:
        raise error
    except Exception as ex:
        return (of or Attempt()).failure(ex)


@pytest.mark.parametrize(
    ("error", "permanent"),
    [
        (ConfigError("conninfo cannot work: …", parameter="conninfo"), True),
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
    failure = raised(error)
    assert failure.is_permanent is permanent
    assert failure.error is error
    assert error.__traceback__ is None


@pytest.mark.parametrize(
    ("error", "permanent"),
    [
        (KeyError("tenant"), True),
        (NameError("secret"), True),
        (psycopg.errors.SyntaxError("secret"), True),
        (psycopg.errors.LockNotAvailable("secret"), False),
        (RuntimeError("the vault timed out"), False),
        (ValueError("password authentication failed"), False),
        (psycopg.OperationalError("FATAL:  role does not exist"), False),
    ],
    ids=repr,
)
def test_what_a_function_of_the_users_raises_is_not_read(error: Exception, permanent: bool) -> None:
    attempt = Attempt()
    attempt.now("in the conninfo function", raised)
    failure = raised(error, attempt)
    assert failure.is_permanent is permanent
    assert failure.words.startswith("the conninfo function (")
    assert "test_attempt.py:" in failure.words
    assert "in raised) raised " in failure.words
    assert failure.kind == "the conninfo function failed"
    assert "the conninfo function" in failure.advice
    for text in (failure.words, failure.kind, failure.advice):
        assert str(error.args[0]) not in text


def test_what_a_connect_of_the_users_raises_is_not_read() -> None:
    failure = raised(psycopg.OperationalError("FATAL:  password authentication failed"))
    assert not failure.is_permanent
    assert "the connect() of the connection class" in failure.words


@pytest.mark.parametrize(
    ("error", "what_to_do"),
    [
        (psycopg.ProgrammingError('invalid connection option "colour"'), PROGRAM),
        (psycopg.InterfaceError("Psycopg cannot use the 'ProactorEventLoop'"), NONE),
    ],
)
def test_what_libpq_is_given_in_vain_is_permanent(error: Any, what_to_do: str) -> None:
    failure = of_login(error, frozenset({"colour"}))
    assert failure.is_permanent
    assert failure.advice == what_to_do


def test_a_function_that_does_not_return_is_named_and_not_the_server() -> None:
    attempt = Attempt()
    failure = attempt.silence(4.0)
    assert failure.words == "no answer from the server for 4.0 s"
    assert (failure.kind, failure.is_permanent) == (_attempt.SILENT, False)
    attempt.now("in the kwargs function", raised)
    failure = attempt.silence(4.0)
    assert failure.words.startswith("the kwargs function (tests/unit/test_attempt.py:")
    assert failure.words.endswith(" in raised) has not returned for 0.0 s")
    assert failure.kind == "the kwargs function does not return"
    assert "timeout of its own" in failure.advice
