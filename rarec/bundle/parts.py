"""The parts of a bundle's recommender: the variant around its language model, and the served row as a ranker.

A row with vectors has a dense form: one table of item vectors, what any vector index takes, and the neighbours that are
added to it. The score of a user and an item is the inner product of their vectors there, plus that of the neighbour
models, which is not zero for the few items alone that they list. So the exact best k are among the best
k + seen + listed of the table and the listed items.

Shape letters: B users, C users of a block, N catalogue, Z size of a scored vector, F size of the fused vectors, K
vectors of a user, E source dimension.
"""

import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from threading import RLock
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from scipy.sparse import csr_matrix

from rarec.bundle.base_recommender import Part, chances
from rarec.bundle.bundle import MODEL, Bundle, Float32, Rows
from rarec.config.neighbours import built_in
from rarec.distributed.world import SINGLE, World
from rarec.errors import UserError
from rarec.evaluation.results import part_title
from rarec.ids.source import Source
from rarec.models.build import build_model, load_weights, slots_reserved
from rarec.models.encode import Encoder
from rarec.models.language_model import LoadedModel, load_model
from rarec.neighbours.base import NewItems
from rarec.prompts import PromptPair
from rarec.ranking import EvalBatch, FusedRanker, NeighbourRanker, Ranker, Scores, VectorRanker
from rarec.ranking.rank import VectorScores
from rarec.ranking.rankers import compared_with
from rarec.storage.artefacts import differences

RowsOfUsers = Sequence[npt.NDArray[np.integer]]
"""Item rows of each user, oldest first."""
_OTHER_ROW = "export a row with a variant: VARIANT+id"

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


class Parts:
    """The rankers of a bundle; each is opened when it is first used, by any thread.

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
        self._llm = llm or (str(bundle.llm) if bundle.llm else None)
        self._batch_size = batch_size or int(bundle.facts["batch_size"])

    @once
    def rankers(self) -> dict[str, Ranker]:
        """The parts of the row that is served, by name."""
        return {name: self._part(name) for name in self.bundle.facts["parts"]}

    @once
    def ranker(self) -> FusedRanker:
        """The row that is served: the weighted sum of its parts."""
        parts = self.bundle.facts["parts"].values()
        weights, slopes = (tuple(part[key] for part in parts) for key in ("weight", "slope"))
        return FusedRanker(tuple(self.rankers.values()), weights, slopes)

    @once
    def dense(self) -> "DenseForm":
        """The row as one inner product, and the neighbour tables.

        Raises:
            UserError: it has no such form.
        """
        return DenseForm.of(self.ranker, list(self.bundle.facts["parts"]))

    def scored(self, histories: RowsOfUsers) -> Scores:
        """Return the scores of the row after some histories."""
        return self._fastest.scored(unknown_users(histories))

    @once
    def _fastest(self) -> Ranker:
        """The row that is served: by its dense form, if it has one."""
        try:
            return self.dense
        except UserError:
            return self.ranker

    def _part(self, name: str) -> Ranker:
        bundle = self.bundle
        facts = bundle.facts
        if facts["model"] and name == facts["model"]["variant"]["name"]:
            return VectorRanker(bundle.vectors[MODEL], lambda rows, histories: self.encoder.users(rows, histories))
        if name == "popularity":
            return VectorRanker.of_counts(bundle.catalogue.counts_N)
        if name == "id":
            return bundle.sources[facts["id_model"]].ranker()
        lacking_N = None if bundle.knows_new_items(name) else bundle.catalogue.counts_N == 0
        rule = facts["neighbours"]
        return NeighbourRanker(bundle.near[name], rule["newest"], rule["decay"], lacking_N)

    @once
    def described(self) -> dict[str, Part]:
        """The parts of the row that is served, as the rules of a fusion read them."""
        return {
            name: Part(
                title=part_title(name),
                weight=part["weight"],
                slope=part["slope"],
                knows_new=self.bundle.knows_new_items(name),
                vectors_NZ=ranker.items_NZ if isinstance(ranker := self.rankers[name], VectorRanker) else None,
                lacking_N=self.rankers[name].lacking_N,
            )
            for name, part in self.bundle.facts["parts"].items()
        }

    @property
    def newest_and_decay(self) -> tuple[int, float]:
        """Return how many items of a history neighbour tables read, and the factor on older ones."""
        rule = self.bundle.facts["neighbours"] or {"newest": 0, "decay": 1.0}
        return int(rule["newest"]), float(rule["decay"])

    @once
    def new_items(self) -> dict[str, NewItems]:
        """The finder of neighbours of new items for each table whose model is rarec's and knows them, by name."""
        bundle = self.bundle
        known = bundle.catalogue
        untitled = bundle.facts["tables"]["items"]["untitled"]
        rule = bundle.facts["neighbours"]
        models = {name: built_in(name) for name in bundle.tables}
        return {
            name: model.new_items(known.titles, known.texts, untitled, bundle.near[name], int(rule["top"]))
            for name, model in models.items()
            if model is not None and model.knows_new_items
        }

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
        prompts = self._prompts(bundle.catalogue.titles, bundle.catalogue.texts)
        model = build_model(bundle.config, bundle.variant, self._loaded, bundle.shapes, prompts.sources)
        load_weights(model, bundle.directory, bundle.weights)
        return Encoder(model.eval().to(self._world.device), prompts, sources, self._batch_size, self._world)

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


def unknown_users(histories: RowsOfUsers) -> EvalBatch:
    """Return users of no dataset, by their histories."""
    nobody = np.zeros(len(histories), np.int64)
    return EvalBatch(nobody, histories, nobody)


def sample_histories(parts: Parts, count: int, seed: int = 17) -> list[Rows]:
    """Return histories to check a bundle with: 1 to 20 different items each, popular ones more often."""
    rng = np.random.default_rng(seed)
    chances_N = chances(parts.bundle.catalogue.counts_N)
    lengths = rng.integers(1, min(20, len(chances_N) - 1), count, endpoint=True)
    return [rng.choice(len(chances_N), length, replace=False, p=chances_N) for length in lengths]


# ---- the dense form


@dataclass(frozen=True)
class DenseForm(Ranker):
    """A fusion's dense parts as one inner product, and its sparse ones.

    Attributes:
        items_NF: item vectors: those of each dense part times its weight, side by side.
        dense: the dense parts by name, whose user vectors side by side are the user's.
        sparse: the neighbour models by name, with their weights.
    """

    items_NF: Float32
    dense: Mapping[str, VectorRanker]
    sparse: Mapping[str, tuple[NeighbourRanker, float]]

    @classmethod
    def of(cls, fusion: FusedRanker, names: Sequence[str]) -> "DenseForm":
        """Return the form of a fusion whose parts have these names.

        Where a part lacks an item, the score that is predicted from the first part's goes into the item's vector of the
        first part, or into its column of the first part's table.

        Raises:
            UserError: no part is dense; or what an item's neighbours say would lower its score.
        """
        named = dict(zip(names, zip(fusion.parts, fusion.weights, strict=True), strict=True))
        dense = {name: part for name, (part, _) in named.items() if isinstance(part, VectorRanker)}
        near = {name: (part, weight) for name, (part, weight) in named.items() if isinstance(part, NeighbourRanker)}
        if not dense:
            raise UserError("this row has no vectors: no table of vectors has its scores", _OTHER_ROW)
        tables = [named[name][1] * part.items_NZ for name, part in dense.items()]
        if isinstance(first := fusion.parts[0], VectorRanker):
            tables[0] = tables[0] + _predicted_vectors(fusion, first.items_NZ)
        elif isinstance(first, NeighbourRanker) and list(_lacking(fusion)):
            near[names[0]] = _predicting(fusion, first), 1.0
        return cls(np.concatenate(tables, 1, dtype=np.float32), dense, near)

    def users(self, histories: RowsOfUsers) -> Float32:
        """Return user vectors, (B, F); or (B, K, F), of which the best score counts."""
        nobody = np.zeros(len(histories), np.int64)
        parts = [part.users(nobody, histories) for part in self.dense.values()]
        wide = [part if part.ndim == 3 else part[:, None] for part in parts]
        most = max(part.shape[1] for part in wide)
        vectors_BKF = np.concatenate([np.broadcast_to(part, (len(part), most, part.shape[2])) for part in wide], 2)
        return vectors_BKF[:, 0] if most == 1 else vectors_BKF

    def near(self, histories: RowsOfUsers) -> csr_matrix:
        """Return what the neighbour models add, (B, N), times their weights."""
        near_BN = csr_matrix((len(histories), len(self.items_NF)), dtype=np.float32)
        for part, weight in self.sparse.values():
            near_BN = near_BN + np.float32(weight) * part.near(histories)
        return near_BN

    def scored(self, chunk: EvalBatch) -> Scores:
        """See `Ranker`."""
        return DenseScores(self, chunk.histories)

    def best(
        self, users: Float32, histories: Sequence[Rows], candidates: Sequence[Rows], k: int
    ) -> list[tuple[Rows, Float32]]:
        """Return each user's k best new items among candidates and what the neighbour tables list, with their scores.

        They are the best of the catalogue if the candidates hold the k + seen items of the largest inner product.

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
            among = np.setdiff1d(np.concatenate([rows, near_1N.indices]).astype(np.int64), history)
            scores = (self.items_NF[among] @ users[user].reshape(-1, users.shape[-1]).T).max(1)
            scores = scores + near_1N[:, among].toarray().ravel()
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
        near_BN = form.near(histories)
        full = 2 * near_BN.nnz > self.n_users * self.n_items  # a sparse entry takes twice the memory of a dense one
        self._near_BN = torch.from_numpy(near_BN.toarray()) if full else near_BN

    def block(self, users: slice) -> torch.Tensor:
        """See `Scores`."""
        near_CN = self._near_BN[users]
        if not torch.is_tensor(near_CN):
            starts, columns, values = map(torch.from_numpy, (near_CN.indptr, near_CN.indices, near_CN.data))
            with warnings.catch_warnings():  # torch says that these tensors are in beta
                warnings.simplefilter("ignore")
                near_CN = torch.sparse_csr_tensor(starts, columns, values, near_CN.shape)
        return self._dense.block(users).add_(near_CN)


def _predicted_vectors(fusion: FusedRanker, first_NZ: Float32) -> npt.NDArray[np.float64]:
    """Return what the first part's item vectors get for the items that other parts lack, (N, Z)."""
    added_NZ = np.zeros(first_NZ.shape)
    for lacking_N, scale in _lacking(fusion):
        added_NZ += scale * lacking_N[:, None] * (first_NZ - first_NZ[compared_with(lacking_N)].mean(0))
    return added_NZ


def _predicting(fusion: FusedRanker, first: NeighbourRanker) -> NeighbourRanker:
    """Return the first part with its weight, and what it predicts for the items that other parts lack, in its table."""
    weight_N = np.full(first.table_NN.shape[0], fusion.weights[0])
    for lacking_N, scale in _lacking(fusion):
        weight_N += scale * lacking_N
    if (weight_N < 0).any():
        raise UserError("this row lowers the score of items by their neighbours: no table has its scores", _OTHER_ROW)
    return first.scaled(weight_N)


def _lacking(fusion: FusedRanker) -> Iterator[tuple[npt.NDArray[np.bool_], float]]:
    """Yield the items that a part after the first lacks, (N,), and its weight times its slope, where that counts."""
    for part, weight, slope in list(zip(fusion.parts, fusion.weights, fusion.slopes, strict=True))[1:]:
        if part.lacking_N is not None and part.lacking_N.any() and weight * slope:
            yield part.lacking_N, weight * slope
