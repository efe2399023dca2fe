"""Reports of errors: of the machine, such as a full disk, and of the program, whose traceback goes into a file."""

import errno
import os
import re
import shlex
import sys
import tempfile
import traceback
from pathlib import Path

from rarec.console.inert import inert
from rarec.errors import in_short, without_password
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
"""The field that most of a stage's memory depends on, by stage; of the others it is `train.batch_size`."""
EXHAUSTED = {
    **dict.fromkeys(map(os.strerror, (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)), "free space on the disk of run.dir"),
    **dict.fromkeys(map(os.strerror, (errno.EMFILE, errno.ENFILE)), "allow more open files (ulimit -n 4096)"),
    **dict.fromkeys((os.strerror(errno.EAGAIN), "can't start new thread"), "free memory, or allow more processes"),
}
"""Messages of a full disk, a used-up quota, a file-size limit, limits of open files and threads; with what to do."""
STARVED = tuple(map(os.strerror, (errno.EMFILE, errno.ENFILE, errno.EAGAIN, errno.ENOMEM)))
"""Messages of a process that is out of memory, threads or open files. A file that it fails to read is not damaged."""
PATH_REMEDIES = {
    **dict.fromkeys(
        (errno.EACCES, errno.EROFS), "choose a run.dir that you may write to, and inputs that you may read"
    ),
    **dict.fromkeys(
        (errno.EEXIST, errno.ENOTDIR, errno.EISDIR),
        "another file has that name: move it away, or choose another run.dir",
    ),
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.ELOOP: "remove the link that leads back to itself, or name another path",
}
"""Remedies for errors of a path."""
_FIRST_LINE = "rarec ended with an error that it did not expect.\n"


def machine_trouble(error: BaseException) -> str | None:
    """Return the message for an error of the machine, such as a full disk; None for an error of the program."""
    path = str(error.filename) if isinstance(error, OSError) and error.filename else ""
    where = f": {path}" if path else ""
    for text, remedy in EXHAUSTED.items():  # in the text: safetensors, DuckDB and Arrow raise exceptions of their own
        if text in str(error):
            return f"{text}{where}\n  -> {remedy}, then run the same command to resume"
    if not isinstance(error, OSError):
        return None
    number = errno.EACCES if isinstance(error, PermissionError) else error.errno
    if number in PATH_REMEDIES:
        return in_short(f"{error.strerror or error}{where}") + f"\n  -> {PATH_REMEDIES[number]}"
    if error.strerror == os.strerror(errno.ENOENT) and not path:  # as `Path.cwd` raises it
        return "the current directory does not exist any more\n  -> cd to one that does"
    return None


def crash_line(
    error: BaseException, *, configuration: Path | None = None, directory: Path | None = None, rank: int = 0
) -> str:
    """Write the traceback of an error to a file; return the line for the user.

    Args:
        error: what was raised.
        configuration: the file of the run's configuration, if one was read.
        directory: `run.dir`, if it is known.
        rank: this process.
    """
    stage = _stage(error)
    reason = in_short(without_secrets(f"{type(error).__name__}: {error}".strip(": ").replace("\n", " ")))
    place = traceback.extract_tb(error.__traceback__)[-1]
    report = _report(error, stage, configuration)
    _free(error)  # what the failed frames hold: memory and open files, which writing needs
    path = _write(report, directory, f"crash-rank{rank}.txt" if rank else CRASH)
    raised = f"raised in {place.filename}, line {place.lineno}; its traceback cannot be written"
    return f"{stage}: {reason} ({f'the traceback is in {path}' if path else raised}) -> {_remedy(error, stage)}"


def without_secrets(text: str) -> str:
    """Return a text without the passwords of URLs, and without values of options that are named like secrets."""
    secret = r"(?i)((?:password|passwd|secret|token|api_?key)\s*[=:]\s*)[^\s&'\",]+"
    return re.sub(secret, r"\1...", without_password(text))


def _report(error: BaseException, stage: str, configuration: Path | None) -> str:
    head = f"version: {__version__}\ncommand: {shlex.join(sys.argv)}\nstage: {stage}\n"
    head += f"configuration: {configuration or 'none'}\n\n"
    return _FIRST_LINE + without_secrets(head + "".join(traceback.format_exception(error)))


def _stage(error: BaseException) -> str:
    """Return the label of the stage that was being made; the command if none was."""
    for frame, _ in reversed(list(traceback.walk_tb(error.__traceback__))):
        label = getattr(frame.f_locals.get("self"), "label", None)
        if frame.f_code.co_name == "make" and label:
            return str(label)
    program = Path(sys.argv[0]).name
    return " ".join(["rarec", *sys.argv[1:2]]) if program in ("rarec", "__main__.py") else program


def _free(error: BaseException | None) -> None:
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


def _write(report: str, directory: Path | None, name: str) -> Path | None:
    """Write the report to `run.dir`, or else to a temporary file; return the path, None if neither can be written."""
    temporary = Path(tempfile.gettempdir(), f"rarec-crash-{os.getpid()}.txt")
    for path in [directory / name, temporary] if directory else [temporary]:
        try:  # a file of the user's with that name stays
            own = not os.path.lexists(path) or path.read_text(errors="replace").startswith(_FIRST_LINE)
            if own and path.parent.is_dir():
                write_text(path, inert(report))
                return path
        except (OSError, ValueError):
            continue
    return None


def _remedy(error: BaseException, stage: str) -> str:
    out_of_memory = isinstance(error, MemoryError) or "OutOfMemory" in type(error).__name__
    if out_of_memory or os.strerror(errno.ENOMEM) in str(error):  # PyTorch and Arrow have errors of their own
        words = re.split(r"[ /.]", stage)
        fields = [field for name, field in MEMORY_FIELDS.items() if name in words] or ["train.batch_size"]
        return f"use a machine with more memory or lower {fields[0]}, then run the same command to resume"
    return "run the same command to resume; if it fails again, report it with that file"
