"""Describe what is planned: the GPUs and the engine, and a training's inputs: prompts, samples, batches, vectors.

Shape letters: S samples, b samples of one batch.
"""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt
from pydantic import ByteSize, TypeAdapter

from rarec.config import RunConfig
from rarec.config.ids import Ids, Import, Recipe
from rarec.data.shards.batch_plan import plan_batches
from rarec.data.shards.files import open_index
from rarec.distributed.hardware import DEVICES, Device, known_device
from rarec.errors import UserError
from rarec.ids.imports import vectors_shape
from rarec.models.build import SIDES, SourceShape, slots_reserved
from rarec.storage.artefacts import Manifest

EngineName = Literal["0", "1", "2", "3", "fsdp2"]
"""An engine as `--zero` names it: "0" is DDP (or one process), "1" to "3" are DeepSpeed's ZeRO stages."""
ENGINES: tuple[EngineName, ...] = get_args(EngineName)
REPLICATED: tuple[EngineName, ...] = ("0", "1", "2")
"""Engines that keep the whole language model on every GPU."""
RESERVED_BYTES, FRAGMENTATION = 2e9, 0.05
"""Not available on each GPU: bytes for CUDA, NCCL and cuBLAS; the share that the allocator loses (own estimates)."""
MEGABYTE = 10**6
_SIZE = re.compile(r"\s*\d+(\.\d+)?\s*[kmgt]i?b\s*", re.IGNORECASE)


@dataclass(frozen=True)
class Cluster:
    """GPUs of one kind, in one or more machines.

    Attributes:
        gpus: number of GPUs in each machine.
        machines: number of machines.
        memory: memory of a GPU, in bytes.
        device: kind of GPU.
    """

    gpus: int
    machines: int
    memory: int
    device: Device

    @classmethod
    def of(cls, gpus: int, machines: int, memory: str | None, device: str) -> "Cluster":
        """Build a cluster from the options of `rarec plan`.

        Args:
            gpus: number of GPUs in each machine.
            machines: number of machines.
            memory: memory of a GPU with its unit, such as `80GB`; None for the memory that the device is sold with.
            device: name of the GPU, such as `H100`.

        Raises:
            UserError: the unit or the device is unknown.
        """
        known = known_device(device)
        if known is None:
            names = ", ".join(sorted(each.name for each in DEVICES))
            raise UserError(f"--device {device}: its peak FLOP/s are not listed", f"give one of {names}")
        return cls(gpus, machines, _parse_bytes(memory) if memory else round(known.memory_gb * 1e9), known)

    @property
    def world_size(self) -> int:
        """The number of processes: one for each GPU."""
        return self.gpus * self.machines

    @property
    def usable(self) -> int:
        """The bytes of a GPU that are available for training."""
        return round(self.memory * (1 - FRAGMENTATION) - RESERVED_BYTES)


@dataclass(frozen=True)
class TrainingSetup:
    """The cluster, and the settings that may be changed to make a training fit.

    Attributes:
        cluster: GPUs to train on.
        engine: engine to train with.
        accumulate: `train.accumulate`.
        checkpointing: `llm.gradient_checkpointing`.
        eval_batch: `evaluate.batch_size`, the number of prompts encoded at a time in validation and evaluation.
    """

    cluster: Cluster
    engine: EngineName
    accumulate: int
    checkpointing: bool
    eval_batch: int

    def changes(self, other: "TrainingSetup") -> list[str]:
        """Return the overrides and options that turn this setup into the other."""
        pairs = {
            "evaluate.batch_size={}": (self.eval_batch, other.eval_batch),
            "train.accumulate={}": (self.accumulate, other.accumulate),
            "llm.gradient_checkpointing={}": tuple(str(each.checkpointing).lower() for each in (self, other)),
            "--zero {}": (self.engine, other.engine),
            "--gpus {}": (self.cluster.gpus, other.cluster.gpus),
            "--machines {}": (self.cluster.machines, other.cluster.machines),
        }
        return [words.format(new) for words, (old, new) in pairs.items() if old != new]


def parse_engine(name: str) -> EngineName:
    """Return the engine that `--zero` names, in any case.

    Raises:
        UserError: no engine has this name.
    """
    for engine in ENGINES:
        if name.casefold() == engine:
            return engine
    raise UserError(f"--zero {name}: unknown engine", f"give one of {', '.join(ENGINES)}")


def _parse_bytes(text: str) -> int:
    """Return the bytes of a size such as `80GB` or `79.1 GiB`; less than a megabyte lacks its unit."""
    size = int(TypeAdapter(ByteSize).validate_python(text)) if _SIZE.fullmatch(text) else 0
    if size < MEGABYTE:
        raise UserError(f"--memory {text}: not a memory size", "give a number and its unit (MB, GB, GiB), as in 80GB")
    return size


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
        tokens_S = index_S["tokens"]
        batches = None
        if config.train.tokens_per_batch:
            user_slots = sum(slots_reserved(config, source_shapes(config))["user"].values())
            epoch = (tokens_S[numbers] for numbers in plan_batches(index_S, config, user_slots).batches(0))
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


def _source_shape(section: Ids | Import) -> SourceShape:
    chosen = section.chosen if isinstance(section, Ids) else section
    if isinstance(chosen, Recipe):
        return SourceShape(chosen.dim, chosen.per_user)
    users = vectors_shape(chosen.users, "users") if chosen.users is not None else ()
    return SourceShape(vectors_shape(chosen.items, "items")[-1], users[1] if len(users) == 3 else 1)
