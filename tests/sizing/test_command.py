"""``poolkeeper advise``."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from poolkeeper.__main__ import main
from poolkeeper.sizing import Recording


def a_recording(path: Path) -> Path:
    recording = Recording("orders", 4)
    for i in range(400):
        recording._done.append((i * 0.01, 0.02, 0.005))
    recording.save(path)
    return path


def test_a_recording_becomes_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["advise", str(a_recording(tmp_path / "orders.jsonl"))]) == 0
    out = capsys.readouterr().out
    assert 'pool "orders": 100 acquires per second, held for 20 ms' in out
    assert "recorded: 400 acquires in 4 s" in out
    assert "advised" in out
    assert "now" in out


def test_a_rate_and_a_hold_become_json_and_a_plot(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plot = tmp_path / "plot.svg"
    line = f"advise --rate 100 --hold 0.02 --sizes 4,8 --size 8 --json --plot {plot}"
    assert main(line.split()) == 0
    advice = json.loads(capsys.readouterr().out)
    assert [row["size"] for row in advice["rows"]] == [4, 8]
    assert advice["current"] == 8
    assert plot.read_text().endswith("</svg>\n")


def test_a_fleet_becomes_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    line = "advise --rate 2 --hold 0.02 --query 0.005 --processes 400 --cores 8 --pooler 32"
    assert main([*line.split(), "--max-connections", "300", "--sizes", "2"]) == 0
    out = capsys.readouterr().out
    assert "refused: the server has 300" in out
    assert "keeps 10 ms" in out


@pytest.mark.parametrize("line", ["--sizes 1", "--sizes 3 --target 0"])
def test_if_none_will_do_the_status_says_so(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["advise", "--rate", "100", "--hold", "0.02", *line.split()]) == 1
    assert "None of these" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("", "there is nothing to advise on"),
        ("--rate 100", "there is nothing to advise on"),
        ("--rate 0 --hold 1", "rate cannot be 0"),
        ("--rate 1 --hold 1 --processes 4", "--cores is missing"),
        ("nowhere.jsonl", "cannot read"),
        ("nowhere.jsonl --rate 1", "not both: --rate"),
        ("--rate 1 --hold 1 --plot no/where.svg", "cannot write 'no/where.svg'"),
        ("--rate 1 --hold 1 --cores 4 --pooler 8", "--cores, --pooler is of a fleet"),
        ("--rate 1 --hold 1 --processes 4 --cores 4 --plot x.svg", "--plot is of one process"),
    ],
)
def test_what_cannot_be_read_is_told(
    line: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["advise", *line.split()]) == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize("sizes", ["x", "4,,8", ""])
def test_sizes_are_numbers(sizes: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["advise", "--rate", "1", "--hold", "1", "--sizes", sizes])
    assert caught.value.code == 2
    assert "whole numbers" in capsys.readouterr().err


@pytest.mark.parametrize(
    "option", ["--size", "--processes", "--cores=4 --pooler", "--max-connections"]
)
def test_how_many_is_a_number(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["advise", "--rate", "1", "--hold", "1", *option.split(), "0"])
    assert caught.value.code == 2
    assert "'0' is no whole number, 1 or more" in capsys.readouterr().err
