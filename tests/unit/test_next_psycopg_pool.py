"""A psycopg_pool that lacks what poolkeeper needs is told of by the import, and never later."""

from __future__ import annotations

import ast
import inspect
import re
import shutil
from pathlib import Path

import psycopg_pool
import pytest

from poolkeeper import _compat, _pool
from tests.support.programs import run_program

RENAMED = {
    "_maybe_grow_pool": "pool_async.py",  # a method
    "_nconns_min": "base.py",  # an attribute of each pool
    "_sched": "pool_async.py",  # of one that is open
    "_expire_at": "base.py",  # of its connections
    "_CONNECTIONS_LOST": "base.py",
    "AddConnection": "pool_async.py",  # a class
    "AEvent": "_acompat.py",
    "_event": "sched_async.py",
    "open": "pool_async.py",  # a parameter of the constructor, and a method
}


@pytest.mark.parametrize("name", RENAMED)
def test_an_import_beside_one_that_lacks_a_name_says_so(name: str, tmp_path: Path) -> None:
    package = Path(psycopg_pool.__file__).parent
    shutil.copytree(package, tmp_path / "psycopg_pool")
    for file in (tmp_path / "psycopg_pool").glob("*.py"):
        text = file.read_text()
        file.write_text(re.sub(rf"(?<![\w]){name}\b", f"{name}_of_the_next_release", text))
    ended = run_program(
        """
        sys.path.insert(0, sys.argv[1])
        try:
            import poolkeeper
        except ImportError as ex:
            print(type(ex).__name__)
            print(ex)
        """,
        str(tmp_path),
    )
    assert ended.code == 0, ended.err
    kind, message, detail, hint = ended.out.splitlines()
    assert kind == "MissingDependencyError"
    ours = r"(\d\S+|\(not installed as a package\))"
    assert re.fullmatch(rf"poolkeeper {ours} does not work with psycopg_pool \d\S+", message)
    assert detail.startswith("DETAIL:  It needs what that version does not have: ")
    assert name in detail
    assert 'pip install "psycopg-pool>=3.3.2,<3.4"' in hint


def names(module: object, of: str) -> set[str]:
    """Return the attributes of the variable *of* in the source of *module*."""
    return {
        node.attr
        for node in ast.walk(ast.parse(inspect.getsource(module)))  # type: ignore[arg-type]
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.value.id == of
    }


def test_every_name_that_is_used_is_looked_for() -> None:
    """Of pools, in the one module that uses their internals, and of the class in the other."""
    inherited = set(dir(psycopg_pool.AsyncConnectionPool)) & names(_pool, "self")
    used = names(_compat, "pool") | (names(_compat, "conn") - {"_pool"}) | inherited
    looked_for = {*_compat.NEEDED, *(name for set_by in _compat.SET_BY.values() for name in set_by)}
    replaced = {name for name in used if name in vars(_pool.BoundPool)}
    assert used - looked_for - replaced == set()


def test_nothing_is_missing_from_the_one_that_is_installed() -> None:
    _compat.require()
