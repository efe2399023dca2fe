"""A whole run on the small world: what it leaves, that stages resume and refuse, the bundle's scores."""

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from huggingface_hub import ModelCard

from rarec.artefacts import read_manifest, write_manifest
from rarec.config import VARIANTS
from rarec.entry import open_run
from rarec.errors import UserError
from rarec.files import read_json
from rarec.models.encode import Encoder
from rarec.models.weights import save_weights
from rarec.planning.cluster import Cluster
from rarec.ranking import rank_targets
from rarec.serving.bundle import load_bundle, model_card
from rarec.stages.export import provenance, recommend
from rarec.stages.plan import plan
from rarec.stages.run import Run
from rarec.stages.shard_content import ShardContent
from rarec.stages.train import open_feed, open_stream
from rarec.training.loader import Collator

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def context(finished: Path) -> Run:
    return open_run(finished, [])


def test_metrics_carry_variant_protocol_interval_and_n(context):
    rows = read_json(context.directory("evaluate") / "metrics.json")
    variants = {row["variant"] for row in rows}
    assert {"id_only", "text_only", "per_layer", "text_only+id", "per_layer+id"} <= variants
    assert {"id_only+popularity", "text_only+id+popularity", "per_layer+id+popularity"} <= variants
    assert {"per_layer/shuffled_history", "per_layer/permuted_ids"} <= variants
    for row in rows:
        assert set(row) == {"variant", "metric", "protocol", "value", "low", "high", "n"}
        assert row["low"] <= row["value"] <= row["high"]
        assert (row["protocol"], row["n"]) == ("full", 60)


def test_ranks_hold_one_row_a_user_and_variant_and_agree_with_the_metrics(context):
    ranks = pq.read_table(context.directory("evaluate") / "ranks.parquet")
    assert {"variant", "user", "target", "rank"} == set(ranks.column_names)
    rows = ranks.to_pylist()
    own = [row for row in rows if row["variant"] == "per_layer"]
    assert sorted(row["user"] for row in own) == sorted(f"u{number:03d}" for number in range(60))
    values = {
        (r["variant"], r["metric"]): r["value"] for r in read_json(context.directory("evaluate") / "metrics.json")
    }
    assert values["per_layer", "hr@10"] == pytest.approx(np.mean([row["rank"] <= 10 for row in own]))
    last = context.dataset.sequence(0)[-1]
    assert own[0]["target"] == str(context.dataset.item_ids[int(last)])


def test_paired_comparisons_are_differences_of_the_same_users(context):
    values = {
        (r["variant"], r["metric"]): r["value"] for r in read_json(context.directory("evaluate") / "metrics.json")
    }
    rows = read_json(context.directory("evaluate") / "comparisons.json")
    assert {(row["variant"], row["baseline"]) for row in rows} >= {
        ("per_layer", "id_only"),
        ("per_layer+id", "text_only+id"),
        ("per_layer+id+popularity", "text_only+id+popularity"),
        ("per_layer+id+popularity", "id_only+popularity"),
    }
    for row in rows:
        expected = values[row["variant"], row["metric"]] - values[row["baseline"], row["metric"]]
        assert row["difference"] == pytest.approx(expected, abs=1e-12)
        assert row["low"] <= row["difference"] <= row["high"]


def test_the_report_is_one_file_that_needs_nothing_else(context):
    page = (context.directory("report") / "report.html").read_text()
    assert "RA-Rec" in page
    assert "<svg" in page
    assert 'src="http' not in page
    assert 'href="http' not in page


def test_the_bundle_holds_what_was_trained_and_no_pickle(context):
    names = {
        path.relative_to(context.directory("export")).as_posix()
        for path in context.directory("export").rglob("*")
        if path.is_file()
    }
    assert names == {"alignment.safetensors", "manifest.json", "prompt.yaml", "README.md"}
    manifest = read_manifest(context.directory("export"), "bundle")
    assert {"prepare", "catalogue", "ids/id", "llm", "prompt"} <= set(manifest["made_from"])
    assert {"name", "revision", "config_sha256", "fingerprint"} <= set(manifest["llm"])
    assert manifest["trainable_parameters"] > 0
    assert any(row["metric"] == "ndcg@10" for row in manifest["metrics"])
    card = (context.directory("export") / "README.md").read_text()
    assert f"{manifest['trainable_parameters']:,}" in card
    assert "{" not in card
    assert ModelCard(card).data.base_model == manifest["llm"]["name"]


@pytest.mark.parametrize(
    ("variant", "said"),
    [
        ("text_only", ["no slots"]),
        ("prefix_only", ["2 contextual instructions", "blocks 0, 1"]),
        ("input", ["2 contextual instructions", "vectors of id", "block 0"]),
        ("readout", ["vectors of id", "readout"]),
    ],
)
def test_a_model_card_says_what_the_variant_has(context, variant, said):
    manifest = read_manifest(context.directory("export"), "bundle")
    config = open_run(context.config_file, ["train.blocks=[0,1]"]).config
    card = model_card(VARIANTS[variant], config, {**manifest, "sources": ["id"]})
    training = card[card.index("## Training") : card.index("## Evaluation")]
    assert [part for part in said if part not in training] == []


def vectors(context: Run, model) -> tuple[np.ndarray, np.ndarray]:
    encoder = Encoder(model, context.prompts, context.sources, 16)
    rows = np.arange(10)
    return encoder.users(rows, [context.dataset.sequence(int(row)) for row in rows]), encoder.items()


def test_a_reloaded_bundle_gives_the_same_scores_exactly(context, finished, tmp_path):
    moved = shutil.copytree(context.directory("export"), tmp_path / "elsewhere")
    other = open_run(finished, [])
    loaded = load_bundle(moved, other.config, other.load_llm, provenance(other), other.prompts.sources)
    users, items = vectors(context, context.stage("train", "per_layer").best_model())
    again_users, again_items = vectors(other, loaded)
    assert np.array_equal(users @ items.T, again_users @ again_items.T)


def test_a_bundle_of_half_precision_is_smaller_and_scores_nearly_the_same(context, finished, tmp_path):
    half = open_run(finished, [f"run.dir={shutil.copytree(context.root, tmp_path / 'run')}", "export.dtype=float16"])
    shutil.rmtree(half.directory("export"))
    half.make("export")
    sizes = [(of.directory("export") / "alignment.safetensors").stat().st_size for of in (context, half)]
    trained = read_manifest(half.directory("export"), "bundle")["trainable_parameters"]
    assert sizes[0] - sizes[1] == pytest.approx(2 * trained, abs=500)  # of names and shapes
    loaded = load_bundle(half.directory("export"), half.config, half.load_llm, provenance(half), half.prompts.sources)
    assert {parameter.dtype for parameter in loaded.user.parameters()} == {torch.float32}
    for whole, again in zip(
        vectors(context, context.stage("train", "per_layer").best_model()), vectors(half, loaded), strict=True
    ):
        assert not np.array_equal(whole, again)
        assert np.linalg.norm(whole - again) < 0.01 * np.linalg.norm(whole)


def test_what_half_precision_cannot_hold_is_refused(context, tmp_path):
    model = context.stage("train", "per_layer").best_model()
    model.item.readout.heads["text"].bias.data[0] = 1e5
    with pytest.raises(UserError, match=r"item\.readout\.heads\.text\.bias overflows float16"):
        save_weights(model, tmp_path, dtype=torch.float16)
    assert not any(tmp_path.iterdir())


def test_a_bundle_refuses_another_base_model_and_altered_files(context, finished, tmp_path):
    from tests.synthetic import write_llm

    other = write_llm(tmp_path / "llm", "bert", seed=3)
    with pytest.raises(UserError, match="bundle") as error:
        recommend(open_run(finished, [f"llm.path={other}"]), "u001", 3)
    assert "set llm.path" in error.value.remedy
    moved = shutil.copytree(context.directory("export"), tmp_path / "bundle")
    (moved / "prompt.yaml").write_text("user: x\n")
    with pytest.raises(UserError, match=r"prompt\.yaml is missing or altered"):
        recommend(context, "u001", 3, moved)


def test_recommendations_are_new_to_the_user(context):
    best = recommend(context, "u001", 5)
    seen = {str(context.dataset.item_ids[int(item)]) for item in context.dataset.sequence(1)}
    assert len(best) == 5
    assert not seen & {item for item, _ in best}
    with pytest.raises(UserError, match="'nobody' is not in"):
        recommend(context, "nobody", 5)


def test_every_stage_leaves_what_is_done_alone(context, finished):
    before = {path: path.stat().st_mtime_ns for path in context.root.rglob("manifest.json")}
    for name, stage in STAGES.items():
        if name != "report":
            stage(open_run(finished, []))
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_the_resolved_configuration_is_that_of_the_last_command(finished, tmp_path):
    """Though nothing is made: a sweep asks there what a run was made with."""
    context = open_run(finished, [])
    shutil.copytree(context.root, tmp_path / "run")
    again = open_run(finished, [f"run.dir={tmp_path / 'run'}", "report.examples=1"])
    again.make("prepare")
    assert not again.made
    assert yaml.safe_load(again.config_file.read_text())["report"]["examples"] == 1


def test_a_stage_before_its_time_names_the_command_to_type(finished, tmp_path):
    for name, needs in {"ids": "rarec prepare", "shards": "rarec prepare", "train": "rarec shards"}.items():
        with pytest.raises(UserError, match=needs):
            open_run(finished, [f"run.dir={tmp_path / name}"]).make(name)


def test_some_samples_stand_without_their_items_vectors(finished, tmp_path):
    """Which ones, the sample decides, not its batch: so a fallback for new items is learned on any cut of a batch."""
    context = open_run(finished, [f"run.dir={tmp_path}", "alignment.id_dropout=0.5"])
    for stage in ("prepare", "ids", "shards"):
        context.make(stage)
    model = open_run(finished, []).stage("train", "per_layer").best_model()
    shards = context.directory("shards")
    states = np.load(shards / "item_states.npy", mmap_mode="r")
    collate = Collator(model, context.prompts, context.sources, states, id_dropout=0.5)
    samples = [
        sample
        for batch in open_stream(
            context, open_feed(context, context.stage("shards").require(outside=True)), np.array([], np.int64)
        ).epoch(0)
        for sample in batch
    ]
    bare = (collate(samples, len(samples)).items.vectors["id"] == 0).all(-1).squeeze(1)
    assert 0.3 < bare.float().mean() < 0.7
    alone = [bool((collate([sample], 1).items.vectors["id"] == 0).all()) for sample in samples]
    assert alone == bare.tolist()
    whole = Collator(model, context.prompts, context.sources, states, id_dropout=0.0)(samples, len(samples))
    assert (whole.items.vectors["id"] != 0).any(-1).all()


def test_an_variant_without_slots_in_the_model_goes_the_whole_way(finished, tmp_path):
    """From its shards to a bundle that recommends; there are no slots to diagnose."""
    context = open_run(finished, [f"run.dir={tmp_path}", "train.variants=[readout]", "export.variant=readout"])
    context.run()
    rows = read_json(context.directory("evaluate") / "metrics.json")
    assert {"readout", "readout+id", "readout/permuted_ids"} <= {row["variant"] for row in rows}
    assert not (context.directory("evaluate") / "diagnostics.json").exists()
    assert len(recommend(context, "u001", 5)) == 5
    calculator = plan(context, Cluster.of(1, 1, None, "H100"), "0").calculator
    assert calculator.slots("readout") == {"user": 0, "item": 0}
    assert calculator.meta_model("readout", False).first_grad_block is None


def test_the_papers_choices_go_the_whole_way(finished, tmp_path):
    """`configs/runs/paper.yaml` as it is shipped, over the small world's log and language model."""
    shipped = yaml.safe_load((ROOT / "configs" / "runs" / "paper.yaml").read_text())
    ours = yaml.safe_load(finished.read_text())
    mine = {name: ours[name] for name in ("prepare", "llm")} | {"run": {"dir": str(tmp_path / "run")}}
    (tmp_path / "paper.yaml").write_text(yaml.safe_dump({**shipped, **mine}))
    short = ["ids.comirec.dim=8", "ids.comirec.epochs=1", "train.epochs=1", "train.validation_users=20"]
    context = open_run(tmp_path / "paper.yaml", [*short, "evaluate.resamples=50", "shards.share=0.3"])
    context.run()
    variants = {row["variant"] for row in read_json(context.directory("evaluate") / "metrics.json")}
    assert {"text_only", "prefix_only", "input", "per_layer"} <= variants
    assert read_json(context.directory("train", "text_only") / "manifest.json")["step"] == 0
    assert read_json(context.directory("train", "per_layer") / "manifest.json")["step"] > 0


def test_new_items_are_ranked_by_their_text(finished, tmp_path):
    """No ID vector is theirs, and still they differ: and the strata tell how they fare."""
    overrides = [f"run.dir={tmp_path}", "prepare.split.new_items=0.2", "train.variants=[text_only,per_layer]"]
    context = open_run(finished, overrides)
    for stage in ("prepare", "ids", "shards", "train", "evaluate"):
        context.make(stage)
    new = np.flatnonzero(context.dataset.train_counts_N == 0)
    assert len(new) > 2
    assert (context.sources["id"].items_NE[new] == 0).all()
    encoder = Encoder(context.stage("train", "per_layer").best_model(), context.prompts, context.sources, 16)
    items_NZ = encoder.items()
    assert len(np.unique(items_NZ[new].round(4), axis=0)) == len({context.dataset.titles[row] for row in new})
    rows = [
        row for row in read_json(context.directory("evaluate") / "strata.json") if row["stratum"] == "met in training"
    ]
    asked = {row["bucket"]: row["n"] for row in rows if row["variant"] == "per_layer" and row["metric"] == "hr@10"}
    targets = context.dataset.targets("test").item_rows
    assert asked == {"0": np.isin(targets, new).sum(), "1": (~np.isin(targets, new)).sum()}


def test_ranks_of_another_system_become_a_variant_of_the_report(context, finished, tmp_path):
    """Here they are those of the ID model, so the two must be equal; another file needs another evaluation."""
    run = shutil.copytree(context.root, tmp_path / "run")
    ranks = pq.read_table(run / "evaluation" / "ranks.parquet").to_pandas()
    own = ranks[ranks["variant"] == "id_only"].sample(frac=1, random_state=0)
    own[["user", "rank"]].to_parquet(tmp_path / "llara.parquet")
    overrides = [f"run.dir={run}", f"evaluate.external={{llara: {tmp_path}/llara.parquet}}"]
    again = open_run(finished, overrides)
    again.fresh = True
    again.make("evaluate")
    values = {(r["variant"], r["metric"]): r["value"] for r in read_json(run / "evaluation" / "metrics.json")}
    assert values["external:llara", "mrr"] == values["id_only", "mrr"]
    pairs = {(r["variant"], r["baseline"]) for r in read_json(run / "evaluation" / "comparisons.json")}
    assert {("per_layer", "external:llara"), ("per_layer+id", "external:llara")} <= pairs
    assert "external:llara" in {row["variant"] for row in read_json(run / "evaluation" / "strata.json")}
    open_run(finished, overrides).make("report")
    assert "llara (external)" in (run / "report" / "report.html").read_text()
    own[["user", "rank"]].assign(rank=1).to_parquet(tmp_path / "llara.parquet")
    with pytest.raises(UserError, match="external/llara"):
        open_run(finished, overrides).make("evaluate")


@pytest.mark.parametrize("stage", ["evaluate", "export", "report"])
def test_an_evaluation_belongs_to_its_training(context, finished, tmp_path, stage):
    """Other weights get neither its figures nor a card nor a report with them."""
    run = shutil.copytree(context.root, tmp_path / "run")
    done = run / "train" / "per_layer" / "manifest.json"
    done.write_text(json.dumps({**read_json(done), "best_step": 999}))
    with pytest.raises(UserError, match="made from another per_layer"):
        open_run(finished, [f"run.dir={run}"]).make(stage)


def test_an_evaluation_belongs_to_its_rival(context, finished, tmp_path):
    run = shutil.copytree(context.root, tmp_path / "run")
    manifest = read_json(run / "evaluation" / "manifest.json")
    made_from = {**manifest["made_from"], "baseline": "another"}
    write_manifest(run / "evaluation", "evaluate", settings=manifest["settings"], made_from=made_from)
    with pytest.raises(UserError, match="made from another baseline"):
        open_run(finished, [f"run.dir={run}"]).make("evaluate")


def test_alignment_trains_on_what_its_id_vectors_have_not_seen(finished, tmp_path):
    """The slots' ID model is another than the baseline, and every sample's target was held out from it."""
    context = open_run(finished, [f"run.dir={tmp_path}", "ids.holdout=0.01", "train.variants=[per_layer]"])
    for stage in ("prepare", "ids", "shards", "train", "evaluate"):
        context.make(stage)
    dataset, samples = context.dataset, ShardContent(context).selection
    assert (samples.positions == dataset.train_length_U[samples.user_rows] - 1).all()
    assert context.baseline.hash != context.sources["id"].hash
    targets = dataset.targets("test")
    rows = zip(targets.user_rows, targets.positions, strict=True)
    histories = [dataset.history(int(user), int(position)) for user, position in rows]
    users = context.baseline.user_vectors(targets.user_rows, histories)
    expected = rank_targets(users, context.baseline.items_NE, targets.item_rows, histories)
    ranks = pq.read_table(context.directory("evaluate") / "ranks.parquet").to_pylist()
    assert [row["rank"] for row in ranks if row["variant"] == "id_only"] == expected.tolist()
