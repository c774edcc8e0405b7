"""
The classes of the connections of a pool, made from what the user's ``connect()`` returns.

Connections are made by the user's class, as psycopg_pool would make them, and become the pool's
afterwards: `BoundClasses` assigns them a subclass of their class, made by `bound_class()`.
"""
# A connection becomes the pool's by the attributes that make it one.
# pyright: reportPrivateUsage=false

from __future__ import annotations

import weakref
from collections.abc import Iterable
from types import MemberDescriptorType
from typing import Any, cast

from psycopg import AsyncConnection
from psycopg._connection_base import BaseConnection

from ._binding import LoopBinding
from ._connection import (
    BoundConnection,
    BoundLock,
    GuardedWait,
    Keeper,
    ReleasedConnection,
    RevokedConnection,
    ShownConnection,
)
from ._proxies import makers, unwrapped
from ._session import DressedSession, Handle, Session
from ._waiting import WaitingConnection
from ._words import in_words
from .errors import ConfigError, see


def bound_class(
    user_class: type[AsyncConnection[Any]], keeper: Keeper, binding: LoopBinding | None
) -> type[BoundConnection]:
    """Return a subclass of *user_class* whose connections belong to *keeper* and *binding*."""

    def derive(prefix: str, *bases: type, **namespace: Any) -> Any:
        name = f"{prefix}{user_class.__name__}"
        return type(name, bases, {"__module__": "poolkeeper", "__qualname__": name, **namespace})

    # The user's wait(), if it has one, calls ours in place of psycopg's.
    users = () if user_class is AsyncConnection else (user_class,)
    bound = derive(
        "Bound",
        *(() if _leaves_to_psycopg(user_class, "wait") else (GuardedWait,)),
        BoundConnection,
        *users,
        WaitingConnection,
        _user_class=user_class,
        _keeper=weakref.ref(keeper),
        _binding=binding,
    )
    bound.exits_like_psycopg = _leaves_to_psycopg(user_class, "__aexit__", "commit", "rollback")
    bound.closes_like_psycopg = _leaves_to_psycopg(user_class, "close")
    bound.sets_like_psycopg = _leaves_to_psycopg(
        user_class, "set_autocommit", "_set_autocommit_gen", "autocommit"
    )
    bound.runs_like_psycopg = bound.sets_like_psycopg and _leaves_to_psycopg(
        user_class, "wait", "cursor", "execute", "adapters", "_start_query", "_notice_handler"
    )
    bound._lock_class = type("BoundLock", (BoundLock,), {"_binding": binding})
    bound._released_class = derive("Released", ReleasedConnection, bound)
    bound._revoked_class = derive("Revoked", RevokedConnection, bound)
    bound._shown_class = derive("Shown", ShownConnection, bound)
    return cast("type[BoundConnection]", bound)


def _leaves_to_psycopg(user_class: type[AsyncConnection[Any]], *methods: str) -> bool:
    return all(getattr(user_class, name) is getattr(AsyncConnection, name) for name in methods)


_OURS = frozenset(
    name
    for cls in (BoundConnection, Handle)
    for name in (*cls.__annotations__, *vars(cls))
    if not name.startswith("__") and not hasattr(AsyncConnection, name)
)
"""Names of attributes that a connection must not have of its own."""


def require_class(user_class: type[AsyncConnection[Any]]) -> None:
    """
    Return if a pool can have connections of *user_class*.

    Raises:
        ConfigError: If it cannot.
    """
    try:
        _check_class(user_class)
    except TypeError as ex:
        raise ConfigError(
            f"connection_class cannot be {user_class!r}",
            parameter="connection_class",
            detail=f"Connections of it cannot be handed out: {ex}.",
            hint=see("config"),
        ) from ex


def _check_class(user_class: type[AsyncConnection[Any]]) -> None:
    _check_names(name for name in _OURS if hasattr(user_class, name))
    try:
        retired = bound_class(user_class, cast(Any, BoundConnection), None)._released_class
        object.__new__(retired)  # of a class that has no __del__() of the user's
    except Exception as ex:
        raise TypeError(f"no subclass of it can be made and used: {in_words(ex)}") from ex


def _check_names(taken: Iterable[str]) -> None:
    if names := ", ".join(sorted(taken)):
        raise TypeError(f"it has {names}, which poolkeeper needs for itself")


class BoundClasses:
    """
    The bound classes of one life of a pool, by the class of the connections that they are for.

    Connections are made by the user's class, as psycopg_pool would make them, and become the
    pool's afterwards. So ``connect()`` may be patched, and return what it likes: a connection of
    another class, or one in a proxy.
    """

    def __init__(self, keeper: Keeper, binding: LoopBinding) -> None:
        self._keeper = keeper
        self._binding = binding
        self._by_user_class: dict[type, type[BoundConnection]] = {}

    def bind(self, given: Any) -> Any:
        """
        Make *given*, which the user's ``connect()`` returned, a connection of the pool.

        Returns:
            What to call it by: itself, or a proxy like the one that it came in.

        Raises:
            ConfigError: If it cannot be one.
        """
        conn, proxies = unwrapped(given, AsyncConnection)
        kind: Any = cast(Any, type(conn))
        try:
            bound = self._by_user_class.get(kind)
            if bound is None:
                bound = self._by_user_class[kind] = self._bound(kind)
            _check_names(name for name in _OURS if name in vars(conn))
            conn.__class__ = bound
        except TypeError as ex:
            if isinstance(conn, BaseConnection) and not isinstance(conn, BoundConnection):
                conn.pgconn.finish()
            raise ConfigError(
                f"connect() returned a {kind.__module__}.{kind.__qualname__}, which cannot be kept"
                f" in a pool: {ex}",
                parameter="connection_class",
                detail="It is connect() of the connection_class, or what has taken its place.",
                hint=f"Let it return a psycopg.AsyncConnection of its own. {see('config')}",
            ) from ex
        conn.lock = bound._lock_class()
        slots = _slots(kind)
        if not proxies and not slots:
            conn._session = Session(conn)
            return conn
        stand_in = object.__new__(bound._released_class)
        conn._session = session = DressedSession(conn, slots, makers(proxies, conn, stand_in))
        return session.dressed(conn)

    def _bound(self, kind: Any) -> type[BoundConnection]:
        if BoundConnection in kind.__mro__:
            raise TypeError("it is a pool's already")
        if AsyncConnection not in kind.__mro__:
            raise TypeError("that is no psycopg.AsyncConnection")
        _check_class(kind)
        return bound_class(kind, self._keeper, self._binding)


def _slots(kind: type) -> list[Any]:
    """Return the descriptors of what an object of *kind* keeps in ``__slots__``."""
    return [
        attribute
        for cls in kind.__mro__
        for attribute in vars(cls).values()
        if isinstance(attribute, MemberDescriptorType)
    ]
