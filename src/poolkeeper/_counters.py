"""
psycopg_pool's statistics: under its keys, counted here.

Times are summed in seconds and told in whole milliseconds; what is left of a millisecond stays
for the next time.
"""

from __future__ import annotations

from collections import Counter


class Counters:
    """
    What `get_stats()` counts in one life of a pool.

    Attributes:
        requests: Acquires, those that failed included.
        queued: How many of them had to wait.
        wait_seconds: How long these did, together.
        usage_seconds: How long blocks have held connections, together.
    """

    def __init__(self) -> None:
        self.requests = self.queued = 0
        self.wait_seconds = self.usage_seconds = 0.0
        self._others: Counter[str] = Counter()
        self._before: dict[str, float] = {}
        """What there was at the last `pop()`."""

    def count(self, key: str, by: int = 1) -> None:
        """Add to what is told as *key*."""
        self._others[key] += by

    def read(self) -> dict[str, int]:
        """Return all there is since the last `pop()`; what nothing was counted of is left out."""
        return self._since(self._before, self._all())

    def pop(self) -> dict[str, int]:
        """Return all there is since the last `pop()`, and begin again."""
        before, self._before = self._before, self._all()
        return self._since(before, self._before)

    def _all(self) -> dict[str, float]:
        # Read only: another thread may ask while the loop counts, and would lose it a count.
        ours = {
            "requests_num": self.requests,
            "requests_queued": self.queued,
            "requests_wait_ms": self.wait_seconds * 1000,
            "usage_ms": self.usage_seconds * 1000,
        }
        return {**self._others, **{key: number for key, number in ours.items() if number}}

    @staticmethod
    def _since(before: dict[str, float], now: dict[str, float]) -> dict[str, int]:
        return {
            key: int(number) - int(before.get(key, 0))
            for key, number in now.items()
            if key not in before or number > before[key]
        }
