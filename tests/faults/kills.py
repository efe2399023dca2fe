"""Interruptions: a stage is killed again and again, and must end as one that was not, byte for byte."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

import psutil
from hypothesis import strategies as st

from rarec.storage.artefacts import MANIFEST
from rarec.storage.directories import CHECKED
from tests.commands import Command, run_command
from tests.faults.judge import TEMPORARY, snapshot
from tests.faults.surroundings import Disk
from tests.faults.world import RUN, STAGES, Draw, World, folders_of

ROOT = Path(__file__).parents[2]
ENGINE = ROOT / "configs" / "accelerate" / "cpu.yaml"
LAUNCHED = ("ids", "shards", "train", "evaluate")
"""Stages that `accelerate launch` starts."""
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
    known: dict[tuple[str, bool, int], tuple[dict[str, str], float]] = field(default_factory=dict)

    @property
    def state(self) -> str:
        first = self.stage in ("run", STAGES[0])
        return "finished" if self.fresh else "new" if first else f"upto-{STAGES[STAGES.index(self.stage) - 1]}"

    @property
    def folders(self) -> list[str]:
        return folders_of(STAGES if self.stage == "run" else [self.stage])

    def undisturbed(self) -> tuple[dict[str, str], float]:
        """Return the results and how long they take."""
        key = (self.stage, self.fresh, self.ranks)
        if key not in self.known:
            self.world.copy(self.state, self.place)
            started = time.monotonic()
            assert self.run() == 0
            self.known[key] = self.results(), time.monotonic() - started
            shutil.rmtree(self.place)
        return self.known[key]

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

    def run(self, **surroundings: object) -> int | None:
        """Run the command to its end; return its exit code."""
        words = [self.stage, "config.yaml", *["--fresh"] * self.fresh]
        if self.ranks > 1:
            return self._launch().wait(180)
        return run_command(replace(Command(words, str(self.place)), **surroundings)).code  # type: ignore[arg-type]

    def _interrupt(self, draw: Draw, disk: Disk, seconds: float) -> None:
        number, moment = draw(st.sampled_from(SIGNALS)), draw(st.floats(0.05, 1)) * seconds
        way = draw(st.sampled_from(["time", "rename", "disk"]))
        if self.ranks > 1:
            self._launch_and_kill(draw, number, moment)
        elif way == "disk" and disk.small:
            disk.leave(draw(st.integers(1_000, 500_000)))
            self.run()
        elif way == "rename":
            self.run(kill=(number, draw(st.integers(1, 64)), ""))
        else:
            self.run(kill_after=(number, moment))

    def _launch(self) -> subprocess.Popen[bytes]:
        if not (self.place / "configs").is_symlink():  # the engine's file names one of DeepSpeed's there
            (self.place / "configs").symlink_to(ROOT / "configs")
        launcher = ["--config_file", str(ENGINE), "--num_processes", str(self.ranks), "--main_process_port", "0"]
        script = [str(ROOT / "launch" / f"{self.stage}.py"), "--config", "config.yaml", *["--fresh"] * self.fresh]
        words = [sys.executable, "-m", "accelerate.commands.launch", *launcher, *script]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
        silent = subprocess.DEVNULL
        return subprocess.Popen(
            words, cwd=self.place, env=environment, stdout=silent, stderr=silent, start_new_session=True
        )

    def _launch_and_kill(self, draw: Draw, number: signal.Signals, moment: float) -> None:
        """Launch the ranks; then kill one, or send another signal to all."""
        launcher = self._launch()
        with suppress(subprocess.TimeoutExpired):
            launcher.wait(moment)
        ranks = ranks_of(launcher.pid)
        for rank in ranks[:1] if number == signal.SIGKILL and draw(st.booleans()) else ranks:
            with suppress(psutil.NoSuchProcess):
                rank.send_signal(number)
        launcher.wait(180)

    def _is_whole(self) -> bool:
        """Return whether all is made and nothing begun: a training that is asked to stop ends with code 0."""
        run = self.place / RUN
        begun = any(path.name == ".begun.json" or path.name.endswith(".fresh") for path in run.rglob(".*"))
        return not begun and all((run / folder / MANIFEST).exists() for folder in self.folders)

    def faults(self, expected: dict[str, str]) -> list[str]:
        """Return what differs from the expected results, what else was changed, and what is left."""
        results = self.results()
        differs = [path for path in expected | results if expected.get(path) != results.get(path)]
        before, after = snapshot(self.world.state(self.state)), snapshot(self.place)
        mine = tuple(f"{RUN}/{folder}/" for folder in self.folders)
        kept = [path for path in before if not path.startswith(mine) and not path.endswith(CHANGING)]
        changed = [path for path in kept if path not in after or after[path].content != before[path].content]
        ends = (".fresh", ".begun.json", ".progress")
        left = [path for path in after if TEMPORARY.search(path) or path.endswith(ends)]
        named = {"differs": differs, "was changed": changed, "is left": left}
        return [f"{path} {what}" for what, paths in named.items() for path in paths]

    def results(self) -> dict[str, str]:
        """Return the hash of each artefact, and of each of its files and checkpoints' tensors; reports hold times."""
        found: dict[str, str] = {}
        tree = snapshot(self.place / RUN)
        for folder in self.folders:
            with suppress(OSError, ValueError, KeyError):
                manifest = json.loads((self.place / RUN / folder / MANIFEST).read_bytes())
                found[folder] = manifest["hash"] * (folder != "report")
            inside = (path for path in tree if path.startswith(f"{folder}/"))
            found |= {path: tree[path].content for path in inside if path.endswith(ENDS)}
        return found


def ranks_of(launcher: int) -> list[psutil.Process]:
    """Return the ranks that a launcher has started, without the data workers that they fork (same command line)."""
    with suppress(psutil.Error):
        children = psutil.Process(launcher).children(recursive=True)
        return [child for child in children if (parent := child.parent()) and parent.cmdline() != child.cmdline()]
    return []
