"""DeepSpeed: ZeRO-1 and 2 shard the optimizer of the trainable parameters, ZeRO-3 also the frozen weights.

DeepSpeed's mixed precision stays off: frozen weights have the dtype `llm.dtype`, and trainable ones are float32 with
every engine, so that engines give the same results. DeepSpeed reads `DS_ACCELERATOR` when it is imported.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import deepspeed
import torch
from deepspeed import utils
from torch import Tensor, nn
from transformers.integrations.deepspeed import HfDeepSpeedConfig, unset_hf_deepspeed_config

from rarec.config.method import Llm
from rarec.config.schema import Train
from rarec.distributed.world import World
from rarec.errors import UserError
from rarec.models.build import trained_parameters
from rarec.models.towers import RaRec
from rarec.training.engines import MOMENTS, Engine, Optimisation, TrainableModule, build_optimizer, set_rate


class ZeroEngine(Engine):
    """DeepSpeed ZeRO.

    Args:
        world: all ranks.
        config: DeepSpeed's configuration, from the launcher's file.
    """

    def __init__(self, world: World, config: Mapping[str, Any]) -> None:
        super().__init__(world)
        self.config = dict(config)
        self.stage = int(config["zero_optimization"]["stage"])
        self.name = f"ZeRO-{self.stage}"

    @contextmanager
    def loading(self, llm: Llm) -> Iterator[None]:
        """See `Engine`. With stage 3 only rank 0 reads the file, and each rank keeps its shard."""
        if self.stage != 3:
            yield
            return
        self.refuse_quantised(llm)
        if llm.compile:  # weights come and go within a block
            problem = f"llm.compile does not work with {self.name}"
            raise UserError(problem, "set llm.compile: false, or use configs/accelerate/fsdp2.yaml", shared=True)
        config = {**self._filled(), "bf16": {"enabled": llm.dtype == "bfloat16"}}
        known = HfDeepSpeedConfig(config)  # transformers uses it as long as it is referenced
        try:
            yield
        finally:
            del known
            unset_hf_deepspeed_config()

    @contextmanager
    def serving(self, model: nn.Module) -> Iterator[None]:
        """See `Engine`."""
        self.place(model)
        if self.stage != 3:
            yield
            return
        engine, *_ = deepspeed.initialize(model=model, config=self._filled())
        try:
            yield
        finally:
            engine.destroy()

    def train(self, model: RaRec, config: Train) -> "ZeroOptimisation":
        """See `Engine`."""
        parts = config.accumulate
        micro = max(1, config.batch_size // (self.world.size * parts))
        parameters = trained_parameters(model)
        self.place(model)
        engine, *_ = deepspeed.initialize(
            model=model if self.stage == 3 else TrainableModule(model),
            optimizer=build_optimizer(parameters, config),
            config=self._filled(micro, config.clip, parts),
        )
        self._check(engine, model)
        return ZeroOptimisation(model, engine, config, self.world, engine.optimizer)

    def place(self, model: nn.Module) -> None:
        """Move a model to the device; with stage 3 its buffers alone, which DeepSpeed leaves where they are."""
        if self.stage != 3:
            super().place(model)
            return
        for module in model.modules():
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, buffer.to(self.world.device))

    def _filled(self, micro: int = 1, clip: float = 1.0, parts: int = 1) -> dict[str, Any]:
        """Return DeepSpeed's configuration, completed by the run's."""
        own = {"train_micro_batch_size_per_gpu": micro, "gradient_clipping": clip, "gradient_accumulation_steps": parts}
        return {**self.config, **own, "steps_per_print": 2**62, "zero_allow_untested_optimizer": True}

    def _check(self, engine: Any, model: RaRec) -> None:
        if engine.zero_optimization_stage() != self.stage or engine.dp_world_size != self.world.size:
            built = f"ZeRO-{engine.zero_optimization_stage()} over {engine.dp_world_size} ranks"
            raise UserError(f"DeepSpeed built {built}, not {self.name} over {self.world.size}")
        whole = [name for name, p in model.backbone.named_parameters() if not hasattr(p, "ds_id")]
        if self.stage == 3 and whole:
            raise UserError(f"ZeRO-3 did not shard {len(whole)} frozen tensors, {whole[0]} first")


class ZeroOptimisation(Optimisation):
    """A model under a DeepSpeed engine, with DeepSpeed's optimizer."""

    @contextmanager
    def part(self, last: bool) -> Iterator[None]:
        """See `Optimisation`."""
        yield
        if not last:
            self.wrapped.step()  # counts the part; `update` takes the step after the last one

    def backward(self, loss: Tensor) -> None:
        """See `Optimisation`."""
        self.wrapped.backward(loss * self.world.size, scale_wrt_gas=False)  # losses add up, gradients are averaged

    def gradients(self) -> Iterator[tuple[str, Tensor]]:
        """See `Optimisation`."""
        every = ((name, utils.safe_get_full_grad(p)) for name, p in self.parameters.items())
        return ((name, gradient) for name, gradient in every if gradient is not None)

    def update(self, rate: float) -> None:
        """See `Optimisation`."""
        set_rate(self.optimizer, rate)
        self.wrapped.step()

    def weights(self) -> dict[str, Tensor]:
        """See `Optimisation`."""
        return {name: utils.safe_get_full_fp32_param(p) for name, p in self.parameters.items()}

    def moments(self) -> dict[str, Tensor]:
        """See `Optimisation`."""
        if not self._states:
            return {}
        self._link()
        named = ((name, p, kind) for name, p in self.parameters.items() for kind in MOMENTS)
        return {f"{name}/{kind}": utils.safe_get_full_optimizer_state(p, kind) for name, p, kind in named}

    def resume(self, moments: Mapping[str, Tensor], step: int) -> None:
        """See `Optimisation`."""
        for flat in self._flat:
            zeros = {kind: torch.zeros_like(flat) for kind in MOMENTS}
            self._states[flat] = {"step": torch.tensor(float(step), device=flat.device), **zeros}
        self._link()
        for name, parameter in self.parameters.items():
            for kind in MOMENTS:
                self._set(parameter, moments[f"{name}/{kind}"].to(self.world.device), kind)

    def end(self) -> None:
        """See `Optimisation`."""
        self.wrapped.destroy()

    @property
    def _shards_parameters(self) -> bool:
        return bool(self.wrapped.zero_optimization_stage() == 3)

    @property
    def _states(self) -> dict[Tensor, Any]:
        """The states of the optimizer that DeepSpeed runs on its flat shards."""
        states: dict[Tensor, Any] = self.optimizer.optimizer.state
        return states

    @property
    def _flat(self) -> list[Tensor]:
        """The flat shards."""
        name = "fp32_partitioned_groups_flat" if self._shards_parameters else "single_partition_of_fp32_groups"
        flat: list[Tensor] = getattr(self.optimizer, name)
        return flat

    def _link(self) -> None:
        """Link parameters to their moments: DeepSpeed does so only after the first step, for the first group alone."""
        if not self._shards_parameters:
            for group, flat in zip(self.optimizer.bit16_groups, self._flat, strict=True):
                utils.lazy_init_hp_params_optimizer_state(group, flat, self._states)

    def _set(self, parameter: nn.Parameter, moment: Tensor, kind: str) -> None:
        if not self._shards_parameters:
            utils.safe_set_full_optimizer_state(parameter, moment, kind)
            return
        size = parameter.ds_tensor.numel()  # type: ignore[attr-defined]  # the last shards are padded, which DeepSpeed's own setter ignores
        filled = torch.cat([moment.flatten(), moment.new_zeros(size * self.world.size - moment.numel())])
        utils.safe_set_local_optimizer_state(parameter, filled[self.world.rank * size :][:size], kind)
