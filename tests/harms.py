"""Damage to shards, by name: the change, what verification must report, and what reading must report.

Stale damage leaves the recorded hashes alone; forged damage is followed by `forging.forge`, so that every hash agrees.
Reading reports the same as verification (True), something else (a pattern), or cannot notice (None, False). Patterns
hold the file, the sample and the field, not the wording.
"""

import gzip
import io
import json
import os
import pickle
import tarfile
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np

from rarec.data.shards.index import ENTRY, INDEX
from rarec.data.shards.samples import Sample
from rarec.storage.artefacts import MANIFEST
from rarec.storage.files import read_json, write_json
from tests import forging
from tests.forging import EXPECTED, ITEMS, PER_SHARD, TOTAL, Change, honest, in_all, in_field, member, members_of, retar

SHARD, OTHER = "000001.tar", "000002.tar"
KEYS = EXPECTED.keys(1)
BEFORE, KEY, AFTER, LAST = KEYS[1], KEYS[2], KEYS[3], KEYS[-1]
NAMED = rf"shard \S*{SHARD}, sample {KEY}: "
LOST = "its bytes"
ANY_LOST = rf"shard \S*{SHARD}, sample \S*: {LOST}"
FIRST_MISSING = rf"shard {SHARD}, sample {KEYS[0]}: .*missing"
Harm = Callable[[Path], object]


def place(directory: Path, key: str = KEY) -> tuple[int, int]:
    """Return offset and size of a sample in its tar."""
    with tarfile.open(directory / SHARD) as tar:
        own = [info for info in tar if info.name.startswith(f"{key}.")]
    end = own[-1].offset_data + -(-own[-1].size // 512) * 512
    return own[0].offset, end - own[0].offset


def cut(at: Callable[[int, int], int]) -> Harm:
    """Truncate the tar at a position computed from the offset and size of a sample."""
    return lambda directory: os.truncate(directory / SHARD, at(*place(directory)))


def flip(at: Callable[[int, int], int], name: str = SHARD) -> Harm:
    """Flip one bit of a byte."""

    def harm(directory: Path) -> None:
        data = bytearray((directory / name).read_bytes())
        data[at(*place(directory))] ^= 1
        (directory / name).write_bytes(data)

    return harm


def flip_row(field: str) -> Harm:
    """Flip one bit of a sample's index row."""
    row = PER_SHARD + KEYS.index(KEY)
    return flip(lambda offset, size: -ENTRY.itemsize * (TOTAL - row) + ENTRY.fields[field][1], INDEX)


def swap(directory: Path) -> None:
    (directory / SHARD).rename(directory / "aside")
    (directory / OTHER).rename(directory / SHARD)
    (directory / "aside").rename(directory / OTHER)


def tar(change: Change) -> Harm:
    return lambda directory: retar(directory / SHARD, change)


def instead(name: str, make: Callable[[Path], object]) -> Harm:
    """Replace a file by something else."""

    def harm(directory: Path) -> None:
        (directory / name).unlink()
        make(directory / name)

    return harm


def noise(directory: Path) -> None:
    (directory / SHARD).write_bytes(np.random.default_rng(0).bytes((directory / SHARD).stat().st_size))


def gzipped(directory: Path) -> None:
    (directory / SHARD).write_bytes(gzip.compress((directory / SHARD).read_bytes()))


def without(key: str, field: str = "") -> Change:
    return lambda members: [(i, data) for i, data in members if not i.name.startswith(f"{key}.{field}")]


def turned_round(members: list[forging.Member]) -> list[forging.Member]:
    return sorted(members, key=lambda each: each[0].name.split(".")[0], reverse=True)


def index_of(change: Callable[[np.ndarray], np.ndarray]) -> Harm:
    return lambda directory: np.save(directory / INDEX, change(np.load(directory / INDEX)))


def field(name: str, change: Callable[[bytes], bytes]) -> Change:
    return in_field(KEY, name, change)


def array(name: str, change: Callable[[np.ndarray], np.ndarray]) -> Change:
    """Change the array in a field, to anything that NumPy can save."""
    return field(name, lambda data: npy(change(np.load(io.BytesIO(data)))))


def npy(values: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, values, allow_pickle=True)
    return buffer.getvalue()


def facts(**changes: object) -> Change:
    return field("json", with_facts(**changes))


def with_facts(**changes: object) -> Callable[[bytes], bytes]:
    return lambda data: json.dumps(json.loads(data) | changes).encode()


def arrays(name: str, change: Callable[[np.ndarray], np.ndarray]) -> Change:
    """Change the array in a field of every sample."""
    return in_all(name, lambda data: npy(change(np.load(io.BytesIO(data)))))


def also(*more: forging.Member) -> Change:
    """Append members to the sample."""

    def change(members: list[forging.Member]) -> list[forging.Member]:
        after = max(at for at, (info, _) in enumerate(members) if info.name.startswith(f"{KEY}.")) + 1
        return members[:after] + list(more) + members[after:]

    return change


def another(sample: Sample) -> Change:
    """Store another sample's content under the key."""

    def change(members: list[forging.Member]) -> list[forging.Member]:
        kept = also(*members_of(sample, KEY))(members)
        first = [at for at, (info, _) in enumerate(kept) if info.name.startswith(f"{KEY}.")][: len(sample.fields())]
        return [each for at, each in enumerate(kept) if at not in first]

    return change


def with_value(value: float) -> Callable[[np.ndarray], np.ndarray]:
    def change(values: np.ndarray) -> np.ndarray:
        values.flat[-1] = value
        return values

    return change


def manifest_of(change: Callable[[dict], object]) -> Harm:
    """Change the manifest and update its own hash."""

    def harm(directory: Path) -> None:
        manifest = read_json(directory / MANIFEST)
        change(manifest)
        forging.seal(directory, manifest)

    return harm


def torn(directory: Path) -> None:
    text = (directory / MANIFEST).read_bytes()
    (directory / MANIFEST).write_bytes(text[: len(text) // 2])


def stale_hash(directory: Path) -> None:
    write_json(directory / MANIFEST, read_json(directory / MANIFEST) | {"made_from": {"prepare": "another"}})


class Payload:
    """Create a file when unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.path,)


RAN = Path(tempfile.gettempdir()) / f"rarec-ran-{os.getpid()}"
PICKLE = pickle.dumps(Payload(RAN))
OBJECTS = npy(np.array([Payload(RAN)], object))
TRUE = honest(3, 2)
LEAK = int(EXPECTED.dataset.validation_U[4])
NON_FINITE, BEYOND = "NaN", "catalogue of 30"

STALE: dict[str, tuple[Harm, str, str | None]] = {
    "cut inside a member": (cut(lambda offset, size: offset + 700), NAMED + "it is truncated", ANY_LOST),
    "cut inside a header": (cut(lambda offset, size: offset + 100), NAMED + "it is truncated", ANY_LOST),
    "cut between samples": (cut(lambda offset, size: offset), NAMED + "it is missing", ANY_LOST),
    "cut between members": (cut(lambda offset, size: offset + 1024), NAMED + ".*field json", ANY_LOST),
    "cut before the end mark": (
        lambda directory: os.truncate(directory / SHARD, sum(place(directory, LAST))),
        rf"shard {SHARD}, after its last sample",
        None,
    ),
    "a byte of a name": (flip(lambda offset, size: offset + 3), NAMED + "it is missing", NAMED + LOST),
    "a byte of a header": (flip(lambda offset, size: offset + 1024 + 140), NAMED + ".*field", NAMED + LOST),
    "a byte of the states": (flip(lambda offset, size: offset + 2 * 1024 + 512 + 130), NAMED + LOST, NAMED + LOST),
    "a byte of padding": (flip(lambda offset, size: offset + size - 1), NAMED + LOST, NAMED + LOST),
    "a byte after the end": (flip(lambda *_: -1), rf"shard {SHARD}, after its last sample", None),
    "missing": (lambda d: (d / SHARD).unlink(), rf"shard {SHARD} is missing", rf"{SHARD} is missing"),
    "renamed": (lambda d: (d / SHARD).rename(d / "000009.tar"), rf"shard {SHARD} is missing", rf"{SHARD} is missing"),
    "swapped": (
        swap,
        rf"{SHARD}, sample {EXPECTED.keys(2)[0]}: .*{KEYS[0]}",
        r"\.tar, sample \S*: " + LOST,
    ),
    "a sample more": (
        tar(lambda members: members + members_of(honest(8, 1))),
        rf"shard {SHARD}, sample 000000008-000001: ",
        None,
    ),
    "a sample less": (tar(without(KEY)), rf"shard {SHARD}, sample {AFTER}: .*{KEY}", ANY_LOST),
    "samples turned round": (tar(turned_round), rf"shard {SHARD}, sample {LAST}: .*{KEYS[0]}", ANY_LOST),
    "an empty tar": (tar(lambda members: []), FIRST_MISSING, ANY_LOST),
    "no byte": (instead(SHARD, Path.touch), FIRST_MISSING, ANY_LOST),
    "a directory": (instead(SHARD, Path.mkdir), rf"{SHARD} is missing", SHARD),
    "a pipe": (instead(SHARD, os.mkfifo), rf"{SHARD} is missing", SHARD),
    "noise": (noise, FIRST_MISSING, ANY_LOST),
    "gzipped": (gzipped, FIRST_MISSING, ANY_LOST),
    "a file more": (lambda d: (d / "notes.txt").touch(), r"notes\.txt", None),
    "index: a byte of a digest": (flip_row("digest"), rf"samples\.npy, .*{KEY}", NAMED + LOST),
    "index: a byte of an offset": (flip_row("offset"), rf"samples\.npy, .*{KEY}", NAMED + LOST),
    "index: a byte of a size": (flip_row("size"), rf"samples\.npy, .*{KEY}", NAMED + LOST),
    "index: a byte of a user": (flip_row("user"), rf"samples\.npy, .*{KEY}", f"000000002-000002: .*'{KEY}"),
    "index: a byte of a length": (flip_row("tokens"), rf"samples\.npy, .*{KEY}", NAMED + ".*11 tokens"),
    "index: a byte of a shard": (flip_row("shard"), rf"samples\.npy, row 10: sample {KEY}", rf"row 10: sample {KEY}"),
    "index: missing": (lambda d: (d / INDEX).unlink(), r"samples\.npy is missing", r"samples\.npy is missing"),
    "index: cut": (lambda d: os.truncate(d / INDEX, 500), r"samples\.npy cannot be read", r"samples\.npy cannot be"),
    "index: no byte": (instead(INDEX, Path.touch), r"samples\.npy cannot be read", r"samples\.npy cannot be read"),
    "index: a pipe": (instead(INDEX, os.mkfifo), r"samples\.npy is missing", r"samples\.npy is missing"),
    "index: a row less": (index_of(lambda rows: rows[:-1]), r"samples\.npy .*33 samples", r"samples\.npy .*33 samples"),
    "index: another type": (
        index_of(lambda rows: rows["digest"]),
        r"samples\.npy .*33 samples",
        r"samples\.npy .*33 samples",
    ),
    "index: turned round": (index_of(lambda rows: rows[::-1]), r"samples\.npy, row 0: sample", r"samples\.npy, row 0"),
}

FORGED: dict[str, tuple[Change, str, bool | str]] = {
    **{
        f"no {name}": (without(KEY, name), f"field {name}", True)
        for name in ("history.npy", "json", "states.npy", "tokens.npy", "vector-id.npy")
    },
    "a field more": (also(member(f"{KEY}.txt", b"hello")), "field 'txt'", True),
    "vectors more": (
        also(member(f"{KEY}.vector-x.npy", npy(np.ones((1, 2), "f4")))),
        r"vectors of .*{'id': \(1, 3\), 'x': \(1, 2\)}",
        True,
    ),
    "a .pyd field": (also(member(f"{KEY}.pyd", PICKLE)), "field 'pyd'", True),
    "a .pth field": (also(member(f"{KEY}.pth", PICKLE)), "field 'pth'", True),
    "a pickle": (field("states.npy", lambda data: PICKLE), "field states.npy", True),
    "objects": (field("states.npy", lambda data: OBJECTS), "field states.npy", True),
    "doubles": (
        array("states.npy", lambda a: a.astype("f8")),
        "field states.npy .*float64 .*float16",
        True,
    ),
    "long rows": (array("history.npy", lambda a: a.astype("i8")), "field history.npy .*int64 .*int32", True),
    "big endian": (array("tokens.npy", lambda a: a.astype(">i4")), "field tokens.npy", True),
    "texts": (array("tokens.npy", lambda a: a.astype(str)), "field tokens.npy", True),
    "narrow states": (array("states.npy", lambda a: a[:, :2]), r"field states.npy .*\(2, 2\)", True),
    "rank 1": (array("states.npy", np.ravel), "field states.npy .*rank 1", True),
    "rank 3": (array("vector-id.npy", lambda a: a[None]), "field vector-id.npy .*rank 3", True),
    "rank 0": (array("tokens.npy", lambda a: a[0]), "field tokens.npy .*rank 0", True),
    "columns first": (array("states.npy", np.asfortranarray), "field states.npy", True),
    "a torn array": (field("tokens.npy", lambda data: data[:-4]), "field tokens.npy", True),
    "no bytes": (field("tokens.npy", lambda data: b""), "field tokens.npy", True),
    "a shape that is too large": (
        field("tokens.npy", lambda data: data.replace(b"(11,)", b"(99,)")),
        "field tokens.npy .*44 bytes",
        True,
    ),
    "NaN": (array("states.npy", with_value(np.nan)), "field states.npy .*NaN", NON_FINITE),
    "infinity": (array("states.npy", with_value(-np.inf)), "field states.npy .*NaN", NON_FINITE),
    "NaN in a vector": (array("vector-id.npy", with_value(np.nan)), "field vector-id.npy .*NaN", NON_FINITE),
    "row beyond": (
        array("history.npy", with_value(ITEMS)),
        "field history.npy .*item row 30",
        BEYOND,
    ),
    "row below": (array("history.npy", with_value(-1)), "field history.npy .*item row -1", BEYOND),
    "target beyond": (facts(target=ITEMS), "field json: .*item row 30", BEYOND),
    "another history": (
        array("history.npy", lambda a: (a + 1) % ITEMS),
        "field history.npy",
        False,
    ),
    "a history less": (array("history.npy", lambda a: a[1:]), "field history.npy", False),
    "another target": (facts(target=(TRUE.target + 1) % ITEMS), "field json: the target", False),
    "another sample": (another(honest(3, 3)), "field json .*000000003-000003", True),
    "another user": (facts(user=4), "field json .*000000004-000002", True),
    "a row of no number": (facts(target="7"), "field json: user, position or target", True),
    "a true row": (facts(target=True), "field json: user, position or target", True),
    "a mark beyond": (facts(marks={"id": 12}), "field json: `marks`", True),
    "a mark without vectors": (facts(marks={"x": 1}), "field vector-x.npy", True),
    "garbled json": (field("json", lambda data: data[:-9]), "field json", True),
    "json of bytes": (field("json", lambda data: b"\xff\xfe\x00"), "field json", True),
    "deep json": (field("json", lambda data: b"[" * 200_000), "field json", True),
    "json that is a list": (
        field("json", lambda data: b"[1, 2]"),
        "field json .*marks, position",
        True,
    ),
    "json without a key": (field("json", lambda data: b'{"user": 3}'), "field json", True),
    "a field twice": (also(*members_of(TRUE)[:1]), "field history.npy", True),
    "a path upwards": (also(member("../../evil", b"x")), r"member '\.\./\.\./evil'", True),
    "an absolute path": (also(member("/etc/evil", b"x")), "member '/etc/evil'", True),
    "a path in the prefix": (
        also(member(f"{'../' * 35}{KEY}.json", b"{}")),
        "member ",
        True,
    ),
    **{
        f"a {name}": (also(member(f"{KEY}.txt", type=kind, linkname="/etc/passwd")), "member ", True)
        for name, kind in {
            "symbolic link": tarfile.SYMTYPE,
            "hard link": tarfile.LNKTYPE,
            "device": tarfile.CHRTYPE,
            "fifo": tarfile.FIFOTYPE,
            "directory": tarfile.DIRTYPE,
        }.items()
    },
}


WHOLE_TARS: dict[str, tuple[Change, str]] = {
    "states of fewer blocks": (arrays("states.npy", lambda a: a[:1]), r"field states.npy .*\(1, 4\)"),
    "narrower states": (arrays("states.npy", lambda a: a[:, :2]), r"field states.npy .*\(2, 2\)"),
    "other floats": (arrays("states.npy", lambda a: a.astype("f4")), "field states.npy .*float32 .*float16"),
    "tokens below": (arrays("tokens.npy", lambda a: a * 0 - 1), "field tokens.npy"),
    "tokens beyond": (arrays("tokens.npy", lambda a: a * 0 + 20), "field tokens.npy"),
    "no marks": (in_all("json", with_facts(marks={})), r"field json .*\[\].*\['id'\]"),
    "other vectors": (arrays("vector-id.npy", lambda a: a[:, :2]), r"vectors of .*{'id': \(1, 2\)}"),
}
"""Every sample of a tar is changed in the same way, and every hash agrees."""

REARRANGED: dict[str, tuple[Harm, str, int]] = {
    "a sample again": (
        tar(lambda members: members + members_of(TRUE)),
        NAMED,
        1,
    ),
    "a sample more": (
        tar(lambda members: members + members_of(honest(8, 1))),
        "sample 000000008-000001: ",
        1,
    ),
    "a sample less": (tar(without(KEY)), rf"sample {AFTER}: .*{KEY}", 1),
    "the last sample less": (tar(without(LAST)), rf"{SHARD}, sample {LAST}: .*missing", 1),
    "a validation target": (
        tar(lambda members: members + members_of(honest(4, LEAK))),
        rf"sample 000000004-{LEAK:06d}: .*training interaction",
        1,
    ),
    "a user that is not": (
        tar(lambda members: members + members_of(replace(TRUE, user=99))),
        "sample 000000099-000002: .*training interaction",
        1,
    ),
    "samples turned round": (tar(turned_round), rf"{SHARD}, sample {LAST}: .*{KEYS[0]}", 1),
    "shards swapped": (swap, rf"sample {EXPECTED.keys(2)[0]}: .*{KEYS[0]}", 2),
    "the last shard less": (
        lambda d: (d / "000004.tar").unlink(),
        "000004.tar is missing, .*manifest.json",
        1,
    ),
}


MANIFESTS: dict[str, tuple[Harm, str]] = {
    "torn": (torn, r"manifest\.json "),
    "missing": (lambda d: (d / MANIFEST).unlink(), r"manifest\.json"),
    "no bytes": (instead(MANIFEST, Path.touch), r"manifest\.json "),
    "a list": (instead(MANIFEST, lambda path: path.write_text("[]")), r"manifest\.json "),
    "of another kind": (manifest_of(lambda m: m.update(kind="prepare")), r"manifest\.json .*'prepare', not 'shards'"),
    "of another schema": (manifest_of(lambda m: m.update(schema=99)), r"manifest\.json .*schema 99, .* schema 3"),
    "with a stale hash": (stale_hash, r"manifest\.json "),
    "without shards": (manifest_of(lambda m: m.update(shards=[])), "`shards`"),
    "with shards of the old form": (
        manifest_of(lambda m: m.update(shards=["000000.tar"])),
        f"{'000000.tar'}: its record",
    ),
    "that forgot a record": (manifest_of(lambda m: m["shards"].pop()), "`samples` .*33, .*32"),
    "that forgot a shard": (
        manifest_of(lambda m: m.update(samples=32, shards=m["shards"][:-1])),
        r"000004\.tar .*`files` .*`shards`",
    ),
    "with records turned round": (
        manifest_of(lambda m: m["shards"].reverse()),
        r"000000\.tar: its record .*000004\.tar",
    ),
    "with another hash of a tar": (
        manifest_of(lambda m: m["shards"][1].update(sha256="0" * 64)),
        rf"{SHARD}: its record .*sha256",
    ),
    "with another count": (
        manifest_of(lambda m: m["shards"][1].update(samples=9)),
        rf"{SHARD}: its record .*9 samples .*8 lengths",
    ),
    "with a count that is none": (
        manifest_of(lambda m: m["shards"][1].update(samples="8")),
        rf"{SHARD}: its record .*samples, bytes or lengths",
    ),
    "with a list of lengths": (
        manifest_of(lambda m: m["shards"][1].update(lengths=[8] * 8)),
        rf"{SHARD}: its record .*samples, bytes or lengths",
    ),
    "with a record less its bytes": (
        manifest_of(lambda m: m["shards"][1].pop("bytes")),
        rf"{SHARD}: its record .*fields",
    ),
    "with a hash of none": (
        manifest_of(lambda m: (m["files"].pop(SHARD), m["shards"][1].update(sha256=None))),
        rf"{SHARD}: its record .*sha256",
    ),
    "with files of no hash": (manifest_of(lambda m: m["files"].update({INDEX: None})), "`files`"),
    "with a list of files": (manifest_of(lambda m: m.update(files=list(m["files"]))), "`files`"),
    "with settings of text": (manifest_of(lambda m: m.update(settings="x")), "`settings`"),
    "made from a number": (manifest_of(lambda m: m.update(made_from=3)), "`made_from`"),
    "with an endless number": (instead(MANIFEST, lambda path: path.write_text("9" * 5000)), r"manifest\.json "),
    "nested without end": (instead(MANIFEST, lambda path: path.write_text("[" * 100_000)), r"manifest\.json "),
    "with another total": (manifest_of(lambda m: m.update(samples=40)), "`samples` .*40, .*33"),
}
