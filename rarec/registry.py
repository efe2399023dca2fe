"""Parts that a user adds by name: an ID model, a variant, a readout, an alignment map, a loss.

A field of the configuration names a part in one of three ways: one that rarec brings (`sasrec`), one that an installed
package offers as an entry point of the group `rarec.KIND`, or any object by its dotted name
(`my_package.models:Decay`). The last is looked up in the current directory as well. Code that the configuration does not name is never imported.
"""

import importlib
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from rarec.errors import UserError

KINDS = {
    "id_models": "ids.model",
    "variants": "train.variants",
    "readouts": "readout.module",
    "alignment_maps": "alignment.map",
    "losses": "loss.recommendation",
}
"""Kinds of parts, each with the field that names one. The entry points' group is `rarec.` and the kind."""


def find(kind: str, name: str, built_in: Mapping[str, Any]) -> Any:
    """Return the part of a name.

    Args:
        kind: one of `KINDS`.
        name: of a built-in part, of an entry point, or dotted: `package.module:Name`.
        built_in: what rarec brings, by name.

    Raises:
        UserError: there is no such part, or its module cannot be imported.
    """
    if name in built_in:
        return built_in[name]
    offered = {point.name: point for point in entry_points(group=f"rarec.{kind}")}
    with _importable_from_here():
        try:
            if name in offered:
                return offered[name].load()
            if ":" in name:
                module, _, attribute = name.partition(":")
                return getattr(importlib.import_module(module), attribute)
        except (ImportError, AttributeError) as error:
            remedy = "write it as package.module:Name; the module must be installed, or in the current directory"
            raise UserError(f"field `{KINDS[kind]}`: cannot load {name!r}: {error}", remedy) from None
    known = ", ".join([*built_in, *sorted(offered)])
    raise UserError(
        f"field `{KINDS[kind]}`: unknown name {name!r}", f"there are: {known}; or name your own: package:Name"
    )


@contextmanager
def _importable_from_here() -> Iterator[None]:
    """Let modules be imported from the current directory while it lasts, as `python -m` would."""
    here = str(Path.cwd())
    sys.path.append(here)
    try:
        yield
    finally:
        sys.path.remove(here)
