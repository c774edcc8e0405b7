"""
Opening: one life begins, is put together, and is waited for until it has its connections.

Of threads and tasks that open one pool at once, one begins the life; all who wait are told the
same. An `open()` that fails or is cancelled ends the life that did not come to be open, unless
somebody else still waits for it.
"""
# A pool's life, and what it was made with, are not its users'.
# pyright: reportPrivateUsage=false

from __future__ import annotations

import asyncio
import weakref
from functools import partial
from time import monotonic

from ._acquiring import end_deadlock, time_out
from ._binding import LoopBinding, beginning
from ._checking import Checks
from ._classes import BoundClasses
from ._clock import LineClock, SlowCallbacks
from ._closing import abandon, bury, end
from ._events import listeners_of
from ._failover import Failover
from ._front import Front
from ._life import Life, Pool
from ._making import Maker
from ._no_life import State
from ._processes import expected
from ._recovery import Connector
from ._reporting import open_error
from ._stock import help_growth, let_go, shrink
from ._storm import Storm
from ._tasks import Tasks
from ._watching import Watch, watch_for_leaks
from ._where import Place, warn_user
from .errors import ConnectionBudgetWarning, DuplicatePoolWarning, LoopMismatchError, another


async def open_pool(pool: Pool, wait: bool, timeout: float, caller: str | None) -> None:
    """Begin a life where none goes on here: see `BoundPool.open()`."""
    while isinstance(life := pool._life, Life) and life.ending and _alive_here(life):
        await life.until_ended()
    life = begin(pool, caller)
    life.announce()
    if wait:
        await until_ready(life, timeout)
        await _tell_found(life, caller)
    else:
        life.openers.unawaited = True


async def _tell_found(life: Life, caller: str | None) -> None:
    """Tell whoever has opened it what was found out; where that is an error, it is not open."""
    life.front.tell()
    try:
        life.front.warn(life.max_size, caller)
    except ConnectionBudgetWarning:
        await end(life, 0.0, None)
        raise


def open_in_constructor(pool: Pool, warned: bool) -> None:
    """Open the pool on the running loop; who uses it first is warned, if nobody was yet."""
    life = begin(pool, None)
    life.openers.unawaited = True
    if not warned:
        life.announced = False
        life.binding.admit_nobody()


def begin(pool: Pool, caller: str | None) -> Life:
    """Return the life that goes on here, or begin one; of threads that come at once one does."""
    abandoned: Life | None = None
    try:
        with beginning():
            before = pool._life
            if isinstance(before, Life) and not before.ending and not before.gone:
                life = before
            else:
                binding = LoopBinding(pool.name, caller)  # raises where no pool can be opened
                if isinstance(before, Life):
                    abandon(before)
                    abandoned = before
                life = pool._life = _put_together(pool, binding)
    except LoopMismatchError as ex:
        listeners_of(pool).tell(
            "loop_mismatch", purpose="open it", opened="", used=str(Place.here(caller))
        )
        raise ex
    finally:
        if abandoned is not None:
            bury(abandoned)
    if life is before:
        life.binding.check("open it")
        return life
    life.note_made()
    life.tasks.stay()
    for _ in range(life.min_size):
        life.connector.add()
    return life


def _alive_here(life: Life) -> bool:
    """Tell whether a life goes on; raise if it goes on elsewhere."""
    if life.gone:
        return False
    life.binding.check("open it")
    return True


def _put_together(pool: Pool, binding: LoopBinding) -> Life:
    """Make a life, whose parts know what to call, but hold no connection yet."""
    loop = asyncio.get_running_loop()
    reference: weakref.ref[Life]

    def look() -> None:
        shrink(reference)

    life = Life(pool, binding, Tasks(binding, pool.max_idle, look))
    reference = weakref.ref(life)
    if not life.keeps:
        life.keep = partial(let_go, life)
    life.clock = LineClock(
        loop,
        life.line,
        partial(time_out, life),
        partial(help_growth, life),
        partial(end_deadlock, life),
        partial(_stood_still, life),
    )
    life.watch = watch = Watch(life)
    life.storm = Storm(watch, loop, life.tasks.context)
    life.connector = Connector(Maker(life), loop)
    life.checks = Checks(watch, life.between)
    life.failover = Failover(watch)
    life.front = Front(life.name, expected(pool._options.expected_processes), life.cleaner)
    life.classes = BoundClasses(pool, binding)
    binding.pool = weakref.ref(pool)
    binding.listeners = life.listeners
    if loop.get_debug():
        life.slow_callbacks = SlowCallbacks()
    if life.leak_threshold is not None:
        watch_for_leaks(life, life.leak_threshold)
    return life


def _stood_still(life: Life, seconds: float) -> None:
    by = life.slow_callbacks.last if life.slow_callbacks else ""
    life.listeners.tell("stalled", seconds=seconds, stalled_by=by)


def note_opened(pool: Pool, caller: str | None) -> None:
    """Note that a manager's pool was opened; warn if another is, for the same server and loop."""
    server = pool._server
    with beginning():  # other threads open theirs
        others = [] if server is None or pool in _opened else list(_opened)
    for other in others:
        life = other._life
        if other._server == server and not life.ending and life.binding.is_here():
            warn_user(
                f'pool "{pool.name}" is the second one open for the same server, database'
                f' and user on this loop; pool "{other.name}" was opened'
                f" {life.opened}, this one {pool._life.opened}. A pool made per request or per"
                " call costs more than no pool: make one and share it",
                DuplicatePoolWarning,
                caller,
            )
            break
    with beginning():
        _opened.add(pool)


_opened: weakref.WeakSet[Pool] = weakref.WeakSet()


# --- waiting for it ------------------------------------------------------------------------------


async def until_ready(life: Life, timeout: float) -> None:
    """
    Wait until there are `min_size` connections.

    Raises:
        OpenError: If they cannot be made, or not within *timeout* seconds.
    """
    openers = life.openers
    if life.state is State.OPEN and life.has_minimum and life.keeps:
        openers.unawaited = True
        return
    opener = openers.join(monotonic() + timeout)
    if not life.keeps:
        life.connector.add()  # to see that one can be made; nobody waits for it
    try:
        failed = life.connector.last_failure
        if failed is not None and failed.is_permanent:
            openers.tell(open_error(life, None))
        await asyncio.wait({opener}, timeout=timeout)
    except BaseException:
        openers.leave(opener)
        if not openers.unawaited:
            await _give_up(life, None)
        raise
    openers.leave(opener)
    failure = opener.result() if opener.done() else open_error(life, timeout)
    if failure is not None:
        await _give_up(life, failure)
        raise another(failure)
    openers.unawaited = True


async def _give_up(life: Life, failure: BaseException | None) -> None:
    """End a life that did not come to be open, unless another task waits for it."""
    if life.openers:
        return
    # Open already, if a cancellation came together with the last connection: an opener
    # that was cancelled will not close what it does not know to be open.
    if life.state is State.OPENING or (life.state is State.OPEN and not life.openers.unawaited):
        await end(life, 0.0, failure)
