"""Print for a terminal, a pipe and a file of Markdown."""

from __future__ import annotations

import os
import re
import shutil
import textwrap
from collections.abc import Iterable, Sequence
from typing import TextIO

_BOLD, _RED, _GREEN, _YELLOW, _DIM = "1", "31", "32", "33", "2"


class Narrator:
    """Writes paragraphs, results and tables that fit the terminal; 80 columns into a pipe."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        terminal = stream.isatty()
        columns = shutil.get_terminal_size((80, 24)).columns if terminal else 80
        self.width = max(60, min(columns, 100))
        self._colour = (
            terminal and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
        )

    def line(self, text: str = "", style: str = "") -> None:
        """Print one line as it is."""
        self._stream.write(self._styled(text, style) + "\n")
        self._stream.flush()

    def title(self, text: str) -> None:
        """Print the heading of a part."""
        self.line()
        self.line(text, _BOLD)
        self.line("=" * len(text), _BOLD)

    def heading(self, number: int, text: str) -> None:
        """Print the heading of a mistake."""
        self.line()
        self.line(f"{number:2}. {text}", _BOLD)

    def paragraph(self, text: str, indent: int = 4) -> None:
        """Print text, wrapped."""
        for line in self._wrapped(text, " " * indent):
            self.line(line)

    def result(self, side: str, text: str, messages: Iterable[str], good: bool | None) -> None:
        """Print what happened on one side, and the messages; *good* picks the colour."""
        style = {True: _GREEN, False: _RED, None: _YELLOW}[good]
        first, *rest = self._wrapped(text, " " * 17, f"    {side:<11}  ")
        label = len(f"    {side:<11}")
        self.line(first[:label] + self._styled(first[label:], style))
        for line in rest:
            self.line(line, style)
        for message in messages:
            for part in message.splitlines():
                for line in self._wrapped(part, " " * 21, " " * 17 + "| "):
                    self.line(" " * 17 + "|" + line[18:], _DIM)

    def table(self, head: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
        """Print a table of three columns, cells wrapped."""
        rows = list(rows)
        first = max(len(row[0]) for row in [head, *rows])
        other = (self.width - first - 4) // 2
        widths = (first, other, other)
        self._row(head, widths, _BOLD)
        self.line("  ".join("-" * width for width in widths))
        for number, row in enumerate(rows):
            if number:
                self.line()
            self._row(row, widths)

    def _row(self, row: Sequence[str], widths: Sequence[int], style: str = "") -> None:
        cells = [_wrap(cell, width) for cell, width in zip(row, widths, strict=True)]
        for number in range(max(map(len, cells))):
            parts = [
                (cell[number] if number < len(cell) else "").ljust(width)
                for cell, width in zip(cells, widths, strict=True)
            ]
            self.line("  ".join(parts).rstrip(), style)

    def _wrapped(self, text: str, indent: str, first: str | None = None) -> list[str]:
        first = indent if first is None else first
        return _wrap(text, self.width, first, indent, break_long_words=False)

    def _styled(self, text: str, style: str) -> str:
        return f"\033[{style}m{text}\033[0m" if self._colour and style and text else text


def _wrap(
    text: str, width: int, first: str = "", indent: str = "", *, break_long_words: bool = True
) -> list[str]:
    lines = textwrap.wrap(
        re.sub(r"(\d) (?=m?s\b)", "\\1\x1f", text),  # a number stays with its unit
        width,
        initial_indent=first,
        subsequent_indent=indent,
        break_long_words=break_long_words,
        break_on_hyphens=False,
    )
    return [line.replace("\x1f", " ") for line in lines] or [first]


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(
        "| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines
    )
