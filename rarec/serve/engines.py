"""What answers a service's requests: a bundle's model in PyTorch or in ONNX Runtime."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rarec.bundle.base_recommender import BaseRecommender
from rarec.bundle.recommended import History, Id, Recommended, Request
from rarec.errors import UserError
from rarec.export import AGAIN
from rarec.serve.settings import ServeSettings
from rarec.serve.telemetry import event
from rarec.storage.artefacts import Manifest, check_files, read_manifest

LONGEST = 20
"""Items of the longest history that an engine answers before it serves."""


class Answer(NamedTuple):
    """What one user gets: items, best first; how many ids of the history are unknown, and which ids of the rules."""

    items: list[Recommended]
    unknown: int
    unknown_in_rules: Sequence[Id] = ()


class Engine:
    """A bundle that answers.

    Args:
        recommender: over it.
        version: hash of its manifest.

    Attributes:
        row: name of the row that is served.
        ids: of the catalogue.
        titles: of the catalogue.
    """

    def __init__(self, recommender: BaseRecommender, version: str) -> None:
        self.recommender, self.version = recommender, version
        self.row, self.ids, self.titles = recommender.row, recommender.items, recommender.catalogue.titles

    def answer(self, requests: Sequence[Request]) -> list[Answer]:
        """Recommend. Raises `UserError` where a request's rules are wrong."""
        answers = self.recommender.answer(requests)
        return list(map(Answer, answers.items, answers.unknown, answers.unknown_in_rules))

    def vectors(self, histories: Sequence[History]) -> list[Any]:
        """Return query vectors, (B, F) or (B, K, F), as lists."""
        vectors: list[Any] = self.recommender.query_vectors(histories).tolist()
        return vectors


def load_engine(settings: ServeSettings, path: Path) -> Engine:
    """Open the engine of a bundle, say what it cannot answer, and warm it up.

    Raises:
        UserError: it is missing or damaged.
    """
    engine = (_load_onnx if settings.backend == "onnx" else _load_torch)(path, settings)
    for what, error in engine.recommender.missing.items():
        event("warning", f"{path}: {what} is not offered: {error.problem} -> {error.remedy}")
    lengths = [1 + user % LONGEST for user in range(settings.warm_up)]
    engine.answer([Request(engine.ids[:length]) for length in lengths])  # so that no request waits for memory
    return engine


def _load_torch(path: Path, settings: ServeSettings) -> Engine:
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
    return Engine(recommender, str(bundle.manifest["hash"]))


def _load_onnx(path: Path, settings: ServeSettings) -> Engine:
    """Open a folder whose model runs in ONNX Runtime: neither torch nor the language model's folder is needed."""
    manifest = check_served(path)
    try:
        from rarec.export.onnx_recommender import OnnxRecommender
    except ModuleNotFoundError as error:
        raise UserError(f"backend onnx: {error.name} is not installed", "pip install 'rarec[serving]'") from None
    row = str(manifest["settings"]["row"])
    recommender = OnnxRecommender(path, row, settings.threads or 0, settings.batch_size)
    return Engine(recommender, str(manifest["hash"]))


def check_served(folder: Path) -> Manifest:
    """Check the files of a folder; return its manifest.

    Raises:
        UserError: it is missing, damaged, or lacks a form.
    """
    try:
        manifest = read_manifest(folder, "served")
    except UserError as error:
        raise UserError(error.problem, AGAIN) from None
    check_files(folder, manifest, AGAIN)
    if not {"onnx", "faiss"} <= set(manifest["settings"]["formats"]):
        raise UserError(f"{folder} lacks ONNX or faiss", AGAIN)
    return manifest
