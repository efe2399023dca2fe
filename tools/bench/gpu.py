"""Check everything that a GPU does, and measure training on it: one command, made to take eight minutes on one GPU.

    python -m tools.bench.gpu [--device cuda] [--only NAME ...] [--minutes 8] [--out results/gpu]

speed:    Llama shapes of 1B and 8B with random weights, LoRA and slots in every block, beside plain PEFT; MFU; memory
          beside `rarec plan`. See gpu_speed.py.

Each other check is a training, an evaluation or an ID model of a small run that is generated here, once on the CPU and
once on the device, on all GPUs that are there (NCCL):

engines:  every engine of configs/accelerate; losses of twelve steps are those of one CPU process.
resume:   a training that SIGTERM stopped, and that was started again, has the losses of an undisturbed one.
ids:      ID models in float32 and in bfloat16, with their item table on the ranks.
ranking:  metrics of an evaluation on the device, by one engine and by ZeRO-3.
ways:     attention backends, packed prompts, compiled blocks, recomputed blocks, quantised weights.

Writes DIR/DEVICE.json after each check. A check that fails, or that finds no time left, is a row of its own, and the
others go on. After --minutes, what runs is ended. `--device cpu` runs the same on two processes and with tiny shapes:
so this tool can be tested.
"""

import argparse
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from tools.bench.gpu_place import LONGEST, Place, tried
from tools.bench.measuring import Figure, at_most, print_table
from tools.bench.small_runs import ROOT, texts_of, write_llama, write_run

VARIANT, STEPS = "per_layer_lora", 12
CLOSE = 0.02
"""Largest relative difference of a loss in bfloat16, which has three digits."""
LOG = {"users": 300, "items": 200, "interactions": 4000, "tastes": 8}
LLAMA = {"num_hidden_layers": 4, "hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4}
STEP_SETTINGS = {"batch_size": 32, "epochs": 100, "max_steps": STEPS, "validate_every": STEPS}
SECTIONS: dict[str, Any] = {
    "ids": {"holdout": 0.2, "sasrec": {"epochs": 3, "dim": 32, "dropout": 0.0}},
    "neighbours": {"models": ["cooccurrence"]},
    "lora": {"rank": 4},
    "train": {"variants": [VARIANT], **STEP_SETTINGS},
    "evaluate": {"resamples": 50, "sanity_checks": False},
}
Jobs = dict[str, Callable[[], list[Figure] | None]]


def main() -> None:
    """Run the checks, print the table, write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--only", nargs="+", choices=list(CHECKS), default=list(CHECKS), metavar="NAME")
    parser.add_argument("--minutes", type=float, default=8)
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "gpu")
    arguments = parser.parse_args()
    on_gpu = arguments.device == "cuda"
    if on_gpu and not torch.cuda.is_available():
        parser.error("PyTorch finds no GPU here: --device cpu shows that the checks themselves work")
    ranks = torch.cuda.device_count() if on_gpu else 2
    name = torch.cuda.get_device_name() if on_gpu else "cpu"
    stack = {package: version(package) for package in ("torch", "transformers", "peft", "deepspeed") if _has(package)}
    figures: list[Figure] = []
    arguments.out.mkdir(parents=True, exist_ok=True)
    file = arguments.out / f"{re.sub(r'[^A-Za-z0-9]+', '-', name)}.json"
    with tempfile.TemporaryDirectory() as scratch:
        place = Place(arguments.device, ranks, Path(scratch), time.monotonic() + 60 * arguments.minutes)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, place.stop)
        for check in (name for name in CHECKS if name in arguments.only):
            started = time.monotonic()
            if check != "speed" and not place.config.exists():
                more = ["neighbours", "shards", "train"] if {*arguments.only} - {"speed", "ids"} else []
                figures += tried("the run to check", partial(make_run, place, ["prepare", "ids", *more]))
            figures += tried(check, partial(CHECKS[check], place))
            print(f"{check}: {time.monotonic() - started:.0f} s", file=sys.stderr)
            rows = [asdict(figure) for figure in figures]
            file.write_text(
                json.dumps({"device": name, "ranks": ranks, "stack": stack, "figures": rows}, indent=2) + "\n"
            )
    print_table(figures)
    raise SystemExit(any(figure.met is False for figure in figures))


def make_run(place: Place, stages: Sequence[str]) -> None:
    """Generate a log and a small Llama, and run stages on the CPU."""
    llm = place.root / "llm"
    write_run(place.root, LOG, llm={"path": str(llm), "dtype": "bfloat16"}, **SECTIONS)
    write_llama(llm, texts_of(place.root), **LLAMA)
    place.run([sys.executable, "-m", "rarec", "run", str(place.config), "--stages", " ".join(stages)])


def losses(run: Path) -> list[float]:
    """Return the loss of each step."""
    lines = map(json.loads, (run / "train" / VARIANT / "log.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if "loss" in line]


def largest_difference(values: Sequence[float], expected: Sequence[float]) -> float:
    """Return the largest relative difference of two lists of losses; infinite if one is shorter."""
    if len(values) != len(expected):
        return float("inf")
    return max(abs(value / right - 1) for value, right in zip(values, expected, strict=True))


def trained(
    place: Place, name: str, *overrides: str, engine: str = "", ranks: int = 0, stages: Sequence[str] = ("train",)
) -> list[float]:
    """Train on the device, after the stages that the overrides change; return the losses."""
    copy = place.copied(name, without=stages)
    for stage in stages:
        place.run(place.launched(stage, name, *overrides, engine=engine, ranks=ranks))
    return losses(copy)


def compared(place: Place, what: str, allowed: float, train: Callable[[], list[float]]) -> list[Figure]:
    """Train, and compare the losses with the CPU's."""
    difference = largest_difference(train(), losses(place.root / "run"))
    return [at_most(f"{what}: largest difference of a loss from the CPU's", difference, allowed)]


def check_engines(place: Place) -> list[Figure]:
    """Train with every engine."""
    ranks = {"one": 1, **dict.fromkeys(("zero1", "zero2", "zero3"), place.ranks)}
    several = (place.several, "fsdp2")
    ranks |= dict.fromkeys(several, place.ranks) if place.ranks > 1 else {}
    jobs: Jobs = {}
    for engine, count in ranks.items():
        train = partial(trained, place, engine, engine=engine, ranks=count)
        jobs[engine] = partial(compared, place, f"{engine}, {count} rank(s)", CLOSE, train)
    missing = [] if place.ranks > 1 else [Figure(", ".join(several), "not checked: one GPU")]
    return [*place.figures(jobs), *missing]


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
        packed = ["flex_attention", *["flash_attention_2"] * _has("flash_attn")]
        ways |= {f"{backend}, packed": [f"llm.attention={backend}", "llm.packing=true"] for backend in packed}
    jobs: Jobs = {}
    for name, overrides in ways.items():
        train = partial(trained, place, name.replace(" ", "-"), *overrides, ranks=1)
        jobs[name] = partial(compared, place, name, CLOSE, train)
    if _has("bitsandbytes"):  # states of a model in four bits differ, so shards are made again
        train = partial(trained, place, "nf4", "llm.quantize=nf4", ranks=1, stages=("shards", "train"))
        jobs["nf4"] = partial(compared, place, "nf4", 0.2, train)
    missing = [Figure(name, "not checked: not installed") for name in ("flash_attn", "bitsandbytes") if not _has(name)]
    return [*place.figures(jobs), *missing]


def _has(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def check_resume(place: Place) -> list[Figure]:
    """Stop a training by SIGTERM, and start it again."""
    whole = trained(place, "whole")
    copy, command = place.copied("stopped"), place.launched("train", "stopped", "train.checkpoint_every=1")
    log, end = copy / "train" / VARIANT / "log.jsonl", min(place.end, time.monotonic() + LONGEST)
    with (place.root / "stopped.txt").open("wb") as output:
        process = place.started(command, output)
        while process.poll() is None and time.monotonic() < end:
            if log.exists() and '"step": 4,' in log.read_text():
                break
            time.sleep(0.01)
        for number in (signal.SIGTERM, signal.SIGKILL):
            if process.poll() is None:
                os.killpg(process.pid, number)
                with suppress(subprocess.TimeoutExpired):
                    process.wait(60)
    stopped = len(losses(copy))
    place.run(command)
    what = "resumed: largest difference of a loss from an undisturbed training"
    return [
        Figure("stopped after step", str(stopped), f"before {STEPS}", met=stopped < STEPS),
        at_most(what, largest_difference(losses(copy), whole), 1e-3),
    ]


def check_ids(place: Place) -> list[Figure]:
    """Train the ID models on the device."""
    return place.figures({f"ID model, {kind}": partial(ids_in, place, kind) for kind in ("float32", "bfloat16")})


def ids_in(place: Place, dtype: str) -> list[Figure]:
    """Train the ID models in one precision."""
    copy = place.copied(f"ids-{dtype}", without=("ids", "shards", "train"))
    place.run(place.launched("ids", copy.name, f"ids.sasrec.dtype={dtype}"))
    curves = [json.loads((run / "ids/id/manifest.json").read_text())["curve"] for run in (copy, place.root / "run")]
    difference = largest_difference(*([epoch["loss"] for epoch in curve] for curve in curves))
    what = f"ID model, {dtype}: largest difference of an epoch's loss from the CPU's in float32"
    return [at_most(what, difference, CLOSE if dtype == "bfloat16" else 1e-2)]


def check_ranking(place: Place) -> list[Figure]:
    """Evaluate on the device what was trained on the CPU."""
    expected = metrics_of(replace(place, device="cpu", ranks=1), "evaluated-cpu", "one")
    engines = (place.several if place.ranks > 1 else "one", "zero3")
    return place.figures({engine: partial(ranked, place, engine, expected) for engine in engines})


def ranked(place: Place, engine: str, expected: Mapping[str, float]) -> list[Figure]:
    """Evaluate by an engine."""
    metrics = metrics_of(place, f"evaluated-{engine}", engine)
    off = max(abs(metrics[key] - expected[key]) for key in expected)
    return [at_most(f"evaluation, {engine}: largest difference of {len(expected)} metrics from the CPU's", off, 0.02)]


def metrics_of(place: Place, name: str, engine: str) -> dict[str, float]:
    """Evaluate; return the metrics."""
    copy = place.copied(name, without=())
    place.run(place.launched("evaluate", name, engine=engine))
    rows = json.loads((copy / "evaluation/metrics.json").read_text())
    return {f"{row['variant']} {row['metric']}": row["value"] for row in rows}


def check_speed(place: Place) -> list[Figure]:
    """Measure training steps, in a process of their own."""
    out = place.root / "speed.json"
    command = [sys.executable, "-m", "tools.bench.gpu_speed", "--device", place.device, "--out", str(out)]
    failure = tried("speed", partial(place.run, command))  # what was measured before is kept
    return [*(Figure(**row) for row in (json.loads(out.read_text()) if out.exists() else [])), *failure]


CHECKS: dict[str, Callable[[Place], list[Figure]]] = {
    "speed": check_speed,
    "engines": check_engines,
    "resume": check_resume,
    "ids": check_ids,
    "ranking": check_ranking,
    "ways": check_ways,
}

if __name__ == "__main__":
    main()
