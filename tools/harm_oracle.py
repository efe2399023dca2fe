"""The one judge of `tools/check_harm.py`: what may be on the disk and on the terminal after a harm and a command.

A command ends in one of two ways. Exit code 0: its results equal those of an undisturbed run. Exit code 2: one line
`error:` that names the file or the field, and a remedy; what was finished is still there, byte for byte. In both ways
every file that rarec has not made is untouched, output is inert text, and nothing hangs.
"""

import hashlib
import os
import re
import signal
import stat
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from harm_process import Command, Outcome
from harm_world import FOLDERS, HALF, RUN, STAGES, World

from rarec.errors import UserError
from rarec.storage.artefacts import IDENTITY, MANIFEST, sha256_json
from rarec.storage.files import read_json

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
_KEPT = (".safetensors", ".tar", ".npy", ".parquet")
"""Ends of files with finished work in an artefact that is half built."""
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


@dataclass(frozen=True)
class Entry:
    """One path of a tree.

    Attributes:
        kind: of file, from its mode.
        mode: permissions.
        mtime: in nanoseconds.
        content: sha256 of a file, target of a link, empty for others.
    """

    kind: int
    mode: int
    mtime: int
    content: str


Tree = dict[str, Entry]


def snapshot(root: Path) -> Tree:
    """Return every path below a directory."""
    return {path.relative_to(root).as_posix(): _entry(path) for path in sorted(root.rglob("*"))}


def users_files(tree: Tree, original: Tree, planted: tuple[str, ...]) -> Tree:
    """Return what is the user's right after the harm: all outside `run`, and what was put inside."""

    def is_mine(path: str) -> bool:
        inside = any(path == one or path.startswith(f"{one}/") for one in planted)
        return inside or path not in original or not path.startswith(f"{RUN}/")

    return {path: entry for path, entry in tree.items() if path != RUN and is_mine(path)}


def _entry(path: Path) -> Entry:
    status = path.lstat()
    content = ""
    if stat.S_ISLNK(status.st_mode):
        content = str(path.readlink())
    elif stat.S_ISREG(status.st_mode):
        content = hashlib.sha256(path.read_bytes()).hexdigest()
    return Entry(stat.S_IFMT(status.st_mode), stat.S_IMODE(status.st_mode), status.st_mtime_ns, content)


@dataclass(frozen=True)
class Harm:
    """What was done to a copy of a state, the command that comes after it, and how it is judged.

    Attributes:
        what: the harm in one line.
        command: the command, run inside the copy.
        names: a refusal must contain one of these: names of files or fields.
        planted: paths that are the user's although they are in `run.dir`.
        expect: `same` results as undisturbed, the same `tables` of prepared data, `any` results, or a `refusal`.
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

    @property
    def line(self) -> str:
        """The command as typed."""
        return "rarec " + " ".join(self.command.words)

    def then(self, words: list[str]) -> "Harm":
        """Return the same harm before another command in ordinary surroundings, which must succeed."""
        return replace(self, command=Command(words, self.command.cwd), last_resort=False, again=False)


@dataclass
class Judge:
    """Collects the faults of one case.

    Args:
        world: has the undisturbed results.
        root: the copy.
        harm: what was done.
        original: the state before the harm.
        users: what is the user's, from `users_files`.
        before: the tree after the harm and before the command.
        after: the tree after the command.
    """

    world: World
    root: Path
    harm: Harm
    original: Tree
    users: Tree
    before: Tree
    after: Tree
    faults: list[str] = field(default_factory=list)

    def judge(self, outcome: Outcome) -> list[str]:
        """Return what is wrong; nothing, if all is as it must be."""
        self._users_files()
        self._outside(outcome)
        if outcome.code is None:
            return [*self.faults, f"it hangs: killed after {outcome.wall:.0f} s"]
        allowed = [0, 2] + [LAST_RESORT] * self.harm.last_resort
        if self.harm.native and outcome.code in NATIVE and outcome.stderr:
            return self.faults
        if outcome.code == BROKEN_PIPE and self.harm.command.stdout == "broken":
            return self.faults
        if outcome.code not in allowed:
            self.faults.append(f"exit code {outcome.code}: {_last_line(outcome.stderr)}")
        self._output(outcome)
        self._permissions()
        if outcome.code == 0:
            self.results()
            self.faults += self.harm.check(self.root, outcome)
        else:
            self._refusal(outcome)
        return self.faults

    # ---- what is the user's

    def _users_files(self) -> None:
        for path, entry in self.users.items():
            now = self.after.get(path)
            if now is None:
                if not (stat.S_ISDIR(entry.kind) and self._is_empty(path)):
                    self.faults.append(f"the user's {path} is gone")
            elif stat.S_ISDIR(entry.kind):
                if now.kind != entry.kind:
                    self.faults.append(f"the user's directory {path} was replaced")
            elif now != entry:
                changed = [name for name, value in asdict(entry).items() if asdict(now)[name] != value]
                self.faults.append(f"the user's {path} has another {', '.join(changed)}")

    def _outside(self, outcome: Outcome) -> None:
        if not self.harm.elsewhere:
            own = (RUN, "home", *["tmp"] * (outcome.code in NATIVE))  # who is ended by native code cannot tidy up
            new = [path for path in self.after if path not in self.before and path.split("/")[0] not in own]
            self.faults += [f"it wrote {path}, outside run.dir" for path in new[:3]]

    def _is_empty(self, path: str) -> bool:
        return not any(other.startswith(f"{path}/") for other in self.users)

    # ---- what is printed

    def _output(self, outcome: Outcome) -> None:
        if "Traceback (most recent call last)" in outcome.stderr + outcome.stdout:
            self.faults.append(f"a traceback: {_last_line(outcome.stderr)}")
        printed = outcome.stderr + outcome.stdout
        if "FORCE_COLOR" in self.harm.command.environment:
            printed = _COLOUR.sub("", printed)
        found = _CONTROL.search(printed)
        if found:
            self.faults.append(f"it printed the control character {found[0]!r}")

    def _refusal(self, outcome: Outcome) -> None:
        errors = re.findall(r"^error: .*(?:\n(?!error: ).*)*", outcome.stderr, re.MULTILINE)  # it is what comes last
        if len(errors) != 1:
            self.faults.append(f"{len(errors)} lines `error:`; the last line: {_last_line(outcome.stderr)}")
            return
        message = errors[0].strip()
        if len(message) > LONGEST:
            self.faults.append(f"a message of {len(message)} characters")
        if not remedies(message) and outcome.code == 2:
            self.faults.append(f"no remedy: {message.splitlines()[0][:300]}")
        if self.harm.names and not any(name.lower() in message.lower() for name in self.harm.names):
            self.faults.append(f"none of {', '.join(self.harm.names)} is named: {message[:300]}")
        self._finished_work()
        if self.harm.early:
            if self._below_run(self.before) != self._below_run(self.after):
                self.faults.append(f"refused late, after something was written: {message[:200]}")
            if outcome.cpu > EARLY:
                self.faults.append(f"refused after {outcome.cpu:.1f} s of CPU time")

    def _below_run(self, tree: Tree) -> set[tuple[str, str]]:
        return {(path, entry.content) for path, entry in tree.items() if path.startswith(f"{RUN}/")}

    # ---- what rarec made

    def _permissions(self) -> None:
        """Check that every new file follows the umask."""
        umask = UMASK if self.harm.command.umask is None else self.harm.command.umask
        for path, entry in self.after.items():
            wanted = {stat.S_IFREG: 0o666, stat.S_IFDIR: 0o777}.get(entry.kind)
            if path not in self.before and wanted is not None and entry.mode != wanted & ~umask:
                self.faults.append(f"{path} has mode {entry.mode:o} under umask {umask:o}")
                return

    def _finished_work(self) -> None:
        """After a refusal: finished artefacts are there, or were made anew; half built ones have lost nothing."""
        for folder in (folder for folders in FOLDERS.values() for folder in folders):
            place = f"{RUN}/{folder}"
            if f"{place}/{MANIFEST}" in self.original and self._broken(folder, equal=self.harm.expect == "same"):
                listed = [f"{place}/{name}" for name in self.world.manifests()[folder]["files"]]
                self.faults += [f"finished {path} was lost" for path in listed if self._lost(path)]
        for folder in HALF.values():
            if f"{RUN}/{folder}/{MANIFEST}" not in self.original | self.after:
                begun = [path for path in self.original if path.startswith(f"{RUN}/{folder}/") and path.endswith(_KEPT)]
                self.faults += [f"begun {path} was lost" for path in begun if self._lost(path)]

    def _lost(self, path: str) -> bool:
        """Return whether a file of rarec's is not as it was, although the harm left it alone."""
        was, then, now = (tree.get(path) for tree in (self.original, self.before, self.after))
        return was is not None and then == was and (now is None or now.content != was.content)

    def results(self) -> None:
        """Judge what a command leaves that ended with exit code 0."""
        if self.harm.expect == "refusal":
            self.faults.append("exit code 0, although it must be refused")
        elif self.harm.expect == "tables":
            files = self.world.manifests()["prepare"]["files"]
            self.faults += [
                f"run/prepare/{name} differs from the undisturbed one"
                for name, digest in files.items()
                if name.endswith(".parquet") and self._content(f"{RUN}/prepare/{name}") != digest
            ]
        scope = FOLDERS if self.harm.command.words[0] == "run" else {self.harm.command.words[0]: []}
        for stage in [stage for stage in STAGES if stage in scope]:
            for folder in FOLDERS[stage]:
                broken = self._broken(folder, equal=self.harm.expect == "same")
                if broken:
                    self.faults.append(f"exit code 0, but {broken}")
        left = [path for path in self.after if ".aside-" in path and path not in self.before]
        self.faults += [f"it left {path}" for path in left[:3]]

    def _broken(self, folder: str, equal: bool) -> str:
        """Return what is wrong with an artefact as it is now; empty if it is whole, and equal to the undisturbed."""
        if self.harm.elsewhere:
            return ""
        place = f"{RUN}/{folder}"
        if f"{place}/{MANIFEST}" not in self.after:
            return f"{place}/{MANIFEST} is missing"
        try:
            manifest = read_json(self.root / place / MANIFEST)
            identity = {name: manifest[name] for name in IDENTITY}
            files = dict(manifest["files"])
        except (UserError, KeyError, TypeError, ValueError):
            return f"{place}/{MANIFEST} is damaged"
        if manifest.get("hash") != sha256_json(identity):
            return f"{place}/{MANIFEST} does not match its hash"
        for name, digest in files.items():
            if self._content(f"{place}/{name}") != digest:
                return f"{place}/{name} is damaged"
        if equal and folder != "report" and manifest["hash"] != self.world.manifests()[folder]["hash"]:
            return f"{place} differs from the undisturbed one"
        return ""

    def _content(self, path: str) -> str | None:
        entry = self.after.get(path)
        return entry.content if entry else None


def remedies(message: str) -> list[str]:
    """Return the remedies in a message: what follows each `->` at the beginning of a line."""
    return [line.strip().removeprefix("->").strip() for line in message.splitlines() if line.strip().startswith("->")]


def _last_line(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[-1][:300] if lines else "(no message)"
