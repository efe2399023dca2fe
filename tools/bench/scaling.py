"""Measure the speed of training on two ranks, each on a core of its own, relative to one process on one core.

    python -m tools.bench.scaling [--rounds 3] [--steps 16] [--batch 8]

Every training is started as `accelerate launch --config_file configs/accelerate/X.yaml launch/train.py`, over a small
log and a frozen Llama of 26M random weights, both generated here. A rank has one thread and a fixed number of samples
in a step: with two ranks the step's batch doubles. Nearly all prompts have the same length. Run it alone on the
machine.

one process: one rank, pinned to one core.
two apart:   two such trainings at a time, independent of each other, each pinned to a core: the limit of the machine.
DDP ...:     two ranks of one training, pinned to those two cores.

They take turns. For each, the samples per second of all ranks together are printed, and the share of a step spent
waiting for data; then the speedup over one process. Speed is the batch divided by the time from one step to the next,
with update, communication and log; the first four steps and the validation are not counted. Figures are medians over
steps, over rounds, and of the ratios within each round.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from rarec.stages.run import Run
from tools.bench.measuring import Figure, at_least, options, print_table
from tools.bench.small_runs import ROOT, launched, texts_of, write_llama, write_run

VARIANT, SKIPPED = "per_layer", 4
"""Steps at the beginning that are not counted."""
ONE, APART = "one process", "two apart"
ENGINES = {ONE: "one", "DDP": "cpu", "ZeRO-2": "zero2", "FSDP2": "fsdp2", "ZeRO-3": "zero3"}
"""The launcher's file of each engine."""
GOALS = {"DDP": 1.6, "ZeRO-2": 1.6}
LOG = {"users": 20, "items": 200, "interactions": 3000, "tastes": 8}
LLAMA = {"num_hidden_layers": 8, "hidden_size": 512, "intermediate_size": 1376, "num_attention_heads": 8}


class Speed(NamedTuple):
    """The speed of trainings that run at the same time.

    Attributes:
        samples: samples per second over all ranks.
        waiting: longest share of a step spent waiting for data.
    """

    samples: float
    waiting: float


def start(command: Sequence[str], cores: Sequence[int], output: Path) -> "subprocess.Popen[bytes]":
    """Start a command with one thread a process, pinned to cores; its output goes into a file."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)  # the process inherits it
    try:
        with output.open("wb") as stream:
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=stream, stderr=stream)
    finally:
        os.sched_setaffinity(0, before)


def finish(process: "subprocess.Popen[bytes]", output: Path) -> None:
    """Wait for a process; if it failed, exit with its output."""
    if process.wait():
        raise SystemExit(output.read_text())


@dataclass(frozen=True)
class PreparedRun:
    """A run with its shards; every training gets a copy.

    Args:
        root: directory of the run.
        steps: number of steps of each training.
        batch: samples of a rank in a step.
    """

    root: Path
    steps: int
    batch: int

    def make(self) -> None:
        """Generate the log and the language model, and make the shards."""
        train = {"variants": [VARIANT], "epochs": 1000, "validation_users": 8}
        train |= {"max_steps": self.steps, "validate_every": self.steps}
        share = min(1.0, 4 * self.batch * self.steps / LOG["interactions"])
        sections = {"ids": {"sasrec": {"epochs": 1}}, "shards": {"share": share}, "train": train}
        config = write_run(self.root, LOG, {"repeats": "keep"}, llm={"path": str(self.root / "llm")}, **sections)
        write_llama(self.root / "llm", texts_of(self.root), **LLAMA)
        Run(config, say=lambda line: None).run(["prepare", "ids", "shards"])

    def speed(self, way: str) -> Speed:
        """Train once in one of the ways, and return its speed."""
        cores = sorted(os.sched_getaffinity(0))[:2]
        shares = [cores[:1], cores[1:]] if way == APART else [cores[:1] if way == ONE else cores]
        engine = ENGINES[ONE if way == APART else way]
        names = [f"{way} {number}" for number in range(len(shares))]
        trainings = [self._start(engine, own, name) for own, name in zip(shares, names, strict=True)]
        for name, training in zip(names, trainings, strict=True):
            finish(training, self.root / f"{name}.txt")
        speeds = [self._speed(name, self.batch * len(own)) for name, own in zip(names, shares, strict=True)]
        return Speed(sum(speed.samples for speed in speeds), max(speed.waiting for speed in speeds))

    def _start(self, engine: str, cores: Sequence[int], name: str) -> "subprocess.Popen[bytes]":
        """Start a training in a copy of the run, on one rank for each core."""
        run = self.root / name
        shutil.rmtree(run, ignore_errors=True)
        shutil.copytree(self.root / "run", run)
        overrides = [f"run.dir={run}", f"train.batch_size={self.batch * len(cores)}"]
        script = ["launch/train.py", "--config", str(self.root / "config.yaml"), *overrides]
        return start(launched(engine, len(cores), *script), cores, self.root / f"{name}.txt")

    def _speed(self, name: str, batch: int) -> Speed:
        """Return the speed of a training, from the times of TensorBoard's events."""
        directory = self.root / name / "train" / VARIANT
        events = EventAccumulator(str(directory / "log"))
        events.Reload()
        times = [event.wall_time for event in events.Scalars("loss")][SKIPPED - 1 :]
        lines = [json.loads(line) for line in (directory / "log.jsonl").read_text().splitlines()]
        waiting = [line["data_wait"] for line in lines[SKIPPED:] if "loss" in line]
        return Speed(batch / float(np.median(np.diff(times))), float(np.median(waiting)))


def table(speeds: Mapping[str, list[Speed]]) -> list[Figure]:
    """Return the figures of all rounds."""
    figures, ratios = [], []
    base = np.array([speed.samples for speed in speeds[ONE]])
    for way, own in speeds.items():
        samples, waiting = np.median(own, axis=0)
        figures.append(Figure(way, f"{samples:,.2f} samples/s, {waiting:.1%} waiting for data"))
        ratio, what = float(np.median([speed.samples for speed in own] / base)), f"{way} / {ONE}"
        ratios.append(at_least(what, ratio, GOALS[way], " x") if way in GOALS else Figure(what, f"{ratio:.2f} x"))
    return [*figures, *ratios[1:]]


def main() -> None:
    """Prepare the run, train in turns, print the table."""
    arguments = options(__doc__, rounds=3, steps=16, batch=8)
    if len(os.sched_getaffinity(0)) < 2 or arguments.steps < SKIPPED + 2:
        raise SystemExit(f"this takes two cores, and {SKIPPED + 2} steps")
    speeds: dict[str, list[Speed]] = {way: [] for way in (ONE, APART, *list(ENGINES)[1:])}
    with tempfile.TemporaryDirectory() as scratch:
        prepared = PreparedRun(Path(scratch), arguments.steps, arguments.batch)
        prepared.make()
        for _ in range(arguments.rounds):
            for way, own in speeds.items():
                own.append(prepared.speed(way))
                print(f"{way}: {own[-1].samples:,.2f} samples/s", file=sys.stderr)
    print(f"tools.bench.scaling: {arguments.batch} samples a rank and step, {arguments.rounds} rounds")
    print_table(table(speeds))


if __name__ == "__main__":
    main()
