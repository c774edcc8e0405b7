"""
psycopg_pool's statistics: under its keys, counted here.

Times are summed in seconds and told in whole milliseconds; what is left of a millisecond stays
for the next time.
"""

from __future__ import annotations

from collections import Counter
from math import modf


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
        self._told: Counter[str] = Counter()
        self._rest: dict[str, float] = {}
        self._zero()

    def _zero(self) -> None:
        self.requests = self.queued = 0
        self.wait_seconds = self.usage_seconds = 0.0

    def count(self, key: str, by: int = 1) -> None:
        """Add to what is told as *key*."""
        self._told[key] += by

    def read(self) -> dict[str, int]:
        """Return all there is so far; what nothing was counted of is left out."""
        for key, number in (("requests_num", self.requests), ("requests_queued", self.queued)):
            if number:
                self._told[key] += number
        for key, seconds in (
            ("requests_wait_ms", self.wait_seconds),
            ("usage_ms", self.usage_seconds),
        ):
            if seconds:
                self._rest[key], whole = modf(seconds * 1000 + self._rest.get(key, 0.0))
                self._told[key] += int(whole)
        self._zero()
        return dict(self._told)

    def pop(self) -> dict[str, int]:
        """Return all there is so far, and begin again."""
        counted = self.read()
        self._told.clear()
        return counted
