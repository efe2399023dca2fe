"""The HTML report and the terminal table: no claim beyond the intervals; self-contained, safe, reproducible."""

import io
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from rarec.config import RunConfig
from rarec.errors import UserError
from rarec.evaluation.results import Finding, Findings, Results, figure, primary_metric, variant_order, variant_title
from rarec.evaluation.rows import comparison_rows, metric_rows, pairs_of_interest, slots_and_rival, strata_rows
from rarec.evaluation.verdict import Verdict, best_variant, parts_worth, sanity_checks, verdict
from rarec.report.html import REPORT, write_report
from rarec.report.plots import curves
from rarec.report.run_files import RunDirectories, TrainingRecord, closing_lines, read_run, terminal_table
from rarec.storage.artefacts import write_manifest
from rarec.storage.files import sha256_file, write_json

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
    "lexical": 70,
    "cheap": 48,
    "id_only+cheap": 35,
    "text_only+id+cheap": 33,
    "per_layer+id+cheap": 30,
    "per_layer+id+cheap/without_id": 31,
    "per_layer+id+cheap/without_lexical": 30,
    "per_layer/or_cheap": 28,
    "per_layer/shuffled_history": 55,
    "per_layer/permuted_ids": 66,
}
"""Typical rank of the target, of 1,000 items."""
PARTS = {
    name: {"share": share, "weight": 1.0, "new_weight": 0.0}
    for name, share in {"per_layer": 0.5, "id": 0.25, "lexical": 0.25}.items()
}
TITLES = ["Fargo (1996)", "Alien & Aliens", "Star Wars (1977)", "<script>alert('x')</script>", "L'Avventura", "$9.99"]


def config(directory: Path, **sections: Any) -> RunConfig:
    """Return a run's configuration."""
    prepare = {
        "interactions": {"path": "log.csv", "user": "user", "item": "item", "time": "time"},
        "items": {"path": "items.csv", "item": "item", "title": "title"},
    }
    tree = {"run": {"dir": str(directory)}, "prepare": prepare, "llm": {"path": "models/all-MiniLM-L6-v2"}, **sections}
    tree["train"] = {"variants": list(TRAINED), **sections.get("train", {})}
    return RunConfig.model_validate(tree)


def directories(root: Path) -> RunDirectories:
    """Return the directories of a run in `root`."""
    training = {variant: root / "train" / variant for variant in TRAINED}
    return RunDirectories(root / "evaluation", root / "prepare", root / "shards", training)


def root_of(run: RunDirectories) -> Path:
    return run.evaluation.parent


def write_page(run: RunDirectories) -> Path:
    """Write the report of a run and return its path."""
    directory = root_of(run) / "report"
    write_report(directory, run, config(root_of(run)), say=lambda line: None)
    return directory / REPORT


def write_evaluation(run: RunDirectories, users: int = 400) -> None:
    """Write the evaluation of simulated ranks, through the project's own functions."""
    rng = np.random.default_rng(3)
    taste_U = rng.exponential(size=users) ** 2
    ranks = {
        variant: 1 + np.minimum(999, taste_U * skill * rng.gamma(2, 0.5, users)).astype(np.int64)
        for variant, skill in SKILL.items()
    }
    drawn = {"resamples": 200, "seed": 17}
    plain = [variant for variant in SKILL if "/" not in variant and variant != "per_layer"]
    strata = {"history length": rng.geometric(0.05, users) + 3, "popularity": rng.geometric(0.01, users)}
    write_json(run.evaluation / "metrics.json", metric_rows(ranks, CUTOFFS, **drawn))
    validated = {variant: ranks_U for variant, ranks_U in ranks.items() if "/" not in variant}
    write_json(run.evaluation / "validation.json", metric_rows(validated, CUTOFFS, **drawn))
    pairs = pairs_of_interest(ranks, "per_layer")
    write_json(run.evaluation / "comparisons.json", comparison_rows(ranks, pairs, CUTOFFS, **drawn))
    alone = {variant: ranks[variant] for variant in ["per_layer", *plain]}
    rows = strata_rows(alone, strata, slots_and_rival(alone, "per_layer"), **drawn)
    write_json(run.evaluation / "strata.json", rows)
    write_json(run.evaluation / "examples.json", [example(user) for user in (196, 22)])
    write_json(run.evaluation / "fusion.json", {"per_layer+id+cheap": PARTS})
    write_manifest(run.evaluation, "evaluate", settings={}, made_from={}, n=users, seconds=41.27)


def example(user: int) -> dict[str, Any]:
    """Return a user whose target is third with one variant and in no list of the others."""
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


def write_training(run: RunDirectories) -> None:
    """Write logs of four variants that were killed and resumed: an incomplete line, and a step twice."""
    for number, variant in enumerate(TRAINED):
        lines = []
        for step in range(1, 401):
            loss = 3.2 - number / 10 + 1.8 * np.exp(-step / 90)
            terms = {
                "loss": loss + 0.1,
                "recommendation": loss,
                "align": 0.0 if variant == "text_only" else 2 - step / 400,
            }
            lines.append(
                json.dumps({"step": step, "epoch": step // 200, **terms, "tokens_per_s": 5100.0, "data_wait": 0.012})
            )
            if step % 50 == 0:
                quality = 0.03 + number / 200 + step / 2e4 - (step / 5e3) ** 2 * 4
                lines.append(json.dumps({"step": step, "validation": {"ndcg@10": quality}}))
        lines[200:200] = ['{"step": 180, "lo', lines[199]]
        run.training[variant].mkdir(parents=True)
        log = run.training[variant] / "log.jsonl"
        log.write_text("\n".join(lines) + "\n")
        done = {
            "log": sha256_file(log),
            "step": 400,
            "best_step": 300,
            "seconds": 93.4,
            "trainable_parameters": 1_234_567 * (number + 1),
        }
        write_json(run.training[variant] / "manifest.json", done)


def write_data(run: RunDirectories) -> None:
    """Write the reports of preparation and selection."""
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
def run(tmp_path_factory: pytest.TempPathFactory) -> RunDirectories:
    made = directories(tmp_path_factory.mktemp("runs") / "movies")
    write_evaluation(made)
    write_training(made)
    write_data(made)
    return made


@pytest.fixture(scope="module")
def page(run: RunDirectories) -> str:
    return write_page(run).read_text()


class Tags(HTMLParser):
    """The tags of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def compared(variant: str, baseline: str, low: float, high: float, metric: str = "ndcg@10") -> dict[str, Any]:
    figures = {"difference": (low + high) / 2, "low": low, "high": high, "n": 943, "differing": 90}
    return {"variant": variant, "baseline": baseline, "metric": metric, "protocol": "full", **figures}


def measured(variant: str, value: float = 0.05, metric: str = "ndcg@10") -> dict[str, Any]:
    figures = {"value": value, "low": value - 0.01, "high": value + 0.01, "n": 943}
    return {"variant": variant, "metric": metric, "protocol": "full", **figures}


ID, FUSION = ("per_layer", "id_only"), ("per_layer", "text_only+id")


def judged(rows: list[dict[str, Any]], *metrics: dict[str, Any]) -> Verdict:
    measures = list(metrics) or [measured("per_layer")]
    return verdict(Results(measures, rows, deployable(measures)), "per_layer", 17)


def outcomes(findings: Findings) -> list[str | None]:
    return [finding and finding.outcome for finding in findings.values()]


def deployable(metrics: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows of validation.json of equal values."""
    return [row for row in metrics if "/" not in row["variant"] and not row["variant"].startswith("external:")]


def test_a_verdict_claims_a_lead_only_where_the_interval_lies_above_zero() -> None:
    said = judged([compared(*ID, 0.001, 0.009), compared(*FUSION, -0.002, 0.006)])
    assert said.outcome == "inconclusive"
    assert "RA-Rec (per layer) is better than the ID model, and is not significantly different from" in said.headline
    assert "(n=943)" in said.headline
    text = " ".join(said.sentences)
    assert "paired difference in NDCG@10 +.0050, 95% interval +.0010 to +.0090" in text
    assert "with seed 17" in text


def test_a_verdict_says_when_the_method_loses() -> None:
    said = judged([compared(*ID, 0.001, 0.009), compared(*FUSION, -0.02, -0.01)])
    assert said.outcome == "worse"
    assert "is worse than text only + ID" in said.headline


def test_a_verdict_names_what_was_not_compared_or_not_evaluated() -> None:
    said = judged([compared(*ID, 0.001, 0.009)])
    assert (said.outcome, "was not compared with text only + ID" in said.headline) == ("inconclusive", True)
    said = judged([], measured("id_only"))
    assert (said.outcome, said.sentences) == ("inconclusive", ())
    assert "RA-Rec (per layer) was not evaluated" in said.headline


def test_a_metric_that_reads_otherwise_is_not_hidden() -> None:
    rows = [compared(*ID, 0.001, 0.009), compared(*FUSION, 0.001, 0.006)]
    rows += [compared(*ID, -0.03, -0.01, "hr@100"), compared(*FUSION, 0.01, 0.02, "hr@100")]
    rows += [compared(*ID, 0.01, 0.02, "mrr"), compared(*FUSION, 0.01, 0.02, "mrr")]
    assert "MRR agrees, but on HR@100 it is worse than the ID model." in judged(rows).sentences


def test_slots_are_said_to_add_nothing_where_late_fusion_does_as_well_without_them() -> None:
    rows = [compared(*ID, 0.01, 0.02), compared(*FUSION, 0.01, 0.02), compared("per_layer+id", FUSION[1], -0.01, 0.01)]
    (alone,) = [text for text in judged(rows).sentences if "the ID score" in text]
    assert alone.startswith("RA-Rec (per layer) + ID is not significantly different from text only + ID")
    assert "no evidence that the slots add" in alone


def test_the_verdict_says_first_whether_the_slots_add_to_the_untrained_baselines() -> None:
    whole = "per_layer+id+cheap"
    metrics = [measured("per_layer", 0.05), measured(whole, 0.06), measured("id_only+cheap", 0.055)]
    against_id, against_text = (
        compared(whole, "id_only+cheap", 0.01, 0.02),
        compared(whole, "text_only+id+cheap", 0, 0.02),
    )
    said = judged([against_id, against_text], *metrics)
    assert said.outcome == "inconclusive"
    assert said.headline.startswith("No evidence that RA-Rec (per layer) adds to the untrained baselines")
    assert "is better than ID model + cheap, and is not significantly different from text only + ID" in said.headline
    said = judged([against_id, {**against_text, "low": 0.001}], *metrics)
    assert said.outcome == "better"
    assert said.headline.startswith("RA-Rec (per layer) adds to the untrained baselines: on NDCG@10,")
    assert said.sentences[0].startswith("RA-Rec (per layer) + ID + cheap reaches NDCG@10 .0600")
    assert said.sentences[1].startswith("RA-Rec (per layer) reaches NDCG@10 .0500")
    assert judged([{**against_id, "high": -0.001, "low": -0.1}, against_text], *metrics).outcome == "worse"


def test_where_text_is_tuned_by_lora_the_slots_must_beat_it_too() -> None:
    rows = [
        compared(*ID, 0.01, 0.02),
        compared(*FUSION, 0.01, 0.02),
        compared("per_layer", "text_lora+id", -0.01, 0.01),
    ]
    said = judged(rows, measured("per_layer", 0.05), measured("text_lora+id", 0.049))
    assert said.outcome == "inconclusive"
    assert "not significantly different from text only + LoRA + ID" in said.headline
    names = ["id_only", "text_only+id", "text_lora+id", "per_layer", "per_layer+id"]
    assert ("per_layer+id", "text_lora+id") in pairs_of_interest(names, "per_layer")


def test_slots_with_lora_are_compared_with_text_with_lora_where_there_is_no_other() -> None:
    rows = [compared("per_layer_lora+id+cheap", f"{name}+cheap", 0.01, 0.02) for name in ("id_only", "text_lora+id")]
    rows.append(compared("per_layer_lora+id", "text_lora+id", -0.02, -0.01))
    names = ("id_only", "text_lora", "text_lora+id", "per_layer_lora", "per_layer_lora+id", "per_layer_lora+id+cheap")
    metrics = [measured(name, 0.04 + at / 100) for at, name in enumerate(names)]
    said = verdict(Results(metrics, rows, metrics), "per_layer_lora", 3)
    assert (said.outcome, said.best and outcomes(said.best.findings)) == ("better", ["better"] * 2)
    assert "next to the ID score, the slots do harm" in " ".join(said.sentences)
    pairs = pairs_of_interest([*names, "per_layer_lora/permuted_ids"], "per_layer_lora")
    assert ("per_layer_lora/permuted_ids", "text_lora") in pairs


def test_the_variant_to_deploy_is_the_best_on_validation_users() -> None:
    metrics = [measured("id_only", 0.04), measured("per_layer", 0.05), measured("per_layer+id", 0.06)]
    metrics += [measured("per_layer/shuffled_history", 0.09), measured("external:llara", 0.07)]
    validation = [measured("id_only", 0.05), measured("per_layer", 0.08), measured("per_layer+id", 0.07)]
    best = best_variant(Results(metrics, [], validation))
    assert best is not None
    assert (best.name, best.chosen, best.value, best.metric) == ("per_layer", 0.08, 0.05, "ndcg@10")
    rows = [compared(*ID, 0.001, 0.009), compared("per_layer+id", "id_only", 0.01, 0.02)]
    rows += [compared("per_layer+id", "text_only+id", -0.01, 0.02)]
    best = best_variant(Results(metrics, rows, deployable(metrics)))
    assert best is not None
    assert (best.name, outcomes(best.findings)) == ("per_layer+id", ["better", "inconclusive"])
    assert best.better_outside == ("llara (external)", 0.07)
    assert "llara (external)" in best.sentence
    assert "text only + ID, which is simpler" in best.advice


def test_a_baseline_with_more_parts_is_not_called_simpler() -> None:
    metrics = [measured("id_only", 0.05), measured("text_only+id", 0.04)]
    best = best_variant(Results(metrics, [compared("id_only", "text_only+id", -0.01, 0.02)], metrics))
    assert best is not None
    assert (best.name, best.advice) == ("id_only", "Deploy: ID model.")


def test_the_best_variant_with_untrained_baselines_is_compared_with_baselines_with_them() -> None:
    rows = [compared("per_layer+id+cheap", f"{name}+cheap", 0.01, 0.02) for name in ("id_only", FUSION[1])]
    metrics = [measured("per_layer", 0.05), measured("per_layer+id+cheap", 0.06)]
    best = best_variant(Results(metrics, rows, metrics))
    assert best is not None
    assert list(best.findings) == ["id_only+cheap", "text_only+id+cheap"]
    assert outcomes(best.findings) == ["better"] * 2
    said = judged([*rows, compared(*FUSION, -0.02, -0.01)], *metrics)
    assert (said.outcome, said.best) == ("better", best)
    assert "It is the best variant on validation users" in said.headline


def test_a_lead_of_the_text_without_slots_is_no_success_of_the_method() -> None:
    rows = [compared("text_only+id", "id_only", 0.01, 0.02), compared(*FUSION, -0.02, -0.01)]
    said = judged(rows, measured("per_layer", 0.05), measured("text_only+id", 0.06))
    assert said.best is not None
    assert (said.best.name, outcomes(said.best.findings), said.outcome) == ("text_only+id", ["better"], "worse")


def test_of_equal_variants_the_simpler_one_is_best_and_without_metrics_there_is_none() -> None:
    metrics = [measured("per_layer+id"), measured("per_layer"), measured("id_only")]
    best = best_variant(Results(metrics, [], metrics))
    assert best is not None
    assert best.name == "id_only"
    assert best_variant(Results([])) is None


def test_a_part_is_worth_what_is_lost_without_it() -> None:
    whole = "per_layer+id+cheap"
    rows = [compared(whole, f"{whole}/without_id", 0.01, 0.02), compared(whole, "id_only+cheap", 0.02, 0.03)]
    own, ids, words = parts_worth(Results([], rows), {whole: PARTS}, "per_layer", ["ndcg@10", "mrr"])
    assert [part["title"] for part in (own, ids, words)] == ["RA-Rec (per layer)", "ID", "similar words (TF-IDF)"]
    assert own["weight"] == 0.5
    assert (own["findings"]["ndcg@10"].difference, ids["findings"]["ndcg@10"].low) == (0.025, 0.01)
    assert (list(own["findings"]), words["findings"]) == (["ndcg@10"], {})
    assert parts_worth(Results([], rows), {}, "per_layer", ["ndcg@10"]) == []


@given(st.lists(st.floats(-1, 1), min_size=3, max_size=3).map(sorted))
def test_a_finding_is_better_or_worse_only_with_its_whole_interval(values: list[float]) -> None:
    low, difference, high = values
    row = {**compared("per_layer", "id_only", low, high), "difference": difference}
    finding = Results([], [row]).find("per_layer", "id_only", "ndcg@10")
    swapped = Results([], [row]).find("id_only", "per_layer", "ndcg@10")
    assert finding is not None
    assert swapped is not None
    assert (finding.outcome == "better") == (low > 0)
    assert (finding.outcome == "worse") == (high < 0)
    opposite = {"better": "worse", "worse": "better", "inconclusive": "inconclusive"}
    assert swapped.outcome == opposite[finding.outcome]


def test_an_interval_that_touches_zero_allows_no_claim() -> None:
    assert Finding("a", "b", "mrr", 0.01, 0.0, 0.02, 9, 9).outcome == "inconclusive"
    assert Finding("a", "b", "mrr", -0.01, -0.02, 0.0, 9, 9).outcome == "inconclusive"


@pytest.mark.parametrize(("differing", "outcome"), [(1, "inconclusive"), (5, "inconclusive"), (6, "better")])
def test_a_handful_of_users_that_differ_allows_no_claim(differing: int, outcome: str) -> None:
    """The bootstrap's interval is above zero, although so few users could differ by chance."""
    better, same = np.full(900, 50), np.full(900, 50)
    better[:differing] = 3
    ranks = {"per_layer": better, "id_only": same}
    rows = comparison_rows(ranks, [("per_layer", "id_only")], [10], resamples=2000, seed=0)
    finding = Results([], rows).find("per_layer", "id_only", "hr@10")
    assert finding is not None
    assert (finding.differing, finding.n) == (differing, 900)
    assert finding.low > 0 or differing == 1
    assert finding.outcome == outcome


def test_sanity_checks_pass_only_where_the_variant_gets_worse() -> None:
    metrics = [measured("per_layer", 0.06), measured("text_only", 0.04)]
    metrics += [measured("per_layer/shuffled_history", 0.06), measured("per_layer/permuted_ids", 0.041)]
    rows = [compared("per_layer/shuffled_history", "per_layer", -0.001, 0.001)]
    rows += [compared("per_layer/permuted_ids", "per_layer", -0.03, -0.01)]
    rows += [compared("per_layer/permuted_ids", "text_only", -0.004, 0.006)]
    shuffled, permuted = sanity_checks(Results(metrics, rows), "per_layer")
    assert (shuffled["passed"], permuted["passed"]) == (False, True)
    assert "n=943" in shuffled["text"]
    assert "from .0600 to .0410" in permuted["text"]
    assert "Text only reaches .0400" in permuted["text"]
    assert [check["passed"] for check in sanity_checks(Results(metrics), "per_layer")] == [None, None]


def test_names_and_figures_read_as_people_write_them() -> None:
    assert variant_title("per_layer+id") == "RA-Rec (per layer) + ID"
    assert variant_title("per_layer/permuted_ids") == "RA-Rec (per layer), permuted IDs"
    assert variant_title("per_layer+id+popularity") == "RA-Rec (per layer) + ID + popularity"
    assert variant_title("id_only+popularity") == "ID model + popularity"
    assert variant_title("external:llara") == "llara (external)"
    last = ["per_layer/permuted_ids", "text_only+id+popularity", "id_only+popularity", "text_only+id"]
    names = [*last, "external:llara", "per_layer", "id_only", "text_only"]
    assert sorted(names, key=variant_order) == ["id_only", "text_only", "per_layer", "external:llara", *reversed(last)]
    assert [figure(0.05334), figure(1.0), figure(-0.00001, signed=True)] == [".0533", "1.0000", "+.0000"]
    assert figure(-0.0021, signed=True) == "\N{MINUS SIGN}.0021"
    assert [primary_metric(["mrr", "ndcg@10"]), primary_metric(["ndcg@20", "ndcg@5"]), primary_metric([])] == [
        "ndcg@10",
        "ndcg@5",
        "mrr",
    ]


def test_the_page_needs_nothing_from_outside_and_runs_nothing(page: str) -> None:
    tags = Tags(page).tags
    assert not {"script", "link", "img", "iframe", "object", "foreignobject"} & {tag for tag, _ in tags}
    pointers = [
        value or "" for _, attrs in tags for name, value in attrs.items() if name in ("href", "src", "xlink:href")
    ]
    ids = [attrs["id"] for _, attrs in tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    assert {pointer[1:] for pointer in pointers} <= set(ids)
    assert all(pointer.startswith("#") for pointer in pointers)
    assert set(re.findall(r"url\(#?([^)]*)\)", page)) <= set(ids)
    assert "http" not in page.replace("http-equiv", "")
    assert not any(name.startswith("on") for _, attrs in tags for name in attrs)


def test_the_page_is_well_formed_and_its_plots_speak_and_follow_the_theme(page: str) -> None:
    parsed = Tags(page)
    assert parsed.open == []
    plots = [attrs for tag, attrs in parsed.tags if tag == "svg"]
    assert len(plots) == 6
    assert all(attrs["role"] == "img" and len(attrs["aria-label"] or "") > 40 for attrs in plots)
    assert any("+ ID + cheap minus text only + ID + cheap" in (attrs["aria-label"] or "") for attrs in plots)
    drawn = "".join(re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL))
    assert not re.search(r"(fill|stroke): ?#", drawn)
    defined = set(re.findall(r"(--[\w-]+):", page))
    assert set(re.findall(r"var\((--[\w-]+)\)", page)) <= defined
    assert "prefers-color-scheme: dark" in page


def test_titles_are_text_never_markup(page: str) -> None:
    assert "<script" not in page
    assert "<b>Bold" not in page
    assert page.count("&lt;script&gt;alert(&#39;x&#39;)&lt;/script&gt;") == 4
    assert "Alien &amp; Aliens" in page


def test_the_target_is_marked_where_its_rank_says(page: str) -> None:
    lists = re.findall(r"<ol>.*?</ol>", page, flags=re.DOTALL)
    marked = [re.findall(r"<li>(<mark>)?", part) for part in lists]
    assert [[place for place, mark in enumerate(marks, 1) if mark] for marks in marked] == [[], [], [3]] * 2
    assert "target at rank 1,204" in page


def test_a_tie_that_moves_the_rank_still_marks_the_target(tmp_path: Path) -> None:
    row = {**example(1), "target_rank": {"per_layer": 5, "id_only": 31, "text_only": 1204}}
    run = directories(tmp_path)
    write_json(run.evaluation / "metrics.json", [measured("per_layer")])
    write_json(run.evaluation / "examples.json", [row])
    page = write_page(run).read_text()
    assert re.search(r"<ol>(<li>[^<]*</li>){2}<li><mark>", page)


def test_the_page_shows_figures_settings_and_cost(page: str, run: RunDirectories) -> None:
    rows = json.loads((run.evaluation / "metrics.json").read_text())
    ndcg = next(row for row in rows if (row["variant"], row["metric"]) == ("per_layer", "ndcg@10"))
    assert f"reaches NDCG@10 {figure(ndcg['value'])} (95% interval" in page
    for shown in ("2,000", "71,234", "3,703,701", "align_weight: 0.1", "min_user_interactions"):
        assert shown in page


def test_equal_files_give_equal_bytes(run: RunDirectories, page: str) -> None:
    again = write_page(run)
    assert again.read_text() == page
    assert [entry.name for entry in again.parent.iterdir()] == ["report.html"]


def test_a_resumed_log_counts_each_step_once_and_an_incomplete_line_is_named(run: RunDirectories) -> None:
    printed: list[str] = []
    record = read_run(run, say=printed.append)
    assert [line["step"] for line in record.training["per_layer"].losses] == list(range(1, 401))
    assert len(record.training["per_layer"].validations) == 8
    assert len(printed) == 4
    assert "log.jsonl, line 201" in printed[0]


def test_what_a_variant_left_that_is_trained_no_more_is_not_shown(run: RunDirectories) -> None:
    assert set(read_run(run, say=lambda line: None).training) > {"per_layer"}
    alone = replace(run, training={"per_layer": run.training["per_layer"]})
    assert set(read_run(alone, say=lambda line: None).training) == {"per_layer"}


def test_what_was_not_written_is_left_out(tmp_path: Path) -> None:
    run = directories(tmp_path / "small")
    write_json(run.evaluation / "metrics.json", [measured("id_only", 0.04), measured("id_only", 0.03, "hr@7")])
    page = write_page(run).read_text()
    sections = re.findall(r'<section[^>]* id="(\w+)"', page)
    assert sections == ["verdict", "results", "protocol", "settings"]
    assert "was not evaluated" in page
    assert "HR@7" in page


def test_a_row_without_a_field_is_named_and_nothing_is_written(tmp_path: Path) -> None:
    run = directories(tmp_path)
    row = measured("per_layer")
    del row["low"]
    write_json(run.evaluation / "metrics.json", [measured("id_only"), row])
    with pytest.raises(UserError, match=r"metrics\.json lacks `low`"):
        write_page(run)
    assert not (tmp_path / "report").exists()


def test_without_the_extra_the_command_that_installs_it_is_named(
    run: RunDirectories, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UserError, match="matplotlib") as caught:
        write_page(run)
    assert caught.value.remedy == "pip install 'rarec[report]'"


METRICS = ["hr@10", "hr@100", "ndcg@10", "mrr"]


def printed_table(rows: list[dict[str, Any]], width: int) -> str:
    console = Console(width=width, file=io.StringIO(), record=True)
    console.print(terminal_table(Results(rows), METRICS, width))
    return console.export_text()


@pytest.mark.parametrize(("width", "with_interval"), [(80, ["ndcg@10"]), (110, METRICS), (60, [])])
def test_the_terminal_table_is_whole_at_any_width_with_the_intervals_that_fit(
    run: RunDirectories, width: int, with_interval: list[str]
) -> None:
    rows = json.loads((run.evaluation / "metrics.json").read_text())
    text = printed_table(rows, width)
    assert max(map(len, text.splitlines())) <= width
    assert "n=400" in text
    assert "…" not in text
    for row in rows:
        if row["metric"] in METRICS and not row["variant"].startswith(("per_layer+id+cheap/", "per_layer/or_cheap")):
            shown = f"{figure(row['value'])} {figure(row['low'])}–{figure(row['high'])}"
            assert figure(row["value"]) in text
            assert (shown in text) == (row["metric"] in with_interval)
    assert text.index("ID model") < text.index("RA-Rec (per layer)") < text.index("text only + ID")


def test_the_terminal_table_leaves_out_other_protocols() -> None:
    rows = [measured("id_only"), {**measured("text_only"), "protocol": "cand20"}]
    table = terminal_table(Results(rows), ["ndcg@10", "mrr"], 80)
    assert table.row_count == 1


def test_the_last_lines_name_the_best_variant_and_the_next_step(run: RunDirectories) -> None:
    files = read_run(run, say=lambda line: None)
    lines = closing_lines(files, config(root_of(run)))
    assert len(lines) == 2
    assert lines[0].startswith("RA-Rec (per layer) + ID + cheap is best on validation users")
    assert lines[1].startswith("Deploy: RA-Rec (per layer) + ID + cheap")
    other = closing_lines(files, config(root_of(run), export={"variant": "input"}))
    assert "export.variant" in other[-1]
    assert closing_lines(replace(files, validation=[]), config(root_of(run))) == []


@pytest.mark.parametrize(
    ("train", "field"), [({"epochs": 3}, "train.epochs (now 3)"), ({"max_steps": 400}, "train.max_steps (now 400)")]
)
def test_a_training_that_was_still_improving_is_named_with_the_field_to_raise(
    run: RunDirectories, train: dict[str, Any], field: str
) -> None:
    files = read_run(run, say=lambda line: None)
    improving = replace(files.training["per_layer"], done={"step": 400, "best_step": 400})
    files = replace(files, training={**files.training, "per_layer": improving})
    line = closing_lines(files, config(root_of(run), train=train))[0]
    assert "RA-Rec (per layer)" in line
    assert field in line
    once = replace(improving, validations=improving.validations[:1])  # nothing to compare with
    lines = closing_lines(replace(files, training={"per_layer": once}), config(root_of(run), train=train))
    assert not any(field in line for line in lines)


@pytest.mark.slow
def test_a_variable_that_matplotlib_cannot_read_is_named(finished, tmp_path) -> None:
    run = shutil.copytree(finished.parent / "run", tmp_path / "run")
    command = [sys.executable, "-m", "rarec", "report", str(finished), f"run.dir={run}", "--fresh"]
    environment = {**os.environ, "MPLBACKEND": "nonsense"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert "MPLBACKEND" in result.stderr


def test_every_validation_is_a_point_of_its_curve_which_is_drawn_where_all_are_zero() -> None:
    """The best step is one of them; losses, of which there are many, are averaged."""
    values = [{"step": step, "ndcg@100": (step * 7 % 11) / 11} for step in range(1, 401)]
    picture = curves({"per_layer": TrainingRecord({"best_step": 151}, [], values)}, "ndcg@100")
    assert picture.count("\nL ") > 200  # of 400; matplotlib leaves out what cannot be seen
    assert "validation" in curves({"per_layer": TrainingRecord({}, [], [{"step": 2, "ndcg@100": 0.0}])}, "ndcg@100")
