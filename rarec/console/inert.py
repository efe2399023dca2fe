"""Make output inert: data cannot steer a terminal, and a stream that is closed, broken or ASCII does not stop the run.

Titles, ids, paths and other libraries' messages may hold any character. `inert` is the one function that makes them
visible; it is called where output leaves: by the standard streams (`inert_streams`), by the console
(`rarec.console.progress.Console`), and on the whole page of the report.
"""

import os
import re
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO

from rarec.errors import UserError, in_short

_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""C0 but for tab and line feed, C1, separators of lines, overrides of the direction of text, lone surrogates."""


def inert(text: str) -> str:
    r"""Return a text whose control characters are escaped, such as `\x1b`; tabs and line feeds stay."""
    return _CONTROLS.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def in_one_line(text: str) -> str:
    """Return a text for a cell or a line of its own: tabs and line feeds are escaped as well."""
    return inert(text).replace("\n", "\\n").replace("\t", "\\t")


class OutputClosed(Exception):
    """The reader of standard output has left, as `head` does."""


class _Stream:
    """A standard stream that shows every character in some way.

    Args:
        stream: the stream below.
        fail: called with it and the error if it cannot be written.
        escape: makes texts inert. rich, which has controls of its own, writes to `rich_proxied_file` instead.
    """

    def __init__(
        self, stream: TextIO, fail: Callable[[TextIO, Exception], None], escape: Callable[[str], str] = inert
    ) -> None:
        self._stream, self._fail, self._escape = stream, fail, escape
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
        if escape is inert:
            self.rich_proxied_file = _Stream(stream, fail, str)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        self._try(lambda: self._stream.write(self._escape(text)))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        self.write("".join(lines))

    def flush(self) -> None:
        self._try(self._stream.flush)

    def _try(self, work: Callable[[], object]) -> None:
        try:
            work()
        except (OSError, ValueError) as error:
            self._fail(self._stream, error)


@contextmanager
def inert_streams() -> Iterator[None]:
    """Make standard output and standard error inert within the context, and open those that are closed.

    Results that cannot be written are an error; a message that nobody can read does not stop the run.
    """
    _open_closed()
    before = sys.stdin, sys.stdout, sys.stderr
    hooks = sys.unraisablehook, threading.excepthook
    sys.stdin = sys.stdin or open(0, closefd=False)  # noqa: SIM115 - a handle, for as long as the process lives
    sys.stdout = _Stream(sys.stdout or open(1, "w", closefd=False), _refuse)  # noqa: SIM115
    sys.stderr = _Stream(sys.stderr or open(2, "w", closefd=False), lambda *_: None)  # noqa: SIM115
    sys.unraisablehook = threading.excepthook = _print_ignored
    try:
        yield
    finally:
        sys.stdin, sys.stdout, sys.stderr = before
        sys.unraisablehook, threading.excepthook = hooks


def _refuse(stream: TextIO, error: Exception) -> None:
    with suppress(OSError, ValueError):  # what is left to write must not fail again when Python ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    if isinstance(error, BrokenPipeError):
        raise OutputClosed from None
    reason = getattr(error, "strerror", None) or str(error)
    remedy = "send it to a terminal, or to a file on a disk with space; what is finished stays"
    raise UserError(f"standard output cannot be written: {reason}", remedy) from None


def _print_ignored(error: Any) -> None:
    """Print one line about an error that ends nothing, where Python would print a traceback."""
    if error.exc_type is not SystemExit:
        where = getattr(error, "thread", None) or getattr(error, "object", None)
        line = f"ignored: {error.exc_type.__name__}: {error.exc_value} in {in_short(repr(where))}"
        print(in_short(line), file=sys.stderr)


def _open_closed() -> None:
    """Open closed standard streams: else the next file would get their number, and what is printed with it."""
    for number, mode in enumerate((os.O_RDONLY, os.O_RDONLY, os.O_WRONLY)):  # results must not vanish in silence
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, mode)  # it gets the lowest free number, which is this one
            os.set_inheritable(number, True)
