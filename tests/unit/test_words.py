"""What is said of an exception: enough to find it, and nothing that it was given."""

from __future__ import annotations

import errno
import json
from typing import Any

import psycopg
import pytest

from poolkeeper import ConfigError, OpenError
from poolkeeper._words import at_login, in_words

AT = 'connection failed: connection to server at "10.0.0.9", port 5432 failed: '
SECRET = "hunter2"


def raised(error: BaseException) -> BaseException:
    try:
        raise error
    except BaseException as ex:
        return ex


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (KeyError(SECRET), "KeyError"),
        (RuntimeError(f"timed out: {SECRET}"), "RuntimeError"),
        (ExceptionGroup(SECRET, [ValueError(SECRET)]), "ExceptionGroup"),
        (TimeoutError(), "TimeoutError"),
        (
            ConnectionRefusedError(errno.ECONNREFUSED, SECRET),
            "ConnectionRefusedError (Connection refused)",
        ),
        (
            FileNotFoundError(errno.ENOENT, "no", SECRET),
            "FileNotFoundError (No such file or directory)",
        ),
        (OSError(SECRET), "OSError"),
        (psycopg.OperationalError(SECRET), "psycopg.OperationalError"),
        (psycopg.ProgrammingError(f'missing "=" after "{SECRET}"'), "psycopg.ProgrammingError"),
        (psycopg.OperationalError("the connection is lost"), "the connection is lost"),
        (
            psycopg.OperationalError(
                "consuming input failed: server closed the connection unexpectedly\n"
                "\tThis probably means the server terminated abnormally"
            ),
            "consuming input failed: server closed the connection unexpectedly",
        ),
        (
            psycopg.errors.UniqueViolation(SECRET),
            "psycopg.errors.UniqueViolation (SQLSTATE 23505)",
        ),
        (
            psycopg.errors.AdminShutdown("terminating connection due to administrator command"),
            "terminating connection due to administrator command (SQLSTATE 57P01)",
        ),
        (
            ConfigError("conninfo cannot work: …", detail="Facts.", hint="Advice."),
            "conninfo cannot work: …",
        ),
        (OpenError(), "poolkeeper.errors.OpenError"),
    ],
    ids=repr,
)  # fmt: skip
def test_an_error_is_told_by_its_class_unless_its_words_are_known(
    error: BaseException, words: str
) -> None:
    assert in_words(error) == words
    assert SECRET not in in_words(raised(error))


def test_the_innermost_line_of_the_program_is_named() -> None:
    def inner() -> None:
        raise KeyError(SECRET)

    with pytest.raises(KeyError) as caught:
        inner()
    said = in_words(caught.value)
    line = caught.traceback[-1].lineno + 1
    assert said.startswith("KeyError, raised at ")
    assert said.endswith(f"test_words.py:{line} in inner")


def test_of_a_library_that_raises_the_line_that_called_it_is_named() -> None:
    with pytest.raises(ValueError, match="Expecting") as caught:
        json.loads(SECRET)
    said = in_words(caught.value)
    assert said.startswith("json.decoder.JSONDecodeError, raised at ")
    assert said.endswith("in test_of_a_library_that_raises_the_line_that_called_it_is_named")


NAMES = ("app", "shop", "db.example", "10.0.0.9", "colour")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('FATAL:  role "app" does not exist\n', 'role "app" does not exist'),
        (f'FATAL:  role "{SECRET}" does not exist', 'role "***" does not exist'),
        (
            'FATAL:  the database "shop" is closed\nDETAIL:  Hunters do that.',
            'the database "shop" is closed',
        ),
        (f'FATAL:  database "a\n{SECRET}" does not exist', 'database "***"'),
        (f'FATAL:  database "a"{SECRET}"b" does not exist', 'database "***" does not exist'),
        ('FATAL:  unrecognized configuration parameter "colour"',) * 2,
        (
            f'FATAL:  invalid value for parameter "colour": "{SECRET}"',
            'invalid value for parameter "colour": "***"',
        ),
        (
            f"FATAL:  invalid command-line argument for server process: {SECRET}",
            "invalid command-line argument for server process: ***",
        ),
        (
            f'FATAL:  no pg_hba.conf entry for host "127.0.0.1", user "app", database "{SECRET}"',
            'no pg_hba.conf entry for host "127.0.0.1", user "app", database "***"',
        ),
        ("FATAL:  no such user: app", "no such user: app"),
        (f"FATAL:  no such user: {SECRET}", "no such user: ***"),
        ('FATAL:  server login failed: FATAL role "app" does not exist',) * 2,
        (
            "FATAL:  unsupported frontend protocol 3.2: server supports 3.0 to 3.0",
            "unsupported frontend protocol 3.2: server supports 3.0 to 3.0",
        ),
        ("FATAL:  le rôle « app » n'existe pas", "le rôle « app » n'existe pas"),
        (f"FATAL:  le rôle « {SECRET} » n'existe pas", 'le rôle "***" n\'existe pas'),
        ("FATAL:  Datenbank »shop« existiert nicht", "Datenbank »shop« existiert nicht"),
        (f"{AT}Connection refused\n\tIs the server running?", f"{AT}Connection refused"),
        (
            f'could not translate host name "{SECRET}" to address: Name or service not known',
            'could not translate host name "***" to address: Name or service not known',
        ),
        ("failed to resolve host 'db.example': [Errno -2] Name or service not known",) * 2,
        (
            f"failed to resolve host '{SECRET}': [Errno -2] Name or service not known",
            'failed to resolve host "***": [Errno -2] Name or service not known',
        ),
        ("connection timeout expired", "connection timeout expired"),
        (
            f'connection failed: connection to server at "{SECRET}" (127.0.0.1), port 5432 failed:'
            f' server certificate for "{SECRET}" does not match host name "db.example"',
            'connection failed: connection to server at "***" (127.0.0.1), port 5432 failed:'
            ' server certificate for "***" does not match host name "db.example"',
        ),
        (" \n", "no reason was given"),
        (
            f"{AT}Connection refused\nMultiple connection attempts failed. All failures were:\n"
            f"- host: 'localhost', port: None, hostaddr: '::1': {AT}Connection refused\n"
            "- host: 'localhost', port: None, hostaddr: '127.0.0.1': "
            f'{AT}FATAL:  role "app" does not exist',
            f'{AT}Connection refused; role "app" does not exist',
        ),
    ],
)
def test_of_a_failed_login_what_is_quoted_is_shown_where_it_is_known(text: str, words: str) -> None:
    error: Any = psycopg.OperationalError(text)
    assert at_login(error, NAMES) == words.removeprefix("FATAL:  ")
