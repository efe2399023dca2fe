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
_LESS_MEMORY = (
    "use a machine with more memory, or lower prepare.memory (prepare, neighbours), batch_size or negatives of "
    "ids.MODEL (ids), prompt.max_history (shards), evaluate.batch_size (evaluate, export) or train.batch_size (train); "
    "then run the same command to resume"
)
EXHAUSTED = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), "free space on the disk of run.dir"),
    **dict.fromkeys((errno.EMFILE, errno.ENFILE), "allow more open files (ulimit -n 4096)"),
    errno.EAGAIN: "free memory, or allow more processes",
}
"""What to do about a full disk, a used-up quota, a file-size limit, limits of open files and of threads."""
_NO_MEMORY = os.strerror(errno.ENOMEM)
STARVED = (*map(os.strerror, (errno.EMFILE, errno.ENFILE, errno.EAGAIN)), _NO_MEMORY)
"""Messages of a process that is out of memory, threads or open files. A file that it fails to read is not damaged."""
_NAME_TAKEN = "another file has that name: move it away, or choose another run.dir"
PATH_REMEDIES = {
    **dict.fromkeys((errno.EACCES, errno.EROFS), "choose a run.dir and inputs for which you have the permissions"),
    **dict.fromkeys((errno.EEXIST, errno.ENOTDIR, errno.EISDIR), _NAME_TAKEN),
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.ELOOP: "remove the link that leads back to itself, or name another path",
}
"""What to do about an error of a path."""
_FIRST_LINE = "rarec ended with an error that it did not expect.\n"


def machine_trouble(error: BaseException) -> str | None:
    """Return the message for an error of the machine, such as a full disk; None for an error of the program."""
    path = str(error.filename) if isinstance(error, OSError) and error.filename else ""
    where = f": {path}" if path else ""
    text = str(error).replace("can't start new thread", os.strerror(errno.EAGAIN))
    for number, remedy in EXHAUSTED.items():  # in the text: safetensors, DuckDB and Arrow raise exceptions of their own
        if os.strerror(number) in text:
            return f"{os.strerror(number)}{where}\n  -> {remedy}, then run the same command to resume"
    if not isinstance(error, OSError):
        return None
    number = errno.EACCES if isinstance(error, PermissionError) else error.errno or 0
    if number in PATH_REMEDIES:
        return in_short(f"{error.strerror or error}{where}") + f"\n  -> {PATH_REMEDIES[number]}"
    if number == errno.ENOENT and not path:  # as `Path.cwd` raises it
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
    # PyTorch and Arrow have errors of their own for a lack of memory.
    in_need = isinstance(error, MemoryError) or "OutOfMemory" in type(error).__name__ or _NO_MEMORY in str(error)
    report = _report(error, stage, configuration)
    _free(error)  # what the failed frames hold: memory and open files, which writing needs
    path = _write(report, directory, f"crash-rank{rank}.txt" if rank else CRASH)
    where = f"the traceback is in {path}" if path else "no file can be written for its traceback"
    remedy = _LESS_MEMORY if in_need else "run the same command to resume; if it fails again, report it with that file"
    return f"{stage}: {reason} ({where}) -> {remedy}"


def without_secrets(text: str) -> str:
    """Return a text without the passwords of URLs, and without values of options that are named like secrets."""
    secret = r"(?i)((?:password|passwd|secret|token|api_?key)\s*[=:]\s*)[^\s&'\",]+"
    return re.sub(secret, r"\1...", without_password(text))


def _report(error: BaseException, stage: str, configuration: Path | None) -> str:
    head = (
        f"version: {__version__}\ncommand: {shlex.join(sys.argv)}\nstage: {stage}\nconfiguration: {configuration}\n\n"
    )
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
