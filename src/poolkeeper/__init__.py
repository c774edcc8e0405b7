"""
poolkeeper: keeps psycopg's async connection pool alive, on the right event loop, and honest.
"""

from ._manager import PoolManager
from ._pool import BoundPool
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
    TooManyWaitersError,
    UnclosedManagerWarning,
)

__version__ = "0.1.0"

__all__ = [
    "AcquireTimeout",
    "BoundPool",
    "ClosedError",
    "ConfigError",
    "DuplicatePoolWarning",
    "LoopMismatchError",
    "MissingDependencyError",
    "NotOpenError",
    "OpenError",
    "PoolManager",
    "PoolkeeperError",
    "ReleasedConnectionError",
    "TooManyWaitersError",
    "UnclosedManagerWarning",
    "__version__",
]
