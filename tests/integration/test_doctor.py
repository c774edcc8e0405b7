"""``poolkeeper doctor``: what it finds where something is wrong, and that it finds nothing else."""

from __future__ import annotations

import asyncio
import datetime
import io
import json
import os
import re
import socket
import ssl
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import psycopg
import pytest

from poolkeeper.__main__ import main
from poolkeeper._embedded import EmbeddedServer, free_port
from poolkeeper.cli import _examination, _way
from tests.support.certificates import Authority
from tests.support.pooler import MODES, PGBOUNCER, pgbouncer, pgbouncer_version
from tests.support.server import PASSWORD, admin

Doctor = Callable[..., dict[str, Any]]
Secure = Callable[..., str]

STEPS = [
    "event loop", "connection string", "DNS", "TCP", "TLS", "login", "version",
    "primary or standby", "pooler", "budget", "round trip", "prepared statements", "clock",
    "keepalives",
]  # fmt: skip


@pytest.fixture
def doctor(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Doctor:
    """A function that runs the command; gives each step by its name, and "status"."""
    for name in ("DATABASE_URL", "PGHOST", "PGPASSWORD", "PGSERVICE", "WEB_CONCURRENCY"):
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
    assert without_time == {"event loop", "connection string", "DNS", "budget"}
    assert found["DNS"]["said"] == "127.0.0.1 is an address, and no name"
    assert found["login"]["said"].startswith("user postgres has a session in database ")
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
    assert "nobody_there" in found["login"]["said"]


@pytest.mark.parametrize("host", ["host=/no/such/directory ", ""])
def test_a_unix_socket_that_is_not_there_is_told_at_once(doctor: Doctor, host: str) -> None:
    """Also where nobody has given a host, which may not be meant."""
    found = doctor(f"{host}port=1")
    assert wrong(found) == ["socket"]
    assert "no such file or directory" in found["socket"]["said"]
    assert ("DATABASE_URL" in found["socket"]["advice"]) is not bool(host)


def test_a_service_is_resolved(
    doctor: Doctor, dsn: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As libpq does it: before the environment, after what is given."""
    params = psycopg.conninfo.conninfo_to_dict(dsn) | {"password": PASSWORD}
    lines = (f"{name}={value}" for name, value in params.items())
    (tmp_path / "services").write_text("\n".join(["[shop]", *lines]))
    monkeypatch.setenv("PGSERVICEFILE", str(tmp_path / "services"))
    monkeypatch.setenv("PGDATABASE", "nope")
    found = doctor("service=shop")
    assert found["status"] == 0
    where = f"service=shop host={params['host']} port={params['port']}"
    assert where in found["connection string"]["said"]
    assert "PGSERVICE" not in os.environ
    monkeypatch.setenv("PGSERVICE", "stop")  # the one that is given counts, and this one stays
    assert where in doctor("service=shop")["connection string"]["said"]
    assert os.environ["PGSERVICE"] == "stop"
    monkeypatch.delenv("PGSERVICE")
    lost = doctor("service=stop")
    assert wrong(lost) == ["connection string"]
    assert lost["connection string"]["said"] == 'definition of service "***" not found'


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


def test_a_value_that_libpq_does_not_know_is_told_before_anything_is_tried(doctor: Doctor) -> None:
    found = doctor("host=nobody.invalid sslmode=wrong-pw")
    assert wrong(found) == ["connection string"]
    assert found["connection string"]["said"] == 'invalid sslmode value: "***"'


def test_the_authorities_of_the_system_ask_for_the_whole_of_the_check(doctor: Doctor) -> None:
    """As libpq has it, where nobody has said what is to be checked."""
    where = f"host=127.0.0.1 port={free_port()} sslrootcert=system"
    assert "sslmode=verify-full sslrootcert=system" in doctor(where)["connection string"]["said"]


def test_without_unix_sockets_no_host_means_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """On Windows, as libpq has it."""
    monkeypatch.delattr(socket, "AF_UNIX")
    assert list(_way.servers({"port": "5433"})) == [_way.Server("localhost", "localhost", "5433")]


@pytest.mark.parametrize(
    ("host", "here"),
    [
        ("/var/run/postgresql", True),
        ("@postgresql", True),
        ("localhost", True),
        ("127.0.0.7", True),
        ("::1", True),
        ("192.0.2.1", False),
        ("db.example", False),
    ],
)
def test_what_is_on_this_machine_is_known_by_its_name(host: str, here: bool) -> None:
    assert _way.is_here(host) is here


async def test_an_address_that_refuses_is_not_wrong_where_another_one_is_taken(dsn: str) -> None:
    """As of localhost, where the server listens on 127.0.0.1 only."""
    params = psycopg.conninfo.conninfo_to_dict(dsn)
    server = _way.Server("localhost", "localhost", str(params["port"]))
    tried = await _way._tcp(server, ["127.0.0.2", str(params["host"])], 20)
    (refused, none), (opened, streams) = tried
    assert (refused.ok, refused.advice) == (None, "Another address of this host is taken instead.")
    assert none is None
    assert opened.ok is True
    assert streams is not None
    streams[1].close()
    await streams[1].wait_closed()


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
        timeout = "0.5" if answer is None else "2"
        found = doctor(f"host=127.0.0.1 port={port} user=u", "--timeout", timeout)
    assert wrong(found) == where
    assert said in found[where[0]]["said"]
    if where == ["login"]:
        assert "no TLS could be agreed on: the connection was closed" in found["TLS"]["said"]


async def test_direct_tls_begins_without_a_question_and_its_refusal_is_told() -> None:
    """With the name of the protocol, for which a server that is asked so looks."""
    asked: list[bytes] = []

    async def refuse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked.append(await reader.read(4096))
        writer.write(bytes.fromhex("15 03 03 00 02 02 28"))  # an alert: handshake_failure
        await writer.drain()
        writer.close()

    async with await asyncio.start_server(refuse, "127.0.0.1", 0) as listening:
        port = str(listening.sockets[0].getsockname()[1])
        server = _way.Server("db.example", "127.0.0.1", port)
        params = {"sslmode": "require", "sslnegotiation": "direct", "sslrootcert": "/no/file"}
        steps = [step async for step, _ in _way.way_to(server, params, 30)]
    assert [(step.name, step.ok) for step in steps] == [
        ("DNS", True), ("TCP", True), ("TLS", False),
    ]  # fmt: skip
    assert "no TLS could be agreed on: " in steps[2].said
    assert steps[2].said.endswith("alert handshake failure")
    assert asked[0][:2] == b"\x16\x03"  # the handshake itself
    assert b"postgresql" in asked[0]


@pytest.mark.parametrize(
    ("code", "said", "advice"),
    [
        (9, "is not valid yet", "Set the clock"),
        (10, "has expired", "Have it renewed"),
        (18, "is not signed by /ca.crt", "sslrootcert=FILE"),
        (23, "is not good: certificate revoked", "Have one made"),
        (64, "is not for db.example", "hostaddr="),
    ],
)
def test_what_is_wrong_with_a_certificate_is_known_by_the_number_of_openssl(
    code: int, said: str, advice: str
) -> None:
    error = ssl.SSLCertVerificationError("[SSL: CERTIFICATE_VERIFY_FAILED] failed")
    error.verify_code, error.verify_message = code, "certificate revoked"
    server = _way.Server("db.example", "127.0.0.1", "5432")
    told = _way._of_certificate(error, server, "/ca.crt")
    assert said in told[0]
    assert advice in told[1]


@pytest.fixture(scope="module")
def odd_server() -> Iterator[EmbeddedServer]:
    """A standby without a primary, which lets ``app`` in by TLS only, and has none."""
    hba = ["host all postgres 127.0.0.1/32 trust", "hostssl all app 127.0.0.1/32 trust"]
    server = EmbeddedServer(hba=hba)
    (server._data / "standby.signal").touch()
    with server:
        yield server


@pytest.mark.parametrize(
    ("released", "ok", "advice"),
    [(6, False, "Not maintained since November 20"), (5, True, "Maintained until"), (3, True, "")],
)
async def test_a_version_is_wrong_when_it_is_no_longer_maintained(
    monkeypatch: pytest.MonkeyPatch, released: int, ok: bool, advice: str
) -> None:
    """As of a day in August, when so many years have passed since it came out, in autumn."""

    class Then(datetime.date):
        @classmethod
        def today(cls) -> datetime.date:
            return datetime.date(2029, 8, 20)

    monkeypatch.setattr(_examination, "date", Then)
    info = SimpleNamespace(server_version=(2029 - released - 2007) * 10000 + 3)
    conn = SimpleNamespace(info=info, pgconn=SimpleNamespace(ssl_in_use=False))
    found = await _examination._version(conn, None, None)
    assert found.ok is ok
    assert found.advice.startswith(advice)
    assert bool(found.advice) is bool(advice)


@pytest.mark.fault
def test_a_standby_is_told_from_a_primary(doctor: Doctor, odd_server: EmbeddedServer) -> None:
    found = doctor(odd_server.dsn())
    assert found["status"] == 0
    assert found["primary or standby"]["said"] == "a standby"
    assert "target_session_attrs" in found["primary or standby"]["advice"]


def test_a_primary_that_takes_no_writes_is_told(doctor: Doctor, database: str) -> None:
    """And one that keeps its limits to itself, as this database does."""
    admin(
        database,
        "create view public.pg_roles as select * from pg_catalog.pg_roles where false",
    )
    options = "-csearch_path=public,pg_catalog -cdefault_transaction_read_only=on"
    found = doctor(psycopg.conninfo.make_conninfo(database, options=options))
    assert found["status"] == 0
    assert found["primary or standby"]["said"] == "a primary that takes no writes"
    assert "default_transaction_read_only" in found["primary or standby"]["advice"]
    assert found["budget"]["ok"] is None
    assert found["budget"]["said"] == "the server does not tell its limits"


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


@pytest.mark.parametrize(("ahead", "said"), [(-100, "behind"), (100, "ahead")])
def test_a_clock_that_is_wrong_is_told(
    doctor: Doctor, database: str, ahead: int, said: str
) -> None:
    """The server's, as this database has it."""
    admin(
        database,
        "create function public.clock_timestamp() returns timestamptz language sql as"
        f" $$ select pg_catalog.clock_timestamp() + make_interval(secs => {ahead}) $$",
    )
    options = "-csearch_path=public,pg_catalog"
    found = doctor(psycopg.conninfo.make_conninfo(database, options=options))
    assert wrong(found) == ["clock"]
    assert re.search(rf" 1?\d\d\.\d s {said}$", found["clock"]["said"])
    assert "NTP" in found["clock"]["advice"]


@pytest.mark.parametrize(
    ("params", "ok", "said", "advice"),
    [
        ({"keepalives": "0"}, False, "off", "Take keepalives=0 out"),
        ({"keepalives_idle": "30"}, True, "after 30 s", ""),
        ({"keepalives_idle": "7000"}, True, "after 7000 s", "keepalives_idle=30"),
    ],
)
def test_keepalives_are_those_of_the_socket(
    doctor: Doctor, dsn: str, params: dict[str, str], ok: bool, said: str, advice: str
) -> None:
    """They count on the way to another machine."""
    assert doctor(psycopg.conninfo.make_conninfo(dsn, **params))["status"] == 0
    where = psycopg.conninfo.conninfo_to_dict(dsn)["host"]
    far = {"host": "db.example", "hostaddr": where}
    step = doctor(psycopg.conninfo.make_conninfo(dsn, **far, **params))["keepalives"]
    assert (step["ok"], step["said"].partition(" without")[0]) == (ok, said)
    assert advice in step["advice"]
    assert bool(step["advice"]) is bool(advice)


def test_where_nobody_tells_after_how_long_keepalives_are_on(
    doctor: Doctor, dsn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(socket, "TCP_KEEPIDLE", raising=False)
    monkeypatch.delattr(socket, "TCP_KEEPALIVE", raising=False)
    where = psycopg.conninfo.conninfo_to_dict(dsn)["host"]
    far = {"host": "db.example", "hostaddr": where}
    step = doctor(psycopg.conninfo.make_conninfo(dsn, **far))["keepalives"]
    assert (step["ok"], step["said"], step["advice"]) == (True, "on", "")


async def test_prepared_statements_that_answer_for_others_are_wrong() -> None:
    """As those of a pooler that mixes up its sessions."""

    class Mixed:
        prepare_threshold = 5

        async def execute(self, *_: Any, **__: Any) -> Mixed:
            return self

        async def fetchone(self) -> tuple[int]:
            return (0,)  # as the first one has asked

    found = await _examination._prepared(Mixed(), None, None)
    assert (found.ok, found.said) == (False, "they answer something else")


if PGBOUNCER is not None:

    @pytest.fixture(scope="module")
    def secure(server_dsn: str) -> Iterator[Secure]:
        """Servers that take TLS: the certificate of one has expired, of another nearly so."""
        user = "nobody" if os.geteuid() == 0 else None  # PgBouncer's
        with ExitStack() as stack:
            directory = Path(stack.enter_context(TemporaryDirectory(prefix="poolkeeper-")))
            directory.chmod(0o755)
            ours, theirs = Authority(directory), Authority(directory, "another")
            found: dict[str, str] = {}
            for name, days in (("good", 400), ("old", -1), ("ending", 3)):
                cert, key = ours.certify("db.example", days, user)
                settings = {"client_tls_cert_file": cert, "client_tls_key_file": key}
                found[name] = stack.enter_context(
                    pgbouncer(server_dsn, "session", client_tls_sslmode="allow", **settings)
                )

            def dsn(name: str, authority: str = "ours", **params: str) -> str:
                trusted = theirs if authority == "theirs" else ours
                where = {"host": "db.example", "hostaddr": "127.0.0.1", "sslmode": "verify-full"}
                params = where | {"sslrootcert": str(trusted.path)} | params
                return psycopg.conninfo.make_conninfo(found[name], **params)

            yield dsn

    def test_tls_that_works_is_told_with_the_end_of_the_certificate(
        doctor: Doctor, secure: Secure
    ) -> None:
        found = doctor(secure("good"))
        assert found["status"] == 0
        assert (
            "offers TLS 1.3, sslmode=verify-full; its certificate is good until 2"
            in (found["TLS"]["said"])
        )
        assert found["TLS"]["advice"] == ""
        assert found["version"]["said"].endswith(", by TLS")
        ending = doctor(secure("ending"))
        assert ending["status"] == 0
        assert ending["TLS"]["advice"] == "That is in 2 days: have it renewed."

    @pytest.mark.parametrize(
        ("name", "params", "said", "advice"),
        [
            ("old", {}, "certificate has expired", "Have it renewed"),
            ("good", {"host": "db.other"}, "certificate is not for db.other", "hostaddr="),
            ("good", {"host": ""}, "needs the name of the host", "Give host="),
            ("good", {"authority": "theirs"}, "is not signed by", "sslrootcert=FILE"),
            ("good", {"authority": "theirs", "sslmode": "require"}, "is not signed by", "FILE"),
            ("good", {"sslrootcert": "system"}, "the authorities of this system", "sslrootcert"),
            ("good", {"sslrootcert": "/no/file"}, "there is no /no/file", "sslrootcert=system"),
            ("good", {"sslrootcert": __file__}, "cannot be read", "in PEM"),
        ],
    )
    def test_a_certificate_that_is_not_trusted_is_told_with_the_reason(
        doctor: Doctor, secure: Secure, name: str, params: dict[str, str], said: str, advice: str
    ) -> None:
        """And at the login, in libpq's words."""
        found = doctor(secure(name, **params))
        assert wrong(found) == ["TLS", "login"]
        assert said in found["TLS"]["said"]
        assert advice in found["TLS"]["advice"]

    def test_where_tls_is_not_wanted_nothing_is_wrong_without_it(
        doctor: Doctor, secure: Secure
    ) -> None:
        found = doctor(secure("good", "theirs", sslmode="prefer"))
        assert found["status"] == 0
        assert found["TLS"]["advice"].startswith("sslmode=prefer goes on without TLS.")
        assert not found["version"]["said"].endswith(", by TLS")
        unread = doctor(secure("good", sslmode="require", sslrootcert="/no/file"))
        assert unread["status"] == 0
        assert unread["TLS"]["said"].endswith("sslmode=require: its certificate was not looked at")
        assert "verify-full" in unread["TLS"]["advice"]
        never = doctor(secure("good", sslmode="disable"))
        assert never["status"] == 0
        assert never["TLS"]["said"].endswith("offers TLS, sslmode=disable")

    @pytest.mark.parametrize("mode", MODES)
    def test_a_pooler_is_told_with_its_mode(doctor: Doctor, server_dsn: str, mode: str) -> None:
        untracked = {"max_prepared_statements": 0} if pgbouncer_version() >= (1, 21) else {}
        with pgbouncer(server_dsn, mode, **untracked) as dsn:
            found = doctor(dsn)
            alone = doctor(dsn, "--max-size", "1")
        assert found["status"] == alone["status"] == 0
        known = "of a mode that is not known" if mode == "session" else f"in {mode} mode"
        assert found["pooler"]["said"].startswith(f"there is one, {known}")
        # Of one connection nobody can tell, where no other client takes its session.
        assert alone["pooler"]["said"].startswith("there is one, of a mode that is not known")
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
    assert main(["doctor", "host=x sslmode"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].startswith("✗ connection string")
    assert lines[2].startswith(" " * 33)  # what to do, below what was said
    assert lines[3:] == ["wrong: connection string"]


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
    assert main(["doctor", "host=nowhere sslmode=x"]) == 1
    out = capsys.readouterr().out
    assert "Check the connection string" in out
    assert "wrong: connection string" in out


@pytest.mark.parametrize("option", ["--timeout=0", "--timeout=x", "--max-size=0", "--processes=x"])
def test_an_option_that_cannot_work_is_refused(
    option: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["doctor", option])
    assert caught.value.code == 2
    assert "number" in capsys.readouterr().err


def test_it_says_which_loop_psycopg_cannot_use(
    doctor: Doctor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And goes on all the same: on one that psycopg can use."""

    class ProactorEventLoop(asyncio.SelectorEventLoop):
        """asyncio.run() makes one of that name on Windows."""

    monkeypatch.setattr(asyncio, "new_event_loop", ProactorEventLoop)
    found = doctor("host=nobody.invalid")
    assert found["event loop"]["ok"] is None
    assert "SelectorEventLoop" in found["event loop"]["advice"]
    assert wrong(found) == ["DNS"]
