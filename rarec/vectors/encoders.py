"""Encode pictures by a vision model, and texts by a language model; code that comes with a model is never run.

Both are models of transformers, which loads those of timm as well, in a folder or on the hub. Pickles are not read.

Shape letters: B batch, E dimension.
"""

import importlib.util
import os
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from transformers import AutoConfig, AutoImageProcessor, AutoModel

from rarec.config.method import Llm
from rarec.errors import UserError
from rarec.models.backbone import fingerprint
from rarec.models.encode import text_vectors
from rarec.models.language_model import load_model
from rarec.models.model_folder import check_folder, locate, read_model, read_with
from rarec.storage.artefacts import sha256_json
from rarec.vectors.make import Encode


def load_text_encoder(name: str, device: torch.device) -> tuple[Encode, str]:
    """Return how a model encodes texts, by the mean of its final states, and a hash of what the vectors depend on.

    Args:
        name: a decoder or encoder, as `llm.path`; the folder of a sentence-transformers model is one.
        device: where it runs.

    Raises:
        UserError: see `load_model`.
    """
    with tempfile.TemporaryDirectory(prefix="rarec-") as scratch:
        loaded = load_model(Llm(path=name), Path(scratch, "llm"), device=device.type)
    loaded.backbone.to(device)
    return partial(text_vectors, loaded), sha256_json(loaded.identity)


def load_picture_encoder(name: str, device: torch.device) -> tuple[Encode, str]:
    """Return how a model encodes pictures, and a hash of what the vectors depend on.

    The vectors are the image features of a model of pictures and texts, otherwise what the model pools its states to,
    or their mean where the checkpoint has no weights for that.

    Args:
        name: folder or hub name of a model of transformers or timm (`timm/NAME` on the hub).
        device: where it runs.

    Raises:
        UserError: the extra is not installed; the model cannot be read, or lacks weights.
    """
    for package in ("PIL", "timm", "torchvision"):
        if importlib.util.find_spec(package) is None:
            raise UserError(f"{package}, which reads pictures, is not installed", "pip install 'rarec[vectors]'")
    path = locate(name, Path(os.devnull))  # no GGUF file is a vision model
    if Path(path).is_dir():
        check_folder(Path(path), allow_pickle=False)
    settings = read_with(AutoConfig, name, path)
    for given in ("checkpoint_path", "num_classes"):  # a file that timm would read; what transformers gives it as well
        (getattr(settings, "model_args", None) or {}).pop(given, None)
    processor = read_with(AutoImageProcessor, name, path)
    model, info = read_model(AutoModel, name, path, config=settings, use_safetensors=True)
    pooled = not any("pooler." in key for key in info["missing_keys"])
    identity = sha256_json([fingerprint(model, settings), processor.to_json_string()])
    return partial(_encode, model.to(device), processor, pooled), identity


@torch.no_grad()
def _encode(model: Any, processor: Any, pooled: bool, paths: Sequence[Path]) -> npt.NDArray[np.float32]:
    with ThreadPoolExecutor() as threads:
        pixels = processor(images=list(threads.map(open_picture, paths)), return_tensors="pt")["pixel_values"]
    out = getattr(model, "get_image_features", model)(pixel_values=pixels.to(model.device))
    states = out["pooler_output"] if pooled and "pooler_output" in out else out["last_hidden_state"]
    if states.ndim > 2:  # (B, positions, E), or (B, E, height, width)
        states = states.flatten(2).mean(2) if states.ndim == 4 else states.mean(1)
    return np.asarray(states.float().cpu())


def open_picture(path: Path) -> Any:
    """Read a picture, turned as its camera was held.

    Raises:
        UserError: it cannot be read.
    """
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as picture:
            return ImageOps.exif_transpose(picture).convert("RGB")
    except Exception as error:  # each format has exceptions of its own
        problem = f"{path} cannot be read as a picture: {error}"
        raise UserError(problem, "replace or remove it; the same command resumes") from None
