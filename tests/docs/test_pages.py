"""A page that is done as it says, top to bottom, in an empty directory, does what it shows."""

from __future__ import annotations

import ast
import os
import re
import shlex
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from functools import cache, partial
from http.server import HTTPServer, SimpleHTTPRequestHandler
from importlib import metadata
from pathlib import Path
from threading import Thread

import pytest
from packaging.requirements import Requirement

from tests.support.redis import REDIS, redis_server
from tests.support.wheel import build_wheel

from . import curl
from .blocks import blocks
from .pages import (
    PAGES,
    TWICE,
    database_url,
    environment,
    installs,
    needs_redis,
    own_programs,
)
from .walk import TYPED, NotAsShown, Reader, typed

MOST_LINES = 30


class Handler(SimpleHTTPRequestHandler):
    """Answers without the time, and tells nobody."""

    protocol_version = "HTTP/1.1"

    def date_time_string(self, timestamp: float | None = None) -> str:
        return "now"

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package as the wheel has it, beside this environment's other packages."""
    away = tmp_path_factory.mktemp("wheel")
    with zipfile.ZipFile(build_wheel(away)) as built:
        built.extractall(away / "installed")
    return away / "installed"


@pytest.fixture(scope="module")
def redis() -> Iterator[str]:
    with redis_server() as url:
        yield url


@pytest.mark.timeout(300)  # several servers, one after the other
@pytest.mark.parametrize(
    "page", [page for page in PAGES if REDIS or not needs_redis(page)], ids=lambda page: page.stem
)
def test_a_page_does_what_it_says(
    page: Path, wheel: Path, dsn: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    # "make pages" does all of them twice, which takes its time.
    times = TWICE if page.stem in ("quickstart", "semantics") else 1
    with database_url(dsn, f"page_{page.stem.lower()}") as url:
        env = environment(
            url, own_programs(), PYTHONPATH=str(wheel), PYTEST_ADDOPTS=without_plugins(page, wheel)
        )
        if needs_redis(page):
            env["REDIS_URL"] = request.getfixturevalue("redis")
        for _ in range(times):
            with Reader(tmp_path, env, install=lambda line: None) as reader:
                reader.follow(page)


HOWTO = [page for page in PAGES if page.parent.name == "howto"]


@pytest.mark.parametrize("page", HOWTO, ids=lambda page: page.stem)
def test_a_howto_begins_with_one_complete_file(page: Path) -> None:
    first = next(block for block in blocks(page) if block.file)
    assert not first.continues
    assert not first.source
    assert len(first.body.splitlines()) <= MOST_LINES
    before = [block for block in blocks(page) if block.line < first.line]
    assert [block.body.split()[:2] for block in before] == [["pip", "install"]]
    assert "`DATABASE_URL`" in page.read_text().partition(first.body)[0]


def name_of(distribution: str) -> str:
    return re.sub(r"[-_.]+", "-", distribution).lower()


def brought(lines: list[str], wheel: Path) -> set[str]:
    """Return the distributions that ``pip install`` lines bring, as far as they are here."""
    (ours,) = metadata.distributions(path=[str(wheel)])
    wanted = [Requirement(word) for line in lines for word in shlex.split(line)[2:]]
    seen: set[tuple[str, str]] = set()
    while wanted:
        one = wanted.pop()
        for extra in ["", *one.extras]:
            if (name_of(one.name), extra) in seen:
                continue
            try:
                here = ours if one.name == ours.name else metadata.distribution(one.name)
            except metadata.PackageNotFoundError:
                continue  # for another Python, or another system
            assert not extra or extra in (here.metadata.get_all("Provides-Extra") or []), one
            seen.add((name_of(one.name), extra))
            needs = [Requirement(line) for line in here.requires or []]
            wanted += [n for n in needs if not n.marker or n.marker.evaluate({"extra": extra})]
    return {name for name, _ in seen}


def without_plugins(page: Path, wheel: Path) -> str:
    """Keep from pytest the plugins that this environment has and the page's reader has not."""
    here = brought(installs(page), wheel)
    return " ".join(
        f"-p no:{plugin.name}" for name, plugin in plugins_here() if name_of(name) not in here
    )


@cache
def plugins_here() -> list[tuple[str, metadata.EntryPoint]]:
    """Return pytest's plugins in this environment, each with the distribution it is from."""
    return [
        (here.name, plugin)
        for here in metadata.distributions()
        for plugin in here.entry_points.select(group="pytest11")
    ]


@cache
def owners() -> dict[str, list[str]]:
    """Return the distributions that a module may be from."""
    return {**metadata.packages_distributions(), "poolkeeper": ["poolkeeper"]}


@cache
def scripts() -> dict[str, str]:
    """Return the distribution of each command."""
    return {
        script.name: here.name
        for here in metadata.distributions()
        for script in here.entry_points.select(group="console_scripts")
    }


def used(page: Path) -> tuple[set[str], set[str]]:
    """Return the modules that a page imports, other than its own files, and what it runs."""
    pasted = [block for block in blocks(page) if not block.source]
    own = {re.split(r"[./]", str(block.file))[0] for block in pasted if block.file}
    modules, commands = set(), set()
    for block in pasted:
        if block.language == "python":
            code = ast.parse(block.body)
            for node in ast.walk(code):
                if isinstance(node, ast.Import):
                    modules |= {alias.name for alias in node.names}
                elif isinstance(node, ast.ImportFrom) and not node.level:
                    modules.add(str(node.module))
        elif block.language == TYPED:
            for command, *arguments in map(str.split, typed(block.body)):
                if command != "python":
                    commands.add(command)
                elif arguments[0] == "-m":
                    modules.add(arguments[1])
    return {module.partition(".")[0] for module in modules} - own, commands - {"pip"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_what_a_page_uses_is_brought_by_its_own_pip_line(page: Path, wheel: Path) -> None:
    """The suite's environment has everything; a reader's has not."""
    has = brought(installs(page), wheel)
    modules, commands = used(page)
    for module in modules - sys.stdlib_module_names:
        assert {name_of(name) for name in owners()[module]} & has, module
    for command in commands & set(scripts()):
        assert name_of(scripts()[command]) in has, command


def page_of(text: str, directory: Path) -> Path:
    page = directory / "page.md"
    page.write_text(text)
    return page


WRONG = {
    "a program that prints something else": "```python\n# a.py\nprint(2)\n```\n\n```text\n1\n```\n",
    "a program that fails": "```python\n# app.py\n1 / 0\n```\n\n```sh\npython app.py\n```\n",
    "a fragment without a place": "```python\nprint(1)\n```\n",
    "a server that ends": "<!-- keeps running -->\n```sh\npython -c 8000\n```\n",
    "a server that nobody can tell is there": "<!-- keeps running -->\n```sh\nsleep 9\n```\n",
    "an answer that differs": (
        "<!-- keeps running -->\n```sh\npython -m http.server 8000\n```\n\n"
        "```sh\ncurl http://localhost:8000/nothing\n```\n\n```text\nsomething\n```\n"
    ),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_page_that_does_not_do_what_it_says_is_noticed(wrong: str, tmp_path: Path) -> None:
    page = page_of(WRONG[wrong], tmp_path)
    env = environment("", own_programs())
    with Reader(tmp_path, env) as reader, pytest.raises(NotAsShown, match=r"page\.md:\d"):
        reader.follow(page)


RIGHT = """
```python
# app.py
from http.server import BaseHTTPRequestHandler, HTTPServer

class Handler(BaseHTTPRequestHandler):
    answer = b"first"

    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(self.answer)
```

<!-- keeps running -->
```sh
python serve.py 8000
```
"""


def test_a_page_is_done_in_the_order_of_its_blocks(tmp_path: Path) -> None:
    """Files, a server, and the server again with what is added to its files."""
    serve = (
        "```python\n# serve.py\nimport sys\nimport app\n\n"
        "try:\n    app.HTTPServer(('', int(sys.argv[1])), app.Handler).serve_forever()\n"
        "except KeyboardInterrupt:\n    print('ended')\n```\n"
    )
    ask = "```sh\ncurl \\\n  http://localhost:8000/\n```\n\n```text\n{}\n```\n"
    more = "```python\n# app.py, continued\nHandler.answer = b'sec' + b'ond'\n```\n"
    page = page_of(serve + RIGHT + ask.format("first") + more + ask.format("second"), tmp_path)
    with Reader(tmp_path, environment("", own_programs())) as reader:
        reader.follow(page)
        reader.follow(page)  # from its beginning


if shutil.which("curl"):

    @pytest.mark.parametrize("line", ["curl {}/here", "curl --include {}/nothing -d x=1 -H 'A: b'"])
    def test_the_stand_in_answers_as_curl_does(line: str, tmp_path: Path) -> None:
        (tmp_path / "here").write_text("something")
        with HTTPServer(("127.0.0.1", 0), partial(Handler, directory=tmp_path)) as server:
            Thread(target=server.serve_forever, daemon=True).start()
            curl.stand_in(tmp_path)
            url = f"http://127.0.0.1:{server.server_port}"
            said = [
                subprocess.check_output(
                    line.format(url), shell=True, env={"PATH": path}, stderr=subprocess.DEVNULL
                )
                for path in (os.environ["PATH"], str(tmp_path))
            ]
            server.shutdown()
        assert said[0] == said[1]
