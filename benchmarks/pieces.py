"""
Where the time of an acquire and release goes: ``python -m benchmarks.pieces``.

Times the parts of the path by themselves, on a real pool, and prints a table. The parts are
private functions of poolkeeper, so this file changes with them.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import perf_counter
from typing import Any

from poolkeeper import PoolManager, _block
from poolkeeper._acquiring import take
from poolkeeper._block import CheckoutContext
from poolkeeper._checkouts import Checkout
from poolkeeper._embedded import EmbeddedServer
from poolkeeper.events import Acquired, Closed, Released

ROUNDS, CALLS = 11, 5_000


def timed(call: Callable[[], object]) -> float:
    """Return the microseconds of one *call*, the least of several rounds."""
    best = float("inf")
    for _ in range(ROUNDS):
        begin = perf_counter()
        for _ in range(CALLS):
            call()
        best = min(best, perf_counter() - begin)
    return best / CALLS * 1e6


async def entered(context: Callable[[], Any]) -> float:
    """Return the microseconds of one empty block in *context*."""
    best = float("inf")
    for _ in range(ROUNDS):
        begin = perf_counter()
        for _ in range(CALLS):
            async with context():
                pass
        best = min(best, perf_counter() - begin)
    return best / CALLS * 1e6


@contextmanager
def nothing_inside(conn: Any) -> Iterator[None]:
    """Let a block get *conn*, and give it back, without a thought."""
    was = _block.take, _block.release
    _block.take, _block.release = lambda *_: conn, lambda *_: None  # type: ignore[assignment]
    try:
        yield
    finally:
        _block.take, _block.release = was


async def pieces(dsn: str) -> list[tuple[str, float]]:
    """Return what each part costs, in microseconds."""
    db = PoolManager(dsn, min_size=4, max_size=4)
    await db.open()
    pool: Any = db.pool
    frame = sys._getframe()
    found = [("the whole block", await entered(db.connection))]
    for kinds in ((Closed,), (Acquired, Released)):
        unsubscribe = db.subscribe(lambda _: None, *kinds)
        names = " and ".join(kind.__name__ for kind in kinds)
        found.append((f"the same, with a subscriber of {names}", await entered(db.connection)))
        unsubscribe()
    conn = take(pool._life, frame, 1, True)
    with nothing_inside(conn):
        alone = await entered(lambda: CheckoutContext(pool, None, sys._getframe()))
    found.append(("context object and its two coroutines", alone))
    session = conn._session
    handle = conn

    def succeed() -> None:
        nonlocal handle
        handle = session.successor(handle)

    task: Any = asyncio.current_task()
    code = frame.f_code
    found += [
        ("a new handle for the next borrower", timed(succeed)),
        ("a look at the socket", timed(session.is_quiet)),
        ("which task this is", timed(asyncio.current_task)),
        ("the record of a checkout", timed(lambda: Checkout(session, task, code, 1, True, 0.0))),
        ("which loop this is", timed(pool._life.binding.is_here)),
        (
            "the reported parameters (only after a query)",
            timed(lambda: session.parameters_unchanged),
        ),
    ]
    await db.close(timeout=0)
    return found


def main() -> None:
    """Print the table, for asyncio or, with ``--uvloop``, for uvloop."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--uvloop", action="store_true")
    run: Any = asyncio.run
    if parser.parse_args().uvloop:
        from uvloop import run
    gc.disable()
    with EmbeddedServer() as server:
        found = run(pieces(server.dsn()))
    print("| part | µs |\n| --- | --- |")
    for part, cost in found:
        print(f"| {part} | {cost:.2f} |")


if __name__ == "__main__":
    main()
