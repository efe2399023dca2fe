"""The version of rarec and, in a checkout, the commit."""

import subprocess
from collections.abc import Mapping
from functools import cache
from pathlib import Path

__version__ = "0.1.0"
_CHECKOUT = Path(__file__).parents[1]


@cache
def source() -> Mapping[str, str | None]:
    """Return `version`, and `commit` with `-dirty` if tracked files were changed; None outside a checkout.

    The first call of a process decides.
    """
    return {"version": __version__, "commit": _commit()}


def _commit() -> str | None:
    if not (_CHECKOUT / ".git").exists():  # a repository further up is another project's
        return None
    command = ["git", "-C", str(_CHECKOUT), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        described = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    return described.strip() or None
