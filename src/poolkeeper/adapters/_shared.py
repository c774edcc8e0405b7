"""
What the adapters share.

How a manager lives in an application, how a request finds it, the connection of one request, the
answers of the health endpoints, and what to say when a framework is not installed. Knows no
framework; each adapter says it in the words of its own.
"""

from __future__ import annotations

import asyncio
import json
import sys
import weakref
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, MutableMapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from types import FrameType, TracebackType
from typing import Any, NamedTuple, Self, TypeAlias, TypeVar

from psycopg import AsyncConnection
from typing_extensions import override

from poolkeeper import (
    Diagnosis,
    MissingDependencyError,
    NotOpenError,
    OpenError,
    PoolkeeperError,
    PoolManager,
)
from poolkeeper._log import log as log
from poolkeeper._manager import require_manager as require_manager
from poolkeeper._where import Behalf, Handler
from poolkeeper._where import Route as Route
from poolkeeper._where import asker as asker
from poolkeeper._where import call_site as call_site
from poolkeeper._where import code_behind as code_behind
from poolkeeper._where import program_frame as program_frame
from poolkeeper._where import routes_are_told_by as routes_are_told_by
from poolkeeper.errors import hide_from_pytest, see

KEY = "poolkeeper"
"""Where an application keeps its manager, unless told otherwise."""

AppT = TypeVar("AppT")
State: TypeAlias = Mapping[str, Any]
Lifespan: TypeAlias = Callable[[AppT], AbstractAsyncContextManager[State]]
InnerLifespan: TypeAlias = Callable[[AppT], AbstractAsyncContextManager[State | None]]


class requires:  # noqa: N801 - reads as a statement
    """
    Say which extra to install when the framework that is imported in the block is missing.

    Any other import error passes untouched, so that a broken install is not called a missing
    one.
    """

    def __init__(self, package: str, *, extra: str | None = None) -> None:
        self._package = package
        self._extra = extra or package

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, exc_type: object, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if isinstance(exc, ModuleNotFoundError) and exc.name == self._package:
            raise MissingDependencyError(
                f"cannot import poolkeeper.adapters.{self._extra}: {self._package} is not"
                " installed",
                hint=f'Install it with: pip install "poolkeeper[{self._extra}]"',
            ) from exc


# --- the manager in the application -----------------------------------------------------------

_lives: weakref.WeakKeyDictionary[PoolManager[Any], weakref.WeakSet[Span]] = (
    weakref.WeakKeyDictionary()
)
"""Who shares a manager that one of them has opened; none if somebody else did."""


class Span:
    """
    The life of *manager* in an application, from start-up to shutdown.

    Closes what it has opened: a manager that was open already, because a test or an outer
    application holds it, is theirs to close. Of several that share one, such as the sessions of
    an MCP server, the first opens it and the last closes it. Can be entered again after it was
    left.

    Args:
        manager: The manager.
        site: ``file:line`` of the user's, which messages name as where the pool was opened rather
            than the framework's that happens to run the hooks; by default the line that asks.
    """

    def __init__(self, manager: PoolManager[Any], site: str | None = None) -> None:
        require_manager(manager)
        self.manager = manager
        self._site = site or call_site()
        hide_from_pytest()  # the adapter is loaded by now
        self._life: weakref.WeakSet[Span] | None = None

    async def start(self) -> None:
        """Open the manager, or find it open on this loop."""
        if self.manager.state not in ("opening", "open"):
            _lives[self.manager] = weakref.WeakSet()
            self._join(_lives[self.manager])
        else:
            # Before the wait: those who are in it may leave meanwhile. An empty one was left
            # behind, by a loop that was closed with the pool open.
            self._join(_lives.get(self.manager) or None)
        try:
            await self.manager.open(
                caller=self._site
            )  # raises LoopMismatchError if that is another loop's
        except BaseException:
            self._join(None)
            raise

    async def stop(self) -> None:
        """Close the manager if it is not somebody else's; otherwise, and again, do nothing."""
        life = self._life
        self._join(None)
        if life is not None and not life and _lives.get(self.manager) is life:
            del _lives[self.manager]
            await self.manager.close()

    def _join(self, life: weakref.WeakSet[Span] | None) -> None:
        if self._life is not None:
            self._life.discard(self)
        self._life = life
        if life is not None:
            life.add(self)

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.stop()


def lifespan(
    manager: PoolManager[Any], inner: InnerLifespan[Any] | None = None, *, key: str = KEY
) -> Lifespan[Any]:
    """
    Return a lifespan that opens *manager* when the application starts and closes it at the end.

    The pool is open before *inner* starts and until it has ended, so start-up and shutdown code
    of yours has it. It opens on the loop that serves. If it cannot be opened, or *inner* fails,
    the application does not start, and the pool is closed. A manager that is open on this loop
    already is used, and left open.

    Args:
        manager: Your manager; safe to create at import time.
        inner: A lifespan of your own. What it yields is kept.
        key: Where to keep the manager in the state that the lifespan yields. Another one for
            each further manager: ``lifespan(db, lifespan(reports, key="reports"))``.

    Raises:
        ConfigError: If *manager* is none.
        OpenError: On start-up, with the server's reason.
        LoopMismatchError: On start-up, if the manager is open on another loop.

    .. versionadded:: 0.1.0
    """
    require_manager(manager)  # now, at the line that has given it
    site = call_site()

    @asynccontextmanager
    async def span(app: Any) -> AsyncGenerator[State]:
        async with Span(manager, site):
            if inner is None:
                yield {key: manager}
            else:
                async with inner(app) as state:
                    yield {**(state or {}), key: manager}

    return span


def pool_in(state: State | None, key: str, hint: str) -> PoolManager[Any]:
    """
    Return the manager that the application keeps in *state*.

    Raises:
        NotOpenError: If there is none, with *hint*: what to do about it in this framework.
    """
    manager: Any = None if state is None else state.get(key)
    if manager is None:
        raise NotOpenError(
            "there is no pool in this application: its start-up has not run",
            detail=f"The pool is opened by the application's start-up, which keeps it under"
            f' "{key}"; nothing is there.',
            hint=f"{hint} {see('no-startup')}",
        )
    return manager  # type: ignore[no-any-return]


# --- the connection of a request ----------------------------------------------------------------

_HELD = "poolkeeper.held"


def asgi_route(scope: Mapping[str, Any]) -> Route:
    """Return what a router has written into the scope: Starlette's its route, others the path."""
    route: Any = scope.get("route")
    path: str | None = route if isinstance(route, str) else getattr(route, "path", None)
    return (scope.get("method", "WEBSOCKET"), path) if path else None


def scope_in(found: Any) -> dict[str, Any]:
    """Return *found* if it is an ASGI scope, else an empty one."""
    return found if type(found) is dict else {}  # pyright: ignore[reportUnknownVariableType]


routes_are_told_by(lambda found: asgi_route(scope_in(found)))


class RequestConnection(AbstractAsyncContextManager[AsyncConnection[Any]]):
    """
    The connection of one request, acquired on entering, committed or rolled back on leaving.

    Entered again by the same task of the same request, it is the same connection, and the
    outermost block ends the checkout: code that is called with the request needs no second
    connection, and cannot wait for one that the request itself holds. Another task of the request
    gets a connection of its own; unless the task that entered has ended, for then the connection
    was handed on, as Litestar does that resolves dependencies in tasks.

    Args:
        store: A mapping that lives as long as the request.
        manager: Where to acquire.
        caller: Whose line the diagnosis names, as for `PoolManager.connection()`.
        route: What the request is for; the diagnosis names that too.
    """

    def __init__(
        self,
        store: MutableMapping[str, Any],
        manager: PoolManager[Any],
        caller: FrameType | Callable[..., Any] | None,
        route: Route = None,
    ) -> None:
        self._held: list[RequestConnection] = store.setdefault(_HELD, [])
        self._manager = manager
        self._asks_for: Behalf | None = None
        """Which function of the program, where no traceback can show it: it is not called yet."""
        whose: Any = caller
        if route is not None:
            # Words are made of it when somebody reads them.
            frame = caller if isinstance(caller, FrameType) else sys._getframe(1)
            code = code_behind(caller) if frame is not caller else None
            lineno = frame.f_lineno if code is None else None
            whose = Behalf(Handler(code or frame.f_code, *route), frame, lineno)
            if code is not None:
                self._asks_for = whose
        self._checkout = manager.connection(caller=whose)
        self._conn: AsyncConnection[Any]
        self._task: asyncio.Task[Any] | None = None

    @override
    async def __aenter__(self) -> AsyncConnection[Any]:
        task = asyncio.current_task()
        for held in self._held:
            if held._manager is self._manager and held._is_of(task):
                return held._conn
        try:
            self._conn = await self._checkout.__aenter__()
        except PoolkeeperError as ex:
            if (asks := self._asks_for) is not None:
                ex.add_note(f"CONTEXT:  Asked for by {asker(asks.f_code, asks.f_lineno)}.")
            raise ex.with_traceback(None)  # noqa: B904 - see briefly()
        self._task = task
        self._held.append(self)
        return self._conn

    def _is_of(self, task: asyncio.Task[Any] | None) -> bool:
        if self._task is not None and self._task.done():
            self._task = task
        return self._task is task

    @override
    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self in self._held:
            self._held.remove(self)
            await self._checkout.__aexit__(exc_type, exc, traceback)


# --- health -------------------------------------------------------------------------------------


class Answer(NamedTuple):
    """What a health endpoint answers: always JSON, never cached."""

    status: int
    body: bytes
    headers: Mapping[str, str] = {"cache-control": "no-store"}
    content_type: str = "application/json"

    @classmethod
    def of(cls, code: int, /, **content: object) -> Answer:
        return cls(code, json.dumps(content).encode())


def alive() -> Answer:
    """
    Answer whether this process is alive: it is, since it answers.

    Asks neither pool nor server: what restarting the process cannot mend is no reason to.
    """
    return Answer.of(200, status="alive")


RETRY_AFTER = 5
"""Seconds after which a client that was turned away may come again."""


def busy() -> Answer:
    """
    Answer a request for which there was no connection.

    Anybody may ask: why there was none is in the log.
    """
    answer = Answer.of(503, detail="Service Unavailable")
    return answer._replace(headers={**answer.headers, "retry-after": str(RETRY_AFTER)})


async def ready(
    find: Callable[[], PoolManager[Any] | Awaitable[PoolManager[Any]]],
    timeout: float = 2.0,
    details: bool = False,
) -> Answer:
    """
    Answer whether a query can run now, also while the pool is exhausted.

    200 if the server answers, 503 if not. In both cases the kind of reason, the five numbers of
    the pool and, where connections are short, the cause that the diagnosis names. Anybody may ask:
    the words of the server, which name hosts, users and databases, are in the log.

    Args:
        find: Finds the manager, or says with an error of ours why there is none.
        timeout: Seconds to wait for the server.
        details: Tell the words of the server as well; for those who may read the log.
    """
    try:
        found = find()
        manager = found if isinstance(found, PoolManager) else await found
    except PoolkeeperError as ex:
        reason = str(ex.args[0])
        if isinstance(ex, OpenError) and not details:
            reason = f"the pool cannot be opened: {ex.kind}"
        return Answer.of(503, status="not ready", reason=reason)
    health = await manager.check(timeout)
    if not health.ok:
        log("not_ready", pool=manager.name, reason=health.reason, kind=health.kind)
    return Answer.of(
        200 if health.ok else 503,
        status="ready" if health.ok else "not ready",
        reason=health.reason if details else health.kind,
        pool=_numbers(manager.diagnose()),
    )


def _numbers(diagnosis: Diagnosis) -> dict[str, object]:
    snapshot = diagnosis.snapshot
    return {
        "name": snapshot.name,
        "total": snapshot.total,
        "in_use": snapshot.in_use,
        "idle": snapshot.idle,
        "max": snapshot.max,
        "waiting": snapshot.waiting,
        "cause": diagnosis.cause,
    }
