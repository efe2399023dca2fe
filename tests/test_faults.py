"""Faults on purpose: a run killed at its writes, a full disk, torn files, a configuration that changes midway."""

import resource
import shutil
import signal
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from rarec.console.last_resort import guarded
from rarec.entry import open_run
from rarec.errors import EXIT_CODE, UserError
from rarec.ranking.rank import EvalBatch
from rarec.ranking.rankers import VectorRanker
from rarec.stages import STAGES
from rarec.stages.shard_content import ShardContent
from rarec.storage.artefacts import read_manifest
from rarec.storage.directories import CHECKED, MARKER
from rarec.storage.files import read_json, temporary_path
from tests.processes import be_killed_at_rename, unfinish
from tests.ranks import START
from tests.recommending import recommend
from tests.synthetic import write_llm


@pytest.fixture
def copied(finished: Path, tmp_path: Path) -> str:
    """Copy the finished run; return the override that points to the copy."""
    shutil.copytree(run_directory(finished), tmp_path / "run")
    return f"run.dir={tmp_path / 'run'}"


def run_directory(config: Path) -> Path:
    return Path(open_run(config, []).config.run.dir)


def run_until(config: Path, overrides: list[str], renames: int, file_bytes: int) -> None:
    """Run all stages until this process is killed before its nth rename, or may not write so large a file."""
    torch.set_num_threads(1)
    sys.stderr = Path(overrides[0].removeprefix("run.dir=")).with_suffix(".stderr").open("w")
    be_killed_at_rename(renames)
    resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, resource.RLIM_INFINITY))

    guarded(lambda: open_run(config, overrides).run())


def outcome(config: Path, overrides: list[str], renames: int = -1, file_bytes: int = resource.RLIM_INFINITY) -> int:
    process = START.Process(target=run_until, args=(config, overrides, renames, file_bytes))
    process.start()
    process.join()
    assert process.exitcode is not None
    return process.exitcode


def identities(run: Path) -> dict[str, str]:
    """Return the hash of each artefact."""
    places = ("prepare", "ids/id", "shards", "train/per_layer", "evaluation", "bundle")
    return {place: read_json(run / place / "manifest.json")["hash"] for place in places}


def asides(run: Path) -> list[Path]:
    """Return the paths of what was begun and is not whole; locks stay by design."""
    return [path for path in run.rglob(".*") if path.suffix != ".lock" and path.name not in (MARKER, CHECKED)]


@pytest.mark.slow
def test_a_full_disk_and_many_kills_later_a_run_ends_as_one_that_met_none(finished, tmp_path):
    place, codes, renames = tmp_path / "run", [], 12
    for limit in (3_000, 200_000):
        assert outcome(finished, [f"run.dir={place}"], file_bytes=limit) == EXIT_CODE
        said = place.with_suffix(".stderr").read_text()
        assert "error: File too large" in said
        assert "free space" in said
        assert "Traceback" not in said
        assert not [path for path in asides(place) if "aside" in path.name]
    assert (place / "ids" / "id" / "manifest.json").exists()
    while not codes or codes[-1] != 0:
        codes.append(outcome(finished, [f"run.dir={place}"], renames))
        renames += 22
    assert len(codes) > 2
    assert set(codes[:-1]) == {-signal.SIGKILL}
    assert identities(place) == identities(run_directory(finished))
    assert not asides(place)


@pytest.mark.parametrize(
    "file",
    [
        "prepare/manifest.json",
        "ids/id/manifest.json",
        "shards/manifest.json",
        "train/per_layer/manifest.json",
        "evaluation/manifest.json",
        "evaluation/metrics.json",
        "bundle/manifest.json",
    ],
)
def test_a_json_file_that_is_torn_or_something_else_is_refused_by_name(finished, copied, file):
    path = Path(copied.removeprefix("run.dir=")) / file
    whole = path.read_bytes()
    faults = [whole[: len(whole) // 2], b"[]", b"\xff\x00"]
    if path.name == "manifest.json":
        faults.append(whole.replace(b"files", b"fires"))
    for content in faults:
        path.write_bytes(content)
        with pytest.raises(UserError, match=file.replace(".", r"\.")) as error:
            use_everything(finished, copied)
        assert error.value.remedy
    path.write_bytes(whole)
    use_everything(finished, copied)


def use_everything(config: Path, place: str) -> None:
    for name in STAGES:
        if name != "report":
            open_run(config, [place]).make(name)
    open_run(config, [place]).metrics()
    recommend(open_run(config, [place]), "u001", 1)


@pytest.mark.parametrize(
    ("file", "stage"),
    [
        ("prepare/users.parquet", "train"),
        ("ids/id/items.npy", "train"),
        ("ids/id/model.safetensors", "train"),
        ("shards/item_states.npy", "train"),
        ("shards/target_counts.npy", "train"),
        ("shards/000001.tar", "train"),
        ("bundle/alignment.safetensors", "recommend"),
    ],
)
def test_a_file_with_one_byte_changed_is_refused_by_name(finished, copied, file, stage):
    place = Path(copied.removeprefix("run.dir="))
    shutil.rmtree(place / "train")
    data = bytearray((place / file).read_bytes())
    data[len(data) // 2] ^= 1
    (place / file).write_bytes(data)
    run = open_run(finished, [copied])
    with pytest.raises(UserError, match=file.replace(".", r"\.")):
        recommend(run, "u001", 1) if stage == "recommend" else run.make(stage)


@pytest.mark.parametrize(
    ("override", "stage", "match"),
    [
        ("prepare.min_user_interactions=6", "ids", r"prepare\.min_user_interactions: 5 -> 6"),
        ("ids.sasrec.epochs=9", "shards", r"users\.epochs: 8 -> 9"),
        ("shards.share=0.5", "train", r"shards\.share: 0\.7 -> 0\.5"),
        ("prompt.separator='; '", "train", "another prompt|prompt.separator"),
        ("shards.share=0.5", "evaluate", r"shards\.share"),
        ("train.lr=0.5", "evaluate", r"train\.lr"),
        ("readout.head=false", "export", r"readout\.head"),
        ("evaluate.users=5", "report", r"evaluate\.users: null -> 5"),
        ("train.lr=0.5", "report", r"train\.lr"),
        ("run.seed=3", "evaluate", "seed: 17 -> 3"),
    ],
)
def test_a_stage_refuses_what_was_made_by_another_configuration(finished, copied, override, stage, match):
    with pytest.raises(UserError, match=match) as error:
        open_run(finished, [copied, override]).make(stage)
    assert "--fresh" in str(error.value)


@pytest.mark.slow
def test_a_retrained_variant_makes_its_evaluation_stale_and_an_equal_one_does_not(finished, copied):
    open_run(finished, [copied]).make("train", fresh=True)
    open_run(finished, [copied]).make("evaluate")
    open_run(finished, [copied, "train.lr=0.02"]).make("train", fresh=True)
    with pytest.raises(UserError, match=r"was made from another (text_only|per_layer)"):
        open_run(finished, [copied, "train.lr=0.02"]).make("evaluate")


def test_a_variant_that_is_exported_but_not_trained_is_refused_before_anything_is_made(finished, tmp_path):
    with pytest.raises(UserError, match=r"`export\.variant`: input .*train\.variants"):
        open_run(finished, [f"run.dir={tmp_path / 'run'}", "export.variant=input"]).run()
    assert not (tmp_path / "run").exists()


def test_stages_that_need_no_exported_variant_do_not_ask_for_it(finished, tmp_path):
    run = open_run(finished, [f"run.dir={tmp_path / 'run'}", "export.variant=input"])
    run.run(["prepare", "ids"])
    assert run.dataset.hash == run.sources["id"].manifest["made_from"]["prepare"]
    with pytest.raises(UserError, match=r"`export\.variant`: input .*train\.variants"):
        run.run(["train", "export"])
    assert not (tmp_path / "run" / "shards").exists(), "nothing more was begun"


def test_prompts_without_slots_are_refused(finished, copied):
    with pytest.raises(UserError, match=r"source 'id' .*prompt\.user"):
        open_run(finished, [copied, "prompt.user='{history}'", "prompt.item='{title}'"]).make("shards", fresh=True)


@pytest.mark.parametrize(("field", "stage"), [("shards.state_blocks", "shards"), ("train.blocks", "train")])
def test_a_block_that_the_model_lacks_is_refused(finished, copied, field, stage):
    with pytest.raises(UserError, match=rf"{field}: .* no block 2"):
        open_run(finished, [copied, f"{field}=[2]"]).make(stage, fresh=True)


@pytest.mark.parametrize(
    ("stage", "override"),
    [
        ("prepare", "prepare.min_user_interactions=500"),
        ("shards", "shards.state_blocks=[2]"),
        ("train", "train.blocks=[2]"),
        ("train", "train.trackers=[nosuch]"),
    ],
)
def test_a_fresh_stage_that_fails_leaves_what_was_made_before(finished, copied, stage, override):
    place = Path(copied.removeprefix("run.dir=")) / stage
    before = {path: path.read_bytes() for path in place.rglob("*") if path.is_file()}
    with pytest.raises(UserError):
        open_run(finished, [copied, override]).make(stage, fresh=True)
    assert {path: path.read_bytes() for path in place.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("stage", ["train", "shards"])
def test_a_fresh_stage_whose_input_is_damaged_leaves_what_was_made_before(finished, copied, tmp_path, stage):
    place, overrides = Path(copied.removeprefix("run.dir=")), [copied]
    if stage == "train":
        (place / "shards" / "000001.tar").unlink()
    else:
        write_llm(tmp_path / "llm", "llama")
        weights = load_file(tmp_path / "llm" / "model.safetensors")
        next(weight for name, weight in weights.items() if "layers" in name).fill_(torch.nan)
        save_file(weights, tmp_path / "llm" / "model.safetensors", {"format": "pt"})
        overrides.append(f"llm.path={tmp_path / 'llm'}")
    before = {path: path.read_bytes() for path in (place / stage).rglob("*") if path.is_file()}
    with pytest.raises(UserError, match="000001.tar" if stage == "train" else "NaN"):
        open_run(finished, overrides).make(stage, fresh=True)
    assert {path: path.read_bytes() for path in (place / stage).rglob("*") if path.is_file()} == before


def test_killed_shards_of_other_settings_are_refused_and_replaced_by_fresh_with_no_tar_left(finished, copied):
    place = Path(copied.removeprefix("run.dir="))
    unfinish(place / "shards")
    temporary_path(place / "shards" / "000009.tar", "1").write_bytes(b"torn")
    run = open_run(finished, [copied, "shards.samples_per_shard=200"])
    with pytest.raises(UserError, match=r"shards\.samples_per_shard") as error:
        run.make("shards")
    assert "rarec shards CONFIG --fresh" in error.value.remedy
    run.make("shards", fresh=True)
    assert sorted(path.name for path in (place / "shards").glob("*.tar")) == ["000000.tar", "000001.tar"]
    assert not asides(place / "shards")


def test_cut_prompts_are_counted_whoever_made_the_samples(finished, copied):
    """After a kill, the manifest has the figures of an uninterrupted build."""
    run = open_run(finished, [copied, "prompt.max_tokens=24"])
    run.make("shards", fresh=True)
    manifest = run.stage("shards").require(outside=True)
    cut = manifest["cut_prompts"]["user"]
    assert 0 < cut < manifest["samples"]
    content = ShardContent(run)
    assert content.cut_users() == cut  # without samples
    list(content.samples(range(10, 30)))
    assert content.cut_users() == cut


@pytest.mark.slow
def test_a_path_may_hold_what_means_something_elsewhere(finished, tmp_path):
    place = tmp_path / "a b {1..2} [bold] %20 ::ü"
    shutil.copytree(run_directory(finished), place)
    shutil.rmtree(place / "train")
    tree = yaml.safe_load(finished.read_text())
    tree["run"]["dir"] = str(place)
    config = tmp_path / "with spaces.yaml"
    config.write_text(yaml.safe_dump(tree))
    open_run(config, []).make("train")
    open_run(config, []).make("report")
    assert read_manifest(place / "train" / "per_layer", "train")


def test_memory_of_a_ranking_does_not_grow_with_the_users(finished):
    from rarec.data.dataset import EvalTargets

    dataset = open_run(finished, []).dataset
    items_NZ = np.random.default_rng(0).standard_normal((dataset.n_items, 8)).astype(np.float32)
    ranker = VectorRanker(items_NZ, lambda rows, histories: items_NZ[[history[-1] for history in histories]])

    def peak(users: int) -> int:
        known = dataset.targets("test")
        rows = np.resize(known.user_rows, users)
        targets = EvalTargets(rows, np.resize(known.positions, users), np.resize(known.item_rows, users))
        tracemalloc.start()
        for shuffled_by in (None, 1):
            ranker.ranks(EvalBatch.of(dataset, targets, shuffled_by=shuffled_by), users_at_a_time=256)
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return most

    peak(256)
    small, large = peak(1_000), peak(10_000)
    ranks_themselves = 2 * 8 * 10_000  # the chunks' and their concatenation, eight bytes a user
    assert large - small < 1.5 * ranks_themselves


@pytest.mark.parametrize("gigabytes", [80.0, 2.0])  # by the plan it fits; by the plan no change makes it fit
def test_a_device_out_of_memory_names_what_a_step_takes_and_a_change(finished, copied, monkeypatch, gigabytes):
    def fail(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")

    monkeypatch.setattr("rarec.stages.variant_training.train_variant", fail)
    monkeypatch.setattr("rarec.planning.advice.memory_of_rank", lambda device: int(gigabytes * 1e9))
    with pytest.raises(UserError, match=rf"{gigabytes} GB.*text_only") as error:
        open_run(finished, [copied, "train.lr=0.5"]).make("train", fresh=True)
    assert "rarec plan" in error.value.remedy
    assert "train.accumulate=2" in error.value.remedy
