"""``poolkeeper doctor``: what stands between this machine and a query, step by step."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator
from dataclasses import asdict, dataclass
from typing import Any

from ._arguments import number, seconds


def add_parser(commands: Any) -> None:
    """Add the command to those there are."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "doctor",
        help="look at what stands between this machine and a query, step by step",
        description="Follows a connection from the connection string to a query: event loop, DNS,"
        " TCP, TLS, login, version, primary or standby, pooler, budget, round trip, prepared"
        " statements, clock, keepalives. It changes nothing, and shows no password. Exit status 1"
        " if something is wrong.",
    )
    parser.add_argument(
        "dsn",
        nargs="?",
        metavar="DSN",
        help="connection string or URL; DATABASE_URL if left out, and where that is not set,"
        " what PGHOST and the like say",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument(
        "--timeout",
        type=seconds(0.1, 600),
        default=5.0,
        metavar="SECONDS",
        help="for each step (default: 5)",
    )
    parser.add_argument(
        "--max-size",
        type=number,
        default=4,
        metavar="NUMBER",
        help="max_size of the pool, for the budget (default: 4)",
    )
    parser.add_argument(
        "--processes",
        type=number,
        metavar="NUMBER",
        help="processes that open such a pool, for the budget (default: WEB_CONCURRENCY, or 1)",
    )
    parser.set_defaults(run=_run)


@dataclass(frozen=True)
class Step:
    """One thing that was looked at."""

    name: str
    ok: bool | None
    """None if it could not be looked at."""
    said: str
    advice: str = ""
    """What to do; also where it is good enough, and could be better."""
    seconds: float | None = None


def _run(chosen: argparse.Namespace) -> int:
    from poolkeeper.cli._examination import examine

    dsn = chosen.dsn if chosen.dsn is not None else os.environ.get("DATABASE_URL", "")
    steps = examine(dsn, chosen.timeout, chosen.max_size, chosen.processes)
    show = _plain
    if chosen.json:
        show = _as_json
    elif sys.stdout.isatty():
        show = _in_terminal()
    # psycopg cannot use the loop that asyncio.run() makes on Windows.
    with asyncio.Runner(loop_factory=asyncio.SelectorEventLoop) as runner:
        return int(runner.run(show(steps)))


def _status(steps: list[Step]) -> int:
    return int(any(step.ok is False for step in steps))


async def _as_json(steps: AsyncIterator[Step]) -> int:
    done = [step async for step in steps]
    status = _status(done)
    print(json.dumps({"ok": not status, "steps": [asdict(step) for step in done]}, indent=2))
    return status


# --- how it is shown ------------------------------------------------------------------------------

_MARKS = {True: "✓", False: "✗", None: "-"}
_COLOURS = {True: "green", False: "bold red", None: "dim"}
_NAME = 20
_TIME = 9


def _time(step: Step) -> str:
    if step.seconds is None or step.seconds < 0.00005:
        return " " * _TIME
    number = f"{step.seconds * 1000:.1f} ms" if step.seconds < 1 else f"{step.seconds:.1f} s"
    return number.rjust(_TIME)


def _summary(steps: list[Step]) -> str:
    wrong = [step.name for step in steps if step.ok is False]
    return f"wrong: {', '.join(wrong)}" if wrong else "nothing is wrong"


async def _plain(steps: AsyncIterator[Step]) -> int:
    marks = _MARKS
    try:
        "".join(marks.values()).encode(sys.stdout.encoding or "ascii")
    except UnicodeEncodeError:
        marks = {True: "ok", False: "NO", None: "- "}
    done: list[Step] = []
    async for step in steps:
        done.append(step)
        print(f"{marks[step.ok]} {step.name:{_NAME}}{_time(step)}  {step.said}", flush=True)
        if step.advice:
            print(f"{'':{len(marks[step.ok]) + _NAME + _TIME + 3}}{step.advice}", flush=True)
    print(_summary(done))
    return _status(done)


def _in_terminal() -> Any:
    """Return what shows the steps in a terminal: in colour, if rich is installed."""
    try:
        from rich.console import Console
        from rich.padding import Padding
        from rich.table import Table
        from rich.text import Text
    except ModuleNotFoundError:
        return _plain

    async def show(steps: AsyncIterator[Step]) -> int:
        console = Console(highlight=False)
        done: list[Step] = []
        with console.status("looking"):
            async for step in steps:
                done.append(step)
                colour = _COLOURS[step.ok]
                row = Table.grid(padding=(0, 1))
                row.add_column(width=1)
                row.add_column(width=_NAME)
                row.add_column(width=_TIME, justify="right")
                row.add_column()
                row.add_row(
                    Text(_MARKS[step.ok], style=colour),
                    Text(step.name, style="bold" if step.ok is False else ""),
                    Text(_time(step).strip(), style="dim"),
                    Text(step.said, style=colour if step.ok is not True else ""),
                )
                if step.advice:
                    row.add_row("", "", "", Text(step.advice, style="yellow"))
                console.print(row)
        verdict = Text(_summary(done), style=_COLOURS[not _status(done)])
        console.print(Padding(verdict, (1, 0, 0, 0)))
        return _status(done)

    return show
