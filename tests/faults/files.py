"""Harms to files in `run.dir`: the user's, in rarec's way (`trees`), and rarec's own, damaged (`bytes`)."""

import os
import random
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from hypothesis import assume
from hypothesis import strategies as st

from tests.commands import Command
from tests.faults.judge import TENSORS, Harm
from tests.tiny_runs import BEFORE, BUNDLE, HALF, NEW, RUN, STAGES, USES, World, folders_of, half_built

Draw = Callable[..., Any]
"""Hypothesis' `draw`: takes a strategy, returns an example."""
NAMES = """
prepare ids neighbours shards train evaluation bundle report llm cache notes.txt manifest.json config.yaml resolved.yaml
record.json crash.txt .lock .prepare.lock .report.lock .rarec .prepare.aside-1 .prepare.aside-old .report.aside-99999
.record.json.aside-7 .shards.fresh prepare/notes.txt prepare/manifest.json prepare/.begun.json prepare/.progress ids/id
ids/.id.lock ids/.id.fresh ids/id/mine.npy neighbours/lexical neighbours/mine neighbours/.ease.lock
neighbours/.transition.fresh neighbours/cooccurrence/mine.parquet shards/notes.txt shards/mine.tar shards/000000.tar
shards/000099.tar shards/.progress shards/.000009.tar.aside-1 train/per_layer train/mine train/.per_layer.lock
train/.per_layer.fresh train/per_layer/notes.txt train/per_layer/log.jsonl train/per_layer/checkpoints/step-abc
train/per_layer/checkpoints/step- train/per_layer/checkpoints/step-00000099 train/per_layer/checkpoints/step-1.old
train/per_layer/checkpoints/.step-00000001.aside-3 evaluation/notes.txt evaluation/ranks.parquet bundle/notes.txt
bundle/README.md report/notes.txt report/report.html report/manifest.json out out.csv .out.aside-1 .out.csv.progress .
""".split()
"""Names of rarec's, and names beside them, in which the user may have something, relative to `run.dir`."""
TEXT = b"the user's own words\n"


def copied(world: World, place: Path, state: str, words: list[str]) -> Command:
    """Copy a state, and return a command that is given there; in a short run, reject what builds for long."""
    is_quick = words[0] in ("prepare", "ids", "shards", "export") or (state == "finished" and "--fresh" not in words)
    assume(is_quick or not world.is_short)
    world.copy(state, place)
    return Command(words, str(place))


def choose(draw: Draw, world: World, place: Path, states: Sequence[str]) -> Command:
    """Copy a state, and choose a command that can be given there: a stage, all stages, or one that uses the bundle."""
    state: str = draw(st.sampled_from(states))
    if state == "finished" and draw(st.integers(0, 2)) == 2:
        return copied(world, place, state, draw(st.sampled_from(USES)).split())
    kind, _, stage = state.rpartition("-")
    if not kind.startswith("half"):
        possible = STAGES if state == "finished" else STAGES[: STAGES.index(stage) + 1]
        stage = draw(st.sampled_from([possible[-1], *possible, "run"]))
    options = [[], ["--fresh"], *[["--verify"]] * (stage == "shards" and state == "finished")]
    options = [[]] if stage == "run" or kind == "half" else options
    return copied(world, place, state, [stage, "config.yaml", *draw(st.sampled_from(options))])


def _directory(path: Path) -> None:
    path.mkdir()
    (path / "mine.txt").write_bytes(TEXT)


FILES: dict[str, Callable[[Path, Path], object]] = {
    "a file": lambda path, mine: path.write_bytes(TEXT),
    "a file of mode 0600": lambda path, mine: (path.write_bytes(TEXT), path.chmod(0o600)),
    "an empty file": lambda path, mine: path.touch(),
    "a JSON file": lambda path, mine: path.write_text('{"kind": "prepare", "mine": true}\n'),
}
PLANTS = FILES | {
    "a directory with a file": lambda path, mine: _directory(path),
    "an empty directory": lambda path, mine: path.mkdir(),
    "a link to a file": lambda path, mine: path.symlink_to(mine / "mine.txt"),
    "a link to a directory": lambda path, mine: path.symlink_to(mine),
    "a link to nothing": lambda path, mine: path.symlink_to(mine / "nowhere"),
    "a link to itself": lambda path, mine: path.symlink_to(path.name),
    "a pipe": lambda path, mine: os.mkfifo(path),
}


def plant(draw: Draw, world: World, place: Path) -> Harm:
    """Put something of the user's where a command writes, or elsewhere in `run`."""
    if draw(st.integers(0, 5)) == 5:
        return _input_inside(draw, world, place)
    command = choose(draw, world, place, [NEW, *["finished"] * len(BEFORE), *BEFORE])
    folders = folders_of([] if BUNDLE in command.words else command.words[:1])
    tops = tuple(folder.split("/")[0] for folder in folders)
    near = [name for name in NAMES if name.lstrip(".").startswith(tops or "out")]
    name, kind = draw(st.sampled_from(near) | st.sampled_from(NAMES)), draw(st.sampled_from(list(PLANTS)))
    path = place / RUN / name
    topmost = path  # the first on the way to it that does not exist: all below is the user's
    while topmost != place / RUN and topmost.parent != place / RUN and not topmost.parent.exists():
        topmost = topmost.parent
    is_damage = path.is_file() and kind in FILES  # nobody can tell who wrote these bytes into a file of rarec's
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    _directory(place / "mine")
    PLANTS[kind](path, place / "mine")
    names = (path.name, topmost.name, str(path.parent.relative_to(place)))
    planted = () if is_damage else (topmost.relative_to(place).as_posix(),)
    return Harm(f"{kind} at run/{name} ({world.copied})", command, names, planted, elsewhere=name == ".")


def _input_inside(draw: Draw, world: World, place: Path) -> Harm:
    """Keep the log, the language model or the configuration in `run.dir`, under a name that rarec might take."""
    world.copy(NEW, place)
    mine = draw(st.sampled_from(["log", "llm", "config.yaml"]))
    inside = f"{RUN}/{draw(st.sampled_from(['prepare', 'bundle', 'log', 'ids/id', 'resolved.yaml', 'prepare/mine']))}"
    (place / inside).parent.mkdir(parents=True)
    (place / mine).rename(place / inside)
    tables = [f"prepare.{table}.path={inside}/{table}.csv" for table in ("interactions", "items")]
    overrides = {"log": tables, "llm": [f"llm.path={inside}"], "config.yaml": []}[mine]
    config = inside if mine == "config.yaml" else "config.yaml"
    top = "/".join(inside.split("/")[:2])
    command = Command([draw(st.sampled_from(["prepare", "run"])), config, *overrides], str(place))
    expect = "tables" if command.words[0] == "prepare" else "any"  # what is built knows the paths of its inputs
    return Harm(f"{mine} is {inside}", command, (inside, top, mine), (top,), expect=expect)


Change = Callable[[bytes, int, bytes], bytes]
"""Takes the bytes of a file, a position in it, and the bytes of another file; returns others."""
DAMAGES: dict[str, Change] = {
    "one bit flipped": lambda data, at, other: data[:at] + bytes([data[at] ^ 1 << at % 8]) + data[at + 1 :],
    "cut short": lambda data, at, other: data[:at],
    "emptied": lambda data, at, other: b"",
    "doubled": lambda data, at, other: data * 2,
    "a byte more": lambda data, at, other: data + b"\n",
    "noise": lambda data, at, other: random.Random(at).randbytes(max(8, len(data))),
    "zeros": lambda data, at, other: bytes(len(data)),
    "another file's bytes": lambda data, at, other: other,
    "an empty list": lambda data, at, other: b"[]",
}
REPLACED: dict[str, Callable[[Path], object]] = {
    "removed": lambda path: None,
    "a directory": Path.mkdir,
    "a pipe": os.mkfifo,
}


def damage(draw: Draw, world: World, place: Path) -> Harm:
    """Damage a file of rarec's, in a finished run or one that was killed, and give a command that reads it."""
    halves = [f"half-{fresh}{stage}" for stage in HALF for fresh in ("", "fresh-")]
    command = choose(draw, world, place, [*["finished"] * len(halves), *halves])
    folders = ["bundle"] if BUNDLE in command.words else folders_of(command.words[:1]) or ["."]
    if world.copied != "finished":
        folders = [half_built(command.words[0], "fresh" in world.copied).as_posix()]
    folder = place / RUN / draw(st.sampled_from(folders) | st.sampled_from([*folders, "."]))
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    tensors = [path for path in files if path.suffix in TENSORS]
    path = draw(st.sampled_from(tensors or files) | st.sampled_from(files))
    kind = draw(st.sampled_from([*["damaged"] * 6, *REPLACED]))
    if kind == "damaged":
        kind = damage_bytes(draw, path, draw(st.sampled_from(files)))
    else:
        path.unlink()
        REPLACED[kind](path)
    return Harm(f"{path.relative_to(place)}: {kind} ({world.copied})", command, (path.name, path.parent.name))


def damage_bytes(draw: Draw, path: Path, other: Path, changes: dict[str, Change] = DAMAGES) -> str:
    """Damage a file, perhaps with bytes of another; return what was done."""
    data, kind = path.read_bytes() or b"\0", draw(st.sampled_from(list(changes)))
    path.write_bytes(changes[kind](data, draw(st.integers(0, len(data) - 1)), other.read_bytes()))
    return str(kind)
