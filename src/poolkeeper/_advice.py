"""
What to do about a loop that is the wrong one, where the program runs in something that is known.

Told by what is loaded, and by what is on the stack; nothing is loaded for it.
"""

from __future__ import annotations

import sys
from types import FrameType

_PYTEST = (
    "Under pytest, set asyncio_default_fixture_loop_scope and asyncio_default_test_loop_scope to"
    " one scope."
)
_WSGI = (
    "async_to_sync() runs this on a loop of its own, as Django does with each async view under"
    " WSGI: serve the application by ASGI, where one loop lasts, or call a Portal in a view that"
    " is not async."
)
_CELERY = (
    "In a Celery task each asyncio.run() makes a new loop: call a Portal, which keeps one in each"
    " worker (poolkeeper.adapters.celery)."
)
_CELERY_FORKED = "With Celery, poolkeeper.adapters.celery opens it in each worker, after the fork."
_NOTEBOOK = (
    "In a notebook a loop runs already: await at the top level of a cell, where asyncio.run()"
    " cannot be called, and not in a thread either."
)


def advice(owner_runs: bool = False) -> str:
    """
    Return what fits the place, as a sentence that ends with a space; "" where none is known.

    Args:
        owner_runs: True if the loop that opened the pool runs, so it is no other test's.
    """
    frame = sys._getframe(1)
    if _calls("asgiref.sync", frame):
        return f"{_WSGI} "
    if _calls("celery", frame):
        return f"{_CELERY} "
    if "_pytest" in sys.modules and not owner_runs:
        return f"{_PYTEST} "
    if "ipykernel" in sys.modules:
        return f"{_NOTEBOOK} "
    return ""


def advice_after_fork() -> str:
    """Return the same for a process that was forked from the one that opened the pool."""
    return f"{_CELERY_FORKED} " if "celery" in sys.modules else ""


def _calls(package: str, innermost: FrameType) -> bool:
    """Tell whether a module of *package* is among those that have called."""
    if package not in sys.modules:
        return False  # and nothing to look for
    frame: FrameType | None = innermost
    while frame is not None:
        module = str(frame.f_globals.get("__name__", ""))
        if module == package or module.startswith(f"{package}."):
            return True
        frame = frame.f_back
    return False
