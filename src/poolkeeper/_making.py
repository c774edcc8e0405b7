"""
Making connections: from what the user says a connection is made with to one that is the pool's.

When one is made is the business of the `Connector`, in whose tasks all this runs. A cancellation
ends it at any point and leaves nothing behind; so does an error, which is noted as the attempt's
and told to those who wait in vain.
"""

from __future__ import annotations

import asyncio
from functools import partial
from inspect import isawaitable
from random import random
from time import monotonic
from traceback import clear_frames
from typing import Any

from psycopg import pq

from . import _attempt, _cleaning, _compat, _reporting
from ._attempt import Failure
from ._conninfo import normalise, parse
from ._ending import dismiss, end_session
from ._life import Life
from ._log import log
from ._releasing import called
from ._status import IDLE
from ._stock import count_made, in_need
from ._words import raised_by
from .errors import AcquireTimeout, ConfigError, see

OF_NULL_POOL = 32
"""How many connections a null pool may make at once, at least."""

YOUNGER = 0.05
"""By how much of `max_lifetime`, at most, one is replaced sooner, for not all to be at once."""


async def connect_beside(life: Life) -> Any:
    """Make a connection that is neither configured nor counted."""
    return await _connect(life, *await _parameters(life))


async def _parameters(life: Life) -> tuple[str, dict[str, Any]]:
    """Return what one connection is to be made with."""
    conninfo = await _given("conninfo", life.pool.conninfo)
    return conninfo or "", await _given("kwargs", life.pool.kwargs) or {}


async def _given(name: str, value: Any) -> Any:
    """Return *value*, or what it returns if it is a function of the user's, async or not."""
    if not callable(value):
        return value
    attempt = _attempt.attempt_here()
    attempt.now(f"in the {name} function", value)
    given = value()
    if isawaitable(given):
        given = await given
    attempt.now(_attempt.SERVER)  # not if it raises: it is known by that who did
    return given


async def _connect(life: Life, conninfo: str, kwargs: dict[str, Any]) -> Any:
    conninfo = normalise(conninfo)
    # What a function returned: psycopg's own error may quote the password.
    _attempt.attempt_here().params = {**parse(conninfo), **kwargs}
    kwargs = dict(kwargs)
    if life.application_name is not None:
        kwargs["application_name"] = life.application_name
    else:
        # libpq uses it where neither conninfo nor PGAPPNAME says otherwise.
        kwargs.setdefault("fallback_application_name", life.front.session_name)
    # By the user's class, as psycopg_pool would: it and what it makes may be patched.
    try:
        made = await life.pool.connection_class.connect(conninfo, **kwargs)
    except asyncio.CancelledError as ex:
        # Its frames hold the socket, and whoever keeps the cancelled task holds the frames.
        _clear_frames(ex)
        raise
    conn = life.classes.bind(made)
    life.sessions.add(conn._session)
    return conn


class Maker:
    """Makes the connections of one life, when its `Connector` says so; see `_recovery.Pool`."""

    def __init__(self, life: Life) -> None:
        self._life = life
        self.name = life.name

    @property
    def num_workers(self) -> int:
        """How many may be made at once."""
        number = self._life.pool.num_workers
        # A null pool makes one for each acquire, and psycopg_pool's as many as there are of these.
        return number if self._life.keeps else max(number, OF_NULL_POOL)

    async def make_connection(self) -> None:
        """Make one connection, configure it and add it to the pool."""
        life = self._life
        counters = life.counters
        counters.count("connections_num")
        conninfo, kwargs = await _parameters(life)
        began = monotonic()
        try:
            conn = await _connect(life, conninfo, kwargs)
        except Exception:
            counters.count("connections_errors")
            raise
        counters.count("connections_ms", int((monotonic() - began) * 1000))
        life.connector.answered()
        if not await self._meet(conn, kwargs):
            conn = await _connect(life, conninfo, kwargs)
            await self._meet(conn, kwargs)
        _compat.set_owner(conn, life.pool)
        await self._configure(conn)
        session = conn._session
        session.expires_at = monotonic() + life.pool.max_lifetime * (1.0 - YOUNGER * random())
        session.settle(conn)
        connected = partial(
            life.listeners.tell,
            "connected",
            seconds=session.made_at - began,
            backend_pid=session.backend_pid,
        )
        # Another attempt, made beside this one, may have been faster.
        if life.ending or not life.connector.claim():
            connected()
            dismiss(life, conn, "closing" if life.ending else "not needed")
            return
        _compat.set_owner(conn, None)
        life.give(conn)
        count_made(life)
        connected()
        life.note_made()
        if not life.openers:
            life.front.tell_later(life.max_size, life.opened.site)

    async def _meet(self, conn: Any, kwargs: dict[str, Any]) -> bool:
        """Find out what it can tell; False if that has cost it, which happens once."""
        met = False
        try:
            met = await self._life.front.meet(conn, kwargs)
        finally:
            if not met:
                end_session(conn._session)
        return met

    async def _configure(self, conn: Any) -> None:
        life = self._life
        attempt = _attempt.attempt_here()
        try:
            if life.configure is not None:
                attempt.now("in the configure callback", life.configure)
                await called("configure", life.configure, conn)
                attempt.now(_attempt.SERVER)
                if (status := conn.pgconn.transaction_status) != IDLE:
                    raise ConfigError(
                        "the configure callback left the connection in status"
                        f" {pq.TransactionStatus(status).name}: commit at its end, or set"
                        " autocommit",
                        parameter="configure",
                        hint=see("config"),
                    )
                await _cleaning.note_configured(conn)
        except BaseException:
            # It is dropped, but the traceback of what we keep holds on to it.
            end_session(conn._session)
            raise

    def may_start_tasks(self) -> bool:
        """Tell whether a task that is started now is not one that asyncio.run() will miss."""
        return self._life.tasks.may_start()

    def spare_attempts(self, wanted: int) -> int:
        """Give up as many of *wanted* attempts as nobody needs any more, and return how many."""
        life = self._life
        needed = min(life.max_size, max(life.min_size, life.made + len(life.line)))
        spare = max(0, min(wanted, life.total - needed))
        if spare:
            life.growing = False
        return spare

    def in_need(self) -> bool:
        """Tell whether somebody waits, and there is no connection that may come back."""
        return in_need(self._life)

    def room(self) -> int:
        """Return how many attempts may be under way: `max_size` less the connections there are."""
        return self._life.max_size - self._life.made

    def connect_failed(self, failure: Failure, began: float) -> None:
        """Note that an attempt has failed; the connector goes on by itself."""
        life = self._life
        life.listeners.tell(
            "connect_failed",
            seconds=monotonic() - began,
            reason=failure.words,
            kind=failure.kind,
            permanent=failure.is_permanent,
            attempts_failed=life.connector.failures,
        )
        if life.openers and failure.is_permanent:
            life.openers.tell(_reporting.open_error(life, None))
        elif life.connector.failures == 1:
            life.outage_told = False
            left = life.openers.until - monotonic()
            waits = f", open() waits for {left:.1f} s more" if life.openers else ""
            life.tell(
                "outage_began",
                _reporting.counts(life),
                reason=failure.words,
                kind=failure.kind,
                then=f"trying again until one can{waits}",
                hint=f"{failure.advice} {see('open', 'open' if life.openers else 'server')}",
            )
        if failure.is_permanent and not life.made:
            _refuse_waiters(life, failure, began)

    def outage_over(self, seconds: float, attempts_failed: int) -> None:
        """Note that connections can be made again."""
        self._life.tell("outage_over", outage_seconds=seconds, attempts_failed=attempts_failed)

    def outage_goes_on(self, seconds: float) -> None:
        """Call `reconnect_failed` once for an outage that is longer than `reconnect_timeout`."""
        life = self._life
        if not life.outage_told and seconds > life.pool.reconnect_timeout:
            life.outage_told = True
            life.tasks.start(self._tell_reconnect_failed)

    async def _tell_reconnect_failed(self) -> None:
        try:
            await self._life.pool.reconnect_failed()
        except Exception as ex:
            reason = raised_by("the reconnect_failed callback", ex)
            log("callback_failed", pool=self.name, reason=reason)


def _refuse_waiters(life: Life, failure: Failure, began: float) -> None:
    """Tell those who wait in vain: an attempt that *began* later has failed, for good."""
    waiters = [waiter for waiter in life.line if waiter.since <= began]
    if not waiters:
        return
    diagnosis = _reporting.diagnose(life)
    for waiter in waiters:
        life.line.leave(waiter)
        error = AcquireTimeout(
            f'cannot acquire a connection from pool "{life.name}": {failure.words}',
            detail=diagnosis.detail,
            hint=f"{failure.advice} {see('acquire-timeout')}",
            diagnosis=diagnosis,
        )
        error.__cause__ = failure.error
        waiter.refuse(error)


def _clear_frames(error: BaseException | None) -> None:
    """Let go of what the functions that *error* has ended had in their variables."""
    while error is not None:
        clear_frames(error.__traceback__)
        error = error.__context__
