"""Harms to files: things of the user's in rarec's way (`trees`), and files of rarec's that are damaged (`bytes`)."""

import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

from harm_oracle import Harm
from harm_process import Command
from harm_world import FOLDERS, HALF, RUN, STAGES, World, next_stage

INSIDE: dict[str, list[str]] = {
    "": [
        "prepare",
        "ids",
        "neighbours",
        "shards",
        "train",
        "evaluation",
        "bundle",
        "report",
        "llm",
        "cache",
        "notes.txt",
        "manifest.json",
    ],
    ".": [
        "config.yaml",
        "resolved.yaml",
        "record.json",
        "crash.txt",
        ".lock",
        ".prepare.lock",
        ".report.lock",
        ".rarec",
    ],
    "./": [".prepare.aside-1", ".prepare.aside-old", ".report.aside-99999", ".record.json.aside-7", ".shards.fresh"],
    "prepare": ["notes.txt", "manifest.json", ".begun.json", ".progress"],
    "ids": ["id", ".id.lock", ".id.fresh", "id/mine.npy"],
    "neighbours": ["lexical", "mine", ".ease.lock", ".transition.fresh", "cooccurrence/mine.parquet"],
    "shards": ["notes.txt", "mine.tar", "000000.tar", "000099.tar", ".progress", ".000009.tar.aside-1"],
    "train": ["per_layer", "mine", ".per_layer.lock", ".per_layer.fresh", "per_layer/notes.txt", "per_layer/log.jsonl"],
    "train/per_layer/checkpoints": [
        "step-abc",
        "step-",
        "step-00000099",
        "step-00000001.old",
        ".step-00000001.aside-3",
    ],
    "evaluation": ["notes.txt", "ranks.parquet"],
    "bundle": ["notes.txt", "README.md"],
    "report": ["notes.txt", "report.html", "manifest.json"],
}
NAMES = [Path(folder, name).as_posix() for folder, names in INSIDE.items() for name in names]
"""Names of rarec's, and names beside them, in which the user may have something, relative to `run.dir`."""
TEXT = b"the user's own words\n"


def _file(path: Path, place: Path) -> None:
    path.write_bytes(TEXT)


def _private(path: Path, place: Path) -> None:
    path.write_bytes(TEXT)
    path.chmod(0o600)


def _empty_file(path: Path, place: Path) -> None:
    path.touch()


def _object(path: Path, place: Path) -> None:
    path.write_text('{"kind": "prepare", "mine": true}\n')


def _directory(path: Path, place: Path) -> None:
    path.mkdir()
    (path / "mine.txt").write_bytes(TEXT)


def _empty_directory(path: Path, place: Path) -> None:
    path.mkdir()


def _link_to_file(path: Path, place: Path) -> None:
    (place / "mine.txt").write_bytes(TEXT)
    path.symlink_to(place / "mine.txt")


def _link_to_directory(path: Path, place: Path) -> None:
    (place / "mine").mkdir()
    (place / "mine" / "mine.txt").write_bytes(TEXT)
    path.symlink_to(place / "mine")


def _dangling(path: Path, place: Path) -> None:
    path.symlink_to(place / "nowhere")


def _loop(path: Path, place: Path) -> None:
    path.symlink_to(path.name)


def _pipe(path: Path, place: Path) -> None:
    os.mkfifo(path)


PLANTS: dict[str, Callable[[Path, Path], None]] = {
    "a file": _file,
    "a file of mode 0600": _private,
    "an empty file": _empty_file,
    "a JSON file": _object,
    "a directory with a file": _directory,
    "an empty directory": _empty_directory,
    "a link to a file": _link_to_file,
    "a link to a directory": _link_to_directory,
    "a link to nothing": _dangling,
    "a link to itself": _loop,
    "a pipe": _pipe,
}


FILES = [kind for kind, make in PLANTS.items() if make in (_file, _private, _empty_file, _object)]


def plant(generator: random.Random, world: World, place: Path) -> Harm:
    """Put something of the user's where rarec writes, or inputs of the user's inside `run.dir`."""
    if generator.random() < 0.2:
        return generator.choice([_inputs_inside, _config_inside, _model_inside, _run_is_here])(generator, world, place)
    state = generator.choice(["new", "new", "finished", "finished", *(f"upto-{stage}" for stage in STAGES[:-1])])
    world.copy(state, place)
    name = generator.choice(NAMES)
    kind = generator.choice(list(PLANTS))
    path = place / RUN / name
    planted = _topmost_new(path, place / RUN)
    damage = path.is_file() and kind in FILES  # nobody can tell who wrote these bytes into a file of rarec's
    _clear(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    PLANTS[kind](path, place)
    words = _words(generator, name.split("/")[0], state)
    return Harm(
        f"{kind} at run/{name} ({state})",
        Command(words, str(place)),
        (path.name, *([] if planted == path else [planted.name]), str(path.parent.relative_to(place))),
        () if damage else (planted.relative_to(place).as_posix(),),
    )


def _topmost_new(path: Path, root: Path) -> Path:
    """Return the first directory on the way to a path that is not there: all below it is the user's."""
    new = path
    while new.parent != root and not new.parent.exists():
        new = new.parent
    return new


def _clear(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _words(generator: random.Random, folder: str, state: str, config: str = "config.yaml") -> list[str]:
    """Return a command: the stage of a directory if its inputs are there, or another that is possible, or all."""
    stages = {made.split("/")[0]: stage for stage, folders in FOLDERS.items() for made in folders}
    stage = stages.get(folder.lstrip(".").split(".")[0])
    possible = STAGES if state == "finished" else STAGES[: STAGES.index(next_stage(state)) + 1]
    if stage not in possible or generator.random() < 0.3:
        stage = generator.choice(["run", possible[-1], *possible])
    fresh = generator.random() < (0.2 if stage == "run" else 0.5)
    return [stage, config, *["--fresh"] * fresh]


def _inputs_inside(generator: random.Random, world: World, place: Path) -> Harm:
    """Keep the log in a directory of the run."""
    state = generator.choice(["new", "finished"])
    world.copy(state, place)
    folder = generator.choice(["prepare", "shards", "report", "log", "evaluation", "ids/id", "."])
    logs = place / RUN / folder
    logs.mkdir(parents=True, exist_ok=True)
    for name in ("interactions.csv", "items.csv"):
        (place / "log" / name).rename(logs / name)
    inside = logs.relative_to(place).as_posix()
    overrides = [f"prepare.{name}.path={inside}/{name}.csv" for name in ("interactions", "items")]
    stage = generator.choice(["prepare", "run"])
    words = [stage, "config.yaml", *overrides, *["--fresh"] * (generator.random() < 0.5)]
    planted = tuple(f"{inside}/{name}" for name in ("interactions.csv", "items.csv"))
    command, names = Command(words, str(place)), ("interactions", folder)
    return Harm(f"the log is in {inside} ({state})", command, names, planted, expect="tables")


def _config_inside(generator: random.Random, world: World, place: Path) -> Harm:
    """Keep the configuration in `run.dir`, under a name that rarec might take."""
    world.copy("new", place)
    name = generator.choice(["config.yaml", "resolved.yaml", "prepare.yaml", "prepare/config.yaml", "record.json"])
    path = place / RUN / name
    path.parent.mkdir(parents=True)
    (place / "config.yaml").rename(path)
    words = [generator.choice(["prepare", "run"]), f"run/{name}"]
    top = f"run/{name.split('/')[0]}"
    return Harm(f"the configuration is run/{name}", Command(words, str(place)), (path.name, top), (top,))


def _model_inside(generator: random.Random, world: World, place: Path) -> Harm:
    """Keep the language model in `run.dir`."""
    world.copy("new", place)
    name = generator.choice(["llm", "bundle", "shards", "shards/model"])
    (place / RUN / name).parent.mkdir(parents=True, exist_ok=True)
    (place / "llm").rename(place / RUN / name)
    top = f"run/{name.split('/')[0]}"
    words = ["run", "config.yaml", f"llm.path=run/{name}"]
    return Harm(f"the language model is in run/{name}", Command(words, str(place)), ("llm", top), (top,))


def _run_is_here(generator: random.Random, world: World, place: Path) -> Harm:
    """Run in the directory of the user's own files, or in a link to an empty directory."""
    world.copy("new", place)
    if generator.random() < 0.5:
        (place / RUN).mkdir()
        for name in ("log", "llm", "config.yaml"):
            (place / name).rename(place / RUN / name)
        words, planted = ["prepare", "config.yaml", "run.dir=."], ("run/log", "run/llm", "run/config.yaml")
        return Harm("run.dir is the user's folder", Command(words, str(place / RUN)), ("run.dir", "config"), planted)
    (place / "disk").mkdir()
    (place / RUN).symlink_to("disk")
    command = Command(["prepare", "config.yaml"], str(place))
    return Harm("run.dir is a link to an empty directory", command, (RUN,), expect="any", elsewhere=True)


# ---- bytes


def _flip(generator: random.Random, data: bytes, other: bytes) -> bytes:
    if not data:
        return b"\x01"
    changed = bytearray(data)
    changed[generator.randrange(len(data))] ^= 1 << generator.randrange(8)
    return bytes(changed)


DAMAGES: dict[str, Callable[[random.Random, bytes, bytes], bytes]] = {
    "one bit flipped": _flip,
    "cut short": lambda generator, data, other: data[: generator.randrange(len(data))] if data else b"{",
    "emptied": lambda generator, data, other: b"",
    "doubled": lambda generator, data, other: data * 2,
    "a byte more": lambda generator, data, other: data + b"\n",
    "noise": lambda generator, data, other: generator.randbytes(max(8, len(data))),
    "zeros": lambda generator, data, other: bytes(len(data)),
    "another file's bytes": lambda generator, data, other: other,
    "an empty list": lambda generator, data, other: b"[]",
}
READERS = ["run", "run", "run", *STAGES, "recommend", "shards --verify"]


def damage(generator: random.Random, world: World, place: Path) -> Harm:
    """Damage one file that rarec has made, in a finished run or one that was killed."""
    half = generator.choice(list(HALF))
    state = generator.choice(["finished", "finished", "finished", f"half-{half}", f"half-fresh-{half}"])
    world.copy(state, place)
    files = sorted(path for path in (place / RUN).rglob("*") if path.is_file())
    if state != "finished" and generator.random() < 0.7:
        parent, _, last = HALF[half].rpartition("/")
        begun = (f"{parent}/.{last}.fresh/".lstrip("/"), f"{HALF[half]}/")
        files = [path for path in files if path.relative_to(place / RUN).as_posix().startswith(begun)]
    path, other = generator.choice(files), generator.choice(files)
    what = ruin(generator, path, other)
    words = _reader(generator, half, state)
    name = path.relative_to(place).as_posix()
    return Harm(f"{name}: {what} ({state})", Command(words, str(place)), (path.name, path.parent.name))


def ruin(generator: random.Random, path: Path, other: Path) -> str:
    """Damage a file, or put something else in its place; return what was done."""
    what = generator.choice([*DAMAGES, "removed", "a directory", "a pipe", "mode 0"])
    if what in DAMAGES:
        path.write_bytes(DAMAGES[what](generator, path.read_bytes(), other.read_bytes()))
    elif what == "mode 0":
        path.chmod(0)
    else:
        path.unlink()
        if what != "removed":
            (Path.mkdir if what == "a directory" else os.mkfifo)(path)
    return what


def _reader(generator: random.Random, half: str, state: str) -> list[str]:
    """Return a command that reads what is there."""
    if state != "finished":
        fresh = state.startswith("half-fresh") and generator.random() < 0.7
        return [half if fresh else generator.choice([half, "run"]), "config.yaml", *["--fresh"] * fresh]
    stage, *options = generator.choice(READERS).split()
    if stage == "recommend":
        return [stage, f"{RUN}/bundle", "--history", "i00,i01"]
    fresh = stage in STAGES and not options and generator.random() < 0.3
    return [stage, "config.yaml", *options, *["--fresh"] * fresh]
