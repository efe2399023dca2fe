"""A training that is killed, stopped, resumed on other ranks and engines, or short of disk ends as if undisturbed."""

import json
import os
import signal
import subprocess
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from rarec.entry import open_run
from tests.ranks import VARIANT, copied, finish, losses, start, wait_for_step, weights

pytestmark = pytest.mark.multiprocess

TRAIN = [
    f"train.variants=[{VARIANT}]",
    "train.epochs=8",
    "train.max_steps=40",
    "train.validate_every=20",
    "train.checkpoint_every=2",
    "train.patience=99",
    "lora.dropout=0.1",
]


@pytest.fixture(scope="module")
def undisturbed(decoder, tmp_path_factory) -> Callable[[str], Path]:
    """For an engine, a run that two ranks train without trouble."""

    @cache
    def trained(engine: str) -> Path:
        run = tmp_path_factory.mktemp(engine) / "run"
        finish("train", decoder, [copied(decoder, run), *TRAIN], engine=engine, scratch=run.parent)
        return run

    return trained


def checkpoint_steps(run: Path) -> list[int]:
    return sorted(int(path.name[5:]) for path in (run / "train" / VARIANT / "checkpoints").glob("step-*"))


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert [name for name in found if not torch.equal(found[name], expected[name])] == []


@pytest.mark.parametrize("engine", ["ddp", "zero3"])
def test_killed_again_and_again_it_ends_with_the_same_weights_bit_for_bit(decoder, undisturbed, tmp_path, engine):
    """kill -9 of a random rank at a random step; the others are ended as by a launcher."""
    whole, killed = undisturbed(engine), tmp_path / "killed"
    arguments = "train", decoder, [copied(decoder, killed), *TRAIN]
    rng, kills = np.random.default_rng(0), 2 if engine == "ddp" else 1
    for step in sorted(rng.choice(np.arange(5, 35), kills, replace=False).tolist()):
        job = start(*arguments, engine=engine, scratch=tmp_path)
        wait_for_step(killed, step, job)
        os.kill(job.processes[int(rng.integers(2))].pid, signal.SIGKILL)
        job.codes(timeout=0.5)
        assert not (killed / "train" / VARIANT / "manifest.json").exists()
    finish(*arguments, engine=engine, scratch=tmp_path)
    assert_equal(weights(killed), weights(whole))
    assert losses(killed) == losses(whole)


def test_killed_while_trained_anew_the_old_stays_usable_and_the_same_command_resumes(decoder, undisturbed, tmp_path):
    """kill -9 of one of two ranks during `--fresh` with other settings."""
    whole, killed = undisturbed("ddp"), tmp_path / "killed"
    old = [copied(decoder, killed), *TRAIN[:1], "train.max_steps=2", "run.device=cpu"]
    open_run(decoder, old).make("train")
    before, fresh = weights(killed), killed / "train" / f".{VARIANT}.fresh"
    job = start("train", decoder, [old[0], *TRAIN], scratch=tmp_path, fresh=True)
    wait_for_step(killed, 20, job, folder=fresh.name)
    os.kill(job.processes[1].pid, signal.SIGKILL)
    job.codes(timeout=0.5)
    assert_equal(weights(killed), before)
    assert open_run(decoder, old).stage("train", VARIANT).best_model() is not None
    saved = max(int(path.name[5:]) for path in (fresh / "checkpoints").glob("step-*"))
    lines = (fresh / "log.jsonl").read_text().splitlines()[:-1]  # the last may be torn
    log = [line for line in lines if json.loads(line)["step"] <= saved]
    finish("train", decoder, [old[0], *TRAIN], scratch=tmp_path, fresh=True)
    assert (killed / "train" / VARIANT / "log.jsonl").read_text().splitlines()[: len(log)] == log, "it was resumed"
    assert_equal(weights(killed), weights(whole))
    assert losses(killed) == losses(whole)
    assert {path.name for path in (killed / "train").iterdir()} == {VARIANT, f".{VARIANT}.lock"}


def test_from_two_ranks_to_one_and_back_over_engines_in_mid_epoch(decoder, tmp_path):
    """ZeRO-3 on two ranks, ZeRO-2 on one, none, ZeRO-3 on two again: SIGTERM to one rank stops all after their step."""
    still = [*TRAIN[:-1], "lora.dropout=0.0"]  # dropout depends on the rank
    whole, moved = tmp_path / "whole", tmp_path / "moved"
    open_run(decoder, [copied(decoder, whole), "run.device=cpu", *still]).make("train")
    arguments = "train", decoder, [copied(decoder, moved), *still]
    for step, engine, ranks in ((7, "zero3", 2), (15, "zero2", 1), (23, "ddp", 1)):
        job = start(*arguments, engine=engine, ranks=ranks, scratch=tmp_path)
        wait_for_step(moved, step, job)
        os.kill(job.processes[-1].pid, signal.SIGTERM)
        assert job.codes() == [0] * ranks, job.said()
        assert "stopped by a signal at step" in job.said()
        assert step <= checkpoint_steps(moved)[-1] < 40
    finish(*arguments, engine="zero3", scratch=tmp_path)
    assert losses(moved) == pytest.approx(losses(whole), rel=1e-4)
    expected = weights(whole)
    for name, tensor in weights(moved).items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-3, atol=5e-5, msg=name)


def test_a_disk_that_fills_up_during_a_checkpoint_leaves_the_one_before(decoder, undisturbed, tmp_path):
    """A real file system of a few megabytes, filled up during training."""
    whole, small = undisturbed("ddp"), tmp_path / "small"
    place = copied(decoder, small)
    (small / "train").mkdir()
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", small / "train"], check=False)
    if mount.returncode:
        pytest.skip("mounting a file system takes root")
    try:
        job = start("train", decoder, [place, *TRAIN], scratch=tmp_path)
        wait_for_step(small, 9, job)
        ballast = small / "train" / "ballast"
        with pytest.raises(OSError, match="No space left"):
            ballast.write_bytes(bytes(8 << 20))
        assert job.codes() == [2, 2], job.said()
        assert "No space left on device" in job.said()
        checkpoints = open_run(decoder, [place, *TRAIN]).stage("train", VARIANT).checkpoints()
        for step in checkpoint_steps(small):
            checkpoints.verify(step)
        ballast.unlink()
        finish("train", decoder, [place, *TRAIN], scratch=tmp_path)
        assert_equal(weights(small), weights(whole))
    finally:
        subprocess.run(["umount", "-l", small / "train"], check=True)


def test_an_adapter_saved_under_zero_3_is_whole_and_loads_in_stock_peft(decoder, tmp_path):
    run = tmp_path / "run"
    overrides = [copied(decoder, run), *TRAIN[:1], "train.max_steps=4", "lora.dropout=0.0"]
    finish("train", decoder, overrides, engine="zero3", scratch=tmp_path)
    opened = open_run(decoder, [*overrides, "run.device=cpu"])
    adapter = sorted((run / "train" / VARIANT / "checkpoints").glob("step-*"))[-1] / "lora"
    saved = load_file(adapter / "adapter_model.safetensors")
    assert saved
    assert all(tensor.numel() for tensor in saved.values())
    assert any(tensor.abs().max() > 0 for name, tensor in saved.items() if "lora_B" in name)
    model = opened.stage("train", VARIANT).best_model().backbone
    from transformers import AutoModelForCausalLM

    stock = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(decoder.parent / "llm"), adapter).eval()
    ids = torch.arange(5, 17)[None]
    mask = torch.ones_like(ids)
    with torch.no_grad():
        expected = stock.get_base_model().model(input_ids=ids, attention_mask=mask).last_hidden_state
        torch.testing.assert_close(model(ids, mask), expected, rtol=1e-5, atol=1e-6)
