"""The examples of docs/deploy are whole: systemd takes the unit, metrics and options in them exist."""

import json
import os
import re
import shlex
import shutil
import subprocess
import tomllib
from typing import Any

import pytest
import typer
import yaml

from rarec.cli import app
from rarec.serve.guard import Metrics
from tests.pages import DOCS, ROOT

DEPLOY = DOCS / "deploy"


def options(words: list[str]) -> set[str]:
    """Return the options of `rarec serve` that a command gives and that do not exist."""
    serve = typer.main.get_command(app).commands["serve"]
    known = {option for each in serve.params for option in each.opts}
    return {word for word in words[words.index("serve") :] if word.startswith("--")} - known


def test_the_unit_gives_options_that_are_there():
    text = (DEPLOY / "rarec.service").read_text()
    start = next(line for line in text.splitlines() if line.startswith("ExecStart="))
    assert options(shlex.split(start.removeprefix("ExecStart="))) == set()


@pytest.mark.skipif(
    not shutil.which("systemd-analyze") and "systemd" not in os.environ.get("RAREC_REQUIRE", ""),
    reason="needs systemd-analyze",
)
def test_systemd_finds_no_fault_in_the_unit(tmp_path):
    unit = tmp_path / "rarec.service"
    unit.write_text((DEPLOY / "rarec.service").read_text().replace("/opt/rarec/.venv/bin/rarec", "/bin/true"))
    checked = subprocess.run(["systemd-analyze", "verify", str(unit)], capture_output=True, text=True, check=False)
    assert "rarec.service" not in checked.stderr


def test_the_container_installs_what_the_service_needs_and_no_torch():
    text = (DEPLOY / "Dockerfile").read_text()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    installed = set(re.findall(r'"([\w-]+>=[\d.]+)"', text))
    assert installed <= {*project["dependencies"], *extras["serve"], *extras["serving"]}
    assert set(extras["serve"]) <= installed
    assert "torch" not in re.sub(r"^#.*$", "", text, flags=re.MULTILINE)
    command = json.loads(re.search(r"^CMD (.*)$", text, re.MULTILINE)[1])
    assert options(command) == set()
    assert re.search(r"^USER ", text, re.MULTILINE)


def test_kubernetes_asks_for_paths_and_ports_that_are_there():
    deployment, service = yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text())
    pod = deployment["spec"]["template"]
    assert deployment["spec"]["selector"]["matchLabels"].items() <= pod["metadata"]["labels"].items()
    assert service["spec"]["selector"].items() <= pod["metadata"]["labels"].items()
    (container,) = pod["spec"]["containers"]
    assert container["readinessProbe"]["httpGet"]["path"] == "/ready"
    assert container["livenessProbe"]["httpGet"]["path"] == "/health"
    assert {mount["name"] for mount in container["volumeMounts"]} == {one["name"] for one in pod["spec"]["volumes"]}
    assert f"EXPOSE {container['ports'][0]['containerPort']}" in (DEPLOY / "Dockerfile").read_text()


def test_the_dashboard_asks_for_metrics_that_are_there():
    metrics = Metrics()
    metrics.request("GET", "/v1/recommend", 200, 0.1)
    metrics.events.labels("loaded").inc()
    there = set(re.findall(r"^(rarec_\w+)", metrics.text().decode(), re.MULTILINE))
    board = json.loads((DEPLOY / "grafana.json").read_text())
    asked = {
        name for panel in board["panels"] for one in panel["targets"] for name in re.findall(r"rarec_\w+", one["expr"])
    }
    assert len(asked) >= 6
    assert asked <= there


@pytest.mark.parametrize("name", ["rarec.service", "Dockerfile", "kubernetes.yaml", "grafana.json"])
def test_each_is_named_by_the_page(name):
    assert f"(deploy/{name})" in (DOCS / "operations.md").read_text()


def test_the_settings_of_the_page_are_valid(tmp_path):
    from rarec.serve.settings import read_settings

    text = next(block for block in _yaml_of_serving() if "bundles:" in block)
    (tmp_path / "serve.yaml").write_text(text)
    found: Any = read_settings(tmp_path / "serve.yaml")
    assert set(found.bundles) == {"new", "old"}


def _yaml_of_serving() -> list[str]:
    from tests.pages import blocks

    return blocks(DOCS / "serving.md", "yaml")
