"""
Every error and warning that poolkeeper raises.

The shape is the one PostgreSQL users read daily: a first line that stands alone in a log,
then ``DETAIL:`` (facts) and ``HINT:`` (advice). Each class also inherits the exception that
existing code already catches for the same trouble.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from copy import copy
from functools import wraps
from inspect import iscoroutinefunction
from typing import TYPE_CHECKING, Any, Self, TypeVar, cast

import psycopg
from psycopg_pool import PoolClosed, PoolTimeout, TooManyRequests
from typing_extensions import override

from . import _facts

__all__ = [
    "AcquireTimeout",
    "BlockedLoopWarning",
    "CallTimeout",
    "ClosedError",
    "ConfigError",
    "ConnectionBudgetWarning",
    "DuplicatePoolWarning",
    "LoopMismatchError",
    "LoopPerCallWarning",
    "LostWorkError",
    "MissingDependencyError",
    "NoConnectionError",
    "NotOpenError",
    "OpenError",
    "PoolkeeperError",
    "QueryTimeout",
    "ReleasedConnectionError",
    "SelfDeadlockError",
    "TooManyWaitersError",
    "UnclosedManagerWarning",
]

_Error = TypeVar("_Error", bound=BaseException)
_Method = TypeVar("_Method", bound=Callable[..., Any])

DOCS = "https://poolkeeper.readthedocs.io"
"""Where the pages are read; messages and the command line have it from here."""


def see(anchor: str, about: str = "") -> str:
    """
    Return the sentence that sends a reader to the docs of one error, on the site and offline.

    Args:
        anchor: Of the error.
        about: What to explain, if there is something more to the point.
    """
    return f"{see_site(anchor)} or run: poolkeeper explain {about or anchor}"


def see_site(anchor: str) -> str:
    """Return the sentence for where the command line does not run, for nothing can be imported."""
    return f"See {DOCS}/errors#{anchor}"


class PoolkeeperError(Exception):
    """
    Base of every error raised by poolkeeper.

    ``str()`` gives the message, then a DETAIL and a HINT line where there are any.

    .. versionadded:: 0.1.0
    """

    detail: str | None
    """Facts in full sentences: where the pool was opened, where it was used, numbers."""

    hint: str | None
    """What to do about it; marked "Probably" where it is a guess."""

    def __init__(
        self, message: str = "", *, detail: str | None = None, hint: str | None = None
    ) -> None:
        super().__init__(message)
        self.detail = detail
        self.hint = hint

    def __str__(self) -> str:
        lines = [str(self.args[0]) if self.args else ""]
        if self.detail:
            lines.append(f"DETAIL:  {self.detail}")
        if self.hint:
            lines.append(f"HINT:  {self.hint}")
        return "\n".join(lines)


def see_page(page: str) -> str:
    """Return the sentence that sends a reader to a page of the docs."""
    return f"See {DOCS}/{page}"


def briefly(method: _Method) -> _Method:
    """
    Let the traceback of an error of ours end at the line that has called *method*, and here.

    What lies between is of no use to whoever reads it, and would be most of what there is to read.
    """
    if not iscoroutinefunction(method):

        @wraps(method)
        def make(*args: Any, **kwargs: Any) -> Any:
            try:
                return method(*args, **kwargs)
            except PoolkeeperError as ex:
                raise ex.with_traceback(None)  # noqa: B904 - it is the same

        return cast(_Method, make)

    @wraps(method)
    async def call(*args: Any, **kwargs: Any) -> Any:
        try:
            return await method(*args, **kwargs)
        except PoolkeeperError as ex:
            raise ex.with_traceback(None)  # noqa: B904 - it is the same

    return cast(_Method, call)


def hide_from_pytest() -> None:
    """
    Let pytest leave out of a traceback what lies in our modules, as many as are loaded.

    It looks for ``__tracebackhide__`` among the names of a module, too.
    """
    package = __name__.partition(".")[0]
    for name, module in sys.modules.copy().items():
        if name.startswith(package) and name.partition(".")[0] == package:
            vars(module)["__tracebackhide__"] = _says_itself


def _says_itself(excinfo: Any) -> bool:
    """Tell whether the error says itself what is wrong: not where the fault may be ours."""
    return isinstance(getattr(excinfo, "value", None), PoolkeeperError | psycopg.Error)


def another(error: _Error) -> _Error:
    """Return one like *error* for one more task: who raises it writes a traceback into it."""
    other = copy(error)
    other.__cause__ = error.__cause__
    return other


class ConfigError(PoolkeeperError, ValueError):
    """A parameter has a value that cannot work. Names the parameter."""

    parameter: str | None
    """Name of the offending parameter."""

    def __init__(self, message: str = "", *, parameter: str | None = None, **fields: Any) -> None:
        super().__init__(message, **fields)
        self.parameter = parameter


class LoopMismatchError(PoolkeeperError, RuntimeError):
    """
    The pool, or a connection of it, was used where it does not belong.

    Another event loop, a loop that is closed, no loop at all, a forked process, or a loop
    that psycopg cannot use. Subclasses `RuntimeError`, asyncio's own type for this.
    """


class NotOpenError(PoolkeeperError, PoolClosed):
    """The pool was used before it was opened."""


class ClosedError(PoolkeeperError, PoolClosed):
    """The pool was used after it was closed, or was closed while the caller waited."""


class OpenError(PoolkeeperError, PoolTimeout):
    """
    The pool could not be opened; ``__cause__`` is the server's own reason where it gave one.

    Also a `PoolTimeout`, which is what ``wait()`` and ``open(wait=True)`` of a bare
    pool raise, and a `psycopg.OperationalError`, as that is.
    """

    kind: str = "no connection can be made"
    """Why, for strangers: what kind of reason it is, without host, port, user or database."""


class NoConnectionError(PoolkeeperError):
    """
    No connection could be had, now: `AcquireTimeout` or `TooManyWaitersError`.

    What a web application answers with 503; the adapters have a handler for it, ``exhausted``.
    """


class AcquireTimeout(NoConnectionError, PoolTimeout):
    """No connection became free in time; ``__cause__`` is the last connect failure, if any."""

    detail: str | None
    hint: str | None
    diagnosis: _facts.Diagnosis | None
    """Why: the likely cause, its evidence and the snapshot it was made from."""

    _tell: Callable[[], tuple[str, str, str, _facts.Diagnosis]]
    """What finds the words, from facts of the moment in which it was made; gone when it has."""

    def __init__(
        self, message: str = "", *, diagnosis: _facts.Diagnosis | None = None, **fields: Any
    ) -> None:
        super().__init__(message, **fields)
        self.diagnosis = diagnosis

    @classmethod
    def told_later(cls, tell: Callable[[], tuple[str, str, str, _facts.Diagnosis]]) -> Self:
        """
        Return an error that looks for its words when somebody reads it.

        Most are caught for what they are, and to find the words costs more than the refusal.
        """
        error = cls()
        for name in _TOLD:
            del error.__dict__[name]
        error._tell = tell
        return error

    def _find_words(self) -> None:
        if (tell := self.__dict__.get("_tell")) is not None:
            message, self.detail, self.hint, self.diagnosis = tell()
            _ARGS.__set__(self, (message,))
            self.__dict__.pop("_tell", None)  # another thread may have read it meanwhile

    if not TYPE_CHECKING:  # for it, these are what they are for every exception

        @property
        def args(self):
            """What every exception has: the message."""
            self._find_words()
            return _ARGS.__get__(self)

        @args.setter
        def args(self, args):
            self._find_words()
            _ARGS.__set__(self, args)

        def __getattr__(self, name):
            if name in _TOLD and "_tell" in self.__dict__:
                self._find_words()
                return self.__dict__[name]
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    @override
    def __repr__(self) -> str:
        self._find_words()
        return super().__repr__()

    @override
    def __reduce__(self) -> Any:
        self._find_words()
        return super().__reduce__()


_ARGS: Any = BaseException.args
_TOLD = ("detail", "hint", "diagnosis")


class SelfDeadlockError(AcquireTimeout):
    """
    Every connection is held by a task that waits for one more, and the caller was the last.

    Raised within a second, if none of them has stopped waiting by then: more time could only end
    in time-outs.
    """


class TooManyWaitersError(NoConnectionError, TooManyRequests):
    """``max_waiting`` tasks are waiting for a connection already."""


class QueryTimeout(PoolkeeperError, psycopg.errors.QueryCanceled):
    """
    A statement has taken longer than its ``query_timeout``, and was stopped.

    Also what psycopg raises for the server's own ``statement_timeout``.
    """


class CallTimeout(PoolkeeperError, TimeoutError):
    """A call through a `Portal` has taken longer than its ``timeout``; its task has ended."""


class ReleasedConnectionError(PoolkeeperError, psycopg.InterfaceError):
    """A connection, or something made from it, was used or returned after it was given back."""


class LostWorkError(PoolkeeperError, psycopg.OperationalError):
    """A block has ended without an error, but its connection was lost with a transaction open."""


class MissingDependencyError(PoolkeeperError, ImportError):
    """
    A dependency is not installed, or not in a version that works. Names what to install.

    An extra, for what is optional; for psycopg_pool both versions, when poolkeeper is imported.
    """


class UnclosedManagerWarning(ResourceWarning):
    """A manager was garbage-collected while its pool was open."""


class DuplicatePoolWarning(UserWarning):
    """A second pool was opened for the same server, database and user on the same loop."""


class BlockedLoopWarning(UserWarning):
    """A `Portal` was called where an event loop runs, which stood still meanwhile."""


class LoopPerCallWarning(UserWarning):
    """One line of the program runs one event loop after the other, each with a pool of its own."""


class ConnectionBudgetWarning(UserWarning):
    """The processes of a program may ask for more connections than the server has for them."""
