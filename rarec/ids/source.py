"""A source: a named table of frozen vectors, one per item, and a way to make user vectors.

User vectors come from an ID model that reads the history, from a rule over the history's item vectors, or from a table.

Shape letters: N items, U users, B users of a batch, K vectors a user, E dimension, S dimension of another ID model,
T history.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import load_file
from torch import Tensor

from rarec.config.ids import RECIPES, Recipe
from rarec.errors import UserError
from rarec.ids.models import SequenceModel, build, pad
from rarec.ranking.rankers import VectorRanker
from rarec.storage.artefacts import read_manifest, sha256_json

Floats = npt.NDArray[np.float32]
Rows = npt.NDArray[np.integer]

KIND = "ids"
ITEMS_FILE = "items.npy"
MODEL_FILE = "model.safetensors"
USERS = "users"
"""Name of the table of `UserTable`; its file is `NAME.npy`."""
MAPPED_ITEMS, MATRIX, BIAS, INNER = "items", "matrix", "bias", "inner."
"""Names of the tensors of `MappedUsers`; those of the other model's user vectors begin with the last."""
KINDS_OF_USERS = (*RECIPES, "mapped", "rule", "table")
"""Ways to make user vectors that come with rarec; any other name is of an ID model of the user's own."""


class UserVectors(ABC):
    """A way to make user vectors."""

    @property
    def per_user(self) -> int:
        """K."""
        return 1

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The weights or tables from which `users_of` makes them again, with the settings."""
        return {}

    @abstractmethod
    def vectors(self, items_NE: Floats, user_rows: Rows, histories: Sequence[Rows]) -> Floats:
        """Return the users' vectors, (B, K, E).

        Args:
            items_NE: the source's item vectors.
            user_rows: rows of the users in the prepared dataset, (B,).
            histories: item rows of each user, oldest first.
        """

    def permuted(self, rng: np.random.Generator) -> "UserVectors":
        """Return the user vectors that belong to permuted item vectors: itself, where it reads no others."""
        return self


@dataclass(frozen=True)
class SequenceUsers(UserVectors):
    """User vectors by an ID model: the states after the last interaction of the history."""

    model: SequenceModel

    @property
    def per_user(self) -> int:
        """K."""
        return self.model.per_user

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The weights, without the item table."""
        return dict(self.model.state_dict())

    def vectors(self, items_NE: Floats, user_rows: Rows, histories: Sequence[Rows]) -> Floats:
        """See `UserVectors`."""
        return self.model.encode(items_NE, histories)


@dataclass(frozen=True)
class HistoryRule(UserVectors):
    """User vectors by a weighted mean of the history's item vectors; the weights depend on age alone.

    Attributes:
        weights_T: weights by age, the newest item first; items older than T are not read.
    """

    weights_T: npt.NDArray[np.float64]

    @classmethod
    def of(cls, rule: Literal["mean", "last", "recency"], half_life: float, max_history: int) -> "HistoryRule":
        """Build the configured rule: equal weights, the newest item alone, or weights that halve every `half_life`."""
        age_T = np.arange(max_history)
        weights = {"mean": np.ones(max_history), "last": (age_T == 0) * 1.0, "recency": 0.5 ** (age_T / half_life)}
        return cls(weights[rule])

    def vectors(self, items_NE: Floats, user_rows: Rows, histories: Sequence[Rows]) -> Floats:
        """See `UserVectors`. Items without a vector are skipped; a history without any vector gives zeros."""
        rows_BT, lengths_B = pad(_with_vectors(items_NE, histories), len(self.weights_T))
        age_BT = lengths_B[:, None] - 1 - np.arange(rows_BT.shape[1])
        weights_BT = np.where(age_BT >= 0, self.weights_T[age_BT], 0.0)
        weights_BT /= np.maximum(weights_BT.sum(axis=1, keepdims=True), np.finfo(np.float64).tiny)
        users_BE: npt.NDArray[np.float64] = np.einsum("bt,bte->be", weights_BT, items_NE[rows_BT])
        return users_BE[:, None].astype(np.float32)


@dataclass(frozen=True)
class UserTable(UserVectors):
    """Imported user vectors, one row per user; the history is not read."""

    users_UKE: Floats

    @property
    def per_user(self) -> int:
        """K."""
        return int(self.users_UKE.shape[1])

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The table."""
        return {USERS: torch.from_numpy(self.users_UKE)}

    def vectors(self, items_NE: Floats, user_rows: Rows, histories: Sequence[Rows]) -> Floats:
        """See `UserVectors`."""
        users_BKE: Floats = np.asarray(self.users_UKE[user_rows])
        return users_BKE

    def permuted(self, rng: np.random.Generator) -> "UserTable":
        """Return the table with its rows permuted, a copy in memory."""
        return replace(self, users_UKE=rng.permutation(self.users_UKE))


@dataclass(frozen=True)
class MappedUsers(UserVectors):
    """User vectors u M + b, where u are those of another ID model than the one that a recommender was trained with.

    Attributes:
        inner: makes the other model's user vectors.
        items_NS: the other model's item vectors, which it reads; zeros for items that it does not know.
        matrix_SE: M.
        bias_E: b.
    """

    inner: UserVectors
    items_NS: Floats
    matrix_SE: Floats
    bias_E: Floats

    @property
    def per_user(self) -> int:
        """K."""
        return self.inner.per_user

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The map, and what the other model is made by."""
        own = {MAPPED_ITEMS: self.items_NS, MATRIX: self.matrix_SE, BIAS: self.bias_E}
        inner = {INNER + name: tensor for name, tensor in self.inner.tensors.items()}
        return {**{name: torch.from_numpy(np.array(array)) for name, array in own.items()}, **inner}

    def vectors(self, items_NE: Floats, user_rows: Rows, histories: Sequence[Rows]) -> Floats:
        """See `UserVectors`. Items that the other model does not know are skipped; zeros without any other."""
        known = _with_vectors(self.items_NS, histories)
        users_BKS = self.inner.vectors(self.items_NS, user_rows, known)
        is_known_B11 = np.array([len(history) > 0 for history in known])[:, None, None]
        mapped_BKE: Floats = ((users_BKS @ self.matrix_SE + self.bias_E) * is_known_B11).astype(np.float32)
        return mapped_BKE

    def permuted(self, rng: np.random.Generator) -> "MappedUsers":
        """Return the user vectors of permuted items, a copy in memory."""
        return replace(self, items_NS=rng.permutation(self.items_NS))


def _with_vectors(items_NE: Floats, histories: Sequence[Rows]) -> list[Rows]:
    """Return histories without the items that have no vector."""
    return [history[(items_NE[history] != 0).any(-1)] for history in histories]


@dataclass(frozen=True)
class Source:
    """Frozen vectors of items and users. The score of a user and an item is the largest of K dot products.

    Attributes:
        name: by which templates refer to its slots.
        items_NE: item vectors by the prepared dataset's item rows, memory-mapped. A zero vector means that the item has
            none, for example because it does not occur in training.
        users: makes user vectors.
        hash: of the artefact; a permuted source has another one.
        manifest: settings, inputs, and metrics on the validation users.
    """

    name: str
    items_NE: Floats
    users: UserVectors
    hash: str
    manifest: Mapping[str, Any]

    @property
    def dim(self) -> int:
        """E."""
        return int(self.items_NE.shape[1])

    @property
    def vectors_per_user(self) -> int:
        """K: 1, or more for ComiRec and imported user tables of three axes."""
        return self.users.per_user

    def user_vectors(self, user_rows: Rows, histories: Sequence[Rows]) -> Floats:
        """Return user vectors, (B, K, E).

        Args:
            user_rows: rows of the users in the prepared dataset, (B,).
            histories: known item rows of each user, oldest first; may be empty.
        """
        return self.users.vectors(self.items_NE, user_rows, histories)

    def ranker(self) -> VectorRanker:
        """Return the ID model as a ranker."""
        return ranker_of(self.items_NE, self.users)

    def permuted(self, seed: int) -> "Source":
        """Return the source with its item vectors permuted among items, and user vectors that follow (sanity check).

        Every vector stays the same, but says nothing about its item. The permuted table is a copy in memory.
        """
        rng = np.random.default_rng(seed)
        items_NE = rng.permutation(self.items_NE)
        digest = sha256_json([self.hash, "permuted", seed])
        return replace(self, items_NE=items_NE, users=self.users.permuted(rng), hash=digest)


def ranker_of(items_NE: Floats, users: UserVectors) -> VectorRanker:
    """Return a ranker over item vectors and their user vectors; an item without a vector is scored as the mean item."""
    lacking_N = (items_NE == 0).all(1)
    scored_NE = np.asarray(items_NE)
    if lacking_N.any() and not lacking_N.all():
        scored_NE = np.where(lacking_N[:, None], items_NE[~lacking_N].mean(axis=0), items_NE)
    own = partial(users.vectors, items_NE)
    return VectorRanker(scored_NE, own, knows_new=False, lacking_N=lacking_N)


def open_source(directory: Path, recipe: Recipe | None = None) -> Source:
    """Open an artefact of kind `ids`; vectors are read from disk when they are used.

    Args:
        directory: the artefact.
        recipe: settings of the ID model, as the configuration has them. Only an ID model of the user's own needs them:
            the manifest names it too, but code that the configuration does not name is never imported.

    Raises:
        UserError: it is missing, of another kind or schema, or its files are damaged; or it was made by an ID model of
            the user's own that `recipe` is not of.
    """
    manifest = read_manifest(directory, KIND)
    try:
        items_NE = load_table(directory / ITEMS_FILE)
        settings = manifest["settings"]["users"]
        users = users_of(settings, recipe, _read_tensors(directory, settings["kind"]), str(directory))
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{directory} is damaged: {error}", f"rebuild it: rarec {KIND} CONFIG --fresh") from None
    return Source(manifest["name"], items_NE, users, manifest["hash"], manifest)


def _alike(one: Tensor | None, other: Tensor | None) -> bool:
    return one is not None and other is not None and one.shape == other.shape


def load_table(path: Path) -> Floats:
    """Map a table of vectors, copy on write: the file cannot change, yet torch takes the array without a copy."""
    table: Floats = np.load(path, mmap_mode="c", allow_pickle=False)
    return table


def _read_tensors(directory: Path, kind: str) -> dict[str, Tensor]:
    """Read what user vectors of a kind are made by."""
    if kind == "rule":
        return {}
    if kind == "table":
        return {USERS: torch.from_numpy(load_table(directory / f"{USERS}.npy"))}
    return load_file(directory / MODEL_FILE)


def users_of(
    settings: Mapping[str, Any], recipe: Recipe | None, tensors: Mapping[str, Tensor], where: str
) -> UserVectors:
    """Return the way to make user vectors that settings describe: a rule, a table, or an ID model.

    Args:
        settings: `kind` and its fields, as in a manifest.
        recipe: see `open_source`.
        tensors: the weights; see `UserVectors.tensors`.
        where: what the settings are of, for messages.
    """
    kind = settings["kind"]
    fields = {name: value for name, value in settings.items() if name != "kind"}
    match kind:
        case "mapped":
            inner = {name.removeprefix(INNER): tensor for name, tensor in tensors.items() if name.startswith(INNER)}
            tables = (tensors[name].numpy() for name in (MAPPED_ITEMS, MATRIX, BIAS))
            return MappedUsers(users_of(settings["inner"], recipe, inner, where), *tables)
        case "rule":
            return HistoryRule.of(**fields)
        case "table":
            return UserTable(tensors[USERS].numpy())
    if kind in RECIPES:
        recipe = RECIPES[kind](**fields)
        with torch.device("meta"):  # before memory is taken for the sizes that the settings name
            expected = build(recipe).state_dict()
        differing = [name for name in {**expected, **tensors} if not _alike(expected.get(name), tensors.get(name))]
        if differing:
            raise ValueError(f"tensor {differing[0]!r} does not fit the settings of {where}")
    elif recipe is None or recipe.model_dump(mode="json") != fields:
        problem = f"{where} was made by the ID model {kind}, which the configuration does not name"
        raise UserError(problem, f"set ids.model: {kind} and its ids.settings, if you trust that code")
    model = build(recipe)
    model.load_state_dict(dict(tensors))
    return SequenceUsers(model.eval())
