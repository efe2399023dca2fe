"""Measure how OpenMP's threads should wait for each other, on an idle machine and beside other busy processes.

    python -m tools.bench.waiting [--busy 1] [--rounds 2]

It is the part `busy` of `python -m tools.bench` too: the speed beside a busy process over that on an idle machine.

Each way of waiting is measured in a process of its own: seconds for 10 training steps of SASRec by the default recipe,
many of whose operations last microseconds, and for a forward and backward pass of a language model of MiniLM's shape,
whose operations last milliseconds. `rarec` sets the one called `rarec`; `spin` is what GNU's OpenMP does by itself,
`passive` is OMP_WAIT_POLICY=PASSIVE. Rounds are interleaved; medians are reported, and ratios to `spin`.
"""

import multiprocessing
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from transformers import BertConfig, BertModel

from rarec.config.ids import SasRecConfig
from rarec.console.last_resort import WAITING
from rarec.distributed.world import SINGLE
from rarec.ids.models import build
from rarec.ids.objective import Batch, SampledSoftmax, draw_negatives
from tools.bench.measuring import Action, Row, in_turns, options

WAYS = {"spin": {}, "rarec": WAITING, "passive": {"OMP_WAIT_POLICY": "PASSIVE"}}
ITEMS, STEPS = 12_000, 10
TOKENS = (64, 100)


def workloads() -> dict[str, Action]:
    """Return training steps of an ID model, and a forward and backward pass of a language model."""
    torch.manual_seed(0)
    recipe = SasRecConfig()
    id_loss, items_R = SampledSoftmax(build(recipe)), torch.arange(ITEMS)
    windows = recipe.batch_size
    batch = Batch(torch.randint(ITEMS, (windows, 51)), torch.randint(1, 51, (windows,)))
    vectors_RE = torch.randn(ITEMS, recipe.dim, requires_grad=True)
    shape = BertConfig(hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536)
    llm = BertModel(shape).requires_grad_(False)
    embedded = torch.randn(*TOKENS, 384, requires_grad=True)

    def id_steps() -> None:
        for _ in range(STEPS):
            negatives = draw_negatives(items_R, recipe.negatives)
            id_loss(batch.groups(SINGLE), negatives, items_R, vectors_RE).backward()

    def llm_pass() -> None:
        llm(inputs_embeds=embedded).last_hidden_state.square().mean().backward()

    return {"ID model": id_steps, "language model": llm_pass}


def spin_forever() -> None:
    """Keep one core busy."""
    while True:
        pass


@contextmanager
def busy(processes: int) -> Iterator[None]:
    """Keep as many cores busy as there are processes."""
    others = [multiprocessing.Process(target=spin_forever, daemon=True) for _ in range(processes)]
    for other in others:
        other.start()
    yield
    for other in others:
        other.kill()


def rounds(count: int, ways: Iterable[str] = WAYS) -> dict[str, np.ndarray]:
    """Return the median seconds of both workloads, by way of waiting."""
    spent: dict[str, list[list[float]]] = {way: [] for way in ways}
    unset = {name: value for name, value in os.environ.items() if name not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
    command = [sys.executable, "-m", "tools.bench.waiting", "--measure"]
    for _ in range(count):
        for way, own in spent.items():
            out = subprocess.run(command, env=unset | WAYS[way], check=True, capture_output=True, text=True).stdout
            own.append([float(line) for line in out.split()])
    return {way: np.median(own, axis=0) for way, own in spent.items()}


def rows(quick: bool) -> list[Row]:
    """Return the speed beside a busy process, relative to the idle machine's."""
    count = 1 if quick else 3
    idle = rounds(count, ["rarec"])["rarec"]
    with busy(1):
        beside = rounds(count, ["rarec"])["rarec"]
    return [
        Row.least(f"{kind}: beside a busy process / idle", 1 / slow, 1 / fast, 0.5, "runs/s")
        for kind, slow, fast in zip(("ID model", "language model"), beside.tolist(), idle.tolist(), strict=True)
    ]


def main() -> None:
    """Measure every way of waiting, alone and beside busy processes, and print the table."""
    arguments = options(__doc__, busy=1, rounds=2, measure=False)
    if arguments.measure:  # in a process of its own
        for times in in_turns(1, workloads()).values():
            print(times[0])
        return
    print(f"{'machine':16}{'waiting':10}{'SASRec, s':>10}{'ratio':>8}{'LLM, s':>10}{'ratio':>8}")
    for name, others in (("idle", 0), (f"{arguments.busy} busy", arguments.busy)):
        with busy(others):
            figures = rounds(arguments.rounds)
        for way, times in figures.items():
            cells = (f"{time:10.2f}{time / spin:8.2f}" for time, spin in zip(times, figures["spin"], strict=True))
            print(f"{name:16}{way:10}{''.join(cells)}")


if __name__ == "__main__":
    main()
