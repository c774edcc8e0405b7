"""Every adapter is complete: module, extra, suite, example, how-to."""

from __future__ import annotations

import ast
import importlib
import inspect
import tomllib
from pathlib import Path

import pytest

import poolkeeper
import poolkeeper.adapters
from poolkeeper import PoolkeeperError
from tests.support.hints import hints_missing
from tests.workers.tools import WORKERS

from .conformance import ADAPTERS, Conformance
from .servers import Served

ROOT = Path(__file__).parents[2]
HERE = Path(poolkeeper.adapters.__file__).parent
MODULES = sorted(path for path in HERE.glob("*.py") if not path.name.startswith("_"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def suites(name: str, base: type) -> list[type]:
    module = importlib.import_module(f"tests.adapters.test_{name}")
    return [
        one
        for _, one in inspect.getmembers(module, inspect.isclass)
        if issubclass(one, base) and one is not base
    ]


def test_every_module_is_registered() -> None:
    others = {"generic", "sqlalchemy"}  # tests/clients has those of SQLAlchemy
    assert {path.stem for path in MODULES} == {*ADAPTERS, *WORKERS, *others}


@pytest.mark.parametrize("name", WORKERS)
def test_every_tool_with_workers_has_an_extra_an_example_and_a_page(name: str) -> None:
    assert name in PROJECT["optional-dependencies"]
    assert (ROOT / "examples" / name / "app.py").exists()
    assert f"examples/{name}/app.py" in (ROOT / "docs" / "howto" / f"{name}.md").read_text()


@pytest.mark.parametrize("name", ADAPTERS)
def test_every_adapter_passes_the_suites_and_has_an_example_and_a_page(name: str) -> None:
    (conformance, *_) = suites(name, Conformance)
    assert conformance.framework.name == name
    assert suites(name, Served)
    assert (ROOT / "examples" / name / "app.py").exists()
    assert (ROOT / "examples" / name / "test_app.py").exists()
    assert f"examples/{name}/app.py" in (ROOT / "docs" / "howto" / f"{name}.md").read_text()
    extra = conformance.framework.extra
    assert (extra or name) == name
    assert (extra in PROJECT["optional-dependencies"]) == (extra is not None)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_adapters_share_only_the_public_api_and_one_private_module(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            names = {node.module or alias.name for alias in node.names}
            assert names <= ({"_shared", "starlette"} if path.stem == "fastapi" else {"_shared"})
        elif isinstance(node, ast.ImportFrom) and str(node.module).startswith("poolkeeper"):
            assert node.module in ("poolkeeper", "poolkeeper.errors")
            assert {alias.name for alias in node.names} <= {*poolkeeper.__all__, "see"}


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_every_public_name_is_documented_and_has_its_type_hints(path: Path) -> None:
    module = importlib.import_module(f"poolkeeper.adapters.{path.stem}")
    assert not hints_missing(module)
    for name in module.__all__:
        value = getattr(module, name)
        if inspect.isfunction(value) or inspect.isclass(value):
            assert value.__doc__, name


def test_importing_poolkeeper_loads_no_adapter() -> None:
    assert issubclass(PoolkeeperError, Exception)
    tree = ast.parse(Path(poolkeeper.__file__).read_text())
    assert "adapters" not in ast.dump(tree)
