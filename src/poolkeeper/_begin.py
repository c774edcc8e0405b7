"""
The `BEGIN` of a transaction, which travels with the first query in it.

psycopg sends the one, waits for the answer, and then sends the other: a third of what a block
with one query costs. Here both go out together, in libpq's pipeline mode, with one `Sync` after
them, as JDBC's driver has always done it; and the answers come together.

That is for a query with parameters, which goes by the extended protocol anyway. Whatever else
begins a transaction (several statements in one string, COPY, a stream, a named cursor) is left to
psycopg, as is the query itself: its generator is driven as ever, and finds a transaction begun.
"""
# What psycopg is about to do is seen in its generator.
# pyright: reportPrivateUsage=false

from __future__ import annotations

from collections.abc import Generator
from typing import Any, TypeVar, cast

import psycopg
from psycopg import AsyncCursor, AsyncPipeline, generators, pq, waiting
from psycopg._cursor_base import BaseCursor
from psycopg.abc import PQGen

T = TypeVar("T")

READABLE = waiting.Ready.R
OK = pq.ConnStatus.OK
FATAL_ERROR = pq.ExecStatus.FATAL_ERROR
COMMAND_OK = pq.ExecStatus.COMMAND_OK
PIPELINE_SYNC = pq.ExecStatus.PIPELINE_SYNC

_EXECUTES = cast(Any, BaseCursor)._execute_gen.__code__
_CAN = AsyncPipeline.is_supported()


def begins_with_query(conn: Any, gen: Any) -> bool:
    """
    Tell whether *gen* begins a transaction with a query that `BEGIN` can travel with.

    Args:
        conn: Outside of a transaction, and not in autocommit.
        gen: Of psycopg's, and not begun.
    """
    if getattr(gen, "gi_code", None) is not _EXECUTES or not _CAN:
        return False
    asked = gen.gi_frame.f_locals
    prepared = conn._prepared
    return (
        type(asked["self"]) is AsyncCursor  # another may bind its parameters itself
        and _surely_sends(asked["query"], asked["params"])
        and conn._pipeline is None
        and conn._tpc is None
        # Else psycopg may have statements to deallocate, for which it leaves the pipeline.
        and not prepared._to_flush
        and len(prepared._names) < prepared.prepared_max
    )


def _surely_sends(query: Any, params: object) -> bool:
    """Tell whether *query* has parameters for the server, unless psycopg refuses it."""
    if not params:
        return False
    kind = type(params)
    if kind is tuple or kind is list:
        return True
    return kind is dict and type(query) is str and "%(" in query and "%%" not in query


def with_begin(conn: Any, gen: Generator[Any, Any, T]) -> PQGen[T]:
    """Do as *gen*, in a transaction that is begun on the way."""
    pgconn: Any = conn.pgconn
    prepared = conn._prepared
    pgconn.enter_pipeline_mode()
    pgconn.send_query_params(conn._get_tx_start_command(), None)
    statements = prepared._prepared_idx
    value: Any = None
    failure: Exception | None = None
    synced = running = True
    try:
        next(gen)
        # One that is prepared first takes a second exchange, in the same transaction.
        synced = prepared._prepared_idx == statements
    except StopIteration as done:
        value, running = done.value, False
    except Exception as ex:
        failure, running = ex, False
    yield from _ask(pgconn, synced)
    (begun,) = yield from generators.fetch_many(pgconn)
    if begun.status != COMMAND_OK:
        gen.close()
        failure = said(pgconn, begun) or lost()
    elif running:
        try:
            # It may be there already. What there is is looked at first: the generator reads on
            # before it looks, and if the session has ended, why would be forgotten.
            pgconn.is_busy()
            ready: Any = READABLE
            while True:
                state = gen.send(ready)
                if not synced:
                    yield from _ask(pgconn, False)
                ready = yield state
        except StopIteration as done:
            value = done.value
        except Exception as ex:
            failure = ex
    try:
        if not synced:
            yield from _ask(pgconn, True)
        while rest := (yield from generators.fetch_many(pgconn)):
            if rest[-1].status == PIPELINE_SYNC:
                break
            if rest[-1].status == FATAL_ERROR and pgconn.status != OK:
                # Why the session has ended, of which the generator knows the end alone.
                failure = said(pgconn, rest[-1]) or failure or lost()
        pgconn.exit_pipeline_mode()
    except psycopg.Error as ex:  # the session is lost
        failure = failure or ex
    if failure is not None:
        raise failure
    return cast(T, value)


def said(pgconn: Any, result: Any) -> psycopg.Error | None:
    """Return the server's error; None if libpq has made it, for the session is lost."""
    if result.error_field(pq.DiagnosticField.SQLSTATE) is None:
        return None
    encoding = "utf-8" if pgconn.pgconn_ptr is None else pgconn._encoding
    return psycopg.errors.error_from_result(result, encoding=encoding)


def lost() -> psycopg.OperationalError:
    """Return the error for a session that was lost without a word of the server's."""
    return psycopg.OperationalError("the connection is lost")


def _ask(pgconn: Any, at_end: bool) -> PQGen[None]:
    """Let the server answer what it was sent."""
    if at_end:
        pgconn.pipeline_sync()
    else:
        pgconn.send_flush_request()
    if pgconn.flush():
        yield from generators.send(pgconn)
