"""Paths inside installed packages."""

import importlib.util
from pathlib import Path

from rarec.errors import UserError

PACKAGE = "package:"


def resolve(path: str) -> str:
    """Turn `package:NAME/FILE` into the path of a file inside an installed package; other paths stay as they are.

    The package is found, not imported: none of its code runs.

    Raises:
        UserError: the package is not installed, or holds no such file.
    """
    if not path.startswith(PACKAGE):
        return path
    name, _, inside = path.removeprefix(PACKAGE).partition("/")
    spec = importlib.util.find_spec(name) if name.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        remedy = f"pip install --no-deps {name.replace('_', '-')}"
        raise UserError(f"{path}: the Python package {name!r} is not installed", remedy)
    found = Path(spec.submodule_search_locations[0]) / inside
    if not found.exists():
        raise UserError(f"{path}: the installed package {name!r} holds no {inside!r}", f"look in {found.parent}")
    return str(found)
