"""The wheel that users install."""

from __future__ import annotations

import email
import os
import re
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from email.message import Message
from pathlib import Path

import pytest

import poolkeeper
from poolkeeper import errors
from poolkeeper._explain import PAGES
from tests.support.wheel import build_wheel

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Iterator[zipfile.ZipFile]:
    """The wheel, built from this checkout without the network."""
    with zipfile.ZipFile(build_wheel(tmp_path_factory.mktemp("dist"))) as wheel:
        yield wheel


@pytest.fixture(scope="module")
def metadata(wheel: zipfile.ZipFile) -> Message:
    """What the wheel says about itself."""
    (name,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    return email.message_from_bytes(wheel.read(name))


def test_the_wheel_holds_the_package_and_its_pytest_plugin_alone(
    wheel: zipfile.ZipFile,
) -> None:
    source = ROOT / "src"
    expected = {
        path.relative_to(source).as_posix()
        for package in ("poolkeeper", "pytest_poolkeeper")
        for path in (source / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    pages = {f"poolkeeper/_pages/{page}.md" for page in PAGES}
    held = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert held == expected | pages
    for page in pages:
        assert wheel.read(page) == (ROOT / "docs" / Path(page).name).read_bytes()


def test_what_the_wheel_explains_is_what_stands_in_its_pages(
    wheel: zipfile.ZipFile, tmp_path: Path
) -> None:
    wheel.extractall(tmp_path)
    (page,) = tmp_path.glob("poolkeeper/_pages/errors.md")
    page.write_text(page.read_text().replace("A forked process", "Changed in the wheel"))
    ended = subprocess.run(
        [sys.executable, "-m", "poolkeeper", "explain", "fork"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert ended.stdout.startswith("Changed in the wheel\n")


def test_the_wheel_is_typed_and_carries_its_licence(wheel: zipfile.ZipFile) -> None:
    names = wheel.namelist()
    assert "poolkeeper/py.typed" in names
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)


def test_the_wheel_depends_on_psycopg_its_pool_and_typing_extensions_alone(
    metadata: Message,
) -> None:
    required = [line for line in metadata.get_all("Requires-Dist", []) if "extra ==" not in line]
    assert sorted(re.split(r"[<>=!~ ;]", line)[0] for line in required) == [
        "psycopg-pool",
        "psycopg[pool]",
        "typing-extensions",
    ]


def test_the_wheel_has_the_version_of_the_package_and_the_python_it_promises(
    metadata: Message,
) -> None:
    assert metadata["Version"] == poolkeeper.__version__
    assert metadata["Requires-Python"] == ">=3.11"


def test_the_wheel_says_who_made_it_and_where_it_lives(metadata: Message) -> None:
    urls = dict(line.split(", ", 1) for line in metadata.get_all("Project-URL", []))
    assert metadata["Author"] == "poolkeeper contributors"
    assert set(urls) == {"Documentation", "Source", "Issues", "Changelog"}
    assert errors.see("x").startswith(f"See {urls['Documentation']}")
    assert all(
        url.startswith(urls["Source"]) for name, url in urls.items() if name != "Documentation"
    )


def test_the_index_shows_the_readme(wheel: zipfile.ZipFile) -> None:
    """Its links are absolute, which tests/docs looks at: relative ones lead nowhere there."""
    (name,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    assert wheel.read(name).decode().endswith((ROOT / "README.md").read_text(encoding="utf-8"))
