"""No password, query text or parameter is told to anybody, wherever it was and whatever failed."""

from __future__ import annotations

import asyncio
import logging
import traceback
import warnings
from collections.abc import Callable
from typing import Any

import psycopg
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from psycopg.conninfo import conninfo_to_dict

from poolkeeper import ConfigError, PoolManager
from poolkeeper.__main__ import main
from poolkeeper.adapters._shared import ready

MARK = "S3cretMark"

some = settings(
    max_examples=40,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
around = st.text(alphabet="ab1@/:?#%&= '\"\\.,-[]+", max_size=6)


class Said(logging.Handler):
    """Keeps all that a pool says, to whomever."""

    def __init__(self) -> None:
        super().__init__()
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(self.format(record))

    def about(self, db: PoolManager[Any]) -> None:
        self.texts += [repr(db), repr(db.pool), repr(db.snapshot()), str(db.diagnose())]

    def error(self, error: BaseException, chain: bool) -> None:
        self.texts += [str(error), repr(error)]
        if chain:
            self.texts.append("".join(traceback.format_exception(error)))
        else:  # of the program's own exceptions: what a traceback prints is the program's affair
            self.texts.append("".join(traceback.format_exception(error, chain=False)))

    def assert_nothing_of(self, secret: str) -> None:
        told = [text for text in self.texts if secret.lower() in text.lower()]
        assert not told, told[0]


async def use(said: Said, chain: bool, conninfo: Any, **arguments: Any) -> None:
    """Use a pool in every way that can fail, and keep what is said."""
    try:
        db = PoolManager(conninfo, min_size=1, max_size=1, name="orders", **arguments)
    except ConfigError as ex:
        said.error(ex, chain=True)
        return
    try:
        await db.open(timeout=0.3)
    except psycopg.Error as ex:
        said.error(ex, chain)
    said.about(db)
    await db.open(wait=False)
    for _ in range(2):
        try:
            await db.fetchval("select 1", timeout=0.2)
        except psycopg.Error as ex:
            said.error(ex, chain)
        said.about(db)
        said.texts.append(repr(await db.check(timeout=0.5)))
    for details in (False, True):
        answer = await ready(lambda: db, 0.5, details)
        said.texts.append(answer.body.decode())
    await db.close(timeout=0.5)
    said.about(db)


def all_said(chain: bool, conninfo: Any, **arguments: Any) -> Said:
    said = Said()
    loggers = [logging.getLogger(name) for name in ("poolkeeper", "psycopg.pool")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.addHandler(said)
        logger.setLevel(logging.INFO)
    try:
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            asyncio.run(use(said, chain, conninfo, **arguments))
        said.texts += [str(warning.message) for warning in warned]
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.removeHandler(said)
            logger.setLevel(level)
    assert said.texts
    return said


# --- connection strings ---------------------------------------------------------------------------


@some
@given(before=around, after=around, url=st.booleans(), function=st.booleans())
def test_a_password_is_not_told_however_the_string_is_broken(
    dsn: str, before: str, after: str, url: bool, function: bool
) -> None:
    there = conninfo_to_dict(dsn)
    host, port = there.get("host") or "127.0.0.1", there.get("port") or "5432"
    password = f"{before}{MARK}{after}"
    broken = (
        f"postgresql://nobody:{password}@{host}:{port}/postgres"
        if url
        else f"host={host} port={port} user=nobody password={password} dbname=nowhere"
    )
    said = all_said(True, (lambda: broken) if function else broken)
    said.assert_nothing_of(MARK)


@pytest.mark.parametrize("function", [False, True])
@pytest.mark.parametrize("value", [MARK, f"-c work_mem={MARK}"])
@pytest.mark.parametrize("parameter", ["password", "options", "sslpassword", "passfile"])
def test_a_parameter_that_holds_a_secret_is_not_told(
    dsn: str, parameter: str, value: str, function: bool
) -> None:
    kwargs = {"user": "nobody", parameter: value}
    all_said(True, dsn, kwargs=(lambda: kwargs) if function else kwargs).assert_nothing_of(MARK)


@pytest.mark.parametrize("rest", ["", "@127.0.0.1:1/x", "/x@127.0.0.1:1/x", " x"])
def test_the_demo_does_not_tell_it(rest: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--dsn", f"postgresql://nobody:{MARK}{rest}@127.0.0.1:1/postgres"]) == 2
    assert MARK not in "".join(capfd.readouterr())


# --- what callbacks raise -------------------------------------------------------------------------

ERRORS: list[Callable[[str], Exception]] = [
    KeyError,
    RuntimeError,
    ValueError,
    OSError,
    psycopg.OperationalError,
    psycopg.ProgrammingError,
    psycopg.errors.InvalidPassword,
    lambda text: psycopg.OperationalError(f"connection failed: FATAL:  {text}"),
    lambda text: psycopg.OperationalError(f'FATAL:  role "{text}" does not exist'),
    lambda text: FileNotFoundError(2, text, text),
    lambda text: ExceptionGroup(text, [ValueError(text)]),
    lambda text: UnicodeEncodeError("utf-8", text, 0, 1, text),
]


@pytest.mark.parametrize("callback", ["conninfo", "kwargs", "configure", "check", "reset"])
@pytest.mark.parametrize("make", ERRORS)
def test_what_a_callback_raises_is_not_told(
    dsn: str, callback: str, make: Callable[[str], Exception]
) -> None:
    def fails(*_: object) -> Any:
        raise make(f"password authentication failed: {MARK}")

    async def fails_later(*_: object) -> Any:
        fails()

    if callback == "conninfo":
        said = all_said(False, fails)
    elif callback == "kwargs":
        said = all_said(False, dsn, kwargs=fails)
    else:
        said = all_said(False, dsn, **{callback: fails_later})
    said.assert_nothing_of(MARK)


QUERIES: list[tuple[str, tuple[Any, ...]]] = [
    (f"select '{MARK}' falsee", ()),
    (f"select {MARK}", ()),
    (f"select '{MARK}'::int", ()),
    ("select %s::int", (MARK,)),
    (f"select * from {MARK}", ()),
    (f"select {MARK}()", ()),
    (f"set work_mem = '{MARK}'", ()),
    (f"do $$ begin raise exception '{MARK}' using errcode = '57014'; end $$", ()),
    (f"do $$ begin raise exception 'x' using detail = '{MARK}', hint = '{MARK}'; end $$", ()),
    (f"select set_config('app.key', '{MARK}', falsee)", ()),
    (f"select 1; {MARK}", ()),
]


@pytest.mark.parametrize("callback", ["configure", "check", "reset"])
@pytest.mark.parametrize(("query", "parameters"), QUERIES)
def test_what_a_server_quotes_of_a_query_is_not_told(
    dsn: str, callback: str, query: Any, parameters: tuple[Any, ...]
) -> None:
    async def run(conn: Any) -> None:
        await conn.execute(query, parameters or None)

    all_said(False, dsn, **{callback: run}).assert_nothing_of(MARK)
