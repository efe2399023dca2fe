"""The README is short and true: its commands and its Python lines run, its figures are those of the results."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from tests.pages import README, ROOT, SMALL, blocks, lines, make_place, runnable, shell
from tests.serving import service

TEXT = README.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_place(tmp_path_factory.mktemp("readme"))


@pytest.fixture(scope="module")
def ran(place: Path) -> Path:
    """The place after every command of the page; the first, which is the longest, in a process of its own."""
    first, *others = runnable(README)
    shell(first, place)
    for command in others:
        shell(command, place, quick=True)
    return place


def test_it_is_short():
    assert len(TEXT.splitlines()) <= 150


def test_the_two_commands_come_first():
    assert [line.split()[:2] for line in lines(README, "bash")[:2]] == [["make", "demo"], ["make", "test"]]


@pytest.mark.slow
def test_what_make_demo_runs_is_a_valid_run(tmp_path):
    recipe = (ROOT / "Makefile").read_text().split("\ndemo:")[1].split("\n\n")[0]
    command = next(line.strip() for line in recipe.splitlines() if "rarec run" in line)
    small = {**SMALL, "shards.share": 0.002, "prepare.min_item_interactions": 150, "run.dir": str(tmp_path / "run")}
    overrides = " ".join(f"'{name}={str(value).lower() if value is False else value}'" for name, value in small.items())
    shell(f"{command.removeprefix('$(BIN)/')} {overrides}", ROOT, quick=True)
    assert (tmp_path / "run" / "bundle" / "recommender.json").exists()


@pytest.mark.slow
def test_every_command_runs(ran):
    assert (ran / "runs" / "mine" / "report" / "report.html").exists()


@pytest.mark.slow
def test_the_python_lines_run_after_the_commands(ran):
    result = subprocess.run(
        [sys.executable, "-c", blocks(README, "python")[0]],
        cwd=ran,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("Recommended(item=") == 10


@pytest.mark.slow
def test_the_service_answers_the_request_of_the_page(ran):
    (serve,), (curl,) = (
        [shlex.split(line) for line in lines(README, "bash") if line.startswith(word)]
        for word in ("rarec serve", "curl")
    )
    with service(*(ran / word if word.startswith("runs/") else word for word in serve[2:])) as started:
        path = curl[1].removeprefix("http://127.0.0.1:8000")
        answer = httpx.post(started.url + path, json=json.loads(curl[curl.index("-d") + 1]), timeout=60).json()
        page = httpx.get(started.url, timeout=60)
    assert len(answer["results"][0]["items"]) == 10
    assert page.headers["content-type"].startswith("text/html")


def test_the_headline_is_of_the_results_pages():
    results = "\n".join(path.read_text() for path in [ROOT / "RESULTS.md", *(ROOT / "docs").rglob("results*/*.md")])
    part = TEXT.split("## What it is worth")[1].split("\n## ")[0]
    cells = [cell.strip() for line in part.splitlines() if line.startswith("|") for cell in line.split("|")]
    figures = [cell for cell in cells if re.match(r"[+−]?\.\d{4} \(", cell)]
    assert len(figures) >= 15
    assert [cell for cell in figures if f"| {cell} |" not in results] == []
