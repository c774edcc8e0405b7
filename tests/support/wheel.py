"""The wheel that users install."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def build_wheel(directory: Path) -> Path:
    """Build it from this checkout, without the network, into *directory*."""
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", directory],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    (path,) = directory.glob("*.whl")
    return path
