"""Make the vectors of items from pictures or texts: a file of vectors, and the list of their ids beside it.

They are made in chunks, each a part of the file (`storage/parts.py`) that is named by what it is made from. So a
command that was killed, or stopped at a picture that cannot be read, resumes there, the picture replaced or not.

Shape letters: C items of a chunk, E dimension.
"""

import os
import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from rarec.config.schema import Items
from rarec.console.progress import track
from rarec.data.engines.duckdb_engine import DuckDBEngine
from rarec.data.preparation.inputs import read_catalogue, table_location
from rarec.errors import UserError
from rarec.storage.artefacts import sha256_json
from rarec.storage.directories import is_there
from rarec.storage.files import atomic_write, write_text
from rarec.storage.parts import Parts, refuse_existing

Encode = Callable[[Sequence[Any]], npt.NDArray[np.float32]]
"""Return the vectors (C, E) of pictures, given by their paths, or of texts."""
PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")
CHUNK = 128
"""Items of a part, and pictures in a forward pass."""


def find_pictures(folder: Path) -> dict[str, Path]:
    """Return the pictures of a folder by item id, the name without the ending; other files are skipped.

    Raises:
        UserError: it is no folder, or has no picture, or two of one item.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder", "name one of pictures, or with --texts the columns of a table")
    pictures: dict[str, Path] = {}
    for path in sorted(folder.glob("[!.]*")):
        if path.suffix.lower() in PICTURES and (other := pictures.setdefault(path.stem, path)) != path:
            raise UserError(f"{other} and {path} are both of item {path.stem!r}", "keep one picture of each item")
    if not pictures:
        raise UserError(f"{folder} has no pictures", f"a picture has its item's id and one of {', '.join(PICTURES)}")
    return pictures


def read_texts(table: str, item: str, columns: Sequence[str], say: Callable[[str], None]) -> dict[str, str]:
    """Return the texts of a catalogue by item id, the columns joined; an item without text is left out.

    Raises:
        UserError: the table cannot be read, lacks a column, or has no text.
    """
    items = Items(path=table, item=item, title=columns[0], text=[*columns[1:]], untitled="")
    with tempfile.TemporaryDirectory(prefix="rarec-") as scratch, closing(DuckDBEngine(Path(scratch))) as engine:
        read, counts = read_catalogue(engine, items, table_location(items, "prepare.items"), lambda line: None)
        rows = (row for batch in engine.batches(read.order_by("line")) for row in batch.to_pylist())
        texts = {str(row["item"]): text for row in rows if (text := f"{row['title']} {row['text']}".strip())}
    if not texts:
        raise UserError(f"{table}: no row has an id and a text in {', '.join(columns)}", "name other columns: --texts")
    say(f"{table}: {len(texts):,} items have a text, of {counts['rows']:,} rows")
    return texts


def make_vectors(content: Mapping[str, Path | str], load: Callable[[], tuple[Encode, str]], out: Path) -> Path:
    """Write the vectors of items to a `.npy` file, and their ids to a file beside it, whose path is returned.

    Args:
        content: picture or text by item id.
        load: load the model; return how it encodes, and a hash of what its vectors depend on.
        out: the file to write.

    Raises:
        UserError: one of the files is there, or another process writes it; a picture cannot be read; an id is no line
            of text; a vector is not finite.
    """
    for item in filter(re.compile("[\r\n\ud800-\udfff]").search, content):
        raise UserError(f"the item id {item!r} is no line of UTF-8 text", "rename that item")
    if out.suffix != ".npy":
        raise UserError(f"--out {out} does not end in .npy", "name a file that does")
    refuse_existing(out)
    lines, ids = "".join(f"{item}\n" for item in content), out.with_suffix(".ids.txt")
    if os.path.lexists(ids) and not (ids.is_file() and ids.read_bytes() == lines.encode()):
        raise is_there(ids)
    encode, identity = load()
    parts, items, names = Parts(out, identity), list(content), []
    with parts.begun():
        for start in track(range(0, len(items), CHUNK), "making vectors"):
            chunk = items[start : start + CHUNK]
            names.append(sha256_json([[item, _mark(content[item])] for item in chunk]))
            if parts.find(names[-1]) is None:
                vectors_CE = encode([content[item] for item in chunk])
                for row in np.flatnonzero(~np.isfinite(vectors_CE).all(1)):
                    raise UserError(
                        f"--model: the vector of {chunk[row]!r} holds NaN or infinity", "take another model"
                    )
                parts.add(names[-1], partial(Path.write_bytes, data=vectors_CE.astype("<f4").tobytes()))
        paths = parts.all(names)
        shape = len(items), sum(path.stat().st_size for path in paths) // 4 // len(items)
        with atomic_write(parts.whole) as file:
            np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": shape})
            for path in paths:
                file.write(path.read_bytes())
        write_text(ids, lines)
        parts.place()
    return ids


def _mark(content: Path | str) -> object:
    """Return what tells a picture or text from another: of a file its name, size and time."""
    if isinstance(content, str):
        return content
    return [content.name, content.stat().st_size, content.stat().st_mtime_ns]
