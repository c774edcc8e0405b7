"""What README.md and docs/ say of the source, and of one another, is so."""

from __future__ import annotations

import ast
import importlib.util
import re
from pathlib import Path

import pytest

import poolkeeper
from poolkeeper import _compat
from poolkeeper.errors import DOCS
from tests.docs.blocks import Block, blocks

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]

_HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)
_ANCHOR = re.compile(r'<a id="([^"]+)"></a>')
_LINK = re.compile(r"\[[^\]]+\]\(([^)\s]+)\)")
_SEE = re.compile(r"""\bsee(?:_site)?\(["']([\w-]+)["'][,)]""")


EXCERPTS = [block for page in PAGES for block in blocks(page) if block.source]


@pytest.mark.parametrize("block", EXCERPTS, ids=lambda block: f"{block.path.name}:{block.line}")
def test_an_excerpt_is_what_stands_in_the_tested_example(block: Block) -> None:
    assert block.source is not None
    assert f"\n{block.body}" in "\n" + (ROOT / block.source).read_text()


def anchors(page: Path) -> set[str]:
    """What a link can point to, as GitHub and MyST name it."""
    text = page.read_text(encoding="utf-8")
    for block in blocks(page):
        text = text.replace(block.body, "")
    headings = {
        re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-")
        for heading in _HEADING.findall(text)
    }
    return headings | set(_ANCHOR.findall(text))


def test_every_error_that_points_to_the_docs_finds_its_paragraph_there() -> None:
    used = {
        anchor
        for path in Path(poolkeeper.__file__).parent.rglob("*.py")
        for anchor in _SEE.findall(path.read_text())
    }
    assert used
    assert set(_ANCHOR.findall((ROOT / "docs" / "errors.md").read_text())) == used


def test_every_error_and_warning_has_its_place_in_the_docs() -> None:
    text = (ROOT / "docs" / "errors.md").read_text()
    public = [name for name in poolkeeper.errors.__all__ if f"`{name}`" not in text]
    assert not public


def test_the_reference_has_every_public_name() -> None:
    text = (ROOT / "docs" / "reference.md").read_text()
    shown = set(
        re.findall(r"^\.\. auto(?:class|module):: (?:poolkeeper\.)?(\S+)$", text, re.MULTILINE)
    )
    package = Path(poolkeeper.__file__).parent
    adapters = {f"adapters.{path.stem}" for path in package.glob("adapters/[!_]*.py")}
    names = {name for name in poolkeeper.__all__ if not name.startswith("__")}
    telemetry = {f"telemetry.{path.stem}" for path in package.glob("telemetry/[!_]*.py")}
    modules = {"errors", "events", "live", "sizing", "testing"} | adapters | telemetry
    assert shown == modules | names - set(poolkeeper.errors.__all__)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_between_the_pages_lead_somewhere(page: Path) -> None:
    for link in _LINK.findall(page.read_text(encoding="utf-8")):
        if "://" in link:
            continue
        target, _, anchor = link.partition("#")
        file = (page.parent / target).resolve() if target else page
        assert file.exists(), f"{page.name}: {link}"
        if anchor:
            assert anchor in anchors(file), f"{page.name}: {link}"


RAW = "https://raw.githubusercontent.com/poolkeeper/poolkeeper/main/"
BLOB = "https://github.com/poolkeeper/poolkeeper/blob/main/"
READMES = sorted(ROOT.glob("README*.md"))


@pytest.mark.parametrize("readme", READMES, ids=lambda page: page.name)
def test_the_links_of_a_readme_lead_here_from_wherever_it_is_read(readme: Path) -> None:
    """PyPI shows it, and knows neither the checkout nor its pictures."""
    links = _LINK.findall(readme.read_text(encoding="utf-8"))
    assert links
    for link in links:
        assert link.startswith("https://"), link
        for begin in (RAW, BLOB):
            if link.startswith(begin):
                assert (ROOT / link.removeprefix(begin)).is_file(), link
        if link.startswith(f"{DOCS}/"):
            path, _, anchor = link.removeprefix(f"{DOCS}/").partition("#")
            page = ROOT / "docs" / f"{path.strip('/') or 'index'}.md"
            assert page.is_file(), link
            assert not anchor or anchor in anchors(page), link


def imported(module: Path) -> set[str]:
    """What a module takes from its own package."""
    nodes = [n for n in ast.walk(ast.parse(module.read_text())) if isinstance(n, ast.ImportFrom)]
    inside = [node for node in nodes if node.level]
    return {str(n.module) for n in inside if n.module} | {
        alias.name for n in inside if not n.module for alias in n.names
    }


def test_the_architecture_page_names_every_module_and_imports_point_upwards_in_its_list() -> None:
    package = ROOT / "src" / "poolkeeper"  # an installed wheel carries pages besides
    (listed,) = (b.body for b in blocks(ROOT / "docs" / "architecture.md") if not b.language)
    order = re.findall(r"^  (\w+)(?:\.py|/)", listed, re.MULTILINE)
    present = {
        path.stem for path in package.iterdir() if path.name not in ("__pycache__", "py.typed")
    }
    assert set(order) == present
    assert order[0] == "__init__"  # at the top because that is where readers begin
    for place, name in enumerate(order[1:], 1):
        if (package / f"{name}.py").exists():
            below = imported(package / f"{name}.py") & set(order[place:])
            assert not below, f"{name} imports {below}"


def test_the_picture_of_the_rooms_is_up_to_date() -> None:
    """If not: python scripts/rooms.py."""
    path = ROOT / "scripts" / "rooms.py"
    spec = importlib.util.spec_from_file_location("rooms", path)
    assert spec is not None
    assert spec.loader is not None
    rooms = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(rooms)
    drawn = rooms.picture(ROOT / "src" / "poolkeeper")
    assert rooms.PICTURE.read_text(encoding="utf-8") == drawn
    assert "_life imports _checking" in drawn


def test_there_is_no_circle_among_the_modules_of_the_core() -> None:
    graph: dict[str, set[str]] = {
        path.stem: imported(path) for path in (ROOT / "src" / "poolkeeper").glob("*.py")
    }
    while leaves := [name for name, direct in graph.items() if not direct & graph.keys()]:
        for name in leaves:
            del graph[name]
    assert not graph


def test_the_architecture_page_names_all_that_is_used_of_psycopg_pools_internals() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text()
    _, _, table = text.partition("| internal | what for |\n| --- | --- |\n")
    rows = re.findall(r"^\|.*`(_\w+)`.*\|.*\|$", table, re.MULTILINE)
    assert rows == ["_pool"]  # the only one, see test_compat
    assert not [name for name in _compat.NEEDED if name.startswith("_")]
