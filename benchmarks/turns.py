"""
Contestants in processes of their own, which take turns.

`measure()` starts them and says whose turn it is; ``python -m benchmarks.turns`` is one of them.
It prepares, says "ready", and answers each contest that it reads with one turn, as JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import subprocess
import sys
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from .contests import LOOPS, STAGES
from .timing import Turn, rotated, runner

ROOT = Path(__file__).parents[1]

LIFE = 3
"""Rounds that a process takes part in, for one can be slow for as long as it lives."""

Results = dict[str, dict[str, dict[str, list[float]]]]
"""By contest and contestant: seconds per operation, of "cpu" and "wall", for each round."""


# --- who says whose turn it is ------------------------------------------------------------------


class Process:
    """One contestant."""

    def __init__(self, stage: str, contestant: str, dsn: str, loop: str, seconds: float) -> None:
        self.name = f"{contestant} ({stage}, {loop})"
        self._process = subprocess.Popen(
            [
                *(sys.executable, "-m", "benchmarks.turns"),
                *(f"--stage={stage}", f"--contestant={contestant}"),
                *(f"--dsn={dsn}", f"--loop={loop}", f"--seconds={seconds}"),
            ],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def contests(self) -> list[str]:
        """Wait until it is ready, and return what it takes part in."""
        found: list[str] = self._read()
        return found

    def turn(self, contest: str) -> Turn:
        """Let it take one turn."""
        stdin = self._process.stdin
        assert stdin is not None
        stdin.write(f"{contest}\n")
        stdin.flush()
        return Turn(**self._read())

    def _read(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.name} has ended")
        return json.loads(line)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            self._process.communicate(timeout=30)  # the end of its input tells it to go
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.communicate()


def measure(
    stage: str, contests: Iterable[str], dsn: str, loop: str, rounds: int, seconds: float
) -> Results:
    """Let all contestants of *stage* that are installed take *rounds* turns at each contest."""
    found: Results = {contest: {} for contest in contests}
    for first in range(0, rounds, LIFE):
        with ExitStack() as stack:
            processes = {
                name: stack.enter_context(Process(stage, name, dsn, loop, seconds))
                for name in STAGES[stage].installed()
            }
            for name, process in processes.items():
                for contest in process.contests():
                    if contest in found:
                        found[contest].setdefault(name, {"cpu": [], "wall": []})
            for number in range(first, min(first + LIFE, rounds)):
                for contest, samples in found.items():
                    for name in rotated(samples, number) if samples else ():
                        turn = processes[name].turn(contest)
                        samples[name]["cpu"].append(turn.cpu / turn.done)
                        samples[name]["wall"].append(turn.wall / turn.done)
    return found


# --- whose turn it is ---------------------------------------------------------------------------


def say(what: Any) -> None:
    print(json.dumps(what), flush=True)


async def take_part(stage: str, contestant: str, dsn: str, seconds: float) -> None:
    """Prepare, then take a turn whenever told, until there is nothing more to read."""
    enter = import_module(f"benchmarks.{STAGES[stage].module}").enter
    async with enter(stage, contestant, dsn) as turns:
        say(list(turns))
        while contest := (await asyncio.to_thread(sys.stdin.readline)).strip():
            say(asdict(await turns[contest](seconds)))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.turns")
    parser.add_argument("--stage", required=True, choices=STAGES)
    parser.add_argument("--contestant", required=True)
    parser.add_argument("--dsn", required=True)
    parser.add_argument("--loop", required=True, choices=LOOPS)
    parser.add_argument("--seconds", required=True, type=float)
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    with runner(options.loop) as run:
        run.run(take_part(options.stage, options.contestant, options.dsn, options.seconds))


if __name__ == "__main__":
    main()
