"""Test shards: samples survive a round trip, tars depend on the samples alone, the index is correct."""

import hashlib
import tarfile
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st

from rarec.data.selection import select_samples
from rarec.data.shards.files import INDEX, open_index, write_index
from rarec.data.shards.samples import INDEX_ROW, Sample, index_tar, key_of, read_sample, write_tar
from rarec.data.shards.writing import PROGRESS, write_shards
from rarec.entry import open_run
from rarec.errors import UserError
from rarec.stages.shard_content import ShardContent
from rarec.storage.artefacts import read_manifest, write_sealed
from rarec.storage.files import sha256_file
from tests.shards import finish, made_sample


def write(directory: Path, total: int, per_shard: int, writers: int = 2, **more) -> list[dict]:
    make, identity = more.get("make", make_samples), more.get("identity", "one")
    places = [range(total)[at : at + per_shard] for at in range(0, total, per_shard)]
    return write_shards(directory, places, writers, make, identity)


def make_samples(places: range):
    return map(made_sample, places)


def equal(one: Sample, other: Sample) -> bool:
    """To the bit, types included."""
    return one.fields() == other.fields()


def read(directory: Path) -> list[Sample]:
    """Every sample by the index."""
    samples = []
    for entry in np.load(directory / INDEX):
        data = (directory / f"{entry['shard']:06d}.tar").read_bytes()
        samples.append(read_sample(data[int(entry["offset"]) :][: int(entry["size"])], entry, "a tar"))
    return samples


rows = st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=30).map(lambda values: np.array(values, np.int32))


@given(
    user=st.integers(0, 2**32 - 1),
    position=st.integers(1, 2**32 - 1),
    history=rows,
    tokens=rows,
    shape=st.tuples(st.integers(1, 3), st.integers(1, 40)),
    dtype=st.sampled_from(["float16", "float32"]),
    sources=st.lists(st.text(st.characters(codec="ascii", categories=["L", "N"]), min_size=1, max_size=8), unique=True),
    view=st.booleans(),
)
@settings(max_examples=60)
def test_a_sample_comes_back_as_it_was(tmp_path_factory, user, position, history, tokens, shape, dtype, sources, view):
    rng = np.random.default_rng(0)
    states = rng.standard_normal(shape).astype(dtype)
    vectors = {name: rng.standard_normal((2, 5)).astype(np.float32) for name in sources}
    written = Sample(user, position, 7, history, tokens, dict.fromkeys(sources, 1), states, vectors)
    path = tmp_path_factory.mktemp("one") / "a.tar"
    _, (entry,) = write_tar(path, [written], 0)
    extent = path.read_bytes()[: int(entry["size"])]
    back = read_sample(memoryview(extent) if view else extent, entry, "a.tar")
    assert equal(back, written)
    assert key_of(entry) == back.key == written.key


def test_stock_webdataset_reads_the_shards(tmp_path):
    write(tmp_path, 25, 10)
    samples = list(webdataset.WebDataset([str(path) for path in sorted(tmp_path.glob("*.tar"))], shardshuffle=False))
    assert [sample["__key__"] for sample in samples] == [made_sample(number).key for number in range(25)]
    for number, sample in enumerate(samples):
        assert {name: data for name, data in sample.items() if not name.startswith("__")} == made_sample(
            number
        ).fields()
    decoded = next(iter(webdataset.WebDataset(str(tmp_path / "000000.tar"), shardshuffle=False).decode()))
    np.testing.assert_array_equal(decoded["tokens.npy"], made_sample(0).tokens_T)
    assert decoded["json"]["marks"] == {"id": 1}


def test_a_tar_is_what_tarfile_reads(tmp_path):
    record, entries = write_tar(tmp_path / "a.tar", map(made_sample, range(5)), 3)
    with tarfile.open(tmp_path / "a.tar") as tar:
        members = tar.getmembers()
    first = [member for member in members if member.name.endswith(".history.npy")]
    assert [member.offset for member in first] == entries["offset"].tolist()
    assert {member.mtime for member in members} == {0}
    assert record["samples"] == 5
    assert record["bytes"] == (tmp_path / "a.tar").stat().st_size
    assert record["sha256"] == sha256_file(tmp_path / "a.tar")
    assert record["lengths"] == {"8": 1, "16": 3, "24": 1}


def test_the_index_has_place_and_digest_of_each_sample(tmp_path):
    _, entries = write_tar(tmp_path / "a.tar", map(made_sample, range(20)), 3)
    data = (tmp_path / "a.tar").read_bytes()
    for number, entry in enumerate(entries):
        extent = data[int(entry["offset"]) :][: int(entry["size"])]
        assert entry["digest"] == int.from_bytes(hashlib.sha256(extent).digest()[:8], "little")
        assert (entry["shard"], entry["tokens"], entry["user"]) == (3, 7 + number * 7 % 11, number)
    np.testing.assert_array_equal(index_tar(tmp_path / "a.tar", 3), entries)


def test_equal_samples_make_equal_bytes_at_any_time(tmp_path):
    first, _ = write_tar(tmp_path / "a.tar", map(made_sample, range(5)), 0)
    time.sleep(1.1)
    assert write_tar(tmp_path / "b.tar", map(made_sample, range(5)), 0)[0]["sha256"] == first["sha256"]


@pytest.mark.parametrize(("total", "per_shard"), [(40, 10), (41, 10), (3, 10), (7, 1)])
def test_files_do_not_depend_on_the_number_of_writers(tmp_path, total, per_shard):
    kept = {}
    for writers in (1, 2, 5):
        records = write(tmp_path / str(writers), total, per_shard, writers)
        assert [record["samples"] for record in records][:-1] == [per_shard] * (len(records) - 1)
        kept[writers] = (records, {path.name: path.read_bytes() for path in (tmp_path / str(writers)).glob("*.???")})
    assert kept[1] == kept[2] == kept[5]
    assert all(equal(back, made_sample(number)) for number, back in enumerate(read(tmp_path / "2")))


def test_at_most_the_writers_and_one_more_shard_are_in_memory(tmp_path, monkeypatch):
    made, written, most = [0], [0], [0]
    real = write_tar

    def slow(path, samples, shard):
        time.sleep(0.02)
        result = real(path, samples, shard)
        written[0] += 1
        return result

    def make(places):
        made[0] += 1
        most[0] = max(most[0], made[0] - written[0])
        return map(made_sample, places)

    monkeypatch.setattr("rarec.data.shards.writing.write_tar", slow)
    write(tmp_path, 60, 5, 3, make=make)
    assert most[0] == 4


def test_a_stopped_maker_keeps_what_was_made_and_goes_on_there(tmp_path):
    made: list[int] = []

    def make(places: range):
        for number in places:
            if number == 25 and len(made) == 25:
                raise KeyboardInterrupt
            made.append(number)
            yield made_sample(number)

    with pytest.raises(KeyboardInterrupt):
        write(tmp_path, 40, 10, make=make)
    assert sorted(path.name for path in tmp_path.glob("*.tar")) == ["000000.tar", "000001.tar"]
    after = write(tmp_path, 40, 10, make=make)
    assert made == [*range(25), *range(20, 40)]
    assert after == write(tmp_path / "undisturbed", 40, 10)
    assert (tmp_path / INDEX).read_bytes() == (tmp_path / "undisturbed" / INDEX).read_bytes()


def test_a_writer_that_fails_stops_the_maker_and_keeps_the_other_shards(tmp_path, monkeypatch):
    made: list[int] = []
    real, before = write_tar, threading.active_count()

    def failing(path, samples, shard):
        if shard == 2:
            raise OSError(28, "No space left on device")
        return real(path, samples, shard)

    def make(places):
        made.append(places.start)
        return map(made_sample, places)

    monkeypatch.setattr("rarec.data.shards.writing.write_tar", failing)
    with pytest.raises(OSError, match="No space left"):
        write(tmp_path, 400, 10, make=make)
    assert len(made) < 10
    assert threading.active_count() == before
    kept = len(list(tmp_path.glob("*.tar")))
    assert kept >= 2
    monkeypatch.setattr("rarec.data.shards.writing.write_tar", real)
    made.clear()
    write(tmp_path, 400, 10, make=make)
    assert len(made) == 40 - kept


@pytest.mark.parametrize("harm", ["identity", "flip", "cut", "unlink"])
def test_a_finished_tar_is_kept_only_if_it_is_what_this_run_makes(tmp_path, harm):
    whole, made = write(tmp_path, 20, 10), []
    tar = tmp_path / "000000.tar"
    if harm == "flip":
        data = bytearray(tar.read_bytes())
        data[700] ^= 1
        tar.write_bytes(data)
    elif harm == "cut":
        tar.write_bytes(tar.read_bytes()[:5120])
    elif harm == "unlink":
        tar.unlink()

    def make(places):
        made.append(places.start)
        return make_samples(places)

    assert write(tmp_path, 20, 10, identity="other" if harm == "identity" else "one", make=make) == whole
    assert made == ([0, 10] if harm == "identity" else [0])


def test_the_manifest_names_every_file_and_hashes_no_tar_again(tmp_path, monkeypatch):
    records, hashed = write(tmp_path, 25, 10), []
    monkeypatch.setattr(
        "rarec.storage.artefacts.sha256_file", lambda path: hashed.append(path.name) or sha256_file(path)
    )
    manifest = finish(tmp_path, records)
    assert hashed == [INDEX]
    assert manifest["files"] == {path.name: sha256_file(path) for path in tmp_path.iterdir() if path.suffix != ".json"}
    assert manifest == read_manifest(tmp_path, "shards")
    assert (manifest["samples"], manifest["shards"]) == (25, records)


def test_an_index_is_mapped_not_read(tmp_path):
    index = open_index(tmp_path, finish(tmp_path, write(tmp_path, 25, 10)))
    assert isinstance(index, np.memmap)
    assert index.dtype == INDEX_ROW
    assert index["shard"].tolist() == [0] * 10 + [1] * 10 + [2] * 5


def test_an_index_is_written_in_parts(tmp_path):
    whole = np.array([(0, at, 1, 2, 3, 4, 5) for at in range(9)], INDEX_ROW)
    write_index(tmp_path, [whole[:4], whole[4:]], 9)
    np.testing.assert_array_equal(np.load(tmp_path / INDEX), whole)


@pytest.mark.parametrize("leak", ["validation", "no history"])
def test_a_leaking_selection_is_refused_before_anything_is_made(finished, monkeypatch, leak):
    run = open_run(finished, [])
    honest = select_samples(run.dataset, run.config.shards, run.config.run.seed)
    honest.positions[5] = run.dataset.validation_U[honest.user_rows[5]] if leak == "validation" else 0
    monkeypatch.setattr("rarec.stages.shard_content.select_samples", lambda *args: honest)
    with pytest.raises(UserError, match=r"sample 000000\d{3}-\d{6} "):
        ShardContent(run)


@pytest.mark.parametrize("content", ["of another tar", "of another build", "a manifest", "incomplete"])
def test_a_wrong_note_of_progress_costs_only_its_tar(tmp_path, content):
    write(tmp_path, 25, 10)
    note, made = tmp_path / PROGRESS / "000001.json", []
    if content == "of another tar":
        note.write_bytes((tmp_path / PROGRESS / "000002.json").read_bytes())
    elif content == "incomplete":
        note.write_bytes(note.read_bytes()[:-9])
    else:
        write_sealed(note, {"identity": "two"} if content == "of another build" else {"kind": "shards"})
    write(tmp_path, 25, 10, make=lambda places: made.extend(places) or map(made_sample, places))
    assert made == list(range(10, 20))
