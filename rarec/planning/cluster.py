"""The GPUs to plan for, the engines by name, and the settings that decide how much memory a training needs."""

from dataclasses import dataclass
from typing import Literal, get_args

from pydantic import ByteSize, TypeAdapter, ValidationError

from rarec.distributed.hardware import DEVICES, Device, known_device
from rarec.errors import UserError

EngineName = Literal["0", "1", "2", "3", "fsdp2"]
"""An engine as `--zero` names it: "0" is DDP (or one process), "1" to "3" are DeepSpeed's ZeRO stages."""
ENGINES: tuple[EngineName, ...] = get_args(EngineName)
REPLICATED: tuple[EngineName, ...] = ("0", "1", "2")
"""Engines that keep the whole language model on every GPU."""
RESERVED_BYTES, FRAGMENTATION = 2e9, 0.05
"""Not available on each GPU: bytes for CUDA, NCCL and cuBLAS; the share that the allocator loses (own estimates)."""
MEGABYTE = 10**6


@dataclass(frozen=True)
class Cluster:
    """GPUs of one kind, in one or more machines.

    Attributes:
        gpus: number of GPUs in each machine.
        machines: number of machines.
        memory: memory of a GPU, in bytes.
        device: kind of GPU.
    """

    gpus: int
    machines: int
    memory: int
    device: Device

    @classmethod
    def of(cls, gpus: int, machines: int, memory: str | None, device: str) -> "Cluster":
        """Build a cluster from the options of `rarec plan`.

        Args:
            gpus: number of GPUs in each machine.
            machines: number of machines.
            memory: memory of a GPU with its unit, such as `80GB`; None for the memory that the device is sold with.
            device: name of the GPU, such as `H100`.

        Raises:
            UserError: the unit or the device is unknown.
        """
        known = known_device(device)
        if known is None:
            names = ", ".join(sorted(each.name for each in DEVICES))
            raise UserError(f"--device {device}: its peak FLOP/s are not listed", f"give one of {names}")
        return cls(gpus, machines, _parse_bytes(memory) if memory else round(known.memory_gb * 1e9), known)

    @property
    def world_size(self) -> int:
        """The number of processes: one for each GPU."""
        return self.gpus * self.machines

    @property
    def usable(self) -> int:
        """The bytes of a GPU that are available for training."""
        return round(self.memory * (1 - FRAGMENTATION) - RESERVED_BYTES)


@dataclass(frozen=True)
class TrainingSetup:
    """The cluster, and the settings that may be changed to make a training fit.

    Attributes:
        cluster: GPUs to train on.
        engine: engine to train with.
        accumulate: `train.accumulate`.
        checkpointing: `llm.gradient_checkpointing`.
        eval_batch: `evaluate.batch_size`, the number of prompts encoded at a time in validation and evaluation.
    """

    cluster: Cluster
    engine: EngineName
    accumulate: int
    checkpointing: bool
    eval_batch: int

    def changes(self, other: "TrainingSetup") -> list[str]:
        """Return the overrides and options that turn this setup into the other."""
        pairs = {
            "evaluate.batch_size={}": (self.eval_batch, other.eval_batch),
            "train.accumulate={}": (self.accumulate, other.accumulate),
            "llm.gradient_checkpointing={}": tuple(str(each.checkpointing).lower() for each in (self, other)),
            "--zero {}": (self.engine, other.engine),
            "--gpus {}": (self.cluster.gpus, other.cluster.gpus),
            "--machines {}": (self.cluster.machines, other.cluster.machines),
        }
        return [words.format(new) for words, (old, new) in pairs.items() if old != new]


def parse_engine(name: str) -> EngineName:
    """Return the engine that `--zero` names, in any case.

    Raises:
        UserError: no engine has this name.
    """
    for engine in ENGINES:
        if name.casefold() == engine:
            return engine
    raise UserError(f"--zero {name}: unknown engine", f"give one of {', '.join(ENGINES)}")


def _parse_bytes(text: str) -> int:
    """Return the bytes of a size such as `80GB` or `79.1 GiB`; less than a megabyte lacks its unit."""
    try:
        size = int(TypeAdapter(ByteSize).validate_python(text))
    except ValidationError:
        size = 0
    if size < MEGABYTE:
        raise UserError(f"--memory {text}: not a memory size", "give a number and its unit (MB, GB, GiB), as in 80GB")
    return size
