"""A whole run on the small world: its files and tables, what stages refuse, the bundle's scores."""

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml

import rarec
from rarec.config.ids import FOLD
from rarec.entry import open_run
from rarec.errors import UserError
from rarec.ids.source import open_source
from rarec.models.encode import Encoder
from rarec.planning.setup import Cluster
from rarec.ranking.rank import VectorScores, rank_scores
from rarec.stages import STAGES
from rarec.stages.run import Run
from rarec.stages.shard_content import verify
from rarec.stages.train import plan
from rarec.stages.variant_training import open_feed
from rarec.storage.artefacts import IDENTITY, read_manifest, read_sealed, write_manifest, write_sealed
from rarec.storage.files import read_json
from rarec.training.batches import Collator
from tests.recommending import recommend

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def run(finished: Path) -> Run:
    return open_run(finished, [])


def test_metrics_carry_variant_protocol_interval_and_n(run):
    rows = read_json(run.directory("evaluate") / "metrics.json")
    variants = {row["variant"] for row in rows}
    assert {"id_only", "text_only", "per_layer", "text_only+id", "per_layer+id"} <= variants
    assert {"id_only+cheap", "text_only+id+cheap", "per_layer+id+cheap"} <= variants
    assert {"per_layer/shuffled_history", "per_layer/permuted_ids"} <= variants
    for row in rows:
        assert set(row) == {"variant", "metric", "protocol", "value", "low", "high", "n"}
        if row["metric"] == "coverage@10":  # of all users together
            assert (row["low"], row["high"]) == (None, None)
        else:
            assert row["low"] <= row["value"] <= row["high"]
        assert (row["protocol"], row["n"]) == ("full", 60)


def test_ranks_hold_one_row_a_user_and_variant_and_agree_with_the_metrics(run):
    ranks = pq.read_table(run.directory("evaluate") / "ranks.parquet")
    assert {"variant", "user", "place", "target", "rank"} == set(ranks.column_names)
    rows = ranks.to_pylist()
    own = [row for row in rows if row["variant"] == "per_layer"]
    assert sorted(row["user"] for row in own) == sorted(f"u{number:03d}" for number in range(60))
    values = {(r["variant"], r["metric"]): r["value"] for r in read_json(run.directory("evaluate") / "metrics.json")}
    assert values["per_layer", "hr@10"] == pytest.approx(np.mean([row["rank"] <= 10 for row in own]))
    last = run.dataset.sequence(0)[-1]
    assert own[0]["target"] == str(run.dataset.item_ids[int(last)])


def test_paired_comparisons_are_differences_of_the_same_users(run):
    values = {(r["variant"], r["metric"]): r["value"] for r in read_json(run.directory("evaluate") / "metrics.json")}
    rows = read_json(run.directory("evaluate") / "comparisons.json")
    assert {(row["variant"], row["baseline"]) for row in rows} >= {
        ("per_layer", "id_only"),
        ("per_layer+id", "text_only+id"),
        ("per_layer+id+cheap", "text_only+id+cheap"),
        ("per_layer+id+cheap", "id_only+cheap"),
    }
    for row in rows:
        expected = values[row["variant"], row["metric"]] - values[row["baseline"], row["metric"]]
        assert row["difference"] == pytest.approx(expected, abs=1e-12)
        assert row["low"] <= row["difference"] <= row["high"]


def test_the_report_is_one_file_that_needs_nothing_else(run):
    page = (run.directory("report") / "report.html").read_text()
    assert "RA-Rec" in page
    assert "<svg" in page
    assert 'src="http' not in page
    assert 'href="http' not in page


def test_every_stage_leaves_what_is_done_alone(run, finished):
    before = {path: path.stat().st_mtime_ns for path in run.root.rglob("manifest.json")}
    for name in STAGES:
        assert not open_run(finished).make(name)
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_the_resolved_configuration_is_that_of_the_last_command(finished, tmp_path):
    """Even if nothing is built: a sweep reads there which settings a run was made with."""
    shutil.copytree(open_run(finished).root, tmp_path / "run")
    again = open_run(finished, [f"run.dir={tmp_path / 'run'}", "report.examples=1"])
    assert not again.make("prepare")
    assert yaml.safe_load(again.config_file.read_text())["report"]["examples"] == 1


def test_a_stage_whose_input_is_missing_names_the_command_to_type(finished, tmp_path):
    for name, needs in {"ids": "rarec prepare", "shards": "rarec prepare", "train": "rarec shards"}.items():
        with pytest.raises(UserError, match=needs):
            open_run(finished, [f"run.dir={tmp_path / name}"]).make(name)


def test_id_dropout_leaves_out_vectors_by_sample(finished, tmp_path):
    """The sample decides, not its batch, so the result does not depend on how batches are split."""
    run = open_run(finished, [f"run.dir={tmp_path}", "alignment.id_dropout=0.5"])
    run.run(["prepare", "ids", "shards"])
    model = open_run(finished, []).stage("train", "per_layer").best_model()
    shards = run.directory("shards")
    states = np.load(shards / "item_states.npy", mmap_mode="r")
    collate = Collator(model, run.prompts, [run.sources], states, id_dropout=0.5)
    stored = open_feed(run).samples
    samples = [stored[number] for number in range(len(stored))]
    bare = (collate(samples, len(samples)).items.vectors["id"] == 0).all(-1).squeeze(1)
    assert 0.3 < bare.float().mean() < 0.7
    alone = [bool((collate([sample], 1).items.vectors["id"] == 0).all()) for sample in samples]
    assert alone == bare.tolist()
    whole = Collator(model, run.prompts, [run.sources], states, id_dropout=0.0)(samples, len(samples))
    assert (whole.items.vectors["id"] != 0).any(-1).all()


@pytest.mark.slow
def test_a_variant_without_slots_in_the_model_goes_the_whole_way(finished, tmp_path):
    """From its shards to a bundle that recommends; there are no slots to diagnose."""
    run = open_run(finished, [f"run.dir={tmp_path}", "train.variants=[readout]", "export.variant=readout"])
    run.run()
    rows = read_json(run.directory("evaluate") / "metrics.json")
    assert {"readout", "readout+id", "readout/permuted_ids"} <= {row["variant"] for row in rows}
    assert not (run.directory("evaluate") / "diagnostics.json").exists()
    assert len(recommend(run, "u001", 5)) == 5
    calculator = plan(run, Cluster.of(1, 1, None, "H100"), "0").calculator
    assert calculator.slots("readout") == {"user": 0, "item": 0}
    assert calculator.meta_model("readout", False).first_grad_block is None


@pytest.mark.slow
def test_the_papers_choices_go_the_whole_way(finished, tmp_path):
    """`configs/runs/paper.yaml` as it is shipped, over the small world's log and language model."""
    shipped = yaml.safe_load((ROOT / "configs" / "runs" / "paper.yaml").read_text())
    small = yaml.safe_load(finished.read_text())
    mine = {name: small[name] for name in ("prepare", "llm")} | {"run": {"dir": str(tmp_path / "run")}}
    (tmp_path / "paper.yaml").write_text(yaml.safe_dump({**shipped, **mine}))
    short = ["ids.comirec.dim=8", "ids.comirec.epochs=1", "train.epochs=1", "train.validation_users=20"]
    run = open_run(tmp_path / "paper.yaml", [*short, "evaluate.resamples=50", "shards.share=0.3"])
    run.run()
    variants = {row["variant"] for row in read_json(run.directory("evaluate") / "metrics.json")}
    assert {"text_only", "prefix_only", "input", "per_layer"} <= variants
    assert read_json(run.directory("train", "text_only") / "manifest.json")["step"] == 0
    assert read_json(run.directory("train", "per_layer") / "manifest.json")["step"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["llara_input", "e4srec_input", "llmsrec"])
def test_a_preset_goes_the_whole_way(finished, tmp_path, preset):
    """Its shards are checked, its training resumes nothing, and its bundle recommends."""
    overrides = [f"run.dir={tmp_path}", f"preset={preset}", "lora.targets=[query]", "export.variant=null"]
    run = open_run(finished, overrides)
    run.run()
    assert "all samples match" in verify(run, deep=True)
    main = run.config.main_variant
    assert "id@titles" in run.build_model(main).user.slots
    metrics = run.metrics().set_index(["variant", "metric"]).value
    assert metrics[main.name, "hr@10"] > 0  # of 40 items: items that are all the same would tie behind all others
    assert len(recommend(run, str(run.dataset.user_ids[0]), 3)) == 3
    losses = [json.loads(line) for line in (run.directory("train", main.name) / "log.jsonl").read_text().splitlines()]
    distilled = [line["distil"] for line in losses if "loss" in line]
    assert (min(distilled) > 0) == (preset == "llmsrec")


def test_new_items_are_ranked_by_their_text(finished, tmp_path):
    """They have no ID vector and still differ, and the strata count them."""
    overrides = [f"run.dir={tmp_path}", "prepare.split.new_items=0.2", "train.variants=[text_only,per_layer]"]
    run = open_run(finished, overrides)
    run.run(["prepare", "ids", "neighbours", "shards", "train", "evaluate"])
    new = np.flatnonzero(run.dataset.train_counts_N == 0)
    assert len(new) > 2
    assert (run.sources["id"].items_NE[new] == 0).all()
    encoder = Encoder(run.stage("train", "per_layer").best_model(), run.prompts, run.sources, 16)
    items_NZ = encoder.items()
    assert len(np.unique(items_NZ[new].round(4), axis=0)) == len({run.dataset.titles[row] for row in new})
    rows = [row for row in read_json(run.directory("evaluate") / "strata.json") if row["stratum"] == "met in training"]
    asked = {row["bucket"]: row["n"] for row in rows if row["variant"] == "per_layer" and row["metric"] == "hr@10"}
    targets = run.dataset.targets("test").item_rows
    assert asked == {"0": np.isin(targets, new).sum(), "1": (~np.isin(targets, new)).sum()}


def test_ranks_of_another_system_become_a_variant_of_the_report(run, finished, tmp_path):
    """The file holds the ranks of the ID model, so both figures must be equal; another file needs a new evaluation."""
    root = shutil.copytree(run.root, tmp_path / "run")
    ranks = run.ranks()
    own = ranks[ranks["variant"] == "id_only"].sample(frac=1, random_state=0)
    own[["user", "rank"]].to_parquet(tmp_path / "llara.parquet")
    again = open_run(finished, [f"run.dir={root}", f"evaluate.external={{llara: {tmp_path}/llara.parquet}}"])
    again.make("evaluate", fresh=True)
    values = again.metrics().set_index(["variant", "metric"])["value"]
    assert values["external:llara", "mrr"] == values["id_only", "mrr"]
    pairs = set(again.comparisons()[["variant", "baseline"]].itertuples(index=False, name=None))
    assert {("per_layer", "external:llara"), ("per_layer+id", "external:llara")} <= pairs
    assert "external:llara" in {row["variant"] for row in read_json(again.directory("evaluate") / "strata.json")}
    again.make("report")
    assert "llara (external)" in (again.directory("report") / "report.html").read_text()
    own[["user", "rank"]].assign(rank=1).to_parquet(tmp_path / "llara.parquet")
    with pytest.raises(UserError, match="external/llara"):
        again.make("evaluate")


def other_manifest(directory: Path, kind: str, **made_from: str) -> None:
    """Change what an artefact was made from, as if it came from another run: settings and files stay the same."""
    manifest = read_manifest(directory, kind)
    made_from = {**manifest["made_from"], **made_from}
    figures = {name: value for name, value in manifest.items() if name not in (*IDENTITY, "hash")}
    write_manifest(
        directory, kind, settings=manifest["settings"], made_from=made_from, files=manifest["files"], **figures
    )


@pytest.mark.parametrize("stage", ["evaluate", "export", "report"])
def test_an_evaluation_belongs_to_its_training(run, finished, tmp_path, stage):
    """Other weights get neither its figures nor a card nor a report with them."""
    root = shutil.copytree(run.root, tmp_path / "run")
    other_manifest(root / "train" / "per_layer", "train", another="run")
    with pytest.raises(UserError, match="made from another per_layer"):
        open_run(finished, [f"run.dir={root}"]).make(stage)


def test_another_checkpoint_does_not_take_the_place_of_the_best(run, finished, tmp_path):
    """Whether the manifest names another step, or another checkpoint was put in its place."""
    other = open_run(finished, [f"run.dir={shutil.copytree(run.root, tmp_path / 'run')}"]).stage("train", "per_layer")
    steps, best = other.checkpoints().steps(), other.require()["best_step"]
    newest = next(step for step in reversed(steps) if step != best)
    manifest = other.directory / "manifest.json"
    whole = read_sealed(manifest, "")
    write_sealed(manifest, {**whole, "best_step": newest})
    with pytest.raises(UserError, match=f"{newest:08d}") as error:
        other.best_model()
    assert "rarec train CONFIG --fresh" in error.value.remedy
    write_sealed(manifest, whole)
    shutil.rmtree(other.checkpoints().path(best))
    shutil.copytree(other.checkpoints().path(newest), other.checkpoints().path(best))
    with pytest.raises(UserError, match=f"{best:08d}"):
        other.best_model()


def test_an_evaluation_belongs_to_its_baseline(run, finished, tmp_path):
    root = shutil.copytree(run.root, tmp_path / "run")
    other_manifest(root / "evaluation", "evaluate", baseline="another")
    with pytest.raises(UserError, match="made from another baseline"):
        open_run(finished, [f"run.dir={root}"]).make("evaluate")


def test_results_are_read_as_tables(finished):
    run = rarec.Run(finished)
    metrics, comparisons, ranks = run.metrics(), run.comparisons(), run.ranks()
    assert list(metrics) == ["variant", "metric", "protocol", "value", "low", "high", "n"]
    assert set(comparisons) == {*metrics, "baseline", "difference", "differing"} - {"value"}
    assert set(ranks) == {"variant", "user", "place", "target", "rank"}
    told = metrics.astype(object).where(metrics.notna(), None)  # a table has NaN where coverage has no interval
    assert told.to_dict("records") == read_json(run.directory("evaluate") / "metrics.json")
    value = metrics.set_index(["variant", "metric"]).loc[("per_layer", "mrr"), "value"]
    assert value == pytest.approx((1 / ranks.query("variant == 'per_layer'")["rank"]).mean())


@pytest.mark.parametrize("table", ["metrics", "comparisons", "ranks"])
def test_results_of_other_settings_or_of_no_evaluation_are_refused(finished, tmp_path, table):
    with pytest.raises(UserError, match=r"evaluate\.resamples: 200 -> 50"):
        getattr(rarec.Run(finished, ["evaluate.resamples=50"]), table)()
    with pytest.raises(UserError, match="rarec train CONFIG"):
        getattr(rarec.Run(finished, [f"run.dir={tmp_path}"]), table)()


def test_a_sample_reads_the_vectors_of_the_model_that_has_not_seen_it(finished, tmp_path):
    """User, titles and item alike; each batch is of one part of the users, and the evaluation reads `id`."""
    run = open_run(finished, [f"run.dir={tmp_path}", "ids.holdout=0.01", "ids.folds=2", "train.variants=[per_layer]"])
    run.run(["prepare", "ids", "neighbours", "shards", "train", "evaluate"])
    dataset, feed = run.dataset, open_feed(run)
    models = [open_source(run.directory("ids", f"{FOLD}{fold}")) for fold in range(2)]
    assert len({source.hash for source in (*models, run.sources["id"])}) == 3
    states = np.load(run.directory("shards") / "item_states.npy", mmap_mode="r")
    collate = Collator(
        run.build_model(run.config.main_variant), run.prompts, run.sample_sources, states, id_dropout=0.0
    )
    numbers = []
    for batch in feed.plan().batches(0):
        samples = feed.samples.read(batch)
        fold = samples[0].user % 2
        assert {sample.user % 2 for sample in samples} == {fold}
        targets = np.array([sample.target for sample in samples])
        items_BE = collate(samples, len(samples)).items.vectors["id"][:, 0].numpy()
        assert np.array_equal(items_BE, models[fold].items_NE[targets])
        for sample in samples:
            assert sample.position == dataset.train_length_U[sample.user] - 1
            history = dataset.history(sample.user, sample.position)
            expected_KE = models[fold].user_vectors(np.array([sample.user]), [history])[0]
            assert np.allclose(sample.vectors["id"], expected_KE, atol=1e-5)
        numbers += batch.tolist()
    assert sorted(numbers) == list(range(len(feed.samples)))
    targets = dataset.targets("test")
    rows = zip(targets.user_rows, targets.positions, strict=True)
    histories = [dataset.history(int(user), int(position)) for user, position in rows]
    users = run.sources["id"].user_vectors(targets.user_rows, histories)
    expected = rank_scores(VectorScores(users, run.sources["id"].items_NE), targets.item_rows, histories)
    ranks = pq.read_table(run.directory("evaluate") / "ranks.parquet").to_pylist()
    assert [row["rank"] for row in ranks if row["variant"] == "id_only"] == expected.tolist()
