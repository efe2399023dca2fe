"""Build the tables of Amazon Beauty 2014 for `configs/runs/beauty.yaml` from three published files.

    python -m tools.make_beauty Beauty.txt datamaps.json meta_Beauty.json.gz DIR

- `Beauty.txt`: the 5-core log with the numbering of S3-Rec, `data/Beauty.txt` of CIKM2020-S3Rec. A line is a user,
  followed by the user's items in the order of time.
- `datamaps.json`: the ASIN of each item number (`id2item`), `data/beauty/datamaps.json` of RDRec.
- `meta_Beauty.json.gz`: Amazon's product metadata (McAuley Lab, UCSD, 2014; research use), one Python literal per line.
  Only titles are used, with HTML entities resolved; an item may have none.

DIR/interactions.parquet has user_id, item_id, position; DIR/items.parquet has item_id, asin, title.
"""

import argparse
import ast
import gzip
import html
import json
import zlib
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from rarec.console.last_resort import guarded
from rarec.errors import UserError
from rarec.storage.files import atomic_write


@contextmanager
def reading(path: Path, kind: str) -> Iterator[None]:
    """Turn errors in the block into a `UserError` that names the file."""
    try:
        yield
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist", f"{kind}: see --help for its source") from error
    except (OSError, EOFError, zlib.error, ValueError, SyntaxError, LookupError, TypeError) as error:
        raise UserError(f"{path} is not {kind}: {error}", "see --help for its source") from error


def interactions(sequences: Path) -> pa.Table:
    """Read the log; one row per interaction."""
    rows: list[tuple[int, int, int]] = []
    with reading(sequences, "the log of Beauty"), sequences.open() as lines:
        for number, line in enumerate(lines, 1):
            words = line.split()
            if len(words) < 2 or not all(map(str.isdecimal, words)):
                raise ValueError(f"line {number} is not a user number followed by item numbers")
            user, *items = map(int, words)
            rows += [(user, item, position) for position, item in enumerate(items)]
        if not rows:
            raise ValueError("the file is empty")
    names = ("user_id", "item_id", "position")
    columns = (pa.array(column, pa.int64()) for column in zip(*rows, strict=True))
    return pa.table(dict(zip(names, columns, strict=True)))


def asins_of(datamaps: Path) -> dict[int, str]:
    """Read the ASIN of each item number."""
    with reading(datamaps, "the numbering of Beauty's items"):
        named = json.loads(datamaps.read_text())["id2item"]
        return {number: named[str(number)] for number in sorted(map(int, named))}


def titles_of(metadata: Path, asins: Collection[str]) -> dict[str, str]:
    """Read the titles of these products, by ASIN; products without a title are left out."""
    with reading(metadata, "Amazon's metadata of 2014"), gzip.open(metadata, "rt", encoding="utf-8") as lines:
        products = map(ast.literal_eval, lines)
        known = (product for product in products if product["asin"] in asins and product.get("title"))
        return {product["asin"]: html.unescape(product["title"]) for product in known}


def catalogue_of(asins: Mapping[int, str], titles: Mapping[str, str]) -> pa.Table:
    """Return one row per item, sorted by number."""
    title = pa.array(map(titles.get, asins.values()), pa.string())
    return pa.table({"item_id": pa.array(asins, pa.int64()), "asin": list(asins.values()), "title": title})


def main() -> None:
    """Read the three files, write the two tables, and print their sizes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("sequences", "datamaps", "metadata", "directory"):
        parser.add_argument(name, type=Path)
    given = parser.parse_args()
    log, asins = interactions(given.sequences), asins_of(given.datamaps)
    catalogue = catalogue_of(asins, titles_of(given.metadata, set(asins.values())))
    given.directory.mkdir(parents=True, exist_ok=True)
    for name, table in {"interactions": log, "items": catalogue}.items():
        with atomic_write(given.directory / f"{name}.parquet") as file:
            pq.write_table(table, file)
    users = len(log["user_id"].unique())
    print(f"{given.directory}: {users:,} users, {catalogue.num_rows:,} items, {log.num_rows:,} interactions")
    print(f"items without a title: {catalogue['title'].null_count:,}")


if __name__ == "__main__":
    guarded(main)
