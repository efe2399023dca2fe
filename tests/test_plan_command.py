"""`rarec plan`: its advice, its output, models of which only config.json exists, bad input."""

import io
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
from rich.console import Console

from rarec import cli
from rarec.console.last_resort import guarded
from rarec.distributed.hardware import known_device
from rarec.entry import open_run
from rarec.errors import UserError
from rarec.planning.advice import plan_variants, smallest_change
from rarec.planning.calculator import Calculator
from rarec.planning.plan_table import render
from rarec.planning.setup import Cluster, parse_engine
from rarec.stages.train import plan
from tests.plans import BLOCKS, GPU, HEADS, LLAMA_8B, D, F, V, calculator, room, written
from tests.synthetic import write_llm

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    return write_llm(tmp_path_factory.mktemp("llm"), "llama", blocks=BLOCKS)


@pytest.fixture(scope="module")
def large(tmp_path_factory) -> Calculator:
    """A model whose frozen weights are larger than DeepSpeed's buckets: 16 wide blocks; only config.json is read."""
    path = tmp_path_factory.mktemp("large")
    (path / "config.json").write_text(json.dumps({**LLAMA_8B, "num_hidden_layers": 16}))
    dtype = {"path": str(path), "dtype": "bfloat16"}
    return calculator(path, llm=dtype, prompt={"max_tokens": 64}, evaluate={"batch_size": 8})


def test_a_replicated_engine_is_advised_wherever_it_fits(large):
    setting = large.setup(replace(GPU, gpus=2), "0")
    total = large.memory("per_layer", setting).peak
    advice = plan_variants(large, ["per_layer"], room(large, total, gpus=2), None)
    assert (advice.engine, advice.fits, advice.change) == ("0", True, None)


def test_sharding_is_advised_where_the_whole_model_does_not_fit(large):
    recomputed = Calculator(
        large.config.model_copy(update={"llm": large.config.llm.model_copy(update={"gradient_checkpointing": True})}),
        large.builder,
    )
    setting = recomputed.setup(replace(GPU, gpus=8), "0")
    frozen = recomputed.memory("per_layer", setting).frozen
    advice = plan_variants(recomputed, ["per_layer"], room(recomputed, frozen, gpus=8), None)
    assert (advice.engine, advice.fits) == ("3", True)


def test_the_smallest_change_fits_and_the_smaller_ones_do_not(large):
    base = large.setup(replace(GPU, gpus=2), "0")
    quarter = replace(base, accumulate=4)
    cluster = room(large, large.memory("per_layer", quarter).peak, gpus=2)
    base, quarter = (replace(setting, cluster=cluster) for setting in (base, quarter))
    assert [large.fits("per_layer", replace(base, accumulate=parts)) for parts in (1, 2, 4)] == [False, False, True]
    found = smallest_change(large, "per_layer", base)
    assert found == quarter
    assert base.changes(found) == ["train.accumulate=4"]


@pytest.mark.parametrize("engine", ["0", "2"])
def test_without_room_for_more_parts_blocks_are_recomputed(large, engine):
    train = large.config.train.model_copy(update={"batch_size": 2})
    encode = large.config.evaluate.model_copy(update={"batch_size": 1})
    few = Calculator(large.config.model_copy(update={"train": train, "evaluate": encode}), large.builder)
    setting = few.setup(replace(GPU, gpus=2), engine)
    peak = few.memory("per_layer", replace(setting, checkpointing=True)).peak
    setting = replace(setting, cluster=room(few, peak, gpus=2))
    assert setting.changes(smallest_change(few, "per_layer", setting)) == ["llm.gradient_checkpointing=true"]


def test_smaller_chunks_are_the_change_where_encoding_is_what_does_not_fit(large):
    encode = large.config.evaluate.model_copy(update={"batch_size": 1024})
    llm = large.config.llm.model_copy(update={"gradient_checkpointing": True})
    wide = Calculator(large.config.model_copy(update={"evaluate": encode, "llm": llm}), large.builder)
    setting = wide.setup(replace(GPU, gpus=2), "0")
    assert wide.memory("per_layer", setting).peak_phase == "encoding"
    total = wide.memory("per_layer", replace(setting, eval_batch=256)).peak
    setting = replace(setting, cluster=room(wide, total, gpus=2))
    assert setting.changes(smallest_change(wide, "per_layer", setting)) == ["evaluate.batch_size=256"]


def test_where_nothing_helps_it_says_so(large):
    advice = plan_variants(large, ["per_layer"], replace(GPU, memory=2_200_000_000), None)
    assert (advice.engine, advice.fits, advice.change) == (None, False, None)


def lines(path: Path, cluster: Cluster, asked: str | None = None, overrides: tuple[str, ...] = ()) -> str:
    made = plan(open_run(path, list(overrides)), cluster, parse_engine(asked) if asked else None)
    return "\n".join(part for part in render(made, "mine.yaml run.seed=3") if isinstance(part, str))


def test_the_command_prints_variants_engines_advice_and_how_to_start(llama, tmp_path, capsys, monkeypatch):
    path = written(tmp_path, llama, train={"variants": ["text_only", "per_layer"]})
    arguments = ["rarec", "plan", str(path), "llm.dtype=bfloat16", "--gpus", "2", "--memory", "80GB"]
    monkeypatch.setattr(sys, "argv", arguments)
    monkeypatch.chdir(tmp_path)
    guarded(cli.command)
    printed = capsys.readouterr().out
    for words in ("RA-Rec (per layer) *", "ZeRO-3", "FSDP2", "recommended: DDP", "100,000 samples"):
        assert words in printed
    launch = f"accelerate launch --config_file {ROOT}/configs/accelerate/ddp.yaml --num_processes 2 -m rarec train"
    assert f"{launch} {path} llm.dtype=bfloat16" in printed
    assert not (tmp_path / "none").exists()


def test_the_tables_are_whole_on_80_columns(large):
    """The same words as on a terminal of any width, none cut or broken."""

    def words(width: int) -> list[str]:
        console = Console(width=width, record=True, file=io.StringIO())
        made = plan_variants(large, ["readout", "per_layer_lora"], replace(GPU, gpus=2), None)
        for part in render(made, "mine.yaml"):
            if not isinstance(part, str):
                console.print(part)
        text = console.export_text()
        assert max(map(len, text.splitlines())) <= width
        return sorted(text.split())

    assert words(80) == words(200)


def test_one_gpu_needs_no_engine(llama, tmp_path):
    printed = lines(written(tmp_path, llama), GPU)
    assert "recommended: one process" in printed
    assert "configs/accelerate/one.yaml" in printed
    assert "llm.dtype=bfloat16" in printed


def test_a_change_is_printed_with_the_command_that_makes_it(llama, tmp_path):
    path = written(tmp_path, llama, evaluate={"batch_size": 1}, train={"variants": ["per_layer"]})
    made = calculator(llama, evaluate={"batch_size": 1})
    setting = replace(made.setup(replace(GPU, gpus=2), "0"), accumulate=2)
    printed = lines(path, room(made, made.memory("per_layer", setting).peak, gpus=2), "0")
    assert "DDP lacks" in printed
    assert "smallest change that makes it fit: train.accumulate=2 (" in printed
    assert "-m rarec train mine.yaml run.seed=3 train.accumulate=2" in printed


@pytest.mark.slow
def test_a_plan_of_8b_reads_config_json_alone_and_takes_seconds_and_little_memory(tmp_path):
    llm = tmp_path / "llm"
    llm.mkdir()
    (llm / "config.json").write_text(json.dumps(LLAMA_8B))
    path = written(tmp_path, llm, llm={"path": str(llm), "dtype": "bfloat16"}, train={"variants": ["per_layer"]})
    code = (
        "import resource, sys; from rarec import cli; from rarec.distributed.hardware import peak_memory\n"
        "try: cli.app(sys.argv[1:])\n"
        "finally: print(peak_memory(), resource.getrusage(resource.RUSAGE_SELF).ru_utime)"
    )
    command = [sys.executable, "-c", code, "plan", str(path), "--gpus", "8"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    peak, seconds = map(float, done.stdout.splitlines()[-1].split())
    assert "15.01 GB" in done.stdout  # without the head
    assert peak < 1.5e9
    assert seconds < 60


def test_a_gguf_file_is_planned_from_its_metadata(llama, tmp_path):
    file = tmp_path / "tiny.gguf"
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_context_length(128)
    writer.add_embedding_length(D)
    writer.add_block_count(BLOCKS)
    writer.add_feed_forward_length(F)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(2)
    writer.add_vocab_size(V)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tensor("token_embd.weight", np.zeros((V, D), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    variant = calculator(file).meta_model("per_layer", False)
    assert variant.block_numel == calculator(llama).meta_model("per_layer", False).block_numel


@pytest.mark.parametrize(
    ("values", "problem", "remedy"),
    [
        ((8, 1, "80 gigs", "H100"), "--memory 80 gigs", "GiB"),
        ((8, 1, "80", "H100"), "--memory 80", "as in 80GB"),
        ((8, 1, "0GB", "H100"), "--memory 0GB", "as in 80GB"),
        ((8, 1, "80GB", "Voodoo 2"), "--device Voodoo 2", "H200"),
    ],
)
def test_unknown_hardware_is_refused_with_the_remedy(values, problem, remedy):
    with pytest.raises(UserError) as error:
        Cluster.of(*values)
    assert problem in error.value.problem
    assert remedy in error.value.remedy


def test_memory_has_units_of_both_kinds_and_the_devices_own_by_default():
    assert Cluster.of(1, 1, "80gb", "H100").memory == 80 * 10**9
    assert Cluster.of(1, 1, "79.5 GiB", "H100").memory == round(79.5 * 2**30)
    assert Cluster.of(1, 1, None, "NVIDIA H200").memory == known_device("H200").memory_gb * 10**9


@pytest.mark.parametrize(
    ("sections", "zero", "problem", "remedy"),
    [
        ({"llm": {"path": "/nowhere/model"}}, None, "llm.path: /nowhere/model", "config.json"),
        ({"llm": {"path": "/nowhere/model.gguf"}}, None, "llm.path: /nowhere/model.gguf", ".gguf file"),
        ({"train": {"batch_size": 4}}, None, "train.accumulate", "train.batch_size"),
        ({"train": {"blocks": [7]}}, None, "train.blocks", ""),
        ({"shards": {"state_blocks": [7]}}, None, "shards.state_blocks", ""),
        ({"ids": {"model": "import", "imported": {"items": "no.npy"}}}, None, "no.npy", ""),
    ],
)
def test_runs_that_cannot_be_planned_are_refused_with_the_remedy(llama, tmp_path, sections, zero, problem, remedy):
    path = written(tmp_path, llama, **sections)
    with pytest.raises(UserError) as error:
        plan(open_run(path, []), replace(GPU, gpus=8), zero)
    assert problem in error.value.problem
    assert remedy in error.value.remedy


def test_four_bits_are_refused_where_weights_are_sharded(llama, tmp_path):
    path = written(tmp_path, llama, llm={"quantize": "nf4"})
    with pytest.raises(UserError, match=r"llm\.quantize: --zero 3") as error:
        plan(open_run(path, []), replace(GPU, gpus=2), "3")
    assert "--zero 2" in error.value.remedy
    assert set(plan(open_run(path, []), replace(GPU, gpus=2), None).memories) == {"0", "1", "2"}


def test_an_unknown_engine_is_refused():
    assert [parse_engine(name) for name in ("0", "3", "FSDP2")] == ["0", "3", "fsdp2"]
    with pytest.raises(UserError, match="--zero 4") as error:
        parse_engine("4")
    assert "fsdp2" in error.value.remedy


@pytest.mark.parametrize("size", ["80", "80GB/40GB", "80GB x 8", "640gbit", "GB", "-80GB"])
def test_what_is_no_size_of_a_memory_is_refused(size):
    with pytest.raises(UserError, match="--memory"):
        Cluster.of(1, 1, size, "H100")
    assert Cluster.of(1, 1, "79.1 GiB", "H100").memory == round(79.1 * 2**30)
