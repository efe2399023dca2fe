"""One training on any engine and any number of ranks: the same losses, figures, adapters; elastic in mid-epoch."""

import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch

from rarec.distributed.world import World
from rarec.entry import open_run
from rarec.evaluation.results import LIST_METRICS
from rarec.storage.files import read_json
from tests.ranks import ENGINES, VARIANT, copied, finish, losses, weights
from tests.synthetic import write_llm

pytestmark = pytest.mark.multiprocess

TRAIN = [
    f"train.variants=[{VARIANT}]",
    "train.epochs=4",
    "train.max_steps=20",
    "train.validate_every=10",
    "lora.dropout=0.0",
]


@pytest.fixture(scope="session")
def alone(decoder, tmp_path_factory) -> Path:
    """A run trained by one process without a launcher."""
    run = tmp_path_factory.mktemp("alone") / "run"
    open_run(decoder, [copied(decoder, run), *TRAIN]).make("train")
    return run


@pytest.fixture
def zero():
    """The module over DeepSpeed, whose import takes seconds."""
    from rarec.training import zero

    return zero


@pytest.mark.parametrize("engine", ENGINES)
def test_two_ranks_train_as_one_process_does_on_every_engine(decoder, alone, tmp_path, engine):
    finish("train", decoder, [copied(decoder, tmp_path / "run"), *TRAIN], engine=engine, scratch=tmp_path)
    assert losses(tmp_path / "run") == pytest.approx(losses(alone), rel=1e-4)
    expected, trained = weights(alone), weights(tmp_path / "run")
    assert expected.keys() == trained.keys()
    for name, tensor in trained.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-3, atol=2e-5, msg=name)


def test_deepspeed_needs_no_compiler(decoder, tmp_path):
    nothing = {"TORCH_EXTENSIONS_DIR": str(tmp_path / "ops"), "CXX": "no-such-compiler"}
    few = [copied(decoder, tmp_path / "run"), *TRAIN, "train.max_steps=1"]
    finish("train", decoder, few, engine="zero1", scratch=tmp_path, environment=nothing)
    assert not (tmp_path / "ops").exists()


@pytest.mark.parametrize(("stage", "of_weight"), [(2, "meta"), (3, "cpu")])
def test_what_deepspeed_does_not_move_to_the_device_is_there(zero, stage, of_weight):
    """ZeRO-3 shards parameters on the device itself, and leaves buffers where they were."""
    model = torch.nn.Sequential(torch.nn.BatchNorm1d(3), torch.nn.Linear(3, 3))
    zero.ZeroEngine(World(device=torch.device("meta")), {"zero_optimization": {"stage": stage}}).place(model)
    assert {buffer.device.type for buffer in model.buffers()} == {"meta"}
    assert model[1].weight.device.type == of_weight


HALF = [*TRAIN, "llm.dtype=bfloat16"]


@pytest.fixture(scope="session")
def half(decoder, tmp_path_factory) -> Path:
    """The same with the frozen model in bfloat16, trained by one process."""
    run = tmp_path_factory.mktemp("half") / "run"
    place = copied(decoder, run)
    shutil.rmtree(run / "shards")
    for stage in ("shards", "train"):
        open_run(decoder, [place, "run.device=cpu", *HALF]).make(stage)
    return run


@pytest.mark.parametrize("engine", ["ddp", "zero2", "zero3"])
def test_a_frozen_model_in_bfloat16_trains_equally_within_its_rounding(decoder, half, tmp_path, engine):
    """Trained parameters stay float32.

    bfloat16 keeps 8 bits: a batch that is split is padded, and so rounded, otherwise, and the readout enlarges that.
    """
    run = tmp_path / "run"
    shutil.copytree(half, run, ignore=shutil.ignore_patterns("train"))
    finish("train", decoder, [f"run.dir={run}", *HALF], engine=engine, scratch=tmp_path)
    assert losses(run) == pytest.approx(losses(half), rel=5e-2)
    assert all(tensor.dtype == torch.float32 for tensor in weights(run).values())


@pytest.mark.parametrize("engine", ["ddp", "zero2"])
def test_a_model_in_four_bits_trains_equally(decoder, tmp_path, engine):
    """QLoRA: layers as wide as the 64 weights that share a scale; shards are made with the same frozen model."""
    llm = write_llm(tmp_path / "llm", "llama", hidden=64)
    few = [*TRAIN, f"llm.path={llm}", "llm.quantize=nf4", "train.max_steps=6"]
    single, many = tmp_path / "single", tmp_path / "many"
    place = copied(decoder, single)
    shutil.rmtree(single / "shards")
    open_run(decoder, [place, "run.device=cpu", *few]).make("shards")
    shutil.copytree(single, many)
    open_run(decoder, [place, "run.device=cpu", *few]).make("train")
    finish("train", decoder, [f"run.dir={many}", *few], engine=engine, scratch=tmp_path)
    assert losses(many) == pytest.approx(losses(single), rel=1e-4)
    assert any(tensor.abs().max() > 0 for name, tensor in weights(many).items() if "lora_B" in name)


FIGURES = [
    "train.variants=[per_layer,per_layer_lora]",
    "train.max_steps=4",
    "train.validate_every=2",
    "report.examples=3",
]


@pytest.fixture(scope="session")
def judged(decoder, tmp_path_factory) -> Path:
    """A run made by one process from its shards to its evaluation."""
    run = tmp_path_factory.mktemp("judged") / "run"
    place = copied(decoder, run)
    for stage in ("train", "evaluate"):
        open_run(decoder, [place, *FIGURES]).make(stage)
    return run


def is_of_lists(row):
    return row.get("metric") in LIST_METRICS


@pytest.mark.parametrize("engine", ["ddp", "zero3", "fsdp2"])
def test_shards_figures_and_examples_are_those_of_one_process(decoder, judged, tmp_path, engine):
    run = tmp_path / "run"
    place = copied(decoder, run)
    shutil.rmtree(run / "shards")
    for stage in ("shards", "train", "evaluate"):
        finish(stage, decoder, [place, *FIGURES], engine=engine, scratch=tmp_path)
    many, single = (read_json(root / "shards" / "manifest.json") for root in (run, judged))
    assert many["files"] == single["files"]
    assert many["cut_prompts"] == single["cut_prompts"]
    ranks, single = (pq.read_table(root / "evaluation" / "ranks.parquet").to_pandas() for root in (run, judged))
    assert ranks[["variant", "user", "target"]].equals(single[["variant", "user", "target"]])
    apart = (ranks["rank"] - single["rank"]).abs()
    assert apart.max() <= 1  # where two items score all but the same, rounding may turn them round
    assert (apart > 0).mean() < 0.01
    turned = set(ranks["variant"][apart > 0])
    for name in ("metrics.json", "comparisons.json", "strata.json"):
        both = (read_json(root / "evaluation" / name) for root in (run, judged))
        own, other = ([row for row in rows if turned.isdisjoint(map(str, row.values()))] for rows in both)
        assert [row for row in own if not is_of_lists(row)] == [row for row in other if not is_of_lists(row)], name
        for row, expected in zip(filter(is_of_lists, own), filter(is_of_lists, other), strict=True):
            # the last place of a list may turn by rounding too, unseen in the ranks of targets
            assert row["value"] == pytest.approx(expected["value"], rel=0.01), row
    examples = (read_json(root / "evaluation" / "examples.json") for root in (run, judged))
    for own, other in zip(*examples, strict=True):
        compared = {variant: top for variant, top in own["top"].items() if variant not in turned}
        assert compared.items() <= other["top"].items()
    own, other = (read_json(root / "evaluation" / "diagnostics.json") for root in (run, judged))
    assert own.keys() == other.keys()
    assert [row["words"] for row in own["words"]] == [row["words"] for row in other["words"]]
    for name, figure in (("blocks", "projection_norm"), ("blocks", "cka_after"), ("attention", "share")):
        pairs = [(row[figure], expected[figure]) for row, expected in zip(own[name], other[name], strict=True)]
        assert all((value is None) == (expected is None) for value, expected in pairs), figure  # CKA of equal texts
        assert all(value is None or value == pytest.approx(expected, rel=1e-3) for value, expected in pairs), figure
