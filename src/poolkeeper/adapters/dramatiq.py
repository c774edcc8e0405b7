"""
Dramatiq: the pool opens and closes with each worker process, on the loop of its async actors.

```python
broker = RedisBroker()
setup(broker, db)
dramatiq.set_broker(broker)


@dramatiq.actor
async def count() -> None:
    print(await db.fetchval("select count(*) from orders"))
```
"""

from __future__ import annotations

from typing import Any

from typing_extensions import override

from poolkeeper import PoolkeeperError, PoolManager

from ._shared import Span, requires

with requires("dramatiq"):
    from dramatiq import Broker, Worker
    from dramatiq.asyncio import get_event_loop_thread
    from dramatiq.middleware import AsyncIO, Middleware, MiddlewareError

__all__ = ["setup"]


def setup(broker: Broker, manager: PoolManager[Any]) -> None:
    """
    Open *manager* when a worker of *broker* starts, and close it at the end.

    It opens on the loop of Dramatiq's middleware ``AsyncIO``, which is added if it is not there:
    async actors use the manager. It closes when they have ended. If it cannot be opened, the
    worker ends, and says why; so does Dramatiq, with status 1. A process that only sends
    messages opens nothing.

    An actor that is not async has no loop: call a `Portal` there.

    Args:
        broker: The broker.
        manager: Your manager; safe to create at import time.

    .. versionadded:: 0.1.0
    """
    if not any(isinstance(one, AsyncIO) for one in broker.middleware):
        broker.add_middleware(AsyncIO())
    broker.add_middleware(_Pool(Span(manager)), after=AsyncIO)


class _Pool(Middleware):
    def __init__(self, span: Span) -> None:
        self._span = span

    @override
    def before_worker_boot(self, broker: Broker, worker: Worker) -> None:
        thread: Any = get_event_loop_thread()  # AsyncIO has come before
        try:
            thread.run_coroutine(self._span.start())
        except PoolkeeperError as ex:
            thread.stop()  # the process would wait for it
            raise MiddlewareError(str(ex)) from ex

    @override
    def after_worker_shutdown(self, broker: Broker, worker: Worker) -> None:
        thread: Any = get_event_loop_thread()  # AsyncIO comes after, at the end
        thread.run_coroutine(self._span.stop())
