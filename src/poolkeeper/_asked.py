"""
One statement that was sent, who waits for its answer, and what is made of that.

Rows are made by psycopg: its transformer, with the adapters of the connection, and the row factory
on a cursor of its own. Two of its row factories look at no cursor, nor does who asks for them; for
these none is made.
"""
# An answer becomes rows by what psycopg's cursors use.
# pyright: reportPrivateUsage=false

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import Any

from psycopg import AsyncCursor, generators, pq, waiting
from psycopg._preparing import PrepareManager
from psycopg.rows import scalar_row, tuple_row

from ._begin import lost, said
from ._statements import Known
from ._where import Code, asker

COMMAND_OK = pq.ExecStatus.COMMAND_OK
FATAL_ERROR = pq.ExecStatus.FATAL_ERROR
TUPLES_OK = pq.ExecStatus.TUPLES_OK

_first: Callable[[Sequence[Any]], Any] = itemgetter(0)


def maker_of(factory: Any) -> Callable[[Sequence[Any]], Any] | None:
    """Return what *factory* makes rows with, if that is the same whatever the cursor has."""
    return tuple if factory is tuple_row else _first if factory is scalar_row else None


class Asked:
    """
    A statement on its way, and the task that waits for it.

    Args:
        known: What is known of its text.
        code: Where it is asked.
        lineno: At which line of it.

    Attributes:
        task: By whom, once it has a place.
        done: Its end: an answer, an error, or that it is to be sent elsewhere.
        results: What the server has answered.
        error: Why it will not.
        moved: True if it is to be sent elsewhere.
        goes_on: True if the server may run it all the same.
        guarded: True if it is the copy of one that goes on, so that it must write nothing.
        left: True if nobody waits for it.
    """

    __slots__ = (
        "begins", "code", "cursor", "done", "entry", "error", "goes_on", "guarded", "known", "left",
        "lineno", "make_row", "moved", "name", "prepares", "results", "seconds", "since", "task",
        "transformer",
    )  # fmt: skip

    transformer: Any
    make_row: Any
    done: Any

    def __init__(self, known: Known | None, code: Code, lineno: int) -> None:
        self.known = known
        self.code = code
        self.lineno = lineno
        self.task: asyncio.Task[Any] | None = None
        self.cursor: Any = None
        """psycopg's, if one is needed to make the rows; else there is what does it."""
        self.results: list[Any] = []
        self.error: BaseException | None = None
        self.moved = self.goes_on = self.guarded = self.left = False
        self.entry: Any = None
        self.begins: Callable[[], None] | None = None
        """Called when the server has come to it, if that was not at once."""
        self.name = b""
        """Of the prepared statement that it runs."""
        self.prepares = False
        """True if it has prepared it."""
        self.since = self.seconds = 0.0
        """When it was sent; how long the server was at it, if somebody is told."""

    def in_words(self) -> str:
        """Return whose it is, in words."""
        return (
            f'in task "{self.task.get_name() if self.task else ""}" at'
            f" {asker(self.code, self.lineno)}"
        )

    def wake(self) -> None:
        """Let the task go on, if it waits."""
        if not self.done.done():
            self.done.set_result(None)

    def validate(self, prepared: PrepareManager) -> None:
        """Let psycopg know whether what it has prepared, or counted, has worked."""
        key, prepare, name = self.entry
        if prepared._names.get(key, name) == name:
            prepared.validate(key, prepare, name, self.results)


def received(pgconn: Any) -> list[list[Any]]:
    """
    Return what has come in a pipeline: the results of one step, or the one of a sync, in each list.

    Raises:
        psycopg.Error: The connection is lost.
    """
    reading = generators.pipeline_communicate(pgconn, _NOTHING_TO_SEND)
    next(reading)
    try:
        reading.send(_READY)
    except StopIteration as end:
        return end.value  # type: ignore[no-any-return]
    raise AssertionError("it has had nothing to wait for")


_NOTHING_TO_SEND: deque[Any] = deque()
_READY = waiting.Ready.RW
"""That it could write ends it."""


def result_of(asked: Asked, shown: Any) -> Any:
    """
    Return the server's answer to *asked*, whose values and rows its transformer and maker make.

    Args:
        asked: That.
        shown: The connection that a cursor is made of, if one is needed after all.

    Raises:
        psycopg.Error: The server's error, or why there is no answer.
    """
    if asked.error is not None:
        raise asked.error
    results, cursor = asked.results, asked.cursor
    if cursor is None:
        result = results[0] if len(results) == 1 else None  # the commit may be refused after it
        if result is not None and (
            result.status == COMMAND_OK or (result.status == TUPLES_OK and result.nfields)
        ):
            asked.transformer.set_pgresult(result)
            return result
        for result in results:
            if result.status == FATAL_ERROR:  # whatever has become of the connection
                raise said(shown.pgconn, result) or lost()
        # No columns, which is an error to scalar_row.
        factory: Any = tuple_row if asked.make_row is tuple else scalar_row
        cursor = AsyncCursor(shown, row_factory=factory)
        cursor._tx = asked.transformer
    cursor._check_results(results)
    cursor._set_results(results)
    asked.transformer, asked.make_row = cursor._tx, cursor._make_row
    return results[0]


_SENT = "The statement had been sent to the server: what it changes may be done all the same."
_NOT_SENT = "The statement had not been sent to its end: it has changed nothing."


def last_word(pgconn: Any, asked: Asked, error: BaseException, sent: bool) -> BaseException:
    """
    Return why *asked* has no answer: in the server's words, if it had any.

    Args:
        pgconn: The connection, which is gone.
        asked: The statement that the server was at.
        error: How that was noticed.
        sent: True if all of it had been sent.
    """
    last = asked.results[-1] if asked.results else None
    its = said(pgconn, last) if last is not None and last.status == FATAL_ERROR else None
    if its is not None and its.diag.severity_nonlocalized == "ERROR":
        return its  # of the statement, which so had an end
    why = its or error
    why.add_note(_SENT if sent else _NOT_SENT)
    return why


def cuts_short(error: BaseException) -> bool:
    """Tell whether Python itself may have raised *error*, between any two steps."""
    return not isinstance(error, Exception) or isinstance(error, MemoryError | RecursionError)


def rowcount(result: Any, _transformer: Any, _make_row: Any) -> int:
    """Return how many rows there are, or were changed."""
    if result.status == TUPLES_OK:
        return result.ntuples  # type: ignore[no-any-return]
    number = result.command_tuples
    return -1 if number is None else number


def first_row(result: Any, transformer: Any, make_row: Any) -> Any:
    """Return the first row; None if there is none."""
    if result.status != TUPLES_OK or not result.ntuples:
        return None
    return transformer.load_row(0, make_row)


def all_rows(result: Any, transformer: Any, make_row: Any) -> list[Any]:
    """Return all rows."""
    if result.status != TUPLES_OK:
        return []
    return transformer.load_rows(0, result.ntuples, make_row)  # type: ignore[no-any-return]
