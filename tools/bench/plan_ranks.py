"""One rank of `tools/bench/plan.py`: train with one of the engines and measure memory and traffic."""

import json
import os
from collections.abc import Callable, Iterable
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
from rarec.models.towers import RaRec, SideBatch
from rarec.planning.activations import HISTORY, StepShape
from rarec.planning.calculator import Calculator
from rarec.planning.cluster import Cluster, EngineName, TrainingSetup
from rarec.planning.input_sizes import PromptLengths
from rarec.planning.memory import ZeroSettings
from rarec.planning.meta_model import MetaModelBuilder
from rarec.stages.run import Run

VARIANT, SOURCES, TEXT = (
    "per_layer_lora",
    {"id": SourceShape(64, 1)},
    {"user": PromptLengths(60, 60), "item": PromptLengths(20, 20)},
)
LIMIT, LIVE = 200_000, 1_000_000
ZERO = ZeroSettings(dict.fromkeys(("1", "2", "3"), LIMIT), live=LIVE, persistent=0)


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
        engine = (
            {"0": "DDP", "fsdp2": "FSDP2"}.get(self.engine, f"ZeRO-{self.engine}") if self.ranks > 1 else "one process"
        )
        return engine + (", recomputed" if self.checkpointing else "") + (", bf16" if self.dtype == "bfloat16" else "")


def calculator_of(case: Case, tree: dict[str, Any]) -> tuple[Calculator, TrainingSetup]:
    """Return the calculator with the prompt lengths that are measured, and the setup."""
    config = RunConfig.model_validate(tree)
    calculator = Calculator(config, MetaModelBuilder(config, SOURCES, Path("-")), zero=ZERO)
    calculator.prompts = TEXT
    return calculator, calculator.setup(Cluster.of(case.ranks, 1, None, "H100"), case.engine)


def train_on(rank: int, case: Case, tree: dict[str, Any], port: str, deepspeed: str, out: str) -> None:
    """Run one rank, in its own process, and write the figures of rank 0 to a file."""
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(case.ranks), "OMP_NUM_THREADS": "1"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "DS_ACCELERATOR": "cpu"}
    os.environ["ACCELERATE_USE_FSDP"] = str(case.engine == "fsdp2")
    if case.engine in ("1", "2", "3"):
        os.environ |= {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_CONFIG_FILE": deepspeed}
    sent = counted()
    run = Run(RunConfig.model_validate(tree), say=lambda line: None)
    named = dict.fromkeys(SIDES, tuple(SOURCES))
    calculator, setup = calculator_of(case, tree)
    model = build_model(run.config, VARIANTS[VARIANT], run.load_llm(VARIANTS[VARIANT]), SOURCES, named)
    training = Training(case, run, model, calculator.step_shape(VARIANT, setup), sent)
    found = training.found()
    if rank == 0:
        Path(out).write_text(json.dumps(found))
    training.optimisation.end()


def counted() -> dict[str, int]:
    """Wrap torch.distributed to count the bytes that this rank sends; return the counter."""
    sent, rings = (
        {"bytes": 0},
        {"all_reduce": 2, "all_gather": 1, "all_gather_into_tensor": 1, "reduce_scatter_tensor": 1},
    )

    def wrapped(function: Callable[..., Any], factor: int) -> Callable[..., Any]:
        def call(*arguments: Any, **keywords: Any) -> Any:
            given = [each for each in (*arguments, *keywords.values()) if isinstance(each, Tensor | list)][:2]
            size = max(sum(t.nbytes for t in (each if isinstance(each, list) else [each])) for each in given)
            sent["bytes"] += round(factor * size * (dist.get_world_size() - 1) / dist.get_world_size())
            return function(*arguments, **keywords)

        return call

    for name, factor in rings.items():
        setattr(dist, name, wrapped(getattr(dist, name), factor))
    return sent


class Training:
    """Train a variant for some steps and measure them.

    Args:
        case: engine and settings.
        run: the run.
        model: model to train.
        shape: sizes of a micro-batch.
        sent: counter of the bytes that this rank sends.
    """

    def __init__(self, case: Case, run: Run, model: RaRec, shape: StepShape, sent: dict[str, int]) -> None:
        self.case, self.model, self.shape, self.sent, self.world = case, model, shape, sent, run.world
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad and parameter.numel() > 1:
                    parameter.normal_(std=0.02)
        self.optimisation = run.engine.train(model, run.config.train)
        self.optimizer = cast(Any, self.optimisation).optimizer  # each engine's own, not its protocol's
        self.objective = Objective(run.config.loss, torch.ones(shape.total), shape.state_blocks, self.world)
        self.gradients = 0
        model.train()

    def found(self) -> dict[str, int]:
        """Measure a step, after enough steps for DeepSpeed to know the order of its gathers."""
        for _ in range(3):
            before = self.sent["bytes"]
            self.step()
        sent, found = self.sent["bytes"] - before, self.held()
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            self.step()
            with record_function("measured"):
                self.step()
        found["step"] = highest(profiler)
        if self.case.ranks == 1 and not self.case.checkpointing:
            saving = Saving(self.model.parameters())
            self.step(saving)
            found["saved"] = saving.bytes
        return found | ({"sent": sent} if self.case.engine in ("1", "2", "3") else {})

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
            self.gradients = max(self.gradients, bytes_of(self.gradient_tensors()))
        for _ in self.optimisation.gradients():
            pass
        self.optimisation.update(1.0)

    def held(self) -> dict[str, int]:
        """Return the bytes that are allocated throughout the training."""
        every = list(self.model.parameters())
        frozen, trainable = ([p for p in every if p.requires_grad == wanted] for wanted in (False, True))
        buffers = [*self.model.user.buffers(), *self.model.item.buffers()]
        own = self.optimizer
        optimizer = getattr(own, "optimizer", own)
        states = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
        flat = getattr(own, "single_partition_of_fp32_groups", getattr(own, "fp32_partitioned_groups_flat", []))
        return {
            "frozen weights": bytes_of(local(frozen)),
            "buffers": bytes_of(buffers),
            "trainable parameters": bytes_of(local(trainable)),
            "gradients": self.gradients,
            "Adam states": bytes_of([*states, *flat]),
        }

    def gradient_tensors(self) -> list[Tensor]:
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
        rows_b = torch.arange(shape.rows) * shape.world_size + self.world.rank
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


class Saving(saved_tensors_hooks):
    """Count the bytes that autograd saves.

    Args:
        weights: parameters, which are not counted.
    """

    def __init__(self, weights: Iterable[Tensor]) -> None:
        self.seen: dict[int, int] = {}
        self.held = {weight.untyped_storage().data_ptr() for weight in weights}
        super().__init__(self.pack, lambda tensor: tensor)

    def pack(self, tensor: Tensor) -> Tensor:
        """Count a tensor's storage once."""
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self.held:
            self.seen[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()

    @property
    def bytes(self) -> int:
        """The bytes of all saved storages."""
        return sum(self.seen.values())


def local(parameters: Iterable[Tensor]) -> list[Tensor]:
    """Return the tensors of this rank: whole parameters, or shards of FSDP2 or ZeRO-3."""
    whole = [p.to_local() if hasattr(p, "to_local") else p.data for p in parameters]
    return whole + [p.ds_tensor for p in parameters if hasattr(p, "ds_tensor")]


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """Return the bytes of the tensors' storages, each counted once."""
    storages = [tensor.untyped_storage() for tensor in tensors]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


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
