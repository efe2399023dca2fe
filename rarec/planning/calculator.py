"""What a setting of a run takes on a rank: memory, traffic, time. Changes are tried by the same calculator."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

from rarec.config import VARIANTS, RunConfig
from rarec.errors import UserError
from rarec.models.build import SIDES, slots_reserved
from rarec.planning.blueprint import Blueprint
from rarec.planning.lengths import Prompts, estimated
from rarec.planning.memory import REPLICATED, SHIPPED, Account, Peaks, Stage, ZeroSettings, account
from rarec.planning.samples import Batches, Samples
from rarec.planning.setting import Cluster, Setting
from rarec.planning.shapes import VariantShapes
from rarec.planning.step import Activations, StepShape, encoding_activations, step_activations
from rarec.planning.traffic import Speed, Traffic, speed, traffic

T = TypeVar("T")


@dataclass(frozen=True)
class Estimate:
    """Of one variant in one setting.

    Attributes:
        account: bytes of a rank.
        step: bytes of a step's activations.
        traffic: bytes of a step.
        speed: None where the device's peak is not known for `llm.dtype`.
        hours: of the variant's training; None where it takes no step, or where speed or samples are not known.
    """

    account: Account
    step: Activations
    traffic: Traffic
    speed: Speed | None
    hours: float | None


class Calculator:
    """Estimates for one run.

    Args:
        config: of the run.
        blueprint: makes its models.
        samples: that are selected; None where that is not known yet.
        zero: DeepSpeed's settings.
    """

    def __init__(
        self, config: RunConfig, blueprint: Blueprint, samples: Samples | None = None, zero: ZeroSettings = SHIPPED
    ) -> None:
        self.config, self.blueprint, self.samples, self.zero = config, blueprint, samples, zero
        self._made: dict[Any, Any] = {}

    @cached_property
    def prompts(self) -> dict[str, Prompts]:
        """Text lengths of each side: those of users as they are, if samples are there."""
        reserved = slots_reserved(self.config, self.blueprint.sources)
        slots = {side: sum(reserved[side][name] for name in self.blueprint.named[side]) for side in SIDES}
        bounds = estimated(self.config, slots, self.blueprint.context_length)
        return bounds | ({"user": self.samples.users} if self.samples else {})

    @cached_property
    def batches(self) -> Batches:
        """Of an epoch. Under a token budget without samples: each of as many of the longest prompts as it holds."""
        if self.samples and self.samples.batches:
            return self.samples.batches
        train, longest = self.config.train, self.prompts["user"].longest
        slots = sum(slots_reserved(self.config, self.blueprint.sources)["user"].values())
        budget = train.tokens_per_batch
        size = max(2, budget // (longest + slots)) if budget else train.batch_size
        count = -(-self.samples.count // size) if self.samples else None
        return Batches(count, size, size, ((size, longest),))

    def setting(self, cluster: Cluster, stage: Stage) -> Setting:
        """As the configuration has it.

        Raises:
            UserError: some rank would have nothing to do, or the engine cannot shard weights in 4 bits.
        """
        train, llm = self.config.train, self.config.llm
        encoding = self.config.evaluate.batch_size
        chosen = Setting(cluster, stage, train.accumulate, llm.gradient_checkpointing, encoding)
        if self.possible(chosen):
            return chosen
        parts = cluster.ranks * train.accumulate
        least = self.batches.smallest
        if parts > least:
            problem = f"a step of {least} samples cannot be cut into {parts}, one for each rank and part"
            raise UserError(problem, "raise train.batch_size, or plan with fewer --gpus")
        raise UserError(f"llm.quantize: weights in 4 bits cannot be sharded (--zero {stage})", "plan with --zero 2")

    def possible(self, setting: Setting) -> bool:
        """Whether every rank has a sample in every part, and the engine can take the weights."""
        quantised = self.config.llm.quantize != "none" and setting.stage not in REPLICATED
        return setting.cluster.ranks * setting.accumulate <= self.batches.smallest and not quantised

    def fits(self, variant: str, setting: Setting) -> bool:
        """Whether a rank has room for it. A step is traced only where what stays leaves any."""
        nothing = Peaks(0, 0, setting.checkpointing)
        usable = setting.cluster.usable
        return (
            self._account(variant, setting, nothing).stays <= usable and self.account(variant, setting).total <= usable
        )

    def account(self, variant: str, setting: Setting) -> Account:
        """Bytes of a rank."""
        shapes, longest = self.variant(variant, setting.checkpointing), self._shapes(variant, setting)[-1]
        encoding = self._once(
            ("encoding", variant, setting.encoding), lambda: encoding_activations(shapes, longest, setting.encoding)
        )
        return self._account(variant, setting, Peaks(self.step(variant, setting).peak, encoding, setting.checkpointing))

    def step(self, variant: str, setting: Setting) -> Activations:
        """A traced step, of the batch that takes most."""
        return self._traced(variant, setting, self.shape(variant, setting))

    def _traced(self, variant: str, setting: Setting, shape: StepShape) -> Activations:
        shapes = self.variant(variant, setting.checkpointing)
        key = ("step", variant, setting.checkpointing, shape.rows, shape.total, shape.ranks, shape.text["user"])
        return self._once(key, lambda: step_activations(shapes, self.config.loss, shape))

    def estimate(self, variant: str, setting: Setting) -> Estimate:
        """All of it."""
        shapes, step, cluster = (
            self.variant(variant, setting.checkpointing),
            self.step(variant, setting),
            setting.cluster,
        )
        recomputes = setting.checkpointing
        sent = traffic(shapes, setting.stage, cluster.ranks, setting.accumulate, step, recomputes)
        samples = self.batches.samples
        tokens = self._tokens(variant) * samples / cluster.ranks
        known, steps = self.config.llm.dtype == "bfloat16", self.steps(variant)
        fast = (
            speed(
                shapes,
                sent,
                cluster.device,
                tokens=tokens,
                samples=samples,
                recomputes=recomputes,
                machines=cluster.machines,
            )
            if known
            else None
        )
        hours = steps * fast.seconds / 3600 if fast and steps else None
        return Estimate(self.account(variant, setting), step, sent, fast, hours)

    def steps(self, variant: str) -> int | None:
        """How many steps a variant takes; None where samples are not known."""
        trained = [weight.name for weight in self.variant(variant, self.config.llm.gradient_checkpointing).trained]
        if self.batches.count is None:
            return None if self.config.train.steps(1, trained) else 0
        return self.config.train.steps(self.batches.count * self.config.train.epochs, trained)

    def variant(self, variant: str, checkpointing: bool) -> VariantShapes:
        """A variant's model."""
        return self._once(
            ("variant", variant, checkpointing), lambda: self.blueprint.variant(VARIANTS[variant], checkpointing)
        )

    def slots(self, variant: str) -> dict[str, int]:
        """How many there are in a prompt of each side."""
        model = self.variant(variant, self.config.llm.gradient_checkpointing).model
        return {"user": sum(model.user.slots.values()), "item": sum(model.item.slots.values())}

    def shape(self, variant: str, setting: Setting) -> StepShape:
        """Of a part of a step on one rank, of the batch that takes most."""
        tried = self._shapes(variant, setting)
        return tried[0] if len(tried) == 1 else max(tried, key=lambda shape: self._traced(variant, setting, shape).peak)

    def _shapes(self, variant: str, setting: Setting) -> list[StepShape]:
        """Of those that may, the longest prompts last."""
        count = len(self.variant(variant, setting.checkpointing).model.backbone.blocks)
        blocks = tuple(sorted(set(self.config.shards.state_blocks or range(count))))
        if blocks[-1] >= count:
            raise UserError(f"shards.state_blocks: the model has blocks 0 to {count - 1}, not {blocks[-1]}")
        vectors = {name: (shape.vectors_per_user, shape.dim) for name, shape in self.blueprint.sources.items()}
        ranks, item = setting.cluster.ranks, self.prompts["item"].longest
        found = []
        for size, longest in self.batches.largest:
            total, text = -(-size // setting.accumulate), {"user": longest, "item": item}
            found.append(StepShape(-(-total // ranks), total, ranks, text, blocks, vectors))
        return found

    def _account(self, variant: str, setting: Setting, peaks: Peaks) -> Account:
        shapes = self.variant(variant, setting.checkpointing)
        return account(shapes, setting.stage, setting.cluster.ranks, peaks, self.zero)

    def _tokens(self, variant: str) -> float:
        """Of a sample, both sides."""
        return sum(self.prompts[side].mean + slots for side, slots in self.slots(variant).items())

    def _once(self, key: Any, make: Callable[[], T]) -> T:
        """Made at the first time it is asked for."""
        if key not in self._made:
            self._made[key] = make()
        made: T = self._made[key]
        return made
