"""``poolkeeper top``: what the pools of running processes do, of all that have asked to be seen."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from poolkeeper.sizing._advice import duration

State = dict[str, Any]

ROWS = 12
"""Of a table, at most."""


def add_parser(commands: Any) -> None:
    """Add the command to those there are."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "top",
        help="a live view of the pools of running processes",
        description="Shows the pools of this user's processes that have called"
        " poolkeeper.live.expose(): numbers, waits, who holds a connection and awaits what, call"
        " sites by hold time, last errors. Pools of one name are added up. Exit status 1 if there"
        " is no process to show.",
    )
    parser.add_argument(
        "sockets",
        nargs="*",
        metavar="PID|SOCKET",
        help="processes, by their numbers or sockets; all there are by default",
    )
    parser.add_argument("--pool", metavar="NAME", help="only pools of this name")
    parser.add_argument("--once", action="store_true", help="show it once and end")
    parser.add_argument("--json", action="store_true", help="print JSON, a line each time")
    parser.add_argument(
        "--interval", type=_seconds, default=1.0, help="seconds between two views (default: 1)"
    )
    parser.set_defaults(run=_run)


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0.1 <= seconds <= 3600:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of seconds, 0.1 to 3600")
    return seconds


@dataclass(frozen=True)
class Table:
    """A table to show: numbers are right-aligned, the last of the texts may be cut off."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    numbers: frozenset[str] = frozenset()


def _run(chosen: argparse.Namespace) -> int:
    paths = _paths(chosen.sockets)
    if chosen.json:
        return _print(chosen, paths, _as_json)
    if sys.stdout.isatty() and not chosen.once:
        with suppress(ModuleNotFoundError):
            return _live(chosen, paths)
    return _print(chosen, paths, _as_text)


def _print(chosen: argparse.Namespace, paths: list[Path], shown: Any) -> int:
    while True:
        pools, silent = _look(paths, chosen.pool)
        print(shown(pools, silent), flush=True)
        if chosen.once:
            return int(not pools)
        time.sleep(chosen.interval)


def _paths(named: list[str]) -> list[Path]:
    from poolkeeper.live._socket import SUFFIX, sockets

    return [
        sockets() / f"{name}{SUFFIX}" if name.isdecimal() else Path(name) for name in named
    ] or [sockets()]


def _look(paths: list[Path], pool: str | None) -> tuple[list[State], list[str]]:
    """Return the pools, added up, and what is to be said of processes that do not answer."""
    from poolkeeper.live._merge import add_up
    from poolkeeper.live._socket import ask

    states: list[State] = []
    silent: list[str] = []
    for path in _files(paths):
        try:
            told = ask(path)
        except (ConnectionRefusedError, FileNotFoundError):
            if path.parent in paths:  # left by a process that was killed
                with suppress(OSError):
                    path.unlink()
            else:
                silent.append(f"{path}: no process answers there")
        except OSError as error:
            silent.append(f"{path}: {error.strerror or error}")
        else:
            states += [state for state in told if pool in (None, state["name"])]
    return add_up(states), silent


def _files(paths: list[Path]) -> Iterator[Path]:
    from poolkeeper.live._socket import SUFFIX, sockets

    for path in paths:
        if path.is_dir() or path == sockets():
            yield from sorted(path.glob(f"*{SUFFIX}"))
        else:
            yield path


# --- how it is shown ------------------------------------------------------------------------------


def _as_json(pools: list[State], silent: list[str]) -> str:
    return json.dumps({"at": time.time(), "pools": pools, "silent": silent})


def _as_text(pools: list[State], silent: list[str]) -> str:
    lines = _head(pools, silent)
    for pool in pools:
        lines += ["", _title(pool), _numbers(pool), *_warnings(pool)]
        for table in _tables(pool):
            lines += ["", f"{table.title}:", *_aligned(table)]
    return "\n".join(lines)


def _head(pools: list[State], silent: list[str]) -> list[str]:
    if not pools and not silent:
        return [
            "no process of yours is to be seen",
            "HINT:  Call poolkeeper.live.expose(manager) in the program. It is to be seen while"
            " the pool is open.",
        ]
    return [f"does not answer: {one}" for one in silent]


def _title(pool: State) -> str:
    of = [
        f"{one['program']} {one['pid']}" + (f" ({one['state']})" if one["state"] != "open" else "")
        for one in pool["processes"]
        if not one["error"]
    ]
    of += [
        f"{one['pid']} cannot tell ({one['error']})" for one in pool["processes"] if one["error"]
    ]
    return f'pool "{pool["name"]}": {", ".join(of)}'


def _numbers(pool: State) -> str:
    return (
        f"total={pool['total']} in_use={pool['in_use']} idle={pool['idle']} max={pool['max']}"
        f" waiting={pool['waiting']}; wait in the last minute: p50"
        f" {duration(pool['wait_p50_seconds'])}, p99 {duration(pool['wait_p99_seconds'])}"
    )


def _warnings(pool: State) -> list[str]:
    return [
        *(f"cause: {cause}" for cause in pool["causes"]),
        *(f"no connection can be made: {error}" for error in pool["last_errors"]),
    ]


def _tables(pool: State) -> list[Table]:
    several = len(pool["processes"]) > 1
    process = ("process",) if several else ()

    def of(row: State) -> tuple[str, ...]:
        return (str(row["pid"]),) if several else ()

    held = tuple(
        (
            duration(row["held_seconds"]), duration(row["query_seconds"]), *of(row),
            row["asker"] or row["site"], row["status"], row["awaits"],
        )
        for row in pool["checkouts"][:ROWS]
    )  # fmt: skip
    waiting = tuple(
        (duration(row["waited_seconds"]), str(row["holds"]), *of(row), row["asker"] or row["site"])
        for row in pool["waiters"][:ROWS]
    )
    sites = tuple(
        (
            duration(site["held"]), str(site["number"]),
            duration(site["held"] / site["number"] if site["number"] else 0.0),
            duration(site["held_most"]),
            f"{min(1, site['query'] / site['held']):.0%}" if site["held"] else "",
            duration(site["waited"]), str(site["in_vain"] or ""), site["who"],
        )
        for site in pool["sites"][:ROWS]
    )  # fmt: skip
    errors = tuple(
        (time.strftime("%H:%M:%S", time.localtime(at)), str(times), *of({"pid": pid}), what, words)
        for at, times, what, words, pid in pool["errors"][:ROWS]
    )
    tables = [
        Table("in use", ("held", "in queries", *process, "who", "now", "awaits"), held,
              frozenset(("held", "in queries", "process"))),
        Table("waiting", ("waited", "holds", *process, "who"), waiting,
              frozenset(("waited", "holds", "process"))),
        Table("call sites by hold time",
              ("held", "times", "mean", "most", "in queries", "waited", "in vain", "who"), sites,
              frozenset(("held", "times", "mean", "most", "in queries", "waited", "in vain"))),
        Table("last errors", ("when", "times", *process, "what", "words"), errors,
              frozenset(("times", "process"))),
    ]  # fmt: skip
    return [table for table in tables if table.rows]


def _aligned(table: Table) -> Iterator[str]:
    widths = [
        max(len(name), *(len(row[i]) for row in table.rows)) for i, name in enumerate(table.columns)
    ]
    for row in (table.columns, *table.rows):
        cells = (
            cell.rjust(width) if name in table.numbers else cell.ljust(width)
            for cell, name, width in zip(row, table.columns, widths, strict=True)
        )
        yield ("  " + "  ".join(cells)).rstrip()


# --- in a terminal --------------------------------------------------------------------------------


def _live(chosen: argparse.Namespace, paths: list[Path]) -> int:
    from rich.live import Live

    with Live(screen=True, auto_refresh=False, vertical_overflow="crop") as live:
        while True:
            live.update(_drawn(*_look(paths, chosen.pool)), refresh=True)
            time.sleep(chosen.interval)


def _drawn(pools: list[State], silent: list[str]) -> Any:
    from rich import box
    from rich.console import Group
    from rich.table import Table as Drawn
    from rich.text import Text

    parts: list[Any] = [Text(line, style="red") for line in _head(pools, silent)]
    for pool in pools:
        parts += [
            Text(_title(pool), style="bold"),
            Text(_numbers(pool), style="bold red" if pool["waiting"] else ""),
            *(Text(line, style="red") for line in _warnings(pool)),
        ]
        for table in _tables(pool):
            drawn = Drawn(
                title=table.title,
                title_justify="left",
                title_style="bold dim",
                box=box.SIMPLE_HEAD,
                pad_edge=False,
                expand=True,
            )
            for name in table.columns:
                if name in table.numbers:
                    drawn.add_column(name, justify="right", no_wrap=True)
                else:
                    drawn.add_column(name, overflow="ellipsis", no_wrap=name in ("when", "now"))
            for row in table.rows:
                drawn.add_row(*map(Text, row))
            parts.append(drawn)
        parts.append(Text())
    return Group(*parts)
