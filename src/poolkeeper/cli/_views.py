"""
What ``poolkeeper top`` shows of pools that were added up: as JSON, as text, or drawn by rich.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from poolkeeper.sizing._advice import duration

State = dict[str, Any]

ROWS = 12
"""Of a table, at most."""


@dataclass(frozen=True)
class Table:
    """A table to show: numbers are right-aligned, the last of the texts may be cut off."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    numbers: frozenset[str] = frozenset()


def as_json(pools: list[State], silent: list[str]) -> str:
    """Return it in one line."""
    return json.dumps({"at": time.time(), "pools": pools, "silent": silent})


def as_text(pools: list[State], silent: list[str]) -> str:
    """Return it in lines."""
    lines = _head(pools, silent)
    for pool in pools:
        lines += ["", _title(pool), _numbers(pool), *_warnings(pool)]
        for table in _tables(pool):
            lines += ["", f"{table.title}:", *_aligned(table)]
    return "\n".join(lines)


def _head(pools: list[State], silent: list[str]) -> list[str]:
    if not pools and not silent:
        return [
            "no process of yours is to be seen",
            "HINT:  Call poolkeeper.live.expose(manager) in the program. It is to be seen while"
            " the pool is open.",
        ]
    return [f"does not answer: {one}" for one in silent]


def _title(pool: State) -> str:
    of = [
        f"{one['program']} {one['pid']}" + (f" ({one['state']})" if one["state"] != "open" else "")
        for one in pool["processes"]
        if not one["error"]
    ]
    of += [
        f"{one['pid']} cannot tell ({one['error']})" for one in pool["processes"] if one["error"]
    ]
    return f'pool "{pool["name"]}": {", ".join(of)}'


def _numbers(pool: State) -> str:
    return (
        f"total={pool['total']} in_use={pool['in_use']} idle={pool['idle']} max={pool['max']}"
        f" waiting={pool['waiting']}; wait in the last minute: p50"
        f" {duration(pool['wait_p50_seconds'])}, p99 {duration(pool['wait_p99_seconds'])}"
    )


def _warnings(pool: State) -> list[str]:
    errors = pool["last_errors"]
    return [
        *(
            f"cause: {cause}"
            for cause in pool["causes"]
            if not any(error in cause for error in errors)
        ),
        *(f"no connection can be made: {error}" for error in errors),
    ]


def _tables(pool: State) -> list[Table]:
    several = len(pool["processes"]) > 1
    process = ("process",) if several else ()

    def of(row: State) -> tuple[str, ...]:
        return (str(row["pid"]),) if several else ()

    held = tuple(
        (
            duration(row["held_seconds"]), duration(row["query_seconds"]), *of(row),
            row["asker"] or row["site"], row.get("now", row["status"]), row["awaits"],
        )
        for row in pool["checkouts"][:ROWS]
    )  # fmt: skip
    waiting = tuple(
        (duration(row["waited_seconds"]), str(row["holds"]), *of(row), row["asker"] or row["site"])
        for row in pool["waiters"][:ROWS]
    )
    sites = tuple(
        (
            duration(site["held"]), str(site["number"]),
            duration(site["held"] / site["number"] if site["number"] else 0.0),
            duration(site["held_most"]),
            f"{min(1, site['query'] / site['held']):.0%}" if site["held"] else "",
            duration(site["waited"]), str(site["in_vain"] or ""), site["who"],
        )
        for site in pool["sites"][:ROWS]
    )  # fmt: skip
    errors = tuple(
        (time.strftime("%H:%M:%S", time.localtime(at)), str(times), *of({"pid": pid}), what, words)
        for at, times, what, words, pid in pool["errors"][:ROWS]
    )
    tables = [
        Table("in use", ("held", "in queries", *process, "who", "now", "awaits"), held,
              frozenset(("held", "in queries", "process"))),
        Table("waiting", ("waited", "holds", *process, "who"), waiting,
              frozenset(("waited", "holds", "process"))),
        Table("call sites by hold time",
              ("held", "times", "mean", "most", "in queries", "waited", "in vain", "who"), sites,
              frozenset(("held", "times", "mean", "most", "in queries", "waited", "in vain"))),
        Table("last errors", ("when", "times", *process, "what", "words"), errors,
              frozenset(("times", "process"))),
    ]  # fmt: skip
    return [table for table in tables if table.rows]


def _aligned(table: Table) -> Iterator[str]:
    widths = [
        max(len(name), *(len(row[i]) for row in table.rows)) for i, name in enumerate(table.columns)
    ]
    for row in (table.columns, *table.rows):
        cells = (
            cell.rjust(width) if name in table.numbers else cell.ljust(width)
            for cell, name, width in zip(row, table.columns, widths, strict=True)
        )
        yield ("  " + "  ".join(cells)).rstrip()


def fitted(console: Any, pools: list[State], silent: list[str]) -> Any:
    """Return it as rich shows it, with as many rows of each table as there is room for."""
    view = None
    for rows in range(ROWS, 0, -1):
        view = drawn(pools, silent, rows)
        if len(console.render_lines(view)) <= console.height:
            break
    return view


def drawn(pools: list[State], silent: list[str], rows: int = ROWS) -> Any:
    """Return it as rich shows it."""
    from rich.console import Group
    from rich.text import Text

    parts: list[Any] = [Text(line, style="red") for line in _head(pools, silent)]
    for pool in pools:
        parts += [
            *([Text()] if parts else []),
            Text(_title(pool), style="bold"),
            Text(_numbers(pool), style="bold red" if pool["waiting"] else ""),
            *(Text(line, style="red") for line in _warnings(pool)),
        ]
        for table in _tables(pool):
            parts += [Text(), _drawn(table, rows)]
    return Group(*parts)


def _drawn(table: Table, rows: int) -> Any:
    from rich.table import Table as Drawn
    from rich.text import Text

    drawn = Drawn(
        title=table.title,
        title_justify="left",
        title_style="bold",
        header_style="dim",
        box=None,
        padding=(0, 2, 0, 0),
        pad_edge=False,
        expand=True,
    )
    for name in table.columns:
        if name in table.numbers:
            drawn.add_column(name, justify="right", no_wrap=True)
        else:
            widest = table.columns[-1] == name
            drawn.add_column(
                name,
                overflow="ellipsis",
                no_wrap=name in ("when", "now", "what"),
                ratio=1 if widest else None,
            )
    for row in table.rows[:rows]:
        drawn.add_row(*map(Text, row))
    return drawn
