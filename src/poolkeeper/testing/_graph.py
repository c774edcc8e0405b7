"""Which task waits for which: found out by looking at what is called when one ends."""

from __future__ import annotations

import asyncio
import gc
from functools import partial
from types import FunctionType, ModuleType
from typing import Any, cast

_RELEASE_WAITER: Any = getattr(asyncio.tasks, "_release_waiter", None)
"""What ``wait_for()`` has called at the end of the task that it makes."""

_DEEPEST, _MOST = 12, 500
"""How far from a task, and at how many objects, is looked."""


def waits_for(waiting: asyncio.Task[Any], task: asyncio.Task[Any]) -> bool:
    """
    Tell whether *waiting* cannot go on before *task* has ended: it awaits it, or a group of such.

    By ``await``, ``gather()``, ``wait()``, ``wait_for()``, ``shield()`` or a task group, directly
    or by way of others. What is waited for in another way, such as an event, is not seen.
    """
    others = [other for other in asyncio.all_tasks() if other is not task]
    found, looked_at = {task}, [task]
    while looked_at:
        one = looked_at.pop()
        ends = _called_at_the_end_of(one)
        for other in others:
            awaited = getattr(other, "_fut_waiter", None)
            if (
                awaited is None
                or other in found
                or (awaited is not one and id(awaited) not in ends)
            ):
                continue
            if other is waiting:
                return True
            found.add(other)
            looked_at.append(other)
    return False


def stands_for(task: asyncio.Task[Any], waiting: asyncio.Task[Any]) -> bool:
    """
    Tell whether *waiting* does nothing but wait for *task*, by ``asyncio.wait_for()``.

    That makes a task of what it is given, up to Python 3.11. Nobody has meant to start one.
    """
    waiters = [
        callback.args[0]
        for callback in _callbacks(task)
        if isinstance(callback, partial) and callback.func is _RELEASE_WAITER
    ]
    awaited = getattr(waiting, "_fut_waiter", None)
    if awaited is None or not waiters:
        return False
    return awaited in waiters or any(
        stands_for(other, waiting)
        for other in asyncio.all_tasks()
        if other is not task and getattr(other, "_fut_waiter", None) in waiters
    )


def _called_at_the_end_of(task: asyncio.Task[Any]) -> set[int]:
    """Return the futures that the callbacks of *task* can reach, by their number."""
    level = _callbacks(task)
    seen: set[int] = set()
    futures: set[int] = set()
    for _ in range(_DEEPEST):
        further: list[Any] = []
        for thing in level:
            if id(thing) in seen or len(seen) > _MOST:
                continue
            seen.add(id(thing))
            if isinstance(thing, asyncio.Future):
                futures.add(id(cast(Any, thing)))
                if not isinstance(thing, asyncio.Task):  # it may end another, as in shield()
                    further += _callbacks(thing)
            elif isinstance(thing, FunctionType):
                further += thing.__closure__ or ()
            elif not isinstance(thing, type | ModuleType | asyncio.AbstractEventLoop):
                further += gc.get_referents(thing)
        level = further
    return futures


def _callbacks(future: Any) -> list[Any]:
    callbacks: list[tuple[Any, Any]] = getattr(future, "_callbacks", None) or []
    return [callback for callback, _context in callbacks]
