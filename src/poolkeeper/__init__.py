"""
poolkeeper: keeps psycopg's async connection pool alive, on the right event loop, and honest.
"""

from ._diagnosis import Diagnosis, Finding
from ._health import Health
from ._manager import PoolManager
from ._pool import BoundPool
from ._snapshot import CheckoutRow, LoadRow, PoolSnapshot, WaiterRow
from .errors import (
    AcquireTimeout,
    ClosedError,
    ConfigError,
    DuplicatePoolWarning,
    LoopMismatchError,
    MissingDependencyError,
    NotOpenError,
    OpenError,
    PoolkeeperError,
    ReleasedConnectionError,
    SelfDeadlockError,
    TooManyWaitersError,
    UnclosedManagerWarning,
)

__version__ = "0.1.0"

__all__ = [
    "AcquireTimeout",
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
    "MissingDependencyError",
    "NotOpenError",
    "OpenError",
    "PoolManager",
    "PoolSnapshot",
    "PoolkeeperError",
    "ReleasedConnectionError",
    "SelfDeadlockError",
    "TooManyWaitersError",
    "UnclosedManagerWarning",
    "WaiterRow",
    "__version__",
]
