"""One file with the whole state of a training, replaced atomically: safetensors, JSON in its header. No pickle."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from rarec.errors import UserError


def save_progress(path: Path, tensors: Mapping[str, torch.Tensor], state: Mapping[str, Any]) -> None:
    """Write the file aside, fsync it, and rename it into place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f"{path.name}.aside")
    save_file(dict(tensors), aside, {"state": json.dumps(state)})
    with aside.open("rb") as file:
        os.fsync(file.fileno())
    aside.replace(path)


def load_progress(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]] | None:
    """Tensors and state, or None where there is no file.

    Raises:
        UserError: the file is torn, or not ours.
    """
    if not path.exists():
        return None
    try:
        with safe_open(path, "pt") as file:
            state = json.loads(file.metadata()["state"])
            return {name: file.get_tensor(name) for name in file.keys()}, state  # noqa: SIM118 - not a mapping
    except (SafetensorError, TypeError, KeyError, json.JSONDecodeError) as error:
        raise UserError(f"{path} is not a training's progress: {error}", "delete it: training starts anew") from None
