"""
Server sessions, and the handles that stand for them.

What a borrower holds is a *handle*: one connection object for one checkout. When it is given
back, `Session.successor()` makes a new object of the same class over the same server session,
from a template taken after ``configure``, and `retire()` turns the old one into an object that
refuses everything. So a late use is refused even when the session is somebody else's by then,
and what a borrower changed on the object is gone with the object.
"""
# A handle is made from the attributes that psycopg gives a connection.
# pyright: reportPrivateUsage=false

from __future__ import annotations

import asyncio
import select
import socket
import weakref
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from math import inf
from time import monotonic
from typing import Any, ClassVar, TypeVar, cast

from psycopg import AsyncConnection, OperationalError, pq
from psycopg._connection_base import BaseConnection
from psycopg.adapt import AdaptersMap
from typing_extensions import override

from ._binding import LoopBinding
from ._checkouts import Checkout
from ._status import BAD, UNKNOWN
from ._wire import Wire

H = TypeVar("H", bound="Handle")

_new = object.__new__  # a class of the user's may want arguments
_set_attribute = object.__setattr__  # or think twice

# Parameters of a session that PostgreSQL reports when they change (search_path: since 18): those
# that a client can change, and the two that tell a server that takes writes from one that does
# not. Documented in "Asynchronous Operations", protocol chapter.
REPORTED_PARAMETERS = (
    b"client_encoding",
    b"DateStyle",
    b"IntervalStyle",
    b"TimeZone",
    b"application_name",
    b"search_path",
    b"default_transaction_read_only",
    b"standard_conforming_strings",
    b"session_authorization",
    b"is_superuser",
    b"in_hot_standby",
)

READ_ONLY = b"default_transaction_read_only"
SEARCH_PATH = b"search_path"
STANDBY = b"in_hot_standby"  # the server's alone to change, "on" until it is promoted
KIND_PARAMETERS = frozenset({READ_ONLY, STANDBY})
"""What tells one kind of server from another; reported since PostgreSQL 14."""

LATELY = 0.001
"""Seconds for which parameters that only the server can have changed are not looked at again."""

DRAINED, MOVED = 0.0, -1.0
"""When a session expires that is to be replaced: because all are; because its server changed."""

_READ_ONLY, _STANDBY = _KIND = [REPORTED_PARAMETERS.index(name) for name in (READ_ONLY, STANDBY)]


class Handle(AsyncConnection[Any]):
    """What a session relies on in the connection objects that stand for it."""

    _binding: ClassVar[LoopBinding]
    _lock_class: ClassVar[type[asyncio.Lock]]
    _released_class: ClassVar[type[Any]]
    _revoked_class: ClassVar[type[Any]]
    _shown_class: ClassVar[type[Any]]

    _session: Session
    _checkout: Checkout | None = None


class Session:
    """
    One server session, whichever handle stands for it now.

    Attributes:
        checkout: Who holds it; None while nobody does.
        configured: The reported parameters that ``configure`` has set.
        converts_like_psycopg: True if all adapters are psycopg's own.
        expires_at: From when on it is to be replaced.
        in_question: True if another session was found on a server that has become another kind,
            and this one was not looked at yet.
        in_pool: True while the pool counts it, so that it must not be lost.
        backend_pid: Process number on the server.
        lane: On which one-shots use it, kept for the next of them; it knows nothing of the session
            meanwhile.
        looked_at: When `unchanged_lately()` has looked; 0.0 in doubt.
        made_at: When it joined the pool.
        returned: The checkout that has ended last, until the session is put right.
        streamed: True if libpq may have been told to give each row as a result of its own.
        unlocked: Done when the transaction of who gave it back last is over, if one was open.
        heard_at: When an exchange with the server ended last, or its socket was found quiet.
        wire: Its socket, as the event loop sees it.
    """

    __slots__ = (
        "__weakref__",
        "_adapters",
        "_expected",
        "_fixed",
        "_handle",
        "_notice_handlers",
        "_notify_handlers",
        "_parameters",
        "_poll",
        "_prepare",
        "backend_pid",
        "checkout",
        "configured",
        "converts_like_psycopg",
        "expires_at",
        "heard_at",
        "in_pool",
        "in_question",
        "lane",
        "looked_at",
        "made_at",
        "pgconn",
        "returned",
        "streamed",
        "unlocked",
        "wire",
    )

    def __init__(self, conn: Handle) -> None:
        self.pgconn = conn.pgconn
        self.wire = Wire(conn.pgconn.socket, conn._binding)
        self.configured: frozenset[bytes] = frozenset()
        self._parameters = self._reported_parameters()
        self.accept_parameters()
        self.heard_at = self.looked_at = 0.0
        self.expires_at = inf
        self.checkout: Checkout | None = None
        self.returned: Checkout | None = None
        self.in_pool = self.streamed = False
        self.unlocked: asyncio.Future[None] | None = None
        self._handle = weakref.ref(conn)

    @property
    def handle(self) -> Any:
        """The handle that stands for the session; None if it was dropped."""
        return self._handle()

    def settle(self, conn: Handle) -> None:
        """
        Remember *conn* as it is: what every later borrower shall find.

        Called when it joins the pool, so after ``configure``.
        """
        conn._adapters = SharedAdapters(conn.adapters)
        self._adapters = AdaptersMap(conn._adapters)
        self.converts_like_psycopg = _are_psycopgs(self._adapters)
        self._notice_handlers = conn._notice_handlers.copy()
        self._notify_handlers = conn._notify_handlers.copy()
        self._prepare = (conn._prepared.prepare_threshold, conn._prepared.prepared_max)
        self.accept_parameters()
        self._poll = _poll_for(conn.pgconn.socket)
        # Bound once to whichever handle is current, not to each handle in turn. Through a weak
        # reference, so that a connection that is dropped is gone at once.
        current = _CurrentHandle(weakref.ref(self))
        conn.pgconn.notice_handler = partial(BaseConnection._notice_handler, cast(Any, current))
        conn.pgconn.notify_handler = partial(BaseConnection._notify_handler, cast(Any, current))
        # All that successor() sets has a place in it, so that what is made of it need not grow.
        # None of it is the session, which would keep itself alive.
        fixed = dict(vars(conn), pgconn=conn.pgconn, _under_way=None)
        fixed.pop("_cancelling", None)
        for per_handle in (
            "_adapters", "_notice_handlers", "_notify_handlers", "_notifies_backlog", "_pool",
            "_checkout", "lock", "_session",
        ):  # fmt: skip
            fixed[per_handle] = None
        self._fixed = fixed
        self.in_pool = True
        self.made_at = monotonic()
        self.backend_pid = conn.pgconn.backend_pid

    def finish(self) -> None:
        """End the session at once. May be called from any thread, but not in a forked child."""
        self.wire.let_go()
        self.pgconn.finish()

    def __del__(self) -> None:
        # At once: what keeps the wire for a while is a timer, for the sake of who waits.
        if (wire := getattr(self, "wire", None)) is not None:
            wire.let_go()

    def is_quiet(self) -> bool:
        """
        Tell whether nothing has come from the server. Costs no round trip.

        An idle session that is not quiet was ended, or has something harmless to say.
        """
        return self.pgconn.status != BAD and not self._poll()

    def _reported_parameters(self) -> tuple[bytes | None, ...]:
        return tuple(map(self.pgconn.parameter_status, REPORTED_PARAMETERS))

    def changed_parameters(self) -> list[tuple[bytes, bytes | None]]:
        """Return the reported parameters that are not as they were, with what they were."""
        now = self._reported_parameters()
        return [
            (name, was)
            for name, was, value in zip(REPORTED_PARAMETERS, self._parameters, now, strict=True)
            if was != value
        ]

    @property
    def parameters_unchanged(self) -> bool:
        """True if every reported parameter is as it was, and no doubt. Costs no round trip."""
        return self._reported_parameters() == self._expected

    def unchanged_lately(self, now: float) -> bool:
        """Tell whether they are, or were within `LATELY`, which is cheaper."""
        if now < self.looked_at + LATELY:
            return True
        self.looked_at = now
        return self.parameters_unchanged

    def accept_parameters(self) -> bool:
        """
        Let the parameters be as they are now: whoever has changed them, no borrower has.

        Returns:
            True if the server is of another kind than it was.
        """
        same = self.same_kind
        self._parameters = now = self._reported_parameters()
        self._expected: tuple[bytes | None, ...] | None = now  # None while in doubt
        self.in_question = False
        self.lane: Any = None  # it converts by what they were
        return not same

    @property
    def same_kind(self) -> bool:
        """True if the server does not report that it has become another kind of server."""
        was, now = self._parameters, self.pgconn.parameter_status
        return now(READ_ONLY) == was[_READ_ONLY] and now(STANDBY) == was[_STANDBY]

    @property
    def kind(self) -> str:
        """What kind of server this is, in the server's words; "" if it does not say."""
        pairs = [(REPORTED_PARAMETERS[i], self._parameters[i]) for i in _KIND]
        return ", ".join(f"{name.decode()}={v.decode()}" for name, v in pairs if v is not None)

    def doubt(self) -> None:
        """Let the release look, whatever is reported: this may be the wrong server by now."""
        self._expected = None
        self.looked_at = 0.0

    def question(self) -> None:
        """Let it be looked at, because of another session, even if it comes back unused."""
        self.in_question = True
        self.doubt()
        if self.checkout is not None:
            self.checkout.used += 1

    @property
    def in_doubt(self) -> bool:
        """True if the release is to look, whatever is reported."""
        return self._expected is None

    @staticmethod
    def forget_prepared(conn: Handle) -> None:
        """
        Forget the prepared statements of the session: the server has, by DISCARD ALL.

        psycopg 3.3 looks for that command only the first time that it runs it.
        """
        conn._prepared.clear()
        conn._prepared._to_flush.clear()

    def forget_added_handlers(self, conn: Handle) -> None:
        """Take away the handlers that ``configure``, run again, added a second time."""
        conn._notice_handlers = list(self._notice_handlers)
        conn._notify_handlers = list(self._notify_handlers)

    def successor(self, conn: H) -> H:
        """
        Retire *conn*, which was given back, and return the next handle of the session.

        The new one is as the first one was when it left ``configure``.
        """
        cls = conn.__class__
        old = conn.__dict__
        new = self._fixed.copy()
        # A generator that was left half-way still holds the lock, and will let it go some day.
        lock = old["lock"]
        new["lock"] = cls._lock_class() if lock.locked() else lock
        new["_notice_handlers"] = self._notice_handlers.copy()
        new["_notify_handlers"] = self._notify_handlers.copy()
        backlog = old["_notifies_backlog"]
        new["_notifies_backlog"] = deque() if backlog or backlog is None else backlog
        adapters = old["_adapters"]
        new["_adapters"] = SharedAdapters(self._adapters) if adapters.handed_out else adapters
        prepared = old["_prepared"]
        threshold, most = self._prepare
        if prepared.prepare_threshold != threshold or prepared.prepared_max != most:
            prepared.prepare_threshold, prepared.prepared_max = threshold, most
        # What is above may be cut short; what is dropped with a session in it is taken back.
        new["_session"] = self
        fresh = _new(cls)
        _set_attribute(fresh, "__dict__", new)
        self._handle = weakref.ref(fresh)
        conn.__class__ = cls._released_class
        return fresh

    def in_place_of(self, conn: H) -> H:
        """Retire *conn*; return a handle like it, of the same checkout, with a lock of its own."""
        fresh = _new(conn.__class__)
        vars(fresh).update(vars(conn), lock=conn._lock_class())
        self._handle = weakref.ref(fresh)
        retire(conn)
        return fresh


class DressedSession(Session):
    """A session whose handles are more than their attributes: proxies around them, slots."""

    __slots__ = ("_makers", "_slots", "_values")

    def __init__(self, conn: Handle, slots: list[Any], makers: list[Callable[[Any], Any]]) -> None:
        super().__init__(conn)
        self._slots = slots
        self._makers = makers

    @override
    def settle(self, conn: Handle) -> None:
        super().settle(conn)
        handle = self.handle
        self._values = [
            (slot, slot.__get__(handle)) for slot in self._slots if _is_set(slot, handle)
        ]

    @override
    def successor(self, conn: H) -> H:
        fresh = super().successor(conn)
        for slot, value in self._values:
            slot.__set__(fresh, value)
        return self.dressed(fresh)

    @override
    def in_place_of(self, conn: H) -> H:
        was = self.handle
        fresh = super().in_place_of(conn)
        for slot in self._slots:
            if _is_set(slot, was):
                slot.__set__(fresh, slot.__get__(was))
        return self.dressed(fresh)

    def dressed(self, conn: H) -> H:
        """Return *conn* in its proxies."""
        dressed: Any = conn
        for make in self._makers:
            dressed = make(dressed)
        return cast(H, dressed)


def _is_set(slot: Any, conn: object) -> bool:
    try:
        slot.__get__(conn)
    except AttributeError:
        return False
    return True


class SharedAdapters(AdaptersMap):
    """An adapters map that the handles of a session share, as long as nobody else has it."""

    handed_out = False
    """True once anybody but psycopg's cursors, which copy it, was given it: he may keep it."""


def _are_psycopgs(adapters: AdaptersMap) -> bool:
    """Tell whether *adapters* have no class of anybody's but psycopg's."""
    kinds: Any = (*adapters._dumpers.values(), *adapters._dumpers_by_oid, *adapters._loaders)
    return all(map(_is_psycopgs, {cls for kind in kinds for cls in kind.values()}))


def _is_psycopgs(cls: type) -> bool:
    if cls.__module__ == "abc":  # made of others, by a call: for an enum, say, or an array
        return _ADAPTS.isdisjoint(vars(cls)) and all(map(_is_psycopgs, cls.__bases__))
    return cls.__module__.startswith(("psycopg.", "psycopg_binary.", "psycopg_c."))


_ADAPTS = frozenset({"__init__", "__new__", "dump", "get_key", "load", "quote", "upgrade"})


class _CurrentHandle:
    """Called, as a `weakref.ref` is, gives the handle that stands for a session now."""

    __slots__ = ("_session",)

    def __init__(self, session: weakref.ref[Session]) -> None:
        self._session = session

    def __call__(self) -> Handle | None:
        session = self._session()
        return session.handle if session is not None else None


def retire(conn: Handle) -> None:
    """Refuse every further use of *conn*, which was given back."""
    conn.__class__ = conn._released_class


def revoke(conn: Handle) -> None:
    """Refuse every further use of *conn*, whose session the pool closes."""
    conn.__class__ = conn._revoked_class


def remains(conn: H) -> H:
    """Return an object by which what runs on *conn* can be cancelled, whatever becomes of that."""
    last = _new(conn.__class__)
    vars(last).update(vars(conn), _checkout=None, _pool=None)
    del vars(last)["_session"]  # it is not the handle, and nothing is lost with it
    return last


class _Gone:
    """Stands for a connection of libpq's that is closed."""

    status = BAD
    pipeline_status = pq.PipelineStatus.OFF
    transaction_status = UNKNOWN


def part_from_pipeline(conn: Handle) -> None:
    """
    Take the session away from the pipeline of *conn*, which was given back in the middle of it.

    At its end psycopg's pipeline ends pipeline mode without a look at the connection (3.3.9).
    """
    if (pipeline := vars(conn).get("_pipeline")) is not None:
        pipeline.pgconn = _Gone


def _poll_for(fileno: int) -> Callable[[], object]:
    """Return a function that says, at once, whether *fileno* can be read."""
    if hasattr(select, "poll"):
        poller = select.poll()
        poller.register(fileno, select.POLLIN)
        return partial(poller.poll, 0)
    return lambda: select.select([fileno], [], [], 0)[0]  # Windows


def shut_down(pgconn: Any) -> None:
    """Shut the socket of *pgconn* down, if it has one; to close it is libpq's business."""
    with (
        suppress(OSError, OperationalError),
        socket.socket(fileno=socket.dup(pgconn.socket)) as duplicate,
    ):
        duplicate.shutdown(socket.SHUT_RDWR)
