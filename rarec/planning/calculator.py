"""Estimate memory, traffic and time of one rank, for any setup of a run; changes are tried with the same calculator."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, TypeVar

from rarec.config import RunConfig
from rarec.errors import UserError
from rarec.models.build import SIDES, slots_reserved, stored_blocks
from rarec.planning import costs
from rarec.planning.activations import Activations, StepShape, encoding_peak, step_activations
from rarec.planning.costs import SHIPPED_ZERO, RankMemory, Traffic, ZeroSettings
from rarec.planning.meta_model import MetaModel, MetaModelBuilder
from rarec.planning.setup import (
    REPLICATED,
    Cluster,
    EngineName,
    EpochBatches,
    PromptLengths,
    SampleStats,
    TrainingSetup,
    prompt_length_bounds,
)

T = TypeVar("T")


@dataclass
class Calculator:
    """Estimate what a run needs.

    Attributes:
        config: configuration of the run.
        builder: builder of its models.
        samples: samples of its shards; None where there are none yet.
        zero: DeepSpeed's settings.
    """

    config: RunConfig
    builder: MetaModelBuilder
    samples: SampleStats | None = None
    zero: ZeroSettings = SHIPPED_ZERO
    _cache: dict[Any, Any] = field(default_factory=dict, init=False)

    @cached_property
    def prompts(self) -> dict[str, PromptLengths]:
        """The prompt lengths of each side: of users from the shards where there are any, otherwise upper bounds."""
        reserved = slots_reserved(self.config, self.builder.sources)
        slots = {side: sum(reserved[side][name] for name in self.builder.slot_sources[side]) for side in SIDES}
        bounds = prompt_length_bounds(self.config, slots, self.builder.context_length)
        return bounds | ({"user": self.samples.user_prompts} if self.samples else {})

    @cached_property
    def batches(self) -> EpochBatches:
        """The batches of an epoch; under a token budget without shards, as many of the longest prompts as it holds."""
        if self.samples and self.samples.batches:
            return self.samples.batches
        train, prompts = self.config.train, self.prompts["user"]
        slots = sum(slots_reserved(self.config, self.builder.sources)["user"].values())
        budget = train.tokens_per_batch
        size = max(2, budget // (prompts.longest + slots)) if budget else train.batch_size
        count = -(-self.samples.count // size) if self.samples else None
        return EpochBatches(count, size, size, ((size, prompts.in_batch(self.config.llm.packing)),))

    def setup(self, cluster: Cluster, engine: EngineName) -> TrainingSetup:
        """Return the setup of the configuration on a cluster.

        Raises:
            UserError: it is impossible; see `refusal`.
        """
        train, llm = self.config.train, self.config.llm
        eval_batch = self.config.evaluate.batch_size
        chosen = TrainingSetup(cluster, engine, train.accumulate, llm.gradient_checkpointing, eval_batch)
        if error := self.refusal(chosen):
            raise error
        return chosen

    def refusal(self, setup: TrainingSetup) -> UserError | None:
        """Return why a setup is impossible: a rank has no sample, or the engine cannot shard 4-bit weights."""
        pieces = setup.cluster.world_size * setup.accumulate
        smallest = self.batches.smallest
        if pieces > smallest:
            problem = f"a batch of {smallest} samples cannot be split into {pieces} (GPUs x train.accumulate)"
            return UserError(problem, "raise train.batch_size, or plan with fewer --gpus")
        if self.config.llm.quantize != "none" and setup.engine not in REPLICATED:
            problem = f"llm.quantize: --zero {setup.engine} cannot shard 4-bit weights"
            return UserError(problem, "plan with --zero 2")
        return None

    def fits(self, variant: str, setup: TrainingSetup) -> bool:
        """Return whether a setup is possible and a GPU has the memory; a step is traced where weights alone fit."""
        usable = setup.cluster.usable
        if self.refusal(setup) or self._without_activations(variant, setup).static > usable:
            return False
        return self.memory(variant, setup).peak <= usable

    def memory(self, variant: str, setup: TrainingSetup) -> RankMemory:
        """Return the memory of a rank."""
        model = self.meta_model(variant, setup.checkpointing)
        longest = self._step_shapes(variant, setup)[-1]
        key = ("encoding", variant, setup.eval_batch)
        encoding = self._cached(key, lambda: encoding_peak(model, longest, setup.eval_batch))
        training = self.activations(variant, setup).peak
        return replace(self._without_activations(variant, setup), activations=training, encoding=encoding)

    def _without_activations(self, variant: str, setup: TrainingSetup) -> RankMemory:
        model = self.meta_model(variant, setup.checkpointing)
        return costs.rank_memory(model, setup.engine, setup.cluster.world_size, self.zero)

    def activations(self, variant: str, setup: TrainingSetup) -> Activations:
        """Trace a step with the batch that needs the most memory."""
        return self._trace(variant, setup, self.step_shape(variant, setup))

    def _trace(self, variant: str, setup: TrainingSetup, shape: StepShape) -> Activations:
        model = self.meta_model(variant, setup.checkpointing)
        key = ("step", variant, setup.checkpointing, shape.rows, shape.total, shape.world_size, shape.text["user"])
        return self._cached(key, lambda: step_activations(model, self.config.loss, shape))

    def traffic(self, variant: str, setup: TrainingSetup) -> Traffic:
        """Return the bytes that a rank sends in a step."""
        model = self.meta_model(variant, setup.checkpointing)
        step = self.activations(variant, setup)
        return costs.step_traffic(model, setup.engine, setup.cluster.world_size, setup.accumulate, step)

    def step_tokens(self, variant: str, setup: TrainingSetup) -> float:
        """Return the tokens of a rank in a step on average: text, slots and padding of both sides."""
        tokens = sum(self.prompts[side].mean + slots for side, slots in self.slots(variant).items())
        return tokens * self.batches.mean_size / setup.cluster.world_size

    def step_seconds(self, variant: str, setup: TrainingSetup) -> float | None:
        """Return the duration of a step; None unless the weights are in bfloat16, whose peak is listed."""
        if self.config.llm.dtype != "bfloat16":
            return None
        model = self.meta_model(variant, setup.checkpointing)
        traffic = self.traffic(variant, setup)
        return costs.step_seconds(model, traffic, setup.cluster, self.step_tokens(variant, setup))

    def hours(self, variant: str, setup: TrainingSetup) -> float | None:
        """Return the duration of a training; None where the duration or the number of steps is unknown."""
        seconds = self.step_seconds(variant, setup)
        steps = self.steps(variant)
        return 0 if steps == 0 else None if seconds is None or steps is None else steps * seconds / 3600

    def steps(self, variant: str) -> int | None:
        """Return the number of steps of a variant's training; None where the number of samples is unknown."""
        names = [weight.name for weight in self.meta_model(variant, self.config.llm.gradient_checkpointing).trainable]
        if self.batches.count is None:
            return None if self.config.train.steps(1, names) else 0
        return self.config.train.steps(self.batches.count * self.config.train.epochs, names)

    def meta_model(self, variant: str, checkpointing: bool) -> MetaModel:
        """Return a variant's model on the meta device."""
        key = ("variant", variant, checkpointing)
        return self._cached(key, lambda: self.builder.build(self.config.variant(variant), checkpointing))

    def slots(self, variant: str) -> dict[str, int]:
        """Return the number of slots in a prompt of each side."""
        model = self.meta_model(variant, self.config.llm.gradient_checkpointing).model
        return {"user": sum(model.user.slots.values()), "item": sum(model.item.slots.values())}

    def step_shape(self, variant: str, setup: TrainingSetup) -> StepShape:
        """Return the sizes of a rank's micro-batch, of the batch that needs the most memory."""
        shapes = self._step_shapes(variant, setup)
        if len(shapes) == 1:
            return shapes[0]
        return max(shapes, key=lambda shape: self._trace(variant, setup, shape).peak)

    def _step_shapes(self, variant: str, setup: TrainingSetup) -> list[StepShape]:
        """Return the sizes of micro-batches that may need the most memory, the one with the longest prompts last."""
        count = len(self.meta_model(variant, setup.checkpointing).model.backbone.blocks)
        blocks = tuple(stored_blocks(self.config, count))
        vectors = {name: (shape.vectors_per_user, shape.dim) for name, shape in self.builder.sources.items()}
        world_size = setup.cluster.world_size
        item = self.prompts["item"].in_batch(self.config.llm.packing)
        shapes = []
        for size, longest in self.batches.largest:
            total = -(-size // setup.accumulate)
            text = {"user": longest, "item": item}
            shapes.append(StepShape(-(-total // world_size), total, world_size, text, blocks, vectors))
        return shapes

    def _cached(self, key: Any, make: Callable[[], T]) -> T:
        if key not in self._cache:
            self._cache[key] = make()
        made: T = self._cache[key]
        return made
