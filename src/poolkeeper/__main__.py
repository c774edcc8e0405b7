"""The command line: what commands there are; those of `cli` say themselves what they take."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from poolkeeper import PoolkeeperError, __version__
from poolkeeper.cli import advise, doctor, top


def main(arguments: Sequence[str] | None = None) -> int:
    """
    Run one command and return its exit status.

    0: done, as promised. 1: it ran, and something was not as promised, or nobody reads to its end.
    2: it could not run.
    """
    for stream in (sys.stdout, sys.stderr):
        if reconfigure := getattr(stream, "reconfigure", None):
            reconfigure(errors="replace")  # a server's messages may be in any language
    chosen = _parser().parse_args(arguments)
    try:
        status = int(chosen.run(chosen))
        sys.stdout.flush()
        return status
    except BrokenPipeError:
        # The reader has seen enough. What Python still wants to flush goes nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except PoolkeeperError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="poolkeeper",
        description="Keeps psycopg's async connection pool alive, on the right event loop,"
        " and honest.",
    )
    parser.add_argument("--version", action="version", version=f"poolkeeper {__version__}")

    def say_what_there_is(_chosen: argparse.Namespace) -> int:
        parser.print_help()
        return 0

    parser.set_defaults(run=say_what_there_is)
    commands = parser.add_subparsers(metavar="COMMAND")
    _add_demo(commands)
    _add_explain(commands)
    advise.add_parser(commands)
    doctor.add_parser(commands)
    top.add_parser(commands)
    return parser


def _add_demo(commands: Any) -> None:
    demo = commands.add_parser(
        "demo",
        help="show a small app at work, then what common mistakes do, with and without poolkeeper",
        description="Runs a small app, then each common mistake twice: with psycopg_pool's"
        " AsyncConnectionPool and with poolkeeper. Takes less than half a minute. Exit status 1"
        " if something was not as promised, 2 if there is no server to show it on.",
    )
    demo.add_argument(
        "--dsn",
        help="a server of yours, instead of one that is started for the demo; in its database a"
        " schema is made and dropped again",
    )
    demo.add_argument(
        "--markdown",
        metavar="FILE",
        type=Path,
        help="also write the closing table, and every message, to this file",
    )
    demo.set_defaults(run=_demo)


def _add_explain(commands: Any) -> None:
    explain = commands.add_parser(
        "explain",
        help="what an error or the cause of a shortage means, and what to do; needs no network",
        description="Prints the page on an error or a cause; without a name, what there is. Exit"
        " status 2 if there is none.",
    )
    explain.add_argument(
        "what",
        nargs="*",
        metavar="NAME|MESSAGE",
        help='an error ("AcquireTimeout"), a cause ("held-but-hardly-used"), or a message or'
        ' traceback as it was pasted; "-" reads it from standard input',
    )
    explain.set_defaults(run=_explain)


def _demo(chosen: argparse.Namespace) -> int:
    from poolkeeper._demo.show import show  # the library itself never imports it

    return show(dsn=chosen.dsn, markdown=chosen.markdown)


def _explain(chosen: argparse.Namespace) -> int:
    from poolkeeper._explain import explain

    return explain(chosen.what)


if __name__ == "__main__":
    sys.exit(main())
