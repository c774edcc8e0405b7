"""A psycopg_pool that lacks what poolkeeper needs is told of by the import, and never later."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import psycopg_pool
import pytest

from poolkeeper import BoundPool, _compat
from poolkeeper._life import Pool
from tests.support.programs import run_program

RENAMED = {
    "max_lifetime": "base.py",  # a parameter of the constructor, and an attribute
    "reconnect_failed": "pool_async.py",  # a method
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


def test_every_name_that_is_used_is_looked_for() -> None:
    """What the pool overrides, and what its rooms read of it."""
    theirs = {name for name in dir(psycopg_pool.AsyncConnectionPool) if not name.startswith("_")}
    overridden = theirs & vars(BoundPool).keys()
    read = {name for name in vars(Pool) | Pool.__annotations__ if not name.startswith("_")}
    assert overridden | read - {"life", "options", "take_back_dropped"} <= {*_compat.NEEDED}


def test_nothing_is_missing_from_the_one_that_is_installed() -> None:
    _compat.require()
