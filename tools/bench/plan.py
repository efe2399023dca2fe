"""Compare `rarec plan` with measured memory and traffic: the real engines, taking real steps on two CPU ranks.

    python -m tools.bench.plan [--blocks 8] [--hidden 256] [--batch 64]

The model is a Llama with random weights, slots in every block and LoRA; a step has two micro-batches. On rank 0:

weights, gradients, Adam: the storages of parameters, of their shards, of DeepSpeed's flat copies and of the optimizer's
    states. A storage of several tensors counts once. Gradients are read after each micro-batch: the larger counts.
saved: what autograd packs in the forward pass (`saved_tensors_hooks`), each storage once, without parameters. Only for
    one process without recomputed blocks: with them, autograd packs nothing but placeholders.
step: the most bytes allocated at once in a step beyond those at its start, by PyTorch's profiler of the allocator:
    activations, gathered weights, buckets, gradients of the micro-batches.
sent: the bytes of calls to torch.distributed in a step (DDP's and FSDP2's own messages bypass it and are not measured).

DeepSpeed runs with buckets of 200,000 elements, a million live parameters and no persistent ones, because the shipped
limits are larger than so small a model; the plan uses the same values.
"""

import json
import os
import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.profiler import ProfilerActivity, profile, record_function

from rarec.config import VARIANTS, RunConfig
from rarec.models.build import SIDES, SourceShape, build_model
from rarec.models.losses import LossTargets, Objective
from rarec.models.towers import SideBatch
from rarec.planning.activations import HISTORY
from rarec.planning.calculator import Calculator
from rarec.planning.costs import ZeroSettings, step_traffic
from rarec.planning.meta_model import MetaModelBuilder
from rarec.planning.setup import Cluster, EngineName, PromptLengths, TrainingSetup
from rarec.stages.run import Run
from tools.bench.measuring import Figure, model_tree, on_ranks, options, print_table
from tools.bench.small_runs import ROOT, bytes_of, llama, local, write_llama

VARIANT, SOURCES = "per_layer_lora", {"id": SourceShape(64, 1)}
TEXT = {"user": PromptLengths(60, 60), "item": PromptLengths(20, 20)}
LIMIT, LIVE = 200_000, 1_000_000
ZERO = ZeroSettings(LIMIT, LIVE, persistent=0)
LIMITS = {
    "reduce_bucket_size": LIMIT,
    "stage3_prefetch_bucket_size": 50_000,
    "stage3_max_live_parameters": LIVE,
    "stage3_max_reuse_distance": LIVE,
    "stage3_param_persistence_threshold": 0,
}
STATIC, TEMPORARY = 0.15, 0.25
"""Allowed relative errors of the plan."""
SENT = {"all_reduce": 2, "all_gather": 1, "all_gather_into_tensor": 1, "reduce_scatter_tensor": 1}
"""How often an operation of a ring sends its largest tensor."""


@dataclass(frozen=True)
class Case:
    """One training: engine, number of ranks, gradient checkpointing, and dtype of the frozen weights."""

    engine: EngineName
    ranks: int
    checkpointing: bool
    dtype: str = "float32"

    @property
    def name(self) -> str:
        """The name in the table."""
        several = {"0": "DDP", "fsdp2": "FSDP2"}.get(self.engine, f"ZeRO-{self.engine}")
        engine = several if self.ranks > 1 else "one process"
        return engine + (", recomputed" if self.checkpointing else "") + (", bf16" if self.dtype == "bfloat16" else "")

    @property
    def is_zero(self) -> bool:
        """Return whether DeepSpeed trains."""
        return self.engine in ("1", "2", "3")

    def tree(self, scratch: Path, batch: int) -> dict[str, Any]:
        """Return the configuration of the run."""
        llm = {"path": str(scratch / "llm"), "dtype": self.dtype, "gradient_checkpointing": self.checkpointing}
        train = {"batch_size": batch, "accumulate": 2, "variants": [VARIANT]}
        return model_tree(run={"dir": str(scratch / "run"), "device": "cpu"}, llm=llm, train=train)


CASES = (
    *(Case("0", 1, recomputed, dtype) for dtype in ("float32", "bfloat16") for recomputed in (False, True)),
    *(Case(engine, 2, False) for engine in ("0", "1", "2", "3", "fsdp2")),
    *(Case(engine, 2, True) for engine in ("3", "fsdp2")),
)


def main() -> None:
    """Print the table; exit with code 1 if an error of the plan is too large."""
    arguments = options(__doc__, blocks=8, hidden=256, batch=64)
    figures: list[Figure] = []
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        shape = llama(arguments.hidden, 3 * arguments.hidden, arguments.blocks, (8, 2), vocab_size=4000)
        write_llama(scratch / "llm", ["a"], **shape)
        for case in CASES:
            tree = case.tree(scratch, arguments.batch)
            measured = on_ranks(case.ranks, train_on, case, tree, scratch / "deepspeed.json")
            figures += compared(case, planned(case, tree), measured)
    print_table(figures)
    raise SystemExit(any(figure.met is False for figure in figures))


def calculator_of(case: Case, tree: dict[str, Any]) -> tuple[Calculator, TrainingSetup]:
    """Return the calculator with the prompt lengths that are measured, and the setup."""
    config = RunConfig.model_validate(tree)
    calculator = Calculator(config, MetaModelBuilder(config, SOURCES, Path("-")), zero=ZERO)
    calculator.prompts = TEXT
    return calculator, calculator.setup(Cluster.of(case.ranks, 1, None, "H100"), case.engine)


def planned(case: Case, tree: dict[str, Any]) -> dict[str, int]:
    """Return the plan's values of the figures that are measured."""
    calculator, setup = calculator_of(case, tree)
    memory, step = calculator.memory(VARIANT, setup), calculator.activations(VARIANT, setup)
    buckets = memory.buckets if case.engine in ("1", "2") else 0
    gradients = memory.gradients if case.engine in ("0", "1", "fsdp2") else 0  # allocated in a step, freed at its end
    model = calculator.meta_model(VARIANT, case.checkpointing)
    sent = step_traffic(model, case.engine, case.ranks, 2, step)
    return {
        "frozen weights": memory.frozen,
        "buffers": memory.buffers,
        "trainable parameters": memory.trainable,
        "gradients": memory.gradients,
        "Adam states": memory.optimizer,
        "saved": step.saved,
        "step": memory.activations + memory.gathered + buckets + gradients,
        "sent": sent.gradients + sent.weights + sent.batch,
    }


def compared(case: Case, plan: dict[str, int], measured: dict[str, int]) -> list[Figure]:
    """Return a line for each measured figure."""
    lines = []
    for what, value in measured.items():
        off, goal = plan[what] / value - 1, TEMPORARY if what in ("saved", "step", "sent") else STATIC
        figure = f"{value / 1e6:,.2f} MB, planned {plan[what] / 1e6:,.2f} ({off:+.1%})"
        lines.append(Figure(f"{case.name}: {what}", figure, f"within {goal:.0%}", abs(off) <= goal))
    return lines


def train_on(case: Case, tree: dict[str, Any], deepspeed: Path) -> dict[str, int]:
    """Train on this rank, and return its figures."""
    os.environ["ACCELERATE_USE_FSDP"] = str(case.engine == "fsdp2")
    if case.is_zero:
        shipped = json.loads((ROOT / "configs" / "deepspeed" / f"zero{case.engine}.json").read_text())
        text = json.dumps({"zero_optimization": shipped["zero_optimization"] | LIMITS})
        own = deepspeed.with_name(f"{os.environ['RANK']}.json")
        own.write_text(text)
        os.environ |= {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(own)}
    training = Training(case, tree)
    figures = training.figures()
    training.optimisation.end()
    return figures


def count_sent() -> dict[str, int]:
    """Wrap torch.distributed to count the bytes that this rank sends; return the counter."""
    sent = {"bytes": 0}

    def wrapped(function: Callable[..., Any], factor: int) -> Callable[..., Any]:
        def call(*arguments: Any, **keywords: Any) -> Any:
            given = [each for each in (*arguments, *keywords.values()) if isinstance(each, Tensor | list)][:2]
            size = max(sum(t.nbytes for t in (each if isinstance(each, list) else [each])) for each in given)
            sent["bytes"] += round(factor * size * (dist.get_world_size() - 1) / dist.get_world_size())
            return function(*arguments, **keywords)

        return call

    for name, factor in SENT.items():
        setattr(dist, name, wrapped(getattr(dist, name), factor))
    return sent


class Training:
    """Train a variant for some steps and measure them.

    Args:
        case: engine and settings.
        tree: configuration of the run.
    """

    def __init__(self, case: Case, tree: dict[str, Any]) -> None:
        self.case, self.sent, self.largest_gradients = case, count_sent(), 0
        run = Run(RunConfig.model_validate(tree), say=lambda line: None)
        calculator, setup = calculator_of(case, tree)
        self.shape = shape = calculator.step_shape(VARIANT, setup)
        named = dict.fromkeys(SIDES, tuple(SOURCES))
        self.model = build_model(run.config, VARIANTS[VARIANT], run.load_llm(VARIANTS[VARIANT]), SOURCES, named)
        with torch.no_grad():
            for parameter in self.model.parameters():
                if parameter.requires_grad and parameter.numel() > 1:
                    parameter.normal_(std=0.02)
        self.rank = run.world.rank
        self.optimisation = run.engine.train(self.model, run.config.train)
        self.optimizer = cast(Any, self.optimisation).optimizer  # each engine has its own
        self.objective = Objective(run.config.loss, torch.ones(shape.total), shape.state_blocks, run.world)
        self.model.train()

    def figures(self) -> dict[str, int]:
        """Measure a step, after enough steps for DeepSpeed to know the order of its gathers."""
        for _ in range(3):
            before = self.sent["bytes"]
            self.step()
        sent, figures = self.sent["bytes"] - before, self.held()
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            self.step()
            with record_function("measured"):
                self.step()
        figures["step"] = highest(profiler)
        if self.case.ranks == 1 and not self.case.checkpointing:
            figures["saved"] = self.saved()
        return figures | ({"sent": sent} if self.case.is_zero else {})

    def step(self, forward: AbstractContextManager[Any] | None = None) -> None:
        """Run two micro-batches and an update, as the training loop does; the last forward pass inside a context."""
        for last in (False, True):
            with self.optimisation.part(last):
                users, items, targets = self.batch()
                with forward if forward and last else nullcontext():
                    encoded = self.optimisation({"user": users, "item": items})
                    total = self.objective(self.model, encoded["user"], encoded["item"], targets).total
                self.optimisation.backward(total / 2)
                del encoded, total, users, items, targets
            self.largest_gradients = max(self.largest_gradients, bytes_of(self.gradients()))
        for _ in self.optimisation.gradients():
            pass
        self.optimisation.update(1.0)

    def saved(self) -> int:
        """Return the bytes that autograd saves in a step: each storage once, and no parameters."""
        weights = {weight.untyped_storage().data_ptr() for weight in self.model.parameters()}
        sizes: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor.detach()

        self.step(saved_tensors_hooks(pack, lambda tensor: tensor))
        return sum(size for address, size in sizes.items() if address not in weights)

    def held(self) -> dict[str, int]:
        """Return the bytes that are allocated throughout the training."""
        every = list(self.model.parameters())
        frozen, trainable = ([p for p in every if p.requires_grad == wanted] for wanted in (False, True))
        own = self.optimizer
        states = getattr(own, "optimizer", own).state.values()
        moments = [value for state in states for value in state.values() if isinstance(value, Tensor)]
        flat = getattr(own, "single_partition_of_fp32_groups", getattr(own, "fp32_partitioned_groups_flat", []))
        return {
            "frozen weights": bytes_of(local(frozen)),
            "buffers": bytes_of([*self.model.user.buffers(), *self.model.item.buffers()]),
            "trainable parameters": bytes_of(local(trainable)),
            "gradients": self.largest_gradients,
            "Adam states": bytes_of([*moments, *flat]),
        }

    def gradients(self) -> list[Tensor]:
        """Return the gradients of parameters, and DeepSpeed's own buffers of gradients."""
        own = self.optimizer
        kept = [own.grad_partitions_flat_buffer] if hasattr(own, "grad_partitions_flat_buffer") else []
        for name in ("averaged_gradients", "all_grad_tensors"):
            kept += [t for group in getattr(own, name, {}).values() for t in group or ()]
        every = [*kept, *(p.grad for p in self.model.parameters() if p.grad is not None)]
        return [tensor for tensor in every if tensor.untyped_storage().nbytes() != 4 * LIMIT]  # a view of a bucket

    def batch(self) -> tuple[SideBatch, SideBatch, LossTargets]:
        """Return a micro-batch of this rank, with some padding."""
        shape, width = self.shape, self.model.backbone.hidden_size
        rows_b = torch.arange(shape.rows) * shape.world_size + self.rank
        users, items = (torch.randn(shape.rows, len(shape.state_blocks), width) for _ in SIDES)
        targets = LossTargets(rows_b, rows_b.clone(), torch.full((shape.rows, HISTORY), -1), users, items, shape.total)
        return self.side("user"), self.side("item"), targets

    def side(self, side: str) -> SideBatch:
        """Return one side's prompts, slots first."""
        tower, rows = getattr(self.model, side), self.shape.rows
        slots = sum(tower.slots.values())
        mask_BT = torch.ones(rows, self.shape.text[side] + slots, dtype=torch.long)
        mask_BT[0, -3:] = 0
        vectors = {name: torch.randn(rows, 1, dim) for name, (_, dim) in self.shape.vectors.items()}
        return SideBatch(torch.zeros_like(mask_BT), mask_BT, torch.arange(slots).repeat(rows, 1), vectors)


def highest(profiler: Any) -> int:
    """Return the most bytes allocated while `measured` was recorded, beyond those at its start."""
    events = sorted(profiler.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    start = next(event.start_ns() for event in events if event.name() == "measured")
    now = base = most = 0
    for event in (event for event in events if event.name() == "[memory]"):
        if event.start_ns() < start:
            base += event.nbytes()
        now += event.nbytes()
        most = max(most, now - base) if event.start_ns() >= start else 0
    return int(most)


if __name__ == "__main__":
    main()
