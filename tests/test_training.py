"""Training: schedule, checkpoints, resume bit for bit after kill -9, early stopping, and a loss that is no number."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from rarec.config.schema import Train
from rarec.entry import open_run
from rarec.errors import Stopped, UserError
from rarec.models.losses import LossTerms
from rarec.stages import variant_training
from rarec.storage.checkpoint_store import CorruptCheckpoint
from rarec.storage.files import read_json
from rarec.training.engines import build_optimizer, rate_at, set_rate
from rarec.training.loop import Checkpoints

LAUNCH = Path(__file__).parents[1] / "launch" / "train.py"
LONG = ["train.variants=[per_layer_lora]", "train.epochs=6", "train.checkpoint_every=3", "lora.dropout=0.1"]


def untrained(finished: Path, directory: Path) -> str:
    """Copy a finished run up to its shards; return the override that points to the copy."""
    run = Path(open_run(finished, []).config.run.dir)
    for stage in ("prepare", "ids", "shards"):
        shutil.copytree(run / stage, directory / stage)
    return f"run.dir={directory}"


def final_weights(run: Path, variant: str = "per_layer_lora") -> dict[str, torch.Tensor]:
    newest = Checkpoints(run / "train" / variant / "checkpoints", 1, "")
    directory = newest.path(newest.steps()[-1])
    tensors = load_file(directory / "alignment.safetensors") | load_file(directory / "optimizer.safetensors")
    return tensors | load_file(directory / "lora" / "adapter_model.safetensors")


def test_the_rate_warms_up_linearly_and_falls_as_a_cosine():
    assert [rate_at(step, 12, 0.25) for step in range(3)] == pytest.approx([0.25, 0.5, 0.75])
    assert rate_at(3, 12, 0.25) == 1.0
    assert rate_at(3 + 9 // 2, 12, 0.25) == pytest.approx(0.5 * (1 + math.cos(math.pi * 4 / 9)))
    assert 0 < rate_at(11, 12, 0.25) < 0.04
    assert rate_at(0, 12, 0.0) == 1.0


def test_readout_alignment_and_lora_have_rates_of_their_own_and_no_group_is_empty():
    parameters = {"user.w": torch.nn.Parameter(torch.ones(2, 2)), "log_scale": torch.nn.Parameter(torch.ones(()))}
    config = Train(lr=0.5, lr_lora=0.25, lr_slots=1.0, weight_decay=0.1)
    groups = build_optimizer(parameters, config).param_groups
    assert [(g["lr"], g["weight_decay"], len(g["params"])) for g in groups] == [(0.5, 0.1, 1), (0.5, 0.0, 1)]
    parameters["backbone.lora_A"] = torch.nn.Parameter(torch.ones(2, 2))
    parameters["user.alignment.w"] = torch.nn.Parameter(torch.ones(2, 2))
    optimizer = build_optimizer(parameters, config)
    set_rate(optimizer, 0.5)
    assert [g["lr"] for g in optimizer.param_groups] == [0.25, 0.25, 0.5, 0.125]


@pytest.mark.slow
def test_kill_9_and_resume_ends_with_the_same_weights_bit_for_bit(finished, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    open_run(finished, [untrained(finished, whole), *LONG]).make("train")
    command = [sys.executable, str(LAUNCH), "--config", str(finished), untrained(finished, killed), *LONG]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    checkpoints = Checkpoints(killed / "train" / "per_layer_lora" / "checkpoints", 1, "")
    process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while process.poll() is None and len(checkpoints.steps()) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (killed / "train" / "per_layer_lora" / "manifest.json").exists()
    subprocess.run(command, env=environment, check=True)
    expected, resumed = final_weights(whole), final_weights(killed)
    assert expected.keys() == resumed.keys()
    assert all(torch.equal(expected[name], resumed[name]) for name in expected)
    steps = [line["step"] for line in log_lines(killed) if "loss" in line]
    assert steps == list(range(1, len(steps) + 1))


def log_lines(run: Path, variant: str = "per_layer_lora") -> list[dict]:
    return [json.loads(line) for line in (run / "train" / variant / "log.jsonl").read_text().splitlines()]


def test_what_trains_is_saved_apart_and_nothing_frozen_with_it(finished, tmp_path):
    open_run(finished, [untrained(finished, tmp_path), "train.variants=[per_layer_lora]", "train.max_steps=3"]).make(
        "train"
    )
    newest = Checkpoints(tmp_path / "train" / "per_layer_lora" / "checkpoints", 1, "")
    directory = newest.path(newest.steps()[-1])
    alignment = load_file(directory / "alignment.safetensors")
    lora = load_file(directory / "lora" / "adapter_model.safetensors")
    assert not [name for name in alignment if "backbone" in name or "lora" in name]
    assert lora
    assert all(".lora_" in name and tensor.numel() and tensor.dtype == torch.float32 for name, tensor in lora.items())
    assert any(tensor.abs().sum() > 0 for name, tensor in lora.items() if "lora_B" in name)
    assert not [path for path in tmp_path.rglob("*") if path.suffix in (".bin", ".pt", ".pth", ".pkl")]


@pytest.mark.slow
def test_the_newest_and_the_best_checkpoint_are_kept(finished, tmp_path):
    overrides = [
        "train.variants=[per_layer]",
        "train.epochs=4",
        "train.validate_every=2",
        "train.keep=2",
        "train.patience=99",
    ]
    open_run(finished, [untrained(finished, tmp_path), *overrides]).make("train")
    directory = tmp_path / "train" / "per_layer"
    done = read_json(directory / "manifest.json")
    validations = {
        line["step"]: line["validation"]["ndcg@100"]
        for line in log_lines(tmp_path, "per_layer")
        if "validation" in line
    }
    assert done["best_step"] == max(validations, key=validations.get)
    newest = sorted(validations)[-2:]
    assert Checkpoints(directory / "checkpoints", 2, "").steps() == sorted({*newest, done["best_step"]})


def test_validation_that_gets_no_better_stops_the_run(finished, tmp_path):
    overrides = [
        "train.variants=[per_layer]",
        "train.epochs=30",
        "train.validate_every=1",
        "train.patience=2",
        "train.lr=1e-12",
        "train.lr_slots=1e-12",
    ]
    open_run(finished, [untrained(finished, tmp_path), *overrides]).make("train")
    done = read_json(tmp_path / "train" / "per_layer" / "manifest.json")
    assert (done["best_step"], done["step"]) == (1, 3)


def test_a_loss_that_is_no_number_names_the_batch_and_keeps_the_last_good_checkpoint(finished, tmp_path, monkeypatch):
    from rarec.models.losses import Objective

    honest, calls = Objective.__call__, []

    def poisoned(self, *arguments):
        calls.append(1)
        terms = honest(self, *arguments)
        return (
            LossTerms(terms.total * float("nan"), terms.recommendation, terms.align, terms.distil)
            if len(calls) == 6
            else terms
        )

    monkeypatch.setattr(Objective, "__call__", poisoned)
    overrides = ["train.variants=[per_layer]", "train.checkpoint_every=2"]
    with pytest.raises(UserError, match=r"step 5 .* samples user-position 0000\d+-\d+") as error:
        open_run(finished, [untrained(finished, tmp_path), *overrides]).make("train")
    assert "step-00000004" in str(error.value)
    open_run(finished, [f"run.dir={tmp_path}", *overrides]).stage("train", "per_layer").checkpoints().verify(4)
    weights = load_file(tmp_path / "train" / "per_layer" / "checkpoints" / "step-00000004" / "alignment.safetensors")
    assert all(tensor.isfinite().all() for tensor in weights.values())


def test_a_harmed_checkpoint_is_refused(finished, tmp_path):
    run = open_run(finished, [untrained(finished, tmp_path), "train.variants=[per_layer]", "train.max_steps=2"])
    run.make("train")
    checkpoints = run.stage("train", "per_layer").checkpoints()
    checkpoints.verify(2)
    path = checkpoints.path(2) / "alignment.safetensors"
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(CorruptCheckpoint, match=r"alignment\.safetensors"):
        checkpoints.verify(2)


def test_other_settings_are_refused_unless_the_user_says_fresh(finished, tmp_path):
    place = untrained(finished, tmp_path)
    short = [place, "train.variants=[per_layer]", "train.max_steps=2"]
    open_run(finished, short).make("train")
    with pytest.raises(UserError, match=r"train\.lr: 0\.002 -> 0\.5") as error:
        open_run(finished, [*short, "train.lr=0.5"]).make("train")
    assert "--fresh" in str(error.value)
    open_run(finished, [*short, "train.lr=0.5"]).make("train", fresh=True)


def test_shards_of_another_language_model_are_refused(finished, tmp_path):
    from tests.synthetic import write_llm

    other = write_llm(tmp_path / "other", "bert", seed=9)
    with pytest.raises(UserError, match="llm"):
        open_run(finished, [untrained(finished, tmp_path / "run"), f"llm.path={other}"]).make("train")


def test_an_unknown_tracker_is_refused(finished, tmp_path):
    with pytest.raises(UserError, match=r"train\.trackers"):
        open_run(finished, [untrained(finished, tmp_path), "train.trackers=[abacus]"]).make("train")


def test_a_signal_in_the_last_validation_stops_what_would_come_next(finished, tmp_path, monkeypatch):
    validation = variant_training.validation

    def signalled(run, model):
        validate = validation(run, model)
        return lambda: os.kill(os.getpid(), signal.SIGTERM) or validate()

    monkeypatch.setattr(variant_training, "validation", signalled)
    overrides = [untrained(finished, tmp_path), "train.variants=[text_only,per_layer]", "train.max_steps=1"]
    with pytest.raises(Stopped, match="text only"):
        open_run(finished, overrides).make("train")
    assert (tmp_path / "train" / "text_only" / "manifest.json").exists()
    assert not (tmp_path / "train" / "per_layer").exists()


@pytest.mark.parametrize("normalise", ["true", "false"])
def test_text_only_without_a_head_has_nothing_to_train_but_a_scale(finished, tmp_path, normalise):
    """Not even that where it is not normalised, as in `configs/runs/paper.yaml`."""
    plain = ["readout.head=false", f"readout.normalise={normalise}", "train.variants=[text_only]"]
    open_run(finished, [untrained(finished, tmp_path), *plain]).make("train")
    assert read_json(tmp_path / "train" / "text_only" / "manifest.json")["step"] == 0
