"""Parts of the user's own, by name: an ID model, a variant, an alignment map, a readout, a loss (docs/extend.md).

A field of the configuration names a part in one of three ways: one that rarec brings (`sasrec`), one that an installed
package offers as an entry point of the group `rarec.KIND`, or any object as `package.module:Name`. The last is looked
up in the current directory as well. Code that the configuration does not name is never imported.
"""

import importlib
import inspect
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from rarec.errors import nearest


@dataclass(frozen=True)
class Kind:
    """A kind of part.

    Attributes:
        field: the configuration's field that names one.
        wanted: what a part must be, in words.
        base: the class that it must be an instance or a subclass of, as `package.module:Name`.
        is_class: True if it is a subclass of `base`, False if it is an instance.
        built_in: the parts that rarec brings, each as `package.module:Name`: they are imported when they are used.
    """

    field: str
    wanted: str
    base: str
    is_class: bool
    built_in: Mapping[str, str]


KINDS = {
    "id_models": Kind(
        "ids.model", "a subclass of rarec.ids.models.SequenceModel", "rarec.ids.models:SequenceModel", True, {}
    ),
    "variants": Kind("train.variants", "an instance of rarec.config.Variant", "rarec.config:Variant", False, {}),
    "alignment_maps": Kind(
        "alignment.map",
        "a subclass of rarec.models.alignment.SourceAlignment",
        "rarec.models.alignment:SourceAlignment",
        True,
        {"linear": "rarec.models.alignment:SourceAlignment"},
    ),
    "readouts": Kind(
        "readout.module",
        "a subclass of rarec.models.towers.ReadoutModule",
        "rarec.models.towers:ReadoutModule",
        True,
        {"sum": "rarec.models.towers:ReadoutModule"},
    ),
    "losses": Kind(
        "loss.recommendation",
        "a function like rarec.models.losses.bpr",
        "collections.abc:Callable",
        False,
        {"softmax": "rarec.models.losses:sampled_softmax", "bpr": "rarec.models.losses:bpr"},
    ),
    "targets": Kind(
        "--to",
        "a subclass of rarec.export.Target",
        "rarec.export:Target",
        True,
        {
            "vectors": "rarec.export.tables:Vectors",
            "faiss": "rarec.export.tables:Faiss",
            "onnx": "rarec.export.onnx:Onnx",
            "vllm": "rarec.export.vllm:Vllm",
            "peft": "rarec.export.huggingface:Peft",
            "hub": "rarec.export.huggingface:Hub",
        },
    ),
}
"""Kinds of parts. The entry points' group is `rarec.` and the kind. ID models and variants that rarec brings are not
listed here: their sections and definitions are part of the configuration."""


def find(kind: str, name: str, known: Iterable[str] = ()) -> Any:
    """Return the part of a name.

    Args:
        kind: one of `KINDS`.
        name: of a built-in part, of an entry point, or `package.module:Name`.
        known: further names that the field takes, for the message.

    Raises:
        ValueError: there is no such part, its module cannot be imported, or it is not what the field needs. It becomes
            a line of a `UserError` that names the field, as every error of a configuration's field.
    """
    of = KINDS[kind]
    if name in of.built_in:
        return _load(of.built_in[name])
    if ":" in name:
        found = _load(name)
    else:
        offered = {point.name: f"{point.module}:{point.attr}" for point in entry_points(group=f"rarec.{kind}")}
        if name not in offered:
            hint = nearest(name, [*known, *of.built_in, *sorted(offered)])
            raise ValueError(f"unknown name{hint}; write one of your own as package.module:Name")
        found = _load(offered[name])
    _check_type(of, name, found)
    return found


def check(kind: str, known: Iterable[str] = ()) -> Callable[[str], str]:
    """Return a validator for a configuration's field that names a part: it finds the part, and returns the name.

    Built-in parts are not imported, so that a configuration which names no others is read without torch.
    """
    known = tuple(known)

    def validator(name: str) -> str:
        if name not in known and name not in KINDS[kind].built_in:
            find(kind, name, known)
        return name

    return validator


def _check_type(of: Kind, name: str, found: Any) -> None:
    base, is_class = _load(of.base), isinstance(found, type)
    fits = is_class and issubclass(found, base) if of.is_class else isinstance(found, base) and not is_class
    if not fits:
        shown = f"the class {found.__qualname__}" if is_class else f"of type {type(found).__name__}"
        raise ValueError(f"{name} is {shown}, not {of.wanted}: see docs/extend.md")
    if inspect.isabstract(found):
        lacking = ", ".join(sorted(found.__abstractmethods__))
        raise ValueError(f"{name} lacks {lacking}: define it, see docs/extend.md")


def _load(dotted: str) -> Any:
    name, _, attribute = dotted.partition(":")
    with _importable_from_here():
        try:
            module = importlib.import_module(name)
        except (Exception, SystemExit) as error:  # whatever the user's module does at its import
            remedy = "install it, put it into the current directory, or correct it"
            raise ValueError(f"cannot import {name}: {_described(error)}; {remedy}") from error
    if not hasattr(module, attribute):
        public = [each for each in vars(module) if not each.startswith("_")]
        where = getattr(module, "__file__", None) or "part of Python"
        raise ValueError(f"{name} ({where}) has no {attribute!r}{nearest(attribute, public, listed=False)}")
    return getattr(module, attribute)


def _described(error: BaseException) -> str:
    """Return type, message and, where it is in a file of the user's, the line of an error."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "importlib" not in frame.filename]
    where = f" ({frames[-1].filename}, line {frames[-1].lineno})" if frames[1:] else ""  # the first is `_load`
    return f"{type(error).__name__}: {error}{where}"


@contextmanager
def _importable_from_here() -> Iterator[None]:
    """Let modules be imported from the current directory, after all others, inside the context."""
    here = str(Path.cwd())
    if here in sys.path:
        yield
        return
    sys.path.append(here)
    try:
        yield
    finally:
        sys.path.remove(here)
