"""The parts of a bundle's recommender: the variant around its language model, and the served row as a ranker.

Shape letters: B users, C users of a block, N catalogue, Z size of a scored vector, F size of the fused vectors, K
vectors of a user, E source dimension.
"""

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from threading import RLock
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from scipy.sparse import csr_matrix

from rarec.bundle.base_recommender import chances
from rarec.bundle.bundle import FACTS, MODEL, REMEDY, TEXTS, Bundle, Float32, Rows
from rarec.bundle.row import Part, Row, Table
from rarec.bundle.rules import BY_DEFAULT, Asked
from rarec.distributed.world import SINGLE, World
from rarec.errors import UserError
from rarec.evaluation.results import part_title
from rarec.ids.source import Source
from rarec.models.build import build_model, load_weights, slots_reserved
from rarec.models.encode import Encoder, text_vectors
from rarec.models.language_model import LoadedModel, load_model, without_adapter
from rarec.neighbours.scores import NEW
from rarec.prompts import PromptPair
from rarec.ranking.learned import LearnedRanker
from rarec.ranking.rank import EvalBatch, Scores, VectorScores
from rarec.ranking.rankers import FusedRanker, NeighbourRanker, Ranker, VectorRanker, new_items
from rarec.storage.artefacts import differences

RowsOfUsers = Sequence[npt.NDArray[np.integer]]
"""Item rows of each user, oldest first."""

if TYPE_CHECKING:
    once = cached_property
else:

    class once(cached_property):
        """A cached property that one thread computes while others wait. One lock for all: it may load a model."""

        lock = RLock()

        def __get__(self, instance: Any, owner: Any = None) -> Any:
            """Return the value; called until it is there."""
            with self.lock:
                return super().__get__(instance, owner)


class BundledModel:
    """A bundle's variant around its language model, which is loaded when it is first used, by any thread.

    Args:
        bundle: an opened bundle.
        llm: see `Parts`.
        batch_size: see `Parts`.
        world: see `Parts`.
    """

    def __init__(self, bundle: Bundle, llm: str | None, batch_size: int | None, world: World) -> None:
        self.bundle = bundle
        self._world = world
        self._llm = llm or (str(bundle.llm) if bundle.llm else None)
        self._batch_size = batch_size or int(bundle.facts["batch_size"])

    @once
    def encoder(self) -> Encoder:
        """The variant around its language model, which is loaded now.

        Raises:
            UserError: the row has no variant; the language model cannot be read, or is another one.
        """
        bundle = self.bundle
        if not bundle.facts["model"]:
            problem = f"{bundle.facts['row']}, which {bundle.directory} holds, has no language model"
            raise UserError(problem, "export a row with a variant: export.variant=VARIANT+id")
        sources = {name: bundle.sources[name] for name in bundle.shapes}
        with self._from_facts():
            prompts = self._prompts(bundle.catalogue.titles, bundle.catalogue.texts)
            model = build_model(bundle.config, bundle.variant, self._loaded, bundle.shapes, prompts.sources)
        load_weights(model, bundle.directory, bundle.weights)
        return Encoder(model.eval().to(self._world.device), prompts, sources, self._batch_size, self._world)

    @contextmanager
    def _from_facts(self) -> Iterator[None]:
        """Name the file of the facts where settings that are valid do not fit each other, or the language model."""
        _ = self._loaded  # has messages of its own
        try:
            yield
        except UserError as error:
            raise UserError(f"{self.bundle.directory / FACTS}: {error.problem}", REMEDY) from None

    @property
    def text_vectors(self) -> "BundledTexts | None":
        """The language model's vectors of texts, which some neighbour tables are made from."""
        return BundledTexts(self) if TEXTS in self.bundle.vectors else None  # there is none of a catalogue too large

    @once
    def without_adapter(self) -> LoadedModel:
        """The language model without LoRA, beside the one with it."""
        _ = self.encoder  # puts the model on its device
        return without_adapter(self._loaded)

    def encode_new(self, titles: Sequence[str], texts: Sequence[str], vectors: Mapping[str, Float32]) -> Float32:
        """Return item vectors (N, Z) of items that are not in the catalogue.

        Args:
            titles: (N,).
            texts: (N,), "" where there is none.
            vectors: of each source that slots take, (N, E); zeros where an item has none.
        """
        sources = {name: replace(known, items_NE=vectors[name]) for name, known in self.encoder.sources.items()}
        return self.encoder_over(sources, self._prompts(titles, texts)).items()

    def encoder_over(self, sources: Mapping[str, Source], prompts: PromptPair | None = None) -> Encoder:
        """Return the variant with other vectors of its sources, over the catalogue's prompts or others."""
        known = self.encoder
        own = {name: sources[name] for name in known.sources}
        return Encoder(known.model, prompts or known.prompts, own, self._batch_size, self._world)

    def _prompts(self, titles: Sequence[str], texts: Sequence[str]) -> PromptPair:
        config = self.bundle.config
        loaded = self._loaded
        reserved = slots_reserved(config, self.bundle.shapes)
        kind = loaded.identity["kind"]
        return PromptPair(config.prompt, loaded.tokenizer, titles, texts, reserved, loaded.context_length, kind)

    @property
    def llm_path(self) -> str:
        """Path or name of the language model, as `llm.path` has it."""
        return self._llm or self.bundle.config.llm.path

    @property
    def context_length(self) -> int:
        """The longest prompt that the language model takes, in tokens."""
        return self._loaded.context_length

    @once
    def _loaded(self) -> LoadedModel:
        """The language model; another one than the variant was trained with is refused."""
        bundle = self.bundle
        config = bundle.config
        llm = config.llm.model_copy(update={"path": self.llm_path})
        lora = config.lora if bundle.variant.lora else None
        device = self._world.device.type
        with tempfile.TemporaryDirectory(prefix="rarec-") as scratch:  # for what a GGUF file is converted to
            loaded = load_model(llm, Path(scratch, "llm"), pool=config.readout.pool, lora=lora, device=device)
        known = bundle.facts["model"]["llm"]
        expected = {key: value for key, value in known.items() if key not in ("name", "revision")}
        changed = differences(expected, {key: loaded.identity.get(key) for key in expected})
        if changed:
            problem = f"{bundle.directory} belongs to another language model ({'; '.join(changed)})"
            raise UserError(problem, f"give the one that it was trained with: {known['name']}")
        return loaded


class BundledTexts:
    """See `TextVectors`.

    Args:
        model: of the bundle, which is loaded when a text is encoded.
    """

    def __init__(self, model: BundledModel) -> None:
        self._model, self.known_ND = model, model.bundle.vectors[TEXTS]

    def encode(self, texts: Sequence[str]) -> Float32:
        """See `TextVectors`."""
        return text_vectors(self._model.without_adapter, texts)


class Parts:
    """The rankers of a bundle.

    Args:
        bundle: an opened bundle.
        llm: path or name of the language model, if it is elsewhere than at the export.
        batch_size: prompts in a forward pass; by default as many as in the evaluation.
        world: device and ranks.

    Attributes:
        model: the variant around its language model.
        rankers: the parts of the row that is served, by name.
        row: that is served.
        ranker: of the row, before a learned order.
    """

    def __init__(
        self, bundle: Bundle, *, llm: str | None = None, batch_size: int | None = None, world: World = SINGLE
    ) -> None:
        self.bundle = bundle
        self.model = BundledModel(bundle, llm, batch_size, world)
        self.rankers = {name: self._ranker(name) for name in bundle.facts["parts"] if name != NEW}
        new_N = new_items(bundle.catalogue.counts_N, self.rankers.values())
        if NEW in bundle.facts["parts"]:
            self.rankers[NEW] = VectorRanker.of_new(new_N)
        self.row = self._row()
        self.ranker = DenseForm(self.row, self.rankers)
        self._whole: Ranker = self.ranker
        if bundle.order is not None:
            each = self.row.parts.values()
            weights, new_weights = tuple(part.weight for part in each), tuple(part.new_weight for part in each)
            fused = FusedRanker(tuple(self.rankers.values()), weights, new_weights, new_N)
            self._whole = LearnedRanker(fused, bundle.order)

    @property
    def dense(self) -> "DenseForm":
        """The ranker of a row whose scores a table of vectors, and neighbour tables beside it, have.

        Raises:
            UserError: it has no such form.
        """
        self.row.check_form()
        return self.ranker

    def scored(self, histories: RowsOfUsers) -> Scores:
        """Return the scores of the row after some histories."""
        return self._whole.scored(unknown_users(histories, self.row.asked))

    def _ranker(self, name: str) -> Ranker:
        bundle = self.bundle
        facts = bundle.facts
        if facts["model"] and name == facts["model"]["variant"]["name"]:
            model = self.model  # not this object, which would refer to itself, and outlive its last user for long
            return VectorRanker(bundle.vectors[MODEL], lambda rows, histories: model.encoder.users(rows, histories))
        if name == "popularity":
            return VectorRanker.of_counts(bundle.catalogue.counts_N)
        if name == "id":
            return bundle.sources[facts["id_model"]].ranker()
        rule = facts["neighbours"]
        return NeighbourRanker(bundle.near[name], rule["newest"], rule["decay"])

    def _row(self) -> Row:
        facts, near = self.bundle.facts, self.bundle.near
        parts, tables = dict[str, Part](), dict[str, Table]()
        for name, ranker in self.rankers.items():
            if name in near:
                tables[name] = near[name].indptr, near[name].indices, near[name].data
            own = (ranker.items_NZ, ranker.lacking_N) if isinstance(ranker, VectorRanker) else (None, None)
            parts[name] = Part(part_title(name), **facts["parts"][name], vectors_NZ=own[0], lacking_N=own[1])
        variant = facts["model"] and facts["model"]["variant"]["name"]
        rule = facts["neighbours"] or {"newest": 0, "decay": 1.0, "top": 0}
        return Row(
            facts["row"],
            parts,
            tables,
            newest=rule["newest"],
            decay=rule["decay"],
            compared=next((name for name in (variant, "id") if name in parts), None),
            untitled=facts["tables"]["items"]["untitled"],
            top=rule["top"],
            order=self.bundle.order,
            asked=Asked(**facts["asked"]),
        )

    @property
    def encoder(self) -> Encoder:
        """See `BundledModel`."""
        return self.model.encoder


def unknown_users(histories: RowsOfUsers, asked: Asked = BY_DEFAULT) -> EvalBatch:
    """Return users of no dataset, by their histories."""
    nobody = np.zeros(len(histories), np.int64)
    return EvalBatch(nobody, histories, nobody - 1, asked.exclude_seen)  # whose target is not known


def sample_histories(parts: Parts, count: int, seed: int = 17) -> list[Rows]:
    """Return histories to check a bundle with: 1 to 20 different items each, popular ones more often."""
    rng = np.random.default_rng(seed)
    chances_N = chances(parts.bundle.catalogue.counts_N)
    lengths = rng.integers(1, min(20, len(chances_N) - 1), count, endpoint=True)
    return [rng.choice(len(chances_N), length, replace=False, p=chances_N) for length in lengths]


# ---- the dense form


@dataclass(frozen=True)
class DenseForm(Ranker):
    """The row as one inner product, and its neighbour tables.

    Attributes:
        row: that is served.
        rankers: its parts, by name.
    """

    row: Row
    rankers: Mapping[str, Ranker]

    @property
    def items_NF(self) -> Float32:
        """The item vectors."""
        return self.row.items_NF

    def users(self, histories: RowsOfUsers) -> Float32:
        """Return user vectors, (B, K, F), of which the best score counts."""
        nobody = np.zeros(len(histories), np.int64)
        vectors = [np.zeros((len(histories), 1, 0), np.float32)]
        for name in self.row.dense:
            part = self.rankers[name]
            assert isinstance(part, VectorRanker)
            own = part.users(nobody, histories)
            vectors.append(own if own.ndim == 3 else own[:, None])
        most = max(own.shape[1] for own in vectors)
        return np.concatenate([np.broadcast_to(own, (len(own), most, own.shape[2])) for own in vectors], 2)

    def near(self, histories: RowsOfUsers) -> csr_matrix:
        """Return what the neighbour tables add, (B, N), times their weights."""
        near_BN = csr_matrix((len(histories), len(self.items_NF)), dtype=np.float32)
        for name, weight_N in self.row.table_weights.items():
            part = self.rankers[name]
            assert isinstance(part, NeighbourRanker)
            own_BN = part.near(histories)
            own_BN.data *= weight_N[own_BN.indices]
            near_BN = near_BN + own_BN
        return near_BN

    def scored(self, chunk: EvalBatch) -> Scores:
        """See `Ranker`."""
        return DenseScores(self, chunk.histories)

    def best(
        self, users: Float32, histories: Sequence[Rows], candidates: Sequence[Rows], k: int
    ) -> list[tuple[Rows, Float32]]:
        """Return each user's k best items among candidates and what the neighbour tables list, with their scores.

        They are the best of the catalogue if the candidates hold the k + seen items of the largest inner product; with
        a learned order, the 200 + seen.

        Args:
            users: as `users` returns them.
            histories: item rows, oldest first.
            candidates: item rows of each user.
            k: number of items.
        """
        near_BN = self.near(histories)
        best = []
        for user, (history, rows) in enumerate(zip(histories, candidates, strict=True)):
            near_1N = near_BN[[user]]
            among = np.setdiff1d(np.concatenate([rows, near_1N.indices]).astype(np.int64), self.row.asked.seen(history))
            if self.row.order is None:
                scores = (self.items_NF[among] @ users[user].T).max(1) + near_1N[:, among].toarray().ravel()
            else:
                scores = self.row.whole(self.row.shares(users[user], history), history)[among]
            order = np.lexsort((among, -scores))[:k]
            best.append((among[order], scores[order].astype(np.float32)))
        return best


class DenseScores:
    """The scores of users by a dense form, a block at a time; see `Scores`.

    Args:
        form: of the row.
        histories: item rows of each user, oldest first.
    """

    def __init__(self, form: DenseForm, histories: RowsOfUsers) -> None:
        self._dense = VectorScores(form.users(histories), form.items_NF)
        self.n_users = len(histories)
        self.n_items = self._dense.n_items
        self.width = self._dense.width + 1
        self._near_BN = form.near(histories)

    def block(self, users: slice) -> torch.Tensor:
        """See `Scores`."""
        near_CN = torch.from_numpy(self._near_BN[users].toarray())
        return self._dense.block(users).add_(near_CN)
