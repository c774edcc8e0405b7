"""
The door between the pool's face, which `import poolkeeper` loads, and its rooms; see `_later`.

Whoever goes through it first, `open()` mostly, loads them all.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ._later import later

if TYPE_CHECKING:
    from ._rooms import *  # noqa: F403 - that is the list
else:
    __getattr__ = later(__name__, "._rooms")
