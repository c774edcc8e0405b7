"""The benchmarks run, and judge every target; the numbers of so short a run say nothing."""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from xml.etree import ElementTree

import pytest

from benchmarks.contests import LOOPS, POOLS, STAGES, Target, is_installed
from benchmarks.load import load
from benchmarks.report import compared

ROOT = Path(__file__).parents[2]
PATIENCE = 300
"""Seconds: it starts a dozen processes, on a machine that may be busy."""

pytestmark = pytest.mark.timeout(PATIENCE)
VERDICT = r" (reached|\*\*not reached\*\*)$"


def quick(dsn: str, out: Path, *arguments: str) -> str:
    """Run the benchmarks as quickly as can be, and return what they print."""
    # That a benchmark ran a line does not say that it is tested.
    env = {name: value for name, value in os.environ.items() if not name.startswith("COVERAGE_")}
    ended = subprocess.run(
        [
            *(sys.executable, "-m", "benchmarks", "--quick"),
            *("--dsn", dsn, "--out", out, *arguments),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=PATIENCE - 10,
        env=env,
    )
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def table(page: str, title: str) -> list[list[str]]:
    """Return the rows below a title."""
    section = page.partition(f"## {title}\n")[2].partition("\n## ")[0]
    return [line.strip("| ").split(" | ") for line in section.splitlines() if "| " in line][2:]


def test_a_quick_run_writes_the_page_and_the_plot(dsn: str, tmp_path: Path) -> None:
    """Every target has a verdict, but those of outages, on another loop, or without a package."""
    printed = quick(dsn, tmp_path, "--loop", "asyncio")
    page = (tmp_path / "benchmarks.md").read_text()
    assert page.strip() == printed.strip()
    rows = table(page, "Targets")
    assert (
        len(rows) == sum(len(c.targets) for s in STAGES.values() for c in s.contests.values()) + 7
    )
    for what, limit, outcome in rows:
        assert limit
        expected = VERDICT
        if "server away" in what:
            expected = "^not measured$"
        elif "FastAPI" in what:
            expected = "^–$"
        elif missing := re.fullmatch(r"(\S+) is not installed", outcome):
            assert not is_installed(missing[1])
            continue
        assert re.search(expected, outcome), f"{what}: {outcome}"
    assert "A quick try" in page
    for address in (dsn, str(ROOT)):
        assert address not in page
    plot = ElementTree.parse(tmp_path / "benchmarks.svg")
    assert len(plot.findall(".//{*}polyline")) >= 2
    competed = [(what, name) for what, name, *_ in table(page, "Side by side")]
    for contest in POOLS.contests.values():
        assert {"psycopg_pool", "poolkeeper"} <= {
            name for what, name in competed if what == contest.title
        }


def test_a_part_is_printed_and_takes_the_place_of_nothing(dsn: str, tmp_path: Path) -> None:
    """All endpoints answer the same, or it fails."""
    page = quick(dsn, tmp_path, "--only", "fastapi")
    assert not list(tmp_path.iterdir())
    assert len(table(page, "Targets")) == 4
    assert {name for name, *_ in table(page, "FastAPI")} == set(STAGES["fastapi"].installed())
    assert "## Side by side" not in page


def test_a_target_is_judged_in_each_round_and_on_its_loop() -> None:
    samples = {"a": {"wall": [2.0, 3.0]}, "b": {"wall": [4.0, 3.0]}}
    assert compared(samples, "a", "b", "wall") == [0.5, 1.0]
    assert compared(samples, "a", "b", "rate") == [2.0, 1.0]
    less = Target("", "cpu", "b", (0.55, 0.75))
    assert less.limit == "≤ 0.55 / 0.75 ×"
    assert [less.reached(0.6, loop) for loop in LOOPS] == [False, True]
    more = Target("", "rate", "b", (1.1, 1.1))
    assert more.limit == "≥ 1.10 ×"
    assert [more.reached(ratio, "uvloop") for ratio in (1.0, 1.2)] == [False, True]


def test_what_nobody_measures_is_refused(tmp_path: Path) -> None:
    """The names that there are are told."""
    with pytest.raises(AssertionError, match=r"there is no nothing; there is .*one-shot"):
        quick("", tmp_path, "--only", "nothing,fastapi")


@asynccontextmanager
async def answering(status: str) -> AsyncIterator[tuple[int, list[int]]]:
    """Serve HTTP, head and body apart; give the port, and a list with an item for each request."""
    asked: list[int] = []

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while await reader.readuntil(b"\r\n\r\n"):
                asked.append(1)
                writer.write(f"HTTP/1.1 {status}\r\nContent-Length: 5\r\n\r\n".encode())
                await writer.drain()
                await asyncio.sleep(0.001)
                writer.write(b"hello")
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
        yield server.sockets[0].getsockname()[1], asked


@pytest.mark.parametrize(
    "seconds",
    [pytest.param(0.2, id="ours")] + [pytest.param(1.0, id="wrk")] * bool(shutil.which("wrk")),
)
async def test_the_load_counts_what_was_answered(seconds: float) -> None:
    async with answering("200 OK") as (port, asked):
        answered, took = await load(port, "/", seconds, clients=4)
    assert 0 < answered <= len(asked) <= answered + 4
    assert took >= seconds * 0.9
    async with answering("500 Sorry") as (port, _):
        with pytest.raises(RuntimeError, match="failed"):
            await load(port, "/", seconds, clients=4)
