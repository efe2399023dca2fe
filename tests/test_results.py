"""Results of sweeps: figures worked out by hand, intervals over users of their seed-means, nothing left out unsaid."""

import math
import re
import shutil
import sys
from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rarec.artefacts import read_manifest, write_manifest
from rarec.config import VARIANTS, dump_config
from rarec.config.identity import (
    baseline_of,
    evaluate_settings,
    prepare_settings,
    shard_settings,
    source_settings,
    variant_settings,
    vectors_of,
)
from rarec.errors import UserError
from rarec.evaluation.result_rows import comparison_rows, metric_rows
from rarec.evaluation.seeds import SeedMeans
from rarec.files import write_json, write_text
from rarec.paths import RunPaths
from rarec.ranking import mean_interval
from rarec.sweep import SweepRun, load_sweep

ROOT = Path(__file__).parents[1]
BASE = """
run: {dir: x}
prepare:
  interactions: {path: a.csv, user: u, item: i, time: t}
  items: {path: b.csv, item: i, title: t}
llm: {path: x}
train: {variants: [text_only, per_layer]}
evaluate: {resamples: 300}
"""
SWEEP = """
dir: all
base: base.yaml
seeds: [17, 18]
runs:
  plain: {}
  share: {seeds: [17], grid: {shards.share: [0.5, 0.01]}}
"""
FUSED = {"text_only+id": [1, 5, 200, 5], "per_layer+id": [1, 1, 1, 1]}
RANKS = {
    17: {"id_only": [1, 20, 200, 5], "per_layer": [2, 2, 2, 2], **FUSED},
    18: {"id_only": [1, 5, 200, 5], "per_layer": [2, 2, 2, 4], **FUSED},
}
"""Of users a to d. The ID model's HR@10 is 1, 1/2, 0, 1; HR@100 1, 1, 0, 1; reciprocal rank 1, 1/8, 1/200, 1/5."""
HEADLINE = ["hr@10", "hr@100", "ndcg@10", "mrr"]


def write_ranks(
    file: Path, ranks: Mapping[str, Sequence[int]], users: Sequence[str] = "abcd", targets: Sequence[str] = "wxyz"
) -> Path:
    rows = [
        {"variant": variant, "user": user, "target": target, "rank": rank}
        for variant, own in ranks.items()
        for user, target, rank in zip(users, targets, own, strict=True)
    ]
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), file)
    return file


def artefact(directory: Path, kind: str, settings: Mapping[str, Any], made_from: Mapping[str, str]) -> str:
    directory.mkdir(parents=True, exist_ok=True)
    return write_manifest(directory, kind, settings=settings, made_from=made_from)["hash"]


def finish(
    run: SweepRun,
    ranks: Mapping[str, Sequence[int]],
    record: Mapping[str, Any] | None = None,
    strata: Any = None,
    **of: Sequence[str],
) -> None:
    """A run with the files that finished stages leave, its ranks made by hand."""
    config, paths = run.config, RunPaths.of(run.config)
    prepare = artefact(paths.prepare, "prepare", prepare_settings(config.prepare, run.seed), {})
    ids = {
        name: artefact(paths.source(name), "ids", source_settings(section, run.seed), {"prepare": prepare})
        for name, section in vectors_of(config).items()
    }
    shards = artefact(paths.shards, "shards", shard_settings(config), {"prepare": prepare, "ids/id": ids["id"]})
    write_text(paths.config, dump_config(config))
    for name in config.train.variants:
        artefact(paths.train(name), "train", variant_settings(config, VARIANTS[name]), {"shards": shards})
        write_json(paths.train(name) / "done.json", {"step": 2, "best_step": 2, "seconds": 1.0})
        lines = [f'{{"step": {step}, "loss": 1.0, "samples": {count}}}\n' for step, count in ((1, 1000), (2, 500))]
        write_text(paths.train(name) / "log.jsonl", "".join(lines))
    from rarec.training.finished import training_hash

    made_from = {name: training_hash(paths.train(name)) for name in config.train.variants}
    made_from |= {"prepare": prepare, "baseline": ids[baseline_of(config)[0]]}
    write_ranks(paths.evaluation / "ranks.parquet", ranks, **of)
    write_json(paths.evaluation / "metrics.json", [])
    write_json(paths.evaluation / "strata.json", strata or [])
    artefact(paths.evaluation, "evaluate", evaluate_settings(config), made_from)
    if record is not None:
        write_json(paths.record, record)


@pytest.fixture
def path(tmp_path, monkeypatch) -> Path:
    """A sweep in the current directory of which nothing is made yet."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    Path("base.yaml").write_text(BASE)
    Path("sweep.yaml").write_text(SWEEP)
    return Path("sweep.yaml")


def page(path: Path) -> str:
    from make_results import results

    return results([path], Path("results"))


def rows_of(page: str, heading: str) -> list[list[str]]:
    """Cells of the table under a heading, without its head."""
    part = page.split(f"### {heading}\n")[1].split("\n### ")[0]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in part.splitlines() if "|" in line][2:]


def test_a_figure_is_the_mean_over_users_of_their_means_over_seeds(tmp_path):
    files = [write_ranks(tmp_path / f"{seed}.parquet", ranks) for seed, ranks in RANKS.items()]
    means = SeedMeans.read(files)
    found = means.figures("id_only")
    assert (means.n, means.seeds, means.left_out) == (4, 2, 0)
    assert [found[metric].mean for metric in HEADLINE] == pytest.approx(
        [2.5 / 4, 3 / 4, (1 + 1.5 / math.log2(6)) / 4, (1 + 1 / 8 + 1 / 200 + 1 / 5) / 4]
    )
    assert found["hr@10"] == mean_interval([1, 0.5, 0, 1])
    difference = means.differences("per_layer+id", "id_only")["mrr"]
    assert difference == mean_interval(1 - np.array([1, 1 / 8, 1 / 200, 1 / 5]))


def test_one_seed_gives_the_figures_of_the_runs_own_metrics(tmp_path):
    ranks = {variant: np.array(own) for variant, own in RANKS[17].items()}
    means = SeedMeans.read([write_ranks(tmp_path / "x.parquet", RANKS[17])], 300, 17)
    for row in metric_rows(ranks, [10, 100], resamples=300, seed=17):
        assert means.figures(row["variant"])[row["metric"]] == (row["value"], row["low"], row["high"])
    pairs = [("per_layer+id", "id_only")]
    for row in comparison_rows(ranks, pairs, [10, 100], resamples=300, seed=17):
        assert means.differences(*pairs[0])[row["metric"]] == (row["difference"], row["low"], row["high"])


def test_seeds_are_paired_by_user_in_whatever_order_and_the_others_are_counted(tmp_path):
    one = write_ranks(tmp_path / "1.parquet", {"id_only": [1, 2, 4]}, "abc", "xyz")
    two = write_ranks(tmp_path / "2.parquet", {"id_only": [8, 2, 1]}, "cbe", "zyv")
    means = SeedMeans.read([one, two])
    assert (means.n, means.left_out) == (2, 2)
    assert means.values["id_only"]["mrr"].tolist() == [1 / 2, (1 / 4 + 1 / 8) / 2]


def test_seeds_of_other_splits_are_refused(tmp_path):
    one = write_ranks(tmp_path / "1.parquet", {"id_only": [1, 2]}, "ab", "xy")
    other = write_ranks(tmp_path / "2.parquet", {"id_only": [1, 2]}, "ab", "xz")
    with pytest.raises(UserError, match=r"2.parquet: user 'b' has another target"):
        SeedMeans.read([one, other])
    strangers = write_ranks(tmp_path / "3.parquet", {"id_only": [1, 2]}, "cd", "xy")
    with pytest.raises(UserError, match="no user was ranked in all of"):
        SeedMeans.read([one, strangers])


def test_the_page_has_every_finished_run_and_names_every_other(path):
    runs = load_sweep(path).runs
    for run in runs[:2]:
        finish(run, RANKS[run.seed])
    made = page(path)
    figures = rows_of(made, "Figures")
    assert [row[:2] for row in figures] == [
        ["plain", "ID model"],
        ["plain", "RA-Rec (per layer)"],
        ["plain", "text only + ID"],
        ["plain", "RA-Rec (per layer) + ID"],
    ]
    assert [cell.split()[0] for cell in figures[0][2:6]] == [".6250", ".7500", ".3951", ".3325"]
    assert figures[0][6:] == ["4", "2"]
    pairs = {row[1]: row[2] for row in rows_of(made, "Paired differences")}
    assert pairs["RA-Rec (per layer) + ID minus ID model"].startswith("+.3750 (")
    assert pairs["RA-Rec (per layer) + ID minus text only + ID"].startswith("+.2500 (")
    assert "- `share/shards.share=0.5/seed-17` is not finished: shards is next" in made
    assert "- `share/shards.share=0.01/seed-17` is not finished: shards is next" in made


def test_a_run_of_which_a_seed_is_missing_says_so(path):
    finish(load_sweep(path).runs[0], RANKS[17])
    made = page(path)
    assert rows_of(made, "Figures")[0][6:] == ["4", "1 of 2"]
    assert "- `plain/seed-18` is not finished: prepare is next" in made


def test_nothing_finished_and_no_evaluation_are_told(path):
    assert page(path).count("No run is finished.") == 3
    path.write_text(SWEEP + "stages: [prepare, ids]\n")
    with pytest.raises(UserError, match=r"sweep.yaml: `stages` lacks evaluate"):
        page(path)


def test_figures_of_altered_files_are_refused(path):
    run = load_sweep(path).runs[0]
    finish(run, RANKS[17])
    write_ranks(run.directory / "evaluation" / "ranks.parquet", RANKS[18])
    with pytest.raises(UserError, match=r"ranks.parquet is missing or altered"):
        page(path)


def test_a_run_that_is_gone_is_told_from_what_was_kept_of_it(path):
    for run in load_sweep(path).runs:
        finish(run, RANKS[17])
    made = page(path)
    shutil.rmtree("all")
    assert page(path) == made
    assert "Every run of the sweep is finished." in made


def test_what_is_kept_names_no_user_and_no_item(path):
    users, items = [f"customer-{one}" for one in "abcd"], [f"article-{one}" for one in "wxyz"]
    finish(load_sweep(path).runs[0], RANKS[17], users=users, targets=items)
    page(path)
    for file in Path("results").rglob("*.*"):
        assert not any(text in file.read_bytes() for text in (b"customer", b"article"))
    table = pq.read_table("results/sweep/plain/seed-17/ranks.parquet")
    assert len(set(table["user"].to_pylist())) == 4
    assert table["rank"].to_pylist() == [rank for ranks in RANKS[17].values() for rank in ranks]


def test_what_was_kept_of_other_settings_is_not_shown(path):
    for at in (0, 2):
        finish(load_sweep(path).runs[at], RANKS[17])
    page(path)
    path.write_text(SWEEP.replace("plain: {}", "plain: {train.lr: 0.5}"))
    made = page(path)
    assert "| share/shards.share=0.5 | ID model |" in made
    assert "| plain |" not in made
    assert "- `plain/seed-17` is not finished: train is next; what is kept of it was made with other settings:" in made
    assert "variants.per_layer.train.lr: 0.002 -> 0.5" in made


def test_what_was_kept_of_other_vectors_is_not_shown(path):
    entry = "plain: {ids: {model: import, imported: {items: a.npy, item_ids: ids.txt}}}"
    path.write_text(SWEEP.replace("plain: {}", entry))
    finish(load_sweep(path).runs[0], RANKS[17])
    page(path)
    shutil.rmtree("all")
    assert "No run is finished." not in page(path)
    path.write_text(SWEEP.replace("plain: {}", entry.replace("a.npy", "b.npy")))
    with pytest.raises(UserError, match=r'imported.id: \["a.npy", "ids.txt", null, null\] -> \["b.npy"'):
        page(path)


def test_tables_are_not_replaced_by_none_since_the_settings_have_changed(path):
    finish(load_sweep(path).runs[0], RANKS[17])
    page(path)
    path.write_text(SWEEP.replace("plain: {}", "plain: {train.lr: 0.5}"))
    with pytest.raises(
        UserError, match=r"none of its runs is finished.*variants\.per_layer\.train\.lr: 0\.002 -> 0\.5"
    ):
        page(path)


def test_a_field_that_came_after_a_run_was_kept_counts_as_its_default(path):
    finish(load_sweep(path).runs[0], RANKS[17])
    made = page(path)
    shutil.rmtree("all")
    kept = Path("results/sweep/plain/seed-17")
    settings = read_manifest(kept, "results")["settings"]
    del settings["alignment"]["missing"]
    write_manifest(kept, "results", settings=settings, made_from={})
    assert rows_of(page(path), "Figures") == rows_of(made, "Figures")
    write_manifest(kept, "results", settings=settings | {"gone": 1}, made_from={})
    with pytest.raises(UserError, match=r"manifest\.json: unknown field `gone`"):
        page(path)


@pytest.mark.parametrize("file", ["run.json", "ranks.parquet", "manifest.json"])
def test_what_was_kept_and_is_altered_is_refused(path, file):
    finish(load_sweep(path).runs[0], RANKS[17])
    page(path)
    shutil.rmtree("all")
    Path("results/sweep/plain/seed-17", file).write_text("{}")
    with pytest.raises(UserError, match=file) as told:
        page(path)
    assert "fetch it again" in told.value.remedy


def test_each_run_tells_how_it_was_made(path):
    stage = {"seconds": 30.4, "hardware": "Some CPU, 2 cores", "ranks": 1, "version": "0.1.0"}
    record = {
        "train": {**stage, "commit": "0123456789abcdef0123-dirty"},
        "evaluate": {**stage, "seconds": 1200.0, "commit": "0123456789abcdef0123-dirty", "ranks": 2},
    }
    record["evaluate"]["earlier"] = [{**stage, "commit": "abcdef0123456789"}]
    first, second = load_sweep(path).runs[:2]
    finish(first, RANKS[17], record)
    finish(second, RANKS[18])
    rows = rows_of(page(path), "How it was made")
    assert rows[0] == [
        "plain/seed-17",
        "`rarec sweep sweep.yaml --only plain/seed-17`",
        "`0123456789ab-dirty`, `abcdef012345`",
        "Some CPU, 2 cores, Some CPU, 2 cores x 2",
        "prepare shared, ids shared, shards shared, train 30 s, evaluate 1,200 s",
        "text only: 2, 1,500; RA-Rec (per layer): 2, 1,500",
    ]
    assert rows[1][2:4] == ["not recorded"] * 2
    assert rows[1][4].endswith("train not recorded, evaluate not recorded")


def test_a_page_of_its_own_has_the_tables_where_its_markers_stand(path):
    for run in load_sweep(path).runs:
        finish(run, RANKS[17])
    Path("sweep.md").write_text("## Mine\n\nBy hand.\n\n<!-- results: differences -->\n\nAnd so it is.\n")
    made = page(path)
    assert "## Mine" in made
    assert "## sweep" not in made
    hand, rest = made.split("And so it is.")
    assert "minus ID model" in hand
    assert "minus ID model" not in rest
    assert [line for line in rest.splitlines() if line.startswith("#")] == [
        "### Figures",
        "### HR@100 by who hits; behind the comma, by the fusion as well",
        "### Curves",
        "### Missing",
        "### How it was made",
    ]
    Path("sweep.md").write_text("<!-- results: figure -->")
    with pytest.raises(UserError, match=r"sweep.md: there is no block `figure`"):
        page(path)


def test_figures_in_the_running_text_are_those_of_the_tables(path):
    for run, ranks in zip(load_sweep(path).runs[:3], (RANKS[17], RANKS[18], RANKS[18]), strict=True):
        finish(run, ranks)
    Path("other.yaml").write_text(SWEEP.replace("dir: all", "dir: others"))
    finish(load_sweep(Path("other.yaml")).runs[0], {**RANKS[17], "id_only": [200] * 4})
    page(Path("other.yaml"))
    cited = ["plain:id_only hr@10", "plain:id_only hr@10 mean", "plain:id_only - per_layer+id mrr"]
    cited += ["other:plain:id_only - plain:id_only hr@100", "share/shards.share=0.5:id_only - plain:id_only hr@10 mean"]
    Path("sweep.md").write_text("".join(f"- {{{{{one}}}}}, so.\n" for one in cited))
    made = page(path)
    found = [line.removeprefix("- ").removesuffix(", so.") for line in made.splitlines()[:40] if line.endswith(", so.")]
    table = {tuple(row[:2]): row for row in rows_of(made, "Figures")}
    assert found[0] == table["plain", "ID model"][2]
    assert found[1] == ".6250"
    assert found[2].startswith("\N{MINUS SIGN}66.8 (")  # 1.33 of 4 less than four firsts
    assert found[3].startswith("\N{MINUS SIGN}75.0 (")  # seed 17 alone is in both
    assert found[4] == "25.0"  # three quarters, and by that seed of the other a half


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ("hr@10", "not a figure"),
        ("plan:id_only hr@10", "there is no finished run `plan`"),
        ("plain:id hr@10", "there is no variant `id`"),
        ("plain:id_only - text_onyl+id hr@10", r"there is no variant `text_onyl\+id`"),
        ("plain:id_only hr@11", "there is no metric `hr@11`"),
        ("others:plain:id_only hr@10", r"others.yaml"),
    ],
)
def test_a_figure_that_there_is_not_is_refused(path, asked, told):
    finish(load_sweep(path).runs[0], RANKS[17])
    Path("sweep.md").write_text(f"It is {{{{{asked}}}}}.")
    with pytest.raises(UserError, match=told):
        page(path)


def test_runs_are_compared_with_the_one_called_base_over_the_users_that_both_ranked(path):
    Path("sweep.yaml").write_text(SWEEP.replace("plain: {}", "base: {}\n  plain: {}"))
    runs = {run.label: run for run in load_sweep(path).runs}
    finish(runs["base/seed-17"], RANKS[17])
    assert "Against the base" not in page(path)
    finish(runs["plain/seed-17"], {"per_layer": [20, 2, 2, 2, 1], "id_only": [1] * 5}, users="dabce", targets="zwxyv")
    ((difference, variant, hits, *_, users, seeds),) = rows_of(page(path), "Against the base")
    assert (difference, variant, users, seeds) == ("plain minus base", "RA-Rec (per layer)", "4", "1")
    assert hits.startswith("−.2500 ")  # d alone is lost, and e stands in one of them only


def test_a_page_names_another_run_that_the_others_are_compared_with(path):
    runs = {run.label: run for run in load_sweep(path).runs}
    for label in ("plain/seed-17", "share/shards.share=0.5/seed-17", "share/shards.share=0.01/seed-17"):
        finish(runs[label], RANKS[17])
    Path("sweep.md").write_text("<!-- results: against share/shards.share=0.5 -->\n\n<!-- results: figures -->")
    table = page(path).split("| run |")[0]
    assert "| plain minus share/shards.share=0.5 |" in table
    assert "| share/shards.share=0.01 minus share/shards.share=0.5 |" in table
    Path("sweep.md").write_text("<!-- results: against share/shards.share=5 -->")
    with pytest.raises(UserError, match=r"sweep.md: sweep.yaml has no run `share/shards.share=5`"):
        page(path)


def test_runs_are_compared_over_the_seeds_that_both_have(path):
    path.write_text(SWEEP.replace("plain: {}", "base: {}\n  plain: {}"))
    runs = {run.label: run for run in load_sweep(path).runs}
    for label, seed in (("base/seed-17", 17), ("base/seed-18", 18), ("plain/seed-18", 18)):
        finish(runs[label], RANKS[seed])
    ((*_, hits, _, _, _, users, seeds), _) = rows_of(page(path), "Against the base")
    assert hits == "+.0000 (+.0000 to +.0000)"  # the same ranks; the mean over both seeds would be another
    assert (users, seeds) == ("4", "1")


@pytest.mark.parametrize(
    ("other", "why"),
    [
        ({"targets": "wxyy"}, "other test targets"),
        ({"users": "efgh"}, "no test user in common"),
    ],
)
def test_runs_on_other_targets_or_users_are_not_compared_and_the_page_says_why(path, other, why):
    path.write_text(SWEEP.replace("plain: {}", "base: {}\n  plain: {}"))
    runs = {run.label: run for run in load_sweep(path).runs}
    finish(runs["base/seed-17"], RANKS[17])
    finish(runs["plain/seed-17"], RANKS[17], **other)
    assert rows_of(page(path), "Against the base")[0][2] == f"not compared: {why}"


def test_runs_without_a_seed_in_common_are_not_compared(path):
    path.write_text(SWEEP.replace("plain: {}", "base: {}\n  plain: {}"))
    runs = {run.label: run for run in load_sweep(path).runs}
    finish(runs["base/seed-17"], RANKS[17])
    finish(runs["plain/seed-18"], RANKS[18])
    assert rows_of(page(path), "Against the base")[0][2] == "not compared: no seed in common"


def test_the_fusion_of_the_first_run_is_compared_with_that_of_a_run_with_another_main_variant(path):
    path.write_text(
        SWEEP.replace("plain: {}", "plain: {}\n  text: {train.variants: [text_only], export.variant: text_only}")
    )
    runs = {run.label: run for run in load_sweep(path).runs}
    for seed in (17, 18):
        finish(runs[f"plain/seed-{seed}"], RANKS[seed])
        finish(runs[f"text/seed-{seed}"], {"id_only": [9] * 4, "text_only": [9] * 4, "text_only+id": [1, 1, 1, 20]})
    last = rows_of(page(path), "Paired differences")[-1]
    assert last[:2] == ["plain, text", "RA-Rec (per layer) + ID minus text only + ID"]
    assert last[2].startswith("+.2500 ")
    assert last[-2:] == ["4", "2"]


def test_strata_are_those_of_each_seed_of_the_first_run(path):
    def row(variant: str, bucket: str, value: float, metric: str = "hr@100") -> dict[str, Any]:
        place = {"variant": variant, "stratum": "popularity", "bucket": bucket, "order": 0, "metric": metric}
        return {**place, "value": value, "low": value - 0.1, "high": value + 0.1, "n": 30}

    both = [row(variant, bucket, 0.5) for variant in ("id_only", "per_layer") for bucket in ("0-3", "4-9")]
    first, second, *_ = load_sweep(path).runs
    finish(first, RANKS[17], strata=[*both, row("id_only", "0-3", 0.9, "hr@10")])
    finish(second, RANKS[18], strata=[row(variant, "0-3", 0.1) for variant in ("id_only", "per_layer")])
    shown = rows_of(page(path), "By history and popularity")
    cells = [".5000 (.4000 to .6000)", ".5000 (.4000 to .6000)", "30"]
    assert shown[:2] == [["plain/seed-17", f"popularity {bucket}", *cells] for bucket in ("0-3", "4-9")]
    assert [row[:2] for row in shown[2:]] == [["plain/seed-18", "popularity 0-3"]]


def test_hits_are_told_by_who_has_them_and_what_the_fusion_makes_of_them(path):
    first, *_ = load_sweep(path).runs
    finish(first, {"id_only": [1, 1, 999, 999], "per_layer": [1, 999, 2, 999], "per_layer+id": [1, 999, 2, 50]})
    ((*_, either, both, ids, own, neither, users),) = rows_of(
        page(path), "HR@100 by who hits; behind the comma, by the fusion as well"
    )
    assert (either, both) == (".7500, .5000", ".2500, .2500")
    assert (ids, own, neither) == (".2500, .0000", ".2500, .2500", ".2500, .2500")
    assert users == "4"


def test_a_grid_over_one_field_is_drawn_the_same_each_time(path):
    pytest.importorskip("matplotlib")
    *_, first, second = load_sweep(path).runs
    finish(first, RANKS[17])
    assert not list(Path().rglob("*.svg"))
    finish(second, RANKS[18])
    assert "![HR@100 over shards.share: share](results/sweep/shards.share.svg)" in page(path)
    drawn = Path("results/sweep/shards.share.svg").read_text()
    for text in ("shards.share", "HR@100", "ID model", "RA-Rec (per layer) + ID", "dasharray"):
        assert text in drawn
    page(path)
    assert Path("results/sweep/shards.share.svg").read_text() == drawn


def test_a_grid_over_lists_is_drawn_with_each_as_it_is_written_and_joins_none(path):
    pytest.importorskip("matplotlib")
    path.write_text(SWEEP.replace("grid: {shards.share: [0.5, 0.01]}", "grid: {train.blocks: [[0], [0, 1]]}"))
    for run in load_sweep(path).runs[2:]:
        finish(run, RANKS[17])
    page(path)
    drawn = Path("results/sweep/train.blocks.svg").read_text()
    assert "[0]" in drawn
    assert "[0, 1]" in drawn
    assert "dasharray" not in drawn, "no line of a fusion"


def test_grids_over_the_same_field_are_drawn_together(path):
    pytest.importorskip("matplotlib")
    text = path.read_text()
    entry = "\n  other: {grid: {shards.share: [1.0, 0.5]}, shards.denoise: true}\n"
    path.write_text(text.rstrip("\n") + entry)
    for run, ranks in zip((run for run in load_sweep(path).runs if run.grid), cycle(RANKS.values()), strict=False):
        finish(run, ranks)
    assert "![HR@100 over shards.share: share, other](results/sweep/shards.share.svg)" in page(path)
    drawn = Path("results/sweep/shards.share.svg").read_text()
    assert [drawn.count(f">{label}<") for label in ("ID model", "share", "share + ID", "other", "other + ID")] == [
        1
    ] * 5


def test_the_tool_makes_its_section_anew_and_keeps_the_others(path, monkeypatch):
    from make_results import main

    for run in load_sweep(path).runs:
        finish(run, RANKS[17])
    monkeypatch.setattr(sys, "argv", ["make_results.py", "sweep.yaml"])
    main()
    made = Path("RESULTS.md").read_text()
    assert made.startswith("# Results\n")
    assert "Made by `python tools/make_results.py sweep.yaml`" in made
    theirs = "\n<!-- sweep: other -->\n\n## Others, by hand\n\nFrom elsewhere.\n"
    head, own = made.split("\n<!-- sweep: sweep -->\n")
    Path("RESULTS.md").write_text("old head\n" + theirs + "\n<!-- sweep: sweep -->\n\nold\n")
    main()
    contents = "- [sweep](#sweep)\n"
    assert head.endswith("\n\n" + contents)
    head = head.removesuffix(contents) + "- [Others, by hand](#others-by-hand)\n" + contents
    assert Path("RESULTS.md").read_text() == head + theirs + "\n<!-- sweep: sweep -->\n" + own


def test_a_page_by_another_hand_is_left_alone(path, monkeypatch):
    from make_results import main

    Path("RESULTS.md").write_text("# My results\n")
    monkeypatch.setattr(sys, "argv", ["make_results.py", "sweep.yaml"])
    with pytest.raises(UserError, match="another hand"):
        main()
    assert Path("RESULTS.md").read_text() == "# My results\n"


def test_the_projects_own_page_has_the_text_of_its_sweeps():
    _, *pairs = re.split(r"<!-- sweep: (.+) -->", (ROOT / "RESULTS.md").read_text())
    sections = dict(zip(pairs[::2], pairs[1::2], strict=True))
    pages = {page.stem: page.read_text() for page in (ROOT / "configs" / "sweeps").glob("*.md")}
    assert sections.keys() == pages.keys()
    for name, text in pages.items():
        parts = re.split(r"<!-- results: .+? -->|{{.+?}}", text.strip())
        made = r"[\s\S]*?".join(re.escape(part.strip("\n")) for part in parts)
        assert re.search(made, sections[name]), f"make the section of {name} again"
