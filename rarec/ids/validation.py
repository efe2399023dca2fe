"""How well vectors rank the validation targets: to stop a training, and to tell the user.

Shape letters: U users, N items, K vectors a user, E dimension.
"""

import numpy as np
import numpy.typing as npt

from rarec.data.dataset import EvalTargets, PreparedDataset
from rarec.errors import UserError
from rarec.ids.source import with_mean
from rarec.ids.users import UserVectors
from rarec.ranking import metric_values, rank_targets
from rarec.ranking.metrics import SELECTION_CUTOFFS

LIMIT = 10_000
"""A fixed random subset of the validation users: beyond it, NDCG@100 is known to better than 0.003 anyway."""
CHUNK = 1024


class Validation:
    """The validation targets of a prepared dataset, ranked in the full catalogue, the user's earlier items excluded.

    Args:
        dataset: prepared.
        seed: of the subset.

    Raises:
        UserError: no user has a validation target.
    """

    def __init__(self, dataset: PreparedDataset, seed: int) -> None:
        self.dataset = dataset
        self.targets = dataset.targets("validation", LIMIT, seed)
        if len(self.targets.user_rows) == 0:
            raise UserError(
                f"{dataset.directory}: no user has a validation target",
                "lower prepare.min_user_interactions, or raise prepare.split.validation_share",
            )

    def __call__(self, items_NE: npt.NDArray[np.float32], users: UserVectors) -> dict[str, float]:
        """Mean HR, NDCG and MRR, and `n`, the number of users."""
        values = metric_values(ranks_of(self.targets, self.dataset, items_NE, users), SELECTION_CUTOFFS)
        return {"n": len(self.targets.user_rows), **{name: float(column.mean()) for name, column in values.items()}}


def ranks_of(
    targets: EvalTargets, dataset: PreparedDataset, items_NE: npt.NDArray[np.float32], users: UserVectors
) -> npt.NDArray[np.int64]:
    """Ranks (U,) of these targets in the full catalogue, the user's earlier items excluded."""
    ranks, scored_NE = [], with_mean(items_NE)
    for start in range(0, len(targets.user_rows), CHUNK):
        part = slice(start, start + CHUNK)
        places = zip(targets.user_rows[part].tolist(), targets.positions[part].tolist(), strict=True)
        histories = [dataset.history(user, position) for user, position in places]
        vectors_BKE = users.vectors(items_NE, targets.user_rows[part], histories)
        ranks.append(rank_targets(vectors_BKE, scored_NE, targets.item_rows[part], histories))
    return np.concatenate(ranks)
