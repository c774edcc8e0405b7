"""
How a one-shot is sent on a lane: prepared as psycopg would, and with a sync of its own.

What is prepared, psycopg's own `PrepareManager` of the connection says, and is told.
"""
# A statement is sent with what psycopg's cursors use.
# pyright: reportPrivateUsage=false

from __future__ import annotations

from typing import Any

from psycopg import capabilities, pq
from psycopg._preparing import Prepare, PrepareManager
from psycopg._queries import PostgresQuery

from ._asked import Asked, cuts_short
from ._converting import are_large
from ._lane import Lane

TEXT = pq.Format.TEXT

GUARD = b"select pg_catalog.set_config('transaction_read_only', 'on', true)"
"""What goes before the copy of a statement, in its transaction, so that it writes nothing."""


def send(lane: Lane, asked: Asked, query: Any, params: Any, factory: Any) -> bool:
    """
    Convert and send a statement; False if it is too large to be sent behind others.

    Raises:
        psycopg.Error, or what the user's dumpers raise: It cannot be converted.
    """
    conn, pgconn = lane.conn, lane.pgconn
    converted = lane.converter.converted(asked, query, params, factory or conn.row_factory)
    values, converted.params = converted.params, None  # it is kept
    if values and are_large(values):
        if lane.under_way:
            return False
        lane.closed = True
    prepared: PrepareManager = conn._prepared
    key = PrepareManager.key(converted)
    lane.prepare_to_send(asked)
    try:
        if prepared._to_flush:
            _deallocate(lane, prepared)
        if asked.guarded:
            pgconn.send_query_params(GUARD, None)
        if (name := prepared._names.get(key)) and prepared.prepare_threshold is not None:
            # As PrepareManager's methods do, which are for all cases.
            prepared._names.move_to_end(key)
            asked.name = name
            pgconn.send_query_prepared(
                name, values, param_formats=converted.formats, result_format=TEXT
            )
            lane.sync(asked)
        else:
            _send_new(lane, asked, converted, values, prepared)
    except BaseException as ex:
        if not asked.since and (asked.guarded or cuts_short(ex)):
            lane.torn(ex)  # some of it may have been sent, without a sync
        raise
    return True


def _send_new(
    lane: Lane, asked: Asked, converted: PostgresQuery, values: Any, prepared: PrepareManager
) -> None:
    """Send what is not prepared yet, but may be from now on."""
    prepare, name = prepared.get(converted)
    if prepare is Prepare.SHOULD:
        _prepare(lane, asked, converted, values, name)
    else:
        lane.pgconn.send_query_params(
            converted.query, values,
            param_types=converted.types, param_formats=converted.formats, result_format=TEXT,
        )  # fmt: skip
    lane.sync(asked)
    if (key := prepared.maybe_add_to_cache(converted, prepare, name)) is not None:
        asked.entry = (key, prepare, name)


def _prepare(lane: Lane, asked: Asked, converted: PostgresQuery, values: Any, name: bytes) -> None:
    lane.pgconn.send_prepare(name, converted.query, param_types=converted.types)
    asked.name = name
    asked.prepares = True
    asked.entry = (PrepareManager.key(converted), Prepare.SHOULD, name)
    try:
        lane.pgconn.send_query_prepared(
            name, values, param_formats=converted.formats, result_format=TEXT
        )
    except BaseException:
        asked.left = True  # what was sent has an end
        lane.sync(asked)
        raise


def _deallocate(lane: Lane, prepared: PrepareManager) -> None:
    """Let the server forget what psycopg has forgotten, before anything new is prepared."""
    while prepared._to_flush:
        name = prepared._to_flush.popleft()
        # As psycopg does: PgBouncer takes this one, but no DEALLOCATE of one name.
        if name is not None and capabilities.has_send_close_prepared():
            lane.pgconn.send_close_prepared(name)
        else:
            what = b"ALL" if name is None else name
            lane.pgconn.send_query_params(b"DEALLOCATE " + what, None)
        lane.sync_for_nobody()
