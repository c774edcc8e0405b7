"""
What poolkeeper logs, on the logger ``poolkeeper``: each event with its level and its words.

The message of a record is one line, and stands alone. Whatever is in it, and more, are fields of
the record, where a formatter for machines finds them: `event_name` first of all, which is stable.
DETAIL, HINT and a stack are fields too. Python's own formatter, which is what a person reads by,
knows none of them, but prints below a message what `stack_info` holds: so there they are lines.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping
from typing import Any, NamedTuple

logger = logging.getLogger("poolkeeper")

DEBUG, INFO, WARNING, ERROR = logging.DEBUG, logging.INFO, logging.WARNING, logging.ERROR


class Event(NamedTuple):
    """What can be told of."""

    level: int
    text: str
    """One line, from the fields."""

    fields: tuple[str, ...] = ()
    """What a record of it has besides those in the text; some of them only where it is known."""


NUMBERS = ("total", "in_use", "idle", "max", "waiting")
SAID = ("detail", "hint")
HELD = ("task", "site", "function", "held_seconds")

EVENTS = {
    # --- the server
    "outage_began": Event(
        WARNING,
        'pool "%(pool)s": no connection can be made: %(reason)s; %(then)s',
        ("kind", *NUMBERS, *SAID),
    ),
    "outage_over": Event(
        WARNING,
        'pool "%(pool)s": connections can be made again, after %(outage_seconds).1f s and'
        " %(attempts_failed)d failed attempt(s)",
    ),
    "connection_dead": Event(INFO, 'a connection of pool "%(pool)s" does not answer: %(reason)s'),
    "connections_replaced": Event(
        INFO, 'pool "%(pool)s": %(number)d idle connection(s) were dead: replaced'
    ),
    "server_changed": Event(
        WARNING,
        'pool "%(pool)s": a server has become another kind of server (%(kind)s): sessions there'
        " are replaced",
    ),
    "writable_server_found": Event(
        WARNING,
        'pool "%(pool)s": a server refuses writes, and there is one that takes them: sessions'
        " are replaced",
    ),
    "writable_server_missing": Event(
        DEBUG, 'pool "%(pool)s": no server that takes writes: %(reason)s'
    ),
    "pooler_found": Event(
        INFO,
        'pool "%(pool)s" stands behind a pooler, %(mode)s: prepared statements are'
        " %(prepared)s%(forgone)s",
        SAID,
    ),
    "budget_exceeded": Event(WARNING, "%(said)s", ("pool", *SAID)),
    "not_ready": Event(INFO, 'pool "%(pool)s" is not ready: %(reason)s', ("kind",)),
    # --- who listens
    "subscriber_failed": Event(
        WARNING,
        'pool "%(pool)s": a subscriber has failed when it was told of "%(told)s": %(reason)s',
        ("subscriber",),
    ),
    "subscriber_slow": Event(
        WARNING,
        'pool "%(pool)s": the subscriber %(subscriber)s took %(seconds).2f s when it was told of'
        ' "%(told)s"; the event loop stood still meanwhile',
    ),
    # --- who waits
    "acquire_timeout": Event(
        WARNING,
        'could not acquire a connection from pool "%(pool)s" within %(timeout_seconds).2f s:'
        " %(summary)s",
        ("cause", "waited_seconds", "task", "site", "function", *NUMBERS, *SAID),
    ),
    "acquire_timeouts_over": Event(
        WARNING,
        'pool "%(pool)s": the time-outs are over: %(number)d acquires failed in'
        " %(storm_seconds).1f s",
        NUMBERS,
    ),
    # --- who holds
    "suspected_leak": Event(
        WARNING,
        'pool "%(pool)s": suspected leak: a connection is held for %(held_seconds).1f s, acquired'
        " %(acquired)s",
        ("task", "site", "function", "stack", *NUMBERS),
    ),
    "suspected_leak_returned": Event(
        WARNING,
        'pool "%(pool)s": no leak after all: a connection was returned after %(held_seconds).1f s,'
        " acquired %(acquired)s",
        ("task", "site", "function"),
    ),
    "connection_dropped": Event(
        WARNING,
        'pool "%(pool)s": a connection was dropped without being given back, after'
        " %(held_seconds).1f s, acquired %(acquired)s; taken back",
        ("task", "site", "function"),
    ),
    "connection_busy": Event(
        WARNING,
        'a connection of pool "%(pool)s" came back while another task was at work on it: closed.'
        " Acquired %(acquired)s",
        HELD,
    ),
    "connection_in_pipeline": Event(
        WARNING, 'a connection of pool "%(pool)s" came back in pipeline mode: closed'
    ),
    "work_rolled_back": Event(
        WARNING,
        'pool "%(pool)s": a connection was given back with work that is not committed: rolled back.'
        " Acquired %(acquired)s",
        HELD,
    ),
    "transaction_failed": Event(
        WARNING,
        'pool "%(pool)s": a transaction had failed, and its error was not passed on: what was done'
        " in it before is rolled back. Acquired %(acquired)s",
        HELD,
    ),
    "query_not_stopped": Event(
        INFO,
        'a connection of pool "%(pool)s" is closed: its query was cancelled, and does not end;'
        " %(reason)s",
    ),
    "transaction_left": Event(
        WARNING, 'a connection of pool "%(pool)s" came back in a transaction: rolled back'
    ),
    "connection_out_of_order": Event(
        WARNING,
        'a connection of pool "%(pool)s" could not be put in order, and is replaced: %(reason)s',
    ),
    "rollback_failed": Event(WARNING, 'pool "%(pool)s": error ignored in rollback: %(reason)s'),
    # --- what borrowers, and others, have set
    "settings_put_back": Event(
        INFO,
        'a connection of pool "%(pool)s" came back with other settings, which are put back:'
        " %(settings)s. Acquired %(acquired)s",
        HELD,
    ),
    "settings_left": Event(
        WARNING,
        'a connection of pool "%(pool)s" has settings that cannot be put back: %(settings)s.'
        " Acquired %(acquired)s",
        HELD,
    ),
    "settings_of_server": Event(
        INFO,
        'a connection of pool "%(pool)s" has settings that were changed by the server, or by what'
        " stands before it, and are left as they are: %(settings)s. Acquired %(acquired)s",
        HELD,
    ),
    # --- what functions of the user's do
    "check_refused": Event(INFO, 'a connection of pool "%(pool)s" failed its check: %(reason)s'),
    "check_stuck": Event(
        WARNING,
        'pool "%(pool)s": the check callback (%(site)s) goes on although it was cancelled; its'
        " connection is replaced",
    ),
    "callback_failed": Event(WARNING, 'pool "%(pool)s": %(reason)s'),
    "lifespan_failed": Event(ERROR, "the application's lifespan failed while it serves"),
    "lifespan_unanswered": Event(WARNING, "the application failed before it answered start-up"),
    "lifespan_refused": Event(
        INFO, "the application takes no part in the ASGI lifespan: %(reason)s"
    ),
    "shutdown_failed": Event(ERROR, "the application's shutdown failed"),
    "proxy_left_out": Event(
        WARNING,
        "connect() gives connections in a proxy (%(proxy)s) that cannot be made anew for each"
        " checkout: connections are handed out without it",
    ),
    # --- closing
    "closed_late": Event(
        WARNING,
        'pool "%(pool)s" was closed after %(waited_seconds).2f s with %(number)d connection(s)'
        " still in use: %(late)s",
    ),
    "close_failed": Event(WARNING, 'pool "%(pool)s": error ignored in %(what)s: %(reason)s'),
    "tasks_left": Event(WARNING, 'pool "%(pool)s" is closed, but tasks go on: %(tasks)s'),
}


def log(
    name: str,
    *facts: Mapping[str, Any],
    quietly: bool = False,
    stack: str = "",
    error: BaseException | None = None,
    on_behalf: int = 0,
    **fields: Any,
) -> None:
    """
    Log an event.

    Args:
        name: Which one, of `EVENTS`.
        facts: Fields that somebody else knows.
        quietly: At DEBUG, for it was told before.
        stack: Where something was done, in lines.
        error: Whose traceback is to be told with it.
        on_behalf: How many frames away that line is which the record is to name.
        fields: What is known of it; strings and numbers that hold no secret.
    """
    level, text, _ = EVENTS[name]
    if quietly:
        level = DEBUG
    if not logger.isEnabledFor(level):
        return
    for some in facts:
        fields.update(some)
    below = [f"{word.upper()}:  {fields[word]}" for word in SAID if fields.get(word)]
    if stack:
        fields["stack"] = stack
        below.append(stack)
    caller = sys._getframe(1 + on_behalf)
    record = logger.makeRecord(
        logger.name,
        level,
        caller.f_code.co_filename,
        caller.f_lineno,
        text,
        (fields,) if fields else (),
        None if error is None else (type(error), error, error.__traceback__),
        caller.f_code.co_name,
        {"event_name": f"{logger.name}.{name}", **fields},
        "\n".join(below) or None,
    )
    logger.handle(record)
