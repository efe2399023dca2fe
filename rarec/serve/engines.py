"""Open what answers a service's requests: a bundle's model in PyTorch or in ONNX Runtime."""

from pathlib import Path

from rarec.bundle.base_recommender import BaseRecommender
from rarec.bundle.recommended import Request
from rarec.errors import UserError
from rarec.export import AGAIN
from rarec.serve.settings import ServeSettings
from rarec.serve.telemetry import event
from rarec.storage.artefacts import Manifest, check_files, read_manifest

LONGEST = 20
"""Items of the longest history that a recommender answers before it serves."""


def load_recommender(settings: ServeSettings, path: Path) -> tuple[BaseRecommender, str]:
    """Open the recommender of a bundle, say what it cannot answer, and warm it up; return it and the bundle's version.

    Raises:
        UserError: it is missing or damaged.
    """
    recommender, version = (_load_onnx if settings.backend == "onnx" else _load_torch)(path, settings)
    if error := recommender.no_place:
        event("warning", f"{path}: place is not offered: {error.problem} -> {error.remedy}")
    lengths = [1 + user % LONGEST for user in range(settings.warm_up)]
    recommender.answer(
        [Request(recommender.items[:length]) for length in lengths]
    )  # so that no request waits for memory
    return recommender, version


def check(settings: ServeSettings, path: Path) -> None:
    """Check the files of a bundle without loading it.

    Raises:
        UserError: one is missing or damaged.
    """
    if settings.backend == "onnx":
        _check_served(path)
        return
    from rarec.bundle.bundle import Bundle

    Bundle.open(path, settings.trusted)


def _load_torch(path: Path, settings: ServeSettings) -> tuple[BaseRecommender, str]:
    """Open a bundle whose model runs in PyTorch."""
    import torch

    from rarec.bundle.bundle import Bundle
    from rarec.bundle.recommender import Recommender

    if settings.threads:
        torch.set_num_threads(settings.threads)
    bundle = Bundle.open(path, settings.trusted)
    recommender = Recommender(bundle, device=settings.device, llm=settings.llm, batch_size=settings.batch_size)
    if bundle.facts["model"]:
        model = recommender.parts.encoder.model
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.data = tensor.data.clone()  # a mapped file that is cut short on the disk would end the process
    return recommender, str(bundle.manifest["hash"])


def _load_onnx(path: Path, settings: ServeSettings) -> tuple[BaseRecommender, str]:
    """Open a folder whose model runs in ONNX Runtime: neither torch nor the language model's folder is needed."""
    manifest = _check_served(path)
    try:
        from rarec.export.onnx_recommender import OnnxRecommender
    except ModuleNotFoundError as error:
        raise UserError(f"backend onnx: {error.name} is not installed", "pip install 'rarec[serving]'") from None
    row = str(manifest["settings"]["row"])
    recommender = OnnxRecommender(path, row, settings.threads or 0, settings.batch_size)
    return recommender, str(manifest["hash"])


def _check_served(folder: Path) -> Manifest:
    """Check the files of a folder and its forms; return its manifest."""
    try:
        manifest = read_manifest(folder, "served")
    except UserError as error:
        raise UserError(error.problem, AGAIN) from None
    check_files(folder, manifest, AGAIN)
    if not {"onnx", "faiss"} <= set(manifest["settings"]["formats"]):
        raise UserError(f"{folder} lacks ONNX or faiss", AGAIN)
    return manifest
