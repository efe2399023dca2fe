"""Test shards behind a URL: verified on arrival, in a bounded cache that processes share."""

import multiprocessing
import os
import re
import shutil
from pathlib import Path

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from rarec.data.shards import files as stores
from rarec.data.shards.files import MAX_OPEN, RemoteTars, fetch_description
from rarec.errors import UserError
from rarec.storage.directories import MARKER
from rarec.storage.files import read_json, temporary_path
from tests.shards import open_stream, seal, users, write_shards

SIZES = [6, 3, 9, 5] * 5
LOCK = ".shards.fetch"
"""Beside the shards: the process that holds it fetches. The file stays."""
FORK = multiprocessing.get_context("fork")


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """Shards as they were made, tars and all."""
    directory = tmp_path_factory.mktemp("made")
    write_shards(directory, SIZES, {"item_states.npy": b"some states"})
    return directory


@pytest.fixture(params=["memory", "file"])
def url(request, made, tmp_path) -> str:
    """A copy of them elsewhere."""
    place = f"memory://{tmp_path}/far" if request.param == "memory" else f"file://{tmp_path}/far"
    fs, root = fsspec.core.url_to_fs(place)
    fs.put(str(made), root, recursive=True)
    return place + "/"


def far(url: str) -> tuple[fsspec.AbstractFileSystem, str]:
    return fsspec.core.url_to_fs(url)


def largest(manifest: dict) -> int:
    """The smallest cache that is allowed."""
    return sum(sorted(record["bytes"] for record in manifest["shards"])[-MAX_OPEN:])


def remote(url: str, manifest: dict, cache: Path, most: int | None = None) -> RemoteTars:
    return RemoteTars(url, manifest["shards"], cache, most or largest(manifest))


def cached(cache: Path) -> list[Path]:
    return [path for path in cache.iterdir() if path.is_file() and path.name != MARKER]


def test_all_but_the_tars_is_fetched_once_and_verified(url, made, tmp_path):
    directory = tmp_path / "run" / "shards"
    fetch_description(url, directory)
    fetched = {path.name for path in directory.iterdir()} - {MARKER}
    assert fetched == {"item_states.npy", "manifest.json", "samples.npy"}
    assert read_json(directory / "manifest.json") == read_json(made / "manifest.json")
    fs, root = far(url)
    fs.rm(root, recursive=True)
    fetch_description(url, directory)  # it is there
    assert [path.name for path in (tmp_path / "run").glob(".*")] == [LOCK]


def test_a_remote_epoch_is_the_local_one_within_a_bounded_cache(url, made, tmp_path, monkeypatch):
    manifest, cache, real = read_json(made / "manifest.json"), tmp_path / "cache", stores.read_blocks

    def bounded(url):
        for block in real(url):
            yield block
            assert sum(path.stat().st_size for path in cached(cache)) <= largest(manifest), "while it is fetched too"

    monkeypatch.setattr(stores, "read_blocks", bounded)
    expected = [users(open_stream(made, manifest).epoch(epoch)) for epoch in range(2)]
    stream = open_stream(made, manifest, remote(url, manifest, cache))
    for epoch in range(2):
        batches = []
        for batch in stream.epoch(epoch):
            batches += users([batch])
        assert batches == expected[epoch]
    assert len(cached(cache)) < len(SIZES)


def test_what_is_cached_is_not_fetched_again_and_the_least_recently_opened_goes_first(tmp_path):
    there, cache = tmp_path / "far", tmp_path / "cache"
    manifest = write_shards(there, [4] * 12)
    tars = remote(f"file://{there}", manifest, cache, 9 * manifest["shards"][0]["bytes"])
    for age, shard in enumerate([*range(9), 0]):  # 0 was opened first and last
        tars.open(shard).close()
        os.utime(cache / f"{shard:06d}.tar", (1e9 + age, 1e9 + age))
    tars.open(9).close()
    tars.open(10).close()
    assert {int(path.stem) for path in cached(cache)} == {0, *range(3, 11)}
    shutil.rmtree(there)
    tars.open(0).close()


def test_a_tar_that_goes_while_it_is_read_stays_readable(url, made, tmp_path):
    manifest = read_json(made / "manifest.json")
    tars = remote(url, manifest, tmp_path / "cache")
    with tars.open(3) as file:
        for shard in range(4, len(SIZES)):
            tars.open(shard).close()
        assert not (tmp_path / "cache" / "000003.tar").exists()
        assert file.read() == (made / "000003.tar").read_bytes()


class Flaky(MemoryFileSystem):
    """Gives other bytes, or fails, the first times a file is opened."""

    protocol = "flaky"
    store: dict = {}  # noqa: RUF012  # as in its base
    pseudo_dirs = [""]  # noqa: RUF012
    bad: list[str] = []  # noqa: RUF012
    opened: list[str] = []  # noqa: RUF012

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(path.replace("flaky://", "memory://"))

    def _open(self, path, *arguments, **options):
        self.opened.append(path)
        if self.bad:
            if self.bad.pop() == "reset":
                raise ConnectionResetError("connection reset by peer")
            path = "/far/000000.tar"
        return super()._open(path, *arguments, **options)


@pytest.fixture
def flaky(made) -> str:
    fsspec.register_implementation("flaky", Flaky, clobber=True)
    Flaky.bad, Flaky.opened = [], []
    fsspec.filesystem("flaky").put(str(made), "/far", recursive=True)
    Flaky.opened.clear()
    return "flaky://far"


@pytest.mark.parametrize("trouble", ["reset", "other"])
def test_a_bad_fetch_is_tried_once_more(flaky, made, tmp_path, trouble):
    manifest = read_json(made / "manifest.json")
    tars = remote(flaky, manifest, tmp_path / "cache")
    Flaky.bad = [trouble]
    with tars.open(2) as file:
        assert file.read() == (made / "000002.tar").read_bytes()
    assert Flaky.opened == ["/far/000002.tar"] * 2
    Flaky.bad = [trouble] * 2
    with pytest.raises(UserError, match=r"flaky://far/000005\.tar (cannot be read: Connection|.*manifest)"):
        tars.open(5)
    assert [path.name for path in cached(tmp_path / "cache")] == ["000002.tar"]
    tars.open(5).close()


def test_a_cached_tar_that_went_bad_is_fetched_anew(flaky, made, tmp_path):
    manifest, cache = read_json(made / "manifest.json"), tmp_path / "cache"
    expected = users(open_stream(made, manifest).epoch(0))
    assert users(open_stream(made, manifest, remote(flaky, manifest, cache, 10**9)).epoch(0)) == expected
    path = cache / "000004.tar"
    path.write_bytes(bytes(path.stat().st_size))
    Flaky.opened.clear()
    assert users(open_stream(made, manifest, remote(flaky, manifest, cache, 10**9)).epoch(0)) == expected
    assert Flaky.opened == ["/far/000004.tar"]


def test_a_tar_that_is_missing_or_altered_there_is_refused_by_its_url(url, made, tmp_path):
    manifest = read_json(made / "manifest.json")
    tars = remote(url, manifest, tmp_path / "cache")
    fs, root = far(url)
    fs.rm_file(f"{root}/000001.tar")
    with pytest.raises(UserError, match=r"far/000001\.tar"):
        tars.open(1)
    fs.pipe_file(f"{root}/000002.tar", (made / "000003.tar").read_bytes())
    with pytest.raises(UserError, match=r"far/000002\.tar .*sha256") as error:
        tars.open(2)
    assert "://" in str(error.value)
    assert cached(tmp_path / "cache") == []


def test_a_bad_description_is_refused_and_nothing_is_left(url, made, tmp_path):
    directory, (fs, root) = tmp_path / "run" / "shards", far(url)

    def refused(match: str) -> None:
        with pytest.raises(UserError, match=match):
            fetch_description(url, directory)
        assert not directory.exists()
        assert [path.name for path in directory.parent.iterdir()] == [LOCK]

    fs.pipe_file(f"{root}/item_states.npy", b"other states")
    refused(r"://.*far/item_states\.npy .*sha256")
    fs.rm_file(f"{root}/item_states.npy")
    refused(r"://.*far/item_states\.npy")
    whole = fs.cat_file(f"{root}/manifest.json")
    fs.pipe_file(f"{root}/manifest.json", whole.replace(b"samples.npy", b"samples.mpy"))
    refused(r"://.*far/manifest\.json")
    fs.pipe_file(f"{root}/manifest.json", whole[:100])
    refused(r"://.*far/manifest\.json")
    fs.rm_file(f"{root}/manifest.json")
    refused(r"://.*far/manifest\.json")


@pytest.mark.parametrize("name", ["../stolen", "/tmp/stolen"])
def test_no_file_is_written_outside_the_directory(made, tmp_path, name):
    shutil.copytree(made, tmp_path / "far")
    manifest = read_json(made / "manifest.json")
    manifest["files"][name] = "0" * 64
    seal(tmp_path / "far", manifest)
    with pytest.raises(UserError, match=rf"'{re.escape(name)}'"):
        fetch_description(f"file://{tmp_path}/far", tmp_path / "run" / "shards")


def test_shards_begun_here_are_not_thrown_away(made, tmp_path):
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "000000.tar").write_bytes(b"hours of work")
    with pytest.raises(UserError, match=str(tmp_path / "shards")):
        fetch_description(f"file://{made}", tmp_path / "shards")
    assert (tmp_path / "shards" / "000000.tar").read_bytes() == b"hours of work"


def test_a_store_that_cannot_be_reached_is_refused_by_its_url(tmp_path):
    with pytest.raises(UserError, match=r"nosuch://far/manifest\.json .*ValueError"):
        fetch_description("nosuch://far", tmp_path / "shards")


def test_a_cache_too_small_for_what_is_read_together_is_refused(made, tmp_path):
    manifest = read_json(made / "manifest.json")
    with pytest.raises(UserError, match=r"train\.stream\.cache_gb = \S+ .*8 "):
        remote(f"file://{made}", manifest, tmp_path / "cache", largest(manifest) - 1)


@pytest.mark.usefixtures("locks")
def test_processes_share_a_cache_and_one_killed_while_fetching_harms_nobody(made, tmp_path):
    manifest, cache, url = read_json(made / "manifest.json"), tmp_path / "cache", f"file://{made}"
    expected = [users(open_stream(made, manifest).epoch(epoch)) for epoch in range(3)]
    cache.mkdir()
    incomplete = temporary_path(cache / "000007.tar", "999999")  # of a process that was killed
    incomplete.write_bytes(b"x" * 5000)

    def read(epoch: int) -> None:
        stream = open_stream(made, manifest, remote(url, manifest, cache))
        fetch_description(url, tmp_path / "run" / "shards")
        os._exit(0 if users(stream.epoch(epoch)) == expected[epoch] else 1)

    processes = [FORK.Process(target=read, args=(epoch,)) for epoch in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert not incomplete.exists()
    assert sum(path.stat().st_size for path in cached(cache)) <= largest(manifest)
    assert (tmp_path / "run" / "shards" / "samples.npy").exists()
