"""Are shards what their manifest, their index and the prepared dataset say? One pass over each file, some at a time.

Hashes alone are checked at the speed of the disk, and only a tar that is not as it was written is looked into. To look
into every sample takes several times longer, and finds what was written wrong, whatever the hashes say.

Shape letters: S samples.
"""

from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from rarec.artefacts import MANIFEST
from rarec.data.shards.index import INDEX, Entries, by_shard, key_of, open_index, shard_records, tar_name
from rarec.data.shards.tar_check import Problem, TarCheck
from rarec.data.shards.truth import Truth
from rarec.errors import UserError
from rarec.files import sha256_file


def verify_shards(
    directory: Path, manifest: Mapping[str, Any], truth: Truth, threads: int, deep: bool = False
) -> list[Problem]:
    """What is wrong with a directory of shards: the first thing of each file, by file.

    Args:
        directory: of the shards.
        manifest: theirs, as `read_manifest` read it.
        truth: what they should hold.
        threads: files read at a time.
        deep: look into every sample.

    Raises:
        UserError: the manifest itself is garbled.
    """
    records = shard_records(directory, manifest)
    index, found = _index(directory, manifest)
    if index is not None and _as_written(directory / INDEX, manifest["files"].get(INDEX, "")):
        found += [] if deep else [_stranger(index, truth)]
    else:
        deep = True  # the tars tell which row it is
    indexed = [None] * len(records) if index is None else by_shard(index, records)

    def tar(shard: int) -> Problem | None:
        if not deep and _as_written(directory / tar_name(shard), records[shard]["sha256"]):
            return None
        return TarCheck(directory, records[shard], shard, truth, indexed[shard]).problem()

    def other(name: str) -> Problem | None:
        return _file_problem(directory / name, name, manifest["files"][name])

    with ThreadPoolExecutor(threads) as pool:
        found += pool.map(tar, range(len(records)))
        found += pool.map(other, sorted(set(manifest["files"]) - {record["file"] for record in records}))
    found += _misplaced(directory, manifest, truth)
    first: dict[str, Problem] = {}
    for problem in filter(None, found):
        first.setdefault(problem.file, problem)
    return [first[file] for file in sorted(first)]


def _index(directory: Path, manifest: Mapping[str, Any]) -> tuple[Entries | None, list[Problem | None]]:
    try:
        return open_index(directory, manifest), []
    except UserError as error:
        return None, [Problem(INDEX, error.problem)]


def _stranger(index_S: Entries, truth: Truth) -> Problem | None:
    """An index row of a sample that should not be there."""
    row = truth.stranger(index_S["user"], index_S["position"])
    if row is None:
        return None
    shard, key = tar_name(int(index_S[row]["shard"])), key_of(index_S[row])
    return Problem(INDEX, f"{INDEX}, shard {shard}, sample {key}: it was not selected for this place")


def _file_problem(path: Path, name: str, digest: str) -> Problem | None:
    try:
        if not path.is_file():
            return Problem(name, f"{name} is missing")
        altered = sha256_file(path) != digest
    except OSError as error:
        return Problem(name, f"{name} cannot be read: {error.strerror}")
    return Problem(name, f"{name}: its bytes are not those that were written (sha256 differs)") if altered else None


def _as_written(path: Path, digest: str) -> bool:
    return _file_problem(path, path.name, digest) is None


def _misplaced(directory: Path, manifest: Mapping[str, Any], truth: Truth) -> Iterator[Problem]:
    """Files that the manifest does not know, and shards that it should know."""
    for path in directory.iterdir():
        if path.name not in {*manifest["files"], MANIFEST} and not path.name.startswith("."):
            yield Problem(path.name, f"{path.name} is no part of these shards")
    for name in map(tar_name, range(len(manifest["shards"]), truth.shards)):
        yield Problem(name, f"shard {name} is missing, and {MANIFEST} does not know of it")
