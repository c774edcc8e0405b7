"""How the cost of an acquire grows with the number of tasks, as SVG: log-log, a panel per size."""

from __future__ import annotations

import math
import statistics

COLOURS = {
    "psycopg_pool": "#d1495b",
    "poolkeeper": "#0072b2",
    "asyncpg": "#8a8a8a",
    "SQLAlchemy": "#b8860b",
}
WIDTH, HEIGHT = 360, 260  # of what is between the axes
LEFT, TOP, GAP, BOTTOM = 64, 48, 152, 56

# What a renderer that knows no style sheets shows is the light one, from the attributes.
STYLE = (
    "@media (prefers-color-scheme: dark) { .back { fill: #0d1117 } .grid { stroke: #30363d }"
    " .title { fill: #e6edf3 } .axis { fill: #9da7b1 } }"
)
TEXT = {
    "title": 'fill="#24292f" font-weight="600"',
    "axis": 'fill="#57606a"',
}


def draw(growth: dict[str, dict[str, dict[str, list[float]]]]) -> str:
    """Return the plot of seconds per acquire, by connections, tasks and contestant."""
    panels = {
        size: {
            name: [(int(tasks), statistics.median(s[name]) * 1e6) for tasks, s in by.items()]
            for name in next(iter(by.values()))
        }
        for size, by in growth.items()
    }
    points = [p for lines in panels.values() for line in lines.values() for p in line]
    most = max(tasks for tasks, _ in points)
    low = 10 ** math.floor(math.log10(min(cost for _, cost in points)))
    high = 10 ** math.ceil(math.log10(max(cost for _, cost in points)))
    width = LEFT + len(panels) * (WIDTH + GAP)
    height = TOP + HEIGHT + BOTTOM
    drawn = [_panel(i, size, panels[size], most, low, high) for i, size in enumerate(panels)]
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}"'
        f' width="{width}" height="{height}" role="img"'
        ' font-family="Helvetica, Arial, sans-serif" font-size="13">\n'
        "<title>µs per acquire and release, by number of tasks</title>\n"
        f"<style>{STYLE}</style>\n"
        f'<rect class="back" fill="#ffffff" width="{width}" height="{height}"/>\n'
        + "\n".join(drawn)
        + "\n</svg>\n"
    )


def _panel(
    index: int,
    size: str,
    lines: dict[str, list[tuple[int, float]]],
    most: int,
    low: float,
    high: float,
) -> str:
    left = LEFT + index * (WIDTH + GAP)

    def x(tasks: float) -> float:
        return left + WIDTH * math.log10(tasks) / math.log10(most)

    def y(cost: float) -> float:
        return TOP + HEIGHT * (1 - math.log10(cost / low) / math.log10(high / low))

    parts = [
        _text(left, TOP - 20, f"{size} connections", "title"),
        _text(left + WIDTH / 2, TOP + HEIGHT + 42, "tasks", "axis", "middle"),
    ]
    if index == 0:
        parts.append(_text(left - 8, TOP - 20, "µs", "axis", "end"))
    for power in range(round(math.log10(low)), round(math.log10(high)) + 1):
        for step in (1, 2, 5):
            cost = step * 10.0**power
            if cost <= high:
                parts.append(
                    f'<line class="grid" stroke="#d0d7de" x1="{left}" x2="{left + WIDTH}"'
                    f' y1="{y(cost):.1f}" y2="{y(cost):.1f}"/>'
                )
                parts.append(_text(left - 8, y(cost) + 4, f"{cost:,g}", "axis", "end"))
    for tasks, _ in next(iter(lines.values())):
        parts.append(_text(x(tasks), TOP + HEIGHT + 20, f"{tasks:,}", "axis", "middle"))
    # Names stand at the ends of their lines, no two on one another.
    free = math.inf
    for name, line in sorted(lines.items(), key=lambda item: item[1][-1][1]):
        path = " ".join(f"{x(tasks):.1f},{y(cost):.1f}" for tasks, cost in line)
        parts.append(
            f'<polyline points="{path}" fill="none" stroke="{COLOURS[name]}"'
            ' stroke-width="2.5" stroke-linejoin="round"/>'
        )
        parts += [
            f'<circle cx="{x(t):.1f}" cy="{y(c):.1f}" r="3.5" fill="{COLOURS[name]}"/>'
            for t, c in line
        ]
        free = min(y(line[-1][1]) + 4, free - 16)
        parts.append(_text(left + WIDTH + 10, free, name, name))
    return "\n".join(parts)


def _text(x: float, y: float, text: str, kind: str, anchor: str = "start") -> str:
    look = TEXT.get(kind) or f'fill="{COLOURS[kind]}" font-weight="600"'
    return (
        f'<text class="{kind}" {look} x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{text}</text>'
    )
