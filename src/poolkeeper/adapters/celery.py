"""
Celery: a portal in each worker process, which tasks call.

```python
app = Celery("shop", broker="redis://localhost")
portal = setup(app, db)


@app.task
def count() -> int:
    return portal.fetchval("select count(*) from orders")
```
"""

from __future__ import annotations

from importlib import import_module
from typing import Any, TypeVar

from psycopg import AsyncConnection

from poolkeeper import PoolkeeperError, PoolManager, Portal

from ._shared import requires

with requires("celery"):
    signals: Any = import_module("celery.signals")  # which has no types

__all__ = ["setup"]

ACT = TypeVar("ACT", bound=AsyncConnection[Any])

_GREEN = ("eventlet", "gevent")


def setup(app: Any, manager: PoolManager[ACT]) -> Portal[ACT]:
    """
    Return a portal for the tasks of *app*, which opens and closes with its workers.

    A worker opens the pool before it takes its first task: each process of the prefork pool its
    own, after the fork, and those of the pools solo and threads one for all tasks. If it cannot
    be opened, the worker does not start: it exits with status 1, and the reason is the last that
    it says. In a prefork pool the pool is opened and closed once in the parent for that.

    At SIGTERM Celery lets tasks finish; the pool is closed after them. Celery's soft time limit
    cancels what a task has called through the portal, and waits for its end.

    Where no worker runs (a web application, ``task.apply()`` in a test), the portal opens the
    pool with the first call.

    Args:
        app: The Celery application.
        manager: Your manager; safe to create at import time.

    .. versionadded:: 0.1.0
    """
    portal = Portal(manager)
    worker = _Worker(app, portal)
    # Celery holds receivers weakly, unless it is told otherwise.
    signals.worker_init.connect(worker.start, weak=False)
    signals.worker_process_init.connect(worker.start_process, weak=False)
    signals.worker_process_shutdown.connect(worker.stop, weak=False)
    signals.worker_shutdown.connect(worker.stop, weak=False)
    return portal


class _Worker:
    """What the signals of Celery's worker do: they are for all applications of a process."""

    def __init__(self, app: Any, portal: Portal[Any]) -> None:
        self._app = app
        self._portal = portal
        self._runs = False

    def start(self, sender: Any, **_: Any) -> None:
        """Before the pool of processes or threads is there."""
        if sender.app is not self._app:
            return
        kind = str(sender.pool_cls.__module__).rpartition(".")[2]
        if kind in _GREEN:
            raise SystemExit(
                f"poolkeeper cannot work in Celery's pool {kind!r}, which has no threads that run"
                " an event loop: take prefork, threads or solo"
            )
        self._runs = True
        try:
            self._portal.open()
        except PoolkeeperError as ex:
            # An Exception would be logged and forgotten.
            raise SystemExit(f"the worker does not start: {ex}") from ex
        if kind == "prefork":
            self._portal.close()  # no thread may run when it forks

    def start_process(self, **_: Any) -> None:
        """In each process of the prefork pool; Celery logs what this raises, and each task too."""
        if self._runs:
            self._portal.open()

    def stop(self, **_: Any) -> None:
        """At the end of a process."""
        if self._runs:
            self._portal.close()
