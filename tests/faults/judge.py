"""The one judge: what may be on the disk and on the terminal after a harm and a command.

A command ends in one of two ways. Exit code 0: its results equal those of an undisturbed run. Exit code 2: one line
`error:` that names the file or the field, and a remedy; what was finished is still there, byte for byte. In both ways
every file that rarec has not made is untouched, output is inert text, and nothing hangs.
"""

import os
import re
import signal
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from rarec.errors import UserError
from rarec.storage.artefacts import IDENTITY, MANIFEST, sha256_json
from rarec.storage.files import read_json
from tests.commands import Command, Outcome
from tests.faults.world import FOLDERS, HALF, RUN, Tree, World, folders_of

LAST_RESORT = 70
"""Exit code of what no message of its own foresees, where memory or files run out."""
NATIVE = (127, -signal.SIGABRT, -signal.SIGSEGV, -signal.SIGBUS)
"""Exit codes of a process that native code ended, which no Python code can prevent."""
BROKEN_PIPE = 128 + signal.SIGPIPE
"""Exit code of a command whose results nobody reads."""
LONGEST = 2_000
"""Largest number of characters of a message."""
EARLY = 4.0
"""Seconds of CPU time within which a configuration is refused; 2 for the check, the rest for imports."""
UMASK = os.umask(0)
"""The umask of this process, which can only be read by setting it."""
os.umask(UMASK)
TEMPORARY = re.compile(r"/\.[^/]*\.(aside|temporary)-[^/]*$")
_KEPT = (".safetensors", ".tar", ".npy", ".parquet")
"""Ends of files with finished work in an artefact that is half built."""
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


@dataclass(frozen=True)
class Harm:
    """What was done to a copy of a state, the command that comes after it, and how it is judged.

    Attributes:
        what: the harm in one line.
        command: the command, run inside the copy.
        names: a refusal must contain one of these: names of files or fields.
        planted: paths that are the user's although they are in `run.dir`.
        expect: `same` results as undisturbed, `any` results, or a `refusal`.
        early: whether a refusal must come when the configuration is read: within seconds, and nothing is written.
        last_resort: whether exit code 70 is a way to end.
        native: whether native code may end the process, as where it gets no memory.
        elsewhere: whether the harm lets rarec write outside `run.dir`.
        check: returns what is wrong with the place and the outcome of a command that ended with exit code 0.
        again: whether the same command, in ordinary surroundings, must then succeed.
        restore: undoes the harm before that.
        release: called when the case is over.
    """

    what: str
    command: Command
    names: tuple[str, ...] = ()
    planted: tuple[str, ...] = ()
    expect: str = "same"
    early: bool = False
    last_resort: bool = False
    native: bool = False
    elsewhere: bool = False
    check: Callable[[Path, Outcome], list[str]] = lambda place, outcome: []
    again: bool = False
    restore: Callable[[], object] = lambda: None
    release: Callable[[], object] = lambda: None

    def afterwards(self) -> "Harm":
        """Return the same command in ordinary surroundings, which must succeed."""
        command = Command(self.command.words, self.command.cwd)
        return replace(self, command=command, names=(), last_resort=False, again=False)


@dataclass
class Judge:
    """Say what is wrong with the end of one case.

    Args:
        world: has the undisturbed results.
        root: the copy.
        harm: what was done.
        original: the state before the harm.
        before: the tree after the harm and before the command.
        after: the tree after the command.
    """

    world: World
    root: Path
    harm: Harm
    original: Tree
    before: Tree
    after: Tree

    @property
    def users(self) -> Tree:
        """What is the user's right after the harm: all outside `run`, and what was put inside."""
        return {path: entry for path, entry in self.before.items() if path != RUN and self._is_users(path)}

    def _is_users(self, path: str) -> bool:
        planted = any(path == mine or path.startswith(f"{mine}/") for mine in self.harm.planted)
        return planted or path not in self.original or not path.startswith(f"{RUN}/")

    def faults(self, outcome: Outcome) -> list[str]:
        """Return what is wrong; nothing if all is as it must be."""
        kept = [*self._users_files(), *self._outside(outcome)]
        if outcome.code is None:
            return [*kept, "it hangs"]
        native = self.harm.native and outcome.code in NATIVE and outcome.stderr
        if native or (outcome.code == BROKEN_PIPE and self.harm.command.stdout == "broken"):
            return kept
        if outcome.code not in [0, 2] + [LAST_RESORT] * self.harm.last_resort:
            kept.append(f"exit code {outcome.code}: {_last_line(outcome.stderr)}")
        kept += [*self._output(outcome), *self._permissions()]
        if outcome.code:
            return [*kept, *self._refusal(outcome), *self._finished_work()]
        return [*kept, *self.results(), *self.harm.check(self.root, outcome)]

    def _users_files(self) -> Iterator[str]:
        users = self.users
        for path, entry in users.items():
            now, is_folder = self.after.get(path), stat.S_ISDIR(entry.kind)
            empty = not any(other.startswith(f"{path}/") for other in users)
            if now is None and (empty or not is_folder):
                yield f"the user's {path} is gone"
            elif now and (now.kind != entry.kind or (not is_folder and now != entry)):
                yield f"the user's {path} was changed: {entry} -> {now}"

    def _outside(self, outcome: Outcome) -> Iterator[str]:
        own = (RUN, "home", *["tmp"] * (outcome.code in NATIVE))  # a process that native code ends cannot tidy up
        for path in self.after:
            if not self.harm.elsewhere and path not in self.before and path.split("/")[0] not in own:
                yield f"it wrote {path}, outside run.dir"

    def _output(self, outcome: Outcome) -> Iterator[str]:
        printed = outcome.stderr + outcome.stdout
        if "Traceback (most recent call last)" in printed:
            yield f"a traceback: {_last_line(outcome.stderr)}"
        coloured = "FORCE_COLOR" in self.harm.command.environment
        control = _CONTROL.search(_COLOUR.sub("", printed) if coloured else printed)
        if control:
            yield f"it printed the control character {control[0]!r}"

    def _refusal(self, outcome: Outcome) -> Iterator[str]:
        errors = re.findall(r"^error: .*(?:\n(?!error: ).*)*", outcome.stderr, re.MULTILINE)  # it is what comes last
        if len(errors) != 1:
            yield f"{len(errors)} lines `error:`; the last line: {_last_line(outcome.stderr)}"
            return
        message = errors[0].strip()
        if len(message) > LONGEST:
            yield f"a message of {len(message)} characters"
        if not remedies(message) and outcome.code == 2:
            yield f"no remedy: {message.splitlines()[0][:300]}"
        if self.harm.names and not any(name.lower() in message.lower() for name in self.harm.names):
            yield f"none of {', '.join(self.harm.names)} is named: {message[:300]}"
        if self.harm.early and _below_run(self.before) != _below_run(self.after):
            yield f"refused late, after something was written: {message[:200]}"
        if self.harm.early and outcome.cpu > EARLY:
            yield f"refused after {outcome.cpu:.1f} s of CPU time"

    def _permissions(self) -> Iterator[str]:
        """Check that every new file follows the umask."""
        umask = UMASK if self.harm.command.umask is None else self.harm.command.umask
        for path, entry in self.after.items():
            full = {stat.S_IFREG: 0o666, stat.S_IFDIR: 0o777}.get(entry.kind)
            if path not in self.before and full is not None and entry.mode != full & ~umask:
                yield f"{path} has mode {entry.mode:o} under umask {umask:o}"

    def _finished_work(self) -> Iterator[str]:
        """After a refusal: finished artefacts are there, or were made anew; half built ones have lost nothing."""
        for folder in folders_of(FOLDERS):
            place = f"{RUN}/{folder}"
            if f"{place}/{MANIFEST}" in self.original and self._broken(folder):
                listed = [f"{place}/{name}" for name in self.world.manifests[folder]["files"]]
                yield from (f"finished {path} was lost" for path in listed if self._lost(path))
            elif folder in HALF.values() and f"{place}/{MANIFEST}" not in self.original | self.after:
                begun = [path for path in self.original if path.startswith(f"{place}/") and path.endswith(_KEPT)]
                yield from (f"begun {path} was lost" for path in begun if self._lost(path))

    def _lost(self, path: str) -> bool:
        """Return whether a file of rarec's is not as it was, although the harm left it alone."""
        was, then, now = (tree.get(path) for tree in (self.original, self.before, self.after))
        return was is not None and then == was and (now is None or now.content != was.content)

    def results(self) -> Iterator[str]:
        """Judge what a command leaves that ended with exit code 0."""
        if self.harm.expect == "refusal":
            yield "exit code 0, although it must be refused"
        stage = self.harm.command.words[0]
        for folder in folders_of([name for name in FOLDERS if stage in (name, "run")]):
            broken = self._broken(folder)
            if broken:
                yield f"exit code 0, but {broken}"
        yield from (f"it left {path}" for path in self.after if TEMPORARY.search(path) and path not in self.before)

    def _broken(self, folder: str) -> str:
        """Return what is wrong with an artefact as it is now; empty if it is whole, and equal to the undisturbed."""
        place = f"{RUN}/{folder}"
        if self.harm.elsewhere:
            return ""
        try:
            manifest = read_json(self.root / place / MANIFEST)
            is_right = manifest["hash"] == sha256_json({name: manifest[name] for name in IDENTITY})
            damaged = [name for name, sha in manifest["files"].items() if self._content(f"{place}/{name}") != sha]
        except (UserError, OSError, LookupError, AttributeError, TypeError) as error:
            return f"{place}/{MANIFEST} cannot be read: {error!r}"
        if not is_right or damaged:
            return f"{place}/{damaged[0] if damaged else MANIFEST} is damaged"
        same = folder == "report" or manifest["hash"] == self.world.manifests[folder]["hash"]
        return "" if same or self.harm.expect != "same" else f"{place} differs from the undisturbed one"

    def _content(self, path: str) -> str | None:
        entry = self.after.get(path)
        return entry.content if entry else None


def remedies(message: str) -> list[str]:
    """Return the remedies in a message: what follows each `->` at the beginning of a line."""
    return [line.strip().removeprefix("->").strip() for line in message.splitlines() if line.strip().startswith("->")]


def _below_run(tree: Tree) -> set[tuple[str, str]]:
    return {(path, entry.content) for path, entry in tree.items() if path.startswith(f"{RUN}/")}


def _last_line(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[-1][:300] if lines else "(no message)"
