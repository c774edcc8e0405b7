"""
Try what is in dist/ as its users get it. ``make verify`` runs it, after ``make build``.

The wheel and the sdist are looked at, then installed into an empty environment each, away from
the checkout. There the wheel explains an error and shows the whole demo, and its public types are
counted. What the sdist installs has to be what the wheel does.

    --tag v1.2.3   say that this is the release it claims to be
    --suite        run the whole suite on the installed wheel too
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import subprocess
import sys
import sysconfig
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).parents[1]
DIST = ROOT / "dist"

# In another environment this one's packages stand behind its own: frameworks and tools, without
# this checkout, whose own .pth file is not read from there.
BEHIND = "behind-the-wheel.pth"

INSTALLED = """\
import pathlib, poolkeeper
print(pathlib.Path(poolkeeper.__file__).parent, poolkeeper.__version__, sep="\\n")
"""


def main() -> None:
    parser = argparse.ArgumentParser(description="Try what is in dist/ as its users get it.")
    parser.add_argument("--tag", help="the tag of the release, such as v1.2.3")
    parser.add_argument("--suite", action="store_true", help="run the suite on the wheel too")
    chosen = parser.parse_args()

    wheel, sdist = only("*.whl"), only("*.tar.gz")
    version = wheel.name.split("-")[1]
    if chosen.tag:
        check_tag(chosen.tag, version)
    tool("twine", "check", "--strict", wheel, sdist)
    tool("check_wheel_contents", wheel)
    with tempfile.TemporaryDirectory(prefix="poolkeeper-dist-") as directory:
        away = Path(directory)
        say(f"installing {wheel.name}")
        python = install(wheel, away / "wheel")
        from_wheel = package(python, away, version)
        run(python, "-I", "-m", "poolkeeper", "explain", "ClosedError", cwd=away)
        run(python, "-I", "-m", "poolkeeper", "demo", cwd=away)

        (site(python) / BEHIND).write_text(f"{sysconfig.get_path('purelib')}\n")
        # With --verifytypes it heeds no --pythonpath: it asks the first Python on the path.
        path = f"{python.parent}{os.pathsep}{os.environ['PATH']}"
        tool("pyright", "--ignoreexternal", "--verifytypes", "poolkeeper", cwd=away, PATH=path)
        if chosen.suite:
            run(
                python, "-m", "pytest", "-p", "tests.support.no_skips", "--no-skips",
                "-n", "4", "--dist", "worksteal", cwd=ROOT,
            )  # fmt: skip

        say(f"installing {sdist.name}")
        from_sdist = package(install(sdist, away / "sdist"), away, version)
        if differing := sorted(
            name for name in from_wheel | from_sdist if from_wheel.get(name) != from_sdist.get(name)
        ):
            sys.exit(f"the sdist does not install what the wheel does: {', '.join(differing)}")
    say(f"{wheel.name} and {sdist.name} are fit to be released")


def only(pattern: str) -> Path:
    """Return the one file of dist/ that matches."""
    found = sorted(DIST.glob(pattern))
    if len(found) != 1:
        sys.exit(f'dist/ has {len(found)} files {pattern}, not one: run "make build" first')
    return found[0]


def check_tag(tag: str, version: str) -> None:
    """Refuse a tag that does not fit what was built, or that the changelog does not know."""
    if tag != f"v{version}":
        sys.exit(f"tag {tag} is not of version {version}, which was built")
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    if not re.search(rf"^## {re.escape(version)}\b", changelog, re.MULTILINE):
        sys.exit(f'CHANGELOG.md has no heading "## {version}"')


def install(artefact: Path, directory: Path) -> Path:
    """Install *artefact*, with what its demo needs, and return the Python that has it."""
    venv.create(directory)
    python = directory / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    tool("pip", "--python", python, "install", "--quiet", f"{artefact}[demo]", cwd=directory)
    return python


def package(python: Path, away: Path, version: str) -> dict[str, str]:
    """Return the installed files and their digests, having imported them."""
    said = subprocess.run(
        [python, "-I", "-W", "error", "-c", INSTALLED],
        cwd=away, check=True, stdout=subprocess.PIPE, text=True,
    ).stdout.splitlines()  # fmt: skip
    place = Path(said[0])
    if said[1] != version or not place.is_relative_to(site(python)):
        sys.exit(f"{place} is version {said[1]}, not {version} in {site(python)}")
    return {
        path.relative_to(place).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in place.rglob("*")
        if path.is_file() and path.suffix != ".pyc"
    }


def site(python: Path) -> Path:
    """Return the directory that *python* has its packages in."""
    ask = "import sysconfig; print(sysconfig.get_path('purelib'))"
    return Path(subprocess.check_output([python, "-I", "-c", ask], text=True).strip())


def tool(name: str, *arguments: object, cwd: Path = ROOT, **env: str) -> None:
    """Run a tool of this environment."""
    run(Path(sys.executable), "-m", name, *arguments, cwd=cwd, **env)


def run(python: Path, *arguments: object, cwd: Path, **env: str) -> None:
    """Run a command; end with its status if it fails."""
    command = [str(python), *map(str, arguments)]
    say(" ".join(word for word in command[1:] if word not in ("-I", "-m")))
    # Nothing of the checkout but what was installed, and no server but the demo's own.
    kept = {k: v for k, v in os.environ.items() if k != "PYTHONPATH" and not k.startswith("PG")}
    if status := subprocess.run(command, cwd=cwd, env=kept | env, check=False).returncode:
        sys.exit(status)


def say(words: str) -> None:
    print(f"verify: {words}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
