"""
Say in words where something happened: line of code, task, event loop, thread.

Keeps strings and numbers only, never frames, tasks or loops: what is stored here may outlive
them by hours.
"""

from __future__ import annotations

import asyncio
import inspect
import itertools
import linecache
import os
import re
import sys
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import cache, partial
from pathlib import Path
from types import CodeType, FrameType, FunctionType
from typing import Any, NamedTuple, TypeAlias, TypeVar, cast

Function = TypeVar("Function", bound=Callable[..., Any])

_INTERNAL = ("poolkeeper", "psycopg", "psycopg_pool", "contextlib", "asyncio", "weakref")

_loop_numbers: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, int] = (
    weakref.WeakKeyDictionary()
)
_next_loop_number = itertools.count(1)


class Place(NamedTuple):
    """Where something happened, ready to be printed."""

    site: str
    """``file:line`` of the caller's code."""

    task: str | None
    """Name of the task, None outside of any."""

    loop: str
    """The loop in words, without its thread; "no event loop" outside of any."""

    thread: str
    pid: int

    @classmethod
    def here(cls, site: str | None = None) -> Place:
        """Describe the caller's caller's place: *site*, or the innermost code that is not ours."""
        task: str | None = None
        loop = running_loop()
        if loop is not None:
            current = asyncio.current_task(loop)
            task = current.get_name() if current else None
        return cls(
            site=site or call_site(),
            task=task,
            loop=describe_loop(loop),
            thread=threading.current_thread().name,
            pid=os.getpid(),
        )

    def __str__(self) -> str:
        return self.describe()

    def describe(self, loop_state: str = "") -> str:
        """Return the place in words, with *loop_state* ("closed") added to the loop."""
        task = f'in task "{self.task}"' if self.task else "outside of any task"
        facts = [self.loop, f'thread "{self.thread}"', *([loop_state] if loop_state else [])]
        if self.loop == NO_LOOP:
            return f"at {self.site} {task} ({', '.join(facts)})"
        number, _, kind = self.loop.partition("/")
        facts[0] = kind
        return f"at {self.site} {task} on loop {number} ({', '.join(facts)})"


NO_LOOP = "no event loop"


def running_loop() -> asyncio.AbstractEventLoop | None:
    """Return the running loop, None where there is none."""
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None


def describe_loop(loop: asyncio.AbstractEventLoop | None) -> str:
    """Return ``number/kind`` of *loop*; numbers count the loops seen by this process."""
    if loop is None:
        return NO_LOOP
    number = _loop_numbers.get(loop)
    if number is None:
        number = _loop_numbers[loop] = next(_next_loop_number)
    kind = type(loop).__module__.partition(".")[0]
    return f"{number}/{kind}"


def call_site() -> str:
    """Return ``file:line`` of `program_frame()`."""
    frame = program_frame(sys._getframe(1))
    return site(frame.f_code, frame.f_lineno)


def own_call_site() -> str:
    """Return `call_site()`; "" where no code of the program's own has called, but a library's."""
    frame = program_frame(sys._getframe(1))
    return "" if _is_installed(frame.f_code.co_filename) else site(frame.f_code, frame.f_lineno)


_THE_LOOP = frozenset({"asyncio.base_events", "asyncio.events", "asyncio.runners"})


def program_frame(innermost: FrameType, *libraries: str) -> FrameType:
    """
    Return the innermost frame of the program's own code.

    Where the program itself is installed as a package, that is the innermost one that is neither
    ours nor of *libraries*. Who runs the event loop is asked only if its task is all ours.
    """
    frame: FrameType | None = innermost
    first: FrameType | None = None
    while frame is not None:
        module = str(frame.f_globals.get("__name__", ""))
        if first is not None and module in _THE_LOOP:
            break
        package = module.partition(".")[0]
        if package not in _INTERNAL and package not in libraries:
            if not _is_installed(frame.f_code.co_filename):
                return frame
            first = first or frame
        frame = frame.f_back
    return first or innermost


def warn_user(message: str, category: type[Warning], caller: str | None = None) -> None:
    """
    Warn at the user's line, or at *caller* (``file:line``).

    No ``stacklevel`` finds it: it is as many frames away as "async with", a method or an adapter
    takes.
    """
    if caller is not None:
        file, _, line = caller.rpartition(":")
        warnings.warn_explicit(message, category, file, int(line) if line.isdecimal() else 1)
        return
    frame = program_frame(sys._getframe(1))
    warnings.warn_explicit(
        message,
        category,
        frame.f_code.co_filename,
        frame.f_lineno,
        frame.f_globals.get("__name__"),
        frame.f_globals.setdefault("__warningregistry__", {}),
    )


class Handler(NamedTuple):
    """What answers a request: stands where its code object would."""

    code: CodeType
    method: str
    """HTTP method, or ``WEBSOCKET``."""

    route: str
    """Template of the path, never the path itself: what stands in that is the client's own."""


Code: TypeAlias = CodeType | Handler


class Behalf:
    """
    Code that something is done for without being called: stands where a frame of it would.

    Args:
        code: The code.
        frame: Who does it.
        lineno: The line; that of its ``def`` if None.
    """

    __slots__ = ("f_back", "f_code", "f_lineno")

    def __init__(self, code: Code, frame: FrameType, lineno: int | None = None) -> None:
        self.f_code: Code = code
        if lineno is None:
            lineno = _code(code).co_firstlineno
        self.f_lineno: int = lineno
        self.f_back: FrameType = frame


def raised_at(error: BaseException) -> str:
    """
    Return ``file:line in function`` of where the program raised *error*; "" if it did not.

    That is the innermost frame of the program's own code, or that of a library that is neither
    ours nor what we stand on, where no code of the program's is in between.
    """
    own = library = ""
    entry = error.__traceback__
    while entry is not None:
        frame = entry.tb_frame
        module = str(frame.f_globals.get("__name__", ""))
        if module.partition(".")[0] not in _INTERNAL:
            code = frame.f_code
            place = f"{site(code, entry.tb_lineno or code.co_firstlineno)} in {code.co_name}"
            if _is_installed(code.co_filename):
                library = place
            else:
                own = place
        entry = entry.tb_next
    return own or library


_STANDARD_LIBRARY = f"{Path(os.__file__).parent}{os.sep}"
_POOLKEEPER = f"{Path(__file__).parent}{os.sep}"


@cache
def _is_installed(path: str) -> bool:
    """Tell whether *path* is the standard library's, or that of an installed package."""
    return (
        path.startswith((_STANDARD_LIBRARY, _POOLKEEPER, "<frozen"))
        or f"{os.sep}site-packages{os.sep}" in path
        or f"{os.sep}dist-packages{os.sep}" in path
    )


_MOST_WRAPPERS = 50  # some go round in circles


def code_behind(function: object) -> CodeType | None:
    """
    Return the code that somebody wrote as *function*; None if it has none in Python.

    Behind decorators (`functools.wraps`), partials, methods and objects that can be called. A
    class stands where the first function in its body does.
    """
    if type(function) is FunctionType and not function.__dict__:
        return function.__code__  # most are no more than that
    written = _unwrapped(function)
    if not isinstance(written, type):
        return written
    inside = f"{written.__qualname__}."  # and so neither generated nor assigned
    members = map(_unwrapped, vars(written).values())
    return min(
        (m for m in members if isinstance(m, CodeType) and m.co_qualname.startswith(inside)),
        key=lambda code: code.co_firstlineno,
        default=None,
    )


def _unwrapped(function: Any) -> CodeType | type | None:
    for _ in range(_MOST_WRAPPERS):
        inner: Any = getattr(function, "__wrapped__", None)
        if inner is None:
            inner = getattr(function, "__func__", None)
        if inner is None and issubclass(type(function), partial):
            inner = function.func
        if inner is None:
            code = getattr(function, "__code__", None)
            if type(code) is CodeType:  # a mock pretends
                return code
            if isinstance(function, type):
                return function
            inner = cast(Any, type(function)).__call__
        function = inner
    return None


def coroutine_function(function: Function) -> Function:
    """
    Let *function*, which returns a coroutine, pass for one that is written ``async def``.

    Frameworks, mocks and decorators ask ``inspect.iscoroutinefunction()``. That is true of it;
    but it runs when it is called, while its caller can still be seen.
    """
    if sys.version_info >= (3, 12):
        return inspect.markcoroutinefunction(function)
    # The flag says how a function is described; what it does when called is in the bytecode.
    code = cast(Any, function).__code__
    cast(Any, function).__code__ = code.replace(co_flags=code.co_flags | inspect.CO_COROUTINE)
    return function


def where_now(
    task: object, acquired: Code
) -> tuple[tuple[CodeType, int] | None, tuple[CodeType, int] | None]:
    """
    Return two lines of the program's own among those that *task* stands at, each None if unknown.

    The innermost of them, which is what it awaits; and the innermost outside of *acquired*, if
    that is among them. A task that runs stands nowhere.

    Args:
        task: A task.
        acquired: Code that has asked for a connection; it counts as the program's own where
            nothing else does, for the program may be installed.
    """
    code_behind = _code(acquired)
    now: tuple[CodeType, int] | None = None
    within: tuple[CodeType, int] | None = None
    outside: tuple[CodeType, int] | None = None
    coroutine: Any = cast(Any, task).get_coro() if isinstance(task, asyncio.Task) else None
    for _ in range(_DEEPEST):
        # What else may be awaited has no frame, or is a generator of some library's.
        frame = getattr(coroutine, "cr_frame", None)
        if frame is None or coroutine.cr_running:
            break
        code = frame.f_code
        if code is code_behind:
            outside, within = now, (code, frame.f_lineno)
        if not _is_of_library(frame.f_globals.get("__name__", ""), code.co_filename):
            now = code, frame.f_lineno
        coroutine = coroutine.cr_await
    return now or within, outside


_DEEPEST = 500

Route: TypeAlias = tuple[str, str] | None
"""Method, or ``WEBSOCKET``, and the template of the path; None if it is not known."""

_tellers: list[Callable[[Any], Route]] = []

_REQUESTS = frozenset({"scope", "request", "req"})


def routes_are_told_by(teller: Callable[[Any], Route]) -> None:
    """
    Let *teller* be asked for the route of what a framework knows a request by.

    Frameworks hand a request from function to function, under one of a few names. There it is
    found when words are made; so a request pays nothing for it.

    Args:
        teller: Returns None for what it does not know.
    """
    _tellers.append(teller)


def answering(code: Code, task: object) -> Code:
    """Return *code* with the route of the request that *task* answers, if that is known."""
    if not _tellers or isinstance(code, Handler) or not isinstance(task, asyncio.Task):
        return code
    # Of a task that a handler has made, it is the handler's that was handed the request.
    tasks: list[asyncio.Task[Any]] = [cast(Any, task)]
    for asked in tasks:
        route = _route_in(_frames(asked))
        if route is not None:
            return Handler(code, *route)
        if len(tasks) < _MOST_TASKS:
            with suppress(Exception):  # what is in a callback may be anything
                tasks += (one for one in _waiting_for(asked) if one not in tasks)
    return code


_MOST_TASKS = 10


def _waiting_for(future: asyncio.Future[Any], depth: int = 3) -> Iterator[asyncio.Task[Any]]:
    """
    Give the tasks that are told when *future* is done: by itself, or by a group of tasks.

    Who is told is in its callbacks: a task, a group (`asyncio.TaskGroup`, or anyio's), or a future
    between the two, as of `asyncio.gather()`. Python 3.14 writes it down for everybody
    (`asyncio.capture_call_graph()`).
    """
    for callback, _ in getattr(future, "_callbacks", None) or ():
        for told in _in(callback):
            scope: Any = getattr(told, "cancel_scope", told)
            host = getattr(scope, "_parent_task", None) or getattr(scope, "_host_task", scope)
            if isinstance(host, asyncio.Task):
                yield cast(Any, host)
            elif isinstance(host, asyncio.Future) and depth:
                yield from _waiting_for(cast(Any, host), depth - 1)


def _in(callback: Any) -> Iterator[object]:
    yield getattr(callback, "__self__", None)
    yield from getattr(callback, "args", ())
    for cell in getattr(callback, "__closure__", None) or ():
        with suppress(ValueError):  # it is empty
            yield cell.cell_contents


def _route_in(frames: Iterator[FrameType]) -> Route:
    for frame in frames:
        for name in _requests_in(frame.f_code):
            found = frame.f_locals.get(name)
            for teller in _tellers:
                with suppress(Exception):  # such as of a request that is not complete
                    route = None if found is None else teller(found)
                    if route is not None:
                        return route
    return None


@cache
def _requests_in(code: CodeType) -> tuple[str, ...]:
    # Of frameworks alone: to read what the program's own code has would keep it alive.
    known = _REQUESTS.intersection(code.co_varnames) if _is_installed(code.co_filename) else ()
    return tuple(known)


def _frames(task: asyncio.Task[Any]) -> Iterator[FrameType]:
    """Give the frames that *task* stands at; of the one that runs, those that it is in."""
    coroutine: Any = task.get_coro()
    outermost: FrameType | None = getattr(coroutine, "cr_frame", None)
    if not getattr(coroutine, "cr_running", False):
        for _ in range(_DEEPEST):
            frame: FrameType | None = getattr(coroutine, "cr_frame", None)
            if frame is None:
                break
            yield frame
            coroutine = coroutine.cr_await
    elif running_loop() is not None and asyncio.current_task() is task:
        frame = sys._getframe(1)
        while frame is not None:
            yield frame
            frame = None if frame is outermost else frame.f_back


@cache
def _is_of_library(module: object, path: str) -> bool:
    return str(module).partition(".")[0] in _INTERNAL or _is_installed(path)


def is_library(code: Code) -> bool:
    """Tell whether *code* is the standard library's, or that of an installed package."""
    return _is_installed(_code(code).co_filename)


def _code(code: Code) -> CodeType:
    return code.code if isinstance(code, Handler) else code


def site(code: Code, lineno: int) -> str:
    """
    Return ``file:line``, relative to the working directory where the file is below it.

    A function as a whole, whose first line is that of a decorator, stands where its ``def`` does.
    """
    code = _code(code)
    if lineno == code.co_firstlineno:
        lineno = _def_line(code)
    path = code.co_filename
    try:
        below = f"{Path.cwd()}{os.sep}"
    except OSError:  # the working directory was removed
        below = ""
    if below and path.startswith(below):
        path = path[len(below) :]
    return f"{path}:{lineno}"


def _def_line(code: CodeType) -> int:
    first = code.co_firstlineno
    lines = [line for _, _, line in code.co_lines() if line is not None and line > first]
    begins = re.compile(rf"\s*(async\s+)?def\s+{re.escape(code.co_name)}\b")
    for lineno in range(first, min(lines, default=first) + 1):
        if begins.match(linecache.getline(code.co_filename, lineno)):
            return lineno
    return first


def function_of(code: Code) -> str:
    """Return the name of the function; "" where the code is none that has a name."""
    code = _code(code)
    # What is inside of it and has no name, such as a lambda, is its business.
    names = [name for name in code.co_qualname.split(".<locals>.") if not name.startswith("<")]
    return names[-1] if names else ""


def route_of(code: Code) -> str:
    """Return method and route, as in ``GET /orders/{id}``; "" where that is not known."""
    return f"{code.method} {code.route}" if isinstance(code, Handler) else ""


def asker(code: Code, lineno: int) -> str:
    """
    Return who asks, as people think of it: ``GET /orders/{id}, web.py:9 in order``.

    What is known of it, that is; of a handler that a library has, no line of the library's.
    """
    route, function = route_of(code), function_of(code)
    if route and is_library(code):
        return route
    place = site(code, lineno)
    if function:
        place = f"{place} in {function}"
    return f"{route}, {place}" if route else place
