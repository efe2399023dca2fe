"""Write a synthetic interaction log of any size in bounded memory; the same sizes and seed give the same bytes.

    python -m tools.make_log DIR --users 100000 --items 10000 --interactions 1000000 [--seed 0] [--ties 0.3] ...

DIR/interactions/part-00000.parquet ... have user, item, time; DIR/items.parquet has item, title, brand, category.
The options are the fields of `Log`.

Every item belongs to a taste, and popularity follows Zipf's law. A user drifts from one taste to another. An item
either follows from the previous one (each has a few successors, some more likely than others) or is drawn from the
current taste, sometimes from the whole catalogue. So a sequence model, or a model that reads titles, beats popularity.

Users are generated in blocks, each from the seed and the block's position. Memory holds one block, the item ids and
their successors. Letters: U users of a block, I its interactions, F the interactions drawn anew, N items.
"""

import argparse
import time
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from rarec.storage.directories import new_directory
from rarec.storage.files import atomic_write

Ints = npt.NDArray[np.int64]

BLOCK_ROWS, BLOCKS_IN_A_FILE = 1 << 19, 8
SUCCESSORS = 4
WANDER, DRIFT = 0.1, 0.6
"""Shares of the items drawn anew: from the whole catalogue; from the second taste, at the end of a user's log."""
FIRST_TIME, YEAR = 1_420_070_400, 31_536_000
"""Unix time and length of the year in which users start."""
SESSION, AWAY, PAUSE = 0.25, 3 * 86_400, 90
"""Share of interactions that open a session; mean seconds before these, and before the others."""
STUFFS, PLACES, KINDS, MOODS = (
    line.split()
    for line in """\
amber birch cedar coral ember flint heather indigo jade linen maple ochre pearl river slate willow
alpine bay canyon delta fjord garden harbour island lagoon meadow mesa moor orchard prairie reef valley
lamp chair shirt watch bag kettle scarf mirror basket candle clock tray vase rug pillow bowl
bold bright calm classic deep fine gentle light modern plain quiet rustic soft tall warm""".splitlines()
)


@dataclass(frozen=True)
class Log:
    """Size and shape of the log. Shares of rows are exact, except `follow` and `ties`, which are probabilities."""

    users: int = 100_000
    items: int = 10_000
    interactions: int = 1_000_000
    """Rows of the log, including junk."""
    seed: int = 0
    tastes: int = 16
    fewest: int = 5
    """Minimum interactions per user, before junk replaces some."""
    follow: float = 0.5
    """Share of interactions that follow from the previous one."""
    ties: float = 0.1
    """Share of interactions in the same second as the previous one."""
    nulls: float = 0.0
    """Share of rows without a user or without an item."""
    unknown: float = 0.0
    """Share of rows whose item is not in the catalogue."""
    duplicates: float = 0.0
    """Share of rows that repeat another row. Without it, no user has an item twice in one second."""
    shuffled: bool = False
    """Shuffle rows within blocks of half a million instead of sorting them by user and time."""

    def __post_init__(self) -> None:
        if self.users * self.fewest > self.interactions - self.rows(self.duplicates):
            raise ValueError(f"{self.users:,} users with {self.fewest} interactions each need more interactions")
        if not 1 <= self.tastes <= min(len(STUFFS) * len(PLACES), self.items // 2):
            raise ValueError("tastes: from 1 to 256, with two items each at least")
        if self.nulls + self.unknown + 2 * self.duplicates > 1:
            raise ValueError("nulls, unknown and duplicates are more than there are rows")

    def rows(self, share: float) -> int:
        """Convert a share to a number of rows."""
        return round(share * self.interactions)

    def blocks(self) -> Iterator[range]:
        """Yield the users of each block."""
        count = min(self.users, -(-self.interactions // BLOCK_ROWS))
        for block in range(count):
            yield range(self.users * block // count, self.users * (block + 1) // count)

    def part(self, total: int, users: range) -> int:
        """Return a block's part of a total; the parts of all blocks add up to the total."""
        return total * users.stop // self.users - total * users.start // self.users


def zipf_ranks(uniform: npt.NDArray[np.float64], count: int | Ints) -> Ints:
    """Draw ranks below `count` by inverting a power law: the probability of a rank is about 1 / (rank + 1)."""
    drawn = np.exp(uniform * np.log(np.add(count, 1.0)))
    return np.minimum(drawn.astype(np.int64), count) - 1


class Catalogue:
    """The items by popularity rank: rank r has taste r modulo the number of tastes, and a random row of the table."""

    def __init__(self, log: Log) -> None:
        rng = np.random.default_rng([log.seed, 0])
        self.log = log
        self.sizes_of_tastes = (log.items - np.arange(log.tastes) + log.tastes - 1) // log.tastes
        self.rows_N = rng.permutation(log.items)
        self.successors_NK = np.stack([self._another(rng) for _ in range(SUCCESSORS)], axis=1)
        self.ids = pa.array(range(1, log.items + log.items // 10 + 2))
        """Ids by row; those beyond the last item are not in the catalogue."""

    def draw(self, tastes: Ints, rng: np.random.Generator) -> Ints:
        """Draw the rank of an item of each taste, by popularity."""
        return zipf_ranks(rng.random(len(tastes)), self.sizes_of_tastes[tastes]) * self.log.tastes + tastes

    def write(self, path: Path) -> None:
        """Write the item table."""
        ranks_N = np.argsort(self.rows_N)
        with atomic_write(path) as file, pq.ParquetWriter(file, self._table(ranks_N, range(0)).schema) as writer:
            for start in range(0, self.log.items, BLOCK_ROWS):
                writer.write_table(self._table(ranks_N, range(start, min(start + BLOCK_ROWS, self.log.items))))

    def _another(self, rng: np.random.Generator) -> Ints:
        """Return, for each rank, another rank of the same taste."""
        step, ranks_N = self.log.tastes, np.arange(self.log.items)
        others_N = self.draw(ranks_N % step, rng)
        beside_N = np.where(ranks_N + step < self.log.items, ranks_N + step, ranks_N - step)
        return np.where(others_N == ranks_N, beside_N, others_N)

    def _table(self, ranks_N: Ints, rows: range) -> pa.Table:
        titles, brands, kinds = [], [], []
        for row, rank in zip(rows, ranks_N[rows.start : rows.stop].tolist(), strict=True):
            nth, taste = divmod(rank, self.log.tastes)
            stuff, place = STUFFS[taste % 16], PLACES[(taste + taste // 16) % 16]
            kinds.append(KINDS[nth % len(KINDS)])
            brands.append(f"{place} & {stuff}".title())
            titles.append(f"{stuff} {place} {kinds[-1]}, {MOODS[nth % len(MOODS)]}, no. {row + 1}")
        text = {"title": titles, "brand": brands, "category": [f"{kind}s" for kind in kinds]}
        ids = self.ids.slice(rows.start, len(rows))
        return pa.table({"item": ids, **{name: pa.array(values, pa.string()) for name, values in text.items()}})


def lengths_of(log: Log, users: range, rng: np.random.Generator) -> Ints:
    """(U,) Draw the number of interactions of each user: the minimum, plus a long-tailed share of the rest."""
    clean = log.part(log.interactions, users) - log.part(log.rows(log.duplicates), users)
    weights_U = rng.lognormal(size=len(users))
    return log.fewest + rng.multinomial(clean - log.fewest * len(users), weights_U / weights_U.sum())


def ranks_of(catalogue: Catalogue, users_I: Ints, starts_U: Ints, lengths_U: Ints, rng: np.random.Generator) -> Ints:
    """(I,) Draw the items by rank: first those drawn anew, then their successors, link by link."""
    log, total = catalogue.log, len(users_I)
    fresh = rng.random(total + 1) >= log.follow
    fresh[starts_U] = fresh[total] = True  # the last entry, beyond the rows, ends the last chain
    rows_F = np.flatnonzero(fresh[:total])
    users_F = users_I[rows_F]
    share_F = (rows_F - starts_U[users_F]) / lengths_U[users_F]
    second_F = rng.random(len(rows_F)) < DRIFT * share_F
    tastes_2U = rng.integers(log.tastes, size=(2, len(starts_U)))
    ranks_I = np.empty(total, dtype=np.int64)
    ranks_I[rows_F] = catalogue.draw(tastes_2U[second_F.astype(np.int64), users_F], rng)
    wander = rows_F[rng.random(len(rows_F)) < WANDER]
    ranks_I[wander] = zipf_ranks(rng.random(len(wander)), log.items)
    rows = rows_F
    while len(rows := rows[~fresh[rows + 1]] + 1):
        which = (SUCCESSORS * rng.random(len(rows)) ** 2).astype(np.int64)
        ranks_I[rows] = catalogue.successors_NK[ranks_I[rows - 1], which]
    return ranks_I


def times_of(log: Log, ranks_I: Ints, users_I: Ints, starts_U: Ints, rng: np.random.Generator) -> Ints:
    """(I,) Draw non-decreasing Unix seconds per user; an item that already occurs in a second moves to a later one."""
    mean_I = np.where(rng.random(len(ranks_I)) < SESSION, AWAY, PAUSE)
    gaps_I = 1 + (mean_I * rng.standard_exponential(len(ranks_I))).astype(np.int64)
    tied_I = rng.random(len(ranks_I)) < log.ties
    tied_I[starts_U] = False
    rows, back = np.flatnonzero(tied_I), 1
    while len(rows):
        tied_I[rows[ranks_I[rows] == ranks_I[rows - back]]] = False
        rows, back = rows[tied_I[rows - back]], back + 1
    gaps_I[tied_I] = 0
    gaps_I[starts_U] = 0
    passed_I = np.cumsum(gaps_I)
    first_U = FIRST_TIME + rng.integers(YEAR, size=len(starts_U))
    return passed_I + (first_U - passed_I[starts_U])[users_I]


def block_of(catalogue: Catalogue, users: range) -> pa.Table:
    """Generate the interactions of a block, including junk."""
    log = catalogue.log
    rng = np.random.default_rng([log.seed, 1, users.start])
    lengths_U = lengths_of(log, users, rng)
    starts_U = np.cumsum(lengths_U) - lengths_U
    users_I = np.repeat(np.arange(len(users)), lengths_U)
    ranks_I = ranks_of(catalogue, users_I, starts_U, lengths_U, rng)
    times_I = times_of(log, ranks_I, users_I, starts_U, rng)
    nulls, unknown, twice = _chosen(log, users, len(users_I), rng)
    items_I = catalogue.rows_N[ranks_I]
    items_I[unknown] = rng.integers(log.items, len(catalogue.ids), size=len(unknown))
    absent_2I = np.zeros((2, len(users_I)), dtype=bool)
    absent_2I[rng.integers(2, size=len(nulls)), nulls] = True
    rows = np.sort(np.concatenate([np.arange(len(users_I)), twice]))
    if log.shuffled:
        rng.shuffle(rows)
    ids = pa.array([f"u{number:09d}" for number in _scattered(log.users, users)])
    return pa.table(
        {
            "user": ids.take(pa.array(users_I[rows], mask=absent_2I[0, rows])),
            "item": catalogue.ids.take(pa.array(items_I[rows], mask=absent_2I[1, rows])),
            "time": times_I[rows],
        }
    )


def _chosen(log: Log, users: range, rows: int, rng: np.random.Generator) -> list[Ints]:
    """Choose disjoint rows without id, with unknown items, and to be repeated."""
    counts = [log.part(log.rows(share), users) for share in (log.nulls, log.unknown, log.duplicates)]
    chosen = rng.choice(rows, sum(counts), replace=False)
    return np.split(chosen, np.cumsum(counts)[:-1])


def _scattered(count: int, numbers: range) -> Ints:
    """Permute numbers below `count`, so that ids do not rise with the order of rows."""
    step = int(count * 0.618) | 1
    while np.gcd(step, count) > 1:
        step += 2
    return np.arange(numbers.start, numbers.stop) * step % count


def make_log(directory: Path, **settings: Any) -> Log:
    """Write a log and its catalogue; an existing log is replaced once the new one is complete.

    Args:
        directory: directory for `interactions/` and `items.parquet`.
        settings: fields of `Log`.
    """
    log = Log(**settings)
    catalogue = Catalogue(log)
    directory.mkdir(parents=True, exist_ok=True)
    catalogue.write(directory / "items.parquet")
    with new_directory(directory / "interactions") as temporary:
        blocks = list(log.blocks())
        for part, first in enumerate(range(0, len(blocks), BLOCKS_IN_A_FILE)):
            tables = (block_of(catalogue, users) for users in blocks[first : first + BLOCKS_IN_A_FILE])
            _write(temporary / f"part-{part:05d}.parquet", tables)
    return log


def _write(path: Path, tables: Iterator[pa.Table]) -> None:
    """Write one row group per table."""
    table = next(tables)
    with pq.ParquetWriter(path, table.schema) as writer:
        writer.write_table(table, row_group_size=table.num_rows)
        for table in tables:
            writer.write_table(table, row_group_size=table.num_rows)


def main() -> None:
    """Write the log that the command asks for, and print its size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    for field in fields(Log):
        kind = {"action": "store_true"} if field.type is bool else {"type": field.type, "default": field.default}
        parser.add_argument(f"--{field.name.replace('_', '-')}", **kind)
    settings = vars(parser.parse_args())
    directory, started = settings.pop("directory"), time.perf_counter()
    try:
        log = make_log(directory, **settings)
    except ValueError as error:
        parser.error(str(error))
    spent = time.perf_counter() - started
    parts = list((directory / "interactions").iterdir())
    size = sum(part.stat().st_size for part in parts)
    junk = {name: log.rows(getattr(log, name)) for name in ("nulls", "unknown", "duplicates")}
    print(f"{directory}: {log.users:,} users, {log.items:,} items, {log.interactions:,} interactions")
    print("of these rows: " + ", ".join(f"{count:,} {name}" for name, count in junk.items()))
    print(f"{len(parts)} files, {size / 1e6:,.0f} MB, {spent:.1f} s, {log.interactions / spent / 1e6:.2f} M rows/s")


if __name__ == "__main__":
    main()
