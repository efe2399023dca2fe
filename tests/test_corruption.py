"""Damaged shards: verification names each file, reading refuses what differs from what was written, repair rebuilds it.

Verification reads every byte; reading checks the samples that it needs.
"""

import io
import os
import pickle
import re
import resource
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rarec.console.last_resort import machine_trouble
from rarec.data.shards.files import INDEX, open_index
from rarec.data.shards.samples import INDEX_ROW, digest_of, key_of, read_sample
from rarec.errors import UserError
from rarec.storage.artefacts import MANIFEST, read_manifest
from tests.processes import be_killed_at_rename
from tests.shards import Change, Member, Selected, bytes_of, open_stream, rewrite_tar, seal, sign

SELECTED = Selected()
SHARD, OTHER = "000001.tar", "000002.tar"
NUMBER = SELECTED.PER_SHARD + 2
KEY = SELECTED.key(NUMBER)
NOBODY = 65534


@pytest.fixture(autouse=True)
def _nothing_hangs() -> Iterator[None]:
    def stop(*_: object) -> None:
        raise AssertionError("it hangs")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(20)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("shards") / "whole"
    SELECTED.write(directory)
    return directory


@pytest.fixture
def harmed(whole: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(whole, tmp_path / "shards"))


def read(directory: Path) -> list[str]:
    """Read an epoch as training does; return the keys."""
    stream = open_stream(directory, read_manifest(directory, "shards"), batch_size=4)
    return [sample.key for batch in stream.epoch(0) for sample in batch]


def row_of(directory: Path) -> np.void:
    row: np.void = np.load(directory / INDEX)[NUMBER]
    return row


def flip(name: str, position: Callable[[Path], int]) -> Callable[[Path], None]:
    """Flip one bit of a byte."""

    def harm(directory: Path) -> None:
        data = bytearray((directory / name).read_bytes())
        data[position(directory)] ^= 1
        (directory / name).write_bytes(data)

    return harm


def flip_in_row(field: str) -> Callable[[Path], None]:
    place = INDEX_ROW.itemsize * (NUMBER - SELECTED.total) + INDEX_ROW.fields[field][1]
    return flip(INDEX, lambda directory: place)


def instead(name: str, make: Callable[[Path], object]) -> Callable[[Path], None]:
    """Replace a file by something else."""

    def harm(directory: Path) -> None:
        (directory / name).unlink()
        make(directory / name)

    return harm


def swap(directory: Path) -> None:
    (directory / SHARD).rename(directory / "kept")
    (directory / OTHER).rename(directory / SHARD)
    (directory / "kept").rename(directory / OTHER)


class Payload:
    """Create a file when unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.path,)


def npy(values: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, values, allow_pickle=True)
    return buffer.getvalue()


RAN = Path(tempfile.gettempdir()) / f"rarec-ran-{os.getpid()}"
PICKLE = pickle.dumps(Payload(RAN))
OBJECTS = npy(np.array([Payload(RAN)], object))

SAMPLE = rf"{SHARD}, sample {KEY}: its bytes"
HARMS: dict[str, tuple[Callable[[Path], object], set[str], str | None]] = {
    "cut": (
        lambda d: os.truncate(d / SHARD, int(row_of(d)["offset"]) + 700),
        {SHARD},
        rf"{SHARD}, sample \S*: its bytes",
    ),
    "cut before the end mark": (lambda d: os.truncate(d / SHARD, (d / SHARD).stat().st_size - 512), {SHARD}, None),
    "a byte of a header": (flip(SHARD, lambda d: int(row_of(d)["offset"]) + 3), {SHARD}, SAMPLE),
    "a byte of the states": (flip(SHARD, lambda d: int(row_of(d)["offset"]) + 2700), {SHARD}, SAMPLE),
    "missing": (lambda d: (d / SHARD).unlink(), {SHARD}, rf"{SHARD} cannot be read: No such file"),
    "renamed": (lambda d: (d / SHARD).rename(d / "000009.tar"), {SHARD, "000009.tar"}, SHARD),
    "swapped": (swap, {SHARD, OTHER}, r"\.tar, sample \S*: its bytes"),
    "no byte": (instead(SHARD, Path.touch), {SHARD}, rf"{SHARD}, sample \S*: its bytes"),
    "a directory": (instead(SHARD, Path.mkdir), {SHARD}, SHARD),
    "a pipe": (instead(SHARD, os.mkfifo), {SHARD}, SHARD),
    "another file": (lambda d: (d / "notes.txt").touch(), {"notes.txt"}, None),
    "index: a digest": (flip_in_row("digest"), {INDEX}, SAMPLE),
    "index: an offset": (flip_in_row("offset"), {INDEX}, SAMPLE),
    "index: missing": (lambda d: (d / INDEX).unlink(), {INDEX}, r"samples\.npy is missing"),
    "index: cut": (lambda d: os.truncate(d / INDEX, 500), {INDEX}, r"samples\.npy cannot be read"),
    "index: a pipe": (instead(INDEX, os.mkfifo), {INDEX}, r"samples\.npy is missing"),
    "index: a row less": (lambda d: np.save(d / INDEX, np.load(d / INDEX)[1:]), {INDEX}, r"samples\.npy .*33 samples"),
    "index: a pickle": (instead(INDEX, lambda path: path.write_bytes(PICKLE)), {INDEX}, r"samples\.npy cannot be read"),
    "index: objects": (instead(INDEX, lambda path: path.write_bytes(OBJECTS)), {INDEX}, r"samples\.npy cannot be read"),
}


def test_what_is_not_harmed_passes(whole):
    assert SELECTED.problems(whole, deep=True) == {}
    assert sorted(read(whole)) == sorted(map(SELECTED.key, range(SELECTED.total)))


@pytest.mark.parametrize("name", HARMS)
def test_damage_is_named_refused_and_rebuilt_and_nothing_else(whole, harmed, tmp_path, name):
    harm, files, message = HARMS[name]
    harm(harmed)
    problems = SELECTED.problems(harmed)
    assert problems.keys() == files
    assert all(file in line for file, line in problems.items())
    if message is None:
        assert len(read(harmed)) == SELECTED.total
    else:
        with pytest.raises(UserError, match=message) as error:
            read(harmed)
        assert error.value.remedy
    assert not RAN.exists()
    for path in map(harmed.joinpath, files):  # what the user made is the user's to move away
        if path.is_dir() or path.name not in bytes_of(whole):
            path.rename(tmp_path / path.name)
    before = {path.name: path.stat().st_ino for path in harmed.glob("*.tar")}
    SELECTED.repair(harmed)
    assert bytes_of(harmed) == bytes_of(whole)
    rewritten = {path.name for path in harmed.glob("*.tar") if before.get(path.name) != path.stat().st_ino}
    assert rewritten == {file for file in files if file in (SHARD, OTHER)}


def field(name: str, change: Callable[[bytes], bytes]) -> Change:
    """Change the bytes of one field of one sample."""
    return lambda members: [(i, change(data) if i.name == f"{KEY}.{name}" else data) for i, data in members]


def array(name: str, change: Callable[[np.ndarray], np.ndarray]) -> Change:
    """Change the array in a field."""
    return field(name, lambda data: npy(change(np.load(io.BytesIO(data)))))


def without(prefix: str) -> Change:
    return lambda members: [(i, data) for i, data in members if not i.name.startswith(prefix)]


def reversed_samples(members: list[Member]) -> list[Member]:
    return sorted(members, key=lambda each: each[0].name.split(".")[0], reverse=True)


FORGED: dict[str, tuple[Change, str, bool]] = {
    "a pickle": (field("states.npy", lambda data: PICKLE), f"sample {KEY} is not a sample", True),
    "objects": (field("states.npy", lambda data: OBJECTS), f"sample {KEY} is not a sample", True),
    "no tokens": (without(f"{KEY}.tokens"), f"sample {KEY} is not a sample", True),
    "an incomplete array": (field("tokens.npy", lambda data: data[:-4]), f"sample {KEY} is not a sample", True),
    "garbled json": (field("json", lambda data: data[:-9]), f"sample {KEY} is not a sample", True),
    "deep json": (field("json", lambda data: b"[" * 200_000), f"sample {KEY} is not a sample", True),
    "another history": (array("history.npy", lambda a: (a + 1) % 30), f"sample {KEY}: field history.npy", False),
    "another target": (
        field("json", lambda data: data.replace(b'target": ', b'target": 1')),
        f"{KEY}: .*target",
        False,
    ),
    "doubles": (array("states.npy", lambda a: a.astype("f8")), f"sample {KEY}: field states.npy is float64", False),
    "NaN": (array("states.npy", lambda a: a * np.float16(np.nan)), f"sample {KEY}: .*NaN", False),
    "another order": (reversed_samples, f"{SHARD}, sample .* is sample", False),
    "a sample less": (without(KEY), r"samples\.npy has 32 samples, but 33", False),
}


@pytest.mark.parametrize("name", FORGED)
def test_wrong_content_with_right_hashes_is_found_by_a_deep_look_and_never_run(whole, harmed, name):
    change, message, refused = FORGED[name]
    rewrite_tar(harmed / SHARD, change)
    assert SELECTED.problems(harmed) == {}
    (line,) = SELECTED.problems(harmed, deep=True).values()
    assert re.search(message, line), line
    if refused:
        with pytest.raises(UserError, match=message):
            read(harmed)
    assert not RAN.exists()


def test_a_wrong_tar_with_right_hashes_is_rebuilt(whole, harmed):
    rewrite_tar(harmed / SHARD, FORGED["another history"][0])
    SELECTED.repair(harmed)
    assert {**bytes_of(harmed), MANIFEST: b""} == {**bytes_of(whole), MANIFEST: b""}
    assert SELECTED.problems(harmed, deep=True) == {}


def test_the_payload_would_run():
    pickle.loads(PICKLE)
    assert RAN.exists()
    RAN.unlink()


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_bytes_that_hash_right_are_a_sample_or_refused(whole, data):
    row = row_of(whole).copy()
    extent = bytearray((whole / SHARD).read_bytes()[int(row["offset"]) :][: int(row["size"])])
    for _ in range(data.draw(st.integers(1, 4))):
        position = data.draw(st.integers(0, len(extent) - 1))
        extent[position : position + data.draw(st.integers(0, 8))] = data.draw(st.binary(max_size=8))
    row["digest"] = digest_of(bytes(extent))
    try:
        message = f"shard {SHARD}, sample {read_sample(bytes(extent), row, SHARD).key} "
    except UserError as error:
        message = error.problem
    assert re.match(rf"shard {SHARD}, sample \S+ ", message)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (lambda whole: whole[: len(whole) // 2], r"manifest\.json "),
        (lambda whole: b"", r"manifest\.json "),
        (lambda whole: b"[]", r"manifest\.json "),
        (lambda whole: b"[" * 100_000, r"manifest\.json "),
        (lambda whole: whole.replace(b'"samples": 33', b'"samples": 34'), r"manifest\.json .*seal"),
    ],
)
def test_a_damaged_manifest_is_refused_and_not_repaired(harmed, content, message):
    path = harmed / MANIFEST
    path.write_bytes(content(path.read_bytes()))
    for use in (SELECTED.problems, read, SELECTED.repair):
        with pytest.raises(UserError, match=message) as error:
            use(harmed)
        assert error.value.remedy


@pytest.mark.parametrize("field", [{"kind": "prepare"}, {"schema": 99}])
def test_a_manifest_of_something_else_is_refused(harmed, field):
    seal(harmed, read_manifest(harmed, "shards") | field)
    with pytest.raises(UserError, match=r"manifest\.json"):
        SELECTED.problems(harmed)


def test_a_users_own_files_are_named_never_listed_and_never_dropped(tmp_path):
    directory, own = tmp_path / "shards", {"my-backup.tar": b"precious", ".notes": b"mine", "nohup.out": b"log"}
    directory.mkdir()
    for name, content in own.items():
        (directory / name).write_bytes(content)
    manifest = SELECTED.write(directory)
    assert not own.keys() & manifest["files"].keys()
    assert list(SELECTED.problems(directory)) == ["my-backup.tar", "nohup.out"]
    SELECTED.repair(directory)
    assert {name: (directory / name).read_bytes() for name in own} == own


@contextmanager
def as_nobody() -> Iterator[None]:
    """Drop root, which may read everything."""
    own = os.geteuid()
    if own == 0:
        os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(own)


@pytest.mark.parametrize("name", [SHARD, INDEX])
def test_a_file_that_may_not_be_read_is_named(whole, name):
    with tempfile.TemporaryDirectory() as place:  # where others may go; pytest's own is closed to them
        directory = Path(shutil.copytree(whole, Path(place) / "shards"))
        Path(place).chmod(0o755)
        (directory / name).chmod(0)
        with as_nobody():
            assert "Permission denied" in SELECTED.problems(directory)[name]
            with pytest.raises(UserError, match=rf"{name} cannot be read: .*Permission"):
                read(directory)


def test_a_full_disk_leaves_no_incomplete_tar_and_writing_resumes(whole, tmp_path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        with pytest.raises(OSError, match="File too large") as refusal:
            SELECTED.write(tmp_path / "shards")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "free space" in str(machine_trouble(refusal.value))
    assert not bytes_of(tmp_path / "shards")
    SELECTED.write(tmp_path / "shards")
    assert bytes_of(tmp_path / "shards") == bytes_of(whole)


def until_killed(work: Callable[[Path], object], directory: Path, renames: int) -> None:
    """Run in a process that is killed at its nth rename of a file."""
    be_killed_at_rename(renames)
    work(directory)


def kill(work: Callable[[Path], object], directory: Path, renames: int) -> int | None:
    process = get_context("fork").Process(target=until_killed, args=(work, directory, renames))
    process.start()
    process.join()
    return process.exitcode


@pytest.mark.parametrize("renames", [1, 2, 5, 9, 11, 12])
def test_a_killed_writing_resumes_to_the_same_bytes(whole, tmp_path, renames):
    assert kill(SELECTED.write, tmp_path / "shards", renames) == -signal.SIGKILL
    assert not (tmp_path / "shards" / MANIFEST).exists()
    SELECTED.write(tmp_path / "shards")
    assert bytes_of(tmp_path / "shards") == bytes_of(whole)


@pytest.mark.parametrize("renames", [1, 3, 4, 6, 8])
def test_a_killed_repair_is_repaired(whole, harmed, renames):
    swap(harmed)
    assert kill(SELECTED.repair, harmed, renames) == -signal.SIGKILL
    SELECTED.repair(harmed)
    assert bytes_of(harmed) == bytes_of(whole)


def test_an_index_of_other_shards_is_refused(harmed):
    index_S = np.load(harmed / INDEX)
    np.save(harmed / INDEX, index_S["digest"])
    sign(harmed)
    with pytest.raises(UserError, match=rf"samples\.npy .*{SELECTED.total} samples"):
        open_index(harmed, read_manifest(harmed, "shards"))
    assert key_of(index_S[NUMBER]) == KEY
