"""
A Unix socket on which a process tells what its pools do, to the same user of the same machine.

It answers from a thread of its own, so also while the event loop stands still: that is when one
wants to know. Thread and socket are there while a pool is open, so a process that forks before
it opens one, as servers do that load the application first, has neither.
"""

from __future__ import annotations

import atexit
import json
import os
import socket
import stat
import struct
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from threading import Lock, Thread
from types import TracebackType
from typing import Any, Self

from poolkeeper import BoundPool, ConfigError, PoolManager, events

from ._observer import Observer

SUFFIX = ".sock"

PATIENCE = 2.0
"""Seconds that somebody who asks has to take the answer."""


class Exposed:
    """
    A pool that is told of. As a context manager, until the end of the block.

    .. versionadded:: 0.1.0
    """

    def __init__(self, observer: Observer, serving: _Serving) -> None:
        self._observer = observer
        self._serving = serving
        # One that cannot connect is not open yet, and to be looked at nevertheless.
        self._unsubscribe = observer.pool.subscribe(
            self._hear, events.Opened, events.ConnectFailed, events.Closed
        )
        if observer.pool.snapshot().state == "open":
            serving.add(observer)

    @property
    def path(self) -> Path:
        """Where the socket of this process is while a pool is open."""
        return self._serving.path

    def close(self) -> None:
        """Tell of it no more. Does nothing the second time."""
        self._unsubscribe()
        self._observer.stop()
        self._serving.remove(self._observer)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _hear(self, event: events.Event) -> None:
        if isinstance(event, events.Closed):
            self._serving.remove(self._observer)
        else:
            self._serving.add(self._observer)


def expose(
    pool: PoolManager[Any] | BoundPool[Any], *, directory: Path | str | None = None
) -> Exposed:
    """
    Let ``poolkeeper top`` see a pool: its numbers, waits, holders and call sites.

    No query, parameter or connection string is told. The socket is there while the pool is open,
    and once it has tried to connect in vain; whoever may read this user's files may ask it, nobody
    else. May be called at import time, and before a fork; again for the same pool, which is told of
    once. Costs what a subscriber costs: some microseconds for each checkout.

    Args:
        pool: The manager, or its pool.
        directory: Where the socket is made, of this user's own; the one where ``poolkeeper top``
            looks if None.

    Raises:
        ConfigError: If *pool* is none, there are no Unix sockets here, or others may write to
            *directory*.

    .. versionadded:: 0.1.0
    """
    places = directories()
    observer = Observer(pool)
    where = places[0] if directory is None else Path(directory)
    _make_own(where)
    return Exposed(observer, _serving(where))


def directories() -> list[Path]:
    """
    Return where this user's sockets may be; they are made in the first one.

    A service has no ``XDG_RUNTIME_DIR`` where a login has one: so both are looked into.

    Raises:
        ConfigError: If there are no Unix sockets here.
    """
    if not hasattr(socket, "AF_UNIX"):
        raise ConfigError(
            "there are no Unix sockets here",
            hint="Mount poolkeeper.live.page() in the application instead",
        )
    user = os.getuid()
    runtime = Path(os.environ.get("XDG_RUNTIME_DIR") or f"/run/user/{user}")
    found = [runtime / "poolkeeper"] if is_own(runtime) else []
    return [*found, Path(tempfile.gettempdir()) / f"poolkeeper-{user}"]


def is_own(directory: Path) -> bool:
    """Tell whether *directory* is there, and this user's: in /tmp anybody may make one."""
    try:
        found = directory.lstat()
    except OSError:
        return False
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid()


def _make_own(directory: Path) -> None:
    """Make the directory, unless it is there; refuse one that others may write to."""
    try:
        directory.mkdir(mode=0o700, exist_ok=True)
        mode = directory.lstat().st_mode
    except OSError as error:
        raise ConfigError(
            f"cannot make {str(directory)!r}", parameter="directory", detail=str(error.strerror)
        ) from error
    if not is_own(directory) or mode & 0o022:
        raise ConfigError(
            f"{str(directory)!r} is not this user's own",
            parameter="directory",
            detail="Others may write to it, or it belongs to somebody else.",
            hint="Give a directory that only this user may write to",
        )


def ask(path: Path, timeout: float = PATIENCE) -> list[dict[str, Any]]:
    """
    Return what a process tells of its pools.

    Raises:
        OSError: If it does not answer, or is gone.
    """
    with socket.socket(socket.AF_UNIX) as asking:
        asking.settimeout(timeout)
        asking.connect(str(path))
        parts: list[bytes] = []
        while part := asking.recv(1 << 16):
            parts.append(part)
    answer = b"".join(parts)
    try:
        told: list[dict[str, Any]] = json.loads(answer)
    except ValueError as error:
        raise OSError("it has not told all of it") from error
    return told


class _Serving:
    """The socket of one process, and those that it tells of."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._observers: dict[Observer, None] = {}
        self._listening: socket.socket | None = None
        self._lock = Lock()
        atexit.register(self._end)
        os.register_at_fork(after_in_child=self._forget)  # where there are Unix sockets

    @property
    def path(self) -> Path:
        return self._directory / f"{os.getpid()}{SUFFIX}"

    def add(self, observer: Observer) -> None:
        with self._lock:
            self._observers[observer] = None
            if self._listening is None:
                self._begin()

    def remove(self, observer: Observer) -> None:
        with self._lock:
            self._observers.pop(observer, None)
            if not self._observers:
                self._end()

    def _begin(self) -> None:
        listening = socket.socket(socket.AF_UNIX)
        with suppress(OSError):
            self.path.unlink()  # of a process that had this number before
        before = os.umask(0o177)
        try:
            listening.bind(str(self.path))
        except OSError:
            listening.close()
            raise
        finally:
            os.umask(before)
        listening.listen(8)
        self._listening = listening
        Thread(target=self._serve, args=(listening,), name="poolkeeper-live", daemon=True).start()

    def _end(self) -> None:
        listening, self._listening = self._listening, None
        if listening is None:
            return
        # Wakes the thread, which closes it: to close it here would not.
        with suppress(OSError), socket.socket(socket.AF_UNIX) as waking:
            waking.settimeout(PATIENCE)
            waking.connect(str(self.path))
        with suppress(OSError):
            self.path.unlink()

    def _forget(self) -> None:
        """In a forked child: socket and thread are the parent's, whose pools are not open here."""
        listening, self._listening = self._listening, None
        self._lock = Lock()
        self._observers.clear()
        if listening is not None:
            listening.close()

    def _serve(self, listening: socket.socket) -> None:
        with listening:
            while True:
                try:
                    asking, _ = listening.accept()
                except OSError:
                    return
                with asking:
                    if self._listening is not listening:
                        return
                    with suppress(OSError):
                        asking.settimeout(PATIENCE)
                        if _is_own_user(asking):
                            asking.sendall(self._told())

    def _told(self) -> bytes:
        states: list[dict[str, Any]] = []
        for observer in {observer.pool: observer for observer in self._observers.copy()}.values():
            try:
                states.append(observer.state())
            except Exception as error:  # the others are told of all the same
                name = observer.pool.name
                states.append({"name": name, "pid": os.getpid(), "error": type(error).__name__})
        return json.dumps(states).encode()


def _is_own_user(asking: socket.socket) -> bool:
    """Tell whether this user asks: the modes of file and directory say so too, on most systems."""
    option = getattr(socket, "SO_PEERCRED", None)
    if sys.platform != "linux" or option is None:
        return True
    size = struct.calcsize("3i")
    uid = struct.unpack("3i", asking.getsockopt(socket.SOL_SOCKET, option, size))[1]
    return uid in (os.getuid(), 0)


_servings: dict[Path, _Serving] = {}


def _serving(directory: Path) -> _Serving:
    """Return the one of this process; there is one for each directory."""
    serving = _servings.get(directory)
    if serving is None:  # not setdefault(): each that is made stays until the end of the process
        serving = _servings[directory] = _Serving(directory)
    return serving
