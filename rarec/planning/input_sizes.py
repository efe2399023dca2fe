"""Describe the inputs of a training: lengths of prompts, numbers of samples and batches, shapes of source vectors.

Shape letters: S samples, b samples of one batch.
"""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from rarec.config import RunConfig
from rarec.config.ids import Ids, Import, Recipe
from rarec.config.neighbours import Graph
from rarec.data.shards.batch_plan import BatchPlan
from rarec.data.shards.files import open_index
from rarec.ids.imports import vectors_shape
from rarec.models.build import SIDES, SourceShape, slots_reserved
from rarec.storage.artefacts import Manifest

SPECIAL_TOKENS = 2
"""The most tokens that a tokenizer puts around a text."""
Lengths = npt.NDArray[np.integer]


@dataclass(frozen=True)
class PromptLengths:
    """Text tokens of one side's prompts, without slots.

    Attributes:
        longest: tokens of the longest prompt, which decides on memory.
        mean: tokens of a prompt on average, which decides on time.
    """

    longest: int
    mean: float

    @classmethod
    def of(cls, tokens_b: Lengths) -> "PromptLengths":
        """Summarize lengths (b)."""
        return cls(int(tokens_b.max()), float(tokens_b.mean()))

    def in_batch(self, packed: bool) -> int:
        """Return the positions that a prompt takes in a batch: as many as the longest, or packed, its own on average.

        Args:
            packed: see `llm.packing`.
        """
        return math.ceil(self.mean) if packed else self.longest


@dataclass(frozen=True)
class EpochBatches:
    """Sizes of the batches of an epoch.

    Attributes:
        count: number of batches; None where it is unknown.
        mean_size: samples of a batch on average.
        smallest: samples of the smallest batch.
        largest: (samples, positions that a user prompt takes) of the batches that may need the most memory: the one
            with most samples first, the one with the longest prompts last.
    """

    count: int | None
    mean_size: float
    smallest: int
    largest: tuple[tuple[int, int], ...]

    @classmethod
    def from_lengths(cls, batches: Iterable[Lengths], packed: bool) -> "EpochBatches":
        """Summarize batches, each given by the lengths of its user prompts (b).

        Args:
            batches: of an epoch.
            packed: see `llm.packing`.
        """
        shapes = [(len(tokens_b), PromptLengths.of(tokens_b).in_batch(packed)) for tokens_b in batches]
        sizes = [size for size, _ in shapes]
        largest = max(shapes), max(shapes, key=lambda shape: shape[::-1])
        return cls(len(shapes), sum(sizes) / len(shapes), min(sizes), tuple(dict.fromkeys(largest)))


@dataclass(frozen=True)
class SampleStats:
    """The samples of existing shards.

    Attributes:
        count: number of samples in an epoch.
        user_prompts: lengths of their user prompts.
        batches: batches under a token budget; None where a batch is a number of samples.
    """

    count: int
    user_prompts: PromptLengths
    batches: EpochBatches | None = None

    @classmethod
    def of_shards(cls, directory: Path, manifest: Manifest, config: RunConfig) -> "SampleStats":
        """Summarize the samples of finished shards, and the batches that a run makes of them."""
        index_S = open_index(directory, manifest)
        tokens_S, batches = index_S["tokens"], None
        if config.train.tokens_per_batch:
            user_slots = sum(slots_reserved(config, source_shapes(config))["user"].values())
            plan = BatchPlan(index_S["shard"], tokens_S, config.run.seed, config.train, user_slots)
            epoch = (tokens_S[numbers] for numbers in plan.batches(0))
            batches = EpochBatches.from_lengths(epoch, config.llm.packing)
        return cls(len(tokens_S), PromptLengths.of(tokens_S), batches)


def prompt_length_bounds(config: RunConfig, slots: Mapping[str, int], context_length: int) -> dict[str, PromptLengths]:
    """Return upper bounds of both sides' prompt lengths: full histories, titles and texts at their longest.

    A word or sign of the template counts as one token; a prompt is cut to `prompt.max_tokens` or the context length,
    slots included.

    Args:
        config: configuration of the run.
        slots: number of slots reserved on each side.
        context_length: context length of the language model, in tokens.
    """
    prompt = config.prompt
    limit = min(prompt.max_tokens or context_length, context_length)
    title = _tokens(prompt.title, title=prompt.max_title_tokens) + _tokens(prompt.separator)
    bounds = {
        "user": _tokens(prompt.user, history=prompt.max_history * title),
        "item": _tokens(prompt.item, title=prompt.max_text_tokens, text=prompt.max_text_tokens),
    }
    longest = {side: max(1, min(SPECIAL_TOKENS + bounds[side], limit - slots[side])) for side in SIDES}
    return {side: PromptLengths(longest[side], longest[side]) for side in SIDES}


def _tokens(template: str, **fields: int) -> int:
    """Return the words and signs of a template, and the tokens of the longest field that it names."""
    words = re.findall(r"\w+|[^\w\s]", re.sub(r"\{[^{}]*\}", " ", template))
    return len(words) + max((tokens for name, tokens in fields.items() if f"{{{name}}}" in template), default=0)


def source_shapes(config: RunConfig) -> dict[str, SourceShape]:
    """Return the dimension and vectors per user of every source, from its recipe or the headers of its files.

    Raises:
        UserError: a file is missing, unreadable, or of the wrong shape.
    """
    return {name: _source_shape(section) for name, section in config.sources_by_name.items()}


def _source_shape(section: Ids | Graph | Import) -> SourceShape:
    chosen = section.chosen if isinstance(section, Ids) else section
    if isinstance(chosen, Graph):
        return SourceShape(chosen.dim, 1)
    if isinstance(chosen, Recipe):
        return SourceShape(chosen.dim, chosen.per_user)
    users = vectors_shape(chosen.users, "users") if chosen.users is not None else ()
    return SourceShape(vectors_shape(chosen.items, "items")[-1], users[1] if len(users) == 3 else 1)
