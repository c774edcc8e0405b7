"""Run the programs of `mistakes`, several at a time, and kill those that never end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal

Side = Literal["bare", "poolkeeper"]

LIMIT = 15.0
"""Seconds that any program may take."""


@dataclass(frozen=True)
class Run:
    """
    What came of one program on one side.

    Attributes:
        facts: What it reported.
        killed: It did not end and was killed.
        code: Its exit status.
        last_words: Last line on its standard error.
        ended: When it ended, as `time.time()`.
    """

    side: Side
    facts: dict[str, Any]
    killed: bool
    code: int
    last_words: str
    ended: float


def environment(dsn: str, schema: str, role: str) -> dict[str, str]:
    """Return what tells the programs of the server; *role* is one that has a password."""
    debugging = {"PYTHONASYNCIODEBUG", "PYTHONDEVMODE", "PYTHONWARNINGS"}  # not in production
    inherited = {name: value for name, value in os.environ.items() if name not in debugging}
    return {
        **inherited,
        "POOLKEEPER_DEMO_DSN": dsn,
        "POOLKEEPER_DEMO_SCHEMA": schema,
        "POOLKEEPER_DEMO_ROLE": role,
    }


class Programs:
    """Runs programs from several threads; `stop()` ends them all."""

    def __init__(self, variables: dict[str, str]) -> None:
        self._variables = variables
        self._lock = threading.Lock()
        self._running: set[subprocess.Popen[str]] = set()
        self._stopped = False

    def run(self, program: str, side: Side) -> Run:
        """Run one program and return when it has ended."""
        with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as stderr:
            process = self._start(program, side, stderr)
            facts: dict[str, Any] = {}
            killed = threading.Event()

            def kill() -> None:
                killed.set()
                _kill(process)

            timer = _timer(LIMIT, kill)
            assert process.stdout is not None
            try:
                with process.stdout as stdout:
                    for line in stdout:
                        facts.update(json.loads(line))
                        if seconds := facts.pop("kill_after", None):
                            timer.cancel()
                            timer = _timer(seconds, kill)
                process.wait()
            finally:
                timer.cancel()
                with self._lock:
                    self._running.discard(process)
            ended = time.time()
            stderr.seek(0)
            lines = [line for line in stderr.read().splitlines() if line.strip()]
        return Run(
            side=side,
            facts=facts,
            killed=killed.is_set(),
            code=process.returncode,
            last_words=lines[-1] if lines else "",
            ended=ended,
        )

    def stop(self) -> None:
        """Kill what runs and start nothing any more."""
        with self._lock:
            self._stopped = True
            for process in self._running:
                _kill(process)

    def _start(self, program: str, side: Side, stderr: Any) -> subprocess.Popen[str]:
        with self._lock:
            if self._stopped:
                raise RuntimeError("stopped")
            process = subprocess.Popen(
                [sys.executable, "-m", "poolkeeper._demo.mistakes", program, side],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
                encoding="utf-8",
                env=self._variables,
                start_new_session=True,  # so that a child it forked is killed with it
            )
            self._running.add(process)
            return process


def _timer(seconds: float, kill: Any) -> threading.Timer:
    timer = threading.Timer(seconds, kill)
    timer.daemon = True
    timer.start()
    return timer


def _kill(process: subprocess.Popen[str]) -> None:
    with suppress(ProcessLookupError):
        if process.poll() is not None:
            return
        if sys.platform == "win32":
            process.kill()
        else:
            os.killpg(process.pid, signal.SIGKILL)
