"""The section `ids`: an ID model to train, or vectors to import."""

from typing import Any, ClassVar, Literal

from pydantic import model_validator

from rarec.config.section import Part, Positive, Rate, Section


class Recipe(Section):
    """What ID models trained here share: sampled softmax, the strong recipe of 2024-25, and when to stop.

    The dropout of each is the best that was tried on held-out interactions of Amazon Beauty (`RESULTS.md`).
    """

    dim: Positive = 64
    """Dimension of the item and user vectors."""
    max_history: Positive = 50
    """Number of newest interactions that the model reads."""
    dropout: Part = 0.2
    """Dropout rate."""
    negatives: Positive = 4096
    """Number of negatives, drawn uniformly from the items of the training part and shared by a batch; all of these
    items, once, if there are no more."""
    batch_size: Positive = 128
    """Windows of histories in a step."""
    lr: Rate = 1e-3
    """Learning rate."""
    epochs: Positive = 100
    """Largest number of passes over the training part."""
    patience: Positive = 10
    """Stop after this many epochs without a better validation NDCG@100."""

    kind: ClassVar[str]
    """The name of its section."""
    title: ClassVar[str]
    """For people."""

    @property
    def shape(self) -> dict[str, Any]:
        """What makes the model; the rest is about its training."""
        return self.model_dump(exclude={"negatives", "batch_size", "lr", "epochs", "patience"})

    @property
    def per_user(self) -> int:
        """Vectors that a user has."""
        return 1


class SasRec(Recipe):
    """Self-attention [D]; the paper's main ID model is ComiRec [N]."""

    kind, title = "sasrec", "SASRec"
    dropout: Part = 0.4
    """Dropout rate."""
    blocks: Positive = 1
    """Number of transformer blocks."""
    heads: Positive = 1
    """Attention heads in each block."""


class Gru4Rec(Recipe):
    """A recurrent net."""

    kind, title = "gru4rec", "GRU4Rec"
    dropout: Part = 0.6
    """Dropout rate."""
    hidden: Positive = 128
    """Hidden size of the recurrent layers."""
    layers: Positive = 1
    """Number of recurrent layers."""


class ComiRec(Recipe):
    """Several interests of a user, each a vector, by self-attention (ComiRec-SA)."""

    kind, title = "comirec", "ComiRec"
    dropout: Part = 0.5
    """Dropout rate."""
    interests: Positive = 4
    """Number of vectors of a user; each gets a slot of its own."""
    hidden: Positive = 256
    """Hidden size of the self-attention that finds the interests."""

    @property
    def per_user(self) -> int:
        """Its interests."""
        return self.interests


RECIPES: dict[str, type[Recipe]] = {recipe.kind: recipe for recipe in (SasRec, Gru4Rec, ComiRec)}


IMPORTED_FILES = ("items", "item_ids", "users", "user_ids")
"""Fields of an import that name files."""


class Import(Section):
    """Vectors made elsewhere."""

    items: str
    """Item vectors: `.npy` or `.safetensors` (one tensor, rows named by `item_ids`), or Parquet of id and vector."""
    item_ids: str | None = None
    """One id a row, in order: a text file, `.npy`, or Parquet (first column). Not for Parquet vectors."""
    missing: Literal["refuse", "fallback"] = "refuse"
    """For items without a vector: refuse, or treat them as new items, with the vector that `alignment.id_dropout`
    trains."""
    users: str | None = None
    """User vectors, in the same formats; without it they are made from the history by `user_rule`."""
    user_ids: str | None = None
    """One id a row of `users`."""
    user_rule: Literal["mean", "last", "recency"] = "recency"
    """How a user vector is made from the history's item vectors: their mean, the last one, or a mean whose weights
    halve every `half_life` interactions."""
    half_life: Rate = 5.0
    """Number of interactions after which a weight halves, for `recency`."""
    max_history: Positive = 50
    """Number of newest interactions that `user_rule` reads."""


class Ids(Section):
    """The ID embeddings, the method's source `id`: trained here, or imported."""

    model: Literal["sasrec", "gru4rec", "comirec", "import"] = "sasrec"
    """The ID model to train, or `import` for vectors made elsewhere."""
    sasrec: SasRec = SasRec()
    gru4rec: Gru4Rec = Gru4Rec()
    comirec: ComiRec = ComiRec()
    holdout: Part | None = None
    """Share of each user's newest training interactions, at least one, that the ID model in the slots does not see.
    The alignment trains on these alone, since a vector that has seen a target is over-confident about it [D]. A
    second ID model, trained on all, is the baseline and the partner in late fusion. Default: 0.1 if the ID model is
    trained here, 0 for imported vectors; set it if yours were trained without the newest interactions (this is not
    checked)."""
    imported: Import | None = None
    """Vectors made elsewhere, for `model: import`."""

    @model_validator(mode="after")
    def _import_is_named(self) -> "Ids":
        if self.model == "import" and self.imported is None:
            raise ValueError("`model: import` needs a section `imported` that names the vectors")
        return self

    @property
    def chosen(self) -> Recipe | Import:
        """The section that `model` names."""
        section: Recipe | Import = getattr(self, "imported" if self.model == "import" else self.model)
        return section

    @property
    def held_out(self) -> float:
        """The share that is held out."""
        usual = 0.1 if isinstance(self.chosen, Recipe) else 0.0
        return usual if self.holdout is None else self.holdout
