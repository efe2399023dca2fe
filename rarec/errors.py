"""The one error a user can cause: what is wrong, where, and what to do about it."""

EXIT_CODE = 2


class UserError(Exception):
    """Bad input. `rarec` prints it without a traceback and exits with code 2.

    Args:
        problem: what is wrong, naming the file and the row or field.
        remedy: what the user can do about it.
    """

    def __init__(self, problem: str, remedy: str = "") -> None:
        self.problem, self.remedy = problem, remedy
        super().__init__(f"{problem}\n  -> {remedy}" if remedy else problem)
