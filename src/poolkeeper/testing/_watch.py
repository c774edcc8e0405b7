"""
What a test leaves behind, and what to say of loops that differ: for the pytest plugin.

What a fixture of a wider scope than one test has opened, acquired or started is not the test's.
"""

from __future__ import annotations

import asyncio
import logging
import sys
import weakref
from typing import Any, NamedTuple, TypeVar

from typing_extensions import override

from poolkeeper import LoopMismatchError
from poolkeeper.errors import see

from ._errors import LeftBehindError, OwnershipError
from ._seam import (
    Checkout,
    checkouts,
    line_of_task,
    live_pools,
    loops_with_pools,
    where_opened,
)

E = TypeVar("E", bound=BaseException)

SCOPES = ("function", "class", "module", "package", "session")
EVENTS = {
    "poolkeeper.connection_dropped",
    "poolkeeper.transaction_left",
    "poolkeeper.work_rolled_back",
}
"""What the pool says of a connection that came back, and was not to come back so."""


class Opener(NamedTuple):
    """The fixture that has opened a pool."""

    fixture: str
    scope: str
    loop_scope: str | None


class Heard(logging.Handler):
    """What pools have said since it was asked last."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    @override
    def emit(self, record: logging.LogRecord) -> None:
        if getattr(record, "event_name", "") in EVENTS:
            self.lines.append(record.getMessage())


class Watch:
    """What pools there are, connections, and tasks on their loops, as one test follows another."""

    def __init__(self) -> None:
        self._kept: weakref.WeakSet[Any] = weakref.WeakSet()
        """Pools and tasks that the test is not to answer for."""
        self._kept_checkouts: set[Checkout] = set()
        self._openers: weakref.WeakKeyDictionary[Any, Opener] = weakref.WeakKeyDictionary()
        self._tasks: list[str] = []
        self._heard = Heard()
        logging.getLogger("poolkeeper").addHandler(self._heard)

    def begin(self) -> None:
        """Note all that is there: it is no part of the test that begins."""
        self._heard.lines.clear()
        self._tasks.clear()
        self._keep()

    def _keep(self) -> None:
        pools = live_pools()
        self._kept.update(pools)
        # Those that have ended are of no interest, and would keep what they knew.
        self._kept_checkouts = {checkout for pool in pools for checkout in checkouts(pool)}
        for loop in loops_with_pools():
            self._kept.update(asyncio.all_tasks(loop))

    def fixture_was_set_up(self, fixturedef: Any) -> None:
        """Note what pools a fixture has opened; keep them if it is for several tests."""
        scope, loop_scope = fixturedef.scope, getattr(fixturedef.func, "_loop_scope", None)
        for pool in live_pools():
            if pool not in self._openers and pool not in self._kept:
                self._openers[pool] = Opener(fixturedef.argname, scope, loop_scope)
        if scope != "function" and not fixturedef.argname.startswith("_"):
            self._keep()

    def watch_runner(self, fixturedef: Any) -> None:
        """Look at the tasks of a loop of pytest-asyncio's before they go with it."""
        if fixturedef.argname.endswith("_scoped_runner") and fixturedef.cached_result is not None:
            runner = fixturedef.cached_result[0]
            get_loop = getattr(runner, "get_loop", None)
            if get_loop is not None:
                fixturedef.addfinalizer(lambda: self._look_at_tasks(get_loop()))

    def _look_at_tasks(self, loop: asyncio.AbstractEventLoop) -> None:
        if loop not in loops_with_pools():
            return
        for task in asyncio.all_tasks(loop):
            line = None if task in self._kept else line_of_task(task)
            if line is not None:
                self._kept.add(task)
                self._tasks.append(f'Task "{task.get_name()}" goes on at {line}.')

    def end(self) -> LeftBehindError | None:
        """Return what to say of the test that has ended; None if it has left nothing."""
        for loop in loops_with_pools():
            self._look_at_tasks(loop)
        said: list[str] = []
        for pool in live_pools():
            said += [
                f'A connection of pool "{pool.name}" was not given back: acquired {checkout}.'
                for checkout in checkouts(pool)
                if checkout not in self._kept_checkouts
            ]
            if pool not in self._kept:
                said.append(f'Pool "{pool.name}" is open: opened {where_opened(pool)}.')
        said += [f"{line[0].upper()}{line[1:]}." for line in self._heard.lines]
        said += self._tasks
        self._keep()
        if not said:
            return None
        return LeftBehindError(
            f"the test has left {len(said)} thing(s) behind",
            detail=" ".join(said),
            hint="Give connections back by a block, wait for tasks or cancel them, close what was"
            f" opened; or mark the test with leaves_behind. {see('left-behind')}",
        )

    # --- loops that differ ------------------------------------------------------------------------

    def advise(self, item: Any, error: BaseException) -> None:
        """Put what is to be written, or installed, into the hint of what a test has raised."""
        by_asyncio = item.get_closest_marker("asyncio") is not None
        if by_asyncio and (unowned := _in_chain(error, OwnershipError)) is not None:
            unowned.hint = _for_context(unowned.hint)
        mismatch = _in_chain(error, LoopMismatchError)
        if mismatch is None:
            return
        opener = next(
            (
                opener
                for pool, opener in self._openers.items()
                if f'pool "{pool.name}" ' in str(mismatch.args[0])
            ),
            None,
        )
        # Without one, or with the same loop as it, settings are not what is wrong: it may be a
        # loop of the test's own, in a thread.
        if opener is None:
            return
        if item.get_closest_marker("anyio") is not None:
            mismatch.hint = _for_anyio(opener, mismatch.hint)
        elif by_asyncio:
            mismatch.hint = _for_asyncio(item, opener, mismatch.hint)


def _in_chain(error: BaseException, kind: type[E]) -> E | None:
    chain: list[BaseException] = []
    inner: BaseException | None = error
    while inner is not None and inner not in chain:
        if isinstance(inner, kind):
            return inner
        chain.append(inner)
        inner = inner.__cause__ or inner.__context__
    return None


def _for_context(otherwise: str | None) -> str | None:
    # A sandbox that a fixture has entered is not its test's before that.
    plugin = sys.modules.get("pytest_asyncio")
    version = str(getattr(plugin, "__version__", "1")).split(".")
    if [int(number) for number in version[:2] if number.isdecimal()] >= [0, 25]:
        return otherwise
    return (
        "Install pytest-asyncio 0.25 or later: since then what a fixture has entered is its test's,"
        f" too. {see('ownership')}"
    )


def _setting(item: Any, name: str) -> str | None:
    """Return what an option of pytest-asyncio's is; None if it is older than that."""
    try:
        return str(item.config.getini(name) or "")
    except ValueError:
        return None


def _for_anyio(opener: Opener, otherwise: str | None) -> str | None:
    if opener.scope == "function":
        return otherwise
    return (
        f'Under anyio, give the fixture anyio_backend the scope "{opener.scope}" in conftest.py:'
        f" its tests have one loop then. {see('loop-mismatch')}"
    )


def _for_asyncio(item: Any, opener: Opener, otherwise: str | None) -> str | None:
    marker = item.get_closest_marker("asyncio")
    default = _setting(item, "asyncio_default_test_loop_scope")
    of_test = marker.kwargs.get("loop_scope") or marker.kwargs.get("scope") or default or "function"
    of_fixtures = _setting(item, "asyncio_default_fixture_loop_scope")
    of_fixture = opener.loop_scope or of_fixtures or opener.scope
    of_fixture = of_fixture if of_fixture in SCOPES else "function"
    if of_test == of_fixture:
        return otherwise
    widest = max(of_test, of_fixture, key=SCOPES.index)
    # One that is made beside it would take its place, and what is in it would be read no more.
    settings = item.config.inipath
    file = settings.name if settings is not None else "pytest.ini"
    value = f'"{widest}"' if file.endswith(".toml") else widest
    newer = " Install pytest-asyncio 0.26 or later." if default is None else ""
    return (
        f'Fixture "{opener.fixture}" opens the pool on the loop of scope "{of_fixture}", the test'
        f' runs on that of scope "{of_test}".{newer} Write both into {file}, and no other'
        f" loop_scope beside them: asyncio_default_fixture_loop_scope = {value} and"
        f" asyncio_default_test_loop_scope = {value}. {see('loop-mismatch')}"
    )
