"""Carry out the remedy of a message, where it says what to type, delete, move or set."""

import re
from dataclasses import dataclass, replace
from pathlib import Path

from tests.commands import Command, run_command
from tests.tiny_runs import BUNDLE

COMMAND = re.compile(r"\brarec (\w+) (?:CONFIG|\S+\.yaml)((?: (?:--[\w-]+|[\w.]+=[^\s;,]+))*)")
DELETE = re.compile(r"\b(?:delete|remove) (\S+?)[,;:.]?(?= |$)")
MOVE = re.compile(r"\bmove (?:(\S+?) away|away (\S+)|\w+ \w+ away)\b")
SET = re.compile(r"\b(?:set|raise|lower|change) `?((?:[a-z]\w*\.)+\w+)`?(?:=|: | to )`?([^\s,;`]+)`?")
OTHER_RUN = re.compile(r"\b(?:choose|set|use) another run\.dir")
_PATH = re.compile(r"[^\s'\"`,;:()]*[/.][^\s'\"`,;:()]*")
ASIDE = "moved-away"


ROUNDS = 10
"""Largest number of remedies that one command may take: another log makes each of the eight stages stale."""


class Useless(Exception):
    """A remedy deletes more than the file that is damaged, or does not help."""


@dataclass(frozen=True)
class Patient:
    """A command that was refused, and where.

    Attributes:
        root: the directory with the run.
        command: the command.
        depth: how many remedies it is the remedy of.
    """

    root: Path
    command: Command
    depth: int = 0

    def recover(self, stderr: str) -> "tuple[list[str], Patient] | None":
        """Carry out remedies until the command succeeds.

        Args:
            stderr: what it said.

        Returns:
            What was done, and the command that succeeded; None if a program cannot carry out what is said.

        Raises:
            Useless: the remedies do not help, or are too wide.
        """
        done, patient = list[str](), self
        for _ in range(ROUNDS):
            followed = patient.follow(stderr[stderr.find("error: ") :])
            if followed is None:
                return None
            done.append(followed[0])
            patient = followed[1]
            outcome = run_command(patient.command)
            if outcome.code == 0:
                return done, patient
            stderr = outcome.stderr
        raise Useless(f"{'; '.join(done)}: does not help: {stderr.strip()[-300:]}")

    def follow(self, message: str) -> "tuple[str, Patient] | None":
        """Carry out the remedy of a message.

        Returns:
            What was done and the command to type next; None if the remedy cannot be carried out by a program.

        Raises:
            Useless: it would delete a directory.
        """
        for text in remedies(message):
            for step in (self._run, self._delete, self._move, self._set, self._other_run, self._same):
                done = step(text, message)
                if done:
                    return done
        return None

    def _run(self, text: str, message: str) -> "tuple[str, Patient] | None":
        found = COMMAND.search(text)
        if not found:
            return None
        _, config, *rest = self.command.words
        config = "config.yaml" if BUNDLE in self.command.words else config
        words = [found[1], config, *found[2].split(), *(word for word in rest if "=" in word)]
        if self.depth == ROUNDS:
            raise Useless(f"rarec {' '.join(words)} does not help: {message.strip()[-300:]}")
        inner = replace(self, command=Command(words, self.command.cwd), depth=self.depth + 1)
        outcome = run_command(inner.command)
        then = inner.recover(outcome.stderr) if outcome.code else None
        return " ".join(["rarec", *words, *(f"({step})" for step in (then[0] if then else []))]), self

    def _delete(self, text: str, message: str) -> "tuple[str, Patient] | None":
        found = DELETE.search(text)
        if not found:
            return None
        path = self._existing(found[1]) or self._subject(message)
        if path is None:
            return None
        if path.is_dir() and not path.is_symlink() and any(path.iterdir()):
            raise Useless(f"the remedy deletes the directory {path}: {text}")
        path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()
        return f"delete {path}", self

    def _move(self, text: str, message: str) -> "tuple[str, Patient] | None":
        found = MOVE.search(text)
        if not found:
            return None
        named = self._existing(found[1] or found[2] or "")
        path = named or self._subject(message)
        if path is None:
            return None
        (self.root / ASIDE).mkdir(exist_ok=True)
        path.rename(self.root / ASIDE / f"{len(list((self.root / ASIDE).iterdir()))}-{path.name}")
        return f"move {path} away", self

    def _set(self, text: str, message: str) -> "tuple[str, Patient] | None":
        found = SET.search(text)
        return self._with(f"{found[1]}={found[2]}") if found else None

    def _other_run(self, text: str, message: str) -> "tuple[str, Patient] | None":
        return self._with("run.dir=another") if OTHER_RUN.search(text) else None

    def _same(self, text: str, message: str) -> "tuple[str, Patient] | None":
        return ("the same command", self) if "the same command" in text else None

    def _with(self, override: str) -> "tuple[str, Patient]":
        words = [*self.command.words, override]
        return override, replace(self, command=replace(self.command, words=words))

    def _existing(self, word: str) -> Path | None:
        path = Path(self.command.cwd, word.strip("'\"`"))
        inside = path != self.root and path.is_relative_to(self.root)
        return path if word and inside and (path.exists() or path.is_symlink()) else None

    def _subject(self, message: str) -> Path | None:
        """Return the first path in the problem that exists: what `it` stands for in the remedy."""
        problem = message.split("\n  ->")[0].removeprefix("error: ")
        return next((path for path in map(self._existing, _PATH.findall(problem)) if path), None)


def remedies(message: str) -> list[str]:
    """Return the remedies in a message: what follows each `->` at the beginning of a line."""
    return [line.strip().removeprefix("->").strip() for line in message.splitlines() if line.strip().startswith("->")]
