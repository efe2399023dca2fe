"""`rarec init`: a directory to start from, with a commented configuration and what launchers and SLURM need."""

from pathlib import Path

from rarec.config.shipped import shipped_files
from rarec.errors import UserError
from rarec.storage.files import write_text

EXAMPLES = ("demo", "mine", "beauty")
"""Configurations to start from: the demo, inside this package; your own log; the headline of the results."""
BESIDE = ("configs/accelerate/*.yaml", "configs/deepspeed/*.json", "launch/*.py", "launch/slurm/*")
"""Files that commands of the documentation name; they are copied to the same relative paths."""


def init(directory: Path, example: str) -> Path:
    """Write a configuration to start from, with what `accelerate launch` and `sbatch` need beside it.

    Args:
        directory: made if need be; files that are there already and equal are left alone.
        example: one of `EXAMPLES`.

    Returns:
        The configuration's path.

    Raises:
        UserError: there is no such example, or a file of that name is there and differs. Nothing is written then.
    """
    if example not in EXAMPLES:
        raise UserError(f"there is no example {example!r}", f"choose one of {', '.join(EXAMPLES)}")
    root = shipped_files()
    beside = [path for pattern in BESIDE for path in sorted(root.glob(pattern)) if path.is_file()]
    copies = {directory / path.relative_to(root): path for path in beside}
    copies[directory / f"{example}.yaml"] = root / "configs" / "runs" / f"{example}.yaml"
    texts = {to: path.read_text(encoding="utf-8") for to, path in copies.items()}
    for to, text in texts.items():
        if to.exists() and (to.is_dir() or to.read_text(errors="replace") != text):
            raise UserError(f"{to} is there already, with other content", "choose another directory")
    for to, text in texts.items():
        if not to.exists():
            write_text(to, text)
    return directory / f"{example}.yaml"
