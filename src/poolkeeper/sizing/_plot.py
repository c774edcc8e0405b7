"""
A picture of the advice: the wait by size, as SVG that stands alone.

Drawn by hand: what draws such things in Python is either much larger than all of this package,
or changes how the whole process imports modules (pygal does).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from xml.sax.saxutils import escape

from ._advice import Advice, SizeRow, duration

WIDTH, HEIGHT = 760, 400
LEFT, RIGHT, TOP, BOTTOM = 76, 736, 56, 320

LEAST = 1e-4
"""Seconds; what is less is drawn as this: nobody waits."""

# What a renderer that knows no style sheets shows is the light one, from the attributes.
STYLE = (
    "@media (prefers-color-scheme: dark) { .back { fill: #0d1117 } .grid { stroke: #30363d }"
    " .title { fill: #e6edf3 } .axis { fill: #9da7b1 } }"
)
P99, P50, TARGET = "#d1495b", "#0072b2", "#8a8a8a"


def plot(advice: Advice) -> str:
    """
    Draw how long acquires wait, by size: an SVG with no script and no reference to elsewhere.

    Sizes that can never do the work have no wait to draw, and are left out.

    .. versionadded:: 0.1.0
    """
    rows = [row for row in advice.rows if row.waits is not None]
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}"'
            f' width="{WIDTH}" height="{HEIGHT}" role="img"'
            ' font-family="Helvetica, Arial, sans-serif" font-size="13">',
            "<title>wait for a connection, by max_size</title>",
            f"<style>{STYLE}</style>",
            f'<rect class="back" fill="#ffffff" width="{WIDTH}" height="{HEIGHT}"/>',
            *_drawn(advice, rows),
            "</svg>\n",
        ]
    )


def _drawn(advice: Advice, rows: list[SizeRow]) -> Iterable[str]:
    work = advice.workload
    of = f'pool "{advice.name}", ' if advice.name else ""
    title = f"{of}{work.rate:.4g} acquires per second, held for {duration(work.hold)}"
    yield _text(LEFT, 28, title, "title")
    most = max((row.waits.p99 for row in rows if row.waits), default=LEAST)
    decades = max(1, math.ceil(math.log10(max(most, advice.target, LEAST) / LEAST) - 1e-9))

    def x(number: int) -> float:
        return LEFT + (RIGHT - LEFT) * (number / (len(rows) - 1) if len(rows) > 1 else 0.5)

    def y(seconds: float) -> float:
        return BOTTOM - (BOTTOM - TOP) * math.log10(max(seconds, LEAST) / LEAST) / decades

    for power in range(decades + 1):
        seconds = LEAST * 10.0**power
        yield _line([(LEFT, y(seconds)), (RIGHT, y(seconds))], "#d8dee4", 'class="grid"')
        yield _text(LEFT - 8, y(seconds) + 4, duration(seconds) if power else "none", "axis", "end")
    for number, row in enumerate(rows):
        yield _text(x(number), BOTTOM + 20, str(row.size), "axis", "middle")
    yield _text((LEFT + RIGHT) / 2, BOTTOM + 40, "max_size", "axis", "middle")
    yield _line([(LEFT, y(advice.target)), (RIGHT, y(advice.target))], TARGET, _DASHED)
    for percentile, colour in (("p50", P50), ("p99", P99)):
        points = [(x(i), y(getattr(row.waits, percentile))) for i, row in enumerate(rows)]
        yield _line(points, colour, 'stroke-width="2"')
        yield from (f'<circle cx="{a:.1f}" cy="{b:.1f}" r="3" fill="{colour}"/>' for a, b in points)
    legend = {"p99": P99, "p50": P50, f"wanted at p99: {duration(advice.target)}": TARGET}
    for number, (words, colour) in enumerate(legend.items()):
        left = LEFT + 110 * number
        yield f'<rect x="{left}" y="{HEIGHT - 26}" width="10" height="10" fill="{colour}"/>'
        yield _text(left + 16, HEIGHT - 16, words, "axis")


_DASHED = 'stroke-dasharray="4 4"'

_FILLS = {"title": "#24292f", "axis": "#57606a"}


def _line(points: list[tuple[float, float]], colour: str, more: str) -> str:
    drawn = " ".join(f"{a:.1f},{b:.1f}" for a, b in points)
    return f'<polyline points="{drawn}" fill="none" stroke="{colour}" {more}/>'


def _text(left: float, low: float, words: str, kind: str, anchor: str = "start") -> str:
    return (
        f'<text class="{kind}" fill="{_FILLS[kind]}" x="{left:.1f}" y="{low:.1f}"'
        f' text-anchor="{anchor}">{escape(words)}</text>'
    )
