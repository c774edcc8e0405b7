"""
The suite where it has to hold: ``nox`` runs all of it, ``nox --list`` says what there is.

Each session has an environment of its own, made with uv where it is installed. A Python that is
not on the machine is left out with a warning; ``--error-on-missing-interpreters`` forbids that.
"""

from __future__ import annotations

import nox

nox.needs_version = ">=2025.2"
nox.options.default_venv_backend = "uv|virtualenv"
nox.options.sessions = ["lint", "types", "tests"]

PYPROJECT = nox.project.load_toml("pyproject.toml")
PYTHONS = ["3.11", "3.12", "3.13"]

# What pyproject.toml promises to work with.
OLDEST = ["psycopg==3.3.0", "psycopg-binary==3.3.0", "psycopg-pool==3.3.2"]


def group(name: str) -> list[str]:
    """Return the requirements of a dependency group; any pip can read those."""
    return list(nox.project.dependency_groups(PYPROJECT, name))


def run_suite(session: nox.Session, *arguments: str, **env: str) -> None:
    """Run the whole suite, or what was asked for after ``--``."""
    session.run(
        "python", "-m", "pytest", "-p", "tests.support.no_skips", "--no-skips",
        "-n", "4", "--dist", "worksteal", *arguments, *session.posargs, env=env,
    )  # fmt: skip


@nox.session(python=PYTHONS, tags=["tests"])
def tests(session: nox.Session) -> None:
    """The suite on asyncio's own loop, with the newest psycopg and psycopg_pool."""
    session.install("-e", ".", *group("test"))
    run_suite(session)


@nox.session(python=PYTHONS, tags=["tests"])
def uvloop(session: nox.Session) -> None:
    """The suite on uvloop."""
    session.install("-e", ".", *group("test"))
    # The servers are processes with loops of their own.
    run_suite(session, "-m", "not served", "--loop", "uvloop")


@nox.session(python=PYTHONS, tags=["tests"])
def debug(session: nox.Session) -> None:
    """The suite in asyncio's debug mode."""
    session.install("-e", ".", *group("test"))
    run_suite(session, "-m", "not served", PYTHONASYNCIODEBUG="1")


@nox.session(python=PYTHONS, tags=["tests"])
def oldest(session: nox.Session) -> None:
    """The suite with the oldest psycopg and psycopg_pool that are supported."""
    session.install("-e", ".", *group("test"), *OLDEST)
    run_suite(session, "-m", "not served")


@nox.session(python="3.11")
def lint(session: nox.Session) -> None:
    """Rules and format of what is Python."""
    session.install(*group("lint"))
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")


@nox.session(python="3.11")
def types(session: nox.Session) -> None:
    """mypy and pyright, both strict."""
    session.install("-e", ".", *group("types"))
    session.run("python", "-m", "mypy")
    session.run("python", "-m", "pyright")
