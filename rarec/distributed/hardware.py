"""Read the machine's cores and memory use, and look up the peak speeds of GPUs, for MFU and `rarec plan`."""

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
    """A kind of GPU.

    Attributes:
        name: words of the name that PyTorch gives it.
        tflops: peak of dense bfloat16, 10^12 operations per second (float16 where it has no bfloat16).
        memory_gb: memory, 10^9 bytes.
        link_gb_s: bandwidth to another GPU of the machine, in each direction, 10^9 bytes per second.
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
"""From the vendors' data sheets. A name is matched in this order, so a longer name comes before its own beginning."""
NETWORK_GB_S = 50.0
"""Bandwidth between machines for each GPU, in each direction: one port of 400 Gbit/s per GPU, as in an NVIDIA DGX H100
(its data sheet). Many clusters have less."""


def known_device(name: str) -> Device | None:
    """Return the listed GPU whose words occur in PyTorch's name of a device; None if there is none.

    Where the name states less memory than the table, as for an A100 of 40 GB, the name's value is taken.
    """
    words = {rf"(?<!\w){re.escape(device.name)}(?!\w)": device for device in DEVICES}
    device = next((device for word, device in words.items() if re.search(word, name, re.IGNORECASE)), None)
    stated = re.search(r"(\d+) ?GB", name, re.IGNORECASE)
    return replace(device, memory_gb=min(device.memory_gb, float(stated[1]))) if device and stated else device


def machine(device: "torch.device") -> str:
    """Return the name of a rank's device: the GPU's, or the CPU's with the cores available to this process."""
    if device.type == "cuda":
        import torch

        return torch.cuda.get_device_name(device)
    model = re.search(r"^model name\s*:\s*(.+)$", read_text("/proc/cpuinfo"), re.MULTILINE)
    return f"{model[1].strip() if model else os.uname().machine}, {cores():g} cores"


def cores() -> float:
    """Return the number of cores available to this process: its affinity, or its container's quota if that is less."""
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota, _, period = read_text("/sys/fs/cgroup/cpu.max").strip().partition(" ")
    return min(affinity, int(quota) / int(period)) if quota.isdigit() and period.isdigit() else affinity


def has_bfloat16() -> bool:
    """Return whether this machine's processor multiplies bfloat16 itself, without emulation."""
    return re.search(r"\b(avx512_bf16|amx_bf16|bf16)\b", read_text("/proc/cpuinfo")) is not None


def memory() -> int:
    """Return the bytes of memory: the machine's, or its container's if that is less."""
    physical = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = read_text("/sys/fs/cgroup/memory.max").strip()
    return min(physical, int(limit)) if limit.isdigit() else physical


def memory_of_rank(device: "torch.device") -> int:
    """Return the bytes that a rank may fill: its GPU's memory, or its share of the machine's."""
    if device.type == "cuda":
        import torch

        return torch.cuda.get_device_properties(device).total_memory
    return memory() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def peak_memory() -> int:
    """Return the peak resident memory of this process, in bytes."""
    # on Linux, ru_maxrss starts at the value of the parent process
    if peak := re.search(r"^VmHWM:\s*(\d+) kB$", read_text("/proc/self/status"), re.MULTILINE):
        return int(peak[1]) << 10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << (0 if sys.platform == "darwin" else 10)


def read_text(path: str) -> str:
    """Return the text of a file; empty if it cannot be read."""
    try:
        return Path(path).read_text(errors="replace")
    except OSError:
        return ""
