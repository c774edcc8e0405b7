"""What was measured, as Markdown: targets first, then everything side by side."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from .contestants import EVERY
from .storm import HELD
from .timing import Samples, quartiles, ratios

NAMES = [contestant.name for contestant in EVERY]
BARE, OURS = "psycopg_pool", "poolkeeper"

Results = dict[str, Any]


# --- targets ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    """One target on one loop: what was measured, and whether that will do. None: not measured."""

    text: str
    met: bool | None

    def __str__(self) -> str:
        verdict = {True: "met", False: "**not met**", None: ""}[self.met]
        return f"{self.text} {verdict}".strip()


NOT_MEASURED = Outcome("not measured", None)


def _ratio(samples: Samples, name: str, against: str, limit: float) -> Outcome:
    if against not in samples:
        return Outcome(f"{against} is not installed", None)
    values = ratios(samples, name, against)
    return Outcome(f"{spread(values)} ×", quartiles(values)[1] <= limit)


def _after_answer(found: Results, name: str) -> float:
    """Return the seconds that opening took beyond the server's own; 0 if that cannot be told."""
    pairs = zip(found[name], found["server"], strict=True)
    return max(0.0, statistics.median(ours - server for ours, server in pairs))


def _wrong_role(found: Results) -> Outcome:
    late = _after_answer(found, OURS)
    cause = "cause named" if found["cause"] else "cause not named"
    return Outcome(f"{late * 1e3:.1f} ms, {cause}", late <= 0.1 and found["cause"])


def _outage(found: dict[str, Any], away: str) -> Outcome:
    if away not in found:
        return NOT_MEASURED
    late = found[away][OURS]
    return Outcome(_late(late), late is not None and late <= 1.0)


def _storm(found: dict[str, float]) -> Outcome:
    stall, memory, told = found["stall"], found["memory"], found["told"]
    text = f"{stall:.2f} s, {memory:.0f} MiB, {_share(told)}"
    return Outcome(text, stall <= 0.3 and memory <= 40 and told == 1)


def _share(part: float) -> str:
    return "all" if part == 1 else f"{part * 100:.1f} %"


def _import(found: Results) -> Outcome:
    late = statistics.median(found["seconds"])
    loaded = ", ".join(found["frameworks"]) or "none"
    least = min(found["seconds"]) * 1e3
    text = f"{late * 1e3:.1f} ms (min {least:.1f}), frameworks: {loaded}"
    return Outcome(text, late <= 0.01 and loaded == "none")


def targets(result: Results) -> list[tuple[str, str, Outcome]]:
    """Return what was to be reached, how much of it, and what was measured on one loop."""
    cost = result["costs"]
    rejected = statistics.median(result["cross_loop"])
    failed = result["killed"][OURS]
    return [
        ("acquire + release, nobody waiting", "≤ 0.65 ×", _ratio(cost["alone"], OURS, BARE, 0.65)),
        (
            "acquire + release, 64 tasks on 4 connections",
            "≤ 0.40 ×",
            _ratio(cost["crowd"], OURS, BARE, 0.40),
        ),
        ("one row with `fetchone()`", "≤ 0.55 ×", _ratio(cost["query"], OURS, BARE, 0.55)),
        (
            "one row with `fetchone()`, beside asyncpg's `pool.fetchrow()`",
            "< 1 × asyncpg",
            _ratio(cost["query"], OURS, "asyncpg", 1.0),
        ),
        (
            "acquire on another loop, rejected in",
            "≤ 50 µs",
            Outcome(f"{rejected * 1e6:.0f} µs", rejected <= 50e-6),
        ),
        (
            "`open()` with a wrong role, after the server answered",
            "≤ 100 ms, cause named",
            _wrong_role(result["wrong_role"]),
        ),
        (
            "all idle connections killed, then 20 requests",
            "0 fail",
            Outcome(f"{failed} fail", failed == 0),
        ),
        (
            "server away for 8 s, served again after",
            "≤ 1 s",
            _outage(result["outage"], "8.0"),
        ),
        (
            "server away for 60 s, served again after",
            "≤ 1 s",
            _outage(result["outage"], "60.0"),
        ),
        (
            "10,000 tasks that give up together: the loop stands still, memory, the true cause",
            "≤ 0.3 s, ≤ 40 MiB, all",
            _storm(result["storm"][OURS]),
        ),
        ("`import poolkeeper` over `import psycopg_pool`", "≤ 10 ms", _import(result["import"])),
    ]


# --- how numbers are written --------------------------------------------------------------------


def number(value: float) -> str:
    """Return *value* with three figures or so."""
    digits = 2 if value < 1 else 1 if value < 100 else 0
    return f"{value:,.{digits}f}"


def spread(values: Sequence[float]) -> str:
    """Return the median and, in parentheses, the quartiles."""
    low, middle, high = quartiles(values)
    return f"{middle:.2f} ({low:.2f}–{high:.2f})"


def _micro(values: Sequence[float]) -> str:
    return f"{number(statistics.median(values) * 1e6)} (min {number(min(values) * 1e6)})"


def _late(seconds: float | None) -> str:
    return "never" if seconds is None else f"{seconds:.2f} s"


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


# --- the page -----------------------------------------------------------------------------------


def _costs(result: Results) -> str:
    rows = []
    for title, samples in (
        ("nobody waiting", result["costs"]["alone"]),
        ("64 tasks on 4 connections", result["costs"]["crowd"]),
        ("one row", result["costs"]["query"]),
    ):
        for name in [*NAMES, "poolkeeper, in a block"]:
            if name in samples:
                ratio = spread(ratios(samples, name, BARE)) if name != BARE else "1"
                rows.append((title, name, _micro(samples[name]), ratio))
            elif name in NAMES:
                rows.append((title, name, "not installed", ""))
    return _table(("what", "pool", "µs", "× psycopg_pool"), rows)


def _growth(result: Results) -> str:
    rows = []
    for size, by_tasks in result["growth"].items():
        for tasks, samples in by_tasks.items():
            cells = [
                number(statistics.median(samples[name]) * 1e6) if name in samples else ""
                for name in NAMES
            ]
            ratio = spread(ratios(samples, OURS, BARE))
            rows.append((f"{int(tasks):,} on {size}", *cells, ratio))
    return _table(("tasks on connections", *NAMES, "poolkeeper ×"), rows)


def _waiters(result: Results) -> str:
    rows = []
    for name in NAMES:
        if name not in result["fairness"]:
            rows.append((name, "not installed", "", "", "", ""))
            continue
        found = result["fairness"][name]
        size = result["memory"][name]
        rows.append((
            name,
            f"{found['seconds']:.2f} s",
            f"{found['median']:.2f} s",
            f"{found['max'] / found['median']:.2f}",
            f"{found['out_of_turn']:,}",
            f"{size:,.0f} ({size - result['memory']['future']:,.0f})",
        ))  # fmt: skip
    return _table(
        ("pool", "all served in", "median wait", "longest / median", "out of turn", "bytes"), rows
    )


def _storms(result: Results) -> str:
    rows = [
        (name, f"{found['stall']:.2f} s", f"{found['memory']:.0f} MiB", _share(found["told"]))
        for name, found in result["storm"].items()
    ]
    return _table(("pool", "the loop stands still", "memory", "told the true cause"), rows)


def _faults(result: Results) -> str:
    role = result["wrong_role"]
    columns = ["pool", "wrong role", "of 20 requests fail"]
    outages = result["outage"]
    columns += [f"late after {float(away):.0f} s" for away in outages]
    rows = []
    for name in NAMES:
        if name not in result["killed"]:
            rows.append((name, "not installed", "", *("" for _ in outages)))
            continue
        seconds = statistics.median(role[name])
        told = (
            "all of its timeout"
            if name == BARE and seconds >= role["bound"]
            else f"{_after_answer(role, name) * 1e3:.1f} ms"
        )
        rows.append((
            name,
            told,
            str(result["killed"][name]),
            *(_late(late[name]) for late in outages.values()),
        ))  # fmt: skip
    return _table(columns, rows)


def _clean_hands(result: Results) -> str:
    cost = {name: seconds * 1e6 for name, seconds in result["clean_hands"].items()}
    return _table(
        ("part", "µs for each release"),
        (
            (
                "a new handle, so that nothing set on the old one is inherited",
                number(cost["handle"]),
            ),
            ("a look at the settings that the server reports", number(cost["unchanged"])),
            ("both", number(sum(cost.values()))),
        ),
    )


def _sections(results: Sequence[Results], render: Any) -> str:
    return "\n\n".join(f"On {result['loop']}:\n\n{render(result)}" for result in results)


def page(results: Sequence[Results], facts: Sequence[str]) -> str:
    """Return ``docs/benchmarks.md``."""
    scale = results[0]["scale"]
    judged = [targets(result) for result in results]
    summary = _table(
        ("what", "to reach", *(result["loop"] for result in results)),
        (
            (what, limit, *(str(outcomes[row][2]) for outcomes in judged))
            for row, (what, limit, _) in enumerate(judged[0])
        ),
    )
    every = [outcome for outcomes in judged for _, _, outcome in outcomes]
    met = sum(outcome.met is True for outcome in every)
    missed = sum(outcome.met is False for outcome in every)
    warning = "" if scale["rounds"] > 1 else "**A quick try: the numbers say nothing.**\n"
    return f"""# Benchmarks

Written by `make bench`; do not edit.
`make bench SLOW=1` measures the outages too.
{warning}
Absolute times on a shared machine say little, ratios say more.
The pools take turns in one process, in rounds of {scale["seconds"] * 1e3:.0f} ms each whose order rotates, so that what disturbs one disturbs all.
A ratio is taken within each round; shown are the median of {scale["rounds"]} rounds and, in parentheses, the quartiles.
The garbage collector is off while the clock runs.
poolkeeper runs with its defaults: every guard is on.

{chr(10).join(f"- {fact}" for fact in facts)}

## Targets

Ratios are against psycopg_pool's own `AsyncConnectionPool.connection()`, unless they say otherwise.
{met} met, {missed} not met, {len(every) - met - missed} not measured.

{summary}

## Side by side

Median and smallest time of one operation.
"One row" is what each library's documentation shows: a block in a transaction for psycopg_pool and SQLAlchemy, `fetchone()` for poolkeeper, `pool.fetchrow()` for asyncpg.
"poolkeeper, in a block" is psycopg_pool's way, on poolkeeper.
asyncpg asks the server to reset a connection at each release, which the others do not.

{_sections(results, _costs)}

## How the cost grows

![Cost of one acquire and release by number of tasks](benchmarks.svg)

Each task acquires, holds for one turn of the loop, releases; µs for one of those, the median of {scale["growth_rounds"]} rounds.
The plot shows {results[0]["loop"]}.

{_sections(results, _growth)}

## Many who wait

{scale["waiters"]:,} tasks ask at once for 10 connections and hold one for 1 ms.
Where everybody is served in turn, the longest wait is at most about twice the median.
"Out of turn" counts tasks served right after one that had asked later.
Bytes are those of a task that waits, measured on a fifth as many; in parentheses without the task itself.

{_sections(results, _waiters)}

## Many who give up together

{results[0]["storm"][OURS]["waiters"]:,} tasks wait for one of {HELD} connections, each held across something else, and their time is up together; each reads its error.
The longest time that nothing else on the loop ran, and by how much the process grew while they were told; each pool in a process of its own.

{_sections(results, _storms)}

## When things go wrong

"Wrong role" is how long opening takes to fail, less the time that the server takes to refuse; psycopg_pool was given {results[0]["wrong_role"]["bound"]:.0f} s, its default is 30 s.
"Fail" is out of 20 requests after all 4 idle connections were killed.
"Late" is from when the server accepts connections again to the first request served.

{_sections(results, _faults)}

## What clean hands cost

Already part of every number above; no round trip.

{_sections(results, _clean_hands)}
"""  # noqa: E501
