"""What shards should hold: the selected training interactions, as the prepared dataset has them.

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
    """The key of the first sample outside the training part, or without a history before it; None if all are in."""
    lengths_S = dataset.train_length_U[user_rows_S]
    leaks = np.flatnonzero((positions_S < 1) | (positions_S >= lengths_S))
    return sample_key(int(user_rows_S[leaks[0]]), int(positions_S[leaks[0]])) if len(leaks) else None


@dataclass(frozen=True)
class Expected:
    """The training interactions that were selected, in the order of the shards.

    Attributes:
        dataset: that they come from.
        user_rows_S: of all shards' samples.
        positions_S: of the targets.
        per_shard: samples in a tar.
        spec: of every sample.
    """

    dataset: PreparedDataset
    user_rows_S: Int32
    positions_S: Int32
    per_shard: int
    spec: SampleSpec

    @property
    def shards(self) -> int:
        """How many there are."""
        return -(-len(self.user_rows_S) // self.per_shard)

    def keys(self, shard: int) -> list[str]:
        """Of a shard's samples."""
        part = slice(shard * self.per_shard, (shard + 1) * self.per_shard)
        rows = zip(self.user_rows_S[part].tolist(), self.positions_S[part].tolist(), strict=True)
        return [sample_key(*row) for row in rows]

    def first_unexpected(
        self, user_rows_S: npt.NDArray[np.integer], positions_S: npt.NDArray[np.integer]
    ) -> int | None:
        """The first of these samples, in the order of the shards, that was not selected for its place."""
        least = min(len(user_rows_S), len(self.user_rows_S))
        other_S = (user_rows_S[:least] != self.user_rows_S[:least]) | (positions_S[:least] != self.positions_S[:least])
        if other_S.any():
            return int(other_S.argmax())
        return least if len(user_rows_S) > least else None

    def mismatch(self, sample: Sample) -> str | None:
        """What of a sample is not so, if anything."""
        user, position, dataset = sample.user, sample.position, self.dataset
        if user >= dataset.n_users or not 1 <= position < dataset.train_length_U[user]:
            return "it is no training interaction of the dataset"
        if not np.array_equal(sample.history_H, dataset.history(user, position)):
            return f"field history.npy {self._beyond(sample.history_H)}is not the user's history"
        if sample.target != dataset.sequence(user)[position]:
            return f"field json: the target {self._beyond([sample.target])}is not the user's item at that position"
        return self.spec.mismatch(sample) or _endless(sample)

    def _beyond(self, item_rows: npt.ArrayLike) -> str:
        beyond = [row for row in np.ravel(item_rows).tolist() if not 0 <= row < self.dataset.n_items]
        return f"holds item row {beyond[0]}, of a catalogue of {self.dataset.n_items}, and " if beyond else ""


def _endless(sample: Sample) -> str | None:
    arrays = {"states": sample.states_LD, **{f"vector-{name}": array for name, array in sample.vectors.items()}}
    endless = [name for name, array in arrays.items() if not all_finite(array)]
    return f"field {endless[0]}.npy holds NaN or infinity" if endless else None
