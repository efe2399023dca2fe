"""Parts of the user's own, by name: ID and neighbour models, variants, alignment maps, readouts and losses.

A field of the configuration names a part in one of three ways: one that rarec brings (`sasrec`), one that an installed
package offers as an entry point of the group `rarec.KIND`, or any object as `package.module:Name`. The last is looked
up in the current directory as well. Code that the configuration does not name is never imported (docs/extend.md).
"""

import importlib
import inspect
import sys
import traceback
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType
from typing import Any

from rarec.errors import nearest


@dataclass(frozen=True)
class Kind:
    """A kind of part.

    Attributes:
        field: the configuration's field that names one.
        base: the class that a part must be an instance or a subclass of, as `package.module:Name`.
        built_in: the parts that rarec brings, each as `package.module:Name`: they are imported when they are used.
        is_class: True if a part is a subclass of `base`, False if it is an instance.
    """

    field: str
    base: str
    built_in: Mapping[str, str]
    is_class: bool = True


KINDS = {
    "id_models": Kind("ids.model", "rarec.ids.models:SequenceModel", {}),
    "variants": Kind("train.variants", "rarec.config:Variant", {}, is_class=False),
    "alignment_maps": Kind(
        "alignment.map",
        "rarec.models.alignment:SourceAlignment",
        {"linear": "rarec.models.alignment:SourceAlignment"},
    ),
    "readouts": Kind(
        "readout.module", "rarec.models.towers:ReadoutModule", {"sum": "rarec.models.towers:ReadoutModule"}
    ),
    "neighbour_models": Kind(
        "neighbours.models",
        "rarec.neighbours.base:NeighbourModel",
        {
            "cooccurrence": "rarec.neighbours.counting:Cooccurrence",
            "transition": "rarec.neighbours.counting:Transition",
            "ease": "rarec.neighbours.ease:Ease",
            "lexical": "rarec.neighbours.lexical:Lexical",
            "semantic": "rarec.neighbours.semantic:Semantic",
        },
    ),
    "losses": Kind(
        "loss.recommendation",
        "collections.abc:Callable",
        {"softmax": "rarec.models.losses:sampled_softmax", "bpr": "rarec.models.losses:bpr"},
        is_class=False,
    ),
    "targets": Kind(
        "--to",
        "rarec.export:Target",
        {
            "vectors": "rarec.export.formats:Vectors",
            "faiss": "rarec.export.formats:Faiss",
            "onnx": "rarec.export.onnx:Onnx",
            "vllm": "rarec.export.vllm:Vllm",
            "peft": "rarec.export.formats:Peft",
            "hub": "rarec.export.formats:Hub",
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
    built_in = KINDS[kind].built_in
    place = name if ":" in name else built_in.get(name)
    if place is None:
        offered = {point.name: point.value for point in entry_points(group=f"rarec.{kind}")}
        if name not in offered:
            hint = nearest(name, [*known, *built_in, *sorted(offered)])
            raise ValueError(f"unknown name{hint}; write one of your own as package.module:Name")
        place = offered[name]
    part = _load(place)
    _check_type(KINDS[kind], name, part)
    return part


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


def _check_type(kind: Kind, name: str, part: Any) -> None:
    base = _load(kind.base)
    is_class = isinstance(part, type)
    fits = issubclass(part, base) if is_class else isinstance(part, base)
    if not fits or is_class != kind.is_class:
        shown = f"the class {part.__qualname__}" if is_class else f"of type {type(part).__name__}"
        wanted = f"{'a subclass' if kind.is_class else 'an instance'} of {kind.base.replace(':', '.')}"
        like = next(iter(kind.built_in.values()), "")
        raise ValueError(f"{name} is {shown}, not {wanted}{like and f', such as {like}'}: see docs/extend.md")
    if inspect.isabstract(part):
        lacking = ", ".join(sorted(part.__abstractmethods__))
        raise ValueError(f"{name} lacks {lacking}: define it, see docs/extend.md")


def _load(path: str) -> Any:
    name, _, attribute = path.partition(":")
    module = _import(name)
    if not hasattr(module, attribute):
        public = [each for each in vars(module) if not each.startswith("_")]
        where = getattr(module, "__file__", None) or "part of Python"
        raise ValueError(f"{name} ({where}) has no {attribute!r}{nearest(attribute, public, listed=False)}")
    return getattr(module, attribute)


def _import(name: str) -> ModuleType:
    """Import a module; it may also be in the current directory, which is searched last."""
    current = [str(Path.cwd())] if str(Path.cwd()) not in sys.path else []
    sys.path.extend(current)
    try:
        return importlib.import_module(name)
    except (Exception, SystemExit) as error:  # whatever the user's module does at its import
        frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "importlib" not in frame.filename]
        # The first frame is this one; the last is in a file of the user's.
        where = f" ({frames[-1].filename}, line {frames[-1].lineno})" if frames[1:] else ""
        remedy = "install it, put it into the current directory, or correct it"
        raise ValueError(f"cannot import {name}: {type(error).__name__}: {error}{where}; {remedy}") from error
    finally:
        for path in current:
            sys.path.remove(path)
