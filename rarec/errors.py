"""The one error a user can cause: what is wrong, where, and what to do about it; and an end that is no error."""

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
    """A stage ended before its end as it was told to, and in good order."""
