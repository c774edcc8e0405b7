"""
The code blocks of a Markdown file, and whether what was printed is what a block shows.

A block whose first line is ``# app.py`` is that file, with ``# app.py, continued`` more of it.
One with ``<!-- from: examples/... -->`` on the line before it is an excerpt of that file, which has
tests of its own. One with ``<!-- keeps running -->`` is a command that does not end by itself.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

FENCE = re.compile(
    r"(?:^<!-- (?:from: (?P<source>\S+)|(?P<runs>keeps running)) -->\n)?"
    r"^```(?P<language>\w*)[^\n]*\n(?P<body>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)
_FILE = re.compile(r"# (?P<name>[\w./-]*\.\w+|Dockerfile)(?P<more>, continued)?$", re.MULTILINE)

# What differs from one run to the next.
_VARIABLE = (
    (re.compile(r"\s+"), " "),
    (re.compile(r"\b\d+\.\d+( ?m?s)\b"), r"N\1"),
    (re.compile(r"\bTask-\d+"), "Task-N"),
    (re.compile(r"\b\d+ attempts? failed"), "N attempts failed"),
    (re.compile(r"\bprocess \d+"), "process N"),
    (re.compile(r"0x[0-9a-f]+"), "0xN"),
)


@dataclass(frozen=True)
class Block:
    """One code block."""

    path: Path
    line: int
    language: str
    body: str
    source: str | None = None
    """The file that it is an excerpt of."""
    keeps_running: bool = False
    """True for a command that does not end by itself."""

    @property
    def file(self) -> str | None:
        """Name of the file that it is saved as, if its first line says so."""
        named = _FILE.match(self.body)
        return named["name"] if named else None

    @property
    def continues(self) -> bool:
        """True if it goes to the end of that file."""
        named = _FILE.match(self.body)
        return bool(named and named["more"])


def blocks(path: Path) -> list[Block]:
    """Return the code blocks of a Markdown file."""
    text = path.read_text(encoding="utf-8")
    return [
        Block(
            path,
            text.count("\n", 0, match.start()) + 1,
            match["language"],
            match["body"],
            match["source"],
            bool(match["runs"]),
        )
        for match in FENCE.finditer(text)
    ]


def agrees(said: str, shown: str) -> bool:
    """
    Tell whether *said* is what the page shows, but for what differs from run to run.

    A line ``...`` stands for lines that are left out, and of a traceback the end is enough.
    """
    parts = [normal(part) for part in re.split(r"^\.\.\.$", shown, flags=re.MULTILINE)]
    words = [rf"(?<!\S){re.escape(part)}(?!\S)" if part else "" for part in parts]
    found = re.fullmatch(".*".join(words), normal(said))
    return bool(found) or ("Traceback" in said and normal(said).endswith(normal(shown)))


def normal(text: str) -> str:
    """Return *text* without what differs from run to run, on one line."""
    for pattern, constant in _VARIABLE:
        text = pattern.sub(constant, text)
    return text.strip()
