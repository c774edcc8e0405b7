"""
Many processes, each with a pool, in front of one server: by simulation.

An acquire waits for a connection of its process's pool; behind a pooler in transaction mode it
then waits for one of the pooler's. What it holds is used in two parts: the server works, sharing
its cores among all whose turn it is, and the rest is the program's own time. So the simulation
knows what a larger pool cannot help with: a server whose cores are busy makes everybody slower.

What it leaves out: locks, the cost of a connection on the server, and of the pooler itself.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from heapq import heappop, heappush
from itertools import count

from ._replay import WARM_UP, Waits
from ._workload import Use, Workload, require

DRAWS = 200_000
"""Acquires of one simulation, of all processes together."""


@dataclass(frozen=True, slots=True)
class Server:
    """
    What there is for all processes.

    Args:
        cores: Queries that it can work on at once without one slowing down another.
        max_connections: Sessions that it has for these processes.
    """

    cores: float
    max_connections: int = 97

    def __post_init__(self) -> None:
        require(self.cores > 0, "cores", self.cores, "a number above 0")
        require(self.max_connections > 0, "max_connections", self.max_connections, "1 or more")


@dataclass(frozen=True, slots=True)
class FleetRow:
    """What becomes of one way to set a fleet up."""

    size: int
    """Connections of each process."""

    pooler: int | None
    """Connections of the pooler to the server; None if there is no pooler."""

    sessions: int
    """On the server, at most."""

    possible: bool
    """False if the server has fewer sessions than that: connections are refused."""

    waits: Waits | None
    """For the process's own pool; None if it is not possible, or has no end."""

    pooler_waits: Waits | None = None
    """For a connection of the pooler's, after that."""

    stretch: float = 1.0
    """How many times longer a hold takes than on a server with nothing else to do."""

    def keeps(self, target: float) -> bool:
        """True if one acquire in a hundred waits no longer than *target*, as far as is known."""
        if self.waits is None:
            return False
        return self.waits.p99 + (self.pooler_waits.p99 if self.pooler_waits else 0.0) <= target


@dataclass(slots=True)
class _Job:
    """One use on its way; *pool* is that of its process, and *since* when it began to wait."""

    pool: _Station
    use: Use
    came: float
    since: float
    began: float = 0.0


@dataclass(slots=True)
class _Station:
    """So many connections, and who waits for one."""

    free: int
    line: deque[_Job] = field(default_factory=deque["_Job"])
    waits: list[float] = field(default_factory=list[float])

    def enter(self, job: _Job, now: float) -> bool:
        """Take a connection, or wait for one."""
        if not self.free:
            self.line.append(job)
            return False
        self.free -= 1
        self.waits.append(now - job.since)
        return True

    def leave(self, now: float) -> _Job | None:
        """Give one back; returns who has it then."""
        if not self.line:
            self.free += 1
            return None
        job = self.line.popleft()
        self.waits.append(now - job.since)
        return job


class _Cores:
    """
    A server's cores, shared equally by all who have work for them.

    Work is measured on a clock that runs as fast as each of them gets on; then the end of each
    is known when it begins.
    """

    def __init__(self, cores: float) -> None:
        self._cores = cores
        self._clock = self._at = 0.0
        self._order = count()
        self._ends: list[tuple[float, int, _Job]] = []

    def _speed(self) -> float:
        return min(1.0, self._cores / len(self._ends)) if self._ends else 1.0

    def _run_until(self, now: float) -> None:
        self._clock += (now - self._at) * self._speed()
        self._at = now

    def begin(self, job: _Job, now: float) -> None:
        self._run_until(now)
        heappush(self._ends, (self._clock + job.use.query, next(self._order), job))

    def next_end(self) -> float:
        """When the first will be done, if nobody comes; infinite if there is none."""
        if not self._ends:
            return float("inf")
        return self._at + max(0.0, self._ends[0][0] - self._clock) / self._speed()

    def end(self, now: float) -> _Job:
        self._run_until(now)
        return heappop(self._ends)[2]


def simulate(
    workload: Workload,
    processes: int,
    size: int,
    server: Server,
    *,
    pooler: int | None = None,
    draws: int = DRAWS,
    seed: int = 1,
) -> FleetRow:
    """
    Return how long acquires wait when so many processes have to do *workload* each.

    Args:
        workload: Of one process.
        processes: How many there are.
        size: `max_size` of each one's pool.
        server: What they share.
        pooler: Connections that a pooler in transaction mode makes to the server; None if there
            is none in front of it.
        draws: Acquires to simulate, of all processes together. 200,000 take a few seconds.
        seed: Of the random numbers.

    Raises:
        ConfigError: If a number cannot be.
    """
    for name, value in {"processes": processes, "size": size, "draws": draws}.items():
        require(value >= 1, name, value, "a whole number, 1 or more")
    require(pooler is None or pooler >= 1, "pooler", pooler, "a whole number, 1 or more")
    sessions = processes * size if pooler is None else min(pooler, processes * size)
    if sessions > server.max_connections:
        return FleetRow(size, pooler, sessions, possible=False, waits=None)
    work = sum(use.query for use in workload.uses) / len(workload.uses)
    slots = min(sessions, processes * size)
    if processes * workload.rate * work >= server.cores or processes * workload.load >= slots:
        return FleetRow(size, pooler, sessions, possible=True, waits=None)
    run = _Run(workload, processes, size, server, pooler, seed)
    run.until(draws)
    skip = int(draws * WARM_UP)
    return FleetRow(
        size,
        pooler,
        sessions,
        possible=True,
        waits=Waits.of(run.pool_waits[skip:]),
        pooler_waits=Waits.of(run.pooler.waits[skip:]) if run.pooler else None,
        stretch=run.held / run.wanted if run.wanted else 1.0,
    )


def seed_of(seed: int, process: int) -> int:
    """Return what the random numbers of one process begin with."""
    return seed * 1_000_003 + process


class _Run:
    """One simulation: what happens next, until enough has happened."""

    def __init__(
        self,
        workload: Workload,
        processes: int,
        size: int,
        server: Server,
        pooler: int | None,
        seed: int,
    ) -> None:
        self.pooler = None if pooler is None else _Station(pooler)
        self.pool_waits: list[float] = []
        self.held = self.wanted = 0.0
        self._cores = _Cores(server.cores)
        self._order = count()
        # What comes at a known time: an arrival, or the end of a program's own time.
        self._events: list[tuple[float, int, _Job | _Process]] = []
        for number in range(processes):
            pool = _Station(size, waits=self.pool_waits)
            uses = workload.draw(seed_of(seed, number))
            process = _Process(pool, uses, next(uses))
            self._at(process.next.gap, process)

    def until(self, draws: int) -> None:
        while len(self.pool_waits) < draws:
            done = self._cores.next_end()
            if done <= self._events[0][0]:
                self._work_done(self._cores.end(done), done)
                continue
            now, _, what = heappop(self._events)
            if isinstance(what, _Job):
                self._give_back(what, now)
            else:
                self._arrive(what, now)

    def _at(self, when: float, what: _Job | _Process) -> None:
        heappush(self._events, (when, next(self._order), what))

    def _arrive(self, process: _Process, now: float) -> None:
        job = _Job(process.pool, process.next, now, now)
        process.next = next(process.uses)
        self._at(now + process.next.gap, process)
        if process.pool.enter(job, now):
            self._got_connection(job, now)

    def _got_connection(self, job: _Job, now: float) -> None:
        job.began = job.since = now
        if self.pooler is None or self.pooler.enter(job, now):
            self._cores.begin(job, now)

    def _work_done(self, job: _Job, now: float) -> None:
        self._at(now + job.use.hold - job.use.query, job)

    def _give_back(self, job: _Job, now: float) -> None:
        self.held += now - job.began
        self.wanted += job.use.hold
        if self.pooler is not None and (other := self.pooler.leave(now)):
            self._cores.begin(other, now)
        if after := job.pool.leave(now):
            self._got_connection(after, now)


@dataclass(slots=True)
class _Process:
    pool: _Station
    uses: Iterator[Use]
    next: Use
