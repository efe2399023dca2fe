"""What every sample of some shards is made of.

Shape letters: L stored blocks, D hidden size, K vectors of a source, E their width, T tokens.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from rarec.data.shards.samples import Sample


@dataclass(frozen=True)
class Form:
    """Types, shapes and names that all samples share.

    Attributes:
        states: (L, D) of the text-only states; (L,) where the width is not known.
        state_dtype: their type.
        vectors: (K, E) of each source's vectors.
        marks: the sources whose slots the user prompt has.
        vocabulary: of the language model; None where it is not loaded.
    """

    states: tuple[int, ...]
    state_dtype: np.dtype[Any]
    vectors: Mapping[str, tuple[int, int]]
    marks: frozenset[str]
    vocabulary: int | None = None

    def unlike(self, sample: Sample) -> str | None:
        """What of a sample is otherwise, if anything."""
        states_LD, shapes = sample.states_LD, {name: array.shape for name, array in sample.vectors.items()}
        if states_LD.dtype != self.state_dtype or states_LD.shape[: len(self.states)] != self.states:
            return (
                f"field states.npy is {states_LD.dtype} of {states_LD.shape}, not {self.state_dtype} of {self.states}"
            )
        if shapes != self.vectors:
            return f"it has vectors of {shapes}, not of {self.vectors}"
        if sample.marks.keys() != self.marks:
            return f"field json marks slots of {sorted(sample.marks)}, not of {sorted(self.marks)}"
        return self._unlike_text(sample.tokens_T)

    def _unlike_text(self, tokens_T: npt.NDArray[np.int32]) -> str | None:
        if tokens_T.min(initial=0) < 0 or (self.vocabulary and tokens_T.max(initial=0) >= self.vocabulary):
            return f"field tokens.npy holds what is no token of a vocabulary of {self.vocabulary or 'any size'}"
        return None
