"""What an approximation of a bundle costs: the share of the exact lists that it finds, for the user's own users.

Shape letters: B users, N catalogue, K items returned, V vectors of a user, F size of the fused vectors.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from rarec.bundle.bundle import Bundle
from rarec.bundle.parts import Parts, sample_histories
from rarec.data.dataset import PreparedDataset
from rarec.errors import UserError
from rarec.ranking import EvalBatch
from rarec.storage.artefacts import MANIFEST, read_manifest

Rows = npt.NDArray[np.int64]
Float32 = npt.NDArray[np.float32]
USERS, K = 200, 10
"""Users, and items of each, whose lists are compared."""


@dataclass(frozen=True)
class ExactLists:
    """Users for whom approximate lists are compared with the exact ones.

    Attributes:
        parts: of the bundle.
        histories: item rows of each user, oldest first.
        users: who they are.
    """

    parts: Parts
    histories: list[Rows]
    users: str

    @classmethod
    def of(cls, parts: Parts) -> "ExactLists":
        """Return validation users of the run that the bundle is in; made-up ones, if it was moved from there."""
        dataset = _dataset(parts.bundle)
        if dataset is None or not (dataset.validation_U >= 0).any():
            return cls(parts, sample_histories(parts, USERS), f"{USERS} made-up users: the bundle is not in its run")
        row_of = {str(item): row for row, item in enumerate(parts.bundle.catalogue.ids.to_pylist())}
        batch = EvalBatch.of(dataset, dataset.targets("validation", USERS))
        ids = ([str(dataset.item_ids[int(row)]) for row in history] for history in batch.histories)
        rows = [np.array([row_of[item] for item in own if item in row_of], np.int64) for own in ids]
        return cls(parts, rows, f"{len(rows)} validation users")

    @cached_property
    def queries(self) -> Float32:
        """The users' exact vectors, (B, V, F)."""
        users = self.parts.dense.users(self.histories)
        return users.reshape(len(users), -1, users.shape[-1])

    def overlap(self, search: Callable[[Float32, int], Rows], queries: Float32 | None = None) -> float:
        """Return the share of the exact K best new items that are in the lists of an approximation.

        Items of equal score count alike.

        Args:
            search: returns the rows of the k items of the largest inner product with queries (V, F); -1 is none.
            queries: approximate vectors of the users, (B, V, F); the exact ones by default.
        """
        form, scores = self.parts.dense, self.parts.scored(self.histories)
        shares = []
        for user, query in enumerate(self.queries if queries is None else queries):
            history = self.histories[user]
            found = search(np.ascontiguousarray(query), min(len(form.items_NF), K + len(history)))
            ((rows_K, _),) = form.best(query[None], [history], [np.unique(found[found >= 0])], K)
            scores_N = scores.block(slice(user, user + 1))[0].numpy()
            scores_N[history] = -np.inf
            best_K = np.sort(scores_N)[::-1][:K]
            best_K = best_K[best_K > -np.inf]
            if len(best_K):
                least = best_K[-1] - 1e-5 * np.abs(best_K[-1])
                shares.append((scores_N[rows_K] >= least).sum() / len(best_K))
        return float(np.mean(shares))


def _dataset(bundle: Bundle) -> PreparedDataset | None:
    """Return the dataset that a bundle was made from, if it is where the run has it."""
    directory = bundle.directory.resolve().parent / "prepare"
    try:
        if not (directory / MANIFEST).exists() or read_manifest(directory, "prepare")["hash"] != _made_from(bundle):
            return None
        return PreparedDataset.open(directory)
    except (UserError, OSError):  # damaged, or without permission: it is only measured with
        return None


def _made_from(bundle: Bundle) -> object:
    return bundle.manifest["made_from"].get("prepare")
