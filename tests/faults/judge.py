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
from typing import Any

from rarec.errors import UserError
from rarec.storage.artefacts import IDENTITY, MANIFEST, sha256_json
from rarec.storage.files import read_json
from tests.commands import Command, Outcome
from tests.remedies import remedies
from tests.tiny_runs import BUNDLE, FOLDERS, HALF, RUN, STAGES, Tree, World, folders_of, snapshot, written

ENDS = (0, 2)  # exit codes of a command that succeeds, and of one that is refused
LAST_RESORT = 70  # of what no message of its own foresees, where memory or files run out
NATIVE = (127, -signal.SIGABRT, -signal.SIGSEGV, -signal.SIGBUS)  # of native code, which no Python code can prevent
LONGEST = 2_000  # characters of a message
EARLY = 4.0  # seconds of CPU time within which a configuration is refused; 2 for the check, the rest for imports
UMASK = os.umask(0)  # it can only be read by setting it
os.umask(UMASK)
LEFT = re.compile(r"/\.[^/]*\.(aside|temporary)-[^/]*$|/\.[^/]*\.fresh$|/\.begun\.json$|/\.progress$")
TENSORS = (".safetensors", ".tar", ".npy", ".parquet", ".arrow")  # their bytes depend on settings and inputs alone
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


@dataclass(frozen=True)
class Harm:
    """What was done to a copy of a state, the command that comes after it, and how it is judged."""

    what: str  # the harm in one line
    command: Command  # run inside the copy
    names: tuple[str, ...] = ()  # a refusal must contain one of these: names of files or fields
    planted: tuple[str, ...] = ()  # paths that are the user's although they are in `run.dir`
    expect: str = "same"  # results as undisturbed; the same `tables` of prepared data; `any` results; a `refusal`
    codes: tuple[int, ...] = ENDS  # exit codes with which the command may end
    early: bool = (
        False  # a refusal must come when the configuration is read: within seconds, before anything is written
    )
    elsewhere: bool = False  # rarec may write outside `run.dir`
    interruptions: tuple[Command, ...] = ()  # the same command, interrupted; they come first, and end as they like
    ranks: int = 1  # number of processes that run the command
    reference: str = "finished"  # the state with the undisturbed results
    again: bool = False  # the same command, in ordinary surroundings, must then succeed
    restore: Callable[[], object] = lambda: None  # undoes the harm before that, and in the end

    def afterwards(self) -> "Harm":
        """Return the same command in ordinary surroundings, which must succeed."""
        command = Command(self.command.words, self.command.cwd)
        expect = "same" if self.expect == "refusal" else self.expect
        return replace(self, command=command, names=(), codes=(0,), expect=expect)


@dataclass(frozen=True)
class Judge:
    """Say what is wrong with the end of one case."""

    world: World  # has the undisturbed results
    root: Path  # the copy
    harm: Harm
    original: Tree  # the state before the harm
    before: Tree  # after the harm and before the command
    after: Tree  # after the command

    def faults(self, outcome: Outcome) -> list[str]:
        """Return what is wrong; nothing if all is as it must be."""
        code = outcome.code
        kept = [stage for stage in FOLDERS if code or stage not in self._stages()]
        faults = [*self._users_files(), *self._outside(), *self._lost_work(folders_of(kept))]
        if code is None:
            return [*faults, "it hangs"]
        if code not in self.harm.codes:
            faults.append(f"exit code {code}: {_last_line(outcome.stderr)}")
        elif code not in (*ENDS, LAST_RESORT):
            return faults  # ended by a signal, as it may be
        faults += [*self._output(outcome), *self._permissions()]
        uses = [] if code and not self.harm.interruptions else self._use(outcome)
        return [*faults, *uses, *(self._refusal(outcome) if code else self.results())]

    def _stages(self) -> list[str]:
        """Return the stages that the command runs."""
        words = self.harm.command.words
        return [] if BUNDLE in words else STAGES if words[0] == "run" else words[:1]

    def _users_files(self) -> Iterator[str]:
        """Check all that is outside `run` or was put inside: it is the user's."""
        for path, entry in self.before.items():
            if not (self._is_planted(path) or path not in self.original or not path.startswith(f"{RUN}/")):
                continue
            now, is_folder = self.after.get(path), stat.S_ISDIR(entry.kind)
            if now is None and not is_folder:  # an empty one may go; what is in one is a path of its own
                yield f"the user's {path} is gone"
            elif now and (now.kind != entry.kind or (not is_folder and now != entry)):
                yield f"the user's {path} was changed: {entry} -> {now}"

    def _is_planted(self, path: str) -> bool:
        return any(path == planted or path.startswith(f"{planted}/") for planted in self.harm.planted)

    def _outside(self) -> Iterator[str]:
        killed = self.harm.interruptions or min(self.harm.codes) < 0  # such a process cannot tidy up
        own = (RUN, "home", *["tmp"] * bool(killed))
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
        if re.search(r"\b(nan|inf)\b", outcome.stdout):
            yield f"it printed a number that is none: {outcome.stdout[:200]!r}"

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
        inside = [path for path in self.before | self.after if path.startswith(f"{RUN}/")]
        if self.harm.early and any(_content(self.before, path) != _content(self.after, path) for path in inside):
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

    def _lost_work(self, folders: list[str]) -> Iterator[str]:
        """Check that finished artefacts are there, or were made anew, and that half built ones have lost nothing."""
        for folder in folders:
            place = f"{RUN}/{folder}"
            if f"{place}/{MANIFEST}" in self.original and self._broken(folder):
                listed = [f"{place}/{name}" for name in self._undisturbed(folder)["files"]]
                yield from (f"finished {path} was lost" for path in listed if self._lost(path))
            elif folder in HALF.values() and f"{place}/{MANIFEST}" not in self.original | self.after:
                begun = [path for path in self.original if path.startswith(f"{place}/") and path.endswith(TENSORS)]
                yield from (f"begun {path} was lost" for path in begun if self._lost(path))

    def _lost(self, path: str) -> bool:
        """Return whether a file of rarec's is not as it was, although the harm left it alone."""
        was, then, now = (tree.get(path) for tree in (self.original, self.before, self.after))
        return was is not None and then == was and (now is None or now.content != was.content)

    def results(self) -> Iterator[str]:
        """Judge what a command leaves that ended with exit code 0."""
        if self.harm.expect == "refusal":
            yield "exit code 0, although it must be refused"
        folders = folders_of(self._stages())
        yield from (f"exit code 0, but {broken}" for broken in map(self._broken, folders) if broken)
        yield from (f"it left {path}" for path in self.after if LEFT.search(path) and path not in self.before)
        if self.harm.interruptions:
            own = tuple(f"{RUN}/{folder}/" for folder in folders)
            expected = snapshot(self.world.state(self.harm.reference))
            tensors = [path for path in self.after | expected if path.startswith(own) and path.endswith(TENSORS)]
            yield from (f"{path} differs" for path in tensors if _content(self.after, path) != _content(expected, path))

    def _use(self, outcome: Outcome) -> Iterator[str]:
        """Check that a command prints and writes what it does with an undisturbed bundle."""
        if BUNDLE in self.harm.command.words and self.harm.expect == "same":
            printed, expected = self.world.undisturbed(" ".join(self.harm.command.words))
            made = {path: content for path, content in written(self.after).items() if not self._is_planted(path)}
            if outcome.code:  # the one before was killed when it had written it, and this one refuses to replace it
                made = {path: content for path, content in made.items() if not path.startswith(f"{RUN}/.")}
            other = [path for path in made | expected if made.get(path) != expected.get(path)]
            yield from (f"{path} is not what it is without the harm" for path in other[:3])
            if outcome.stdout and outcome.stdout != printed:
                yield f"it printed {outcome.stdout[:200]!r}, not {printed[:200]!r}"

    def _broken(self, folder: str) -> str:
        """Return what is wrong with an artefact as it is now; empty if it is whole, and equal to the undisturbed."""
        place = f"{RUN}/{folder}"
        if self.harm.elsewhere:
            return ""
        try:
            manifest = read_json(self.root / place / MANIFEST)
            is_right = manifest["hash"] == sha256_json({name: manifest[name] for name in IDENTITY})
            files = manifest["files"].items()
            damaged = [name for name, sha in files if _content(self.after, f"{place}/{name}") != sha]
        except (UserError, OSError, LookupError, AttributeError, TypeError) as error:
            return f"{place}/{MANIFEST} cannot be read: {error!r}"
        if not is_right or damaged:
            return f"{place}/{damaged[0] if damaged else MANIFEST} is damaged"
        field = {"same": "hash", "tables": "files"}.get(self.harm.expect)
        same = field is None or folder == "report" or manifest[field] == self._undisturbed(folder)[field]
        return "" if same else f"{place} differs from the undisturbed one"

    def _undisturbed(self, folder: str) -> dict[str, Any]:
        """Return the manifest of an artefact of the undisturbed run."""
        manifest: dict[str, Any] = read_json(self.world.state(self.harm.reference) / RUN / folder / MANIFEST)
        return manifest


def _content(tree: Tree, path: str) -> str | None:
    return tree[path].content if path in tree else None


def _last_line(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[-1][:300] if lines else "(no message)"
