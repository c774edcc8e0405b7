"""The frozen facts: what they add up to, and that they are frozen and travel."""

from __future__ import annotations

import copy
import pickle
from dataclasses import FrozenInstanceError, replace

import pytest

from poolkeeper._snapshot import CheckoutRow, LoadRow, PoolSnapshot, WaiterRow

ROW = CheckoutRow("report-7", "app/report.py:52", 4.0, 1.0, "idle", 0.1, 4711)
LOAD = LoadRow(window_seconds=10.0, acquires=50, released=40, held_seconds=20.0, query_seconds=5.0)


@pytest.mark.parametrize(
    ("held", "in_queries", "share"),
    [(4.0, 1.0, 0.25), (4.0, 0.0, 0.0), (4.0, 4.1, 1.0), (0.0, 0.0, 1.0)],
)
def test_the_used_share_is_the_time_in_queries(
    held: float, in_queries: float, share: float
) -> None:
    """Of one that was acquired just now nobody can say that it is hardly used."""
    assert replace(ROW, held_seconds=held, query_seconds=in_queries).used_share == share


def test_the_load_is_shown_as_rate_and_mean() -> None:
    assert LOAD.arrivals_per_second == 5.0
    assert LOAD.mean_held_seconds == 0.5


def test_a_load_of_nothing_is_nothing() -> None:
    nothing = PoolSnapshot("orders", "open", 0, 0, 0, 4, 0).load
    assert (nothing.arrivals_per_second, nothing.mean_held_seconds) == (0.0, 0.0)


def test_the_five_numbers_come_in_their_order() -> None:
    snapshot = PoolSnapshot("orders", "open", 10, 8, 2, 12, 14)
    assert snapshot.numbers() == "total=10 in_use=8 idle=2 max=12 waiting=14"


def test_what_is_neither_idle_nor_in_use_is_shown_after_the_five() -> None:
    snapshot = PoolSnapshot(
        "orders", "open", 10, 8, 0, 12, 14, making=1, returning=0, checking=2
    )  # fmt: skip
    assert snapshot.numbers() == "total=10 in_use=8 idle=0 max=12 waiting=14 making=1 checking=2"


def test_a_snapshot_is_frozen_and_travels() -> None:
    snapshot = PoolSnapshot(
        "orders", "open", 1, 1, 0, 1, 1,
        checkouts=(ROW,), waiters=(WaiterRow("task", "app/x.py:1", 1.5, 0),), load=LOAD,
    )  # fmt: skip
    with pytest.raises(FrozenInstanceError):
        snapshot.total = 2  # type: ignore[misc]
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        assert pickle.loads(pickle.dumps(snapshot, protocol)) == snapshot
    assert copy.deepcopy(snapshot) == snapshot
    assert hash(snapshot) == hash(replace(snapshot))
