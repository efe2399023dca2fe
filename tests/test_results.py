"""Results of sweeps: figures computed by hand, intervals over users of their means over seeds, current pages."""

import json
import math
import re
import shutil
from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rarec.cluster.definition import SweepRun, load_sweep
from rarec.config import dump_config
from rarec.errors import UserError
from rarec.evaluation.rows import comparison_rows, metric_rows
from rarec.ranking.metrics import mean_intervals, paired_intervals
from rarec.stages.run import Run
from rarec.storage.artefacts import write_manifest, write_sealed
from rarec.storage.files import sha256_file, write_json, write_text
from tools.collect_results import collect, read_ranks, settings_of
from tools.make_results import Pages, main
from tools.results_figures import Figures
from tools.results_site import on_page_markdown
from tools.results_statistics import SeedMeans

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
    file: Path, ranks: Mapping[str, Sequence[int]], users: str = "abcd", targets: Sequence[str] = "wxyz"
) -> Path:
    rows = [
        {"variant": variant, "user": user, "place": users[: at + 1].count(user), "target": targets[at], "rank": rank}
        for variant, own in ranks.items()
        for at, (user, rank) in enumerate(zip(users, own, strict=True))
    ]
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), file)
    return file


def finish(
    run: SweepRun,
    ranks: Mapping[str, Sequence[int]],
    record: Mapping[str, Any] | None = None,
    strata: Any = None,
    **split: Sequence[str],
) -> None:
    """A run with the files that finished stages leave, its ranks made by hand."""
    opened = Run(run.config)
    write_text(opened.config_file, dump_config(run.config))
    for stage in opened.all_stages(("prepare", "ids", "neighbours", "shards", "train", "evaluate")):
        figures = {"step": 2, "best_step": 2, "seconds": 1.0} if stage.name == "train" else {}
        if stage.name == "train":
            lines = [f'{{"step": {step}, "loss": 1.0, "samples": {count}}}\n' for step, count in ((1, 1000), (2, 500))]
            write_text(stage.directory / "log.jsonl", "".join(lines))
            figures["log"] = sha256_file(stage.directory / "log.jsonl")
        if stage.name == "evaluate":
            write_ranks(stage.directory / "ranks.parquet", ranks, **split)
            write_json(stage.directory / "metrics.json", [])
            write_json(stage.directory / "strata.json", strata or [])
        stage.directory.mkdir(parents=True, exist_ok=True)
        made_from = {name: each.hash for name, each in stage.inputs().items()}
        write_manifest(stage.directory, stage.kind, settings=stage.settings(), made_from=made_from, **figures)
    if record is not None:
        write_sealed(opened.record_file, record)


@pytest.fixture
def path(tmp_path, monkeypatch) -> Path:
    """A sweep in the current directory of which nothing is made yet."""
    monkeypatch.chdir(tmp_path)
    Path("base.yaml").write_text(BASE)
    Path("sweep.yaml").write_text(SWEEP)
    return Path("sweep.yaml")


def collected(path: Path, *keep_ranks: str) -> dict[str, Any]:
    """Collect what is finished and read the sweep's file."""
    collect(load_sweep(path), Path("results"), keep_ranks)
    return json.loads(Path("results", f"{path.stem}.json").read_text())


def pages() -> dict[str, str]:
    return {page.as_posix(): text for page, text in Pages(Path()).texts.items()}


def page(path: Path) -> str:
    collected(path)
    return pages()[f"docs/results/{path.stem}.md"]


def words(text: str, name: str = "sweep.md") -> None:
    write_text(Path("results/text", name), text)


def rows_of(page: str, heading: str) -> list[list[str]]:
    """Cells of the table under a heading, without its head."""
    part = page.split(f"## {heading}\n")[1].split("\n## ")[0]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in part.splitlines() if "|" in line][2:]


def ranks_of(ranks: Mapping[str, Sequence[int]], users: str = "abcd", targets: str = "wxyz") -> pd.DataFrame:
    """Return the ranks of a seed as they are read from its file, with the users' names."""
    return pd.DataFrame({"target": list(targets), **ranks}, index=list(users))


def test_a_figure_is_the_mean_over_users_of_their_means_over_seeds():
    means = SeedMeans.of({str(seed): ranks_of(ranks) for seed, ranks in RANKS.items()})
    intervals = mean_intervals(means.values["id_only"])
    assert (means.users.tolist(), means.left_out) == (list("abcd"), 0)
    assert [intervals[metric].mean for metric in HEADLINE] == pytest.approx(
        [2.5 / 4, 3 / 4, (1 + 1.5 / math.log2(6)) / 4, (1 + 1 / 8 + 1 / 200 + 1 / 5) / 4]
    )
    assert intervals["hr@10"] == mean_intervals({"hr@10": np.array([1, 0.5, 0, 1])})["hr@10"]
    differences = paired_intervals(means.values["per_layer+id"], means.values["id_only"])
    assert differences["mrr"] == mean_intervals({"mrr": 1 - np.array([1, 1 / 8, 1 / 200, 1 / 5])})["mrr"]


def test_one_seed_gives_the_figures_of_the_runs_own_metrics():
    ranks = {variant: np.array(own) for variant, own in RANKS[17].items()}
    values = SeedMeans.of({"17": ranks_of(RANKS[17])}).values
    for row in metric_rows(ranks, [10, 100], resamples=300, seed=17):
        interval = mean_intervals(values[row["variant"]], 300, 17)[row["metric"]]
        assert interval == (row["value"], row["low"], row["high"])
    pairs = [("per_layer+id", "id_only")]
    for row in comparison_rows(ranks, pairs, [10, 100], resamples=300, seed=17):
        interval = paired_intervals(*(values[name] for name in pairs[0]), 300, 17)[row["metric"]]
        assert interval == (row["difference"], row["low"], row["high"])


def test_seeds_are_paired_by_user_in_any_order_and_the_others_are_counted():
    seeds = {"1": ranks_of({"id_only": [1, 2, 4]}, "abc", "xyz"), "2": ranks_of({"id_only": [8, 2, 1]}, "cbe", "zyv")}
    means = SeedMeans.of(seeds)
    assert (means.users.tolist(), means.left_out) == (["b", "c"], 2)
    assert means.values["id_only"]["mrr"].tolist() == [1 / 2, (1 / 4 + 1 / 8) / 2]


@pytest.mark.parametrize(("users", "targets"), [("ab", "xz"), ("cd", "xy")])
def test_seeds_of_other_splits_are_refused(users, targets):
    seeds = {"1": ranks_of({"id_only": [1, 2]}, "ab", "xy"), "other": ranks_of({"id_only": [1, 2]}, users, targets)}
    with pytest.raises(UserError, match="other"):
        SeedMeans.of(seeds)


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
    missing = made.split("## Missing\n")[1]
    assert "`share/shards.share=0.5/seed-17`" in missing
    assert "`share/shards.share=0.01/seed-17`" in missing


def test_a_run_of_which_a_seed_is_missing_says_so(path):
    finish(load_sweep(path).runs[0], RANKS[17])
    made = page(path)
    assert rows_of(made, "Figures")[0][6:] == ["4", "1 of 2"]
    assert "`plain/seed-18` is not finished: prepare" in made


def test_a_sweep_without_finished_runs_or_evaluation_is_refused(path):
    with pytest.raises(UserError, match=r"sweep.yaml") as refused:
        collected(path)
    assert "rarec sweep sweep.yaml" in refused.value.remedy
    path.write_text(SWEEP + "stages: [prepare, ids]\n")
    with pytest.raises(UserError, match=r"sweep.yaml: `stages` lacks evaluate"):
        collected(path)


def test_figures_of_altered_files_are_refused(path):
    run = load_sweep(path).runs[0]
    finish(run, RANKS[17])
    write_ranks(run.directory / "evaluation" / "ranks.parquet", RANKS[18])
    with pytest.raises(UserError, match=r"ranks.parquet"):
        collected(path)


def test_every_pair_of_variants_is_kept_with_its_interval_in_both_directions(path):
    finish(load_sweep(path).runs[0], RANKS[17])
    kept = collected(path)["runs"]["plain"]
    assert len(kept["differences"]) == 6
    ranks = read_ranks(load_sweep(path).runs[0].directory / "evaluation" / "ranks.parquet")
    values, figures = SeedMeans.of({"17": ranks}).values, Figures(Path("results"))
    for left, right in (("id_only", "per_layer+id"), ("per_layer+id", "id_only")):
        expected = paired_intervals(values[left], values[right], 300, 17)["mrr"]
        difference = figures.difference("sweep", ("plain", left), ("plain", right), "mrr")
        assert difference == pytest.approx(expected, abs=1e-8)


def test_intervals_of_users_with_several_questions_are_over_the_users(path):
    """Ann has three of the four questions: a mean is of hers, of bob's, or of all."""
    run = load_sweep(path).runs[0]
    finish(run, {"id_only": [1, 1, 500, 500], "per_layer": [1, 1, 1, 1]}, users="aaab", targets="wxyz")
    figures = collected(path)["runs"]["plain"]["figures"]["id_only"]
    assert figures[:3] == pytest.approx([1 / 2, 0, 2 / 3])


def test_a_run_that_is_gone_keeps_its_figures_while_its_settings_are_the_same(path):
    runs = load_sweep(path).runs
    for run in runs:
        finish(run, RANKS[17])
    before = collected(path)
    for run in runs[1:]:
        shutil.rmtree(run.directory)
    path.write_text(SWEEP.replace("plain: {}", "plain: {export.variant: text_only}"))  # changes no figure
    assert collected(path) == before  # of `plain` one seed is left here, and the file has two


def test_a_run_whose_settings_have_changed_is_dropped_and_named(path):
    for number in (0, 2):
        finish(load_sweep(path).runs[number], RANKS[17])
    collected(path)
    path.write_text(SWEEP.replace("plain: {}", "plain: {train.lr: 0.5}"))
    (dropped,) = collect(load_sweep(path), Path("results"))
    assert dropped.startswith("dropped plain")
    kept = json.loads(Path("results/sweep.json").read_text())
    assert list(kept["runs"]) == ["share/shards.share=0.5"]
    assert "plain/seed-17" in kept["missing"]


def test_a_run_collected_without_another_is_not_compared_with_what_is_kept_of_it(path):
    runs = load_sweep(path).runs
    for run in runs:
        finish(run, RANKS[17])
    collected(path)
    for run in runs[:3]:
        shutil.rmtree(run.directory)
    pairs = collected(path)["across"]
    half, hundredth = "share/shards.share=0.5", "share/shards.share=0.01"
    assert "differences" in pairs[f"plain - {half}"]
    assert "not_compared" in pairs[f"plain - {hundredth}"]
    assert "not_compared" in pairs[f"{half} - {hundredth}"]


def test_what_is_kept_names_no_user_and_no_item(path):
    users, items = [f"customer-{user}" for user in "abcd"], [f"article-{item}" for item in "wxyz"]
    finish(load_sweep(path).runs[0], RANKS[17], users=users, targets=items)
    collected(path, "plain")
    for file in Path("results").rglob("*.*"):
        assert not any(text in file.read_bytes() for text in (b"customer", b"article"))
    table = pq.read_table("results/sweep.plain.parquet")
    assert len(set(table["user"].to_pylist())) == 4
    assert sorted(table["id_only@17"].to_pylist()) == sorted(RANKS[17]["id_only"])


def test_ranks_of_two_seeds_are_kept_user_by_user(path):
    first, second, *_ = load_sweep(path).runs
    finish(first, RANKS[17])
    finish(second, {name: ranks[::-1] for name, ranks in RANKS[18].items()}, users="dcba", targets="zyxw")
    collected(path, "plain")
    table = pq.read_table("results/sweep.plain.parquet").to_pylist()
    pairs = sorted((row["id_only@17"], row["id_only@18"]) for row in table)
    assert pairs == sorted(zip(RANKS[17]["id_only"], RANKS[18]["id_only"], strict=True))
    with pytest.raises(UserError, match="--ranks"):
        collected(path, "plan")


def test_ranks_of_a_run_that_stays_as_it_was_are_not_begun_with_some_of_its_seeds(path):
    """Another machine has both seeds: with the ranks of one alone, they could not be put together later."""
    first, second, *_ = load_sweep(path).runs
    finish(first, RANKS[17])
    finish(second, RANKS[18])
    collected(path)
    shutil.rmtree(second.directory)
    for keep in (["plain"], []):
        assert collected(path, *keep)["runs"]["plain"]["seeds"] == [17, 18]
        assert not Path("results/sweep.plain.parquet").exists()


def test_seeds_of_several_machines_come_together_where_their_ranks_are_kept(path):
    first, second, *_ = load_sweep(path).runs
    finish(first, RANKS[17])
    finish(second, RANKS[18])
    whole = collected(path, "plain")
    shutil.rmtree("results")
    shutil.move(second.directory, "elsewhere")
    collected(path, "plain")
    shutil.rmtree(first.directory)
    shutil.move("elsewhere", second.directory)
    both = collected(path)
    assert both["runs"]["plain"]["seeds"] == [17, 18]
    for name, figures in whole["runs"]["plain"]["figures"].items():
        assert both["runs"]["plain"]["figures"][name][::3] == figures[::3]  # means; intervals are of other resamples
    assert {f"id_only@{seed}" for seed in (17, 18)} < set(pq.read_table("results/sweep.plain.parquet").column_names)


def test_each_run_shows_how_it_was_made(path):
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
        "`0123456789ab-dirty`, `abcdef012345`",
        "Some CPU, 2 cores, Some CPU, 2 cores x 2",
        "prepare shared, ids shared, neighbours shared, shards shared, train 30 s, evaluate 1,200 s",
        "text only: 2, 1,500; RA-Rec (per layer): 2, 1,500",
    ]
    assert rows[1][1:3] == ["not recorded"] * 2
    assert rows[1][3].endswith("train not recorded, evaluate not recorded")


def test_the_page_lists_the_settings_of_each_run(path):
    for run in load_sweep(path).runs:
        finish(run, RANKS[17])
    rows = rows_of(page(path), "Runs")
    assert rows[0] == ["plain", "nothing", "2"]
    assert rows[1] == ["share/shards.share=0.5", "`shards.share: 0.5`", "1"]


def test_the_words_of_a_sweep_have_the_tables_where_their_markers_are(path):
    for run in load_sweep(path).runs:
        finish(run, RANKS[17])
    words("# Mine\n\nBy hand.\n\n<!-- results: differences -->\n\nThe end.\n")
    made = page(path)
    hand, rest = made.split("The end.")
    assert "# Mine" in hand
    assert "minus ID model" in hand
    assert "minus ID model" not in rest
    titles = [line for line in rest.splitlines() if line.startswith("#")]
    assert titles == ["## Runs", "## Figures", "## Who hits", "## Curves", "## How it was made"]
    words("<!-- results: figure -->")
    with pytest.raises(UserError, match=r"sweep.md.*`figure`"):
        pages()


def test_figures_in_the_text_are_those_of_the_tables(path):
    for run, ranks in zip(load_sweep(path).runs[:3], (RANKS[17], RANKS[18], RANKS[18]), strict=True):
        finish(run, ranks)
    Path("other.yaml").write_text(SWEEP.replace("dir: all", "dir: others"))
    finish(load_sweep(Path("other.yaml")).runs[0], {**RANKS[17], "id_only": [200] * 4})
    collected(Path("other.yaml"))
    cited = ["plain:id_only hr@10", "plain:id_only hr@10 mean", "plain:id_only - per_layer+id mrr"]
    cited += ["other:plain:id_only hr@100 mean", "share/shards.share=0.5:id_only - plain:id_only hr@10 mean"]
    cited += ["plain:id_only hr@10,hr@100 mean", "plain users", "plain seeds"]
    words("".join(f"- {{{{{figure}}}}}, so.\n" for figure in cited))
    made = page(path)
    shown = [line.removeprefix("- ").removesuffix(", so.") for line in made.splitlines()[:40] if line.endswith(", so.")]
    table = {tuple(row[:2]): row for row in rows_of(made, "Figures")}
    assert shown[0] == table["plain", "ID model"][2]
    assert shown[1] == ".6250"
    assert shown[2].startswith("\N{MINUS SIGN}66.8 (")  # 1.33 of 4 less than four firsts
    assert shown[3] == ".0000"
    assert shown[4] == "25.0"  # three quarters, and by that seed of the other a half
    assert shown[5:] == [".6250 | .7500", "4", "2"]


@pytest.mark.parametrize(
    ("figure", "named"),
    [
        ("hr@10", "hr@10"),
        ("plan:id_only hr@10", "run `plan`"),
        ("plain:id hr@10", "variant `id`"),
        ("plain:id_only - text_onyl+id hr@10", r"variant `text_onyl\+id`"),
        ("plain:id_only - plan:id_only hr@10", "run `plan`"),
        ("plain:id_only hr@11", "metric `hr@11`"),
        ("plain:id_only hr@100 in popularity 7", "stratum `popularity 7`"),
        ("plain:id_only mrr in popularity 7", "mrr"),
        ("others:plain:id_only hr@10", "sweep `others`"),
        ("plain:id_only - other:plain:id_only hr@10", "two sweeps"),
    ],
)
def test_an_unknown_figure_is_refused_with_what_is_wrong(path, figure, named):
    finish(load_sweep(path).runs[0], RANKS[17], strata=[stratum("id_only", "0-3", 0.5)])
    collected(path)
    shutil.copy("results/sweep.json", "results/other.json")
    words(f"It is {{{{{figure}}}}}.")
    with pytest.raises(UserError, match=named):
        pages()


@pytest.mark.parametrize("name", ["sweep.md", "RESULTS.md", "blocks/table.md", "README.md"])
def test_an_unknown_figure_is_refused_with_file_and_placeholder(path, name):
    finish(load_sweep(path).runs[0], RANKS[17])
    collected(path)
    figure = "{{sweep:plan:id_only hr@10}}"
    if name == "README.md":
        Path(name).write_text(f"It is <!-- results: {figure} --><!-- /results -->.")
    else:
        words(f"It is {figure}.", name)
    if name.startswith("blocks"):
        words("<!-- results: table -->", "RESULTS.md")
    with pytest.raises(UserError) as refused:
        pages()
    assert name in refused.value.problem
    assert figure in refused.value.problem


def test_runs_are_compared_with_the_one_called_base_over_the_users_that_both_ranked(path):
    Path("sweep.yaml").write_text(SWEEP.replace("plain: {}", "base: {}\n  plain: {}"))
    runs = {run.label: run for run in load_sweep(path).runs}
    finish(runs["base/seed-17"], RANKS[17])
    assert "Against the base" not in page(path)
    finish(runs["plain/seed-17"], {"per_layer": [20, 2, 2, 2, 1], "id_only": [1] * 5}, users="dabce", targets="zwxyv")
    ((difference, variant, hits, *_, users, seeds),) = rows_of(page(path), "Against the base")
    assert (difference, variant, users, seeds) == ("plain minus base", "RA-Rec (per layer)", "4", "1")
    assert hits.startswith("−.2500 ")  # d alone is lost, and e is in one of them only


def test_the_words_name_another_run_that_the_others_are_compared_with(path):
    runs = {run.label: run for run in load_sweep(path).runs}
    for label in ("plain/seed-17", "share/shards.share=0.5/seed-17", "share/shards.share=0.01/seed-17"):
        finish(runs[label], RANKS[17])
    words("<!-- results: against share/shards.share=0.5 -->\n\n<!-- results: figures -->")
    table = page(path).split("| run |")[0]
    assert "| plain minus share/shards.share=0.5 |" in table
    assert "| share/shards.share=0.01 minus share/shards.share=0.5 |" in table
    words("<!-- results: against share/shards.share=5 -->")
    with pytest.raises(UserError, match=r"sweep.md.*`share/shards.share=5`"):
        pages()


def test_runs_are_compared_over_the_seeds_that_both_have(path):
    path.write_text(SWEEP.replace("plain: {}", "base: {}\n  plain: {}"))
    runs = {run.label: run for run in load_sweep(path).runs}
    for label, seed in (("base/seed-17", 17), ("base/seed-18", 18), ("plain/seed-18", 18)):
        finish(runs[label], RANKS[seed])
    ((*_, hits, _, _, _, users, seeds), _) = rows_of(page(path), "Against the base")
    assert hits == "+.0000 (+.0000 to +.0000)"  # the same ranks; the mean over both seeds would be another
    assert (users, seeds) == ("4", "1")


@pytest.mark.parametrize(
    ("seed", "other", "why"),
    [
        (17, {"targets": "wxyy"}, "target"),
        (17, {"users": "efgh"}, "user"),
        (18, {}, "seed"),
    ],
)
def test_runs_with_other_targets_users_or_seeds_are_not_compared_and_the_page_says_why(path, seed, other, why):
    path.write_text(SWEEP.replace("plain: {}", "base: {}\n  plain: {}"))
    runs = {run.label: run for run in load_sweep(path).runs}
    finish(runs["base/seed-17"], RANKS[17])
    finish(runs[f"plain/seed-{seed}"], RANKS[seed], **other)
    cell = rows_of(page(path), "Against the base")[0][2]
    assert cell.startswith("not compared")
    assert why in cell
    words("{{plain:per_layer - base:per_layer hr@10}}")
    with pytest.raises(UserError, match=why):
        pages()


def test_the_fusion_of_the_first_run_is_compared_with_that_of_a_run_with_another_main_variant(path):
    path.write_text(SWEEP.replace("plain: {}", "plain: {}\n  text: {train.variants: [text_only]}"))
    runs = {run.label: run for run in load_sweep(path).runs}
    for seed in (17, 18):
        finish(runs[f"plain/seed-{seed}"], RANKS[seed])
        finish(runs[f"text/seed-{seed}"], {"id_only": [9] * 4, "text_only": [9] * 4, "text_only+id": [1, 1, 1, 20]})
    last = rows_of(page(path), "Paired differences")[-1]
    assert last[:2] == ["plain, text", "RA-Rec (per layer) + ID minus text only + ID"]
    assert last[2].startswith("+.2500 ")
    assert last[-2:] == ["4", "2"]


def stratum(variant: str, bucket: str, value: float, metric: str = "hr@100") -> dict[str, Any]:
    place = {"variant": variant, "stratum": "popularity", "bucket": bucket, "order": 0, "metric": metric}
    return {**place, "value": value, "low": value - 0.1, "high": value + 0.1, "n": 30}


def test_strata_are_those_of_each_seed_of_the_first_run(path):
    both = [stratum(variant, bucket, 0.5) for variant in ("id_only", "per_layer") for bucket in ("0-3", "4-9")]
    first, second, third, _ = load_sweep(path).runs
    finish(first, RANKS[17], strata=[*both, stratum("id_only", "0-3", 0.9, "hr@10")])
    finish(second, RANKS[18], strata=[stratum(variant, "0-3", 0.1) for variant in ("id_only", "per_layer")])
    finish(third, RANKS[17], strata=both)
    single, several = "share/shards.share=0.5:id_only", "plain:id_only"
    words(f"# A\n\n{{{{{single} hr@100 in popularity 4-9}}}}; {{{{{several} hr@100 in popularity 0-3}}}}\n")
    made = page(path)
    shown = rows_of(made, "By history and popularity")
    cells = [".5000 (.4000 to .6000)", ".5000 (.4000 to .6000)", "30"]
    assert shown[:2] == [["plain/seed-17", f"popularity {bucket}", *cells] for bucket in ("0-3", "4-9")]
    assert [row[:2] for row in shown[2:]] == [["plain/seed-18", "popularity 0-3"]]
    assert ".5000 (.4000 to .6000); .3000\n" in made  # several seeds: their mean


def test_what_the_slots_add_by_stratum_is_drawn(path):
    first, second, *_ = load_sweep(path).runs
    row = "per_layer+id - text_only+id"
    finish(first, RANKS[17], strata=[stratum(row, bucket, 0.02) for bucket in ("0-3", "4-9")])
    finish(second, RANKS[18], strata=[stratum(row, "0-3", 0.01)])
    words(
        f"<!-- strata plot: gain sweep:plain:{row} -->\n{{{{sweep:plain:{row} hr@100 in popularity 0-3 mean}}}}\n",
        "RESULTS.md",
    )
    collected(path)
    made = pages()["RESULTS.md"]
    assert "![HR@100 of RA-Rec (per layer) + ID minus text only + ID by stratum](docs/results/gain.svg)" in made
    assert "\n1.5\n" in made  # points of the mean of two seeds
    drawn = pages()["docs/results/gain.svg"]
    assert all(text in drawn for text in ("popularity", "0-3", "4-9"))
    words("<!-- strata plot: gain sweep:plain:per_layer - text_only -->", "RESULTS.md")
    with pytest.raises(UserError, match=r"RESULTS\.md: strata plot gain: .*per_layer - text_only"):
        pages()


def test_hits_are_counted_by_who_has_them_and_by_what_the_fusion_keeps(path):
    first, *_ = load_sweep(path).runs
    finish(first, {"id_only": [1, 1, 999, 999], "per_layer": [1, 999, 2, 999], "per_layer+id": [1, 999, 2, 50]})
    ((*_, either, both, ids, own, neither, users),) = rows_of(page(path), "Who hits")
    assert (either, both) == (".7500, .5000", ".2500, .2500")
    assert (ids, own, neither) == (".2500, .0000", ".2500, .2500", ".2500, .2500")
    assert users == "4"


def test_a_grid_over_one_field_is_drawn_the_same_each_time(path):
    *_, first, second = load_sweep(path).runs
    finish(first, RANKS[17])
    assert "svg" not in page(path)
    finish(second, RANKS[18])
    assert "](sweep.shards.share.svg)" in page(path)
    drawn = pages()["docs/results/sweep.shards.share.svg"]
    for text in ("shards.share", "HR@100", "ID model", "share + ID", "dasharray"):
        assert text in drawn
    assert pages()["docs/results/sweep.shards.share.svg"] == drawn


def test_a_grid_over_lists_is_drawn_with_each_value_and_joins_none(path):
    path.write_text(SWEEP.replace("grid: {shards.share: [0.5, 0.01]}", "grid: {train.blocks: [[0], [0, 1]]}"))
    for run in load_sweep(path).runs[2:]:
        finish(run, RANKS[17])
    collected(path)
    drawn = pages()["docs/results/sweep.train.blocks.svg"]
    assert "[0]" in drawn
    assert "[0, 1]" in drawn
    assert "dasharray" not in drawn, "no line of a fusion"


def test_grids_over_the_same_field_are_drawn_together(path):
    text = path.read_text()
    entry = "\n  other: {grid: {shards.share: [1.0, 0.5]}, shards.denoise: true}\n"
    path.write_text(text.rstrip("\n") + entry)
    for run, ranks in zip((run for run in load_sweep(path).runs if run.grid), cycle(RANKS.values()), strict=False):
        finish(run, ranks)
    collected(path)
    drawn = pages()["docs/results/sweep.shards.share.svg"]
    assert [drawn.count(f">{label}<") for label in ("ID model", "share", "share + ID", "other", "other + ID")] == [
        1
    ] * 5


def test_a_picture_shows_the_figures_that_a_text_lists(path):
    finish(load_sweep(path).runs[0], RANKS[17])
    collected(path)
    words("<!-- plot: best hr@10\nID model = sweep:plain:id_only\nRA-Rec = sweep:plain:per_layer\n-->", "RESULTS.md")
    made = pages()
    assert "](docs/results/best.svg)" in made["RESULTS.md"]
    assert all(f">{label}<" in made["docs/results/best.svg"] for label in ("ID model", "RA-Rec"))
    words("<!-- plot: best hr@10\nID model = sweep:plan:id_only\n-->", "RESULTS.md")
    with pytest.raises(UserError, match=r"RESULTS.md.*best.*`plan`"):
        pages()


def test_the_readme_is_filled_between_its_markers_and_nowhere_else(path):
    finish(load_sweep(path).runs[0], RANKS[17])
    collected(path)
    words("| a |\n| --- |\n| {{sweep:plain:per_layer hr@10 mean}} |", "blocks/table.md")
    figure = "{{{{sweep:plain:id_only hr@10 mean}}}}"  # doubled for `format`
    text = (
        "Top\n\n<!-- results: table -->{}<!-- /results -->\n\n.1 and <!-- results: "
        + figure
        + " -->{}<!-- /results -->\n"
    )
    Path("README.md").write_text(text.format("old\n", ".9"))
    filled = pages()["README.md"]
    assert filled == text.format("\n| a |\n| --- |\n| 1.0000 |\n", ".5000")
    Path("README.md").write_text(filled)
    assert pages()["README.md"] == filled
    Path("README.md").write_text("<!-- results: table -->\n")
    with pytest.raises(UserError, match=r"README.md") as refused:
        pages()
    assert "<!-- /results -->" in refused.value.remedy


def test_the_command_collects_and_writes_only_what_has_changed(path, capsys):
    for run in load_sweep(path).runs:
        finish(run, RANKS[17])
    main(["collect", "sweep.yaml"])
    assert "docs/results/sweep.md" in capsys.readouterr().out
    assert Path("docs/results/sweep.md").read_text() == pages()["docs/results/sweep.md"]
    main([])
    assert capsys.readouterr().out == ""


def test_the_projects_own_pages_are_those_that_the_tool_makes():
    import matplotlib

    remedy = "run: python -m tools.make_results"
    for page, text in Pages(ROOT).texts.items():
        assert (ROOT / page).exists(), f"{page}: {remedy}"
        committed = (ROOT / page).read_text()
        if page.suffix == ".svg" and f"Matplotlib v{matplotlib.__version__}" not in committed:
            continue  # another version draws other bytes
        assert committed == text, f"{page}: {remedy}"


def test_the_projects_own_results_are_short_and_small():
    assert len((ROOT / "RESULTS.md").read_text().splitlines()) <= 300
    assert sum(file.stat().st_size for file in (ROOT / "results").rglob("*")) < 6 * 2**20


def test_the_projects_own_results_are_of_the_runs_that_its_sweeps_name():
    for file in (ROOT / "results").glob("*.json"):
        planned = {
            run.name: settings_of(run) for run in load_sweep(ROOT / "configs" / "sweeps" / f"{file.stem}.yaml").runs
        }
        kept = json.loads(file.read_text())["runs"]
        assert {name: run["settings"] for name, run in kept.items()} == {name: planned.get(name) for name in kept}


def test_the_projects_own_words_have_no_typed_figures_but_those_with_a_source():
    for file in (ROOT / "results" / "text").rglob("*.md"):
        for line in re.sub(r"\{\{.+?\}\}", "", file.read_text()).splitlines():
            assert "http" in line or not re.search(r"\.\d{3,4}\b", line), f"{file.name}: {line}"


def test_the_headlines_ranks_give_its_figures():
    kept = json.loads((ROOT / "results" / "beauty.json").read_text())
    run, table = kept["runs"]["headline"], pq.read_table(ROOT / "results" / "beauty.headline.parquet")
    assert table.num_rows == run["users"]
    for variant, values in run["figures"].items():
        hits = [np.mean(table[f"{variant}@{seed}"].to_numpy() <= 100) for seed in run["seeds"]]
        assert np.mean(hits) == pytest.approx(values[3 * kept["metrics"].index("hr@100")], abs=1e-8)


def test_links_of_the_projects_own_pages_lead_somewhere():
    pages = [ROOT / "RESULTS.md", *(ROOT / "docs").glob("results*.md"), *(ROOT / "docs" / "results").glob("*.md")]
    for page in [*pages, ROOT / "docs" / "experiments.md"]:
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            assert target.startswith("http") or (page.parent / target).exists(), f"{page}: {target}"


def test_the_site_shows_the_page_with_links_from_its_own_place():
    def shown(source: str, text: str) -> str:
        return on_page_markdown(text, page=SimpleNamespace(file=SimpleNamespace(src_uri=source)))

    for target in re.findall(r"\]\(([^)#]+)\)", shown("results.md", "")):
        assert target.startswith("http") or (ROOT / "docs" / target).exists(), target
    assert shown("results/beauty.md", "[Summary](../../RESULTS.md)") == "[Summary](../results.md)"
    assert shown("experiments.md", "[Results](../RESULTS.md)") == "[Results](results.md)"
