"""Servers of the suite's own, which are there sooner than those that the demo makes."""

from __future__ import annotations

import atexit
import shutil
from functools import cache
from pathlib import Path

from typing_extensions import override

from poolkeeper._embedded import EmbeddedServer


class OwnServer(EmbeddedServer):
    """A server whose data is a copy: to make it anew takes a second, and the copy a part of it."""

    @override
    def _make_data(self) -> None:
        shutil.copytree(_template(), self._data)
        if self._user is not None:
            for path in (self._data, *self._data.rglob("*")):
                shutil.chown(path, self._user)


class _Template(EmbeddedServer):
    """Never runs."""

    @property
    def data(self) -> Path:
        return self._data


@cache
def _template() -> Path:
    template = _Template()
    atexit.register(template.close)
    return template.data
