"""
``--no-skips``: fail the run when a test was skipped that should have run.

A skip is a test that nobody misses. Loaded with ``-p tests.support.no_skips``.
"""

from __future__ import annotations

import pytest

_skipped: pytest.StashKey[list[str]] = pytest.StashKey()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.getgroup("poolkeeper").addoption(
        "--no-skips", action="store_true", help="fail when a test is skipped that should run"
    )


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_skipped] = []
    if config.getoption("--no-skips"):
        config.pluginmanager.register(_Watch(config.stash[_skipped]), "poolkeeper-no-skips")


class _Watch:
    def __init__(self, skipped: list[str]) -> None:
        self._skipped = skipped

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.skipped:  # an expected failure is one too
            self._note(report.nodeid, report.longrepr, getattr(report, "wasxfail", None))

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.skipped:
            self._note(report.nodeid, report.longrepr, None)

    def _note(self, nodeid: str, longrepr: object, expected_failure: str | None) -> None:
        reason = longrepr[2] if isinstance(longrepr, tuple) else str(longrepr)
        if expected_failure is not None:
            reason = f"expected failure: {expected_failure}"
        self._skipped.append(f"{nodeid}: {reason}")

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if self._skipped and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if self._skipped:
            terminalreporter.section("skipped, but should have run", red=True)
            for line in self._skipped:
                terminalreporter.line(line)
