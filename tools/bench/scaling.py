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
with update, communication and log; the first steps and the validation are not counted. Figures are medians over steps,
over rounds, and of the ratios within each round.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from rarec.config.method import Prompt
from tools.bench.measuring import Figure, at_least, print_table
from tools.make_log import make_log

ROOT = Path(__file__).resolve().parents[2]
VARIANT, SKIPPED = "per_layer", 4
"""Steps at the beginning that are not counted."""
ONE, APART = "one process", "two apart"
ENGINES = {ONE: "one", "DDP": "cpu", "ZeRO-2": "zero2", "FSDP2": "fsdp2", "ZeRO-3": "zero3"}
"""The launcher's file of each engine."""
GOALS = {"DDP": 1.6, "ZeRO-2": 1.6}
CONFIG = """
run: {{dir: {root}/run, device: cpu}}
prepare:
  interactions: {{path: {root}/log/interactions, user: user, item: item, time: time}}
  items: {{path: {root}/log/items.parquet, item: item, title: title, text: [brand]}}
  repeats: keep
ids: {{sasrec: {{epochs: 1}}}}
llm: {{path: {root}/llm}}
shards: {{share: {share}}}
train: {{variants: [{variant}], epochs: 1000, max_steps: {steps}, validate_every: {steps}, validation_users: 8}}
"""
LLAMA: dict[str, Any] = {
    "num_hidden_layers": 8,
    "hidden_size": 512,
    "intermediate_size": 1376,
    "num_attention_heads": 8,
}


@dataclass(frozen=True)
class Speed:
    """The speed of one training.

    Attributes:
        samples: samples per second over all ranks.
        waiting: share of a step spent waiting for data.
    """

    samples: float
    waiting: float

    @classmethod
    def both(cls, trainings: Sequence["Training"]) -> "Speed":
        """Return the speed of trainings that run at the same time: the sum of samples, and the longest waiting."""
        own = [training.speed() for training in trainings]
        return cls(sum(one.samples for one in own), max(one.waiting for one in own))


def write_tokenizer(directory: Path, texts: Iterable[str]) -> int:
    """Save a tokenizer of the words of these texts; return the size of its vocabulary."""
    lower, split = normalizers.Lowercase(), pre_tokenizers.BertPreTokenizer()
    words = {word for text in texts for word, _ in split.pre_tokenize_str(text.lower())}
    vocabulary = {word: token for token, word in enumerate(["<s>", "</s>", "<unk>", *sorted(words)])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.normalizer, core.pre_tokenizer = lower, split
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=core, **special).save_pretrained(directory)
    return len(vocabulary)


def launch(engine: str, script: Sequence[str | Path], cores: Sequence[int], output: Path) -> subprocess.Popen[bytes]:
    """Start a script on one rank for each core, pinned to it, with one thread; its output goes into a file."""
    file = ROOT / "configs" / "accelerate" / f"{engine}.yaml"
    options: list[str | Path] = ["--config_file", file, "--num_processes", str(len(cores)), "--main_process_port", "0"]
    command: list[str | Path] = [sys.executable, "-m", "accelerate.commands.launch", *options, *script]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)  # the process inherits it
    try:
        with output.open("wb") as stream:
            return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=stream, stderr=stream)
    finally:
        os.sched_setaffinity(0, before)


def finish(process: subprocess.Popen[bytes], output: Path) -> None:
    """Wait for a process; if it failed, exit with its output."""
    if process.wait():
        raise SystemExit(output.read_text())


class PreparedRun:
    """A run with its shards; every training gets a copy.

    Args:
        root: directory of the run.
        steps: number of steps of each training.
        batch: samples of a rank in a step.
    """

    def __init__(self, root: Path, steps: int, batch: int) -> None:
        from rarec.entry import open_run  # not above: a script that measures a process imports this one

        self.root, self.batch, self.config = root, batch, root / "config.yaml"
        rows = 3000
        make_log(root / "log", users=20, items=200, interactions=rows, tastes=8)
        catalogue = pq.read_table(root / "log" / "items.parquet")
        texts = [text for name in ("title", "brand") for text in catalogue[name].to_pylist()]
        size = write_tokenizer(root / "llm", [*texts, Prompt().user])
        LlamaForCausalLM(LlamaConfig(vocab_size=size, **LLAMA)).save_pretrained(root / "llm")
        share = min(1.0, 4 * batch * steps / rows)
        self.config.write_text(CONFIG.format(root=root, variant=VARIANT, steps=steps, share=share))
        run = open_run(self.config)
        for stage in ("prepare", "ids", "shards"):
            run.make(stage)

    def speed(self, way: str) -> Speed:
        """Train once in one of the ways, and return its speed."""
        cores = sorted(os.sched_getaffinity(0))[:2]
        if way == APART:
            return Speed.both([self._start(ENGINES[ONE], cores[at : at + 1], f"{way} {at}") for at in range(2)])
        return Speed.both([self._start(ENGINES[way], cores[: 1 if way == ONE else 2], way)])

    def _start(self, engine: str, cores: list[int], name: str) -> "Training":
        """Start a training in a copy of the run, on one rank for each core."""
        run, batch = self.root / name, self.batch * len(cores)
        shutil.rmtree(run, ignore_errors=True)
        shutil.copytree(self.root / "run", run)
        script: list[str | Path] = [
            "launch/train.py",
            "--config",
            self.config,
            f"run.dir={run}",
            f"train.batch_size={batch}",
        ]
        output = self.root / f"{name}.txt"
        return Training(launch(engine, script, cores, output), output, run / "train" / VARIANT, batch)


@dataclass(frozen=True)
class Training:
    """A running training."""

    process: subprocess.Popen[bytes]
    output: Path
    directory: Path
    batch: int

    def speed(self) -> Speed:
        """Wait for the end and return the speed, from the times of TensorBoard's events."""
        finish(self.process, self.output)
        lines = [json.loads(line) for line in (self.directory / "log.jsonl").read_text().splitlines()]
        events = EventAccumulator(str(self.directory / "log"))
        events.Reload()
        times = [event.wall_time for event in events.Scalars("loss")][SKIPPED - 1 :]
        step = statistics.median(after - before for before, after in pairwise(times))
        waiting = statistics.median(line["data_wait"] for line in lines[SKIPPED:] if "loss" in line)
        return Speed(self.batch / step, waiting)


def table(speeds: Mapping[str, list[Speed]]) -> list[Figure]:
    """Return the figures of all rounds."""
    figures, unit = [], " x"
    for way, own in speeds.items():
        samples, waiting = statistics.median(s.samples for s in own), statistics.median(s.waiting for s in own)
        figures.append(Figure(way, f"{samples:,.2f} samples/s, {waiting:.1%} waiting for data"))
    for way in list(speeds)[1:]:
        ratio = statistics.median(a.samples / b.samples for a, b in zip(speeds[way], speeds[ONE], strict=True))
        what = f"{way} / {ONE}"
        figures.append(at_least(what, ratio, GOALS[way], unit) if way in GOALS else Figure(what, f"{ratio:.2f}{unit}"))
    return figures


def main() -> None:
    """Prepare the run, train in turns, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=16, help=f"of each training; the first {SKIPPED} are not counted")
    parser.add_argument("--batch", type=int, default=8, help="samples of a rank in a step")
    arguments = parser.parse_args()
    if len(os.sched_getaffinity(0)) < 2 or arguments.steps < SKIPPED + 2:
        parser.error(f"this takes two cores, and {SKIPPED + 2} steps")
    speeds: dict[str, list[Speed]] = {way: [] for way in (ONE, APART, *list(ENGINES)[1:])}
    with tempfile.TemporaryDirectory() as scratch:
        prepared = PreparedRun(Path(scratch), arguments.steps, arguments.batch)
        for _ in range(arguments.rounds):
            for way, own in speeds.items():
                own.append(prepared.speed(way))
                print(f"{way}: {own[-1].samples:,.2f} samples/s", file=sys.stderr)
    print(f"tools.bench.scaling: {arguments.batch} samples a rank and step, {arguments.rounds} rounds")
    print_table(table(speeds))


if __name__ == "__main__":
    main()
