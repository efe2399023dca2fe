"""The folder of `rarec export BUNDLE --to onnx --to faiss`, checked before anything of it is loaded."""

from pathlib import Path

from rarec.artefacts import Manifest, check_files, read_manifest
from rarec.errors import UserError

AGAIN = "write it again: rarec export BUNDLE --to onnx --to faiss"


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
