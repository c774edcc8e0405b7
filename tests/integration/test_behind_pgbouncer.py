"""Behind a PgBouncer all is the same that does not look at the server's own sessions."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.pooler import PGBOUNCER

ROOT = Path(__file__).parents[2]

SUITES = (
    "tests/integration/test_helpers.py",
    "tests/integration/test_psycopg_semantics.py",
    "tests/adapters/test_starlette.py::TestStarlette",
)

# Not skipped where there is no PgBouncer, which no wheel has: the report's header says so.
if PGBOUNCER is not None:

    def test_the_suites_pass_in_transaction_mode(pytestconfig: pytest.Config) -> None:
        """What an adapter keeps, what the one-shots do, what is psycopg's."""
        arguments = ["--pooler", "transaction", "--loop", pytestconfig.getoption("--loop")]
        arguments += ["-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-p", "no:randomly"]
        done = subprocess.run(
            [sys.executable, "-m", "pytest", *arguments, *SUITES],
            cwd=ROOT,
            env={name: value for name, value in os.environ.items() if "PYTEST" not in name},
            capture_output=True,
            text=True,
            timeout=100,
            check=False,
        )
        passed = re.search(r"(\d+) passed", done.stdout)
        assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
        assert passed is not None
        assert int(passed[1]) > 100
