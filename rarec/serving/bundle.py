"""Bundles: alignment in safetensors, LoRA in plain PEFT format, manifest, prompt, model card. No pickle."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCardData

from rarec.artefacts import check_files, differences, read_manifest
from rarec.config import MODEL_SECTIONS, VARIANTS, RunConfig, Variant, dump_config
from rarec.errors import UserError
from rarec.files import write_text
from rarec.models.build import SourceShape, build_model
from rarec.models.language_model import LoadedModel
from rarec.models.towers import RaRec
from rarec.models.weights import load_weights, save_weights
from rarec.registry import KINDS

PROMPT = "prompt.yaml"
CARD = "README.md"
_CARD = """---
{front_matter}
---
# {title} on {base}

Alignment weights of RA-Rec (arXiv 2402.04527): pre-trained ID embeddings become soft prompts in the blocks of a frozen
language model. This bundle holds the {parameters:,} trained parameters, and none of the language model's.

## What it needs
- the base model `{base}`, revision {revision}, in {dtype} (weights fingerprint `{fingerprint}`)
- the catalogue, ID embeddings and prompt whose hashes are in `manifest.json`; others are refused when it is loaded

## Training
Loss {loss} + {weight} x alignment; {slots}; seed {seed}.
Training samples: share {share} of all{selection}. All settings are in `manifest.json`.

## Evaluation
The full catalogue is ranked without the user's earlier items; ties count against the model. Intervals: bootstrap over
users.

| metric | value | 95% interval | n |
| --- | --- | --- | --- |
{rows}

## Limits
Measured on one log with one protocol. A ranking learned from past behaviour repeats its biases: it serves popular items
and active users best. Items without text are not covered.
"""


@dataclass(frozen=True)
class Provenance:
    """The identity of a bundle's model: its inputs and language model.

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
        directory: directory to write to.
        model: the trained model.
        variant: the model's variant.
        config: the run's configuration.
        provenance: what the model belongs to.
        metrics: rows of metrics.json for this variant.
        trainable_parameters: number of trained parameters.
    """
    facts: dict[str, Any] = {
        "llm": dict(provenance.llm),
        "sources": {name: vars(shape) for name, shape in provenance.shapes.items()},
        "metrics": [dict(row) for row in metrics],
        "trainable_parameters": trainable_parameters,
    }
    save_weights(model, directory, dtype=getattr(torch, config.export.dtype))
    write_text(directory / PROMPT, dump_config(config.prompt))
    write_text(directory / CARD, model_card(variant, config, facts))
    return facts


def load_bundle(
    directory: Path,
    config: RunConfig,
    load: Callable[[Variant], LoadedModel],
    provenance: Provenance,
    named: Mapping[str, Sequence[str]],
) -> RaRec:
    """Load a bundle's weights around the language model, after checking that they belong together.

    Args:
        directory: where the bundle is.
        config: any run's configuration; sections that the bundle has replace its own.
        load: returns the language model for a variant.
        provenance: the inputs, the language model and the sources of this run.
        named: sources that each side's template names.

    Raises:
        UserError: a file is altered, or the bundle belongs to another language model, catalogue, ID embeddings or
            prompt.
    """
    manifest = read_manifest(directory, "bundle")
    check_files(directory, manifest)
    _check_belongs(directory, manifest, provenance)
    settings = manifest["settings"]
    variant = _variant(directory, settings["variant"], config)
    _check_loading(directory, settings, config, variant)
    _check_named(directory, settings, config)
    sections = {section: settings[section] for section in MODEL_SECTIONS}
    sections["train"] = {**sections["train"], "variants": config.train.variants}
    model = build_model(
        RunConfig.model_validate({**config.model_dump(mode="json"), **sections}),
        variant,
        load(variant),
        provenance.shapes,
        named,
    )
    load_weights(model, directory)
    return model.eval()


def model_card(variant: Variant, config: RunConfig, facts: Mapping[str, Any]) -> str:
    """Return the model card: Markdown with the front matter that model hubs read.

    Args:
        variant: the model's variant.
        config: the run's configuration.
        facts: `llm`, `sources`, `metrics` and `trainable_parameters`, as in the bundle's manifest.
    """
    rows = [
        "| {metric}/{protocol} | {value:.4f} | {low:.4f} to {high:.4f} | {n} |".format(**row)
        for row in facts["metrics"]
    ]
    chosen = [name for name in ("denoise", "diversify") if getattr(config.shards, name)]
    base, tags = facts["llm"], ["recommendation", "soft-prompt", "ra-rec"]
    return _CARD.format(
        front_matter=ModelCardData(base_model=base["name"], library_name="rarec", tags=tags).to_yaml(),
        base=base["name"],
        title=variant.title,
        parameters=facts["trainable_parameters"],
        revision=base["revision"],
        dtype=base["dtype"],
        fingerprint=base["fingerprint"][:16],
        loss=config.loss.recommendation,
        weight=config.loss.align_weight,
        slots=_slots(variant, config, facts["sources"]),
        seed=config.run.seed,
        share=config.shards.share,
        selection=f", {' and '.join(chosen)}" if chosen else "",
        rows="\n".join(rows),
    )


def _slots(variant: Variant, config: RunConfig, sources: Iterable[str]) -> str:
    """Describe the slots of a variant, and the blocks that they enter."""
    if variant.blocks == "none":
        return "no slots"
    every = "every block" if config.train.blocks is None else f"the blocks {', '.join(map(str, config.train.blocks))}"
    where = {"all": f"at the input of {every}", "input": "at the input of block 0", "readout": "at the readout alone"}
    parts = [f"{config.alignment.instructions} contextual instructions"] if variant.instructions else []
    parts += [f"vectors of {', '.join(sources)}"] if variant.projections else []
    parts += ["vectors of the history's items"] if variant.projections and "{soft:" in config.prompt.title else []
    return f"{' and '.join(parts)} {where[variant.blocks]}"


def _check_loading(directory: Path, settings: Mapping[str, Any], config: RunConfig, variant: Variant) -> None:
    """Check pooling and LoRA: the language model is loaded with the run's, which must be the bundle's."""
    here = config.model_dump(mode="json")
    changed = differences(settings["readout"]["pool"], here["readout"]["pool"], "readout.pool")
    changed += differences(settings["lora"], here["lora"], "lora") if variant.lora else []
    if changed:
        raise UserError(
            f"{directory} was exported with other settings: {'; '.join(changed)}", "set these fields to the first value"
        )


def _variant(directory: Path, identity: Any, config: RunConfig) -> Variant:
    """Return the bundle's variant: one that rarec brings, or one that the configuration names."""
    for variant in (*VARIANTS.values(), *config.variants.values()):
        if variant.identity == identity:
            return variant
    name = identity["name"] if isinstance(identity, dict) else identity
    problem = f"{directory} holds the variant {name}, which train.variants does not name as it was"
    raise UserError(problem, "name it in train.variants, as package.module:NAME")


def _check_named(directory: Path, settings: Mapping[str, Any], config: RunConfig) -> None:
    """Refuse parts of the user's own that the configuration does not name: their code is not imported."""
    here = config.model_dump(mode="json")
    for kind in ("alignment_maps", "readouts", "losses"):
        section, field = KINDS[kind].field.split(".")
        name = settings[section][field]
        if name not in KINDS[kind].built_in and name != here[section][field]:
            problem = f"{directory} was exported with {section}.{field}: {name}, which the configuration does not name"
            raise UserError(problem, f"set {section}.{field}: {name}, if you trust that code")


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
                f"{directory} belongs to another {name} ({digest[:12]}; this run's is "
                f"{str(here.inputs.get(name))[:12]})",
                f"use the {name} that the bundle was trained with, or train and export again",
            )
