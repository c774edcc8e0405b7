"""
Which pages are done as they say, and what their readers have beforehand.

``python -m tests.docs.pages`` (``make pages``) gives each page an empty environment, into which
its own ``pip install`` line installs the wheel; the suite serves them all with its environment.

    fastapi quickstart   only these pages
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import tempfile
import time
import venv
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from importlib import metadata
from pathlib import Path
from urllib.parse import quote, urlencode

import psycopg
from psycopg import sql
from psycopg.conninfo import conninfo_to_dict

from poolkeeper._embedded import EmbeddedServer
from tests.support.redis import REDIS, redis_server
from tests.support.wheel import build_wheel

from .blocks import blocks
from .walk import TYPED, NotAsShown, Reader

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
ELSEWHERE = {"logging"}  # what it shows is compared field by field, in test_logging.py
PAGES = [
    ROOT / "README.md",
    *(DOCS / f"{name}.md" for name in ("quickstart", "diagnose", "errors", "semantics")),
    *(page for page in sorted(DOCS.glob("howto/*.md")) if page.stem not in ELSEWHERE),
]
TWICE = 2


@contextmanager
def database_url(server: str, name: str) -> Iterator[str]:
    """Give the URL of an empty database on the server of that conninfo."""
    made = sql.Identifier(name)
    with psycopg.connect(server, autocommit=True) as conn:
        conn.execute(sql.SQL("create database {}").format(made))
        yield as_url(server, name)
        conn.execute(sql.SQL("drop database {} with (force)").format(made))


def as_url(server: str, database: str) -> str:
    """Write a conninfo as the pages do."""
    given = {key: str(value) for key, value in conninfo_to_dict(server).items()}
    given.pop("dbname", None)
    login = ":".join(quote(given.pop(key), safe="") for key in ("user", "password") if key in given)
    place = ":".join(given.pop(key) for key in ("host", "port") if key in given)
    rest = f"?{urlencode(given)}" if given else ""
    return f"postgresql://{login}{'@' if login else ''}{place}/{database}{rest}"


def environment(url: str, programs: Path, **more: str) -> dict[str, str]:
    """Return what the reader's terminal has: nothing of this checkout, and no other server."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("PYTHON", "PG", "COV_", "COVERAGE_", "PYTEST_"))
        and name != "VIRTUAL_ENV"
    }
    path = f"{programs}{os.pathsep}{os.environ['PATH']}"
    return kept | {"PATH": path, "DATABASE_URL": url} | more


def own_programs() -> Path:
    """Return the directory of this environment's commands, also where its packages stand behind."""
    files = metadata.distribution("uvicorn").files or []
    (command,) = (file for file in files if file.name in ("uvicorn", "uvicorn.exe"))
    return Path(str(command.locate())).resolve().parent


def installs(page: Path) -> list[str]:
    """Return the page's ``pip install`` lines."""
    return [
        line
        for block in blocks(page)
        if block.language == TYPED
        for line in block.body.splitlines()
        if line.startswith("pip install ")
    ]


def needs_redis(page: Path) -> bool:
    """Tell whether the reader has a Redis, at ``REDIS_URL``."""
    return "REDIS_URL" in page.read_text(encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description="Do what the pages say, word by word.")
    parser.add_argument("only", nargs="*", help="names of pages; all without")
    only = parser.parse_args().only
    pages = [page for page in PAGES if not only or page.stem.lower() in only]
    if REDIS is None and any(map(needs_redis, pages)):
        sys.exit("there is no redis-server on this machine, which some of the pages need")
    if missing := set(only) - {page.stem.lower() for page in pages}:
        sys.exit(f"no such page: {', '.join(sorted(missing))}")
    # In the background of a shell it is ignored, and would be by the servers that are started.
    signal.signal(signal.SIGINT, signal.default_int_handler)

    failed = []
    with (
        tempfile.TemporaryDirectory(prefix="poolkeeper-pages-") as name,
        EmbeddedServer() as server,
        redis_server() if REDIS else nullcontext("") as redis,
    ):
        away = Path(name)
        (away / "dist").mkdir()
        wheel = build_wheel(away / "dist")
        for page in pages:
            begin = time.monotonic()
            try:
                _do(page, away / page.stem, wheel, server.dsn(), redis)
            except NotAsShown as wrong:
                failed.append(page.stem)
                print(wrong, flush=True)
            said = "FAILED" if page.stem in failed else "as it says, twice over"
            print(f"{page.stem}: {said} ({time.monotonic() - begin:.0f} s)", flush=True)
    if failed:
        sys.exit(f"{len(failed)} of {len(pages)} pages failed: {', '.join(failed)}")


def _do(page: Path, away: Path, wheel: Path, server: str, redis: str) -> None:
    """Follow one page from nothing, twice."""
    reader_has = away / "venv"
    venv.create(reader_has, with_pip=True)
    constraint = away / "this-one.txt"
    constraint.write_text(f"poolkeeper=={wheel.name.split('-')[1]}\n")
    found = f"{os.environ.get('PIP_FIND_LINKS', '')} {wheel.parent}".strip()
    pip: Mapping[str, str] = {"PIP_FIND_LINKS": found, "PIP_CONSTRAINT": str(constraint)}
    programs = reader_has / ("Scripts" if os.name == "nt" else "bin")
    work = away / "work"
    work.mkdir()
    with database_url(server, page.stem) as url:
        for _ in range(TWICE):
            with Reader(work, environment(url, programs, REDIS_URL=redis, **pip)) as reader:
                reader.follow(page)


if __name__ == "__main__":
    main()
