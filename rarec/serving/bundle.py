"""Bundles: alignment in safetensors, LoRA in plain PEFT format, manifest, prompt, model card. No pickle."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rarec.artefacts import check_files, differences, read_manifest
from rarec.config import MODEL_SECTIONS, VARIANTS, RunConfig, Variant, dump_config
from rarec.errors import UserError
from rarec.files import write_text
from rarec.models.build import SourceShape, build_model
from rarec.models.language_model import LoadedModel
from rarec.models.towers import RaRec
from rarec.models.weights import load_weights, save_weights

PROMPT = "prompt.yaml"
CARD = "README.md"


@dataclass(frozen=True)
class Provenance:
    """What a bundle's model belongs to.

    Attributes:
        inputs: hashes of dataset, catalogue, sources, language model and prompt, by name.
        llm: the language model's identity: name, revision, dtype, hashes.
        shapes: dimension and vectors per user of each source.
    """

    inputs: Mapping[str, str]
    llm: Mapping[str, str]
    shapes: Mapping[str, SourceShape]


def write_bundle(
    directory: Path,
    model: RaRec,
    variant: Variant,
    config: RunConfig,
    provenance: Provenance,
    metrics: Sequence[Mapping[str, Any]],
    trainable_parameters: int,
) -> dict[str, Any]:
    """Write a bundle's files; return the figures for its manifest.

    Args:
        directory: to write to.
        model: trained.
        variant: which variant it is.
        config: the run's.
        provenance: what it belongs to.
        metrics: rows of the evaluation for this variant.
        trainable_parameters: the real count.
    """
    figures: dict[str, Any] = {
        "llm": dict(provenance.llm),
        "sources": {name: vars(shape) for name, shape in provenance.shapes.items()},
        "metrics": [dict(row) for row in metrics],
        "trainable_parameters": trainable_parameters,
    }
    save_weights(model, directory, dtype=getattr(torch, config.export.dtype))
    write_text(directory / PROMPT, dump_config(config.prompt))
    write_text(directory / CARD, model_card(variant, config, figures))
    return figures


def load_bundle(
    directory: Path,
    config: RunConfig,
    load: Callable[[Variant], LoadedModel],
    provenance: Provenance,
    named: Mapping[str, Sequence[str]],
) -> RaRec:
    """Put a bundle's weights around the language model, after checking that all belong together.

    Args:
        directory: of the bundle.
        config: any run's configuration; the bundle's own sections take the place of its.
        load: the language model for a variant.
        provenance: what lies here.
        named: sources that each side's template names.

    Raises:
        UserError: a file is altered, or the language model, catalogue, ID embeddings or prompt are not the bundle's.
    """
    manifest = read_manifest(directory, "bundle")
    check_files(directory, manifest)
    _check_belongs(directory, manifest, provenance)
    variant = VARIANTS[manifest["settings"]["variant"]]
    _check_loading(directory, manifest["settings"], config, variant)
    sections = {section: manifest["settings"][section] for section in MODEL_SECTIONS}
    model = build_model(
        RunConfig.model_validate({**config.model_dump(mode="json"), **sections}),
        variant,
        load(variant),
        provenance.shapes,
        named,
    )
    load_weights(model, directory)
    return model.eval()


def _check_loading(directory: Path, settings: Mapping[str, Any], config: RunConfig, variant: Variant) -> None:
    """The language model is loaded as the run's configuration says: its pooling and LoRA must be the bundle's."""
    here = config.model_dump(mode="json")
    changed = differences(settings["readout"]["pool"], here["readout"]["pool"], "readout.pool")
    changed += differences(settings["lora"], here["lora"], "lora") if variant.lora else []
    if changed:
        raise UserError(f"{directory} was made with other settings: {'; '.join(changed)}", "set them as they were")


def _check_belongs(directory: Path, manifest: Mapping[str, Any], here: Provenance) -> None:
    differing = [key for key, value in manifest["llm"].items() if key != "revision" and here.llm.get(key) != value]
    if set(differing) - {"name"}:
        facts = "; ".join(
            f"{key}: {str(manifest['llm'][key])[:60]} -> {str(here.llm.get(key))[:60]}" for key in differing
        )
        raise UserError(
            f"{directory} belongs to another base model ({facts})", f"set llm.path: {manifest['llm']['name']}"
        )
    for name, digest in manifest["made_from"].items():
        belongs = name in ("catalogue", "prompt") or name.startswith("ids/")
        if belongs and here.inputs.get(name) != digest:
            raise UserError(
                f"{directory} belongs to another {name} ({digest[:12]}, but here is {str(here.inputs.get(name))[:12]})",
                "use the one it was trained with, or train again",
            )


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
