"""The card of a bundle: Markdown with the front matter that model hubs read."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from rarec.bundle.contents import Contents, Trained
from rarec.config import RunConfig, Variant
from rarec.console.inert import in_one_line
from rarec.evaluation.labels import (
    FULL,
    figure,
    headline_metrics,
    listed,
    metric_title,
    part_title,
    variant_order,
    variant_title,
)

CARD = "README.md"
_CARD = """---
{front_matter}
---
# {title}

{verdict}

{what}

```python
import rarec

recommender = rarec.load("{folder}")  # from a hub: huggingface_hub.snapshot_download("you/{folder}")
recommender.recommend([["{first}", "{second}"]], k=10)[0]
```

## What it needs
{needs}

## Training
{training}

## Evaluation
The full catalogue of {items:,} items is ranked without the user's earlier items; ties count against the model.
{n:,} test users; 95% bootstrap intervals over them. The row of this bundle is bold.

{table}

## Limits
Measured on one log with one protocol. A ranking learned from past behaviour repeats its biases: it serves popular items
and active users best. Items without text are not covered.
"""


def model_card(contents: Contents, config: RunConfig, figures: Mapping[str, Any], verdict: str) -> str:
    """Return the card.

    Args:
        contents: of the bundle.
        config: of the run.
        figures: `metrics` (rows of metrics.json) and `trained_parameters`, as in the manifest.
        verdict: whether the run's main variant adds to all that is cheap, in one sentence.
    """
    trained, catalogue = contents.trained, contents.catalogue
    examples = [in_one_line(str(item)) for item in catalogue.ids[:2].to_pylist()]
    return _CARD.format(
        front_matter=_front_matter(contents, config, figures).to_yaml(),
        title=variant_title(contents.row),
        verdict=verdict,
        what=_what(contents, figures["trained_parameters"]),
        folder="bundle",
        first=examples[0],
        second=examples[-1],
        needs=_needs(trained),
        training=_training(contents, config),
        items=len(catalogue.titles),
        n=max(row["n"] for row in figures["metrics"]),
        table=_table(contents.row, figures["metrics"]),
    )


def _hub_name(model: str) -> str | None:
    """Return the name of a language model of the hub; None for one that is on this machine: hubs refuse paths."""
    return model if re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", model) and not Path(model).exists() else None


def _front_matter(contents: Contents, config: RunConfig, figures: Mapping[str, Any]) -> ModelCardData:
    """Return what model hubs read: licence, language model, and the row's figures."""
    name, trained = variant_title(contents.row), contents.trained
    dataset = f"test users of a log, {len(contents.catalogue.titles):,} items"
    results = [
        EvalResult("sequential-recommendation", "log", dataset, metric_type=row["metric"], metric_value=row["value"])
        for row in figures["metrics"]
        if row["protocol"] == FULL and row["variant"] == contents.row
    ]
    return ModelCardData(
        base_model=_hub_name(trained.llm["name"]) if trained else None,
        library_name="rarec",
        license=config.export.license,
        tags=["recommendation", "ra-rec"],
        model_name=name,
        eval_results=results,
    )


def _what(contents: Contents, parameters: int) -> str:
    parts = [part_title(name) for name in contents.parts]
    scored = f"The weighted sum of the scores of {listed(parts)}" if len(parts) > 1 else f"The scores of {parts[0]}"
    own = f" It holds {parameters:,} trained parameters, and none of the language model's."
    model = own if contents.trained else ""
    return f"{scored}, for any history of the catalogue's items.{model} RA-Rec: arXiv 2402.04527."


def _needs(trained: Trained | None) -> str:
    if trained is None:
        return "- nothing but this folder"
    llm = trained.llm
    return (
        f"- the language model `{llm['name']}`, revision {llm['revision']}, in {llm['dtype']} (weights "
        f"`{llm['fingerprint'][:16]}`); another one is refused"
    )


def _training(contents: Contents, config: RunConfig) -> str:
    if contents.trained is None:
        return f"Seed {config.run.seed}."
    chosen = [name for name in ("denoise", "diversify") if getattr(config.shards, name)]
    limit = f", at most {config.shards.max_samples:,}" if config.shards.max_samples else ""
    held_out = f", of the newest {config.ids.held_out:.0%} of each user's interactions" if config.ids.held_out else ""
    selection = limit + held_out + (f", {' and '.join(chosen)}" if chosen else "")
    lora = f"; LoRA of rank {config.lora.rank}" if contents.trained.variant.lora else ""
    return (
        f"Loss {config.loss.recommendation} + {config.loss.align_weight} x alignment; "
        f"{slots(contents.trained.variant, config)}{lora}; seed {config.run.seed}.\n"
        f"Training samples: share {config.shards.share} of all{selection}. All settings are in `manifest.json`."
    )


def _table(row: str, metrics: list[Mapping[str, Any]]) -> str:
    full = {(found["variant"], found["metric"]): found for found in metrics if found["protocol"] == FULL}
    names = headline_metrics(metric for _, metric in full)
    lines = [["row", *map(metric_title, names)], ["---"] * (len(names) + 1)]
    for variant in sorted({variant for variant, _ in full}, key=variant_order):
        mark = "**" if variant == row else ""
        cells = [full.get((variant, name)) for name in names]
        values = [f"{figure(c['value'])} ({figure(c['low'])} to {figure(c['high'])})" if c else "" for c in cells]
        lines.append([f"{mark}{variant_title(variant)}{mark}", *values])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def slots(variant: Variant, config: RunConfig) -> str:
    """Describe the slots of a variant, and the blocks that they enter."""
    if variant.blocks == "none":
        return "no slots"
    every = "every block" if config.train.blocks is None else f"the blocks {', '.join(map(str, config.train.blocks))}"
    where = {"all": f"at the input of {every}", "input": "at the input of block 0", "readout": "at the readout alone"}
    parts = [f"{config.alignment.instructions} contextual instructions"] if variant.instructions else []
    parts += [f"vectors of {', '.join(config.sources_by_name)}"] if variant.projections else []
    parts += ["vectors of the history's items"] if variant.projections and "{soft:" in config.prompt.title else []
    return f"{listed(parts)} {where[variant.blocks]}"
