"""
Proxies around a connection, and others like them.

The agents of Datadog, New Relic and Elastic let ``AsyncConnection.connect()`` return a
`wrapt.ObjectProxy` around the connection, whose methods make spans. A handle is for one checkout,
so the handle of the next one needs a proxy of its own: one that still was the borrower's before
would let that one into somebody else's session.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, cast

from ._log import log


def unwrapped(given: Any, wanted: type) -> tuple[Any, list[Any]]:
    """Return what is inside of the proxies around a *wanted* object, and them, outermost first."""
    proxies: list[Any] = []
    while not issubclass(type(given), wanted):
        inside = getattr(given, "__wrapped__", None)
        if inside is None:
            break
        proxies.append(given)
        given = inside
    return given, proxies


def makers(proxies: list[Any], inside: Any, stand_in: object) -> list[Callable[[Any], Any]]:
    """
    Return functions that make others like *proxies*, innermost first.

    Args:
        proxies: As `unwrapped()` gives them. They are moulds from here on.
        inside: What is in them; it will do for a trial.
        stand_in: What they shall have in them from here on.
    """
    made: list[Callable[[Any], Any]] = []
    for proxy in reversed(proxies):
        kind: Any = cast(Any, type(proxy))
        if _can_be_made_anew(kind, proxy, inside):
            proxy.__wrapped__ = stand_in
            made.append(_maker(kind, proxy))
    return made


def _can_be_made_anew(kind: type, mould: Any, inside: Any) -> bool:
    """Tell whether *mould* is a proxy of wrapt's, or one that is made as those are."""
    try:
        trial = _maker(kind, mould)(inside)
        if trial.__wrapped__ is inside and trial.__class__ is type(inside):
            return True
    except Exception:
        pass
    _leave_out(kind)
    return False


@cache
def _leave_out(kind: type) -> None:
    log("proxy_left_out", proxy=f"{kind.__module__}.{kind.__qualname__}")


def _maker(kind: type, mould: Any) -> Callable[[Any], Any]:
    like = _like(kind)

    def make(inside: Any) -> Any:
        proxy = like.__new__(like)
        proxy.__wrapped__ = inside
        proxy._self_poolkeeper_mould = mould
        return proxy

    return make


@cache
def _like(kind: Any) -> Any:
    """
    Return a class of proxies that have the attributes of a mould as well.

    Source:
        wrapt 1.16 to 2.5: what an attribute whose name begins with ``_self_`` is set to is the
        proxy's, not that of what is inside, and what a proxy has not is asked of ``__getattr__``.
    """

    def __getattr__(proxy: Any, name: str) -> Any:  # noqa: N807
        if name.startswith("_self_") and name != "_self_poolkeeper_mould":
            try:
                return getattr(proxy._self_poolkeeper_mould, name)
            except AttributeError:
                pass
        return kind.__getattr__(proxy, name)

    names = {"__module__": kind.__module__, "__qualname__": kind.__qualname__}
    return type(kind)(kind.__name__, (kind,), {**names, "__getattr__": __getattr__})
