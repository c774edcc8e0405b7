"""The benchmarks run, and judge every target; the numbers of so short a run say nothing."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).parents[2]


def test_a_quick_run_writes_the_page_and_the_plot(dsn: str, tmp_path: Path) -> None:
    """Every target has a verdict on each loop, but those that need an outage or another library."""
    ended = subprocess.run(
        [sys.executable, "-m", "benchmarks", "--quick", "--dsn", dsn, "--out", tmp_path],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=110,
    )
    assert ended.returncode == 0, ended.stderr
    page = (tmp_path / "benchmarks.md").read_text()
    targets = page.partition("## Targets")[2].partition("## ")[0]
    rows = [line.strip("| ").split(" | ") for line in targets.splitlines() if "| " in line][2:]
    assert len(rows) == 11
    for what, limit, *outcomes in rows:
        assert limit
        for outcome in outcomes:
            verdict = r" met$|\*\*not met\*\*$"
            if "server away" in what:
                verdict = "^not measured$"
            elif "asyncpg" in what:
                verdict += "|^asyncpg is not installed$"
            assert re.search(verdict, outcome), f"{what}: {outcome}"
    assert "A quick try" in page
    for address in (dsn, str(ROOT)):
        assert address not in page
    plot = ElementTree.parse(tmp_path / "benchmarks.svg")
    assert len(plot.findall(".//{*}polyline")) >= 2
