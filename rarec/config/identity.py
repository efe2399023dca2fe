"""What shapes each artefact, by the configuration alone: the settings in its manifest, its name where it is shared."""

from typing import Any

from rarec.artefacts import sha256_json
from rarec.config.ids import Ids, Import, Recipe
from rarec.config.load import without_password
from rarec.config.logs import Prepare
from rarec.config.schema import RunConfig
from rarec.config.variants import Variant

COMPUTES = ("engine", "spark", "memory", "scratch")
"""Fields of `prepare` that say how it is computed, not what: every engine gives the same dataset."""
IMPORTED_FILES = ("items", "item_ids", "users", "user_ids")
"""Fields of an import that name files."""
BUNDLED = ("llm", "prompt", "alignment", "readout", "loss", "train", "lora")
"""The sections that say what a bundle's model is."""
LLM = ("path", "revision", "kind", "dtype", "quantize")
"""Fields of `llm` that say which weights, in what numbers; the rest says how they are computed with."""
_DIGITS = 16
"""Of a digest in a name."""


def prepare_settings(config: Prepare, seed: int) -> dict[str, Any]:
    """The settings that shape a prepared dataset, as plain JSON."""
    return {"seed": seed, "prepare": config.model_dump(mode="json", exclude=set(COMPUTES))}


def source_settings(section: Ids | Recipe | Import, seed: int) -> dict[str, Any]:
    """The settings that shape a source: a recipe and the seed, or how an import makes its user vectors."""
    chosen = section.chosen if isinstance(section, Ids) else section
    if isinstance(chosen, Recipe):
        holdout = section.held_out if isinstance(section, Ids) else 0.0
        return {"seed": seed, "holdout": holdout, "users": {"kind": chosen.kind, **chosen.model_dump(mode="json")}}
    if chosen.users is not None:
        return {"missing": chosen.missing, "users": {"kind": "table"}}
    rule = {"rule": chosen.user_rule, "half_life": chosen.half_life, "max_history": chosen.max_history}
    return {"missing": chosen.missing, "users": {"kind": "rule", **rule}}


def shard_settings(config: RunConfig) -> dict[str, Any]:
    """The settings that shape the shards; how many write them does not.

    Of other sections: what is held out, how states are pooled, and how many slots prompts keep free. And the order of
    the samples, which was by user once: such shards are refused, and none is completed in another order.
    """
    settings = _sections(config, "shards", "prompt") | {"holdout": config.ids.held_out}
    settings |= {"pool": config.readout.pool, "instructions": config.alignment.instructions}
    settings |= {"order": "random"}
    del settings["shards"]["writers"]
    return settings


def variant_settings(config: RunConfig, variant: Variant) -> dict[str, Any]:
    """The settings that shape one variant's weights."""
    sections = ["alignment", "readout", "loss", "train", *(["lora"] if variant.lora else [])]
    settings = _sections(config, *sections) | {"variant": variant.name}
    for outside in ("variants", "trackers", "keep", "stream"):
        del settings["train"][outside]
    return settings


def evaluate_settings(config: RunConfig) -> dict[str, Any]:
    """The settings that shape an evaluation."""
    settings = _sections(config, "evaluate", "report")
    if not config.evaluate.external:  # evaluations older than this field stay current
        del settings["evaluate"]["external"]
    return settings | {"variants": config.train.variants, "main": config.export.variant}


def bundle_settings(config: RunConfig) -> dict[str, Any]:
    """The settings that shape a bundle."""
    tree = config.model_dump(mode="json")
    return {
        "variant": config.export.variant,
        "dtype": config.export.dtype,
        **{section: tree[section] for section in BUNDLED},
    }


def sources_of(config: RunConfig) -> dict[str, Ids | Import]:
    """The section of every source whose vectors become slots, `id` first."""
    return {"id": config.ids, **config.sources}


BASELINE = "id.all"
"""The ID model that was trained on all, where the one of the slots was not. No source can be called so."""


def baseline_of(config: RunConfig) -> tuple[str, Ids]:
    """Name and section of the ID model that the variants are compared and fused with."""
    apart = config.ids.held_out and isinstance(config.ids.chosen, Recipe)
    return (BASELINE, config.ids.model_copy(update={"holdout": 0.0})) if apart else ("id", config.ids)


def vectors_of(config: RunConfig) -> dict[str, Ids | Import]:
    """The section of all that `rarec ids` makes: the sources, and the baseline."""
    name, section = baseline_of(config)
    return {**sources_of(config), name: section}


def shared_names(config: RunConfig) -> dict[str, str]:
    """What `prepare`, `ids/NAME` and `shards` are called where runs share them, each with a digest of what shapes it.

    The digest of each covers the digests of those that it is made from. Files are known by their paths here: that their
    contents are still the same is for the manifests to say, as in a run of its own.
    """
    prepare = _digest(prepare_settings(config.prepare, config.run.seed), engine_of_tables(config.prepare))
    names = {"prepare": f"prepare-{prepare}"}
    for name, section in sources_of(config).items():
        names[f"ids/{name}"] = _source_name(name, section, config.run.seed, prepare)
    shards = _digest(shard_settings(config), llm_settings(config), names)
    baseline, section = baseline_of(config)
    names[f"ids/{baseline}"] = _source_name("id", section, config.run.seed, prepare)
    return {**names, "shards": f"shards-{shards}"}


def _source_name(name: str, section: Ids | Import, seed: int, prepare: str) -> str:
    return f"ids-{name}-{_digest(source_settings(section, seed), imported_files(section), prepare)}"


def llm_settings(config: RunConfig) -> dict[str, Any]:
    """Which language model it is."""
    return config.llm.model_dump(mode="json", include=set(LLM))


def engine_of_tables(config: Prepare) -> str | None:
    """Where tables are known by their names, the engine that knows them."""
    named = config.interactions.table or config.items.table
    return without_password(config.engine) if named else None


def imported_files(section: Ids | Import) -> list[str | None]:
    """Those that vectors are imported from."""
    chosen = section.chosen if isinstance(section, Ids) else section
    return [] if isinstance(chosen, Recipe) else [getattr(chosen, field) for field in IMPORTED_FILES]


def _digest(*parts: object) -> str:
    return sha256_json(parts)[:_DIGITS]


def _sections(config: RunConfig, *sections: str) -> dict[str, Any]:
    """Sections as plain JSON, with the seed."""
    tree = config.model_dump(mode="json")
    return {"seed": config.run.seed, **{section: tree[section] for section in sections}}
