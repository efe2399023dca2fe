"""The section `ids`: an ID model to train, or vectors to import."""

from collections.abc import Callable
from typing import Annotated, Any, ClassVar, Literal, cast

from pydantic import AfterValidator, Field, ValidationInfo, field_validator, model_validator

from rarec.config.registry import check, find
from rarec.config.section import Count, Few, Location, Part, Positive, Rate, Section, check_settings


class Recipe(Section):
    """An ID model trained here with sampled softmax and early stopping, the strong recipe of 2024-25.

    The default dropout of each model was the best on held-out interactions of Amazon Beauty (`docs/experiments.md`).
    The `Config` of an ID model of your own is a subclass: its fields are set in `ids.settings` (docs/extend.md).
    """

    dim: Positive = 64
    """Dimension of the item vectors."""
    max_history: Positive = 50
    """Number of newest interactions that the model reads."""
    dropout: Part = 0.2
    """Dropout probability in training."""
    negatives: Count = 4096
    """Negatives shared by a batch, drawn uniformly from the items that occur in training. If there are no more items
    than this, all are used."""
    batch_size: Positive = 128
    """Training sequences in a batch."""
    lr: Rate = 1e-3
    """Learning rate of Adam."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type in which the encoder and the scores are computed in training, for a device that multiplies it faster. The
    weights are float32."""
    epochs: Positive = 100
    """Maximum number of epochs."""
    patience: Count = 10
    """Stop after this many epochs without a better validation NDCG@100."""

    kind: ClassVar[str] = "settings"
    """Name of its configuration section."""
    title: ClassVar[str] = "ID model"
    """Name in messages."""
    builds: ClassVar[Callable[..., Any]]
    """The class of the model, a `SequenceModel`, which sets this when it is defined."""

    @property
    def shape(self) -> dict[str, Any]:
        """The fields that determine the model's architecture, without those of its training."""
        return self.model_dump(exclude={"negatives", "batch_size", "lr", "dtype", "epochs", "patience"})

    @property
    def per_user(self) -> int:
        """The number of vectors of a user."""
        return 1


class SasRecConfig(Recipe):
    """SASRec: self-attention over the history."""

    kind, title = "sasrec", "SASRec"
    dropout: Part = 0.4
    """Dropout probability in training."""
    blocks: Few = 1
    """Number of self-attention blocks."""
    heads: Few = 1
    """Number of attention heads; must divide `dim`."""


class Gru4RecConfig(Recipe):
    """GRU4Rec: a recurrent network over the history."""

    kind, title = "gru4rec", "GRU4Rec"
    dropout: Part = 0.6
    """Dropout probability in training."""
    hidden: Positive = 128
    """Size of the recurrent state."""
    layers: Few = 1
    """Number of recurrent layers."""


class ComiRecConfig(Recipe):
    """ComiRec-SA: several interest vectors for each user, by self-attention. The paper's main ID model."""

    kind, title = "comirec", "ComiRec"
    dropout: Part = 0.5
    """Dropout probability in training."""
    interests: Few = 4
    """Number of interest vectors of a user; each gets its own slots in the user prompt."""
    hidden: Positive = 256
    """Size of the attention's hidden layer."""

    @property
    def per_user(self) -> int:
        """The number of interests."""
        return self.interests


RECIPES: dict[str, type[Recipe]] = {recipe.kind: recipe for recipe in (SasRecConfig, Gru4RecConfig, ComiRecConfig)}


OLDER, FOLD = "id.older", "id.fold"
"""Names of the ID models that samples read, the second with a number: see `Ids.folds`. No source can have a dot."""
IMPORT = "import"
"""The value of `ids.model` for vectors from files."""
IMPORTED_FILES = ("items", "item_ids", "users", "user_ids")
"""Fields of an import that name files."""
_SECTIONS = {**{kind: kind for kind in RECIPES}, IMPORT: "imported"}
"""The section of each `ids.model` that rarec brings."""


class Import(Section):
    """Vectors imported from files."""

    items: Location
    """File of item vectors: `.npy`, `.safetensors` with one tensor, or `.parquet` with columns `id` and `vector`."""
    item_ids: Location | None = None
    """File with the item id of each row of `items`, in order: text, `.npy`, or Parquet (first column). Leave it out if
    `items` is Parquet, which has its own ids."""
    missing: Literal["refuse", "fallback"] = "refuse"
    """What to do about catalogue items without a vector: `refuse` stops with an error, `fallback` uses a vector that
    the alignment learns (see `alignment.id_dropout`)."""
    users: Location | None = None
    """File of user vectors, in the same formats. If left out, `user_rule` makes user vectors from the history."""
    user_ids: Location | None = None
    """File with the user id of each row of `users`, in the same formats as `item_ids`."""
    user_rule: Literal["mean", "last", "recency"] = "recency"
    """How to make a user vector from the item vectors of the history: their `mean`, the `last` one, or `recency`, a
    mean with weights that halve every `half_life` interactions."""
    half_life: Rate = 5.0
    """Half-life of the weights of `user_rule: recency`, in interactions."""
    max_history: Positive = 50
    """Number of newest interactions that `user_rule` reads."""


class Ids(Section):
    """The ID embeddings (source `id`): an ID model to train, or vectors to import."""

    model: Annotated[str, AfterValidator(check("id_models", _SECTIONS))] = "sasrec"
    """The ID model to train: `sasrec`, `gru4rec`, `comirec`, or one of your own as `package.module:Name`; `import` for
    vectors from files."""
    sasrec: SasRecConfig = SasRecConfig()
    gru4rec: Gru4RecConfig = Gru4RecConfig()
    comirec: ComiRecConfig = ComiRecConfig()
    holdout: Part | None = None
    """Share of each user's training interactions, the newest and at least one, from which training samples are taken.
    An ID model is over-confident about targets that it was trained on, so a sample reads the vectors of one that was
    not trained on these interactions of its user (see `folds`). Default: 0.5 for an ID model that is trained here, 0
    for imported vectors. Set it for imported vectors that were trained without these interactions. With 0 all training
    interactions are samples, and nothing is hidden from the ID model."""
    folds: Few = 4
    """Number of parts of the users that take turns (cross-fitting). An ID model is trained on what `holdout` leaves.
    From it one goes on to all interactions: the source `id`, of validation, test and serving. And for each part of the
    users one goes on to all but the held-out interactions of these users, whose samples read its vectors. With 1 the
    samples read the vectors of the first model. More parts take longer, and their models have seen more."""
    imported: Import | None = None
    """The vectors to import; needed for `model: import`."""
    settings: dict[str, Any] = Field(default={}, validate_default=True)
    """Settings of an ID model of your own: the fields of its `Config`, and those of `ids.sasrec` without `blocks` and
    `heads` (docs/extend.md)."""

    @field_validator("settings")
    @classmethod
    def _check_settings(cls, given: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
        """Validate the settings by the `Config` of the user's ID model, and fill in its defaults."""
        if "model" not in info.data:  # it is wrong itself
            return given
        model = info.data["model"]
        if model in _SECTIONS:
            if given:
                place = f"ids.{_SECTIONS[model]}"
                raise ValueError(f"they are for an ID model of your own; those of `model: {model}` are in {place}")
            return given
        config = _config_of(model)
        check_settings(given, config.model_fields)
        return config.model_validate(given).model_dump(mode="json")

    @model_validator(mode="after")
    def _check_imported(self) -> "Ids":
        if self.model == IMPORT and self.imported is None:
            raise ValueError("`model: import` needs a section `imported` with the files of the vectors")
        return self

    @property
    def chosen(self) -> Recipe | Import:
        """The settings of the model that `model` selects."""
        if self.model in _SECTIONS:
            return cast(Recipe | Import, getattr(self, _SECTIONS[self.model]))
        return _config_of(self.model).model_validate(self.settings)

    @property
    def recipe(self) -> Recipe | None:
        """The settings of the ID model that is trained here; None for imported vectors."""
        return self.chosen if isinstance(self.chosen, Recipe) else None

    @property
    def held_out(self) -> float:
        """The share of training interactions that is held out."""
        default = 0.5 if self.recipe else 0.0
        return default if self.holdout is None else self.holdout

    @property
    def for_samples(self) -> list[str]:
        """Names of the ID models that samples read, one for each part of the users; `id` where nothing is held out."""
        if not (self.held_out and self.recipe):
            return ["id"]
        return [f"{FOLD}{fold}" for fold in range(self.folds)] if self.folds > 1 else [OLDER]


def _config_of(model: str) -> type[Recipe]:
    """Return the `Config` of an ID model of the user's own."""
    return cast(type[Recipe], find("id_models", model).Config)
