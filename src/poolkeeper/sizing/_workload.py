"""
What a pool has to do: when connections were acquired, and for how long they were held.

Either as it was recorded, or made up from a rate and a mean. A recorded one is drawn from in
blocks of acquires that came one after the other, so bursts stay bursts.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple, Self

from poolkeeper.errors import ConfigError

BLOCK = 256
"""Acquires that stay together when one draws from a recording."""

MADE_UP = 20_000
"""Acquires of a workload that was not recorded."""


class Use(NamedTuple):
    """One use of a connection, all in seconds."""

    gap: float
    """Since the acquire before it."""

    hold: float
    """From the end of the acquire until it was given back."""

    query: float
    """How much of *hold* the server worked, or was waited for."""


@dataclass(frozen=True, slots=True)
class Workload:
    """
    What one pool has to do.

    Args:
        uses: In the order of their acquires.
        block: How many stay together when one draws from them, for bursts to stay bursts; 1 if
            they know nothing of each other.

    Raises:
        ConfigError: If there is no use, or if all of them came in one moment.

    .. versionadded:: 0.1.0
    """

    uses: tuple[Use, ...]
    block: int = BLOCK

    def __post_init__(self) -> None:
        if not self.uses or self.seconds <= 0:
            raise ConfigError(
                "cannot tell how often connections are acquired",
                detail=f"There are {len(self.uses)} acquires, in {self.seconds:g} s.",
                hint="Record for longer, under the load that the pool is to be made for",
            )

    @classmethod
    def of(
        cls,
        rate: float,
        hold: float,
        *,
        variation: float = 1.0,
        query: float | None = None,
        seed: int = 1,
    ) -> Self:
        """
        Make one up: arrivals that know nothing of each other, holds from a gamma distribution.

        Args:
            rate: Acquires per second.
            hold: Seconds that one is held, on average.
            variation: Standard deviation of the holds, in means; 0 if all are alike, 1 for
                exponential ones.
            query: Seconds of *hold* in which the server works, on average; all of it if None.
            seed: Of the random numbers.

        Raises:
            ConfigError: If a number cannot be.
        """
        for name, value in {"rate": rate, "hold": hold}.items():
            require(value > 0 and math.isfinite(value), name, value, "a number above 0")
        require(variation >= 0 and math.isfinite(variation), "variation", variation, "0 or more")
        query = hold if query is None else query
        require(0 <= query <= hold, "query", query, "seconds, 0 to those of hold")
        draw = random.Random(seed)
        shape = variation**-2 if variation else 0.0

        gaps = _with_mean([draw.expovariate(rate) for _ in range(MADE_UP)], 1 / rate)
        holds = _with_mean(
            [draw.gammavariate(shape, 1.0) if shape else 1.0 for _ in range(MADE_UP)], hold
        )
        share = query / hold
        uses = tuple(Use(g, h, h * share) for g, h in zip(gaps, holds, strict=True))
        return cls(uses, block=1)

    @property
    def seconds(self) -> float:
        """From the first acquire to the last."""
        return sum(use.gap for use in self.uses)

    @property
    def rate(self) -> float:
        """Acquires per second."""
        return len(self.uses) / self.seconds

    @property
    def hold(self) -> float:
        """Seconds that one is held, on average."""
        return sum(use.hold for use in self.uses) / len(self.uses)

    @property
    def variation(self) -> float:
        """Standard deviation of the holds, in means."""
        mean = self.hold
        square = sum((use.hold - mean) ** 2 for use in self.uses) / len(self.uses)
        return math.sqrt(square) / mean if mean else 0.0

    @property
    def load(self) -> float:
        """How many connections are in use, on average, if there are enough."""
        return self.rate * self.hold

    def draw(self, seed: int) -> Iterator[Use]:
        """Go on for ever with what might come, in blocks of what came."""
        uses, choose = self.uses, random.Random(seed)
        number = len(uses)
        length = min(self.block, number)
        while length == 1:
            yield from choose.choices(uses, k=BLOCK)
        while True:
            begin = choose.randrange(number)
            block = uses[begin : begin + length]
            yield from block
            yield from uses[: length - len(block)]


def _with_mean(drawn: list[float], mean: float) -> list[float]:
    """Mend what chance has done to the mean: it is what was asked for."""
    factor = mean * len(drawn) / sum(drawn)
    return [value * factor for value in drawn]


def require(holds: bool, name: str, value: object, wanted: str) -> None:
    if not holds:
        raise ConfigError(
            f"{name} cannot be {value!r}", parameter=name, detail=f"It takes {wanted}."
        )
