"""curl, as far as the pages go, for a machine that has none."""

from __future__ import annotations

import argparse
import sys
import urllib.error
import urllib.request
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(prog="curl")
    parser.add_argument("-X", "--request")
    parser.add_argument("-H", "--header", action="append", default=[])
    parser.add_argument("-d", "--data")
    parser.add_argument("-i", "--include", action="store_true")
    parser.add_argument("-o", "--output", type=Path, default=Path("/dev/stdout"))
    parser.add_argument("url")
    given = parser.parse_args()
    data = given.data.encode() if given.data is not None else None
    headers = dict(line.split(": ", 1) for line in given.header)
    wanted = urllib.request.Request(given.url, data, headers, method=given.request)
    try:
        answer = urllib.request.urlopen(wanted, timeout=60)
    except urllib.error.HTTPError as refused:
        answer = refused  # that is an answer too
    with answer, given.output.open("wb") as out:
        if given.include:
            lines = [f"HTTP/1.1 {answer.status} {answer.reason}"]
            lines += (f"{name}: {value}" for name, value in answer.headers.items())
            out.write("".join(f"{line}\r\n" for line in [*lines, ""]).encode())
        out.write(answer.read())


def stand_in(directory: Path) -> None:
    """Make a ``curl`` in *directory*."""
    script = directory / "curl"
    script.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{__file__}" "$@"\n')
    script.chmod(0o755)


if __name__ == "__main__":
    main()
