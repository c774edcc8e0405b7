"""
The one function that turns an exception into words, for a message, a log or a snapshot.

Whoever reads them may be a stranger. So of a server's error there is the SQLSTATE, and its
message only where that is one of the sentences that hold nothing of a query or a parameter; of a
failed login the words of the server and of libpq, with what they quote shown only where it is
known to be a name; of an error of ours its message, which holds nothing else; and of any other
exception its class and where it was raised, never its text. The exception itself goes along as a
``__cause__``: what a traceback prints of the program's own errors is the program's affair.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Collection, Iterator
from contextlib import suppress
from ipaddress import ip_address

import psycopg

from ._where import raised_at
from .errors import PoolkeeperError

HIDDEN = "***"

# What servers and drivers say that holds nothing but what stands here. Compiled when something
# has failed, by re, which keeps it: importing costs less so.
_SENTENCES = r"""
    (?:(?:consuming\ input|sending\ query|flushing|cancellation)\ failed:\ )?
    (?:FATAL:\ +)?
    (?:
        (?:cancell?ing\ statement|terminating\ connection)
        \ due\ to\ (?:
            administrator\ command | user\ request | conflict\ with\ recovery
          | (?:statement|lock|transaction|idle-in-transaction|idle-session)\ timeout
        )
      | terminating\ connection\ because\ (?:
            of\ crash\ of\ another\ server\ process | protocol\ synchronization\ was\ lost
        )
      | the\ database\ system\ is\ (?:
            (?:starting\ up|shutting\ down|in\ recovery\ mode)
          | not\ (?:yet\ )?accepting\ connections
        )
      | sorry,\ too\ many\ clients\ already
      | division\ by\ zero
      | deadlock\ detected
      | out\ of\ (?:shared\ )?memory
      | could\ not\ serialize\ access\ due\ to\ (?:
            concurrent\ (?:update|delete) | read/write\ dependencies\ among\ transactions
        )
      | current\ transaction\ is\ aborted,\ commands\ ignored\ until\ end\ of\ transaction\ block
      | cannot\ execute\ (?:INSERT|UPDATE|DELETE|MERGE|COPY\ FROM|SELECT\ FOR\ UPDATE|nextval\(\))
        \ in\ a\ read-only\ transaction
      | the\ (?:connection|cursor)\ is\ (?:closed|lost)
      | (?:connection\ )?timeout\ expired
      | server\ closed\ the\ connection\ unexpectedly
      | SSL\ connection\ has\ been\ closed\ unexpectedly
      | SSL\ SYSCALL\ error:\ EOF\ detected
      | another\ command\ is\ already\ in\ progress
      | no\ connection\ to\ the\ server
    )
    """


def in_words(error: BaseException) -> str:
    """
    Return *error* in one line that holds no password, query text or parameter.

    With its traceback, the line tells where it was raised.
    """
    if isinstance(error, PoolkeeperError):
        return _known(error) or class_name(error)
    if isinstance(error, psycopg.Error) and (said := _sentence(error)):
        return f"{said} (SQLSTATE {state})" if (state := _state(error)) else said
    place = raised_at(error)
    return f"{_named(error)}, raised at {place}" if place else _named(error)


def raised_by(whose: str, error: BaseException) -> str:
    """Return in words that *whose* function has raised *error*."""
    place = raised_at(error)
    return (
        f"{whose} ({place}) raised {_named(error)}" if place else f"{whose} raised {_named(error)}"
    )


def at_login(error: psycopg.Error | str, names: Collection[str]) -> str:
    """
    Return in one line what psycopg says of a failed login; what it quotes only if it is known.

    Args:
        error: An error that psycopg itself has raised, or what it says of one server.
        names: Names of hosts, users, databases and settings that may be shown.
    """
    return "; ".join(dict.fromkeys(_at_login(said, names) for said in each_host(str(error))))


def quotes_unknown(error: psycopg.Error, names: Collection[str]) -> bool:
    """Tell whether *error*, of a failed login, says anything that `at_login()` would hide."""
    text = str(error)
    return HIDDEN in at_login(text, names) or any(
        HIDDEN in _hide_quoted(line, names) for line in text.splitlines()
    )


def class_name(error: BaseException) -> str:
    """Return the name of the class of *error* as a traceback has it."""
    cls = type(error)
    if cls.__module__ in ("builtins", "__main__"):
        return cls.__qualname__
    return f"{cls.__module__}.{cls.__qualname__}"


def each_host(text: str) -> list[str]:
    """Return what each server of a list said, from the words of psycopg's error for a login."""
    _, several, texts = text.partition(
        "\nMultiple connection attempts failed. All failures were:\n"
    )
    if not several:
        return [text]
    return re.split(r"(?:^|\n)- host: .*, port: .*, hostaddr: (?:None|'[^'\n]*'): ", texts)[1:]


def _named(error: BaseException) -> str:
    known = _known(error)
    return f"{class_name(error)} ({known})" if known else class_name(error)


def _known(error: BaseException) -> str:
    """Return what can be said of *error* beside its class; "" if that is nothing."""
    if isinstance(error, PoolkeeperError):
        return " ".join(str(error.args[0] if error.args else "").split())
    if isinstance(error, psycopg.Error):
        state = f"SQLSTATE {_state(error)}" if _state(error) else ""
        return ", ".join(filter(None, (_sentence(error), state)))
    # The system's own words for its error; not what came with it, such as a path.
    number = error.errno if isinstance(error, OSError) else None
    return os.strerror(number) if isinstance(number, int) and number in errno.errorcode else ""


def _sentence(error: psycopg.Error) -> str:
    said = (error.diag.message_primary or str(error)).partition("\n")[0].strip()
    return said if re.fullmatch(_SENTENCES, said, re.VERBOSE) else ""


def _state(error: psycopg.Error) -> str:
    state = error.sqlstate or ""
    return state if re.fullmatch("[0-9A-Z]{5}", state) else ""


# --- a failed login ---------------------------------------------------------------------------

# The marks of the languages that PostgreSQL speaks. An apostrophe stands between letters.
_PAIRS = tuple(zip("\"'“„»«‹「", "\"'”“«»›」", strict=True))
_MARK = r"""["“”„»«‹›「」]|(?<!\w)'|'(?!\w)"""


def _at_login(said: str, names: Collection[str]) -> str:
    """Return what one server, or libpq of it, said to a login, without what may be secret."""
    before, fatal, after = said.strip().partition("FATAL: ")
    text = (after if fatal else before).strip()
    where = re.match(_WHERE, text)
    to = where.end() if where else 0
    words = " ".join(f"{_hide_quoted(text[:to], names)}{_hide_quoted(text[to:], names)}".split())
    if fatal:
        words = ": ".join(_up_to_unknown(words.split(": "), names))
    return words or "no reason was given"


def _up_to_unknown(pieces: list[str], names: Collection[str]) -> Iterator[str]:
    """Of a server: it puts names and settings into quotes, PgBouncer names after a colon."""
    for number, piece in enumerate(pieces):
        if number and piece not in names and not re.fullmatch(_AFTER_COLON, piece):
            yield HIDDEN
            return
        yield piece


# Of libpq: which server it speaks of.
_WHERE = (
    r'(?:connection [a-z ]{1,20}: )?connection to server (?:at|on socket) "[^"]*"'
    r"(?: \([0-9a-fA-F.:]*\))?(?:, port \d+)? failed: "
)
_AFTER_COLON = rf'FATAL .*|server supports [\d. to]+|"{re.escape(HIDDEN)}"'
_FURTHER = (
    "DETAIL:",
    "HINT:",
    "\tIs the server",
    "\tThis probably",
    "\tbefore or while",
    "Either provide",
)


def _hide_quoted(text: str, names: Collection[str]) -> str:
    """Return the first line of *text*; what it quotes is hidden, but for *names* and addresses."""
    line, _, more = text.partition("\n")
    cut = more and not more.startswith(_FURTHER)  # then what is quoted has several lines
    shown: list[str] = []
    for quoted in _quoted(line, names):
        line = line.replace(quoted, f"\0{len(shown)}\0")
        shown.append(quoted)
    marks = list(re.finditer(_MARK, line))
    if marks:
        # From the first to the last: what is quoted may have marks in it.
        end = len(line) if cut or len(marks) % 2 else marks[-1].end()
        line = f'{line[: marks[0].start()]}"{HIDDEN}"{line[end:]}'
    return re.sub("\0(\\d+)\0", lambda found: shown[int(found[1])], line)


def _quoted(text: str, names: Collection[str]) -> Iterator[str]:
    for name in sorted(names, key=len, reverse=True):
        yield from (f"{opening}{name}{closing}" for opening, closing in _PAIRS)
        yield f"« {name} »"
    for found in re.findall(r'"([0-9a-fA-F.:]+)"', text):
        with suppress(ValueError):
            yield f'"{ip_address(found)}"'
