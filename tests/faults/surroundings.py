"""Harms to what surrounds a command (`surroundings`): variables, streams, permissions, memory, files, the disk."""

import os
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from hypothesis import strategies as st

from tests.commands import Command
from tests.faults.judge import Harm
from tests.faults.world import RUN, STAGES, UPTO, Draw, World, next_stage

_NUMBERS = (
    "RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE MASTER_PORT COLUMNS OMP_NUM_THREADS CUDA_VISIBLE_DEVICES SLURM_PROCID "
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS SLURM_JOB_ID"
)
_PATHS = "HOME TMPDIR MPLCONFIGDIR HF_HOME GIT_DIR PATH"
_WORDS = "TERM LC_ALL TZ MPLBACKEND USER ACCELERATE_MIXED_PRECISION ACCELERATE_USE_FSDP ACCELERATE_USE_DEEPSPEED"
VARIABLES: dict[str, list[str | None]] = {
    **{key: ["x", "-1", "", "0", "1.5", "1e3", "0x1", "٣"] for key in _NUMBERS.split()},
    **{key: [None, "", "/proc/x", "/nowhere", "config.yaml"] for key in _PATHS.split()},
    **{key: [None, "", "nonsense"] for key in _WORDS.split()},
    "FORCE_COLOR": ["0"],
}
ROOM = 64_000_000
"""Bytes of a small disk before its room is taken away."""
LIMITS = {
    "RLIMIT_FSIZE": st.integers(0, 300_000),
    "RLIMIT_NOFILE": st.integers(14, 48),  # with fewer, Python itself cannot start
    # beyond what is loaded already; with less, torch's own clean-up prints a traceback
    "RLIMIT_AS": st.integers(50_000_000, 500_000_000),
}


def surround(draw: Draw, world: World, place: Path) -> Harm:
    """Choose an odd environment for a command that builds the next stage, or all over again."""
    state = draw(st.sampled_from(["finished", "new", *UPTO]))
    world.copy(state, place)
    stage = draw(st.sampled_from([*STAGES, "run"])) if state == "finished" else next_stage(state)
    fresh = stage != "run" and state == "finished"
    command = Command([stage, "config.yaml", *["--fresh"] * fresh], str(place))
    harms = [*SURROUNDINGS, _lost_cwd, _forbidden, _small_disk]
    return replace(draw(st.sampled_from(harms))(draw, place, command), again=True)


def _set_variable(draw: Draw, place: Path, command: Command) -> Harm:
    """Set a variable of the environment to an odd value, or unset it."""
    name = draw(st.sampled_from(list(VARIABLES)))
    value = draw(st.sampled_from(VARIABLES[name]))
    what = f"{name} is unset" if value is None else f"{name}={value!r}"
    return Harm(what, replace(command, environment={name: value}), (name,))


def _stream(draw: Draw, place: Path, command: Command) -> Harm:
    """Give the command an odd standard output."""
    kind = draw(st.sampled_from(["ascii", "closed", "full", "broken"]))
    return Harm(f"standard output is {kind}", replace(command, stdout=kind), ("output", "space"), last_resort=True)


def _limit(draw: Draw, place: Path, command: Command) -> Harm:
    """Limit the size of files, their number, or memory."""
    name = draw(st.sampled_from(list(LIMITS)))
    limits = {name: draw(LIMITS[name])}
    return Harm(f"{limits}", replace(command, limits=limits), last_resort=True, native=name == "RLIMIT_AS")


def _set_umask(draw: Draw, place: Path, command: Command) -> Harm:
    """Set the umask."""
    umask = draw(st.sampled_from([0, 0o002, 0o077, 0o027]))
    return Harm(f"umask {umask:03o}", replace(command, umask=umask))


SURROUNDINGS: list[Callable[[Draw, Path, Command], Harm]] = [_set_variable, _stream, _limit, _set_umask]


def _lost_cwd(draw: Draw, place: Path, command: Command) -> Harm:
    words = [command.words[0], str(place / "config.yaml"), *command.words[2:]]
    return Harm("the current directory is gone", replace(command, words=words, lost_cwd=True), ("directory",))


def _forbidden(draw: Draw, place: Path, command: Command) -> Harm:
    """Take the rights to one path from the user who runs the command."""
    path = draw(st.sampled_from(sorted(place.rglob("*"))))
    mode = draw(st.sampled_from([0, 0o444, 0o555] if path.is_dir() else [0, 0o222, 0o444]))
    path.chmod(mode)
    names, right = (path.name, path.parent.name, "ermission"), 0o755 if path.is_dir() else 0o644
    what = f"mode {mode:03o} of {path.relative_to(place)}"
    return Harm(what, replace(command, obeys=True), names, restore=lambda: path.chmod(right))


def _small_disk(draw: Draw, place: Path, command: Command) -> Harm:
    """Put `run` onto a disk with little room left."""
    disk, free = Disk(place), draw(st.integers(4_000, 1_000_000))
    if not disk.small:
        return _set_umask(draw, place, command)
    disk.leave(free)
    harm = Harm(f"a disk with {free} bytes left", command, ("space",), last_resort=True)
    return replace(harm, restore=lambda: disk.leave(None), release=disk.release)


class Disk:
    """The disk of `run.dir`, whose room can be taken away: a tmpfs for root, else nothing.

    Args:
        place: directory with the run.
    """

    def __init__(self, place: Path) -> None:
        self.path = place / RUN
        before = place / "before"
        self.path.mkdir(exist_ok=True)
        self.path.rename(before)
        self.path.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={ROOM}", "tmpfs", str(self.path)]
        self.small = os.geteuid() == 0 and subprocess.run(command, capture_output=True).returncode == 0
        shutil.copytree(before, self.path, dirs_exist_ok=True)
        shutil.rmtree(before)

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
