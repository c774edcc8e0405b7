"""Flask under WSGI, whose views call a portal."""

from __future__ import annotations

from .servers import Command, Served


def _gunicorn(*options: str) -> Command:
    return lambda app, port: [
        "-m", "gunicorn", "examples.flask.app:create_app()", f"--bind=127.0.0.1:{port}", *options,
    ]  # fmt: skip


class TestFlaskServed(Served):
    """The parent has used the portal before it forks, or one process has all the threads."""

    example = "flask"
    servers = {  # noqa: RUF012
        "gunicorn-preload": _gunicorn("--preload", "--workers=2"),
        "gunicorn-threads": _gunicorn("--threads=8"),
    }
