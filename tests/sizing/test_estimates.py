"""The estimates, beside formulas that are exact, and beside a simulation made in another way."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from itertools import islice
from xml.etree import ElementTree

import pytest

from poolkeeper import ConfigError
from poolkeeper.sizing import (
    Fleet,
    Server,
    Use,
    Waits,
    Workload,
    _advice,
    _replay,
    advise,
    plot,
    simulate,
)
from poolkeeper.sizing._replay import WARM_UP, estimate, replay
from poolkeeper.sizing._simulation import seed_of

PLENTY = Server(cores=1_000_000, max_connections=1_000_000)
"""A server that slows nobody down."""


def erlang_c(size: int, load: float) -> float:
    """Return the share of acquires that wait, if holds are exponential (Erlang, 1917)."""
    blocked = 1.0
    for number in range(1, size + 1):
        blocked = load * blocked / (number + load * blocked)
    share = load / size
    return blocked / (1 - share + share * blocked)


@pytest.mark.parametrize(
    ("size", "share"), [(1, 0.5), (1, 0.9), (4, 0.7), (4, 0.9), (16, 0.7), (16, 0.9)]
)
def test_exponential_holds_wait_as_erlang_says(size: int, share: float) -> None:
    hold = 0.02
    waits = estimate(Workload.of(share * size / hold, hold), size)
    waiting = erlang_c(size, share * size)
    mean = waiting * hold / (size * (1 - share))
    p99 = math.log(waiting / 0.01) * mean / waiting if waiting > 0.01 else 0.0
    assert waits.waiting == pytest.approx(waiting, rel=0.2, abs=0.002)
    assert waits.mean == pytest.approx(mean, rel=0.2, abs=hold / 100)
    assert waits.p99 == pytest.approx(p99, rel=0.2, abs=hold / 100)


@pytest.mark.parametrize("variation", [0.0, 0.5, 1.5, 3.0])
def test_any_holds_wait_as_pollaczek_and_khinchine_say(variation: float) -> None:
    work = Workload.of(35, 0.02, variation=variation)
    mean = 0.7 / 0.3 * 0.02 * (1 + work.variation**2) / 2
    assert estimate(work, 1).mean == pytest.approx(mean, rel=0.2)


HOLDS = {
    "alike": {"variation": 0.0},
    "gamma": {"variation": 0.5},
    "exponential": {"variation": 1.0},
    "wide": {"variation": 2.0},
}


@pytest.mark.parametrize("share", [0.5, 0.9])
@pytest.mark.parametrize("holds", HOLDS)
def test_a_simulation_event_by_event_waits_as_long(holds: str, share: float) -> None:
    """The same acquires, by two programs that have nothing in common."""
    hold, size, draws = 0.02, 4, 20_000
    work = Workload.of(share * size / hold, hold, **HOLDS[holds])
    row = simulate(work, 1, size, PLENTY, draws=draws, seed=7)
    waits = replay(islice(work.draw(seed_of(7, 0)), draws), size)[int(draws * WARM_UP) :]
    assert row.waits is not None
    assert row.waits.p99 == pytest.approx(Waits.of(waits).p99, rel=1e-6)
    assert row.waits.mean == pytest.approx(Waits.of(waits).mean, rel=1e-6)
    assert row.stretch == pytest.approx(1.0)


def test_bursts_stay_bursts() -> None:
    """Twenty at once, then nothing for long: hardly any load, and long waits all the same."""
    uses = tuple(Use(1.0 if i % 20 == 0 else 0.0, 0.01, 0.01) for i in range(2_000))
    work = Workload(uses)
    assert work.load == pytest.approx(0.2)
    assert 0.19 <= estimate(work, 1).p99 <= 0.25
    assert estimate(work, 40).p99 == 0


def test_what_was_recorded_is_replayed_one_by_one() -> None:
    uses = [Use(0.0, 3.0, 0.0), Use(1.0, 3.0, 0.0), Use(1.0, 1.0, 0.0)]
    assert replay(uses, 1) == [0.0, 2.0, 4.0]
    assert replay(uses, 2) == [0.0, 0.0, 1.0]


# --- a server that has enough to do ---------------------------------------------------------------


def test_a_shared_core_makes_holds_longer_as_theory_says() -> None:
    """M/G/1 with processor sharing: longer by 1 / (1 - load), however the holds are spread."""
    for variation in (0.0, 2.0):
        work = Workload.of(50, 0.01, variation=variation)
        row = simulate(work, 1, 1_000, Server(1, 1_000), draws=50_000)
        assert row.stretch == pytest.approx(2.0, rel=0.1)


def test_time_of_the_program_s_own_slows_nobody_down() -> None:
    work = Workload.of(50, 0.01, query=0.001)
    row = simulate(work, 1, 1_000, Server(1, 1_000), draws=50_000)
    assert row.stretch == pytest.approx(1.0, abs=0.02)


def test_a_pooler_is_waited_for_like_a_pool() -> None:
    """With as many in each process as want one, the pooler is where the waiting is."""
    work = Workload.of(40, 0.01)
    row = simulate(work, 4, 100, PLENTY, pooler=2, draws=50_000)
    alone = estimate(Workload.of(160, 0.01), 2)
    assert row.waits is not None
    assert row.pooler_waits is not None
    assert row.waits.p99 == 0
    assert row.pooler_waits.p99 == pytest.approx(alone.p99, rel=0.2)
    assert row.sessions == 2


def test_what_the_server_has_not_is_refused_and_what_it_cannot_has_no_end() -> None:
    work = Workload.of(10, 0.01)
    row = simulate(work, 1_000, 4, Server(64, 500))
    assert not row.possible
    assert not row.keeps(1)
    assert simulate(work, 1_000, 4, Server(64, 500), pooler=50).waits is None  # 100 in use
    assert simulate(work, 1_000, 4, Server(64, 500), pooler=200).waits is None  # 64 cores


def test_a_thousand_processes_are_a_table() -> None:
    fleet = Fleet.of(
        Workload.of(1, 0.02, query=0.005), 1_000, Server(8, 500), sizes=[2], pooler=32, draws=20_000
    )
    direct, pooled = fleet.rows
    assert not direct.possible
    assert pooled.keeps(0.010)
    assert fleet.busy == pytest.approx(0.625, rel=0.01)
    text = str(fleet)
    assert "refused: the server has 500" in text
    assert "keeps 10 ms" in text
    assert json.loads(json.dumps(fleet.as_dict()))["rows"][1]["keeps"]
    too_much = replace(fleet, server=Server(4, 500))
    assert "no pool helps with that" in str(too_much)


def test_each_simulation_of_a_fleet_is_told_when_it_is_done() -> None:
    """Of the pooler's size, too, that has no end: 2.5 are wanted of 2."""
    told: list[tuple[int, int]] = []
    fleet = Fleet.of(
        Workload.of(5, 0.01), 50, PLENTY, sizes=[2], pooler=2, draws=2_000,
        told=lambda done, of: told.append((done, of)),
    )  # fmt: skip
    assert told == [(1, 2), (2, 2)]
    assert fleet.rows[1].waits is None
    assert "longer and longer: there is too little of something" in str(fleet)


# --- the advice -----------------------------------------------------------------------------------


def test_the_smallest_size_that_will_do_is_advised() -> None:
    advice = advise(Workload.of(180, 0.021, variation=1.3), current=4)
    assert advice.size in (8, 9)
    by_size = {row.size: row for row in advice.rows}
    assert by_size[3].waits is None  # 3.8 connections in use
    waits = [row.waits.p99 for row in advice.rows if row.waits]
    assert waits == sorted(waits, reverse=True)
    lines = str(advice).splitlines()
    assert sum(line.endswith("advised") for line in lines) == 1
    assert any(line.startswith("       4") and line.endswith("now") for line in lines)
    assert any("longer and longer" in line for line in lines)


def test_what_would_take_too_many_looks_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """A hundred at once, and little else: no size nearby does it without a wait."""
    monkeypatch.setattr(_advice, "ROWS", 3)
    monkeypatch.setattr(_replay, "FEWEST_DRAWS", 1_000)
    uses = tuple(Use(60.0 if i % 100 == 0 else 0.0, 0.01, 0.01) for i in range(2_000))
    advice = advise(Workload(uses))
    assert [row.size for row in advice.rows] == [1, 2, 3]
    assert advice.rows[-1].waits is not None
    assert advice.rows[-1].waits.p99 > 0.0005


def test_none_may_be_enough() -> None:
    advice = advise(Workload.of(180, 0.021), sizes=[2, 3, 4], target=0.001)
    assert advice.size is None
    assert "None of these keeps the wait within 1.0 ms" in str(advice)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("rate", {"rate": 0, "hold": 1}),
        ("hold", {"rate": 1, "hold": -1}),
        ("hold", {"rate": 1, "hold": math.inf}),
        ("variation", {"rate": 1, "hold": 1, "variation": math.nan}),
        ("query", {"rate": 1, "hold": 1, "query": 2}),
    ],
)
def test_a_number_that_cannot_be_is_named(name: str, arguments: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=f"^{name} cannot be"):
        Workload.of(**arguments)


@pytest.mark.parametrize("uses", [(), (Use(0.0, 1.0, 1.0),)])
def test_too_little_to_tell_from_is_told(uses: tuple[Use, ...]) -> None:
    with pytest.raises(ConfigError, match="cannot tell how often"):
        Workload(uses)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("target", {"target": -1}),
        ("sizes", {"sizes": [0]}),
        ("sizes", {"sizes": [4, -1]}),
        ("current", {"current": 0}),
    ],
)
def test_a_question_that_cannot_be_is_refused(name: str, arguments: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=f"^{name} cannot be"):
        advise(Workload.of(1, 1), **arguments)  # type: ignore[arg-type]


def test_a_plot_stands_alone() -> None:
    advice = advise(Workload.of(180, 0.021), sizes=[3, 5, 8, 12], target=0.005, name="<orders>")
    svg = ElementTree.fromstring(plot(advice))
    words = ["".join(text.itertext()) for text in svg.iter("{http://www.w3.org/2000/svg}text")]
    assert 'pool "<orders>", 180 acquires per second, held for 21 ms' in words
    assert {"5", "8", "12", "none", "max_size", "wanted at p99: 5.0 ms"} <= set(words)
    assert "3" not in words  # it can never do it
    assert not {part.tag for part in svg.iter()} & {"script", "image", "use"}


@pytest.mark.parametrize("sizes", [[3], [40]])
def test_a_plot_of_one_size_or_none_is_a_plot(sizes: list[int]) -> None:
    assert ElementTree.fromstring(plot(advise(Workload.of(180, 0.021), sizes=sizes))).tag


def test_few_waits_are_summed_up() -> None:
    assert Waits.of([0.0]) == Waits(0.0, 0.0, 0.0, 0.0)
    assert Waits.of([0.0, 2.0]) == Waits(1.0, 2.0, 2.0, 0.5)
