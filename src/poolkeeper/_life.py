"""
`Life`: what there is of a pool from `open()` to `close()`, and nothing else.

Opening makes one, ending throws it away; nothing is reset. So nothing of an old loop can reach
a new one, and what outlives its life (a callback of the user's that does not end) changes
nothing in the next.

A life has no behaviour of its own but for what every room needs: it says where each connection
is. What happens to a connection is in the modules that take a life. Where there is none, `NoLife`
stands in its place.
"""
# A pool's life, and what it was made with, are not its users'.
# pyright: reportPrivateUsage=false

from __future__ import annotations

import asyncio
import weakref
from collections import deque
from collections.abc import Callable, Mapping
from time import monotonic
from typing import Any, Protocol

from ._between import Between
from ._binding import LoopBinding
from ._checking import Checks
from ._checkouts import Ledger
from ._classes import BoundClasses
from ._cleaning import Cleaner
from ._clock import LineClock, SlowCallbacks
from ._counters import Counters
from ._events import listeners_of
from ._failover import Failover
from ._front import Front
from ._health import Pool as Watched
from ._health import Question
from ._line import Line
from ._log import log
from ._moment import Moment
from ._no_life import NoLife, Options, State, closed_error, warn_of_constructor
from ._recovery import Connector
from ._session import Session
from ._storm import Storm
from ._tasks import Tasks, set_done
from ._where import Place


class Pool(Protocol):
    """What a life asks of the pool that it is of; psycopg_pool's public attributes."""

    name: str
    conninfo: Any
    kwargs: Any
    connection_class: Any
    close_returns: bool
    timeout: float
    max_waiting: int
    max_lifetime: float
    max_idle: float
    reconnect_timeout: float
    num_workers: int
    _options: Options
    _life: Life | NoLife
    _server: tuple[str, ...] | None

    async def reconnect_failed(self) -> None:
        """Tell the user that an outage lasts."""
        ...

    def take_back_dropped(self, conn: Any) -> None:
        """Take a connection back that was garbage-collected and not closed."""
        ...


class StandIn:
    """
    Serves acquires in the place of a life's own connections, as a sandbox does in tests.

    Whoever acquires asks it where `LoopBinding.admits()` says no and `Life.check_usable()` yes; a
    connection of its own names it as its owner, and so comes back to it.
    """

    pool: Pool

    async def acquire(self, timeout: float | None, frame: Any, lineno: int) -> Any:
        """Return a connection; None where the pool's own are meant."""
        raise NotImplementedError

    def release(self, conn: Any, roll_back: bool, tells: bool) -> asyncio.Future[None] | None:
        """Take one of its own back, as `release()` does; return what the caller is to wait for."""
        raise NotImplementedError


class Openers:
    """
    Who waits until a pool is open.

    Attributes:
        until: When the last of them gives up.
        unawaited: True if the pool is wanted by somebody who does not wait for it, or not any
            more: it is not closed because of those who do.
    """

    def __init__(self) -> None:
        self.until = 0.0
        self.unawaited = False
        self._waiting: set[asyncio.Future[BaseException | None]] = set()

    def __bool__(self) -> bool:
        return bool(self._waiting)

    def join(self, until: float) -> asyncio.Future[BaseException | None]:
        """Wait until then: the result is None, or why it is in vain."""
        opener: asyncio.Future[BaseException | None] = asyncio.get_running_loop().create_future()
        self._waiting.add(opener)
        self.until = max(self.until, until)
        return opener

    def leave(self, opener: asyncio.Future[BaseException | None]) -> None:
        """Wait no more."""
        self._waiting.discard(opener)

    def tell(self, failure: BaseException | None) -> None:
        """Tell all that the pool is open, or why it will not be."""
        for opener in self._waiting:
            if not opener.done():
                opener.set_result(failure)


class Life:
    """
    One life of a pool. Its parts are synchronous, and belong to its loop.

    Args:
        pool: The pool.
        binding: The loop and the process that opened it.
        tasks: The tasks of this life.
    """

    # Made by whoever opens the pool, for each of them is told what to call.
    classes: BoundClasses
    connector: Connector
    clock: LineClock
    checks: Checks
    failover: Failover
    storm: Storm
    watch: Watched
    front: Front

    # What is known of it.
    announced = True
    """False if the constructor has opened it, and nobody has said a word since."""
    came_open = 0.0
    """When it came to be open; 0.0 as long as it is not."""
    late = 0
    """How many connections `close()` has taken from who held them."""
    outage_told = False
    slow_callbacks: SlowCallbacks | None = None
    leak_timer: asyncio.TimerHandle | None = None
    last_moment: Moment | None = None
    moment_until = 0.0
    question: Question | None = None
    """The last one that `check()` of the manager has asked."""

    def __init__(self, pool: Pool, binding: LoopBinding, tasks: Tasks) -> None:
        options = pool._options
        self.pool = pool
        self.name = pool.name
        self.binding = binding
        self.tasks = tasks
        self.state = State.OPENING
        self.ending = False
        """True from the beginning of `close()` on."""
        self.stand_in: StandIn | None = None
        """Who serves acquires in its place; `let_serve()` changes it."""
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.openers = Openers()
        self.configure = options.configure
        self.check = options.check
        self.reset = options.reset
        self.application_name = options.application_name
        self.leak_threshold = options.leak_threshold
        self.listeners = listeners_of(pool)
        self.began = monotonic()

        # The connections: how many, and which of them are idle, the next to be taken first.
        self.keeps = options.keeps
        self.min_size, self.max_size = options.min_size, options.max_size
        self.made = 0
        """How many there are, in whosever hands; the connector knows those to come."""
        self.prepared = 0
        """How many were made since the pool was opened."""
        self.idle: deque[Any] = deque()
        self.keep: Callable[[Any], object] = self.idle.append
        """What is done with a clean connection that nobody waits for."""
        self.idle_low = self.min_size
        """How few were idle at once, since it was looked at whether the pool can shrink."""
        self.growing = False
        """True while one is made because somebody waits; there is one such at a time."""
        self.oversized = False
        """True while there may be more than `max_size`, for that was lowered."""
        self.asked_idle = 0
        """How many that were idle are being asked, and are nobody's else."""
        self.sessions: weakref.WeakSet[Session] = weakref.WeakSet()

        # Those who wait, those who hold, and what is in between.
        self.line = Line()
        self.ledger = Ledger(self.leak_threshold)
        self.held = self.ledger.held
        self.between = Between()
        self.cleaner = Cleaner(self.name, self.configure, self.reset == "discard", self.between.now)
        self.counters = Counters()
        self.lanes: Any = None
        """What shares connections between one-shots, once there was one: see `_oneshots`."""

    def tell(self, name: str, *facts: Mapping[str, Any], **fields: Any) -> None:
        """Log an event, and tell those who have subscribed to it."""
        at = fields.pop("at", None)
        log(name, *facts, pool=self.name, on_behalf=1, **fields)
        self.listeners.tell(name, *facts, at=at, **fields)

    def tell_closed(self) -> None:
        """Tell that it is over, if it came to be open; a forked child's affair it is not."""
        if self.came_open and not self.forked:
            seconds = monotonic() - self.came_open
            self.listeners.tell(
                "closed", open_seconds=seconds, late=self.late, loop_closed=self.gone
            )

    @property
    def total(self) -> int:
        """How many connections there are, and are to be made."""
        return self.made + self.connector.wanted

    @property
    def opened(self) -> Place:
        """Where the pool was opened."""
        return self.binding.opened

    def note_idle_low(self) -> None:
        """Note how few are idle, one having been taken: the pool can shrink by no more."""
        if len(self.idle) < self.idle_low:
            self.idle_low = len(self.idle)

    def take_idle(self) -> Any:
        """Take the idle connection that has had nothing to do for longest."""
        conn = self.idle.popleft()
        self.note_idle_low()
        return conn

    def take_all_idle(self) -> list[Any]:
        """Take all the idle connections; for a moment, which does not count as use."""
        idle = list(self.idle)
        self.idle.clear()
        return idle

    def give(self, conn: Any) -> None:
        """Hand a clean connection to the task that waited longest, or keep it."""
        if not self.line or not self.line.offer(conn):
            self.keep(conn)

    @property
    def has_minimum(self) -> bool:
        """True if there are `min_size` connections, in whosever hands."""
        return self.made >= self.min_size

    def note_made(self) -> None:
        """Let the pool be open, and tell who waits for it, if there are enough."""
        if self.state is State.OPENING and self.prepared >= self.min_size:
            self.state = State.OPEN
            now = self.came_open = monotonic()
            self.listeners.tell("opened", opened=str(self.opened), seconds=now - self.began)
        if self.openers and self.state is State.OPEN and self.has_minimum:
            self.openers.tell(None)

    # --- whether it may be used ---------------------------------------------------------------

    @property
    def forked(self) -> bool:
        """True in a process forked from the one that opened the pool."""
        return self.binding.forked

    @property
    def gone(self) -> bool:
        """True when nobody can run on its loop any more, from this process."""
        return self.binding.dead

    def check_usable(self, purpose: str) -> None:
        """Return if the pool may be used here and now for *purpose*, raise otherwise."""
        self.binding.check(purpose)
        if self.ending:
            raise closed_error(self.name, State.CLOSING, self.opened, purpose)
        if not self.announced:
            self.announce()
            warn_of_constructor(type(self.pool).__name__)

    def announce(self) -> None:
        """Note that somebody has opened it in words."""
        if not self.announced and not self.ending:
            self.announced = True
            self.let_serve(self.stand_in)

    def let_serve(self, stand_in: StandIn | None) -> None:
        """Let *stand_in* serve every acquire from here on; with None, the pool itself again."""
        self.stand_in = stand_in
        if self.ending or stand_in is not None or not self.announced:
            self.binding.admit_nobody()
        else:
            self.binding.admit()

    def out_of_service(self, purpose: str) -> str | None:
        """Do as `check_usable()`, but return in words that it is not open."""
        self.binding.check(purpose)
        return "the pool is closing" if self.ending else None

    def begin_to_end(self) -> None:
        """Admit nobody any more; what there is goes on to its end."""
        self.state = State.CLOSING
        self.ending = True
        self.binding.admit_nobody()

    async def until_ended(self) -> None:
        """Wait for the end of a `close()` that is under way."""
        await asyncio.shield(self.ended)

    def end(self) -> NoLife:
        """Be over; return what stands in its place from here on."""
        self.state = State.CLOSED
        self.between.clear()
        self.pool._life = successor = NoLife(
            self.name, self.pool._options, self.binding, self.counters
        )
        if not self.gone:
            set_done(self.ended)
        return successor
