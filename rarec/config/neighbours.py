"""The section `neighbours`: models that are counted or solved, not trained."""

from typing import Annotated, Any

from pydantic import AfterValidator, Field, ValidationInfo, field_validator

from rarec.config.method import NO_VARIANTS, VARIANTS, check_own_name
from rarec.config.registry import KINDS, find
from rarec.config.section import Count, Positive, Rate, Section, Share, Weight, check_settings

KIND = "neighbour_models"
REFIT = ".refit"
"""End of the name of a table that was counted again, with the validation interactions (`evaluate.refit`)."""
SOURCE = "source:"
"""Begins an entry that is the section of `sources` of that name, as neighbours by its vectors alone."""
_OF_SOURCE = "rarec.neighbours.semantic:OfSource"
BUILT_IN = tuple(KINDS[KIND].built_in)
_OWN_TITLES: dict[str, str] = {}
"""Titles of the models of the user's own that this process has met, by name."""


class NeighbourConfig(Section):
    """The settings that shape the table of a neighbour model: fields of the section `neighbours`, and of one's own."""

    top: Positive
    """Neighbours kept for each item."""


def _check_model(entry: str) -> str:
    """Validate an entry of `neighbours.models`, and return it."""
    if entry not in BUILT_IN:
        model, source = _class_of(entry), source_of(entry)
        name = _name_of(entry)
        check_own_name(entry, name, (*BUILT_IN, *VARIANTS, *NO_VARIANTS, "id", "new"))
        _OWN_TITLES[name] = f"{model.title} {source}" if source else model.title
    return entry


class Neighbours(Section):
    """Item-item tables of the nearest neighbours: the cheapest rivals of every model here, and parts of late fusion."""

    models: list[Annotated[str, AfterValidator(_check_model)]] = Field(
        default=["cooccurrence", "transition", "ease", "lexical", "semantic"]
    )
    """Tables to make; `[]` makes none. `cooccurrence` (item-kNN): bought by the same users; `transition`: bought soon
    after; `ease`: a linear item-item model in closed form; `lexical`: similar words in title and text (TF-IDF);
    `semantic`: titles and texts that the frozen language model reads alike; `source:NAME`: alike by the vectors of a
    section of `sources`; or ones of your own as `package.module:Name`."""
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
    semantic_items: Count = 100_000
    """The same for `semantic`, which compares each item's vector with those of all others."""
    longest: Positive = 200
    """Newest training interactions of a user that are counted: it bounds the pairs of a very active user."""
    settings: dict[str, Any] = Field(default={}, validate_default=True)
    """Settings of neighbour models of your own: the fields of their `Config` (docs/extend.md)."""

    @field_validator("models")
    @classmethod
    def _check_models(cls, given: list[str]) -> list[str]:
        if len(set(map(_name_of, given))) < len(given):
            raise ValueError("a model is named twice")
        return given

    @field_validator("settings")
    @classmethod
    def _check_settings(cls, given: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
        """Validate the settings by the `Config` of every neighbour model of the user's own."""
        if len(info.data) < len(cls.model_fields) - 1:  # another field is wrong
            return given
        configs = [_class_of(entry).Config for entry in info.data["models"] if entry not in BUILT_IN]
        known = {name for config in configs for name in config.model_fields} - set(cls.model_fields)
        check_settings(given, sorted(known))
        for config in configs:
            _validated(config, {**info.data, **given})
        return given

    @property
    def by_name(self) -> dict[str, str]:
        """The entries of `models` by the names of the models, in folders and results.

        The name of one of the user's own is the `Name` of `package.module:Name`; of a source, that of the source.
        """
        return {_name_of(entry): entry for entry in self.models}

    @property
    def sources(self) -> list[str]:
        """The sections of `sources` whose vectors make a table."""
        return [source for entry in self.models if (source := source_of(entry))]

    def class_of(self, name: str) -> Any:
        """Return the class of a model, a `NeighbourModel`, by its name."""
        return _class_of(self.by_name.get(name, name))

    def config_of(self, name: str) -> NeighbourConfig:
        """Return the settings that shape the table of a model, by its name."""
        return _validated(self.class_of(name).Config, {**dict(self), **self.settings})


def built_in(name: str) -> Any:
    """Return the class of a neighbour model that rarec brings, by its name; None for any other name."""
    return find(KIND, name) if name in BUILT_IN else None


def neighbour_titles() -> dict[str, str]:
    """Return the titles of all neighbour models that this process has met, by name."""
    return {name: find(KIND, name).title for name in BUILT_IN} | _OWN_TITLES


def source_of(entry: str) -> str | None:
    """Return the source whose vectors make the table of an entry of `neighbours.models`; None for any other entry."""
    return entry.removeprefix(SOURCE) if entry.startswith(SOURCE) else None


def _class_of(entry: str) -> Any:
    return find(KIND, _OF_SOURCE if source_of(entry) else entry)


def _name_of(entry: str) -> str:
    return entry.rpartition(":")[2]


def _validated(config: type[NeighbourConfig], given: dict[str, Any]) -> NeighbourConfig:
    """Return a `Config` of the fields that it has."""
    return config.model_validate({name: given[name] for name in config.model_fields if name in given})
