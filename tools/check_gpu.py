"""Check everything that a GPU does, and measure training on it: one command, made to take eight minutes on one GPU.

    python tools/check_gpu.py [--device cuda] [--only NAME ...] [--out results/gpu]

Each check is a training, an evaluation or an ID model of a small run that is generated here, once on the CPU and once
on the device, on all GPUs that are there (NCCL):

engines:  every engine of configs/accelerate; losses of twelve steps are those of one CPU process.
ways:     attention backends, packed prompts, compiled blocks, recomputed blocks, quantised weights.
resume:   a training that SIGTERM stopped, and that was started again, has the losses of an undisturbed one.
ids:      an ID model, with its item table on the ranks.
ranking:  metrics of an evaluation on the device.
speed:    Llama shapes of 1B and 8B with random weights, LoRA and slots in every block, beside plain PEFT; MFU; memory
          beside `rarec plan`. See check_gpu_speed.py.

Writes DIR/DEVICE.json. `--device cpu` runs the same on two processes and with tiny shapes: so this tool can be tested.
"""

import argparse
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import pyarrow.parquet as pq
import torch
from bench_scaling import write_tokenizer
from make_log import make_log
from measuring import Figure, at_most, print_table

T = TypeVar("T")
ROOT = Path(__file__).resolve().parents[1]
VARIANT, STEPS = "per_layer_lora", 12
CLOSE = 0.02
"""Largest relative difference of a loss in bfloat16, which has three digits."""
CONFIG = """
run: {{dir: {root}/run, device: cpu}}
prepare:
  interactions: {{path: {root}/log/interactions, user: user, item: item, time: time}}
  items: {{path: {root}/log/items.parquet, item: item, title: title, text: [brand]}}
ids: {{holdout: 0.2, sasrec: {{epochs: 3, dim: 32, dropout: 0.0}}}}
neighbours: {{models: [cooccurrence]}}
llm: {{path: {root}/llm, dtype: bfloat16}}
lora: {{rank: 4}}
train: {{variants: [{variant}], batch_size: 32, epochs: 100, max_steps: {steps}, validate_every: {steps}}}
evaluate: {{resamples: 50, sanity_checks: false}}
"""


@dataclass(frozen=True)
class Place:
    """Where the checks run.

    Attributes:
        device: `cuda` or `cpu`.
        ranks: number of processes: one for each GPU.
        root: scratch folder with the configuration, the log and the language model.
    """

    device: str
    ranks: int
    root: Path

    @property
    def config(self) -> Path:
        """The configuration of the small run."""
        return self.root / "config.yaml"

    def launched(self, script: str, run: str, *overrides: str, engine: str = "", ranks: int = 0) -> list[str]:
        """Return the command that starts a script on the device, on all ranks if no number is given."""
        ranks = ranks or self.ranks
        file = engine or (("ddp" if self.device == "cuda" else "cpu") if ranks > 1 else "one")
        launcher = ["-m", "accelerate.commands.launch", "--config_file", f"configs/accelerate/{file}.yaml"]
        number = ["--num_processes", str(ranks), "--main_process_port", "0"] if ranks > 1 or "zero" in file else []
        given = ["--config", str(self.config), f"run.dir={self.root / run}", f"run.device={self.device}", *overrides]
        return [sys.executable, *launcher, *number, f"launch/{script}.py", *given]

    def at_once(self, work: Callable[[T], list[float]], jobs: Sequence[T]) -> list[list[float]]:
        """Return the results of independent jobs; most of a small training's time is its start."""
        with ThreadPoolExecutor(4 if self.device == "cuda" else 1) as pool:
            return list(pool.map(work, jobs))

    def copied(self, name: str, without: Sequence[str] = ("train",)) -> Path:
        """Return a new copy of the run, with what is made before."""
        place = self.root / name
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(self.root / "run", place)
        for stage in without:
            shutil.rmtree(place / stage, ignore_errors=True)
        return place


def main() -> None:
    """Run the checks, print the table, write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--only", nargs="+", choices=list(CHECKS), default=list(CHECKS), metavar="NAME")
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "gpu")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("PyTorch finds no GPU here: --device cpu shows that the checks themselves work")
    ranks = torch.cuda.device_count() if arguments.device == "cuda" else 2
    name = torch.cuda.get_device_name() if arguments.device == "cuda" else "cpu"
    figures: list[Figure] = []
    with tempfile.TemporaryDirectory() as scratch:
        place = Place(arguments.device, ranks, Path(scratch))
        make_run(place)
        for check in arguments.only:
            started = time.monotonic()
            try:
                figures += CHECKS[check](place)
            except Failed as error:  # the others go on
                figures.append(Figure(check, str(error).strip().splitlines()[-1][:100], "runs", met=False))
                print(error, file=sys.stderr)
            print(f"{check}: {time.monotonic() - started:.0f} s", file=sys.stderr)
    print_table(figures)
    arguments.out.mkdir(parents=True, exist_ok=True)
    file = arguments.out / f"{re.sub(r'[^A-Za-z0-9]+', '-', name)}.json"
    stack = {module: importlib.import_module(module).__version__ for module in ("torch", "transformers", "deepspeed")}
    rows = [{"what": one.what, "figure": one.figure, "goal": one.goal, "met": one.met} for one in figures]
    file.write_text(json.dumps({"device": name, "ranks": ranks, "stack": stack, "figures": rows}, indent=2) + "\n")
    raise SystemExit(any(one.met is False for one in figures))


class Failed(Exception):
    """A command ended with an error; the text is what it said."""


def run(command: Sequence[str], **environment: str) -> None:
    """Run a command in the repository.

    Raises:
        Failed: it ended with another code than 0.
    """
    shared = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    done = subprocess.run(command, cwd=ROOT, env=shared, capture_output=True, text=True, check=False)
    if done.returncode:
        raise Failed(f"{' '.join(command)}\n{done.stdout}{done.stderr}")


def make_run(place: Place) -> None:
    """Generate a log and a small Llama, and make what training needs, on the CPU."""
    from transformers import LlamaConfig, LlamaForCausalLM

    make_log(place.root / "log", users=300, items=200, interactions=4000, tastes=8)
    catalogue = pq.read_table(place.root / "log" / "items.parquet")
    words = write_tokenizer(place.root / "llm", [*catalogue["title"].to_pylist(), *catalogue["brand"].to_pylist()])
    shape: Any = {"num_hidden_layers": 4, "hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4}
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(vocab_size=words, **shape)).save_pretrained(place.root / "llm")
    place.config.write_text(CONFIG.format(root=place.root, variant=VARIANT, steps=STEPS))
    rarec = [sys.executable, "-m", "rarec"]
    stages = "prepare ids neighbours shards train"
    run([*rarec, "run", str(place.config), "--stages", stages])


def losses(run: Path) -> list[float]:
    """Return the loss of each step."""
    lines = map(json.loads, (run / "train" / VARIANT / "log.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if "loss" in line]


def apart(found: Sequence[float], expected: Sequence[float]) -> float:
    """Return the largest relative difference of two lists of losses; infinite if one is shorter."""
    if len(found) != len(expected):
        return float("inf")
    return max(abs(one / other - 1) for one, other in zip(found, expected, strict=True))


def trained(place: Place, name: str, *overrides: str, engine: str = "", ranks: int = 0) -> list[float]:
    """Train on the device; return the losses."""
    copy = place.copied(name)
    run(place.launched("train", name, *overrides, engine=engine, ranks=ranks))
    return losses(copy)


def check_engines(place: Place) -> list[Figure]:
    """Train with every engine."""
    several = ["ddp" if place.device == "cuda" else "cpu", "fsdp2"] if place.ranks > 1 else []
    ways = [("one", 1), *((engine, place.ranks) for engine in (*several, "zero1", "zero2", "zero3"))]
    expected = losses(place.root / "run")
    found = place.at_once(lambda way: trained(place, way[0], engine=way[0], ranks=way[1]), ways)
    return [
        at_most(f"{engine}, {ranks} rank(s): largest difference of a loss from the CPU's", apart(own, expected), CLOSE)
        for (engine, ranks), own in zip(ways, found, strict=True)
    ]


def check_ways(place: Place) -> list[Figure]:
    """Train in ways that must not change the losses."""
    ways = {
        "attention=sdpa": ["llm.attention=sdpa"],
        "attention=eager": ["llm.attention=eager"],
        "packed prompts": ["llm.packing=true"],
        "compiled blocks": ["llm.compile=true"],
        "recomputed blocks": ["llm.gradient_checkpointing=true"],
    }
    if place.device == "cuda":
        ways["flex_attention, packed"] = ["llm.attention=flex_attention", "llm.packing=true"]
        if importlib.util.find_spec("flash_attn"):
            ways["flash_attention_2, packed"] = ["llm.attention=flash_attention_2", "llm.packing=true"]
    expected = losses(place.root / "run")
    found = place.at_once(lambda name: trained(place, name.replace(" ", "-"), *ways[name], ranks=1), list(ways))
    figures = [
        at_most(f"{name}: largest difference of a loss from the CPU's", apart(own, expected), CLOSE)
        for name, own in zip(ways, found, strict=True)
    ]
    if importlib.util.find_spec("bitsandbytes"):
        copy = place.copied("nf4", without=("train", "shards"))  # another model: its states differ
        run(place.launched("shards", "nf4", "llm.quantize=nf4", ranks=1))
        run(place.launched("train", "nf4", "llm.quantize=nf4", ranks=1))
        figures.append(at_most("nf4: largest difference of a loss", apart(losses(copy), expected), 0.2))
    return figures


def check_resume(place: Place) -> list[Figure]:
    """Stop a training by SIGTERM, and start it again."""
    whole = trained(place, "whole")
    copy, command = place.copied("stopped"), place.launched("train", "stopped", "train.checkpoint_every=1")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    log = copy / "train" / VARIANT / "log.jsonl"
    with (place.root / "stopped.txt").open("wb") as said:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=said, stderr=said, start_new_session=True)
        while process.poll() is None and not (log.exists() and '"step": 4,' in log.read_text()):
            time.sleep(0.01)
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)
        process.wait()
    stopped = len(losses(copy))
    run(command)
    return [
        Figure("stopped after step", str(stopped), f"before {STEPS}", met=stopped < STEPS),
        at_most("resumed: largest difference of a loss from an undisturbed training", apart(losses(copy), whole), 1e-3),
    ]


def check_ids(place: Place) -> list[Figure]:
    """Train the ID models on the device."""
    copy = place.copied("ids", without=("ids", "shards", "train"))
    run(place.launched("ids", "ids"))
    curves = [
        json.loads((at / "ids" / "id" / "manifest.json").read_text())["curve"] for at in (copy, place.root / "run")
    ]
    found, expected = ([epoch["loss"] for epoch in curve] for curve in curves)
    return [at_most("ID model: largest difference of an epoch's loss from the CPU's", apart(found, expected), 1e-2)]


def check_ranking(place: Place) -> list[Figure]:
    """Evaluate on the device what was trained on the CPU."""
    metrics = []
    for device in ("cpu", place.device):
        there = Place(device, place.ranks if device == place.device else 1, place.root)
        copy = there.copied(f"evaluated-{device}", without=())
        run(there.launched("evaluate", copy.name))
        metrics.append(
            {
                (m["variant"], m["metric"]): m["value"]
                for m in json.loads((copy / "evaluation/metrics.json").read_text())
            }
        )
    off = max(abs(metrics[0][key] - metrics[1][key]) for key in metrics[0])
    return [at_most(f"evaluation: largest difference of {len(metrics[0])} metrics from the CPU's", off, 0.02)]


def check_speed(place: Place) -> list[Figure]:
    """Measure training steps, in a process of their own."""
    out = place.root / "speed.json"
    run([sys.executable, str(ROOT / "tools" / "check_gpu_speed.py"), "--device", place.device, "--out", str(out)])
    return [Figure(**row) for row in json.loads(out.read_text())]


CHECKS: dict[str, Callable[[Place], list[Figure]]] = {
    "engines": check_engines,
    "ways": check_ways,
    "resume": check_resume,
    "ids": check_ids,
    "ranking": check_ranking,
    "speed": check_speed,
}

if __name__ == "__main__":
    main()
