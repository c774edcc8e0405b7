"""
poolkeeper: keeps psycopg's async connection pool alive, on the right event loop, and honest.
"""

from typing import TYPE_CHECKING, Any

from . import _facts
from ._manager import PoolManager
from ._pool import BoundNullPool, BoundPool
from .errors import (
    AcquireTimeout,
    ClosedError,
    ConfigError,
    DuplicatePoolWarning,
    LoopMismatchError,
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
        WaiterRow,
    )
else:

    def __getattr__(name: str) -> Any:
        if name in __all__:
            return getattr(_facts, name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})


hide_from_pytest()

__version__ = "0.1.0"

__all__ = [
    "AcquireTimeout",
    "BoundNullPool",
    "BoundPool",
    "CheckoutRow",
    "ClosedError",
    "ConfigError",
    "Diagnosis",
    "DuplicatePoolWarning",
    "Finding",
    "Health",
    "LoadRow",
    "LoopMismatchError",
    "LostWorkError",
    "MissingDependencyError",
    "NoConnectionError",
    "NotOpenError",
    "OpenError",
    "PoolManager",
    "PoolSnapshot",
    "PoolkeeperError",
    "QueryTimeout",
    "ReleasedConnectionError",
    "SelfDeadlockError",
    "TooManyWaitersError",
    "UnclosedManagerWarning",
    "WaiterRow",
    "__version__",
]
