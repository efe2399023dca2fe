"""A configuration is checked without a hang, whatever is in it; the message names file and field."""

import os
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from rarec.cluster.definition import load_sweep
from rarec.config import RunConfig, load_config
from rarec.config.plain_yaml import MAX_BYTES
from rarec.errors import UserError
from tests.test_config import SMALL
from tools.make_config_reference import section_of

SECONDS = 60  # what is not stopped takes hours; what is takes a second or two, on a busy machine ten


def bomb(levels: int, line: str, first: str) -> str:
    """Return fields of which each holds the one before it nine times."""
    inside = [first, *(f"[{','.join([f'*a{level - 1}'] * 9)}]" for level in range(1, levels))]
    return "".join(line.format(level=level, value=value) for level, value in enumerate(inside))


HOSTILE = {
    "aliases": SMALL + bomb(12, "a{level}: &a{level} {value}\n", "[x]"),
    "aliases of a long text": SMALL + bomb(5, "a{level}: &a{level} {value}\n", "x" * 50_000),
    "merged aliases": SMALL + "a0: &a0 {x: 1}\n" + bomb(12, "a{level}: &a{level} {{<<: {value}}}\n", "[*a0]"),
    "itself": SMALL + "ids: &x {settings: *x}\n",
    "itself in a list": SMALL + "ids: &x [*x]\n",
    "deep lists": SMALL + "ids: " + "[" * 40_000,
    "deep sections": SMALL + "ids: " + "{a: " * 20_000,
    "deep blocks": SMALL + "".join(f"{' ' * depth}a:\n" for depth in range(400)),
    "many values": SMALL + "ids: [" + "1," * 49_000 + "]",
    "many lines": SMALL + "".join(f"a{number}: 1\n" for number in range(10_000)),
    "much": SMALL + "#" * 50_000_000,
    "a tag of Python": SMALL + "x: !!python/object/apply:os.system ['true']\n",
    "a tag of its own": SMALL + "x: !mine 3\n",
    "a date that is none": SMALL + "x: 2020-99-99\n",
    "a number of 5,000 digits": SMALL + "report: {examples: " + "9" * 5_000 + "}\n",
    "a hexadecimal number of 5,000 digits": SMALL + "report: {examples: 0x" + "f" * 5_000 + "}\n",
    "a number to the base of 60": SMALL + "report: {examples: 1:30}\n",
    "a number to the base of 8": SMALL + "report: {examples: 010}\n",
    "an escape sequence": SMALL + 'report: {examples: "\\e[31m"}\n',
    "a zero byte": SMALL + 'report: {examples: "a\\0b"}\n',
    "half a character": SMALL + 'report: {examples: "\\ud800"}\n',
    "a number as a field": SMALL + "1: 2\n",
    "no field": SMALL + "~: 2\n",
    "two documents": SMALL + "---\na: 1\n",
    "a mark of byte order alone": "\ufeff",
    "nothing": "",
    "binary": "\0\1\2",
}


@contextmanager
def refused(*named: str) -> Iterator[None]:
    """Expect a short `UserError` with some words, and no hang."""
    start = time.monotonic()
    with pytest.raises(UserError) as caught:
        yield
    assert time.monotonic() - start < SECONDS
    text = str(caught.value)
    assert all(name in text for name in named), text
    assert max(map(len, text.splitlines())) < 700
    assert all(char.isprintable() or char == "\n" for char in text)


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE.keys())
def test_a_hostile_file_is_refused_in_time(tmp_path, text):
    (tmp_path / "bad.yaml").write_text(text)
    with refused("bad.yaml"):
        load_config(tmp_path / "bad.yaml")


def test_a_file_of_the_largest_size_is_read_in_time(tmp_path):
    rest = (MAX_BYTES - len(SMALL) - 60) // 4 * "10, "
    (tmp_path / "full.yaml").write_text(f"{SMALL}evaluate: {{external: {{x: y}}, cutoffs: [{rest}]}}\n")
    with refused("full.yaml", "evaluate.cutoffs"):
        load_config(tmp_path / "full.yaml")


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo, lambda path: path.symlink_to(path)])
def test_what_is_no_file_is_refused_and_not_waited_for(tmp_path, make):
    make(tmp_path / "odd.yaml")
    with refused("odd.yaml"):
        load_config(tmp_path / "odd.yaml")


@pytest.mark.parametrize("path", ["/dev/zero", "x" * 5_000, "a\0b"], ids=["device", "long", "zero byte"])
def test_a_path_that_names_no_file_is_refused(path):
    with refused():
        load_config(path)


@pytest.fixture
def small(tmp_path):
    path = tmp_path / "small.yaml"
    path.write_text(SMALL)
    return path


@pytest.mark.parametrize(
    "override",
    ["\x1b[31m=1", "a\0b=1", "train.lr=" + "1" * MAX_BYTES, "x=" + "[" * 5_000, "run.dir=\udcff", "=", "..=1"],
)
def test_a_hostile_override_is_refused_in_time(small, override):
    with refused():
        load_config(small, [override])


def numbers(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield name and type of every field that holds numbers."""
    for name, field in model.model_fields.items():
        section, place = section_of(field.annotation), f"{prefix}{name}"
        if section is not None:
            below = f"{place}.x." if get_origin(field.annotation) is dict else f"{place}."
            yield from numbers(section, below)
        elif {int, float} & set(types(field.annotation)):
            yield place, field.annotation


def types(annotation: Any) -> Iterable[Any]:
    inside = get_args(annotation)[:1] if get_origin(annotation) is Annotated else get_args(annotation)
    return [annotation, *(each for part in inside for each in types(part))]


NUMBERS = dict(numbers(RunConfig))


@pytest.mark.parametrize("field", NUMBERS)
def test_no_number_is_without_bounds(small, field):
    listed = list in map(get_origin, types(NUMBERS[field]))
    values = ["1e15", ".inf", "-.inf", ".nan", "1e400", "true", "'1'", "9" * 30]
    for value in values if field == "run.seed" else [*values, "1000000000000000"]:
        with refused(field):
            load_config(small, [f"{field}=[{value}]" if listed else f"{field}={value}"])


FOLDERS = {
    "empty": "''",
    "blank": "' '",
    "home": "~/runs",
    "another's home": "~nobody/runs",
    "bucket": "s3://bucket/runs",
    "file URL": "file:///tmp/runs",
    "long name": "é" * 150,
    "long path": "x/" * 2_500,
    "line break": '"a\\nb"',
    "zero byte": '"a\\0b"',
    "not UTF-8": "a\udcff",
    "file": "{here}/file",
    "inside a file": "{here}/file/run",
    "loop": "{here}/loop",
    "inside a loop": "{here}/loop/run",
    "nothing": "null",
    "number": "3",
}


@pytest.mark.parametrize("given_as", ["file", "override"])
@pytest.mark.parametrize("field", ["run.dir", "run.shared"])
@pytest.mark.parametrize("folder", FOLDERS.values(), ids=FOLDERS.keys())
def test_a_folder_that_cannot_be_written_is_refused(tmp_path, small, field, folder, given_as):
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    if (field, folder) == ("run.shared", "null"):  # the default
        return
    folder = folder.replace("{here}", str(tmp_path))
    with refused("run." if given_as == "override" else "small.yaml"):
        if given_as == "override":
            load_config(small, [f"{field}={folder}"])
        if "\udcff" in folder:
            small.write_bytes(b"run: {dir: a\xff}")
        else:
            fields = {"dir": "runs/x", field.removeprefix("run."): folder}
            own = ", ".join(f"{name}: {value}" for name, value in fields.items())
            small.write_text(SMALL.replace("dir: runs/x", own))
        load_config(small)


@pytest.mark.parametrize("folder", [".", "..", "a b/ü", "👩‍🔬/run", "C:run", "a~", "./~", "x" * 255])
def test_odd_names_of_folders_are_names(small, folder):
    assert load_config(small, [f"run.dir='{folder}'"]).run.dir == folder


def test_the_remedy_for_a_home_folder_is_its_path(small):
    with pytest.raises(UserError) as caught:
        load_config(small, ["run.dir=~/runs"])
    full = str(Path.home() / "runs")
    assert full in str(caught.value)
    assert load_config(small, [f"run.dir={full}"]).run.dir == full


@pytest.mark.parametrize("field", ["llm.path", "prepare.items.path", "train.stream.remote", "evaluate.external.x"])
@pytest.mark.parametrize("value", ["''", "x" * 300, "x/" * 2_500, '"a\\0b"', '"a\\nb"'])
def test_a_place_that_no_file_system_takes_is_refused(small, field, value):
    with refused(field):
        load_config(small, [f"{field}={value}"])


def sweep(tmp_path: Path, text: str) -> Path:
    (tmp_path / "base.yaml").write_text(SMALL)
    path = tmp_path / "sweep.yaml"
    path.write_text(f"dir: {tmp_path}/sweep\nbase: base.yaml\n{text}")
    return path


@pytest.mark.parametrize(
    "runs",
    [
        "runs:\n  big: {grid: {" + ", ".join(f"a{field}: {[*range(10)]}" for field in range(7)) + "}}\n",
        f"seeds: {[*range(200)]}\nruns:\n  small:\n  big: {{grid: {{train.epochs: {[*range(1, 100)]}}}}}\n",
        "runs:\n" + "".join(f"  big{number}: {{seeds: {[*range(30)]}}}\n" for number in range(500)),
    ],
    ids=["grid", "seeds", "entries"],
)
def test_the_runs_of_a_sweep_are_counted_before_they_are_listed(tmp_path, runs):
    with refused("sweep.yaml", "runs", "grid"):
        load_sweep(sweep(tmp_path, runs))


@pytest.mark.parametrize("folder", ["~/sweep", "s3://bucket", "''", "x" * 300])
def test_a_sweep_needs_a_folder_too(tmp_path, folder):
    path = sweep(tmp_path, "runs: {a: }\n")
    path.write_text(path.read_text().replace(f"dir: {tmp_path}/sweep", f"dir: {folder}"))
    with refused("sweep.yaml", "dir"):
        load_sweep(path)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | st.dates() | st.binary(max_size=5),
    lambda inside: (
        st.lists(inside, max_size=4) | st.dictionaries(st.text(max_size=9) | st.integers(), inside, max_size=4)
    ),
    max_leaves=20,
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(field=st.sampled_from([*RunConfig.model_fields, *NUMBERS, "run.dir", "llm.path", "ids.settings"]), value=VALUES)
def test_any_value_of_any_field_is_taken_or_refused_by_name(small, field, value):
    text = (
        yaml.safe_dump(value, default_flow_style=True, allow_unicode=False, width=10**6).removesuffix("...\n").strip()
    )
    said = ""
    try:
        load_config(small, [f"{field}={text}"])
    except UserError as error:
        said = str(error)
    beside = f"missing field `{field.rpartition('.')[0]}."  # a section that one field opens may need another one
    assert not said or field in said or beside in said
    assert all(len(line) < 700 for line in said.splitlines())
