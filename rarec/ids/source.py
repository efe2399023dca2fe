"""A source: a named table of frozen vectors, one per item, and a way to make user vectors.

User vectors come from an ID model that reads the history, from a rule over the history's item vectors, or from a table.

Shape letters: N items, U users, B users of a batch, K vectors a user, E dimension, T history.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from rarec.config.ids import RECIPES, Recipe
from rarec.errors import UserError
from rarec.ids.mapped import BIAS, INNER, ITEMS, MATRIX, MappedUsers
from rarec.ids.models import SequenceModel, build, pad
from rarec.ranking import VectorRanker
from rarec.storage.artefacts import read_manifest, sha256_json

Floats = npt.NDArray[np.float32]
Rows = npt.NDArray[np.integer]

KIND = "ids"
ITEMS_FILE = "items.npy"
USERS_FILE, USERS = "users.npy", "users"
LEFT_FILE, LEFT = "left.npy", "left"
MODEL_FILE = "model.safetensors"


class UserVectors(Protocol):
    """A way to make user vectors."""

    @property
    def per_user(self) -> int:
        """K."""

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The weights or tables from which `users_of` makes them again, with the settings."""

    def vectors(self, items_NE: Floats, user_rows: Rows, histories: Sequence[Rows]) -> Floats:
        """Return the users' vectors, (B, K, E).

        Args:
            items_NE: the source's item vectors.
            user_rows: rows of the users in the prepared dataset, (B,).
            histories: item rows of each user, oldest first.
        """

    def permuted(self, rng: np.random.Generator) -> "UserVectors":
        """Return the user vectors that belong to permuted item vectors."""


@dataclass(frozen=True)
class SequenceUsers:
    """User vectors by an ID model: the states after the last interaction of the history."""

    model: SequenceModel

    @property
    def per_user(self) -> int:
        """K."""
        return self.model.per_user

    @classmethod
    def of(cls, settings: Recipe, tensors: Mapping[str, Tensor]) -> "SequenceUsers":
        """Build a trained model from its weights."""
        model = build(settings)
        model.load_state_dict(dict(tensors))
        return cls(model.eval())

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The weights, without the item table."""
        return dict(self.model.state_dict())

    def save(self, directory: Path) -> None:
        """Write the model, without the item table."""
        save_file(self.tensors, directory / MODEL_FILE)

    def vectors(self, items_NE: Floats, user_rows: Rows, histories: Sequence[Rows]) -> Floats:
        """See `UserVectors`."""
        return self.model.encode(items_NE, histories)

    def permuted(self, rng: np.random.Generator) -> "SequenceUsers":
        """Return itself: it reads the item vectors."""
        return self


@dataclass(frozen=True)
class HistoryRule:
    """User vectors by a weighted mean of the history's item vectors; the weights depend on age alone; K = 1.

    Attributes:
        weights_T: weights by age, the newest item first; items older than T are not read.
    """

    weights_T: npt.NDArray[np.float64]
    per_user: int = 1

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Nothing: it has no weights."""
        return {}

    @classmethod
    def of(cls, rule: Literal["mean", "last", "recency"], half_life: float, max_history: int) -> "HistoryRule":
        """Build the configured rule: equal weights, the newest item alone, or weights that halve every `half_life`."""
        age_T = np.arange(max_history)
        weights = {"mean": np.ones(max_history), "last": (age_T == 0) * 1.0, "recency": 0.5 ** (age_T / half_life)}
        return cls(weights[rule])

    def vectors(self, items_NE: Floats, user_rows: Rows, histories: Sequence[Rows]) -> Floats:
        """See `UserVectors`. Items without a vector are skipped; a history without any vector gives zeros."""
        known = [history[(items_NE[history] != 0).any(-1)] for history in histories]
        rows_BT, lengths_B = pad(known, len(self.weights_T))
        age_BT = lengths_B[:, None] - 1 - np.arange(rows_BT.shape[1])
        weights_BT = np.where(age_BT >= 0, self.weights_T[age_BT], 0.0)
        weights_BT /= np.maximum(weights_BT.sum(axis=1, keepdims=True), np.finfo(np.float64).tiny)
        users_BE: npt.NDArray[np.float64] = np.einsum("bt,bte->be", weights_BT, items_NE[rows_BT])
        return users_BE[:, None].astype(np.float32)

    def permuted(self, rng: np.random.Generator) -> "HistoryRule":
        """Return itself: it reads the item vectors."""
        return self


@dataclass(frozen=True)
class GraphUsers:
    """User vectors by the graph: the mean of the left singular vectors of the newest items, older ones decayed.

    The inner product of a user's and an item's vector is the decayed mean of the transitions to the item, up to what
    the SVD leaves out.

    Attributes:
        left_NE: left singular vectors by item row.
        rule: weights by age.
    """

    left_NE: Floats
    rule: HistoryRule
    per_user: int = 1

    @classmethod
    def of(cls, left_NE: Floats, newest: int, decay: float) -> "GraphUsers":
        """Build the rule over the left singular vectors."""
        return cls(left_NE, HistoryRule(np.power(decay, np.arange(newest), dtype=np.float64)))

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The left singular vectors."""
        return {LEFT: torch.from_numpy(self.left_NE)}

    def vectors(self, items_NE: Floats, user_rows: Rows, histories: Sequence[Rows]) -> Floats:
        """See `UserVectors`."""
        return self.rule.vectors(self.left_NE, user_rows, histories)

    def permuted(self, rng: np.random.Generator) -> "GraphUsers":
        """Return the user vectors of permuted items, a copy in memory."""
        return GraphUsers(self.left_NE[rng.permutation(len(self.left_NE))], self.rule)


@dataclass(frozen=True)
class UserTable:
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
        return UserTable(self.users_UKE[rng.permutation(len(self.users_UKE))])


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

    @property
    def scored_NE(self) -> Floats:
        """The item vectors to score with: an item without a vector is scored as the mean item."""
        return with_mean(self.items_NE)

    def ranker(self) -> VectorRanker:
        """Return the ID model as a ranker."""
        return ranker_of(self.items_NE, self.users)

    def permuted(self, seed: int) -> "Source":
        """Return the source with its item vectors permuted among items, and user vectors that follow (sanity check).

        Every vector stays the same, but says nothing about its item. The permuted table is a copy in memory.
        """
        rng = np.random.default_rng(seed)
        items_NE = self.items_NE[rng.permutation(len(self.items_NE))]
        digest = sha256_json([self.hash, "permuted", seed])
        return replace(self, items_NE=items_NE, users=self.users.permuted(rng), hash=digest)


def with_mean(items_NE: Floats) -> Floats:
    """Replace each zero vector by the mean of the other vectors."""
    known_N = (items_NE != 0).any(axis=1)
    if known_N.all() or not known_N.any():
        return items_NE
    return np.where(known_N[:, None], items_NE, items_NE[known_N].mean(axis=0))


def ranker_of(items_NE: Floats, users: UserVectors) -> VectorRanker:
    """Return a ranker over item vectors, of which some may be zero, and their user vectors."""
    lacking_N = (items_NE == 0).all(1)
    return VectorRanker(
        np.asarray(with_mean(items_NE)),
        lambda rows, histories: users.vectors(items_NE, rows, histories),
        lacking_N,
    )


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
        # Copy on write: the file cannot change, yet torch takes the array without a copy.
        items_NE = np.load(directory / ITEMS_FILE, mmap_mode="c", allow_pickle=False)
        settings = manifest["settings"]["users"]
        users = users_of(settings, recipe, _read_tensors(directory, settings["kind"]), str(directory))
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{directory} is damaged: {error}", f"rebuild it: rarec {KIND} CONFIG --fresh") from None
    return Source(manifest["name"], items_NE, users, manifest["hash"], manifest)


def _read_tensors(directory: Path, kind: str) -> dict[str, Tensor]:
    """Read what user vectors of a kind are made by; tables are memory-mapped, copy on write."""
    tables = {"table": (USERS, USERS_FILE), "graph": (LEFT, LEFT_FILE)}
    if kind == "rule":
        return {}
    if kind not in tables:
        return load_file(directory / MODEL_FILE)
    name, file = tables[kind]
    return {name: torch.from_numpy(np.load(directory / file, mmap_mode="c", allow_pickle=False))}


KINDS_OF_USERS = (*RECIPES, "mapped", "rule", "table", "graph")
"""Ways to make user vectors that come with rarec; any other name is of an ID model of the user's own."""


def users_of(
    settings: Mapping[str, Any], recipe: Recipe | None, tensors: Mapping[str, Tensor], where: str
) -> UserVectors:
    """Return the way to make user vectors that settings describe: a rule, a table, a graph, or an ID model.

    Args:
        settings: `kind` and its fields, as in a manifest.
        recipe: see `open_source`.
        tensors: the weights; see `UserVectors.tensors`.
        where: what the settings are of, for messages.
    """
    fields = {name: value for name, value in settings.items() if name != "kind"}
    match settings["kind"]:
        case "mapped":
            inner = {name.removeprefix(INNER): tensor for name, tensor in tensors.items() if name.startswith(INNER)}
            tables = (tensors[name].numpy() for name in (ITEMS, MATRIX, BIAS))
            return MappedUsers(users_of(settings["inner"], recipe, inner, where), *tables)
        case "rule":
            return HistoryRule.of(**fields)
        case "table":
            return UserTable(tensors[USERS].numpy())
        case "graph":
            return GraphUsers.of(tensors[LEFT].numpy(), **fields)
        case kind if kind in RECIPES:
            return SequenceUsers.of(RECIPES[kind](**fields), tensors)
        case kind if recipe is None or recipe.model_dump(mode="json") != fields:
            problem = f"{where} was made by the ID model {kind}, which the configuration does not name"
            raise UserError(problem, f"set ids.model: {kind} and its ids.settings, if you trust that code")
        case kind:
            return SequenceUsers.of(recipe, tensors)
