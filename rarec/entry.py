"""The entry that the command line and the scripts in `launch/` share: start a directory, open a run, run a stage of it.

Its own imports are light, so that an error while all else is imported ends in order.
"""

import argparse
import os
from collections.abc import Iterable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from rarec.console.last_resort import crash_context, guarded
from rarec.errors import UserError
from rarec.storage.directories import is_own
from rarec.storage.files import open_file, write_text

if TYPE_CHECKING:
    from rarec.stages.run import Run

EXAMPLES = ("demo", "mine", "beauty")
"""Configurations to start from: the demo, inside this package; your own log; the headline of the results."""
BESIDE = ("configs/accelerate/*.yaml", "configs/deepspeed/*.json", "launch/*.py", "launch/slurm/*")
"""Files that commands of the documentation name; they are copied to the same relative paths."""


def write_example(directory: Path, example: str) -> Path:
    """Write a configuration to start from, with what `accelerate launch` and `sbatch` need beside it.

    Args:
        directory: made if need be; files that are there already and equal are left alone.
        example: one of `EXAMPLES`.

    Returns:
        The configuration's path.

    Raises:
        UserError: there is no such example, or something else of a file's name is there. Nothing is written then.
    """
    from rarec.config.shipped import shipped_files

    if example not in EXAMPLES:
        raise UserError(f"there is no example {example!r}", f"choose one of {', '.join(EXAMPLES)}")
    root = shipped_files()
    beside = [path for pattern in BESIDE for path in sorted(root.glob(pattern)) if path.is_file()]
    copies = {directory / path.relative_to(root): path for path in beside}
    copies[directory / f"{example}.yaml"] = root / "configs" / "runs" / f"{example}.yaml"
    texts = {to: path.read_text(encoding="utf-8") for to, path in copies.items()}
    for to, text in texts.items():
        _check_free(to, directory, text)
    with ExitStack() as undo:  # on an error, nothing is left
        for to, text in texts.items():
            if not os.path.lexists(to):
                missing = [folder for folder in to.parents if not os.path.lexists(folder)]
                for path in (*missing[::-1], to):
                    undo.callback(_remove, path)
                write_text(to, text)
        undo.pop_all()
    return directory / f"{example}.yaml"


def _check_free(to: Path, directory: Path, text: str) -> None:
    """Refuse to write a file through a link, or in place of anything but an equal file."""
    folders = to.parents[: len(to.relative_to(directory).parts) - 1]
    for path, name in ((to, to.name), *((folder, f"{folder.name}/") for folder in folders)):
        if os.path.lexists(path) and not is_own(path, name):
            kind = "folder" if path in folders else "file"
            raise UserError(f"{path} is there already, and is no {kind}", "choose another directory")
    if os.path.lexists(to):
        with open_file(to) as file:
            if file.read() != text.encode():
                raise UserError(f"{to} is there already, with other content", "choose another directory")


def _remove(path: Path) -> None:
    with suppress(OSError):
        path.rmdir() if path.is_dir() else path.unlink()


def open_run(config: Path | str, overrides: Iterable[str] | None = None) -> "Run":
    """Read the configuration and return its run."""
    from rarec.console.progress import say
    from rarec.stages.run import Run

    crash_context["configuration"] = Path(config)
    try:
        run = Run(config, overrides or [], say=say)
    except UserError as error:
        error.shared = True  # every rank reads the same file
        raise
    crash_context["directory"] = run.root
    return run


def run_stage(
    name: str,
    config: Path | str,
    overrides: Iterable[str] | None = None,
    fresh: bool = False,
    part: str | None = None,
) -> "Run":
    """Run one stage, or one part of it, on this rank, which watches over the others; return the run."""
    from rarec.distributed.watchdog import watched

    run = open_run(config, overrides)
    with watched(run.world):
        run.make(name, part, fresh=fresh)
    return run


def launch(stage: str) -> None:
    """Run a stage as the scripts in `launch/` do, on every rank."""
    guarded(lambda: _launch(stage))


def _launch(stage: str) -> None:
    parser = _Parser(description=f"Run the stage `{stage}`, as `rarec {stage}` does, on every rank.")
    parser.add_argument("--config", required=True, type=Path, help="run configuration, YAML")
    parser.add_argument(
        "--fresh", action="store_true", help="rebuild it; what is there stays until its replacement is whole"
    )
    parser.add_argument("overrides", nargs="*", metavar="section.field=value")
    arguments = parser.parse_args()
    run_stage(stage, arguments.config, arguments.overrides, arguments.fresh)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(message, f"see {self.prog} --help", shared=True)
