"""The model card of a bundle, filled from what is known and nothing else."""

from collections.abc import Iterable, Mapping
from typing import Any

from rarec.config import RunConfig, Variant

_CARD = """---
library_name: rarec
base_model: {base}
tags: [recommendation, soft-prompt, ra-rec]
---
# {title} on {base}

Alignment weights of RA-Rec (arXiv 2402.04527): pre-trained ID embeddings become soft prompts in the blocks of a frozen
language model. This bundle holds what was trained, {parameters:,} parameters, and none of the language model's.

## What it needs
- the base model `{base}`, revision {revision}, in {dtype} (weights fingerprint `{fingerprint}`)
- the catalogue, ID embeddings and prompt whose hashes stand in `manifest.json`; loading refuses others

## How it was trained
Loss {loss} + {weight} x alignment; {slots}; seed {seed}.
Training samples: share {share} of all{selection}. The settings are in `manifest.json`.

## How good it is
Ranking of the whole catalogue, the user's earlier items excluded, ties against the model; bootstrap 95% intervals over
users.

| metric | value | 95% interval | n |
| --- | --- | --- | --- |
{rows}

## Limits
Measured on one log with one protocol. A ranking learnt from past behaviour repeats its biases: popular items and active
users are served best. Items without text are not covered.
"""


def _slots(variant: Variant, config: RunConfig, sources: Iterable[str]) -> str:
    """What the variant puts where."""
    if variant.blocks == "none":
        return "no slots"
    every = "every block" if config.train.blocks is None else f"the blocks {', '.join(map(str, config.train.blocks))}"
    where = {"all": f"at the input of {every}", "input": "at the input of block 0", "readout": "at the readout alone"}
    parts = [f"{config.alignment.instructions} contextual instructions"] if variant.instructions else []
    parts += [f"vectors of {', '.join(sources)}"] if variant.projections else []
    return f"{' and '.join(parts)} {where[variant.blocks]}"


def model_card(variant: Variant, config: RunConfig, figures: Mapping[str, Any]) -> str:
    """Markdown with the front matter that model hubs read.

    Args:
        variant: the variant.
        config: the run's.
        figures: `llm`, `sources`, `metrics` and `trainable_parameters`, as in the manifest.
    """
    rows = [
        "| {metric}/{protocol} | {value:.4f} | {low:.4f} to {high:.4f} | {n} |".format(**row)
        for row in figures["metrics"]
    ]
    chosen = [name for name in ("denoise", "diversify") if getattr(config.shards, name)]
    base = figures["llm"]
    return _CARD.format(
        base=base["name"],
        title=variant.title,
        parameters=figures["trainable_parameters"],
        revision=base["revision"],
        dtype=base["dtype"],
        fingerprint=base["fingerprint"][:16],
        loss=config.loss.recommendation,
        weight=config.loss.align_weight,
        slots=_slots(variant, config, figures["sources"]),
        seed=config.run.seed,
        share=config.shards.share,
        selection=f", {' and '.join(chosen)}" if chosen else "",
        rows="\n".join(rows),
    )
