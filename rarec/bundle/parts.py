"""The parts of a bundle's recommender: the variant around its language model, and the served row as a ranker."""

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt

from rarec.bundle.bundle import LLM, MODEL, Bundle
from rarec.bundle.dense import DenseForm, DenseScores
from rarec.distributed.world import SINGLE, World
from rarec.errors import UserError
from rarec.ids.source import Source
from rarec.models.build import build_model, load_weights, slots_reserved
from rarec.models.encode import Encoder
from rarec.models.language_model import LoadedModel, load_model
from rarec.neighbours.base import NewItems
from rarec.neighbours.ranker import NeighbourRanker
from rarec.prompts import PromptPair
from rarec.ranking import EvalBatch, FusedRanker, Ranker, Scores, VectorRanker
from rarec.storage.artefacts import differences

Float32 = npt.NDArray[np.float32]
Rows = npt.NDArray[np.int64]


class Parts:
    """The rankers of a bundle; each is opened when it is first used.

    Args:
        bundle: an opened bundle.
        llm: path or name of the language model, if it is elsewhere than at the export.
        batch_size: prompts in a forward pass; by default as many as in the evaluation.
        world: device and ranks.
    """

    def __init__(
        self, bundle: Bundle, *, llm: str | None = None, batch_size: int | None = None, world: World = SINGLE
    ) -> None:
        self.bundle = bundle
        self._world = world
        self._llm = llm or (str(bundle.directory / LLM) if bundle.holds_llm else None)
        self._batch_size = batch_size or int(bundle.facts["batch_size"])

    @cached_property
    def rankers(self) -> dict[str, Ranker]:
        """The parts of the row that is served, by name."""
        return {name: self._part(name) for name in self.bundle.facts["parts"]}

    @cached_property
    def ranker(self) -> Ranker:
        """The row that is served: one part, or the weighted sum of several."""
        rankers, parts = tuple(self.rankers.values()), self.bundle.facts["parts"].values()
        if len(rankers) == 1:
            return rankers[0]
        weights, slopes = (tuple(part[key] for part in parts) for key in ("weight", "slope"))
        return FusedRanker(rankers, weights, slopes)

    @cached_property
    def dense(self) -> DenseForm:
        """The row as one inner product, and the neighbour tables.

        Raises:
            UserError: it has no such form.
        """
        return DenseForm.of(self.ranker, list(self.bundle.facts["parts"]))

    def scored(self, histories: Sequence[Rows]) -> Scores:
        """Return the scores of the row after some histories, by its dense form if it has one: that is faster."""
        return DenseScores(self._form, histories) if self._form is not None else _scored(self.ranker, histories)

    def popular_scored(self, histories: Sequence[Rows]) -> Scores:
        """Return the popularity of all items, for each history."""
        return _scored(self.popular, histories)

    @cached_property
    def _form(self) -> DenseForm | None:
        try:
            return self.dense
        except UserError:
            return None

    @cached_property
    def popular(self) -> VectorRanker:
        """Popularity."""
        return VectorRanker.of_counts(self.bundle.catalogue.counts_N)

    def _part(self, name: str) -> Ranker:
        bundle = self.bundle
        facts = self.bundle.facts
        if facts["model"] and name == facts["model"]["variant"]["name"]:
            return VectorRanker(bundle.vectors[MODEL], lambda rows, histories: self.encoder.users(rows, histories))
        if name == "popularity":
            return self.popular
        if name == "id":
            return bundle.sources[facts["id_model"]].ranker()
        lacking_N = None if bundle.knows_new_items(name) else bundle.catalogue.counts_N == 0
        rule = facts["neighbours"]
        return NeighbourRanker(bundle.neighbours(name), rule["newest"], rule["decay"], lacking_N)

    @cached_property
    def new_items(self) -> dict[str, NewItems]:
        """Return the finder of neighbours of new items for each table, by name."""
        opened = {name: self.bundle.new_items(name) for name in self.bundle.tables}
        return {name: new_items for name, new_items in opened.items() if new_items is not None}

    @cached_property
    def encoder(self) -> Encoder:
        """The variant around its language model, which is loaded now.

        Raises:
            UserError: the row has no variant; the language model cannot be read, or is another one.
        """
        bundle = self.bundle
        if not bundle.facts["model"]:
            problem = f"{bundle.facts['row']}, which {bundle.directory} holds, has no language model"
            raise UserError(problem, "export a row with a variant: export.variant=VARIANT+id")
        loaded, sources = self._loaded, {name: bundle.sources[name] for name in bundle.shapes}
        prompts = self._prompts(loaded, bundle.catalogue.titles, bundle.catalogue.texts)
        model = build_model(bundle.config, bundle.variant, loaded, bundle.shapes, prompts.sources)
        load_weights(model, bundle.directory)
        return Encoder(model.eval().to(self._world.device), prompts, sources, self._batch_size, self._world)

    def encode_new(self, titles: Sequence[str], texts: Sequence[str], vectors: Mapping[str, Float32]) -> Float32:
        """Return item vectors (N, Z) of items that are not in the catalogue.

        Args:
            titles: (N,).
            texts: (N,), "" where there is none.
            vectors: of each source that slots take, (N, E); zeros where an item has none.
        """
        known = self.encoder
        prompts = self._prompts(self._loaded, titles, texts)
        sources = {name: replace(source, items_NE=vectors[name]) for name, source in known.sources.items()}
        return Encoder(known.model, prompts, sources, self._batch_size, self._world).items()

    def encoder_over(self, sources: Mapping[str, Source]) -> Encoder:
        """Return the variant with other vectors of its sources."""
        known = self.encoder
        own = {name: sources[name] for name in known.sources}
        return Encoder(known.model, known.prompts, own, self._batch_size, self._world)

    def _prompts(self, loaded: LoadedModel, titles: Sequence[str], texts: Sequence[str]) -> PromptPair:
        config = self.bundle.config
        kind = loaded.identity["kind"]
        reserved = slots_reserved(config, self.bundle.shapes)
        return PromptPair(config.prompt, loaded.tokenizer, titles, texts, reserved, loaded.context_length, kind)

    @property
    def llm_path(self) -> str:
        """Path or name of the language model, as `llm.path` has it."""
        return self._llm or self.bundle.config.llm.path

    @property
    def context_length(self) -> int:
        """The longest prompt that the language model takes, in tokens."""
        return self._loaded.context_length

    @cached_property
    def _loaded(self) -> LoadedModel:
        """The language model; another one than the variant was trained with is refused."""
        bundle = self.bundle
        config = self.bundle.config
        llm = config.llm.model_copy(update={"path": self.llm_path})
        lora = config.lora if bundle.variant.lora else None
        device = self._world.device.type
        with tempfile.TemporaryDirectory(prefix="rarec-") as scratch:  # for what a GGUF file is converted to
            loaded = load_model(llm, Path(scratch, "llm"), pool=config.readout.pool, lora=lora, device=device)
        expected = dict(bundle.facts["model"]["llm"])
        name, _ = expected.pop("name"), expected.pop("revision")
        changed = differences(expected, {key: loaded.identity.get(key) for key in expected})
        if changed:
            problem = f"{bundle.directory} belongs to another language model ({'; '.join(changed)})"
            raise UserError(problem, f"give the one that it was trained with: {name}")
        return loaded


def _scored(ranker: Ranker, histories: Sequence[Rows]) -> Scores:
    nobody = np.zeros(len(histories), np.int64)
    return ranker.scored(EvalBatch(nobody, histories, nobody))


def sample_histories(parts: Parts, count: int, seed: int = 17) -> list[Rows]:
    """Return histories to check a bundle with: 1 to 20 different items each, popular ones more often."""
    rng = np.random.default_rng(seed)
    chances_N = _chances(parts.bundle)
    lengths = rng.integers(1, min(20, len(chances_N) - 1), count, endpoint=True)
    return [rng.choice(len(chances_N), length, replace=False, p=chances_N) for length in lengths]


def sample_user(parts: Parts, rng: np.random.Generator, length: int = 5) -> list[int]:
    """Return the history of a user who might be: a popular item, then neighbours of those before."""
    chances_N = _chances(parts.bundle)
    tables = parts.bundle.tables
    rows = [int(rng.choice(len(chances_N), p=chances_N))]
    table_NN = parts.bundle.neighbours("cooccurrence" if "cooccurrence" in tables else tables[0]) if tables else None
    while len(rows) < min(length, len(chances_N)):
        own = table_NN.getrow(int(rng.choice(rows))) if table_NN is not None else None
        nearest = own.indices[np.argsort(-own.data)[:10]] if own is not None else np.empty(0, np.int64)
        new = np.setdiff1d(nearest if rng.random() < 0.9 else np.arange(len(chances_N)), rows)
        rows += [int(rng.choice(new))] if len(new) else []
    return rows


def _chances(bundle: Bundle) -> npt.NDArray[np.float64]:
    """Return the chance of each item to be drawn: the root of its count."""
    roots_N = np.sqrt(bundle.catalogue.counts_N + 1.0)
    chances_N: npt.NDArray[np.float64] = roots_N / roots_N.sum()
    return chances_N
