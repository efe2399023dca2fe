"""Harms to bundles and to what their commands are given (`bundles`): files, tables, arguments, what is in the way."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

from hypothesis import strategies as st

from tests.commands import Command, Outcome
from tests.faults.files import PLANTS, ruin
from tests.faults.judge import Harm, snapshot
from tests.faults.surroundings import SURROUNDINGS
from tests.faults.values import TEXTS, odd_column, read_rows, write_rows
from tests.faults.world import RUN, Draw, World

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
REFUSED = [
    *(f"{HISTORY} {option}" for option in ("-k 0", "-k -3", "-k many", "--device tpu", "--device cuda:99")),
    *(f"{HISTORY} {option}" for option in ("--llm log", "--llm /nowhere", "--user u001")),
    *(
        f"recommend {place}"
        for place in (BUNDLE, "log --history i0", f"{RUN}/prepare --history i0", "/no --history i0")
    ),
    *(f"{ALL} {path}" for path in (f"{OUT}.xlsx", "/proc/nowhere/out.csv")),
    *(f"{ALL} {OUT}.csv --columns {value}" for value in ("item", "item=nothing", "price=item")),
    f"{USER} nobody",
    *(f"{ADD} --vectors {value}" for value in ("id", f"id={NEW}", "id=log/items.csv")),
    f"{ADD} --columns title=nothing",
    f"items add {BUNDLE} log/items.csv --out {OUT}",
    f"items remove {BUNDLE} nothing",
    f"items remove {BUNDLE} {' '.join(f'i{item:03d}' for item in range(24))}",
    *(f"export {BUNDLE} --to {value}" for value in ("vectors", f"nothing --out {OUT}", "vectors --out log")),
    f"export {BUNDLE} --to peft --out {OUT}",
    *(f"realign {BUNDLE} {value}" for value in ("config.yaml --least 1.01", "nowhere.yaml")),
]


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
    files = sorted(path for path in (place / BUNDLE).rglob("*") if path.is_file())
    path = draw(st.sampled_from(files))
    what = ruin(draw, path, draw(st.sampled_from(files)))
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
    return partial(_check, world, command.words, but)


def _check(world: World, words: list[str], but: tuple[str, ...], place: Path, outcome: Outcome) -> list[str]:
    printed, wanted = _undisturbed(world, words)
    made = {path: content for path, content in _made(place).items() if not f"{RUN}/{path}".startswith(but)}
    faults = [
        f"{path} is not what it is without the harm" for path in made | wanted if made.get(path) != wanted.get(path)
    ]
    if outcome.stdout and outcome.stdout != printed:
        faults.append(f"it printed {outcome.stdout[:200]!r}, not {printed[:200]!r}")
    return faults[:3]


def _made(place: Path) -> dict[str, str]:
    """Return the contents of what the commands write, by path."""
    tree = snapshot(place / RUN)
    return {path: entry.content for path, entry in tree.items() if path.startswith(("out", ".out"))}


def _undisturbed(world: World, words: list[str]) -> tuple[str, dict[str, str]]:
    """Return what a command prints and writes with an undisturbed bundle; kept, as it is asked for often."""
    kept = world.root / f"{'-'.join(words).replace('/', '_')}.json"
    if not kept.exists():
        place = world.root / "undisturbed"
        _prepare(world, place)
        outcome = world.must(words, place)
        kept.write_text(json.dumps([outcome.stdout, _made(place)]))
        shutil.rmtree(place)
    printed, made = json.loads(kept.read_text())
    return printed, made
