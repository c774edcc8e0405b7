"""
Draw the two pictures of the README and the site: docs/life.svg and docs/demo.svg.

    python scripts/pictures.py                 both; runs the demo
    python scripts/pictures.py life            only that one

What stands in the second is what the demo has printed, cut where "..." says so.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterable
from html import escape
from pathlib import Path

DOCS = Path(__file__).parents[1] / "docs"

# --- the life of a pool, and of a connection ----------------------------------------------------

# Colours for a light page; those for a dark one take their place where the reader prefers it.
LIGHT_AND_DARK = """
.back { fill: #ffffff } .panel { fill: #f6f8fa; stroke: #d0d7de }
.box { fill: #ffffff; stroke: #57606a; stroke-width: 1.5 }
.good { fill: #dafbe1; stroke: #1a7f37; stroke-width: 1.5 }
.word { fill: #24292f; font-weight: 600 } .note { fill: #57606a; font-size: 13px }
.way { fill: none; stroke: #57606a; stroke-width: 1.5 } .head { fill: #57606a }
@media (prefers-color-scheme: dark) {
.back { fill: #0d1117 } .panel { fill: #161b22; stroke: #30363d }
.box { fill: #0d1117; stroke: #9da7b1 } .good { fill: #12261e; stroke: #3fb950 }
.word { fill: #e6edf3 } .note { fill: #9da7b1 } .way { stroke: #9da7b1 } .head { fill: #9da7b1 }
}
"""
BOX = (100, 44)
HALF = BOX[1] // 2


def life() -> str:
    """Return the picture of the states and the ways between them."""
    y, below = 72, 292
    new, opening, opened, closing, closed = range(16, 700, 157)
    made, idle, in_use, returning = range(36, 700, 196)
    parts = [
        '<rect class="panel" x="16" y="176" width="728" height="232" rx="8"/>',
        _text(32, 204, "while it is open, a connection is", "note"),
        _box(new, y, "new"),
        _box(opening, y, "opening"),
        _box(opened, y, "open", "good"),
        _box(closing, y, "closing"),
        _box(closed, y, "closed"),
        _step(new, opening, y, "open()"),
        _step(opening, opened, y),
        _step(opened, closing, y, "close()"),
        _step(closing, closed, y),
        _way(f"M{closed + 50},{y - HALF} V24 H{opening + 50} V{y - HALF - 6}"),
        _text(458, 16, "open() again: a new life, on any loop, in any process", "note", "middle"),
        _text(opening + 50, y + 44, "min_size connections work,", "note", "middle"),
        _text(opening + 50, y + 62, "or OpenError with the reason", "note", "middle"),
        _text(closing + 50, y + 44, "who waits is told, who holds one", "note", "middle"),
        _text(closing + 50, y + 62, "may finish until the timeout", "note", "middle"),
        _box(made, below, "made"),
        _box(idle, below, "idle", "good"),
        _box(in_use, below, "in use", "good"),
        _box(returning, below, "returning"),
        _step(made, idle, below, "configure"),
        _step(idle, in_use, below, "acquire"),
        _step(in_use, returning, below, "release"),
        _way(f"M{returning + 50},{below + HALF} V362 H{idle + 50} V{below + HALF + 6}"),
        _text(478, 382, "rolled back, as configure left it: to the next in line, or idle", "note",
              "middle"),
        _way(f"M{idle + 30},{below - HALF} V242 H{made + 50} V{below - HALF - 6}"),
        _text(174, 234, "dead, too old, drain()", "note", "middle"),
        _text(in_use + 50, 224, "the line of those who wait:", "note", "middle"),
        _text(in_use + 50, 241, "first come, first served", "note", "middle"),
        _way(f"M{in_use + 50},248 V{below - HALF - 6}"),
    ]  # fmt: skip
    return _picture(760, 424, "The life of a pool, and of a connection in it", parts)


def _picture(width: int, height: int, title: str, parts: Iterable[str]) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}"'
        f' width="{width}" height="{height}" role="img"'
        ' font-family="Helvetica, Arial, sans-serif" font-size="15">\n'
        f"<title>{title}</title>\n<style>{LIGHT_AND_DARK}</style>\n"
        '<defs><marker id="head" viewBox="0 0 8 8" refX="5" refY="4" markerWidth="6"'
        ' markerHeight="6" orient="auto"><path class="head" d="M0,0 L8,4 L0,8 z"/></marker>'
        "</defs>\n"
        f'<rect class="back" width="{width}" height="{height}"/>\n'
        + "\n".join(parts)
        + "\n</svg>\n"
    )


def _box(x: float, y: float, word: str, kind: str = "box") -> str:
    width, height = BOX
    return (
        f'<rect class="{kind}" x="{x}" y="{y - height / 2:g}" width="{width}" height="{height}"'
        f' rx="6"/>\n{_text(x + width / 2, y + 5, word, "word", "middle")}'
    )


def _step(start: int, end: int, y: int, word: str = "") -> str:
    drawn = _way(f"M{start + BOX[0]},{y} H{end - 6}")
    middle = (start + BOX[0] + end) / 2
    return f"{drawn}\n{_text(middle, y - 10, word, 'note', 'middle')}" if word else drawn


def _way(path: str) -> str:
    return f'<path class="way" d="{path}" marker-end="url(#head)"/>'


def _text(x: float, y: float, text: str, kind: str, anchor: str = "start") -> str:
    return f'<text class="{kind}" x="{x:g}" y="{y:g}" text-anchor="{anchor}">{escape(text)}</text>'


# --- the demo, in a terminal ----------------------------------------------------------------------

SHOWN = "One pool, two asyncio.run()"
"""Of the mistakes; the README says the same of it."""

COLUMNS = 82
CELL, LINE = 8.4, 19

INK = {
    "plain": "#c9d1d9", "title": "#ffffff", "said": "#8b949e", "bare": "#ff7b72", "ours": "#7ee787",
}  # fmt: skip


def demo(printed: str) -> str:
    """Return the picture of a terminal with the parts of *printed* that are shown."""
    lines = ["$ poolkeeper demo", *_cut(printed)]
    width, height = round(COLUMNS * CELL) + 32, len(lines) * LINE + 32
    drawn = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}"'
        f' height="{height}" role="img" font-family="ui-monospace, SFMono-Regular, Menlo, Consolas,'
        f' monospace" font-size="14">\n<title>What poolkeeper demo prints</title>\n'
        f'<rect width="{width}" height="{height}" rx="8" fill="#0d1117"/>'
    ]
    owner = "plain"
    for number, line in enumerate(lines):
        runs: list[tuple[str, str]]
        label = re.match(r"( +)(bare pool|poolkeeper)(?= {2,})", line)
        if label:
            owner = "bare" if label[2] == "bare pool" else "ours"
            runs = [(owner, label[0]), ("plain", line[label.end() :])]
        elif re.match(r" *\|", line) or line == "...":
            runs = [("said", line)]
        elif re.match(r" ?\d+\. |\$ |The sums of the app", line):
            runs = [("title", line)]
        else:
            runs = [("plain", line)]
        spans = "".join(f'<tspan fill="{INK[kind]}">{_spaced(text)}</tspan>' for kind, text in runs)
        drawn.append(f'<text x="16" y="{16 + LINE * number + 14}">{spans}</text>')
    return "\n".join(drawn) + "\n</svg>\n"


def _spaced(text: str) -> str:
    return escape(text).replace(" ", "\N{NO-BREAK SPACE}")  # or several would be one


def _cut(printed: str) -> list[str]:
    head, _, rest = printed.partition("\n2. Mistakes")
    version, _, app = head.partition("\n1. ")
    title, _, worked = app.partition("\n")
    (mistake,) = (
        part
        for part in re.split(r"(?m)^(?= ?\d+\. )", rest)
        if re.match(rf" ?\d+\. {re.escape(SHOWN)}", part)
    )
    cut = (
        version.splitlines()[0],
        "",
        f"1. {title}",
        *worked.strip("=\n ").split("\n\n")[-1].splitlines(),
        "...",
        "",
        *mistake.rstrip().splitlines(),
        "...",
        "",
        *rest[rest.rindex("The sums of the app") :].rstrip().splitlines(),
    )
    return [line.rstrip() for line in cut]


def main() -> None:
    wanted = sys.argv[1:] or ["life", "demo"]
    if "life" in wanted:
        (DOCS / "life.svg").write_text(life())
    if "demo" in wanted:
        ended = subprocess.run(
            [sys.executable, "-m", "poolkeeper", "demo"], capture_output=True, text=True, check=True
        )
        (DOCS / "demo.svg").write_text(demo(ended.stdout))


if __name__ == "__main__":
    main()
