"""What the commands take, in the words of argparse."""

from __future__ import annotations

import argparse
from collections.abc import Callable


def seconds(least: float, most: float) -> Callable[[str], float]:
    """Return what reads a number of seconds, from *least* to *most*."""

    def read(text: str) -> float:
        try:
            number = float(text)
        except ValueError:
            number = 0.0
        if not least <= number <= most:
            raise argparse.ArgumentTypeError(
                f"{text!r} is no number of seconds, {least:g} to {most:g}"
            )
        return number

    return read


def number(text: str) -> int:
    """Read a whole number, 1 or more."""
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number, 1 or more")
    return int(text)
