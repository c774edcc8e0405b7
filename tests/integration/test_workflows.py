"""What GitHub and pre-commit run is what everybody can run in a checkout."""

from __future__ import annotations

import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
CI, RELEASE = WORKFLOWS
MAKEFILE = (ROOT / "Makefile").read_text()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

_CHOSEN = re.compile(r"\$\{\{ *matrix\.(\w+) *\}\}")


def jobs(path: Path) -> dict[str, dict[str, Any]]:
    return yaml.safe_load(path.read_text())["jobs"]


def commands(path: Path) -> Iterator[list[str]]:
    """Every command of a workflow, for each choice of its matrix."""
    for job in jobs(path).values():
        matrix = job.get("strategy", {}).get("matrix", {})
        for step in job["steps"]:
            line = step.get("run", "")
            names = [name for name in _CHOSEN.findall(line) if name in matrix]
            for choice in matrix[names[0]] if names else [""]:
                if command := shlex.split(_CHOSEN.sub(str(choice), line)):
                    yield command


def made() -> set[str]:
    """The targets that workflows and pre-commit name."""
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    lines = [line for path in WORKFLOWS for line in commands(path)]
    lines += [shlex.split(hook["entry"]) for hook in hooks]
    return {word for line in lines if line[:1] == ["make"] for word in line[1:] if "=" not in word}


def test_what_workflows_and_hooks_make_can_be_made_in_a_checkout() -> None:
    targets = set(re.findall(r"^(\w+):", MAKEFILE, re.MULTILINE))
    assert {"build", "check", "dist", "lint", "matrix", "soak", "test", "types", "verify"} <= made()
    assert made() <= targets


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_a_workflow_runs_make_and_what_make_needs_alone(path: Path) -> None:
    """Or a job could fail, or pass, for a reason that nobody has at home."""
    for line in commands(path):
        assert line[0] == "make" or line[:2] == ["sudo", "apt-get"], line


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_a_job_may_read_and_only_the_one_that_publishes_may_sign(path: Path) -> None:
    top = yaml.safe_load(path.read_text())["permissions"]
    for name, job in jobs(path).items():
        may = job.get("permissions", top)
        assert may == ({"id-token": "write"} if name == "publish" else {"contents": "read"}), name


def test_what_is_published_is_built_once_and_is_what_was_tried() -> None:
    release = jobs(RELEASE)
    assert release["publish"]["needs"] == "verify"
    assert release["verify"]["needs"] == "build"
    made = [line[1] for line in commands(RELEASE) if line[0] == "make"]
    assert made == ["build", "verify"]
    publish = [step["uses"].split("@")[0] for step in release["publish"]["steps"]]
    assert publish == ["actions/download-artifact", "pypa/gh-action-pypi-publish"]


def test_the_pythons_that_are_promised_are_those_that_are_tested() -> None:
    promised = re.findall(r":: (3\.\d+)", " ".join(PROJECT["classifiers"]))
    ci = jobs(CI)["tests"]
    release = jobs(RELEASE)["verify"]
    tried_too = re.findall(r"'(3\.\d+)'", ci["continue-on-error"])
    assert ci["strategy"]["matrix"]["python"] == promised + tried_too
    assert release["strategy"]["matrix"]["python"] == promised
    assert f"PYTHONS = {promised}".replace("'", '"') in (ROOT / "noxfile.py").read_text()
    assert f"Python {promised[0]} to {promised[-1]}," in (ROOT / "README.md").read_text()


def test_a_report_of_a_bug_asks_what_the_explanation_says() -> None:
    form = yaml.safe_load((ROOT / ".github" / "ISSUE_TEMPLATE" / "bug.yml").read_text())
    (asked,) = [part for part in form["body"] if part.get("id") == "explained"]
    assert "poolkeeper explain" in asked["attributes"]["label"]
    assert asked["validations"]["required"]


def test_the_project_lives_at_one_address() -> None:
    pages = [ROOT / "README.md", ROOT / "SECURITY.md", ROOT / "CONTRIBUTING.md"]
    pages += [path for path in (ROOT / ".github").rglob("*") if path.is_file()]
    text = "\n".join(path.read_text() for path in pages)
    named = set(re.findall(r"https://github\.com/[\w.-]+/[\w.-]+", text))
    assert named == {PROJECT["urls"]["Source"]}
