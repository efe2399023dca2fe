"""Harms to what surrounds a command (`surroundings`): variables, streams, rights, limits, the disk, other processes.

And interruptions: a stage is killed again and again, and must end as one that was not, byte for byte.
"""

import fcntl
import os
import shutil
import signal
import subprocess
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from hypothesis import strategies as st

from tests.commands import Command, Outcome, run_command
from tests.faults.files import Draw, choose, copied
from tests.faults.judge import ENDS, LAST_RESORT, NATIVE, Harm
from tests.ranks import start
from tests.tiny_runs import BEFORE, BUNDLE, FOLDERS, NEW, RUN, STAGES, World

_NUMBERS = """RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE MASTER_PORT COLUMNS OMP_NUM_THREADS CUDA_VISIBLE_DEVICES
SLURM_PROCID SLURM_JOB_ID ACCELERATE_GRADIENT_ACCUMULATION_STEPS"""
_PATHS = "HOME TMPDIR MPLCONFIGDIR HF_HOME GIT_DIR PATH"
_WORDS = "TERM LC_ALL TZ MPLBACKEND USER ACCELERATE_MIXED_PRECISION ACCELERATE_USE_FSDP ACCELERATE_USE_DEEPSPEED"
VARIABLES: dict[str, list[str | None]] = {
    **{key: ["x", "-1", "", "0", "1.5", "1e3", "0x1", "٣"] for key in _NUMBERS.split()},
    **{key: [None, "", "/proc/x", "/nowhere", "config.yaml"] for key in _PATHS.split()},
    **{key: [None, "", "nonsense"] for key in _WORDS.split()},
    "FORCE_COLOR": ["0"],
}
LIMITS = {
    "RLIMIT_FSIZE": st.integers(0, 300_000),
    "RLIMIT_NOFILE": st.integers(14, 48),  # with fewer, Python itself cannot start
    "RLIMIT_AS": st.integers(50_000_000, 500_000_000),  # with less, torch's own clean-up prints a traceback
}
BROKEN_PIPE = 128 + signal.SIGPIPE  # exit code of a command whose results nobody reads
WAITS = 8.0  # seconds after which a command that waits for another process is killed


def surround(draw: Draw, world: World, place: Path) -> Harm:
    """Give a command in odd surroundings; afterwards it must succeed."""
    command = choose(draw, world, place, [NEW, *BEFORE, "finished", "finished"])
    harms = [_variable, _variable, _output, _limit, _limit, _umask, _forbid, _disk, _directory, _lock]
    return replace(draw(st.sampled_from(harms))(draw, place, command), again=True)


def _variable(draw: Draw, place: Path, command: Command) -> Harm:
    name = draw(st.sampled_from(list(VARIABLES)))
    value = draw(st.sampled_from(VARIABLES[name]))
    what = f"{name} is unset" if value is None else f"{name}={value!r}"
    return Harm(what, replace(command, environment={name: value}), (name,))


def _output(draw: Draw, place: Path, command: Command) -> Harm:
    kind = draw(st.sampled_from(["ascii", "closed", "full", "broken"]))
    codes = (*ENDS, LAST_RESORT, *[BROKEN_PIPE] * (kind == "broken"))
    return Harm(f"standard output is {kind}", replace(command, stdout=kind), ("output", "space"), codes=codes)


def _limit(draw: Draw, place: Path, command: Command) -> Harm:
    """Limit the size of files, their number, or memory."""
    name = draw(st.sampled_from(list(LIMITS)))
    limits = {name: draw(LIMITS[name])}
    codes = (*ENDS, LAST_RESORT, *NATIVE * (name == "RLIMIT_AS"))
    return Harm(f"{limits}", replace(command, limits=limits), codes=codes)


def _umask(draw: Draw, place: Path, command: Command) -> Harm:
    umask = draw(st.sampled_from([0, 0o002, 0o077, 0o027]))
    return Harm(f"umask {umask:03o}", replace(command, umask=umask))


def _directory(draw: Draw, place: Path, command: Command) -> Harm:
    """Delete the current directory."""
    if BUNDLE in command.words:
        return _umask(draw, place, command)
    words = [command.words[0], str(place / "config.yaml"), *command.words[2:]]
    return Harm("the current directory is gone", replace(command, words=words, lost_cwd=True), ("directory",))


def _forbid(draw: Draw, place: Path, command: Command) -> Harm:
    """Take the rights to one path from the user who runs the command."""
    path = draw(st.sampled_from(sorted(place.rglob("*"))))
    mode, right = draw(st.sampled_from([0, 0o222, 0o444, 0o555])), path.stat().st_mode
    path.chmod(mode)
    what, names = f"mode {mode:03o} of {path.relative_to(place)}", (path.name, path.parent.name, "ermission")
    return Harm(what, replace(command, obeys=True), names, restore=lambda: path.exists() and path.chmod(right))


def _disk(draw: Draw, place: Path, command: Command) -> Harm:
    """Put `run` onto a disk with little room left: a tmpfs, which root may mount."""
    run, kept, free = place / RUN, place / "kept", draw(st.integers(4_000, 1_000_000))
    run.mkdir(exist_ok=True)
    used = sum(-(-path.lstat().st_size // 4096) * 4096 + 4096 for path in run.rglob("*"))
    run.rename(kept)
    run.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={used + free}", "tmpfs", str(run)]
    is_small = os.geteuid() == 0 and subprocess.run(mount, capture_output=True).returncode == 0
    shutil.copytree(kept, run, dirs_exist_ok=True)
    shutil.rmtree(kept)

    def restore() -> None:
        if run.is_mount():
            shutil.copytree(run, kept)
            subprocess.run(["umount", "--lazy", str(run)], check=True)
            run.rmdir()
            kept.rename(run)

    what = f"a disk with {free} bytes left" if is_small else "a copy"
    return Harm(what, command, ("space",), codes=(*ENDS, LAST_RESORT), restore=restore)


def _lock(draw: Draw, place: Path, command: Command) -> Harm:
    """Let another process build the same artefact: the command waits for it, until it is killed."""
    stage = command.words[0]
    if (
        BUNDLE in command.words
        or stage == "run"
        or (place / RUN / FOLDERS[stage][0]).exists() > ("--fresh" in command.words)
    ):
        return _umask(draw, place, command)  # it builds nothing, or several artefacts
    folder = place / RUN / FOLDERS[stage][0]
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = folder.with_name(f".{folder.name}.lock").open("w")
    fcntl.flock(lock, fcntl.LOCK_EX)
    waiting = replace(command, kill_after=(signal.SIGKILL, WAITS))
    return Harm(f"{folder.name} is locked", waiting, expect="refusal", codes=(-signal.SIGKILL,), restore=lock.close)


LAUNCHED = ("ids", "shards", "train", "evaluate")  # stages that run on several ranks
SIGNALS = st.sampled_from([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT])


def interrupt(draw: Draw, world: World, place: Path, ranks: int = 1) -> Harm:
    """Interrupt a stage, or all, again and again; the same command then ends as if it had not been interrupted."""
    stage = draw(st.sampled_from([*STAGES, "run"] if ranks == 1 else LAUNCHED))
    fresh, finished = draw(st.booleans()), world.state("finished")
    reference = finished if ranks == 1 else finished.with_name(f"{ranks}-ranks-{stage}")
    if not reference.exists():
        shutil.copytree(finished, reference)
        run(Command([stage, "config.yaml", "--fresh"], str(reference)), ranks)
    state = "finished" if fresh else NEW if stage == "run" else f"before-{stage}"
    command = copied(world, place, state, [stage, "config.yaml", *["--fresh"] * fresh])
    seconds = st.floats(0.05, 1).map(lambda share: share * world.seconds / (1 if stage == "run" else 4))
    moments = st.tuples(st.just("kill_after"), st.tuples(SIGNALS, seconds))
    if ranks == 1:
        moments |= st.tuples(st.just("kill"), st.tuples(SIGNALS, st.integers(1, 40), st.just("")))
    kills = draw(st.lists(moments, min_size=1, max_size=4))
    interruptions = tuple(replace(command, **{way: kill}) for way, kill in kills)
    return Harm(f"{kills}", command, codes=(0,), interruptions=interruptions, ranks=ranks, reference=reference.name)


def run(command: Command, ranks: int = 1) -> Outcome:
    """Run a command with a home of its own, on several ranks if need be."""
    place = Path(command.cwd)
    if ranks == 1:
        own = {"HOME": str(place / "home"), "TMPDIR": str(place / "tmp")}
        return run_command(replace(command, environment=own | command.environment))
    fresh, config = "--fresh" in command.words, Path(command.words[1])
    job = start(command.words[0], config, [], ranks=ranks, fresh=fresh, scratch=place / "tmp", cwd=place)
    if command.kill_after:  # one rank is killed; any other signal goes to all
        number, moment = command.kill_after
        job.processes[0].join(moment)
        for process in job.processes[: 1 if number == signal.SIGKILL else None]:
            with suppress(ProcessLookupError):
                os.kill(process.pid or 0, number)
    codes = job.codes(60 if command.kill_after else 240)
    return Outcome(next(filter(None, codes), 0), "", job.said() if job.stderr[0].exists() else "", 0.0)
