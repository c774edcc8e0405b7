"""Several processes of one service, added up: pools of one name count as one."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from ._observer import ERRORS, percentile

State = dict[str, Any]

_SUMS = ("total", "in_use", "idle", "max", "waiting", "making", "returning", "checking")


def add_up(states: Iterable[State]) -> list[State]:
    """
    Return one state for each name of a pool, in the order of the names.

    What is there more than once, such as ``state``, is in ``processes``; rows say whose they are.
    """
    by_name: dict[str, list[State]] = {}
    for state in states:
        by_name.setdefault(state["name"], []).append(state)
    return [_one(name, by_name[name]) for name in sorted(by_name)]


def _one(name: str, states: list[State]) -> State:
    known = [state for state in states if "error" not in state]
    waits = [wait for state in known for wait in state["waits"]]
    return {
        "name": name,
        "processes": [
            {key: state.get(key) for key in ("pid", "program", "state", "opened", "error")}
            for state in states
        ],
        **{key: sum(state[key] for state in known) for key in _SUMS},
        "causes": sorted({state["cause"] for state in known if state["cause"]}),
        "last_errors": sorted({state["last_error"] for state in known if state["last_error"]}),
        "wait_p50_seconds": percentile(waits, 50),
        "wait_p99_seconds": percentile(waits, 99),
        "acquires": len(waits),
        "checkouts": _rows(known, "checkouts", "held_seconds"),
        "waiters": _rows(known, "waiters", "waited_seconds"),
        "sites": _sites(known),
        "errors": sorted(
            ([*error, state["pid"]] for state in known for error in state["errors"]), reverse=True
        )[:ERRORS],
    }


def _rows(states: list[State], what: str, seconds: str) -> list[State]:
    rows = [row | {"pid": state["pid"]} for state in states for row in state[what]]
    return sorted(rows, key=lambda row: row[seconds], reverse=True)


def _sites(states: list[State]) -> list[State]:
    sites: dict[str, State] = {}
    for state in states:
        for site in state["sites"]:
            before = sites.get(site["who"])
            if before is None:
                sites[site["who"]] = dict(site)
                continue
            for key in ("number", "held", "query", "waited", "in_vain"):
                before[key] += site[key]
            before["held_most"] = max(before["held_most"], site["held_most"])
    return sorted(sites.values(), key=lambda site: site["held"], reverse=True)
