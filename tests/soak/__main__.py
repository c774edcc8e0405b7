"""Soak: ``python -m tests.soak --help``."""

from __future__ import annotations

import argparse
import re
import sys
import tracemalloc
from pathlib import Path
from secrets import randbelow
from typing import Any

from . import report
from .outside import Outside
from .run import Soak

BEGIN, END = "<!-- figures -->", "<!-- /figures -->"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__)
    parser.add_argument("--time", type=float, default=60, help="seconds to go on")
    parser.add_argument("--seed", type=int, help="of all that is chosen; by default a new one")
    parser.add_argument("--loop", choices=["asyncio", "uvloop"], default="asyncio")
    parser.add_argument("--record", type=Path, help="page of Markdown to write the figures into")
    parser.add_argument("--tracemalloc", action="store_true", help="say what memory grew where")
    arguments = parser.parse_args()
    seed = randbelow(10**6) if arguments.seed is None else arguments.seed
    again = f"make soak TIME={arguments.time:g} SEED={seed} LOOP={arguments.loop}"
    print(f"again: {again}", flush=True)
    with Outside() as outside:
        soak = Soak(outside, arguments.time, seed, _loop_factory(arguments.loop))
        soak.say = lambda line: print(line, flush=True)
        if arguments.tracemalloc:
            growth = _Growth(soak)
        soak.run()
        if arguments.tracemalloc:
            growth.tell()
    print(report.text(soak, arguments.loop))
    print(f"again: {again}")
    if arguments.record is not None:
        _record(arguments.record, report.table(report.facts(soak, arguments.loop)))
    return bool(soak.book.violations)


def _loop_factory(name: str) -> Any:
    if name == "asyncio":
        return None
    import uvloop

    return uvloop.new_event_loop


def _record(page: Path, figures: str) -> None:
    """Put *figures* where the page keeps them."""
    text, found = re.subn(
        f"{BEGIN}.*?{END}",
        lambda _: f"{BEGIN}\n{figures}\n{END}",
        page.read_text(),
        flags=re.DOTALL,
    )
    if not found:
        raise SystemExit(f"{page} has no place for figures: {BEGIN} ... {END}")
    page.write_text(text)


class _Growth:
    """Compares what is allocated from the third quiet moment on with what is at the end."""

    def __init__(self, soak: Soak) -> None:
        tracemalloc.start(12)
        self._lines = 0
        self._before: tracemalloc.Snapshot | None = None
        soak.say = self._quiet

    def _quiet(self, line: str) -> None:
        print(line, flush=True)
        self._lines += 1
        if self._lines == 3:
            self._before = tracemalloc.take_snapshot()

    def tell(self) -> None:
        if self._before is None:
            return
        after = tracemalloc.take_snapshot()
        for statistic in after.compare_to(self._before, "traceback")[:15]:
            print(statistic)
            print("\n".join(statistic.traceback.format()))


if __name__ == "__main__":
    sys.exit(main())
