"""The expected content of the shards: the selected training interactions of the prepared dataset.

Shape letters: S samples.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from rarec.data.dataset import Int32, PreparedDataset
from rarec.data.shards.index import sample_key
from rarec.data.shards.samples import Sample, SampleSpec
from rarec.data.shards.tar_members import all_finite


def first_leak(dataset: PreparedDataset, user_rows_S: Int32, positions_S: Int32) -> str | None:
    """Return the key of the first sample outside the training part or without a history; None if there is none."""
    lengths_S = dataset.train_length_U[user_rows_S]
    leaks = np.flatnonzero((positions_S < 1) | (positions_S >= lengths_S))
    return sample_key(int(user_rows_S[leaks[0]]), int(positions_S[leaks[0]])) if len(leaks) else None


@dataclass(frozen=True)
class Expected:
    """The selected training interactions, in the order of the shards.

    Attributes:
        dataset: prepared dataset.
        user_rows_S: user rows of all samples.
        positions_S: positions of their targets.
        per_shard: number of samples per tar.
        spec: types and shapes of every sample.
    """

    dataset: PreparedDataset
    user_rows_S: Int32
    positions_S: Int32
    per_shard: int
    spec: SampleSpec

    @property
    def shards(self) -> int:
        """The number of shards."""
        return -(-len(self.user_rows_S) // self.per_shard)

    def keys(self, shard: int) -> list[str]:
        """Return the keys of a shard's samples."""
        part = slice(shard * self.per_shard, (shard + 1) * self.per_shard)
        rows = zip(self.user_rows_S[part].tolist(), self.positions_S[part].tolist(), strict=True)
        return [sample_key(*row) for row in rows]

    def first_unexpected(
        self, user_rows_S: npt.NDArray[np.integer], positions_S: npt.NDArray[np.integer]
    ) -> int | None:
        """Return the index of the first sample that was not selected for its place; None if all were."""
        common = min(len(user_rows_S), len(self.user_rows_S))
        other_S = (user_rows_S[:common] != self.user_rows_S[:common]) | (
            positions_S[:common] != self.positions_S[:common]
        )
        if other_S.any():
            return int(other_S.argmax())
        return common if len(user_rows_S) > common else None

    def mismatch(self, sample: Sample) -> str | None:
        """Return the first difference between a sample and the dataset, or None."""
        user, position, dataset = sample.user, sample.position, self.dataset
        if user >= dataset.n_users or not 1 <= position < dataset.train_length_U[user]:
            return "it is not a training interaction of the dataset"
        if not np.array_equal(sample.history_H, dataset.history(user, position)):
            return f"field history.npy {self._beyond_catalogue(sample.history_H)}is not the user's history"
        if sample.target != dataset.sequence(user)[position]:
            beyond = self._beyond_catalogue([sample.target])
            return f"field json: the target {beyond}is not the user's item at that position"
        return self.spec.mismatch(sample) or _non_finite(sample)

    def _beyond_catalogue(self, item_rows: npt.ArrayLike) -> str:
        beyond = [row for row in np.ravel(item_rows).tolist() if not 0 <= row < self.dataset.n_items]
        return f"has item row {beyond[0]}, beyond the catalogue of {self.dataset.n_items}, and " if beyond else ""


def _non_finite(sample: Sample) -> str | None:
    arrays = {"states": sample.states_LD, **{f"vector-{name}": array for name, array in sample.vectors.items()}}
    non_finite = [name for name, array in arrays.items() if not all_finite(array)]
    return f"field {non_finite[0]}.npy has NaN or infinity" if non_finite else None
