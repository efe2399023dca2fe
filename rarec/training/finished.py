"""The end of a variant's training: `done.json`, and what identifies the weights that it names."""

from pathlib import Path
from typing import Any

from rarec.artefacts import read_manifest, sha256_json
from rarec.errors import UserError
from rarec.files import read_json

DONE = "done.json"


def read_done(directory: Path) -> dict[str, Any]:
    """What `done.json` of a variant says.

    Raises:
        UserError: it is not trained to its end, or the file is torn.
    """
    if not (directory / DONE).exists():
        raise UserError(f"{directory} holds no finished training", "go on with it: rarec train CONFIG")
    done = read_json(directory / DONE)
    if not isinstance(done, dict) or not isinstance(done.get("best_step"), int):
        raise UserError(f"{directory / DONE} names no best step", "train it again: rarec train CONFIG --fresh")
    return done


def training_hash(directory: Path) -> str:
    """Identifies a variant's finished training: what shaped it, where it ended, with what weights; not how long it took.

    Raises:
        UserError: it is not trained, or not to its end.
    """
    manifest = read_manifest(directory, "train")
    own = {name: value for name, value in read_done(directory).items() if name != "seconds"}
    return sha256_json([manifest["hash"], own])
