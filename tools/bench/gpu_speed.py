"""Measure training steps of large decoders on one device: tokens/s, MFU, memory, beside plain PEFT and `rarec plan`.

    python -m tools.bench.gpu_speed [--device cuda] [--out FILE]

Shapes of Llama 3.2 1B and Llama 3.1 8B, in bfloat16, with random weights that are made on the device; LoRA of rank 16
on queries and values, slots in every block. A step is the training loop's: both towers, all losses, clipping, AdamW.
Users have 512 or 2,048 tokens, items 64; nothing is padding. Last, the blocks of the largest model are compiled.

plain PEFT: the same model with the same LoRA and attention, the same tokens: forward, a loss over the states, backward.
MFU:        tokens/s times 4N, over the device's peak; N are the frozen weights in blocks: forward 2N, gradients of the
            inputs 2N. The attention's own products are not counted. Published figures count the embeddings and the
            output layer as well, which is no work here: `as published` does so, to be set beside them.
planned:    the peak of `rarec plan` for these lengths, beside what PyTorch's allocator has held.

FILE is written after each shape: what follows may run out of memory or time.
"""

import gc
import json
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from rarec.config import VARIANTS, RunConfig
from rarec.distributed.hardware import known_device, peak_memory
from rarec.distributed.world import World
from rarec.models.backbone import FrozenBackbone
from rarec.models.build import SIDES, SourceShape, build_model, trained_parameters
from rarec.models.language_model import LoadedModel, compile_blocks, with_lora
from rarec.models.losses import LossTargets, Objective
from rarec.models.towers import RaRec, SideBatch, on_device
from rarec.planning.calculator import Calculator
from rarec.planning.meta_model import MetaModelBuilder
from rarec.planning.setup import Cluster, PromptLengths
from rarec.training.engines import Engine
from tools.bench.measuring import Figure, at_least, in_turns, model_tree, options, print_table
from tools.bench.small_runs import llama

VARIANT, SOURCES, DIM = VARIANTS["per_layer_lora"], {"id": SourceShape(64, 1)}, 64
ITEM_TOKENS, ROUNDS = 64, 5
GOAL = 45.0
"""Percent of MFU at 8B. The best published figure for LoRA on one H100 is 42.8% (torchtune's and others' reports)."""


@dataclass(frozen=True)
class Shape:
    """A model and its batches: (tokens of a user, samples of a step)."""

    name: str
    llama: dict[str, Any]
    batches: tuple[tuple[int, int], ...]
    compile: bool = False


LARGE = (
    Shape("1B", llama(2048, 8192, 16), ((512, 16), (2048, 4))),
    Shape("8B", llama(4096, 14336, 32), ((512, 8), (2048, 2)), compile=True),
)
TINY = (Shape("tiny", llama(64, 128, 2, (4, 2), vocab_size=500), ((96, 4),), compile=True),)


def main() -> None:
    """Measure every shape; print the table, and write it if a file is named."""
    arguments = options(__doc__, device="cuda", out=Path)
    device = torch.device(arguments.device)
    figures: list[Figure] = []
    for shape in LARGE if device.type == "cuda" else TINY:
        with tempfile.TemporaryDirectory() as scratch:
            for of_batch in Measurement(shape, device, Path(scratch)).figures():
                figures += of_batch
                if arguments.out is not None:
                    arguments.out.write_text(json.dumps([asdict(figure) for figure in figures]))
        gc.collect()  # a model is part of cycles, and would count as memory of the next
        if device.type == "cuda":
            torch.cuda.empty_cache()
    print_table(figures)


class Measurement:
    """One shape on one device."""

    def __init__(self, shape: Shape, device: torch.device, scratch: Path) -> None:
        self.shape, self.device, self.scratch = shape, device, scratch
        config = LlamaConfig(**shape.llama, dtype="bfloat16", architectures=["LlamaForCausalLM"])
        config.save_pretrained(scratch)
        llm, train = {"path": str(scratch), "dtype": "bfloat16"}, {"variants": [VARIANT.name]}
        self.config = RunConfig.model_validate(model_tree(llm=llm, lora={"rank": 16, "alpha": 32}, train=train))
        with device:
            model = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16)
        model.lm_head = None  # no logits are computed
        model = with_lora(model.eval(), self.config.lora, 0).to(device)
        self.backbone = FrozenBackbone(model, "mean", sink=True).eval()
        self.weights = sum(p.numel() for n, p in self.backbone.blocks.named_parameters() if "lora_" not in n)
        self.published = self.weights + 2 * config.vocab_size * config.hidden_size

    def figures(self) -> Iterator[list[Figure]]:
        """Yield the figures of every batch shape, and of compiled blocks, which change the model."""
        for tokens, samples in self.shape.batches:
            yield self._of(tokens, samples)
        if self.shape.compile:
            compile_blocks(self.backbone)
            yield self._of(*self.shape.batches[0], name=", compiled")

    def _of(self, tokens: int, samples: int, name: str = "") -> list[Figure]:
        name = f"{self.shape.name}, {samples} x {tokens} tokens{name}"
        steps = {"rarec": self._rarec(tokens, samples), "plain": self._plain(tokens, samples)}
        spent = in_turns(ROUNDS, {way: partial(self._whole, step) for way, step in steps.items()})
        rates = {way: samples * (tokens + ITEM_TOKENS) / float(np.median(times)) for way, times in spent.items()}
        figures = [
            Figure(f"{name}: tokens/s", f"{rates['rarec']:,.0f}"),
            Figure(f"{name}: rarec / plain PEFT", f"{rates['rarec'] / rates['plain']:.2f}"),
        ]
        known = known_device(torch.cuda.get_device_name()) if self.device.type == "cuda" else None
        if known is not None:
            percent = 100 * rates["rarec"] * 4 / known.tflops / 1e12
            mfu, what = percent * self.weights, f"{name}: MFU"
            figures.append(at_least(what, mfu, GOAL, "%") if self.shape.name == "8B" else Figure(what, f"{mfu:.1f}%"))
            figures.append(Figure(f"{what}, as published", f"{percent * self.published:.1f}%"))
        planned, peak = self._planned(tokens, samples), self._peak(steps["rarec"])
        off = planned / peak - 1
        memory = f"{peak / 1e9:,.2f} GB, planned {planned / 1e9:,.2f} ({off:+.0%})"
        if self.device.type == "cpu":  # it holds Python and its libraries as well
            return [*figures, Figure(f"{name}: peak memory", memory)]
        return [*figures, Figure(f"{name}: peak memory", memory, "within 15%", abs(off) <= 0.15)]

    def _rarec(self, tokens: int, samples: int) -> Callable[[], None]:
        """Return a step of the training loop."""
        loaded = LoadedModel(self.backbone, None, tokens + 8, {"kind": "decoder"})  # type: ignore[arg-type] # no text
        model: RaRec = build_model(self.config, VARIANT, loaded, SOURCES, dict.fromkeys(SIDES, ("id",)))
        with torch.no_grad():
            for parameter in trained_parameters(model).values():
                parameter.normal_(std=0.02)
        optimisation = Engine(World(device=self.device)).train(model.train(), self.config.train)
        blocks = tuple(range(len(self.backbone.blocks)))
        objective = Objective(self.config.loss, torch.ones(10_000), blocks)
        sides = {
            "user": self._side(model, "user", tokens, samples),
            "item": self._side(model, "item", ITEM_TOKENS, samples),
        }
        states = torch.randn(samples, len(blocks), self.backbone.hidden_size)
        rows = torch.arange(samples)
        targets = on_device(LossTargets(rows, rows, rows[:, None] + samples, states, states, samples), self.device)

        def step() -> None:
            with optimisation.part(last=True):
                encoded = optimisation(sides)
                optimisation.backward(objective(model, encoded["user"], encoded["item"], targets).total)
            optimisation.update(1.0)

        return step

    def _side(self, model: RaRec, side: str, tokens: int, samples: int) -> SideBatch:
        """Return prompts of random tokens whose slots follow the first one; `tokens` counts both."""
        slots = sum(getattr(model, side).slots.values())
        ids_BT = torch.randint(3, 400, (samples, tokens))
        places_BK = torch.arange(1, slots + 1).expand(samples, slots)
        vectors = {"id": torch.randn(samples, 1, DIM)}
        return SideBatch(ids_BT, torch.ones_like(ids_BT), places_BK, vectors).to(self.device)

    def _plain(self, tokens: int, samples: int) -> Callable[[], None]:
        """Return a step of the same model under PEFT alone."""
        trained = [p for p in self.backbone.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, fused=True)
        batches = [torch.randint(3, 400, (samples, length), device=self.device) for length in (tokens, ITEM_TOKENS)]

        def step() -> None:
            for ids_BT in batches:
                self.backbone.trunk(input_ids=ids_BT, use_cache=False).last_hidden_state.float().mean().backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad()

        return step

    def _planned(self, tokens: int, samples: int) -> int:
        """Return what `rarec plan` says of the peak."""
        config = self.config.model_copy(update={"train": self.config.train.model_copy(update={"batch_size": samples})})
        calculator = Calculator(config, MetaModelBuilder(config, SOURCES, self.scratch))
        slots = config.alignment.instructions + 1
        lengths = {"user": tokens - slots, "item": ITEM_TOKENS - slots}
        calculator.prompts = {side: PromptLengths(length, length) for side, length in lengths.items()}
        setup = calculator.setup(Cluster.of(1, 1, None, "H100"), "0")
        memory = calculator.memory(VARIANT.name, setup)
        return memory.static + max(memory.activations, memory.update)  # there is no validation here

    def _whole(self, step: Callable[[], None]) -> None:
        """Take a step, and wait for the GPU, if there is one."""
        step()
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def _peak(self, step: Callable[[], None]) -> int:
        """Return the most memory that a step takes."""
        if self.device.type == "cpu":
            return peak_memory()
        torch.cuda.reset_peak_memory_stats()
        self._whole(step)
        return torch.cuda.max_memory_allocated()


if __name__ == "__main__":
    main()
