"""Harms to what surrounds a command (`surroundings`): variables, streams, permissions, memory, files, the disk.

And interruptions (`Task`): a stage is killed again and again, and must end as one that was not, byte for byte.
"""

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from rarec.storage.artefacts import MANIFEST
from rarec.storage.directories import CHECKED
from rarec.storage.files import read_json
from tests.commands import Command, run_command
from tests.faults.judge import TEMPORARY, Harm
from tests.faults.world import RUN, STAGES, UPTO, Draw, World, folders_of, next_stage, snapshot, state_before
from tests.ranks import Job, start

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
    harms = [*SURROUNDINGS, _lose_directory, _forbid, _fill_disk]
    return replace(draw(st.sampled_from(harms))(draw, place, command), again=True)


def _set_variable(draw: Draw, place: Path, command: Command) -> Harm:
    """Set a variable of the environment to an odd value, or unset it."""
    name = draw(st.sampled_from(list(VARIABLES)))
    value = draw(st.sampled_from(VARIABLES[name]))
    what = f"{name} is unset" if value is None else f"{name}={value!r}"
    return Harm(what, replace(command, environment={name: value}), (name,))


def _change_output(draw: Draw, place: Path, command: Command) -> Harm:
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


SURROUNDINGS: list[Callable[[Draw, Path, Command], Harm]] = [_set_variable, _change_output, _limit, _set_umask]


def _lose_directory(draw: Draw, place: Path, command: Command) -> Harm:
    """Delete the current directory."""
    words = [command.words[0], str(place / "config.yaml"), *command.words[2:]]
    return Harm("the current directory is gone", replace(command, words=words, lost_cwd=True), ("directory",))


def _forbid(draw: Draw, place: Path, command: Command) -> Harm:
    """Take the rights to one path from the user who runs the command."""
    path = draw(st.sampled_from(sorted(place.rglob("*"))))
    mode = draw(st.sampled_from([0, 0o444, 0o555] if path.is_dir() else [0, 0o222, 0o444]))
    path.chmod(mode)
    names, right = (path.name, path.parent.name, "ermission"), 0o755 if path.is_dir() else 0o644
    what = f"mode {mode:03o} of {path.relative_to(place)}"
    return Harm(what, replace(command, obeys=True), names, restore=lambda: path.chmod(right))


def _fill_disk(draw: Draw, place: Path, command: Command) -> Harm:
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
        self.path, before = place / RUN, place / "before"
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
        """Unmount it."""
        if self.small:
            subprocess.run(["umount", "--lazy", str(self.path)], check=True)


# ---- interruptions


LAUNCHED = ("ids", "shards", "train", "evaluate")
"""Stages that run on several ranks."""
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
ENDS = (".safetensors", ".npy", ".parquet", ".tar", ".arrow")
"""Ends of files that depend on settings and inputs alone."""
CHANGING = ("record.json", "config.yaml", ".lock", CHECKED)


@dataclass(frozen=True)
class Task:
    """A stage, or all with the name `run`, that starts from a state of the world and is brought to its end."""

    world: World
    place: Path
    stage: str
    fresh: bool = False
    ranks: int = 1

    @property
    def state(self) -> str:
        return "finished" if self.fresh else state_before(self.stage)

    @property
    def folders(self) -> list[str]:
        return folders_of(STAGES if self.stage == "run" else [self.stage])

    def undisturbed(self) -> tuple[dict[str, str], float]:
        """Return the results and how long they take."""
        key = (self.stage, self.fresh, self.ranks)
        if key not in self.world.kept:
            self.world.copy(self.state, self.place)
            started = time.monotonic()
            assert self.run() == 0
            self.world.kept[key] = self.results(), time.monotonic() - started
            shutil.rmtree(self.place)
        results, seconds = self.world.kept[key]
        return results, seconds

    def disturbed(self, draw: Draw, interruptions: int) -> list[str]:
        """Interrupt the task, give the same command until it is done; return what is wrong then."""
        expected, seconds = self.undisturbed()
        self.world.copy(self.state, self.place)
        disk = Disk(self.place)
        try:
            for _ in range(interruptions):
                self._interrupt(draw, disk, seconds)
                disk.leave(None)
            codes = [self.run()]
            while not codes[-1] and not self._is_whole() and len(codes) < 3:  # asked to stop, it ends with code 0
                codes.append(self.run())
            return [*self.faults(expected), *[f"exit code {codes[-1]} in the end"] * bool(codes[-1])]
        finally:
            disk.release()
            shutil.rmtree(self.place, ignore_errors=True)

    def run(self, **surroundings: Any) -> int | None:
        """Run the command to its end; return its exit code, or the first one that is not 0."""
        if self.ranks > 1:
            return next(filter(None, self._start().codes()), 0)
        words = [self.stage, "config.yaml", *["--fresh"] * self.fresh]
        return run_command(Command(words, str(self.place), **surroundings)).code

    def _interrupt(self, draw: Draw, disk: Disk, seconds: float) -> None:
        number, moment = draw(st.sampled_from(SIGNALS)), draw(st.floats(0.05, 1)) * seconds
        way = draw(st.sampled_from(["time", "rename", "disk"]))
        if self.ranks > 1:
            self._kill_ranks(draw, number, moment)
        elif way == "disk" and disk.small:
            disk.leave(draw(st.integers(1_000, 500_000)))
            self.run()
        elif way == "rename":
            self.run(kill=(number, draw(st.integers(1, 64)), ""))
        else:
            self.run(kill_after=(number, moment))

    def _start(self) -> Job:
        scratch = self.place / "ranks"
        config = Path("config.yaml")
        return start(self.stage, config, [], ranks=self.ranks, fresh=self.fresh, scratch=scratch, cwd=self.place)

    def _kill_ranks(self, draw: Draw, number: signal.Signals, moment: float) -> None:
        """Start the ranks; then kill one, or send another signal to all."""
        job = self._start()
        job.processes[0].join(moment)
        one = number == signal.SIGKILL and draw(st.booleans())
        for process in job.processes[: 1 if one else None]:
            with suppress(ProcessLookupError):
                os.kill(process.pid or 0, number)
        job.codes(60)

    def _is_whole(self) -> bool:
        """Return whether all is made and nothing begun: a training that is asked to stop ends with code 0."""
        run = self.place / RUN
        begun = any(path.name == ".begun.json" or path.name.endswith(".fresh") for path in run.rglob(".*"))
        return not begun and all((run / folder / MANIFEST).exists() for folder in self.folders)

    def faults(self, expected: dict[str, str]) -> list[str]:
        """Return what differs from the expected results, what else was changed, and what is left."""
        results = self.results()
        before, after = snapshot(self.world.state(self.state)), snapshot(self.place)
        own = tuple(f"{RUN}/{folder}/" for folder in self.folders)
        kept = [path for path in before if not path.startswith(own) and not path.endswith(CHANGING)]
        ends = (".fresh", ".begun.json", ".progress")
        faults = {
            "differs": [path for path in expected | results if expected.get(path) != results.get(path)],
            "was changed": [path for path in kept if path not in after or after[path].content != before[path].content],
            "is left": [path for path in after if TEMPORARY.search(path) or path.endswith(ends)],
        }
        return [f"{path} {what}" for what, paths in faults.items() for path in paths]

    def results(self) -> dict[str, str]:
        """Return the hash of each artefact, and of each of its files and checkpoints' tensors; reports hold times."""
        tree = snapshot(self.place / RUN)
        own = tuple(f"{folder}/" for folder in self.folders)
        results = {path: tree[path].content for path in tree if path.startswith(own) and path.endswith(ENDS)}
        for folder in self.folders:
            manifest = self.place / RUN / folder / MANIFEST
            if manifest.exists():
                results[folder] = read_json(manifest)["hash"] * (folder != "report")
        return results
