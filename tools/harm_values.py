"""Harms to the configuration: any field set to an odd value (`values`), and files that are odd YAML."""

import json
import random
import types
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml
from harm_oracle import Harm
from harm_process import Command
from harm_world import World
from pydantic import BaseModel

from rarec.config import RunConfig

NUMBERS: dict[str, Any] = {
    "nan": float("nan"),
    "inf": float("inf"),
    "-inf": float("-inf"),
    "1e308": 1e308,
    "10^30": 10**30,
    "-10^30": -(10**30),
    "10^400": 10**400,
}
"""Numbers that are refused when the configuration is read, or can be worked with: in no case later."""
ODD: dict[str, Any] = {
    "10^9": 10**9,
    "10^12": 10**12,
    "-1": -1,
    "0": 0,
    "-0.0": -0.0,
    "1e-300": 1e-300,
    "0.5": 0.5,
    "true": True,
    "null": None,
    "an empty text": "",
    "a space": " ",
    "ESC": "\x1b[31mred\x1b[0m",
    "BEL": "a\x07b",
    "NUL": "a\x00b",
    "C1": "a\x9bb",
    "a line break": "a\nb\n",
    "markup": "[bold]x[/bold][/red]",
    "braces": "{history}{soft:id}{",
    "emoji": "\U0001f4a5",
    "right to left": "\u202eabc",
    "a lone surrogate": "\ud800",
    "5000 characters": "x" * 5_000,
    "up": "../../..",
    "home": "~/x",
    "a URL": "s3://bucket/x",
    "a file URL": "file:///nowhere/x",
    "a device": "/dev/null",
    "a file below a file": "config.yaml/x",
    "an absolute path": "/proc/x",
    "the log": "log/interactions.csv",
    "a dotted name": "os:system",
    "an empty list": [],
    "a list in a list": [[1]],
    "a list of many": list(range(2_000)),
    "a list of the same": ["id", "id"],
    "an empty section": {},
    "a section": {"a": {"b": 1}},
    "a date": "2020-01-01",
}
_STAGES = {"run": "prepare", "sources": "ids", "graph": "ids", "llm": "shards", "prompt": "shards", "readout": "shards"}
_STAGES |= {"alignment": "train", "lora": "train", "loss": "train"}
"""Stages that read a section first, where it does not bear the stage's name."""
_ELSEWHERE = ("run.dir", "run.shared", "prepare.scratch")
"""Fields that say where rarec writes."""


def fields(model: type[BaseModel] = RunConfig, prefix: str = "") -> Iterator[str]:
    """Yield the name of every field: `train.lr`."""
    for name, field in model.model_fields.items():
        inside = [one for one in _types(field.annotation) if isinstance(one, type) and issubclass(one, BaseModel)]
        if inside:
            yield from fields(inside[0], f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def _types(annotation: Any) -> Iterator[Any]:
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        for one in typing.get_args(annotation):
            yield from _types(one)
    elif typing.get_origin(annotation) is not dict:
        yield annotation


FIELDS = sorted(fields())


def set_value(generator: random.Random, world: World, place: Path) -> Harm:
    """Set a field to an odd value, in the file or as an override; or give a file that is odd as a whole."""
    if generator.random() < 0.15:
        return _odd_file(generator, world, place)
    world.copy("finished", place)
    field = generator.choice(FIELDS)
    number = generator.random() < 0.4
    kind = generator.choice(list(NUMBERS if number else ODD))
    value = (NUMBERS if number else ODD)[kind]
    section, *parts = field.split(".")
    words = [_STAGES.get(section, section), "config.yaml", "--fresh"]
    override = generator.random() < 0.3
    if override and kind not in ("NUL", "a lone surrogate"):  # no argument can hold these
        words.append(f"{field}={_in_yaml(value)}")
    else:
        _write(place / "config.yaml", field, value)
    return Harm(
        f"{field}: {kind} ({'an override' if override else 'in the file'})",
        Command(words, str(place)),
        (parts[-1] if parts else section, field, section, "config.yaml, line"),
        expect="any",
        early=number,
        elsewhere=field in _ELSEWHERE,
    )


def _in_yaml(value: Any) -> str:
    numbers = {"nan": ".nan", "inf": ".inf", "-inf": "-.inf"}
    return numbers.get(str(value)) or json.dumps(value)


def _write(path: Path, field: str, value: Any) -> None:
    """Set a field in a file, even to what no YAML library would write."""
    tree = yaml.safe_load(path.read_text())
    *parents, leaf = field.split(".")
    section = tree
    for parent in parents:
        if not isinstance(section.get(parent), dict):
            section[parent] = {}
        section = section[parent]
    section[leaf] = "PLACE-OF-THE-VALUE"
    text = yaml.safe_dump(tree, sort_keys=False).replace("PLACE-OF-THE-VALUE", _in_yaml(value))
    path.write_text(text)


def _aliases() -> bytes:
    lines = ["a0: &a0 [x, x]"] + [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 12)]
    return "\n".join(["run: {dir: run}", *lines, "ids: *a11"]).encode()


ODD_FILES: dict[str, Callable[[bytes], bytes]] = {
    "an alias bomb": lambda text: _aliases(),
    "merges of merges": lambda text: b"a: &a {x: 1}\nb: &b {<<: [*a, *a]}\n" * 1 + text,
    "lists 2000 deep": lambda text: text + b"export: " + b"[" * 2_000 + b"]" * 2_000 + b"\n",
    "sections 2000 deep": lambda text: text + b"export: " + b"{a: " * 2_000 + b"1" + b"}" * 2_000 + b"\n",
    "a loop": lambda text: text + b"export: &e {variant: *e}\n",
    "a field twice": lambda text: text + b"report: {examples: 2}\n",
    "a Python object": lambda text: text + b"export: !!python/object/apply:os.system ['touch mine']\n",
    "an unknown tag": lambda text: text + b"export: !mine {}\n",
    "UTF-16": lambda text: text.decode().encode("utf-16"),
    "latin-1": lambda text: text.replace(b"a comment", b"a comm\xe9nt"),
    "a byte-order mark": lambda text: b"\xef\xbb\xbf" + text,
    "NUL bytes": lambda text: text + b"\0\0",
    "ESC in a name": lambda text: text + b'"\\e[31mred": 1\n',
    "empty": lambda text: b"",
    "a list": lambda text: b"- 1\n",
    "a text": lambda text: b"hello\n",
    "two documents": lambda text: text + b"---\n" + text,
    "tabs": lambda text: text.replace(b"  ", b"\t"),
    "cut short": lambda text: text[: len(text) // 2],
    "10 MB of comments": lambda text: text + b"# x\n" * 2_500_000,
    "10^5 unknown fields": lambda text: text + b"".join(b"f%d: 1\n" % n for n in range(100_000)),
    "a section named by a number": lambda text: text + b"3: {a: 1}\n",
    "a date as a value": lambda text: text.replace(b"examples: 1", b"examples: 2020-01-01"),
    "an octal number": lambda text: text.replace(b"examples: 1", b"examples: 0o1"),
    "a sexagesimal number": lambda text: text.replace(b"examples: 1", b"examples: 1:30"),
}
_HARMLESS = ("a byte-order mark", "10 MB of comments", "latin-1", "an octal number")


def _odd_file(generator: random.Random, world: World, place: Path) -> Harm:
    world.copy("finished", place)
    kind, path = generator.choice(list(ODD_FILES)), place / "config.yaml"
    path.write_bytes(ODD_FILES[kind](path.read_bytes()))
    command = Command([generator.choice(["prepare", "report"]), "config.yaml"], str(place))
    return Harm(f"config.yaml is {kind}", command, ("config.yaml",), expect="any", early=kind not in _HARMLESS)
