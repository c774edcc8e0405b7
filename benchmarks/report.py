"""What was measured, as Markdown: targets first, then everything side by side."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from .contestants import EVERY
from .contests import BARE, BY_HAND, FASTAPI, LOOPS, OURS, STAGES, THREADS, Stage, Target
from .load import CLIENTS
from .storm import HELD
from .timing import quartiles, ratios

NAMES = [contestant.name for contestant in EVERY]

Results = dict[str, Any]


# --- targets ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    """One target on one loop: what was measured, and whether that will do. None: not measured."""

    text: str
    reached: bool | None

    def __str__(self) -> str:
        verdict = {True: "reached", False: "**not reached**", None: ""}[self.reached]
        return f"{self.text} {verdict}".strip()


@dataclass(frozen=True)
class Row:
    """One target: what was to be reached, how much of it, and the outcome on each loop."""

    what: str
    limit: str
    outcomes: list[Outcome]

    @property
    def measured(self) -> bool:
        """Whether it was, on any loop."""
        return any(outcome not in (NOT_MEASURED, NOWHERE) for outcome in self.outcomes)


NOT_MEASURED = Outcome("not measured", None)
NOWHERE = Outcome("–", None)
"""Says nothing on this loop."""


def _compared(result: Results, stage: Stage, contest: str, target: Target) -> Outcome:
    if result["loop"] not in stage.loops:
        return NOWHERE
    samples = result.get("contests", {}).get(contest)
    if samples is None:
        return NOT_MEASURED
    for name in (target.ours, target.against):
        if missing := stage.missing(name):
            return Outcome(f"{missing} is not installed", None)
    values = compared(samples, target.ours, target.against, target.figure)
    reached = target.reached(quartiles(values)[1], result["loop"])
    return Outcome(f"{spread(values)} ×", reached)


def compared(samples: Any, name: str, against: str, figure: str) -> list[float]:
    """Return the ratio of two contestants, round by round."""
    if figure == "rate":
        return compared(samples, against, name, "wall")
    return ratios({each: samples[each][figure] for each in (name, against)}, name, against)


def _after_answer(found: Results, name: str) -> float:
    """Return the seconds that opening took beyond the server's own; 0 if that cannot be told."""
    pairs = zip(found[name], found["server"], strict=True)
    return max(0.0, statistics.median(ours - server for ours, server in pairs))


def _cross_loop(found: list[float]) -> Outcome:
    rejected = statistics.median(found)
    return Outcome(f"{rejected * 1e6:.0f} µs", rejected <= 50e-6)


def _wrong_role(found: Results) -> Outcome:
    late = _after_answer(found, OURS)
    cause = "cause named" if found["cause"] else "cause not named"
    return Outcome(f"{late * 1e3:.1f} ms, {cause}", late <= 0.1 and found["cause"])


def _killed(found: dict[str, int]) -> Outcome:
    return Outcome(f"{found[OURS]} fail", found[OURS] == 0)


def _outage(away: str) -> Callable[[Any], Outcome]:
    def outcome(found: dict[str, Any]) -> Outcome:
        if away not in found:
            return NOT_MEASURED
        late = found[away][OURS]
        return Outcome(_late(late), late is not None and late <= 1.0)

    return outcome


def _storm(found: dict[str, Any]) -> Outcome:
    stall, memory, told = (found[OURS][part] for part in ("stall", "memory", "told"))
    text = f"{stall:.2f} s, {memory:.0f} MiB, {_share(told)}"
    return Outcome(text, stall <= 0.3 and memory <= 40 and told == 1)


def _share(part: float) -> str:
    return "all" if part == 1 else f"{part * 100:.1f} %"


def _import(found: Results) -> Outcome:
    late = statistics.median(found["seconds"])
    loaded = ", ".join(found["frameworks"]) or "none"
    least = min(found["seconds"]) * 1e3
    text = f"{late * 1e3:.1f} ms (min {least:.1f}), frameworks: {loaded}"
    return Outcome(text, late <= 0.006 and loaded == "none")


OTHER_TARGETS: tuple[tuple[str, str, str, Callable[[Any], Outcome]], ...] = (
    ("acquire on another loop, rejected in", "≤ 50 µs", "cross-loop", _cross_loop),
    (
        "`open()` with a wrong role, after the server answered",
        "≤ 100 ms, cause named",
        "wrong-role",
        _wrong_role,
    ),
    ("all idle connections killed, then 20 requests", "0 fail", "killed", _killed),
    ("server away for 8 s, served again after", "≤ 1 s", "outages", _outage("8.0")),
    ("server away for 60 s, served again after", "≤ 1 s", "outages", _outage("60.0")),
    (
        "10,000 tasks that give up together: the loop stands still, memory, the true cause",
        "≤ 0.3 s, ≤ 40 MiB, all",
        "storm",
        _storm,
    ),
    ("`import poolkeeper` over `import psycopg_pool`", "≤ 6 ms", "import", _import),
)


def targets(results: Sequence[Results]) -> list[Row]:
    """Return what was to be reached, and what was measured on each loop."""
    rows = [
        Row(
            target.what,
            target.limit,
            [_compared(result, stage, name, target) for result in results],
        )
        for stage in STAGES.values()
        for name, contest in stage.contests.items()
        for target in contest.targets
    ]
    for what, limit, part, judge in OTHER_TARGETS:
        outcomes = [judge(result[part]) if part in result else NOT_MEASURED for result in results]
        rows.append(Row(what, limit, outcomes))
    return rows


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


def _contests(result: Results, stages: Iterable[Stage]) -> str:
    rows = []
    for stage in stages:
        for contest, about in stage.contests.items():
            samples = result["contests"].get(contest, {})
            for name in [name for name in stage.contestants if name in samples]:
                ratio = (
                    spread(compared(samples, name, BARE, figure)) if name != BARE else "1"
                    for figure in ("cpu", "wall")
                )
                each = (_micro(samples[name][figure]) for figure in ("cpu", "wall"))
                rows.append((about.title, name, *each, *ratio))
    return _table(("what", "with", "µs of CPU", "µs", "CPU ×", "time ×"), rows)


def _pools(result: Results) -> str:
    return _contests(result, (stage for stage in STAGES.values() if stage.module == "pools"))


def _clients(result: Results) -> str:
    return _contests(result, (stage for stage in STAGES.values() if stage.module == "clients"))


def _threads(result: Results) -> str:
    return _contests(result, (THREADS,))


def _endpoints(result: Results) -> str:
    samples = result["contests"]["fastapi"]
    rows = []
    for name in samples:
        rate = number(1 / statistics.median(samples[name]["wall"]))
        ratio = (
            spread(compared(samples, name, BY_HAND, figure)) if name != BY_HAND else "1"
            for figure in ("rate", "cpu")
        )
        rows.append((name, rate, _micro(samples[name]["cpu"]), *ratio))
    return _table(("endpoint", "requests/s", "µs of uvicorn's CPU", "requests ×", "CPU ×"), rows)


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
    fairness, memory = result["waiters"]["fairness"], result["waiters"]["memory"]
    rows = []
    for name in NAMES:
        if name not in fairness:
            continue
        found, size = fairness[name], memory[name]
        rows.append((
            name,
            f"{found['seconds']:.2f} s",
            f"{found['median']:.2f} s",
            f"{found['max'] / found['median']:.2f}",
            f"{found['out_of_turn']:,}",
            f"{size:,.0f} ({size - memory['future']:,.0f})",
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
    role, fail, outages = (result.get(part, {}) for part in ("wrong-role", "killed", "outages"))
    columns = {
        "wrong role": (role, lambda name: _refused(role, name)),
        "of 20 requests fail": (fail, lambda name: str(fail[name])),
        **{
            f"late after {float(away):.0f} s": (late, lambda name, late=late: _late(late[name]))
            for away, late in outages.items()
        },
    }
    measured = {title: column for title, column in columns.items() if column[0]}
    rows = [
        (name, *(cell(name) for _, cell in measured.values()))
        for name in NAMES
        if all(name in found for found, _ in measured.values())
    ]
    return _table(("pool", *measured), rows)


def _refused(role: Results, name: str) -> str:
    if name == BARE and statistics.median(role[name]) >= role["bound"]:
        return "all of its timeout"
    return f"{_after_answer(role, name) * 1e3:.1f} ms"


def _clean_hands(result: Results) -> str:
    cost = {name: seconds * 1e6 for name, seconds in result["clean-hands"].items()}
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


@dataclass(frozen=True)
class Section:
    """A part of the page; left out where none of *parts* was measured."""

    title: str
    about: str
    parts: tuple[str, ...]
    render: Callable[[Results], str]

    def text(self, results: Sequence[Results]) -> str:
        """Return it for each loop that it was measured on."""
        tables = [
            f"On {result['loop']}:\n\n{self.render(result)}"
            for result in results
            if any(part in result or part in result.get("contests", {}) for part in self.parts)
        ]
        return "\n\n".join([f"## {self.title}", self.about, *tables]) if tables else ""


SECTIONS = (
    Section(
        "Side by side",
        """\
Median and, in parentheses, smallest time of one operation; the ratios are to psycopg_pool in the same round.
One task has CPU to compare: its wall time jumps with the machine's wake-ups.
A block is in a transaction.
A one-shot is what each library's documentation shows for one statement: `fetchone()` for poolkeeper, `pool.fetchrow()` for asyncpg, the block for psycopg_pool and SQLAlchemy.
"psycopg_pool, autocommit" is a pool all of whose connections are in autocommit; "psycopg, held" is one connection and no pool.
asyncpg asks the server to reset a connection at each release, which the others do not.""",  # noqa: E501
        tuple(STAGES["pools"].contests),
        _pools,
    ),
    Section(
        "In libraries that are given a pool",
        """\
A procrastinate job is deferred and run; a LangGraph write is a checkpoint and what one task wrote; a psycopg-toolkit transaction reads a row through a repository.
Each library is given psycopg_pool's pool or ours, and has the same work to do.""",  # noqa: E501
        tuple(name for name, stage in STAGES.items() if stage.module == "clients"),
        _clients,
    ),
    Section(
        "FastAPI",
        f"""\
An endpoint that fetches one row, served by one process of uvicorn; {CLIENTS} clients ask as fast as they are answered, on the same machine.
"By hand" is a lifespan that opens psycopg_pool's pool and `request.app.state.pool.connection()` in the endpoint, which the ratios are to.""",  # noqa: E501
        tuple(FASTAPI.contests),
        _endpoints,
    ),
    Section(
        "In a thread without a loop",
        """\
A thread asks for one row: of psycopg_pool's `ConnectionPool` in a block, of poolkeeper through a portal, by `portal.fetchone()` and by `portal.run()` with a block.
The portal's CPU is that of both threads, each of which wakes the other once for a call.""",  # noqa: E501
        tuple(THREADS.contests),
        _threads,
    ),
    Section(
        "How the cost grows",
        """\
![Cost of one acquire and release by number of tasks](benchmarks.svg)

Each task acquires, holds for one turn of the loop, releases; µs for one of those.
Here the pools take turns in one process, a few short rounds each, without the garbage collector.
The plot shows the first loop.""",
        ("growth",),
        _growth,
    ),
    Section(
        "Many who wait",
        """\
10,000 tasks ask at once for 10 connections and hold one for 1 ms.
Where everybody is served in turn, the longest wait is at most about twice the median.
"Out of turn" counts tasks served right after one that had asked later.
Bytes are those of a task that waits, measured on a fifth as many; in parentheses without the task itself.""",  # noqa: E501
        ("waiters",),
        _waiters,
    ),
    Section(
        "Many who give up together",
        f"""\
10,000 tasks wait for one of {HELD} connections, each held across something else, and their time is up together; each reads its error.
The longest time that nothing else on the loop ran, and by how much the process grew while they were told; each pool in a process of its own.""",  # noqa: E501
        ("storm",),
        _storms,
    ),
    Section(
        "When things go wrong",
        """\
"Wrong role" is how long opening takes to fail, less the time that the server takes to refuse; psycopg_pool was given 1 s, its default is 30 s.
"Fail" is out of 20 requests after all 4 idle connections were killed.
"Late" is from when the server accepts connections again to the first request served.""",  # noqa: E501
        ("wrong-role", "killed", "outages"),
        _faults,
    ),
    Section(
        "What clean hands cost",
        "Already part of every number above; no round trip.",
        ("clean-hands",),
        _clean_hands,
    ),
)


LOSSES = """\
## Where we lose, and why

Counted, which does not depend on what else a machine does: bytecodes by `python -m benchmarks.counts` (CPython 3.11), system calls by strace.

| one operation | loop | psycopg_pool | poolkeeper | psycopg, held |
| --- | --- | --- | --- | --- |
| block with one query | asyncio | 7,340 bytecodes, 20 calls | 4,600, 19 | – |
| block with one query | uvloop | 2,750, 36 | 2,760, 14 | – |
| one-shot | asyncio | 7,340, 20 | 2,390, 5 | 2,670, 7 |
| one-shot | uvloop | 2,820, 36 | 1,750, 4 | 1,260, 12 |
| LangGraph write | asyncio | 13,200, 88 | 12,200, 137 | – |
| LangGraph write | uvloop | 9,060, 105 | 9,240, 111 | – |
| acquire + release, 64 tasks on 4 connections | asyncio | 2,920 | 1,580 | – |
| acquire + release, 64 tasks on 4 connections | uvloop | 1,600 | 1,190 | – |

- **What is counted is not all of what is paid.**
  More than a third of the CPU of a block is the kernel's, and half of that is for going to sleep and being woken (perf).
  A block whose three exchanges were psycopg's cost 0.93 (asyncio) and 1.01 (uvloop) of the bare one on a quiet machine, where each wait is a sleep, and 0.67 and 0.63 on a busy one.
  So the number of exchanges counts most: since `BEGIN` goes along with a query that has parameters, there are two.
- **A one-shot beside a held connection** does all that the held one does, and acquires and gives back besides.
  On uvloop, whose own part is no bytecode, that is 500 bytecodes more and eight system calls fewer; on asyncio it is 280 bytecodes and two calls fewer.
  Its own time is the same in all runs, 77 µs on asyncio; the held one's was 76 to 91.
- **A block on uvloop** was at 0.74, 0.81, 0.81 and 0.90 in four runs: how often a socket sleeps and is woken differs between them, and is worth as much.
- **A LangGraph write** is two pipelines: at each step psycopg asks whether the socket is ready, and so do we.
  There is less in it that a socket which stays watched makes cheaper, and 39 `getpid()` more.
- **One-shots of 64 tasks** take 15 and 16 µs; those that do not share a connection 89 and 62.
  A third of the CPU of a shared one was a packet for each statement, until what goes behind others in one turn of the loop became one packet.
- **FastAPI with `fetchone()`**: an endpoint without a database has 2.1 to 2.5 times asyncpg's requests, so some 90 of the 180 to 200 µs of CPU are FastAPI's and uvicorn's.
  A request with a one-shot is begun in one turn of the loop, and ended in another; so objects of as many as there are clients come and go together, some 70 each, nearly all of them FastAPI's, and Python's garbage collector runs the more often the more of them are begun in one turn.
  On a quiet machine, in one run each, it took 13 % of the CPU (`gc.callbacks`; 3 % with asyncpg, whose ten connections let ten in at once), and without it the ratio was 1.39.
  Where a connection is idle a one-shot takes it, as it is promised: to share before that had 10 % more requests, and would let one stand behind a slow one that need not.
- **64 tasks on 4 connections, nothing inside**: psycopg_pool's took 37 µs where the pools took turns in one process, and takes 28 µs in one of its own; ours was 12 µs and is about that.
  Beside the former the ratio was 0.34.
"""  # noqa: E501


def page(results: Sequence[Results], facts: Sequence[str], rounds: int, *, whole: bool) -> str:
    """Return ``docs/benchmarks.md`` or, if not *whole*, as much of it as was measured."""
    rows = [row for row in targets(results) if whole or row.measured]
    every = [outcome for row in rows for outcome in row.outcomes]
    reached = sum(outcome.reached is True for outcome in every)
    missed = sum(outcome.reached is False for outcome in every)
    summary = _table(
        ("what", "to reach", *(result["loop"] for result in results)),
        ((row.what, row.limit, *map(str, row.outcomes)) for row in rows),
    )
    warning = "" if rounds > 1 else "**A quick try: the numbers say nothing.**\n"
    introduction = f"""\
# Benchmarks

Written by `make bench`; do not edit.
`make bench SLOW=1` measures the outages too, `make bench ONLY=fastapi` a part, which it only prints.
{warning}
Absolute times on a shared machine say little, ratios say more.
Each contestant has a process of its own, and they take turns, in an order that rotates, so that what disturbs one disturbs all.
A process can be slow for as long as it lives, three times as slow, whoever's it is: after three rounds each gets another one.
A ratio is taken within each round; shown are the median of {rounds} rounds and, in parentheses, the quartiles.
CPU is `process_time()` of the contestant's process, that of PostgreSQL not included.
poolkeeper runs with its defaults: every guard is on.

{chr(10).join(f"- {fact}" for fact in facts)}

## Targets

Limits that differ are those for {" / ".join(LOOPS)}.
{reached} reached, {missed} not reached, {len(every) - reached - missed} not measured.

{summary}"""  # noqa: E501
    texts = (section.text(results) for section in SECTIONS)
    losses = LOSSES.rstrip() if whole else ""
    return "\n\n".join([introduction, *filter(None, [*texts, losses])]) + "\n"
