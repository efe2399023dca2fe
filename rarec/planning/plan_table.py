"""Print a plan in the terminal: a table of variants, a table of engines, the advice and the command to start."""

import shlex
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
from rich.table import Column, Table

from rarec.config.shipped import shipped_file
from rarec.planning.advice import RunPlan
from rarec.planning.calculator import Calculator
from rarec.planning.costs import MFU
from rarec.planning.setup import EngineName, TrainingSetup

TITLES: dict[EngineName, str] = {"0": "DDP", "1": "ZeRO-1", "2": "ZeRO-2", "3": "ZeRO-3", "fsdp2": "FSDP2"}
ROWS = {
    "frozen weights": "frozen",
    "buffers (whitening)": "buffers",
    "trainable parameters": "trainable",
    "gradients": "gradients",
    "Adam states": "optimizer",
    "communication buckets": "buckets",
    "activations (peak)": "activations",
    "gathered weights (peak)": "gathered",
    "or: encoding": "encoding",
    "or: update, checkpoint": "update",
}
"""Rows of the table of engines: fields of `RankMemory`."""
PER_SAMPLES = 100_000
"""Number of samples for which hours and bytes are printed."""
SAMPLE_OVERHEAD = 6_000
"""Bytes of a sample in a tar beside its states and tokens: headers, padding, history, vectors. The demo has 5,400."""


def render(plan: RunPlan, run: str) -> Iterator[Table | str]:
    """Yield the tables and lines of a plan, in order.

    Args:
        plan: plan to print.
        run: configuration file and overrides, as a shell reads them, for the command that starts the training.
    """
    yield _heading(plan) + "\n"
    yield _variant_table(plan)
    yield "\n* needs the most memory; what follows is for this variant\n"
    yield _engine_table(plan)
    yield "\n" + "\n".join((*_advice(plan, run), *_facts(plan)))


def engine_title(setup: TrainingSetup) -> str:
    """Return the name of a setup's engine, for people."""
    return "one process" if setup.engine == "0" and setup.cluster.world_size == 1 else TITLES[setup.engine]


def _heading(plan: RunPlan) -> str:
    config, cluster = plan.calculator.config, plan.setup.cluster
    machines = f"{cluster.machines} machines of " if cluster.machines > 1 else ""
    memory = f"{cluster.memory / 1e9:,.1f} GB each ({cluster.usable / 1e9:,.1f} GB usable)"
    return f"{config.llm.path} in {config.llm.dtype} on {machines}{cluster.gpus} x {cluster.device.name}, {memory}"


def _variant_table(plan: RunPlan) -> Table:
    calculator, setup = plan.calculator, plan.setup
    columns = ("trainable", "peak", "steps", "hours", "checkpoint", "bundle")
    table = _table(f"variants, {engine_title(setup)}", *columns)
    for name in plan.variants:
        model = calculator.meta_model(name, setup.checkpointing)
        steps = calculator.steps(name)
        hours = calculator.hours(name, setup)
        cells = [
            f"{sum(weight.numel for weight in model.trainable):,}",
            _size(calculator.memory(name, setup).peak),
            "?" if steps is None else f"{steps:,}",
            "?" if hours is None else f"{hours:,.1f}" if hours else "0",
            _size(sum(model.file_bytes.values()) + 2 * sum(weight.nbytes for weight in model.trainable)),
            _size(model.bundle_bytes(calculator.config.export.dtype)),
        ]
        mark, style = (" *", "bold") if name == plan.largest else ("", "")
        table.add_row(calculator.config.variant(name).title + mark, *cells, style=style)
    return table


def _engine_table(plan: RunPlan) -> Table:
    planned = plan.setup
    titles = [engine_title(planned) if engine == planned.engine else TITLES[engine] for engine in plan.memories]
    table = _table("memory of each GPU", *titles)
    memories = plan.memories.values()
    for row, field in ROWS.items():
        table.add_row(row, *(_size(getattr(memory, field)) for memory in memories))
    table.add_row("peak", *(_size(memory.peak) for memory in memories), style="bold")
    fits = ("yes" if memory.peak <= planned.cluster.usable else "NO" for memory in memories)
    table.add_row("fits", *fits, style="bold")
    return table


def _advice(plan: RunPlan, run: str) -> Iterator[str]:
    planned = plan.setup
    chosen = plan.change or plan.setup
    engine = "no engine" if plan.engine is None else engine_title(replace(planned, engine=plan.engine))
    yield f"recommended: {engine}; {plan.reason}."
    if not plan.fits:
        yield from _change(plan)
    if chosen.engine == "3":
        yield from _zero3_hints(plan, chosen)
    if plan.fits or plan.change:
        overrides = [word for word in planned.changes(chosen) if not word.startswith("--")]
        yield f"start: {' '.join([launch_command(chosen), run, *overrides])}"


def _change(plan: RunPlan) -> Iterator[str]:
    planned, change = plan.setup, plan.change
    memory = plan.memories[planned.engine]
    missing = _size(memory.peak - planned.cluster.usable)
    yield f"{engine_title(planned)} lacks {missing} on each GPU; the peak is in the phase {memory.peak_phase!r}."
    if change is None:
        yield "No change that was tried makes it fit: use GPUs with more memory, or another language model."
        return
    peak = plan.calculator.memory(plan.largest, change).peak
    yield f"smallest change that makes it fit: {' '.join(planned.changes(change))} (peak {_size(peak)})"
    if planned.accumulate != change.accumulate:
        yield "  this changes the training: in-batch negatives come from one micro-batch"


def _zero3_hints(plan: RunPlan, chosen: TrainingSetup) -> Iterator[str]:
    model = plan.calculator.meta_model(plan.largest, chosen.checkpointing)
    gpus = chosen.cluster.gpus
    if not chosen.checkpointing and model.first_grad_block is not None:
        yield "ZeRO-3 keeps each gathered matrix until its backward pass; llm.gradient_checkpointing=true avoids this"
    if chosen.cluster.machines > 1:
        second = _size(sum(weight.nbytes for weight in model.frozen) / gpus)
        setting = f"{shipped_file('configs/accelerate/zero3_hpz.yaml')} (zero_hpz_partition_size: {gpus})"
        yield f"{setting} gathers weights inside each machine alone, for {second} more on each GPU"


def _facts(plan: RunPlan) -> Iterator[str]:
    calculator = plan.calculator
    variant = plan.largest
    setup = plan.change or plan.setup
    sent = calculator.traffic(variant, setup)
    parts = {"gradients": sent.gradients, "weights": sent.weights, "vectors and states of the batch": sent.batch}
    yield f"sent by each rank per step: {_list_sizes(parts)}"
    yield _speed(calculator, variant, setup)
    yield _micro_batch(calculator, variant, setup)
    yield _saved_activations(calculator, variant, setup)
    yield _disk(calculator, variant, setup)


def _speed(calculator: Calculator, variant: str, setup: TrainingSetup) -> str:
    seconds = calculator.step_seconds(variant, setup)
    if seconds is None:
        return "speed: not estimated; only the peak of bfloat16 is listed (set llm.dtype=bfloat16)"
    tokens = calculator.step_tokens(variant, setup) / seconds
    hours = PER_SAMPLES / (calculator.batches.mean_size / seconds) / 3600
    return (
        f"speed: {_digits(seconds)} s per step, {tokens:,.0f} tokens/s per GPU, "
        f"{_digits(hours)} hours per {PER_SAMPLES:,} samples, without validation, at {MFU:.0%} of the peak"
    )


def _micro_batch(calculator: Calculator, variant: str, setup: TrainingSetup) -> str:
    shape = calculator.step_shape(variant, setup)
    slots = calculator.slots(variant)
    lengths = ", ".join(f"{side} {shape.text[side] + slots[side]}" for side in shape.text)
    line = f"micro-batch of a rank: {shape.rows} of {shape.total} samples, prompts of {lengths} tokens "
    if calculator.samples:
        return line + f"(user prompts as in the shards); {calculator.samples.count:,} samples per epoch"
    line += "(upper bounds from the configuration); unknown number of samples"
    if calculator.config.train.tokens_per_batch:
        line += "; batches of shorter prompts have more samples and may need more memory: plan again after rarec shards"
    return line


def _saved_activations(calculator: Calculator, variant: str, setup: TrainingSetup) -> str:
    """Describe the activations that wait for the backward pass, and the part outside the language model."""
    shape = calculator.step_shape(variant, setup)
    model = calculator.meta_model(variant, setup.checkpointing).model
    width = model.backbone.hidden_size
    alignments = [tower.alignment for tower in (model.user, model.item) if tower.alignment is not None]
    slots = sum(len(alignment.blocks) * sum(alignment.slots.values()) for alignment in alignments)
    states = shape.rows + shape.total * (shape.world_size > 1)
    sizes = {
        "slots": 4 * width * shape.rows * slots,
        "text-only states": 2 * 4 * width * len(shape.state_blocks) * states,
        "scores": 4 * shape.rows * shape.total,
    }
    saved = _size(calculator.activations(variant, setup).saved)
    return f"activations saved for the backward pass: {saved}, including {_list_sizes(sizes)}"


def _disk(calculator: Calculator, variant: str, setup: TrainingSetup) -> str:
    """Describe the space that `run.dir` needs: what is there stays until its replacement is whole."""
    config = calculator.config
    model = calculator.meta_model(variant, setup.checkpointing)
    checkpoint = 3 * 4 * sum(weight.numel for weight in model.trainable)  # and Adam's two moments, in float32
    shape = calculator.step_shape(variant, setup)
    width = model.model.backbone.hidden_size
    states = len(shape.state_blocks) * width * np.dtype(config.shards.state_dtype).itemsize
    sample = states + 4 * shape.text["user"] + SAMPLE_OVERHEAD
    count, per = (
        (calculator.samples.count, "") if calculator.samples else (PER_SAMPLES, f" per {PER_SAMPLES:,} samples")
    )
    return (
        f"disk: shards {_size(sample * count)}{per}; checkpoints {_size(checkpoint)} each, at most "
        f"{config.train.keep + 2} of a variant; with --fresh, both the old and the new at the same time"
    )


def launch_command(setup: TrainingSetup) -> str:
    """Return the command that starts a training, up to the configuration's file.

    Accelerate's files name DeepSpeed's relative to the repository's root; elsewhere its path is given as an option.
    """
    cluster = setup.cluster
    title = engine_title(setup)
    file = "one" if title == "one process" else title.lower().replace("-", "")
    words = ["accelerate", "launch", "--config_file", str(shipped_file(f"configs/accelerate/{file}.yaml"))]
    deepspeed = f"configs/deepspeed/{file}.json"
    if title.startswith("ZeRO") and not Path(deepspeed).is_file():
        words += ["--deepspeed_config_file", str(shipped_file(deepspeed))]
    words += ["--num_processes", str(cluster.world_size)]
    words += ["--num_machines", str(cluster.machines)] if cluster.machines > 1 else []
    return shlex.join([*words, "-m", "rarec", "train"])


def _table(title: str, *names: str) -> Table:
    columns = [Column(name, justify="right", no_wrap=True) for name in names]
    return Table(title, *columns, box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")


def _list_sizes(sizes: dict[str, int]) -> str:
    return ", ".join(f"{name} {_size(size)}" for name, size in sizes.items())


def _digits(number: float) -> str:
    return f"{number:,.2f}" if number >= 1 else f"{number:.2g}"


def _size(size: float) -> str:
    unit, factor = next(((u, b) for u, b in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)) if size >= b), ("B", 1))
    return f"{size / factor:,.2f} {unit}" if factor > 1 else f"{size:.0f} B"
