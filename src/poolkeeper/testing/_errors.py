"""What is raised in tests."""

from __future__ import annotations

from poolkeeper import PoolkeeperError
from poolkeeper.errors import see

__all__ = ["LeftBehindError", "OwnershipError", "SandboxError", "impossible"]


class SandboxError(PoolkeeperError, RuntimeError):
    """
    Something was asked for in a sandbox that cannot be had in one transaction.

    .. versionadded:: 0.1.0
    """

    __module__ = "poolkeeper.testing"


class OwnershipError(SandboxError):
    """
    A connection was asked for by a task that belongs to no test, or to one that has ended.

    .. versionadded:: 0.1.0
    """

    __module__ = "poolkeeper.testing"


class LeftBehindError(PoolkeeperError, AssertionError):
    """
    A test has ended and left a connection, a transaction, a task or an open pool behind.

    .. versionadded:: 0.1.0
    """

    __module__ = "poolkeeper.testing"


A_DATABASE = "give the test a database of its own, where it may commit: fresh_database"


def impossible(pool: str, what: str, why: str, instead: str = "") -> SandboxError:
    """Return the error for what cannot be had in the transaction of a test."""
    advice = f"{instead}, or {A_DATABASE}" if instead else A_DATABASE
    return SandboxError(
        f'{what} cannot be had in the sandbox of pool "{pool}"',
        detail=f"{why} All that a sandbox does is in one transaction, which is rolled back.",
        hint=f"{advice[0].upper()}{advice[1:]}. {see('sandbox')}",
    )
