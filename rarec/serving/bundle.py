"""Bundles: alignment in safetensors, LoRA in plain PEFT format, manifest, prompt, model card. No pickle."""

from collections.abc import Callable, Mapping, Sequence
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
from rarec.serving.card import model_card

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
