"""The section `ids`: an ID model to train, or vectors to import."""

from typing import Any, ClassVar, Literal

from pydantic import model_validator

from rarec.config.section import Part, Positive, Rate, Section


class Recipe(Section):
    """What ID models trained here share: sampled softmax, the strong recipe of 2024-25, and when to stop.

    The dropout of each is the best that was tried on held-out interactions of Amazon Beauty (`RESULTS.md`).
    """

    dim: Positive = 64
    max_history: Positive = 50
    """The newest interactions it reads."""
    dropout: Part = 0.2
    negatives: Positive = 4096
    """Uniform negatives of the items met in training, shared by a batch; all of these, once, if they are no more."""
    batch_size: Positive = 128
    lr: Rate = 1e-3
    epochs: Positive = 100
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


class SasRecConfig(Recipe):
    """Self-attention (ours: the paper's main ID model is ComiRec)."""

    kind, title = "sasrec", "SASRec"
    dropout: Part = 0.4
    blocks: Positive = 1
    heads: Positive = 1


class Gru4RecConfig(Recipe):
    """A recurrent net."""

    kind, title = "gru4rec", "GRU4Rec"
    dropout: Part = 0.6
    hidden: Positive = 128
    layers: Positive = 1


class ComiRecConfig(Recipe):
    """Several interests of a user, each a vector, by self-attention (ComiRec-SA)."""

    kind, title = "comirec", "ComiRec"
    dropout: Part = 0.5
    interests: Positive = 4
    hidden: Positive = 256

    @property
    def per_user(self) -> int:
        """Its interests."""
        return self.interests


RECIPES: dict[str, type[Recipe]] = {recipe.kind: recipe for recipe in (SasRecConfig, Gru4RecConfig, ComiRecConfig)}


class Import(Section):
    """Vectors made elsewhere."""

    items: str
    """Item vectors: `.npy` or `.safetensors` (one tensor, rows named by `item_ids`), or Parquet of id and vector."""
    item_ids: str | None = None
    """One id a row, in order: a text file, `.npy`, or Parquet (first column). Not for Parquet vectors."""
    missing: Literal["refuse", "fallback"] = "refuse"
    """Items that the vectors do not name: refused, or slots of theirs hold what `alignment.id_dropout` learns for such."""
    users: str | None = None
    """User vectors, in the same formats; without it they are made from the history by `user_rule`."""
    user_ids: str | None = None
    """One id a row of `users`."""
    user_rule: Literal["mean", "last", "recency"] = "recency"
    """From the history's item vectors: their mean, the last one, or a mean with weights halving every `half_life`."""
    half_life: Rate = 5.0
    """In interactions, for `recency`."""
    max_history: Positive = 50
    """The newest interactions that the rule reads."""


class Ids(Section):
    """The ID embeddings, the method's source `id`: trained here, or imported."""

    model: Literal["sasrec", "gru4rec", "comirec", "import"] = "sasrec"
    sasrec: SasRecConfig = SasRecConfig()
    gru4rec: Gru4RecConfig = Gru4RecConfig()
    comirec: ComiRecConfig = ComiRecConfig()
    holdout: Part | None = None
    """Share of each user's training interactions, the newest and at least one, that the vectors in the slots are not
    trained on; the alignment is trained on these alone, since a vector that has seen a target is over-confident about
    it (ours). A second ID model, trained on all, is then the baseline and the partner in a fusion. By default a tenth
    where the ID model is trained here, and 0 for imported vectors: set it if they were trained so, they are taken at
    their word."""
    imported: Import | None = None

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
