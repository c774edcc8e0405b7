"""
poolkeeper: keeps psycopg's async connection pool alive, on the right event loop, and honest.
"""

from typing import TYPE_CHECKING, Any

from . import _facts
from ._later import later
from ._manager import PoolManager
from ._pool import BoundNullPool, BoundPool
from .errors import (
    AcquireTimeout,
    BlockedLoopWarning,
    CallTimeout,
    ClosedError,
    ConfigError,
    ConnectionBudgetWarning,
    DuplicatePoolWarning,
    LoopMismatchError,
    LoopPerCallWarning,
    LostWorkError,
    MissingDependencyError,
    NoConnectionError,
    NotOpenError,
    OpenError,
    PoolkeeperError,
    QueryTimeout,
    ReleasedConnectionError,
    SelfDeadlockError,
    TooManyWaitersError,
    UnclosedManagerWarning,
    hide_from_pytest,
)

if TYPE_CHECKING:
    from ._facts import (
        CheckoutRow,
        Diagnosis,
        Finding,
        Health,
        LoadRow,
        PoolSnapshot,
        ServerFacts,
        WaiterRow,
    )
    from ._per_loop import PoolPerLoop
    from ._portal import Portal
else:
    _ROOMS = {"PoolPerLoop": "._per_loop", "Portal": "._portal"}

    def __getattr__(name: str) -> Any:
        if name in _ROOMS:
            return later(__name__, _ROOMS[name])(name)
        if name in __all__:
            return getattr(_facts, name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})


hide_from_pytest()

__version__ = "0.1.0"

__all__ = [
    "AcquireTimeout",
    "BlockedLoopWarning",
    "BoundNullPool",
    "BoundPool",
    "CallTimeout",
    "CheckoutRow",
    "ClosedError",
    "ConfigError",
    "ConnectionBudgetWarning",
    "Diagnosis",
    "DuplicatePoolWarning",
    "Finding",
    "Health",
    "LoadRow",
    "LoopMismatchError",
    "LoopPerCallWarning",
    "LostWorkError",
    "MissingDependencyError",
    "NoConnectionError",
    "NotOpenError",
    "OpenError",
    "PoolManager",
    "PoolPerLoop",
    "PoolSnapshot",
    "PoolkeeperError",
    "Portal",
    "QueryTimeout",
    "ReleasedConnectionError",
    "SelfDeadlockError",
    "ServerFacts",
    "TooManyWaitersError",
    "UnclosedManagerWarning",
    "WaiterRow",
    "__version__",
]
