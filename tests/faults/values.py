"""Harms to what the user gives: fields of the configuration (`values`), logs and language models (`inputs`)."""

import csv
import gzip
import io
import json
import types
import typing
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
import yaml
from hypothesis import strategies as st
from pydantic import BaseModel
from safetensors.torch import load_file, save_file

from rarec.config import RunConfig
from tests.commands import Command
from tests.faults.files import DAMAGES
from tests.faults.judge import Harm
from tests.faults.world import Draw, World

Rows = list[dict[str, Any]]
NUMBERS = st.sampled_from([float("nan"), float("inf"), float("-inf"), 1e308, 10**30, -(10**30), 10**400])
"""Numbers that are refused when the configuration is read, or can be worked with: in no case later."""
_PLACES = "../../.. ~/x s3://bucket/x file:///nowhere/x /dev/null config.yaml/x /proc/x log/interactions.csv os:system"
_TEXTS = ["", " ", "{history}{soft:id}{", "<b>[bold]x[/red]", "=cmd|'/c calc'!A0", "2020-02-30", "x" * 10**5, "\ud800"]
TEXTS = st.sampled_from([*_TEXTS, *_PLACES.split()]) | st.text(max_size=20)
_PLAIN = TEXTS | st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
ODD = st.recursive(_PLAIN, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3))
"""Values that a field or a column may be given, as JSON can hold them."""
STAGE_OF = {
    **{"run": "prepare", "sources": "ids", "graph": "ids", "llm": "shards", "prompt": "shards", "readout": "shards"},
    **{"alignment": "train", "lora": "train", "loss": "train"},
}
"""Stages that read a section first, where it does not bear the stage's name."""
ELSEWHERE = ("run.dir", "run.shared", "prepare.scratch")
"""Fields that say where rarec writes."""


def fields(model: type[BaseModel] = RunConfig, prefix: str = "") -> Iterator[str]:
    """Yield the name of every field: `train.lr`."""
    for name, field in model.model_fields.items():
        kinds = [kind for kind in _types(field.annotation) if isinstance(kind, type) and issubclass(kind, BaseModel)]
        yield from fields(kinds[0], f"{prefix}{name}.") if kinds else [f"{prefix}{name}"]


def _types(annotation: Any) -> Iterator[Any]:
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        yield from (inner for argument in typing.get_args(annotation) for inner in _types(argument))
    elif typing.get_origin(annotation) is not dict:
        yield annotation


FIELDS = sorted(fields())


def set_value(draw: Draw, world: World, place: Path) -> Harm:
    """Set a field to an odd value, in the file or as an override; or give a file that is odd as a whole."""
    world.copy("finished", place)
    if draw(st.integers(0, 6)) == 6:
        kind = draw(st.sampled_from(list(ODD_FILES)))
        (place / "config.yaml").write_bytes(ODD_FILES[kind]((place / "config.yaml").read_bytes()))
        command = Command([draw(st.sampled_from(["prepare", "report"])), "config.yaml"], str(place))
        return Harm(f"a configuration: {kind}", command, ("config.yaml",), expect="any", early=kind not in HARMLESS)
    field, is_number = draw(st.sampled_from(FIELDS)), draw(st.booleans())
    value = draw(NUMBERS if is_number else ODD)
    section, *parts = field.split(".")
    words = [STAGE_OF.get(section, section), "config.yaml", "--fresh"]
    if draw(st.booleans()) and "\0" not in str(value) and "\ud800" not in str(value):  # no argument can hold these
        words.append(f"{field}={_in_yaml(value)[:100_000]}")
    else:
        _write(place / "config.yaml", field, value)
    names = (parts[-1] if parts else section, field, section, "config.yaml, line")
    harm = Harm(f"{field}: {value!r:.80}", Command(words, str(place)), names, expect="any", early=is_number)
    return replace(harm, elsewhere=field in ELSEWHERE)


def _in_yaml(value: Any) -> str:
    return {"nan": ".nan", "inf": ".inf", "-inf": "-.inf"}.get(str(value)) or json.dumps(value)


def _write(path: Path, field: str, value: Any) -> None:
    """Set a field in a file, even to what no YAML library would write."""
    tree = yaml.safe_load(path.read_text())
    *parents, leaf = field.split(".")
    section = tree
    for parent in parents:
        section = section[parent] if isinstance(section.get(parent), dict) else section.setdefault(parent, {})
    section[leaf] = "PLACE-OF-THE-VALUE"
    path.write_text(yaml.safe_dump(tree, sort_keys=False).replace("PLACE-OF-THE-VALUE", _in_yaml(value)))


ALIASES = "\n".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 12))
ODD_FILES: dict[str, Callable[[bytes], bytes]] = {
    "an alias bomb": lambda text: f"run: {{dir: run}}\na0: &a0 [x, x]\n{ALIASES}\nids: *a11\n".encode(),
    "merges of merges": lambda text: b"a: &a {x: 1}\nb: &b {<<: [*a, *a]}\n" + text,
    "lists 2000 deep": lambda text: text + b"export: " + b"[" * 2_000 + b"]" * 2_000 + b"\n",
    "a loop": lambda text: text + b"export: &e {variant: *e}\n",
    "a field twice": lambda text: text + b"report: {examples: 2}\n",
    "a Python object": lambda text: text + b"export: !!python/object/apply:os.system ['touch mine']\n",
    "UTF-16": lambda text: text.decode().encode("utf-16"),
    "latin-1": lambda text: text.replace(b"a comment", b"a comm\xe9nt"),
    "a byte-order mark": lambda text: b"\xef\xbb\xbf" + text,
    "NUL bytes": lambda text: text + b"\0\0",
    "ESC in a name": lambda text: text + b'"\\e[31mred": 1\n',
    "empty": lambda text: b"",
    "a list": lambda text: b"- 1\n",
    "two documents": lambda text: text + b"---\n" + text,
    "tabs": lambda text: text.replace(b"  ", b"\t"),
    "cut short": lambda text: text[: len(text) // 2],
    "10 MB of comments": lambda text: text + b"# x\n" * 2_500_000,
    "10^5 unknown fields": lambda text: text + b"".join(b"f%d: 1\n" % n for n in range(100_000)),
    "a section named by a number": lambda text: text + b"3: {a: 1}\n",
    "a date as a value": lambda text: text.replace(b"examples: 1", b"examples: 2020-01-01"),
    "an octal number": lambda text: text.replace(b"examples: 1", b"examples: 0o1"),
}
HARMLESS = ("a byte-order mark", "10 MB of comments", "latin-1", "an octal number", "merges of merges")


# ---- logs


def harm_input(draw: Draw, world: World, place: Path) -> Harm:
    """Harm the log, the catalogue or the language model."""
    return draw(st.sampled_from([_odd_value, _odd_value, _odd_bytes, _odd_form, _odd_model]))(draw, world, place)


def write_rows(rows: Rows, path: Path) -> None:
    """Write rows in the format that the name says."""
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
        return
    text = io.StringIO()
    if ".jsonl" in path.name:
        text.writelines(json.dumps(row) + "\n" for row in rows)
    else:
        writer = csv.DictWriter(text, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    data = text.getvalue().encode(errors="surrogatepass")
    path.write_bytes(gzip.compress(data, mtime=0) if path.suffix == ".gz" else data)


def read_rows(path: Path) -> Rows:
    """Return the rows of a CSV file of the world."""
    with path.open() as file:
        return [row | ({"time": int(row["time"])} if "time" in row else {}) for row in csv.DictReader(file)]


def odd_column(draw: Draw, path: Path, rows: Rows) -> tuple[str, str]:
    """Put odd values into one column; return its name and what was done."""
    column, value = draw(st.sampled_from(list(rows[0]))), draw(ODD | NUMBERS)
    count = draw(st.sampled_from([1, len(rows) // 2, len(rows)]))
    for row in rows[:count]:
        row[column] = value
    return column, f"{path.name}, column {column}: {value!r:.60} in {count} of {len(rows)} rows"


def _table(draw: Draw, world: World, place: Path) -> tuple[Path, Rows, Command]:
    """Choose one of the two tables and a format; return file, rows and the command that reads it."""
    world.copy("new", place)
    table, form = draw(st.sampled_from(["interactions", "items"])), draw(st.sampled_from(FORMATS))
    path, rows = place / "log" / f"{table}.{form}", read_rows(place / "log" / f"{table}.csv")
    command = Command(["prepare", "config.yaml", f"prepare.{table}.path=log/{path.name}"], str(place))
    return path, rows, command


FORMATS = ("csv", "csv.gz", "jsonl", "jsonl.gz", "parquet")


def _odd_value(draw: Draw, world: World, place: Path) -> Harm:
    """Put odd values into one column."""
    path, rows, command = _table(draw, world, place)
    column, what = odd_column(draw, path, rows)
    try:
        write_rows(rows, path)
    except (pa.ArrowException, UnicodeEncodeError, OverflowError):  # this format cannot hold it
        write_rows(read_rows(place / "log" / f"{path.name.split('.')[0]}.csv"), path)
    return Harm(what, command, (path.name, column, "log"), expect="any")


def _odd_bytes(draw: Draw, world: World, place: Path) -> Harm:
    """Damage the bytes of a log. Those of a gzip file have a checksum."""
    path, rows, command = _table(draw, world, place)
    write_rows(rows, path)
    kind = draw(st.sampled_from(list(DAMAGES)))
    path.write_bytes(DAMAGES[kind](draw, path.read_bytes(), (place / "config.yaml").read_bytes()))
    is_checked = path.suffix == ".gz" and kind not in ("emptied", "another file's bytes", "an empty list")
    return Harm(f"{path.name}: {kind}", command, (path.name, "log"), expect="tables" if is_checked else "any")


FORMS: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "a column twice": (lambda text: b"\n".join(line + b"," + line for line in text.splitlines()), "refusal"),
    "other names of columns": (lambda text: text.replace(b"item", b" ITEM"), "refusal"),
    "rows of other lengths": (lambda text: text + b"u00,i00,1700000000,more,and,more\nu01\n", "refusal"),
    "CRLF": (lambda text: text.replace(b"\r\n", b"\n").replace(b"\n", b"\r\n"), "tables"),
    "a byte-order mark": (lambda text: b"\xef\xbb\xbf" + text, "tables"),
    "UTF-16": (lambda text: text.decode().encode("utf-16"), "any"),
    "a header only": (lambda text: text.splitlines()[0] + b"\n", "refusal"),
}


def _odd_form(draw: Draw, world: World, place: Path) -> Harm:
    """Write a CSV file of another form, or a directory in its place."""
    world.copy("new", place)
    path, kind = (
        place / "log" / f"{draw(st.sampled_from(['interactions', 'items']))}.csv",
        draw(st.sampled_from(list(FORMS))),
    )
    change, expect = FORMS[kind]
    path.write_bytes(change(path.read_bytes()))
    return Harm(f"{path.name}: {kind}", Command(["prepare", "config.yaml"], str(place)), (path.name,), expect=expect)


# ---- language models


def _odd_model(draw: Draw, world: World, place: Path) -> Harm:
    """Damage or remove a file of the model, change its shape or its weights, or pickle it."""
    world.copy("upto-neighbours", place)
    model = place / "llm"
    path, weights = draw(st.sampled_from(sorted(model.iterdir()))), model / "model.safetensors"
    kind, expect = draw(st.sampled_from([*DAMAGES, "removed", "pickled", "another shape", "not a number"])), "refusal"
    if kind in DAMAGES:
        path.write_bytes(DAMAGES[kind](draw, path.read_bytes(), (place / "config.yaml").read_bytes()))
        expect = "any"
    elif kind == "removed":
        path.unlink()
        expect = "any" if path.name == "tokenizer_config.json" else "refusal"
    elif kind == "pickled":
        torch.save(load_file(weights), model / "pytorch_model.bin")
        weights.unlink()
    elif kind == "another shape":
        tree = json.loads((model / "config.json").read_text())
        field = draw(st.sampled_from(["vocab_size", "hidden_size", "num_hidden_layers", "intermediate_size"]))
        tree[field] = draw(st.sampled_from([tree[field] + 1, 10**9, 0, -1, "many", None, 1e308, [2]]))
        (model / "config.json").write_text(json.dumps(tree))
    else:
        tensors = load_file(weights)
        name = draw(st.sampled_from(sorted(name for name in tensors if "pooler" not in name)))
        tensors[name].view(-1)[0] = draw(st.sampled_from([float("nan"), float("inf")]))
        save_file(tensors, weights, {"format": "pt"})
    names = (path.name, "llm", "tokenizer")
    return Harm(f"llm/{path.name}: {kind}", Command(["shards", "config.yaml"], str(place)), names, expect=expect)
