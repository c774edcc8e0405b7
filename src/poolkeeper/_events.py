"""
Who is told what happens to a pool, and how: plainly, at once, and without harm to the pool.

A subscriber is called where something happens, in the very task, thread and context. What it
raises is logged and goes no further; that it takes long is logged. The records are those of
`events`, which is loaded by the first who subscribes: where nobody does, nothing is made, and
`Listeners.quiet` is all that an acquire looks at.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from functools import partial
from threading import get_ident
from time import monotonic
from types import CodeType, FrameType
from typing import Any, cast

from ._log import log
from ._where import Behalf, Code, Handler, asker, function_of, is_library, program_frame, site
from ._words import raised_by
from .errors import ConfigError

SLOW = 0.25
"""Seconds from which a subscriber is said to be slow, and not the machine."""

OF_FAILURES = frozenset({"acquire_timeout", "turned_away", "gave_up"})
"""The events of acquires that end in vain."""

OF_CHECKOUTS = frozenset({"acquired", "released"})
"""The events that each checkout has."""


class Listeners:
    """
    Those who have subscribed to one pool.

    Args:
        pool: Name of the pool.
        keeps_stacks: True if each acquire is more than a record anyway.

    Attributes:
        quiet: True if nobody wants to know more of a checkout than that it is there.
        of_checkouts: True if somebody wants the events of checkouts.
        want_queued: True if somebody wants to know who waits in line.
        want_failures: True if somebody wants those of acquires that end in vain.
    """

    def __init__(self, pool: str, keeps_stacks: bool = False) -> None:
        self.pool = pool
        self.quiet = not keeps_stacks
        self.of_checkouts = self.want_queued = self.want_failures = False
        self.records: Any = None
        """The module `events`, once somebody has subscribed."""
        self._keeps_stacks = keeps_stacks
        self._all: dict[Listener, None] = {}
        self._by_name: dict[str, tuple[Listener, ...]] = {}

    # --- who listens -------------------------------------------------------------------------

    def subscribe(
        self, callback: Callable[[Any], object], kinds: Iterable[type[Any]]
    ) -> Callable[[], None]:
        """Tell *callback* from now on, in any thread; see `PoolManager.subscribe()`."""
        from . import events

        listener = Listener(self.pool, callback, _names(callback, tuple(kinds), events.RECORDS))
        self.records = events
        self._all[listener] = None
        self._settle()
        return partial(self._unsubscribe, listener)

    def _unsubscribe(self, listener: Listener) -> None:
        listener.is_subscribed = False
        self._all.pop(listener, None)
        self._settle()

    def _settle(self) -> None:
        # Without a lock, which a fork could find held: who was not the last looks again.
        while True:
            everybody = tuple(self._all)
            names = {name for listener in everybody for name in listener.names}
            self._by_name = {
                name: tuple(one for one in everybody if name in one.names) for name in names
            }
            self.of_checkouts = bool(names & OF_CHECKOUTS)
            self.want_queued = "queued" in names
            self.want_failures = bool(names & OF_FAILURES)
            self.quiet = not self._keeps_stacks and not self.of_checkouts
            if everybody == tuple(self._all):
                return

    # --- what they are told ------------------------------------------------------------------

    def want(self, name: str) -> bool:
        """Tell whether anybody wants to be told of events of this *name*."""
        return name in self._by_name

    def tell(
        self,
        name: str,
        *facts: Mapping[str, Any],
        at: tuple[Code, int] | None = None,
        **fields: Any,
    ) -> None:
        """
        Tell of an event.

        Args:
            name: Its name.
            facts: Fields that somebody else knows. Those that the event has not are left out.
            at: The code and the line of who has asked for a connection, of an event that has a
                caller.
            fields: What is known of it.
        """
        if name not in self._by_name:
            return
        for some in facts:
            fields.update(some)
        if at is not None:
            fields["caller"] = self.caller(*at)
        fields["pool"] = self.pool
        record = self.records.RECORDS[name]
        # Those of its bases come first.
        self.send(record(**{n: fields[n] for n in record.__dataclass_fields__ if n in fields}))

    def send(self, event: Any) -> None:
        """Give *event* to those who want it, in the order in which they have subscribed."""
        for listener in self._by_name.get(event.event_name, ()):
            listener.hear(event)

    def caller(self, code: Code, lineno: int, frame: FrameType | Behalf | None = None) -> Any:
        """
        Return who asks for a connection, as events have it.

        Args:
            code: Where it is asked for.
            lineno: At which line of it.
            frame: The frame of that, while it runs: where it is a library's, the line of the
                program's that has called the library is told.
        """
        if isinstance(code, CodeType) and isinstance(frame, FrameType) and is_library(code):
            frame = program_frame(frame)
            code, lineno = frame.f_code, frame.f_lineno
        return _caller(self.records.Caller, code, lineno)


def listeners_of(pool: Any) -> Listeners:
    """Return those of *pool*, the same at all times; for all of its lives."""
    listeners = Listeners(pool.name, pool._options.leak_threshold is not None)
    return cast(Listeners, pool.__dict__.setdefault("_listeners", listeners))


class Listener:
    """One subscription."""

    __slots__ = ("_callback", "_inside", "_pool", "_slow", "_told", "is_subscribed", "names")

    def __init__(self, pool: str, callback: Callable[[Any], object], names: frozenset[str]) -> None:
        self.names = names
        """Those of the events that it wants."""
        self.is_subscribed = True
        self._pool = pool
        self._callback = callback
        self._inside = 0
        """The thread in which it is being called."""
        self._told: set[str] = set()
        """The events at which it failed, and that was logged."""
        self._slow = False

    def hear(self, event: Any) -> None:
        """Call the subscriber, whatever it does."""
        here = get_ident()
        # What its own doing causes it is not told: that might never end.
        if not self.is_subscribed or self._inside == here:
            return
        self._inside = here
        began = monotonic()
        try:
            given = self._callback(event)
            if given is not None and inspect.iscoroutine(given):
                given.close()
                raise _not_plain(self._callback)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as ex:
            self._log_failure(event.event_name, ex)
        finally:
            self._inside = 0
        if (seconds := monotonic() - began) >= SLOW and not self._slow:
            self._slow = True
            with suppress(Exception):
                log(
                    "subscriber_slow",
                    pool=self._pool,
                    subscriber=_name(self._callback),
                    told=event.event_name,
                    seconds=seconds,
                )

    def _log_failure(self, name: str, error: BaseException) -> None:
        # A filter or a handler of the user's may raise, too, and the stack may be at its end.
        with suppress(Exception):
            before = name in self._told
            self._told.add(name)
            who = _name(self._callback)
            log(
                "subscriber_failed",
                quietly=before,
                pool=self._pool,
                subscriber=who,
                told=name,
                reason=raised_by(f"the subscriber {who}", error),
            )


def _names(
    callback: object, kinds: tuple[object, ...], records: Mapping[str, type[Any]]
) -> frozenset[str]:
    """
    Return the names of the events of these *kinds*; of all if there is none.

    Raises:
        ConfigError: If this cannot be subscribed.
    """
    if not callable(callback):
        raise ConfigError(
            f"a subscriber must be a function that takes an event, not {type(callback).__name__}",
            parameter="callback",
        )
    target = _innermost(callback)
    if inspect.iscoroutinefunction(target) or inspect.iscoroutinefunction(type(target).__call__):
        raise _not_plain(callback)
    names: set[str] = set()
    for kind in kinds or (None,):
        of_kind = {
            name
            for name, record in records.items()
            if kind is None or (isinstance(kind, type) and issubclass(record, kind))
        }
        if not of_kind:
            raise ConfigError(
                f"cannot subscribe to {getattr(kind, '__name__', repr(kind))}: it is no kind of"
                " event",
                parameter="kinds",
                hint="The kinds are the classes in poolkeeper.events.",
            )
        names |= of_kind
    return frozenset(names)


def _not_plain(callback: object) -> ConfigError:
    return ConfigError(
        f"the subscriber {_name(callback)} is async: it must be a plain function",
        detail="It is called where something happens, and nobody would await it.",
        parameter="callback",
        hint="Let a plain function start a task, or put the event into an asyncio.Queue that a"
        " task of yours reads.",
    )


def _innermost(callback: Any) -> Any:
    while issubclass(type(callback), partial):
        callback = callback.func
    return callback


def _name(callback: object) -> str:
    """Return what a subscriber is called."""
    function = _innermost(callback)
    named = function if hasattr(function, "__qualname__") else cast(Any, type(function))
    return f"{named.__module__}.{named.__qualname__}"


MOST_CALLERS = 2000
"""How many places are kept in words; a program has some hundred."""

_callers: dict[tuple[object, ...], tuple[object, Any]] = {}


def _caller(make: Callable[..., Any], code: Code, lineno: int) -> Any:
    """Return what *make* makes of a place; the same for the same, for the words cost much."""
    # By its number: to hash a code object is to hash all that it is made of. It is kept, so that
    # no other one gets that number.
    if isinstance(code, Handler):
        within, method, route = code
    else:
        within, method, route = code, "", ""
    key = (id(within), lineno, method, route)
    known = _callers.get(key)
    if known is None:
        if len(_callers) >= MOST_CALLERS:
            _callers.clear()
        words = (site(code, lineno), function_of(code), method, route, asker(code, lineno))
        known = _callers[key] = (within, make(*words))
    return known[1]
