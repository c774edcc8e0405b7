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
from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import Any

from psycopg import pq
from psycopg.rows import scalar_row, tuple_row

from ._statements import Known
from ._where import Code, asker

COMMAND_OK = pq.ExecStatus.COMMAND_OK
TUPLES_OK = pq.ExecStatus.TUPLES_OK

MAKERS: dict[Any, Callable[[Sequence[Any]], Any]] = {tuple_row: tuple, scalar_row: itemgetter(0)}
"""What these row factories make rows with, whatever the cursor has."""


class Asked:
    """
    A statement on its way, and the task that waits for it.

    Attributes:
        done: Its end: an answer, an error, or that it is to be sent elsewhere.
        results: What the server has answered.
        error: Why it will not.
        moved: True if it is to be sent elsewhere.
        left: True if nobody waits for it.
    """

    __slots__ = (
        "code", "cursor", "done", "entry", "error", "known", "left", "lineno", "make_row", "moved",
        "name", "prepares", "results", "since", "task", "transformer",
    )  # fmt: skip

    def __init__(self, known: Known | None, code: Code, lineno: int) -> None:
        self.known = known
        self.code = code
        self.lineno = lineno
        self.task: asyncio.Task[Any] | None = asyncio.current_task()
        self.cursor: Any = None
        """psycopg's, if one is needed to make the rows; else what does it."""
        self.transformer: Any = None
        self.make_row: Any = None
        self.results: list[Any] = []
        self.error: BaseException | None = None
        self.moved = self.left = False
        self.entry: Any = None
        self.name = b""
        """Of the prepared statement that it runs."""
        self.prepares = False
        """True if it has prepared it."""
        self.since = 0.0
        self.done: Any = None

    def in_words(self) -> str:
        """Return whose it is, in words."""
        return (
            f'in task "{self.task.get_name() if self.task else ""}" at'
            f" {asker(self.code, self.lineno)}"
        )


def result_of(conn: Any, asked: Asked) -> Any:
    """
    Return the server's answer to *asked*, whose values and rows its transformer and maker make.

    Raises:
        psycopg.Error: The server's error, or why there is no answer.
    """
    if asked.error is not None:
        raise asked.error
    results, cursor = asked.results, asked.cursor
    if cursor is None:
        result = results[0] if results else None
        if result is not None and (
            result.status == COMMAND_OK or (result.status == TUPLES_OK and result.nfields)
        ):
            asked.transformer.set_pgresult(result)
            return result
        # An error, or no columns, which is one to scalar_row.
        factory: Any = tuple_row if asked.make_row is tuple else scalar_row
        cursor = conn.cursor(row_factory=factory)
        cursor._tx = asked.transformer
    cursor._check_results(results)
    cursor._set_results(results)
    asked.transformer, asked.make_row = cursor._tx, cursor._make_row
    return results[0]


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
