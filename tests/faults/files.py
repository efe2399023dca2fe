"""Harms to files: things of the user's in rarec's way (`trees`), and files of rarec's that are damaged (`bytes`)."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from tests.commands import Command
from tests.faults.judge import Harm
from tests.faults.world import FOLDERS, HALF, RUN, STAGES, UPTO, Draw, World, next_stage

INSIDE: dict[str, str] = {
    ".": "prepare ids neighbours shards train evaluation bundle report llm cache notes.txt manifest.json config.yaml "
    "resolved.yaml record.json crash.txt .lock .prepare.lock .report.lock .rarec .prepare.aside-1 .prepare.aside-old "
    ".report.aside-99999 .record.json.aside-7 .shards.fresh",
    "prepare": "notes.txt manifest.json .begun.json .progress",
    "ids": "id .id.lock .id.fresh id/mine.npy",
    "neighbours": "lexical mine .ease.lock .transition.fresh cooccurrence/mine.parquet",
    "shards": "notes.txt mine.tar 000000.tar 000099.tar .progress .000009.tar.aside-1",
    "train": "per_layer mine .per_layer.lock .per_layer.fresh per_layer/notes.txt per_layer/log.jsonl",
    "train/per_layer/checkpoints": "step-abc step- step-00000099 step-00000001.old .step-00000001.aside-3",
    "evaluation": "notes.txt ranks.parquet",
    "bundle": "notes.txt README.md",
    "report": "notes.txt report.html manifest.json",
}
NAMES = [Path(folder, name).as_posix() for folder, names in INSIDE.items() for name in names.split()]
"""Names of rarec's, and names beside them, in which the user may have something, relative to `run.dir`."""
PLACES = "prepare shards bundle log mine ids/id config.yaml resolved.yaml record.json prepare/config.yaml".split()
TEXT = b"the user's own words\n"


def _private(path: Path, place: Path) -> None:
    path.write_bytes(TEXT)
    path.chmod(0o600)


def _directory(path: Path, place: Path) -> None:
    path.mkdir()
    (path / "mine.txt").write_bytes(TEXT)


def _link_to_file(path: Path, place: Path) -> None:
    (place / "mine.txt").write_bytes(TEXT)
    path.symlink_to(place / "mine.txt")


def _link_to_directory(path: Path, place: Path) -> None:
    _directory(place / "mine", place)
    path.symlink_to(place / "mine")


FILES: dict[str, Callable[[Path, Path], object]] = {
    "a file": lambda path, place: path.write_bytes(TEXT),
    "a file of mode 0600": _private,
    "an empty file": lambda path, place: path.touch(),
    "a JSON file": lambda path, place: path.write_text('{"kind": "prepare", "mine": true}\n'),
}
PLANTS = FILES | {
    "a directory with a file": _directory,
    "an empty directory": lambda path, place: path.mkdir(),
    "a link to a file": _link_to_file,
    "a link to a directory": _link_to_directory,
    "a link to nothing": lambda path, place: path.symlink_to(place / "nowhere"),
    "a link to itself": lambda path, place: path.symlink_to(path.name),
    "a pipe": lambda path, place: os.mkfifo(path),
}


def plant(draw: Draw, world: World, place: Path) -> Harm:
    """Put something of the user's where rarec writes, or inputs of the user's inside `run.dir`."""
    if draw(st.integers(0, 4)) == 4:
        return draw(st.sampled_from([_input_inside, _input_inside, _run_is_here]))(draw, world, place)
    state = draw(st.sampled_from(["new", "finished", *UPTO]))
    world.copy(state, place)
    name, kind = draw(st.sampled_from(NAMES)), draw(st.sampled_from(list(PLANTS)))
    path = place / RUN / name
    planted = _topmost_new(path, place / RUN)
    damage = path.is_file() and kind in FILES  # nobody can tell who wrote these bytes into a file of rarec's
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    PLANTS[kind](path, place)
    names = (path.name, *([] if planted == path else [planted.name]), str(path.parent.relative_to(place)))
    mine = () if damage else (planted.relative_to(place).as_posix(),)
    command = Command(_words(draw, name.split("/")[0], state), str(place))
    return Harm(f"{kind} at run/{name} ({state})", command, names, mine)


def _topmost_new(path: Path, root: Path) -> Path:
    """Return the first directory on the way to a path that does not exist: all below it is the user's."""
    new = path
    while new.parent != root and not new.parent.exists():
        new = new.parent
    return new


def _words(draw: Draw, folder: str, state: str, config: str = "config.yaml") -> list[str]:
    """Return a command: the stage of a directory if its inputs exist, or another that is possible, or all."""
    stages = {made.split("/")[0]: stage for stage, folders in FOLDERS.items() for made in folders}
    stage = stages.get(folder.lstrip(".").split(".")[0])
    possible = STAGES if state == "finished" else STAGES[: STAGES.index(next_stage(state)) + 1]
    if stage not in possible or draw(st.integers(0, 2)) == 2:
        stage = draw(st.sampled_from([possible[-1], *possible, "run"]))
    return [stage, config, *["--fresh"] * draw(st.booleans())]


def _input_inside(draw: Draw, world: World, place: Path) -> Harm:
    """Keep the log, the language model or the configuration in `run.dir`, under a name that rarec might take."""
    world.copy("new", place)
    mine, name = draw(st.sampled_from(["log", "llm", "config.yaml"])), draw(st.sampled_from(PLACES))
    path, inside, top = place / RUN / name, f"run/{name}", f"run/{name.split('/')[0]}"
    path.parent.mkdir(parents=True)
    (place / mine).rename(path)
    overrides = {
        "log": [f"prepare.{table}.path={inside}/{table}.csv" for table in ("interactions", "items")],
        "llm": [f"llm.path={inside}"],
    }
    config = inside if mine == "config.yaml" else "config.yaml"
    words = [draw(st.sampled_from(["prepare", "run"])), config, *overrides.get(mine, [])]
    return Harm(f"{mine} is {inside}", Command(words, str(place)), (path.name, top, mine), (top,))


def _run_is_here(draw: Draw, world: World, place: Path) -> Harm:
    """Run in the directory of the user's own files, or in a link to an empty directory."""
    world.copy("new", place)
    if draw(st.booleans()):
        (place / RUN).mkdir()
        planted = tuple(f"run/{name}" for name in ("log", "llm", "config.yaml"))
        for path in planted:
            (place / Path(path).name).rename(place / path)
        command = Command(["prepare", "config.yaml", "run.dir=."], str(place / RUN))
        return Harm("run.dir is the user's folder", command, ("run.dir", "config"), planted)
    (place / "disk").mkdir()
    (place / RUN).symlink_to("disk")
    command = Command(["prepare", "config.yaml"], str(place))
    return Harm("run.dir is a link to an empty directory", command, (RUN,), expect="any", elsewhere=True)


# ---- bytes


def _flip(draw: Draw, data: bytes, other: bytes) -> bytes:
    changed = bytearray(data or b"\0")
    changed[draw(st.integers(0, len(changed) - 1))] ^= 1 << draw(st.integers(0, 7))
    return bytes(changed)


DAMAGES: dict[str, Callable[[Draw, bytes, bytes], bytes]] = {
    "one bit flipped": _flip,
    "cut short": lambda draw, data, other: data[: draw(st.integers(0, len(data) - 1))] if data else b"{",
    "emptied": lambda draw, data, other: b"",
    "doubled": lambda draw, data, other: data * 2,
    "a byte more": lambda draw, data, other: data + b"\n",
    "noise": lambda draw, data, other: draw(st.randoms(use_true_random=False)).randbytes(max(8, len(data))),
    "zeros": lambda draw, data, other: bytes(len(data)),
    "another file's bytes": lambda draw, data, other: other,
    "an empty list": lambda draw, data, other: b"[]",
}
REPLACED: dict[str, Callable[[Path], object]] = {
    "removed": lambda path: None,
    "a directory": Path.mkdir,
    "a pipe": os.mkfifo,
}


def damage(draw: Draw, world: World, place: Path) -> Harm:
    """Damage one file that rarec has made, in a finished run or one that was killed."""
    half = draw(st.sampled_from(list(HALF)))
    state = draw(st.sampled_from(["finished", "finished", "finished", f"half-{half}", f"half-fresh-{half}"]))
    world.copy(state, place)
    files = sorted(path for path in (place / RUN).rglob("*") if path.is_file())
    if state != "finished" and draw(st.booleans()):
        begun = Path(HALF[half])
        own = (f"{begun}/", f"{begun.with_name(f'.{begun.name}.fresh')}/")
        files = [path for path in files if path.relative_to(place / RUN).as_posix().startswith(own)]
    path = draw(st.sampled_from(files))
    what = ruin(draw, path, draw(st.sampled_from(files)))
    command = Command(_reader(draw, half, state), str(place))
    return Harm(f"{path.relative_to(place)}: {what} ({state})", command, (path.name, path.parent.name))


def ruin(draw: Draw, path: Path, other: Path) -> str:
    """Damage a file, or put something else in its place; return what was done."""
    what: str = draw(st.sampled_from([*DAMAGES, *REPLACED, "mode 0"]))
    if what in DAMAGES:
        path.write_bytes(DAMAGES[what](draw, path.read_bytes(), other.read_bytes()))
    elif what == "mode 0":
        path.chmod(0)
    else:
        path.unlink()
        REPLACED[what](path)
    return what


def _reader(draw: Draw, half: str, state: str) -> list[str]:
    """Return a command that reads what is there."""
    fresh: list[Any] = ["--fresh"] * draw(st.booleans())
    if state != "finished":
        return [half, "config.yaml", *fresh] if state.startswith("half-fresh") else [half, "config.yaml"]
    stage, *options = draw(st.sampled_from(["run", *STAGES, "recommend", "shards --verify"])).split()
    if stage == "recommend":
        return [stage, f"{RUN}/bundle", "--history", "i000,i001"]
    return [stage, "config.yaml", *options, *(fresh if stage in STAGES and not options else [])]
