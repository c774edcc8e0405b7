"""
What is loaded when it is first asked for: the one way in which poolkeeper loads a module late.

An import is paid for by every process, the short-lived command too that never opens its pool. So
`_facts` and `_door` stand for modules that only a pool in use needs; type checkers read there
where a name comes from, and annotations name it through them, so that who asks for type hints
finds it. A pool that is opened has all of them (`_rooms`): nothing is loaded while it is at work,
nor when it is closed, for by then there may be no file descriptor left, or the files may be those
of the next release, or Python may be about to exit.

Threads that ask at once wait for each other, as for any import; a forked child has what its parent
had loaded. A name that was found is a name of the module from then on: it costs what any does.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib import import_module
from typing import Any


class Later:
    """Stands for the module *room*, for annotations that name it."""

    def __init__(self, room: str) -> None:
        self._room = room

    def __getattr__(self, name: str) -> Any:
        return getattr(import_module(self._room, __package__), name)


def later(module: str, *rooms: str) -> Callable[[str], Any]:
    """Return ``__getattr__()`` for *module*: what it has not is looked for in *rooms*, in order."""

    def __getattr__(name: str) -> Any:  # noqa: N807
        if not name.startswith("_"):  # of such Python itself asks
            for room in rooms:
                found = vars(import_module(room, __package__))
                if name in found:
                    setattr(sys.modules[module], name, found[name])
                    return found[name]
        raise AttributeError(f"module {module!r} has no attribute {name!r}")

    return __getattr__
