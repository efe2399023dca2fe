"""Harms to inputs: logs with odd bytes, values and columns, and damaged language models (`inputs`)."""

import csv
import gzip
import io
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from harm_files import DAMAGES
from harm_oracle import Harm
from harm_process import Command
from harm_world import World
from safetensors.torch import load_file, save_file

Rows = list[dict[str, Any]]
FORMATS = ("csv", "csv.gz", "jsonl", "jsonl.gz", "parquet")
VALUES: dict[str, Any] = {
    "ESC": "\x1b[31mred\x1b[0m",
    "BEL and NUL": "a\x07b\x00c",
    "C1": "a\x9b31mb",
    "markup": "<script>alert(1)</script>[bold]x[/red]",
    "emoji": "\U0001f469\u200d\U0001f680 \U0001f4a5",
    "right to left": "\u202eabc\u2066",
    "a lone surrogate": "\ud800",
    "a line break": "a\r\nb",
    "quotes": '"a"",b\'',
    "a formula": "=cmd|'/c calc'!A0",
    "10^5 characters": "x" * 100_000,
    "combining characters": "e" + "\u0301" * 500,
    "empty": "",
    "spaces": "   ",
    "null": None,
    "nan": float("nan"),
    "inf": float("inf"),
    "-1": -1,
    "2^63": 2**63,
    "10^30": 10**30,
    "a fraction": 1.5,
    "true": True,
    "an object": {"a": 1},
    "a list": [1, 2],
    "a date": "2020-02-30",
    "milliseconds": 1_700_000_000_000,
    "nanoseconds": 1_700_000_000_000_000_000,
}
BROKEN_GZIP = ("one bit flipped", "cut short", "doubled", "a byte more", "noise", "zeros")


def harm_input(generator: random.Random, world: World, place: Path) -> Harm:
    """Harm the log or the language model."""
    makers = [_odd_value, _odd_value, _odd_value, _odd_bytes, _odd_bytes, _odd_columns, _odd_model, _odd_weights]
    return generator.choice(makers)(generator, world, place)


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
        rows: Rows = list(csv.DictReader(file))
    return [row | ({"time": int(row["time"])} if "time" in row else {}) for row in rows]


def _log(generator: random.Random, place: Path) -> tuple[str, Path, Rows]:
    """Choose one of the two tables and a format; return table, file and rows."""
    table = generator.choice(["interactions", "items"])
    rows = read_rows(place / "log" / f"{table}.csv")
    return table, place / "log" / f"{table}.{generator.choice(FORMATS)}", rows


def _command(place: Path, table: str, path: Path, stage: str = "prepare") -> Command:
    override = f"prepare.{table}.path={path.relative_to(place).as_posix()}"
    return Command([stage, "config.yaml", override], str(place))


def _odd_value(generator: random.Random, world: World, place: Path) -> Harm:
    """Put odd values into one column."""
    world.copy("new", place)
    table, path, rows = _log(generator, place)
    column, kind = generator.choice(list(rows[0])), generator.choice(list(VALUES))
    many = generator.choice([1, 1, len(rows) // 2, len(rows)])
    for row in generator.sample(rows, many):
        row[column] = VALUES[kind]
    mixed = column == "time" and kind in ("milliseconds", "nanoseconds") and many < len(rows)
    nested = column in ("user", "item") and kind in ("an object", "a list") and ".jsonl" in path.name
    try:
        write_rows(rows, path)
    except (pa.ArrowException, UnicodeEncodeError, OverflowError):  # this format cannot hold it
        path = path.with_name(f"{table}.jsonl")
        write_rows(rows, path)
    stage = "run" if column in ("title", "brand") and generator.random() < 0.2 else "prepare"
    what = f"{path.name}, column {column}: {kind} in {many} of {len(rows)} rows"
    names = (path.name, column, f"prepare.{table}", "log")
    expect = "refusal" if mixed or nested else "any"
    return Harm(what, _command(place, table, path, stage), names, expect=expect)


def _odd_bytes(generator: random.Random, world: World, place: Path) -> Harm:
    """Damage the bytes of a log."""
    world.copy("new", place)
    table, path, rows = _log(generator, place)
    write_rows(rows, path)
    kind = generator.choice(list(DAMAGES))
    path.write_bytes(DAMAGES[kind](generator, path.read_bytes(), (place / "config.yaml").read_bytes()))
    checked = path.suffix == ".gz" and kind in BROKEN_GZIP
    names = (path.name, f"prepare.{table}", *(("log",) if not checked else ()))
    return Harm(f"{path.name}: {kind}", _command(place, table, path), names, expect="tables" if checked else "any")


def _twice(rows: Rows, path: Path) -> str:
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow([*rows[0], next(iter(rows[0]))])
    writer.writerows([*row.values(), "x"] for row in rows)
    path.write_text(text.getvalue())
    return "refusal"


def _renamed(rows: Rows, path: Path) -> str:
    write_rows([{f" {name.upper()}": value for name, value in row.items()} for row in rows], path)
    return "refusal"


def _ragged(rows: Rows, path: Path) -> str:
    write_rows(rows, path)
    path.write_bytes(path.read_bytes() + b"u00,i00,1700000000,more,and,more\nu01\n")
    return "refusal"


def _crlf(rows: Rows, path: Path) -> str:
    write_rows(rows, path)
    path.write_bytes(path.read_bytes().replace(b"\r\n", b"\n").replace(b"\n", b"\r\n"))
    return "tables"


def _marked(rows: Rows, path: Path) -> str:
    write_rows(rows, path)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    return "tables"


def _utf16(rows: Rows, path: Path) -> str:
    write_rows(rows, path)
    path.write_bytes(path.read_bytes().decode().encode("utf-16"))
    return "any"


def _header_only(rows: Rows, path: Path) -> str:
    path.write_text(",".join(rows[0]) + "\n")
    return "refusal"


def _a_column_more(rows: Rows, path: Path) -> str:
    write_rows([{**row, "more\x1b[31m": 1} for row in rows], path)
    return "tables"


def _as_directory(rows: Rows, path: Path) -> str:
    path.unlink()
    path.mkdir()
    return "refusal"


COLUMNS: dict[str, Callable[[Rows, Path], str]] = {
    "a column twice": _twice,
    "other names of columns": _renamed,
    "rows of other lengths": _ragged,
    "CRLF": _crlf,
    "a byte-order mark": _marked,
    "UTF-16": _utf16,
    "a header only": _header_only,
    "a column more": _a_column_more,
    "an empty directory": _as_directory,
}


def _odd_columns(generator: random.Random, world: World, place: Path) -> Harm:
    """Write a CSV file of another form."""
    world.copy("new", place)
    table = generator.choice(["interactions", "items"])
    path, kind = place / "log" / f"{table}.csv", generator.choice(list(COLUMNS))
    expect = COLUMNS[kind](read_rows(path), path)
    return Harm(f"{path.name}: {kind}", _command(place, table, path), (path.name, f"prepare.{table}"), expect=expect)


# ---- language models


def _odd_model(generator: random.Random, world: World, place: Path) -> Harm:
    """Damage or remove a file of the model, change its shape, or pickle it."""
    world.copy("upto-ids", place)
    path = generator.choice(sorted((place / "llm").iterdir()))
    kind = generator.choice([*DAMAGES, "removed", "pickled", "no tokenizer", "another shape"])
    expect = "any"
    if kind in DAMAGES:
        path.write_bytes(DAMAGES[kind](generator, path.read_bytes(), (place / "config.yaml").read_bytes()))
    elif kind == "removed":
        path.unlink()
        expect = "any" if path.name == "tokenizer_config.json" else "refusal"
    elif kind == "no tokenizer":
        for file in (place / "llm").glob("tokenizer*"):
            file.unlink()
        expect = "refusal"
    elif kind == "pickled":
        path = place / "llm" / "model.safetensors"
        torch.save(load_file(path), path.with_name("pytorch_model.bin"))
        path.unlink()
        expect = "refusal"
    else:
        path, kind = place / "llm" / "config.json", _reshaped(generator, place / "llm" / "config.json")
        expect = "refusal"
    command = Command(["shards", "config.yaml"], str(place))
    return Harm(f"llm/{path.name}: {kind}", command, (path.name, "llm", "tokenizer"), expect=expect)


def _reshaped(generator: random.Random, path: Path) -> str:
    tree = json.loads(path.read_text())
    field = generator.choice(["vocab_size", "hidden_size", "num_hidden_layers", "intermediate_size"])
    tree[field] = generator.choice([tree[field] + 1, 10**9, 0, -1, "many", None, 1e308, [2]])
    path.write_text(json.dumps(tree))
    return f"{field} is {tree[field]}"


def _odd_weights(generator: random.Random, world: World, place: Path) -> Harm:
    """Put a number that is none into a weight, or leave a weight out."""
    world.copy("upto-ids", place)
    path = place / "llm" / "model.safetensors"
    weights = load_file(path)
    name = generator.choice(sorted(weight for weight in weights if "pooler" not in weight))
    kind = generator.choice(["nan", "inf", "another shape", "missing"])
    if kind == "missing":
        del weights[name]
    elif kind == "another shape":
        weights[name] = weights[name][..., :-1].contiguous()
    else:
        weights[name].view(-1)[weights[name].numel() // 2] = float(kind)
    save_file(weights, path, {"format": "pt"})
    command = Command(["shards", "config.yaml"], str(place))
    return Harm(f"llm/{path.name}, {name}: {kind}", command, ("llm", path.name), expect="refusal")
