"""The error that a user can cause, with its remedy; and the exceptions of a stage that was asked to stop."""

import difflib
import re
import signal
from collections.abc import Iterable, Sequence

EXIT_CODE = 2
LONGEST = 200
"""Characters of data that a message shows."""
_LONGEST_LINE = 1_000
_QUOTED = re.compile(rf"(?<!\w)(['\"`])((?:(?!\1)[^\n]){{{LONGEST + 1},}})\1(?!\w)")
_WORD = re.compile(r"[^\s/]{256,}")
"""Longer than any name of a file."""


class UserError(Exception):
    """Bad input. `rarec` prints it without a traceback and exits with code 2.

    Args:
        problem: what is wrong, naming the file and the row or field; a list for several problems, each a line.
        remedy: what the user can do about it.
        shared: whether every rank raises it, so that the first alone should print it.
    """

    def __init__(self, problem: str | Sequence[str], remedy: str = "", *, shared: bool = False) -> None:
        lines = [problem] if isinstance(problem, str) else problem
        self.problem = "\n".join(lines)
        self.remedy = remedy
        self.shared = shared
        message = in_short("\n".join(map(_in_one_line, lines)))
        super().__init__(f"{message}\n  -> {in_short(_in_one_line(remedy))}" if remedy else message)


class Stopped(Exception):
    """A signal asked a stage to stop, and it has saved what it needs to resume."""


class Terminated(BaseException):
    """A signal ends the command, wherever it is: what is half-written is removed on the way out.

    Args:
        number: of the signal.
    """

    def __init__(self, number: int) -> None:
        self.number = number
        super().__init__(f"stopped by {signal.Signals(number).name}")


def in_short(text: str) -> str:
    """Return a message in which long data are cut, each with a mark that says by how much.

    Cut are quoted texts and words; then lines, from the middle: the reason is at the start of a message, or at the end
    of a library's.
    """
    text = _QUOTED.sub(lambda match: f"{match[1]}{_cut(match[2])}{match[1]}", text)
    lines = [_cut(line, _LONGEST_LINE, LONGEST) for line in _WORD.sub(lambda match: _cut(match[0]), text).split("\n")]
    return "\n".join(lines)


def without_password(text: str) -> str:
    """Return a text in which URLs lose the password between user and host."""
    return re.sub(r"(://[^:/@\s'\"]+):[^\s'\"]+@", r"\1:...@", text)


def _in_one_line(text: str) -> str:
    return re.sub(r"\s*\n\s*", " ", text)


def _cut(text: str, longest: int = LONGEST, end: int = 0) -> str:
    """Return a text of at most so many characters, of which some are its end, and a mark."""
    left = len(text) - longest
    if left <= 0:
        return text
    return f"{text[: longest - end]}... ({left:,} more characters) {text[len(text) - end :]}".rstrip()


def nearest(name: str, names: Iterable[str], *, listed: bool = True) -> str:
    """Return a hint for a message about an unknown name: `; did you mean ...? (known here: ...)`.

    Args:
        name: the unknown name.
        names: the known ones.
        listed: whether to list them all.
    """
    names = list(names)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f"; did you mean `{close[0]}`?" if close else ""
    return f"{hint} (known here: {', '.join(names)})" if names and listed else hint
