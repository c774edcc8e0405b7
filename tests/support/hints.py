"""Whether what a module has in public can be asked for its type hints."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from types import ModuleType
from typing import Any, get_type_hints


def _functions(cls: type) -> Iterator[Any]:
    for base in cls.__mro__:
        if base.__module__.startswith("poolkeeper"):
            for name, member in vars(base).items():
                if not name.startswith("_") or name == "__init__":
                    yield inspect.unwrap(
                        getattr(member, "fget", getattr(member, "__func__", member))
                    )


def hints_missing(module: ModuleType) -> list[str]:
    """Return what cannot be asked, with why; of the public names of *module* and their methods."""
    missing: list[str] = []
    names = getattr(module, "__all__", None) or [n for n in vars(module) if not n.startswith("_")]
    for name in names:
        value = getattr(module, name)
        members = [value, *_functions(value)] if inspect.isclass(value) else [value]
        for one in members:
            if inspect.isclass(one) or inspect.isfunction(one):
                try:
                    get_type_hints(one)
                except Exception as ex:
                    missing.append(f"{one.__qualname__}: {ex}")
    return missing
