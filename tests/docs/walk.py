"""
Do what a page says, top to bottom, as its reader would in an empty directory.

What the reader has beforehand is a Python, in an environment of his own, and ``DATABASE_URL``.

- A block whose first line is ``# app.py`` is saved as that file; with ``# app.py, continued`` it is
  added to its end. A server that runs is started again then, before anything else is typed.
- Each line of a ``sh`` block is typed. With ``<!-- keeps running -->`` on the line before the block
  it is a server, which the reader leaves alone in a terminal of its own: it is there when it
  listens on the port that the line names, or has said what the block after it shows.
- A ``text`` or ``json`` block with no other block before it is what the lines, or the program that
  was just saved, have printed: word by word, but for what differs from run to run.
- ``python`` is pasted into a file: a block that names none is an excerpt, or a mistake.
- An excerpt (``<!-- from: examples/... -->``) is not pasted.

Pages say port 8000. Here it is another one that is free.
"""

from __future__ import annotations

import os
import re
import shlex
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import Self

from . import curl
from .blocks import Block, agrees, blocks

PORT = "8000"

# A command that shows one of these is meant to fail.
_FAILS = re.compile(r"\w(Error|Timeout): |\b[1-9]\d* failed\b")
_PATIENCE = 60.0  # seconds: for a busy machine

SHOWS = ("text", "json")
TYPED = "sh"


class NotAsShown(AssertionError):
    """What happened is not what the page says."""

    def __init__(self, block: Block, what: str, said: str = "") -> None:
        super().__init__(f"{block.path.name}:{block.line}: {what}\n{said}")


class Reader:
    """
    One reader: a directory, and what he has running.

    Args:
        directory: Where he works. Empty at first.
        env: His environment.
        install: What is done with a ``pip install`` line; typed like any other by default.
    """

    def __init__(
        self,
        directory: Path,
        env: Mapping[str, str],
        install: Callable[[str], None] | None = None,
    ) -> None:
        self._directory = directory
        home = directory / ".curl"
        home.mkdir(exist_ok=True)
        # It shows its progress to whoever is no terminal.
        (home / ".curlrc").write_text("silent\nshow-error\n")
        curl.stand_in(home)  # last on the path: for a machine that has none
        self._env = {
            **env,
            "CURL_HOME": str(home),
            "PATH": f"{env['PATH']}{os.pathsep}{home}",
            "PYTHONUNBUFFERED": "1",
        }
        self._install = install
        self._port = str(_free_port())
        self._servers: list[_Server] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for server in self._servers:
            server.kill()

    def follow(self, page: Path) -> None:
        """Do what the page says, once."""
        for block, after in pairwise([*blocks(page), None]):
            if block is None or block.source or block.language in SHOWS:
                continue
            shown = after if after is not None and after.language in SHOWS else None
            if block.file:
                self._save(block)
                if shown is not None:
                    self._type(block, [f"python {block.file}"], shown)
            elif block.keeps_running:
                self._start(block, shown)
            elif block.language == TYPED:
                self._type(block, typed(block.body), shown)
            elif block.language == "python":
                raise NotAsShown(block, "nobody can tell which file it belongs to")
        self._refresh()
        for server in self._servers:
            server.stop()
        self._servers.clear()

    def _save(self, block: Block) -> None:
        path = self._directory / str(block.file)
        path.parent.mkdir(parents=True, exist_ok=True)
        body = block.body.replace(PORT, self._port)
        if path.exists():  # what runs may have imported it
            for server in self._servers:
                server.is_old = True
        if block.continues:
            body = f"{path.read_text()}\n\n{body}"
        path.write_text(body)

    def _type(self, block: Block, lines: list[str], shown: Block | None) -> None:
        self._refresh()
        said = ""
        failed = False
        for line in lines:
            if self._install is not None and line.startswith("pip install "):
                self._install(line)
            else:
                ended = subprocess.run(
                    line.replace(PORT, self._port),
                    shell=True,  # it is typed into one
                    cwd=self._directory,
                    env=self._env,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    text=True,
                    timeout=10 * _PATIENCE,  # pip may have much to do
                    check=False,
                )
                said += f"{ended.stdout.rstrip()}\n"
                failed = failed or bool(ended.returncode)
        said = said.replace(self._port, PORT)
        if failed != bool(shown and _FAILS.search(shown.body)):
            raise NotAsShown(block, "it fails" if failed else "it does not fail", said)
        if shown is not None and not agrees(said, shown.body):
            raise NotAsShown(shown, "it is answered otherwise", said)

    def _start(self, block: Block, shown: Block | None) -> None:
        (line,) = typed(block.body)
        for other in self._servers:
            if other.listens and PORT in line:
                other.stop()
        self._servers = [other for other in self._servers if other.is_running]
        server = _Server(block, line, shown, self._port, self._directory, self._env)
        self._servers.append(server)
        server.start()

    def _refresh(self) -> None:
        """Start again what runs on files that have changed."""
        for server in self._servers:
            if server.is_old:
                server.stop()
                server.start()


class _Server:
    """A command in a terminal of its own."""

    def __init__(
        self,
        block: Block,
        line: str,
        shown: Block | None,
        port: str,
        directory: Path,
        env: Mapping[str, str],
    ) -> None:
        self._block, self._line, self._shown, self._port = block, line, shown, port
        self._directory, self._env = directory, env
        self._log = directory / f".line-{block.line}.log"
        self.listens = PORT in line
        self.is_old = False
        self._process: subprocess.Popen[bytes] | None = None
        if shown is None and not self.listens:
            raise NotAsShown(block, f"nobody can tell when it runs: no port {PORT}, no text after")

    @property
    def is_running(self) -> bool:
        return self._process is not None

    def start(self) -> None:
        with self._log.open("w") as out:
            self._process = subprocess.Popen(
                shlex.split(self._line.replace(PORT, self._port)),
                cwd=self._directory,
                env=self._env,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.is_old = False
        until = time.monotonic() + _PATIENCE
        while not self._is_there():
            if self._process.poll() is not None or time.monotonic() > until:
                raise NotAsShown(self._block, "it does not come up", self._said())
            time.sleep(0.05)

    def _is_there(self) -> bool:
        if self._shown is not None and not agrees(self._said(), f"...\n{self._shown.body}...\n"):
            return False
        return not self.listens or _answers(int(self._port))

    def stop(self) -> None:
        """Press Ctrl-C, and look whether it ends well."""
        assert self._process is not None
        ended_before = self._process.poll()
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGINT)
        try:
            self._process.wait(_PATIENCE)
        except subprocess.TimeoutExpired:
            raise NotAsShown(self._block, "Ctrl-C does not end it", self._said()) from None
        self.kill()
        said = self._said()
        if ended_before is not None or "Traceback" in said:
            raise NotAsShown(self._block, "it does not end well", said)

    def kill(self) -> None:
        if self._process is not None:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)  # its workers too
            self._process.wait()
            self._process = None

    def _said(self) -> str:
        return self._log.read_text(errors="replace").replace(self._port, PORT)


def typed(body: str) -> list[str]:
    """Return the lines that are typed: without comments, continued ones as one."""
    lines = re.sub(r"\\\n\s*", "", body).splitlines()
    stripped = (re.sub(r"(^|\s+)#.*", "", line).strip() for line in lines)
    return [line for line in stripped if line]


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def _answers(port: int) -> bool:
    with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
        return True
    return False
