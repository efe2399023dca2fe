"""One training on any engine and any number of ranks: the same losses, figures, adapters; elastic in mid-epoch."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from rarec.artefacts import read_json
from rarec.cli import open_context
from rarec.stages.run import STAGES
from tests.conftest import make_world
from tests.ranks import ENGINES, finish

ARM = "per_layer_lora"
TRAIN = [f"train.arms=[{ARM}]", "train.epochs=4", "train.max_steps=20", "train.validate_every=10", "lora.dropout=0.0"]


@pytest.fixture(scope="session")
def decoder(tmp_path_factory) -> Path:
    """The configuration of a run up to its shards, over a tiny Llama."""
    config = make_world(tmp_path_factory.mktemp("decoder"), "llama")
    context = open_context(config, ["run.device=cpu"])
    for stage in ("prepare", "ids", "shards"):
        STAGES[stage](context)
    return config


def copied(config: Path, to: Path) -> str:
    """A copy of the run; the override that points there."""
    shutil.copytree(config.parent / "run", to)
    return f"run.dir={to}"


def losses(run: Path, arm: str = ARM) -> list[float]:
    lines = [json.loads(line) for line in (run / "train" / arm / "log.jsonl").read_text().splitlines()]
    steps = [line["step"] for line in lines if "loss" in line]
    assert steps == list(range(1, len(steps) + 1))
    return [line["loss"] for line in lines if "loss" in line]


def weights(run: Path, arm: str = ARM) -> dict[str, torch.Tensor]:
    newest = sorted((run / "train" / arm / "checkpoints").glob("step-*"))[-1]
    files = [newest / "alignment.safetensors", newest / "optimizer.safetensors"]
    adapter = newest / "lora" / "adapter_model.safetensors"
    return {name: tensor for file in [*files, adapter] if file.exists() for name, tensor in load_file(file).items()}


@pytest.fixture(scope="session")
def alone(decoder, tmp_path_factory) -> Path:
    """A run trained by one process without a launcher."""
    run = tmp_path_factory.mktemp("alone") / "run"
    STAGES["train"](open_context(decoder, [copied(decoder, run), *TRAIN]))
    return run


@pytest.mark.parametrize("engine", ENGINES)
def test_two_ranks_train_as_one_process_does_on_every_engine(decoder, alone, tmp_path, engine):
    finish("train", decoder, [copied(decoder, tmp_path / "run"), *TRAIN], engine=engine, scratch=tmp_path)
    assert losses(tmp_path / "run") == pytest.approx(losses(alone), rel=1e-4)
    expected, found = weights(alone), weights(tmp_path / "run")
    assert expected.keys() == found.keys()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-3, atol=2e-5, msg=name)
