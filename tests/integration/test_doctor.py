"""``poolkeeper doctor``: what it finds where something is wrong, and that it finds nothing else."""

from __future__ import annotations

import asyncio
import io
import json
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import psycopg
import pytest

from poolkeeper.__main__ import main
from poolkeeper._embedded import EmbeddedServer, free_port
from poolkeeper.cli import _examination
from tests.support.pooler import MODES, PGBOUNCER, pgbouncer, pgbouncer_version
from tests.support.server import PASSWORD

Doctor = Callable[..., dict[str, Any]]

STEPS = [
    "event loop", "connection string", "DNS", "TCP", "TLS", "login", "version",
    "primary or standby", "pooler", "budget", "round trip", "prepared statements", "clock",
    "keepalives",
]  # fmt: skip


@pytest.fixture
def doctor(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Doctor:
    """A function that runs the command; gives each step by its name, and "status"."""
    for name in ("DATABASE_URL", "PGPASSWORD", "WEB_CONCURRENCY"):
        monkeypatch.delenv(name, raising=False)

    def doctor(*arguments: str) -> dict[str, Any]:
        capsys.readouterr()
        status = main(["doctor", "--json", *arguments])
        out, err = capsys.readouterr()
        assert err == ""
        assert PASSWORD not in out
        assert "wrong-pw" not in out
        told = json.loads(out)
        assert told["ok"] is (status == 0)
        return {step["name"]: step for step in told["steps"]} | {"status": status}

    return doctor


def wrong(found: dict[str, Any]) -> list[str]:
    return [name for name, step in found.items() if name != "status" and step["ok"] is False]


def test_where_all_is_well_each_step_has_a_tick_and_what_was_done_its_time(
    doctor: Doctor, dsn: str
) -> None:
    found = doctor(dsn)
    assert list(found) == [*STEPS, "status"]
    assert wrong(found) == []
    assert found["status"] == 0
    without_time = {name for name in STEPS if found[name]["seconds"] is None}
    assert without_time == {"event loop", "connection string", "budget"}
    assert found["version"]["said"].startswith("PostgreSQL ")
    assert found["primary or standby"]["said"] == "a primary, which takes writes"
    assert found["pooler"]["said"].startswith("none")


def test_the_connection_string_may_come_from_the_environment(
    doctor: Doctor, dsn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DATABASE_URL", dsn)
    assert doctor()["status"] == 0


def test_a_unix_socket_needs_no_network(doctor: Doctor, scram_server: EmbeddedServer) -> None:
    where = f"host={scram_server.directory} port={scram_server.port} user=nobody_there"
    found = doctor(where)
    assert "a Unix socket" in found["socket"]["said"]
    assert not {"DNS", "TCP", "TLS"} & set(found)
    assert wrong(found) == ["login"]


# --- real faults -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "where", "said", "advice"),
    [
        ({"dbname": "nope"}, ["login"], 'database "nope" does not exist', "Check the database"),
        ({"user": "nope"}, ["login"], "password authentication failed", "user and password"),
        ({"password": "wrong-pw"}, ["login"], "password authentication failed", "PGPASSWORD"),
        ({"user": "nologin_app"}, ["login"], "", "user and password"),
        ({"host": "nobody.invalid"}, ["DNS"], "nobody.invalid cannot be resolved", "the host"),
        ({"port": 1}, ["TCP"], "port 1: connection refused", "listen_addresses"),
        ({"sslmode": "require"}, ["TLS", "login"], "offers no TLS, sslmode=require", "sslmode"),
    ],
    ids=str,
)
def test_a_fault_is_found_where_it_is_and_told_with_what_to_do(
    doctor: Doctor,
    scram_server: EmbeddedServer,
    change: dict[str, Any],
    where: list[str],
    said: str,
    advice: str,
) -> None:
    dsn = scram_server.dsn(user="app", password=PASSWORD)
    found = doctor(psycopg.conninfo.make_conninfo(dsn, **change))
    assert wrong(found) == where
    assert found["status"] == 1
    assert said in found[where[0]]["said"]
    assert advice in found[where[0]]["advice"]
    if "login" not in where:
        assert found["login"]["ok"] is None


def test_a_string_that_cannot_be_read_is_told_without_it(doctor: Doctor) -> None:
    found = doctor("host=x pasword=wrong-pw")
    assert wrong(found) == ["connection string"]
    assert list(found) == ["event loop", "connection string", "status"]


def test_of_several_hosts_each_is_looked_at(doctor: Doctor, dsn: str) -> None:
    params = psycopg.conninfo.conninfo_to_dict(dsn)
    hosts = {"host": f"127.0.0.1,{params['host']}", "port": f"1,{params['port']}"}
    found = doctor(psycopg.conninfo.make_conninfo(dsn, **hosts))
    assert found["login"]["ok"] is True
    assert found["TLS"]["ok"] is True


@contextmanager
def black_hole() -> Iterator[int]:
    """A port of this machine that answers no packet: the line of who wants in is full."""
    with socket.socket() as full:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        waiting = [socket.socket() for _ in range(4)]
        try:
            for one in waiting:
                one.setblocking(False)
                one.connect_ex(full.getsockname())
            yield full.getsockname()[1]
        finally:
            for one in waiting:
                one.close()


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the line is never full")
def test_packets_that_are_dropped_are_given_up_in_time(doctor: Doctor) -> None:
    with black_hole() as port:
        found = doctor(f"host=127.0.0.1 port={port}", "--timeout", "0.5")
    assert wrong(found) == ["TCP"]
    assert "no answer within 0.5 s" in found["TCP"]["said"]
    assert "firewall" in found["TCP"]["advice"]


@contextmanager
def answering(answer: bytes | None) -> Iterator[int]:
    """A port on which something says *answer* whatever it is asked; or nothing, if that is None."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            kept: list[socket.socket] = []
            while True:
                try:
                    conn, _ = server.accept()
                except OSError:
                    break
                kept.append(conn)
                if answer is not None:
                    conn.recv(1024)
                    conn.sendall(answer)
                    conn.close()
            for conn in kept:
                conn.close()

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield server.getsockname()[1]
        finally:
            server.shutdown(socket.SHUT_RDWR)
            thread.join()


@pytest.mark.parametrize(
    ("answer", "where", "said"),
    [
        (None, ["TLS"], "takes connections and says nothing"),
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", ["TLS"], "does not answer as PostgreSQL does"),
        (b"", ["TLS"], "does not answer as PostgreSQL does"),
        (b"S", ["login"], ""),  # and then speaks no TLS
    ],
)
def test_what_is_no_postgresql_is_told(
    doctor: Doctor, answer: bytes | None, where: list[str], said: str
) -> None:
    with answering(answer) as port:
        found = doctor(f"host=127.0.0.1 port={port} user=u", "--timeout", "0.5")
    assert wrong(found) == where
    assert said in found[where[0]]["said"]
    if where == ["login"]:
        assert "offers TLS" in found["TLS"]["said"]


@pytest.fixture(scope="module")
def odd_server() -> Iterator[EmbeddedServer]:
    """A standby without a primary, which lets ``app`` in by TLS only, and has none."""
    hba = ["host all postgres 127.0.0.1/32 trust", "hostssl all app 127.0.0.1/32 trust"]
    server = EmbeddedServer(hba=hba)
    (server._data / "standby.signal").touch()
    with server:
        yield server


@pytest.mark.fault
def test_a_standby_is_told_from_a_primary(doctor: Doctor, odd_server: EmbeddedServer) -> None:
    found = doctor(odd_server.dsn())
    assert found["status"] == 0
    assert found["primary or standby"]["said"] == "a standby"
    assert "target_session_attrs" in found["primary or standby"]["advice"]


@pytest.mark.fault
def test_a_server_that_wants_tls_refuses_the_login(
    doctor: Doctor, odd_server: EmbeddedServer
) -> None:
    found = doctor(odd_server.dsn(user="app"))
    assert wrong(found) == ["login"]
    assert "no encryption" in found["login"]["said"]
    assert "pg_hba.conf" in found["login"]["advice"]


def test_more_connections_than_there_are_is_wrong(
    doctor: Doctor, scram_server: EmbeddedServer
) -> None:
    dsn = scram_server.dsn(user="app", password=PASSWORD)
    assert doctor(dsn, "--max-size", "4", "--processes", "2")["status"] == 0
    found = doctor(dsn, "--max-size", "4", "--processes", "3")
    assert wrong(found) == ["budget"]
    assert found["budget"]["said"].startswith(
        "may grow to 12 connections, and the server has 9 for it: max_size=4 in each of 3"
    )
    assert found["budget"]["advice"].startswith("Set max_size to 3 or less")


@pytest.mark.parametrize(("ahead", "said"), [(100.0, "behind"), (-100.0, "ahead")])
def test_a_clock_that_is_wrong_is_told(
    doctor: Doctor, dsn: str, monkeypatch: pytest.MonkeyPatch, ahead: float, said: str
) -> None:
    here = _examination._now
    monkeypatch.setattr(_examination, "_now", lambda: here() + ahead)
    found = doctor(dsn)
    assert wrong(found) == ["clock"]
    assert found["clock"]["said"].endswith(said)
    assert "NTP" in found["clock"]["advice"]


@pytest.mark.parametrize(
    ("host", "params", "ok", "said"),
    [
        ("/tmp", {}, True, "not needed"),
        ("127.0.0.1", {}, True, "not needed"),
        ("db.example", {"keepalives": "0"}, False, "off"),
        ("db.example", {"keepalives_idle": "30"}, True, "after 30 s"),
        ("db.example", {"keepalives_idle": "7000"}, True, "after 7000 s"),
    ],
)
async def test_keepalives_count_on_the_way_to_another_machine(
    host: str, params: dict[str, str], ok: bool, said: str
) -> None:
    conn = SimpleNamespace(info=SimpleNamespace(host=host))
    found = await _examination._keepalives(conn, None, params)
    assert (found.ok, found.said.startswith(said)) == (ok, True)
    assert ("keepalives_idle=30" in found.advice) is (said == "after 7000 s")


if PGBOUNCER is not None:

    @pytest.mark.parametrize("mode", MODES)
    def test_a_pooler_is_told_with_its_mode(doctor: Doctor, server_dsn: str, mode: str) -> None:
        untracked = {"max_prepared_statements": 0} if pgbouncer_version() >= (1, 21) else {}
        with pgbouncer(server_dsn, mode, **untracked) as dsn:
            found = doctor(dsn)
        assert found["status"] == 0
        known = "of a mode that is not known" if mode == "session" else f"in {mode} mode"
        assert found["pooler"]["said"].startswith(f"there is one, {known}")
        assert found["prepared statements"]["said"].startswith("off")
        assert found["budget"]["ok"] is None


# --- how it is shown -----------------------------------------------------------------------------


def test_in_a_pipe_it_is_plain(
    doctor: Doctor, dsn: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["doctor", f"host=127.0.0.1 port={free_port()}"]) == 1
    out = capsys.readouterr().out
    assert "\x1b" not in out
    lines = out.splitlines()
    assert [line.split()[0] for line in lines[:4]] == ["✓", "✓", "✓", "✗"]
    assert lines[-1] == "wrong: TCP"
    assert main(["doctor", dsn]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "nothing is wrong"


def test_what_cannot_show_a_tick_gets_letters(
    doctor: Doctor, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", shown)
    assert main(["doctor", f"host=127.0.0.1 port={free_port()}"]) == 1
    shown.flush()
    lines = shown.buffer.getvalue().decode("ascii").splitlines()  # type: ignore[attr-defined]
    assert [line.split()[0] for line in lines[:4]] == ["ok", "ok", "ok", "NO"]


@pytest.mark.parametrize("rich", [True, False])
def test_in_a_terminal_it_is_in_colour_if_rich_is_there(
    doctor: Doctor,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    rich: bool,
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    if not rich:
        monkeypatch.setitem(sys.modules, "rich.console", None)
    assert main(["doctor", f"host=127.0.0.1 port={free_port()}"]) == 1
    out = capsys.readouterr().out
    assert ("\x1b[" in out) is rich
    assert "connection refused" in out
    assert "wrong: TCP" in out


@pytest.mark.parametrize("option", ["--timeout=0", "--timeout=x", "--max-size=0", "--processes=x"])
def test_an_option_that_cannot_work_is_refused(
    option: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["doctor", option])
    assert caught.value.code == 2
    assert "is no number" in capsys.readouterr().err


def test_it_says_which_loop_psycopg_cannot_use(monkeypatch: pytest.MonkeyPatch) -> None:
    class ProactorEventLoop(asyncio.SelectorEventLoop):
        """Windows has one of that name."""

    with asyncio.Runner(loop_factory=ProactorEventLoop) as runner:

        async def look() -> Any:
            return _examination._loop()

        step = runner.run(look())
    assert step.ok is False
    assert "SelectorEventLoop" in step.advice
