"""
Draw the rooms of the core, from what the modules import: ``python scripts/rooms.py``.

A module stands one row above the highest of those that it imports. An arrow that follows from
others, for one enters a room through them anyway, is left out.
"""

from __future__ import annotations

import ast
from math import fsum
from pathlib import Path

ROOT = Path(__file__).parents[1]
PICTURE = ROOT / "docs" / "rooms.svg"
LEFT_OUT = {
    "__init__",
    "__main__",
    "_demo",
    "_embedded",
    "_explain",
    "adapters",
    "telemetry",
    "testing",
}
"""What is not the core."""

WIDTH, HEIGHT, GAP, ROW, MARGIN = 92, 24, 12, 64, 16


def imports(package: Path) -> dict[str, set[str]]:
    """Return of each module of the core which others it imports, wherever in it."""
    modules = {path.stem: path for path in sorted(package.glob("*.py"))}
    return {
        name: {found for found in _imported(path) if found in modules} - LEFT_OUT
        for name, path in modules.items()
        if name not in LEFT_OUT
    }


def _imported(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level == 1:
            found |= {node.module} if node.module else {alias.name for alias in node.names}
    return found


def reached(name: str, graph: dict[str, set[str]]) -> set[str]:
    """Return all that a module can reach, in however many steps."""
    found: set[str] = set()
    left = [name]
    while left:
        for other in graph[left.pop()] - found:
            found.add(other)
            left.append(other)
    return found


def reduced(graph: dict[str, set[str]]) -> dict[str, set[str]]:
    """Return *graph* without the arrows that follow from others."""
    far = {name: reached(name, graph) for name in graph}
    return {
        name: {other for other in direct if not any(other in far[via] for via in direct - {other})}
        for name, direct in graph.items()
    }


def rows(graph: dict[str, set[str]]) -> list[list[str]]:
    """Return the modules in rows, those that import nothing first; near to what they import."""
    depth: dict[str, int] = {}

    def deep(name: str) -> int:
        if name not in depth:
            depth[name] = 1 + max((deep(other) for other in graph[name]), default=-1)
        return depth[name]

    lines: list[list[str]] = []
    place: dict[str, float] = {}
    for level in range(max(map(deep, graph)) + 1):
        line = sorted(name for name in graph if depth[name] == level)
        if level:
            # Exactly, in whatever order a set has them: two may stand at the same place.
            line.sort(key=lambda name: fsum(map(place.__getitem__, graph[name])) / len(graph[name]))
        place |= {name: (number + 0.5) / len(line) for number, name in enumerate(line)}
        lines.append(line)
    return lines


def picture(package: Path) -> str:
    """Return the picture as SVG."""
    graph = reduced(imports(package))
    lines = rows(graph)
    widest = max(map(len, lines))
    width = 2 * MARGIN + widest * (WIDTH + GAP) - GAP
    height = 2 * MARGIN + (len(lines) - 1) * ROW + HEIGHT
    spots = {
        name: (round((number + 0.5) / len(line) * width), MARGIN + row * ROW)
        for row, line in enumerate(reversed(lines))
        for number, name in enumerate(line)
    }
    drawn = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}"'
        ' font-family="ui-monospace, monospace" font-size="11">',
        '<rect width="100%" height="100%" fill="#fff"/>',
        '<defs><marker id="tip" markerWidth="6" markerHeight="6" refX="5" refY="3" orient="auto">'
        '<path d="M0,0 L6,3 L0,6 z" fill="#789"/></marker></defs>',
    ]
    for name, direct in sorted(graph.items()):
        x, y = spots[name]
        for other in sorted(direct):
            to_x, to_y = spots[other]
            drawn.append(
                f'<path d="M{x},{y + HEIGHT} C{x},{y + HEIGHT + 22} {to_x},{to_y - 22}'
                f' {to_x},{to_y - 1}" fill="none" stroke="#9ab" marker-end="url(#tip)">'
                f"<title>{name} imports {other}</title></path>"
            )
    for name, (x, y) in sorted(spots.items()):
        drawn.append(
            f'<rect x="{x - WIDTH // 2}" y="{y}" width="{WIDTH}" height="{HEIGHT}" rx="5"'
            ' fill="#eef3f8" stroke="#567"/>'
            f'<text x="{x}" y="{y + 16}" text-anchor="middle" fill="#123">{name}</text>'
        )
    return "\n".join([*drawn, "</svg>"]) + "\n"


if __name__ == "__main__":
    PICTURE.write_text(picture(ROOT / "src" / "poolkeeper"), encoding="utf-8")
    print(PICTURE)
