"""A source: a named table of frozen vectors, one an item, and a way to make a user's.

Shape letters: N items, B users of a batch, K vectors a user, E dimension.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from rarec.artefacts import read_manifest, sha256_json
from rarec.config.ids import RECIPES
from rarec.errors import UserError
from rarec.ids.users import HistoryRule, SequenceUsers, UserTable, UserVectors

Floats = npt.NDArray[np.float32]
Rows = npt.NDArray[np.integer]

KIND = "ids"
ITEMS_FILE = "items.npy"


@dataclass(frozen=True)
class Source:
    """Frozen vectors of items and users. Score of a user and an item: the largest of K dot products.

    Attributes:
        name: as templates name its slots.
        items_NE: memory-mapped; row = the prepared dataset's item row. A zero vector says that there is none, as of an
            item that was not met in training.
        users: how user vectors are made.
        hash: of the artefact, and different for a permuted source.
        manifest: what made it and how well it ranks the validation users.
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
        """K: 1, or as many as an imported user table has."""
        return self.users.per_user

    def user_vectors(self, user_rows: Rows, histories: Sequence[Rows]) -> Floats:
        """User vectors, (B, K, E).

        Args:
            user_rows: (B,) rows of the prepared dataset.
            histories: for each of them, the item rows that are known, oldest first; may be empty.
        """
        return self.users.vectors(self.items_NE, user_rows, histories)

    @property
    def scored_NE(self) -> Floats:
        """Item vectors to score with: an item that has none is scored as the mean item."""
        return with_mean(self.items_NE)

    def permuted(self, seed: int) -> "Source":
        """A sanity check: item vectors permuted among items, and users made from the permuted ones (or permuted as well).

        Every vector stays what it was, but tells nothing of its item. The permuted table is a copy in memory.
        """
        rng = np.random.default_rng(seed)
        items_NE = self.items_NE[rng.permutation(len(self.items_NE))]
        digest = sha256_json([self.hash, "permuted", seed])
        return replace(self, items_NE=items_NE, users=self.users.permuted(rng), hash=digest)


def with_mean(items_NE: Floats) -> Floats:
    """The same, the mean of the others in place of each zero vector: such an item is scored as the mean item is."""
    there_N = (items_NE != 0).any(axis=1)
    if there_N.all() or not there_N.any():
        return items_NE
    return np.where(there_N[:, None], items_NE, items_NE[there_N].mean(axis=0))


def open_source(directory: Path) -> Source:
    """Open an artefact of kind `ids`; nothing is read but its header, until vectors are asked for.

    Raises:
        UserError: it is missing, of another kind or schema, or its files are torn.
    """
    manifest = read_manifest(directory, KIND)
    try:
        # Copy on write: the file cannot change, yet torch takes the array without a copy.
        items_NE = np.load(directory / ITEMS_FILE, mmap_mode="c", allow_pickle=False)
        users = OPENERS[manifest["settings"]["users"]["kind"]](directory, manifest["settings"]["users"])
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{directory} is torn: {error}", f"make it again: rarec {KIND} CONFIG --fresh") from None
    return Source(manifest["name"], items_NE, users, manifest["hash"], manifest)


def _open_model(directory: Path, settings: dict[str, Any]) -> UserVectors:
    return SequenceUsers.open(directory, RECIPES[settings["kind"]](**_but_kind(settings)))


def _but_kind(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if name != "kind"}


OPENERS: dict[str, Callable[[Path, dict[str, Any]], UserVectors]] = {
    **dict.fromkeys(RECIPES, _open_model),
    "rule": lambda directory, settings: HistoryRule.of(**_but_kind(settings)),
    "table": lambda directory, settings: UserTable.open(directory),
}
"""How each kind of user vectors, named in the manifest's settings, is read."""
