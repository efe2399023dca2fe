"""Interrupt every stage many times, and check that the results equal, byte for byte, those of undisturbed runs.

    python tools/check_kills.py [--kills 200] [--minutes N] [--seed S] [--only STAGE] [--ranks 1|2] [--engine FILE]

A task is a stage, or all of them, with or without `--fresh`, on one rank, or on two that `accelerate launch` starts
with FILE (configs/accelerate/cpu.yaml). It is interrupted a few times at random moments: kill -9 of any rank, SIGTERM,
SIGINT, or a full disk (a small tmpfs for root, else a limit of the size of files). The same command is given after
each, until it is done. Then the manifests' hashes, all files, the newest checkpoints with weights and moments must be
those of the undisturbed task, everything else in the run what it was, and nothing may be left aside.

Standard error lists each interruption; standard output is the comparison. The exit code is 1 if anything differs.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
from harm_oracle import snapshot
from harm_process import Command, Outcome, Server
from harm_surroundings import Disk
from harm_world import FOLDERS, RUN, STAGES, World
from measuring import Figure, print_table

from rarec.storage.artefacts import MANIFEST
from rarec.storage.directories import CHECKED

ROOT = Path(__file__).parents[1]
LAUNCHED = ("ids", "shards", "train", "evaluate")
"""Stages that `accelerate launch` starts."""
SIGNALS = (signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
LIMIT = 180.0
"""Seconds after which a command hangs."""
PER_TASK = 5
"""Largest number of interruptions of one task."""
CHANGING = ("record.json", "config.yaml", ".lock", CHECKED)
"""Ends of files in `run.dir` that any stage may write."""


@dataclass(frozen=True)
class Task:
    """A stage, or all with the name `run`, to be brought to its end."""

    stage: str
    fresh: bool
    ranks: int

    @property
    def state(self) -> str:
        """The state of the world that it starts from."""
        if self.fresh:
            return "finished"
        return "new" if self.stage in ("run", STAGES[0]) else f"upto-{STAGES[STAGES.index(self.stage) - 1]}"

    @property
    def folders(self) -> list[str]:
        """Directories of what it makes."""
        stages = STAGES if self.stage == "run" else [self.stage]
        return [folder for stage in stages for folder in FOLDERS[stage]]

    def __str__(self) -> str:
        return f"{self.stage}{' --fresh' * self.fresh}, {self.ranks} rank{'s' * (self.ranks > 1)}"


class Killer:
    """Brings tasks to their ends, undisturbed and with interruptions.

    Args:
        world: has the states that tasks start from.
        place: where they are copied to.
        engine: configuration of `accelerate launch`.
        seed: of everything random.
    """

    def __init__(self, world: World, place: Path, engine: Path, seed: int) -> None:
        self.world, self.server = world, world.server
        self.engine, self.place = engine.resolve(), place
        self.generator = random.Random(seed)
        self.interrupted: Counter[str] = Counter()
        self._undisturbed: dict[Task, tuple[dict[str, str], float]] = {}

    def disturb(self, task: Task, most: int) -> list[str]:
        """Bring a task to its end with interruptions; return what is wrong then."""
        expected, seconds = self.undisturbed(task)
        self.world.copy(task.state, self.place)
        disk = Disk(self.place)
        try:
            for _ in range(most):
                if self._interrupt(task, disk, seconds):
                    break
            disk.leave(None)
            for _ in range(3):  # a signal may come when all is done, and then nothing is left to be done
                code, said = self._run(task)
                if code or not self._unfinished(task):
                    break
            faults = [f"{task}: exit code {code} in the end: {said[-300:]}"] if code else []
            found = results(self.place, task)
            faults += [f"{task}: {path} differs" for path in expected | found if expected.get(path) != found.get(path)]
            return faults + self._others(task)
        finally:
            disk.release()
            shutil.rmtree(self.place, ignore_errors=True)

    def undisturbed(self, task: Task) -> tuple[dict[str, str], float]:
        """Return the results of a task and how long it takes."""
        if task not in self._undisturbed:
            self.world.copy(task.state, self.place)
            started = time.monotonic()
            code, said = self._run(task)
            if code:
                raise RuntimeError(f"{task}: the undisturbed command failed: {said}")
            self._undisturbed[task] = results(self.place, task), time.monotonic() - started
            shutil.rmtree(self.place)
        return self._undisturbed[task]

    def _interrupt(self, task: Task, disk: Disk, seconds: float) -> bool:
        """Start the command and interrupt it at a random moment; return whether it was done before that."""
        generator = self.generator
        if generator.random() < 0.25:
            what, command = self._full(task, disk)
            code, _ = self._run(task, command)
            disk.leave(None)
        elif task.ranks > 1:
            what, code = self._launch_and_kill(task, generator.uniform(0.3, 1.0) * seconds)
        else:
            number = generator.choice(SIGNALS)
            kill = (number, int(2 ** generator.uniform(0, 6)), "") if generator.random() < 0.5 else None
            after = None if kill else (number, generator.uniform(0, seconds))
            what = f"{number.name} " + (
                f"before rename {kill[1]}" if kill else f"after {after[1]:.2f} s" if after else ""
            )
            code = self.server.run(Command(self._words(task), str(self.place), kill=kill, kill_after=after)).code
        done = code == 0 and not self._unfinished(task)
        if not done:
            self.interrupted[what.split()[0]] += 1
            print(f"{sum(self.interrupted.values())}. {task}: {what}: exit code {code}", file=sys.stderr, flush=True)
        return done

    def _full(self, task: Task, disk: Disk) -> tuple[str, Command]:
        """Take the room on the disk away; return what was done, and the command with limits."""
        free = int(10 ** self.generator.uniform(3, 5.7))
        if disk.small:
            disk.leave(free)
            return f"disk with {free} bytes left", Command(self._words(task), str(self.place))
        return f"disk for files of {free} bytes", Command(
            self._words(task), str(self.place), limits={"RLIMIT_FSIZE": free}
        )

    def _words(self, task: Task) -> list[str]:
        return [task.stage, "config.yaml", *["--fresh"] * task.fresh]

    def _run(self, task: Task, command: Command | None = None) -> tuple[int | None, str]:
        """Run the command to its end; return exit code and messages."""
        if task.ranks == 1:
            outcome: Outcome = self.server.run(command or Command(self._words(task), str(self.place)))
            return outcome.code, outcome.stderr
        with tempfile.TemporaryFile("w+") as said:
            code = self._wait(self._launch(task, said.fileno()))
            said.seek(0)
            return code, said.read()

    def _launch(self, task: Task, said: int) -> subprocess.Popen[bytes]:
        launcher = ["--config_file", str(self.engine), "--num_processes", str(task.ranks), "--main_process_port", "0"]
        script = [str(ROOT / "launch" / f"{task.stage}.py"), "--config", "config.yaml", *["--fresh"] * task.fresh]
        command = [sys.executable, "-m", "accelerate.commands.launch", *launcher, *script]
        if not (self.place / "configs").is_symlink():  # the engine's file names one of DeepSpeed's there
            (self.place / "configs").symlink_to(ROOT / "configs")
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
        return subprocess.Popen(
            command, cwd=self.place, env=environment, stdout=said, stderr=said, start_new_session=True
        )

    def _wait(self, launcher: subprocess.Popen[bytes]) -> int | None:
        try:
            return launcher.wait(LIMIT)
        except subprocess.TimeoutExpired:
            os.killpg(launcher.pid, signal.SIGKILL)
            launcher.wait()
            return None

    def _launch_and_kill(self, task: Task, after: float) -> tuple[str, int | None]:
        """Launch the ranks; after so many seconds send a signal to one, or to all."""
        launcher = self._launch(task, subprocess.DEVNULL)
        with suppress(subprocess.TimeoutExpired):
            launcher.wait(after)
        ranks, number = ranks_of(launcher.pid), self.generator.choice(SIGNALS)
        chosen = self.generator.choice([*ranks] or [0])
        victims = [ranks[chosen]] if number == signal.SIGKILL and ranks else list(ranks.values())
        for victim in victims:
            with suppress(psutil.NoSuchProcess):
                victim.send_signal(number)
        whom = f"rank {chosen}" if number == signal.SIGKILL else "all ranks"
        return f"{number.name} to {whom} after {after:.1f} s", self._wait(launcher)

    def _unfinished(self, task: Task) -> bool:
        """Return whether something is begun, or not there at all: a training that is asked to stop ends with code 0."""
        run = self.place / RUN
        begun = any(path.name == ".begun.json" or path.name.endswith(".fresh") for path in run.rglob(".*"))
        return begun or not all((run / folder / MANIFEST).exists() for folder in task.folders)

    def _others(self, task: Task) -> list[str]:
        """Return what is wrong with all that the task does not make, and what is left aside."""
        before, after = snapshot(self.world.state(task.state)), snapshot(self.place)
        mine = tuple(f"{RUN}/{folder}/" for folder in task.folders)
        kept = {
            path: each for path, each in before.items() if not path.startswith(mine) and not path.endswith(CHANGING)
        }
        lost = [path for path, each in kept.items() if path not in after or after[path].content != each.content]
        left = [path for path in after if ".aside-" in path or path.endswith((".fresh", ".begun.json", ".progress"))]
        return [f"{task}: {path} was changed" for path in lost] + [f"{task}: {path} is left" for path in left]


def results(place: Path, task: Task) -> dict[str, str]:
    """Return the hash of each artefact, and the sha256 of each of its files and of its checkpoints' tensors.

    Reports hold times: of them only the names of the files are compared.
    """
    found: dict[str, str] = {}
    tree = snapshot(place / RUN)
    for folder in task.folders:
        with suppress(OSError, ValueError, KeyError):
            manifest = json.loads((place / RUN / folder / MANIFEST).read_bytes())
            found[folder] = "" if folder == "report" else manifest["hash"]
            found |= {
                f"{folder}/{name}": "" if folder == "report" else tree[f"{folder}/{name}"].content
                for name in manifest["files"]
            }
        tensors = [path for path in tree if path.startswith(f"{folder}/checkpoints/") and path.endswith(".safetensors")]
        found |= {path: tree[path].content for path in tensors}
    return found


def ranks_of(launcher: int) -> dict[int, psutil.Process]:
    """Return the ranks that a launcher has started, without the data workers that they fork (same command line)."""
    found = {}
    with suppress(psutil.Error):
        for process in psutil.Process(launcher).children(recursive=True):
            with suppress(psutil.Error, KeyError):
                parent = process.parent()
                if parent is not None and parent.cmdline() != process.cmdline():
                    found[int(process.environ()["RANK"])] = process
    return found


def tasks(only: str | None, ranks: int | None) -> list[Task]:
    """Return the tasks to choose from."""
    every = [Task(stage, fresh, 1) for stage in [*STAGES, "run"] for fresh in (False, True)]
    every += [Task(stage, fresh, 2) for stage in LAUNCHED for fresh in (False, True)]
    return [task for task in every if only in (None, task.stage) and ranks in (None, task.ranks)]


def main() -> None:
    """Interrupt tasks, and compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop after this time")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=[*STAGES, "run"])
    parser.add_argument("--ranks", type=int, choices=[1, 2])
    parser.add_argument("--engine", type=Path, default=ROOT / "configs" / "accelerate" / "cpu.yaml")
    arguments = parser.parse_args()
    every, faults, done = tasks(arguments.only, arguments.ranks), list[str](), 0
    if not every:
        parser.error(f"{arguments.only} is not launched on {arguments.ranks} ranks")
    end = time.monotonic() + 60 * arguments.minutes
    with tempfile.TemporaryDirectory(prefix="rarec-kills-") as scratch:
        server = Server()
        world = World(Path(scratch) / "world", server)
        killer = Killer(world, Path(scratch) / "copy", arguments.engine, arguments.seed)
        while (kills := killer.interrupted.total()) < arguments.kills and time.monotonic() < end:
            task = killer.generator.choice(every)
            new = killer.disturb(task, min(killer.generator.randint(1, PER_TASK), arguments.kills - kills))
            print("\n".join(new), file=sys.stderr, flush=True, end="\n" * bool(new))
            faults, done = faults + new, done + 1
        server.close()
    print(f"check_kills.py: {arguments.engine.stem}, seed {arguments.seed}, {done} tasks")
    enough = kills >= arguments.kills
    print_table(
        [
            Figure("interruptions", str(kills), f"{arguments.kills}", enough),
            *[Figure(f"  {kind}", str(number)) for kind, number in sorted(killer.interrupted.items())],
            Figure("differences from undisturbed runs", str(len(faults)), "0", not faults),
        ]
    )
    sys.exit(bool(faults) or not enough)


if __name__ == "__main__":
    main()
