"""Harms to what the user gives: fields of the configuration (`values`), logs and language models (`inputs`)."""

import csv
import gzip
import io
import json
import typing
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from hypothesis import strategies as st
from pydantic import BaseModel

from rarec.config import RunConfig
from rarec.config.load import set_field
from tests.commands import Command
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


def damage_bytes(draw: Draw, path: Path, other: Path) -> str:
    """Damage a file, perhaps with bytes of another; return what was done."""
    kind: str = draw(st.sampled_from(list(DAMAGES)))
    path.write_bytes(DAMAGES[kind](draw, path.read_bytes(), other.read_bytes()))
    return kind


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
        is_table = typing.get_origin(field.annotation) is dict
        kinds = () if is_table else (field.annotation, *typing.get_args(field.annotation))
        sections = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)]
        yield from fields(sections[0], f"{prefix}{name}.") if sections else [f"{prefix}{name}"]


FIELDS = sorted(fields())


def set_value(draw: Draw, world: World, place: Path) -> Harm:
    """Set a field to an odd value, in the file or as an override."""
    world.copy("finished", place)
    field, is_number = draw(st.sampled_from(FIELDS)), draw(st.booleans())
    value = draw(NUMBERS if is_number else ODD)
    section, *parts = field.split(".")
    words = [STAGE_OF.get(section, section), "config.yaml", "--fresh"]
    if draw(st.booleans()) and "\0" not in str(value) and "\ud800" not in str(value):  # no argument can hold these
        words.append(f"{field}={_in_yaml(value)[:100_000]}")
    else:
        _write(place / "config.yaml", field, value)
    names = (parts[-1] if parts else section, field, section, "config.yaml, line")
    command, elsewhere = Command(words, str(place)), field in ELSEWHERE
    return Harm(f"{field}: {value!r:.80}", command, names, expect="any", early=is_number, elsewhere=elsewhere)


def _in_yaml(value: Any) -> str:
    return {"nan": ".nan", "inf": ".inf", "-inf": "-.inf"}.get(str(value)) or json.dumps(value)


def _write(path: Path, field: str, value: Any) -> None:
    """Set a field in a file, even to what no YAML library would write."""
    tree = yaml.safe_load(path.read_text())
    set_field(tree, field, "PLACE-OF-THE-VALUE")
    path.write_text(yaml.safe_dump(tree, sort_keys=False).replace("PLACE-OF-THE-VALUE", _in_yaml(value)))


# ---- logs and language models


FORMATS = ("csv", "csv.gz", "jsonl", "jsonl.gz", "parquet")


def harm_input(draw: Draw, world: World, place: Path) -> Harm:
    """Harm the log, the catalogue or the language model."""
    return draw(st.sampled_from([_odd_value, _odd_value, _odd_bytes, _odd_model]))(draw, world, place)


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


def _odd_value(draw: Draw, world: World, place: Path) -> Harm:
    """Put odd values into one column."""
    path, rows, command = _table(draw, world, place)
    write_rows(rows, path)
    column, what = odd_column(draw, path, rows)
    with suppress(pa.ArrowException, UnicodeEncodeError, OverflowError):  # this format cannot hold it
        write_rows(rows, path)
    return Harm(what, command, (path.name, column, "log"), expect="any")


def _odd_bytes(draw: Draw, world: World, place: Path) -> Harm:
    """Damage the bytes of a log."""
    path, rows, command = _table(draw, world, place)
    write_rows(rows, path)
    kind = damage_bytes(draw, path, place / "config.yaml")
    return Harm(f"{path.name}: {kind}", command, (path.name, "log"), expect="any")


def _odd_model(draw: Draw, world: World, place: Path) -> Harm:
    """Damage or remove a file of the language model."""
    world.copy("upto-neighbours", place)
    path = draw(st.sampled_from(sorted((place / "llm").iterdir())))
    kind, expect = "removed", "any" if path.name == "tokenizer_config.json" else "refusal"
    if draw(st.booleans()):
        kind, expect = damage_bytes(draw, path, place / "config.yaml"), "any"
    else:
        path.unlink()
    command = Command(["shards", "config.yaml"], str(place))
    return Harm(f"llm/{path.name}: {kind}", command, (path.name, "llm", "tokenizer"), expect=expect)
