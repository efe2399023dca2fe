"""The error that a user can cause, with its remedy; and the exception of a stage that was asked to stop."""

import difflib
from collections.abc import Iterable

EXIT_CODE = 2


class UserError(Exception):
    """Bad input. `rarec` prints it without a traceback and exits with code 2.

    Args:
        problem: what is wrong, naming the file and the row or field.
        remedy: what the user can do about it.
        shared: whether every rank raises it, so that the first alone should tell.
    """

    def __init__(self, problem: str, remedy: str = "", *, shared: bool = False) -> None:
        self.problem, self.remedy, self.shared = problem, remedy, shared
        super().__init__(f"{problem}\n  -> {remedy}" if remedy else problem)


class Stopped(Exception):
    """A signal asked a stage to stop, and it has saved what it needs to resume."""


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
