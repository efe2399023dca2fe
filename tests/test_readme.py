"""The README is true: `bash` blocks run, but for tools, on the demo's configuration made small, in the page's order."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.engines import ENGINES_HERE
from tests.synthetic import write_llm, write_log

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BIN = Path(sys.executable).parent
SMALL = [
    "prepare.min_item_interactions=150",
    "ids.sasrec.epochs=1",
    "prompt.max_history=2",
    "shards.share=0.002",
    "train.variants=[text_only,per_layer]",
    "train.max_steps=2",
    "train.validation_users=10",
    "evaluate.users=10",
    "evaluate.sanity_checks=false",
    "evaluate.resamples=50",
    "report.examples=1",
]


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def commands() -> list[str]:
    lines = [line.split("  #")[0].strip() for block in blocks("bash") for line in block.splitlines()]
    skipped = ("make ", "source ", *(() if "spark" in ENGINES_HERE else ("rarec prepare mine.yaml",)))
    return [line for line in lines if line and not line.startswith(skipped)]


def test_the_two_commands_come_first():
    assert [line.split()[:2] for line in blocks("bash")[0].splitlines()] == [
        ["make", "demo"],
        ["make", "test"],
    ]
    makefile = (ROOT / "Makefile").read_text()
    assert "rarec run configs/runs/demo.yaml" in makefile
    assert "-m pytest" in makefile


def test_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)]+)\)", README):
        if not target.startswith("http"):
            assert (ROOT / target).exists(), target


def test_measured_figures_are_those_of_the_results_page():
    part = README.split("## What was measured\n")[1].split("\n## ")[0]
    cells = re.findall(r"\.\d{4} \(\.\d{4} to \.\d{4}\)", part)
    results = (ROOT / "RESULTS.md").read_text()
    assert len(cells) == 8
    assert [cell for cell in cells if f"| {cell} |" not in results] == []


@pytest.mark.parametrize(
    ("difference", "told"),
    [
        ("headline | RA-Rec (per layer) + ID minus ID model", "by {mean} points of HR@100 ({low} to {high})"),
        ("headline | RA-Rec (per layer) + ID minus text only + ID", "slots add {mean} ({low} to {high})"),
        ("headline | text only + ID minus ID model", "gains {mean} of these"),
        (
            "headline, readout | RA-Rec (per layer) + ID minus ID vectors at the readout + ID",
            "is {mean} points less ({low} to {high})",
        ),
    ],
)
def test_measured_differences_are_those_of_the_results_page_in_points(difference, told):
    row = next(line for line in (ROOT / "RESULTS.md").read_text().splitlines() if line.startswith(f"| {difference} |"))
    hits = row.split(" | ")[3]
    mean, low, high = (f"{100 * float(figure):.1f}" for figure in re.findall(r"[+-]\.\d{4}", hits))
    assert told.format(mean=mean, low=low, high=high) in " ".join(README.split())


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A directory like the repository's root, with a user's own data beside."""
    directory = tmp_path_factory.mktemp("readme")
    for name in ("configs", "launch"):
        shutil.copytree(ROOT / name, directory / name)
    yaml = next(block for block in blocks("yaml") if block.startswith("run:"))
    (directory / "mine.yaml").write_text(yaml)
    interactions, items = write_log(directory / "made")
    (directory / "logs").mkdir()
    text = interactions.read_text().replace("user,item,time", "customer,sku,bought_at")
    (directory / "logs" / "november.csv").write_text(text)
    rows = [line.split(",") for line in items.read_text().splitlines()[1:]]
    lines = [f'{{"sku": "{sku}", "name": "{name}", "brand": "{brand}", "category": null}}' for sku, name, brand in rows]
    (directory / "catalogue.jsonl").write_text("\n".join(lines))
    write_llm(directory / "llm")
    return directory


def run(command: str, place: Path) -> subprocess.CompletedProcess[str]:
    words = shlex.split(command)
    if words[0] != "python" and any(word.endswith(".yaml") and "accelerate" not in word for word in words):
        words += SMALL
        if "mine.yaml" in command:
            words += ["prepare.min_item_interactions=0", "shards.share=0.5", f"llm.path={place / 'llm'}"]
    words[0] = str(BIN / words[0])
    environment = {**os.environ, "PATH": f"{BIN}:{os.environ['PATH']}", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "2"}
    return subprocess.run(words, cwd=place, env=environment, capture_output=True, text=True, timeout=600)


def test_every_command_runs_in_the_order_of_the_page(place):
    ran = [line for line in commands() if not line.startswith("python tools/")]
    assert [line.split()[1] for line in ran if line.startswith("rarec")] == [
        "run",
        *(["prepare"] if "spark" in ENGINES_HERE else []),  # mine, again, on Spark: what follows takes it as its own
        "prepare",
        "ids",
        "shards",
        "export",
        "report",
        "recommend",
        *["shards"] * 3,  # --verify, --deep, --repair
        "plan",
    ]
    for command in ran:
        before = (place / "runs/mine/prepare/manifest.json").read_bytes() if "engine=spark" in command else b""
        result = run(command, place)
        if before:
            again = (place / "runs/mine/prepare/manifest.json").read_bytes()
            assert again == before.replace(b'"engine": "duckdb"', b'"engine": "spark"')
        assert result.returncode == 0, f"{command}\n{result.stdout}\n{result.stderr}"
    assert (place / "runs" / "mine" / "report" / "report.html").exists()
    assert (place / "runs" / "demo" / "bundle" / "alignment.safetensors").exists()


def test_what_the_page_says_of_the_command_line_is_there():
    for option in ("--help", "--version"):
        assert subprocess.run([BIN / "rarec", option], capture_output=True).returncode == 0
    assert "--install-completion" in subprocess.run([BIN / "rarec", "--help"], capture_output=True, text=True).stdout


def test_the_sweep_of_the_page_is_a_valid_one(place, monkeypatch):
    from rarec.sweep import load_sweep

    monkeypatch.chdir(place)
    path = Path("configs/sweeps/page.yaml")
    path.write_text(next(block for block in blocks("yaml") if block.startswith("dir:")))
    assert len(load_sweep(path).runs) == 3 + 3 + 3


def test_the_import_section_of_the_page_is_a_valid_configuration(place):
    from rarec.config import load_config

    section = next(block for block in blocks("yaml") if block.startswith("ids:"))
    (place / "import.yaml").write_text((place / "mine.yaml").read_text() + section)
    assert load_config(place / "import.yaml").ids.model == "import"
