"""Figures of `rarec plan`, checked by hand: memory, invariants, lengths of prompts, samples."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.numpy import save_file

from rarec.config import VARIANTS, RunConfig
from rarec.data.shards.files import INDEX
from rarec.entry import open_run
from rarec.errors import UserError
from rarec.models.build import SourceShape
from rarec.planning.activations import MemoryTracker, StepShape, step_activations
from rarec.planning.costs import SHIPPED_ZERO, rank_memory, step_traffic
from rarec.planning.setup import ENGINES, EpochBatches, PromptLengths, SampleStats, prompt_length_bounds
from rarec.stages.train import plan
from rarec.stages.variant_training import open_feed
from tests.plans import BLOCKS, GPU, HEADS, D, E, F, M, V, calculator, tree, written
from tests.synthetic import write_llm

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    return write_llm(tmp_path_factory.mktemp("llm"), "llama", blocks=BLOCKS)


def test_frozen_and_trained_bytes_are_those_of_the_architecture(llama):
    variant = calculator(llama).meta_model("per_layer", False)
    block = 2 * D * D + 2 * D * (D // 2) + 3 * D * F + 2 * D  # q and o, k and v of half the heads, feed-forward, norms
    assert sum(weight.nbytes for weight in variant.frozen) == 4 * (V * D + BLOCKS * block + D)  # no head
    assert variant.block_numel == BLOCKS * block
    maps = BLOCKS + 1  # one behind the last block, which is read
    side = maps * (M * D + D * E + D) + E + 2 * D * D + D  # M, W, b; vector for missing IDs; heads, one bias
    assert sum(weight.numel for weight in variant.trainable) == 2 * side + 1
    fixed = 2 * E + maps + 2 * (D + D * D)  # vectors' mean and spread; units of maps; means and whitening of states
    assert variant.buffer_bytes == 4 * 2 * fixed
    assert variant.file_bytes == {"alignment": 4 * (2 * side + 1 + 2 * fixed), "lora": 0}
    assert rank_memory(variant, "3", 2).buffers == variant.buffer_bytes  # engines do not shard it


def test_of_a_wide_model_the_directions_are_held_once_a_side(llama):
    narrow = calculator(llama, readout={"size": 8}).meta_model("per_layer", False)
    fixed = 2 * E + BLOCKS + 1 + 8 * D + 2 * (D + 8 * 8)
    assert narrow.buffer_bytes == 4 * 2 * fixed


def test_lora_trains_in_float32_beside_a_model_in_bfloat16(llama):
    made = calculator(llama, llm={"dtype": "bfloat16"})
    plain, lora = (made.meta_model(name, False) for name in ("per_layer", "per_layer_lora"))
    more = BLOCKS * 16 * (D + D + D + D // 2)  # rank 16 on the queries, and on the values of half the heads
    assert sum(w.numel for w in lora.trainable) - sum(w.numel for w in plain.trainable) == more
    assert lora.file_bytes["lora"] == 4 * more
    assert {weight.element_bytes for weight in lora.frozen} == {2}
    assert {weight.element_bytes for weight in lora.trainable} == {4}


def test_engines_hold_what_their_table_says(llama):
    variant = calculator(llama).meta_model("per_layer", False)
    frozen, trained = (sum(w.nbytes for w in part) for part in (variant.frozen, variant.trainable))
    settings = replace(SHIPPED_ZERO, persistent=0)
    of = {stage: rank_memory(variant, stage, 4, zero=settings) for stage in ENGINES}
    share = 4 * sum(-(-weight.numel // 4) for weight in variant.trainable)
    assert [of[stage].frozen for stage in ("0", "1", "2")] == [frozen] * 3
    assert of["3"].frozen == 4 * sum(-(-weight.numel // 4) for weight in variant.frozen)
    assert of["fsdp2"].frozen == frozen / 4
    assert [of[stage].trainable for stage in ENGINES] == [trained, trained, trained, share, trained]
    assert [of[stage].gradients for stage in ENGINES] == [trained, trained, share, share, trained]
    assert [of[stage].optimizer for stage in ENGINES] == [2 * trained, 3 * share, 3 * share, 3 * share, 2 * trained]
    assert [of[stage].buckets for stage in ENGINES] == [trained, 200_000_000, 200_000_000, 200_000_000, trained]


def test_zero_3_keeps_small_tensors_whole_beside_their_shards(llama):
    variant = calculator(llama).meta_model("text_only", False)
    whole = sum(weight.nbytes for weight in variant.frozen)
    sharded = rank_memory(variant, "3", 2, zero=replace(SHIPPED_ZERO, persistent=0)).frozen
    assert max(weight.numel for weight in variant.frozen) < SHIPPED_ZERO.persistent
    assert rank_memory(variant, "3", 2).frozen == sharded + whole


def test_fsdp2_fills_up_the_rows_that_ranks_do_not_divide(tmp_path):
    path = write_llm(tmp_path / "llm", "gpt2")
    variant = calculator(path).meta_model("text_only", False)
    rows = sum(-(-weight.shape[0] // 3) * weight.numel // weight.shape[0] for weight in variant.frozen)
    assert rank_memory(variant, "fsdp2", 3).frozen == 4 * rows


def test_weights_in_four_bits_are_those_of_frozen_linear_layers(llama):
    variant = calculator(llama, llm={"dtype": "bfloat16", "quantize": "nf4"}).meta_model("per_layer_lora", False)
    linear = BLOCKS * (2 * D * D + 2 * D * (D // 2) + 3 * D * F)
    norms, table = BLOCKS * 2 * D + D, V * D
    assert sum(weight.nbytes for weight in variant.frozen) == linear * (0.5 + 4 / 64) + 2 * (norms + table)


@pytest.mark.parametrize(("dtype", "kept"), [("float32", 4 * D), ("bfloat16", 2 * D)])
def test_a_block_saves_what_the_docstring_says(tmp_path, dtype, kept):
    def step(blocks: int, checkpointing: bool) -> int:
        path = tmp_path / str(blocks)
        if not path.exists():
            write_llm(path, "llama", blocks=blocks)
        made = calculator(path, llm={"dtype": dtype}, train={"blocks": [0]})
        shape = StepShape(3, 3, 1, {"user": 61, "item": 29}, (0,), {"id": (1, E)})  # with the slots, full 32s
        return step_activations(made.meta_model("per_layer", checkpointing), made.config.loss, shape).saved

    def positions(of_position) -> int:
        lengths = [text + M + 1 for text in (61, 29)]
        return sum(3 * length * of_position(length) for length in lengths)

    formulas = {
        "float32": lambda length: 24 * D + 12 * F + 4 * length + 4 * HEADS + 8,
        "bfloat16": lambda length: 16 * D + 6 * F + 2 * length + 4 * HEADS + 8,
    }
    assert step(3, False) - step(2, False) == positions(formulas[dtype]) + 2 * 16
    assert step(3, True) - step(2, True) == positions(lambda _: kept)


def test_live_bytes_are_counted_until_they_are_freed():
    there = torch.empty(100, device="meta")
    with MemoryTracker([there]) as live:
        first = there + 1
        view = first.view(10, 10)
        second = first * 2
        assert (live.current, live.peak) == (800, 800)
        del first
        assert live.current == 800  # a view holds it
        del view
        assert (live.current, live.peak) == (400, 800)
        del second
    assert live.current == 0


@pytest.mark.parametrize("variant", ["text_only", "per_layer", "per_layer_lora"])
def test_under_zero_3_more_ranks_never_need_more_memory_on_each(llama, variant):
    made = calculator(llama)
    totals = [made.memory(variant, made.setup(replace(GPU, gpus=ranks), "3")).peak for ranks in (1, 2, 3, 4, 8, 16)]
    assert totals == sorted(totals, reverse=True)


@pytest.mark.parametrize("ranks", [1, 2, 7, 8])
def test_sharding_never_holds_more_frozen_bytes(tmp_path, ranks):
    path = write_llm(tmp_path / "llm", "llama", vocabulary=4000)
    variant = calculator(path).meta_model("per_layer", False)
    settings = replace(SHIPPED_ZERO, persistent=D)
    of = {stage: rank_memory(variant, stage, ranks, zero=settings) for stage in ("2", "3")}
    assert of["3"].frozen <= of["2"].frozen + 4 * sum(w.numel for w in variant.frozen if w.numel <= D) + 4 * len(
        variant.frozen
    )
    assert ranks == 1 or of["3"].frozen < of["2"].frozen
    assert of["3"].static <= of["2"].static + 4 * len(variant.weights) + 4 * D * len(variant.frozen)


@pytest.mark.parametrize("kind", ["bert", "gpt2", "qwen3", "llama"])
@pytest.mark.parametrize("attention", ["auto", "eager", "flash_attention_2"])
def test_every_architecture_and_attention_is_traced(tmp_path, kind, attention):
    path = write_llm(tmp_path / "llm", kind)
    made = calculator(path, llm={"attention": attention})
    setting = made.setup(GPU, "0")
    plain = made.memory("per_layer", setting)
    recomputed = made.memory("per_layer", replace(setting, checkpointing=True))
    assert recomputed.activations < plain.activations
    assert made.memory("text_only", setting).activations < plain.activations
    assert plain.frozen == recomputed.frozen


def test_no_gradient_reaches_the_language_model_of_an_variant_without_slots(llama):
    made = calculator(llama)
    variant = made.meta_model("text_only", False)
    assert (variant.first_grad_block, made.steps("text_only")) == (None, None)  # as many as there are samples
    assert calculator(llama, readout={"head": False}).steps("text_only") == 0
    sent = step_traffic(variant, "3", 2, 1, made.activations("text_only", made.setup(replace(GPU, gpus=2), "3")))
    trunk = sum(weight.nbytes for weight in variant.frozen if weight.in_llm)
    assert sent.weights == trunk  # both towers, forward alone, and half of it is away


def test_zero_3_saves_gathered_matrices_unless_blocks_are_recomputed(tmp_path):
    path = write_llm(tmp_path / "llm", "llama", blocks=4)
    made = calculator(path)
    variant, recomputing = (made.meta_model("per_layer", recomputes) for recomputes in (False, True))
    few = replace(SHIPPED_ZERO, persistent=0, live=1000)
    matrices = 2 * sum(weight.nbytes for weight in variant.frozen if weight.linear and weight.block is not None)
    kept, recomputed = (rank_memory(each, "3", 2, few).gathered for each in (variant, recomputing))
    assert kept >= matrices
    assert recomputed < matrices / 4


def test_deepspeed_is_planned_as_it_is_shipped():
    for stage in ("1", "2", "3"):
        shipped = json.loads((ROOT / "configs" / "deepspeed" / f"zero{stage}.json").read_text())["zero_optimization"]
        assert shipped.get("reduce_bucket_size", 500_000_000) == SHIPPED_ZERO.bucket
        assert shipped.get("memory_efficient_linear", False) is False
    assert shipped["stage3_max_live_parameters"] == shipped["stage3_max_reuse_distance"] == SHIPPED_ZERO.live
    assert shipped["stage3_param_persistence_threshold"] == SHIPPED_ZERO.persistent


def test_prompts_are_bounded_by_the_configuration(llama):
    prompt = {"user": "{soft:id} Next after: {history}.", "item": "{title}. {text}", "separator": ", "}
    config = RunConfig.model_validate(
        tree(llama, prompt={**prompt, "max_history": 3, "max_title_tokens": 5, "max_text_tokens": 7})
    )
    user = 2 + 4 + 3 * (5 + 1)  # specials; two words, colon and dot; three titles, each with a comma
    bounds = prompt_length_bounds(config, {"user": 3, "item": 0}, 128)
    assert {side: prompts.longest for side, prompts in bounds.items()} == {"user": user, "item": 2 + 1 + 7}
    assert prompt_length_bounds(config, {"user": 3, "item": 0}, 10)["user"].longest == 10 - 3


@pytest.mark.slow
def test_samples_and_lengths_are_those_of_the_shards(finished):
    made = plan(open_run(finished, []), GPU, None)
    index = np.load(finished.parent / "run" / "shards" / INDEX)
    samples = made.calculator.samples
    assert samples.count == len(index)
    assert index["tokens"].max() <= samples.user_prompts.longest < index["tokens"].max() + 16
    steps = json.loads((finished.parent / "run" / "train" / "per_layer" / "manifest.json").read_text())["step"]
    assert made.calculator.steps("per_layer") >= steps
    assert made.calculator.steps("text_only") == made.calculator.steps("per_layer")
    bare = plan(open_run(finished, ["readout.head=false"]), GPU, None)
    assert bare.calculator.steps("text_only") == 0


def test_shards_of_other_settings_do_not_count(finished, capsys):
    made = plan(open_run(finished, ["prompt.max_history=3"]), GPU, None)
    assert made.calculator.samples is None
    assert "other settings" in capsys.readouterr().err


def test_checkpoint_and_bundle_are_as_large_as_planned(finished):
    variant = plan(open_run(finished, []), GPU, None).calculator.meta_model("per_layer", False)
    checkpoint = next((finished.parent / "run" / "train" / "per_layer" / "checkpoints").glob("step-*"))
    header = 4096
    for file, planned in (
        (checkpoint / "alignment.safetensors", variant.file_bytes["alignment"]),
        (checkpoint / "optimizer.safetensors", 2 * sum(weight.nbytes for weight in variant.trainable)),
        (finished.parent / "run" / "bundle" / "alignment.safetensors", variant.file_bytes["alignment"]),
    ):
        assert planned <= file.stat().st_size <= planned + header


@pytest.mark.parametrize("suffix", ["npy", "safetensors", "parquet"])
def test_the_dimension_of_imported_vectors_is_read_from_their_header(llama, tmp_path, suffix):
    file, vectors = tmp_path / f"items.{suffix}", np.zeros((5, 7), np.float32)
    if suffix == "npy":
        np.save(file, vectors)
    elif suffix == "safetensors":
        save_file({"items": vectors}, file)
    else:
        pq.write_table(pa.table({"id": list(range(5)), "vector": vectors.tolist()}), file)
    np.save(tmp_path / "users.npy", np.zeros((4, 3, 7), np.float32))
    imported = {"items": str(file), "users": str(tmp_path / "users.npy")}
    path = written(tmp_path, llama, ids={"model": "import", "imported": imported})
    made = plan(open_run(path, []), GPU, None)
    assert made.calculator.builder.sources == {"id": SourceShape(7, 3)}


def test_under_a_token_budget_steps_and_the_largest_batch_are_those_of_the_training(finished):
    """Short prompts make batches of more samples than the budget holds of the longest."""
    run = open_run(finished, ["train.tokens_per_batch=700"])
    made = plan(run, GPU, None).calculator
    sizes = [len(batch) for batch in open_feed(run).plan().batches(0)]
    assert (made.batches.count, made.batches.smallest) == (len(sizes), min(sizes))
    assert made.batches.mean_size == pytest.approx(np.mean(sizes))
    assert made.batches.largest[0][0] == max(sizes) > 700 // made.prompts["user"].longest
    assert made.batches.largest[-1][1] == made.prompts["user"].longest
    planned = made.step_shape("per_layer", made.setup(GPU, "0"))
    assert (planned.total, planned.text["user"]) == made.batches.largest[0], (
        "in this run, the batch with most samples needs the most memory"
    )


def test_without_shards_a_token_budget_is_planned_by_the_longest_prompts(llama):
    made = calculator(llama, train={"tokens_per_batch": 4000})
    size = 4000 // (made.prompts["user"].longest + M + 1)
    assert (made.batches.count, made.batches.mean_size) == (None, size)
    assert made.steps("per_layer") is None


def test_lengths_are_summarised():
    lengths = PromptLengths.of(np.array([16, 16, 32, 16]))
    assert (lengths.longest, lengths.mean) == (32, 20)


def test_packed_prompts_take_their_own_length_and_padded_ones_the_longest(llama):
    peaks = []
    for packing, positions in ((False, 32), (True, 20)):
        made = calculator(llama, llm={"packing": packing})
        made.samples = SampleStats(4, PromptLengths(32, 20))
        setup = made.setup(GPU, "0")
        assert made.step_shape("per_layer", setup).text["user"] == positions
        peaks.append(made.memory("per_layer", setup).peak)
    assert peaks[0] > peaks[1]


@pytest.mark.parametrize(("packed", "largest"), [(False, ((3, 4), (1, 9))), (True, ((3, 3), (1, 9)))])
def test_packing_counts_under_a_token_budget_too(packed, largest):
    epoch = EpochBatches.from_lengths([np.array([2, 2, 4]), np.array([9])], packed)
    assert epoch.largest == largest


def test_a_plan_refuses_to_pack_what_cannot_be_packed(tmp_path):
    path = written(tmp_path, write_llm(tmp_path / "bert", "bert"), llm={"packing": True})
    with pytest.raises(UserError, match=r"llm\.packing.*bert"):
        plan(open_run(path, []), GPU, None)


def test_every_variant_has_shapes(llama):
    made = calculator(llama)
    counts = {name: sum(weight.numel for weight in made.meta_model(name, False).trainable) for name in VARIANTS}
    assert counts["text_only"] < counts["prefix_only"] < counts["per_layer"] < counts["per_layer_lora"]
