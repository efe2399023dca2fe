"""Harms to what the user gives: the configuration (`values`), logs, language models and arguments (`inputs`)."""

import gzip
import json
import typing
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import torch
import yaml
from hypothesis import strategies as st
from pydantic import BaseModel
from safetensors.torch import load_file, save_file

from rarec.config import RunConfig
from rarec.config.load import set_field
from tests.commands import Command
from tests.faults.files import DAMAGES, Change, Draw, copied, damage_bytes
from tests.faults.judge import Harm
from tests.tiny_runs import BUNDLE, LOG, NEW, TABLE, USES, World

_PLACES = ". log ../../.. ~/x s3://b/x file:///nowhere/x /dev/null config.yaml/x /proc/x log/interactions.csv os:system"
_TEXTS = ["", " ", "{history}{soft:id}{", "<b>[bold]x[/red]", "=cmd|'/c calc'!A0", "2020-02-30", "x" * 10**5, "\ud800"]
TEXTS = st.sampled_from([*_TEXTS, *_PLACES.split()]) | st.text(max_size=20)
_PLAIN = TEXTS | st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
ODD = st.recursive(_PLAIN, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3))
"""Values that a field or a column may be given, as JSON can hold them."""
NUMBERS = st.sampled_from([float("nan"), float("inf"), float("-inf"), 1e308, 10**30, -(10**30), 10**400])
"""Numbers that are refused when the configuration is read, or can be worked with: in no case later."""
_MANY = "".join(f"\nf{n}: 1" for n in range(10**5))
_BOMB = "".join(f"\na{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 12))
REFUSED = [
    *("{x: &e [*e]}", "!mine {}", "!!python/object/apply:os.system ['touch mine']", "[*nothing]", "1\n\t- 1"),
    *('1\n"\\e[31mred": 1', "1\n3: {a: 1}", "1\nreport: {}", "1\n---\nrun: {}", f"1{_MANY}"),
    *("[" * 2000 + "]" * 2000, "{a: " * 2000 + "1" + "}" * 2000, f"1\na0: &a0 [x, x]{_BOMB}\nx: *a11"),
]
"""YAML that no field can hold, or that no configuration can hold after a field."""
HARMLESS = ["2020-01-01", "0o1", "1:30", "{<<: [{a: 1}, {a: 1}]}", "1" + "\n# x" * 2_500_000]
"""YAML that a field may hold."""
FORMS: dict[str, Change] = {
    "UTF-16": lambda data, at, other: data.decode().encode("utf-16"),
    "latin-1": lambda data, at, other: data.replace(b"e", b"\xe9"),
    "a byte-order mark": lambda data, at, other: b"\xef\xbb\xbf" + data,
    "NUL bytes": lambda data, at, other: data + b"\0\0",
    "CRLF": lambda data, at, other: data.replace(b"\r\n", b"\n").replace(b"\n", b"\r\n"),
    "tabs": lambda data, at, other: data.replace(b"  ", b"\t"),
    "a column twice": lambda data, at, other: b"\n".join(line + b"," + line for line in data.splitlines()),
    "other names of columns": lambda data, at, other: data.replace(b"item", b" ITEM"),
    "rows of other lengths": lambda data, at, other: data + b"u00,i00,1700000000,more,and,more\nu01\n",
    "a header only": lambda data, at, other: data.splitlines()[0] + b"\n",
}
"""Other forms of text files."""
SAME = ("a byte-order mark", "CRLF")
"""Forms in which a table is the same."""
STAGE_OF = {
    **{"run": "prepare", "sources": "ids", "llm": "shards", "prompt": "shards", "readout": "shards"},
    **{"alignment": "train", "lora": "train", "loss": "train"},
}
"""Stages that read a section first, where it does not bear the stage's name."""
ELSEWHERE = ["run.dir", "run.shared", "prepare.scratch"]
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
    """Set a field to an odd value, in the file or as an override; or damage the file."""
    path, way = place / "config.yaml", draw(st.integers(0, 7))
    if way == 7:
        command = copied(world, place, "finished", [draw(st.sampled_from(["prepare", "report"])), path.name])
        what = damage_bytes(draw, path, place / LOG, DAMAGES | FORMS)
        return Harm(f"a configuration: {what}", command, (path.name,), expect="any")
    field, early = draw(st.sampled_from(FIELDS + ELSEWHERE * 5)), way < 4
    values, written = (NUMBERS, REFUSED) if early else (ODD, HARMLESS)
    value = draw(values.map(_in_yaml) | st.sampled_from(written))
    section, *parts = field.split(".")
    command = copied(world, place, "finished", [STAGE_OF.get(section, section), path.name, "--fresh"])
    if draw(st.booleans()):
        command.words.append(f"{field}={value[:100_000]}")
    else:
        tree = yaml.safe_load(path.read_text())
        set_field(tree, field, "PLACE-OF-THE-VALUE")
        path.write_text(yaml.safe_dump(tree, sort_keys=False).replace("PLACE-OF-THE-VALUE", value))
    names = (parts[-1] if parts else section, field, section, path.name)
    harm = Harm(f"{field}: {value:.80}", command, names, expect="any", early=early)
    return replace(harm, elsewhere=field in ELSEWHERE)


def _in_yaml(value: Any) -> str:
    return {"nan": ".nan", "inf": ".inf", "-inf": "-.inf"}.get(str(value)) or json.dumps(value)


def harm_input(draw: Draw, world: World, place: Path) -> Harm:
    """Harm the log, the catalogue, new items or the language model, or give odd arguments."""
    harms = [_harm_table, _harm_table, _harm_table, _harm_model, _odd_argument]
    return draw(st.sampled_from(harms))(draw, world, place)


def _harm_table(draw: Draw, world: World, place: Path) -> Harm:
    """Put odd values into a column of a table, damage its bytes, or write it in another form."""
    name = draw(st.sampled_from([LOG, LOG, "log/items.csv", TABLE]))
    form = draw(st.sampled_from(["csv", "csv.gz", "jsonl", "jsonl.gz", "parquet"]))
    uses = [line for line in USES if name in line]
    world.copy("finished" if name == TABLE or (uses and draw(st.booleans())) else NEW, place)
    rows = pd.read_csv(place / name, keep_default_na=False).to_dict("records")
    path = (place / name).with_suffix(f".{form}")
    new = path.relative_to(place).as_posix()
    words = ["prepare", "config.yaml", f"prepare.{path.name.split('.')[0]}.path={new}"]
    if world.copied == "finished":
        words = draw(st.sampled_from(uses)).replace(name, new).split()
    write_rows(rows, path)
    command, column, expect = Command(words, str(place)), draw(st.sampled_from(list(rows[0]))), "any"
    if draw(st.booleans()):
        what = damage_bytes(draw, path, place / "config.yaml", DAMAGES | (FORMS if form == "csv" else {}))
        is_checked = form.endswith(".gz") and what not in ("emptied", "another file's bytes", "an empty list")
        expect = "tables" if words[0] == "prepare" and (is_checked or what in SAME) else "any"
    else:
        value, count = draw(ODD | NUMBERS), draw(st.sampled_from([1, len(rows) // 2, len(rows)]))
        what = f"{column}: {value!r:.60} in {count} rows"
        with suppress(pa.ArrowException, UnicodeEncodeError, OverflowError):  # this format cannot hold it
            write_rows([row | {column: value} for row in rows[:count]] + rows[count:], path)
    return Harm(f"{new}: {what}", command, (path.name, column, "log", "--columns"), expect=expect)


def write_rows(rows: list[dict[str, Any]], path: Path) -> None:
    """Write rows in the format that the name says."""
    if ".jsonl" in path.name:
        with (gzip.open if path.suffix == ".gz" else open)(path, "wt") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
    else:
        frame = pd.DataFrame(rows, dtype=object)
        frame.to_parquet(path) if path.suffix == ".parquet" else frame.to_csv(path, index=False, errors="surrogatepass")


def _harm_model(draw: Draw, world: World, place: Path) -> Harm:
    """Damage or remove a file of the language model, change its shape or its weights, or pickle it."""
    world.copy("before-shards", place)
    path, weights = draw(st.sampled_from(sorted((place / "llm").iterdir()))), place / "llm" / "model.safetensors"
    kind, expect = draw(st.sampled_from(["damaged", "removed", "pickled", "another shape", "not a number"])), "refusal"
    if kind == "damaged":
        kind, expect = damage_bytes(draw, path, place / "config.yaml"), "any"
    elif kind == "removed":
        path.unlink()
        expect = "any" if path.name == "tokenizer_config.json" else "refusal"
    elif kind == "pickled":
        torch.save(load_file(weights), place / "llm" / "pytorch_model.bin")
        weights.unlink()
    elif kind == "another shape":
        path = place / "llm" / "config.json"
        field = draw(st.sampled_from(["vocab_size", "hidden_size", "num_hidden_layers", "intermediate_size"]))
        value = draw(st.sampled_from([1_000, 10**9, 0, -1, "many", None, 1e308, [2]]))
        path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))
    else:
        tensors = load_file(weights)
        name = draw(st.sampled_from(sorted(name for name in tensors if "pooler" not in name)))
        tensors[name].view(-1)[0] = draw(st.sampled_from([float("nan"), float("inf")]))
        save_file(tensors, weights, {"format": "pt"})
    command = Command(["shards", "config.yaml"], str(place))
    return Harm(f"llm/{path.name}: {kind}", command, (path.name, "llm", "tokenizer"), expect=expect)


OPTIONS = """-k 0, -k -3, -k many, --device tpu, --device cuda:99, --llm log, --llm /nowhere, --columns price=item,
--vectors id, --vectors id=log/items.csv, --least 1.01, --to peft, --to nothing, --out log, --out /proc/nowhere/out.csv
"""
"""Options that no command takes with these values."""
ARGUMENTS = {BUNDLE: "log run/prepare /no", TABLE: "log/items.csv", "i003": "nothing", "u001": "nobody"}
"""Arguments that are refused, by those in whose place they are given."""


def _odd_argument(draw: Draw, world: World, place: Path) -> Harm:
    """Ask for what cannot be, or in an odd way."""
    world.copy("finished", place)
    words, way = draw(st.sampled_from(USES)).split(), draw(st.integers(0, 2))
    if way == 0:
        text = draw(TEXTS).replace("\0", "").encode(errors="ignore").decode()[:10_000]
        return Harm("a history", Command([*USES[0].split()[:3], text], str(place)), expect="any")
    if way == 1:
        words += draw(st.sampled_from(OPTIONS.replace("\n", " ").strip().split(", "))).split()
    else:
        old = draw(st.sampled_from([word for word in words if word in ARGUMENTS]))
        words[words.index(old)] = draw(st.sampled_from(ARGUMENTS[old].split()))
    return Harm("an argument", Command(words, str(place)), expect="refusal")
