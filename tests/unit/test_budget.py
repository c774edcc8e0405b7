"""How many connections a program may ask for, and how many there are for it."""

from __future__ import annotations

import os
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from poolkeeper._budget import Limits, excess
from poolkeeper._processes import Processes, expected, session_name

FOUR = Processes(4, "uvicorn, workers")


@pytest.mark.parametrize(
    ("max_size", "processes", "limits", "allowed"),
    [
        (10, FOUR, Limits(100, 3, -1, -1), None),
        (24, FOUR, Limits(100, 3, -1, -1), None),
        (25, FOUR, Limits(100, 3, -1, -1), 97),
        (25, FOUR, Limits(100, 0, -1, -1), None),
        (10, FOUR, Limits(100, 3, 39, -1), 39),
        (10, FOUR, Limits(100, 3, 40, -1), None),
        (10, FOUR, Limits(100, 3, -1, 20), 20),
        (10, FOUR, Limits(100, 3, 30, 20), 20),
        (1, Processes(1, ""), Limits(100, 3, 0, -1), 0),
        (98, Processes(1, ""), Limits(100, 3, -1, -1), 97),
    ],
)
def test_the_least_of_what_is_allowed_counts(
    max_size: int, processes: Processes, limits: Limits, allowed: int | None
) -> None:
    found = excess("orders", max_size, processes, limits)
    if allowed is None:
        assert found is None
    else:
        assert found is not None
        assert found.message == (
            f'pool "orders" may grow to {max_size * processes.number} connections, and the server'
            f" has {allowed} for it"
        )


def test_detail_has_the_arithmetic_and_hint_what_fits() -> None:
    found = excess("orders", 10, FOUR, Limits(30, 3, 20, 25))
    assert found is not None
    assert found.detail == (
        "max_size=10 in each of 4 processes (uvicorn, workers) makes 40. The server has"
        " max_connections=30, 3 of them reserved. The role has a CONNECTION LIMIT of 20. The"
        " database has a CONNECTION LIMIT of 25."
    )
    assert found.hint.startswith("Set max_size to 5 or less, raise the limit, or put a pooler")
    assert str(found) == f"{found.message}\nDETAIL:  {found.detail}\nHINT:  {found.hint}"


def test_where_there_are_too_many_processes_no_size_is_small_enough() -> None:
    found = excess("orders", 1, Processes(40, "WEB_CONCURRENCY"), Limits(30, 3, -1, -1))
    assert found is not None
    assert found.hint.startswith("Run fewer processes, raise the limit")


def test_where_nobody_says_how_many_processes_there_are_it_is_asked_for() -> None:
    found = excess("orders", 200, Processes(1, ""), Limits(100, 0, -1, -1))
    assert found is not None
    assert found.detail.startswith("max_size=200 in one process makes 200.")
    assert "expected_processes=" in found.hint


# --- how many processes --------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def no_word_of_the_machines_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WEB_CONCURRENCY", raising=False)


def test_what_is_given_is_asked_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WEB_CONCURRENCY", "2")
    assert expected(8) == (8, "expected_processes")


@pytest.mark.parametrize(
    ("value", "number"), [("4", 4), ("", 1), ("0", 1), ("-2", 1), ("auto", 1), ("2.5", 1)]
)
def test_the_environment_may_say_it(
    monkeypatch: pytest.MonkeyPatch, value: str, number: int
) -> None:
    monkeypatch.setenv("WEB_CONCURRENCY", value)
    assert expected(None) == (number, "WEB_CONCURRENCY" if number > 1 else "")


def started_as(monkeypatch: pytest.MonkeyPatch, **handed: Any) -> None:
    """Let this process be one that a supervisor has started with these arguments."""
    module = ModuleType("multiprocessing.process")
    this = SimpleNamespace(_args=(), _kwargs=handed)
    vars(module).update(parent_process=lambda: object(), current_process=lambda: this)
    monkeypatch.setitem(sys.modules, module.__name__, module)


def settings_of(server: str, workers: Any) -> object:
    return type("Config", (), {"__module__": f"{server}.config", "workers": workers})()


def test_a_supervisor_has_handed_its_settings_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WEB_CONCURRENCY", "2")
    started_as(monkeypatch, sockets=[], config=settings_of("uvicorn", 4))
    assert expected(None) == (4, "uvicorn, workers")


@pytest.mark.parametrize(
    "handed", [{}, {"config": settings_of("mine", 4)}, {"config": settings_of("uvicorn", None)}]
)
def test_settings_of_nobody_known_count_for_nothing(
    monkeypatch: pytest.MonkeyPatch, handed: dict[str, Any]
) -> None:
    started_as(monkeypatch, **handed)
    assert expected(None) == (1, "")


@pytest.mark.parametrize(
    ("module", "attribute", "said_by"),
    [
        ("gunicorn.arbiter", "num_workers", "gunicorn, workers"),
        ("billiard.pool", "_processes", "Celery, concurrency"),
    ],
)
def test_the_parent_stands_below_a_forked_worker(
    monkeypatch: pytest.MonkeyPatch, module: str, attribute: str, said_by: str
) -> None:
    parent = ModuleType(module)
    monkeypatch.setitem(sys.modules, module, parent)
    exec("def fork(self, then): return then()", vars(parent))
    arbiter = SimpleNamespace(**{attribute: 3})
    assert parent.fork(arbiter, lambda: expected(None)) == (3, said_by)
    assert parent.fork(None, lambda: expected(None)) == (1, "")
    assert expected(None) == (1, "")


# --- how they are told apart ---------------------------------------------------------------------


def test_one_of_several_has_its_number() -> None:
    assert session_name("orders", several=False) == "poolkeeper:orders"
    assert session_name("orders", several=True) == f"poolkeeper:orders:{os.getpid()}"


@pytest.mark.parametrize("name", ["x" * 80, "ü" * 40])
def test_a_long_name_leaves_room_for_the_number(name: str) -> None:
    shown = session_name(name, several=True)
    assert shown.endswith(f":{os.getpid()}")
    assert 62 <= len(shown.encode()) <= 63
