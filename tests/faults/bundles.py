"""Bundles that somebody has forged, with the right hashes and the wrong contents; and kills of what uses a bundle."""

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from rarec.storage.artefacts import MANIFEST, write_manifest
from tests.faults.files import Draw, copied
from tests.faults.judge import Harm
from tests.faults.surroundings import SIGNALS
from tests.tiny_runs import BUNDLE, USES, World

FACTS = "recommender.json"
ODD = [
    None,
    True,
    -1,
    0,
    3,
    10**12,
    -0.5,
    1e308,
    float("nan"),
    float("inf"),
    "",
    "x",
    "../x",
    "os:getcwd",
    [],
    [[]],
    {},
]
WRITERS = [line for line in USES if "--out" in line]


def forge(draw: Draw, world: World, place: Path) -> Harm:
    """Forge a file of a bundle, with its hash and those of the manifest, and give a command that uses the bundle.

    A refusal names the file; or the language model, whose identity only that model can contradict.
    """
    command = copied(world, place, "finished", draw(st.sampled_from(USES)).split())
    bundle = place / BUNDLE
    forge_file = draw(st.sampled_from([_forge_facts, _forge_facts, _forge_tensors, _forge_table, _forge_list]))
    path, what = forge_file(draw, bundle)
    names = (path.relative_to(bundle).as_posix(), *["another language model"] * what.startswith("model.llm."))
    return Harm(f"forged: {path.name}, {what}", command, names, expect="any")


def interrupt_use(draw: Draw, world: World, place: Path) -> Harm:
    """Kill a command that writes by a bundle, again and again; the same command then writes what it always does."""
    command = copied(world, place, "finished", draw(st.sampled_from(WRITERS)).split())
    renames = st.tuples(st.just("kill"), st.tuples(SIGNALS, st.integers(1, 12), st.just("")))
    moments = renames | st.tuples(st.just("kill_after"), st.tuples(SIGNALS, st.floats(0.05, 4)))
    kills = draw(st.lists(moments, min_size=1, max_size=3))
    interruptions = tuple(replace(command, **{way: kill}) for way, kill in kills)
    return Harm(f"{kills}", command, ("run/out",), interruptions=interruptions)


def _forge_facts(draw: Draw, bundle: Path) -> tuple[Path, str]:
    facts = json.loads((bundle / FACTS).read_text())
    at = draw(st.sampled_from(list(_places(facts))))
    value = draw(st.sampled_from([*ODD, "REMOVED"]))
    *way, last = at
    parent = facts
    for key in way:
        parent = parent[key]
    if value == "REMOVED":
        del parent[last]
    else:
        parent[last] = value
    (bundle / FACTS).write_text(json.dumps(facts))
    _seal(bundle)
    return bundle / FACTS, f"{'.'.join(map(str, at))}: {value!r}"


def _places(value: Any, way: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the way to every value in a JSON value."""
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield (*way, key)
        yield from _places(value[key], (*way, key))


TENSORS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "not a number": lambda tensor: torch.full_like(tensor, float("nan")),
    "infinite": lambda tensor: torch.full_like(tensor, float("inf")),
    "shorter": lambda tensor: tensor[:-1].clone(),
    "empty": lambda tensor: tensor[:0].clone(),
    "of another type": lambda tensor: tensor.to(torch.bfloat16),
    "of integers": lambda tensor: tensor.int(),
    "flat": lambda tensor: tensor.flatten()[None].clone(),
}


def _forge_tensors(draw: Draw, bundle: Path) -> tuple[Path, str]:
    path = draw(st.sampled_from(sorted(bundle.rglob("*.safetensors"))))
    tensors = load_file(path)
    name = draw(st.sampled_from(sorted(name for name, tensor in tensors.items() if tensor.ndim)))
    kind = draw(st.sampled_from([*TENSORS, "renamed"]))
    tensor = tensors.pop(name)
    tensors |= {f"{name}2": tensor} if kind == "renamed" else {name: TENSORS[kind](tensor)}
    save_file(tensors, path)
    _seal(bundle)
    return path, f"{name}: {kind}"


def _forge_table(draw: Draw, bundle: Path) -> tuple[Path, str]:
    path = draw(st.sampled_from(sorted(bundle.rglob("*.parquet"))))
    table = pq.read_table(path)
    column = draw(st.integers(0, table.num_columns - 1))
    name, count = table.column_names[column], len(table)
    forms = {
        "removed": lambda: table.remove_column(column),
        "missing": lambda: table.set_column(column, name, pa.nulls(count, table.schema.types[column])),
        "numbers": lambda: table.set_column(column, name, pa.array(np.full(count, float("nan")))),
        "large": lambda: table.set_column(column, name, pa.array(np.full(count, 2**31 - 1))),
        "negative": lambda: table.set_column(column, name, pa.array(np.full(count, -1, np.int32))),
        "lists": lambda: table.set_column(column, name, pa.array([[1]] * count)),
        "rows": lambda: table.slice(0, 0),
    }
    kind = draw(st.sampled_from(list(forms)))
    pq.write_table(forms[kind](), path)
    _seal(bundle)
    return path, f"{name}: {kind}"


def _forge_list(draw: Draw, bundle: Path) -> tuple[Path, str]:
    """Leave a file out of the manifest, and alter it."""
    path = draw(
        st.sampled_from(sorted(path for path in bundle.rglob("[!.]*") if path.is_file() and path.name != MANIFEST))
    )
    data = path.read_bytes()
    path.unlink()
    _seal(bundle)
    path.write_bytes(data[: len(data) // 2] + b"x" + data[len(data) // 2 + 1 :])
    return path, "not listed"


def _seal(bundle: Path) -> None:
    known = json.loads((bundle / MANIFEST).read_text())
    (bundle / MANIFEST).unlink()
    write_manifest(bundle, "bundle", settings=known["settings"], made_from=known["made_from"])
