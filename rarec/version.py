"""Which rarec this is: its version and, where it runs from a checkout, the commit."""

import subprocess
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import rarec

_CHECKOUT = Path(rarec.__file__).parents[1]


@cache
def source() -> Mapping[str, str | None]:
    """`version`, and `commit` with `-dirty` behind it where tracked files were changed; None outside a checkout.

    A process looks once.
    """
    return {"version": rarec.__version__, "commit": _commit()}


def _commit() -> str | None:
    if not (_CHECKOUT / ".git").exists():  # a repository further up would not be ours
        return None
    command = ["git", "-C", str(_CHECKOUT), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    return said.strip() or None
