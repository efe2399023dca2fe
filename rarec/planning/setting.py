"""Where a run is to train, and what of it may be changed to make it fit."""

import re
from dataclasses import dataclass

from rarec.errors import UserError
from rarec.hardware import DEVICES, Device, known_device
from rarec.planning.memory import STAGES, Stage

FOR_OTHERS, FRAGMENTS = 2e9, 0.05
"""Kept free on each GPU: bytes for CUDA, NCCL and cuBLAS, and a share for what the allocator cannot use (both ours)."""
UNITS = {"MB": 10**6, "GB": 10**9, "TB": 10**12, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}


@dataclass(frozen=True)
class Cluster:
    """Where it is to train.

    Attributes:
        gpus: in each machine.
        machines: how many.
        memory: of a GPU, in bytes.
        device: its kind.
    """

    gpus: int
    machines: int
    memory: int
    device: Device

    @classmethod
    def of(cls, gpus: int, machines: int, memory: str | None, device: str) -> "Cluster":
        """As a user names it; the memory is the device's by default.

        Raises:
            UserError: there is no GPU, or no such unit or device.
        """
        for flag, count in (("--gpus", gpus), ("--machines", machines)):
            if count < 1:
                raise UserError(f"{flag} {count}: nothing trains on that", f"give {flag} 1 or more")
        known = known_device(device)
        if known is None:
            names = ", ".join(sorted(each.name for each in DEVICES))
            raise UserError(f"--device {device}: its peak is not known here", f"give one of {names}")
        return cls(gpus, machines, _bytes(memory) if memory else round(known.memory_gb * 1e9), known)

    @property
    def ranks(self) -> int:
        """One for each GPU."""
        return self.gpus * self.machines

    @property
    def usable(self) -> int:
        """Bytes of a GPU that are left for the account."""
        return round(self.memory * (1 - FRAGMENTS) - FOR_OTHERS)


@dataclass(frozen=True)
class Setting:
    """What may be changed to make a training fit.

    Attributes:
        cluster: that it runs on.
        stage: the engine.
        accumulate: `train.accumulate`.
        checkpointing: `llm.gradient_checkpointing`.
        encoding: `evaluate.batch_size`.
    """

    cluster: Cluster
    stage: Stage
    accumulate: int
    checkpointing: bool
    encoding: int

    def changes(self, other: "Setting") -> list[str]:
        """Overrides and flags that make of this setting the other."""
        pairs = {
            "evaluate.batch_size={}": (self.encoding, other.encoding),
            "train.accumulate={}": (self.accumulate, other.accumulate),
            "llm.gradient_checkpointing={}": tuple(str(each.checkpointing).lower() for each in (self, other)),
            "--zero {}": (self.stage, other.stage),
            "--gpus {}": (self.cluster.gpus, other.cluster.gpus),
            "--machines {}": (self.cluster.machines, other.cluster.machines),
        }
        return [words.format(new) for words, (old, new) in pairs.items() if old != new]


def stage_of(name: str) -> Stage:
    """The engine that a user names.

    Raises:
        UserError: there is no such one.
    """
    for stage in STAGES:
        if name.casefold() == stage:
            return stage
    raise UserError(f"--zero {name}: no such stage", f"give one of {', '.join(STAGES)}")


def _bytes(text: str) -> int:
    """Of a size such as `80GB` or `79.1 GiB`."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]+)\s*", text)
    units = {name.casefold(): size for name, size in UNITS.items()}
    if match is None or match[2].casefold() not in units or not float(match[1]):
        raise UserError(f"--memory {text}: that is no size", f"give a number and one of {', '.join(UNITS)}, as in 80GB")
    return round(float(match[1]) * units[match[2].casefold()])
