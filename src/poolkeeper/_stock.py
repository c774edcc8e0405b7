"""
How many connections there are: growing, shrinking, the sizes, and replacing all of them.

One is made for somebody who waits, at a time, up to `max_size`; what is lost is replaced; what
was idle for `max_idle` goes, one at a time, down to `min_size`. What is too many after `resize()`
is closed now where it is idle, and when it comes back where it is in use.
"""

from __future__ import annotations

import weakref
from typing import Any

from ._config import null_size, require_sizes
from ._ending import dismiss, replace
from ._life import Life
from ._session import DRAINED


def grow(life: Life) -> None:
    """Ask for one more connection, if there is room and none is being made for who waits."""
    if not life.keeps:
        while life.connector.wanted < len(life.line) and life.total < life.max_size:
            life.connector.add()
    elif not life.growing and life.total < life.max_size:
        life.growing = True
        life.connector.add()


def count_made(life: Life) -> None:
    """Count a connection that was made; the growth goes on if it is not enough."""
    life.made += 1
    life.prepared += 1
    life.growing = False
    if life.total < life.min_size or life.line:
        grow(life)
    if life.oversized:
        close_surplus(life)


def forget(life: Life, number: int) -> None:
    """Count *number* connections less, which are not to be replaced."""
    life.made -= number
    life.growing = False


def let_go(life: Life, conn: Any) -> None:
    """Close a clean connection that nobody waits for, of a pool that keeps none."""
    forget(life, 1)
    dismiss(life, conn, "not kept")


def help_growth(life: Life) -> None:
    """Let the pool grow for who waits, and mend what somebody may have cancelled or dropped."""
    life.ledger.let_go()
    life.tasks.stay()
    grow(life)
    life.connector.go_on()
    if life.connector.last_failure is not None and in_need(life):
        life.connector.hurry()


def in_need(life: Life) -> bool:
    """Tell whether somebody waits, and there is no connection that may come back."""
    return bool(life.line) and not life.made


def shrink(life: weakref.ref[Life]) -> None:
    """Close one connection that nobody has needed since the last look."""
    here = life()
    if here is None or here.ending:
        return
    unused, here.idle_low = here.idle_low, len(here.idle)
    if unused > 0 and here.idle and here.total > here.min_size:
        forget(here, 1)
        dismiss(here, here.take_idle(), "unused")


def resize(life: Life, min_size: int, max_size: int | None) -> None:
    """
    Set the sizes; ask for the connections that are missing, close those that are too many.

    Raises:
        ConfigError: If no pool can have these sizes.
    """
    if max_size is None:
        max_size = min_size
    if life.keeps:
        require_sizes(min_size, max_size)
    else:
        max_size = null_size(min_size, max_size)
    life.min_size, life.max_size = min_size, max_size
    while life.total < min_size:
        life.connector.add()
    life.oversized = True
    close_surplus(life)
    life.note_made()
    if life.line:
        help_growth(life)


def is_surplus(life: Life) -> bool:
    """Tell whether there are more connections than `max_size`."""
    life.oversized = life.total > life.max_size
    return life.oversized


def close_surplus(life: Life) -> None:
    """Close idle connections as long as there are more than `max_size`."""
    while is_surplus(life) and life.idle:
        forget(life, 1)
        dismiss(life, life.take_idle(), "surplus")


def drain(life: Life) -> None:
    """Replace every connection: idle ones now, the others when they come back."""
    for session in life.sessions:
        if session.in_pool:
            session.expires_at = DRAINED
    for conn in life.take_all_idle():
        dismiss(life, conn, "drained")
        replace(life)
