"""Servers for tests, and databases that are copied from a template."""

from __future__ import annotations

import os
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, contextmanager, suppress
from itertools import count
from types import TracebackType
from typing import Any, LiteralString, Self, TypeAlias

import psycopg
from psycopg import sql
from psycopg.conninfo import make_conninfo

from poolkeeper import ConfigError, MissingDependencyError
from poolkeeper._embedded import EmbeddedServer as EmbeddedServer
from poolkeeper.errors import see

Schema: TypeAlias = str | Callable[[str], object] | None


def server(which: str = "embedded") -> AbstractContextManager[str]:
    """
    Return a context manager that yields the DSN of a PostgreSQL for tests.

    Args:
        which: ``"embedded"`` for one out of a wheel, which is started and leaves no trace;
            ``"container"`` for one in Docker; or the DSN of a server that runs.

    Raises:
        ConfigError: If it is none of these.
        MissingDependencyError: On entering, with what to install.

    .. versionadded:: 0.1.0
    """
    if which == "embedded":
        return _embedded()
    if which == "container":
        return _container()
    if "=" in which or "://" in which:
        return _given(which)
    raise ConfigError(
        "there is no such server for tests",
        parameter="poolkeeper_server",
        detail='It is "embedded", "container" or a DSN.',
        hint=see("config"),
    )


@contextmanager
def _given(dsn: str) -> Generator[str]:
    yield dsn


@contextmanager
def _embedded() -> Generator[str]:
    with EmbeddedServer({"max_connections": 200}) as embedded:
        yield embedded.dsn()


@contextmanager
def _container() -> Generator[str]:
    try:
        from testcontainers.postgres import PostgresContainer
    except ModuleNotFoundError as ex:
        raise MissingDependencyError(
            "cannot start a server in a container: testcontainers is not installed",
            hint='Install it with: pip install "testcontainers[postgres]"',
        ) from ex
    try:
        container: Any = PostgresContainer("postgres:17", driver=None)
    except Exception as ex:
        if type(ex).__module__.partition(".")[0] != "docker":
            raise
        raise MissingDependencyError(
            "cannot start a server in a container: there is no Docker here", hint=f"{ex}"
        ) from ex
    container.with_command("postgres -c fsync=off -c max_connections=200")
    with container as running:
        yield str(running.get_connection_url())


_numbers = count(1)


class Template:
    """
    A database that is made once, and copied for each test, or each worker, that commits.

    A context manager, and usable from sync and async tests: a copy takes some 15 ms with some tens
    of small tables, and is dropped at the end of its block, whoever is connected.

    Args:
        dsn: A server; its user may create databases.
        schema: SQL that fills it; or a function, called with its DSN, that does.

    .. versionadded:: 0.1.0
    """

    def __init__(self, dsn: str, schema: Schema = None) -> None:
        self._dsn = dsn
        self._schema = schema
        self.name: str = f"poolkeeper_template_{os.getpid()}_{next(_numbers)}"
        self._admin: psycopg.Connection[Any]
        self._strategy: LiteralString = ""

    def __enter__(self) -> Self:
        self._admin = psycopg.connect(self._dsn, autocommit=True)
        try:
            # Copied file by file it is there sooner, but for the checkpoint that this takes; in
            # version 15 and later it can be chosen, before it was always so.
            off = self._admin.execute("show fsync").fetchone() == ("off",)
            if off and self._admin.info.server_version >= 150000:
                self._strategy = " strategy file_copy"
            self._run("create database {}", self.name)
            self._fill()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def _fill(self) -> None:
        dsn = make_conninfo(self._dsn, dbname=self.name)
        if callable(self._schema):
            self._schema(dsn)
        elif self._schema:
            with psycopg.connect(dsn) as conn:
                conn.execute(self._schema.encode())

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        with suppress(psycopg.Error), self._admin:
            self._run("drop database if exists {} with (force)", self.name)

    @contextmanager
    def copy(self) -> Generator[str]:
        """
        Return a context manager that yields the DSN of a fresh copy.

        Raises:
            ConfigError: If somebody is still connected to the template.
        """
        name = f"{self.name}_{next(_numbers)}"
        try:
            self._run(f"create database {{}} template {{}}{self._strategy}", name, self.name)
        except psycopg.errors.ObjectInUse as ex:
            raise ConfigError(
                "the template cannot be copied: somebody is connected to it",
                parameter="schema",
                detail="What fills it has left a connection open.",
                hint=f"Close it: a pool, an engine. {see('config')}",
            ) from ex
        try:
            yield make_conninfo(self._dsn, dbname=name)
        finally:
            self._run("drop database if exists {} with (force)", name)

    def _run(self, statement: LiteralString, *names: str) -> None:
        self._admin.execute(sql.SQL(statement).format(*map(sql.Identifier, names)))
