"""
arq: the pool opens and closes with the worker.

```python
async def count(ctx) -> int:
    return await db.fetchval("select count(*) from orders")


class WorkerSettings:
    functions = [count]


setup(WorkerSettings, db)
```
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from poolkeeper import PoolManager

from ._shared import KEY, Span

__all__ = ["KEY", "setup"]


def setup(
    settings: type[Any] | dict[str, Any], manager: PoolManager[Any], *, key: str = KEY
) -> None:
    """
    Open *manager* when the worker of *settings* starts, and close it at the end.

    It is open before ``on_startup`` of yours begins, and until ``on_shutdown`` of yours has ended.
    If it cannot be opened, the worker ends with the reason. A manager that is open on this loop
    already is used, and left open. Needs nothing of arq.

    Args:
        settings: The settings of the worker, a class or a dict. Its hooks are put in here.
        manager: Your manager; safe to create at import time.
        key: Where jobs find it in their ``ctx``.

    .. versionadded:: 0.1.0
    """
    span = Span(manager)
    given: Any = settings if isinstance(settings, dict) else vars(settings)
    starts, stops = given.get("on_startup"), given.get("on_shutdown")

    async def start(ctx: dict[Any, Any]) -> None:
        await span.start()
        ctx[key] = manager
        try:
            await _call(starts, ctx)
        except BaseException:
            await span.stop()
            raise

    async def stop(ctx: dict[Any, Any]) -> None:
        try:
            await _call(stops, ctx)
        finally:
            await span.stop()

    for name, hook in (("on_startup", start), ("on_shutdown", stop)):
        if isinstance(settings, dict):
            settings[name] = hook
        else:
            setattr(settings, name, staticmethod(hook))


async def _call(hook: Callable[[Any], Awaitable[Any]] | None, ctx: dict[Any, Any]) -> None:
    if hook is not None:
        await hook(ctx)
