"""
What every tool's worker keeps, as a real process: the pool, the tasks, the end, and a bad start.
"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psycopg
import pytest

from examples import ledger
from poolkeeper import PoolManager
from tests.support.redis import REDIS, command, redis_server

from .tools import TOOLS, Tool

ROOT = Path(__file__).parents[2]
SESSIONS = "poolkeeper:ledger"

if REDIS is None:
    pytest.skip("there is no redis-server on this machine", allow_module_level=True)


@pytest.fixture(scope="module")
def redis() -> Iterator[str]:
    """A Redis of these tests' own."""
    with redis_server() as url:
        yield url


class Processes:
    """The processes of one test: workers, and who sends them something."""

    def __init__(self, tool: Tool, dsn: str, redis: str, log: Path) -> None:
        self._tool = tool
        self._env = {**os.environ, "DATABASE_URL": dsn, "REDIS_URL": redis}
        self._log = log
        self._all: list[subprocess.Popen[str]] = []
        self._sender: subprocess.Popen[str] | None = None

    @property
    def output(self) -> str:
        return self._log.read_text()

    def worker(self) -> subprocess.Popen[str]:
        with self._log.open("a") as out:
            return self._start(self._tool.arguments, stdout=out, stderr=subprocess.STDOUT)

    def send(self, source: int, target: int, amount: int) -> None:
        if self._sender is None:
            arguments = ("-m", "tests.workers.send", self._tool.example)
            pipe = subprocess.PIPE
            self._sender = self._start(arguments, stdin=pipe, stdout=pipe)
        assert self._sender.stdin
        assert self._sender.stdout
        self._sender.stdin.write(f"{source} {target} {amount}\n")
        self._sender.stdin.flush()
        assert self._sender.stdout.readline() == "sent\n"

    def _start(self, arguments: tuple[str, ...], **files: Any) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-u", *arguments],
            cwd=ROOT,
            env=self._env,
            text=True,
            start_new_session=True,  # its children too are killed at last
            **files,
        )
        self._all.append(process)
        return process

    def kill(self) -> None:
        for process in self._all:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.communicate()


@pytest.fixture(params=TOOLS, ids=lambda tool: tool.name)
def tool(request: pytest.FixtureRequest) -> Tool:
    return request.param  # type: ignore[no-any-return]


@contextmanager
def processes(tool: Tool, dsn: str, redis: str, log: Path) -> Iterator[Processes]:
    assert command(redis, "FLUSHALL") == b"+OK"
    running = Processes(tool, dsn, redis, log)
    try:
        yield running
    finally:
        running.kill()


def until(condition: Callable[[], object], output: Callable[[], str] = str) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, output()
        time.sleep(0.05)


def test_a_worker_does_each_task_as_a_whole_and_once(
    tool: Tool, database: str, redis: str, tmp_path: Path
) -> None:
    """Also one in the middle of which it is told to end: then, or when it is there again."""
    asyncio.run(_prepare(database))
    with psycopg.connect(database, autocommit=True) as conn:

        def ask(query: str) -> Any:
            (value,) = conn.execute(query.encode()).fetchone() or (None,)
            return value

        there = (
            "select count(*) from pg_stat_activity"
            f" where starts_with(application_name, '{SESSIONS}')"
        )
        with processes(tool, database, redis, tmp_path / "log") as running:

            def see(condition: Callable[[], object]) -> None:
                until(condition, lambda: running.output)

            worker = running.worker()
            running.send(1, 2, 10)
            running.send(1, 999, 10)  # taken from 1, and nobody to give it to
            see(lambda: ask("select count(*) from transfers") == 1)
            see(lambda: "UnknownAccount" in running.output)
            assert ask("select balance from accounts where id = 1") == ledger.BALANCE - 10

            # In the middle of a task: it waits for a lock.
            with psycopg.connect(database) as blocker:
                blocker.execute("select from accounts where id = 1 for update")
                running.send(1, 2, 20)
                # With it, SAQ may try once more what has failed.
                see(lambda: ask(f"{there} and wait_event_type = 'Lock'") >= 1)
                worker.send_signal(signal.SIGTERM)
                with suppress(subprocess.TimeoutExpired):
                    worker.wait(1)
            see(lambda: worker.poll() is not None)
            see(lambda: ask(there) == 0)

            worker = running.worker()
            running.send(2, 3, 40)
            see(lambda: ask("select count(*) from transfers") == 3)
            worker.send_signal(signal.SIGTERM)
            see(lambda: worker.poll() is not None)
            see(lambda: ask(there) == 0)
            assert "never closed" not in running.output
            assert "was late" not in running.output
        amounts = "select array_agg(amount order by amount) from transfers"
        assert ask(amounts) == [10, 20, 40]
        assert ask("select sum(balance) from accounts") == ledger.ACCOUNTS * ledger.BALANCE


async def _prepare(dsn: str) -> None:
    async with PoolManager(dsn, min_size=1) as db:
        await ledger.prepare(db)


def test_with_a_wrong_role_it_does_not_start_and_says_why(
    tool: Tool, database: str, redis: str, tmp_path: Path
) -> None:
    dsn = psycopg.conninfo.make_conninfo(database, user="nobody_there")
    with processes(tool, dsn, redis, tmp_path / "log") as running:
        worker = running.worker()
        until(lambda: worker.poll() is not None, lambda: running.output)
        assert worker.returncode not in (0, None), running.output
        last = "\n".join(running.output.splitlines()[-12:])
        assert 'role "nobody_there" does not exist' in last, running.output
