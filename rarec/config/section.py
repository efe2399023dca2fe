"""The base of all configuration sections, and types of numbers and names."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Positive = Annotated[int, Field(gt=0)]
NonNegative = Annotated[int, Field(ge=0)]
Share = Annotated[float, Field(gt=0, le=1)]
Part = Annotated[float, Field(ge=0, lt=1)]
Rate = Annotated[float, Field(gt=0)]
SourceName = Annotated[str, Field(pattern="^[A-Za-z0-9_-]{1,40}$")]
"""A part of file names, and of the names in a tar, which are short and plain."""
ExternalName = Annotated[str, Field(pattern="^[A-Za-z0-9._-]{1,40}$")]
"""Part of a row's name, where `/` and `+` have meanings of their own."""
Blocks = Annotated[list[NonNegative], Field(min_length=1)]


class Section(BaseModel):
    """A strict part of the configuration: unknown fields and wrong types are refused."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, use_attribute_docstrings=True)
