"""Training on its stream: equal on any number of workers, from remote shards, and without damaged samples."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
import weakref
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import torch

from rarec.config import VARIANTS
from rarec.console.last_resort import SIGNALLED
from rarec.data.shards.files import open_index
from rarec.data.shards.samples import key_of
from rarec.entry import open_run
from rarec.errors import UserError
from rarec.models import initialise
from rarec.models.losses import Objective
from rarec.prompts import Encoded
from rarec.stages.run import Run
from rarec.stages.variant_training import open_feed, open_initialiser
from rarec.storage.files import read_json
from rarec.training import batches
from rarec.training.loop import Checkpoints
from tests.processes import all_end, workers_of
from tests.shards import made_sample
from tests.synthetic import write_llm
from tests.test_training import LAUNCH, final_weights, log_lines, untrained

VARIANT = "per_layer_lora"
SHORT = [f"train.variants=[{VARIANT}]", "lora.dropout=0.1"]
BUDGET = ["train.tokens_per_batch=900"]
SKIP = ["train.stream.damaged=skip"]


class Untrained:
    """A run whose shards are built, and whose training is not."""

    def __init__(self, finished: Path, directory: Path) -> None:
        self.finished, self.directory, self.said = finished, directory, []
        self.place = untrained(finished, directory)

    def open(self, *overrides: str) -> Run:
        run = open_run(self.finished, [self.place, *SHORT, *overrides])
        run.say = self.said.append
        return run

    def train(self, *overrides: str) -> "Untrained":
        self.open(*overrides).make("train")
        return self

    @property
    def variant(self) -> Path:
        return self.directory / "train" / VARIANT

    @property
    def manifest(self) -> dict:
        return read_json(self.variant / "manifest.json")

    def damage(self, *numbers: int) -> list[str]:
        """Flip a byte in each of these samples, or flip it back; returns their names."""
        directory = self.directory / "shards"
        entries = open_index(directory, read_json(directory / "manifest.json"))[list(numbers)]
        for entry in entries:
            with (directory / f"{entry['shard']:06d}.tar").open("r+b") as file:
                file.seek(int(entry["offset"]) + 700)
                byte = file.read(1)[0]
                file.seek(-1, os.SEEK_CUR)
                file.write(bytes([byte ^ 1]))
        return [f"{entry['shard']:06d}.tar {key_of(entry)}" for entry in entries]


@pytest.fixture
def run(finished, tmp_path) -> Untrained:
    return Untrained(finished, tmp_path / "run")


def equal(one: Untrained, other: Untrained) -> bool:
    expected, found = final_weights(one.directory, VARIANT), final_weights(other.directory, VARIANT)
    same = expected.keys() == found.keys() and all(torch.equal(expected[name], found[name]) for name in expected)
    losses = [[line["loss"] for line in log_lines(each.directory, VARIANT) if "loss" in line] for each in (one, other)]
    return same and losses[0] == losses[1]


def stop_after(monkeypatch, steps: int) -> None:
    """Ctrl-C in the middle of a step."""
    honest, calls = Objective.__call__, []

    def interrupted(self, *arguments):
        calls.append(1)
        if len(calls) == steps + 1:
            raise KeyboardInterrupt
        return honest(self, *arguments)

    monkeypatch.setattr(Objective, "__call__", interrupted)


@pytest.mark.slow
@pytest.mark.parametrize("cut", [[], BUDGET])
def test_weights_are_equal_bit_for_bit_on_any_workers_and_through_a_resume(finished, tmp_path, monkeypatch, cut):
    none = Untrained(finished, tmp_path / "none").train(*cut, "train.stream.workers=0")
    stopped = Untrained(finished, tmp_path / "stopped")
    with monkeypatch.context() as patch:
        stop_after(patch, 5)
        with pytest.raises(KeyboardInterrupt):
            stopped.train(*cut, "train.stream.workers=1")
    assert workers_of(psutil.Process()) == []
    assert Checkpoints(stopped.variant / "checkpoints", 1, "").steps()[-1] == 4
    stopped.train(*cut, "train.stream.workers=2")
    assert equal(none, stopped)
    assert none.manifest["skipped_samples"] == 0
    stopped.train(*cut, "train.stream.workers=0")  # finished: the number of workers is none of its settings
    assert "is up to date" in stopped.said[-1]


def test_a_budget_makes_batches_of_many_sizes_and_validates_at_the_end_of_each_epoch(run):
    overrides = [*BUDGET, "train.validate_every=null", "train.epochs=3"]
    run.train(*overrides)
    lines = log_lines(run.directory, VARIANT)
    epochs = [line["epoch"] for line in lines if "epoch" in line]
    assert epochs == sorted(epochs)
    assert set(epochs) == {0, 1, 2}
    ends = [step for step in range(1, len(epochs) + 1) if step == len(epochs) or epochs[step] > epochs[step - 1]]
    assert [line["step"] for line in lines if "validation" in line] == ends
    assert run.manifest["step"] == len(epochs)


def test_a_budget_too_small_is_refused_before_anything_is_made(run):
    with pytest.raises(UserError, match=r"train\.tokens_per_batch = 9"):
        run.train("train.tokens_per_batch=9")
    assert not run.variant.exists()


def test_a_damaged_sample_ends_the_training_by_name_and_a_repaired_one_lets_it_resume(finished, tmp_path, run):
    (name,) = run.damage(5)
    file, key = name.split()
    with pytest.raises(UserError, match=rf"{file}, sample {key}: ") as error:
        run.train("train.epochs=1")
    assert "--verify --repair" in error.value.remedy
    assert not (run.variant / "manifest.json").exists()
    run.damage(5)
    whole = Untrained(finished, tmp_path / "whole").train("train.epochs=1")
    assert equal(whole, run.train("train.epochs=1"))


@pytest.mark.slow
def test_skipped_samples_are_printed_recorded_and_stay_out_through_a_resume(finished, tmp_path, run, monkeypatch):
    names = run.damage(3, 7, 70)
    with monkeypatch.context() as patch:
        stop_after(patch, 5)
        with pytest.raises(KeyboardInterrupt):
            run.train(*SKIP)
    (line,) = [line for line in run.said if "left out" in line]
    assert "left out 3 damaged samples" in line
    recorded = read_json(run.variant / "skipped.json")
    assert sorted(f"{file} {key}" for file, keys in recorded.items() for key in keys) == sorted(names)
    run.damage(7)  # repaired meanwhile: the plan does not change
    run.train(*SKIP)
    assert run.manifest["skipped_samples"] == 3
    undisturbed = Untrained(finished, tmp_path / "undisturbed")
    undisturbed.damage(3, 7, 70)
    assert equal(undisturbed.train(*SKIP), run)
    assert run.open(*SKIP).stage("train", VARIANT).require()["skipped_samples"] == 3


def test_samples_damaged_after_the_training_began_are_refused_with_the_remedy(run, monkeypatch):
    run.damage(3)
    with monkeypatch.context() as patch:
        stop_after(patch, 5)
        with pytest.raises(KeyboardInterrupt):
            run.train(*SKIP)
    file, key = run.damage(40)[0].split()
    with pytest.raises(UserError, match=f"{file}, sample {key}: ") as error:
        run.train(*SKIP)
    assert "--verify --repair" in error.value.remedy
    run.damage(40)
    run.train(*SKIP)
    assert run.manifest["skipped_samples"] == 1


def test_before_the_first_step_the_damaged_are_those_of_now(run, monkeypatch):
    run.damage(3)
    with monkeypatch.context() as patch:
        stop_after(patch, 0)
        with pytest.raises(KeyboardInterrupt):
            run.train(*SKIP)
    run.damage(3, 4, 5)
    run.train(*SKIP)
    assert run.manifest["skipped_samples"] == 2
    assert [len(keys) for keys in read_json(run.variant / "skipped.json").values()] == [2]


def test_a_record_of_a_training_that_never_began_leaves_nothing_out(run, monkeypatch):
    run.damage(3)
    with monkeypatch.context() as patch:
        stop_after(patch, 0)
        with pytest.raises(KeyboardInterrupt):
            run.train(*SKIP)
    run.damage(3)
    run.train()
    assert run.manifest["skipped_samples"] == 0
    assert not (run.variant / "skipped.json").exists()


def test_the_first_values_hold_no_sample_while_the_next_are_read():
    seen = []

    def read(count):
        for number in range(count):
            assert sum(ref() is not None for ref in seen) <= 1
            sample = made_sample(number)
            seen.append(weakref.ref(sample))
            yield sample
            del sample

    pair = SimpleNamespace(stored=lambda tokens_T, marks, history_H: Encoded(tokens_T, marks))
    samples = batches.initial_samples(read(40), pair)
    assert samples.vectors["id"][:, 0, 0].tolist() == list(range(40))
    assert [len(prompt.tokens_T) for prompt in samples.prompts] == [len(made_sample(at).tokens_T) for at in range(40)]
    assert samples.targets_N.tolist() == [made_sample(number).target for number in range(40)]


def test_nothing_whole_is_refused_before_anything_is_made(run):
    for path in (run.directory / "shards").glob("*.tar"):
        path.unlink()
    with pytest.raises(UserError, match="train"):
        run.train(*SKIP)
    assert not run.variant.exists()


def test_an_altered_index_is_refused_before_anything_is_made(run):
    path = run.directory / "shards" / "samples.npy"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"samples\.npy"):
        run.train()
    assert not run.variant.exists()


@pytest.mark.slow
def test_training_from_remote_shards_equals_training_from_local_ones(finished, tmp_path):
    here, there = Untrained(finished, tmp_path / "here").train(), Untrained(finished, tmp_path / "there")
    far = tmp_path / "far"
    (there.directory / "shards").rename(far)
    remote = f"train.stream.remote=file://{far}"
    there.open(remote).make("shards")
    assert equal(here, there.train(remote))
    assert not list((there.directory / "shards").glob("*.tar"))
    assert len(list((there.directory / "cache").glob("*.tar"))) == len(list(far.glob("*.tar")))
    assert there.open().stage("train", VARIANT).require()["files"] == here.manifest["files"]


def test_damage_of_remote_shards_is_an_error_with_the_url_and_cannot_be_skipped(finished, tmp_path):
    run = Untrained(finished, tmp_path / "run")
    run.damage(3)
    shutil.copytree(run.directory / "shards", tmp_path / "far")
    remote = f"train.stream.remote=file://{tmp_path}/far"
    with pytest.raises(UserError, match=r"train\.stream"):
        run.train(remote, *SKIP)
    assert not run.variant.exists()
    with pytest.raises(UserError, match=r"file://\S+/far/000000\.tar"):
        run.train(remote)


def test_the_first_values_come_from_a_bounded_part_of_the_catalogue(run, monkeypatch):
    monkeypatch.setattr(initialise, "ALIGNMENT_ITEMS", 10)
    for module in (initialise, batches):
        monkeypatch.setattr(module, "WHITENING_SIZE", 3)
    opened = run.open()
    feed = open_feed(opened)
    items, plan = opened.dataset.n_items, feed.plan()
    samples = batches.initial_samples(feed.first_samples(plan, 4), opened.prompts)
    starts = [initialise.InitialData.draw(samples, items, 17) for _ in range(2)]
    rows = starts[0].items_N
    assert len(rows) == 10 < items
    assert np.all(np.diff(rows) > 0)
    np.testing.assert_array_equal(starts[1].items_N, rows)
    assert len(samples.targets_N) == 4 < len(feed.samples)
    assert len(samples.prompts) == len(starts[0].encoded_N) == 3
    assert set(starts[0].encoded_N) < set(rows)
    run.train("train.max_steps=2")


@pytest.mark.slow
def test_ctrl_c_ends_with_one_line_and_no_process(run):
    command = [sys.executable, str(LAUNCH), "--config", str(run.finished), run.place, *SHORT, "train.epochs=200"]
    command += ["train.patience=999", "train.stream.workers=2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    deadline = time.monotonic() + 90
    while not list(run.variant.glob("checkpoints/step-*")) and time.monotonic() < deadline:
        time.sleep(0.05)
    children = psutil.Process(process.pid).children(recursive=True)
    os.killpg(process.pid, signal.SIGINT)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == SIGNALLED + signal.SIGINT, said
    assert len(re.findall("^.*interrupted.*$", said, re.MULTILINE)) == 1
    assert "Traceback" not in said
    assert len(children) >= 2
    assert all_end(children, seconds=10)


@pytest.mark.parametrize("kind", ["encoder", "decoder"])
def test_a_variant_starts_with_every_part_white(finished, tmp_path, kind):
    """Passed through it again, users and items come out around zero, about as long in every part."""
    untrained_run = Untrained(finished, tmp_path / "run")
    run = untrained_run.open()
    if kind == "decoder":
        run = untrained_run.open(f"llm.path={write_llm(tmp_path / 'llama', 'llama')}")
        shutil.rmtree(run.directory("shards"))
        run.make("shards")
    assert run.llm.identity["kind"] == kind
    feed = open_feed(run)
    initialiser = open_initialiser(run, feed.manifest["state_blocks"])
    samples = batches.initial_samples(feed.first_samples(feed.plan(), initialise.ALIGNMENT_SAMPLES), run.prompts)
    model = initialiser.new_model(VARIANTS[VARIANT], lambda _: samples).eval()
    assert any("lora_" in name for name, _ in model.named_parameters())
    data = initialise.InitialData.draw(samples, run.dataset.n_items, run.config.run.seed)
    for side in ("user", "item"):
        with torch.no_grad():
            readout, passed = getattr(model, side).readout, initialiser.moments(model, side, data)
        for part in ("text", "vectors"):  # instructions hardly differ between items
            stretch_ZZ = readout.white[part].stretch_ZZ.double()
            torch.testing.assert_close(readout.white[part].center_D.double(), passed[part].mean_D, atol=1e-4, rtol=1e-4)
            white_ZZ = stretch_ZZ @ passed[part].covariance_DD @ stretch_ZZ
            assert 0.3 < white_ZZ.trace() < 1.1  # of few: unseen ones are longer
        unit = getattr(model, side).alignment.sources["id"].unit_L[-1]
        assert bool(unit == readout.white["vectors"].unit) == (kind == "decoder")
