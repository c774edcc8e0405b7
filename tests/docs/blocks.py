"""
The code blocks of a Markdown file, and how to run one as its reader would.

A ``python`` block that calls ``run()`` is a whole program: it is saved as ``app.py`` and run in a
process of its own. Any other is a fragment: ``main.py`` runs it in a coroutine, with an open
manager at hand as ``db``. A ``text`` block after it, with no other block between, is how its
output ends.

A block with ``<!-- from: examples/... -->`` on the line before it is an excerpt of that file, which
has tests of its own. One with ``<!-- keeps running -->`` is a command that does not end by itself.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

_FENCE = re.compile(
    r"(?:^<!-- (?:from: (?P<source>\S+)|(?P<runs>keeps running)) -->\n)?"
    r"^```(?P<language>\w*)[^\n]*\n(?P<body>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)
_FILE = re.compile(r"# (?P<name>[\w./-]*\.\w+|Dockerfile)(?P<more>, continued)?$", re.MULTILINE)
_RUN = re.compile(r"\brun\(")
# Keeps the fragment's own file name and line numbers, for messages show them.
_MAIN = """\
import ast, asyncio, os, pathlib
import psycopg, poolkeeper
from poolkeeper import PoolManager

source = pathlib.Path("app.py")
code = compile(source.read_text(), str(source.resolve()), "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)

async def main():
    db = PoolManager(os.environ["DATABASE_URL"], min_size=1, max_size=4, name="orders")
    async with db:
        running = eval(code, {
            **vars(poolkeeper), "__name__": "app", "asyncio": asyncio, "os": os,
            "psycopg": psycopg, "db": db,
        })
        if running is not None:
            await running

asyncio.run(main())
"""

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


@dataclass(frozen=True)
class Example:
    """Python code, and what the text says that it prints."""

    code: Block
    output: Block | None

    @property
    def is_program(self) -> bool:
        """True if the code runs by itself."""
        return bool(_RUN.search(self.code.body))

    def run(self, directory: Path, dsn: str) -> subprocess.CompletedProcess[str]:
        """Run it in *directory*; what it prints and what it complains of come as one text."""
        (directory / "app.py").write_text(self.code.body)
        (directory / "main.py").write_text(_MAIN)
        return subprocess.run(
            [sys.executable, "app.py" if self.is_program else "main.py"],
            cwd=directory,
            env={
                **os.environ,
                "DATABASE_URL": dsn,
                "PYTHONUNBUFFERED": "1",
                "PYTHONASYNCIODEBUG": "",  # it prints what the text does not show
            },
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=60,
            check=False,
        )


def blocks(path: Path) -> list[Block]:
    """Return the code blocks of a Markdown file."""
    text = path.read_text()
    return [
        Block(
            path,
            text.count("\n", 0, match.start()) + 1,
            match["language"],
            match["body"],
            match["source"],
            bool(match["runs"]),
        )
        for match in _FENCE.finditer(text)
    ]


def examples(path: Path) -> list[Example]:
    """Return the Python blocks of a Markdown file, each with its output where it is shown."""
    return [
        Example(block, after if after is not None and after.language == "text" else None)
        for block, after in pairwise([*blocks(path), None])
        if block is not None and block.language == "python" and not block.source
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
