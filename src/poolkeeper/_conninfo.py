"""
Connection strings: accept what ``DATABASE_URL`` often holds, and keep passwords out of messages.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

import psycopg
from psycopg import pq
from psycopg.conninfo import conninfo_to_dict

from .errors import ConfigError, see

# What libpq says, up to where it quotes what it could not read: that may be a piece of the
# password. Its other words, in other languages too, are not shown. Compiled when something is
# wrong, by re, which keeps it: importing costs less so.
_SAYINGS = r"""
    (?P<named>
        invalid\ connection\ option
      | invalid\ URI\ query\ parameter:
      | (?:extra|missing)\ key/value\ separator\ "="\ in\ URI\ query\ parameter:
    )
    | missing\ "="\ after
    | unterminated\ quoted\ string\ in\ connection\ info\ string
    | end\ of\ string\ reached\ when\ looking\ for\ matching\ "\]"
    | IPv6\ host\ address\ may\ not\ be\ empty\ in\ URI:
    | unexpected\ character
    | invalid\ percent-encoded\ token:
    | forbidden\ value\ %00\ in\ percent-encoded\ value:
    | unexpected\ spaces\ found\ in
    """
_NAME = "[a-z_]{1,40}"
_SECRET = "(?i)passw|secret|key|token"

HIDDEN = "***"


def normalise(conninfo: str) -> str:
    """Return *conninfo* with the driver of a SQLAlchemy-style URL taken out of its scheme."""
    conninfo = conninfo.strip()
    scheme, is_url, rest = conninfo.partition("://")
    dialect, _, driver = scheme.partition("+")  # "postgresql+psycopg", "postgres+asyncpg"
    if is_url and driver.isidentifier() and dialect.lower() in ("postgresql", "postgres"):
        return f"{dialect}://{rest}"
    return conninfo


def parse(conninfo: str, **kwargs: Any) -> dict[str, Any]:
    """
    Return the parameters of a normalised *conninfo* and *kwargs*, as libpq reads them.

    Raises:
        ConfigError: If it cannot work. Neither it nor its chain shows the string.
    """
    try:
        params = dict(conninfo_to_dict(conninfo, **kwargs))
    except (psycopg.Error, UnicodeError) as ex:
        # UnicodeError: a %-escape that is no UTF-8. It holds the whole string.
        parameter = "conninfo"
        why = "not UTF-8" if isinstance(ex, UnicodeError) else _safe_words(str(ex), conninfo)
        fault = f"is not a connection string that libpq can read: {why}"
    else:
        name, what = _fault(params)
        if not name:
            return params
        parameter = "kwargs" if name in kwargs else "conninfo"
        fault = f"cannot work: {what}"
    # Raised outside of the except block: libpq's own message may quote the password, and
    # __context__ would print it.
    raise ConfigError(
        f"{parameter} {fault}",
        parameter=parameter,
        hint="Give a URL (postgresql://user:password@host:5432/dbname, with %-escapes for"
        " special characters) or a string of keywords (host=… dbname=…)."
        f" {see('config')}",
    )


def _safe_words(libpq_message: str, conninfo: str) -> str:
    """Return a libpq parse error without anything that may be a piece of the password."""
    message = libpq_message.strip()
    said = re.match(_SAYINGS, message, re.VERBOSE)
    if said is None:
        return "the reason may quote the password and is not shown"
    rest = message[said.end() :]
    name = re.fullmatch(f' "({_NAME})"', rest) if said["named"] else None
    if not rest or (name and _is_a_name(name[1], conninfo)):
        return message
    return f'{said[0]} "{HIDDEN}"'


def _is_a_name(text: str, conninfo: str) -> bool:
    """Tell whether *text* is surely the name of an option, not a piece of a split password."""
    known = [option.keyword.decode() for option in pq.Conninfo.get_defaults()]
    from difflib import get_close_matches  # only where something is wrong: importing it takes time

    if get_close_matches(text, known, 1, 0.8):
        return True  # misspelt
    if "://" in conninfo:
        query = conninfo.partition("?")[2]
        # With a "@" after it, the "?" stands in the password.
        return "@" not in query and not re.search(_SECRET, query.rpartition(text)[0])
    return not re.search(_SECRET, conninfo.rpartition(text)[0])


def _fault(params: dict[str, Any]) -> tuple[str, str]:
    """
    Return which of *params* cannot work, and why; two empty strings if none is known not to.

    libpq reads a URL up to the first "@" or "/", so the rest of a password that has one of them
    would be looked up, and shown, as a host name or a port.
    """
    hosts, addresses, ports = (
        str(params.get(name) or "").split(",") for name in ("host", "hostaddr", "port")
    )
    if any("@" in host[1:] and not host.startswith("/") for host in hosts):
        return "host", 'a host name has a "@" in it'
    if any(port and not _is_port(port) for port in map(str.strip, ports)):
        return "port", "a port is not a number from 1 to 65535"
    servers = max(len(hosts), len(addresses))
    if len(ports) not in (1, servers):
        return "port", f"{len(ports)} ports are given for {servers} hosts"
    return "", ""


def _is_port(text: str) -> bool:
    return text.isascii() and text.isdecimal() and 0 < int(text) < 65536


def server_key(params: dict[str, Any]) -> tuple[str, ...]:
    """Return what tells one server, database and user from another."""
    names = ("host", "hostaddr", "port", "dbname", "user", "service")
    return tuple(str(params.get(name) or "") for name in names)


def names(params: Mapping[str, Any]) -> frozenset[str]:
    """
    Return what of *params* may be shown: hosts, ports, user, database, settings by their names.

    Nothing, if a password may be among them: libpq reads a URL up to the first "@" or "/", so
    that the rest of a password that has one of them is a host or a database, and the "@" that
    was to end it still follows.
    """
    values = {
        name: str(params.get(name) or "").split(",")
        for name in ("host", "hostaddr", "port", "dbname", "user")
    }
    shown = {value for each in values.values() for value in each}
    shown.update(f"{host}/.s.PGSQL.{port}" for host in values["host"] for port in values["port"])
    for name, value in params.items():
        if name not in _MAY_HAVE_AN_AT and isinstance(value, str) and "@" in value[1:]:
            return frozenset()
    for setting in re.findall(r"(?:-c\s*|--)([\w.]+)=", str(params.get("options") or "")):
        shown.add(setting)
    shown.update(name for name in params if re.fullmatch(_NAME, name))
    password = str(params.get("password") or "")
    return frozenset(name for name in shown if name and (not password or password not in name))


_MAY_HAVE_AN_AT = frozenset({"user", "password", "sslpassword"})


def servers(params: Mapping[str, Any]) -> int:
    """Return how many servers *params* name; each may have several addresses."""
    return max(len(_given(params, name).split(",")) for name in ("host", "hostaddr"))


def has_timeout(params: Mapping[str, Any]) -> bool:
    """Tell whether *params* or the environment say how long a server has to answer."""
    return _given(params, "connect_timeout").strip() not in ("", "0")


def _given(params: Mapping[str, Any], name: str) -> str:
    """Return a parameter, from the environment if need be, as psycopg does."""
    value = params.get(name)
    return str(os.environ.get(f"PG{name.upper()}", "") if value is None else value)
