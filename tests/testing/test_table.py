"""The page's table of modes and scopes: every cell is a test, run by pytest as users run it."""

from __future__ import annotations

import re
from itertools import product
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

from .test_plugin import run_pytest

PAGE = Path(__file__).parents[2] / "docs" / "howto" / "pytest.md"
SCOPES = ("function", "class", "module", "package", "session")

WORKS, SETTINGS, PYTESTS = "works", "two settings", "ScopeMismatch"

HEAD = """
import os
import pytest
import pytest_asyncio
from poolkeeper import PoolManager

def manager(name):
    return PoolManager(os.environ["TABLE_DSN"], min_size=1, name=name)
"""

ASYNCIO_FIXTURE = """
@pytest_asyncio.fixture(scope="{scope}", loop_scope="{loop}")
async def {name}():
    async with manager("{name}") as db:
        yield db
"""

ASYNCIO_TEST = """
    @pytest.mark.asyncio(loop_scope="{test}")
    async def test_{scope}_{loop}_{test}(self, {name}):
        assert await {name}.fetchval("select 1") == 1
"""

ANYIO_FIXTURE = """
@pytest.fixture(scope="{scope}")
async def of_{scope}():
    async with manager("{scope}") as db:
        yield db
"""

ANYIO_TEST = """
    @pytest.mark.anyio
    async def test_{scope}_{backend}(self, of_{scope}):
        assert await of_{scope}.fetchval("select 1") == 1
"""

ANYIO_BACKEND = """
@pytest.fixture(scope="{backend}")
def anyio_backend():
    return "asyncio"

class Test:
"""


ELSEWHERE = """
import asyncio

@pytest.fixture(scope="module")
def elsewhere():
    db = manager("elsewhere")
    with asyncio.Runner() as runner:
        runner.run(db.open())
        yield db
        runner.run(db.close())

@pytest.mark.anyio
async def test_elsewhere(elsewhere, anyio_backend):
    await elsewhere.fetchval("select 1")
"""


def outcome(case: ET.Element) -> str:
    """Return what became of a cell, by what pytest said."""
    said = " ".join(
        f"{child.get('message', '')} {child.text}"
        for child in case
        if child.tag in ("failure", "error")
    )
    if not said:
        return WORKS
    settings = (
        r"asyncio_default_fixture_loop_scope = (\w+) and asyncio_default_test_loop_scope = \1\b"
    )
    if "LoopMismatchError" in said and re.search(settings, said):
        return SETTINGS
    if "LoopMismatchError" in said and 'fixture anyio_backend the scope "module"' in said:
        return "anyio_backend"
    return PYTESTS if "ScopeMismatch" in said else said


def cells(directory: Path, dsn: str, *arguments: str) -> dict[str, str]:
    """Run what is in *directory*; return what became of each test."""
    (directory / "__init__.py").touch()
    (directory / "pytest.ini").write_text(
        "[pytest]\nasyncio_default_fixture_loop_scope = function\n"
        "filterwarnings = ignore::poolkeeper.errors.DuplicatePoolWarning\n"
    )
    ran = run_pytest(directory, "-q", "--junitxml=said.xml", *arguments, TABLE_DSN=dsn)
    found: dict[str, str] = {}
    for case in ET.parse(directory / "said.xml").iter("testcase"):
        name = re.sub(r"\W.*", "", str(case.get("name")).removeprefix("test_"))
        if found.get(name, WORKS) == WORKS:
            found[name] = outcome(case)
    assert found, ran.stdout
    return found


def table(first: str) -> dict[tuple[str, ...], list[str]]:
    """Return the page's table whose first column is called so: its rows by their first columns."""
    lines = PAGE.read_text().splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(f"| {first} |"))
    named = 2 if "`loop_scope`" in lines[start] else 1
    rows: dict[tuple[str, ...], list[str]] = {}
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        words = [word.strip().strip("`") for word in line.strip("|").split("|")]
        rows[tuple(words[:named])] = words[named:]
    return rows


@pytest.mark.parametrize("mode", ["strict", "auto"])
def test_pytest_asyncio_does_what_the_table_says(mode: str, dsn: str, tmp_path: Path) -> None:
    pairs = list(product(SCOPES, SCOPES))
    fixtures, tests = "", "\nclass Test:\n"
    for (scope, loop), test in product(pairs, SCOPES):
        # One that cannot be set up is not asked for twice.
        shared = SCOPES.index(scope) <= SCOPES.index(loop)
        name = f"{scope}_{loop}" if shared else f"{scope}_{loop}_{test}"
        if f"def {name}(" not in fixtures:
            fixtures += ASYNCIO_FIXTURE.format(scope=scope, loop=loop, name=name)
        tests += ASYNCIO_TEST.format(scope=scope, loop=loop, test=test, name=name)
    text = f"{HEAD}{fixtures}{tests}"
    (tmp_path / "test_cells.py").write_text(text)
    found = cells(tmp_path, dsn, "-o", f"asyncio_mode={mode}")
    says = table("`scope` of the fixture")
    assert len(found) == len(pairs) * len(SCOPES) == sum(map(len, says.values()))
    for scope, loop in pairs:
        seen = [found[f"{scope}_{loop}_{test}"] for test in SCOPES]
        assert seen == says[scope, loop], (scope, loop)


def test_anyio_does_what_the_table_says(dsn: str, tmp_path: Path) -> None:
    for backend in SCOPES:
        package = tmp_path / backend
        package.mkdir()
        (package / "__init__.py").touch()
        text = HEAD + "".join(ANYIO_FIXTURE.format(scope=scope) for scope in SCOPES)
        text += ANYIO_BACKEND.format(backend=backend)
        text += "".join(ANYIO_TEST.format(scope=scope, backend=backend) for scope in SCOPES)
        if backend == "session":
            text += ELSEWHERE
        (package / f"test_{backend}.py").write_text(text)
    found = cells(tmp_path, dsn, "-p", "anyio", "-o", "asyncio_mode=strict")
    assert found.pop("elsewhere") == "anyio_backend"
    says = table("`scope` of `anyio_backend`")
    assert len(found) == len(SCOPES) ** 2 == sum(map(len, says.values()))
    for backend in SCOPES:
        seen = [found[f"{scope}_{backend}"] for scope in SCOPES]
        assert seen == says[backend,], backend
