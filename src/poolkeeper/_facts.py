"""
The names of `_snapshot` and `_diagnosis`, loaded when one of them is first asked for.

To make their classes takes half as long as to import all the rest, and an import is paid for by
every process, the short-lived command too that never opens its pool. The annotations name them
through this module as well, so that who asks for type hints finds them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ._diagnosis import Diagnosis as Diagnosis
    from ._diagnosis import Finding as Finding
    from ._diagnosis import diagnose as diagnose
    from ._snapshot import CheckoutRow as CheckoutRow
    from ._snapshot import Health as Health
    from ._snapshot import LoadRow as LoadRow
    from ._snapshot import PoolSnapshot as PoolSnapshot
    from ._snapshot import StepRow as StepRow
    from ._snapshot import WaiterRow as WaiterRow

NAMES = frozenset(
    {
        "CheckoutRow",
        "Diagnosis",
        "Finding",
        "Health",
        "LoadRow",
        "PoolSnapshot",
        "StepRow",
        "WaiterRow",
        "diagnose",
    }
)


def load() -> None:
    """
    Load them now.

    When a pool opens: a process that has run out of file descriptors, or whose files were
    replaced by those of the next release, could not load them any more when it needs them.
    """
    from . import _diagnosis, _snapshot

    for module in (_snapshot, _diagnosis):
        globals().update((name, vars(module)[name]) for name in NAMES & vars(module).keys())


if not TYPE_CHECKING:  # or every name would be one

    def __getattr__(name: str) -> Any:
        if name not in NAMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        load()
        return globals()[name]
