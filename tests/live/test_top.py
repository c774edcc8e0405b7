"""``poolkeeper top``: processes that have asked to be seen, alone and added up."""

from __future__ import annotations

import asyncio
import io
import json
import os
import pty
import re
import select
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from rich.console import Console

from poolkeeper import AcquireTimeout, ConfigError, PoolManager, events
from poolkeeper.__main__ import main
from poolkeeper._embedded import free_port
from poolkeeper.cli._views import fitted
from poolkeeper.live import _observer, _socket, expose, page
from poolkeeper.live._merge import add_up
from poolkeeper.live._observer import Observer
from poolkeeper.live._socket import ask
from tests.support.waiting import until as until_there

MakeManager = Callable[..., PoolManager[Any]]

Top = Callable[..., tuple[int, str]]


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where sockets are made and looked for; other tests make theirs elsewhere."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path / "poolkeeper"


@pytest.fixture
def top(directory: Path, capsys: pytest.CaptureFixture[str]) -> Top:
    """A function that runs the command once, and returns its status and what it printed."""

    def top(*arguments: str) -> tuple[int, str]:
        capsys.readouterr()
        status = main(["top", "--once", *arguments])
        return status, capsys.readouterr().out

    return top


async def test_it_shows_who_holds_who_waits_and_what_happened(
    make_manager: MakeManager, top: Top
) -> None:
    db = make_manager(min_size=1, max_size=1, name="orders", timeout=0.2)
    with expose(db):
        async with db:
            async with db.connection() as conn:
                await conn.execute("select 1")
                with pytest.raises(AcquireTimeout):
                    await asyncio.create_task(fails(db))
                waiter = asyncio.create_task(waits(db))
                while not db.snapshot().waiting:
                    await asyncio.sleep(0.01)
                status, text = await asyncio.to_thread(top)
            await waiter
            calm = await asyncio.to_thread(top, "--json")
    assert status == 0
    assert re.search(rf'^pool "orders": \S+ {os.getpid()}$', text, re.MULTILINE)
    assert "total=1 in_use=1 idle=0 max=1 waiting=1" in text
    assert "in test_it_shows_who_holds_who_waits_and_what_happened" in text
    assert "in waits" in text
    assert "cause: " in text
    assert "no connection" in text
    (pool,) = json.loads(calm[1])["pools"]
    assert pool["waiting"] == 0
    assert {site["who"].rpartition(" in ")[2] for site in pool["sites"]} >= {"waits", "fails"}
    assert next(s for s in pool["sites"] if s["who"].endswith(" in fails"))["in_vain"] == 1


async def fails(db: PoolManager) -> None:
    async with db.connection(timeout=0.2):
        raise AssertionError("there was one")


async def waits(db: PoolManager) -> None:
    async with db.connection(timeout=30):
        pass


async def test_a_loop_that_stands_still_is_seen(make_manager: MakeManager, top: Top) -> None:
    """The answer is given by a thread, with what the loop's tasks hold."""
    db = make_manager(min_size=1, max_size=1, name="stuck")
    with expose(db):
        async with db, db.connection():
            status, text = top()  # in the loop's own thread
    assert status == 0
    assert "in_use=1" in text


async def test_the_socket_is_the_user_s_own_and_there_while_the_pool_is_open(
    make_manager: MakeManager, directory: Path
) -> None:
    db = make_manager(min_size=1)
    exposed = expose(db)
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    assert not exposed.path.exists()
    for _ in range(2):
        async with db:
            assert stat.S_IMODE(exposed.path.stat().st_mode) == 0o600
            assert [state["state"] for state in ask(exposed.path)] == ["open"]
        assert not exposed.path.exists()
    exposed.close()
    exposed.close()
    async with db:
        assert not exposed.path.exists()


@pytest.mark.filterwarnings("ignore::poolkeeper.DuplicatePoolWarning")
async def test_a_service_without_a_runtime_directory_is_seen_from_a_login_that_has_one(
    make_manager: MakeManager, top: Top, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "nowhere"))
    db = make_manager(min_size=1, name="orders")
    async with db:
        with expose(db):
            (tmp_path / "run").mkdir()
            monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "run"))
            for named in ((), (str(os.getpid()),), (str(tmp_path / f"poolkeeper-{os.getuid()}"),)):
                status, text = await asyncio.to_thread(top, *named)
                assert status == 0
                assert 'pool "orders"' in text


async def test_a_pool_that_is_exposed_twice_counts_once(
    make_manager: MakeManager, directory: Path, top: Top
) -> None:
    db = make_manager(min_size=1, name="orders")
    async with db:
        with expose(db), expose(db.pool):
            assert "total=1" in (await asyncio.to_thread(top))[1]
        assert (await asyncio.to_thread(top))[0] == 1


async def test_another_user_is_told_nothing(
    make_manager: MakeManager, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who asks is asked of the system, where it can tell."""
    db = make_manager(min_size=1, name="orders")
    async with db:
        with expose(db) as exposed:
            with monkeypatch.context() as elsewhere:
                elsewhere.delattr(socket, "SO_PEERCRED", raising=False)
                assert [state["name"] for state in ask(exposed.path, 30)] == ["orders"]
            monkeypatch.setattr(_socket, "_is_own_user", lambda asking: False)
            with pytest.raises(OSError, match="it has not told all of it"):
                ask(exposed.path, 30)


async def test_two_pools_share_the_socket(make_manager: MakeManager, top: Top) -> None:
    one, other = make_manager(min_size=1, name="one"), make_manager(min_size=1, name="other")
    async with one:
        with expose(one), expose(other):
            async with other:
                assert 'pool "one"' in top()[1]
                assert 'pool "other"' in top()[1]
                assert 'pool "other"' not in top("--pool", "one")[1]
            assert 'pool "other"' not in top()[1]


def errors_of(observer: Observer) -> list[tuple[int, str, str]]:
    return [(number, what, words) for _, number, what, words in observer.state()["errors"]]


CALLER = events.Caller(site="shop.py:7", function="order", asker="shop.py:7 in order")


def test_what_goes_wrong_is_told_in_words() -> None:
    """The same is told once, as the last, with how often it was."""
    observer = Observer(PoolManager("host=nowhere", name="orders"))
    for event in (
        events.OutageEnded(pool="orders", outage_seconds=7.4, attempts_failed=3),
        events.LoopMismatch(pool="orders", purpose="acquire", opened="loop 1", used="loop 2"),
        events.LeakSuspected(pool="orders", task="a", caller=CALLER, held_seconds=61.2, stack=""),
        events.TurnedAway(pool="orders", task="b", caller=CALLER, waiting=9),
        events.OutageEnded(pool="orders", outage_seconds=12.0, attempts_failed=5),
    ):
        observer._hear(event)
    assert errors_of(observer) == [
        (1, "used on another event loop", "loop 2"),
        (1, "suspected leak", "shop.py:7 in order, held 61 s"),
        (1, "turned away", "shop.py:7 in order: 9 wait already"),
        (2, "connections can be made again", "after 12 s"),
    ]
    (site,) = observer.state()["sites"]
    assert (site["who"], site["in_vain"]) == ("shop.py:7 in order", 1)


def test_only_the_last_kinds_of_errors_are_kept() -> None:
    observer = Observer(PoolManager("host=nowhere", name="orders"))
    for number in range(_observer.ERRORS + 5):
        told = events.LoopMismatch(
            pool="orders", purpose="acquire", opened="loop", used=f"loop {number}"
        )
        observer._hear(told)
    kept = [words for _, _, words in errors_of(observer)]
    assert kept == [f"loop {number}" for number in range(5, _observer.ERRORS + 5)]


def test_of_a_busy_second_the_first_waits_are_kept_and_all_are_counted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(time, "time", lambda: 1_000_000.5)
    observer = Observer(PoolManager("host=nowhere", name="orders"))
    for number in range(_observer.MOST_WAITS + 50):
        told = events.Acquired(
            pool="orders", task="a", caller=CALLER, waited_seconds=float(number), queued=False
        )
        observer._hear(told)
    state = observer.state()
    assert state["waits"] == [float(number) for number in range(_observer.MOST_WAITS)]
    ((_, _, _, acquired, *_),) = state["history"]
    assert acquired == _observer.MOST_WAITS + 50


def test_without_a_process_it_says_how_to_be_seen(top: Top) -> None:
    status, text = top()
    assert status == 1
    assert "poolkeeper.live.expose" in text


def test_a_directory_of_others_is_refused(tmp_path: Path) -> None:
    open_to_all = tmp_path / "shared"
    open_to_all.mkdir()
    open_to_all.chmod(0o777)
    with pytest.raises(ConfigError, match="not this user's own"):
        expose(PoolManager("host=nowhere"), directory=open_to_all)
    with pytest.raises(ConfigError, match="cannot make"):
        expose(PoolManager("host=nowhere"), directory=tmp_path / "no" / "where")


def test_where_there_are_no_unix_sockets_the_page_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On Windows."""
    monkeypatch.delattr(socket, "AF_UNIX")
    with pytest.raises(ConfigError, match="no Unix sockets here"):
        expose(PoolManager("host=nowhere"))
    assert main(["top", "--once"]) == 2
    assert "poolkeeper.live.page()" in capsys.readouterr().err


def test_what_is_no_pool_is_refused(directory: Path) -> None:
    for wrong in (None, "db", object()):
        with pytest.raises(ConfigError, match=r"cannot show a \w+: it is neither"):
            expose(wrong)  # type: ignore[arg-type]
        with pytest.raises(ConfigError, match=r"cannot show a \w+: it is neither"):
            page(wrong)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="no pool to show"):
        page()
    assert not directory.exists()


def test_a_socket_that_nobody_answers_is_taken_away_or_told(directory: Path, top: Top) -> None:
    directory.mkdir()
    left = directory / "999999.sock"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(left))
    named = top(str(left))
    assert named == (1, f"does not answer: {left}: no process answers there\n")
    assert top()[0] == 1
    assert not left.exists()


@pytest.mark.parametrize("interval", ["0", "x", "-1", "inf", "nan"])
def test_an_interval_is_a_number_of_seconds(interval: str) -> None:
    with pytest.raises(SystemExit):
        main(["top", "--interval", interval])


# --- real processes ------------------------------------------------------------------------------

PROGRAM = """
    import asyncio, os, sys
    from poolkeeper import PoolManager
    from poolkeeper.live import expose

    db = PoolManager(sys.argv[1], min_size=2, max_size=2, name="shop")
    expose(db)
    child = os.fork()  # as servers do that load the application first

    async def main():
        async with db, db.connection() as conn:
            await conn.execute("select 1")
            os.write(1, b"READY\\n")  # in one piece: two processes write there
            await asyncio.sleep(60)

    try:
        asyncio.run(main())
    except KeyboardInterrupt:
        pass
    if child:
        os.waitpid(child, 0)
"""


@pytest.fixture
def processes(directory: Path, dsn: str) -> Iterator[subprocess.Popen[str]]:
    """Two processes, one forked from the other, with a pool of the same name each."""
    with subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(PROGRAM), dsn],
        stdout=subprocess.PIPE, text=True, start_new_session=True,
    ) as process:  # fmt: skip
        try:
            assert process.stdout is not None
            assert [process.stdout.readline() for _ in range(2)] == ["READY\n"] * 2
            yield process
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def test_processes_of_one_service_are_added_up(
    processes: subprocess.Popen[str], directory: Path, top: Top
) -> None:
    status, text = top()
    assert status == 0
    assert "total=4 in_use=2 idle=2 max=4 waiting=0" in text
    (pool,) = json.loads(top("--json")[1])["pools"]
    pids = {one["pid"] for one in pool["processes"]}
    assert processes.pid in pids
    assert len(pids) == 2
    assert {row["pid"] for row in pool["checkouts"]} == pids
    assert "total=2" in top(str(processes.pid))[1]
    os.killpg(processes.pid, signal.SIGINT)
    processes.wait(30)
    assert not list(directory.iterdir())


def test_in_a_terminal_it_is_drawn_until_it_is_interrupted(
    processes: subprocess.Popen[str],
) -> None:
    ours, theirs = pty.openpty()
    env = {**os.environ, "TERM": "xterm", "COLUMNS": "120", "LINES": "40"}
    command = [sys.executable, "-m", "poolkeeper", "top", "--interval", "0.2"]
    with subprocess.Popen(
        command, stdin=theirs, stdout=theirs, stderr=theirs, env=env, start_new_session=True
    ) as process:
        os.close(theirs)
        try:
            shown = until(ours, b"call sites by hold time", b"in use")
        finally:
            process.send_signal(signal.SIGINT)
        assert process.wait(30) == 130
    os.close(ours)
    assert b"shop" in shown


async def test_a_pool_that_cannot_connect_is_shown_with_the_reason_once(
    make_manager: MakeManager, top: Top
) -> None:
    db = make_manager(f"host=127.0.0.1 port={free_port()}", min_size=1, max_size=1, name="orders")
    with expose(db) as exposed:
        await db.open(wait=False)
        waiter = asyncio.create_task(waits(db))
        await until_there(lambda: db.snapshot().waiting and exposed.path.exists())
        status, text = await asyncio.to_thread(top)
        waiter.cancel()
        await asyncio.wait([waiter])
        await db.close()
    assert status == 0
    head = text.partition("in use:")[0].partition("waiting:\n")[0]
    assert head.count("Connection refused") == 1
    assert "no connection can be made: connection failed" in head
    assert re.search(r'^pool "orders": .* \(opening\)$', head, re.MULTILINE)


@pytest.mark.parametrize(("lines", "rows"), [(60, {12}), (26, {*range(2, 12)}), (10, {1})])
async def test_each_table_has_as_many_rows_as_there_is_room_for(
    make_manager: MakeManager, directory: Path, lines: int, rows: set[int]
) -> None:
    """So that the last one, of errors, is there in a small terminal too."""
    console = Console(width=100, height=lines, file=io.StringIO())
    db = make_manager(min_size=1, max_size=1, name="orders")
    with expose(db) as exposed:
        async with db:
            async with db.connection():
                with pytest.raises(AcquireTimeout):
                    await asyncio.create_task(fails(db))
                waiters = [asyncio.create_task(waits(db)) for _ in range(12)]
                while db.snapshot().waiting < len(waiters):
                    await asyncio.sleep(0.01)
                pools = add_up(await asyncio.to_thread(ask, exposed.path))
            await asyncio.gather(*waiters)
    view = fitted(console, pools, [])
    assert len(console.render_lines(view)) <= lines or rows == {1}
    console.print(view)
    shown = console.file.getvalue()
    for title in ("in use", "waiting", "call sites by hold time", "last errors"):
        assert re.search(f"^ *{title} *$", shown, re.MULTILINE)
    assert len(re.findall(r" 0  \S+ in waits *$", shown, re.MULTILINE)) in rows


def until(terminal: int, *words: bytes) -> bytes:
    """Read what a terminal shows until *any of the words* is there."""
    shown = b""
    end = time.monotonic() + 30
    while time.monotonic() < end and not any(word in shown for word in words):
        if select.select([terminal], [], [], 0.5)[0]:
            shown += os.read(terminal, 1 << 16)
    return shown


def test_without_rich_it_is_plain(monkeypatch: pytest.MonkeyPatch, top: Top) -> None:
    monkeypatch.setitem(sys.modules, "rich.live", None)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    calls: list[float] = []

    def sleep(seconds: float) -> None:
        calls.append(seconds)
        raise KeyboardInterrupt

    monkeypatch.setattr(time, "sleep", sleep)
    assert main(["top"]) == 130
    assert calls == [1.0]


def test_a_rich_that_is_broken_is_not_taken_for_none(
    monkeypatch: pytest.MonkeyPatch, top: Top
) -> None:
    class Broken(ModuleType):
        def __getattr__(self, name: str) -> Any:
            raise ModuleNotFoundError("No module named 'pygments'", name="pygments")

    monkeypatch.setitem(sys.modules, "rich.live", Broken("rich.live"))
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    with pytest.raises(ModuleNotFoundError, match="pygments"):
        main(["top"])
