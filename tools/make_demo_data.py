"""Cut the demo's slice, `rarec/examples/online_retail`, out of the tables of UCI Online Retail II.

    python -m tools.make_demo_data data/uci-online-retail-2009-2011 rarec/examples/online_retail

TABLES/interactions.parquet holds user_id, item_id and timestamp (seconds), TABLES/items.parquet item_id and title: the
invoices of 2009 to 2011 without rows that name no customer, returns, and codes that are no products. The slice holds
the purchases since 1 December 2010 of every second customer, chosen by a hash of the customer's number. Of a customer
and product the first purchase counts; customers with fewer than 5 products are left out. A customer's purchases of one
minute are shuffled by a hash of customer and product: sorted by product, they would show an order that nobody followed.

The same tables give the same bytes with the same zlib.
"""

import argparse
import csv
import gzip
import hashlib
import io
import math
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from rarec.console.last_resort import guarded
from rarec.errors import UserError
from rarec.storage.files import atomic_write

SINCE = datetime(2010, 12, 1, tzinfo=UTC)
FEWEST_PRODUCTS = 5


def read_table(path: Path, columns: list[str]) -> pa.Table:
    """Read columns of a Parquet file.

    Raises:
        UserError: the file does not exist, is not Parquet, or lacks a column.
    """
    try:
        return pq.read_table(path, columns=columns).select(columns)
    except (OSError, KeyError, pa.ArrowException) as error:
        raise UserError(f"{path}: {error}", f"give Parquet with the columns {', '.join(columns)}") from error


def is_chosen(customer: int) -> bool:
    """Return whether the slice holds a customer: one of two, by the parity of a SHA-256 digest."""
    return hashlib.sha256(str(customer).encode()).digest()[-1] % 2 == 0


def shuffled_place(customer: int, product: str) -> int:
    """Return a number by which a customer's purchases of one minute are sorted."""
    digits = (int(hashlib.md5(str(name).encode()).hexdigest()[:7], 16) for name in (customer, product))
    return math.prod(number + 1 for number in digits) % (2**31 - 1)


def first_purchases(log: pa.Table) -> pa.Table:
    """Return customer, product and time of each chosen customer's first purchase of a product, in time order."""
    customers = [customer for customer in log["user_id"].unique().to_pylist() if is_chosen(customer)]
    chosen = pc.is_in(log["user_id"], pa.array(customers, log["user_id"].type))
    recent = pc.greater_equal(log["timestamp"], int(SINCE.timestamp()))
    first = log.filter(pc.and_(chosen, recent)).group_by(["user_id", "item_id"]).aggregate([("timestamp", "min")])
    sizes = first.group_by("user_id").aggregate([("item_id", "count")])
    kept = sizes.filter(pc.greater_equal(sizes["item_id_count"], FEWEST_PRODUCTS))["user_id"]
    first = first.filter(pc.is_in(first["user_id"], kept)).select(["user_id", "item_id", "timestamp_min"])
    places = map(shuffled_place, first["user_id"].to_pylist(), first["item_id"].to_pylist())
    order = [(name, "ascending") for name in ("timestamp_min", "user_id", "place", "item_id")]
    return first.append_column("place", pa.array(places)).sort_by(order).drop_columns("place")


def csv_bytes(header: list[str], rows: Iterable[Iterable[object]]) -> bytes:
    """Return a CSV table with Unix line ends."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([header, *rows])
    return text.getvalue().encode()


def main() -> None:
    """Read the two tables, write the two of the slice, and print their counts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("tables", "directory"):
        parser.add_argument(name, type=Path)
    given = parser.parse_args()
    log = first_purchases(read_table(given.tables / "interactions.parquet", ["user_id", "item_id", "timestamp"]))
    catalogue = read_table(given.tables / "items.parquet", ["item_id", "title"]).sort_by("item_id")
    items = catalogue.filter(pc.is_in(catalogue["item_id"], log["item_id"].unique()))
    customers, products, seconds = (column.to_pylist() for column in log.itercolumns())
    times = [datetime.fromtimestamp(second, UTC).strftime("%Y-%m-%d %H:%M") for second in seconds]
    files = {
        "interactions.csv.gz": gzip.compress(
            csv_bytes(["customer", "product", "time"], zip(customers, products, times, strict=True)), mtime=0
        ),
        "items.csv": csv_bytes(["product", "title"], zip(*items.to_pydict().values(), strict=True)),
    }
    given.directory.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        with atomic_write(given.directory / name) as file:
            file.write(content)
    users = len(set(customers))
    print(f"{given.directory}: {users:,} customers, {items.num_rows:,} products, {log.num_rows:,} purchases")


if __name__ == "__main__":
    guarded(main)
