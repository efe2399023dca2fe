"""Rank the validation targets of a dataset by an ID model: after each epoch of a training, and of imported vectors.

Shape letters: B users, U items that they have had, N items, M items of this rank, K vectors a user, E dimension.
"""

import numpy as np
import numpy.typing as npt
import torch

from rarec.data.dataset import PreparedDataset
from rarec.errors import UserError
from rarec.ids.models import SequenceModel
from rarec.ids.source import Floats, UserVectors, ranker_of
from rarec.ids.table import ItemTable
from rarec.ranking.metrics import validation_metrics
from rarec.ranking.rank import EvalBatch, VectorScores, rank_scores

LIMIT = 10_000
"""Users, a fixed random subset: with this many, NDCG@100 is known to better than 0.003."""
CHUNK = 1024
"""Users ranked at a time. Another size may round scores differently."""


class Validation:
    """Rank the validation targets of a prepared dataset in the full catalogue.

    Args:
        dataset: prepared.
        seed: of the random subset of users.

    Raises:
        UserError: no user has a validation target.
    """

    def __init__(self, dataset: PreparedDataset, seed: int) -> None:
        self.batch = EvalBatch.of(dataset, dataset.targets("validation", LIMIT, seed))
        if len(self.batch.user_rows) == 0:
            remedy = "lower prepare.min_user_interactions, or raise prepare.split.validation_share"
            raise UserError(f"{dataset.directory}: no user has a validation target", remedy)

    def of_vectors(self, items_NE: Floats, users: UserVectors) -> dict[str, float]:
        """Return mean HR, NDCG and MRR of finished vectors, and `n`, the number of users."""
        return _figures(ranker_of(items_NE, users).ranks(self.batch, users_at_a_time=CHUNK))

    def of_training(self, encoder: SequenceModel, table: ItemTable) -> dict[str, float]:
        """Return the same of a model in training; each rank scores its own rows of the table."""
        chunks = list(self.batch.chunks(CHUNK))
        users = [_encoded(chunk, encoder, table) for chunk in chunks]
        table.fill_untrained(table.mean())  # as `ranker_of` scores them
        ranks = []
        for chunk, users_BKE in zip(chunks, users, strict=True):
            scores = VectorScores(users_BKE, table.rows_ME.detach())
            ranks.append(rank_scores(scores, chunk.targets, chunk.histories, first=table.first, world=table.world))
        table.fill_untrained(0.0)
        return _figures(np.concatenate(ranks))


def _encoded(chunk: EvalBatch, encoder: SequenceModel, table: ItemTable) -> torch.Tensor:
    """Return the vectors of a chunk's users, (B, K, E); each rank encodes its share of them."""
    world = table.world
    n_users = len(chunk.user_rows)
    read = [history[-encoder.max_history :] for history in chunk.histories]
    rows_U = np.unique(np.concatenate([*read, np.zeros(1, np.int64)]))
    vectors_UE = table.look_up(torch.from_numpy(rows_U).to(world.device)).numpy(force=True)
    own = [np.searchsorted(rows_U, history) for history in read[world.rank :: world.size]]
    users_bKE = torch.from_numpy(encoder.encode(vectors_UE, own)).to(world.device)
    return world.gather_rows(users_bKE, n_users)


def _figures(ranks: npt.NDArray[np.int64]) -> dict[str, float]:
    return {"n": len(ranks), **validation_metrics(ranks)}
