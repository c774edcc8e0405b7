"""``poolkeeper advise``: how large a pool should be, and how a fleet of them would do."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from poolkeeper.errors import ConfigError

from ._arguments import number

if TYPE_CHECKING:
    from poolkeeper.sizing import Advice, Workload


def add_parser(commands: Any) -> None:
    """Add the command to those there are."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "advise",
        help="how long acquires wait, for each size of a pool; for a fleet of processes too",
        description="Estimates, from what was recorded or from a rate and a mean, how long an"
        " acquire waits for each max_size; with --processes, by simulation, for so many pools on"
        " one server, with and without a pooler in front of it. Exit status 1 if none of the"
        " sizes will do, 2 if something cannot be read.",
    )
    work = parser.add_argument_group("the work of one process")
    work.add_argument(
        "recording", nargs="?", type=Path, metavar="FILE", help="what Recording.save() has written"
    )
    work.add_argument(
        "--rate",
        type=float,
        metavar="NUMBER",
        help="acquires per second, if nothing was recorded",
    )
    work.add_argument("--hold", type=float, metavar="SECONDS", help="that one is held, on average")
    work.add_argument(
        "--variation",
        type=float,
        metavar="NUMBER",
        help="standard deviation of the holds, in means (default: 1)",
    )
    work.add_argument(
        "--query",
        type=float,
        metavar="SECONDS",
        help="of --hold in which the server works (default: all of it)",
    )
    pool = parser.add_argument_group("the pool")
    pool.add_argument("--size", type=number, metavar="NUMBER", help="max_size as it is")
    pool.add_argument("--sizes", type=_sizes, metavar="NUMBER,…", help="those to look at: 4,8,16")
    pool.add_argument(
        "--target",
        type=float,
        default=0.010,
        metavar="SECONDS",
        help="that one acquire in a hundred may wait (default: 0.01)",
    )
    fleet = parser.add_argument_group("a fleet")
    fleet.add_argument(
        "--processes", type=number, metavar="NUMBER", help="how many have a pool like this"
    )
    fleet.add_argument("--cores", type=float, metavar="NUMBER", help="of the server")
    fleet.add_argument(
        "--max-connections",
        type=number,
        metavar="NUMBER",
        help="that it has for them (default: 97)",
    )
    fleet.add_argument(
        "--pooler",
        type=number,
        metavar="NUMBER",
        help="connections of a pooler to the server (default: 4 a core)",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--plot", type=Path, metavar="FILE.svg", help="draw it, too")
    parser.set_defaults(run=_run)


def _sizes(text: str) -> list[int]:
    try:
        return [int(size) for size in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of whole numbers: 4,8,16") from None


def _run(chosen: argparse.Namespace) -> int:
    from poolkeeper.sizing import Recording, Workload, advise

    _require_sense(chosen)
    if chosen.recording is not None:
        recording = Recording.load(chosen.recording)
        workload, name = recording.workload(), recording.name
        current, gave_up = chosen.size or recording.size, recording.gave_up
    else:
        variation = 1.0 if chosen.variation is None else chosen.variation
        workload = Workload.of(chosen.rate, chosen.hold, variation=variation, query=chosen.query)
        name, current, gave_up = "", chosen.size, 0
    if chosen.processes is not None:
        return _fleet(chosen, workload)
    advice = advise(
        workload,
        sizes=chosen.sizes,
        target=chosen.target,
        current=current,
        name=name,
        gave_up=gave_up,
    )
    if chosen.plot is not None:
        _write(chosen.plot, advice)
    print(json.dumps(advice.as_dict(), indent=2) if chosen.json else advice)
    return int(advice.size is None)


def _require_sense(chosen: argparse.Namespace) -> None:
    """Refuse what would be left out without a word."""
    numbers = _given(chosen, "rate", "hold", "variation", "query")
    if chosen.recording is not None and numbers:
        raise ConfigError(f"give a recording, or --rate and --hold, not both: {numbers}")
    if chosen.recording is None and (chosen.rate is None or chosen.hold is None):
        raise ConfigError(
            "there is nothing to advise on",
            hint="Give the file of a recording, or --rate and --hold: poolkeeper advise --help",
        )
    if chosen.processes is None:
        if of_fleet := _given(chosen, "cores", "max_connections", "pooler"):
            raise ConfigError(f"{of_fleet} is of a fleet: --processes is missing")
        return
    if of_one := _given(chosen, "size", "plot"):
        raise ConfigError(f"{of_one} is of one process, and --processes of a fleet")
    if chosen.cores is None:
        raise ConfigError("--cores is missing", hint="How many does the server have?")


def _given(chosen: argparse.Namespace, *names: str) -> str:
    given = (name for name in names if getattr(chosen, name) is not None)
    return ", ".join(f"--{name.replace('_', '-')}" for name in given)


def _write(path: Path, advice: Advice) -> None:
    from poolkeeper.sizing import plot

    try:
        path.write_text(plot(advice), encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot write {str(path)!r}", detail=str(error.strerror)) from error


def _fleet(chosen: argparse.Namespace, workload: Workload) -> int:
    from poolkeeper.sizing import Fleet, Server

    server = Server(chosen.cores, chosen.max_connections or 97)
    pooler = chosen.pooler or max(1, round(4 * chosen.cores))
    fleet = Fleet.of(
        workload,
        chosen.processes,
        server,
        sizes=chosen.sizes,
        pooler=pooler,
        target=chosen.target,
        told=_progress if sys.stderr.isatty() else None,
    )
    print(json.dumps(fleet.as_dict(), indent=2) if chosen.json else fleet)
    return int(not any(row.keeps(chosen.target) for row in fleet.rows))


def _progress(done: int, of: int) -> None:
    print(f"\rsimulated {done} of {of}", end="\n" if done == of else "", file=sys.stderr)
