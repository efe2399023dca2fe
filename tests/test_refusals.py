"""Refusals on several ranks: one message, from the first rank, and exit code 2 on all; damaged checkpoints."""

import json
import shutil
import time
from pathlib import Path

import pytest

from rarec.entry import open_run
from rarec.errors import UserError
from rarec.storage.directories import MARKER
from rarec.storage.files import read_json, sha256_file
from rarec.training.loop import Checkpoints, TrainingState
from tests.processes import unfinish
from tests.ranks import Job, copied, start, wait_for_step
from tests.test_diagnostics import make_model

SHORT = ["train.variants=[per_layer]", "train.max_steps=4", "train.validate_every=2", "train.keep=2", "run.device=cpu"]


def flip(path: Path, of_the_way: float = 1.0) -> None:
    """Flip one bit of a file, at its end or before it."""
    with path.open("r+b") as file:
        file.seek(int((path.stat().st_size - 1) * of_the_way))
        byte = file.read(1)[0]
        file.seek(-1, 1)
        file.write(bytes([byte ^ 1]))


def refused(decoder: Path, tmp_path: Path, *overrides: str, **keywords) -> str:
    """Return what the first rank prints; the others print no error."""
    run = copied(decoder, tmp_path / "run")
    said = refused_alike(start("train", decoder, [run, *SHORT, *overrides], scratch=tmp_path, **keywords))
    assert not (tmp_path / "run" / "train" / "per_layer").exists(), "nothing was begun"
    return said


def refused_alike(job: Job) -> str:
    """Return what the first of two ranks prints; the other ends with the same code and prints no error."""
    assert job.codes() == [2, 2], [job.said(rank) for rank in (0, 1)]
    errors = [[line for line in job.said(rank).splitlines() if line.startswith("error:")] for rank in (0, 1)]
    assert [len(lines) for lines in errors] == [1, 0]
    assert "Traceback" not in job.said()
    return job.said()


@pytest.mark.multiprocess
@pytest.mark.parametrize(
    ("overrides", "keywords", "said"),
    [
        (["run.num_processes=4"], {}, ["run.num_processes", "--num_processes 4"]),
        (["run.device=cuda"], {}, ["run.device is cuda", "run.device=cpu"]),
        (["run.device=auto"], {}, ["GPU", "run.device=cpu"]),
        (["train.batch_size=3", "train.accumulate=2"], {}, ["ranks, 4", "train.batch_size"]),
        ([], {"deepspeed": {"gradient_accumulation_steps": 3}}, ["gradient_accumulation_steps: 3", "train.accumulate"]),
        ([], {"deepspeed": {"gradient_clipping": 9.0}}, ["gradient_clipping: 9.0", "train.clip", "zero2.json"]),
        ([], {"deepspeed": {"train_batch_size": 64}}, ["train_batch_size: 64", "train.batch_size"]),
        ([], {"deepspeed": {"bf16": {"enabled": True}}}, ["bf16", "llm.dtype"]),
        ([], {"deepspeed": {"optimizer": {"type": "Adam"}}}, ["optimizer", "zero2.json"]),
        ([], {"environment": {"ACCELERATE_MIXED_PRECISION": "bf16"}}, ["mixed_precision: bf16", "llm.dtype"]),
        ([], {"environment": {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "x"}}, ["_steps: x", "train.accumulate"]),
        ([], {"environment": {"ACCELERATE_DEEPSPEED_CONFIG_FILE": "none"}}, ["deepspeed_config_file", "zero2.yaml"]),
    ],
)
def test_what_does_not_fit_is_refused_by_all_and_printed_by_the_first(decoder, tmp_path, overrides, keywords, said):
    text = refused(decoder, tmp_path, *overrides, engine="zero2", **keywords)
    for part in said:
        assert part in text, text


@pytest.mark.multiprocess
@pytest.mark.parametrize("engine", ["ddp", "zero3"])
def test_an_error_of_one_rank_ends_all_with_its_name_and_message(decoder, tmp_path, engine):
    """A sample damaged during training is found by the rank that reads it; the other must not wait for ever."""
    run = tmp_path / "run"
    overrides = [copied(decoder, run), "train.variants=[per_layer]", "train.epochs=40", "train.validate_every=999"]
    job = start("train", decoder, overrides, engine=engine, scratch=tmp_path)
    wait_for_step(run, 3, job, "per_layer")
    flip(run / "shards" / "000001.tar", of_the_way=0.5)
    started = time.monotonic()
    assert job.codes() == [2, 2]
    assert time.monotonic() - started < 60
    printed = [job.said(rank) for rank in (0, 1)]
    found = ["\nerror: " in f"\n{said}" and "000001.tar, sample" in said for said in printed]
    assert sorted(found) == [False, True]
    other = printed[found.index(False)]
    assert f"rank {found.index(True)} stopped at step" in other
    assert "000001.tar, sample" in other


@pytest.mark.multiprocess
@pytest.mark.parametrize("engine", ["zero3", "fsdp2"])
def test_four_bits_are_not_for_engines_that_shard_frozen_weights(decoder, tmp_path, engine):
    said = refused(decoder, tmp_path, "llm.quantize=nf4", engine=engine)
    assert "llm.quantize: nf4 (QLoRA) cannot be sharded by" in said
    assert "zero2.yaml" in said


# ---- checkpoints


@pytest.fixture
def trained(decoder, tmp_path):
    """A short training with checkpoints of steps 2 and 4, as if killed after the last."""
    overrides = [copied(decoder, tmp_path / "run"), *SHORT]
    open_run(decoder, overrides).make("train")
    unfinish(tmp_path / "run" / "train" / "per_layer")
    return tmp_path / "run" / "train" / "per_layer"


@pytest.mark.multiprocess
@pytest.mark.parametrize("finished", [True, False])
def test_ranks_refuse_alike_a_training_with_other_settings_and_leave_it(decoder, trained, tmp_path, finished):
    place = f"run.dir={trained.parents[1]}"
    if finished:
        open_run(decoder, [place, *SHORT]).make("train")
    before = {path: path.read_bytes() for path in trained.parents[1].rglob("*") if path.is_file()}
    said = refused_alike(start("train", decoder, [place, *SHORT, "train.lr=0.5"], scratch=tmp_path / "scratch"))
    assert "train.lr: 0.002 -> 0.5" in said
    assert "rarec train CONFIG --fresh" in said
    assert {path: path.read_bytes() for path in trained.parents[1].rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("name", ["alignment.safetensors", "optimizer.safetensors", "state.json"])
@pytest.mark.parametrize("harm", [flip, lambda path: path.write_bytes(path.read_bytes()[:-9]), Path.unlink])
def test_a_torn_checkpoint_is_reported_and_the_one_before_it_is_used(decoder, trained, name, harm):
    directory = trained
    whole = {path.name: sha256_file(path) for path in (directory / "checkpoints" / "step-00000004").iterdir()}
    harm(directory / "checkpoints" / "step-00000004" / name)
    lines: list[str] = []
    again = open_run(decoder, [f"run.dir={directory.parents[1]}", *SHORT])
    again.say = lines.append
    again.make("train")
    assert any(f"step-00000004/{name}" in line and line.endswith("step-00000002") for line in lines)
    found = {path.name: sha256_file(path) for path in (directory / "checkpoints" / "step-00000004").iterdir()}
    for file in ("alignment.safetensors", "optimizer.safetensors"):
        assert found[file] == whole[file]


def test_where_no_checkpoint_is_whole_training_does_not_start_again_silently(decoder, trained):
    directory = trained
    for step in ("step-00000002", "step-00000004"):
        flip(directory / "checkpoints" / step / "alignment.safetensors")
    for _ in range(2):  # not the second time either
        with pytest.raises(UserError, match="step-00000002") as error:
            open_run(decoder, [f"run.dir={directory.parents[1]}", *SHORT]).make("train")
        assert f"move {directory / 'checkpoints'} away" in error.value.remedy


def save(checkpoints: Checkpoints, step: int, best: int | None = None) -> Path:
    """Write a checkpoint as a training does; return the file with its weights."""
    checkpoints.save(make_model(), {}, {}, TrainingState(step, best, 0.5))
    return checkpoints.path(step) / "alignment.safetensors"


def test_a_torn_checkpoint_takes_the_place_of_none_that_is_written_later(tmp_path):
    checkpoints = Checkpoints(tmp_path, 2, "this training")
    save(checkpoints, 2)
    flip(save(checkpoints, 9))
    checkpoints = Checkpoints(tmp_path, 1, "this training")
    assert checkpoints.newest(print) == 2
    save(checkpoints, 4)
    assert checkpoints.steps() == [4]
    assert checkpoints.newest(print) == 4


@pytest.mark.parametrize(
    ("bests", "harmed", "used"),
    [
        ({2: 2, 4: 2, 6: 2}, [6], 4),
        ({2: 2, 4: 4, 6: 4}, [4], 2),
        ({4: 2, 6: 6}, [6], 4),  # 2 was replaced by 6, which the next validation will find again
        ({2: 2, 4: 2, 6: 2}, [2], None),
        ({4: 2, 6: 2}, [], None),  # 2 was deleted by hand
        ({2: 2, 4: 2}, [2, 4], None),
    ],
)
def test_training_resumes_only_where_it_ends_as_if_nothing_had_happened(tmp_path, bests, harmed, used):
    checkpoints, lines = Checkpoints(tmp_path, 9, "this training"), []
    for step, best in bests.items():
        path = save(checkpoints, step, best)
        if step in harmed:
            flip(path)
    if used is None:
        with pytest.raises(UserError, match=f"step-0000000{min(harmed, default=2)}") as error:
            checkpoints.newest(print)
        assert f"move {tmp_path} away" in error.value.remedy
        assert checkpoints.steps() == list(bests)
    else:
        assert checkpoints.newest(lines.append) == used
        assert checkpoints.steps() == [step for step in bests if step <= used]
        assert lines
        assert all(line.endswith(f"step-0000000{used}") for line in lines)


FIRST_IS_BEST = [*SHORT, "train.lr=1e-12", "train.lr_slots=1e-12"]


def test_where_the_best_is_torn_training_goes_on_from_the_beginning_once_that_is_said(decoder, tmp_path):
    overrides = [copied(decoder, tmp_path / "run"), *FIRST_IS_BEST]
    open_run(decoder, overrides).make("train")
    directory = tmp_path / "run" / "train" / "per_layer"
    before = read_json(directory / "manifest.json")
    assert (before["best_step"], before["step"]) == (2, 4)
    unfinish(directory)
    flip(directory / "checkpoints" / "step-00000002" / "alignment.safetensors")
    with pytest.raises(UserError, match="step-00000002") as error:
        open_run(decoder, overrides).make("train")
    assert f"move {directory / 'checkpoints'} away" in error.value.remedy
    (directory / "checkpoints").rename(tmp_path / "away")
    open_run(decoder, overrides).make("train")
    assert read_json(directory / "manifest.json")["files"] == before["files"]


def test_a_finished_training_whose_best_is_torn_is_refused_and_what_is_advised_helps(decoder, tmp_path):
    overrides = [copied(decoder, tmp_path / "run"), *FIRST_IS_BEST]
    open_run(decoder, overrides).make("train")
    directory = tmp_path / "run" / "train" / "per_layer"
    before = read_json(directory / "manifest.json")
    flip(directory / "checkpoints" / "step-00000002" / "alignment.safetensors")
    for stage in ("train", "evaluate"):
        with pytest.raises(UserError, match=r"step-00000002/alignment\.safetensors") as error:
            open_run(decoder, overrides).make(stage)
        assert "rarec train CONFIG --fresh train.variants=[per_layer]" in error.value.remedy
    open_run(decoder, [*overrides, "train.variants=[per_layer]"]).make("train", fresh=True)
    open_run(decoder, overrides).make("evaluate")
    changing = {"seconds": 0, "log": 0, "seal": 0}
    assert {**read_json(directory / "manifest.json"), **changing} == {**before, **changing}


@pytest.mark.parametrize("other", ["readout.pool=last", "alignment.instructions=1"])
def test_shards_with_states_pooled_otherwise_or_prompts_cut_otherwise_are_refused(decoder, trained, other):
    field = other.partition("=")[0].partition(".")[2]
    with pytest.raises(UserError, match=rf"shards .*{field}") as error:
        open_run(decoder, [f"run.dir={trained.parents[1]}", *SHORT, other]).make("train")
    assert "rarec shards CONFIG --fresh" in error.value.remedy


@pytest.mark.parametrize("other", ["train.lr=0.5", "alignment.instructions=1", "run.seed=3"])
def test_a_checkpoint_of_another_training_is_refused(decoder, trained, tmp_path, other):
    """Another alignment shape, other data (the seed selects them), other settings."""
    directory = trained
    foreign = open_run(decoder, [copied(decoder, tmp_path / "other"), *SHORT, other])
    if not other.startswith("train."):
        foreign.run(["prepare", "ids", "shards"], fresh=True)
    foreign.make("train")
    other_step_4 = tmp_path / "other" / "train" / "per_layer" / "checkpoints" / "step-00000004"
    place = directory / "checkpoints" / "step-00000004"
    shutil.rmtree(place)
    shutil.copytree(other_step_4, place)
    with pytest.raises(UserError, match="step-00000004"):
        open_run(decoder, [f"run.dir={directory.parents[1]}", *SHORT]).make("train")
    assert foreign.stage("train", "per_layer").checkpoints().newest(print) == 4


def test_a_checkpoint_names_no_ranks_and_holds_no_frozen_weight(trained):
    directory = trained
    newest = directory / "checkpoints" / "step-00000004"
    assert {path.name for path in newest.iterdir()} - {MARKER} == {
        "alignment.safetensors",
        "optimizer.safetensors",
        "state.json",
        "manifest.json",
    }
    said = json.dumps([read_json(newest / name) for name in ("state.json", "manifest.json")])
    assert "rank" not in said
    assert "world" not in said
