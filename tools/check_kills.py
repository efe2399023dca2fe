"""Kill a training many times, and check that its weights are equal, bit for bit, to those of an undisturbed training.

    python tools/check_kills.py RUN.yaml [section.field=value ...] [--engine FILE] [--ranks 2] [--kills 20]

The shards of RUN must exist. They are copied to a temporary directory and trained there twice: undisturbed, and with
`--kills` interruptions at random steps: `kill -9` of a random rank, every third time SIGTERM to all. Each start is the
same command, `accelerate launch` with FILE (configs/accelerate/cpu.yaml). Standard error lists each interruption and
the newest checkpoint at that time; standard output is the comparison.
"""

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import psutil
import torch
from measuring import Figure, print_table
from safetensors.torch import load_file

from rarec.config import load_config

LAUNCH = Path(__file__).parents[1] / "launch" / "train.py"


class Training:
    """One training in a directory of its own.

    Args:
        arguments: arguments of this tool.
        directory: directory of the run, to which its shards are copied.
    """

    def __init__(self, arguments: argparse.Namespace, directory: Path) -> None:
        config = load_config(arguments.config, arguments.overrides)
        for stage in ("prepare", "ids", "shards", "llm"):
            if (Path(config.run.dir) / stage).exists():
                shutil.copytree(Path(config.run.dir) / stage, directory / stage)
        self.directory = directory / "train" / config.train.variants[0]
        launcher = ["--config_file", str(arguments.engine), "--num_processes", str(arguments.ranks)]
        fields = [*arguments.overrides, f"run.dir={directory}", f"train.variants=[{config.train.variants[0]}]"]
        run = [str(LAUNCH), "--config", str(arguments.config), *fields]
        self.command = [sys.executable, "-m", "accelerate.commands.launch", *launcher, "--main_process_port", "0", *run]

    def start(self) -> subprocess.Popen[bytes]:
        """Start or resume the training."""
        return subprocess.Popen(self.command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)

    @property
    def step(self) -> int:
        """The last step in the log."""
        log = self.directory / "log.jsonl"
        steps = [line.split(",")[0] for line in log.read_text().splitlines()] if log.exists() else []
        return int(steps[-1].rpartition(":")[2]) if steps else 0

    @property
    def done(self) -> bool:
        """Return whether the training is finished."""
        return (self.directory / "manifest.json").exists()

    def checkpoint(self) -> Path | None:
        """Return the newest checkpoint."""
        return max((self.directory / "checkpoints").glob("step-*"), default=None)

    def weights(self) -> dict[str, torch.Tensor]:
        """Return the trained weights and their moments from the newest checkpoint."""
        newest = self.checkpoint()
        files = sorted(newest.rglob("*.safetensors")) if newest else []
        return {f"{file.name}/{name}": tensor for file in files for name, tensor in load_file(file).items()}


def disturb(training: Training, steps: list[int], rng: np.random.Generator) -> int:
    """Interrupt a training when it reaches each of these steps; return the number of interruptions."""
    interrupted = 0
    for number, step in enumerate(steps):
        launcher = training.start()
        while launcher.poll() is None and training.step < step:
            time.sleep(0.01)
        ranks = ranks_of(launcher.pid)
        if launcher.poll() is None and ranks:
            gently, chosen = number % 3 == 2, sorted(ranks)[int(rng.integers(len(ranks)))]
            for victim in ranks.values() if gently else [ranks[chosen]]:
                with suppress(psutil.NoSuchProcess):
                    victim.send_signal(signal.SIGTERM if gently else signal.SIGKILL)
            interrupted += 1
            what = "SIGTERM to all" if gently else f"kill -9 of rank {chosen}"
            print(f"step {training.step}: {what}; newest checkpoint {training.checkpoint()}", file=sys.stderr)
        launcher.wait()
    return interrupted


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


def main() -> None:
    """Train with and without interruptions, and compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("--engine", type=Path, default=Path("configs/accelerate/cpu.yaml"))
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("overrides", nargs="*", metavar="section.field=value")
    arguments = parser.parse_intermixed_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    rng = np.random.default_rng(arguments.seed)
    with tempfile.TemporaryDirectory() as scratch:
        whole, disturbed = (Training(arguments, Path(scratch) / name) for name in ("whole", "disturbed"))
        if whole.start().wait() or not whole.done:
            sys.exit("the undisturbed training failed: " + " ".join(whole.command))
        steps = sorted(rng.integers(1, max(2, whole.step - 1), arguments.kills).tolist())
        interrupted = disturb(disturbed, steps, rng)
        while not disturbed.done and disturbed.start().wait() == 0:
            pass
        expected, found = whole.weights(), disturbed.weights()
        same = expected.keys() == found.keys() and all(torch.equal(expected[name], found[name]) for name in expected)
        print(f"check_kills.py: {arguments.engine.stem}, {arguments.ranks} ranks, {whole.step} steps")
        print_table(
            [
                Figure("interruptions", str(interrupted), f"{arguments.kills}", interrupted == arguments.kills),
                Figure("tensors compared, weights and moments", str(len(expected))),
                Figure("equal bit for bit to the undisturbed training", "yes" if same else "no", "yes", same),
            ]
        )
    sys.exit(not same)


if __name__ == "__main__":
    main()
