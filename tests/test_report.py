"""The HTML report and the terminal table: honest about what the intervals allow, self-contained, safe, reproducible."""

import io
import json
import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from rarec.artefacts import write_json, write_manifest
from rarec.config import RunConfig
from rarec.errors import UserError
from rarec.evaluation.figures import comparison_rows, metric_rows
from rarec.evaluation.labels import arm_order, arm_title, figure, primary_metric
from rarec.evaluation.record import read_run
from rarec.evaluation.report import write_report
from rarec.evaluation.strata import strata_rows
from rarec.evaluation.table import terminal_table
from rarec.evaluation.verdict import Finding, find, probes, verdict
from rarec.paths import RunPaths

CUTOFFS = [1, 5, 10, 20, 50, 100]
TRAINED = ("text_only", "prefix_only", "input", "per_layer")
SKILL = {
    "id_only": 45,
    "text_only": 60,
    "prefix_only": 58,
    "input": 44,
    "per_layer": 36,
    "text_only+id": 37,
    "per_layer+id": 33,
    "per_layer/shuffled_history": 55,
    "per_layer/permuted_ids": 66,
}
"""Typical rank of the target, of 1,000 items."""
TITLES = ["Fargo (1996)", "Alien & Aliens", "Star Wars (1977)", "<script>alert('x')</script>", "L'Avventura", "$9.99"]


def config(directory: Path, **sections: Any) -> RunConfig:
    """A run's configuration."""
    prepare = {
        "interactions": {"path": "log.csv", "user": "user", "item": "item", "time": "time"},
        "items": {"path": "items.csv", "item": "item", "title": "title"},
    }
    tree = {"run": {"dir": str(directory)}, "prepare": prepare, "llm": {"path": "models/all-MiniLM-L6-v2"}, **sections}
    return RunConfig.model_validate(tree)


def write_evaluation(run: RunPaths, users: int = 400) -> None:
    """What an evaluation of simulated ranks leaves, through the project's own functions."""
    rng = np.random.default_rng(3)
    taste_U = rng.exponential(size=users) ** 2
    ranks = {
        arm: 1 + np.minimum(999, taste_U * skill * rng.gamma(2, 0.5, users)).astype(np.int64)
        for arm, skill in SKILL.items()
    }
    drawn = {"resamples": 200, "seed": 17}
    plain = [arm for arm in SKILL if "/" not in arm and arm != "per_layer"]
    pairs = [("per_layer", arm) for arm in plain] + [("per_layer+id", "text_only+id"), ("per_layer+id", "id_only")]
    pairs += [(arm, "per_layer") for arm in SKILL if "/" in arm]
    strata = {"history length": rng.geometric(0.05, users) + 3, "popularity": rng.geometric(0.01, users)}
    write_json(run.evaluation / "metrics.json", metric_rows(ranks, CUTOFFS, **drawn))
    write_json(run.evaluation / "comparisons.json", comparison_rows(ranks, pairs, CUTOFFS, **drawn))
    write_json(
        run.evaluation / "strata.json", strata_rows({a: ranks[a] for a in ["per_layer", *plain]}, strata, **drawn)
    )
    write_json(run.evaluation / "examples.json", [example(user) for user in (196, 22)])
    figures = {"n": users, "seconds": 41.27, "fusion": {"text_only": 0.75, "per_layer": 0.5}}
    write_manifest(run.evaluation, "evaluate", settings={}, made_from={}, **figures)


def example(user: int) -> dict[str, Any]:
    """A user whose target stands third with one arm and nowhere with the others."""
    others = [f"Film {number} ({1950 + number})" for number in range(20)]
    top = {"per_layer": [*others[:2], TITLES[3], *others[2:9]], "id_only": others[:10], "text_only": others[5:15]}
    rank = {"per_layer": 3, "id_only": 31, "text_only": 1204}
    return {
        "user": user,
        "history": [TITLES[0], TITLES[1], TITLES[4]],
        "target": TITLES[3],
        "target_rank": rank,
        "top": top,
    }


def write_training(run: RunPaths) -> None:
    """Logs of four arms; one was killed and went on, and its log holds a torn line and a step twice."""
    for number, arm in enumerate(TRAINED):
        lines = []
        for step in range(1, 401):
            loss = 3.2 - number / 10 + 1.8 * np.exp(-step / 90)
            terms = {"loss": loss + 0.1, "recommendation": loss, "align": 0.0 if arm == "text_only" else 2 - step / 400}
            lines.append(
                json.dumps({"step": step, "epoch": step // 200, **terms, "tokens_per_s": 5100.0, "data_wait": 0.012})
            )
            if step % 50 == 0:
                quality = 0.03 + number / 200 + step / 2e4 - (step / 5e3) ** 2 * 4
                lines.append(json.dumps({"step": step, "validation": {"ndcg@10": quality}}))
        lines[200:200] = ['{"step": 180, "lo', lines[199]]
        run.train(arm).mkdir(parents=True)
        (run.train(arm) / "log.jsonl").write_text("\n".join(lines) + "\n")
        done = {"step": 400, "best_step": 300, "seconds": 93.4, "trainable_parameters": 1_234_567 * (number + 1)}
        write_json(run.train(arm) / "done.json", done)


def write_data(run: RunPaths) -> None:
    """The accounts of preparation and selection."""
    steps = [
        {
            "step": "duplicates",
            "interactions_before": 100_000,
            "interactions_after": 99_287,
            "note": "same user and item again",
        },
        {
            "step": "min_user_interactions",
            "interactions_before": 99_287,
            "interactions_after": 99_281,
            "note": "fewer than 5",
        },
    ]
    counts = {"users": 943, "items": 1682, "interactions": 99_281}
    run.prepare.mkdir(parents=True)
    write_manifest(run.prepare, "prepare", settings={}, made_from={}, counts=counts, steps=steps, cut_times=[])
    buckets = [{"history": f"{n}-{n + 4}", "popularity": "1-9", "samples": 90 * n, "kept": 40} for n in range(3, 15)]
    noise = [{"history": ["Heat (1995)"], "target": "<b>Bold</b>"}]
    report = {"samples": {"all": 97_395, "wanted": 20_000}, "dropped": {"no shared word": 71_234}, "buckets": buckets}
    write_json(run.shards / "selection.json", {**report, "kept": 19_998, "examples_of_noise": noise})


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunPaths:
    paths = RunPaths(tmp_path_factory.mktemp("runs") / "movies")
    write_evaluation(paths)
    write_training(paths)
    write_data(paths)
    return paths


@pytest.fixture(scope="module")
def page(run: RunPaths) -> str:
    return write_report(run, config(run.root), say=lambda line: None).read_text()
