"""A recommender over a bundle: histories of item ids in, ranked items out. It needs no run and no dataset.

Shape letters: B users, N catalogue, Z size of a scored vector, F size of the fused vectors.
"""

from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np
import torch

from rarec.bundle.base_recommender import BaseRecommender
from rarec.bundle.bundle import MODEL, Bundle, Float32, Rows
from rarec.bundle.parts import Parts
from rarec.bundle.recommended import History, Id, Recommendations
from rarec.bundle.rules import Plan, check_k
from rarec.config.section import check_device
from rarec.distributed.world import World
from rarec.errors import UserError
from rarec.ranking.rank import USERS_AT_A_TIME, best_scores


class Recommender(BaseRecommender):
    """Ranks the items of a bundle for any history. Several threads may share one.

    ```python
    import rarec

    recommender = rarec.load("runs/demo/bundle")
    recommender.recommend([["22423", "85123A"]], k=10)[0]
    ```

    Args:
        bundle: an opened bundle.
        device: where the language model runs: `cpu`, `cuda`, `cuda:1` or so, or `auto` for a GPU if there is one.
        llm: path or name of the language model, if it is elsewhere than at the export.
        batch_size: prompts in a forward pass; by default as many as in the evaluation.

    Attributes:
        items: ids of the catalogue.
        rules: what narrows, mixes and fills the lists.
    """

    def __init__(
        self, bundle: Bundle, *, device: str = "auto", llm: str | None = None, batch_size: int | None = None
    ) -> None:
        self.bundle = bundle
        self.parts = Parts(bundle, llm=llm, batch_size=batch_size, world=World(device=_device(device)))
        super().__init__(self.parts.row, bundle.catalogue, bundle.date)
        self.text_vectors = self.parts.model.text_vectors

    def best(self, plans: Sequence[Plan]) -> list[tuple[Rows, Float32]]:
        """See `BaseRecommender`."""
        best: list[tuple[Rows, Float32]] = []
        for start in range(0, len(plans), USERS_AT_A_TIME):
            chunk = plans[start : start + USERS_AT_A_TIME]
            scores = self.parts.scored([plan.history for plan in chunk])
            most = max(plan.candidates for plan in chunk)
            found = best_scores(scores, most, [plan.seen for plan in chunk], [plan.excluded_N for plan in chunk])
            best += [
                (rows_C[: plan.candidates], own[: plan.candidates])
                for plan, rows_C, own in zip(chunk, *found, strict=True)
            ]
        return best

    def queries(self, histories: Sequence[Rows]) -> Float32:
        """See `BaseRecommender`."""
        return self.parts.ranker.users(histories)

    def encode_new(self, title: str, text: str) -> Float32:
        """See `BaseRecommender`."""
        sources = {name: np.zeros((1, source.dim), np.float32) for name, source in self.parts.encoder.sources.items()}
        encoded: Float32 = self.parts.model.encode_new([title], [text], sources)[0]
        return encoded

    def user_vectors(self, histories: Sequence[History]) -> Float32:
        """Return the variant's user vectors, (B, Z).

        Raises:
            UserError: there is no history, or this row has no language model.
        """
        rows, _ = self.rules.rows(histories, empty=False)
        return self.parts.encoder.users(np.zeros(len(rows), np.int64), rows)

    def rerank(self, histories: Sequence[History], candidates: Sequence[Sequence[Id]], k: int = 10) -> Recommendations:
        """Return each user's k best items among candidates, such as a vector index finds, and the neighbours.

        With the k + len(history) best by inner product as candidates, these are the k best of the catalogue. A learned
        order takes the 200 + len(history) best.

        Args:
            histories: ids of items, oldest first.
            candidates: ids of items, for each user.
            k: number of items.

        Raises:
            UserError: there is no history, or not one list of candidates for each; k is not positive; a candidate is
                not in the catalogue, or this row has no vectors.
        """
        check_k(k)
        rows, unknown = self.rules.rows(histories, empty=False)
        among = [self._known(items) for items in candidates]
        if len(among) != len(rows):
            raise UserError(f"{len(rows)} histories, but {len(among)} lists of candidates", "give one for each history")
        best = self.parts.dense.best(self.parts.dense.users(rows), rows, among, k)
        return Recommendations([self._listed(*user) for user in best], unknown)

    def item_vectors(self, items: Sequence[Id] | None = None) -> Float32:
        """Return the variant's item vectors, (N, Z), of some items or of all."""
        vectors = self.bundle.vectors[MODEL]
        return vectors if items is None else vectors[self._known(items)]


def _device(wanted: str) -> torch.device:
    """Return the device for `auto`, `cpu`, `cuda` or `cuda:N`."""
    available = torch.cuda.is_available()
    try:
        check_device(wanted)
        if wanted.startswith("cuda") and not available:
            raise ValueError("there is no GPU that PyTorch can use: choose auto or cpu")
    except ValueError as error:
        raise UserError(f"device {wanted!r} cannot be used", str(error)) from None
    return torch.device(wanted if wanted != "auto" else "cuda" if available else "cpu")


def load(
    bundle: str | Path, *, device: str = "auto", llm: str | None = None, trusted: Collection[str] = ()
) -> Recommender:
    """Open a bundle that `rarec export` has written.

    Args:
        bundle: its folder.
        device: see `Recommender`.
        llm: see `Recommender`.
        trusted: parts of your own that it may import, as `package.module:Name`.

    Raises:
        UserError: it is missing or damaged, or of another version.
    """
    return Recommender(Bundle.open(Path(bundle), trusted), device=device, llm=llm)
