"""A tiny world: a log, a language model, a configuration; runs over it that are new, half built and finished.

Every path in the configuration is relative, so that a state is copied as a whole and `rarec` runs inside the copy.
"""

import hashlib
import json
import shutil
import signal
import stat
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from rarec.storage.artefacts import MANIFEST
from tests.commands import Command, Outcome, run_command
from tests.synthetic import write_llm, write_log

Draw = Callable[..., Any]
"""Hypothesis' `draw`: takes a strategy, returns an example."""
CONFIG = """\
# a comment of the user's
run: {dir: run, device: cpu}
prepare:
  engine: duckdb
  interactions: {path: log/interactions.csv, user: user, item: item, time: time}
  items: {path: log/items.csv, item: item, title: title, text: [brand]}
ids: {holdout: 0.0, sasrec: {dim: 8, epochs: 4, negatives: 8, batch_size: 16, dropout: 0.0}}
llm: {path: llm}
shards: {samples_per_shard: 32}
train:
  {batch_size: 16, epochs: 1, validate_every: 3, variants: [text_only, per_layer], validation_users: 20, trackers: []}
evaluate: {resamples: 20}
report: {examples: 1}
"""
RUN = "run"
FOLDERS = {
    "prepare": ["prepare"],
    "ids": ["ids/id"],
    "neighbours": ["neighbours/cooccurrence", "neighbours/transition", "neighbours/ease", "neighbours/lexical"],
    "shards": ["shards"],
    "train": ["train/text_only", "train/per_layer"],
    "evaluate": ["evaluation"],
    "export": ["bundle"],
    "report": ["report"],
}
"""Directories in `run.dir`, by the stage that makes them."""
STAGES = list(FOLDERS)
HALF = {"ids": "ids/id", "shards": "shards", "train": "train/per_layer"}
"""Stages that resume, with the artefact that is killed right before its manifest is written."""
UPTO = [f"upto-{stage}" for stage in STAGES[:-1]]


@dataclass(frozen=True)
class Entry:
    """One path of a tree: kind of file, permissions, time in nanoseconds, and sha256 or target of a link."""

    kind: int
    mode: int
    mtime: int
    content: str


Tree = dict[str, Entry]


def snapshot(root: Path) -> Tree:
    """Return every path below a directory."""
    return {path.relative_to(root).as_posix(): _entry(path) for path in sorted(root.rglob("*"))}


def _entry(path: Path) -> Entry:
    status = path.lstat()
    content = ""
    if stat.S_ISLNK(status.st_mode):
        content = str(path.readlink())
    elif stat.S_ISREG(status.st_mode):
        content = hashlib.sha256(path.read_bytes()).hexdigest()
    return Entry(stat.S_IFMT(status.st_mode), stat.S_IMODE(status.st_mode), status.st_mtime_ns, content)


class World:
    """States of a run, each a directory that holds `log`, `llm`, `config.yaml`, and `run` where something was run.

    Args:
        root: where they are kept.

    Attributes:
        copied: the state that was copied last.
        kept: results of undisturbed commands, which are needed often.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.copied = "new"
        self.kept: dict[Any, Any] = {}
        write_log(root / "new" / "log", users=30, items=24)
        write_llm(root / "new" / "llm")
        (root / "new" / "config.yaml").write_text(CONFIG)

    def state(self, name: str) -> Path:
        """Return a state, made when it is first needed.

        Args:
            name: `new`; `finished`; `upto-STAGE`; `half-STAGE`, killed right before the manifest is written; or
                `half-fresh-STAGE`, the same of `--fresh` over a finished run.
        """
        if not (self.root / name).exists():
            temporary = self.root / f"{name}.temporary"
            shutil.rmtree(temporary, ignore_errors=True)
            self._make(name, temporary)
            temporary.rename(self.root / name)
        return self.root / name

    def copy(self, name: str, place: Path) -> Path:
        """Copy a state; return the copy."""
        source = self.state(name)
        self.copied = name
        return shutil.copytree(source, place, symlinks=True)

    @cached_property
    def manifests(self) -> dict[str, dict[str, Any]]:
        """The manifest of each artefact of the finished run, by its directory in `run.dir`."""
        run = self.state("finished") / RUN
        return {folder: json.loads((run / folder / MANIFEST).read_bytes()) for folder in folders_of(STAGES)}

    def must(self, words: Sequence[str], place: Path) -> Outcome:
        """Run a command that must succeed."""
        outcome = run_command(Command(list(words), str(place)))
        assert outcome.code == 0, f"the undisturbed `rarec {' '.join(words)}` failed: {outcome.stderr}"
        return outcome

    def _make(self, name: str, place: Path) -> None:
        kind, _, stage = name.rpartition("-")
        if name == "finished":
            self.copy("new", place)
            self.must(["run", "config.yaml"], place)
        elif kind == "upto":
            self.copy("finished", place)
            for folder in folders_of(STAGES[STAGES.index(stage) + 1 :]):
                shutil.rmtree(place / RUN / folder)
        else:
            fresh = kind == "half-fresh"
            self.copy("finished" if fresh else state_before(stage), place)
            folder = Path(HALF[stage])
            built = folder.with_name(f".{folder.name}.fresh") if fresh else folder
            kill = (signal.SIGKILL, 1, f"{built}/{MANIFEST}")
            code = run_command(Command([stage, "config.yaml", *["--fresh"] * fresh], str(place), kill=kill)).code
            assert code == -signal.SIGKILL, (name, code)


def folders_of(stages: Sequence[str]) -> list[str]:
    """Return the directories that stages make."""
    return [folder for stage in stages for folder in FOLDERS[stage]]


def state_before(stage: str) -> str:
    """Return the state in which a stage, or `run`, is next."""
    first = stage in ("run", STAGES[0])
    return "new" if first else f"upto-{STAGES[STAGES.index(stage) - 1]}"


def next_stage(state: str) -> str:
    """Return the stage that a state comes to next; the last one, if it is finished."""
    return next((stage for stage in STAGES if state_before(stage) == state), STAGES[-1])
