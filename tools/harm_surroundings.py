"""Harms to what surrounds a command (`surroundings`): variables, streams, permissions, memory, files, the disk."""

import os
import random
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from harm_oracle import Harm
from harm_process import Command
from harm_world import RUN, STAGES, World, next_stage

VARIABLES: dict[str, list[str | None]] = {
    "RANK": ["x", "-1", "", "3", "1e3", "0x1", "\u0663"],
    "WORLD_SIZE": ["x", "-1", "", "0", "1.5"],
    "LOCAL_RANK": ["x", "-1", "", "7"],
    "LOCAL_WORLD_SIZE": ["x", "0"],
    "MASTER_PORT": ["x", "-1", "99999"],
    "COLUMNS": ["0", "1", "x", "-5", "100000"],
    "TERM": ["dumb", "nonsense", ""],
    "LC_ALL": ["C", "nonsense"],
    "TZ": ["nonsense", "Asia/Tokyo", ":"],
    "OMP_NUM_THREADS": ["x", "0", "-1"],
    "CUDA_VISIBLE_DEVICES": ["x", "", "99"],
    "ACCELERATE_MIXED_PRECISION": ["x", ""],
    "ACCELERATE_USE_FSDP": ["maybe", ""],
    "ACCELERATE_USE_DEEPSPEED": ["maybe", ""],
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": ["x", "0"],
    "MPLBACKEND": ["nonsense", ""],
    "MPLCONFIGDIR": ["/proc/x", "config.yaml"],
    "HOME": [None, "", "/proc/x", "config.yaml"],
    "TMPDIR": ["/nowhere", "config.yaml", "/proc"],
    "HF_HOME": ["/proc/x", "config.yaml"],
    "SLURM_PROCID": ["x"],
    "SLURM_JOB_ID": ["x"],
    "PATH": [None, ""],
    "USER": [None],
    "NO_COLOR": ["1"],
    "FORCE_COLOR": ["0"],
    "GIT_DIR": ["/nowhere"],
    "PYTHONWARNINGS": ["error"],
}
ROOM = 64_000_000
"""Bytes of a small disk before its room is taken away."""
LIMITS: dict[str, Callable[[random.Random], int]] = {
    "RLIMIT_FSIZE": lambda generator: int(10 ** generator.uniform(0, 5.5)),
    "RLIMIT_NOFILE": lambda generator: generator.randint(12, 48),  # with fewer, Python itself cannot start
    # beyond what is loaded already; with less, torch's own clean-up prints a traceback
    "RLIMIT_AS": lambda generator: int(10 ** generator.uniform(7.7, 8.7)),
}
_STATES = ["new", *(f"upto-{stage}" for stage in STAGES[:-1]), "finished"]


def surround(generator: random.Random, world: World, place: Path) -> Harm:
    """Choose an odd environment for a command that builds the next stage, or all over again."""
    state = generator.choice(_STATES)
    world.copy(state, place)
    stage = generator.choice([*STAGES, "run"]) if state == "finished" else next_stage(state)
    if state != "finished" and generator.random() < 0.15:
        stage = "run"
    fresh = stage != "run" and state == "finished"
    command = Command([stage, "config.yaml", *["--fresh"] * fresh], str(place))
    makers: list[Callable[..., Harm]] = [set_variable, set_variable, stream, limit, limit, set_umask, _lost_cwd]
    makers += [_forbidden, _forbidden]
    if os.geteuid() == 0:
        makers += [_small_disk, _small_disk]
    return replace(generator.choice(makers)(generator, place, command), again=True)


def set_variable(generator: random.Random, place: Path, command: Command) -> Harm:
    """Set a variable of the environment to an odd value, or unset it."""
    name = generator.choice(list(VARIABLES))
    value = generator.choice(VARIABLES[name])
    what = f"{name} is unset" if value is None else f"{name}={value!r}"
    return Harm(what, replace(command, environment={name: value}), (name,))


def stream(generator: random.Random, place: Path, command: Command) -> Harm:
    """Give the command an odd standard output."""
    kind = generator.choice(["closed", "ascii", "full", "broken"])
    if kind == "ascii":  # something to print that ASCII lacks
        text = (place / "config.yaml").read_text()
        (place / "config.yaml").write_text(text.replace("dir: run", "dir: 'run'"))
    return Harm(f"standard output is {kind}", replace(command, stdout=kind), ("output", "space"), last_resort=True)


def limit(generator: random.Random, place: Path, command: Command) -> Harm:
    """Limit the size of files, their number, or memory."""
    name = generator.choice(list(LIMITS))
    value = LIMITS[name](generator)
    limited = replace(command, limits={name: value})
    return Harm(f"{name} {value}", limited, last_resort=True, native=name == "RLIMIT_AS")


def set_umask(generator: random.Random, place: Path, command: Command) -> Harm:
    """Set the umask."""
    umask = generator.choice([0, 0o002, 0o077, 0o027])
    return Harm(f"umask {umask:03o}", replace(command, umask=umask))


def _lost_cwd(generator: random.Random, place: Path, command: Command) -> Harm:
    words = [command.words[0], str(place / "config.yaml"), *command.words[2:]]
    return Harm("the current directory is gone", replace(command, words=words, lost_cwd=True), ("directory",))


def _forbidden(generator: random.Random, place: Path, command: Command) -> Harm:
    """Take the rights to one path from the user who runs the command."""
    paths = [path for path in place.rglob("*") if path.name != "config.yaml" or path.parent == place]
    path = generator.choice(sorted(paths))
    mode = generator.choice([0, 0o444, 0o555] if path.is_dir() else [0, 0o222, 0o444])
    path.chmod(mode)
    names = (path.name, path.parent.name, "ermission")
    what = f"mode {mode:03o} of {path.relative_to(place)}"
    right = 0o755 if path.is_dir() else 0o644
    return Harm(what, replace(command, obeys=True), names, restore=lambda: path.chmod(right))


def _small_disk(generator: random.Random, place: Path, command: Command) -> Harm:
    """Put `run` onto a disk with little room left."""
    disk, free = Disk(place), int(10 ** generator.uniform(3.6, 6))
    if not disk.small:
        return set_umask(generator, place, command)
    disk.leave(free)
    what = f"a disk with {free} bytes left"
    keywords: dict[str, Any] = {"restore": lambda: disk.leave(None), "release": disk.release}
    return Harm(what, command, ("space",), last_resort=True, **keywords)


class Disk:
    """The disk of `run.dir`, whose room can be taken away: a tmpfs for root, else nothing.

    Args:
        place: directory with the run.
    """

    def __init__(self, place: Path) -> None:
        self.path = place / RUN
        aside = place / "aside"
        self.path.mkdir(exist_ok=True)
        self.path.rename(aside)
        self.path.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={ROOM}", "tmpfs", str(self.path)]
        self.small = os.geteuid() == 0 and subprocess.run(command, capture_output=True).returncode == 0
        shutil.copytree(aside, self.path, dirs_exist_ok=True)
        shutil.rmtree(aside)

    def leave(self, free: int | None) -> None:
        """Leave so many bytes free; None for enough."""
        if self.small:
            used = sum(-(-path.lstat().st_size // 4096) * 4096 + 4096 for path in self.path.rglob("*"))
            size = ROOM if free is None else used + free
            subprocess.run(["mount", "-o", f"remount,size={size}", str(self.path)], capture_output=True)

    def release(self) -> None:
        """Take it away."""
        if self.small:
            subprocess.run(["umount", "--lazy", str(self.path)], check=True)
