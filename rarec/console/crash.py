"""The last resort: an error that nobody foresaw becomes one line, and a file with its traceback."""

import errno
import os
import re
import shlex
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

from rarec.console.inert import inert
from rarec.errors import in_short
from rarec.storage.files import write_text
from rarec.version import __version__

CRASH = "crash.txt"
"""File in `run.dir`; other ranks than 0 add their number."""
MEMORY_FIELDS = {
    "prepare": "prepare.memory",
    "ids": "batch_size or negatives of ids.MODEL",
    "neighbours": "prepare.memory",
    "shards": "prompt.max_history",
    "evaluate": "evaluate.batch_size",
    "export": "evaluate.batch_size",
}
"""The field that most of a stage's memory depends on, by stage."""
_FIRST_LINE = "rarec ended with an error that it did not expect.\n"


def crash_line(error: BaseException, config: str, directory: Path | None, rank: int) -> str:
    """Write the traceback of an error to a file; return the line for the user.

    Args:
        error: what was raised.
        config: the configuration's path; empty if none is read.
        directory: `run.dir`, if it is known.
        rank: this process.
    """
    stage = _stage(error) or _command()
    reason = in_short(without_secrets(f"{type(error).__name__}: {error}".strip(": ").replace("\n", " ")))
    place = _place(error)
    report = _report(error, stage, config)
    _free(error)  # what the failed frames hold: memory and open files, which writing needs
    written = _write(report, directory, f"-rank{rank}" if rank else "")
    where = f"the traceback is in {written}" if written else f"raised in {place}; its traceback cannot be written"
    return f"{stage}: {reason} ({where}) -> {_remedy(error, stage)}"


def _report(error: BaseException, stage: str, config: str) -> str:
    facts = {"version": __version__, "command": shlex.join(sys.argv), "stage": stage, "configuration": config or "none"}
    head = "".join(f"{name}: {value}\n" for name, value in facts.items())
    return _FIRST_LINE + without_secrets(f"{head}\n{''.join(traceback.format_exception(error))}")


def without_secrets(text: str) -> str:
    """Return a text without the passwords of URLs, and without values of options that are named like secrets."""
    try:
        from rarec.config.load import without_password
    except Exception:  # what failed may be that very import
        text = re.sub(r"://[^\s'\"]*", "://...", text)
    else:
        text = without_password(text)
    return re.sub(r"(?i)((?:password|passwd|secret|token|api_?key)\s*[=:]\s*)[^\s&'\",]+", r"\1...", text)


def _stage(error: BaseException) -> str:
    """Return the stage, with its part, that was being made; empty if none was."""
    made = [frame.f_locals.get("self") for frame in _frames(error) if frame.f_code.co_name == "make"]
    return next((str(one.label) for one in reversed(made) if hasattr(one, "label")), "")


def _command() -> str:
    name = Path(sys.argv[0]).name
    return " ".join(["rarec", *sys.argv[1:2]]) if name in ("rarec", "__main__.py") else name


def _frames(error: BaseException) -> Iterator[FrameType]:
    return (frame for frame, _ in traceback.walk_tb(error.__traceback__))


def _place(error: BaseException) -> str:
    last = list(_frames(error))[-1]
    return f"{last.f_code.co_filename}, line {last.f_lineno}, in {last.f_code.co_name}"


def _free(error: BaseException | None) -> None:
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


def _write(report: str, directory: Path | None, suffix: str) -> Path | None:
    """Write the report to `run.dir`, or else to a temporary file; return the path, None if neither can be written."""
    temporary = Path(tempfile.gettempdir(), f"rarec-crash-{os.getpid()}-{time.time_ns()}.txt")
    for path in ([directory / f"crash{suffix}.txt"] if directory else []) + [temporary]:
        try:
            if path.parent.is_dir() and not _is_foreign(path):
                write_text(path, inert(report))
                return path
        except (OSError, ValueError):
            continue
    return None


def _is_foreign(path: Path) -> bool:
    """Return whether something of the user's has that name."""
    if not path.exists() and not path.is_symlink():
        return False
    with path.open(encoding="utf-8", errors="replace") as file:
        return file.read(len(_FIRST_LINE)) != _FIRST_LINE


def _remedy(error: BaseException, stage: str) -> str:
    out_of_memory = isinstance(error, MemoryError) or "OutOfMemory" in type(error).__name__
    if out_of_memory or os.strerror(errno.ENOMEM) in str(error):  # PyTorch and Arrow have errors of their own
        field = next(
            (of for name, of in MEMORY_FIELDS.items() if name in re.split(r"[ /.]", stage)), "train.batch_size"
        )
        return f"use a machine with more memory or lower {field}, then run the same command to resume"
    return "run the same command to resume; if it fails again, report it with that file"
