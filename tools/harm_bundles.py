"""Harms to bundles and to what their commands are given (`bundles`): files, tables, arguments, what is in the way."""

import json
import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

from harm_files import PLANTS, ruin
from harm_inputs import VALUES, read_rows, write_rows
from harm_oracle import Harm, snapshot
from harm_process import Command, Outcome
from harm_surroundings import limit, set_umask, set_variable, stream
from harm_world import RUN, World

BUNDLE = f"{RUN}/bundle"
LOG = "log/interactions.csv"
NEW = "log/new.csv"
OUT = f"{RUN}/out"
HISTORY = ["recommend", BUNDLE, "--history", "i00,i01"]
USER = ["recommend", BUNDLE, "--user", "u01", "--log", LOG]
ALL = ["recommend", BUNDLE, "--all", "--log", LOG, "--out"]
ADD = ["items", "add", BUNDLE, NEW, "--out", OUT]
COMMANDS = {
    "history": HISTORY,
    "user": USER,
    "parquet": [*ALL, f"{OUT}.parquet"],
    "csv": [*ALL, f"{OUT}.csv"],
    "jsonl": [*ALL, f"{OUT}.jsonl"],
    "add": ADD,
    "remove": ["items", "remove", BUNDLE, "i03", "i05", "--out", OUT],
    "realign": ["realign", BUNDLE, "config.yaml", "--least", "-9", "--out", OUT],
    "vectors": ["export", BUNDLE, "--to", "vectors", "--out", OUT],
    "hub": ["export", BUNDLE, "--to", "hub", "--out", OUT],
}
ARGUMENTS: list[tuple[list[str], str]] = [
    ([*HISTORY, "-k", "0"], "refusal"),
    ([*HISTORY, "-k", "-3"], "refusal"),
    ([*HISTORY, "-k", "many"], "refusal"),
    ([*HISTORY, "-k", "999999999"], "any"),
    ([*HISTORY, "--device", "tpu"], "refusal"),
    ([*HISTORY, "--device", "cuda:99"], "refusal"),
    ([*HISTORY, "--llm", "log"], "refusal"),
    ([*HISTORY, "--llm", "/nowhere"], "refusal"),
    ([*HISTORY, "--trust", "no.such:Thing"], "any"),
    ([*HISTORY, "--user", "u01"], "refusal"),
    (["recommend", BUNDLE], "refusal"),
    (["recommend", "log", "--history", "i00"], "refusal"),
    (["recommend", f"{RUN}/prepare", "--history", "i00"], "refusal"),
    (["recommend", "/nowhere", "--history", "i00"], "refusal"),
    ([*ALL, f"{OUT}.xlsx"], "refusal"),
    ([*ALL, "/proc/nowhere/out.csv"], "refusal"),
    ([*ALL, f"{OUT}.csv", "--columns", "item"], "refusal"),
    ([*ALL, f"{OUT}.csv", "--columns", "item=nothing"], "refusal"),
    ([*ALL, f"{OUT}.csv", "--columns", "price=item"], "refusal"),
    ([*USER[:3], "nobody", *USER[4:]], "refusal"),
    ([*ADD, "--vectors", "id"], "refusal"),
    ([*ADD, "--vectors", f"id={NEW}"], "refusal"),
    ([*ADD, "--vectors", "id=log/items.csv"], "refusal"),
    ([*ADD, "--columns", "title=nothing"], "refusal"),
    (["items", "add", BUNDLE, "log/items.csv", "--out", OUT], "refusal"),
    (["items", "remove", BUNDLE, "nothing"], "refusal"),
    (["items", "remove", BUNDLE, *(f"i{item:02d}" for item in range(24))], "refusal"),
    (["export", BUNDLE, "--to", "vectors"], "refusal"),
    (["export", BUNDLE, "--to", "nothing", "--out", OUT], "refusal"),
    (["export", BUNDLE, "--to", "vectors", "--out", "log"], "refusal"),
    (["export", BUNDLE, "--to", "peft", "--out", OUT], "refusal"),
    (["realign", BUNDLE, "config.yaml", "--least", "1.01"], "refusal"),
    (["realign", BUNDLE, "nowhere.yaml"], "refusal"),
]
"""Commands that must be refused, or whose end may be any."""


def harm_bundle(generator: random.Random, world: World, place: Path) -> Harm:
    """Harm a bundle, or what a command makes of it."""
    makers = [_damaged, _damaged, _damaged, _in_the_way, _odd_table, _odd_table, _odd_argument, _surrounded]
    world.copy("finished", place)
    write_new(place)
    return generator.choice(makers)(generator, world, place)


def write_new(place: Path) -> None:
    """Write a table of new items."""
    (place / NEW).write_text("item,title,brand\nn00,river lamp 1,RIVER\nn01,stone chair 2,STONE\nn02,,\n")


def _command(generator: random.Random, place: Path, *names: str) -> Command:
    return Command(COMMANDS[generator.choice(names or list(COMMANDS))], str(place))


def _damaged(generator: random.Random, world: World, place: Path) -> Harm:
    """Damage a file of the bundle."""
    files = sorted(path for path in (place / BUNDLE).rglob("*") if path.is_file())
    path = generator.choice(files)
    what = ruin(generator, path, generator.choice(files))
    command = _command(generator, place)
    names = (path.name, path.parent.name)
    harm = Harm(f"{path.relative_to(place)}: {what}", command, names, check=_same_as(world, command))
    return replace(harm, expect="any")  # the bundle itself is damaged, and stays so


def _in_the_way(generator: random.Random, world: World, place: Path) -> Harm:
    """Put something of the user's where a command writes, or beside it under a name that it might take."""
    command = _command(generator, place, *list(COMMANDS)[2:])
    out = place / command.words[-1 if command.words[0] != "items" else command.words.index("--out") + 1]
    path = generator.choice([out, out.with_name(f".{out.name}.aside-1"), out.with_name(f".{out.name}.progress")])
    kind = generator.choice(list(PLANTS))
    PLANTS[kind](path, place)
    planted = (path.relative_to(place).as_posix(),)
    harm = Harm(f"{kind} at {planted[0]}", command, (path.name, out.name), planted, expect="any")
    return replace(harm, check=_same_as(world, command, but=planted))


def _odd_table(generator: random.Random, world: World, place: Path) -> Harm:
    """Put odd values into a column of the new items or of the log."""
    name, commands = generator.choice([(NEW, ["add"]), (LOG, ["user", "csv", "parquet", "jsonl"])])
    rows = read_rows(place / name)
    column, kind = generator.choice(list(rows[0])), generator.choice(list(VALUES))
    for row in generator.sample(rows, generator.choice([1, len(rows)])):
        row[column] = VALUES[kind]
    path = (place / name).with_suffix(generator.choice([".csv", ".jsonl"]))
    write_rows(rows, path)
    command = _command(generator, place, *commands)
    words = [word.replace(name, path.relative_to(place).as_posix()) for word in command.words]
    command = replace(command, words=words)
    names = (path.name, column, "--columns", "log")
    return Harm(f"{path.name}, column {column}: {kind}", command, names, expect="any")


def _odd_argument(generator: random.Random, world: World, place: Path) -> Harm:
    """Ask for what cannot be, or say it in an odd way."""
    if generator.random() < 0.3:
        odd = "".join(str(value) for value in generator.sample(list(VALUES.values()), 2)).replace("\x00", "")
        words = [*HISTORY[:3], odd.encode(errors="ignore").decode()[:10_000]]
        return Harm("an odd history", Command(words, str(place)), expect="any")
    words, expect = generator.choice(ARGUMENTS)
    return Harm("an argument", Command(words, str(place)), expect=expect)


def _surrounded(generator: random.Random, world: World, place: Path) -> Harm:
    """Run a command in odd surroundings; afterwards it must succeed."""
    command = _command(generator, place)
    harm = generator.choice([set_variable, stream, limit, set_umask])(generator, place, command)
    return replace(harm, again=True, check=_same_as(world, command))


def _same_as(world: World, command: Command, but: tuple[str, ...] = ()) -> Callable[[Path, Outcome], list[str]]:
    """Return a check that a command prints and writes what it does with an undisturbed bundle."""
    return partial(_check, world, command.words, but)


def _check(world: World, words: list[str], but: tuple[str, ...], place: Path, outcome: Outcome) -> list[str]:
    printed, wanted = _undisturbed(world, words)
    made = {path: content for path, content in _made(place).items() if not path.startswith(but)}
    faults = [f"{path} is not what it is without the harm" for path in wanted if made.get(path) != wanted[path]]
    faults += [f"it wrote {path}" for path in made if path not in wanted]
    if outcome.stdout and outcome.stdout != printed:
        faults.append(f"it printed {outcome.stdout[:200]!r}, not {printed[:200]!r}")
    return faults[:3]


def _made(place: Path) -> dict[str, str]:
    """Return the contents of what the commands write, by path."""
    tree = snapshot(place)
    return {path: entry.content for path, entry in tree.items() if path.startswith((OUT, f"{RUN}/.out"))}


def _undisturbed(world: World, words: list[str]) -> tuple[str, dict[str, str]]:
    """Return what a command prints and writes with an undisturbed bundle; kept, as it is asked for often."""
    kept = world.root / "bundles" / f"{'-'.join(words).replace('/', '_')}.json"
    if not kept.exists():
        kept.parent.mkdir(exist_ok=True)
        place = world.root / "undisturbed"
        world.copy("finished", place)
        write_new(place)
        outcome = world.must(words, place)
        kept.write_text(json.dumps([outcome.stdout, _made(place)]))
        shutil.rmtree(place)
    printed, made = json.loads(kept.read_text())
    return printed, made
