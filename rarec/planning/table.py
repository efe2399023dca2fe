"""A plan in the terminal: variants, engines, and what to do, in words."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from rich.table import Table

from rarec.config import VARIANTS
from rarec.planning.advice import Advice
from rarec.planning.calculator import Calculator, Estimate
from rarec.planning.memory import Account, Stage
from rarec.planning.setting import Setting
from rarec.planning.traffic import MFU

NAMES: dict[Stage, str] = {"0": "DDP", "1": "ZeRO-1", "2": "ZeRO-2", "3": "ZeRO-3", "fsdp2": "FSDP2"}
FILES: dict[Stage, str] = {"0": "ddp", "1": "zero1", "2": "zero2", "3": "zero3", "fsdp2": "fsdp2"}
ROWS = {
    "frozen weights": "frozen",
    "whitening, units": "fixed",
    "what trains": "trained",
    "its gradients": "gradients",
    "Adam": "optimizer",
    "buckets of messages": "buckets",
    "activations": "training",
    "weights gathered for a while": "gathered",
    "or, encoding at a validation": "encoding",
    "or, updating and saving": "update",
}
GUESSED = 100_000
"""Samples for which hours are told where their number is not known."""


@dataclass(frozen=True)
class Plan:
    """What is shown.

    Attributes:
        calculator: of the run.
        estimates: of each variant, as planned.
        largest: the variant that decides.
        accounts: of that variant, by engine.
        advice: for it.
    """

    calculator: Calculator
    estimates: dict[str, Estimate]
    largest: str
    accounts: dict[Stage, Account]
    advice: Advice


def show(plan: Plan, run: str) -> Iterator[Table | str]:
    """Tables and lines, one after the other.

    Args:
        plan: what is shown.
        run: its file and overrides, for the command that starts it.
    """
    yield _title(plan) + "\n"
    yield _variants(plan)
    yield ""
    yield _engines(plan)
    yield "\n" + "\n".join((*_advice(plan, run), *_facts(plan)))


def name_of(setting: Setting) -> str:
    """The engine of a setting."""
    return "one process" if setting.stage == "0" and setting.cluster.ranks == 1 else NAMES[setting.stage]


def _title(plan: Plan) -> str:
    config, cluster = plan.calculator.config, plan.advice.setting.cluster
    where = f"{cluster.machines} machines of " if cluster.machines > 1 else ""
    kept = f"{cluster.memory / 1e9:,.1f} GB, {cluster.usable / 1e9:,.1f} of them for training"
    return f"{config.llm.path} in {config.llm.dtype} on {where}{cluster.gpus} x {cluster.device.name} with {kept}"


def _variants(plan: Plan) -> Table:
    table = _table(
        f"each variant, {name_of(plan.advice.setting)}", "trains", "peak", "steps", "hours", "checkpoint", "bundle"
    )
    for name, estimate in plan.estimates.items():
        shapes = plan.calculator.variant(name, plan.advice.setting.checkpointing)
        trained, saved = sum(weight.count for weight in shapes.trained), sum(shapes.saved.values())
        checkpoint = saved + 2 * sum(weight.bytes for weight in shapes.trained)
        steps = plan.calculator.steps(name)
        cells = [f"{trained:,}", _size(estimate.account.total), f"{steps:,}" if steps is not None else "?"]
        cells += [f"{estimate.hours:,.1f}" if estimate.hours else "0" if steps == 0 else "?"]
        cells += [_size(checkpoint), _size(shapes.bundled(plan.calculator.config.export.dtype))]
        style = "bold" if name == plan.largest else ""
        table.add_row(VARIANTS[name].title + (" (decides)" if style else ""), *cells, style=style)
    return table


def _engines(plan: Plan) -> Table:
    planned, usable = plan.advice.setting, plan.advice.setting.cluster.usable
    names = [name_of(planned) if stage == planned.stage else NAMES[stage] for stage in plan.accounts]
    table = _table("on each rank", *names)
    for row, field in ROWS.items():
        table.add_row(row, *(_size(getattr(account, field)) for account in plan.accounts.values()))
    table.add_row("peak", *(_size(account.total) for account in plan.accounts.values()), style="bold")
    fits = ("yes" if account.total <= usable else "NO" for account in plan.accounts.values())
    table.add_row("fits", *fits, style="bold")
    return table


def _advice(plan: Plan, run: str) -> Iterator[str]:
    advice, planned = plan.advice, plan.advice.setting
    advised = "none yet" if advice.stage is None else name_of(replace(planned, stage=advice.stage))
    yield f"advised: {advised}; {advice.why}."
    if not advice.fits:
        yield from _change(plan)
    chosen = advice.change or planned
    yield from _of_zero_3(plan, chosen)
    if advice.fits or advice.change:
        overrides = [word for word in planned.changes(chosen) if not word.startswith("--")]
        yield f"start it: {_command(chosen, run)}{''.join(f' {word}' for word in overrides)}"


def _of_zero_3(plan: Plan, chosen: Setting) -> Iterator[str]:
    """What is particular to it."""
    shapes = plan.calculator.variant(plan.largest, chosen.checkpointing)
    if chosen.stage == "3" and not chosen.checkpointing and shapes.first_block is not None:
        yield "ZeRO-3 holds each gathered matrix until its backward pass; llm.gradient_checkpointing=true spares that"
    if chosen.stage == "3" and chosen.cluster.machines > 1:
        second = _size(sum(weight.bytes for weight in shapes.frozen) / chosen.cluster.gpus)
        file = f"configs/accelerate/zero3_hpz.yaml (zero_hpz_partition_size: {chosen.cluster.gpus})"
        yield f"{file} gathers inside each machine alone, for {second} more on each rank"


def _change(plan: Plan) -> Iterator[str]:
    advice, planned = plan.advice, plan.advice.setting
    over = plan.accounts[planned.stage].total - planned.cluster.usable
    yield f"{name_of(planned)} lacks {_size(over)} on each GPU, while it is at {plan.accounts[planned.stage].highest}."
    if advice.change is None:
        yield "No change that was tried makes it fit: take GPUs of more memory, or another language model."
        return
    total = plan.calculator.account(plan.largest, advice.change).total
    yield f"smallest change that makes it fit: {' '.join(planned.changes(advice.change))} (peak {_size(total)})"
    if planned.accumulate != advice.change.accumulate:
        yield "  negatives are those of a part, so this changes what is trained"


def _facts(plan: Plan) -> Iterator[str]:
    calculator, setting = plan.calculator, plan.advice.change or plan.advice.setting
    estimate = calculator.estimate(plan.largest, setting)
    sent = estimate.traffic
    parts = {"gradients": sent.gradients, "weights": sent.weights, "vectors and states of the batch": sent.batch}
    yield f"sent by a rank in a step: {', '.join(f'{name} {_size(size)}' for name, size in parts.items())}"
    if estimate.speed is None:
        yield "speed: not estimated, for only the peak of bfloat16 is known here (llm.dtype=bfloat16)"
    else:
        fast, hours = estimate.speed, GUESSED / estimate.speed.samples / 3600
        yield (
            f"speed: {_few(fast.seconds)} s a step, {fast.tokens:,.0f} tokens/s a GPU, {_few(hours)} hours for each "
            f"{GUESSED:,} samples; without validation, at {MFU:.0%} of the peak"
        )
    yield _prompts(calculator, plan.largest, setting)
    yield _inside(calculator, plan.largest, setting)


def _prompts(calculator: Calculator, variant: str, setting: Setting) -> str:
    shape, slots = calculator.shape(variant, setting), calculator.slots(variant)
    lengths = ", ".join(f"{side} {shape.text[side] + slots[side]}" for side in shape.text)
    known = f"{calculator.samples.count:,} samples an epoch" if calculator.samples else "samples not known yet"
    source = "users' as the shards have them" if calculator.samples else "bounds of the configuration"
    said = f"a part on a rank: {shape.rows} of {shape.total} samples, prompts of {lengths} tokens ({source}); {known}"
    if calculator.config.train.tokens_per_batch and not calculator.samples:
        said += "; batches of shorter prompts hold more samples and may take more memory: plan again from the shards"
    return said


def _inside(calculator: Calculator, variant: str, setting: Setting) -> str:
    """What of the activations does not belong to the language model."""
    shape, model = calculator.shape(variant, setting), calculator.variant(variant, setting.checkpointing).model
    width = model.backbone.hidden_size
    alignments = [tower.alignment for tower in (model.user, model.item) if tower.alignment is not None]
    slots = sum(len(alignment.blocks) * sum(alignment.slots.values()) for alignment in alignments)
    sizes = {
        "slots": 4 * width * shape.rows * slots,
        "text-only states": 2 * 4 * width * len(shape.state_blocks) * (shape.rows + shape.total * (shape.ranks > 1)),
        "scores": 4 * shape.rows * shape.total,
    }
    waiting = _size(calculator.step(variant, setting).saved)
    return f"activations wait for the backward pass with {waiting}; in them: {_listed(sizes)}"


def _listed(sizes: dict[str, int]) -> str:
    return ", ".join(f"{name} {_size(size)}" for name, size in sizes.items())


def _command(setting: Setting, run: str) -> str:
    cluster = setting.cluster
    file = "one" if name_of(setting) == "one process" else FILES[setting.stage]
    machines = f" --num_machines {cluster.machines}" if cluster.machines > 1 else ""
    launch = f"accelerate launch --config_file configs/accelerate/{file}.yaml --num_processes {cluster.ranks}{machines}"
    return f"{launch} launch/train.py --config {run}"


def _table(title: str, *columns: str) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column(title)
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def _few(number: float) -> str:
    """In few digits, however small."""
    return f"{number:,.2f}" if number >= 1 else f"{number:.2g}"


def _size(size: float) -> str:
    unit, bytes_ = next(((u, b) for u, b in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)) if size >= b), ("B", 1))
    return f"{size / bytes_:,.2f} {unit}" if bytes_ > 1 else f"{size:.0f} B"
