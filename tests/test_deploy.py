"""The examples of docs/deploy are whole: systemd takes the unit, metrics and options in them exist."""

import json
import os
import re
import shlex
import shutil
import subprocess
import time
import tomllib

import pytest
import typer
import yaml
from starlette.testclient import TestClient

from rarec.cli import app
from rarec.serve.app import assemble
from rarec.serve.settings import ServeSettings, read_settings
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


@pytest.fixture(scope="module")
def asked_and_counted(run) -> str:
    """The metrics of a service that has answered, refused, noted, and asked its shadow."""
    bundle = run.directory("export")
    bundles = {"a": {"path": str(bundle)}, "b": {"path": str(bundle), "share": 0.0}}
    settings = ServeSettings(
        bundles=bundles,
        device="cpu",
        shadow={"bundle": "b", "share": 1.0},
        impressions={"path": str(run.directory("export").parent / "shown"), "seconds": 0.1},
    )
    app, manager = assemble(lambda: settings)
    manager.load()
    end = time.monotonic() + 30
    with TestClient(app) as client:
        text = ""
        while 'rarec_impressions_total{outcome="written"}' not in text or "rarec_shadow_overlap_sum" not in text:
            assert time.monotonic() < end, text
            client.post("/v1/recommend", json={"histories": [["i001"]]})
            client.post("/v1/recommend", json={})
            text = client.get("/metrics").text
        return text


def _exprs(name: str) -> list[str]:
    text = (DEPLOY / name).read_text()
    if name == "grafana.json":
        return [one["expr"] for panel in json.loads(text)["panels"] for one in panel["targets"]]
    return [rule["expr"] for group in yaml.safe_load(text)["groups"] for rule in group["rules"]]


@pytest.mark.parametrize(("name", "least"), [("grafana.json", 12), ("alerts.yaml", 4)])
def test_dashboard_and_alerts_ask_for_metrics_and_labels_that_are_there(asked_and_counted, name, least):
    there = set(re.findall(r"^(rarec_\w+)", asked_and_counted, re.MULTILINE))
    asked = {metric for expr in _exprs(name) for metric in re.findall(r"rarec_\w+", expr)}
    assert len(asked) >= least
    assert asked <= there
    labels = {label for labels in re.findall(r"{(.*)}", asked_and_counted) for label in re.findall(r"(\w+)=", labels)}
    used = re.findall(r'(\w+)=~?"|by \(([\w, ]+)\)', " ".join(_exprs(name)))
    assert {label.strip() for given in used for part in given for label in part.split(",") if label} <= labels


@pytest.mark.parametrize("name", ["rarec.service", "Dockerfile", "kubernetes.yaml", "grafana.json", "alerts.yaml"])
def test_each_is_named_by_the_page(name):
    assert f"(deploy/{name})" in (DOCS / "operations.md").read_text()


def test_the_settings_of_the_page_are_valid(tmp_path):
    texts = [block for block in _yaml_of_serving() if "bundles:" in block]
    assert len(texts) >= 2
    for text in texts:
        (tmp_path / "serve.yaml").write_text(text)
        assert len(read_settings(tmp_path / "serve.yaml").bundles) == 2


def _yaml_of_serving() -> list[str]:
    from tests.pages import blocks

    return blocks(DOCS / "serving.md", "yaml")
