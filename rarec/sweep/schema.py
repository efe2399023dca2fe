"""The file of a sweep: strict, as a run's configuration is."""

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from rarec.config.section import NonNegative, Section

StageName = Literal["prepare", "ids", "shards", "train", "evaluate", "export", "report"]
OWN_FIELDS = ("seeds", "grid")
"""Fields of a run that are not the configuration's."""
Seeds = Annotated[list[NonNegative], Field(min_length=1)]


class Entry(Section):
    """One of `runs`: fields of the base that it overrides, dotted or nested, beside `seeds` and `grid`."""

    seeds: Seeds | None = None
    """Instead of the sweep's."""
    grid: dict[str, Annotated[list[Any], Field(min_length=1)]] = Field({})
    """Fields to lists of values: one run for each combination."""
    overrides: dict[str, Any] = Field({})
    """All the rest."""

    @model_validator(mode="before")
    @classmethod
    def _rest(cls, value: Any) -> Any:
        if value is None:  # a name with nothing behind it: the base as it is
            return {}
        if not isinstance(value, dict):
            return value
        rest = {str(name): each for name, each in value.items() if name not in OWN_FIELDS}
        return {**{name: value[name] for name in OWN_FIELDS if name in value}, "overrides": rest}


class SweepFile(Section):
    """A sweep as its file has it."""

    dir: str
    """Where all runs lie, relative to the current directory: each in NAME/seed-SEED, what they share in `shared`."""
    base: str
    """The run configuration that all start from, relative to this file."""
    seeds: Seeds = Field([17])
    stages: Annotated[list[StageName], Field(min_length=1)] = Field(["prepare", "ids", "shards", "train", "evaluate"])
    """What is made of each run, in the order of `rarec run`."""
    runs: Annotated[dict[str, Entry], Field(min_length=1)]
    """By name."""
