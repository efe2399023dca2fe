"""What a variant starts from, of the catalogue and of the training samples.

Shape letters: N items or users, E source dimension, K vectors of a user.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from rarec.data.shards.stream import SampleStream
from rarec.prompts import Encoded
from rarec.stages.context import Context

MOST_USERS = 8192
"""Samples of so many are looked at, where there is something to align."""
MOST_ITEMS = 65_536
"""At most so many items are."""
PASSED = 2048
"""So many of either are passed through the variant."""

Floats = npt.NDArray[np.floating]
Rows = npt.NDArray[np.integer]


@dataclass(frozen=True)
class Start:
    """What a variant starts from.

    Attributes:
        items_N: item rows: all of them, or a random part of a large catalogue.
        passed_N: some of them, in random order.
        targets_N: item rows of the targets of training samples.
        vectors: for each source their users' (N, K, E).
        prompts: their users', of as many as are passed through the variant.
    """

    items_N: Rows
    passed_N: Rows
    targets_N: Rows
    vectors: dict[str, Floats]
    prompts: list[Encoded]


def gather(context: Context, stream: SampleStream, users: int) -> Start:
    """Of so many users, at most; whatever batches will be made of their samples."""
    items, generator = context.dataset.n_items, np.random.default_rng([context.config.run.seed, *b"start"])
    items_N = np.arange(items)
    if items > MOST_ITEMS:
        items_N = np.sort(generator.choice(items, MOST_ITEMS, replace=False))
    passed_N = generator.permutation(items_N)[:PASSED]
    targets, prompts = list[int](), list[Encoded]()
    vectors: dict[str, list[Floats]] = {name: [] for name in context.sources}
    for number in stream.plan.first_samples(users):
        (sample,) = stream.read(np.array([number]))  # of which little is kept
        targets.append(sample.target)
        for name, vectors_KE in sample.vectors.items():
            vectors[name].append(vectors_KE.copy())
        if len(prompts) < PASSED:
            prompts.append(Encoded(sample.tokens_T.copy(), sample.marks))
    stacked = {name: np.stack(of) for name, of in vectors.items()}
    return Start(items_N, passed_N, np.array(targets), stacked, prompts)
