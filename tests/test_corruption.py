"""Damaged shards, tables and manifests: verification and reading must each report one clear error.

Verification knows the dataset and reads every byte; reading knows the index only. So verification reports all damage,
and reading refuses everything that would return samples other than those written, or samples that a step cannot use.
"""

import os
import pickle
import re
import resource
import shutil
import signal
import subprocess
import tarfile
import tempfile
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rarec.data.shards.index import INDEX, digest_of
from rarec.data.shards.samples import read_sample
from rarec.data.shards.stream import damaged_samples
from rarec.data.shards.tar_members import MAX_SAMPLE_BYTES
from rarec.data.shards.tars import LocalTars
from rarec.entry import machine_trouble
from rarec.errors import UserError
from rarec.storage.artefacts import MANIFEST
from tests import forging
from tests.forging import PER_SHARD, TOTAL, bytes_of, forge, problems, retar
from tests.harms import (
    FORGED,
    KEY,
    KEYS,
    MANIFESTS,
    NAMED,
    OBJECTS,
    PICKLE,
    RAN,
    REARRANGED,
    SHARD,
    STALE,
    WHOLE_TARS,
    manifest_of,
    place,
    swap,
)
from tests.processes import be_killed_at_rename

NOBODY = 65534
TWO_FILES = {"swapped", "renamed"}


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
    forging.write_honest(directory)
    return directory


@pytest.fixture
def harmed(whole: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(whole, tmp_path / "shards"))


def test_what_is_not_harmed_passes(whole):
    assert problems(whole) == []
    assert len({sample.key for sample in forging.stream(whole)}) == TOTAL


def test_index_and_manifest_are_what_tarfile_finds(whole, harmed):
    forge(harmed)
    assert [(harmed / path.name).read_bytes() == path.read_bytes() for path in whole.iterdir()] == [True] * 7


def refused(directory: Path, told: str, read: str | None, files: int = 1) -> None:
    """Check that verification reports one line per damaged file, and that reading raises."""
    lines = problems(directory)
    assert any(re.search(told, line) for line in lines), lines
    assert len(lines) == files, lines
    if read is None:
        assert len(forging.stream(directory)) >= TOTAL - 1
        return
    with pytest.raises(UserError, match=read) as error:
        forging.stream(directory)
    assert error.value.remedy


@pytest.mark.parametrize("name", STALE)
def test_harm_that_hashes_show_is_named(harmed, name):
    harm, told, read = STALE[name]
    harm(harmed)
    refused(harmed, told, read, 2 if name in TWO_FILES else 1)
    assert problems(harmed, deep=False) == problems(harmed), "no need to look into every sample"


@pytest.mark.parametrize("name", FORGED)
def test_harm_that_hashes_hide_is_named(harmed, name):
    change, told, read = FORGED[name]
    retar(harmed / SHARD, change)
    forge(harmed)
    words = told if read is True else read
    refused(harmed, f"{NAMED}.*{told}", f"{NAMED}.*{words}" if words else None)
    assert not RAN.exists()


@pytest.mark.parametrize("name", WHOLE_TARS)
def test_a_tar_that_was_written_anew_in_another_form_is_named_though_its_samples_agree(whole, harmed, name):
    change, told = WHOLE_TARS[name]
    retar(harmed / SHARD, change)
    forge(harmed)
    refused(harmed, rf"shard {SHARD}, sample {KEYS[0]}: .*{told}", rf"{SHARD}, sample \S*: .*{told}")
    forging.repair(harmed)
    assert bytes_of(harmed) == bytes_of(whole)


def test_a_tar_that_claims_to_be_huge_is_named_and_never_held_in_memory(harmed):
    header = tarfile.TarInfo(f"{KEYS[0]}.zzz")
    header.size = 2 * MAX_SAMPLE_BYTES
    path, most, written = harmed / SHARD, MAX_SAMPLE_BYTES, (harmed / SHARD).stat().st_size
    path.write_bytes(header.tobuf(tarfile.USTAR_FORMAT))
    os.truncate(path, header.size + 4 * 512)
    tracemalloc.start()
    (line,) = problems(harmed, deep=False)
    assert re.fullmatch(rf"shard {SHARD}, .*{path.stat().st_size} bytes.* {written} .*", line), line
    manifest_of(lambda m: m["shards"][1].update(bytes=header.size))(harmed)
    (line,) = problems(harmed, deep=False)
    assert re.fullmatch(rf"shard {SHARD}, sample {KEYS[0]}: .*{most} bytes", line), line
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < most / 4


@pytest.mark.parametrize("name", REARRANGED)
def test_other_samples_than_the_selected_are_named_though_every_hash_agrees(harmed, name):
    harm, told, files = REARRANGED[name]
    harm(harmed)
    forge(harmed)
    lines = problems(harmed)
    assert re.search(told, "\n".join(lines)), lines
    assert len(lines) == files
    assert problems(harmed, deep=False), "the index alone shows it"


@pytest.mark.parametrize("name", MANIFESTS)
def test_a_manifest_that_is_not_one_is_refused_and_not_repaired(harmed, name):
    harm, told = MANIFESTS[name]
    harm(harmed)
    for use in (problems, forging.stream, forging.repair):
        with pytest.raises(UserError, match=told) as error:
            use(harmed)
        assert error.value.remedy


@pytest.mark.parametrize("field", [{"bytes": 1}, {"lengths": {"800": PER_SHARD}}])
def test_a_record_that_the_tar_belies_is_named_and_repaired(whole, harmed, field):
    manifest_of(lambda m: m["shards"][1].update(field))(harmed)
    (line,) = problems(harmed)
    assert line.startswith(f"shard {SHARD}: its record in manifest.json"), line
    forging.repair(harmed)
    assert bytes_of(harmed) == bytes_of(whole)


@pytest.mark.parametrize("name", sorted(STALE.keys() - {"a directory", "a file more", "renamed"}))
def test_what_is_broken_is_made_again_and_nothing_else(whole, harmed, name):
    STALE[name][0](harmed)
    before = {path.name: path.stat().st_ino for path in harmed.glob("*.tar")}
    broken = {line.split(",")[0].split()[1] for line in problems(harmed) if line.startswith("shard ")}
    forging.repair(harmed)
    assert bytes_of(harmed) == bytes_of(whole)
    again = {path.name for path in harmed.glob("*.tar") if before.get(path.name) != path.stat().st_ino}
    assert again == broken


@pytest.mark.parametrize("name", ["NaN", "another history", "no tokens.npy", "a path upwards"])
def test_forged_shards_are_made_again_too(whole, harmed, name):
    retar(harmed / SHARD, FORGED[name][0])
    forge(harmed)
    forging.repair(harmed)
    assert bytes_of(harmed) == bytes_of(whole)


@pytest.mark.parametrize(
    "content", [PICKLE, OBJECTS, b"PK\x03\x04", b"\x93NUMPY\x01\x00v\x00{"], ids=["pickle", "objects", "zip", "header"]
)
def test_an_index_that_is_a_pickle_or_half_a_header_is_not_run(harmed, content):
    (harmed / INDEX).write_bytes(content)
    refused(harmed, r"samples\.npy ", r"samples\.npy ")
    forging.sign(harmed)
    refused(harmed, r"samples\.npy ", r"samples\.npy ")
    assert not RAN.exists()


def header(text: str) -> bytes:
    padded = text.ljust(-(-(len(text) + 11) // 64) * 64 - 11) + "\n"
    return b"\x93NUMPY\x01\x00" + len(padded).to_bytes(2, "little") + padded.encode()


@pytest.mark.parametrize(
    "text",
    [
        f"{{'descr': '<u4', 'fortran_order': False, 'shape': ({10**30},), }}",
        f"{{'descr': '<u4', 'fortran_order': False, 'shape': ({2**62},), }}",
        "{'descr': [('a',)], 'fortran_order': False, 'shape': (33,), }",
        "{1: 2, 'fortran_order': False, 'shape': (33,), }",
        "-" * 9000 + "1",
        "(" * 9000,
    ],
)
def test_an_index_whose_header_cannot_be_is_named(harmed, text):
    (harmed / INDEX).write_bytes(header(text))
    forging.sign(harmed)
    refused(harmed, r"samples\.npy ", r"samples\.npy ")


def test_an_offset_beyond_every_file_is_named_and_its_sample_counts_as_damaged(harmed):
    index_S = np.load(harmed / INDEX)
    index_S["offset"][PER_SHARD + KEYS.index(KEY)] = 2**63
    np.save(harmed / INDEX, index_S)
    forging.sign(harmed)
    refused(harmed, rf"samples\.npy, .*{KEY}", NAMED)
    assert damaged_samples(index_S, LocalTars(harmed), 1).tolist() == [PER_SHARD + KEYS.index(KEY)]


def test_a_users_own_files_are_named_never_listed_and_never_dropped(tmp_path):
    directory, own = tmp_path / "shards", {"my-backup.tar": b"precious", ".notes": b"mine", "nohup.out": b"log"}
    directory.mkdir()
    for name, content in own.items():
        (directory / name).write_bytes(content)
    manifest = forging.write_honest(directory)
    assert not own.keys() & manifest["files"].keys()
    assert [line.split()[0] for line in problems(directory)] == ["my-backup.tar", "nohup.out"]
    forging.repair(directory)
    assert {name: (directory / name).read_bytes() for name in own} == own


def test_the_payload_would_run():
    pickle.loads(PICKLE)
    assert RAN.exists()
    RAN.unlink()


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_bytes_that_hash_right_are_a_sample_or_refused(whole, data):
    offset, size = place(whole)
    extent = bytearray((whole / SHARD).read_bytes()[offset : offset + size])
    entry = np.load(whole / INDEX)[PER_SHARD + KEYS.index(KEY)].copy()
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(extent) - 1))
        extent[at : at + data.draw(st.integers(0, 8))] = data.draw(st.binary(max_size=8))
    entry["size"], entry["digest"] = len(extent), digest_of(bytes(extent))
    try:
        told = f"shard {SHARD}, sample {read_sample(bytes(extent), entry, SHARD).key}: "
    except UserError as error:
        told = error.problem
    assert re.match(NAMED, told)


@settings(max_examples=40, deadline=None)
@given(at=st.floats(0, 0.999), length=st.integers(0, 600), put=st.binary(max_size=600), signed=st.booleans())
def test_a_tar_changed_anywhere_is_named(whole, tmp_path_factory, at, length, put, signed):
    directory = Path(shutil.copytree(whole, tmp_path_factory.mktemp("any") / "shards"))
    data = bytearray((directory / SHARD).read_bytes())
    begin = int(at * len(data))
    if data[begin : begin + length] == put:
        return
    data[begin : begin + length] = put
    (directory / SHARD).write_bytes(data)
    if signed:
        sealed = forging.sha256_file(directory / SHARD)
        manifest_of(lambda m: (m["shards"][1].update(sha256=sealed), m["files"].update({SHARD: sealed})))(directory)
    assert len(problems(directory)) == 1


@contextmanager
def as_nobody() -> Iterator[None]:
    """Drop root, which may read everything."""
    mine = os.geteuid()
    if mine == 0:
        os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(mine)


@pytest.mark.parametrize("name", [SHARD, INDEX, MANIFEST])
def test_a_file_that_may_not_be_read_is_named(whole, name):
    with tempfile.TemporaryDirectory() as place:  # where others may go; pytest's own is closed to them
        directory = Path(shutil.copytree(whole, Path(place) / "shards"))
        Path(place).chmod(0o755)
        (directory / name).chmod(0)
        with as_nobody():
            if name == MANIFEST:
                with pytest.raises(PermissionError) as refusal:
                    problems(directory)
                assert MANIFEST in str(machine_trouble(refusal.value))
                return
            refused(directory, rf"{name} cannot be read: .*Permission denied", rf"{name} cannot be read: .*Permission")


def test_too_small_a_file_limit_leaves_no_torn_tar(whole, tmp_path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        with pytest.raises(OSError, match="File too large") as refusal:
            forging.write_honest(tmp_path / "shards")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "free space" in str(machine_trouble(refusal.value))
    assert not [path for path in (tmp_path / "shards").iterdir() if path.is_file()]
    forging.write_honest(tmp_path / "shards")
    assert bytes_of(tmp_path / "shards") == bytes_of(whole)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root mounts a small disk")
def test_a_full_disk_keeps_the_whole_tars_and_goes_on_when_there_is_room(whole, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=120k", "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        with pytest.raises(OSError, match="No space left") as refusal:
            forging.write_honest(disk / "shards")
        assert "free space" in str(machine_trouble(refusal.value))
        tars = sorted((disk / "shards").glob("*.tar"))
        assert [path.read_bytes() for path in tars] == [(whole / path.name).read_bytes() for path in tars]
        assert not list((disk / "shards").glob(".*aside*"))
        subprocess.run(["mount", "-o", "remount,size=2m", str(disk)], check=True)
        forging.write_honest(disk / "shards")
        assert bytes_of(disk / "shards") == bytes_of(whole)
    finally:
        subprocess.run(["umount", str(disk)], check=True)


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
def test_a_killed_writing_goes_on_to_the_same_bytes(whole, tmp_path, renames):
    assert kill(forging.write_honest, tmp_path / "shards", renames) == -signal.SIGKILL
    assert not (tmp_path / "shards" / MANIFEST).exists()
    forging.write_honest(tmp_path / "shards")
    assert bytes_of(tmp_path / "shards") == bytes_of(whole)


@pytest.mark.parametrize("renames", [1, 2, 3, 4])
def test_a_killed_repair_is_repaired(whole, harmed, renames):
    swap(harmed)
    assert kill(forging.repair, harmed, renames) == -signal.SIGKILL
    forging.repair(harmed)
    assert bytes_of(harmed) == bytes_of(whole)
