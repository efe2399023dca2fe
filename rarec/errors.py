"""The error that a user can cause, with its remedy; and the exceptions of a stage that was asked to stop."""

import difflib
import re
import signal
from collections.abc import Iterable, Sequence
from typing import Any

EXIT_CODE = 2
LONGEST = 200
"""Characters of data that a message shows."""
_LONGEST_LINE = 1_000
_QUOTED = re.compile(rf"(?<!\w)(['\"`])((?:(?!\1)[^\n]){{{LONGEST + 1},}})\1(?!\w)")
_WORD = re.compile(r"[^\s/]{256,}")
"""Longer than any name of a file."""
HIDDEN = "..."
_SHORT = 7
_SECRET = (
    r"(?:[\w.-]*(?:password|passwd|passphrase|pwd|secret|token|credentials?|signature|jwt|authorization|"
    r"(?:api|access|account|private|secret|shared)[._-]?key(?:[._-]?id)?)|(?:[\w.-]*[._-])?(?:sig|auth|pass|pw))"
)
"""Names of secrets: of options, of a URL's query and fragment, and of Spark's and cloud stores' settings."""
_QUOTED_VALUE = r"'(?:\\.|''|[^'\\])*'|\"(?:\\.|\"\"|[^\"\\])*\"|\{[^}]*\}"
_PORT = r"\s|\d{1,5}(?:[/?#:,;)'\"\s]|$)"
_USER = re.compile(rf"(:/{{1,2}}[^\s/?#:\[]*:)(?!{re.escape(HIDDEN)}@)(?:(?!{_PORT}).+|\S+)@")
"""A URL's user and password: up to the last `@`, since a password may hold spaces, quotes, `@`, `/` and `#`."""
_LONE_TOKEN = re.compile(rf"(?i)(https?:/{{1,2}})(?!{re.escape(HIDDEN)}@)[^\s/?#@:]+@(?!\S+:{re.escape(HIDDEN)}@)")
_OPTION = re.compile(
    rf"(?i)(?<![\w.-])(?!token: \[)({_SECRET}['\"]?\s*[=:]\s*)"
    rf"(?:{_QUOTED_VALUE}|(?:(?:Bearer|Basic)\s+)?[^\s&;]*[^\s&;,:'\"`)\]}}])"
)
"""A secret in a message, of which nothing says where it ends but a space or a sign; `token: [CLS]` is none."""
_WHOLE_USER = re.compile(rf"(?s)(:/{{1,2}}[^/?#:\[]*:)(?!{re.escape(HIDDEN)}@).+@")
_WHOLE_OPTION = re.compile(rf"(?is)(?<![\w.-])({_SECRET}\s*=\s*)(?:{_QUOTED_VALUE})?.*?(?=[&;]|#[\w-]+=|\s+\w+\s*=|$)")
_CONNECTION = re.compile(r"(?s).*://|[\w ]+=")
_WHOLE = {_WHOLE_USER: rf"\1{HIDDEN}@", _LONE_TOKEN: rf"\1{HIDDEN}@", _WHOLE_OPTION: rf"\1{HIDDEN}"}
"""Where secrets are in a text that is a URL or a connection string and nothing else, and what is shown instead."""
_known_secrets: dict[str, str] = {}
"""What messages show in place of secrets of configurations that were read: there, it is known where each ends."""


class UserError(Exception):
    """Bad input. `rarec` prints it without a traceback and exits with code 2.

    Args:
        problem: what is wrong, naming the file and the row or field; a list for several problems, each a line.
        remedy: what the user can do about it.
        shared: whether every rank raises it, so that the first alone should print it.
    """

    def __init__(self, problem: str | Sequence[str], remedy: str = "", *, shared: bool = False) -> None:
        lines = [problem] if isinstance(problem, str) else problem
        self.problem = redacted("\n".join(lines))
        self.remedy = redacted(remedy)
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
    """Return a message without secrets, in which long data are cut, each with a mark that says by how much.

    Cut are quoted texts and words; then lines, from the middle: the reason is at the start of a message, or at the end
    of a library's.
    """
    text = _QUOTED.sub(lambda match: f"{match[1]}{_cut(match[2])}{match[1]}", redacted(text))
    lines = [_cut(line, _LONGEST_LINE, LONGEST) for line in _WORD.sub(lambda match: _cut(match[0]), text).split("\n")]
    return "\n".join(lines)


def redacted(text: str) -> str:
    """Return a message without passwords, tokens and signatures of URLs, connection strings and options."""
    for secret, shown in list(_known_secrets.items()):
        text = text.replace(secret, shown)
    text = _LONE_TOKEN.sub(rf"\1{HIDDEN}@", _USER.sub(rf"\1{HIDDEN}@", text))
    return _OPTION.sub(rf"\1{HIDDEN}", text)


def redacted_setting(value: Any, name: str = "") -> Any:
    """Return a value of a configuration without secrets, and keep these out of all messages from now on.

    Args:
        value: a text, which as a whole may be a URL or a connection string, or lists and dictionaries of values.
        name: of the option.
    """
    if isinstance(value, dict):
        return {key: redacted_setting(part, str(key)) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [redacted_setting(part) for part in value]
    if not isinstance(value, str):
        return value
    if value and re.fullmatch(_SECRET, name, re.IGNORECASE):
        _known_secrets.update({value: HIDDEN} if len(value) > _SHORT else {})  # a short one is a part of other words
        return HIDDEN
    if _CONNECTION.match(value):
        for pattern, shown in _WHOLE.items():
            for match in pattern.finditer(value):
                for secret in (match[0], repr(match[0])[1:-1]):
                    _known_secrets[secret] = match.expand(shown)
            value = pattern.sub(shown, value)
    return value


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
