"""
SAQ: the pool opens and closes with the worker.

```python
async def count(ctx) -> int:
    return await db.fetchval("select count(*) from orders")


settings = {"queue": Queue.from_url("redis://localhost"), "functions": [count]}
setup(settings, db)
```
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from poolkeeper import PoolManager

from ._shared import KEY, Span

__all__ = ["KEY", "setup"]


def setup(settings: dict[str, Any], manager: PoolManager[Any], *, key: str = KEY) -> None:
    """
    Open *manager* when the worker of *settings* starts, and close it at the end.

    It is open before ``startup`` of yours begins, and until ``shutdown`` of yours has ended. If it
    cannot be opened, the worker ends with the reason. A manager that is open on this loop already
    is used, and left open. Needs nothing of SAQ.

    SAQ's own ``PostgresQueue`` puts every connection of its pool into autocommit: give it a
    manager of its own.

    Args:
        settings: The settings of the worker. Its hooks are put in here.
        manager: Your manager; safe to create at import time.
        key: Where jobs find it in their ``ctx``.

    .. versionadded:: 0.1.0
    """
    span = Span(manager)

    async def start(ctx: dict[str, Any]) -> None:
        await span.start()
        ctx[key] = manager

    async def stop(_: dict[str, Any]) -> None:
        await span.stop()

    settings["startup"] = [start, *_each(settings.get("startup"))]
    settings["shutdown"] = [*_each(settings.get("shutdown")), stop]


def _each(hooks: Callable[..., Any] | list[Callable[..., Any]] | None) -> list[Callable[..., Any]]:
    if hooks is None:
        return []
    return [hooks] if callable(hooks) else [*hooks]
