"""A fleet in a table: sizes of each process's pool, with and without a pooler in front."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Self

from typing_extensions import override

from ._advice import TARGET, duration
from ._simulation import DRAWS, FleetRow, Server, simulate
from ._workload import Workload, require


@dataclass(frozen=True, slots=True)
class Fleet:
    """
    So many processes with a pool each, on one server. ``str()`` is a table.

    .. versionadded:: 0.1.0
    """

    workload: Workload
    """Of one process."""

    processes: int
    server: Server
    target: float
    """Seconds that one acquire in a hundred may wait."""

    rows: tuple[FleetRow, ...]

    @classmethod
    def of(
        cls,
        workload: Workload,
        processes: int,
        server: Server,
        *,
        sizes: Sequence[int] | None = None,
        pooler: int | None = None,
        target: float = TARGET,
        draws: int = DRAWS,
        told: Callable[[int, int], None] | None = None,
    ) -> Self:
        """
        Simulate each size without a pooler, and with one. Takes some seconds for each.

        Args:
            workload: Of one process.
            processes: How many there are.
            server: What they share.
            sizes: `max_size` of each process; by default some from the first that can do it.
            pooler: Connections of the pooler, in transaction mode, to the server; None to
                simulate none.
            target: Seconds that one acquire in a hundred may wait.
            draws: Acquires of one simulation, of all processes together.
            told: Called with how many simulations are done, and of how many.

        Raises:
            ConfigError: If a number cannot be.
        """
        require(target >= 0, "target", target, "seconds, 0 or more")
        least = math.floor(workload.load) + 1
        chosen = sizes or [math.ceil(least * factor) for factor in (1, 2, 3, 5)]
        wanted = [
            (size, of) for size in chosen for of in ([None] if pooler is None else [None, pooler])
        ]
        rows: list[FleetRow] = []
        for size, of in wanted:
            rows.append(simulate(workload, processes, size, server, pooler=of, draws=draws))
            if told is not None:
                told(len(rows), len(wanted))
        return cls(workload, processes, server, target, tuple(rows))

    @property
    def busy(self) -> float:
        """Share of the server's cores that work, on average; 1 or more is too much for it."""
        uses = self.workload.uses
        query = sum(use.query for use in uses) / len(uses)
        return self.processes * self.workload.rate * query / self.server.cores

    @override
    def __str__(self) -> str:
        return "\n".join([*self._head(), "", *self._table(), "", *self._words()])

    def _head(self) -> Iterable[str]:
        work = self.workload
        yield (
            f"{self.processes:,} processes, each with {work.rate:.4g} acquires per second, held"
            f" for {duration(work.hold)} on average: {self.processes * work.load:.3g} in use"
        )
        yield (
            f"on a server with {self.server.max_connections:,} connections and"
            f" {self.server.cores:g} cores, {self.busy:.0%} busy"
        )

    def _table(self) -> Iterable[str]:
        yield "max_size  pooler  on the server  wait p50  wait p99  pooler p99  held longer"
        for row in self.rows:
            pooler = "none" if row.pooler is None else str(row.pooler)
            place = f"{row.size:>8}  {pooler:>6}  {row.sessions:>13,}"
            if not row.possible:
                yield f"{place}  refused: the server has {self.server.max_connections:,}"
            elif row.waits is None:
                yield f"{place}  longer and longer: there is too little of something"
            else:
                at_pooler = duration(row.pooler_waits.p99) if row.pooler_waits else "-"
                yield (
                    f"{place}  {duration(row.waits.p50):>8}  {duration(row.waits.p99):>8}"
                    f"  {at_pooler:>10}  {row.stretch - 1:>10.0%}"
                    f"{'  keeps ' + duration(self.target) if row.keeps(self.target) else ''}"
                )

    def _words(self) -> Iterable[str]:
        if self.busy >= 1:
            yield "The server's cores have more to do than they can: no pool helps with that."
        yield "A simulation: without locks, disks, and what a connection costs the server."

    def as_dict(self) -> dict[str, Any]:
        """Return all of it as what JSON can hold, but for the uses themselves."""
        return {
            "processes": self.processes,
            "rate": self.workload.rate,
            "hold_seconds": self.workload.hold,
            "cores": self.server.cores,
            "max_connections": self.server.max_connections,
            "busy": self.busy,
            "target_seconds": self.target,
            "rows": [asdict(row) | {"keeps": row.keeps(self.target)} for row in self.rows],
        }
