"""The command line: ``poolkeeper demo``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from poolkeeper import PoolkeeperError, __version__


def main(arguments: Sequence[str] | None = None) -> int:
    """
    Run one command and return its exit status.

    0: done, as promised. 1: it ran, and something was not as promised. 2: it could not run.
    """
    chosen = _parser().parse_args(arguments)
    try:
        return int(chosen.run(chosen))
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
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
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
    return parser


def _demo(chosen: argparse.Namespace) -> int:
    from poolkeeper._demo.show import show  # the library itself never imports it

    return show(dsn=chosen.dsn, markdown=chosen.markdown)


if __name__ == "__main__":
    sys.exit(main())
