"""Part `busy` of `python -m tools.bench`: the speed beside a busy process over that on an idle machine.

Threads of OpenMP wait for each other as `rarec` lets them. Each measurement has a process of its own: seconds for 10
training steps of SASRec by the default recipe, many of whose operations last microseconds, and for a forward and
backward pass of a language model of MiniLM's shape, whose operations last milliseconds. Medians are compared.
"""

import multiprocessing
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from transformers import BertConfig, BertModel

from rarec.config.ids import SasRecConfig
from rarec.distributed.world import SINGLE
from rarec.ids.models import build
from rarec.ids.objective import Batch, SampledSoftmax, draw_negatives
from tools.bench.measuring import Action, Row, apart, in_turns

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
    """Never end."""
    while True:
        pass


@contextmanager
def busy() -> Iterator[None]:
    """Keep one core busy."""
    other = multiprocessing.Process(target=spin_forever, daemon=True)
    other.start()
    yield
    other.kill()


def seconds_of_each() -> np.ndarray:
    """Return the seconds of both workloads."""
    return np.array([times[0] for times in in_turns(1, workloads()).values()])


def rows(quick: bool) -> list[Row]:
    """Return the speed beside a busy process, relative to the idle machine's."""
    count = 1 if quick else 3
    idle = np.median([apart(seconds_of_each) for _ in range(count)], axis=0)
    with busy():
        beside = np.median([apart(seconds_of_each) for _ in range(count)], axis=0)
    return [
        Row.least(f"{kind}: beside a busy process / idle", 1 / slow, 1 / fast, 0.5, "runs/s")
        for kind, slow, fast in zip(("ID model", "language model"), beside.tolist(), idle.tolist(), strict=True)
    ]
