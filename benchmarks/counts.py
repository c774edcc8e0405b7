"""
How many bytecodes Python runs for one operation: ``python -m benchmarks.counts --dsn …``.

They do not depend on what else the machine does, and tell in which function the rest is.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections import Counter
from importlib import import_module
from types import CodeType, FrameType
from typing import Any

from .contests import LOOPS, STAGES
from .timing import runner

SECONDS = 0.05
"""How long one turn would take if nothing were counted."""


class Bytecodes:
    """Counts bytecodes while it is entered, by the code that they are of."""

    def __init__(self) -> None:
        self.by_code: Counter[CodeType] = Counter()

    def __enter__(self) -> Counter[CodeType]:
        sys.settrace(self._called)
        return self.by_code

    def __exit__(self, *_: object) -> None:
        sys.settrace(None)

    def _called(self, frame: FrameType, _event: str, _arg: Any) -> Any:
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        return self._counted

    def _counted(self, frame: FrameType, event: str, _arg: Any) -> Any:
        if event == "opcode":
            self.by_code[frame.f_code] += 1
        return self._counted


async def count(stage: str, contestant: str, contest: str, dsn: str, top: int) -> None:
    """Print what one operation of *contestant* takes, and the *top* functions."""
    enter = import_module(f"benchmarks.{STAGES[stage].module}").enter
    async with enter(stage, contestant, dsn) as turns:
        await turns[contest](SECONDS)
        with Bytecodes() as found:
            turn = await turns[contest](SECONDS)
    print(f"{contestant}: {found.total() / turn.done:,.0f} bytecodes for one {contest}")
    for code, number in found.most_common(top):
        print(f"{number / turn.done:10,.1f}  {code.co_qualname}")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.counts", description=__doc__)
    parser.add_argument("--dsn", required=True)
    parser.add_argument("--stage", choices=STAGES, default="pools")
    parser.add_argument("--contest", default="block")
    parser.add_argument("--loop", choices=LOOPS, default="asyncio")
    parser.add_argument("--top", type=int, default=10, help="how many functions to name")
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    for contestant in STAGES[options.stage].installed():
        with runner(options.loop) as run:
            counting = count(options.stage, contestant, options.contest, options.dsn, options.top)
            try:
                run.run(counting)
            except KeyError:
                print(f"{contestant}: has no {options.contest}")


if __name__ == "__main__":
    main()
