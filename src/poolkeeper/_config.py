"""
What a pool can be made with: what cannot work is refused by name, before anything is opened.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast, get_origin

import psycopg
from psycopg import AsyncConnection
from psycopg.conninfo import make_conninfo

from . import _conninfo
from .errors import ConfigError, see

UNLIMITED = 1_000_000
"""What `max_size` of a null pool is in place of 0: nobody has so many."""


def bad(parameter: str, value: object, wanted: str, advice: str = "") -> ConfigError:
    return ConfigError(
        f"{parameter} cannot be {value!r}",
        parameter=parameter,
        detail=f"It takes {wanted}.",
        hint=f"{advice} {see('config')}".strip(),
    )


def require_callable(
    wanted: str = "an async function that is called with one argument", /, **callbacks: object
) -> None:
    for parameter, value in callbacks.items():
        if value is not None and not callable(value):
            raise bad(parameter, value, wanted)


def require_number(**seconds: object) -> None:
    for parameter, value in seconds.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not value >= 0:
            raise bad(parameter, value, "a number of seconds, not negative")


def require_integer(**numbers: tuple[object, int]) -> None:
    for parameter, (value, least) in numbers.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise bad(parameter, value, f"a whole number, {least} or more")


def require_sizes(min_size: object, max_size: object) -> None:
    """Refuse sizes that no pool can have."""
    require_integer(min_size=(min_size, 0), max_size=(max_size, 1))
    if cast(int, max_size) < cast(int, min_size):
        raise bad("max_size", max_size, f"min_size or more, and min_size is {min_size}")


def null_size(min_size: object, max_size: object) -> int:
    """Return how many connections a null pool may have, refuse sizes that it cannot have."""
    if min_size != 0 or isinstance(min_size, bool):
        raise bad("min_size", min_size, "0, for a null pool keeps no connections")
    require_integer(max_size=(max_size, 0))
    return cast(int, max_size) or UNLIMITED


def shown_size(max_size: int) -> int:
    """Return `max_size` as the user of a null pool gives it."""
    return 0 if max_size == UNLIMITED else max_size


def require_text(**texts: object) -> None:
    for parameter, value in texts.items():
        if value is not None and not isinstance(value, str):
            raise bad(parameter, value, "a string or None")


def require_flag(**flags: object) -> None:
    for parameter, value in flags.items():
        if not isinstance(value, bool):
            raise bad(parameter, value, "True or False")


def settle(keeps: bool, settings: dict[str, Any], own: Mapping[str, Any]) -> int:
    """
    Refuse what cannot work, and give the *settings* of a pool the form that psycopg_pool takes.

    Args:
        keeps: False for a null pool.
        settings: Those of psycopg_pool that a pool keeps.
        own: The others.

    Returns:
        How many connections the pool may have.
    """

    def given(*names: str) -> dict[str, Any]:
        return {name: own[name] if name in own else settings[name] for name in names}

    require_callable(**given("configure", "check", "reconnect_failed"))
    if own["reset"] != "discard":
        require_callable(**given("reset"))
    require_number(**given("timeout", "max_lifetime", "max_idle", "reconnect_timeout"))
    if own["leak_threshold"] is not None:
        require_number(**given("leak_threshold"))
    if own["expected_processes"] is not None:
        require_integer(expected_processes=(own["expected_processes"], 1))
    min_size, most = settings["min_size"], settings["max_size"]
    if keeps:
        require_sizes(min_size, most)
    else:
        most = null_size(min_size, most)
    require_integer(
        max_waiting=(settings["max_waiting"], 0), num_workers=(settings["num_workers"], 1)
    )
    require_text(**given("name", "application_name"))
    require_flag(**given("close_returns"))
    settings["connection_class"] = _user_class(settings["connection_class"])
    settings["conninfo"] = _conninfo_of(settings["conninfo"])
    settings["kwargs"] = _kwargs_of(settings["kwargs"])
    return cast(int, most)


def _user_class(given: object) -> type[AsyncConnection[Any]]:
    # A generic alias (AsyncConnection[DictRow]) is how psycopg's docs type the rows.
    user_class = AsyncConnection if given is None else get_origin(given) or given
    if not (isinstance(user_class, type) and issubclass(user_class, AsyncConnection)):
        raise bad("connection_class", given, "AsyncConnection or a subclass of it")
    return user_class  # pyright: ignore[reportUnknownVariableType] - rows of any kind


def _conninfo_of(given: Any) -> Any:
    """Return what libpq takes, or the function that it comes from."""
    if isinstance(given, str):
        return _conninfo.normalise(given)
    wanted = "a string or a function that returns one"
    if given is None:
        raise bad("conninfo", None, wanted, _UNSET)
    if not callable(given):
        raise bad("conninfo", cast(Any, type(given)), wanted)
    return given


_UNSET = (
    "Probably an environment variable that is not set: os.environ.get() returns None then, where"
    ' os.environ["DATABASE_URL"] raises.'
)


def _kwargs_of(given: Any) -> Any:
    """Return a copy, or the function that they come from."""
    if given is None or callable(given):
        return given or {}
    if not isinstance(given, Mapping):
        raise bad("kwargs", cast(Any, type(given)), "a dict, a function that returns one, or None")
    return dict(cast("Mapping[str, Any]", given))


# Parameters of psycopg's connect() that are not libpq's.
_PSYCOPG_PARAMETERS = frozenset(
    {"autocommit", "prepare_threshold", "context", "row_factory", "cursor_factory"}
)


def refuse_misplaced(arguments: Mapping[str, object]) -> None:
    """Tell who gives the manager an argument of ``connect()`` where that belongs."""
    for name in _PSYCOPG_PARAMETERS.intersection(arguments):
        raise ConfigError(
            f"{name} is no parameter of PoolManager",
            parameter=name,
            detail="It is one of psycopg's connect(), which makes the connections.",
            hint=f'Write PoolManager(..., kwargs={{"{name}": ...}}). {see("config")}',
        )


def server(settings: Mapping[str, Any]) -> tuple[str, ...] | None:
    """Check what libpq will be given as far as it is known, and return which server it means."""
    conninfo = settings["conninfo"]
    kwargs: Any = settings["kwargs"]
    if not isinstance(conninfo, str):
        return None
    classes = settings["connection_class"].__mro__
    own_connect = any("connect" in vars(c) for c in classes[: classes.index(AsyncConnection)])
    if callable(kwargs) or own_connect:  # which may take anything
        kwargs = {}
    libpq: dict[str, Any] = {
        name: value for name, value in kwargs.items() if name not in _PSYCOPG_PARAMETERS
    }
    for name in libpq:
        try:
            make_conninfo("", **{name: "1"})
        except (psycopg.Error, TypeError):  # TypeError: conninfo=, or a name that is no string
            raise ConfigError(
                f"kwargs cannot hold {name!r}",
                parameter="kwargs",
                detail="It takes parameters of connect().",
                hint=see("config"),
            ) from None
    return _conninfo.server_key(_conninfo.parse(conninfo, **libpq))
