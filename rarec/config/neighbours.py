"""The section `neighbours`: models that are counted or solved, not trained; and the section `graph`."""

from typing import Annotated, Literal

from pydantic import Field, field_validator

from rarec.config.section import Count, Positive, Rate, Section, Share, Weight

NeighbourModel = Literal["cooccurrence", "transition", "ease", "lexical"]


class Graph(Section):
    """A second source of vectors for slots, `{soft:graph}`: a truncated SVD of the graph of transitions.

    An item's vector describes the items that precede it. A user's vector describes what follows the newest items of the
    history: it is a mean over them, older ones decayed as in `neighbours`. Interactions that `ids.holdout` holds out
    are not counted.
    """

    dim: Positive = 64
    """Singular vectors that are kept."""


class Neighbours(Section):
    """Item-item tables of the nearest neighbours: the cheapest rivals of every model here, and parts of late fusion."""

    models: list[NeighbourModel] = Field(default=["cooccurrence", "transition", "ease", "lexical"])
    """Tables to make; `[]` makes none. `cooccurrence` (item-kNN): bought by the same users; `transition`: bought soon
    after; `ease`: a linear item-item model in closed form; `lexical`: similar words in title and text (TF-IDF)."""
    top: Positive = 200
    """Neighbours kept for each item."""
    newest: Positive = 10
    """Newest items of a history that score their neighbours."""
    decay: Share = 0.7
    """Factor on the score by each older item of the history."""
    steps: Annotated[int, Field(gt=0, le=20)] = 3
    """Largest distance of the two interactions of a transition."""
    step_decay: Share = 0.5
    """Factor on a transition by each further step."""
    shrinkage: Weight = 0.0
    """Number of users (of interactions, for transitions) added to a score's denominator: it holds rare items back."""
    ease_penalty: Rate = 200.0
    """Penalty of `ease` on squared weights, in users of an item."""
    ease_items: Count = 15_000
    """Largest catalogue for `ease`, which takes 16 bytes for each pair of items: 3.6 GB for this many. In a larger one
    it adds nothing."""
    lexical_items: Count = 500_000
    """Largest catalogue for `lexical`, which compares each item's words with those of all others: ten times the items
    take a hundred times as long. In a larger one it adds nothing."""
    longest: Positive = 200
    """Newest training interactions of a user that are counted: it bounds the pairs of a very active user."""

    @field_validator("models")
    @classmethod
    def _check_models(cls, given: list[NeighbourModel]) -> list[NeighbourModel]:
        if len(set(given)) < len(given):
            raise ValueError("a model is named twice")
        return given

    def largest(self, model: str) -> float:
        """Return the largest catalogue for a model."""
        return {"ease": self.ease_items, "lexical": self.lexical_items}.get(model, float("inf"))
