"""
FastStream: the pool opens and closes with the application.

```python
app = FastStream(broker, lifespan=lifespan(db))


@broker.subscriber("orders")
async def add(order: Order) -> None:
    async with db.connection() as conn: ...
```
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any, TypeAlias

from poolkeeper import PoolManager

from ._shared import KEY, Span, call_site, requires

with requires("faststream"):
    from faststream import ContextRepo

__all__ = ["KEY", "lifespan"]

Lifespan: TypeAlias = Callable[[ContextRepo], AbstractAsyncContextManager[None]]


def lifespan(
    manager: PoolManager[Any], inner: Lifespan | None = None, *, key: str = KEY
) -> Lifespan:
    """
    Return a lifespan that opens *manager* when the application starts, and closes it at the end.

    The pool is open before the broker starts and before all start-up hooks, and until the broker
    has stopped and all shutdown hooks have ended. If it cannot be opened, or *inner* fails, the
    application does not start, and the pool is closed. A manager that is open on this loop already
    is used, and left open. In a test, ``TestApp(app)`` runs the lifespan, ``TestBroker`` does not.

    How long messages may take at the end is up to the broker's ``graceful_timeout``.

    Args:
        manager: Your manager; safe to create at import time.
        inner: A lifespan of your own, which is called with the context.
        key: Where handlers find it: ``db: Annotated[PoolManager, Context("poolkeeper")]``.

    .. versionadded:: 0.1.0
    """
    site = call_site()

    @asynccontextmanager
    async def span(context: ContextRepo) -> AsyncGenerator[None]:
        async with Span(manager, site):
            context.set_global(key, manager)
            if inner is None:
                yield
            else:
                async with inner(context):
                    yield

    return span
