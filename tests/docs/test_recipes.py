"""What pages show that takes another server than the suite's, or a cluster, to try."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from poolkeeper._embedded import EmbeddedServer

from .blocks import Block, agrees, blocks
from .pages import environment
from .walk import TYPED, Reader, typed

HOWTO = Path(__file__).parents[2] / "docs" / "howto"


def file_of(page: str, name: str) -> Block:
    (block,) = (block for block in blocks(HOWTO / f"{page}.md") if block.file == name)
    return block


def shown_after(block: Block) -> str:
    page = blocks(block.path)
    return page[page.index(block) + 1].body


# --- passwords that are rotated -----------------------------------------------------------------


@pytest.mark.parametrize("renewed", [True, False])
def test_the_page_on_passwords_holds_where_the_server_asks_for_them(
    renewed: bool, scram_server: EmbeddedServer, tmp_path: Path
) -> None:
    """The suite's own lets everybody in; and the example is to fail if it renews nothing."""
    block = file_of("connections", "rotate.py")
    program = block.body
    if not renewed:
        program = program.replace("    secret.write_text(password)\n", "")
        program = program.replace('min_size=1, name="shop"', 'min_size=1, timeout=2, name="shop"')
        assert program.count("timeout=2") == 1
    page = tmp_path / "page.md"
    page.write_text(
        f"```python\n{program}```\n\n```sh\npython rotate.py > said 2>&1 || true\n```\n"
    )
    with Reader(tmp_path, environment(scram_server.dsn(), Path(sys.executable).parent)) as reader:
        reader.follow(page)
    said = (tmp_path / "said").read_text()
    if renewed:
        assert agrees(said, shown_after(block))
    else:
        assert 'password authentication failed for user "clerk"' in said


# --- what Kubernetes is told --------------------------------------------------------------------

MANIFESTS: list[Any] = list(yaml.safe_load_all(file_of("kubernetes", "deployment.yaml").body))
DEPLOYMENT, SERVICE = MANIFESTS
POD: Any = DEPLOYMENT["spec"]["template"]["spec"]
(CONTAINER,) = POD["containers"]
PAGE = (HOWTO / "kubernetes.md").read_text()


@pytest.mark.parametrize("version", ["1.30", kubernetes_validate.latest_version()])
@pytest.mark.parametrize("manifest", MANIFESTS, ids=lambda manifest: manifest["kind"])
def test_a_manifest_is_what_kubernetes_takes(manifest: Any, version: str) -> None:
    kubernetes_validate.validate(manifest, version, strict=True)


def test_the_validator_finds_a_field_that_there_is_not() -> None:
    wrong = json.loads(json.dumps(DEPLOYMENT))
    wrong["spec"]["template"]["spec"]["containers"][0]["livenessprobe"] = {}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(wrong, "1.30", strict=True)


def test_the_parts_of_the_deployment_fit_each_other() -> None:
    labels = DEPLOYMENT["spec"]["template"]["metadata"]["labels"]
    assert DEPLOYMENT["spec"]["selector"]["matchLabels"] == labels == SERVICE["spec"]["selector"]
    (port,) = CONTAINER["ports"]
    assert SERVICE["spec"]["ports"][0]["targetPort"] == port["name"]
    command = json.loads(PAGE.partition("\nCMD ")[2].partition("\n")[0])
    assert command[command.index("--port") + 1] == str(port["containerPort"])
    asked = {
        line.rpartition("/")[2]
        for block in blocks(HOWTO / "kubernetes.md")
        if block.language == TYPED
        for line in typed(block.body)
    }
    for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
        get = CONTAINER[probe]["httpGet"]
        assert get["port"] == port["name"]
        assert get["path"].lstrip("/") in asked
    assert CONTAINER["readinessProbe"]["httpGet"]["path"] == "/readyz"
    assert CONTAINER["readinessProbe"]["timeoutSeconds"] > 2  # check() takes as long
    patience = (
        CONTAINER["startupProbe"]["periodSeconds"] * (CONTAINER["startupProbe"]["failureThreshold"])
    )
    assert patience > 30  # open_timeout


def table_of(heading: str) -> list[str]:
    """The last cells of the table under *heading*."""
    section = PAGE.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    rows = re.findall(r"^\|.*\| ([^|]*) \|$", section, re.MULTILINE)
    return [row for row in rows if re.search(r"\d", row)]


def test_the_times_of_a_shutdown_add_up_to_less_than_the_grace_period() -> None:
    before = CONTAINER["lifecycle"]["preStop"]["sleep"]["seconds"]
    (serving,) = re.findall(r'"--timeout-graceful-shutdown", "(\d+)"', PAGE)
    (closing,) = re.findall(r"close_timeout=(\d+)", PAGE)
    grace = POD["terminationGracePeriodSeconds"]
    total = before + int(serving) + int(closing) + 1
    assert table_of("Shutdown") == [
        str(before), f"{serving} at most", f"{closing} and 1 at most", f"{total} of {grace}",
    ]  # fmt: skip
    assert total < grace


def test_the_connections_of_all_pods_are_counted_right() -> None:
    spec = DEPLOYMENT["spec"]
    pods = spec["replicas"] + spec["strategy"]["rollingUpdate"]["maxSurge"]
    (size,) = re.findall(r"max_size=(\d+)", PAGE)
    total = pods * (int(size) + 1)
    assert table_of("How many connections") == [
        str(pods), "× 1", f"× {int(size) + 1}", f"{total} of 97",
    ]  # fmt: skip
