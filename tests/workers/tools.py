"""The tools that run workers: how each is started, and what it does with a task at SIGTERM."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Tool:
    """One tool, in one way to run it."""

    example: str
    """Name of the directory in ``examples/``."""

    arguments: tuple[str, ...]
    """What Python is called with to run a worker."""

    way: str = ""
    adapter: bool = True
    """Whether there is one, and an extra of its name."""

    @property
    def name(self) -> str:
        return f"{self.example}-{self.way}" if self.way else self.example


def _celery(pool: str) -> Tool:
    arguments = ("-m", "celery", "-A", "examples.celery.app", "worker", f"--pool={pool}", "-c2")
    return Tool("celery", arguments, pool)


TOOLS = (
    _celery("prefork"),
    _celery("threads"),
    _celery("solo"),
    Tool(
        "taskiq", ("-m", "taskiq", "worker", "examples.taskiq.app:broker", "-w1", "--max-fails=1")
    ),
    Tool("dramatiq", ("-m", "dramatiq", "examples.dramatiq.app", "-p1", "-t2")),
    Tool("arq", ("-m", "arq", "examples.arq.app.WorkerSettings")),
    Tool("saq", ("-m", "saq", "examples.saq.app.settings")),
    Tool("apscheduler", ("-m", "examples.apscheduler.app"), adapter=False),
    Tool("faststream", ("-m", "faststream", "run", "examples.faststream.app:app")),
)

WORKERS = tuple(dict.fromkeys(tool.example for tool in TOOLS if tool.adapter))
"""Every tool with a module in ``poolkeeper.adapters``."""
