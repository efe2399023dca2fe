"""The base of all configuration sections, and types of numbers, names and places.

Numbers have upper bounds that no honest run meets: a slip of the finger is refused when the file is read, not after
hours, and not by a machine out of memory.
"""

import os
import re
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    SerializationInfo,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)

from rarec.errors import nearest, redacted_setting

Few = Annotated[int, Field(gt=0, le=1_000)]
"""Number of layers, heads, processes, things kept or shown."""
NonNegativeFew = Annotated[int, Field(ge=0, le=1_000)]
Positive = Annotated[int, Field(gt=0, le=100_000)]
"""Size of a vector, a batch or a history; number of epochs."""
Count = Annotated[int, Field(gt=0, le=100_000_000)]
"""Number of users, interactions, steps or tokens: as many as a log may have."""
NonNegative = Annotated[int, Field(ge=0, le=100_000_000)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Share = Annotated[float, Field(gt=0, le=1)]
Part = Annotated[float, Field(ge=0, lt=1)]
Rate = Annotated[float, Field(gt=0, le=1e12)]
Temperature = Annotated[float, Field(ge=1e-6, le=1e6)]
"""Divides scores, which stay finite in any type of weights."""
Weight = Annotated[float, Field(ge=0, le=1e12)]
SourceName = Annotated[str, Field(pattern="^[A-Za-z0-9_-]{1,40}$")]
"""A part of file names, and of the names in a tar, which are short and plain."""
ExternalName = Annotated[str, Field(pattern="^[A-Za-z0-9._-]{1,40}$")]
"""Part of a row's name, where `/` and `+` have meanings of their own."""


RESERVED = ("item_id", "title", "text", "train_count")
"""Columns of every catalogue in a bundle."""


def _column_name(name: str) -> str:
    if not name or name in RESERVED:
        raise ValueError(f"a bundle has {name!r} of its own: give the column another name" if name else "it is empty")
    return name


ColumnName = Annotated[str, AfterValidator(_column_name)]
"""Name of a further column of a catalogue."""


def _row_name(name: str) -> str:
    if not re.fullmatch(r"[^+/]+(\+id)?(\+cheap(\+learned)?)?", name):
        raise ValueError("write a variant, alone or with +id, +id+cheap or +id+cheap+learned")
    return name


RowName = Annotated[str, AfterValidator(_row_name)]
"""Name of a row of the results that can be deployed: a variant, alone or fused, such as `VARIANT+id+cheap`."""
Blocks = Annotated[list[NonNegativeFew], Field(min_length=1, max_length=1_000)]

_MAX_NAME, _MAX_PATH = 255, 4_000
"""Bytes of a file's name, and of a path to it, that file systems take; Linux's limit of 4,096 less a few names."""


def _check_location(given: str) -> str:
    """Refuse a text that no file system takes as a path."""
    if not given.strip():
        raise ValueError("it is empty: name a place")
    if any(ord(char) < ord(" ") for char in given):
        raise ValueError("a path holds a line break or a control character: choose another name")
    longest = max(len(os.fsencode(name)) for name in given.split("/"))
    if longest > _MAX_NAME or len(os.fsencode(given)) > _MAX_PATH:
        limits = f"a name in a path has at most {_MAX_NAME} bytes, and a path {_MAX_PATH}"
        raise ValueError(f"{limits}: shorten it")
    return given


def _check_folder(given: str) -> str:
    """Refuse what is no local folder and cannot become one."""
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]*:/", given):
        raise ValueError("a URL, but results are written to a local folder: name one, and copy it afterwards")
    if given.startswith("~"):
        full = os.path.expanduser(given)  # noqa: PTH111 - that of Path raises where it finds no such user
        raise ValueError(f"`~` has no meaning in a configuration: write the path out ({full})")
    if len(os.fsencode(Path(given).absolute())) > _MAX_PATH:
        raise ValueError(f"from the current directory it is longer than {_MAX_PATH} bytes: shorten it")
    existing = next((path for path in (Path(given), *Path(given).parents) if os.path.lexists(path)), None)
    if existing and not os.path.isdir(existing):  # noqa: PTH112 - that of Path raises in a loop of links
        raise ValueError(f"{existing} is not a folder: move it away, or choose another")
    return given


Location = Annotated[str, AfterValidator(_check_location)]
"""A path or URL of something that is read."""
Folder = Annotated[Location, AfterValidator(_check_folder)]
"""A local folder that is written, made if it does not exist."""


def check_device(given: str) -> str:
    """Validate the name of a device, and return it; whether the machine has it is another question."""
    if not re.fullmatch(r"auto|(cpu|cuda)(:\d+)?", given):
        raise ValueError("choose auto, cpu, cuda or cuda:N")
    return given


Device = Annotated[str, AfterValidator(check_device)]


def check_settings(given: Collection[str], known: Collection[str]) -> None:
    """Refuse a setting that no part of the user's own has, and name the nearest one."""
    for name in given:
        if name not in known:
            raise ValueError(f"unknown field `{name}`{nearest(name, known)}")


class Section(BaseModel):
    """A strict part of the configuration: unknown fields, wrong types, NaN and infinity are refused.

    Dumped as JSON, for a file, a manifest or a hash, it has no secrets; messages show none of those that it was given.
    """

    model_config = ConfigDict(
        extra="forbid", strict=True, frozen=True, use_attribute_docstrings=True, allow_inf_nan=False
    )

    @model_validator(mode="before")
    @classmethod
    def _hide_from_messages(cls, given: Any) -> Any:
        with suppress(RecursionError):  # which pydantic refuses by name
            redacted_setting(given)
        return given

    @model_serializer(mode="wrap")
    def _without_secrets(self, dump: SerializerFunctionWrapHandler, info: SerializationInfo) -> Any:
        return redacted_setting(dump(self)) if info.mode_is_json() else dump(self)
