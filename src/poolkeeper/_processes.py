"""
How many processes there are of this program, where that can be known; a leaf.

A worker is told by what has started it: the settings that uvicorn and hypercorn hand to each of
theirs, or the arbiter that still stands below a forked one on the stack. Nothing is loaded for
it, and where nobody says a number, none is made up.
"""

from __future__ import annotations

import os
import sys
from types import FrameType
from typing import Any, NamedTuple

LONGEST = 63
"""Bytes of a name that the server keeps."""


class Processes(NamedTuple):
    """How many there are, or 1."""

    number: int
    said_by: str
    """Who says so; "" if nobody does."""


def expected(given: int | None) -> Processes:
    """Return how many processes there are: as *given*, or as who has started this one says."""
    if given is not None:
        return Processes(given, "expected_processes")
    return _of_supervisor() or _of_parent(sys._getframe()) or _of_environment() or Processes(1, "")


def _of_supervisor() -> Processes | None:
    """Ask the settings that a server has handed to this worker."""
    started = sys.modules.get("multiprocessing.process")
    if started is None or started.parent_process() is None:
        return None
    worker: Any = started.current_process()
    handed = (*getattr(worker, "_args", ()), *getattr(worker, "_kwargs", {}).values())
    for settings in handed:
        server = type(settings).__module__.partition(".")[0]
        if server in ("uvicorn", "hypercorn"):
            return _number(getattr(settings, "workers", None), f"{server}, workers")
    return None


# Who starts workers by fork, and what is its number of them; both read in gunicorn 23 and
# billiard 4.2. The name of the module is that of the function on the stack.
_PARENTS = {
    "gunicorn.arbiter": ("num_workers", "gunicorn, workers"),
    "billiard.pool": ("_processes", "Celery, concurrency"),
}


def _of_parent(innermost: FrameType) -> Processes | None:
    """Ask whoever has forked this process, and stands below it on the stack since."""
    if not _PARENTS.keys() & sys.modules.keys():
        return None
    frame: FrameType | None = innermost
    while frame is not None:
        parent = _PARENTS.get(str(frame.f_globals.get("__name__", "")))
        if parent is not None:
            name, said_by = parent
            found = _number(getattr(frame.f_locals.get("self"), name, None), said_by)
            if found is not None:
                return found
        frame = frame.f_back
    return None


def _of_environment() -> Processes | None:
    given = os.environ.get("WEB_CONCURRENCY", "")
    return _number(int(given), "WEB_CONCURRENCY") if given.isdecimal() else None


def _number(value: object, said_by: str) -> Processes | None:
    return Processes(value, said_by) if isinstance(value, int) and value > 0 else None


def session_name(pool: str, several: bool) -> str:
    """
    Return what the server is to show for a connection, in as many bytes as it keeps.

    Args:
        pool: Name of the pool.
        several: True if there are several processes, to be told apart.
    """
    own = f":{os.getpid()}" if several else ""
    name = f"poolkeeper:{pool}".encode()[: LONGEST - len(own)]
    return name.decode(errors="ignore") + own
