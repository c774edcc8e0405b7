"""
taskiq: the pool opens and closes with each worker process.

```python
broker = ListQueueBroker("redis://localhost")
setup(broker, db)


@broker.task
async def count() -> int:
    return await db.fetchval("select count(*) from orders")
```
"""

from __future__ import annotations

from typing import Any

from poolkeeper import PoolManager

from ._shared import Span, requires

with requires("taskiq"):
    from taskiq import AsyncBroker, TaskiqEvents, TaskiqState

__all__ = ["setup"]


def setup(broker: AsyncBroker, manager: PoolManager[Any]) -> None:
    """
    Open *manager* when a worker of *broker* starts, and close it at the end.

    It opens on the loop that runs the tasks, before start-up handlers that are registered later,
    and closes after all shutdown handlers. If it cannot be opened, the worker process ends with
    the reason; taskiq starts a new one, for ever unless it is told ``--max-fails``. A process
    that only sends tasks opens nothing; with an ``InMemoryBroker``, ``startup()`` does. A manager
    that is open on this loop already is used, and left open.

    Args:
        broker: The broker.
        manager: Your manager; safe to create at import time.

    .. versionadded:: 0.1.0
    """
    span = Span(manager)

    async def start(_: TaskiqState) -> None:
        # They are called in the order of their registration: this one is to be the last.
        handlers = broker.event_handlers[TaskiqEvents.WORKER_SHUTDOWN]
        if stop in handlers:
            handlers.remove(stop)
        handlers.append(stop)
        await span.start()

    async def stop(_: TaskiqState) -> None:
        await span.stop()

    broker.add_event_handler(TaskiqEvents.WORKER_STARTUP, start)
