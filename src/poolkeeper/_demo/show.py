"""``poolkeeper demo``: the app, the mistakes, the table."""

from __future__ import annotations

import asyncio
import logging
import platform
import secrets
import signal
import sys
import time
from collections.abc import Callable, Generator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg
import psycopg_pool
from psycopg import sql
from psycopg.conninfo import make_conninfo

from poolkeeper import PoolkeeperError, PoolManager, __version__
from poolkeeper._conninfo import normalise
from poolkeeper._words import in_words

from . import app, programs
from .catalogue import MISTAKES, SKIPPED, Case, span
from .narration import Narrator, markdown_table
from .programs import Programs, Run

ROLE = "poolkeeper_demo_clerk"  # has a password, on a server of our own
AT_A_TIME = 6  # most of them only wait
HEAD = ("mistake", "bare pool", "poolkeeper")


class CannotShow(Exception):
    """There is no server that the demo could run on, or no file to write to."""


@dataclass(frozen=True)
class Place:
    """Where the demo may work: a schema that is its own."""

    dsn: str
    schema: str
    role: str
    version: str


def show(dsn: str | None, markdown: Path | None) -> int:
    """
    Run the demo, on the server at *dsn* or on one of our own, and return its exit status.

    Raises:
        MissingDependencyError: If there is no *dsn* and no server to start.
        OpenError: If the server at *dsn* cannot be used.
        ConfigError: If *dsn* is not a connection string.
    """
    begin = time.monotonic()
    for name in ("poolkeeper", "psycopg.pool"):  # the error tells it all
        logging.getLogger(name).addHandler(logging.NullHandler())
    narrator = Narrator(sys.stdout)
    try:
        with ExitStack() as cleanup:
            cleanup.enter_context(_ended_by_signals())
            return _show(narrator, dsn, markdown, begin, cleanup)
    except CannotShow as error:
        print(error, file=sys.stderr)
        return 2


def _show(
    narrator: Narrator, dsn: str | None, markdown: Path | None, begin: float, cleanup: ExitStack
) -> int:
    if markdown is not None:
        try:
            markdown.touch()  # now, not after half a minute
        except OSError as error:
            raise CannotShow(f"cannot write to {markdown}: {error.strerror}") from error
    place = cleanup.enter_context(_place(narrator, dsn))
    runner = Programs(programs.environment(place.dsn, place.schema, place.role))
    ok = _show_app(narrator, place)
    rows, messages, broken = _show_mistakes(narrator, runner)
    narrator.title("In short")
    narrator.table(HEAD, rows)
    narrator.line()
    seconds = time.monotonic() - begin
    narrator.paragraph(
        f"{'The sums of the app are right' if ok else 'THE SUMS OF THE APP ARE WRONG'}."
        f" {_verdict(rows, broken)} All of it took {seconds:.0f} s.",
        indent=0,
    )
    if markdown is not None:
        markdown.write_text(_document(place, rows, messages), encoding="utf-8")
        narrator.line(f"Written to {markdown}.")
    return 0 if ok and not broken else 1


def _verdict(rows: list[tuple[str, str, str]], broken: list[str]) -> str:
    text = f"{len(rows) - len(broken)} of {len(rows)} as poolkeeper promises."
    if broken:
        text += f" NOT AS PROMISED: {', '.join(broken)}."
    return text


# --- the server ---------------------------------------------------------------------------------


_TO_END = [
    getattr(signal, name) for name in ("SIGTERM", "SIGHUP", "SIGINT") if hasattr(signal, name)
]


@contextmanager
def _ended_by_signals() -> Generator[None, None, None]:
    """Let SIGTERM and SIGHUP end the demo as Ctrl-C does: cleaned up."""
    received: list[int] = []

    def end(number: int, frame: Any) -> None:
        received.append(number)
        interrupt = signal.getsignal(signal.SIGINT)
        if not callable(interrupt):
            raise KeyboardInterrupt
        interrupt(signal.SIGINT, frame)  # asyncio.run() has one of its own: it cancels main()

    before = {
        number: signal.signal(number, end)
        for number in _TO_END
        if number != signal.SIGINT and signal.getsignal(number) != signal.SIG_IGN  # nohup
    }
    try:
        yield
    except KeyboardInterrupt:
        if received:
            raise SystemExit(128 + received[0]) from None
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _deferred() -> Generator[None, None, None]:
    """Hold a signal back until the end of the block, which takes a second: it is then raised."""
    received: list[int] = []
    before = {
        number: signal.signal(number, lambda number, _: received.append(number))
        for number in _TO_END
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if received:
            signal.raise_signal(received[0])


@contextmanager
def _undisturbed() -> Generator[None, None, None]:
    """Finish a clean-up although Ctrl-C is pressed again."""
    before = {number: signal.signal(number, signal.SIG_IGN) for number in _TO_END}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _place(narrator: Narrator, dsn: str | None) -> Generator[Place, None, None]:
    narrator.line(
        f"poolkeeper {__version__}, psycopg {psycopg.__version__},"
        f" psycopg_pool {psycopg_pool.__version__}, Python {platform.python_version()}"
    )
    with ExitStack() as cleanup:
        role = ""
        if dsn is None:
            dsn = cleanup.enter_context(_own_server(narrator))
            role = ROLE
        schema = f"poolkeeper_demo_{secrets.token_hex(4)}"
        # Refuses a bad DSN, in our own words. The name tells our sessions from others'.
        PoolManager(dsn)
        dsn = make_conninfo(normalise(dsn), application_name=schema)
        try:
            version = asyncio.run(_make_schema(dsn, schema, role))
        except PoolkeeperError:
            raise
        except psycopg.Error as error:
            raise CannotShow(f"cannot make a schema for the demo: {in_words(error)}") from error
        cleanup.callback(_drop_schema, dsn, schema)
        narrator.line(f"PostgreSQL {version}, schema {schema}, dropped at the end.")
        yield Place(dsn, schema, role, version)


@contextmanager
def _own_server(narrator: Narrator) -> Generator[str, None, None]:
    from poolkeeper._embedded import EmbeddedServer

    begin = time.monotonic()
    hba = [f"host all {ROLE} 127.0.0.1/32 scram-sha-256", "host all all 127.0.0.1/32 trust"]
    server: EmbeddedServer | None = None
    try:
        with _deferred():
            server = EmbeddedServer({"max_connections": 200}, hba)
            server.start()
        narrator.line(f"Started a PostgreSQL of our own in {span(time.monotonic() - begin)}.")
        yield server.dsn()
    except RuntimeError as error:
        if server is not None and server.running:
            raise
        raise CannotShow(f"cannot start a PostgreSQL: {error}") from error
    finally:
        with _undisturbed():
            if server is not None:
                server.close()


async def _make_schema(dsn: str, schema: str, role: str) -> str:
    async with (
        PoolManager(dsn, name="demo", min_size=1, open_timeout=5) as db,
        db.connection() as conn,
    ):
        name = sql.Identifier(schema)
        await conn.execute(sql.SQL("create schema {}").format(name))
        await conn.execute(sql.SQL("create table {}.notes (note text)").format(name))
        if role:
            password = secrets.token_hex(8)
            await conn.execute(
                sql.SQL("create role {} login password {}").format(sql.Identifier(role), password)
            )
        return conn.info.parameter_status("server_version") or "of unknown version"


def _drop_schema(dsn: str, schema: str) -> None:
    # Sessions of killed programs end when the server notices, which may be late.
    with _undisturbed(), psycopg.connect(dsn, autocommit=True) as conn:
        conn.execute(
            "select pg_terminate_backend(pid) from pg_stat_activity"
            " where application_name = %s and pid <> pg_backend_pid()",
            (schema,),
        )
        conn.execute("set client_min_messages to warning")
        conn.execute(sql.SQL("drop schema {} cascade").format(sql.Identifier(schema)))


# --- part one: the app --------------------------------------------------------------------------


def _show_app(narrator: Narrator, place: Place) -> bool:
    narrator.title("1. A small app that does it right")
    narrator.paragraph(
        f"{app.ACCOUNTS} accounts with {app.OPENING_BALANCE} each. {app.WRITERS} writers make"
        f" {app.TRANSFERS_PER_WRITER} transfers each, in transactions, while {app.READERS} readers"
        f" add up all balances again and again. They share {app.CONNECTIONS} connections."
    )
    books = asyncio.run(app.run(place.dsn, place.schema))
    narrator.line()
    expected = app.ACCOUNTS * app.OPENING_BALANCE
    for text in (
        f"{books.transfers} transfers committed, {books.refused} refused for want of money and"
        f" rolled back, in {span(books.seconds)}",
        f"{books.looks} looks at the total while that went on, {books.wrong_looks} of them wrong",
        f"total at the end: {books.total} of {expected}",
        f"{books.entries} entries in the journal; {books.accounts_off} accounts that do not agree"
        " with it",
    ):
        narrator.paragraph(text)
    narrator.paragraph("The sums are right." if books.right else "THE SUMS ARE WRONG.")
    return books.right


# --- part two: the mistakes ---------------------------------------------------------------------


def _show_mistakes(
    narrator: Narrator, runner: Programs
) -> tuple[list[tuple[str, str, str]], list[tuple[str, Run, Run, Case]], list[str]]:
    """Run and print every mistake; return the rows, what was printed, and what was broken."""
    narrator.title("2. Mistakes, without and with poolkeeper")
    narrator.paragraph(
        "Each program runs twice, the same lines of code: with AsyncConnectionPool of psycopg_pool"
        ' ("bare pool") and with PoolManager. Timeouts are 1 s where 30 s is the default. The'
        " programs are in poolkeeper/_demo/mistakes.py; messages name its lines."
    )
    rows: list[tuple[str, str, str]] = []
    told: list[tuple[str, Run, Run, Case]] = []
    broken: list[str] = []
    with _side_by_side(runner) as result:
        for number, mistake in enumerate(MISTAKES, 1):
            narrator.heading(number, mistake.title)
            narrator.paragraph(mistake.story)
            for case in mistake.cases:
                narrator.line()
                bare, ours = result(case)
                if len(mistake.cases) > 1:
                    narrator.paragraph(case.label + ":")
                is_broken = case.broken(ours)
                good = None if case.cell(ours).startswith(SKIPPED) else not is_broken
                narrator.result("bare pool", case.cell(bare), case.messages(bare), False)
                narrator.result("poolkeeper", case.cell(ours), case.messages(ours), good)
                rows.append((case.label, case.cell(bare), case.cell(ours)))
                told.append((mistake.title, bare, ours, case))
                if is_broken:
                    broken.append(case.label)
    return rows, told, broken


@contextmanager
def _side_by_side(runner: Programs) -> Generator[Callable[[Case], tuple[Run, Run]], None, None]:
    """Run all programs, a few at a time, and yield what waits for the two runs of a case."""
    cases = [case for mistake in MISTAKES for case in mistake.cases]
    cases.sort(key=lambda case: case.program != "outage")  # the longest first
    threads = ThreadPoolExecutor(AT_A_TIME)
    try:
        futures: dict[str, tuple[Future[Run], Future[Run]]] = {
            case.program: (
                threads.submit(runner.run, case.program, "bare"),
                threads.submit(runner.run, case.program, "poolkeeper"),
            )
            for case in cases
        }

        def result(case: Case) -> tuple[Run, Run]:
            bare, ours = futures[case.program]
            return bare.result(), ours.result()

        yield result
    finally:
        with _undisturbed():
            runner.stop()
            threads.shutdown(cancel_futures=True)


# --- the document -------------------------------------------------------------------------------


def _document(
    place: Place,
    rows: list[tuple[str, str, str]],
    told: list[tuple[str, Run, Run, Case]],
) -> str:
    parts = [
        "# What each mistake does, without and with poolkeeper",
        _by_sentence(
            "Made by `poolkeeper demo --markdown FILE`, which runs each program twice, with"
            " psycopg_pool's `AsyncConnectionPool` (the bare pool) and with `PoolManager`, and"
            " writes down what happened. Every cell and every message is from one run. Numbers"
            " differ from run to run, those of the races most of all (fork, loops in threads,"
            " cancellation)."
        ),
        _by_sentence(
            f"poolkeeper {__version__}, psycopg {psycopg.__version__},"
            f" psycopg_pool {psycopg_pool.__version__}, Python {platform.python_version()},"
            f" PostgreSQL {place.version}. Timeouts are 1 s where psycopg_pool's default is 30 s;"
            " programs that hang are killed after 2 s. `mistakes.py` is"
            " `src/poolkeeper/_demo/mistakes.py`."
        ),
        markdown_table(HEAD, rows),
        "## What they say",
    ]
    stories = {mistake.title: mistake.story for mistake in MISTAKES}
    seen: set[str] = set()
    for title, bare, ours, case in told:
        if title not in seen:
            seen.add(title)
            parts += [f"### {title}", _by_sentence(stories[title])]
        several = sum(title == other for other, *_ in told) > 1
        parts += [f"**{case.label}**"] if several else []
        for name, run in (("bare pool", bare), ("poolkeeper", ours)):
            parts.append(f"{name}: {case.cell(run)}")
            if text := "\n".join(case.messages(run)):
                parts.append(f"```text\n{text}\n```")
    return "\n\n".join(parts) + "\n"


def _by_sentence(text: str) -> str:
    """Return *text* with each sentence on a line of its own."""
    return text.replace(". ", ".\n")
