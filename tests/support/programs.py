"""Run a whole Python program and look at how it ends, as a user would."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import time
from dataclasses import dataclass


@dataclass(frozen=True)
class Ended:
    """How a program ended."""

    code: int | None
    """Exit status; None if it had to be killed."""
    out: str
    err: str
    seconds: float


def run_program(
    source: str, *arguments: str, timeout: float = 30.0, loop: str = "asyncio"
) -> Ended:
    """
    Run *source* as a program, on the suite's loop through its ``run`` function.

    The program finds ``run`` (asyncio.run, or uvloop.run) and ``sys.argv`` ready.
    """
    prelude = (
        "import asyncio, os, sys\nfrom asyncio import run\n"
        if loop == "asyncio"
        else "import asyncio, os, sys\nfrom uvloop import run\n"
    )
    # In debug mode asyncio reports turns that took long: that is the machine, not the program.
    prelude += (
        "import logging\n"
        "logging.getLogger('asyncio').addFilter(lambda r: 'Executing' not in r.getMessage())\n"
        "del logging\n"
    )
    begin = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, "-c", prelude + textwrap.dedent(source), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ},
    )
    try:
        out, err = process.communicate(timeout=timeout)
        code: int | None = process.returncode
    except subprocess.TimeoutExpired:
        process.kill()
        out, err = process.communicate()
        code = None
    return Ended(code, out, err, time.monotonic() - begin)
