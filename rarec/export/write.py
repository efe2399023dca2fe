"""Write a bundle in forms for other engines into one folder."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rarec.bundle.parts import Parts
from rarec.bundle.recommender import Recommender
from rarec.errors import UserError
from rarec.export.hub import upload, write_repository
from rarec.export.tables import FACTS, write_tables
from rarec.storage.artefacts import write_manifest
from rarec.storage.directories import new_directory
from rarec.storage.files import write_json

FORMATS = ("vectors", "faiss", "onnx", "vllm", "peft", "hub")
OWN = {"vllm", "peft", "hub"}
KIND = "served"


def write_formats(
    recommender: Recommender,
    formats: Sequence[str],
    directory: Path,
    *,
    index: str = "flat",
    int8: bool = False,
    push: str | None = None,
    say: Callable[[str], None],
) -> None:
    """Write forms of a bundle, each checked against it.

    Args:
        recommender: over the bundle; its model becomes float32 with `onnx`.
        formats: of `FORMATS`; `faiss` and `onnx` together come with a client that needs neither torch nor rarec.
        directory: to write to.
        index: kind of the index of `faiss`.
        int8: with `onnx`: the query in 8-bit integers as well.
        push: with `hub`: repository to upload to, `NAME/REPOSITORY`; it is made, and private, if it is not there.
        say: print one line to the user.

    Raises:
        UserError: a form is unknown, or not possible for this bundle; the folder is there already.
    """
    unknown = [name for name in formats if name not in FORMATS]
    if unknown:
        raise UserError(f"--to {unknown[0]} is unknown", f"choose from {', '.join(FORMATS)}")
    if push is not None and list(formats) != ["hub"]:
        raise UserError("--push uploads what --to hub writes", "give it with --to hub alone")
    if len(formats) > 1 and OWN & set(formats):
        names = ", ".join(sorted(OWN))
        raise UserError(f"{names} are folders of their own", "give one --to, and the others in other commands")
    if os.path.lexists(directory):
        raise UserError(f"{directory} is there already", "move it away, or name another folder: --out")
    bundle = recommender.bundle
    if "hub" in formats:
        write_repository(bundle, directory)
        if push is not None:
            say(upload(directory, push))
        return
    with new_directory(directory) as temporary:
        figures = _write(recommender.parts, formats, temporary, index, int8)
        settings = {"formats": sorted(formats), "row": bundle.facts["row"]}
        write_manifest(temporary, KIND, settings=settings, made_from={"bundle": bundle.manifest["hash"]}, **figures)
    for name, value in figures.items():
        say(f"{name}: {value}")


def _write(parts: Parts, formats: Sequence[str], temporary: Path, index: str, int8: bool) -> dict[str, Any]:
    if "peft" in formats:
        from rarec.export.adapters import write_adapter

        return write_adapter(parts, temporary)
    if "vllm" in formats:
        from rarec.export.vllm.export import write_vllm

        return write_vllm(parts, temporary)
    facts, figures = write_tables(parts, temporary), dict[str, Any]()
    if "faiss" in formats:
        from rarec.export.index import write_index

        figures |= write_index(parts, index, temporary)
    if "onnx" in formats:
        from rarec.export.onnx_files import write_onnx

        fields, found = write_onnx(parts, temporary, int8)
        write_json(temporary / FACTS, {**facts, **fields})
        figures |= found
    return figures
