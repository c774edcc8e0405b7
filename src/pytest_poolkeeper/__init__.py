"""
poolkeeper's plugin for pytest: a server for tests, fresh databases, and what tests leave behind.

It is loaded by every run of pytest where poolkeeper is installed, so it imports nothing of it: what
there is to do is in `poolkeeper.testing`, and done once the tests themselves use poolkeeper.
"""

from __future__ import annotations

import sys
from collections.abc import Generator, Iterator
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from poolkeeper.testing._watch import Watch

_WATCH = pytest.StashKey["Watch"]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options."""
    group = parser.getgroup("poolkeeper")
    says = 'PostgreSQL for tests: "embedded", "container" or a DSN'
    group.addoption("--poolkeeper-server", metavar="SERVER", help=f"{says} (as the ini option)")
    parser.addini("poolkeeper_server", says, default="embedded")
    parser.addini(
        "poolkeeper_leftovers",
        'what becomes of a test that leaves something of a pool behind: "fail" or "ignore"',
        default="fail",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Add the marker."""
    config.addinivalue_line(
        "markers", "leaves_behind: the test may leave connections, tasks or pools behind"
    )


# --- fixtures ---------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def poolkeeper_dsn(pytestconfig: pytest.Config) -> Iterator[str]:
    """The address of the server that ``--poolkeeper-server``, or ``poolkeeper_server``, names."""
    from poolkeeper.testing import server

    chosen = pytestconfig.getoption("--poolkeeper-server")
    with server(chosen or pytestconfig.getini("poolkeeper_server")) as dsn:
        yield dsn


@pytest.fixture(scope="session")
def poolkeeper_schema() -> Any:
    """SQL, or a function of a DSN, that fills the template; for you to override."""
    return ""


@pytest.fixture(scope="session")
def poolkeeper_template(poolkeeper_dsn: str, poolkeeper_schema: Any) -> Iterator[Any]:
    """The `Template` that `fresh_database` is copied from."""
    from poolkeeper.testing import Template

    with Template(poolkeeper_dsn, poolkeeper_schema) as template:
        yield template


@pytest.fixture
def fresh_database(poolkeeper_template: Any) -> Iterator[str]:
    """The DSN of a copy of the template that is the test's own; it may commit."""
    with poolkeeper_template.copy() as dsn:
        yield dsn


# --- what is left behind ------------------------------------------------------------------------


def _watch(config: pytest.Config) -> Watch | None:
    """Return what watches the pools of this run; None as long as there can be none."""
    if "poolkeeper._manager" not in sys.modules:
        return None
    watch = config.stash.get(_WATCH, None)
    if watch is None:
        from poolkeeper.testing._watch import Watch

        watch = config.stash[_WATCH] = Watch()
    return watch


def _fails(item: pytest.Item) -> bool:
    return (
        item.config.getini("poolkeeper_leftovers") == "fail"
        and item.get_closest_marker("leaves_behind") is None
    )


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> Generator[None]:
    """Note what is there before the test."""
    if (watch := _watch(item.config)) is not None:
        watch.begin()
    yield


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_fixture_setup(
    fixturedef: pytest.FixtureDef[Any], request: pytest.FixtureRequest
) -> Generator[None, object, object]:
    """Note which pools a fixture opens, and what it may keep for other tests."""
    result = yield
    if (watch := _watch(request.config)) is not None:
        watch.fixture_was_set_up(fixturedef)
        watch.watch_runner(fixturedef)
    return result


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_teardown(item: pytest.Item) -> Generator[None]:
    """Fail the test if it has left anything behind."""
    yield
    if (watch := _watch(item.config)) is not None:
        left = watch.end()
        if left is not None and _fails(item):
            raise left


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, Any, Any]:
    """Say which settings are to be written where a fixture and a test have different loops."""
    if call.excinfo is not None and (watch := _watch(item.config)) is not None:
        watch.advise(item, call.excinfo.value)
    return (yield)
