"""What the adapters of the tools do with hooks, signals and middleware that are there already."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any

import arq.worker
import celery
import dramatiq
import faststream
import pytest
import taskiq
from celery import signals
from celery.concurrency.solo import TaskPool
from dramatiq.brokers.stub import StubBroker
from dramatiq.middleware import AsyncIO

from poolkeeper import PoolManager
from poolkeeper.adapters import arq as on_arq
from poolkeeper.adapters import celery as on_celery
from poolkeeper.adapters import dramatiq as on_dramatiq
from poolkeeper.adapters import faststream as on_faststream
from poolkeeper.adapters import saq as on_saq
from poolkeeper.adapters import taskiq as on_taskiq


class Said:
    """Hooks of a user's own, and what they saw."""

    def __init__(self, db: PoolManager[Any]) -> None:
        self._db = db
        self.all: list[str] = []

    async def start(self, ctx: dict[str, Any]) -> None:
        assert ctx["poolkeeper"] is self._db
        self.all.append(f"start: {self._db.state}")

    async def stop(self, ctx: dict[str, Any]) -> None:
        assert ctx["poolkeeper"] is self._db
        self.all.append(f"stop: {self._db.state}")


# --- arq ------------------------------------------------------------------------------------------


async def test_arq_settings_in_a_dict_get_the_hooks(make_manager: Any) -> None:
    db = make_manager(min_size=1)
    settings: dict[str, Any] = {"functions": []}
    on_arq.setup(settings, db)
    hooks = arq.worker.get_kwargs(settings)  # type: ignore[arg-type]
    ctx: dict[str, Any] = {}
    await hooks["on_startup"](ctx)
    assert (ctx, db.state) == ({"poolkeeper": db}, "open")
    await hooks["on_shutdown"](ctx)
    assert db.state == "closed"


async def test_hooks_of_an_arq_worker_have_the_pool(make_manager: Any) -> None:
    db = make_manager(min_size=1)
    said = Said(db)

    class Settings:
        functions = ()
        on_startup = said.start
        on_shutdown = said.stop

    on_arq.setup(Settings, db)
    ctx: dict[str, Any] = {}
    await Settings.on_startup(ctx)
    await Settings.on_shutdown(ctx)
    assert said.all == ["start: open", "stop: open"]
    assert db.state == "closed"


async def test_the_pool_of_an_arq_worker_whose_own_start_fails_is_closed(make_manager: Any) -> None:
    db = make_manager(min_size=1)

    async def fail(ctx: dict[str, Any]) -> None:
        assert ctx["poolkeeper"].state == "open"
        raise LookupError

    settings: dict[str, Any] = {"on_startup": fail}
    on_arq.setup(settings, db)
    with pytest.raises(LookupError):
        await settings["on_startup"]({})
    assert db.state == "closed"


# --- SAQ, taskiq, FastStream ----------------------------------------------------------------------


@pytest.mark.parametrize("several", [False, True])
async def test_hooks_of_a_saq_worker_have_the_pool(make_manager: Any, several: bool) -> None:
    db = make_manager(min_size=1)
    said = Said(db)
    settings: dict[str, Any] = {"startup": said.start, "shutdown": said.stop}
    if several:
        settings = {name: [hook, hook] for name, hook in settings.items()}
    on_saq.setup(settings, db)
    ctx: dict[str, Any] = {}
    for hook in settings["startup"] + settings["shutdown"]:
        await hook(ctx)
    times = 2 if several else 1
    assert said.all == ["start: open"] * times + ["stop: open"] * times
    assert db.state == "closed"


async def test_a_taskiq_broker_that_starts_again_closes_the_pool_last_again(
    make_manager: Any,
) -> None:
    db = make_manager(min_size=1)
    broker = taskiq.InMemoryBroker()
    on_taskiq.setup(broker, db)
    await broker.startup()
    assert db.state == "open"
    await broker.shutdown()
    assert db.state == "closed"
    seen: list[str] = []
    broker.add_event_handler(
        taskiq.TaskiqEvents.WORKER_SHUTDOWN, lambda _: seen.append(str(db.state))
    )
    await broker.startup()
    await broker.shutdown()
    assert seen == ["open"]
    assert db.state == "closed"


async def test_a_lifespan_of_a_faststream_users_own_has_the_pool(make_manager: Any) -> None:
    db = make_manager(min_size=1)
    said: list[str] = []

    @asynccontextmanager
    async def own(context: faststream.ContextRepo) -> AsyncIterator[None]:
        assert context.get("poolkeeper") is db
        said.append(f"start: {db.state}")
        yield
        said.append(f"stop: {db.state}")

    async with on_faststream.lifespan(db, own)(faststream.ContextRepo()):
        assert said == ["start: open"]
    assert said == ["start: open", "stop: open"]
    assert db.state == "closed"


# --- Dramatiq -------------------------------------------------------------------------------------


def test_dramatiqs_own_middleware_for_a_loop_is_used_where_it_is_there(make_manager: Any) -> None:
    db = make_manager(min_size=1)
    broker = StubBroker(middleware=[AsyncIO()])
    on_dramatiq.setup(broker, db)
    assert sum(isinstance(one, AsyncIO) for one in broker.middleware) == 1
    worker = dramatiq.Worker(broker, worker_threads=1, worker_timeout=10)
    worker.start()
    try:
        assert db.state == "open"
    finally:
        worker.stop()
    assert db.state == "closed"


# --- Celery ---------------------------------------------------------------------------------------


class Worker:
    """What Celery's own says of itself."""

    def __init__(self, app: celery.Celery, pool_cls: type) -> None:
        self.app = app
        self.pool_cls = pool_cls


@pytest.fixture
def celerys_signals() -> Iterator[None]:
    """Take the receivers away in the end: they are for all applications of the process."""
    used = (
        signals.worker_init,
        signals.worker_process_init,
        signals.worker_process_shutdown,
        signals.worker_shutdown,
    )
    before = [list(signal.receivers or ()) for signal in used]
    yield
    for signal, receivers in zip(used, before, strict=True):
        signal.receivers = receivers
        signal.sender_receivers_cache.clear()


@pytest.mark.usefixtures("celerys_signals")
def test_a_worker_of_another_celery_application_leaves_the_pool_alone(make_manager: Any) -> None:
    db = make_manager(min_size=1)
    portal = on_celery.setup(celery.Celery("ours"), db)
    worker = Worker(celery.Celery("another"), TaskPool)
    signals.worker_init.send(sender=worker)
    signals.worker_process_init.send(sender=None)
    assert db.state == "new"
    with portal:
        signals.worker_process_shutdown.send(sender=None)
        signals.worker_shutdown.send(sender=worker)
        assert db.state == "open"


@pytest.mark.usefixtures("celerys_signals")
@pytest.mark.parametrize("kind", ["eventlet", "gevent"])
def test_a_celery_worker_of_green_threads_does_not_start(make_manager: Any, kind: str) -> None:
    app = celery.Celery("ours")
    db = make_manager(min_size=1)
    on_celery.setup(app, db)
    pool = type("TaskPool", (), {"__module__": f"celery.concurrency.{kind}"})
    with pytest.raises(SystemExit, match=f"Celery's pool '{kind}'.*take prefork, threads or solo"):
        signals.worker_init.send(sender=Worker(app, pool))
    assert db.state == "new"
