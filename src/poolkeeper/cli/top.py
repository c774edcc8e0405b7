"""``poolkeeper top``: what the pools of running processes do, of all that have asked to be seen."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from ._arguments import seconds

State = dict[str, Any]


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
        metavar="PID|SOCKET|DIRECTORY",
        help="processes, by their numbers or sockets, or all in a directory; by default all there"
        " are where expose() makes them",
    )
    parser.add_argument("--pool", metavar="NAME", help="only pools of this name")
    parser.add_argument("--once", action="store_true", help="show it once and end")
    parser.add_argument("--json", action="store_true", help="print JSON, a line each time")
    parser.add_argument(
        "--interval",
        type=seconds(0.1, 3600),
        default=1.0,
        help="seconds between two views (default: 1)",
    )
    parser.set_defaults(run=_run)


def _run(chosen: argparse.Namespace) -> int:
    from ._views import as_json, as_text

    paths = _paths(chosen.sockets)
    if chosen.json:
        return _print(chosen, paths, as_json)
    if sys.stdout.isatty() and not chosen.once:
        try:
            return _live(chosen, paths)
        except ModuleNotFoundError as error:
            if str(error.name).partition(".")[0] != "rich":
                raise
    return _print(chosen, paths, as_text)


def _print(chosen: argparse.Namespace, paths: list[Path], shown: Any) -> int:
    while True:
        pools, silent = _look(paths, chosen.pool)
        print(shown(pools, silent), flush=True)
        if chosen.once:
            return int(not pools)
        time.sleep(chosen.interval)


def _paths(named: list[str]) -> list[Path]:
    """Return sockets, and directories of them."""
    from poolkeeper.live._socket import SUFFIX, directories, is_own

    places = directories()
    if not named:
        return [place for place in places if is_own(place)] or places[:1]
    return [
        next((path for path in paths if path.exists()), paths[0])
        for paths in (
            [place / f"{name}{SUFFIX}" for place in places] if name.isdecimal() else [Path(name)]
            for name in named
        )
    ]


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
    from poolkeeper.live._socket import SUFFIX

    for path in paths:
        if path.suffix != SUFFIX and not path.is_socket():
            yield from sorted(path.glob(f"*{SUFFIX}"))
        else:
            yield path


def _live(chosen: argparse.Namespace, paths: list[Path]) -> int:
    from rich.live import Live

    from ._views import fitted

    with Live(screen=True, auto_refresh=False, vertical_overflow="crop") as live:
        while True:
            live.update(fitted(live.console, *_look(paths, chosen.pool)), refresh=True)
            time.sleep(chosen.interval)
