"""Connection strings: what is accepted, what is refused, and that no password is ever shown."""

from __future__ import annotations

import string
import traceback
from urllib.parse import quote

import psycopg
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from poolkeeper import ConfigError, PoolManager
from poolkeeper._conninfo import normalise, parse, server_key
from poolkeeper.errors import see

SECRET = "sEcr3t"

# Each holds the secret and cannot be read, or cannot work.
MALFORMED = [
    # a password with characters that need escapes
    f"postgresql://user:{SECRET}@@host:port/db",
    f"postgresql://user:{SECRET}%zz@host/db",
    f"postgresql://user:{SECRET}%@host/db",
    f"postgresql://user:%{SECRET}@host/db",
    f"postgresql://user:{SECRET}%00@host/db",
    f"postgresql://user:{SECRET} x@host/db",
    f"postgresql://user:{SECRET}%AA@host/db",
    f"postgresql://user:{SECRET}\udcaa@host/db",
    f'postgresql://user:a"b{SECRET}%zz@host/db',
    f'postgresql://user:%{SECRET}"{SECRET}@host/db',
    f'postgresql://user:p%zz"\n{SECRET}@host',
    f"postgresql://user:half@{SECRET}@host/db",
    f"postgresql://user:half@{SECRET}@host:5432/db",
    f"postgresql://user:{SECRET}/half@host/db",
    f"postgresql://user:half/{SECRET}@host/db",
    f"postgresql://user:12/{SECRET}?x@host/db",
    f"postgresql://user:12/half?{SECRET.lower()}=1@host/db",
    "postgresql://user:12/half?secretword=1@host/db",
    f"postgresql://user:pass@[{SECRET}/db",
    f"postgresql://user:pass@[::1]{SECRET}/db",
    f"postgresql://user:pass@[]{SECRET}/db",
    f"postgresql://{SECRET}:{SECRET}@host:{SECRET}/db",
    f"postgresql://user:{SECRET}:x@host:1:2/db",
    # options in a URL
    f"postgresql+psycopg://user:{SECRET}@host/db?bogus=1",
    f"postgresql://user:{SECRET}@host/db?bogus={SECRET}",
    f"postgresql://user:{SECRET}@host/db?{SECRET}=1",
    f"postgresql://user:{SECRET}@host/db?{SECRET}",
    f"postgresql://user:{SECRET}@host/db?sslmode=a={SECRET}",
    f"postgresql://host/db?password={SECRET}%zz",
    f"postgresql://host/db?password=half&{SECRET.lower()}=1",
    "postgresql://host/db?password=half&secretword=1",
    f'postgresql://user:x@host/db?option "{SECRET}=1',
    f'postgresql://user:x@host/db?option "{SECRET}',
    # keywords
    f"password={SECRET} foo",
    f"password=half {SECRET}",
    f"password=half {SECRET}=1",
    "password=half secretword=1",
    f"password='{SECRET}",
    f"password='{SECRET}' {SECRET}",
    f"password = '{SECRET}' x{SECRET}",
    f'password="{SECRET}" {SECRET}" x',
    f"host=x password=a\n{SECRET} y",
    f"{SECRET}=1",
    f"passwrod={SECRET}",
    f"host=x port={SECRET}",
    f"host=a@{SECRET}",
    f"host=a,b@{SECRET} port=5432",
    # neither
    f"mysql://user:{SECRET}@host/db",
    f"postgresql:/user:{SECRET}@host/db",
    f"postgresql//user:{SECRET}@host/db",
    f"psql postgresql://user:{SECRET}@host/db",
    f"'postgresql://user:{SECRET}@host/db'",
    SECRET,
]


def everything_shown(error: BaseException) -> str:
    """Return all that a log, a debugger or an error tracker could print of *error*."""
    chain: list[BaseException] = []
    todo = [error]
    while todo:
        one = todo.pop()
        chain.append(one)
        todo += [ex for ex in (one.__cause__, one.__context__) if ex is not None]
    texts = [text for ex in chain for text in (str(ex), repr(ex), repr(ex.args), repr(vars(ex)))]
    return "\n".join([*texts, *traceback.format_exception(error)])


@pytest.mark.parametrize(
    ("given", "libpq_gets"),
    [
        ("postgresql+psycopg://u@h/db", "postgresql://u@h/db"),
        ("postgresql+asyncpg://u@h/db", "postgresql://u@h/db"),
        ("postgresql+psycopg2://u@h/db", "postgresql://u@h/db"),
        ("postgresql+psycopg_async://u@h/db", "postgresql://u@h/db"),
        ("postgres+psycopg://u@h/db", "postgres://u@h/db"),
        ("POSTGRESQL+PSYCOPG://u@h/db", "POSTGRESQL://u@h/db"),
        ("  postgresql+psycopg://u@h/db\n", "postgresql://u@h/db"),
        ("postgres://u@h/db", "postgres://u@h/db"),
        ("postgresql://u:a+psycopg://@h/db", "postgresql://u:a+psycopg://@h/db"),
        ("host=h password=postgresql+psycopg://", "host=h password=postgresql+psycopg://"),
        ("host=h dbname='my db'", "host=h dbname='my db'"),
        ("mysql+psycopg://u@h/db", "mysql+psycopg://u@h/db"),
        ("", ""),
    ],
)
def test_the_driver_is_taken_out_of_the_scheme_and_nothing_else(
    given: str, libpq_gets: str
) -> None:
    assert normalise(given) == libpq_gets
    assert normalise(libpq_gets) == libpq_gets


@pytest.mark.parametrize(
    "conninfo",
    [
        "",
        "postgresql://",
        "postgres://user:pass@host/db",
        "postgresql://user:p%40ss%2Fw%3F@host:5432/db?sslmode=require&application_name=x",
        "postgresql://user@host1:5432,host2:5433/db?target_session_attrs=any",
        "postgresql://host1,host2:5433/db",
        "postgresql://[::1]:5432/db",
        "postgresql:///db?host=/var/run/postgresql",
        "postgresql://%2Fvar%2Frun%2F%40postgresql/db",
        "host=@abstract dbname=db",
        "host=/run/a@b dbname=db",
        "host=a,b,c port=5432",
        "host=a,b port=1,",
        "hostaddr=127.0.0.1,::1 port=5432,5433",
        "service=orders",
        "user=app password='with \\' quote' port=65535",
    ],
)
def test_a_good_string_is_read_as_libpq_reads_it(conninfo: str) -> None:
    assert parse(conninfo) == conninfo_to_dict(conninfo)


def test_keyword_arguments_win_over_the_string() -> None:
    assert parse("host=a port=1", port=5433) == {"host": "a", "port": 5433}


@pytest.mark.parametrize("conninfo", MALFORMED)
def test_a_string_that_cannot_work_is_refused_without_its_password(conninfo: str) -> None:
    with pytest.raises(ConfigError) as caught:
        PoolManager(conninfo)
    error = caught.value
    assert error.parameter == "conninfo"
    assert error.args[0].startswith("conninfo ")
    shown = everything_shown(error).lower()
    # The source line that pytest and Python print has the variable's name, not its value.
    assert SECRET.lower() not in shown
    assert "secretword" not in shown
    assert "half" not in shown


UNREADABLE = "conninfo is not a connection string that libpq can read:"


@pytest.mark.parametrize(
    ("conninfo", "message"),
    [
        (
            "postgresql://u:p@h/db?bogus=1",
            f'{UNREADABLE} invalid URI query parameter: "bogus"',
        ),
        (
            "host=h colour=red",
            f'{UNREADABLE} invalid connection option "colour"',
        ),
        (
            "host=h password=x sslmod=require",
            f'{UNREADABLE} invalid connection option "sslmod"',
        ),
        (
            "host=h password=x colour=red",
            f'{UNREADABLE} invalid connection option "***"',
        ),
        (
            "postgresql://u:p%zz@h",
            f'{UNREADABLE} invalid percent-encoded token: "***"',
        ),
        (
            "password='x",
            f"{UNREADABLE} unterminated quoted string in connection info string",
        ),
        ("postgresql://u:%aa@h/db", f"{UNREADABLE} not UTF-8"),
        ("postgresql://u:\udcaa@h/db", f"{UNREADABLE} not UTF-8"),
        ("postgresql://u:a@b@h/db", 'conninfo cannot work: a host name has a "@" in it'),
        ("postgresql://u:a/b@h/db", "conninfo cannot work: a port is not a number from 1 to 65535"),
        ("host=h port=0", "conninfo cannot work: a port is not a number from 1 to 65535"),
        ("host=h port=65536", "conninfo cannot work: a port is not a number from 1 to 65535"),
        ("host=h port=5\u0663", "conninfo cannot work: a port is not a number from 1 to 65535"),
        ("host=a,b port=1,2,3", "conninfo cannot work: 3 ports are given for 2 hosts"),
    ],
)
def test_what_is_wrong_is_said_as_far_as_it_is_safe(conninfo: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(conninfo)
    assert caught.value.args[0] == message
    assert str(caught.value) == (
        f"{message}\nHINT:  Give a URL (postgresql://user:password@host:5432/dbname, with"
        " %-escapes for special characters) or a string of keywords (host=… dbname=…)."
        f" {see('config')}"
    )


def test_words_of_libpq_that_are_not_known_are_not_shown(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It speaks the user's language where it was told to."""

    def translated(*args: object, **kwargs: object) -> None:
        raise psycopg.ProgrammingError(f"« = » manquant après « {SECRET} » dans la chaîne")

    monkeypatch.setattr("poolkeeper._conninfo.conninfo_to_dict", translated)
    with pytest.raises(ConfigError, match="the reason may quote the password") as caught:
        parse(f"password=x {SECRET}")
    assert SECRET not in everything_shown(caught.value)


def test_a_fault_in_kwargs_names_kwargs() -> None:
    with pytest.raises(ConfigError) as caught:
        PoolManager("host=h", kwargs={"port": "five"})
    assert caught.value.parameter == "kwargs"
    assert caught.value.args[0] == "kwargs cannot work: a port is not a number from 1 to 65535"


# No password below is a piece of our own messages, of file names or of code.
passwords = st.text(
    st.sampled_from(string.punctuation + " \t\n" + string.ascii_letters), min_size=1, max_size=12
).map(lambda text: f"Qz7{text}Qz7")


@given(password=passwords)
@settings(max_examples=200, deadline=None)
def test_no_random_password_is_shown_when_it_is_not_escaped(password: str) -> None:
    for conninfo in (
        f"postgresql://user:{password}@host/db",
        f"postgresql+psycopg://user:{password}@host:5432/db?bogus=1",
        f"postgresql://host/db?password={password}",
        f"host=host password={password}",
        f"host=host password='{password}' port=x",
    ):
        try:
            manager = PoolManager(conninfo)
            shown = f"{manager!r} {manager.pool!r}"
        except ConfigError as error:
            shown = everything_shown(error)
        assert "Qz7" not in shown


@given(password=st.text(st.characters(exclude_characters="\0", codec="utf-8"), min_size=1))
@settings(max_examples=100, deadline=None)
def test_every_password_that_is_escaped_is_read_back(password: str) -> None:
    url = f"postgresql+psycopg://user:{quote(password, safe='')}@host:5432/db"
    assert parse(normalise(url))["password"] == password
    assert parse(normalise(make_conninfo(password=password)))["password"] == password


def test_one_server_has_one_key() -> None:
    one = server_key(parse("postgresql://app:x@db:5432/orders?sslmode=require"))
    assert one == server_key(parse("host=db port=5432 dbname=orders user=app password=y"))
    for other in ("host=db2", "port=1", "dbname=x", "user=x", "hostaddr=::1", "service=s"):
        assert one != server_key(parse("postgresql://app:x@db:5432/orders") | parse(other))
