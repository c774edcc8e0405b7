"""`poolkeeper explain` finds the page of what it is given, whatever that is."""

from __future__ import annotations

import inspect
import io
import re
import subprocess
import sys
import traceback
from contextlib import redirect_stdout
from pathlib import Path

import pytest
from psycopg_pool import PoolTimeout

import poolkeeper
from poolkeeper import _diagnosis, errors
from poolkeeper.__main__ import main
from poolkeeper._diagnosis import diagnose
from poolkeeper._explain import Section, close_to, find, sections, shown
from poolkeeper.errors import AcquireTimeout, LoopMismatchError, see
from tests.unit.test_diagnosis import CASES, full, in_five_seconds, room, row

PACKAGE = Path(poolkeeper.__file__).parent
ANCHORS = sorted(
    {
        anchor
        for module in PACKAGE.rglob("*.py")
        for anchor in re.findall(r"""\bsee(?:_site)?\(["']([\w-]+)["'][,)]""", module.read_text())
    }
)
CLASSES = [
    cls for _, cls in inspect.getmembers(errors, inspect.isclass) if cls.__name__ in errors.__all__
]
CAUSES = set(re.findall(r'Finding\(\s*"([\w-]+)"', Path(_diagnosis.__file__).read_text()))
REFUSED = full(
    row(), checks_refused=3, check_error="ValueError", check_failing_seconds=9.0, waited_seconds=9.0
)
DIAGNOSES = [
    *(diagnose(snapshot) for cause, snapshot, _ in CASES if cause != "none"),
    diagnose(REFUSED),
    diagnose(room(), in_vain=True),
]


def names(found: list[Section]) -> list[str]:
    return list(dict.fromkeys(section.name for section in found))


def run(*arguments: str, given: str | bytes = b"", **variables: str) -> tuple[int, str, str]:
    ended = subprocess.run(
        [sys.executable, "-m", "poolkeeper", *arguments],
        input=given if isinstance(given, bytes) else given.encode(),
        capture_output=True,
        env={"PATH": "", "PYTHONPATH": str(PACKAGE.parent), **variables},
        check=False,
        timeout=60,
    )
    return ended.returncode, ended.stdout.decode(), ended.stderr.decode()


# --- what is found ------------------------------------------------------------------------------


@pytest.mark.parametrize("anchor", ANCHORS)
def test_what_a_hint_says_finds_its_page(anchor: str) -> None:
    (section, *_) = find(anchor)
    assert (section.page, section.name) == ("errors", anchor)
    for said in (see(anchor), f"HINT:  Open it. {see(anchor)}", section.url, anchor.upper()):
        assert names(find(said)) == [anchor]


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_the_name_of_a_class_finds_what_is_said_of_it(cls: type[Exception]) -> None:
    name = cls.__name__
    found = find(name)
    assert found
    assert all(name in section.classes for section in found)
    for asked in (f"poolkeeper.errors.{name}", name.lower(), f"`{name}`", f"{name}:"):
        assert find(asked) == found


@pytest.mark.parametrize("diagnosis", DIAGNOSES, ids=lambda diagnosis: diagnosis.cause)
def test_a_message_finds_the_page_of_each_cause_that_it_names(
    diagnosis: _diagnosis.Diagnosis,
) -> None:
    causes = [finding.cause for finding in diagnosis.findings]
    assert names(find(diagnosis.cause)) == [diagnosis.cause]
    assert names(find(str(diagnosis))) == causes
    line = f'could not acquire a connection from pool "orders" within 5.00 s: {diagnosis.summary}'
    for told in (line, f"2026-11-26 20:15:01 WARNING poolkeeper: {line}"):
        assert names(find(told)) == ["acquire-timeout", diagnosis.cause]


def test_each_cause_there_is_has_its_page_and_its_message_is_tried_here() -> None:
    causes = {
        section.name for section in sections() if section.page == "diagnose" and section.words
    }
    assert causes == CAUSES == {diagnosis.cause for diagnosis in DIAGNOSES}


def test_causes_that_are_told_beside_the_likely_one_are_found_after_it() -> None:
    leaked = row(task_done=True, in_block=False)
    used = row(query_seconds=0.1)
    diagnosis = diagnose(in_five_seconds(full(leaked, used, used)))
    assert names(find(str(diagnosis))) == ["held-but-hardly-used", "suspected-leak"]


def test_a_message_is_found_however_it_was_folded_and_whatever_stands_around_it() -> None:
    text = """
    Traceback (most recent call last):
      File "/srv/web.py", line 9, in order
        await db.fetchval("select 1")
    poolkeeper.errors.LoopMismatchError: pool "my orders" is bound to an
    event loop that is closed
    """
    assert names(find(text)) == ["loop-mismatch"]
    assert names(find('pool "my orders" was given back twice')) == ["released"]


def test_of_a_traceback_without_known_words_the_class_counts() -> None:
    try:
        raise LoopMismatchError("words of another version")
    except LoopMismatchError:
        text = traceback.format_exc()
    assert names(find(text)) == ["loop-mismatch", "fork"]


@pytest.mark.parametrize(
    "said",
    [
        "psycopg_pool.PoolTimeout: couldn't get a connection after 30.00 sec",
        "couldn't get a connection after 5.00 sec",
        "PoolTimeout: pool initialization incomplete after 30.0 sec",
        "PoolTimeout",
        "psycopg_pool.PoolClosed: the pool 'pool-1' is not open yet",
        "psycopg_pool.PoolClosed: the pool 'pool-1' is already closed",
        "TooManyRequests: the pool 'pool-1' has already 3 requests waiting",
    ],
)
def test_an_error_of_the_bare_pool_finds_a_page_too(said: str) -> None:
    assert names(find(said)) == ["errors-of-the-bare-pool"]


def test_what_is_known_of_nothing_finds_nothing_but_names_that_are_like_it() -> None:
    for asked in ("", "x", "ValueError: bad", "the line of a poem", "open the door"):
        assert find(asked) == []
    assert close_to("aquire-timeout")[:2] == ["acquire-timeout", "AcquireTimeout"]
    assert close_to("looop mismatch")[0] == "loop-mismatch"
    assert close_to("zzz") == []


# --- how it is shown ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "section", sections(), ids=lambda section: f"{section.page}-{section.name}"
)
def test_a_page_is_text_that_fits_the_terminal(section: Section) -> None:
    text = shown(section, 60)
    assert section.url in text
    prose = [line for line in text.splitlines() if not line.startswith(("    ", "[", "http"))]
    assert max(map(len, prose)) <= 60
    assert not any(mark in "\n".join(prose) for mark in ("](", "**", "<a id", "```", "|"))


def test_links_are_numbered_and_stand_at_the_end() -> None:
    body = (
        "See [one](#fork), [two](quickstart.md), [three](index.md#x) and [one](#fork);"
        " [four](https://example.org/a.md#b).\n"
    )
    assert shown(Section("errors", "name", "A title", body), 80).splitlines() == [
        "A title",
        "=======",
        "",
        "See one [1], two [2], three [3] and one [1]; four [4].",
        "",
        "[1] poolkeeper explain fork",
        "[2] https://poolkeeper.readthedocs.io/quickstart",
        "[3] https://poolkeeper.readthedocs.io/#x",
        "[4] https://example.org/a.md#b",
        "https://poolkeeper.readthedocs.io/errors#name",
    ]


# --- the command --------------------------------------------------------------------------------


def test_without_a_command_it_says_what_there_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    out, err = capsys.readouterr()
    assert "demo " in out
    assert "explain " in out
    assert err == ""


def test_it_prints_into_whatever_stands_for_standard_output() -> None:
    """Into what has no encoding, too, as a notebook's has none."""
    with redirect_stdout(io.StringIO()) as shown_there:
        assert main(["explain", "fork"]) == 0
    assert shown_there.getvalue().startswith("A forked process\n")


def test_without_a_name_it_lists_every_error_and_cause(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain"]) == 0
    listed = set(re.findall(r"^  (\S+)", capsys.readouterr().out, re.MULTILINE))
    assert listed >= {*ANCHORS, *CAUSES, "warnings"}


def test_a_name_or_words_on_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", "self", "deadlock"]) == 0
    out = capsys.readouterr().out
    assert "/errors#self-deadlock\n" in out
    assert out.endswith("/diagnose#self-deadlock\n")
    assert main(["explain", "Fork"]) == 0
    assert capsys.readouterr().out.startswith("A forked process\n")


def test_what_is_not_known_is_said_and_ends_in_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", "acquire-timeot"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    first, *rest = err.splitlines()
    assert first.startswith(
        'There is nothing on "acquire-timeot". Did you mean acquire-timeout or AcquireTimeout'
    )
    assert any(line.startswith("  held-but-hardly-used ") for line in rest)


def test_a_traceback_is_read_from_standard_input() -> None:
    try:
        try:
            raise PoolTimeout("couldn't get a connection after 30.00 sec")
        except PoolTimeout as ex:
            raise AcquireTimeout(
                'could not acquire a connection from pool "orders" within 30.00 s: all connections'
                " are in use, most by queries that take long",
                hint=f"Look. {see('acquire-timeout')}",
            ) from ex
    except AcquireTimeout:
        text = traceback.format_exc()
    code, out, err = run("explain", "-", given=text.encode() + b"\xff")
    assert (code, err) == (0, "")
    assert re.findall(r"^https://\S+?/(\w+#\S+)$", out, re.MULTILINE) == [
        "errors#errors-of-the-bare-pool",
        "errors#acquire-timeout",
        "diagnose#slow-queries",
    ]


@pytest.mark.parametrize(
    ("given", "code", "out", "err"),
    [
        (b" \n", 2, "", "Standard input was empty.\n"),
        (b"LoopMismatchError: \xff", 0, "/errors#loop-mismatch\n", ""),
    ],
)
def test_what_is_piped_into_it_is_what_is_asked(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    given: bytes,
    code: int,
    out: str,
    err: str,
) -> None:
    """Whatever bytes these are; where there are none, the command says so."""
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(given)))
    assert main(["explain", "-"]) == code
    said = capsys.readouterr()
    assert out in said.out
    assert bool(said.out) is bool(out)
    assert said.err == err


def test_it_can_be_read_in_any_encoding() -> None:
    code, out, err = run("explain", "stalled-loop", PYTHONIOENCODING="ascii")
    assert (code, err) == (0, "")
    assert "the event loop stood still for ? s" in out


@pytest.mark.parametrize(
    "command", [["explain", "fork"], ["doctor", "host=nobody.invalid"], ["top", "--once"]]
)
def test_who_reads_it_may_stop_in_the_middle(command: list[str]) -> None:
    program = (
        "import os, sys; from poolkeeper.__main__ import main\n"
        "reads, writes = os.pipe(); os.close(reads); os.dup2(writes, 1)\n"
        f"sys.exit(main({command!r}))"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, check=False)
    assert (ended.returncode, ended.stderr) == (1, b"")


def test_an_installation_without_its_pages_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr("poolkeeper._explain.files", lambda package: tmp_path)
    monkeypatch.setattr("poolkeeper._explain.__file__", str(tmp_path / "a" / "b" / "c.py"))
    sections.cache_clear()
    try:
        assert main(["explain", "fork"]) == 2
    finally:
        sections.cache_clear()
    assert 'lacks its page "errors"' in capsys.readouterr().err
