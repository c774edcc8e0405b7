"""Every error and warning: what it can be caught as, how it reads, and that it travels."""

from __future__ import annotations

import contextlib
import copy
import inspect
import pickle
import traceback
from collections.abc import Callable
from typing import Any

import psycopg
import psycopg_pool
import pytest

import poolkeeper
from poolkeeper import errors
from poolkeeper._diagnosis import Diagnosis, diagnose
from poolkeeper._snapshot import CheckoutRow, LoadRow, PoolSnapshot, WaiterRow
from poolkeeper.errors import (
    AcquireTimeout,
    BlockedLoopWarning,
    CallTimeout,
    ClosedError,
    ConfigError,
    ConnectionBudgetWarning,
    DuplicatePoolWarning,
    LoopMismatchError,
    LoopPerCallWarning,
    LostWorkError,
    MissingDependencyError,
    NoConnectionError,
    NotOpenError,
    OpenError,
    PoolkeeperError,
    QueryTimeout,
    ReleasedConnectionError,
    SelfDeadlockError,
    TooManyWaitersError,
    UnclosedManagerWarning,
)

BASES = {
    PoolkeeperError: (Exception,),
    ConfigError: (PoolkeeperError, ValueError),
    LoopMismatchError: (PoolkeeperError, RuntimeError),
    NotOpenError: (PoolkeeperError, psycopg_pool.PoolClosed),
    ClosedError: (PoolkeeperError, psycopg_pool.PoolClosed),
    OpenError: (PoolkeeperError, psycopg_pool.PoolTimeout),
    NoConnectionError: (PoolkeeperError,),
    AcquireTimeout: (NoConnectionError, psycopg_pool.PoolTimeout),
    SelfDeadlockError: (AcquireTimeout,),
    TooManyWaitersError: (NoConnectionError, psycopg_pool.TooManyRequests),
    QueryTimeout: (PoolkeeperError, psycopg.errors.QueryCanceled),
    CallTimeout: (PoolkeeperError, TimeoutError),
    ReleasedConnectionError: (PoolkeeperError, psycopg.InterfaceError),
    LostWorkError: (PoolkeeperError, psycopg.OperationalError),
    MissingDependencyError: (PoolkeeperError, ImportError),
    UnclosedManagerWarning: (ResourceWarning,),
    DuplicatePoolWarning: (UserWarning,),
    BlockedLoopWarning: (UserWarning,),
    LoopPerCallWarning: (UserWarning,),
    ConnectionBudgetWarning: (UserWarning,),
}

ERRORS = [cls for cls in BASES if issubclass(cls, PoolkeeperError)]
each_error = pytest.mark.parametrize("cls", ERRORS, ids=lambda cls: cls.__name__)


@pytest.mark.parametrize("cls", BASES, ids=lambda cls: cls.__name__)
def test_a_class_has_exactly_these_bases(cls: type[Exception]) -> None:
    assert cls.__bases__ == BASES[cls]


def test_every_class_of_the_module_is_in_the_table_and_exported() -> None:
    classes = {
        cls
        for _, cls in inspect.getmembers(errors, inspect.isclass)
        if cls.__module__ == errors.__name__
    }
    assert classes == set(BASES)
    names = {cls.__name__ for cls in classes}
    assert set(errors.__all__) == names
    assert names <= set(poolkeeper.__all__)
    assert all(getattr(poolkeeper, name) is getattr(errors, name) for name in names)


def test_what_the_package_exports_is_there() -> None:
    assert [name for name in poolkeeper.__all__ if not hasattr(poolkeeper, name)] == []
    assert len(set(poolkeeper.__all__)) == len(poolkeeper.__all__)


@pytest.mark.parametrize(
    ("cls", "caught_as"),
    [
        (OpenError, psycopg.OperationalError),
        (OpenError, psycopg_pool.PoolTimeout),
        (AcquireTimeout, psycopg.OperationalError),
        (SelfDeadlockError, psycopg_pool.PoolTimeout),
        (NotOpenError, psycopg.OperationalError),
        (ReleasedConnectionError, psycopg.Error),
        (MissingDependencyError, ImportError),
        (UnclosedManagerWarning, Warning),
    ],
)
def test_existing_code_catches_it(cls: type[Exception], caught_as: type[Exception]) -> None:
    with pytest.raises(caught_as):
        raise cls("x")


@each_error
def test_a_message_stands_alone(cls: type[PoolkeeperError]) -> None:
    error = cls('pool "orders" is closed')
    assert str(error) == 'pool "orders" is closed'
    assert error.detail is None
    assert error.hint is None


@each_error
def test_detail_and_hint_follow_on_lines_of_their_own(cls: type[PoolkeeperError]) -> None:
    error = cls('pool "orders" is closed', detail="Opened at app.py:1.", hint="Open it.")
    assert str(error) == ('pool "orders" is closed\nDETAIL:  Opened at app.py:1.\nHINT:  Open it.')
    assert str(cls("a", detail="b")) == "a\nDETAIL:  b"
    assert str(cls("a", hint="c")) == "a\nHINT:  c"


@each_error
def test_a_traceback_shows_the_whole_text(cls: type[PoolkeeperError]) -> None:
    shown = "".join(traceback.format_exception_only(cls("a", detail="b", hint="c")))
    assert shown.endswith(f"errors.{cls.__name__}: a\nDETAIL:  b\nHINT:  c\n")


@each_error
def test_it_can_be_made_without_a_message(cls: type[PoolkeeperError]) -> None:
    assert str(cls()) == ""


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@each_error
def test_a_pickle_keeps_everything(cls: type[PoolkeeperError], protocol: int) -> None:
    _same(cls, lambda error: pickle.loads(pickle.dumps(error, protocol)))


@each_error
@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy])
def test_a_copy_keeps_everything(cls: type[PoolkeeperError], copied: Any) -> None:
    _same(cls, copied)


def a_diagnosis() -> Diagnosis:
    """With a row of each kind, so that all of them are known to travel."""
    row = CheckoutRow("report-7", "app/report.py:52", 41.2, 40.0, "idle", 0.1, 4711, stack="...")
    waiter = WaiterRow("task", "app/x.py:1", 1.5, 0)
    return diagnose(
        PoolSnapshot(
            "orders", "open", 1, 1, 0, 1, 1,
            checkouts=(row,), waiters=(waiter,), load=LoadRow(10.0, 5, 4, 3.0, 2.0),
        )
    )  # fmt: skip


def _same(cls: type[PoolkeeperError], travel: Any) -> None:
    fields: dict[str, Any] = {"detail": "Facts.", "hint": "Advice."}
    if cls is ConfigError:
        fields["parameter"] = "max_size"
    if issubclass(cls, AcquireTimeout):
        fields["diagnosis"] = a_diagnosis()
    error = cls("what happened", **fields)
    other = travel(error)
    assert type(other) is cls
    assert other is not error
    assert str(other) == str(error) == "what happened\nDETAIL:  Facts.\nHINT:  Advice."
    assert other.args == ("what happened",)
    assert {name: getattr(other, name) for name in fields} == fields


def test_a_config_error_names_the_parameter() -> None:
    assert ConfigError("x", parameter="name").parameter == "name"
    assert ConfigError("x").parameter is None


def test_a_timeout_says_why_where_that_is_known() -> None:
    diagnosis = a_diagnosis()
    assert AcquireTimeout("x", diagnosis=diagnosis).diagnosis is diagnosis
    assert AcquireTimeout("x").diagnosis is None
    assert SelfDeadlockError("x", diagnosis=diagnosis).diagnosis is diagnosis


# --- words that are found when they are read ----------------------------------------------------

READS: dict[str, Callable[[AcquireTimeout], object]] = {
    "str": str,
    "repr": repr,
    "args": lambda error: error.args,
    "detail": lambda error: error.detail,
    "hint": lambda error: error.hint,
    "diagnosis": lambda error: error.diagnosis,
    "format": lambda error: traceback.format_exception(error),
    "pickle": pickle.dumps,
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "setting args": lambda error: setattr(error, "args", ("none was free",)),
}


class Story:
    """Counts how often it is told."""

    def __init__(self) -> None:
        self.told = 0
        self.diagnosis = a_diagnosis()

    def __call__(self) -> tuple[str, str, str, Diagnosis]:
        self.told += 1
        return "none was free", "Facts.", "Advice.", self.diagnosis


@pytest.mark.parametrize("first", READS)
def test_whoever_reads_a_timeout_first_finds_the_words(first: str) -> None:
    story = Story()
    error = AcquireTimeout.told_later(story)
    assert story.told == 0
    READS[first](error)
    assert story.told == 1
    told = AcquireTimeout(
        "none was free", detail="Facts.", hint="Advice.", diagnosis=story.diagnosis
    )
    for read in ("str", "repr", "args", "detail", "hint", "diagnosis", "format"):
        assert READS[read](error) == READS[read](told)
    assert vars(error) == vars(told)
    assert story.told == 1
    _same_as(error, pickle.loads(pickle.dumps(error)))
    _same_as(error, copy.copy(error))


def _same_as(error: AcquireTimeout, other: AcquireTimeout) -> None:
    assert str(other) == str(error)
    assert (other.args, other.detail, other.hint) == (error.args, error.detail, error.hint)
    assert other.diagnosis == error.diagnosis


def test_to_raise_and_catch_a_timeout_reads_nothing() -> None:
    story = Story()
    for _ in range(3):
        with contextlib.suppress(psycopg_pool.PoolTimeout):
            raise AcquireTimeout.told_later(story)
    assert story.told == 0


def test_a_timeout_has_no_more_attributes_than_others() -> None:
    error = AcquireTimeout.told_later(Story())
    assert not hasattr(error, "nothing")
    assert error.sqlstate is None
    with pytest.raises(AttributeError, match="'AcquireTimeout' object has no attribute 'nothing'"):
        _ = error.nothing  # type: ignore[attr-defined]


def test_a_hint_sends_to_the_docs_and_names_the_command_that_needs_no_network() -> None:
    closed = "See https://poolkeeper.readthedocs.io/errors#closed"
    assert errors.see_site("closed") == closed
    assert errors.see("closed") == f"{closed} or run: poolkeeper explain closed"
    assert errors.see("closed", "fork") == f"{closed} or run: poolkeeper explain fork"
