"""What the machine has and takes; and what accelerators can do at most: the yardstick of MFU and of `rarec plan`."""

import os
import re
import resource
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Device:
    """One accelerator.

    Attributes:
        name: part of what PyTorch calls it.
        tflops: dense bfloat16, 10^12 operations a second (float16 where it has no bfloat16).
        memory_gb: 10^9 bytes.
        link_gb_s: to its like in one machine, in each direction, 10^9 bytes a second.
    """

    name: str
    tflops: float
    memory_gb: float
    link_gb_s: float


DEVICES = (
    Device("B200", 2250, 192, 900),
    Device("GH200", 989, 96, 450),
    Device("H200", 989, 141, 450),
    Device("H100 PCIe", 756, 80, 64),
    Device("H100", 989, 80, 450),
    Device("A100", 312, 80, 300),
    Device("MI300X", 1307, 192, 448),
    Device("L40S", 362, 48, 32),
    Device("L40", 181, 48, 32),
    Device("L4", 121, 24, 32),
    Device("A10", 125, 24, 32),
    Device("A10G", 70, 24, 32),
    Device("RTX 4090", 165, 24, 32),
    Device("RTX 3090", 71, 24, 32),
    Device("V100", 125, 32, 150),
    Device("T4", 65, 16, 16),
)
"""From the makers' data sheets. The first whose name stands in PyTorch's, as words, is meant: the longer of two comes
first."""
NETWORK_GB_S = 50.0
"""Between machines, for each GPU, in each direction: a port of 400 Gbit/s, as many of which an NVIDIA DGX H100 has as
GPUs (its data sheet). Many clusters have less."""


def known_device(name: str) -> Device | None:
    """The accelerator that PyTorch calls so; None for one that is not in the table, and for a CPU.

    A name that tells less memory than the table is believed: there are A100 of 40 and of 80 GB.
    """
    words = (rf"(?<!\w){re.escape(device.name)}(?!\w)" for device in DEVICES)
    found = next((one for one, word in zip(DEVICES, words, strict=True) if re.search(word, name, re.IGNORECASE)), None)
    told = re.search(r"(\d+) ?GB", name, re.IGNORECASE)
    return replace(found, memory_gb=min(found.memory_gb, float(told[1]))) if found and told else found


def machine(device: "torch.device") -> str:
    """What a rank computes on, for people: a GPU's name, or the CPU's with the cores that this process may use."""
    if device.type == "cuda":
        import torch

        return torch.cuda.get_device_name(device)
    found = re.search(r"^model name\s*:\s*(.+)$", _text("/proc/cpuinfo"), re.MULTILINE)
    return f"{found[1].strip() if found else os.uname().machine}, {cores():g} cores"


def cores() -> float:
    """Cores this process may use: its affinity, or the quota of its container where that is less."""
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota, _, period = _text("/sys/fs/cgroup/cpu.max").strip().partition(" ")
    return min(affinity, int(quota) / int(period)) if quota.isdigit() and period.isdigit() else affinity


def peak_memory() -> int:
    """The most memory that this process has had resident, in bytes."""
    # ru_maxrss of Linux starts from that of the process which started this one, however small this one stays
    peak = re.search(r"^VmHWM:\s*(\d+) kB$", _text("/proc/self/status"), re.MULTILINE)
    if peak:
        return int(peak[1]) << 10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << (0 if sys.platform == "darwin" else 10)


def _text(path: str) -> str:
    """The text of a file that says what is here; empty where there is none."""
    try:
        return Path(path).read_text(errors="replace")
    except OSError:
        return ""
