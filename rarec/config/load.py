"""Read a configuration from YAML and overrides `a.b=c`; errors name the file, the field and the nearest name."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from rarec.config.plain_yaml import MAX_BYTES, Dumper, parse
from rarec.config.schema import RunConfig
from rarec.config.shipped import shipped_files
from rarec.errors import LONGEST, UserError, nearest

Model = TypeVar("Model", bound=BaseModel)
PRESET = "preset"
"""Field beside the sections: a file of fields, such as `llara_input` (configs/presets/)."""
_FIELDS = "correct it: docs/configuration.md has every field, with its type and meaning"
_EXAMPLES = "give a YAML file in UTF-8; rarec init DIR writes one to start from, and configs/runs/ has examples"


def load_config(path: str | Path, overrides: Iterable[str] = ()) -> RunConfig:
    """Read a run configuration.

    Args:
        path: a YAML file.
        overrides: `section.field=value` strings; the value is read as YAML.

    Raises:
        UserError: the file is missing or not YAML, or a field is unknown, missing or of the wrong type.
    """
    tree = above_preset(read_tree(path))
    given = dict[str, str]()
    for override in overrides:
        name, value = parse_override(override)
        set_field(tree, name, value)
        given[name] = f"override {_shown(override)}"
    return validated(RunConfig, tree, str(path), given)


def read_tree(path: str | Path) -> dict[str, Any]:
    """Read the fields of a configuration file, without validation.

    Raises:
        UserError: the file is missing or not YAML, or holds no fields.
    """
    tree = parse(_read_text(Path(path)), str(path), "correct it there")
    if not isinstance(tree, dict):
        raise UserError(f"{path} holds no fields", "see configs/runs/demo.yaml for an example")
    return tree


def _read_text(path: Path) -> str:
    """Read a configuration file; a pipe or a device, which may never end, is not opened."""
    try:
        if not path.is_file():
            raise ValueError("there is no file of that name (a directory, a pipe or a device is none)")
        if path.stat().st_size > MAX_BYTES:
            raise ValueError(f"it has more than {MAX_BYTES:,} bytes; data belong in other files")
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:  # of the encoding, or of a path that is too long or holds a zero byte
        raise UserError(f"configuration {_shown(str(path))} cannot be read: {error}", _EXAMPLES) from None


def parse_override(override: str) -> tuple[str, Any]:
    """Split `section.field=value` into the field's name and its value, read as YAML.

    Raises:
        UserError: it is not of that form.
    """
    name, separator, value = override.partition("=")
    if not separator or not name or not name.isprintable():
        problem = f"override {_shown(override)} is not of the form section.field=value"
        raise UserError(problem, "write it so: train.epochs=3")
    remedy = f"put a text with braces, colons or the like in quotes of its own: '{name}=\"...\"'"
    return name, parse(value, f"override {_shown(override)}", remedy)


def format_override(name: str, value: Any) -> str:
    """Return the override that sets a field to a value, without spaces; `parse_override` reads it back."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return f"{name}={text}".replace(" ", "\\u0020")  # a space can only be inside a quoted text


def above_preset(tree: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of a file with those of the preset that it names, where it does not set them itself.

    Raises:
        UserError: there is no such preset.
    """
    return _merged(_preset(tree.pop(PRESET)), tree) if PRESET in tree else tree


def set_field(tree: dict[str, Any], name: str, value: Any) -> None:
    """Set a field, given as `section.field`, in the fields of a file; `preset` sets all of the preset's fields.

    Raises:
        UserError: the name goes through a value as though it were a section, or there is no such preset.
    """
    if name == PRESET:
        merged = _merged(tree, _preset(value))
        tree.clear()
        tree.update(merged)
        return
    *parents, leaf = name.split(".")
    for parent in parents:
        tree = tree.setdefault(parent, {})
        if not isinstance(tree, dict):
            raise UserError(f"override of `{name}`: {parent} is a value, not a section", _FIELDS)
    tree[leaf] = value


def _preset(name: Any) -> dict[str, Any]:
    """Return the fields of a preset that rarec brings, by its name, or of a file, by its path."""
    known = {path.stem: path for path in sorted((shipped_files() / "configs" / "presets").glob("*.yaml"))}
    path = known.get(str(name), Path(str(name)))
    if path.suffix not in (".yaml", ".yml"):
        problem = f"field `{PRESET}`: there is no preset {_shown(name)}{nearest(str(name), known)}"
        raise UserError(problem, "name one of these, or the path of a YAML file")
    return read_tree(path)


def _merged(under: Any, over: Any) -> Any:
    """Return `over`, and what `under` has beside it, section by section."""
    if not isinstance(under, dict) or not isinstance(over, dict):
        return over
    return {**under, **{name: _merged(under.get(name), value) for name, value in over.items()}}


def validated(
    model: type[Model],
    tree: dict[str, Any],
    where: str,
    given: Mapping[str, str] | None = None,
    remedy: str = _FIELDS,
) -> Model:
    """Validate the fields of a file.

    Args:
        model: the strict type of the file.
        tree: as `read_tree` gives it.
        where: for messages.
        given: the same for fields that were not given there, by their names.
        remedy: for messages.

    Raises:
        UserError: a field is unknown, missing or of the wrong type; one line each.
    """
    try:
        return model.model_validate(tree)
    except ValidationError as error:
        lines = [f"{_place(detail, given or {}, where)}: {_explain(detail, model)}" for detail in error.errors()]
        raise UserError(lines, remedy) from None


def dump_config(config: BaseModel) -> str:
    """Return the resolved configuration as YAML, every default written out; `load_config` reads it back equal.

    URLs lose their passwords (see `Section`): it goes into reports, which are passed on.
    """
    tree = config.model_dump(mode="json")
    text: str = yaml.dump(tree, Dumper=Dumper, sort_keys=False, allow_unicode=True, width=110)
    return text


def _place(detail: ErrorDetails, given: Mapping[str, str], where: str) -> str:
    """Return where the field, or a section around it, was set: an override or the file."""
    names = [".".join(map(str, detail["loc"][:depth])) for depth in range(len(detail["loc"]), 0, -1)]
    return next((given[name] for name in names if name in given), where)


def _shown(value: object) -> str:
    """Return a value as Python writes it, but no more of it than a line holds."""
    text = repr(value)
    return text if len(text) <= LONGEST else text[:LONGEST] + "..."


def _explain(detail: ErrorDetails, model: type[BaseModel]) -> str:
    field = ".".join(str(part) for part in detail["loc"])[:LONGEST]
    if detail["type"] == "extra_forbidden":
        return f"unknown field `{field}`{_nearest(detail['loc'], model)}"
    if detail["type"] == "missing":
        return f"missing field `{field}`"
    message = detail["msg"].removeprefix("Value error, ")
    return f"field `{field}`: {message} (got {_shown(detail['input'])})" if field else message


def _nearest(location: tuple[int | str, ...], model: type[BaseModel]) -> str:
    """Return `; did you mean ...`, from the fields of the unknown field's section."""
    section: Any = model
    for part in location[:-1]:
        fields = getattr(section, "model_fields", {})
        section = fields[part].annotation if part in fields else None
    fields = getattr(section, "model_fields", {})
    return nearest(str(location[-1]), [field.alias or name for name, field in fields.items()])
