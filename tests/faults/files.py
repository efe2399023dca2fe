"""Harms to files: of the user's, in rarec's way (`trees`); of rarec's, damaged (`bytes`); of bundles (`bundles`)."""

import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from tests.commands import Command, Outcome
from tests.faults.judge import Harm
from tests.faults.surroundings import SURROUNDINGS
from tests.faults.values import TEXTS, damage_bytes, odd_column, read_rows, write_rows
from tests.faults.world import FOLDERS, HALF, RUN, STAGES, UPTO, Draw, World, next_stage, snapshot

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
TEXT = b"the user's own words\n"


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
    "a file of mode 0600": lambda path, place: (path.write_bytes(TEXT), path.chmod(0o600)),
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
    """Put something of the user's where rarec writes."""
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


def _words(draw: Draw, folder: str, state: str) -> list[str]:
    """Return a command: the stage of a directory if its inputs exist, or another that is possible, or all."""
    stages = {made.split("/")[0]: stage for stage, folders in FOLDERS.items() for made in folders}
    stage = stages.get(folder.lstrip(".").split(".")[0])
    possible = STAGES if state == "finished" else STAGES[: STAGES.index(next_stage(state)) + 1]
    if stage not in possible or draw(st.integers(0, 2)) == 2:
        stage = draw(st.sampled_from([possible[-1], *possible, "run"]))
    return [stage, "config.yaml", *["--fresh"] * draw(st.booleans())]


# ---- bytes


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
    path, what = ruin(draw, files)
    command = Command(_reader(draw, half, state), str(place))
    return Harm(f"{path.relative_to(place)}: {what} ({state})", command, (path.name, path.parent.name))


def ruin(draw: Draw, files: list[Path]) -> tuple[Path, str]:
    """Damage one of some files, or put something else in its place; return the file and what was done."""
    path, kind = draw(st.sampled_from(files)), draw(st.sampled_from(["damaged", "damaged", *REPLACED, "mode 0"]))
    if kind == "damaged":
        return path, damage_bytes(draw, path, draw(st.sampled_from(files)))
    if kind == "mode 0":
        path.chmod(0)
    else:
        path.unlink()
        REPLACED[kind](path)
    return path, kind


def _reader(draw: Draw, half: str, state: str) -> list[str]:
    """Return a command that reads what is there."""
    fresh: list[Any] = ["--fresh"] * draw(st.booleans())
    if state != "finished":
        return [half, "config.yaml", *fresh] if state.startswith("half-fresh") else [half, "config.yaml"]
    stage, *options = draw(st.sampled_from(["run", *STAGES, "recommend", "shards --verify"])).split()
    if stage == "recommend":
        return [stage, f"{RUN}/bundle", "--history", "i000,i001"]
    return [stage, "config.yaml", *options, *(fresh if stage in STAGES and not options else [])]


# ---- bundles


BUNDLE, LOG, NEW, OUT = f"{RUN}/bundle", "log/interactions.csv", "log/new.csv", f"{RUN}/out"
HISTORY = f"recommend {BUNDLE} --history i000,i001"
USER = f"recommend {BUNDLE} --log {LOG} --user"
ALL = f"recommend {BUNDLE} --all --log {LOG} --out"
ADD = f"items add {BUNDLE} {NEW} --out {OUT}"
COMMANDS = {
    "history": HISTORY,
    "user": f"{USER} u001",
    "parquet": f"{ALL} {OUT}.parquet",
    "csv": f"{ALL} {OUT}.csv",
    "jsonl": f"{ALL} {OUT}.jsonl",
    "add": ADD,
    "remove": f"items remove {BUNDLE} i003 i005 --out {OUT}",
    "realign": f"realign {BUNDLE} config.yaml --least -9 --out {OUT}",
    "vectors": f"export {BUNDLE} --to vectors --out {OUT}",
    "hub": f"export {BUNDLE} --to hub --out {OUT}",
}
REFUSED = f"""
{HISTORY} -k 0
{HISTORY} -k -3
{HISTORY} --device cuda:99
{HISTORY} --llm log
{HISTORY} --llm /nowhere
{HISTORY} --user u001
recommend {BUNDLE}
recommend log --history i0
recommend {RUN}/prepare --history i0
recommend /no --history i0
{ALL} {OUT}.xlsx
{ALL} /proc/nowhere/out.csv
{ADD} --vectors id
{ADD} --vectors id={NEW}
{ADD} --vectors id=log/items.csv
items add {BUNDLE} log/items.csv --out {OUT}
items remove {BUNDLE} nothing
items remove {BUNDLE} {" ".join(f"i{item:03d}" for item in range(24))}
export {BUNDLE} --to vectors
export {BUNDLE} --to nothing --out {OUT}
export {BUNDLE} --to vectors --out log
export {BUNDLE} --to peft --out {OUT}
realign {BUNDLE} config.yaml --least 1.01
realign {BUNDLE} nowhere.yaml
""".strip().splitlines()


def harm_bundle(draw: Draw, world: World, place: Path) -> Harm:
    """Harm a bundle, or what a command makes of it."""
    _prepare(world, place)
    command = _command(draw, place)
    harms = [_damaged, _damaged, _in_the_way, _odd_table, _odd_argument, _surrounded]
    return draw(st.sampled_from(harms))(draw, world, place, command)


def _prepare(world: World, place: Path) -> None:
    """Copy a finished run, and write a table of new items."""
    world.copy("finished", place)
    (place / NEW).write_text("item,title,brand\nn00,river lamp 1,RIVER\nn01,stone chair 2,STONE\nn02,,\n")


def _command(draw: Draw, place: Path, *names: str) -> Command:
    return Command(COMMANDS[draw(st.sampled_from(names or list(COMMANDS)))].split(), str(place))


def _damaged(draw: Draw, world: World, place: Path, command: Command) -> Harm:
    """Damage a file of the bundle, which stays so."""
    path, what = ruin(draw, sorted(path for path in (place / BUNDLE).rglob("*") if path.is_file()))
    names = (path.name, path.parent.name)
    check = _same_as(world, command)
    return Harm(f"{path.relative_to(place)}: {what}", command, names, expect="any", check=check)


def _in_the_way(draw: Draw, world: World, place: Path, _: Command) -> Harm:
    """Put something of the user's where a command writes, or beside it under a name that it might take."""
    command = _command(draw, place, *list(COMMANDS)[2:])
    out = place / command.words[command.words.index("--out") + 1]
    path = draw(st.sampled_from([out, out.with_name(f".{out.name}.aside-1"), out.with_name(f".{out.name}.progress")]))
    kind = draw(st.sampled_from(list(PLANTS)))
    PLANTS[kind](path, place)
    planted = (path.relative_to(place).as_posix(),)
    check = _same_as(world, command, but=planted)
    return Harm(f"{kind} at {planted[0]}", command, (path.name, out.name), planted, expect="any", check=check)


def _odd_table(draw: Draw, world: World, place: Path, _: Command) -> Harm:
    """Put odd values into a column of the new items or of the log."""
    name, commands = draw(st.sampled_from([(NEW, ["add"]), (LOG, ["user", "csv", "parquet", "jsonl"])]))
    rows = read_rows(place / name)
    column, what = odd_column(draw, place / name, rows)
    path = (place / name).with_suffix(draw(st.sampled_from([".csv", ".jsonl"])))
    write_rows(rows, path)
    command = _command(draw, place, *commands)
    words = [word.replace(name, path.relative_to(place).as_posix()) for word in command.words]
    return Harm(what, replace(command, words=words), (path.name, column, "--columns", "log"), expect="any")


def _odd_argument(draw: Draw, world: World, place: Path, command: Command) -> Harm:
    """Ask for what cannot be, or say it in an odd way."""
    text = draw(TEXTS).replace("\0", "").encode(errors="ignore").decode()
    words = draw(st.sampled_from([line.split() for line in REFUSED] + [[*HISTORY.split()[:3], text[:10_000]]]))
    is_history = len(words) == 4 and words[-1] == text[:10_000]
    return Harm("an argument", replace(command, words=words), expect="any" if is_history else "refusal")


def _surrounded(draw: Draw, world: World, place: Path, command: Command) -> Harm:
    """Run a command in odd surroundings; afterwards it must succeed."""
    harm = draw(st.sampled_from(SURROUNDINGS))(draw, place, command)
    return replace(harm, again=True, check=_same_as(world, command))


def _same_as(world: World, command: Command, but: tuple[str, ...] = ()) -> Callable[[Path, Outcome], list[str]]:
    """Return a check that a command prints and writes what it does with an undisturbed bundle."""

    def check(place: Path, outcome: Outcome) -> list[str]:
        printed, expected = _undisturbed(world, command.words)
        made = {path: content for path, content in _made(place).items() if not f"{RUN}/{path}".startswith(but)}
        other = [path for path in made | expected if made.get(path) != expected.get(path)]
        faults = [f"{path} is not what it is without the harm" for path in other]
        if outcome.stdout and outcome.stdout != printed:
            faults.append(f"it printed {outcome.stdout[:200]!r}, not {printed[:200]!r}")
        return faults[:3]

    return check


def _made(place: Path) -> dict[str, str]:
    """Return the contents of what the commands write, by path."""
    tree = snapshot(place / RUN)
    return {path: entry.content for path, entry in tree.items() if path.startswith(("out", ".out"))}


def _undisturbed(world: World, words: list[str]) -> tuple[str, dict[str, str]]:
    """Return what a command prints and writes with an undisturbed bundle."""
    key = " ".join(words)
    if key not in world.kept:
        place = world.root / "undisturbed"
        _prepare(world, place)
        outcome = world.must(words, place)
        world.kept[key] = outcome.stdout, _made(place)
        shutil.rmtree(place)
    printed, made = world.kept[key]
    return printed, made
