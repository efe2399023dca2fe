"""YAML in, overrides `a.b=c`, one strict `RunConfig` out; errors name the file, the field and the nearest name."""

import difflib
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from rarec.config.schema import RunConfig
from rarec.errors import UserError


class _Loader(yaml.SafeLoader):
    """YAML as people expect it: 1e-3 is a number, and a key given twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.MarkedYAMLError(None, None, f"field {key!r} is given twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def _parse(text: str, where: str) -> Any:
    try:
        return yaml.load(text, _Loader)  # a SafeLoader: it builds plain values only
    except yaml.YAMLError as error:
        raise UserError(f"{where} is not valid YAML: {error}") from None


def load_config(path: str | Path, overrides: Iterable[str] = ()) -> RunConfig:
    """Read a run configuration.

    Args:
        path: a YAML file.
        overrides: `section.field=value` strings; the value is read as YAML.

    Raises:
        UserError: the file is missing or not YAML, or a field is unknown, missing or of the wrong type.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"configuration {path} does not exist", "the project's own lie in configs/runs/")
    tree = _parse(path.read_text(encoding="utf-8"), str(path))
    if not isinstance(tree, dict):
        raise UserError(f"{path} holds no fields", "see configs/runs/demo.yaml for an example")
    for override in overrides:
        _apply(tree, override)
    try:
        return RunConfig.model_validate(tree)
    except ValidationError as error:
        lines = [f"{path}: {_explain(detail)}" for detail in error.errors()]
        raise UserError("\n".join(lines)) from None


def dump_config(config: BaseModel) -> str:
    """The resolved configuration as YAML, every default written out; `load_config` reads it back equal.

    But for passwords in URLs: it goes into reports, which are passed on.
    """
    text: str = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=110)
    return without_password(text)


def without_password(text: str) -> str:
    """The same text; URLs lose the password between user and host."""
    return re.sub(r"(://[^:/@\s'\"]+):[^\s'\"]+@", r"\1:...@", text)


def _apply(tree: dict[str, Any], override: str) -> None:
    name, separator, value = override.partition("=")
    if not separator or not name:
        raise UserError(f"override {override!r} is not of the form section.field=value")
    *parents, leaf = name.split(".")
    for parent in parents:
        tree = tree.setdefault(parent, {})
        if not isinstance(tree, dict):
            raise UserError(f"override {override!r}: {parent} is a value, not a section")
    tree[leaf] = _parse(value, f"override {override!r}")


def _explain(detail: ErrorDetails) -> str:
    field = ".".join(str(part) for part in detail["loc"])
    if detail["type"] == "extra_forbidden":
        return f"unknown field `{field}`{_nearest(detail['loc'])}"
    if detail["type"] == "missing":
        return f"missing field `{field}`"
    message = detail["msg"].removeprefix("Value error, ")
    return f"field `{field}`: {message} (got {detail['input']!r})" if field else message


def _nearest(location: tuple[int | str, ...]) -> str:
    """`; did you mean ...`, from the fields of the section that the unknown field stands in."""
    section: Any = RunConfig
    for part in location[:-1]:
        fields = getattr(section, "model_fields", {})
        section = fields[part].annotation if part in fields else None
    names = list(getattr(section, "model_fields", {}))
    close = difflib.get_close_matches(str(location[-1]), names, n=1, cutoff=0.5)
    hint = f"; did you mean `{close[0]}`?" if close else ""
    return f"{hint} (known here: {', '.join(names)})" if names else hint
