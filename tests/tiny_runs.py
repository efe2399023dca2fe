"""A tiny world: a log, a language model, a configuration; runs over it that are new, half built and finished.

Every path in the configuration is relative, so that a state is copied as a whole and `rarec` runs inside the copy.
"""

import hashlib
import shutil
import signal
import stat
import time
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from rarec.storage.artefacts import MANIFEST
from tests.commands import Command, run_command
from tests.synthetic import write_llm, write_log

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
export: {variant: per_layer+id+cheap}
report: {examples: 1}
"""
RUN, BUNDLE, OUT = "run", "run/bundle", "run/out"
LOG, TABLE = "log/interactions.csv", "log/new.csv"
FOLDERS = {
    "prepare": ["prepare"],
    "ids": ["ids/id"],
    "neighbours": [f"neighbours/{name}" for name in ("cooccurrence", "transition", "ease", "lexical", "semantic")],
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
NEW, *BEFORE = [f"before-{stage}" for stage in STAGES]
USES = f"""
recommend {BUNDLE} --history i000,i001
recommend {BUNDLE} --log {LOG} --user u001
recommend {BUNDLE} --all --log {LOG} --out {OUT}.parquet
recommend {BUNDLE} --all --log {LOG} --out {OUT}.csv
recommend {BUNDLE} --all --log {LOG} --out {OUT}.jsonl
items add {BUNDLE} {TABLE} --out {OUT}
items remove {BUNDLE} i003 i005 --out {OUT}
items update {BUNDLE} log/items.csv brand --out {OUT}
realign {BUNDLE} config.yaml --least -9 --out {OUT}
export {BUNDLE} --to vectors --out {OUT}
export {BUNDLE} --to hub --out {OUT}
""".strip().splitlines()
"""Commands that use the bundle."""


class Entry(NamedTuple):
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
    content = str(path.readlink()) if path.is_symlink() else ""
    if stat.S_ISREG(status.st_mode):
        content = hashlib.sha256(path.read_bytes()).hexdigest()
    return Entry(stat.S_IFMT(status.st_mode), stat.S_IMODE(status.st_mode), status.st_mtime_ns, content)


class World:
    """States of a run, each a directory with `log`, `llm`, `config.yaml`, and `run` where something was run.

    Args:
        root: where they are kept.

    Attributes:
        copied: the state that was copied last.
        seconds: how long it took to make the finished run.
        is_short: whether tests should build little.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.copied = NEW
        self.seconds = 0.0
        self.is_short = False
        self.undisturbed = cache(self._undisturbed)
        write_log(root / NEW / "log", users=30, items=24)
        write_llm(root / NEW / "llm")
        (root / NEW / "config.yaml").write_text(CONFIG)
        (root / NEW / TABLE).write_text("item,title,brand\nn00,river lamp 1,RIVER\nn01,stone chair 2,STONE\nn02,,\n")

    def state(self, name: str) -> Path:
        """Return a state, made when it is first needed.

        Args:
            name: `before-STAGE`; `finished`; `half-STAGE`, killed right before the manifest is written; or
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

    def _undisturbed(self, line: str) -> tuple[str, dict[str, str]]:
        """Return what a command prints, and what it writes (`written`), with the bundle of the finished run."""
        place = shutil.copytree(self.state("finished"), self.root / "undisturbed")
        printed, made = _run(line.split(), place), written(snapshot(place))
        shutil.rmtree(place)
        return printed, made

    def _make(self, name: str, place: Path) -> None:
        kind, _, stage = name.rpartition("-")
        if name == "finished":
            self.copy(NEW, place)
            started = time.monotonic()
            _run(["run", "config.yaml"], place)
            self.seconds = time.monotonic() - started
        elif kind == "before":
            self.copy("finished", place)
            for folder in folders_of(STAGES[STAGES.index(stage) :]):
                shutil.rmtree(place / RUN / folder)
        else:
            fresh = kind == "half-fresh"
            self.copy("finished" if fresh else f"before-{stage}", place)
            kill = (signal.SIGKILL, 1, f"{half_built(stage, fresh)}/{MANIFEST}")
            _run([stage, "config.yaml", *["--fresh"] * fresh], place, kill=kill)


def _run(words: list[str], place: Path, **kill: Any) -> str:
    """Run a command that must succeed, or be killed; return what it prints."""
    outcome = run_command(Command(words, str(place), **kill))
    assert outcome.code == (-signal.SIGKILL if kill else 0), f"undisturbed {' '.join(words)}: {outcome}"
    return outcome.stdout


def half_built(stage: str, fresh: bool) -> Path:
    """Return the directory in `run.dir` in which a stage that resumes builds."""
    folder = Path(HALF[stage])
    return folder.with_name(f".{folder.name}.fresh") if fresh else folder


def written(tree: Tree) -> dict[str, str]:
    """Return the contents of what commands on a bundle have written, by path."""
    return {path: entry.content for path, entry in tree.items() if path.startswith((OUT, f"{RUN}/.out"))}


def folders_of(stages: Iterable[str]) -> list[str]:
    """Return the directories that stages make; nothing for what is no stage."""
    return [folder for stage in stages for folder in FOLDERS.get(stage, [])]
