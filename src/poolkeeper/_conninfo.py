"""
Connection strings: accept what ``DATABASE_URL`` often holds, and keep passwords out of messages.
"""

from __future__ import annotations

import re
from typing import Any

import psycopg
from psycopg.conninfo import conninfo_to_dict

from .errors import ConfigError, see

# "postgresql+psycopg://", "postgres+asyncpg://": SQLAlchemy names the driver in the scheme.
_SQLALCHEMY_SCHEME = re.compile(r"^(postgres(?:ql)?)\+[a-z0-9_]+://", re.IGNORECASE)

# libpq quotes what it could not read, and that may be a piece of the password. It is kept only
# where the words before it say that it is the name of an option.
_QUOTED = re.compile(r'(?P<before>option|parameter|keyword)?(?P<colon>:? )"(?P<text>[^"]*)"')
_NAME = re.compile(r"[a-z_]{1,40}")

HIDDEN = "***"


def normalise(conninfo: str) -> str:
    """Return *conninfo* with the driver of a SQLAlchemy-style URL taken out of its scheme."""
    return _SQLALCHEMY_SCHEME.sub(r"\1://", conninfo.strip())


def parse(conninfo: str, **kwargs: Any) -> dict[str, Any]:
    """
    Return the parameters of a normalised *conninfo* and *kwargs*, as libpq reads them.

    Raises:
        ConfigError: If libpq cannot read it. Neither it nor its chain shows the string.
    """
    reason = ""
    try:
        return dict(conninfo_to_dict(conninfo, **kwargs))
    except psycopg.Error as ex:
        reason = without_secrets(str(ex))
    # Raised outside of the except block: libpq's own message may quote the password, and
    # __context__ would print it.
    raise ConfigError(
        f"conninfo is not a connection string that libpq can read: {reason}",
        parameter="conninfo",
        hint="Give a URL (postgresql://user:password@host:5432/dbname, with %-escapes for"
        " special characters) or a string of keywords (host=… dbname=…)."
        f" {see('config')}",
    )


def without_secrets(libpq_message: str) -> str:
    """Return the first line of a libpq parse error without anything it quotes from the input."""

    def keep_names(match: re.Match[str]) -> str:
        if match["before"] and _NAME.fullmatch(match["text"]):
            return match[0]
        return f'{match["before"] or ""}{match["colon"]}"{HIDDEN}"'

    line = libpq_message.strip().splitlines()[0] if libpq_message.strip() else "no reason given"
    return _QUOTED.sub(keep_names, line)


def server_key(params: dict[str, Any]) -> tuple[str, ...]:
    """Return what tells one server, database and user from another."""
    names = ("host", "hostaddr", "port", "dbname", "user", "service")
    return tuple(str(params.get(name) or "") for name in names)
