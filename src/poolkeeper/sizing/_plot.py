"""A picture of the advice: the wait by size, as SVG that stands alone."""

# pygal has no types.
# pyright: reportMissingTypeStubs=false

from __future__ import annotations

import math
from typing import Any, cast
from xml.etree import ElementTree

from poolkeeper.errors import MissingDependencyError

from ._advice import Advice, duration

LEAST = 1e-4
"""Seconds; what is less is drawn as this: nobody waits."""


def plot(advice: Advice) -> bytes:
    """
    Draw how long acquires wait, by size: an SVG with no script and no reference to elsewhere.

    Raises:
        MissingDependencyError: If pygal is not installed; names the extra.

    .. versionadded:: 0.1.0
    """
    try:
        import pygal
        from pygal.style import Style
    except ModuleNotFoundError as error:
        if error.name != "pygal":
            raise
        raise MissingDependencyError(
            "a plot needs pygal", hint='Install it: pip install "poolkeeper[cli]"'
        ) from error

    rows = [row for row in advice.rows if row.waits is not None]
    most = max((row.waits.p99 for row in rows if row.waits), default=1.0)
    decades = range(-4, max(0, math.ceil(math.log10(max(most, LEAST)))) + 1)  # of seconds
    chart: Any = pygal.Line(
        style=Style(
            background="white",
            plot_background="white",
            colors=("#d1495b", "#0072b2", "#8a8a8a"),
            font_family="Helvetica, Arial, sans-serif",
        ),
        js=[],
        logarithmic=True,
        title=f"wait for a connection, at {advice.workload.rate:.4g} acquires per second,"
        f" held for {duration(advice.workload.hold)}",
        x_title="max_size",
        y_labels=[{"value": 10.0**power, "label": _label(10.0**power)} for power in decades],
        show_y_guides=False,
        formatter=_label,
        range=(LEAST, 10.0 ** decades[-1]),
        legend_at_bottom=True,
        legend_at_bottom_columns=3,
        truncate_legend=-1,
        width=760,
        height=460,
        dots_size=3,
    )
    chart.x_labels = [str(row.size) for row in rows]
    chart.add("p99", [max(LEAST, row.waits.p99) for row in rows if row.waits])
    chart.add("p50", [max(LEAST, row.waits.p50) for row in rows if row.waits])
    chart.add(
        f"wanted at p99: {duration(advice.target)}",
        [max(LEAST, advice.target)] * len(rows),
        show_dots=False,
        stroke_style={"dasharray": "4, 4"},
    )
    drawing = cast(ElementTree.Element, chart.render_tree())
    for parent in list(drawing.iter()):
        for script in [part for part in parent if str(part.tag).endswith("script")]:
            parent.remove(script)
    return cast(bytes, ElementTree.tostring(drawing, "utf-8", xml_declaration=True))


def _label(seconds: float) -> str:
    return "none" if seconds <= LEAST else duration(seconds)
